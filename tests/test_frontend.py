"""Loading: what a good file becomes, and that a bad one ends in an error that says why."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit import equivalence, opset
from optkit.data import specs
from optkit.errors import BackendUnavailableError, ModelError, OptkitError, UnsupportedOpError, UsageError
from optkit.frontend import load, read
from optkit.graph import IR_VERSION, OPSET, graphs, text, verify, walk
from optkit.reference import ReferenceSession

# Names, doubled nodes, an If with a body that has its own weight and reads one from outside.
NESTED = """
<ir_version: 8, opset_import: ["" : 16]>
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
  y = If (c) <
    then_branch = t () => (float[N, 4] r) { k = ReduceSum <keepdims = 1> (x) r = Mul (x, k) },
    else_branch = e () => (float[N, 4] r) { r = Mul (x, w) }
  >
}
"""


def _bytes(source: str, weights: dict[str, np.ndarray] | None = None) -> bytes:
    proto = onnx.parser.parse_model(source)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto.SerializeToString()


def _model(
    body: str,
    *,
    opset: int = OPSET,
    inputs: str = "float[N, 4] x",
    outputs: str = "float[N, 4] y",
    head: str = "",
) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {head} {{ {body} }}'


def _load(source: str, **options: object) -> ir.Model:
    return load(_bytes(source), check=False, **options)  # type: ignore[arg-type]


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in walk(model)]


def _run(source: str | bytes, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def _external(tmp_path: Path, **entries: str) -> Path:
    """A model whose weight of 16 bytes is in ``w.bin``, with these entries instead."""
    proto = onnx.parser.parse_model(_model("y = Mul(x, w)"))
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    tensor = proto.graph.initializer.add(
        name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in {"location": "w.bin", "offset": "0", "length": "16", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


# -- what a good file becomes


@pytest.mark.parametrize("version", range(7, OPSET + 1))
def test_every_opset_from_7_on_comes_out_at_the_working_one(version: int):
    model = _load(_model("y = Relu(x)", opset=version))
    assert model.opset_imports == {"": OPSET}
    assert model.ir_version == IR_VERSION
    verify(model)


def test_a_path_bytes_and_a_graph_give_the_same_model(tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(_bytes(NESTED))
    a, b = load(path, check=False), load(path.read_bytes(), check=False)
    c = load(ir.load(path), check=False)
    assert text(a) == text(b) == text(c) == text(load(str(path), check=False))


def test_a_graph_that_is_loaded_is_not_changed():
    given_ = ir.from_onnx_text(_model("y = Softmax <axis = 0> (x)", opset=11))
    before = text(given_)
    load(given_, check=False)
    assert text(given_) == before
    assert given_.opset_imports[""] == 11


def test_loading_what_was_loaded_changes_nothing():
    once = _load(NESTED)
    assert text(load(once)) == text(once)
    assert read(once).notes == ()


def test_bodies_are_converted_too():
    model = _load(NESTED)
    reduce_sum = next(n for n in walk(model) if n.op_type == "ReduceSum")
    assert [g.name for g in graphs(model)] == ["g", "t", "e"]
    assert reduce_sum.outputs[0].dtype == ir.DataType.FLOAT


def test_names_are_unique_across_bodies_and_every_node_has_one():
    model = _load(NESTED)
    nodes = [n.name for n in walk(model)]
    values = [o.name for n in walk(model) for o in n.outputs]
    assert len(set(nodes)) == len(nodes)
    assert all(nodes)
    assert len(set(values)) == len(values)


def test_a_node_without_a_name_is_called_after_its_output():
    assert [n.name for n in walk(_load(_model("h = Relu(x) y = Neg(h)")))] == ["h", "y"]


def test_the_second_node_of_a_name_gets_a_number():
    proto = onnx.parser.parse_model(_model("h = Relu(x) y = Neg(h)"))
    for node in proto.graph.node:
        node.name = "n"
    assert [n.name for n in walk(load(proto.SerializeToString()))] == ["n", "n_1"]


def test_nodes_are_put_in_an_order_in_which_they_can_run():
    assert _ops(_load(_model("y = Neg(h) h = Relu(x)"))) == ["Relu", "Neg"]


def test_values_of_which_any_order_would_do_are_sorted_and_held_against_sorted_ones(tmp_path: Path):
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2, 40] x) => (float[2, 12] y, int64[2, 12] i) <int64[1] k = {12}> {
      y, i = TopK<sorted = 0>(x, k) }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    loaded = read(path)
    (note,) = loaded.notes
    assert note == "any order of values would do for 1 TopK; they are sorted"
    x = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    found = ReferenceSession(loaded.original).run({"x": x})
    np.testing.assert_array_equal(found["y"], -np.sort(-x, axis=1)[:, :12])
    np.testing.assert_array_equal(np.take_along_axis(x, found["i"], axis=1), found["y"])


def test_unnamed_axes_of_inputs_get_symbols_of_their_own_and_named_ones_keep_theirs():
    proto = onnx.parser.parse_model(
        _model("y = Concat <axis = 1> (x, z)", inputs="float[N, ?, 4] x, float[N, ?, 4] z")
    )
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_value = -1
    inputs, _ = specs(load(proto.SerializeToString()))
    assert [i.shape for i in inputs] == [("N", "x_1", 4), ("N", "z_1", 4)]


def test_a_symbol_that_is_only_a_question_mark_is_no_name():
    proto = onnx.parser.parse_model(_model("y = Relu(x)", inputs="float[N, M] x"))
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = "?"
    assert specs(load(proto.SerializeToString()))[0][0].shape == ("x_0", "x_1")


def test_weights_listed_as_inputs_are_not_inputs():
    proto = onnx.parser.parse_model(_model("y = Mul(x, w)", inputs="float[N, 4] x, float[4] w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "w"))
    proto.ir_version = 3
    loaded = read(proto.SerializeToString(), check=False)
    assert [v.name for v in loaded.model.graph.inputs] == ["x"]
    assert "old files" in loaded.notes[0]
    proto.ir_version = 8
    assert "default value" in read(proto.SerializeToString(), check=False).notes[0]


def test_shapes_are_inferred():
    model = _load(
        _model(
            "h = MatMul(x, w) y = Relu(h)",
            head="<float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>",
            outputs="float[N, 2] y",
        )
    )
    assert str(next(walk(model)).outputs[0].shape) == "[N,2]"


def test_metadata_of_model_and_nodes_is_kept():
    proto = onnx.parser.parse_model(_model("y = Softmax <axis = 0> (x)", opset=11))
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[0].metadata_props.add(key="optkit.module", value="head.softmax")
    model = load(proto.SerializeToString(), check=False)
    assert model.metadata_props == {"author": "me"}
    assert {n.metadata_props["optkit.module"] for n in walk(model)} == {"head.softmax"}


def test_operators_of_onnx_runtime_are_kept_with_their_domain():
    source = '<ir_version: 8, opset_import: ["" : 12, "com.microsoft" : 1, "ai.onnx.ml" : 2]> g (float[N, 4] x) => (float[N, 4] y) { y = com.microsoft.FastGelu(x) }'
    model = _load(source)
    assert model.opset_imports == {"": OPSET, "com.microsoft": 1}


FUNCTION = """
<ir_version: 10, opset_import: ["" : 21, "%s" : 1]>
g (float[N, 4] x) => (float[N, 4] y) { h = %s.twice <to = 3.0> (x) y = %s.twice (h) }
<domain: "%s", opset_import: ["" : 12]>
twice <to: float = 2.0> (a) => (b) { k = Constant <value_float: float = @to> () m = Mul(a, k) b = Softmax <axis = 0> (m) }
"""


def test_functions_are_written_out_each_with_its_own_opset():
    model = _load(FUNCTION.replace("%s", "mine"))
    assert not model.functions
    assert "Flatten" in _ops(model)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    # Before opset 13, Softmax over axis 0 was over all axes.
    first = np.exp(3 * x) / np.exp(3 * x).sum()
    second = np.exp(2 * first) / np.exp(2 * first).sum()
    assert np.allclose(_run(ir.to_proto(model).SerializeToString(), x=x)[0], second)


def test_functions_of_optkit_stay_calls():
    source = (
        FUNCTION.replace("%s", "optkit")
        .replace('["" : 12]', '["" : 21]')
        .replace("<axis = 0>", "<axis = -1>")
    )
    model = _load(source)
    assert _ops(model) == ["twice", "twice"]
    assert [f.name for f in model.functions.values()] == ["twice"]


def test_large_weights_are_mapped_and_never_copied(tmp_path: Path):
    path = tmp_path / "m.onnx"
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    path.write_bytes(
        _bytes(_model("y = MatMul(x, w)", inputs="float[N, 64] x", outputs="float[N, 64] y"), {"w": w})
    )
    found = load(path).graph.initializers["w"].const_value
    assert found is not None
    array = found.numpy()
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert np.array_equal(array, w)


def test_weights_in_constant_nodes_and_typed_fields_are_read():
    values = np.arange(600, dtype=np.float32)
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [600], values.tolist())
    proto = onnx.parser.parse_model(_model("y = Add(x, k)", inputs="float[600] x", outputs="float[600] y"))
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["k"], value=tensor))
    model = load(proto.SerializeToString())
    assert np.array_equal(model.graph.initializers["k"].const_value.numpy(), values)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "dtype", ["BFLOAT16", "FLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4", "FLOAT4E2M1", "INT8", "BOOL", "DOUBLE"]
)
def test_every_type_of_weight_comes_back_bit_for_bit(dtype: str):
    kind = ir.DataType[dtype]
    values = np.random.default_rng(0).integers(0, 2, (40, 61)).astype(np.float32)
    tensor = ir.tensor(values.astype(kind.numpy()), dtype=kind, name="w")
    proto = onnx.parser.parse_model(_model("y = Relu(x)", head="<float unused = {1}>"))
    proto.graph.initializer.append(ir.to_proto(tensor))
    found = load(proto.SerializeToString()).graph.initializers["w"].const_value
    assert found is not None
    assert found.dtype == kind
    assert found.tobytes() == tensor.tobytes()


def test_strings_in_a_constant_are_read():
    """As classifiers hold the names of their classes."""
    graph = "chosen = Gather(names, i) y = Equal(chosen, cat)"
    proto = onnx.parser.parse_model(_model(graph, inputs="int64[2] i", outputs="bool[2] y"))
    for name, words in {"names": ["cat", "dog"], "cat": ["cat"]}.items():
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.STRING, [len(words)], words)
        proto.graph.initializer.append(tensor)
    session = ReferenceSession(load(proto.SerializeToString(), check=False))
    assert session.run({"i": np.array([1, 0])})["y"].tolist() == [False, True]


def test_external_data_is_read_relative_to_the_model(tmp_path: Path):
    model = load(_external(tmp_path), check=False)
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


# -- conversion of opsets

_F, _X4 = "float[a, b, c, d] y", "float[1, 2, 6, 8] x"
_CONVERSIONS: dict[str, tuple[int, str, str, str, str]] = {}


def _case(name: str, opset: int, inputs: str, outputs: str, body: str, head: str = "") -> None:
    _CONVERSIONS[f"{name}-{opset}"] = (opset, inputs, outputs, body, head)


for _op in ("Softmax", "LogSoftmax", "Hardmax"):
    for _axis in (0, 1, 3, -2):
        _case(
            f"{_op}{_axis}",
            11,
            "float[2, 3, 4, 5] x",
            "float[2, 3, 4, 5] y",
            f"y = {_op} <axis = {_axis}> (x)",
        )
    _case(f"{_op}-default", 9, "float[2, 3, N, 5] x", "float[2, 3, N, 5] y", f"y = {_op} (x)")
    _case(f"{_op}-pooled", 9, "float[2, 3, 1, 1] x", "float[2, 3, 1, 1] y", f"y = {_op} (x)")
for _op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
    for _opset in (9, 17 if _op != "Sum" else 12):
        _case(
            f"Reduce{_op}",
            _opset,
            "float[2, 3, 4] x",
            "float[1, 3, 1] y",
            f"y = Reduce{_op} <axes = [0, 2]> (x)",
        )
    _case(f"Reduce{_op}-all", 9, "float[2, 3, 4] x", "float y", f"y = Reduce{_op} <keepdims = 0> (x)")
_case("Squeeze", 12, "float[2, 1, 4] x", "float[2, 4] y", "y = Squeeze <axes = [1]> (x)")
_case("Squeeze-all", 9, "float[2, 1, 1] x", "float[2] y", "y = Squeeze (x)")
_case("Unsqueeze", 9, "float[2, 4] x", "float[2, 1, 4] y", "y = Unsqueeze <axes = [1]> (x)")
for _opset in (9, 13, 17):
    _case(
        "Split-even", _opset, "float[2, 6] x", "float[2, 3] y, float[2, 3] z", "y, z = Split <axis = -1> (x)"
    )
_case(
    "Split", 9, "float[2, 6] x", "float[2, 2] y, float[2, 4] z", "y, z = Split <axis = 1, split = [2, 4]> (x)"
)
for _limits in ("<min = -0.5>", "<max = 0.5>", "<min = -0.2, max = 0.3>", ""):
    _case(f"Clip{_limits}", 9, "float[2, 6] x", "float[2, 6] y", f"y = Clip {_limits} (x)")
_case("Clip-half", 9, "float16[2, 6] x", "float16[2, 6] y", "y = Clip <min = 0.0> (x)")
_case("Clip-late", 9, "float[2, 6] x", "float16[2, 6] y", "h = Cast <to = 10> (x) y = Clip <min = 0.0> (h)")
for _mode in ("constant", "reflect", "edge"):
    _case(
        f"Pad-{_mode}",
        10,
        "float[4, 6] x",
        "float[a, b] y",
        f'y = Pad <mode = "{_mode}", pads = [1, 2, 0, 3]> (x)',
    )
_case("Pad-value", 7, "float[4, 6] x", "float[a, b] y", "y = Pad <pads = [0, -1, 1, -2], value = 2.5> (x)")
_case(
    "Slice",
    9,
    "float[4, 6] x",
    "float[a, b] y",
    "y = Slice <starts = [1, -3], ends = [3, 99], axes = [0, 1]> (x)",
)
_case("Slice-plain", 7, "float[4, 6] x", "float[a, b] y", "y = Slice <starts = [1], ends = [3]> (x)")
_case("TopK", 9, "float[4, 6] x", "float[4, 2] y, int64[4, 2] i", "y, i = TopK <axis = -1, k = 2> (x)")
for _opset in (7, 9, 11):
    _case("Dropout", _opset, "float[4, 6] x", "float[4, 6] y", "y = Dropout <ratio = 0.3> (x)")
for _mode in ("nearest", "linear"):
    for _scale in ((2, 2), (3, 2), (1.5, 1.7)):
        _list = f"1.0, 1.0, {float(_scale[0])}, {float(_scale[1])}"
        _case(
            f"Upsample-{_mode}-{_scale}",
            7,
            _X4,
            _F,
            f'y = Upsample <mode = "{_mode}", scales = [{_list}]> (x)',
        )
        _case(
            f"Upsample-{_mode}-{_scale}",
            9,
            _X4,
            _F,
            f'y = Upsample <mode = "{_mode}"> (x, s)',
            f"<float[4] s = {{{_list}}}>",
        )
    for _scale in ((2, 2), (0.5, 0.5), (0.6, 0.3), (1.5, 1)):
        _list = f"1.0, 1.0, {float(_scale[0])}, {float(_scale[1])}"
        _case(
            f"Resize-{_mode}-{_scale}",
            10,
            _X4,
            _F,
            f'y = Resize <mode = "{_mode}"> (x, s)',
            f"<float[4] s = {{{_list}}}>",
        )
_case("Scatter", 9, "float[3, 3] x, int64[1, 3] i, float[1, 3] u", "float[3, 3] y", "y = Scatter(x, i, u)")
_NORM = "float[2, 3, 4, 4] x, float[3] s, float[3] m"
_case(
    "BatchNormalization",
    7,
    _NORM,
    "float[2, 3, 4, 4] y",
    "y = BatchNormalization <spatial = 1> (x, s, s, m, v)",
    "<float[3] v = {1, 2, 3}>",
)
_case(
    "BatchNormalization",
    9,
    _NORM,
    "float[2, 3, 4, 4] y",
    "y = BatchNormalization (x, s, s, m, v)",
    "<float[3] v = {1, 2, 3}>",
)
_case(
    "RoiAlign", 10, "float[1, 2, 8, 8] x", _F, "y = RoiAlign <output_height = 2, output_width = 2, sampling_ratio = 2> (x, r, i)",
    "<float[1, 4] r = {0, 0, 6, 6}, int64[1] i = {0}>",
)  # fmt: skip
for _mode in ("bilinear", "bicubic", "nearest"):
    _case(
        f"GridSample-{_mode}",
        16,
        "float[1, 2, 6, 6] x, float[1, 3, 3, 2] g",
        _F,
        f'y = GridSample <mode = "{_mode}"> (x, g)',
    )
_case("DFT", 17, "float[1, 8, 1] x", "float[1, 8, 2] y", "y = DFT <axis = 1> (x)")
_case("DFT-default", 17, "float[1, 8, 1] x", "float[1, 5, 2] y", "y = DFT <onesided = 1> (x)")
_case(
    "GroupNormalization", 18, "float[2, 4, 3, 3] x", "float[2, 4, 3, 3] y", "y = GroupNormalization <num_groups = 2> (x, s, b)",
    "<float[2] s = {1.5, 2.5}, float[2] b = {0.1, -0.3}>",
)  # fmt: skip
_case(
    "AveragePool",
    10,
    "float[1, 2, 6, 6] x",
    _F,
    "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
)
_case("MaxPool", 8, "float[1, 2, 6, 6] x", _F, "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (x)")
# Newer than the working opset: written out with the operators' own definitions, or taken as they are.
_case("RMSNormalization", 23, "float[2, 8] x, float[8] s", "float[2, 8] y", "y = RMSNormalization(x, s)")
_case("Swish", 24, "float[2, 8] x", "float[2, 8] y", "y = Swish <alpha = 1.5> (x)")
_case("Swish-default", 24, "float[2, 8] x", "float[2, 8] y", "y = Swish (x)")
_QKV = "float[N, T, 16] q, float[N, T, 16] k, float[N, T, 16] v"
_case(
    "Attention",
    23,
    _QKV,
    "float[N, T, 16] y",
    "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v)",
)
_case(
    "Attention-operands-left-out",
    24,
    "float[2, 2, 4, 8] q, float[2, 2, 4, 8] k, float[2, 2, 4, 8] v",
    "float[2, 2, 4, 8] y",
    "y = Attention(q, k, v, , , , n)",
    "<int64[2] n = {2, 3}>",
)
_case(
    "RotaryEmbedding",
    23,
    "float[1, 2, 4, 8] x, float[1, 4, 4] c, float[1, 4, 4] s",
    "float[1, 2, 4, 8] y",
    "y = RotaryEmbedding(x, c, s)",
)
_case("Cast", 24, "float[2, 5] x", "float16[2, 5] y", "y = Cast <to = 10> (x)")
_case(
    "QuantizeLinear",
    23,
    "float[2, 5] x",
    "float[2, 5] y",
    "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
    "<float s = {0.1}, int8 z = {0}>",
)


@pytest.mark.parametrize("case", sorted(_CONVERSIONS))
def test_a_converted_operator_computes_the_same(case: str, tmp_path: Path):
    version, inputs, outputs, body, head = _CONVERSIONS[case]
    source = _model(body, opset=version, inputs=inputs, outputs=outputs, head=head)
    path = tmp_path / "m.onnx"
    path.write_bytes(_bytes(source.replace("ir_version: 8", "ir_version: 10") if version > 15 else source))
    model = load(path, check=False)
    assert equivalence.compare(path, model).get("difference", 1.0) < 1e-6
    # Only what the opset lost may be left: shapes and types of the interface are the same.
    assert [str(v) for v in specs(model)[0]] == [str(v) for v in specs(ir.load(path))[0]]


def _same_attributes(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """Whether every node written for ``old`` is one of ``new`` with the same inputs and attributes.

    New attributes are those with a default: they were introduced with what was done before.
    """
    for name, attribute in old.attributes.items():
        other = new.attributes.get(name)
        if (
            other is None
            or other.default_value != attribute.default_value
            or (other.required and not attribute.required)
        ):
            return False
    if any(a.required for n, a in new.attributes.items() if n not in old.attributes):
        return False
    return new.min_input <= old.min_input and new.max_input >= old.max_input and not new.deprecated


# Changes that do not show in the schema, or that were looked at and mean nothing.
_REVIEWED = {
    ("GroupNormalization", 21),  # by rule: scale and bias are for channels, not groups
    ("RoiAlign", 16),  # by rule: the new attribute's default is not what was done before
    ("Resize", 11),  # by rule
    ("Split", 18),  # by rule: num_outputs must be there without split
    ("DFT", 20),  # by rule
}


def test_every_change_between_opsets_has_a_rule_or_is_only_wider():
    history: dict[str, dict[int, onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= OPSET:
            history.setdefault(schema.name, {})[schema.since_version] = schema
    missing = []
    for name, versions in history.items():
        ordered = sorted(versions)
        for old, new in itertools.pairwise(ordered):
            if new <= opset.OLDEST:
                continue
            ruled = any(before == new for before, _ in opset._RULES.get(name, ()))
            if not ruled and not _same_attributes(versions[old], versions[new]):
                missing.append((name, old, new))
    assert missing == []
    for name, version in _REVIEWED:
        assert any(before == version for before, _ in opset._RULES[name])


def test_an_operator_without_an_equivalent_is_named_with_the_reason():
    source = _model(
        "a = BatchNormalization <spatial = 0> (x, w, w, w, w) y = Resize (a, s)",
        opset=8,
        inputs=_X4,
        outputs=_F,
    )
    source = source.replace("Resize (a, s)", "Relu (a)").replace(_X4, f"{_X4}, float[2, 6, 8] w")
    with pytest.raises(UnsupportedOpError, match=r"a \(BatchNormalization\): .*spatial=0"):
        _load(source)


def test_all_operators_that_cannot_be_converted_are_listed():
    body = "a = BitCast <to = 6> (x) b = BitCast <to = 1> (a) y = CumProd (b, i)"
    with pytest.raises(UnsupportedOpError) as caught:
        _load(_model(body, opset=26, head="<int64 i = {0}>"))
    assert [node for node, _ in caught.value.problems] == ["a (BitCast)", "b (BitCast)", "y (CumProd)"]


def test_a_conversion_is_checked_against_the_original_and_noted():
    loaded = read(
        _bytes(_model("y = Hardmax(x)", opset=11, inputs="float[2, 3, 4] x", outputs="float[2, 3, 4] y"))
    )
    assert loaded.opset == 11
    assert loaded.notes[0] == "converted from opset 11 to 21"
    assert "computes the same" in loaded.notes[1]
    assert loaded.model.meta["optkit.notes"] == loaded.notes


def test_a_conversion_that_changes_the_numbers_is_an_error(tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(
        _bytes(
            _model("y = Softmax <axis = 0> (x)", opset=11, inputs="float[3, 4] x", outputs="float[3, 4] y")
        )
    )
    wrong = _load(_model("y = Softmax <axis = 0> (x)", inputs="float[3, 4] x", outputs="float[3, 4] y"))
    with pytest.raises(ModelError, match="converting its opset changed it: output 'y' differs"):
        equivalence._judgement(equivalence.compare(path, wrong), "m.onnx")


def test_a_model_that_cannot_run_on_random_inputs_is_noted_as_not_compared():
    notes = read(
        _bytes(
            _model(
                "i = Cast <to = 7> (s) j = Add(i, i) k = Add(j, five) y = Reshape(x, k)",
                opset=17,
                inputs="float[3, 4] x, float[2] s",
                outputs="float[a, b] y",
                head="<int64[1] five = {5}>",
            )
        )
    ).notes
    assert "not compared with the original: ONNX Runtime cannot run it on random inputs" in notes[1]


def test_random_numbers_inside_a_model_do_not_disturb_the_comparison(tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(_bytes(_model("r = RandomNormalLike(x) y = Softmax(r)", opset=11)))
    assert equivalence.compare(path, load(path, check=False)) == {"difference": 0.0}


# -- what a bad file becomes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
        (b"\x80\x04\x95" + bytes(50), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(20), "TensorFlow Lite"),
        (b"this is not protobuf at all", "not an ONNX model"),
        (bytes(range(256)), "not an ONNX model"),
        (b"\x08\x08", "no graph"),
    ],
)
def test_a_file_that_is_something_else_is_named(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_damaged(share: float):
    whole = _bytes(_model("y = MatMul(x, w)"), {"w": np.ones((64, 64), np.float32)})
    with pytest.raises(ModelError, match="damaged"):
        load(whole[: int(len(whole) * share)])


def test_a_missing_file_and_a_folder_are_usage_errors(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "nothing.onnx")
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a folder") as caught:
        load(tmp_path)
    assert caught.value.hint == f"did you mean {tmp_path / 'm.onnx'}?"


def test_a_pipe_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["m.pkl", "m.pickle", "m.joblib"])
def test_pickles_are_refused_unread(name: str):
    with pytest.raises(UsageError, match="pickles can run any code"):
        load(name)


@pytest.mark.parametrize("name", ["m.pt2", "m.pt", "package.module:factory"])
def test_pytorch_sources_name_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        BackendUnavailableError, match=f"{name}: PyTorch models need torch and onnxscript"
    ) as caught:
        load(name)
    assert "optkit[torch]" in str(caught.value.hint)


@pytest.mark.needs("torch", "onnxscript")
@pytest.mark.parametrize("name", ["m.pt2", "m.pt", "m.safetensors"])
def test_a_missing_file_of_torch_is_named(name: str):
    with pytest.raises(UsageError, match=f"{name}: no such file"):
        load(name)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "missing.bin"}, "no such file"),
        ({"location": "/etc/hostname"}, "not below the folder"),
        ({"location": "../w.bin"}, "not below the folder"),
        ({"location": "sub/../../w.bin"}, "not below the folder"),
        ({"location": "..\\w.bin"}, "not below the folder"),
        ({"location": "C:w.bin"}, "not below the folder"),
        ({"location": ""}, "no location"),
        ({"location": "w\0.bin"}, "no location"),
        ({"location": "."}, "not a regular file"),
        ({"location": "out.bin"}, "leads out of the folder"),
        ({"location": "hard.bin"}, "another name elsewhere"),
        ({"offset": "-16"}, "not a number of bytes"),
        ({"offset": "4"}, "bytes 4 to 20 of 'w.bin', which has 16"),
        ({"offset": "99999999999999999999999"}, "not a number of bytes"),
        ({"offset": "9223372036854775807"}, "bytes 9223372036854775807"),
        ({"length": "15"}, "needs 16 bytes, the entry says 15"),
        ({"length": "abc"}, "not a number of bytes"),
        ({"length": "1" * 19}, "the entry says"),
        ({"optkit.cut": "0"}, "no location"),
    ],
)
def test_external_data_that_lies_is_refused(entries: dict[str, str], message: str, tmp_path: Path):
    outside = tmp_path / "outside.bin"
    outside.write_bytes(bytes(16))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "out.bin").symlink_to(outside)
    os.link(outside, folder / "hard.bin")
    with pytest.raises(ModelError, match=message) as caught:
        load(_external(folder, **entries))
    assert "'w'" in str(caught.value)


def test_external_data_outside_can_be_allowed(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "w2.bin").write_bytes(bytes(16))
    assert load(_external(tmp_path / "a", location="../w2.bin"), unsafe=True, check=False)


def test_a_link_inside_the_folder_is_fine(tmp_path: Path):
    path = _external(tmp_path, location="link.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "w.bin")
    assert load(path, check=False)


def test_a_model_that_is_a_link_has_its_data_beside_the_target(tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    _external(blobs)
    (snapshot / "model.onnx").symlink_to(blobs / "model.onnx")
    (snapshot / "w.bin").symlink_to(blobs / "w.bin")
    assert load(snapshot / "model.onnx", check=False)


def test_external_data_of_a_graph_is_mapped_and_checked_too(tmp_path: Path):
    path = _external(tmp_path)
    model = load(ir.load(path), check=False)
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    with pytest.raises(ModelError, match=r"bytes 0 to 16 of 'w\.bin', which has 8"):
        load(ir.load(path), check=False)


def test_bytes_cannot_have_external_data(tmp_path: Path):
    with pytest.raises(ModelError, match="in a file beside the model"):
        load(_external(tmp_path).read_bytes())


def _tensor(**fields: object) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        given_ = {"name": "w", "data_type": 1, "dims": [4], "raw_data": bytes(16), **fields}
        proto.graph.initializer.add(**{k: v for k, v in given_.items() if v is not None})

    return edit


def _node(
    op_type: str, inputs: list[str], outputs: list[str], **attributes: object
) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(onnx.helper.make_node(op_type, inputs, outputs, **attributes))

    return edit


def _edit(change: Callable[[onnx.GraphProto], object]) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        change(proto.graph)

    return edit


def _all(*edits: Callable[[onnx.ModelProto], None]) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        for one in edits:
            one(proto)

    return edit


def _nested(depth: int) -> Callable[[onnx.ModelProto], bytes]:
    """If in If in If: bytes, because the Python protobuf library refuses to build it."""

    def field(number: int, content: bytes) -> bytes:
        return (
            bytes([number << 3 | 2])
            + onnx.StringStringEntryProto(key="k" * len(content)).SerializeToString()[1 : -len(content)]
            + content
        )

    def edit(proto: onnx.ModelProto) -> bytes:
        graph = b""
        for _ in range(depth):
            graph = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, graph)))
        return proto.SerializeToString() + field(7, graph)

    return edit


_FLOATS = onnx.helper.make_tensor_type_proto(1, [])
_BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], bytes | None], str]] = {
    "shape too large": (_tensor(dims=[1 << 40]), r"tensor 'w' of the graph: shape \[1099511627776\] needs"),
    "shape overflows": (_tensor(dims=[1 << 62, 1 << 62]), "needs"),
    "shape too small": (_tensor(dims=[3]), "needs 12 bytes or entries, 16 are there"),
    "negative size": (_tensor(dims=[-4]), "negative size"),
    "unknown type": (_tensor(data_type=99), "unknown element type 99"),
    "no type": (_tensor(data_type=0), "no element type"),
    "no data": (_tensor(raw_data=None), "needs 4 bytes or entries, 0 are there"),
    "wrong field": (_tensor(raw_data=None, int64_data=[1, 2, 3, 4]), "needs"),
    "large, too small": (_tensor(raw_data=bytes(4096), dims=[4096]), "needs 16384 bytes, 4096 are there"),
    "initializer twice": (_all(_tensor(), _tensor()), "initializer 'w' is there twice"),
    "initializer without name": (_tensor(name=""), "no name"),
    "undefined input": (_node("Relu", ["nowhere"], ["z"]), r"node 1 \(Relu\) in the graph: its input 'nowhere' is not defined"),
    "defined twice": (_node("Relu", ["x"], ["y"]), r"'y' is defined by node 0 \(Relu\) as well"),
    "input defined again": (_node("Relu", ["y"], ["x"]), "as an input or initializer as well"),
    "cycle": (_all(_node("Add", ["x", "b"], ["a"]), _node("Relu", ["a"], ["b"])), "cycle"),
    "output not computed": (_edit(lambda g: g.output.add(name="z")), "output 'z' is not computed"),
    "no outputs": (_edit(lambda g: g.ClearField("output")), "no outputs"),
    "output twice": (_edit(lambda g: g.output.append(g.output[0])), "output 'y' is there twice"),
    "input twice": (_edit(lambda g: g.input.append(g.input[0])), "input 'x' is there twice"),
    "input of strings": (_edit(lambda g: setattr(g.input.add(name="s").type.tensor_type, "elem_type", 8)), "holds strings"),
    "input of a sequence": (
        _edit(lambda g: setattr(g.input.add(name="s").type.sequence_type.elem_type.tensor_type, "elem_type", 1)), "'s' is a sequence",
    ),
    "output of maps": (
        _edit(
            lambda g: g.output[0].type.CopyFrom(
                onnx.helper.make_sequence_type_proto(onnx.helper.make_map_type_proto(7, _FLOATS))
            )
        ),
        "'y' of Relu is a map or a sequence of maps",
    ),
    "input without type": (_edit(lambda g: g.input.add(name="s")), "'s' is not a tensor of known type"),
    "unknown operator": (_node("Frobnicate", ["x"], ["z"], name="f"), r"f \(Frobnicate\): no operator Frobnicate in opset 21"),
    "unknown domain": (_node("Op", ["x"], ["z"], name="f", domain="acme"), "unknown operator acme.Op, and the model has no function"),
    "unknown in ORT": (_node("Op", ["x"], ["z"], name="f", domain="com.microsoft"), "no operator com.microsoft.Op in ONNX Runtime"),
    "too few inputs": (_node("Conv", ["x"], ["z"], name="f"), r"f \(Conv\): 1 inputs instead of 2 to 3"),
    "missing input": (_node("Conv", ["", "x"], ["z"], name="f"), r"input 0 \(X\) is missing"),
    "too many outputs": (_node("Relu", ["x"], ["z", "zz"]), "2 outputs instead of 1 to 1"),
    "missing attribute": (_node("Concat", ["x", "x"], ["z"]), "attribute 'axis' is missing"),
    "unknown attribute": (_node("Relu", ["x"], ["z"], alpha=1.0), "unknown attribute 'alpha'"),
    "attribute of another type": (_node("Concat", ["x"], ["z"], axis=1.0), "'axis' is of type FLOAT, not INT"),
    "attribute not UTF-8": (_node("Conv", ["x", "x"], ["z"], auto_pad=b"\xff\xfe"), "not UTF-8"),
    "nested too deeply": (_nested(60), "damaged"),
    "nested much too deeply": (_nested(2000), "nested too deeply"),
    "opset of the future": (lambda p: setattr(p.opset_import[0], "version", 999), "written for opset 999"),
    "opset of the past": (lambda p: setattr(p.opset_import[0], "version", 5), "older than 7"),
    "opset out of range": (lambda p: setattr(p.opset_import[0], "version", -1), "version -1"),
    "sparse weights": (_edit(lambda g: g.sparse_initializer.add()), "sparse"),
    "training": (lambda p: p.training_info.add() and None, "training graph"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(_BROKEN))
def test_a_broken_model_says_what_and_where(kind: str):
    edit, message = _BROKEN[kind]
    proto = onnx.parser.parse_model(_model("y = Relu(x)"))
    data = edit(proto) or proto.SerializeToString()
    with pytest.raises(ModelError, match=message):
        load(data, check=False)


def test_all_unknown_operators_are_listed():
    with pytest.raises(UnsupportedOpError) as caught:
        _load(_model("a = Foo(x) b = Relu(a) y = Bar(b)"))
    assert [node for node, _ in caught.value.problems] == ["a (Foo)", "y (Bar)"]


def _functions(*bodies: str) -> str:
    head = '<ir_version: 10, opset_import: ["" : 21, "f" : 1]> g (float[N] x) => (float[N] y) { y = f.a0(x) }'
    return head + "".join(
        f'<domain: "f", opset_import: ["" : 21, "f" : 1]> a{i} (x) => (y) {{ {b} }}'
        for i, b in enumerate(bodies)
    )


def test_functions_that_call_each_other_in_a_circle_are_refused():
    with pytest.raises(ModelError, match="calls itself"):
        _load(_functions("y = f.a1(x)", "y = f.a0(x)"))


def test_functions_that_would_grow_without_bound_are_refused():
    bodies = [f"h = f.a{i + 1}(x) y = f.a{i + 1}(h)" for i in range(40)]
    with pytest.raises(ModelError, match=r"would be written out .* times"):
        _load(_functions(*bodies, "y = Relu(x)"))


def test_functions_that_call_each_other_very_deep_are_refused():
    with pytest.raises(ModelError, match="deep"):
        _load(_functions(*(f"y = f.a{i + 1}(x)" for i in range(200)), "y = Relu(x)"))


def test_many_nodes_of_one_name_take_no_time():
    proto = onnx.parser.parse_model(_model("y = Relu(x)"))
    for _ in range(5_000):
        proto.graph.node.append(onnx.helper.make_node("Relu", ["x"], [""], name="n"))
    for index, node in enumerate(proto.graph.node[1:]):
        node.output[0] = f"o{index}"
    names = {n.name for n in walk(load(proto.SerializeToString()))}
    assert len(names) == 5_001


def test_a_loop_that_never_ends_does_not_reach_the_caller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(equivalence, "_SECONDS", 2)
    body = "y = Loop (m, t, x) <body = b (int64 i, bool c, float[N, 4] a) => (bool d, float[N, 4] e) { d = Identity(c) e = Relu(a) }>"
    head = "<int64 m = {9223372036854775807}, bool t = {1}>"
    notes = read(_bytes(_model(body, opset=17, head=head))).notes
    assert notes[-1] == "not compared with the original: it did not finish within 2 seconds"


def test_a_tensor_beyond_all_memory_does_not_reach_the_caller():
    body = "h = ConstantOfShape(s) r = ReduceMax(h) y = Add(x, r)"
    notes = read(_bytes(_model(body, opset=17, head="<int64[2] s = {1000000, 1000000}>"))).notes
    assert notes[-1].startswith("not compared with the original: ONNX Runtime")


_SEED = _bytes(NESTED, {"big": np.arange(500, dtype=np.float32)})


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, len(_SEED) - 1), st.integers(0, 7), st.integers(0, 2), st.binary(max_size=8))
def test_whatever_is_flipped_in_a_file_only_our_errors_come_out(at: int, bit: int, kind: int, junk: bytes):
    data = bytearray(_SEED)
    if kind == 0:
        data[at] ^= 1 << bit
    elif kind == 1:
        data[at : at + len(junk)] = junk
    else:
        del data[at : at + 1 + bit]
    with contextlib.suppress(OptkitError):
        verify(load(bytes(data), check=False))


def test_models_are_compared_at_sizes_that_no_window_is_larger_than(tmp_path: Path):
    """Of a window that reaches beyond its input, ONNX Runtime makes something else in each version of AveragePool."""
    graph = "(float[N, 2, T] x) => (float[N, 2, U] y) { h = AveragePool<kernel_shape = [4], strides = [4]>(x) y = AveragePool<kernel_shape = [8], strides = [8], count_include_pad = 1>(h) }"
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}'), tmp_path / "m.onnx"
    )
    notes = read(tmp_path / "m.onnx").notes
    assert any("largest difference 0.0e+00" in note for note in notes), notes
