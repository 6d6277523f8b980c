"""Whether two ways of computing one function agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ABSOLUTE = 1e-9  # float64 sums of some hundred terms of order one, in another order


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], atol: float = ABSOLUTE) -> bool:
    """Return whether two lists of tensors agree to ``atol``, one by one."""
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(found, wanted, strict=True))
