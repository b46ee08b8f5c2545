"""The kernels of an artifact as plug-ins of TensorRT: C++ with the machine code inside, and the graph that calls them.

TensorRT's ahead-of-time plug-ins in Python are no way: their arguments come as inputs, numbers, outputs, and Triton's machine code
has its numbers behind the outputs, and two pointers more.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from optkit.backends.triton import bundle
from optkit.errors import ModelError
from optkit.kernels.base import DOMAIN
from optkit.kernels.launching import read
from optkit.rewrite import substitute
from optkit.store import save

FOLDER, SOURCE = "tensorrt", "optkit_plugins.cpp"
_TEMPLATE = Path(__file__).with_name("plugin.cpp.in")
_TYPES = {
    "FLOAT": "kFLOAT", "FLOAT16": "kHALF", "BFLOAT16": "kBF16", "INT8": "kINT8", "UINT8": "kUINT8", "INT32": "kINT32",
    "INT64": "kINT64", "BOOL": "kBOOL", "FLOAT8E4M3FN": "kFP8",
}  # fmt: skip
_SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "/", ast.Mod: "%",
}  # fmt: skip
_OPERATIONS = {
    "+": "kSUM",
    "-": "kSUB",
    "*": "kPROD",
    "/": "kFLOOR_DIV",
    "min": "kMIN",
    "max": "kMAX",
    "cdiv": "kCEIL_DIV",
}
_WHOLE = {"i32": "int32_t", "i64": "int64_t"}


def write(path: Path) -> None:
    """Write ``tensorrt/`` into the artifact ``path``: the source of the plug-ins, and the graph with their nodes.

    Raises:
        ModelError: A call leaves out an input, or has a type that plug-ins do not.
    """
    facts = bundle.read(path)
    model = ir.load(path / bundle.MODEL)
    nodes = {node.outputs[0].name: node for node in model.graph if node.domain == DOMAIN}
    variants: dict[str, dict[str, Any]] = {}
    for row in facts["launches"]:
        node = nodes[row["outputs"][0]["name"]]
        made = _variant(row, node)
        same = [name for name, known in variants.items() if known == made]
        name = same[0] if same else f"{row['kernels'][0]}.{len(variants)}"
        variants[name] = made
        _become_plugin(node, name, made)
    InlinePass()(model)
    model.functions.clear()
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    save(model, folder / bundle.MODEL)
    (folder / SOURCE).write_text(_source(path, facts["arch"], variants), encoding="utf-8")


def _variant(row: Mapping[str, Any], node: ir.Node) -> dict[str, Any]:
    """All that the plug-in of a call is made from."""
    places = [i for i, o in enumerate(row["outputs"]) if o is not None]
    outputs = [row["outputs"][i] for i in places]
    if None in row["inputs"]:
        raise ModelError(f"{row['node']}: a call that leaves out operands cannot be a plug-in")
    kinds = [v.dtype.name if v is not None and v.dtype is not None else "nothing" for v in node.inputs]
    kinds += [o["type"] for o in outputs]
    if odd := [k for k in kinds if k not in _TYPES]:
        raise ModelError(f"{row['node']}: TensorRT's plug-ins have no {odd[0].lower()}")
    return {
        "op": f"Optkit{row['op']}", "kernel": row["kernels"][0], "sizes": row["sizes"],
        "inputs": kinds[: len(node.inputs)], "outputs": kinds[len(node.inputs) :],
        "shapes": [o["shape"] for o in outputs], "places": places,
    }  # fmt: skip


def _become_plugin(node: ir.Node, name: str, made: Mapping[str, Any]) -> None:
    """TensorRT's parser knows operators by their name alone, and plug-ins by three attributes."""
    if made["places"] != list(range(len(made["places"]))):
        node = _without_gaps(node, made["places"])
    node.op_type, node.domain = made["op"], DOMAIN
    node.attributes.clear()
    for key, value in (("plugin_namespace", "optkit"), ("plugin_version", "1"), ("program", name)):
        node.attributes.add(ir.AttrString(key, value))
    node.resize_outputs(len(made["outputs"]))


def _without_gaps(node: ir.Node, places: Sequence[int]) -> ir.Node:
    """The same call with those of its outputs alone that are read, one behind the other."""
    graph = node.graph
    assert graph is not None
    new = ir.node(node.op_type, list(node.inputs), domain=DOMAIN, num_outputs=len(places), name=node.name)
    graph.insert_after(node, new)
    for value, old in zip(new.outputs, (node.outputs[i] for i in places), strict=True):
        if not old.is_graph_output():
            value.name, old.name = old.name, None
        substitute(old, value)
    graph.remove(node, safe=True)
    return new


