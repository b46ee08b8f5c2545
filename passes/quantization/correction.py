"""Bias correction: what rounding the weights adds to the mean of each output channel is taken out of the bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute


def shift_of(node: ir.Node, error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """What weights that are off by ``error`` add to the outputs of ``node`` on average.

    ``E[e x] = e E[x]``, summed over all that an output channel reads (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019, arXiv:1906.04721, eq. 17). Padding of a convolution counts as if it had the
    mean too.

    Args:
        node: Conv, Gemm, or MatMul with a matrix.
        error: Rounded weights less the weights, in the layout of the node's weights.
        mean: ``[input channels]`` mean of what the node reads.

    Returns:
        ``[output channels]`` in float64.
    """
    error = error.astype(np.float64)
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        taps = error.reshape(group, len(error) // group, error.shape[1], -1).sum(-1)
        return np.asarray(np.einsum("goi,gi->go", taps, mean.reshape(group, -1))).reshape(-1)
    matrix = error.T if attribute(node, "transB", 0) else error
    return np.asarray(mean @ matrix)
