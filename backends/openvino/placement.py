"""Where OpenVINO's CPU plugin wants Q/DQ pairs."""

from __future__ import annotations

from functools import partial

from optkit.placement import Placement, Row, rows

# What the plugin's convolution applies before it stores: as post-operations of oneDNN, in any number. "Swish" stands for
# x * Sigmoid(x) too, which ONNX has no operator for before opset 24.
ABSORBED = frozenset(
    {
        "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Softplus", "Swish",
        "Tanh",
    }
)  # fmt: skip
_WHY = "OpenVINO's low-precision transformations and the runtime graphs of both spellings (2026.4)"

# With AMX, kernels whose inputs are signed take 3 to 6 % less of a small network's time; without it they take as long.
_CENTRED = 0.125

_Integers = partial(
    Placement, activation="u8", weight="s8", centred=_CENTRED, library="onednn", bias=False, source=_WHY
)

_LINEAR = (Row(op="Gemm", output=False), Row(op="MatMul", output=False, max_rank=2))

# Integers from layer to layer: concatenations and pools run on them too.
# - The convolution in front of a sum adds what the other branch stored, and applies the activation, before it stores: a
#   pair between the two would take that from it.
# - A concatenation copies integers of one grid. Where its operands had their own, kernels of their own would rescale them.
# - What no other layer reads stays float: a pair there gains nothing, and took PP-OCRv4 recognition from 98.8 to 96.1 % of
#   the characters.
DEFAULT = _Integers(
    name="default",
    rows=rows(
        Row(op="Conv", floats=True, absorbs=ABSORBED),
        *_LINEAR,
        Row(op="Add", role="between", absorbs=ABSORBED, into=frozenset({"Conv"})),
        Row(op="Concat", role="between", unify=True, output=False),
        Row(op="MaxPool", role="between"),
        Row(op="AveragePool", role="between"),
        Row(op="GlobalAveragePool", role="between"),
        *(
            Row(op=op, role="between")
            for op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Resize")
        ),
    ),
)

# Pairs in front of convolutions and linear layers alone. Whatever lies between is float and becomes their
# post-operations; the kernel of the layer before stores integers where the next one reads nothing else.
CONV = _Integers(
    name="conv",
    rows=rows(Row(op="Conv", output=False), *_LINEAR),
)

LINEAR = _Integers(
    name="linear",
    rows=rows(*_LINEAR),
)

PLACEMENTS = {p.name: p for p in (DEFAULT, CONV, LINEAR)}