def _source(path: Path, arch: str, variants: Mapping[str, Mapping[str, Any]]) -> str:
    kernels = list(dict.fromkeys(v["kernel"] for v in variants.values()))
    code, functions, table = [], [], []
    for index, name in enumerate(kernels):
        code.append(
            f'__asm__(".pushsection .rodata\\n.balign 16\\n.hidden optkit_code_{index}\\n.global optkit_code_{index}\\n"\n'
            f'        "optkit_code_{index}:\\n.incbin \\"../{bundle.FOLDER}/{name}.cubin\\"\\n.byte 0\\n.popsection");\n'
            f'extern "C" __attribute__((visibility("hidden"))) unsigned char const optkit_code_{index}[];'
        )
    for index, (name, made) in enumerate(variants.items()):
        record = read(path / bundle.FOLDER, made["kernel"]).record
        if record["profile_scratch"] or record["program"].get("aliases"):
            raise ModelError(f"{made['kernel']} writes in place or profiles itself, which plug-ins do not")
        functions.append(_functions(index, made, record))
        lists = [", ".join(f"DataType::{_TYPES[k]}" for k in made[side]) for side in ("inputs", "outputs")]
        table.append(
            f'        Program{{"{made["op"]}", "{name}", "{record["entry"]}", optkit_code_{kernels.index(made["kernel"])}, '
            f"{32 * record['warps']}, {record['shared']}, {record['scratch']}, {{{lists[0]}}}, {{{lists[1]}}}, shape_{index}, "
            f"outputs_{index}, start_{index}}},"
        )
    ops = dict.fromkeys(v["op"] for v in variants.values())
    text = _TEMPLATE.read_text(encoding="utf-8")
    for mark, part in (
        ("@ARCH@", arch), ("@CODE@", "\n".join(code)), ("@PROGRAMS@", "\n\n".join(functions)), ("@TABLE@", "\n".join(table)),
        ("@CREATORS@", ", ".join(f'Creator("{op}")' for op in ops)),
    ):  # fmt: skip
        text = text.replace(mark, part)
    return text


def _functions(index: int, made: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Grid, shapes of outputs and launch of a variant."""
    sizes = "".join(
        f"    int64_t const {name} = {_number(text)};\n    (void) {name};\n"
        for name, text in made["sizes"].items()
    )
    grid = ", ".join(_number(text) for text in record["program"]["grid"])
    shapes = [
        f"    outputs[{i}].nbDims = {len(shape)};\n"
        + "".join(f"    outputs[{i}].d[{k}] = {_symbol(text)};\n" for k, text in enumerate(shape))
        for i, shape in enumerate(made["shapes"])
    ]
    given = {a["name"]: a for a in record["program"]["arguments"]}
    lines, places = [], []
    for parameter in record["parameters"]:
        argument, name = given[parameter], f"a_{parameter}"
        kind, _, place = argument["binds"].partition(":")
        places.append(f"&{name}")
        if kind in ("input", "output"):
            side = "in" if kind == "input" else "out"
            at = int(place) if kind == "input" else made["places"].index(int(place))
            lines.append(f"    CUdeviceptr {name} = reinterpret_cast<CUdeviceptr>({side}[{at}]);")
            check = f"!aligned({name})"
        else:
            whole = _WHOLE[argument["type"]]
            lines.append(f"    int64_t const wide_{parameter} = {_number(argument['binds'])};")
            lines.append(f"    {whole} {name} = static_cast<{whole}>(wide_{parameter});")
            lines.append(f"    if (!fits<{whole}>(wide_{parameter}))\n    {{\n        return false;\n    }}")
            check = f"{name} % kALIGNMENT != 0"
        if argument["aligned"]:
            lines.append(f"    if ({check})\n    {{\n        return false;\n    }}")
    scratch = (
        "reinterpret_cast<CUdeviceptr>(workspace) + (kSCRATCH_ALIGNMENT - reinterpret_cast<CUdeviceptr>(workspace) "
        "% kSCRATCH_ALIGNMENT) % kSCRATCH_ALIGNMENT"
        if record["scratch"]
        else "0"
    )
    body = "\n".join(lines)
    return (
        f"Shape shape_{index}(Sizes const& s)\n{{\n{sizes}    return Shape{{{{{grid}}}}};\n}}\n\n"
        f"void outputs_{index}(Symbols const& s, DimsExprs* outputs)\n{{\n{''.join(shapes)}}}\n\n"
        f"bool start_{index}(CUfunction function, Program const& program, Sizes const& s, void const* const* in, "
        f"void* const* out, void* workspace, CUstream stream)\n{{\n{sizes}    (void) workspace;\n{body}\n"
        f"    CUdeviceptr scratch = {scratch};\n    CUdeviceptr profile = 0;\n"
        f"    void* arguments[] = {{{', '.join([*places, '&scratch', '&profile'])}}};\n"
        f"    return launch(function, program, shape_{index}(s), arguments, stream);\n}}"
    )


def _number(expression: str) -> str:
    """An expression of sizes in C++."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() as number):
                return f"int64_t{{{number}}}"
            case ast.Name(id=name):
                return name
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{text(operand)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SIGNS:
                return f"({text(left)} {_SIGNS[type(op)]} {text(right)})"
            case ast.Call(func=ast.Name(id=name), args=arguments):
                inner = [text(a) for a in arguments]
                if name in ("elements", "axis"):
                    return f"s.{name}({', '.join(a.removeprefix('int64_t') for a in inner)})"
                return f"{'std::' if name in ('min', 'max') else ''}{name}({', '.join(inner)})"
        raise ModelError(f"{expression!r} is not a size")

    return text(ast.parse(expression, mode="eval").body)


def _symbol(expression: str) -> str:
    """An expression of sizes for TensorRT's builder."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() as number):
                return f"s.number({number})"
            case ast.BinOp(left=left, op=op, right=right) if _SIGNS.get(type(op)) in _OPERATIONS:
                return _with(_SIGNS[type(op)], [text(left), text(right)])
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in _OPERATIONS:
                return _with(name, [text(a) for a in arguments])
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in ("elements", "axis"):
                return f"s.{name}({', '.join(json.dumps(ast.literal_eval(a)) for a in arguments)})"
        raise ModelError(f"{expression!r} is not a size that TensorRT works out")

    return text(ast.parse(expression, mode="eval").body)


def _with(name: str, operands: Sequence[str]) -> str:
    found = operands[0]
    for operand in operands[1:]:
        found = f"s.with(DimensionOperation::{_OPERATIONS[name]}, {found}, {operand})"
    return found
