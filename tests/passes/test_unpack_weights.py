"""``MatMulNBits`` in terms of the standard, held against ONNX Runtime's own kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import constant
from optkit.passes.base import Context
from optkit.passes.cleanup.packed import UnpackWeights
from optkit.targets import target
from optkit.testing import check_pass, parse

_H100 = Context(target=target("h100"))
_COLUMNS = 24


def _packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """``[rows, n]`` small integers, those of a byte side by side, the first in its lowest bits."""
    per = 8 // bits
    filled = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % per))).reshape(len(numbers), -1, per)
    return (filled << (np.arange(per) * bits)).sum(-1).astype(np.uint8)


def _model(
    bits: int = 4, depth: int = 64, block: int = 32, zeros: str = "", bias: bool = False, kind: str = "float",
    more: str = "", groups: np.ndarray | None = None, tail: str = "y = Relu(p)",
) -> ir.Model:  # fmt: skip
    random, dtype = np.random.default_rng(0), {"float": np.float32, "float16": np.float16}[kind]
    blocks, top = -(-depth // block), 1 << bits
    q = random.integers(0, top, (_COLUMNS, blocks * block))
    weights: dict[str, np.ndarray] = {
        "q": _packed(q, bits).reshape(_COLUMNS, blocks, -1),
        "s": random.uniform(0.01, 0.1, (_COLUMNS, blocks)).astype(dtype),
    }
    z = random.integers(0, top, (_COLUMNS, blocks))
    if zeros:
        made = {
            "packed": _packed(z, bits),
            "middle": _packed(np.full_like(z, top // 2), bits),
            "floats": z.astype(dtype),
        }
        weights["z"] = made[zeros] if zeros in made else (z + 0.5).astype(dtype)
    if groups is not None:
        weights["g"] = groups.astype(np.int32)
    if bias:
        weights["b"] = random.normal(size=_COLUMNS).astype(dtype)
    names = ["x", "q", "s", "z" if zeros else "", "g" if groups is not None else "", "b" if bias else ""]
    while not names[-1]:
        names.pop()
    text = (
        f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\ng ({kind}[2, N, {depth}] x) => '
        f"({kind}[2, N, {_COLUMNS}] y) {{\n p = com.microsoft.MatMulNBits <K = {depth}, N = {_COLUMNS}, bits = {bits}, "
        f"block_size = {block}{more}> ({', '.join(names)})\n {tail}\n}}"
    )
    return parse(text, **weights)


def _stored(model: ir.Model) -> list[ir.DataType | None]:
    return [
        v.dtype
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        for v in node.inputs[::2]
        if v is not None
    ]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("bits", "zeros"),
    # ONNX Runtime has no zero points in floats for 8 bits.
    [
        (bits, zeros)
        for bits in (2, 4, 8)
        for zeros in ("", "packed", "floats")
        if (bits, zeros) != (8, "floats")
    ],
)
def test_every_width_and_zero_point_gives_what_onnx_runtime_gives(bits, block, zeros):
    model = check_pass(
        UnpackWeights(),
        _model(bits, 128, block, zeros),
        ops=["DequantizeLinear", "MatMul", "Relu"],
        context=_H100,
    )
    around, above = (
        (ir.DataType.INT8, ir.DataType.UINT8) if bits == 8 else (ir.DataType.INT4, ir.DataType.UINT4)
    )
    assert _stored(model) == ([above, above] if zeros else [around])
    assert not [v for v in model.graph.initializers if v in "qsz"]
    # Behind the product nothing was known.
    assert model.graph[1].outputs[0].shape == ir.Shape([2, "N", _COLUMNS])


def test_zero_points_that_are_all_in_the_middle_are_none():
    assert _stored(check_pass(UnpackWeights(), _model(zeros="middle"), context=_H100)) == [ir.DataType.INT4]


@pytest.mark.parametrize("zeros", ["", "packed"])
@pytest.mark.parametrize("depth", [40, 80, 65])
def test_a_last_block_may_be_shorter(depth, zeros):
    check_pass(UnpackWeights(), _model(depth=depth, zeros=zeros), context=_H100)


def test_a_bias_is_added():
    check_pass(
        UnpackWeights(), _model(bias=True), ops=["DequantizeLinear", "MatMul", "Add", "Relu"], context=_H100
    )


def test_an_output_of_the_graph_keeps_its_name():
    check_pass(UnpackWeights(), _model(tail="y = Identity(p)"), context=_H100)


def test_halves_stay_halves():
    # Weights and sums of 64 products of about 1 are rounded to float16 in an order of their own.
    model = check_pass(
        UnpackWeights(), _model(kind="float16", zeros="packed"), context=_H100, atol=2e-2, rtol=2e-2
    )
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT16


def test_inputs_in_the_order_of_their_groups_are_gathered():
    groups = np.random.default_rng(1).permutation(np.arange(64) // 32)
    check_pass(
        UnpackWeights(),
        _model(groups=groups),
        ops=["Gather", "DequantizeLinear", "MatMul", "Relu"],
        context=_H100,
    )
    check_pass(
        UnpackWeights(),
        _model(groups=np.arange(64) // 32),
        ops=["DequantizeLinear", "MatMul", "Relu"],
        context=_H100,
    )


@pytest.mark.parametrize(
    "model",
    [
        _model(zeros="halves"),
        _model(groups=np.zeros(64)),
        _model(tail="a = Relu(p)\n y = Identity(a)", more=", weight_prepacked = 1"),
    ],
    ids=["zero points between integers", "blocks of other lengths", "packed for a card"],
)  # fmt: skip
def test_what_the_standard_cannot_say_stays(model):
    assert UnpackWeights().run(model, _H100) == []


def test_weights_that_are_computed_stay():
    text = (
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\ng (float[N, 64] x, uint8[24, 2, 16] q, float[24, 2] s) '
        "=> (float[N, 24] y) { y = com.microsoft.MatMulNBits <K = 64, N = 24, bits = 4, block_size = 32> (x, q, s) }"
    )
    assert UnpackWeights().run(parse(text), _H100) == []


def test_onnx_runtime_keeps_its_own_operator():
    check_pass(UnpackWeights(), _model(), ops=["MatMulNBits", "Relu"])


def test_the_dequantized_weights_are_those_that_were_packed():
    model = _model(zeros="packed")
    q, s, z = (constant(model.graph.initializers[k]) for k in "qsz")
    done = check_pass(UnpackWeights(), model, context=_H100)
    w, scale, zero = (constant(v).astype(np.float64) for v in done.graph[0].inputs)
    numbers = np.stack([q & 15, q >> 4], -1).reshape(_COLUMNS, 64).T
    middles = np.stack([z & 15, z >> 4], -1).reshape(_COLUMNS, 2).T
    assert np.array_equal(w, numbers) and np.array_equal(zero, middles) and np.array_equal(scale, s.T)
