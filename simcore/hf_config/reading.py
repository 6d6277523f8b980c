"""From a config to a `ModelSpec`: the registry of families and the entry points."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simcore.errors import InputError, unknown
from simcore.hf_config.dtypes import dtype_fields
from simcore.hf_config.gpt import (
    read_bloom,
    read_falcon,
    read_gpt2,
    read_gpt_neox,
    read_mpt,
    read_opt,
    read_phi,
)
from simcore.hf_config.keys import Config, Fields, text_of
from simcore.hf_config.llama import (
    read_deepseek,
    read_llama,
    read_mistral,
    read_mixtral,
    read_phi3,
    read_qwen2,
    read_qwen2_moe,
    read_qwen3,
    read_qwen3_moe,
)
from simcore.hf_config.others import (
    read_dream,
    read_gemma,
    read_gemma2,
    read_gemma3_text,
    read_gpt_oss,
    read_llada,
    read_llama4_text,
    read_mamba2,
    read_mamba_ssm,
    text_part_of,
)
from simcore.models import ModelSpec, check_model

FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "llama": read_llama,
    "mistral": read_mistral,
    "mixtral": read_mixtral,
    "qwen2": read_qwen2,
    "qwen2_moe": read_qwen2_moe,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
    "deepseek_v2": read_deepseek,
    "deepseek_v3": read_deepseek,
    "kimi_k2": read_deepseek,
    "gpt2": read_gpt2,
    "gpt_neox": read_gpt_neox,
    "opt": read_opt,
    "bloom": read_bloom,
    "falcon": read_falcon,
    "mpt": read_mpt,
    "phi": read_phi,
    "phi3": read_phi3,
    "gemma": read_gemma,
    "gemma2": read_gemma2,
    "gemma3": text_part_of(read_gemma3_text),
    "gemma3_text": read_gemma3_text,
    "mamba2": read_mamba2,
    "mamba_ssm": read_mamba_ssm,
    "llada": read_llada,
    "dream": read_dream,
    "gpt_oss": read_gpt_oss,
    "llama4": text_part_of(read_llama4_text),
    "llama4_text": read_llama4_text,
}


def _family(config: Config) -> str:
    if "model_type" not in config and "ssm_cfg" in config:
        return "mamba_ssm"
    kind = text_of(config, "model_type", "")
    if not kind:
        raise InputError("key 'model_type' is missing: is this the config.json of a network?")
    if kind.lower() not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES)
    return kind.lower()


def from_hf_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return the network that a Hugging Face config describes, under ``name``.

    Raises `InputError` where a key is missing or ill-typed, or the family is not known.
    """
    try:
        if not isinstance(config, Mapping):
            raise InputError(f"expected a table of keys, found {type(config).__name__}.")
        fields = FAMILIES[_family(config)](config) | dtype_fields(config)
        model = ModelSpec(name=name, **fields)
        check_model(model)
    except InputError as error:
        text = str(error).removeprefix(f"model {name[:80]!r}: ")
        raise InputError(f"config of {name[:80]!r}: {text}") from None
    return model


def load_hf_config(path: str | Path) -> ModelSpec:
    """Return the network of a ``config.json`` (or of the folder that holds one).

    It is named after its ``_name_or_path``, else after the folder.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "not readable"
        raise InputError(f"cannot read {str(file)!r}: {reason}: check the path.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{str(file)!r} is not JSON: pass a network's config.json.") from None
    if not isinstance(config, dict):
        raise InputError(f"{str(file)!r} holds no table of keys: pass a network's config.json.")
    given = config.get("_name_or_path")
    name = given if isinstance(given, str) and given else file.resolve().parent.name or file.stem
    return from_hf_config(config, name)
