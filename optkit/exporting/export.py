"""From a module and example inputs to a graph that has its names."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from optkit.errors import UsageError
from optkit.exporting.axes import Axes, Dynamic, ask
from optkit.exporting.eager import call, quiet
from optkit.exporting.exported import Exported
from optkit.exporting.interface import free_axes, name_free_axes, name_interface, take_bounds
from optkit.exporting.origin import note_origins
from optkit.exporting.script import from_script
from optkit.exporting.signature import Flat, Signature, output_names
from optkit.exporting.tracing import climb, enlarged
from optkit.exporting.writing import write
from optkit.passes.modes import evaluating


def export(module: Any, inputs: Any, dynamic: Dynamic | None = None, *, name: str = "module") -> Exported:
    """Trace ``module``, in evaluation mode, and write it as ONNX.

    Weights are shared with the module, not copied. The module is left as it was.

    Args:
        module: An ``nn.Module``, or an ``ExportedProgram`` (whose own free axes are kept).
        inputs: As ``Signature`` takes them; not needed for a program that holds its example.
        dynamic: As ``axes.ask`` takes it.

    Raises:
        UsageError: The inputs do not fit the module, or an axis does not exist.
        ModelError: It cannot be traced; names the line. ``UnsupportedOpError``: ONNX has no word for an operator.
    """
    if isinstance(module, torch.export.ExportedProgram):
        return _from_program(module, inputs, dynamic, name)
    if isinstance(module, torch.jit.ScriptModule):
        return from_script(module, inputs, dynamic, name)
    if inputs is None:
        raise UsageError(
            f"{name}: a module needs example inputs",
            hint="give inputs=(tensor, ...), or (module, inputs); on the command line --inputs x=1x3x224x224, or a factory that returns both",
        )
    module, notes = _in_float32(module, name)
    with evaluating(module) as was_training:
        if was_training:
            notes.append("exported in evaluation mode")
        signature = Signature(module, _float_inputs(inputs) if notes and "float32" in notes[0] else inputs)
        axes = ask(dynamic, signature.names, signature.tensors)
        _note_fixed(signature, notes)
        result = call(module, signature, signature.tensors, name)
        outputs = output_names(result)
        tensors = enlarged(module, signature, axes, outputs)
        flat = Flat(module, signature)
        flat.eval()
        program, rung = climb(flat, tensors, signature, axes, name)
        model = write(program, name)
        note_origins(model, wrapper="module")
        name_interface(model, signature.names, outputs)
        name_free_axes(model, axes, signature.names, trusted=rung.startswith("dynamic"))
        take_bounds(program, axes, signature.names)
    model.graph.name = re.sub(r"[^0-9A-Za-z_.]+", "_", name) or "model"
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes, rung=rung,
        outputs=tuple(outputs), notes=tuple(notes),
    )  # fmt: skip


def _in_float32(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, list[str]]:
    weights = [*module.parameters(), *module.buffers()]
    if any(w.device.type == "meta" for w in weights):
        raise UsageError(f"{name}: its weights are on the meta device", hint="load the weights first")
    narrow = sorted(
        {str(w.dtype).removeprefix("torch.") for w in weights if w.dtype in (torch.float16, torch.bfloat16)}
    )
    if narrow:
        note = f"its weights are {' and '.join(narrow)}; exported in float32, which holds them exactly"
        return copy.deepcopy(module).cpu().float(), [note]
    if any(w.device.type != "cpu" for w in weights):
        return copy.deepcopy(module).cpu(), []
    return module, []


def _float_inputs(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(
        lambda v: (
            v.float() if isinstance(v, torch.Tensor) and v.dtype in (torch.float16, torch.bfloat16) else v
        ),
        inputs,
    )


def _note_fixed(signature: Signature, notes: list[str]) -> None:
    fixed = [f"{n}={v!r}" for n, v in signature.fixed.items() if v is not None]
    if fixed:
        notes.append(f"arguments that are not tensors are part of the graph: {', '.join(fixed)[:200]}")


def _from_program(program: Any, inputs: Any, dynamic: Dynamic | None, name: str) -> Exported:
    """An exported program is its own reference; the axes that it leaves free are the ones that stay free."""
    if dynamic:
        raise UsageError(
            f"{name}: which axes of an exported program are free was decided when it was exported",
            hint="leave --dynamic out, or export it again with dynamic_shapes, or give the module",
        )
    module = program.module()
    example = program.example_inputs if inputs is None else inputs
    if example is None:
        raise UsageError(f"{name}: holds no example inputs", hint="give inputs=(tensor, ...)")
    with quiet():
        signature = Signature(module, example)
        free, sizes = free_axes(program, signature)
        result = call(module, signature, signature.tensors, name)
        outputs = output_names(result)
        model = write(program, name)
    note_origins(model)
    axes = Axes(names=free, sizes=sizes)
    name_interface(model, signature.names, outputs)
    name_free_axes(model, axes, signature.names, trusted=True)
    take_bounds(program, axes, signature.names)
    model.graph.name = re.sub(r"[^0-9A-Za-z_.]+", "_", name) or "model"
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes,
        rung="as exported", outputs=tuple(outputs), notes=(),
    )  # fmt: skip
