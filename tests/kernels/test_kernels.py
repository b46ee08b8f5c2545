"""Every kernel: its function body and its program against float64, its machine code against the gates."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import optkit.kernels
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN, TYPES
from optkit.kernels.build import build, key
from optkit.kernels.gates import failures, gates, read_size
from optkit.kernels.numerics import errors, interpret, launch, rivals
from optkit.kernels.triton.drawing import DTYPES
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.targets.gpu import ARCHITECTURES, GFX942
from optkit.workbench import refused, sheets

HOPPER, ADA = (9, 0), (8, 9)
NAMES = list(KERNELS)
CASES = [(name, index) for name in NAMES for index in range(len(KERNELS[name].small))]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def call(kernel, problem, inputs):
    """A model of one call of the kernel's function."""
    values = [
        None if a is None else ir.Value(
            name=f"i{i}", shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype))
        )
        for i, a in enumerate(inputs)
    ]  # fmt: skip
    shapes = kernel.outputs(problem, [() if a is None else a.shape for a in inputs])
    node = ir.node(
        kernel.op,
        values,
        attributes=kernel.attributes(problem),
        domain=DOMAIN,
        num_outputs=len(shapes),
        name="call",
    )
    made = [
        (i, output)
        for i, (output, shape) in enumerate(zip(node.outputs, shapes, strict=True))
        if shape is not None
    ]
    for i, output in made:
        output.name, output.shape = f"o{i}", ir.Shape(shapes[i])
        output.type = ir.TensorType(TYPES[kernel.output_format(problem, i)])
    function = kernel.function()
    graph = ir.Graph(
        [v for v in values if v is not None],
        [output for _, output in made],
        nodes=[node],
        opset_imports={"": 21, DOMAIN: 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10, functions=[function])


EIGHT = ir.DataType.FLOAT8E4M3FN


def in_floats(model):
    """Floats of 8 bits, which ONNX Runtime takes from no one, as float32 outside."""
    graph = model.graph
    (node,) = graph
    for i, value in enumerate(tuple(graph.inputs)):
        if value.dtype == EIGHT:
            wide = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            value.name = f"{value.name}/8"
            graph.inputs[i] = wide
            graph.insert_before(
                node, ir.Node("", "Cast", [wide], [ir.AttrInt64("to", int(EIGHT))], outputs=[value])
            )
    for i, value in enumerate(tuple(graph.outputs)):
        if value.dtype == EIGHT:
            cast = ir.node("Cast", [value], attributes={"to": 1})
            cast.outputs[0].name, value.name = value.name, f"{value.name}/8"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            graph.append(cast)
            graph.outputs[i] = cast.outputs[0]
    return model


@pytest.mark.parametrize(("name", "index"), CASES)
def test_the_function_body_computes_what_the_reference_does(name, index):
    kernel = KERNELS[name]()
    problem = kernel.small[index]
    inputs = kernel.draw(problem, 5, seed=3)
    wide = [
        a if a is None or a.dtype.kind in "iu" or a.itemsize == 1 else a.astype(np.float32) for a in inputs
    ]
    exact = {**problem, "output": "fp32"} if "output" in problem else {**problem, "format": "fp32"}
    model = in_floats(call(kernel, exact, wide))
    feeds = {
        f"i{i}": a.astype(np.float32) if a.dtype == DTYPES["fp8"] else a
        for i, a in enumerate(wide)
        if a is not None
    }
    found = ReferenceSession(model, optimize=False).run(feeds)
    for value, right in zip(found.values(), kernel.reference(exact, wide), strict=True):
        # float32 sums of at most 256 terms around 1.
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_call_tells_its_problem(name, index):
    kernel = KERNELS[name]()
    problem = kernel.small[index]
    rows = max(kernel.edges(problem, HOPPER))
    model = call(kernel, problem, kernel.draw(problem, rows, seed=3))
    (node,) = model.graph
    found = kernel.problem(node)
    assert not isinstance(found, str), found
    known = {"scale", "epsilon"}
    assert {k: v for k, v in found.items() if k not in known} == {
        k: v for k, v in problem.items() if k not in known
    }
    for name_ in known & set(problem):
        # Attributes of ONNX are float32.
        assert np.float32(found[name_]) == np.float32(problem[name_])


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), GFX942]
)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_configuration(name, capability):
    kernel = KERNELS[name]()
    for problem in (*kernel.examples, *kernel.small):
        if kernel.unsupported(problem, capability):
            continue
        program = kernel.program(problem, capability)
        assert program.warps in (1, 2, 4, 8, 16)
        assert 1 in kernel.edges(problem, capability)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_finalist_is_the_one_of_the_table_and_none_comes_twice(name):
    kernel = KERNELS[name]()
    for problem in kernel.examples:
        found = kernel.finalists(problem, HOPPER)
        assert found[0] == kernel.program(problem, HOPPER)
        assert len({p.digest() for p in found}) == len(found)
        assert all(p.stages > 0 for p in found)


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear-gelu",
        "linear-int8",
        "linear-int4",
        "linear-int4-decode",
        "linear-uint4",
        "linear-uint4-decode",
    ],
)
@pytest.mark.parametrize("capability", [c for c in ARCHITECTURES if c >= (8, 0)])
def test_a_device_chooses_among_tiles_not_only_among_stages(name, capability):
    kernel = KERNELS[name]()
    found = kernel.finalists(kernel.examples[0], capability)
    assert len({(p.constants["M"], p.constants["N"], p.constants.get("K")) for p in found}) > 1


