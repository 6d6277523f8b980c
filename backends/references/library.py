"""The tensor library, by name, for checks that hold small executions against plain arithmetic."""

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint", "torch"]
