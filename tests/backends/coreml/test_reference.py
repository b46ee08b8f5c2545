"""The evaluator and the rules of the loader, on programs that others wrote and on programs with planted mistakes."""

from __future__ import annotations

import functools
import math
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optkit.backends import BACKENDS
from optkit.benchmarks.fetch import cache
from optkit.errors import ModelError
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PHONE = target("iphone15")
MODEL = "Data/com.apple.CoreML/model.mlmodel"
# Operations whose mistakes converters make: pads, strides, axes, epsilons, flags, bounds, scales.
TARGETED = """g (float[1, 4, 9, 9] x) => (float[1, 6, 5] y, float[1, 5, 5] z, float[1, 4, 6, 6] o) {
  a = Conv<kernel_shape = [3, 3], pads = [0, 1, 2, 1], strides = [2, 2]>(x, w, v)
  b = LeakyRelu<alpha = 0.3>(a)
  p = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(b)
  f = Reshape(p, flat)
  s = Slice(f, one, last, two)
  t = Softmax<axis = 1>(s)
  n = LayerNormalization<epsilon = 0.1>(t, g1, g2)
  m = MatMul(n, k)
  y = Clip(m, low, high)
  u = Transpose<perm = [0, 2, 1]>(y)
  l = MatMul(u, y)
  h = Mul(l, row)
  q = QuantizeLinear(h, scale, zero)
  d = DequantizeLinear(q, scale, zero)
  r = ReduceMean<keepdims = 0>(d, second)
  e = Pow(r, half)
  z = Add(d, e)
  c = Concat<axis = 2>(x, x)
  j = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">(c, , , sizes)
  o = Elu<alpha = 0.7>(j)
}"""


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    return {
        "w": normal(6, 4, 3, 3), "v": normal(6), "g1": normal(24), "g2": normal(24), "k": normal(24, 5), "row": normal(5), "flat": np.array([0, 0, -1]),
        "one": np.array([0]), "last": np.array([24]), "two": np.array([2]), "low": np.float32(-0.8), "high": np.float32(1.1),
        "scale": np.float32(0.05), "zero": np.int8(3), "second": np.array([2]), "half": np.float32(2.0),
        "sizes": np.array([1, 4, 6, 6]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Any]:
    """The package of the graph above, and the graph."""
    model = parse(HEAD + TARGETED, **_weights())
    folder = tmp_path_factory.mktemp("written")
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(), folder)
    return folder, model


def _off(folder: Path, model: Any) -> float:
    """The largest difference to ONNX Runtime."""
    backend = BACKENDS.get("coreml")()
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)
    with backend.load(folder, PHONE, backend.options()) as session:
        found = session.run(feeds)
    return max(float(np.abs(found[k] - v).max()) for k, v in expected.items())


def _edited(folder: Path, to: Path, edit: Callable[[Any], None]) -> Path:
    from optkit.backends.coreml.quiet import Model_pb2

    shutil.copytree(folder, to)
    file = to / "model.mlpackage" / MODEL
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    edit(spec)
    file.write_bytes(spec.SerializeToString(deterministic=True))
    return to


def _operations(spec: Any) -> Iterator[Any]:
    main = spec.mlProgram.functions["main"]
    yield from main.block_specializations[main.opset].operations


def _constant(spec: Any, kind: str, parameter: str) -> Any:
    """The tensor of a constant parameter of the first operation of a kind, to be changed in place."""
    operation = next(o for o in _operations(spec) if o.type == kind)
    name = operation.inputs[parameter].arguments[0].name
    constant = next(o for o in _operations(spec) if o.outputs[0].name == name)
    return constant.attributes["val"].immediateValue.tensor


def _set(kind: str, parameter: str, index: int, value: Any) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        tensor = _constant(spec, kind, parameter)
        which = tensor.WhichOneof("value")
        values = getattr(tensor, which).values
        if which == "bytes":
            raw = bytearray(values)
            raw[index] = value
            tensor.bytes.values = bytes(raw)
        else:
            values[index] = value

    return edit


def _swap(kind: str, one: str, other: str) -> Callable[[Any], None]:
    """Two inputs of an operation trade places."""

    def edit(spec: Any) -> None:
        operation = next(o for o in _operations(spec) if o.type == kind)
        a, b = (operation.inputs[k].arguments[0].name for k in (one, other))
        operation.inputs[one].arguments[0].name, operation.inputs[other].arguments[0].name = b, a

    return edit