@pytest.mark.needs("triton", "torch")
def test_every_kernel_computes_what_the_reference_does_at_the_edges_of_blocks():
    launches = [
        launch(kernel, problem, HOPPER, rows)
        for kernel in (KERNELS[name]() for name in NAMES)
        for problem in kernel.small
        for rows in kernel.edges(problem, HOPPER)
    ]
    for one, outputs in zip(launches, interpret(launches), strict=True):
        for error in errors(one, outputs):
            assert error.steps <= one.kernel.allowed(one.problem), (
                one.kernel.name,
                one.problem,
                error.output,
            )


@pytest.mark.needs("triton", "torch")
def test_every_other_tile_computes_what_the_reference_does():
    launches = [
        one
        for kernel in (KERNELS[name]() for name in NAMES)
        for problem in kernel.small
        for capability in (HOPPER, ADA)
        if kernel.unsupported(problem, capability) is None
        for one in rivals(kernel, problem, capability)
    ]
    assert {one.kernel.name for one in launches} >= {
        "linear",
        "linear-int8",
        "linear-fp8",
        "linear-int4-decode",
        "linear-uint4-decode",
    }
    for one, outputs in zip(launches, interpret(launches), strict=True):
        for error in errors(one, outputs):
            assert error.steps <= one.kernel.allowed(one.problem), (one.kernel.name, one.program.config)


@pytest.mark.needs("triton", "torch")
def test_a_wrong_constant_is_found_by_the_numbers():
    kernel = KERNELS["layer-norm"]()
    one = launch(kernel, kernel.small[0], HOPPER, 3)
    constants = {**one.program.constants, "EPSILON": 0.1}
    wrong = dataclasses.replace(one, program=dataclasses.replace(one.program, constants=constants))
    (outputs,) = interpret([wrong])
    assert errors(wrong, outputs)[0].steps > 10 * kernel.allowed(kernel.small[0])


LOWEST = float(np.finfo(np.float32).min)
# What hides keys, by the formats of masks that hold it.
HIDING = {
    "fp32": (-np.inf, LOWEST, float(ml_dtypes.finfo(ml_dtypes.bfloat16).min), -65504.0, -1e9),
    "bf16": (-np.inf, float(ml_dtypes.finfo(ml_dtypes.bfloat16).min), -1e9),
    "fp16": (-np.inf, -65504.0),
}


