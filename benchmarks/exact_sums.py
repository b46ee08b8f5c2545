"""What the rounding of sums amounts to: the same model with sums that are rounded once."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from optkit.frontend import load
from optkit.graph import graphs


def with_exact_sums(path: Path) -> ir.Model:
    """The model with its sums and means in float64, each rounded once at its end."""
    model = load(path, check=False)
    for graph in graphs(model):
        for node in tuple(graph):
            value = node.inputs[0] if node.inputs else None
            if (
                node.op_type not in ("ReduceSum", "ReduceMean")
                or value is None
                or value.dtype != ir.DataType.FLOAT
            ):
                continue
            kinds = {"to": ir.DataType.DOUBLE.value}, {"to": ir.DataType.FLOAT.value}
            wide = ir.node("Cast", [value], attributes=kinds[0], name=f"{node.name}/wide")
            narrow = ir.node("Cast", [node.outputs[0]], attributes=kinds[1], name=f"{node.name}/narrow")
            total, rounded = node.outputs[0], narrow.outputs[0]
            # The readers are told first, then the cast is made to read the sum; an output of the graph keeps its name.
            total.replace_all_uses_with(rounded, replace_graph_outputs=True)
            rounded.name, total.name = total.name, f"{total.name}/wide"
            rounded.type, rounded.shape = ir.TensorType(ir.DataType.FLOAT), total.shape
            narrow.replace_input_with(0, total)
            node.replace_input_with(0, wide.outputs[0])
            total.type = wide.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
            graph.insert_before(node, wide)
            graph.insert_after(node, narrow)
    return model
