"""Saturation in 16 bits, emulated as a graph, against a slow int16 loop and what ONNX Runtime gave on such a processor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.reference import ReferenceSession
from optkit.saturation import SAFE, emulate, pairs_at_risk, products, saturated
from optkit.testing import parse

MATMUL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[M, {k}] x) => (float[M, {n}] y)
{{ xq = QuantizeLinear(x, sx, zx)
  xd = DequantizeLinear(xq, sx, zx)
  wd = DequantizeLinear<axis = {axis}>(w, sw, zw)
  y = {op}(xd, wd) }}
"""
CONV = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[B, {c}, 7, 6] x) => (float[B, {n}, H, W] y)
{{ xq = QuantizeLinear(x, sx, zx)
  xd = DequantizeLinear(xq, sx, zx)
  wd = DequantizeLinear<axis = 0>(w, sw, zw)
  v = Conv{attributes}(xd, wd)
  r = Relu(v)
  yq = QuantizeLinear(r, sy, zy)
  y = DequantizeLinear(yq, sy, zy) }}
"""
INTEGER = """
<ir_version: 10, opset_import: ["" : 21]>
g (uint8[M, 6] x) => (int32[M, 2] y)
{ y = MatMulInteger(x, w) }
"""
SCALE_X, ZERO_X, SCALE_Y = np.float32(0.02), np.uint8(37), np.float32(0.05)


def _model(text: str, **weights: np.ndarray) -> ir.Model:
    model = parse(text, **weights)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def _weights(shape: tuple[int, ...], channels: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "sx": SCALE_X, "zx": ZERO_X,
        "w": random.choice(np.asarray([-127, -90, -40, 0, 40, 90, 127], np.int8), size=shape),
        "sw": random.uniform(5e-4, 1e-3, size=channels).astype(np.float32), "zw": np.zeros(channels, np.int8),
    }  # fmt: skip


def _inputs(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations in u8, half of them 255, and the floats that they stand for."""
    random = np.random.default_rng(seed)
    raw = np.where(random.random(shape) < 0.5, 255, random.integers(0, 256, shape)).astype(np.uint8)
    return raw, ((raw.astype(np.float32) - ZERO_X) * SCALE_X).astype(np.float32)


def _maddubs(x: np.ndarray, w: np.ndarray) -> int:
    """One dot product of u8 ``x`` and s8 ``w`` as vpmaddubsw and vpmaddwd compute it, in order."""
    total = 0
    for k in range(0, len(x), 2):
        pair = sum(int(x[i]) * int(w[i]) for i in range(k, min(k + 2, len(x))))
        total += max(-32768, min(32767, pair))
    return total


