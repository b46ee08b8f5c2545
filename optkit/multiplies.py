"""Multiply-accumulates of a node, whatever its domain, and which operators may have some that nobody counts.

The rows of ``optkit.ops`` are about what can be quantized; here are the operators that only files from elsewhere hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from optkit.graph import attribute, elements
from optkit.microscaling import is_call
from optkit.ops import spec
from optkit.ops.spec import conv_macs, gemm_macs, matmul_macs

_Count = Callable[[ir.Node], int | None]

_MICROSOFT = "com.microsoft"
# Of ONNX Runtime's operators, those that multiply no matrices.
_PLAIN = frozenset(
    {
        "BiasAdd", "BiasGelu", "BiasSplitGelu", "BiasSoftmax", "FastGelu", "Gelu", "QuickGelu", "GroupNorm", "SkipGroupNorm",
        "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
        "EmbedLayerNormalization", "RotaryEmbedding", "GatherBlockQuantized", "QuantizeLinear", "DequantizeLinear",
        "DynamicQuantizeLinear", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearConcat",
        "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearWhere", "NhwcMaxPool", "Trilu", "Unique",
        "ExpandDims", "Pad", "GatherND", "Range", "CDist",
    }
)  # fmt: skip
# Standard operators that compute sums of products without a row here: transforms, a determinant.
_UNKNOWN = frozenset({"DFT", "STFT", "Det"})


def macs(node: ir.Node) -> int | None:
    """Of one run, at the shapes that the graph states; 0 where nothing is known to multiply, None where a size is free."""
    count = _row(node)
    return 0 if count is None else count(node)


def multiplies(node: ir.Node) -> bool:
    """Whether multiply-accumulates of ``node`` are counted."""
    return _row(node) is not None


def uncounted(node: ir.Node) -> bool:
    """Whether nothing is known of what ``node`` multiplies."""
    if multiplies(node) or is_call(node):
        return False
    if node.domain == "":
        return node.op_type in _UNKNOWN or node.op_type == "Einsum"
    return not (node.domain == _MICROSOFT and node.op_type in _PLAIN)


def _row(node: ir.Node) -> _Count | None:
    known = spec(node)
    if known is not None and known.macs is not None:
        return known.macs
    # Of more than two operands, what is least to multiply depends on the order.
    if node.op_type == "Einsum" and len(node.inputs) != 2:
        return None
    return _ROWS.get((node.domain, node.op_type))


def _einsum(node: ir.Node) -> int | None:
    """One for each combination of the labels, but for those that one operand alone has and the output does not: they are summed first."""
    given, _, wanted = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    terms = given.split(",")
    for term, value in zip(terms, node.inputs, strict=False):
        dims = _dims(value)
        if dims is None or len(terms) != 2:
            return None
        before, dots, after = term.partition("...")
        ahead = dims[len(before) : len(dims) - len(after)] if dots else ()
        # Axes that no letter names are matched from the last one on.
        named = [*before, *(f".{len(ahead) - i}" for i in range(len(ahead))), *after]
        for label, size in zip(named, dims, strict=False):
            sizes[label] = max(sizes.get(label, 1), size)
    both = set(terms[0]) & set(terms[1])
    implied = not wanted
    return math.prod(
        n for label, n in sizes.items() if implied or label in both or label in wanted or label[0] == "."
    )


def _attention(node: ir.Node) -> int | None:
    """Scores and values, ``[batch, heads, queries, depth]`` or heads side by side in the last axis; causal ones where they are seen."""
    q, k, v = (_dims(value) for value in node.inputs[:3])
    if q is None or k is None or v is None:
        return None
    past = _dims(node.inputs[4]) if len(node.inputs) > 4 else ()
    if past is None:
        return None
    heads = q[1] if len(q) == 4 else int(str(attribute(node, "q_num_heads", 1)))
    grouped = k[1] if len(k) == 4 else int(str(attribute(node, "kv_num_heads", heads)))
    deep = q[-1] if len(q) == 4 else q[-1] // heads
    wide = v[-1] if len(v) == 4 else v[-1] // max(1, grouped)
    before = past[-2] if past else 0
    return (
        q[0]
        * heads
        * _pairs(q[-2], before + k[-2], before, causal=bool(attribute(node, "is_causal", 0)))
        * (deep + wide)
    )


def _heads(node: ir.Node) -> int | None:
    """MultiHeadAttention and GroupQueryAttention of ONNX Runtime: ``[batch, tokens, hidden]``, keys and values perhaps in it."""
    q = _dims(node.inputs[0])
    k, v = (
        _dims(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else () for i in (1, 2)
    )
    if q is None or k is None or v is None:
        return None
    grouped = node.op_type == "GroupQueryAttention"
    heads = int(str(attribute(node, "num_heads", 1)))
    batch, tokens = q[0], q[1]
    if len(q) == 5:  # [batch, tokens, heads, 3, depth]
        hidden = q[2] * q[4]
    elif k:
        hidden = q[2]
    else:
        hidden = q[2] * heads // (heads + 2 * int(str(attribute(node, "kv_num_heads", heads))))
    at = 3 if grouped else 6
    past = _dims(node.inputs[at]) if len(node.inputs) > at and node.inputs[at] is not None else ()
    if past is None:
        return None
    before = past[-2] if past else 0
    # Keys are [batch, tokens, hidden], or [batch, heads, tokens, depth] of another sequence.
    keys = tokens if not k else k[2] if len(k) == 4 else k[1]
    values = hidden if grouped or len(v) != 3 else v[2]
    causal = grouped or bool(attribute(node, "unidirectional", 0))
    window = int(str(attribute(node, "local_window_size", -1)))
    return batch * _pairs(tokens, before + keys, before, causal=causal, window=window) * (hidden + values)


def _projected(node: ir.Node) -> int | None:
    """Attention of ONNX Runtime: queries, keys and values by one matrix ``[hidden, 3 x width]`` first."""
    x, w = _dims(node.inputs[0]), _dims(node.inputs[1])
    if x is None or w is None:
        return None
    width = w[1] // 3
    pairs = _pairs(x[1], x[1], 0, causal=bool(attribute(node, "unidirectional", 0)))
    return x[0] * (x[1] * math.prod(w) + 2 * pairs * width)


def _pairs(queries: int, keys: int, before: int, *, causal: bool, window: int = -1) -> int:
    """Of a query and a key that it sees, of the last ``window`` at most where that is positive."""
    if not causal:
        return queries * keys
    most = keys if window <= 0 else min(keys, window)
    return sum(min(most, before + i + 1) for i in range(queries))


def _bits(node: ir.Node) -> int | None:
    x, outputs = elements(node.inputs[0].shape if node.inputs[0] is not None else None), attribute(node, "N")
    return None if x is None else x * int(str(outputs))


def _fused_matmul(node: ir.Node) -> int | None:
    out, a = elements(node.outputs[0].shape), _dims(node.inputs[0])
    return None if out is None or a is None else out * a[-2 if attribute(node, "transA", 0) else -1]


def _qlinear_conv(node: ir.Node) -> int | None:
    out, w = elements(node.outputs[0].shape), _dims(node.inputs[3])
    return None if out is None or w is None else out * math.prod(w[1:])


def _dims(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


_ROWS: dict[tuple[str, str], _Count] = {
    ("", "QLinearMatMul"): matmul_macs,
    ("", "QLinearConv"): _qlinear_conv,
    ("", "DeformConv"): conv_macs,
    ("", "Einsum"): _einsum,
    ("", "Attention"): _attention,
    (_MICROSOFT, "Attention"): _projected,
    (_MICROSOFT, "MultiHeadAttention"): _heads,
    (_MICROSOFT, "GroupQueryAttention"): _heads,
    (_MICROSOFT, "MatMulNBits"): _bits,
    (_MICROSOFT, "FusedMatMul"): _fused_matmul,
    (_MICROSOFT, "TransposeMatMul"): _fused_matmul,
    (_MICROSOFT, "FusedGemm"): gemm_macs,
    (_MICROSOFT, "QGemm"): gemm_macs,
    (_MICROSOFT, "GemmFastGelu"): matmul_macs,
    (_MICROSOFT, "MatMulIntegerToFloat"): matmul_macs,
    (_MICROSOFT, "DynamicQuantizeMatMul"): matmul_macs,
    (_MICROSOFT, "FusedConv"): conv_macs,
}