def _become(kind: str, other: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        next(o for o in _operations(spec) if o.type == kind).type = other

    return edit


MUTANTS = {
    "a pad on the other side": _set("conv", "pad", 0, 1),
    "a pad too few": _set("conv", "pad", 2, 0),
    "another stride": _set("conv", "strides", 0, 1),
    "other dilations": _set("conv", "dilations", 1, 2),
    "same instead of custom pads": _set("conv", "pad_type", 0, "same"),
    "valid instead of custom pads": _set("conv", "pad_type", 0, "valid"),
    "pads counted by an average": _set("avg_pool", "exclude_padding_from_average", 0, False),
    "a window of another size": _set("avg_pool", "kernel_sizes", 1, 2),
    "another slope": _set("leaky_relu", "alpha", 0, 0.01),
    "softmax along another axis": _set("softmax", "axis", 0, -1),
    "another epsilon": _set("layer_norm", "epsilon", 0, 1e-5),
    "gamma and beta swapped": _swap("layer_norm", "gamma", "beta"),
    "a lower bound": _set("clip", "alpha", 0, -0.1),
    "an upper bound": _set("clip", "beta", 0, 0.5),
    "a product not transposed": _set("matmul", "transpose_x", 0, False),
    "a product transposed": _set("matmul", "transpose_y", 0, True),
    "another scale": _set("quantize", "scale", 0, 0.1),
    "another zero point": _set("dequantize", "zero_point", 0, 4),
    "a mean along another axis": _set("reduce_mean", "axes", 0, 1),
    "aligned corners": _set("resize_bilinear", "sampling_mode", 0, "STRICT_ALIGN_CORNERS"),
    "another alpha": _set("elu", "alpha", 0, 1.0),
    "a sum for a difference": _become("add", "sub"),
    "joined along another axis": _set("concat", "axis", 0, 3),
}
# Those that a shape follows from, and the operation.
RESHAPING = {
    "a pad too few": "conv", "another stride": "conv", "other dilations": "conv", "valid instead of custom pads": "conv",
    "a window of another size": "avg_pool", "a product not transposed": "matmul", "a product transposed": "matmul",
    "joined along another axis": "concat",
}  # fmt: skip


def test_the_package_is_right_before_anything_is_planted(written):
    assert _off(*written) < 1e-5


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_planted_mistake_is_caught(written, mistake, tmp_path):
    from optkit.backends.coreml.validate import problems

    folder, model = written
    changed = _edited(folder, tmp_path / "changed", MUTANTS[mistake])
    before, after = (p / "model.mlpackage" / MODEL for p in (folder, changed))
    assert before.read_bytes() != after.read_bytes()
    off, refused = 0.0, ""
    try:
        off = _off(changed, model)
    except ModelError as error:
        refused = str(error)
    # Other numbers, another shape than the program declares, or values that do not fit each other.
    assert off > 1e-3 or "declares" in refused or "cannot be computed" in refused
    # Without running it, what has another shape than declared is refused by the name of the operation.
    told = [p.partition(" ")[0] for p in problems(changed / "model.mlpackage")]
    assert told == [RESHAPING[mistake]] if mistake in RESHAPING else not told


def _drop(kind: str, parameter: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        del next(o for o in _operations(spec) if o.type == kind).inputs[parameter]

    return edit


def test_an_operation_that_the_evaluator_does_not_know_is_named(written, tmp_path):
    changed = _edited(written[0], tmp_path / "changed", _become("elu", "gelu_of_tomorrow"))
    with pytest.raises(ModelError, match="does not know the operations gelu_of_tomorrow"):
        BACKENDS.get("coreml")().load(changed, PHONE, None)


def test_the_largest_that_need_not_be_sorted_are_not(tmp_path):
    """Core ML: "no particular ordering is guaranteed"; who relies on one is told."""
    backend, folder = BACKENDS.get("coreml")(), tmp_path / "as written"
    model = parse(
        HEAD + "g (float[4] x) => (float[2] v, int64[2] i) <int64[1] k = {2}> { v, i = TopK(x, k) }"
    )
    folder.mkdir()
    backend.lower(model, PHONE, backend.options(), folder)
    changed = _edited(folder, tmp_path / "changed", _set("topk", "sort", 0, False))
    x = np.array([1, 3, 0, 4], np.float32)
    for path, places in ((folder, [3, 1]), (changed, [1, 3])):
        with backend.load(path, PHONE, backend.options()) as session:
            assert session.run({"x": x})["i"].tolist() == places


@pytest.mark.parametrize("deployment", ["iOS16", "iOS17"])
@pytest.mark.parametrize("node", [
    "Gather(x, i)", "GatherElements(x, i)", "GatherND(x, i)", "ScatterND(x, i, u)", "ScatterElements(x, i, v)",
])  # fmt: skip
def test_from_ios_17_on_a_place_counted_from_the_end_is_none(node, deployment, tmp_path):
    """Core ML: "negative values are considered out-of-bound", iOS 17 gather; before, they were allowed."""
    text = "g (float[4, 1] x, float[3, 1] u) => (float[] y) <int64[3, 1] i = {0, 2, 1}, float[3, 1] v = {3, 4, 5}> { y = %s }"
    backend, folder = BACKENDS.get("coreml")(), tmp_path / "as written"
    model = parse(HEAD + text % node)
    folder.mkdir()
    backend.lower(model, PHONE, backend.options(deployment=deployment), folder)

    def edit(spec: Any) -> None:
        (operation,) = (o for o in _operations(spec) if o.type.startswith(("gather", "scatter")))
        tensor = _constant(spec, operation.type, "indices")
        which = tensor.WhichOneof("value")
        if which == "bytes":
            tensor.bytes.values = np.array([0, 2, -1], np.uint16).tobytes()
        else:
            getattr(tensor, which).values[2] = -1

    changed = _edited(folder, tmp_path / "changed", edit)
    feeds = random_feeds(model)
    with backend.load(changed, PHONE, backend.options()) as session:
        if deployment == "iOS16":
            session.run(feeds)
        else:
            with pytest.raises(ModelError, match="index -1 is negative"):
                session.run(feeds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes|no blob"),
        (b"\0" * 10, "10 bytes are not a file of weights"),
        (b"\1\0\0\0\7\0\0\0" + b"\0" * 56, "version 7"),
    ],
)
def test_a_broken_file_of_weights_is_refused(content, message, tmp_path):
    from optkit.backends.coreml.reference.blobs import Blobs

    (tmp_path / "weight.bin").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Blobs(tmp_path / "weight.bin").raw(64)


def test_a_package_without_a_program_is_refused(tmp_path):
    from optkit.backends.coreml.reference.program import Package

    with pytest.raises(ModelError, match="no model inside"):
        Package(tmp_path)
    (tmp_path / "Data/com.apple.CoreML").mkdir(parents=True)
    (tmp_path / MODEL).write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"cannot be read|holds a"):
        Package(tmp_path)


