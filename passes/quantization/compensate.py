"""Weights are rounded one input at a time, and those that follow make up for the error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from optkit.passes.base import Context
from optkit.passes.quantization.rounding import fits, moments_by_window
from optkit.passes.quantization.stored import Site

logger = logging.getLogger(__name__)

# Inputs whose errors are carried to all that follow at once, and the share of the mean diagonal that is added to it.
_BLOCK, _DAMPING = 32, 0.01
_MEMO = "weights of four bits"

# Rounds ``[groups, out]`` weights of one input, given its index.
Nearest = Callable[[int, np.ndarray], np.ndarray]


def compensated(weight: np.ndarray, moments: np.ndarray, nearest: Nearest) -> np.ndarray:
    """``weight`` rounded so that the error of the outputs, and not of the weights, is small.

    Frantar et al., "GPTQ", 2023, arXiv:2210.17323, algorithm 1: inputs in the order of their power, largest first; what
    rounding one does to the outputs is taken out by those that are left. In float64, all groups at once.

    Args:
        weight: ``[groups, out, in]``.
        moments: ``[groups, in, in]``, ``E[x x^T]``.
        nearest: Gives the values that are allowed.

    Returns:
        ``[groups, out, in]`` in float64; values that ``nearest`` gave.
    """
    count = weight.shape[2]
    power = np.einsum("gii->gi", moments)
    order = np.argsort(-power.sum(0), kind="stable")
    w = weight.astype(np.float64)[:, :, order]
    h = moments.astype(np.float64)[:, order][:, :, order]
    places = np.arange(count)
    h[:, places, places] += np.maximum(_DAMPING * power.mean(1, keepdims=True), np.finfo(np.float32).tiny)
    upper = np.linalg.cholesky(np.linalg.inv(h)).swapaxes(1, 2)
    found = np.empty_like(w)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = np.empty((*w.shape[:2], end - start))
        for j in range(start, end):
            found[:, :, j] = nearest(int(order[j]), w[:, :, j])
            error = (w[:, :, j] - found[:, :, j]) / upper[:, j, j, None]
            w[:, :, j:end] -= error[:, :, None] * upper[:, None, j, j:end]
            errors[:, :, j - start] = error
        w[:, :, end:] -= errors @ upper[:, start:end, end:]
    return found[:, :, np.argsort(order)]


def observed(
    model: ir.Model, sites: Sequence[Site], context: Context
) -> Iterator[tuple[Site, np.ndarray | None]]:
    """Each site with the second moments of what it multiplies; None where they are not known.

    They are those of the graph as it was before the first pass that asks, so that the order in which passes share the
    weights does not matter. Without data none are known.
    """
    kept = context.memo.setdefault(_MEMO, {})
    if "graph" not in kept:
        # Shares all tensors.
        kept["graph"] = model.clone()
    plain: ir.Model = kept["graph"]
    if context.data is None and sites:
        logger.warning("without calibration data weights are rounded to the nearest value")
        yield from ((site, None) for site in sites)
    if context.data is None or not sites:
        return
    nodes = {str(n.name): n for n in plain.graph}
    owners: dict[ir.Node, Site] = {}
    for site in sites:
        node = nodes.get(str(site.node.name))
        if node is None or len(tuple(site.value.uses())) != 1 or not _is_product(node) or not fits(node):
            yield site, None
        else:
            owners[node] = site
    for window in moments_by_window(plain, list(owners), context):
        yield from ((owners[node], moments) for node, moments in window.items())


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "Gemm", "MatMul") and node.inputs[0] is not None


def remembered(context: Context, key: tuple[object, ...]) -> dict[str, tuple[np.ndarray, ...]]:
    """What was found for weights by their names, with the options ``key``; a graph of another start has another memo."""
    kept: dict[object, dict[str, tuple[np.ndarray, ...]]] = context.memo.setdefault(_MEMO, {})
    return kept.setdefault(key, {})
