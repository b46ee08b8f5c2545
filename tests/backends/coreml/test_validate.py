"""What a Mac would refuse: one thing wrong in a saved program, and which operation is told, and why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optkit.backends import BACKENDS
from optkit.benchmarks.fetch import cache
from optkit.passes.base import Context
from optkit.passes.quantization.weights import QuantizeWeights
from optkit.targets import target
from optkit.testing import parse

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PHONE = target("iphone15")
MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
# In float16 the names of operations end in _cast_fp16.
GRAPH = """g (float[N, 3, 8, 8] image) => (float[N, 10] probs) <int64[2] axes = {2, 3}> {
  c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(image, w, b)
  r = Relu(c)
  m = ReduceMean<keepdims = 0>(r, axes)
  g = Gelu(m)
  l = Gemm<transB = 1>(g, k)
  probs = Softmax<axis = 1>(l)
}"""
LOOP = """g (float[2] x, bool go) => (float[2] y) <int64 n = {3}, float two = {2.0}> {
  y = Loop(n, go, x)<body = b (int64 i, bool c, float[2] v) => (bool d, float[2] u) { d = Identity(c) u = Mul(v, two) }> }"""
BRANCH = """g (float[2] x, bool c) => (float[2] y) {
  y = If(c)<then_branch = t () => (float[2] a) { a = Exp(x) }, else_branch = e () => (float[2] b) { b = Sin(x) }> }"""
STATE = "g (float[2, 4] x, float[2, 4] k) => (float[2, 4] y, float[2, 4] l) { l = Add(x, k) y = Relu(l) }"
GATHER = "g (float[4, 3] x, int64[2] i) => (float[2, 3] y) { y = Gather(x, i) }"


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        n: random.normal(size=s).astype(np.float32)
        for n, s in {"w": (6, 3, 3, 3), "b": (6,), "k": (10, 6)}.items()
    }


def _lower(graph: str, folder: Path, weights: dict[str, np.ndarray] | None = None, **options) -> Path:
    backend = BACKENDS.get("coreml")()
    folder.mkdir(exist_ok=True)
    model = parse(HEAD + graph, **(weights or {}))
    backend.lower(model, PHONE, backend.options.model_validate(options), folder)
    return folder


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def written(request, tmp_path_factory) -> Path:
    """The network above, for any batch up to 4."""
    return _lower(
        GRAPH, tmp_path_factory.mktemp("written"), _weights(), precision=request.param, shapes={"N": {"min": 1, "default": 2, "max": 4}}
    )  # fmt: skip


def _problems(folder: Path, to: Path, edit: Callable[[Any], None]) -> list[str]:
    """What is wrong once ``edit`` has changed the program; before, nothing is."""
    from optkit.backends.coreml.quiet import Model_pb2
    from optkit.backends.coreml.validate import problems

    assert problems(folder / "model.mlpackage") == []
    shutil.copytree(folder, to)
    spec = Model_pb2.Model()
    before = (to / MODEL).read_bytes()
    spec.ParseFromString(before)
    edit(spec)
    (to / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    assert (to / MODEL).read_bytes() != before
    return problems(to / "model.mlpackage")


def _operations(spec: Any) -> Any:
    main = spec.mlProgram.functions["main"]
    return main.block_specializations[main.opset].operations


def _find(spec: Any, kind: str) -> Any:
    return next(o for o in _operations(spec) if o.type == kind)


def _given(spec: Any, kind: str, parameter: str) -> Any:
    """The constant that a parameter of the first operation of a kind is given."""
    name = _find(spec, kind).inputs[parameter].arguments[0].name
    return next(o for o in _operations(spec) if o.outputs[0].name == name)


def _type(kind: str, to: str) -> Callable[[Any], None]:
    """The declared type of the result of an operation; ``TO`` or the other of both floats."""

    def edit(spec: Any) -> None:
        declared = _find(spec, kind).outputs[0].type.tensorType
        codes = {"FLOAT16": 10, "FLOAT32": 11, "INT32": 23}
        other = codes["FLOAT16"] if declared.dataType == codes["FLOAT32"] else codes["FLOAT32"]
        declared.dataType = codes.get(to, other)

    return edit


def _size(kind: str, axis: int, size: int) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        _find(spec, kind).outputs[0].type.tensorType.dimensions[axis].constant.size = size

    return edit


def _rank(kind: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        declared = _find(spec, kind).outputs[0].type.tensorType
        declared.dimensions.add().constant.size = 1
        declared.rank += 1

    return edit


def _set(kind: str, parameter: str, *values: Any) -> Callable[[Any], None]:
    """Values of a constant parameter, in the number and type that it says."""

    def edit(spec: Any) -> None:
        constant = _given(spec, kind, parameter)
        held = constant.attributes["val"]
        tensor = held.immediateValue.tensor
        getattr(tensor, tensor.WhichOneof("value")).values[:] = values
        for declared in (held.type.tensorType, constant.outputs[0].type.tensorType):
            if declared.rank:
                declared.dimensions[0].constant.size = len(values)

    return edit


def _with_an_axis(kind: str, parameter: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        constant = _given(spec, kind, parameter)
        for value_type in (constant.attributes["val"].type, constant.outputs[0].type):
            _another_axis(value_type.tensorType)

    return edit


def _strides_of_floats(spec: Any) -> None:
    constant = _given(spec, "conv", "strides")
    held = constant.attributes["val"]
    for declared in (held.type.tensorType, constant.outputs[0].type.tensorType):
        declared.dataType = 11
    held.immediateValue.tensor.floats.values[:] = [1.0, 1.0]


def _strides_as_floats(spec: Any) -> None:
    _given(spec, "conv", "strides").attributes["val"].immediateValue.tensor.floats.values[:] = [1.0, 1.0]


def _weight_size(spec: Any) -> None:
    _given(spec, "conv", "weight").outputs[0].type.tensorType.dimensions[0].constant.size = 5


def _blob_of_another_type(spec: Any) -> None:
    """As many bytes, of integers."""
    constant = _given(spec, "conv", "weight")
    held = constant.attributes["val"]
    code = {10: 22, 11: 23}[held.type.tensorType.dataType]
    for declared in (held.type.tensorType, constant.outputs[0].type.tensorType):
        declared.dataType = code


def _longer_blob(spec: Any) -> None:
    constant = _given(spec, "conv", "weight")
    for declared in (constant.attributes["val"].type.tensorType, constant.outputs[0].type.tensorType):
        declared.dimensions[0].constant.size = 7


def _another_file(spec: Any) -> None:
    _given(spec, "conv", "weight").attributes["val"].blobFileValue.fileName = "@model_path/weights/other.bin"


def _far_blob(spec: Any) -> None:
    _given(spec, "conv", "weight").attributes["val"].blobFileValue.offset = 1 << 30


def _drop(kind: str, parameter: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        del _find(spec, kind).inputs[parameter]

    return edit


def _become(kind: str, other: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        _find(spec, kind).type = other

    return edit


def _late(spec: Any) -> None:
    operations = _operations(spec)
    operations.append(operations.pop(next(i for i, o in enumerate(operations) if o.type == "conv")))


def _twice(spec: Any) -> None:
    _operations(spec).append(_find(spec, "conv"))


def _unknown_parameter(spec: Any) -> None:
    conv = _find(spec, "conv")
    conv.inputs["color"].CopyFrom(conv.inputs["groups"])


def _computed_axis(spec: Any) -> None:
    softmax = _find(spec, "softmax")
    softmax.inputs["axis"].arguments[0].name = softmax.inputs["x"].arguments[0].name


def _wrong_count(spec: Any) -> None:
    _find(spec, "relu").outputs[0].type.tensorType.rank += 1


# The operation that is told, and what of it.
OPERATIONS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "a convolution of the other float": ("conv", _type("conv", "OTHER"), "follows from what it takes"),
    "a convolution of integers": ("conv", _type("conv", "INT32"), r"declared as int32\[\?, 6, 8, 8\], and float"),
    "a convolution of other channels": ("conv", _size("conv", 1, 7), r"\[\?, 7, 8, 8\], and float\d\d\[\?, 6, 8, 8\] follows"),
    "a convolution of another size": ("conv", _size("conv", 3, 9), "follows from what it takes"),
    "a convolution of another rank": ("conv", _rank("conv"), "follows from what it takes"),
    "a relu with fewer sizes than axes": ("relu", _wrong_count, "with another number of axes than it has sizes"),
    "a relu of another size": ("relu", _size("relu", 1, 7), "follows from what it takes"),
    "a mean of another rank": ("reduce_mean", _rank("reduce_mean"), "follows from what it takes"),
    "a softmax of another size": ("softmax", _size("softmax", 1, 9), "follows from what it takes"),
    "a weight of another size": ("const", _weight_size, r"declared as float\d\d\[5, 3, 3, 3\], and holds float\d\d\[6, 3, 3, 3\]"),
    "a file with fewer weights": ("const", _longer_blob, r"holds \d+ bytes float\d\d, the program says float\d\d\[7, 3, 3, 3\]"),
    "a file of floats for integers": ("const", _blob_of_another_type, r"bytes float\d\d, the program says int\d\d"),
    "weights beyond the file": ("const", _far_blob, "no blob at 1073741824"),
    "weights in another file": ("const", _another_file, "weight.bin is the only file read"),
    "an axis that is not there": ("softmax", _set("softmax", "axis", 5), "axis is 5, and x has 2 axes"),
    "axes of which one is not there": ("reduce_mean", _set("reduce_mean", "axes", 2, -5), "axes is -5, and x has 4 axes"),
    "an axis twice": ("reduce_mean", _set("reduce_mean", "axes", 2, -2), r"axes is \[2, -2\], and names an axis twice"),
    "pads for one axis": ("conv", _set("conv", "pad", 1, 1), r"pad is int32\[2\], and x has 4 ends"),
    "a flag with an axis": ("reduce_mean", _with_an_axis("reduce_mean", "keep_dims"), r"keep_dims is bool\[1\], and has 0 axes"),
    "groups that do not divide": ("conv", _set("conv", "groups", 2), "channels 3 not divisible by groups 2"),
    "padding of no known kind": ("conv", _set("conv", "pad_type", "sam"), "sam"),
    "a gelu of no known kind": ("gelu", _set("gelu", "mode", "QUICK"), "mode is 'QUICK', and may be EXACT, SIGMOID_APPROXIMATION, TANH"),
    "strides of floats": ("conv", _strides_of_floats, r"strides is float32\[2\], and conv takes int32"),
    "strides stored as floats": ("const", _strides_as_floats, r"a value of floats is declared as int32\[2\]"),
    "strides for three axes": ("conv", _set("conv", "strides", 1, 1, 1), r"strides is int32\[3\], and x has 2 places"),
    "a parameter too few": ("conv", _drop("conv", "x"), "the parameter 'x' is missing"),
    "no kind of padding": ("conv", _drop("conv", "pad_type"), "the parameter 'pad_type' is missing"),
    "a parameter too many": ("conv", _unknown_parameter, "has no parameter 'color'"),
    "an axis that is computed": ("softmax", _computed_axis, "the parameter 'axis' has to be constant"),
    "a value before it is computed": ("relu", _late, "is used before it is computed"),
    "a name for two values": ("conv", _twice, "is defined twice"),
    "an operation that there is not": ("convolve", _become("conv", "convolve"), "there is no such operation in CoreML8"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OPERATIONS)
def test_an_operation_that_a_mac_would_refuse_is_named(written, mistake, tmp_path):
    kind, edit, message = OPERATIONS[mistake]
    found = _problems(written, tmp_path / "changed", edit)
    told = [p for p in found if p.startswith(f"{kind} '")]
    assert any(re.search(message, p) for p in told), found


def _feature(edit: Callable[[Any], None], where: str = "input") -> Callable[[Any], None]:
    def change(spec: Any) -> None:
        edit(getattr(spec.description, where)[0].type.multiArrayType)

    return change


def _dtype(code: int) -> Callable[[Any], None]:
    def edit(array: Any) -> None:
        array.dataType = code

    return edit


def _shape(*sizes: int) -> Callable[[Any], None]:
    def edit(array: Any) -> None:
        array.shape[:] = sizes

    return edit


def _range(axis: int, low: int, high: int) -> Callable[[Any], None]:
    def edit(array: Any) -> None:
        array.shapeRange.sizeRanges[axis].lowerBound, array.shapeRange.sizeRanges[axis].upperBound = low, high

    return edit


def _fewer_ranges(array: Any) -> None:
    del array.shapeRange.sizeRanges[0]


def _listed(array: Any) -> None:
    array.enumeratedShapes.shapes.add().shape[:] = [1, 3, 8, 8]
    array.enumeratedShapes.shapes.add().shape[:] = [4, 3, 8, 9]


def _twice_described(spec: Any) -> None:
    spec.description.input.add().CopyFrom(spec.description.input[0])


def _not_described(spec: Any) -> None:
    del spec.description.output[0]


def _renamed(spec: Any) -> None:
    spec.description.input[0].name = "other"


def _text(spec: Any) -> None:
    spec.description.input[0].type.stringType.SetInParent()


def _picture(spec: Any) -> None:
    image = spec.description.input[0].type.imageType
    image.width, image.height, image.colorSpace = 8, 9, 20


def _older(spec: Any) -> None:
    spec.specificationVersion = 6


def _forget_function(spec: Any) -> None:
    del spec.mlProgram.functions["main"]


def _forget_result(spec: Any) -> None:
    operations = _operations(spec)
    del operations[next(i for i, o in enumerate(operations) if o.outputs[0].name == "probs")]


# Arrays of 65552 are of float16, of 131104 of int32.
DESCRIPTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "an input of another type": (_feature(_dtype(65552)), r"input 'image' is described as float16, and the function has float32\[\?, 3"),
    "an output of another type": (_feature(_dtype(131104), "output"), "output 'probs' is described as int32, and the function has float32"),
    "an input of another size": (_feature(_shape(2, 3, 9, 8)), r"input 'image' is described as \[2, 3, 9, 8\], and the function has"),
    "an input of another rank": (_feature(_shape(2, 3, 8)), r"input 'image' is described as \[2, 3, 8\]"),
    "an output of another rank": (_feature(_shape(1, 10, 1), "output"), r"output 'probs' is described as \[1, 10, 1\]"),
    "a size beside its range": (_feature(_shape(5, 3, 8, 8)), r"is usually \[5, 3, 8, 8\], and axis 0 is 1 to 4"),
    "a range of what is fixed": (_feature(_range(2, 4, 8)), r"has 4 to 8 on axis 2, and the function has float32\[\?, 3, 8, 8\]"),
    "a range without an end": (_feature(_range(0, 1, -1)), r"an axis without an upper bound \(0\)"),
    "a range too few": (_feature(_fewer_ranges), "has 3 ranges"),
    "a listed shape of another size": (_feature(_listed), r"is described as \[4, 3, 8, 9\]"),
    "a usual shape that is not listed": (_feature(_listed), "which is none of its listed shapes"),
    "an input twice": (_twice_described, r"names the inputs \['image', 'image'\], the function takes \['image'\]"),
    "an output too few": (_not_described, r"names the outputs \[\], the function gives \['probs'\]"),
    "an input of another name": (_renamed, r"names the inputs \['other'\]"),
    "an input that is text": (_text, "input 'image' is described as stringType"),
    "an input that is a picture of another size": (_picture, "input 'image' is a picture of RGB, 9 by 8, and the function has"),
    "a specification that is too old": (_older, "specification version 6, and CoreML8 needs 9"),
    "no function": (_forget_function, "there is no function 'main'"),
    "a result that is not computed": (_forget_result, "the output 'probs' is not computed"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", DESCRIPTIONS)
def test_a_description_that_is_not_the_functions_is_told(written, mistake, tmp_path):
    edit, message = DESCRIPTIONS[mistake]
    found = _problems(written, tmp_path / "changed", edit)
    assert any(re.search(message, p) for p in found), found


def test_floats_of_both_widths_do_not_meet_in_one_operation(tmp_path):
    """What the input is cast to is passed by."""
    folder = _lower(GRAPH, tmp_path / "a", _weights(), precision="fp16", shapes={"N": 1})

    def edit(spec: Any) -> None:
        _find(spec, "conv").inputs["x"].arguments[0].name = "image"

    (found,) = _problems(folder, tmp_path / "b", edit)
    assert re.match(
        r"conv '.*' is declared as float16\[1, 6, 8, 8\], and float32\[1, 6, 8, 8\] follows", found
    )


def test_before_ios_17_weights_have_the_type_of_what_they_meet(tmp_path):
    folder = _lower(GRAPH, tmp_path / "a", _weights(), precision="fp16", shapes={"N": 1}, deployment="iOS16")

    def edit(spec: Any) -> None:
        _find(spec, "conv").inputs["x"].arguments[0].name = "image"

    found = _problems(folder, tmp_path / "b", edit)
    for parameter, problem in zip(("weight", "bias"), found, strict=True):
        assert re.match(
            rf"conv '.*': x is float32.*, {parameter} is float16.*, and conv takes one type for both", problem
        )


def test_operations_newer_than_the_program_are_refused(tmp_path):
    folder = _lower(GATHER, tmp_path / "a", deployment="iOS16")
    found = _problems(folder, tmp_path / "b", _become("gather", "scaled_dot_product_attention"))
    assert "there is no such operation in CoreML6" in found[0]


def test_gathers_say_whether_they_check_their_indices(tmp_path):
    found = _problems(_lower(GATHER, tmp_path / "a"), tmp_path / "b", _drop("gather", "validate_indices"))
    assert "'validate_indices' is missing" in found[0]


def _inner(kind: str, block: int) -> Callable[[Any], None]:
    """The first result of a block of an operation gets another size."""

    def edit(spec: Any) -> None:
        chosen = _find(spec, kind).blocks[block]
        made = {o.outputs[0].name: o for o in chosen.operations}
        made[chosen.outputs[-1]].outputs[0].type.tensorType.dimensions[0].constant.size = 3

    return edit


def _shorter(kind: str, block: int) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        del _find(spec, kind).blocks[block].outputs[-1]

    return edit


def _a_block_less(kind: str) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        del _find(spec, kind).blocks[1]

    return edit


def _no_flag(spec: Any) -> None:
    _find(spec, "cond").inputs["pred"].arguments[0].name = "x"


@pytest.mark.parametrize(
    ("graph", "edit", "message"),
    [
        (LOOP, _inner("while_loop", 1), r"the body has int32\[\], bool\[\], float32\[3\], the loop has int32\[\], bool\[\], float32\[2\]"),
        (LOOP, _shorter("while_loop", 1), r"the body has int32\[\], bool\[\], the loop has"),
        (LOOP, _shorter("while_loop", 0), r"the condition has nothing, a loop has bool\[\]"),
        (LOOP, _a_block_less("while_loop"), "has 1 blocks"),
        (BRANCH, _inner("cond", 0), r"the branch has float32\[3\], the operation has float32\[2\]"),
        (BRANCH, _shorter("cond", 1), "the branch has nothing"),
        (BRANCH, _a_block_less("cond"), "has 1 branches"),
        (BRANCH, _no_flag, r"pred is float32\[2\], and has to be one bool"),
    ],
)  # fmt: skip
def test_blocks_give_what_their_operation_gives(graph, edit, message, tmp_path):
    found = _problems(_lower(graph, tmp_path / "a"), tmp_path / "b", edit)
    assert any(re.search(message, p) for p in found), found


def _state(edit: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(spec: Any) -> None:
        edit(spec.description.state[0].type.stateType.arrayType)

    return change


def _state_as_input(spec: Any) -> None:
    feature = spec.description.input.add()
    feature.CopyFrom(spec.description.state[0])
    feature.type.multiArrayType.CopyFrom(spec.description.state[0].type.stateType.arrayType)
    del spec.description.state[0]


def _state_of(code: int) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        for value in spec.mlProgram.functions["main"].inputs:
            if value.type.WhichOneof("type") == "stateType":
                value.type.stateType.wrappedType.tensorType.dataType = code

    return edit


def _read_a_tensor(spec: Any) -> None:
    _find(spec, "read_state").inputs["input"].arguments[0].name = "x"


def _compute_with_a_state(spec: Any) -> None:
    _find(spec, "relu").inputs["x"].arguments[0].name = "k"


def _write_another(spec: Any) -> None:
    _find(spec, "write_state").inputs["data"].arguments[0].name = "x"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_state(_shape(2, 5)), r"input 'k' is described as \[2, 5\], and the function has a state of float16\[2, 4\]"),
        (_state(_dtype(65568)), "input 'k' is described as float32, and the function has a state of float16"),
        (_state_as_input, "input 'k' is described as multiArrayType, and the function has a state"),
        (_state_of(11), r"the state 'k' is a state of float32\[2, 4\], and states hold float16"),
        (_read_a_tensor, r"read_state '.*': input is float32\[2, 4\], and read_state takes a state"),
        (_compute_with_a_state, r"relu '.*': x is a state of float16\[2, 4\], and relu takes tensors"),
        (_write_another, r"write_state '.*': writes float32\[2, 4\] into a state of float16\[2, 4\]"),
    ],
)  # fmt: skip
def test_states_are_what_is_read_and_written(edit, message, tmp_path):
    folder = _lower(STATE, tmp_path / "a", states={"k": "l"})
    found = _problems(folder, tmp_path / "b", edit)
    assert any(re.search(message, p) for p in found), found


def test_compressed_weights_fit_their_scales(tmp_path):
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 64)).astype(np.float32)
    model = parse(HEAD + "g (float[2, 64] x) => (float[2, 64] y) { y = MatMul(x, w) }", w=weight)
    assert QuantizeWeights(bits=4, block=32).run(model, Context(target=PHONE))
    backend = BACKENDS.get("coreml")()
    (tmp_path / "a").mkdir()
    backend.lower(model, PHONE, backend.options(), tmp_path / "a")

    def edit(spec: Any) -> None:
        scale = _find(spec, "constexpr_blockwise_shift_scale").inputs["scale"].arguments[0]
        for dimension, size in zip(scale.value.type.tensorType.dimensions, (128, 1), strict=True):
            dimension.constant.size = size

    (found,) = _problems(tmp_path / "a", tmp_path / "b", edit)
    assert re.match("constexpr_blockwise_shift_scale '.*Number of scales", found)


def test_no_type_of_a_package_that_nobody_here_wrote_can_be_another(tmp_path):
    """Of basic-pitch, which coremltools 7 made from TensorFlow: every 25th of its operations."""
    from optkit.backends.coreml.quiet import Model_pb2
    from optkit.backends.coreml.validate import problems

    package = cache() / "models" / "basic_pitch" / "nmp.mlpackage"
    if not package.is_dir():
        pytest.skip("python -m optkit.benchmarks.coreml --only basic_pitch fetches the package")
    assert problems(package) == []
    changed = tmp_path / "model.mlpackage"
    shutil.copytree(package, changed)
    spec = Model_pb2.Model()
    spec.ParseFromString((tmp_path / MODEL).read_bytes())
    for operation in _operations(spec)[::25]:
        output = operation.outputs[0]
        before = output.SerializeToString()
        for edit in (_other_kind, _another_axis):
            edit(output.type.tensorType)
            (tmp_path / MODEL).write_bytes(spec.SerializeToString())
            told = [p for p in problems(changed) if p.startswith(f"{operation.type} {output.name!r}")]
            assert told, (operation.type, edit)
            output.ParseFromString(before)


def _other_kind(declared: Any) -> None:
    declared.dataType = 11 if declared.dataType == 23 else 23


def _another_axis(declared: Any) -> None:
    declared.dimensions.add().constant.size = 1
    declared.rank += 1