FORMS = {
    "int8 a channel": ("linear", {"mode": "linear_symmetric", "dtype": "int8", "granularity": "per_channel"}),
    "uint8 a tensor": ("linear", {"mode": "linear", "dtype": "uint8", "granularity": "per_tensor"}),
    "int4 a block": (
        "linear", {"mode": "linear_symmetric", "dtype": "int4", "granularity": "per_block", "block_size": 16}
    ),
    "uint4 a block": ("linear", {"mode": "linear", "dtype": "uint4", "granularity": "per_block", "block_size": 8}),
    "a palette of 16": ("palette", {"mode": "uniform", "nbits": 4}),
    "a palette of 8 a group of channels": (
        "palette", {"mode": "uniform", "nbits": 3, "granularity": "per_grouped_channel", "group_size": 16}
    ),
    "half of the weights": ("sparse", {"target_sparsity": 0.5}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_compressed_constants_are_what_coremltools_decompresses(form, tmp_path):
    """Compressed by coremltools; what the numbers are, its own decompression says."""
    from optkit.backends.coreml.quiet import ct, silence
    from optkit.backends.coreml.reference.machine import Machine
    from optkit.backends.coreml.reference.program import Package

    model = parse(
        HEAD + "g (float[1, 32] x) => (float[1, 64] y) { y = MatMul(x, w) }",
        w=np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32),
    )
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(), tmp_path)
    kind, options = FORMS[form]
    optimize = ct.optimize.coreml
    compress, settings = {
        "linear": (optimize.linear_quantize_weights, optimize.OpLinearQuantizerConfig),
        "palette": (optimize.palettize_weights, optimize.OpPalettizerConfig),
        "sparse": (optimize.prune_weights, optimize.OpMagnitudePrunerConfig),
    }[kind]
    with silence():
        loaded = ct.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True)
        loaded = compress(loaded, optimize.OptimizationConfig(settings(weight_threshold=0, **options)))
        loaded.save(str(tmp_path / "small.mlpackage"))
        optimize.decompress_weights(loaded).save(str(tmp_path / "plain.mlpackage"))
    x = {"x": random_feeds(model)["x"]}
    small, full = (Package(tmp_path / f"{n}.mlpackage") for n in ("small", "plain"))
    kinds = {o.kind for o in small.functions["main"].block.operations}
    assert any(k.startswith("constexpr_") for k in kinds)
    found, expected = (Machine(p.functions["main"]).run(x)["y"] for p in (small, full))
    np.testing.assert_array_equal(found, expected)


def test_basic_pitch_as_spotify_converted_it_computes_what_its_onnx_twin_does():
    """A package that nobody here wrote: coremltools 7 made it from TensorFlow."""
    from optkit.backends.coreml.reference.machine import Machine
    from optkit.backends.coreml.reference.program import Package

    folder = cache() / "models" / "basic_pitch"
    package, twin = folder / "nmp.mlpackage", folder / "basic_pitch.onnx"
    if not (package.is_dir() and twin.is_file()):
        pytest.skip("python -m optkit.benchmarks.coreml --only basic_pitch fetches the package")
    function = Package(package).functions["main"]
    x = np.random.default_rng(0).normal(size=(1, 43844, 1)).astype(np.float32) * np.float32(0.1)
    found = Machine(function).run({function.inputs[0].name: x})
    reference = ReferenceSession(twin)
    expected = reference.run({reference.inputs[0]: x})
    assert len(found) == len(expected) == 3
    for array in expected.values():
        nearest = min(
            (v for v in found.values() if v.shape == array.shape), key=lambda v: np.abs(v - array).max()
        )
        assert np.abs(nearest - array).max() < 5e-5 < array.max()


def test_rounding_to_halves_is_that_of_numpy_for_every_half_every_tie_and_random_bits():
    from optkit.backends.coreml.reference.halves import halves

    every = np.arange(0x10000, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)]).astype(np.float64)
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    bits = (
        np.random.default_rng(0)
        .integers(0, 1 << 32, 1 << 18, dtype=np.uint64)
        .astype(np.uint32)
        .view(np.float32)
    )
    small = bits[np.abs(bits) < 65000]
    with np.errstate(all="ignore"):
        for values in (
            every,
            ties,
            np.nextafter(ties, np.float32(0)),
            np.nextafter(ties, np.float32(1e6)),
            bits,
            small,
        ):
            expected, found = values.astype(np.float16).astype(np.float32), halves(values)
            same = expected.view(np.uint32) == found.view(np.uint32)
            assert (same | (np.isnan(expected) & np.isnan(found))).all()


def test_the_share_below_a_point_is_that_of_the_error_function_in_float64():
    from optkit.backends.coreml.reference.ops.elementwise import gelu, share_below

    x = np.linspace(-11, 11, 100_001).astype(np.float32)
    exact = np.asarray([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x])
    assert np.abs(share_below(x) - exact).max() < 1e-7
    inside = np.abs(x) < 10
    assert (np.abs(share_below(x) / exact - 1)[inside]).max() < 3e-6
    assert np.abs(gelu(x) - x * exact).max() < 1e-6
    assert np.isnan(gelu(np.float32([np.nan]))).all()


def test_operations_that_are_not_rounded_give_numbers_that_need_no_rounding():
    from optkit.backends.coreml.reference.halves import halves
    from optkit.backends.coreml.reference.machine import _MOVES, _PICKS
    from optkit.backends.coreml.reference.ops import OPERATIONS

    a, b = (
        halves(np.random.default_rng(i).normal(size=(2, 3, 8, 8)).astype(np.float32) * 4) for i in range(2)
    )
    axes = {"axes": np.asarray([2]), "keep_dims": True}
    given = {
        "abs": {"x": a}, "clip": {"x": a, "alpha": -0.5, "beta": 2.25}, "max_pool": {"x": a, "kernel_sizes": np.asarray([2, 2])},
        "maximum": {"x": a, "y": b}, "minimum": {"x": a, "y": b}, "reduce_max": {"x": a, **axes}, "reduce_min": {"x": a, **axes},
        "relu": {"x": a}, "relu6": {"x": a}, "select": {"cond": a > b, "a": a, "b": b}, "threshold": {"x": a, "alpha": 0.125},
        "topk": {"x": a, "k": 3},
    }  # fmt: skip
    assert set(given) == _PICKS - _MOVES
    for kind, arguments in given.items():
        found = OPERATIONS[kind](**arguments)
        values = found[0] if isinstance(found, list | tuple) else found
        np.testing.assert_array_equal(np.asarray(values, np.float32), halves(values), err_msg=kind)


def test_float16_widens_to_what_numpy_says_for_every_number():
    from optkit.backends.coreml.reference.halves import widened

    every = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    for values in (every, every[np.isfinite(every)], every.reshape(256, 256).T):
        expected, found = values.astype(np.float32), widened(values)
        assert found.shape == values.shape
        same = expected.view(np.uint32) == found.view(np.uint32)
        assert (same | (np.isnan(expected) & np.isnan(found))).all()


