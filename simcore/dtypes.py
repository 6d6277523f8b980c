"""Bytes of one element, per numeric format."""

from __future__ import annotations

from simcore.errors import unknown

# Block formats count their shared scales: OCP MX v1.0 (one 8-bit scale per 32 elements),
# NVFP4 (one fp8 scale per 16 elements, NVIDIA Blackwell white paper 2025).
DTYPE_BYTES: dict[str, float] = {
    "fp64": 8.0,
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4 / 128**2,  # one fp32 scale per 128 x 128 weights (DeepSeek-V3, 2024)
    "int8": 1.0,
    "uint8": 1.0,
    "int4": 0.5,
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
    "int32": 4.0,
    "int64": 8.0,
    "bool": 1.0,
}


def dtype_bytes(dtype: str) -> float:
    """Return the bytes of one element of ``dtype``."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise unknown("dtype", dtype, DTYPE_BYTES) from None
