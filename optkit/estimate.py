"""How long a graph may take on hardware that is not at hand, from the hardware's data sheet; nothing here is a measurement.

The floor is the roofline (``optkit.cost``): a bound that no schedule beats. The range above it is an expectation: rates that
large regular kernels have reached on real devices, and the time from one kernel to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnx_ir.passes.common import InlinePass

from optkit.backends.base import Estimate
from optkit.cost import costs, floor
from optkit.graph import elements, walk
from optkit.inference import at_shapes
from optkit.ops import spec

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.targets import Target

# Shares of the peaks that kernels reach, at best and in small or ragged shapes: an H100 multiplied bf16 matrices of 8192
# at 81 % of its peak and copied at 90 % of its bandwidth. The low ends are expectations without a source.
_COMPUTE = (0.81, 0.30)
_MEMORY = (0.90, 0.50)
# Seconds from one kernel to the next: within a CUDA graph, and launched one by one.
_LAUNCH = (1.0e-6, 5.0e-6)


def estimate(model: ir.Model, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Estimate | None:
    """Floor and range of one run of ``model`` with inputs of ``shapes``.

    Weights that fit the target's last cache may stay there from run to run: the floor does not count their traffic.

    Returns:
        None where the target's peaks are not known, or a size depends on the data.
    """
    if target.bandwidth is None or not target.peak:
        return None
    if model.functions:  # what calls compute counts too
        model = model.clone()
        InlinePass()(model)
    fixed = at_shapes(model, shapes)
    found = costs(fixed)
    needed = found.operations
    if needed is None or any(fmt not in target.peak for fmt in needed):
        return None
    bandwidth = target.bandwidth
    least = floor(fixed, found, target.peak, lambda size: bandwidth)
    if least is None:
        return None
    compute = sum(count / target.peak[fmt] for fmt, count in needed.items())
    memory = max(0, least.bytes - (target.l2 or 0)) / bandwidth
    launched = _launched(fixed)
    between = [_bytes(value) for node in launched for value in node.outputs if value.uses()]
    if None in between:
        return None
    # At best everything between two products is fused into them; at worst each value is written and read again.
    apart = (least.bytes + 2 * sum(size or 0 for size in between)) / bandwidth
    fewest = sum(_is_product(node) for node in launched)
    low = max(compute / _COMPUTE[0], memory / _MEMORY[0], fewest * _LAUNCH[0], _LAUNCH[0])
    high = max(compute / _COMPUTE[1], apart / _MEMORY[1]) + len(launched) * _LAUNCH[1]
    return Estimate(
        floor=max(compute, memory),
        low=low,
        high=max(low, high),
        bound="compute" if compute >= memory else "memory",
        inputs=", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()),
    )


def of_kernel(operations: float, moved: float, fmt: str, target: Target) -> Estimate:
    """Floor and range of one launch of a kernel.

    Args:
        operations: In format ``fmt``, two for a multiply-add.
        moved: Bytes that it has to read and write once; the floor is for cold caches.
        fmt: Whose peak counts.
        target: Its peaks are known.
    """
    assert target.bandwidth is not None
    # A rate that no data sheet gives bounds nothing.
    compute = operations / target.peak[fmt] if fmt in target.peak else 0.0
    memory = moved / target.bandwidth
    return Estimate(
        floor=max(compute, memory),
        low=max(compute / _COMPUTE[0], memory / _MEMORY[0], _LAUNCH[0]),
        high=max(compute / _COMPUTE[1], memory / _MEMORY[1]) + _LAUNCH[1],
        bound="compute" if compute >= memory else "memory",
    )


def _launched(model: ir.Model) -> list[ir.Node]:
    """Nodes that compute floats, but for movements and changes of format, which are part of what reads them."""
    found = []
    for node in walk(model):
        known = spec(node)
        quiet = node.op_type in ("Constant", "Cast") or (
            known is not None and known.family in ("shape", "quant")
        )
        if any(v.dtype is not None and v.dtype.is_floating_point() for v in node.outputs) and not quiet:
            found.append(node)
    return found


def _is_product(node: ir.Node) -> bool:
    known = spec(node)
    return known is not None and known.macs is not None


def _bytes(value: ir.Value) -> int | None:
    count = elements(value.shape)
    return None if count is None or value.dtype is None else math.ceil(count * value.dtype.itemsize)