def test_convolutions_in_parts_are_those_in_one_piece(monkeypatch):
    """A row of the output at a time, some of them over pads alone; depthwise along rows, columns and place by place."""
    from optkit.backends.coreml.reference.ops import linear

    random = np.random.default_rng(0)
    x, w = (random.normal(size=s).astype(np.float32) for s in ((2, 3, 5, 40), (4, 3, 2, 3)))
    d = random.normal(size=(3, 1, 3, 3)).astype(np.float32)
    dense = {
        "x": x,
        "weight": w,
        "pad_type": "custom",
        "pad": np.asarray([4, 5, 1, 0]),
        "strides": np.asarray([1, 2]),
    }
    deep = {
        "x": x,
        "weight": d,
        "groups": 3,
        "pad_type": "custom",
        "pad": np.asarray([2, 1, 1, 1]),
        "strides": np.asarray([2, 2]),
    }
    whole, bands = linear.conv(**dense), linear.conv(**deep)
    monkeypatch.setattr(linear, "_LEAST", 1)
    np.testing.assert_allclose(linear.conv(**dense, room=0), whole, atol=1e-5)
    np.testing.assert_allclose(linear.conv(**deep, room=0), bands, atol=1e-5)
    monkeypatch.setattr(linear, "_WIDE", 1 << 20)
    np.testing.assert_allclose(linear.conv(**deep, room=0), bands, atol=1e-5)
    # An infinity is far from most windows, and takes the way that multiplies no zeros.
    x[0, 0, 0, 0] = np.inf
    found = linear.conv(**deep, room=0)
    np.testing.assert_allclose(found[0, 1:], bands[0, 1:], atol=1e-5)
    assert not np.isnan(found).any()
    assert np.isinf(found[0, 0]).any()


DEPTHWISE = {
    "rows and columns": ([2, 160, 9, 7], 1, "kernel_shape = [3, 3], strides = [2, 1], pads = [1, 0, 2, 1]"),
    "two of each": ([1, 160, 6, 5], 2, "kernel_shape = [3, 3], pads = [1, 1, 1, 1]"),
    "far apart": ([1, 3, 12, 40], 1, "kernel_shape = [3, 2], dilations = [2, 3], pads = [2, 0, 1, 3]"),
    "a line": ([2, 160, 30], 1, "kernel_shape = [5], strides = [3], dilations = [2], pads = [4, 1]"),
    "a space": (
        [1, 4, 5, 6, 7],
        2,
        "kernel_shape = [3, 2, 3], strides = [1, 2, 2], pads = [1, 0, 1, 1, 1, 0]",
    ),
}


@pytest.mark.parametrize("pads", [[30, 0, 3, 0], [0, 30, 0, 3], [3, 2, 30, 30], [0, 0, 0, 0]])
@pytest.mark.parametrize("sizes", [(5, 40), (40, 6), (9, 9)])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
def test_depthwise_convolutions_over_wide_pads_are_those_over_zeros(pads, sizes, strides):
    """Whole bands lie in the pads: above, below, before and behind."""
    from optkit.backends.coreml.reference.ops import linear

    random = np.random.default_rng(0)
    x, w = (random.normal(size=s).astype(np.float32) for s in ((1, 3, *sizes), (3, 1, 3, 3)))
    found = linear.conv(x, w, strides=np.array(strides), pad_type="custom", pad=np.array(pads), groups=3)
    around = np.pad(x, ((0, 0), (0, 0), pads[:2], pads[2:]))
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), (2, 3))[
        :, :, :: strides[0], :: strides[1]
    ]
    expected = np.einsum("nchwab,cab->nchw", windows.astype(np.float64), w[:, 0].astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", DEPTHWISE)
@pytest.mark.parametrize("parts", [False, True])
def test_channels_side_by_side_are_what_onnx_runtime_computes(kind, parts, tmp_path, monkeypatch):
    from optkit.backends.coreml.reference.ops import linear

    shape, times, attributes = DEPTHWISE[kind]
    channels = shape[1]
    kernel = [int(k) for k in attributes.split("[")[1].split("]")[0].split(",")]
    sizes = ", ".join(map(str, shape))
    model = parse(
        HEAD + f"g (float[{sizes}] x) => (float[{', '.join('abcde'[: len(shape)])}] y) "
        f"{{ y = Conv<group = {channels}, {attributes}>(x, w, v) }}",
        w=np.random.default_rng(0).normal(size=(channels * times, 1, *kernel)).astype(np.float32),
        v=np.random.default_rng(1).normal(size=channels * times).astype(np.float32),
    )
    feeds = random_feeds(model)
    expected = ReferenceSession(model).run(feeds)["y"]
    called = []
    usual = linear._side_by_side
    monkeypatch.setattr(linear, "_side_by_side", lambda *given: (called.append(1), usual(*given))[1])
    monkeypatch.setattr(linear, "_MANY", 1)
    monkeypatch.setattr(linear, "_WIDE", 1 << 20)
    if parts:
        monkeypatch.setattr(linear, "_BESIDE", 1)
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(), tmp_path)
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        np.testing.assert_allclose(session.run(feeds)["y"], expected, atol=1e-5)
    assert called


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_written_over_that_somebody_still_reads(precision, tmp_path):
    """Inputs, constants, what a view shows, what a branch gives back, what is read twice, outputs."""
    model = parse(
        HEAD + """g (float[2, 4] x, bool c) => (float[2, 4] y, float[4, 2] v, float[2, 4] r, float[2, 4] z, float[2, 4] p, float[2, 4] o) {
          r0 = Relu(x)
          k = Add(w, r0)
          a = Sub(k, r0)
          v = Reshape(a, turned)
          n = Neg(a)
          u = Reshape(k, turned)
          i = Transpose<perm = [1, 0]>(u)
          o = Exp(i)
          b = Mul(x, k)
          z = If(c) <then_branch = one () => (float[2, 4] t) { t = Identity(b) }, else_branch = two () => (float[2, 4] e) { e = Neg(b) }>
          s = Relu(b)
          y = Add(n, s)
          q = Add(y, y)
          p = Mul(q, q)
          r = Relu(x)
        }""",
        w=np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), turned=np.array([4, 2]),
    )  # fmt: skip
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision=precision), tmp_path)
    feeds = {
        "x": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float16).astype(np.float32),
        "c": np.asarray(True),
    }
    before = feeds["x"].copy()
    expected = ReferenceSession(model).run(feeds)
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        for _ in range(2):
            found = session.run(feeds)
            for name, array in expected.items():
                np.testing.assert_allclose(
                    found[name], array, atol=1e-6 if precision == "fp32" else 1e-2, err_msg=name
                )
    np.testing.assert_array_equal(feeds["x"], before)


