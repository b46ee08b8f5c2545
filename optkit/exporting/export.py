"""From a module and example inputs to a graph: the ladder of ways to trace it, and the names that the graph gets."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from optkit.errors import ModelError, OptkitError, UnsupportedOpError, UsageError
from optkit.exporting.attention import zero_masked_rows
from optkit.exporting.axes import Axes, Dynamic, ask
from optkit.exporting.explain import located, place, untraceable
from optkit.exporting.operators import translations
from optkit.exporting.origin import note_origins
from optkit.exporting.pooling import clamp_windows
from optkit.exporting.program import simplify
from optkit.exporting.repairs import repaired
from optkit.exporting.signature import Flat, Signature, output_names
from optkit.graph import walk

logger = logging.getLogger(__name__)

_DIM = torch.export.Dim
# ``(name, what becomes of asked axes, keyword arguments of torch.export.export)``, best first.
_LADDER: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("dynamic", _DIM.DYNAMIC, {"strict": False}),
    (
        "dynamic, with run-time checks",
        _DIM.DYNAMIC,
        {"strict": False, "prefer_deferred_runtime_asserts_over_guards": True},
    ),
    ("auto", _DIM.AUTO, {"strict": False}),
    ("strict", _DIM.AUTO, {"strict": True}),
)
_FIXED = (("static", None, {"strict": False}), ("strict", None, {"strict": True}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A graph and the module that it must compute the same as.

    Attributes:
        model: As exported: at the exporter's opset, every node with its module and line.
        module: In evaluation mode; takes ``signature.arguments(tensors)``.
        tensors: The example inputs, in the order of the graph's inputs.
        rung: Of the ladder.
        outputs: Names.
    """

    model: ir.Model
    name: str
    module: Any
    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    axes: Axes
    rung: str
    outputs: tuple[str, ...]
    notes: tuple[str, ...]

    def eager(self, tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """What the module itself computes, by output name."""
        return run_eager(self.module, self.signature, tensors, self.outputs)

    def feeds(self, tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """The tensors as a batch for the graph."""
        names = [str(v.name) for v in self.model.graph.inputs]
        given = dict(zip(self.signature.names, tensors, strict=True))
        return {n: given[n].numpy(force=True) for n in names}


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
        return _from_script(module, inputs, dynamic, name)
    if inputs is None:
        raise UsageError(
            f"{name}: a module needs example inputs",
            hint="give inputs=(tensor, ...), or (module, inputs); on the command line the factory returns both",
        )
    module, notes = _in_float32(module, name)
    with _evaluation(module) as was_training:
        if was_training:
            notes.append("exported in evaluation mode")
        signature = Signature(module, _float_inputs(inputs) if notes and "float32" in notes[0] else inputs)
        axes = ask(dynamic, signature.names, signature.tensors)
        _note_fixed(signature, notes)
        result = _call(module, signature, signature.tensors, name)
        outputs = output_names(result)
        tensors = _traced(module, signature, axes, outputs)
        flat = Flat(module, signature)
        flat.eval()
        program, rung = _climb(flat, tensors, signature, axes, name)
        model = _onnx(program, name)
        note_origins(model, wrapper="module")
        _name_interface(model, signature.names, outputs)
        _name_free_axes(model, axes, signature.names, trusted=rung.startswith("dynamic"))
        _take_bounds(program, axes, signature.names)
    model.graph.name = re.sub(r"[^0-9A-Za-z_.]+", "_", name) or "model"
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes, rung=rung,
        outputs=tuple(outputs), notes=tuple(notes),
    )  # fmt: skip


def run_eager(
    module: Any, signature: Signature, tensors: Sequence[torch.Tensor], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    """One call in evaluation mode without gradients; arguments are copies, as caches are written to."""
    from torch.utils import _pytree as pytree

    args, kwargs = signature.arguments([t.clone() for t in tensors])
    with _evaluation(module), torch.no_grad(), quiet():
        result = module(*args, **kwargs)
    found = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
    return {n: v.resolve_conj().numpy(force=True).copy() for n, v in zip(outputs, found, strict=True)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from telling the user's terminal about itself."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch", "transformers")]
    children = [
        logging.getLogger(n)
        for n in tuple(logging.root.manager.loggerDict)
        if n.startswith(("torch", "transformers"))
    ]
    old = [(lg, lg.level) for lg in dict.fromkeys([*loggers, *children])]
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            for lg, _ in old:
                lg.setLevel(logging.CRITICAL)
            yield
        finally:
            for lg, level in old:
                lg.setLevel(level)
            if said.getvalue():
                logger.debug("said while tracing: %s", said.getvalue())


@contextlib.contextmanager
def _evaluation(module: Any) -> Iterator[bool]:
    parts = list(module.modules()) if hasattr(module, "modules") else []
    training = [m for m in parts if m.training]
    try:
        for m in training:
            m.training = False
        yield bool(training)
    finally:
        for m in training:
            m.training = True


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


def _call(module: Any, signature: Signature, tensors: Sequence[torch.Tensor], name: str) -> Any:
    args, kwargs = signature.arguments([t.clone() for t in tensors])
    try:
        with torch.no_grad(), quiet():
            return module(*args, **kwargs)
    except OptkitError:
        raise
    except Exception as error:
        at = place(error)
        where = f"{located(at)}: " if at else ""
        raise UsageError(
            f"{name}: does not run on the example inputs: {where}{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint="give inputs that the module takes",
        ) from error


def _traced(module: Any, signature: Signature, axes: Axes, outputs: Sequence[str]) -> list[torch.Tensor]:
    """The example at sizes of at least 2: tracing takes an axis of one element for an axis of always one."""
    if not axes or min(axes.sizes.values()) > 1:
        return [t.clone() for t in signature.tensors]
    taken = set(axes.sizes.values())
    sizes = {}
    for label, size in axes.sizes.items():
        while size < 2 or (size != axes.sizes[label] and size in taken):
            size += 1
        taken.add(size)
        sizes[label] = size
    larger = axes.resized(signature.names, signature.tensors, sizes)
    try:
        run_eager(module, signature, larger, outputs)
    except Exception as error:  # noqa: BLE001  (whatever the user's module raises: then the example is all there is)
        logger.debug("the module does not take %s: %s", sizes, error)
        return [t.clone() for t in signature.tensors]
    return larger


def _climb(
    flat: Flat, tensors: Sequence[torch.Tensor], signature: Signature, axes: Axes, name: str
) -> tuple[Any, str]:
    first: BaseException | None = None
    for rung, kind, options in _LADDER if axes else _FIXED:
        shapes = tuple({axis: kind for axis in axes.names.get(n, {})} for n in signature.names)
        try:
            with quiet(), torch.no_grad(), repaired(flat.module):
                program = torch.export.export(
                    flat,
                    tuple(t.clone() for t in tensors),
                    dynamic_shapes={"inputs": shapes} if axes else None,
                    **options,
                )
        except Exception as error:  # noqa: BLE001  (torch raises what user code raises, and many kinds of its own)
            logger.debug("%s: %s: %s", name, rung, error)
            first = first or error
            continue
        return program, rung
    assert first is not None
    raise untraceable(name, first) from first


def _onnx(program: Any, name: str) -> ir.Model:
    failure: Exception | None = None
    for decompose in (False, True):
        try:
            with quiet(), torch.no_grad():
                ready = simplify(program.run_decompositions() if decompose else program)
                written = torch.onnx.export(
                    ready, dynamo=True, optimize=False, verbose=False, custom_translation_table=translations()
                )
        except Exception as error:  # noqa: BLE001  (the exporter wraps whatever went wrong in errors of its own)
            logger.debug("%s: no ONNX: %s", name, error)
            failure = failure or error
            continue
        assert written is not None
        model: ir.Model = written.model
        zero_masked_rows(model)
        clamp_windows(model)
        return model
    assert failure is not None
    raise _no_word(program, failure, name) from failure


def _no_word(program: Any, error: Exception, name: str) -> ModelError:
    text, current = "", error
    while current is not None:
        text += f"{current}\n"
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    missing = re.search(
        r"No (?:ONNX|decompositions).*?for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>", text
    )
    lines = [line for line in text.splitlines() if line.strip()]
    reason = next(
        (ln for ln in lines if "No ONNX" in ln or "Error calling" in ln), lines[0] if lines else str(error)
    )
    if missing is None:
        return ModelError(
            f"{name}: torch.onnx cannot write it: {reason[:400]}",
            hint="run with --debug for the whole message",
        )
    target = f"{missing[1]}.{missing[2]}"
    problems = []
    for node in program.graph.nodes:
        if str(node.target) in (target, target.replace("::", ".")):
            trace = node.meta.get("stack_trace") or ""
            at = re.findall(r'File "([^"]+)", line (\d+)', trace)
            where = _place(at)
            problems.append(
                (f"{node.name} ({target}{': ' + where if where else ''})", "ONNX has no such operator")
            )
    problems = problems or [(target, "ONNX has no such operator")]
    return UnsupportedOpError(name, problems, hint="write that line with other operators of torch")


def _place(frames: Sequence[tuple[str, str]]) -> str:
    from optkit.exporting.explain import is_users, shorten

    users = [(f, n) for f, n in frames if is_users(f)]
    return f"{shorten(users[-1][0])}:{users[-1][1]}" if users else ""


def _name_interface(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    graph = model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ModelError(
            f"the exporter wrote {len(graph.inputs)} inputs and {len(graph.outputs)} outputs "
            f"for {len(inputs)} and {len(outputs)} tensors"
        )
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(graph.outputs):
        if value in seen:  # an input, a weight or another output handed through
            same = ir.node("Identity", [value], name=f"output_{index}/Identity")
            same.outputs[0].type, same.outputs[0].shape = value.type, value.shape
            graph.append(same)
            graph.outputs[index] = same.outputs[0]
        seen.add(graph.outputs[index])
    wanted = [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]
    if doubled := set(inputs) & set(outputs):
        wanted = [(v, f"{n}.out" if v in set(graph.outputs) and n in doubled else n) for v, n in wanted]
    taken = {name for _, name in wanted}
    own = {value for value, _ in wanted}
    for value in (*graph.initializers.values(), *(o for node in graph for o in node.outputs)):
        if value.name in taken and value not in own:
            value.name = f"{value.name}.inner"
    for number, (value, _) in enumerate(wanted):
        value.name = f"optkit.renamed.{number}"
    for value, name in wanted:
        value.name = name


def _name_free_axes(model: ir.Model, axes: Axes, names: Sequence[str], *, trusted: bool) -> None:
    """Free axes get the names that were asked for, all through the graph.

    Args:
        trusted: Tracing kept the axes free. Where it did not, it wrote their sizes into shapes, and these are found anew.
    """
    labels: dict[str, str] = {}
    for name, value in zip(names, model.graph.inputs, strict=True):
        if value.shape is None:
            continue
        free = axes.names.get(name, {})
        for axis, label in free.items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                labels.setdefault(dim.value, label)
        value.shape = ir.Shape([free.get(i, d) for i, d in enumerate(value.shape)])
    known = set(model.graph.inputs)

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        words = set(re.findall(r"[A-Za-z_]\w*", dim.value))
        if not words <= set(labels) or any(not labels[w].isidentifier() and dim.value != w for w in words):
            return None
        return re.sub(r"[A-Za-z_]\w*", lambda m: labels[m[0]], dim.value).replace(" ", "")

    for value in dict.fromkeys((*(o for node in model.graph for o in node.outputs), *model.graph.outputs)):
        if value in known or value.shape is None:
            continue
        if trusted:
            value.shape = ir.Shape([renamed(d) for d in value.shape])
        elif axes:
            value.shape = None


def _take_bounds(program: Any, axes: Axes, names: Sequence[str]) -> None:
    """What tracing found out about sizes: a table of 512 positions takes no more than 512 tokens."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"][-len(names) :]
    limits = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for name, node in zip(names, places, strict=True):
        shape: Mapping[int, Any] = dict(enumerate(getattr(node.meta.get("val"), "shape", ())))
        for axis, label in axes.names.get(name, {}).items():
            bounds = limits.get(str(shape.get(axis)))
            if bounds is None or not label.isidentifier():
                continue
            upper = int(bounds.upper) if str(bounds.upper).isdigit() else None
            lower = int(bounds.lower) if str(bounds.lower).isdigit() else 1
            low, high = axes.bounds.get(label, (1, None))
            # Tracing assumes 2 where 1 was never tried; whether 1 works is measured.
            low = max(low, lower if lower > 2 else 1)
            axes.bounds[label] = (low, upper if high is None else min(high, upper or high))


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
        free, sizes = _free_axes(program, signature)
        result = _call(module, signature, signature.tensors, name)
        outputs = output_names(result)
        model = _onnx(program, name)
    note_origins(model)
    axes = Axes(names=free, sizes=sizes)
    _name_interface(model, signature.names, outputs)
    _name_free_axes(model, axes, signature.names, trusted=True)
    _take_bounds(program, axes, signature.names)
    model.graph.name = re.sub(r"[^0-9A-Za-z_.]+", "_", name) or "model"
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes,
        rung="as exported", outputs=tuple(outputs), notes=(),
    )  # fmt: skip


def _free_axes(program: Any, signature: Signature) -> tuple[dict[str, dict[int, str]], dict[str, int]]:
    places = [n for n in program.graph.nodes if n.op == "placeholder"][-len(signature.names) :]
    free: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    labels: dict[str, str] = {}
    for name, node, tensor in zip(signature.names, places, signature.tensors, strict=True):
        for axis, dim in enumerate(getattr(node.meta.get("val"), "shape", ())):
            text = str(dim)
            if text.isdigit():
                continue
            if text.isidentifier() and text not in labels:
                # The first axis of inputs is the batch; others are named by their place, as in ``x_1``.
                labels[text] = (
                    "batch"
                    if axis == 0 and "batch" not in labels.values()
                    else f"{re.sub(r'[^0-9A-Za-z_]+', '_', name)}_{axis}"
                )
                sizes[labels[text]] = tensor.shape[axis]
            label = re.sub(r"[A-Za-z_]\w*", lambda m: labels.get(m[0], m[0]), text).replace(" ", "")
            free.setdefault(name, {})[axis] = label
    return free, sizes


def _from_script(module: Any, inputs: Any, dynamic: Dynamic | None, name: str) -> Exported:
    """TorchScript goes through torch's older exporter: torch.export does not trace it."""
    again = "export the nn.Module instead: torch.export.save(torch.export.export(module, args), 'model.pt2')"
    if inputs is None:
        raise UsageError(
            f"{name}: TorchScript does not say what its inputs are",
            hint=f"give example inputs (--inputs); or {again}",
        )
    with _evaluation(module), quiet():
        signature = Signature(module, inputs)
        axes = ask(dynamic, signature.names, signature.tensors)
        outputs = output_names(_call(module, signature, signature.tensors, name))
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
            node.metadata_props["optkit.module"] = ".".join(path[:-1])
    _name_interface(model, signature.names, outputs)
    _name_free_axes(model, axes, signature.names, trusted=False)
    return Exported(
        model=model, name=name, module=module, signature=signature, tensors=tuple(signature.tensors), axes=axes,
        rung="TorchScript", outputs=tuple(outputs), notes=("TorchScript, written by torch's older exporter: nodes have no source lines",),
    )  # fmt: skip
