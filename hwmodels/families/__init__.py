"""Kernel families: one formula each, its coefficients fitted per chip, library and dtype."""

from __future__ import annotations

from hwmodels.families.attention import ATTENTION_DECODE, ATTENTION_PREFILL
from hwmodels.families.family import Family
from hwmodels.families.matmul import MATMUL
from hwmodels.families.moe import MOE

FAMILIES: dict[str, Family] = {
    family.name: family for family in (MATMUL, ATTENTION_PREFILL, ATTENTION_DECODE, MOE)
}