def _value(name, kind, *shape):
    from optkit.backends.coreml.reference.program import Output, Type

    return Output(name=name, type=Type(kind=kind, dtype=np.dtype(kind.lower()).type, shape=shape))


def _operation(kind, output, attributes=None, blocks=(), **inputs):
    from optkit.backends.coreml.reference.program import Name, Operation

    named = {k: [Name(n) for n in ([v] if isinstance(v, str) else v)] for k, v in inputs.items()}
    return Operation(
        kind=kind,
        name=output.name,
        inputs=named,
        attributes=attributes or {},
        outputs=(output,),
        blocks=blocks,
    )


def _machine(operations, outputs, *inputs):
    from optkit.backends.coreml.reference.machine import Machine
    from optkit.backends.coreml.reference.program import Block, Function

    block = Block(inputs=[], outputs=outputs, operations=operations)
    return Machine(Function(name="main", opset="CoreML8", inputs=list(inputs), block=block))


def test_sums_without_axes_keep_their_shape_in_float16():
    from optkit.backends.coreml.reference.program import Name

    x, total, row = _value("x", "FLOAT16", 3), _value("total", "FLOAT16"), _value("row", "FLOAT16", 1)
    axes = _operation("const", _value("axes", "INT32", 1), {"val": np.zeros(1, np.int32)})
    operations = [
        axes,
        _operation("reduce_sum", total, x="x", axes="axes"),
        _operation("expand_dims", row, x="total", axes="axes"),
    ]
    kept = _operation("const", _value("keep", "BOOL"), {"val": np.asarray(False)})
    operations[1].inputs["keep_dims"] = [Name("keep")]
    found = _machine([kept, *operations], ["row"], x).run({"x": np.ones(3, np.float16)})
    np.testing.assert_array_equal(found["row"], [3])


def test_a_branch_may_give_one_value_twice():
    from optkit.backends.coreml.reference.program import Block

    x, first, second = (_value(n, "FLOAT32", 2) for n in ("x", "first", "second"))
    same = Block(inputs=[], outputs=["x", "x"], operations=[])
    cond = _operation("cond", first, pred="which", blocks=(same, same))
    cond.outputs = (first, second)
    found = _machine([cond], ["first", "second"], x, _value("which", "BOOL")).run(
        {"x": np.arange(2, dtype=np.float32), "which": np.asarray(True)}
    )
    np.testing.assert_array_equal(found["first"], found["second"])


def test_first_runs_in_several_threads_are_prepared_once(monkeypatch):
    """Constants are let go once they are read: who came second must not look for them."""
    x = _value("x", "FLOAT32", 2)
    constants = [
        _operation("const", _value(f"c{i}", "FLOAT32", 2), {"val": np.full(2, i, np.float32)})
        for i in range(40)
    ]
    sums = [
        _operation("add", _value(f"s{i}", "FLOAT32", 2), x=f"s{i - 1}" if i else "x", y=f"c{i}")
        for i in range(40)
    ]
    machine = _machine([*constants, *sums], ["s39"], x)
    together = threading.Barrier(4)

    def run(_):
        together.wait()
        return machine.run({"x": np.ones(2, np.float32)})["s39"]

    usual = machine._prepared
    monkeypatch.setattr(machine, "_prepared", lambda body: (time.sleep(0.01), usual(body))[1])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(4)):
            np.testing.assert_array_equal(found, [781, 781])


def _block(operations, outputs, *inputs):
    from optkit.backends.coreml.reference.program import Block

    return Block(inputs=list(inputs), outputs=outputs, operations=operations)


def _order(block):
    from optkit.backends.coreml.reference.order import late

    return [op.outputs[0].name if op.outputs else op.kind for op in late(block)]


def test_a_value_that_waits_for_another_branch_is_computed_when_that_is_done():
    x, wide, small = _value("x", "FLOAT32", -1, 8), _value("wide", "FLOAT32", -1, 9), ("FLOAT32", -1, 2)
    operations = [
        _operation("linear", wide, x="x"),
        _operation("relu", _value("also", "FLOAT32", -1, 9), x="wide"),
        _operation("linear", _value("other", *small), x="x"),
        _operation("tanh", _value("ready", *small), x="other"),
        _operation("concat", _value("y", "FLOAT32", -1, 11), values=["also", "ready"]),
    ]
    assert _order(_block(operations, ["y"], x)) == ["other", "ready", "wide", "also", "y"]


@pytest.mark.parametrize("outputs", [["y"], ["y", "narrow"]])
def test_a_value_that_waits_in_less_room_than_what_it_is_made_of_is_computed_at_once(outputs):
    x, narrow = _value("x", "FLOAT32", -1, 8), _value("narrow", "FLOAT32", -1, 7)
    operations = [
        _operation("linear", narrow, x="x"),
        _operation("linear", _value("other", "FLOAT32", -1, 8), x="z"),
        _operation("concat", _value("y", "FLOAT32", -1, 15), values=["narrow", "other"]),
    ]
    given = _block(operations, outputs, x, _value("z", "FLOAT32", -1, 8))
    assert _order(given) == ["narrow", "other", "y"]


