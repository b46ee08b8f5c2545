from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.batch_norm import FoldBatchNorm
from optkit.testing import check_pass, parse

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(layer: str, *, before: bool = True, rank: int = 4, **weights: np.ndarray):
    shape = ", ".join(["N", "6", "9", "9"][:rank])
    body = (
        f"a = {layer}(x, w) b = BatchNormalization(a, g, h, m, v)"
        if before
        else f"a = BatchNormalization(x, g, h, m, v) b = {layer}(a, w)"
    )
    return parse(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x) => (float y) {{ {body} y = Relu(b) }}'.replace(
            "float y", f"float[{', '.join('ABCD'[:rank])}] y"
        ),
        **weights,
    )


def statistics(channels: int) -> dict[str, np.ndarray]:
    return {"g": floats(channels), "h": floats(channels), "m": floats(channels), "v": floats(channels) ** 2}


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ("Conv<pads = [1, 1, 1, 1]>", (8, 6, 3, 3)),
        ("Conv<group = 6>", (12, 1, 3, 3)),
        ("Conv<group = 3, strides = [2, 2]>", (9, 2, 3, 3)),
        ("ConvTranspose<strides = [2, 2]>", (6, 5, 2, 2)),
        ("ConvTranspose<group = 2>", (6, 4, 3, 3)),
    ],
)
def test_batch_norm_behind_a_convolution_goes(layer, weight):
    channels = weight[0] if layer.startswith("Conv<") else weight[1] * (2 if "group" in layer else 1)
    source = model(layer, w=floats(*weight), **statistics(channels))
    check_pass(FoldBatchNorm(), source, ops=[layer.split("<")[0], "Relu"], atol=1e-4)


@pytest.mark.parametrize(("layer", "weight"), [("Gemm", (6, 8)), ("Gemm<transB = 1, alpha = 0.5>", (8, 6))])
def test_batch_norm_behind_a_linear_layer_goes(layer, weight):
    source = model(layer, rank=2, w=floats(*weight), **statistics(8))
    check_pass(FoldBatchNorm(), source, ops=["Gemm", "Relu"], atol=1e-4)


def test_batch_norm_in_front_of_a_convolution_without_padding_goes():
    source = model("Conv<group = 2>", before=False, w=floats(4, 3, 3, 3), **statistics(6))
    check_pass(FoldBatchNorm(), source, ops=["Conv", "Relu"], atol=1e-4)


def test_batch_norm_in_front_of_padding_stays():
    source = model("Conv<pads = [1, 1, 1, 1]>", before=False, w=floats(4, 6, 3, 3), **statistics(6))
    check_pass(FoldBatchNorm(), source, ops=["BatchNormalization", "Conv", "Relu"])


def test_padding_does_no_harm_where_the_shift_is_zero():
    zeros = {"h": np.zeros(6, np.float32), "m": np.zeros(6, np.float32)}
    source = model(
        "Conv<pads = [1, 1, 1, 1]>", before=False, w=floats(4, 6, 3, 3), **{**statistics(6), **zeros}
    )
    check_pass(FoldBatchNorm(), source, ops=["Conv", "Relu"], atol=1e-4)


def test_a_convolution_that_others_read_keeps_its_weights():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y, float[N, 6, 4, 4] z) {
          a = Conv(x, w) b = BatchNormalization(a, g, h, m, v) y = Relu(b) z = Neg(a)
        }
        """,
        w=floats(6, 6, 1, 1),
        **statistics(6),
    )
    check_pass(FoldBatchNorm(), source, ops=["Conv", "BatchNormalization", "Relu", "Neg"])


def test_weights_that_two_layers_share_are_copied_for_the_one():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y) {
          a = Conv(x, w) b = BatchNormalization(a, g, h, m, v) y = Conv(b, w)
        }
        """,
        w=floats(6, 6, 1, 1),
        **statistics(6),
    )
    after = check_pass(FoldBatchNorm(), source, ops=["Conv", "Conv"], atol=1e-4)
    first, second = after.graph
    assert (first.inputs[1].name, second.inputs[1].name) == ("a/weight", "w")


def test_training_stays():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y, float[6] n, float[6] o) {
          a = Conv(x, w) y, n, o = BatchNormalization<training_mode = 1>(a, g, h, m, v)
        }
        """,
        w=floats(6, 6, 1, 1),
        **statistics(6),
    )
    check_pass(FoldBatchNorm(), source, ops=["Conv", "BatchNormalization"])


def test_an_output_of_the_graph_keeps_its_name():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y) { a = Conv(x, w) y = BatchNormalization(a, g, h, m, v) }
        """,
        w=floats(6, 6, 1, 1),
        **statistics(6),
    )
    check_pass(FoldBatchNorm(), source, ops=["Conv"], atol=1e-4)
