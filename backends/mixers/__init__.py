"""Run the forms of sequence mixers in torch, and count what they did.

`TORCH_MIXERS` holds, for each mixer of `simcore.mixers`, the maker of its inputs and one function
per form. A form that is one kernel of the same arithmetic as another has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from backends.mixers import attention, layers, linear, nonlinear
from backends.mixers.count import Steps, count_matrix_flops, one_thread, tensor_bytes
from backends.mixers.linear import Answer, Sizes, Tensors
from simcore.errors import unknown

Make = Callable[[Sizes, torch.Generator], Tensors]
Run = Callable[[Tensors, Sizes, Steps], Answer]


@dataclass(frozen=True, slots=True)
class TorchMixer:
    """How to draw a mixer's inputs, and its forms as functions of (inputs, sizes, steps)."""

    make: Make
    forms: Mapping[str, Run]


@dataclass(frozen=True, slots=True)
class MixerRun:
    """What one execution gave: output, final state, and what was counted on the way."""

    output: torch.Tensor
    state: tuple[torch.Tensor, ...]
    matrix_flops: int
    serial_steps: int
    state_bytes: int
    input_bytes: int


_LINEAR = {
    "parallel": linear.parallel,
    "chunked": linear.chunked,
    "recurrent": linear.recurrent,
}
_MINIMAL = {
    "parallel": nonlinear.min_parallel,
    "scan": nonlinear.min_scan,
    "recurrent": nonlinear.min_recurrent,
}
_GRU = {"recurrent": nonlinear.gru_recurrent, "newton": nonlinear.newton}

TORCH_MIXERS: dict[str, TorchMixer] = {
    "attention": TorchMixer(
        linear.qkv,
        {
            "parallel": attention.parallel,
            "fused": attention.fused,
            "recurrent": attention.recurrent,
        },
    ),
    "sliding_attention": TorchMixer(
        linear.qkv,
        {
            "parallel": attention.sliding_parallel,
            "chunked": attention.sliding_chunked,
            "recurrent": attention.sliding_recurrent,
        },
    ),
    "aaren": TorchMixer(
        attention.aaren_inputs,
        {
            "parallel": attention.aaren_parallel,
            "scan": attention.aaren_scan,
            "recurrent": attention.aaren_recurrent,
        },
    ),
    "combiner": TorchMixer(
        linear.qkv,
        {"parallel": attention.combiner_parallel, "chunked": attention.combiner_chunked},
    ),
    "combiner_tree": TorchMixer(
        linear.qkv, {"parallel": attention.tree_parallel, "chunked": attention.tree_chunked}
    ),
    "s2_attention": TorchMixer(
        linear.qkv, {"parallel": attention.s2_parallel, "chunked": attention.s2_chunked}
    ),
    "gam": TorchMixer(
        attention.gam_inputs,
        {"parallel": attention.gam_parallel, "recurrent": attention.gam_recurrent},
    ),
    "merging": TorchMixer(layers.merging_inputs, {"parallel": layers.merging}),
    "universal_transformer": TorchMixer(
        layers.halting_inputs, {"parallel": layers.padded, "compacted": layers.compacted}
    ),
    "linear_attention": TorchMixer(linear.no_decay, _LINEAR),
    "retnet": TorchMixer(linear.head_decay, _LINEAR),
    "mamba2": TorchMixer(linear.token_decay, _LINEAR),
    "gla": TorchMixer(linear.vector_decay, _LINEAR),
    "deltanet": TorchMixer(
        linear.with_rates,
        {"chunked": linear.delta_chunked, "recurrent": linear.delta_recurrent},
    ),
    "hydra": TorchMixer(
        linear.token_decay,
        {
            "parallel": linear.quasiseparable,
            "chunked": linear.both_chunked,
            "recurrent": linear.both_recurrent,
        },
    ),
    "s4": TorchMixer(
        linear.s4_inputs, {"parallel": linear.s4_parallel, "recurrent": linear.s4_recurrent}
    ),
    "gru": TorchMixer(nonlinear.network(3, "dense"), _GRU),
    "diagonal_gru": TorchMixer(nonlinear.network(3, "diagonal"), _GRU),
    "lstm": TorchMixer(
        nonlinear.network(4, "heads"),
        {"recurrent": nonlinear.lstm_recurrent, "fused": nonlinear.lstm_fused},
    ),
    "min_gru": TorchMixer(nonlinear.network(2, "none"), _MINIMAL),
    "min_lstm": TorchMixer(nonlinear.network(3, "none"), _MINIMAL),
    "pgn": TorchMixer(
        nonlinear.pgn_inputs,
        {"parallel": nonlinear.pgn_parallel, "recurrent": nonlinear.pgn_recurrent},
    ),
    "plstm": TorchMixer(
        nonlinear.grid_inputs,
        {"scan": nonlinear.grid_scan, "recurrent": nonlinear.grid_recurrent},
    ),
}


def draw_inputs(name: str, sizes: Sizes, seed: int = 0) -> Tensors:
    """Return the inputs that `run_mixer` works on: tensors by name, float64.

    Raises `InputError` for an unknown mixer.
    """
    if name not in TORCH_MIXERS:
        raise unknown("mixer", name, TORCH_MIXERS)
    return TORCH_MIXERS[name].make(sizes, torch.Generator().manual_seed(seed))


def run_mixer(name: str, form: str, sizes: Sizes, seed: int = 0) -> MixerRun:
    """Execute one form in float64 on the CPU at ``sizes`` (whole numbers) and count its work.

    Raises `InputError` for a mixer or form that has no torch function.
    """
    inputs = draw_inputs(name, sizes, seed)
    mixer = TORCH_MIXERS[name]
    if form not in mixer.forms:
        raise unknown(f"executed form of {name}", form, mixer.forms)
    steps = Steps()
    with one_thread():
        (output, state), flops = count_matrix_flops(lambda: mixer.forms[form](inputs, sizes, steps))
    return MixerRun(
        output, state, flops, steps.count, tensor_bytes(state), tensor_bytes(inputs.values())
    )
