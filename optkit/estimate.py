"""How long a kernel may take on hardware that is not at hand, from the hardware's data sheet; nothing here is a measurement.

The floor is the roofline: a bound that no schedule beats. The range above it is an expectation: rates that large regular kernels
have reached on real devices, and the time from one kernel to the next. Whole graphs: ``optkit.planning``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.backends.base import Estimate

if TYPE_CHECKING:
    from optkit.targets import Target

# Shares of the peaks that kernels reach, at best and in small or ragged shapes: an H100 multiplied bf16 matrices of 8192
# at 81 % of its peak and copied at 90 % of its bandwidth. The low ends are expectations without a source.
_COMPUTE = (0.81, 0.30)
_MEMORY = (0.90, 0.50)
# Seconds from one kernel to the next: within a CUDA graph, and launched one by one.
_LAUNCH = (1.0e-6, 5.0e-6)


def expected(compute: float, memory: float, launches: int) -> tuple[float, float]:
    """Seconds, the optimistic and the pessimistic end, of what takes ``compute`` and ``memory`` at the target's peaks."""
    low = max(compute / _COMPUTE[0], memory / _MEMORY[0], launches * _LAUNCH[0])
    return low, max(compute / _COMPUTE[1], memory / _MEMORY[1]) + launches * _LAUNCH[1]


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
    low, high = expected(compute, memory, 1)
    bound = "compute" if compute >= memory else "memory"
    return Estimate(floor=max(compute, memory), low=low, high=high, bound=bound)