def test_states_are_read_and_written_in_the_order_that_the_program_says():
    kept = _value("kept", "FLOAT16", 4)
    write = _operation("write_state", kept, input="state", data="x")
    write.outputs = ()
    operations = [
        _operation("read_state", kept, input="state"),
        write,
        _operation("read_state", _value("again", "FLOAT16", 4), input="state"),
        _operation("add", _value("y", "FLOAT16", 4), x="kept", y="again"),
    ]
    assert _order(_block(operations, ["y"], _value("x", "FLOAT16", 4))) == [
        "kept",
        "write_state",
        "again",
        "y",
    ]


def _most(block, operations):
    """Elements that are held at most while an operation runs, which must find all that it reads."""
    made = {v.name: -1 for v in block.inputs} | {o.outputs[0].name: i for i, o in enumerate(operations)}
    last = made | dict.fromkeys(block.outputs, len(operations))
    for index, op in enumerate(operations):
        assert all(made[name] < index for name in op.names)
        last |= {name: max(index, last[name]) for name in op.names}
    values = [*block.inputs, *(o.outputs[0] for o in operations)]
    return max(
        sum(v.type.shape[0] for v in values if made[v.name] <= index <= last[v.name])
        for index in range(len(operations))
    )


def test_operations_in_another_order_find_what_they_read_and_hold_no_more_at_most():
    from optkit.backends.coreml.reference.order import late

    random = np.random.default_rng(0)
    most = []
    for _ in range(200):
        values, operations = [_value("x", "FLOAT32", 10)], []
        for i in range(20):
            # Mostly of what is near, as in networks.
            read = {values[-min(int(n), len(values))].name for n in random.geometric(0.4, size=2)}
            values.append(_value(f"v{i}", "FLOAT32", int(random.integers(1, 30))))
            operations.append(_operation("concat", values[-1], values=sorted(read)))
        block = _block(operations, ["v19", "v18"], values[0])
        found = late(block)
        assert sorted(map(id, found)) == sorted(map(id, operations))
        most.append((_most(block, operations), _most(block, found)))
    before, after = np.array(most).T
    assert (after < before).mean() > 0.25
    assert (after <= before).all()


def test_a_constant_is_not_written_over_through_a_view():
    weights = np.linspace(-1, 1, 6, dtype=np.float16)
    operations = [
        _operation("const", _value("w", "FLOAT16", 6), {"val": weights}),
        _operation("reshape", _value("seen", "FLOAT16", 2, 3), x="w", shape="sizes"),
        _operation("exp", _value("found", "FLOAT16", 2, 3), x="seen"),
    ]
    machine = _machine(operations, ["found"], _value("sizes", "INT32", 2))
    for _ in range(2):
        result = machine.run({"sizes": np.array([2, 3], np.int32)})["found"]
        np.testing.assert_allclose(result, np.exp(weights.astype(np.float32)).reshape(2, 3), rtol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "conv", "conv of one element", "grouped conv", "linear", "matmul", "transposed", "lstm", "lstm both ways", "gru",
        "gru backwards", "rnn",
    ],
)  # fmt: skip
def test_weights_in_float16_are_widened_some_rows_at_a_time(kind, monkeypatch):
    """The numbers are those of the weights in float32 at once, up to the order of sums."""
    from optkit.backends.coreml.reference.ops import OPERATIONS, linear, recurrent

    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    cells = {"x": draw(5, 2, 6), "initial_h": draw(2, 8)}
    lstm = cells | {"initial_c": draw(2, 8), "bias": draw(32), "output_sequence": True}
    both = lstm | {"initial_h": draw(2, 16), "initial_c": draw(2, 16), "direction": "bidirectional"}

    def weights(gates, way=""):
        return {f"weight_ih{way}": draw(gates * 8, 6), f"weight_hh{way}": draw(gates * 8, 8)}

    given, narrow = {
        "conv": ({"x": draw(2, 3, 9, 7)}, {"weight": draw(10, 3, 3, 2)}),
        "conv of one element": ({"x": draw(2, 3, 9, 7)}, {"weight": draw(10, 3, 1, 1)}),
        "grouped conv": ({"x": draw(2, 6, 9, 7), "groups": 2}, {"weight": draw(10, 3, 3, 2)}),
        "linear": ({"x": draw(2, 5, 6), "bias": draw(10)}, {"weight": draw(10, 6)}),
        "matmul": ({"x": draw(2, 5, 6)}, {"y": draw(6, 10)}),
        "transposed": ({"x": draw(2, 6, 5), "transpose_x": True, "transpose_y": True}, {"y": draw(10, 6)}),
        "lstm": (lstm, weights(4)),
        "lstm both ways": (both, weights(4) | weights(4, "_back")),
        "gru": (cells | {"output_sequence": True}, weights(3)),
        "gru backwards": (cells | {"direction": "reverse"}, weights(3)),
        "rnn": (cells | {"bias": draw(8), "output_sequence": True}, weights(1)),
    }[kind]
    halves = {k: v.astype(np.float16) for k, v in narrow.items()}
    run = OPERATIONS[
        kind.split()[-1] if kind == "grouped conv" else {"transposed": "matmul"}.get(kind, kind.split()[0])
    ]
    expected = run(**given, **{k: v.astype(np.float32) for k, v in halves.items()})
    monkeypatch.setattr(linear, "_WIDENED", 1)
    for module in (linear, recurrent):
        monkeypatch.setattr(module, "_LEAST", 1)
    found = run(**given, **halves, **({"room": 0} if "initial_h" in given else {}))
    for a, b in zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]:
        assert b.dtype == np.float32
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def _peak(run: Callable[[], Any]) -> int:
    """Bytes that it holds at most, beside what there was before."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _run_and_peak(model, precision: str, folder: Path, feeds) -> tuple[dict[str, np.ndarray], int]:
    """What its package gives, and the bytes that a second run holds at most."""
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision=precision), folder)
    with backend.load(folder, PHONE, backend.options()) as session:
        return session.run(feeds), _peak(lambda: session.run(feeds))


def test_to_see_that_weights_are_finite_takes_less_memory_than_a_small_program():
    from optkit.backends.coreml.reference.halves import is_finite

    weights = np.ones(1 << 18, np.float16)
    assert is_finite(weights)
    assert _peak(lambda: is_finite(weights)) < 1 << 15
    weights[-1] = np.inf
    assert not is_finite(weights)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_large_weights_that_are_not_finite_stay_so(odd, tmp_path):
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    weight[3, 5] = odd
    model = parse(HEAD + "g (float[1, 64] x) => (float[1, 128] y) { y = MatMul(x, w) }", w=weight)
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision="fp16"), tmp_path)
    feeds = random_feeds(model)
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        found = session.run(feeds)["y"]
    expected = feeds["x"] @ weight
    np.testing.assert_array_equal(found[:, 5], expected[:, 5])
    np.testing.assert_allclose(np.delete(found, 5, 1), np.delete(expected, 5, 1), atol=0.1)


@pytest.mark.parametrize("kind", ["relu", "relu6", "clip"])
def test_clipped_while_rounding_infinities_and_nan_are_what_clipping_makes_of_them(kind):
    """Large numbers become float16's infinity where no bound keeps them from it."""
    from optkit.backends.coreml.reference.halves import halves
    from optkit.backends.coreml.reference.ops import OPERATIONS

    bounds = {"alpha": -1.0, "beta": 6.0} if kind == "clip" else {}
    values = np.array(
        [np.nan, np.inf, -np.inf, 1e5, -1e5, 3e-8, 2.0**-14 * 1.0004, 5.998, 0.0, -0.3], np.float32
    )
    clip = functools.partial(OPERATIONS[kind], **bounds)
    with np.errstate(over="ignore"):
        expected = clip(values).astype(np.float16).astype(np.float32)
        found = halves(values, clip=clip, positive=kind != "clip", small=kind != "relu")
    np.testing.assert_array_equal(found, expected)