def hiding(shape, low):
    """A mask whose rows in turn hide all keys, all but the last, as padding on the left does, all but the first, and every other."""
    hidden = np.zeros((4, shape[3]), bool)
    hidden[0], hidden[1, :-5], hidden[2, 7:], hidden[3, ::2] = True, True, True, True
    turns = np.arange(np.prod(shape[:3])).reshape(shape[:3]) % 4
    return np.where(hidden[turns], np.float32(low), np.float32(0))


@pytest.mark.needs("triton", "torch")
def test_attention_hides_keys_with_any_low_number_as_onnx_does():
    """The product of float32's lowest number with log2(e) is infinite, which would make NaN of rows that hide every key."""
    cases = []
    for name, index, fmt in (
        ("masked-attention", 0, "fp32"),
        ("masked-attention", 1, "bf16"),
        ("masked-attention", 2, "fp32"),
        ("masked-attention", 3, "fp16"),
        ("causal-masked-attention", 1, "fp32"),
    ):
        kernel = KERNELS[name]()
        problem = {**kernel.small[index], "mask_format": fmt}
        # Over a block of queries, and over one of keys.
        one = launch(kernel, problem, HOPPER, max(kernel.edges(problem, HOPPER)))
        masks = [hiding(one.inputs[3].shape, low) for low in HIDING[fmt]]
        if fmt == "fp32":
            # With a second one, as for order and padding: minus infinity where both hide.
            second = np.where(np.arange(one.inputs[3].shape[3]) < 40, np.float32(LOWEST), np.float32(0))
            with np.errstate(over="ignore"):
                masks.append(hiding(one.inputs[3].shape, LOWEST) + second)
        cases += [dataclasses.replace(one, inputs=[*one.inputs[:3], m.astype(DTYPES[fmt])]) for m in masks]
    for one, (found,) in zip(cases, interpret(cases), strict=True):
        wide = [a.astype(np.float32) for a in one.inputs]
        exact = {**one.problem, "format": "fp32", "mask_format": "fp32"}
        feeds = {f"i{i}": a for i, a in enumerate(wide)}
        (right,) = ReferenceSession(call(one.kernel, exact, wide), optimize=False).run(feeds).values()
        case = (one.kernel.name, one.problem, float(wide[3].min()))
        found = found.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(right), err_msg=str(case))
        assert np.isnan(right).any() <= np.isinf(wide[3]).any(), case
        allowed = one.kernel.allowed(one.problem) * {"fp16": 2.0**-10, "bf16": 2.0**-7}[one.problem["format"]]
        least = np.sqrt(np.nanmean(right**2))
        np.testing.assert_allclose(found, right, rtol=allowed, atol=allowed * least, err_msg=str(case))


@pytest.mark.needs("triton")
@pytest.mark.parametrize(("name", "arch"), [("h100", "sm_90a"), ("mi300x", "gfx942")])
def test_every_kernel_that_a_target_has_formats_for_compiles_and_passes_its_gates(name, arch):
    where = target(name)
    found = sheets(NAMES, [where])
    kernels = {n: KERNELS[n]() for n in NAMES}
    assert {s.kernel for s in found} == {
        n for n, k in kernels.items() if any(k.unsupported(p, where.capability) is None for p in k.examples)
    }
    assert len(found) > 40
    for sheet in found:
        assert failures(sheet.record) == [], sheet.kernel
        assert sheet.record["arch"] == arch
        assert sheet.record["registers"] > 0
        assert not sheet.cached
        assert 0 < sheet.estimate.floor <= sheet.estimate.low <= sheet.estimate.high
    again = sheets(NAMES, [where])
    assert all(s.cached for s in again)
    assert [s.record["sha256"] for s in again] == [s.record["sha256"] for s in found]


