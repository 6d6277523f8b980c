"""Formats of weights and cache, from torch_dtype and the quantisation tables."""

from __future__ import annotations

from collections.abc import Callable

from simcore.errors import InputError, unknown
from simcore.hf_config.keys import Config, Fields, flag_of, table_of, text_of, whole_of

DTYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def _storage(config: Config) -> str:
    """The dtype that ``torch_dtype`` or ``dtype`` names; bf16 where the config is silent."""
    inner = table_of(config, "text_config")
    name = text_of(config, "torch_dtype|dtype", text_of(inner, "torch_dtype|dtype", "bfloat16"))
    name = name.removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise unknown("torch_dtype", name, DTYPE_NAMES)
    return DTYPE_NAMES[name]


def _by_bits(table: Config, keys: str, default: int) -> str:
    bits = whole_of(table, keys, default)
    formats = {4: "int4", 8: "int8"}
    if bits not in formats:
        raise InputError(f"{bits}-bit weights are not covered: 4 and 8 bits are.")
    return formats[bits]


def _compressed_tensors(table: Config) -> str:
    """The weight format of the first group of an llm-compressor checkpoint."""
    groups = table_of(table, "config_groups")
    weights = table_of(table_of(groups, next(iter(groups))), "weights") if groups else {}
    if text_of(weights, "type", "int") == "float":
        bits = whole_of(weights, "num_bits", 8)
        size = whole_of(weights, "group_size", 0)
        return "fp8" if bits == 8 else ("mxfp4" if size == 32 else "nvfp4")
    return _by_bits(weights, "num_bits", 8)


def _modelopt(table: Config) -> str:
    name = text_of(table, "quant_algo", "FP8").upper()
    formats = {"FP8": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4", "W4A16_AWQ": "int4"}
    if name not in formats:
        raise unknown("quant_algo", name, formats)
    return formats[name]


QUANTISATIONS: dict[str, Callable[[Config], str]] = {
    "fp8": lambda _: "fp8",
    "fbgemm_fp8": lambda _: "fp8",
    "gptq": lambda table: _by_bits(table, "bits", 4),
    "awq": lambda table: _by_bits(table, "bits|w_bit", 4),
    "bitsandbytes": lambda t: "int4" if flag_of(t, "load_in_4bit|_load_in_4bit", False) else "int8",
    "mxfp4": lambda _: "mxfp4",
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}


def dtype_fields(config: Config) -> Fields:
    """Weights as quantised; arithmetic in fp8 for fp8 weights, else in the unquantised dtype."""
    plain = _storage(config)
    quantised = table_of(config, "quantization_config")
    weights = plain
    if quantised:
        method = text_of(quantised, "quant_method", "")
        if method not in QUANTISATIONS:
            raise unknown("quant_method", method, QUANTISATIONS)
        weights = QUANTISATIONS[method](quantised)
    kv = "bf16" if plain == "fp8" else plain
    return {
        "weights_dtype": weights,
        "kv_dtype": kv,
        "compute_dtype": "fp8" if weights == "fp8" else kv,
    }