def test_of_large_weights_in_float16_a_part_alone_is_in_float32_at_a_time(tmp_path):
    weight = np.random.default_rng(0).normal(size=(512, 4096)).astype(np.float32)
    model = parse(HEAD + "g (float[1, 512] x) => (float[1, 4096] y) { y = MatMul(x, w) }", w=weight)
    feeds = random_feeds(model)
    _, peak = _run_and_peak(model, "fp16", tmp_path, feeds)
    assert peak < weight.nbytes / 16


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_recurrent_layer_takes_little_more_memory_than_its_input_and_output(precision, tmp_path):
    """Four gates of all steps would be four times the output, and the weights in float32 more than both."""
    random = np.random.default_rng(0)
    model = parse(
        HEAD + "g (float[200, 1, 256] x) => (float[200, 1, 1, 256] y) { y = LSTM<hidden_size = 256>(x, w, r) }",
        w=random.normal(size=(1, 1024, 256)).astype(np.float32) / 16, r=random.normal(size=(1, 1024, 256)).astype(np.float32) / 16,
    )  # fmt: skip
    feeds = random_feeds(model)
    expected = ReferenceSession(model).run(feeds)["y"]
    found, peak = _run_and_peak(model, precision, tmp_path, feeds)
    np.testing.assert_allclose(found["y"], expected, atol=1e-5 if precision == "fp32" else 1e-2)
    assert peak < 2 * feeds["x"].nbytes + 2**17


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_takes_no_more_memory_than_twice_the_largest_activation(precision, tmp_path):
    random = np.random.default_rng(0)
    model = parse(
        HEAD + """g (float[1, 8, 512, 512] x) => (float[1, 8] y) {
          a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
          b = Sigmoid(a)
          c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8>(b, d)
          e = Gelu(c)
          f = HardSigmoid(e)
          g = Softmax<axis = 3>(f)
          h = LayerNormalization<axis = 3>(g, k, l)
          m = Relu(h)
          y = ReduceMean<keepdims = 0>(m, axes)
        }""",
        w=random.normal(size=(8, 8, 3, 3)).astype(np.float32), d=random.normal(size=(8, 1, 3, 3)).astype(np.float32),
        k=random.normal(size=512).astype(np.float32), l=random.normal(size=512).astype(np.float32), axes=np.array([2, 3]),
    )  # fmt: skip
    feeds = random_feeds(model)
    largest = feeds["x"].nbytes
    _, peak = _run_and_peak(model, precision, tmp_path, feeds)
    # Beside them a padded channel, and pieces of elementwise steps.
    assert peak < 2 * largest + 5 * 2**18


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("sizes", ["6, 160", "32, 30", "12, 12", "960"])
def test_convolutions_find_room_beside_an_input_and_an_output_of_the_largest_size(precision, sizes, tmp_path):
    """Depthwise and dense, for low and wide pictures, square ones, small ones of many channels and lines; and the pooling."""
    random = np.random.default_rng(0)
    axes = len(sizes.split(","))
    channels = 1_000 if sizes == "12, 12" else 150
    window = f"kernel_shape = {[3] * axes}, pads = {[1] * 2 * axes}"
    model = parse(
        HEAD + f"""g (float[1, {channels}, {sizes}] x) => (float[1, {channels}, {sizes}] y) {{
          a = Conv<{window}, group = {channels}>(x, d)
          b = Conv<{window}, group = {channels // 25}>(a, w)
          y = MaxPool<{window}>(b)
        }}""",
        d=random.normal(size=(channels, 1, *[3] * axes)).astype(np.float32),
        w=random.normal(size=(channels, 25, *[3] * axes)).astype(np.float32) / 9,
    )  # fmt: skip
    feeds = random_feeds(model)
    expected = ReferenceSession(model).run(feeds)["y"]
    found, peak = _run_and_peak(model, precision, tmp_path, feeds)
    np.testing.assert_allclose(found["y"], expected, atol=1e-4 if precision == "fp32" else 0.1)
    # Beside them what one row of the output is computed from, and pieces of a fixed size.
    assert peak < 2 * feeds["x"].nbytes + 5 * 2**17


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_part_keeps_of_a_whole_that_nobody_reads_counts_as_held(precision, tmp_path):
    """As values of attention do, which come out of one product with queries and keys."""
    model = parse(
        HEAD + """g (float[8, 32, 64, 64] x) => (float[1, 32, 64, 64] y) {
          a = Relu(x)
          b, c = Split<axis = 0>(a, sizes)
          d = ReduceMax(b, axis)
          e = Exp(a)
          f = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(d, w)
          g = ReduceMax(e, axis)
          h = Add(f, g)
          y = Add(h, c)
        }""",
        sizes=np.array([7, 1]), axis=np.array([0]),
        w=np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype(np.float32) / 17,
    )  # fmt: skip
    feeds = {"x": np.random.default_rng(1).normal(size=(8, 32, 64, 64)).astype(np.float32)}
    _, peak = _run_and_peak(model, precision, tmp_path, feeds)
    # Beside them an input and an output of the convolution, and what it is computed from.
    assert peak < 2 * feeds["x"].nbytes + 3 * feeds["x"].nbytes // 8


