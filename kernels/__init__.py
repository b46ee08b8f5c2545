"""The table of fused kernels; empty until the first kernel lands."""

from __future__ import annotations

from optkit.registry import Registry

KERNELS = Registry("kernel", {}, group="optkit.kernels")
