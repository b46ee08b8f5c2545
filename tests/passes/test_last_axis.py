"""Long axes last: the same numbers over axes in another order, where that saves padding and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.base import Context
from optkit.passes.lowering.last_axis import LengthenLastAxis
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.rewrite import near_misses
from optkit.targets import target
from optkit.testing import check_pass, parse, random_feeds, same_numbers

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
ENGINE = Context(target=target("apple-ane"))
# Takes float32 as well, which shows the same numbers best.
PHONE = target("iphone15")


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


CHAIN = (
    HEAD
    + """g (float[N, 6, 70] x) => (float[N, 8, 68] y) <int64[1] three = {3}> {
      u = Unsqueeze(x, three) c = Conv<kernel_shape = [3, 1]>(u, w, b) r = Relu(c) s = Mul(r, f) y = Squeeze(s, three) }"""
)
_CHAIN = {"w": _floats(8, 6, 3, 1), "b": _floats(8), "f": _floats(8, 68, 1)}


def test_a_sequence_of_columns_becomes_one_of_rows():
    ops = ["Reshape", "Conv", "Relu", "Mul", "Reshape"]
    after = check_pass(LengthenLastAxis(), parse(CHAIN, **_CHAIN), ops=ops, context=ENGINE)
    conv = next(n for n in after.graph if n.op_type == "Conv")
    assert list(conv.inputs[1].shape) == [8, 6, 1, 3]
    assert list(conv.attributes["kernel_shape"].value) == [1, 3]
    assert list(conv.outputs[0].shape)[1:] == [8, 1, 68]


# One operator each in the middle of a chain: inputs ``r`` and ``q``, ``[N, 4, 40, 2]``, its weights, and what it gives.
OPERATORS = {
    "windows": ("Conv<pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2], group = 2>(r, k)", {"k": (4, 2, 3, 2)}, "4, 21, 1"),
    "windows back": ("ConvTranspose<strides = [3, 1], output_padding = [2, 0], pads = [1, 0, 0, 1]>(r, k)", {"k": (4, 5, 3, 2)}, "5, 121, 2"),
    "windows by rule": ('MaxPool<kernel_shape = [3, 2], auto_pad = "SAME_LOWER">(r)', {}, "4, 40, 2"),
    "means of windows": ("AveragePool<kernel_shape = [4, 1], strides = [2, 1], pads = [1, 0, 0, 0]>(r)", {}, "4, 19, 2"),
    "norms of channels": ("BatchNormalization(r, v, v, v, p)", {"v": (4,), "p": (4,)}, "4, 40, 2"),
    "norms of places": ("InstanceNormalization(r, v, v)", {"v": (4,)}, "4, 40, 2"),
    "slopes": ("PRelu(r, k)", {"k": (40, 1)}, "4, 40, 2"),
    "vectors": ("Sub(k, r)", {"k": (2,)}, "4, 40, 2"),
    "one number": ("Mul(r, one)", {}, "4, 40, 2"),
    "a number that is fed": ("Mul(r, fed)", {}, "4, 40, 2"),
    "a choice": ("Where(t, r, q)", {}, "4, 40, 2"),
    "softmax": ("Softmax<axis = -2>(r)", {}, "4, 40, 2"),
    "several": ("Concat<axis = -1>(r, q, r)", {}, "4, 40, 6"),
    "a part": ("Slice(r, from, to, at)", {}, "4, 11, 1"),
    "a part by short numbers": ("Slice(r, i, j, n)", {}, "4, 11, 2"),
    "a part of the first axes": ("Slice(r, zeros, most)", {}, "3, 30, 1"),
    "edges": ('Pad<mode = "edge">(r, around)', {}, "5, 42, 5"),
    "some edges": ("Pad(r, few, one, at)", {}, "4, 43, 3"),
    "a sum": ("ReduceSum<keepdims = 1>(r, two)", {}, "4, 1, 2"),
}  # fmt: skip
_NUMBERS = """<int64[2] from = {3, 1}, int64[2] to = {14, 2}, int64[2] at = {-2, 3}, int64[4] zeros = {0, 1, 2, 0}, int64[4] most = {9, 4, 32, 1},
  int64[8] around = {0, 1, 2, 3, 0, 0, 0, 0}, int64[4] few = {1, 0, 2, 1}, int64[1] two = {2}, float one = {0.5},
  int32[1] i = {3}, int32[1] j = {14}, int32[1] n = {2}>"""


@pytest.mark.parametrize("batch", ["N", "2"])
@pytest.mark.parametrize("what", OPERATORS)
def test_operators_compute_the_same_in_another_order(what, batch):
    operator, weights, sizes = OPERATORS[what]
    # Steps enough before and behind that the moves are paid for, whatever sizes come out of the middle.
    before = " ".join(f"a{i + 1} = Sigmoid(a{i})" for i in range(9))
    after = " ".join(f"z{i + 1} = Tanh(z{i})" for i in range(8))
    model = parse(
        HEAD
        + f"""g (float[{batch}, 4, 40, 2] a0, float[1] fed) => (float[{batch}, {sizes}] y) {_NUMBERS} {{
      {before} r = Neg(a9) q = Abs(a4) t = Cast<to = 9>(a5) z0 = {operator} {after} y = Neg(z8) }}""",
        **{k: np.abs(_floats(*shape)) if k == "p" else _floats(*shape) for k, shape in weights.items()},
    )
    after = check_pass(LengthenLastAxis(), model, context=ENGINE)
    assert all(n.outputs[0].shape[3] == 40 for n in after.graph if n.op_type == "Sigmoid")
    # Nothing is moved in the middle, but before the first and behind the last of all.
    moved = [i for i, n in enumerate(after.graph) if n.op_type == "Transpose"]
    assert moved == [0, len(after.graph) - 1]


STACKED = (
    HEAD
    + """g (float[N, 172, 48] x) => (float[N, 2, 172, 40] y%s)
    <int64[1] three = {3}, int64[1] zero = {0}, int64[1] end = {39}, int64[1] two = {2}, int64[8] pads = {0, 0, 0, 0, 0, 0, 9, 0},
     int64[1] last = {40}, int64[1] one = {1}, float scale = {0.5}> {
      u = Unsqueeze(x, three) m = Mul(u, scale) s = Slice(m, zero, end, two) p = Pad(s, pads) c = Concat<axis = 3>(m, p)
      d = Slice(c, zero, last, two) %s }"""
)


def test_channels_that_come_last_come_second_and_nothing_is_moved():
    text = STACKED % ("", "y = Transpose<perm = [0, 3, 1, 2]>(d)")
    after = check_pass(LengthenLastAxis(), text, context=ENGINE)
    assert [n.op_type for n in after.graph] == ["Reshape", "Mul", "Slice", "Pad", "Concat", "Slice"]


def test_a_sum_over_the_short_axis_ends_the_region():
    text = STACKED % ("", "e = ReduceSum<keepdims = 0>(d, three) y = Unsqueeze(e, one)")
    text = text.replace("2, 172, 40] y", "1, 172, 40] y")
    after = check_pass(LengthenLastAxis(), text, context=ENGINE)
    assert "Transpose" not in [n.op_type for n in after.graph]


def test_what_is_read_elsewhere_or_given_out_is_moved_back():
    text = STACKED % (
        ", float[N, 172, 48, 2] c, float[N, 40, 2] o",
        "y = Transpose<perm = [0, 3, 1, 2]>(d) o = ReduceMax<keepdims = 0>(d, one)",
    )
    after = check_pass(LengthenLastAxis(), text, context=ENGINE)
    moved = [n for n in after.graph if n.op_type == "Transpose"]
    assert [list(n.attributes["perm"].value) for n in moved] == [[0, 2, 3, 1], [0, 2, 3, 1]]


def test_a_transpose_before_a_convolution_is_moved_with_what_is_before_it():
    text = (
        HEAD
        + """g (float[N, 40, 36] x) => (float[N, 36, 40] y) <int64[1] three = {3}> {
      u = Unsqueeze(x, three) s = Exp(u) t = Transpose<perm = [0, 2, 1, 3]>(s) c = Conv(t, w) y = Squeeze(c, three) }"""
    )
    ops = ["Reshape", "Exp", "Transpose", "Conv", "Reshape"]
    after = check_pass(LengthenLastAxis(), parse(text, w=_floats(36, 36, 1, 1)), ops=ops, context=ENGINE)
    assert min(n.outputs[0].shape[3] for n in after.graph if len(n.outputs[0].shape) == 4) == 36


def test_parts_are_taken_in_the_other_order_too():
    text = (
        HEAD
        + """g (float[N, 4, 40, 2] x) => (float[N, 4, 20, 2] y) {
      a = Exp(x) b = Neg(a) c = Sin(b) d = Cos(c) p, q = Split<axis = 2, num_outputs = 2>(d) s = Add(p, q) t = Exp(s) u = Neg(t) v = Sin(u)
      y = Cos(v) }"""
    )
    after = check_pass(LengthenLastAxis(), text, context=ENGINE)
    part = next(n for n in after.graph if n.op_type == "Split")
    assert part.attributes["axis"].value == 3
    assert [list(v.shape)[1:] for v in part.outputs] == [[4, 2, 20]] * 2


# Nobody pays for two moves around one convolution.
ALONE = HEAD + "g (float[N, 6, %s] x) => (float[N, 8, %s] y) { y = Conv<kernel_shape = [3, 1]>(x, w, b) }"


@pytest.mark.parametrize(
    ("sizes", "out"),
    [("70, 1", "68, 1"), ("20, 1", "18, 1"), ("70, 70", "68, 70"), ("20, 70", "18, 70"), ("T, 1", "T2, 1"), ("70, T", "68, T")],
    ids=["moves that cost more", "short both ways", "a square", "long already", "an unknown length", "an unknown last axis"],
)  # fmt: skip
def test_other_convolutions_stay(sizes, out):
    model = parse(ALONE % (sizes, out), w=_CHAIN["w"], b=_CHAIN["b"])
    with near_misses() as misses:
        assert LengthenLastAxis().run(model, ENGINE) == []
    assert [m.rule for m in misses] == ["lengthen-last-axis"] * (sizes in ("70, 1", "20, 1"))
    if sizes == "70, 1":
        # Of 64 bytes each: the rows that are read and written, and three parts of 64 bytes a channel for as long a row.
        inside, moved = 64 * (6 * 70 + 8 * 68), 64 * 3 * (6 + 8)
        assert f"2 more Transposes, and {inside + 2 * moved} bytes instead of {inside}" in misses[0].reason


def test_a_kernel_that_is_fed_stays():
    text = CHAIN.replace("70] x)", "70] x, float[8, 6, 3, 1] w)")
    after = check_pass(LengthenLastAxis(), parse(text, b=_CHAIN["b"], f=_CHAIN["f"]), context=ENGINE)
    conv = next(n for n in after.graph if n.op_type == "Conv")
    assert list(conv.inputs[0].shape)[1:] == [6, 70, 1]


def test_moves_that_operators_do_not_outnumber_have_to_save_half():
    # Keys by heads, as they are after split-heads: of 51 positions, which take the place of 64, but 32 features.
    text = (
        HEAD
        + """g (float[2, 51, 4, 32] k, float[2, 4, 51, 32] q) => (float[2, 4, 51, 51] y) {
      t = Transpose<perm = [0, 2, 3, 1]>(k) a, b, c, d = Split<axis = 1, num_outputs = 4>(t) e, f, g, h = Split<axis = 1, num_outputs = 4>(q)
      i = MatMul(e, a) j = MatMul(f, b) l = MatMul(g, c) m = MatMul(h, d) y = Concat<axis = 1>(i, j, l, m) }"""
    )
    with near_misses() as misses:
        assert LengthenLastAxis().run(parse(text), ENGINE) == []
    # Of 64 bytes a row: k and t, t and the parts; and then k and the parts, and these before and after moves of their own.
    k, t = 2 * 51 * 4, 2 * 4 * 32 * 2
    before, after = 64 * (k + 3 * t), 64 * (2 * k + k + t)
    assert after < 0.9 * before
    assert any(f"3 more Transposes, and {after} bytes instead of {before}" in m.reason for m in misses)


def test_a_batch_that_moves_ends_the_region():
    text = (
        HEAD
        + "g (float[N, 4, 40, 2] x) => (float[40, 4, N, 2] y) { a = Exp(x) b = Sin(a) t = Transpose<perm = [2, 1, 0, 3]>(b) y = Neg(t) }"
    )
    after = check_pass(LengthenLastAxis(), text, context=ENGINE)
    assert next(n for n in after.graph if n.op_type == "Neg").outputs[0].shape[0] == 40


def test_elsewhere_nothing_changes():
    assert LengthenLastAxis().run(parse(CHAIN, **_CHAIN), Context(target=target("iphone15"))) == []


@pytest.mark.needs("coremltools")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_package_has_long_last_axes_and_the_same_numbers(precision, tmp_path):
    from optkit.backends import BACKENDS
    from optkit.backends.coreml.reference.program import Package

    backend, model = BACKENDS.get("coreml")(), parse(CHAIN.replace("N", "2"), **_CHAIN)
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    run_passes(model, Recipe.load("neural-engine").passes, ENGINE)
    options = backend.options.model_validate({"precision": precision})
    backend.lower(model, PHONE, options, tmp_path)
    block = Package(tmp_path / "model.mlpackage").functions["main"].block
    computed = [o for o in block.operations if o.kind in ("conv", "relu", "mul")]
    assert len(computed) == 3 and all(o.outputs[0].type.shape[-1] == 68 for o in computed)
    with backend.load(tmp_path, PHONE, options) as session:
        # Half precision: eighteen products of numbers around 1, of 11 bits each.
        np.testing.assert_allclose(
            session.run(feeds)["y"], expected, atol=1e-5 if precision == "fp32" else 3e-2
        )


def _stored(model: ir.Model) -> int:
    """Elements of all values with the last axis padded to 32; names count once."""
    shapes = [
        [d if isinstance(d, int) else 1 for d in v.shape] for n in model.graph for v in n.outputs if v.shape
    ]
    return sum(int(np.prod(s[:-1])) * -(-s[-1] // 32) * 32 for s in shapes)


@pytest.mark.parametrize(
    ("name", "shape", "times"), [("basic_pitch", (1, 43844, 1), 6), ("magika", (1, 2048), 4)]
)
def test_real_models_store_a_fraction_and_compute_the_same(name, shape, times):
    from optkit.benchmarks import suite
    from optkit.errors import OptkitError
    from optkit.frontend import load

    try:
        path = suite.fetch(name)
    except OptkitError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    model = load(path, check=False)
    passes = [p for p in Recipe.load("coreml-fp16").passes if p.name != "lengthen-last-axis"]
    run_passes(model, passes, ENGINE)
    after = model.clone()
    assert LengthenLastAxis().run(after, ENGINE)
    random, value = np.random.default_rng(0), model.graph.inputs[0]
    kind = value.dtype.numpy()
    drawn = random.normal(size=shape) * 0.1 if kind == np.float32 else random.integers(0, 256, shape)
    same_numbers(model, after, {str(value.name): drawn.astype(kind)}, atol=1e-5, rtol=1e-4)
    assert _stored(after) * times < _stored(model)


class _Random:
    """Grows a graph over ``[N, 4, 36, 2]`` a step at a time, with Transposes, Reshapes and values that are read twice between."""

    def __init__(self, seed: int) -> None:
        self.random, self.lines, self.weights = (
            np.random.default_rng(seed),
            list[str](),
            dict[str, np.ndarray](),
        )
        self.values = [("x", (4, 36, 2)), ("z", (4, 36, 1))]

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = array if array.dtype == np.int64 else array.astype(np.float32)
        return name

    def step(self) -> None:
        random = self.random
        (x, s), to = (
            self.values[random.integers(max(0, len(self.values) - 5), len(self.values))],
            f"v{len(self.lines)}",
        )
        like = [v for v, t in self.values if t == s]
        at = int(random.integers(3))
        axes = self.constant(np.array([at + 1]))
        kernel = [int(random.integers(1, min(3, d) + 1)) for d in s[1:]]
        order = [int(i) for i in random.permutation(3)]
        wide = self.constant(
            random.normal(size=[d if random.random() < 0.5 else 1 for d in s][random.integers(3) :])
        )
        kind, t = int(random.integers(11)), s
        if kind < 2:
            line = f"{random.choice(['Relu', 'Sigmoid', 'Tanh', 'Neg'])}({x})"
        elif kind == 2:
            line = f"{random.choice(['Add', 'Mul', 'Sub'])}({x}, {random.choice([wide, str(random.choice(like))])})"
        elif kind == 3:
            weight = self.constant(random.normal(size=(3, s[0], *kernel)) / s[0])
            line, t = f"Conv({x}, {weight})", (3, s[1] - kernel[0] + 1, s[2] - kernel[1] + 1)
        elif kind == 4:
            line = f"MaxPool<kernel_shape = {kernel}>({x})"
            t = (s[0], s[1] - kernel[0] + 1, s[2] - kernel[1] + 1)
        elif kind == 5 and s[at] < 50:
            line, t = (
                f"Concat<axis = {at + 1}>({x}, {random.choice(like)})",
                tuple(d * 2 if i == at else d for i, d in enumerate(s)),
            )
        elif kind == 6 and s[at] > 2:
            line = f"Slice({x}, {self.constant(np.array([1]))}, {self.constant(np.array([99]))}, {axes})"
            t = tuple(d - (i == at) for i, d in enumerate(s))
        elif kind == 7:
            line, t = (
                f"Pad({x}, {self.constant(np.array([1, 0]))}, , {axes})",
                tuple(d + (i == at) for i, d in enumerate(s)),
            )
        elif kind == 8:
            self.lines.append(f"m{to} = ReduceMean<keepdims = {at % 2}>({x}, {axes})")
            line = f"Sub({x}, m{to})" if at % 2 else f"Unsqueeze(m{to}, {axes})"
            t = s if at % 2 else tuple(1 if i == at else d for i, d in enumerate(s))
        elif kind == 9:
            line, t = f"Transpose<perm = {[0, *(i + 1 for i in order)]}>({x})", tuple(s[i] for i in order)
        else:
            ones = [d for d in s if d != 1]
            t = tuple(int(d) for d in ([*ones, 1, 1, 1][:3] if at else [1] * (3 - len(ones)) + ones))
            line = f"Reshape({x}, {self.constant(np.array([0, *t]))})"
        self.lines.append(f"{to} = {line}")
        self.values.append((to, t))

    def model(self, steps: int) -> ir.Model:
        while len(self.lines) < steps:
            self.step()
        outputs = dict([self.values[-1], self.values[int(self.random.integers(2, len(self.values)))]])
        ports = ", ".join(f"float[N, {', '.join(map(str, s))}] {v}" for v, s in outputs.items())
        text = (
            f"{HEAD}g (float[N, 4, 36, 2] x, float[N, 4, 36, 1] z) => ({ports}) {{ {' '.join(self.lines)} }}"
        )
        return parse(text, **self.weights)


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs_keep_their_numbers(seed):
    check_pass(LengthenLastAxis(), _Random(seed).model(24), context=ENGINE, atol=1e-4, rtol=1e-4)