@pytest.mark.needs("triton")
@pytest.mark.parametrize("capability", [ADA, HOPPER])
def test_attention_of_small_heads_with_a_value_for_every_score_is_shipped(capability):
    """The mask is most of what they read, and its rows start anywhere."""
    kernel = KERNELS["masked-attention"]()
    problem = {
        "format": "fp16",
        "depth": 16,
        "scale": "0.25",
        "share": 1,
        "mask": "bhq",
        "mask_format": "fp32",
    }
    built = build([(p, capability) for p in kernel.finalists(problem, capability)])
    assert any(not failures(one.record) for one in built)


@pytest.mark.needs("triton")
def test_the_same_program_compiles_to_the_same_bytes():
    kernel = KERNELS["rms-norm"]()
    job = (kernel.program(kernel.examples[0], ADA), ADA)
    (first,) = build([job])
    (second,) = build([job], fresh=True)
    assert first.record["sha256"] == second.record["sha256"]
    assert not second.cached


@pytest.mark.needs("triton")
@pytest.mark.parametrize("capability", [ADA, GFX942])
def test_machine_code_does_not_name_the_folder_that_it_was_compiled_in(capability):
    kernel = KERNELS["rms-norm"]()
    (built,) = build([(kernel.program(kernel.examples[0], capability), capability)])
    code = built.code.read_bytes()
    assert len(code) == built.record["bytes"]
    assert str(Path(optkit.kernels.__file__).parent).encode() not in code
    assert b".debug_line" not in code


@pytest.mark.needs("triton")
def test_loads_that_nobody_promised_to_be_aligned_fail_the_gate():
    kernel = KERNELS["rms-norm"]()
    program = kernel.program(kernel.examples[0], ADA)
    loose = dataclasses.replace(
        program, arguments=tuple(dataclasses.replace(a, aligned=False) for a in program.arguments)
    )
    (built,) = build([(loose, ADA)])
    assert any("128-bit loads" in f for f in failures(built.record))


@pytest.mark.needs("triton")
def test_a_block_too_large_for_registers_fails_the_gate_for_the_stack():
    kernel = KERNELS["layer-norm"]()
    program = kernel.program({**kernel.examples[1], "columns": 8192}, ADA)
    crowded = dataclasses.replace(program, warps=1, constants={**program.constants, "ROWS": 1})
    (built,) = build([(crowded, ADA)])
    assert any(f.startswith("stack") for f in failures(built.record))


RECORD = {
    "capability": [9, 0], "arch": "sm_90a", "registers": 128, "stack": 0, "shared": 1 << 16, "warps": 8,
    "instructions": {"LDG.E.128": 4, "HGMMA.64x64x16.F32": 4},
    "program": {
        "arguments": [{"type": "*bf16"}, {"type": "i32"}], "products": "bf16", "low": False, "waived": {},
    },
}  # fmt: skip


def altered(**changes):
    record = copy.deepcopy(RECORD)
    for name, value in changes.items():
        if name in record["program"]:
            record["program"][name] = value
        else:
            record[name] = value
    return record


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"shared": 228 << 10}, "shared memory"),
        ({"stack": 8}, "stack"),
        ({"registers": 256}, "occupancy"),
        ({"instructions": {"LDG.E.128": 4, "HMMA.16816.F32": 16}}, "matrix instructions"),
        ({"instructions": {"LDG.E.U16": 16, "HGMMA.64x64x16.F32": 4}}, "128-bit loads"),
        ({"instructions": {"LDG.E.128": 1, "LDG.E": 13, "HGMMA.64x64x16.F32": 4}}, "128-bit loads"),
        (
            {"instructions": {"global_load_dwordx2": 30, "global_load_dwordx4": 4}, "products": None},
            "128-bit loads",
        ),
        ({"low": True}, "matrix instructions"),
        ({"arch": "sm_89"}, "architecture"),
        ({"arguments": [{"type": "*fp8e4nv"}], "capability": [8, 0], "arch": "sm_80"}, "formats"),
    ],
)
def test_each_gate_catches_its_failure(changes, gate):
    assert all(g.passed for g in gates(RECORD))
    assert gate in [g.name for g in gates(altered(**changes)) if not g.passed]
    waived = altered(**changes, waived={gate: "for the test"})
    assert gate not in [f.partition(":")[0] for f in failures(waived)]


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("LDG.E", 4), ("LDG.E.U8", 1), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.64", 8), ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDG.E.ENL2.256", 32), ("UTMALDG.2D", 1024), ("LDS.128", 0), ("STG.E.128", 0), ("global_load_ushort", 2),
        ("global_load_short_d16_hi", 2), ("global_load_sbyte", 1), ("global_load_dword", 4), ("buffer_load_dwordx4", 16),
        ("ds_read_b128", 0),
    ],
)  # fmt: skip
def test_reads_of_global_memory_count_by_their_bytes(instruction, size):
    assert read_size(instruction) == size


