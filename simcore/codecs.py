"""Codecs: gradients and boundary activations sent in 8 bits, with a scale for every block of them.

A codec is a table of levels in [-1, 1]: each value is divided by the largest magnitude of its block
and becomes the number of the nearest level. What is summed over ranks is coded twice, as in ZeRO++
(Wang et al. 2023): every rank sends each other one its coded part, sums the decoded parts that
came, and sends the coded sum to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simcore.errors import InputError, unknown
from simcore.ops import Buffer, Op, Size
from simcore.strategy import ParallelStrategy

BLOCK = 2048  # values that share a scale (Dettmers et al. 2022, block-wise quantisation)
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Codec:
    """Levels in rising order, and the arithmetic per value of finding the nearest one."""

    levels: tuple[float, ...]
    vector_flops: float

    @property
    def error(self) -> float:
        """The largest error of a value, over the largest magnitude of its block."""
        gaps = [b - a for a, b in zip(self.levels, self.levels[1:], strict=False)]
        return max(max(gaps) / 2, 1 - self.levels[-1], 1 + self.levels[0])


def _linear() -> tuple[float, ...]:
    """Return 255 equal steps."""
    return tuple(i / 127 for i in range(-127, 128))


def _dynamic() -> tuple[float, ...]:
    """Return the dynamic tree of Dettmers (2016, 8-bit approximations for parallelism).

    Of the 7 bits beside the sign, i leading zeros are a decimal exponent of -i; the bits behind the
    first 1 divide [0.1, 1] evenly and stand for the middle of their part.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        parts = 2 ** (6 - exponent)
        for part in range(parts):
            value = 10.0**-exponent * (0.1 + 0.9 * (part + 0.5) / parts)
            found += [value, -value]
    return tuple(sorted(found))


def _fp8() -> tuple[float, ...]:
    """Return the finite values of E4M3, over their largest (Micikevicius et al. 2022)."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    values = sorted(v / 448 for v in (small + normal)[:-1])  # the last code is not a number
    return tuple(-v for v in reversed(values[1:])) + tuple(values)


CODECS: dict[str, Codec] = {
    # Scale, round and clamp; a table of 256 levels is searched in 8 comparisons.
    "int8": Codec(_linear(), 4),
    "fp8": Codec(_fp8(), 4),
    "dynamic8": Codec(_dynamic(), 12),
}


def coded_bytes(elements: Size) -> Size:
    """Return the bytes of so many coded values: one each, and the scales of their blocks."""
    return elements + SCALE_BYTES * -(-elements // BLOCK)


def check_codecs(parallel: ParallelStrategy, *, replicas: bool, summed: bool) -> None:
    """Raise `InputError` where codecs are unknown or do not fit the strategy.

    ``replicas``: gradients are sharded within replicas and summed over these too; ``summed``: they
    are summed between pipeline ranks as well.
    """
    for key in ("grad_codec", "act_codec"):
        name = getattr(parallel, key)
        if name != "none" and name not in CODECS:
            raise unknown(key, name, ("none", *CODECS))
    if parallel.error_feedback and parallel.grad_codec == "none":
        raise InputError(
            "[parallel].error_feedback goes with a grad_codec: set one, or leave it out."
        )
    if parallel.act_codec != "none" and parallel.pp == 1:
        raise InputError(
            "[parallel].act_codec codes what pipeline stages exchange: leave it out where pp is 1."
        )
    if parallel.grad_codec == "none":
        return
    if parallel.dp * parallel.cp == 1:
        raise InputError(
            "[parallel].grad_codec codes gradients that ranks sum: leave it out where dp and cp "
            "are 1."
        )
    if replicas:
        raise InputError(
            "[parallel].grad_codec codes one sum over all data ranks, not one within replicas and "
            "another between them: set dp_replicate or dp_shard to 1, or zero_stage below 3."
        )
    if summed:
        raise InputError(
            "[parallel].grad_codec does not go with gradients that pipeline ranks sum: choose "
            "a model without tied embeddings and a schedule with one copy of the network."
        )


@dataclass(frozen=True, slots=True)
class CodedSum:
    """The ops of a coded sum of gradients, by when they run.

    ``reduce`` after the backward of the unit, ``settle`` when its parts have had time to arrive,
    ``step`` before the optimizer.
    """

    reduce: tuple[Op, ...] = ()
    settle: tuple[Op, ...] = ()
    step: tuple[Op, ...] = ()


def coded_sum(
    buffers: dict[str, Buffer],
    unit: str,
    part: str,
    ranks: tuple[str, int],
    codec: str,
    *,
    feedback: bool,
) -> CodedSum:
    """Return the sum of ``{unit}.g`` over ``ranks`` (group, degree), and declare its buffers.

    ``part``: the buffer that gets this rank's share of the sum; "" where every rank needs it all.
    ``feedback``: what coding loses is added to the next step's gradients (Seide et al. 2014).
    """
    (group, degree), grads = ranks, buffers[f"{unit}.g"]
    each = -(-grads.elements // degree)
    size, dtype, layered = coded_bytes(each), grads.dtype, grads.layered
    attrs = {"codec": codec, "coded": size, "flops": CODECS[codec].vector_flops}

    def held(name: str, elements: Size, kind: str, scope: str) -> str:
        buffers[f"{unit}.{name}"] = Buffer((elements,), kind, scope, layered, init="zeros")
        return f"{unit}.{name}"

    def coder(source: str, target: str, pieces: int, elements: Size) -> Op:
        lost = (held(f"{target}.lost", elements, dtype, "state"),) if feedback else ()
        code = held(target, pieces * size, "uint8", "work")
        dims = {"t": pieces, "n": each}
        return Op("encode", dims, dtype, (source, *lost), (code, *lost), attrs=attrs)

    def decoder(source: str, target: str, *, summed: bool) -> Op:
        shape = tuple(buffers[target].dims)
        more = {"summed": summed, "shape": shape}
        return Op(
            "decode", {"t": degree, "n": each}, dtype, (source,), (target,), attrs=attrs | more
        )

    def exchange(kind: str, source: str, target: str) -> Op:
        return Op(kind, {"n": degree * size}, "uint8", (source,), (target,), "dp", group)

    out = coder(f"{unit}.g", "sent", degree, grads.elements)
    came = held("came", degree * size, "uint8", "work")
    reduce = (out, exchange("all_to_all", out.writes[0], came))
    if part:
        return CodedSum(reduce, (decoder(came, part, summed=True),))
    mine = held("part", each, dtype, "work")
    total = coder(mine, "sum", 1, each)
    everything = held("sums", degree * size, "uint8", "grad")  # until the optimizer comes
    return CodedSum(
        reduce,
        (
            decoder(came, mine, summed=True),
            total,
            exchange("all_gather", total.writes[0], everything),
        ),
        (decoder(everything, f"{unit}.g", summed=False),),
    )


def coded_boundary(buffers: dict[str, Buffer], name: str, codec: str) -> Mapping[str, Op]:
    """Return the ops that pack buffer ``name`` into ``{name}.code`` and unpack it."""
    plain = buffers[name]
    size = coded_bytes(plain.elements)
    code = f"{name}.code"
    buffers[code] = Buffer((size,), "uint8", "act", plain.layered)
    dims = {"t": 1, "n": plain.elements}
    attrs = {"codec": codec, "coded": size, "flops": CODECS[codec].vector_flops}
    back = attrs | {"summed": False, "shape": tuple(plain.dims)}
    return {
        "pack": Op("encode", dims, plain.dtype, (name,), (code,), attrs=attrs),
        "unpack": Op("decode", dims, plain.dtype, (code,), (name,), attrs=back),
    }
