"""Kernel families: one formula each, its coefficients fitted per chip, library and dtype."""

from __future__ import annotations

from hwmodels.families.attention import ATTENTION_DECODE, ATTENTION_PREFILL
from hwmodels.families.attention_variants import VARIANTS
from hwmodels.families.family import Family
from hwmodels.families.matmul import MATMUL
from hwmodels.families.memory import MEMORY
from hwmodels.families.moe import MOE

FAMILIES: dict[str, Family] = {
    family.name: family for family in (MATMUL, ATTENTION_PREFILL, ATTENTION_DECODE, MOE, MEMORY)
} | {name: variant.family for name, variant in VARIANTS.items()}

__all__ = ["FAMILIES", "VARIANTS", "Family"]
