"""Counting what torch really does: sequential steps, kernels, FLOPs of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


@dataclass
class Steps:
    """Counts the iterations that have to wait for the one before."""

    count: int = 0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items of a dependent loop, counting them."""
        for item in items:
            self.count += 1
            yield item

    def tick(self) -> None:
        """Count one dependent step outside a loop."""
        self.count += 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: waking more costs more than these small tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class KernelCounter(TorchDispatchMode):
    """Counts the operations that compute, views left out: on a GPU each is one kernel or more."""

    kernels: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = str(func)
        if not view and not name.startswith(("aten.empty", "aten.new_empty")):
            self.kernels += 1
        return func(*args, **(kwargs or {}))


def count_kernels(call: Callable[[], Any]) -> int:
    """Return how many computing operations ``call`` dispatches, those of autograd included."""
    counter = KernelCounter()  # type: ignore[no-untyped-call]
    with one_thread(), counter:
        call()
    return counter.kernels


def count_matrix_flops(call: Callable[[], T]) -> tuple[T, int]:
    """Return what ``call`` returns and the FLOPs of its matrix products, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the elements of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