@pytest.mark.needs("triton")
def test_a_program_that_does_not_fit_its_source_is_refused_by_name():
    kernel = KERNELS["rms-norm"]()
    program = kernel.program(kernel.examples[0], ADA)
    with pytest.raises(ModelError, match="disagree on rows"):
        build([(dataclasses.replace(program, arguments=program.arguments[:-1]), ADA)])


@pytest.mark.needs("triton")
@pytest.mark.parametrize(("seconds", "each"), [(0.05, 0), (0, 0.05)])
def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch, seconds, each):
    monkeypatch.setattr("optkit.kernels.build._SECONDS", seconds)
    monkeypatch.setattr("optkit.kernels.build._EACH", each)
    kernel = KERNELS["softmax"]()
    with pytest.raises(ModelError, match=r"worker did not finish within 0.05 s"):
        build([(kernel.program(kernel.examples[0], ADA), ADA)], fresh=True)


def test_without_triton_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr("optkit.kernels.build.installed", lambda: False)
    with pytest.raises(BackendUnavailableError) as caught:
        sheets(["rms-norm"], [target("h100")])
    assert caught.value.hint == "pip install 'optkit[triton]'"


@pytest.mark.parametrize("name", ["cpu", "t4"])
def test_targets_without_kernels_are_refused(name):
    with pytest.raises(UsageError, match="sm_80"):
        sheets(["rms-norm"], [target(name)])


def test_formats_that_an_architecture_lacks_are_left_out_and_told():
    kernel = KERNELS["paged-attention-quantized"]()
    eight = {**kernel.examples[0], "stored": "fp8"}
    assert kernel.unsupported(eight, (8, 0)) == "sm_80 has no fp8"
    assert kernel.unsupported(eight, ADA) is None
    told = refused([kernel.name], [target("a100"), target("l4")])
    assert told == ["paged-attention-quantized for a100: sm_80 has no fp8"]


@pytest.mark.needs("triton", "torch")
def test_a_kernel_that_writes_in_place_leaves_the_rest_as_it_was():
    kernel = KERNELS["rotary-write"]()
    one = launch(kernel, kernel.small[0], HOPPER, 3)
    (outputs,) = interpret([one])
    slots = one.inputs[4]
    page, place = np.divmod(slots, kernel.small[0]["page"])
    for found, before in zip(outputs, one.inputs[5:7], strict=True):
        same = found == before
        assert not same[page, :, place].all(axis=(1, 2)).any()
        same[page, :, place] = True
        assert same.all()


@pytest.mark.needs("triton")
def test_the_key_depends_on_program_and_architecture():
    kernel = KERNELS["layer-norm"]()
    first, second = (kernel.program(p, HOPPER) for p in kernel.examples[:2])
    assert len({key(first, HOPPER), key(second, HOPPER), key(first, ADA)}) == 3


def test_drawn_values_are_exact_in_their_formats():
    for name in NAMES:
        kernel = KERNELS[name]()
        arrays = kernel.draw(kernel.small[0], 3, seed=0)
        assert [a.shape for a in arrays if a is not None] == kernel.shapes(kernel.small[0], 3)
        assert arrays[0].dtype in {
            DTYPES[str(v)] for k, v in kernel.small[0].items() if k in ("format", "stored")
        }
