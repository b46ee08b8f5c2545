"""TorchScript goes through torch's older exporter: torch.export does not trace it."""

from __future__ import annotations

import io
from typing import Any

import onnx
import onnx_ir as ir
import torch

from optkit.errors import ModelError, UsageError
from optkit.exporting.axes import Dynamic, ask
from optkit.exporting.eager import call, quiet
from optkit.exporting.exported import Exported
from optkit.exporting.interface import name_free_axes, name_interface
from optkit.exporting.signature import Signature, output_names
from optkit.graph import walk
from optkit.origin import MODULE
from optkit.passes.modes import evaluating


def from_script(module: Any, inputs: Any, dynamic: Dynamic | None, name: str) -> Exported:
    """TorchScript goes through torch's older exporter: torch.export does not trace it."""
    again = "export the nn.Module instead: torch.export.save(torch.export.export(module, args), 'model.pt2')"
    if inputs is None:
        raise UsageError(
            f"{name}: TorchScript does not say what its inputs are",
            hint=f"give example inputs (--inputs x=1x512); or {again}",
        )
    with evaluating(module), quiet():
        signature = Signature(module, inputs)
        axes = ask(dynamic, signature.names, signature.tensors)
        outputs = output_names(call(module, signature, signature.tensors, name))
        free = {n: dict(a) for n, a in axes.names.items()}
        args, kwargs = signature.arguments(signature.tensors)
        written = io.BytesIO()
        try:
            torch.onnx.export(
                module, args, written, kwargs=kwargs or None, dynamo=False, opset_version=17, input_names=signature.names,
                output_names=[f"optkit_output_{i}" for i in range(len(outputs))], dynamic_axes=free,
            )  # fmt: skip
        except Exception as error:
            raise ModelError(
                f"{name}: torch cannot write this TorchScript as ONNX: {str(error).strip().partition(chr(10))[0][:300]}",
                hint=again,
            ) from error
    model = ir.from_proto(onnx.load_from_string(written.getvalue()))
    for node in walk(model):
        path = str(node.name or "").strip("/").split("/")
        if len(path) > 1:
            node.metadata_props[MODULE] = ".".join(path[:-1])
    name_interface(model, signature.names, outputs)
    name_free_axes(model, axes, signature.names, trusted=False)
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes,
        rung="TorchScript", outputs=tuple(outputs), notes=("TorchScript, written by torch's older exporter: nodes have no source lines",),
    )  # fmt: skip