def _product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``(x - ZERO_X) @ w.T`` for ``x`` ``[M, K]`` and ``w`` ``[N, K]``, with saturation."""
    saturating = np.asarray([[_maddubs(row, column) for column in w] for row in x])
    return saturating - int(ZERO_X) * w.astype(np.int64).sum(1)


def _run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ReferenceSession(model)
    found = session.run({"x": x})["y"]
    session.close()
    return found


@pytest.mark.parametrize(
    ("op", "shape", "axis"),
    [("MatMul", (37, 8), 1), ("MatMul", (4, 3), 1), ("Gemm<transB = 1>", (8, 37), 0), ("Gemm", (36, 5), 1)],
)
def test_products_of_matrices_come_out_as_int16_saturation_makes_them(op, shape, axis):
    n, k = shape[axis], shape[1 - axis]
    weights = _weights(shape, n, seed=k)
    model = _model(MATMUL.format(k=k, n=n, op=op, axis=axis), **weights)
    raw, x = _inputs((5, k), seed=1)
    exact = _run(model, x)
    assert emulate(model) == ["y"]
    w = weights["w"] if axis == 0 else weights["w"].T
    wanted = _product(raw, w) * (SCALE_X * weights["sw"])
    found = _run(model, x)
    # Float32 rounding of sums of up to k products.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(found - exact).max() > 0.05


def test_batched_rows_saturate_alike():
    weights = _weights((6, 4), 4, seed=0)
    text = MATMUL.format(k=6, n=4, op="MatMul", axis=1).replace("float[M, ", "float[B, M, ")
    model = _model(text, **weights)
    raw, x = _inputs((2, 3, 6), seed=2)
    emulate(model)
    wanted = np.stack([_product(part, weights["w"].T) for part in raw]) * (SCALE_X * weights["sw"])
    np.testing.assert_allclose(_run(model, x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("c", "n", "group", "kernel", "attributes"),
    [
        (4, 6, 1, 3, "pads = [1, 1, 1, 1]"),
        (3, 5, 1, 3, "pads = [0, 1, 2, 0], strides = [2, 1]"),  # pairs that span kernel positions
        (5, 4, 1, 1, ""),
        (4, 4, 1, 1, "strides = [2, 2]"),
        (6, 4, 2, 3, "dilations = [2, 1]"),
        (4, 8, 4, 3, "pads = [1, 1, 1, 1]"),  # two outputs a channel: not depthwise for ONNX Runtime
        (4, 4, 1, 2, 'auto_pad = "SAME_UPPER"'),
    ],
)
def test_convolutions_pair_channels_within_kernel_positions_and_pad_with_the_zero_point(
    c, n, group, kernel, attributes
):
    weights = _weights((n, c // group, kernel, kernel), n, seed=c)
    weights |= {"sy": SCALE_Y, "zy": np.uint8(0)}
    given = ", ".join(filter(None, (f"group = {group}", attributes)))
    model = _model(CONV.format(c=c, n=n, attributes=f"<{given}>"), **weights)
    raw, x = _inputs((2, c, 7, 6), seed=3)
    exact = _run(model, x)
    assert emulate(model) == ["v"]
    found = _run(model, x)
    wanted = _convolved(raw, weights["w"], found.shape[2:], group, attributes)
    wanted = np.clip(np.round(wanted * (SCALE_X * weights["sw"])[:, None, None] / SCALE_Y), 0, 255) * SCALE_Y
    # A sum in float32 may fall on the other side of a rounding point, once in a while.
    off = np.abs(found - wanted)
    assert off.max() < 1.01 * SCALE_Y and (off > SCALE_Y / 2).mean() < 0.005
    assert np.abs(found - exact).max() > SCALE_Y / 2


def _convolved(raw, w, size, group, attributes):
    """The integer convolution with saturation, one output at a time."""
    found = {k.strip(): v for k, v in (a.split("=", 1) for a in attributes.split(", ") if "=" in a)}
    parsed = {
        k: [int(d) for d in attributes.split(f"{k} = [")[1].split("]")[0].split(",")]
        for k in ("pads", "strides", "dilations") if f"{k} = [" in attributes
    }  # fmt: skip
    top, left, bottom, right = parsed.get("pads", [0, 0, 1, 1] if "auto_pad" in found else [0, 0, 0, 0])
    (sy, sx), (dy, dx) = parsed.get("strides", [1, 1]), parsed.get("dilations", [1, 1])
    padded = np.pad(raw, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=ZERO_X)
    n, per, kernel = len(w), w.shape[1], w.shape[2]
    out = np.zeros((len(raw), n, *size))
    for b, o, i, j in np.ndindex(*out.shape):
        first = o // (n // group) * per
        window = padded[b, first : first + per, i * sy : i * sy + (kernel - 1) * dy + 1 : dy]
        window = window[:, :, j * sx : j * sx + (kernel - 1) * dx + 1 : dx]
        k = np.moveaxis(w[o], 0, -1).reshape(-1)
        out[b, o, i, j] = _product(np.moveaxis(window, 0, -1).reshape(1, -1), k[None])[0, 0]
    return out


# A convolution that stores floats.
FLOAT = CONV.split("  r = Relu")[0].replace("  v =", "  y =") + "}}"


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("c", "n", "group", "kernel", "attributes"),
    [
        (4, 6, 1, 3, "pads = [1, 1, 1, 1]"),
        (3, 5, 1, 3, "pads = [0, 1, 2, 0], strides = [2, 1]"),
        (5, 4, 1, 1, ""),
        (6, 4, 2, 3, "dilations = [2, 1]"),
        (4, 8, 4, 3, "pads = [1, 1, 1, 1]"),
    ],
)
def test_onednn_saturates_whatever_is_stored_and_for_shifted_activations_too(
    c, n, group, kernel, attributes, signed
):
    weights = _weights((n, c // group, kernel, kernel), n, seed=c)
    if signed:
        weights["zx"] = (ZERO_X.astype(int) - 128).astype(np.int8)
    given = ", ".join(filter(None, (f"group = {group}", attributes)))
    model = _model(FLOAT.format(c=c, n=n, attributes=f"<{given}>"), **weights)
    raw, x = _inputs((2, c, 7, 6), seed=3)
    exact = _run(model, x)
    assert list(products(model)) == []
    assert emulate(model, "onednn") == ["y"]
    found = _run(model, x)
    # Without groups a channel of weights 0 stands behind an odd number of them.
    odd = ((0, 0), (0, c % 2 if group == 1 else 0), (0, 0), (0, 0))
    wanted = _convolved(np.pad(raw, odd), np.pad(weights["w"], odd), found.shape[2:], group, attributes)
    wanted = wanted * (SCALE_X * weights["sw"])[:, None, None]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(found - exact).max() > 0.05


def test_onednn_shifts_signed_activations_of_matrices():
    weights = _weights((6, 4), 4, seed=0) | {"zx": (ZERO_X.astype(int) - 128).astype(np.int8)}
    model = _model(MATMUL.format(k=6, n=4, op="MatMul", axis=1), **weights)
    raw, x = _inputs((5, 6), seed=2)
    assert emulate(model, "onednn") == ["y"]
    wanted = _product(raw, weights["w"].T) * (SCALE_X * weights["sw"])
    np.testing.assert_allclose(_run(model, x), wanted, rtol=0, atol=1e-5)


def test_integers_come_out_as_onnx_runtime_gives_them_on_a_haswell():
    w = np.asarray([[127, 127, 1, 127, 127, -1], [-128, -100, 127, 3, -127, -127]], np.int8).T.copy()
    model = _model(INTEGER, w=w)
    x = np.full((2, 6), 255, np.uint8)
    x[1] = np.arange(6) * 50
    assert _run(model, x).tolist() == [[129540, -89760], [50650, -49000]]
    assert emulate(model) == ["y"]
    # ONNX Runtime 1.32 under QEMU's model of a Haswell, which has AVX2 and no VNNI.
    assert _run(model, x).tolist() == [[97537, -32769], [50650, -24618]]


def test_a_pair_is_at_risk_where_equal_signs_add_up_to_more_than_128():
    w = np.asarray([[64, 64, 64, 65, 127, -127, -64, -64, -64, -65, -128, 0, 127]], np.int8)
    assert pairs_at_risk(w).tolist() == [[False, True, False, False, True, False]]
    every = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)), -1).reshape(-1, 1, 2)
    risk = pairs_at_risk(every[:, 0].astype(np.int8))[:, 0]
    extremes = np.stack([(every[:, 0] * corner).sum(1) for corner in np.ndindex(2, 2)], 1) * 255
    assert np.array_equal(risk, (extremes > 32767).any(1) | (extremes < -32768).any(1))
    assert not pairs_at_risk(np.full((1, 8), -SAFE, np.int8)).any()
    assert pairs_at_risk(np.full((1, 2), SAFE + 1, np.int8)).all()


@pytest.mark.parametrize(
    ("old", "new", "divided"),
    [
        ("", "", 2),  # seven bits
        (
            "(float[B, 4, H, W] y)",
            "(float[B, 4, H, W] y, float[B, 4, H, W] v)",
            1,
        ),  # its float output is wanted
        ("Relu(v)", "HardSwish(v)", 1),  # no kernel applies it between the product and the next grid
        ("Conv(xd, wd)", "Conv(x, wd)", 1),  # activations in float
        ("Conv(xd, wd)", "Conv(xd, r0)", 1),  # weights that are computed
    ],
)
def test_near_misses_do_not_saturate(old, new, divided):
    weights = _weights((4, 4, 3, 3), 4, seed=0) | {"sy": SCALE_Y, "zy": np.uint8(0)}
    weights["w"] = (weights["w"] // divided).astype(np.int8)
    text = CONV.format(c=4, n=4, attributes="").replace(old, new)
    text = text.replace("  v =", "  r0 = Relu(wd)\n  v =")
    assert emulate(_model(text, **weights)) == []
    unchanged = CONV.format(c=4, n=4, attributes="").replace("  v =", "  r0 = Relu(wd)\n  v =")
    if divided == 1:
        assert emulate(_model(unchanged, **weights)) == ["v"]


def test_depthwise_convolutions_widen_first():
    weights = _weights((4, 1, 3, 3), 4, seed=0) | {"sy": SCALE_Y, "zy": np.uint8(0)}
    model = _model(CONV.format(c=4, n=4, attributes="<group = 4>"), **weights)
    for library in ("mlas", "onednn"):
        assert list(products(model, library)) == [] and emulate(model, library) == []


def test_unsigned_weights_and_signed_activations_are_exact():
    for name, array in (("w", "uint8"), ("zx", "int8")):
        weights = _weights((6, 4), 4, seed=0)
        weights[name] = weights[name].astype(array)
        if name == "w":
            weights["zw"] = weights["zw"].astype(array)
        assert list(products(_model(MATMUL.format(k=6, n=4, op="MatMul", axis=1), **weights))) == []


def test_what_saturates_is_told_by_channel_and_only_where_the_data_do_it():
    weights = _weights((6, 3), 3, seed=0)
    weights["w"] = np.asarray([[127, 127, 0, 0, 0, 0], [0] * 6, [-127, -127, 1, 1, 1, 1]], np.int8).T.copy()
    model = _model(MATMUL.format(k=6, n=3, op="MatMul", axis=1), **weights)
    before = [n.op_type for n in model.graph]
    _, loud = _inputs((4, 6), seed=0)
    loud[:] = (255 - float(ZERO_X)) * SCALE_X
    quiet = np.zeros((4, 6), np.float32)
    assert {k: v.tolist() for k, v in saturated(model, [{"x": quiet}, {"x": loud}]).items()} == {
        "y": [True, False, True]
    }
    assert saturated(model, [{"x": quiet}]) == {}
    assert [n.op_type for n in model.graph] == before