def test_the_same_input_gives_the_same_bits_whatever_ran_before(tmp_path):
    """How much room there is decides on the pieces of products, and these on how sums are rounded."""
    random = np.random.default_rng(0)
    model = parse(
        HEAD + """g (float[1, N, 384] x) => (float[1, N, 384] y) {
          a = MatMul(x, v)
          b = Gelu(a)
          y = MatMul(b, w)
        }""",
        v=random.normal(size=(384, 1536)).astype(np.float32) / 20, w=random.normal(size=(1536, 384)).astype(np.float32) / 40,
    )  # fmt: skip
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision="fp16"), tmp_path)
    small, large = ({"x": random.normal(size=(1, n, 384)).astype(np.float32)} for n in (16, 400))
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        first, again, _, after = (session.run(x)["y"] for x in (small, small, large, small))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, after)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_elements_are_written_over_those_that_nobody_reads_afterwards(precision, tmp_path):
    model = parse(
        HEAD + """g (float[1, 4, 256, 256] x) => (float[1, 4, 256, 256] y) {
          a = Add(x, c)
          b = Clip(a, low, high)
          d = Gelu(b)
          e = Mul(d, c)
          f = Div(e, c)
          g = Reshape(f, flat)
          h = Softmax(g)
          y = Reshape(h, whole)
        }""",
        c=np.float32(1.5), low=np.float32(-1), high=np.float32(1), flat=np.array([1024, 256]), whole=np.array([1, 4, 256, 256]),
    )  # fmt: skip
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision=precision), tmp_path)
    feeds = random_feeds(model)
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        features = session.features(feeds)
        session.compute(features)
        peak = _peak(lambda: session.compute(features))
    # In float16 the input is widened beside, and pieces are of a fixed size.
    assert peak < (1 + (precision == "fp16")) * feeds["x"].nbytes + 2**20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_who_watches_sees_the_same_numbers(precision, tmp_path):
    """Watched, every operation rounds and has memory of its own."""
    random = np.random.default_rng(0)
    model = parse(
        HEAD + """g (float[1, 4, 40, 50] x) => (float[1, 4, 40, 50] y, float[1, 4, 40, 50] z, float[1, 4, 40, 50] v) {
          a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
          b = Clip(a, zero, six)
          c = Mul(b, k)
          d = Clip(c, low, high)
          e = Sub(d, b)
          y = Relu(e)
          f = Mul(y, k)
          v = Clip(f, low, high)
          g = Sub(f, x)
          z = Softmax(g)
        }""",
        w=random.normal(size=(4, 4, 3, 3)).astype(np.float32) * np.float32(1e-3), k=np.float32(0.3), zero=np.float32(0),
        six=np.float32(6), low=np.float32(-0.001), high=np.float32(0.002),
    )  # fmt: skip
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(precision=precision), tmp_path)
    feeds = random_feeds(model)
    seen = []
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        features = session.features(feeds)
        watched = session.compute(features, lambda op, *_: seen.append(op.kind))
        alone = session.compute(features)
    assert len([k for k in seen if k in ("clip", "relu", "relu6")]) == 4
    for name, array in watched.items():
        np.testing.assert_array_equal(alone[name], array, err_msg=name)


def test_a_clip_that_lacks_its_bounds_is_named_where_it_is_done_while_rounding(tmp_path):
    model = parse(
        HEAD + "g (float[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y) { a = Conv(x, w) y = Clip(a, low, high) }",
        w=np.ones((3, 3, 1, 1), np.float32), low=np.float32(-1), high=np.float32(1),
    )  # fmt: skip
    backend = BACKENDS.get("coreml")()
    (tmp_path / "a").mkdir()
    backend.lower(model, PHONE, backend.options(precision="fp16"), tmp_path / "a")
    changed = _edited(tmp_path / "a", tmp_path / "b", _drop("clip", "alpha"))
    with backend.load(changed, PHONE, None) as session, pytest.raises(ModelError, match=r"clip '.*alpha"):
        session.run(random_feeds(model))


@pytest.mark.parametrize(
    ("body", "x", "name"),
    [
        ("a = Abs(x) b = Add(a, k) y = Add(b, k)", 1, "add 'y_1'"),
        ("c = Mul(x, k) y = Sub(c, k)", 2, "mul 'c'"),
        ("p = Mul(x, x) y = ReduceSum(p)", 40_000, "reduce_sum 'y_1'"),
    ],
)
def test_a_value_beyond_the_integers_of_core_ml_is_told_by_its_name(body, x, name, tmp_path):
    """ONNX computes it in 64 bits; in 32 it would be another number."""
    model = parse(HEAD + f"g (int64[3] x) => (int64[n] y) <int64 k = {{2000000000}}> {{ {body} }}")
    backend = BACKENDS.get("coreml")()
    backend.lower(model, PHONE, backend.options(), tmp_path)
    with backend.load(tmp_path, PHONE, backend.options()) as session:
        with pytest.raises(
            ModelError, match=f"{name} gives integers beyond 32 bits .*, and Core ML has none"
        ):
            session.run({"x": np.full(3, x)})
        small = {"x": np.array([-1, 0, 0])}
        expected = ReferenceSession(model).run(small)["y"]
        if np.abs(expected).max() < 1 << 31:
            np.testing.assert_array_equal(session.run(small)["y"], expected)
