"""Sequence mixers by name: what each of their forms costs, as arrays.

`MIXERS` is the registry; a new mixer is one entry here and its torch forms in `backends.mixers`.
"""

from __future__ import annotations

from simcore.errors import unknown
from simcore.mixers.attention import ATTENTION_MIXERS
from simcore.mixers.linear import LINEAR_MIXERS
from simcore.mixers.mixer import Mixer, MixerCost, Shape
from simcore.mixers.nonlinear import NONLINEAR_MIXERS

__all__ = ["MIXERS", "Mixer", "MixerCost", "Shape", "mixer_cost"]

MIXERS: dict[str, Mixer] = {
    mixer.name: mixer for mixer in (*ATTENTION_MIXERS, *LINEAR_MIXERS, *NONLINEAR_MIXERS)
}


def mixer_cost(name: str, form: str, shape: Shape) -> MixerCost:
    """Return what one form of a mixer costs at a shape (numbers or arrays), forward only.

    Raises `InputError` for an unknown mixer, form or column.
    """
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    return MIXERS[name].cost(form, shape)
