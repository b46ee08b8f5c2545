"""Where in the Python code each node comes from."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from optkit.exporting.explain import is_users, shorten
from optkit.graph import graphs
from optkit.origin import MODULE, SOURCE, inherit

if TYPE_CHECKING:
    import onnx_ir as ir

_TORCH = "pkg.torch."


def note_origins(model: ir.Model, *, wrapper: str = "") -> None:
    """Replace what the exporter wrote on nodes by the path of the module and the line of the user's that each comes from.

    Args:
        wrapper: Name of the attribute through which the module was called while tracing; paths leave it out.
    """
    for graph in graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _forget(value.metadata_props)
        for node in graph:
            props = node.metadata_props
            module, source = _module(props.get(f"{_TORCH}onnx.name_scopes", ""), wrapper), None
            source = _source(props.get(f"{_TORCH}onnx.stack_trace", ""))
            _forget(props)
            if module:
                props[MODULE] = module
            if source:
                props[SOURCE] = source
            for value in node.outputs:
                _forget(value.metadata_props)
    # Sizes that tracing itself reads belong to what they are read for.
    inherit(model)
    _forget(model.graph.metadata_props)
    _forget(model.metadata_props)
    for graph in graphs(model):
        for node in graph:
            # Wherever a node is named, in reports and in recipes, its module is.
            if path := node.metadata_props.get(MODULE):
                node.name = f"{path}/{str(node.name).removeprefix('node_')}"


def _forget(props: dict[str, str]) -> None:
    for key in [k for k in props if k.startswith(_TORCH) or k == "namespace"]:
        del props[key]


def _module(scopes: str, wrapper: str) -> str:
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        return ""
    # The last is the name of the operation itself.
    path = next((n for n in reversed(names[:-1]) if n and not n.startswith("_empty_nn_module")), "")
    path = re.sub(r"@\d+", "", str(path))
    return path.removeprefix(wrapper).removeprefix(".") if wrapper else path


def _source(trace: str) -> str | None:
    frames = [(f, n) for f, n in re.findall(r'File "([^"]+)", line (\d+)', trace) if is_users(f)]
    return f"{shorten(frames[-1][0])}:{frames[-1][1]}" if frames else None
