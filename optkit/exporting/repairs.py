"""What is changed for the time of tracing, because torch cannot trace it as it is; the numbers stay the same.

Each repair is a context manager over the module; a row in ``REPAIRS`` is what adding one takes. What it did is undone
afterwards, and the result is compared with the module as it was.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from optkit.exporting.durations import vectorized
from optkit.exporting.patches import in_place
from optkit.exporting.recurrent import symbolic
from optkit.exporting.rows import whole_rows
from optkit.exporting.shadowing import shadowed
from optkit.exporting.state_space import selective_scan


@contextlib.contextmanager
def _recurrent(module: torch.nn.Module) -> Iterator[None]:
    """Lengths of recurrent layers stay free."""
    with symbolic():
        yield


@contextlib.contextmanager
def _experts(module: torch.nn.Module) -> Iterator[None]:
    """Mixtures of experts of transformers run as batched products: their grouped kernel is no operator of ONNX."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_experts_implementation"):
            configs[id(config)] = config
    old = [(c, c._experts_implementation) for c in configs.values()]
    try:
        for config, _ in old:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, value in old:
            config._experts_implementation = value


@contextlib.contextmanager
def _integer_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Integers kept as buffers of no axis, such as paddings, are numbers: a branch on them is then no branch on data."""
    taken: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
    for owner in module.modules():
        for name, buffer in tuple(owner._buffers.items()):
            if (
                buffer is not None
                and buffer.ndim == 0
                and not buffer.is_floating_point()
                and name != "num_batches_tracked"
            ):
                taken.append((owner, name, buffer))
    try:
        for owner, name, buffer in taken:
            del owner._buffers[name]
            object.__setattr__(owner, name, int(buffer))
        yield
    finally:
        for owner, name, buffer in taken:
            owner.__dict__.pop(name, None)
            owner._buffers[name] = buffer


@contextlib.contextmanager
def _lengths(module: torch.nn.Module) -> Iterator[None]:
    """``len(tensor)`` keeps the axis free: Python's own makes a number of it."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else builtins.len(value)

    with shadowed(module, "len", length):
        yield


@contextlib.contextmanager
def _causal_padding(module: torch.nn.Module) -> Iterator[None]:
    """What codecs add behind a signal so that its last window is full: in integers, where theirs goes through a tensor."""
    name = "_get_extra_padding_for_conv1d"
    found = [m for m in module.modules() if hasattr(type(m), name) and hasattr(m, "padding_total")]

    def extra(owner: Any) -> Callable[[Any], Any]:
        kernel, stride, total = int(owner.kernel_size), int(owner.stride), int(owner.padding_total)

        def count(hidden_states: Any) -> Any:
            length = hidden_states.shape[-1]
            # Rounded up without negative numbers, which ONNX divides another way.
            return (length - kernel + total + stride - 1) // stride * stride + kernel - total - length

        return count

    try:
        for owner in found:
            owner.__dict__[name] = extra(owner)
        yield
    finally:
        for owner in found:
            owner.__dict__.pop(name, None)


REPAIRS: dict[str, Callable[[torch.nn.Module], contextlib.AbstractContextManager[None]]] = {
    "recurrent": _recurrent,
    "experts": _experts,
    "integer-buffers": _integer_buffers,
    "lengths": _lengths,
    "causal-padding": _causal_padding,
    "selective-scan": selective_scan,
    "durations": vectorized,
    "patches": in_place,
}


# For what cannot be traced otherwise: rows that are used as more than an argument of ``torch.cat`` cannot be traced so.
LAST: dict[str, Callable[[torch.nn.Module], contextlib.AbstractContextManager[None]]] = {"rows": whole_rows}


@contextlib.contextmanager
def repaired(module: torch.nn.Module, *, last: bool = False) -> Iterator[None]:
    """All repairs at once, undone in the end; ``last`` adds those of ``LAST``."""
    with contextlib.ExitStack() as stack:
        for repair in (*REPAIRS.values(), *(LAST.values() if last else ())):
            stack.enter_context(repair(module))
        yield
