"""What OpenVINO would compute otherwise than ONNX says is refused, written out or spelled otherwise; what it reads right is not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends import BACKENDS
from optkit.backends.openvino.misread import misread
from optkit.backends.openvino.spelling import spelled
from optkit.errors import ModelError, UnsupportedOpError
from optkit.graph import walk
from optkit.legalize import legalize
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng '


def _weights(gates: int) -> dict[str, np.ndarray]:
    shapes = {"w": (1, gates * 4, 3), "r": (1, gates * 4, 4), "b": (1, gates * 8), "p": (1, 12)}
    random = np.random.default_rng(0)
    return {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def _recurrent(operator: str, given: str = "", **attributes: object) -> ir.Model:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    told = "".join(f", {k} = {v}" for k, v in attributes.items())
    return parse(
        f"{HEAD}(float[5, 2, 3] x) => (y) {{ y = {operator}<hidden_size = 4{told}>(x, w, r, b{given}) }}",
        **_weights(gates),
    )


def _resize(told: str) -> ir.Model:
    return parse(
        f'{HEAD}(float[1, 1, 8, 6] x) => (y) {{ y = Resize<{told}>(x, "", "", sizes) }}',
        sizes=np.array([1, 1, 5, 5], np.int64),
    )


def _node(types: str, call: str, **weights: np.ndarray) -> ir.Model:
    return parse(f"{HEAD}({types}) => (y) {{ y = {call} }}", **weights)


def _pool(call: str, sizes: str = "9, 9") -> ir.Model:
    return _node(f"float[1, 2, {sizes}] x", f"{call}(x)")


def _lengths(sizes: str) -> ir.Model:
    return parse(
        f"{HEAD}(float[{sizes}, 3] x, int32[2] n) => (y) {{ y = GRU<hidden_size = 4>(x, w, r, b, n) }}",
        **_weights(3),
    )


def _both_ways(activations: str) -> ir.Model:
    weights = {k: np.concatenate([v, v]) for k, v in _weights(1).items()}
    told = f'hidden_size = 4, direction = "bidirectional", activations = [{activations}]'
    return _node("float[5, 2, 3] x", f"RNN<{told}>(x, w, r, b)", **weights)


def _transposed(sizes: str, told: str) -> ir.Model:
    kernel = np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3)
    return _node(f"float[{sizes}] x", f"ConvTranspose<strides = [2, 2], {told}>(x, k)", k=kernel)


ROIS = {
    "rois": np.array([[0, 0, 4, 4], [1, 2, 7, 6]], np.float32), "batch": np.array([0, 0], np.int64)
}  # fmt: skip
ROI = "RoiAlign<output_height = 3, output_width = 3, sampling_ratio = 2"
NONE, LAST = {"axes": np.array([], np.int64)}, {"axis": np.array(-2, np.int64), "size": np.array(8, np.int64)}

# Name -> model, what the refusal says.
MISREAD = {
    "batch first, LSTM": (lambda: _recurrent("LSTM", layout=1), "layout 1"),
    "batch first, GRU": (lambda: _recurrent("GRU", layout=1), "layout 1"),
    "batch first, RNN": (lambda: _recurrent("RNN", layout=1), "layout 1"),
    "peepholes": (lambda: _recurrent("LSTM", ', "", "", "", p'), "peepholes"),
    "input_forget": (lambda: _recurrent("LSTM", input_forget=1), "input_forget"),
    "antialias": (lambda: _resize('mode = "linear", antialias = 1'), "antialias"),
    "exclude_outside": (lambda: _resize('mode = "cubic", exclude_outside = 1'), "exclude_outside"),
    "aspect": (lambda: _resize('keep_aspect_ratio_policy = "not_larger"'), "not_larger"),
    "largest of regions": (
        lambda: _node("float[1, 2, 8, 8] x", f'{ROI}, mode = "max">(x, rois, batch)', **ROIS), "mode max"
    ),
    "axis of a transform": (
        lambda: _node("float[1, 6, 8, 2] x", 'DFT(x, "", axis)', axis=np.array(2, np.int64)), "axis 1"
    ),
    "transform of real signals": (
        lambda: _node("float[1, 6, 8, 1] x", 'DFT<onesided = 1>(x, "", axis)', axis=np.array(1, np.int64)),
        "real",
    ),
    "window in the pads": (
        lambda: _pool("MaxPool<kernel_shape = [2, 2], strides = [2, 2], pads = [1, 0, 1, 0], ceil_mode = 1>"),
        "ceil_mode",
    ),
    "window in the pads, sizes unknown": (
        lambda: _pool("MaxPool<kernel_shape = [1, 1], strides = [2, 2], ceil_mode = 1>", "H, W"), "ceil_mode"
    ),
    "what is counted behind pads": (
        lambda: _pool(
            "AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1, count_include_pad = 1>",
            "8, 8",
        ),
        "count_include_pad",
    ),
    "other end of an output": (
        lambda: _transposed("1, 2, 5, 6", 'output_shape = [10, 12], auto_pad = "SAME_UPPER"'), "SAME_UPPER"
    ),
    "constant without elements": (
        lambda: parse(f"{HEAD}(float[2, 3] x) => (y, z) {{ y = Constant<value = int64[0] {{}}>()\n z = Relu(x) }}"),
        "without any",
    ),
    "bytes that saturate": (
        lambda: parse(f"{HEAD}(float[2, 3] x) => (float8e4m3fn[2, 3] y) {{ y = Cast<to = 17>(x) }}"), "saturate"
    ),
    "lengths, sizes free": (lambda: _lengths("T, 2"), "sequence_lens"),
    "activations by direction": (lambda: _both_ways('"Tanh", "Relu"'), "one direction"),
    "output that is told, sizes free": (
        lambda: _transposed("N, 2, 5, 6", "output_shape = [10, 12]"), "output_shape where sizes are free"
    ),
    "pads that are told, sizes free": (
        lambda: _transposed("N, 2, 5, 6", 'auto_pad = "SAME_LOWER"'), "SAME_LOWER where sizes are free"
    ),
    "slopes along the last axis": (
        lambda: _node("float[2, 4, 4] x", "PRelu(x, k)", k=np.array([0.1, 0.2, 0.3, 0.4], np.float32)), "slopes"
    ),
    "window that reaches over": (
        lambda: _pool("LpPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>", "8, 8"), "reaches over"
    ),
    "sum that wraps": (lambda: _node("int8[2, 3] x", "Add(x, k)", k=np.array(127, np.int8)), "saturates"),
    "indices by columns": (
        lambda: parse(
            f"{HEAD}(float[1, 1, 4, 6] x) => (y, z) {{ y, z = MaxPool<kernel_shape = [2, 2], storage_order = 1>(x) }}"
        ),
        "storage_order",
    ),
    "magnitudes where nothing is reduced": (
        lambda: _node("float[2, 3] x", "ReduceL1<noop_with_empty_axes = 1>(x)"), "noop_with_empty_axes"
    ),
    "logarithms where no axis is given": (
        lambda: _node("float[2, 3] x", "ReduceLogSum<noop_with_empty_axes = 1>(x, axes)", **NONE),
        "noop_with_empty_axes",
    ),
    "bias between integers": (
        lambda: _node("float[1, 7, 3, 3] x", "LRN<size = 3, alpha = 0.3, bias = 1.5>(x)"), "bias 1.5"
    ),
    "larger without a sign": (
        lambda: _node("uint32[3] x", "Max(x, k)", k=np.array([2**32 - 1], np.uint32)), "uint32 in 32 bits with a sign"
    ),
    "sum of 64 bits without a sign": (
        lambda: _node("uint64[3] x", "Add(x, k)", k=np.array([2**40], np.uint64)), "uint64 in 32 bits"
    ),
    "sum of 64 bits": (
        lambda: _node("int64[3] x", "Add(x, far)", far=np.array([2**40], np.int64)), "32 bits, here far"
    ),
    "table of 64 bits": (
        lambda: _node("bool[3] x", "Where(x, far, far)", far=np.array([-(2**33), 1, 2**31], np.int64)),
        "32 bits, here far",
    ),
}  # fmt: skip
# Forms close to those, which it reads as they are.
READ = {
    "LSTM": lambda: _recurrent("LSTM"),
    "GRU": lambda: _recurrent("GRU", linear_before_reset=1),
    "RNN": lambda: _recurrent("RNN"),
    "Resize": lambda: _resize('mode = "cubic", cubic_coeff_a = -0.5'),
    "regions": lambda: _node("float[1, 2, 8, 8] x", f"{ROI}>(x, rois, batch)", **ROIS),
    "transform": lambda: _node("float[1, 6, 8, 2] x", 'DFT(x, "", axis)', axis=np.array(1, np.int64)),
    "pool": lambda: _pool("MaxPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>", "H, W"),
    "pool that the sizes allow": lambda: _pool(
        "MaxPool<kernel_shape = [2, 2], strides = [3, 3], ceil_mode = 1>", "8, 8"
    ),
    "average": lambda: _pool(
        "AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 0], ceil_mode = 1>", "8, 8"
    ),
    "output that is told": lambda: _transposed("1, 2, 5, 6", "output_shape = [10, 12]"),
    "lengths": lambda: _lengths("5, 2"),
    "activations": lambda: _both_ways('"Relu", "Relu"'),
    "pads that are told": lambda: _transposed("1, 2, 5, 6", 'auto_pad = "SAME_LOWER"'),
    "slopes of channels": lambda: _node(
        "float[N, 4, 3] x", "PRelu(x, k)", k=np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)
    ),
    "windows that fit": lambda: _pool(
        "LpPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>", "9, 9"
    ),
    "sum in 16 bits": lambda: _node("int16[2, 3] x", "Add(x, k)", k=np.array(32767, np.int16)),
    "reduction": lambda: _node("float[2, 3] x", "ReduceL1<keepdims = 0>(x)"),
    "squares": lambda: _node("float[2, 3] x", "ReduceSumSquare<noop_with_empty_axes = 1>(x)"),
    "bias": lambda: _node("float[1, 7, 3, 3] x", "LRN<size = 3, alpha = 0.3, bias = 2.0>(x)"),
    "sum of 32 bits": lambda: _node("int64[3] x", "Add(x, k)", k=np.array([2**30, -(2**31), 5], np.int64)),
    "no bound": lambda: _node(
        "int64[3] x", "Clip(x, least, far)", least=np.array(2), far=np.array(2**63 - 1)
    ),
    "to the end": lambda: parse(
        f"{HEAD}(float[3, 4] x) => (y) {{ e = Concat<axis = 0>(two, far)\n y = Slice(x, s, e) }}",
        two=np.array([2]),
        far=np.array([2**63 - 1]),
        s=np.array([1, 1]),
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_openvino_misreads_is_told(case):
    make, said = MISREAD[case]
    (reason,) = filter(None, map(misread, walk(make())))
    assert reason.startswith("OpenVINO ")
    assert said in reason


@pytest.mark.parametrize("case", READ)
def test_what_it_reads_is_not(case):
    assert not [n for n in walk(READ[case]()) if misread(n)]


def _by_openvino(model: ir.Model, folder, feeds) -> dict[str, np.ndarray]:
    backend = BACKENDS["openvino"]()
    options = backend.options.model_validate({"precision": "f32"})
    backend.lower(model, target("cpu"), options, folder)
    with backend.load(folder, target("cpu"), options, threads=1) as session:
        return session.run(feeds)


def _same(found, expected) -> bool:
    return all(
        found[k].shape == v.shape and np.allclose(found[k], v, rtol=1e-4, atol=1e-5)
        for k, v in expected.items()
    )


# ONNX Runtime, which is what they are held against, does not take a batch that comes first; bytes cannot be handed over.
@pytest.mark.needs("openvino")
@pytest.mark.parametrize("case", [c for c in MISREAD if not c.startswith(("batch", "bytes"))])
def test_without_the_refusal_openvino_gives_other_numbers(case, tmp_path):
    make, _ = MISREAD[case]
    feeds = random_feeds(make(), size=8)
    assert not _same(
        _by_openvino(make(), tmp_path, feeds), ReferenceSession(make(), optimize=False).run(feeds)
    )


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("case", READ)
def test_what_is_not_refused_is_what_onnx_runtime_gives(case, tmp_path):
    feeds = random_feeds(READ[case](), size=8)
    expected = ReferenceSession(READ[case](), optimize=False).run(feeds)
    assert _same(_by_openvino(READ[case](), tmp_path, feeds), expected)


@pytest.mark.needs("openvino")
def test_a_graph_with_a_misread_node_is_refused_for_it(tmp_path):
    model = _recurrent("LSTM", ', "", "", "", p')
    with pytest.raises(UnsupportedOpError, match=r"\(LSTM\): OpenVINO leaves out peepholes"):
        legalize(model, BACKENDS["openvino"](), target("cpu"), name="speech.onnx")


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("bias", [0.5, 1.5])
def test_a_bias_between_integers_is_written_out(bias, tmp_path):
    model = _node("float[1, 7, 3, 3] x", f"LRN<size = 3, alpha = 0.3, beta = 0.6, bias = {bias}>(x)")
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)
    legalize(model, BACKENDS["openvino"](), target("cpu"), name="net.onnx")
    assert _same(_by_openvino(model, tmp_path, feeds), expected)


MASKED = """{}(float[2, 3] mask, float[2, 3] p, float[3, 4] v) => (float[2, 4] y) {{
  axes = Constant<value_ints = [-1]>()
  low = Constant<value = float {{-inf}}>()
  zero = Constant<value = float {{0}}>()
  scores = Add(p, mask)
  half = Cast<to = 10>(low)
  cast = Cast<to = 1>(half)
  weights = Softmax(scores)
  most = ReduceMax<keepdims = {}>(mask, axes)
  {}
  product = MatMul(weights, v)
  y = Where(rows, zero, product)
}}"""


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("order", ["most, low", "low, most", "most, cast"])
@pytest.mark.parametrize("keep", [0, 1])
def test_rows_that_see_nothing_are_found(order, keep, tmp_path):
    asked = f"rows = Equal({order})"
    if not keep:
        asked = f"flat = Equal({order})\n  rows = Unsqueeze(flat, axes)"
    model = parse(MASKED.format(HEAD, keep, asked))
    mask = np.array([[-np.inf, -np.inf, -np.inf], [0, -np.inf, 0]], np.float32)
    feeds = {**random_feeds(model), "mask": mask}
    found = _by_openvino(model, tmp_path, feeds)["y"]
    assert np.array_equal(found[0], np.zeros(4))
    assert np.allclose(found, ReferenceSession(model, optimize=False).run(feeds)["y"], atol=1e-6)


@pytest.mark.needs("openvino")
def test_a_number_that_attention_chooses_twice_is_taken(tmp_path):
    graph = """(float[B, 2, L, 8] q, float[B, 2, 8, L] k, float[B, 2, L, 8] v, bool[B, 1, L, L] mask, bool[B, 1, L, 1] any) => (y) {
      seen = Where(mask, none, low)
      products = MatMul(q, k)
      masked = Add(products, seen)
      weights = Softmax(masked)
      sums = MatMul(weights, v)
      y = Where(any, sums, none)
    }"""
    model = parse(HEAD + graph, none=np.array(0, np.float32), low=np.array(-1e4, np.float32))
    feeds = random_feeds(model, size=5)
    expected = ReferenceSession(model, optimize=False).run(feeds)
    assert _same(_by_openvino(model, tmp_path, feeds), expected)


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("repeats", [(2, 2, 2, 3), (1, 2, 2, 3), (3, 1, 1, 2), (2, 2, 3, 2, 2)])
def test_computed_repeats_of_many_axes_are_written(repeats, tmp_path):
    sizes = ", ".join("2345"[i % 4] for i in range(len(repeats)))
    model = _node(f"float[{sizes}] x, int64[{len(repeats)}] times", "Tile(x, times)")
    x = np.random.default_rng(0).normal(size=[int(n) for n in sizes.split(", ")]).astype(np.float32)
    found = _by_openvino(model, tmp_path, {"x": x, "times": np.array(repeats, np.int64)})["y"]
    assert np.array_equal(found, np.tile(x, repeats))


@pytest.mark.parametrize(
    "model",
    [
        lambda: _node("float[2, 3, 4] x, int64[3] times", "Tile(x, times)"),
        lambda: _node("float[2, 3, 4, 5] x", "Tile(x, times)", times=np.array([2, 2, 2, 2], np.int64)),
        lambda: parse(
            f"{HEAD}(float[2, 3] x) => (y) {{ z = Constant<value = float {{0}}>()\n m = ReduceMax(x)\n y = Equal(m, z) }}"
        ),
    ],
    ids=["three axes", "constant repeats", "another number"],
)
def test_what_openvino_takes_as_it_is_stays(model):
    assert spelled(model()) is None


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("form", ["0 by default", "constant", "computed"])
def test_boxes_that_overlap_as_much_as_is_allowed_stay(form, tmp_path):
    half, place = np.array([0.5], np.float32), float(form == "0 by default")
    # The second is half of the first, or beside it; the third lies apart from both.
    boxes = np.array([[[0, 0, 2, 2], [0, 2 * place, 2, 1 + 3 * place], [5, 5, 6, 6]]], np.float32)
    feeds = {"b": boxes, "s": np.array([[[0.9, 0.8, 0.7]]], np.float32)}
    weights = {"k": np.array([5], np.int64)}
    if form == "constant":
        weights["t"] = half
    if form == "computed":
        feeds["t"] = half
    port, given = ", float[1] t" if "t" in feeds else "", "" if place else ", t"
    model = parse(
        f"{HEAD}(float[1, 3, 4] b, float[1, 1, 3] s{port}) => (y) {{ y = NonMaxSuppression(b, s, k{given}) }}",
        **weights,
    )
    found = _by_openvino(model, tmp_path, feeds)["y"]
    assert np.array_equal(found, [[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    assert np.array_equal(found, ReferenceSession(model, optimize=False).run(feeds)["y"])


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("far", [2**31, -(2**31) - 1])
def test_inputs_beyond_32_bits_are_refused_as_they_come(far, tmp_path):
    model = _node("int64[2] x", "Neg(x)")
    fits = np.array([1 - 2**31, 2**31 - 1])
    assert _by_openvino(model, tmp_path, {"x": fits})["y"].tolist() == (-fits).tolist()
    with pytest.raises(ModelError, match=rf"input 'x' has .*{far}.*, and OpenVINO computes int64 in 32 bits"):
        _by_openvino(model, tmp_path, {"x": np.array([far, 0])})


@pytest.mark.needs("openvino")
@pytest.mark.parametrize(
    ("sizes", "length", "kept"), [("2, 40", ", n", True), ("2, 40", "", False), ("N, samples", ", n", False)]
)
def test_spectra_that_it_does_not_take_are_written_out(sizes, length, kept, tmp_path):
    known = {"step": np.array(3), "w": np.hanning(8).astype(np.float32), "n": np.array(8)}
    model = _node(f"float[{sizes}, 1] x", f"STFT(x, step, w{length})", **known)
    feeds = {"x": random_feeds(_node("float[2, 40, 1] x", "Relu(x)"))["x"]}
    expected = ReferenceSession(model, optimize=False).run(feeds)
    legalize(model, BACKENDS["openvino"](), target("cpu"), name="speech.onnx")
    assert any(n.op_type == "STFT" for n in walk(model)) == kept
    assert _same(_by_openvino(model, tmp_path, feeds), expected)
