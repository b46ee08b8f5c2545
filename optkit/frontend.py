"""A file, its bytes or a graph becomes the model that passes work on: one opset, clean names, known shapes."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import PassError, PreconditionError
from onnx_ir.passes.common import InlinePass

from optkit import equivalence, onnxfile, opset
from optkit.data import Feeds, TensorSpec
from optkit.errors import BackendUnavailableError, DataError, ModelError, UnsupportedOpError, UsageError
from optkit.graph import IR_VERSION, OPSET, attribute, describe, graphs, verify, walk
from optkit.inference import infer

if TYPE_CHECKING:
    from optkit.exporting.exported import Exported

logger = logging.getLogger(__name__)

# Functions of this domain are kernels with a fallback, and stay calls.
_KERNELS = "optkit"
# Functions that need more than this to be written out are a trap, not a network.
_MOST_STEPS = 200_000_000
_DEEPEST_CALL = 100

# Constants above this are weights.
_LARGE = 1024

_TORCH = {".pt2", ".pt", ".pth", ".ckpt", ".ts", ".jit", ".safetensors", ".torchscript"}
_EXPORTERS = ("torch", "onnxscript")
_PICKLES = {".pkl", ".pickle", ".joblib"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model and what loading did to it.

    Attributes:
        model: At opset ``OPSET``, verified.
        name: How messages name the source: the file's name, or "model".
        opset: Of the source, default domain.
        notes: What was changed or could not be checked, as sentences for the report.
        path: The file, where there is one and the reference can run it.
        examples: Batches that came with the source; those of a module are its example inputs.
        axes: Smallest and largest size of free axes, where they are known.
        packages: What took part in making the graph, for the manifest.
        sorts: Whether the graph gives values in order of which the file leaves open in which they come.
    """

    model: ir.Model
    name: str
    opset: int
    notes: tuple[str, ...]
    path: Path | None = None
    examples: tuple[Feeds, ...] = ()
    axes: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    sorts: bool = False

    @property
    def original(self) -> Path | ir.Model:
        """What everything is held against: the file as it is, but where there is none, or where it leaves an order open."""
        return self.model if self.path is None or self.sorts else self.path


def load(source: Any, *, unsafe: bool = False, check: bool = True) -> ir.Model:
    """Load a model at the working opset; ``read`` also tells what was done."""
    return read(source, unsafe=unsafe, check=check).model


def is_torch(source: Any) -> bool:
    """Whether ``source`` is for PyTorch: a module, with or without inputs, the name of a factory, or a file of torch."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return (path / "config.json").is_file()
        named = (
            isinstance(source, str) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source) is not None
        )
        return path.suffix.lower() in _TORCH or (named and not path.exists())
    # Whoever has a module has imported torch.
    torch = sys.modules.get("torch")
    first = source[0] if isinstance(source, tuple | list) and source else source
    return torch is not None and isinstance(first, torch.nn.Module | torch.export.ExportedProgram)


def read(
    source: Any,
    *,
    unsafe: bool = False,
    check: bool = True,
    inputs: Any = None,
    dynamic: Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Loaded:
    """Load a model and bring it to the form that passes rely on.

    * The default domain is at opset ``OPSET``; nodes of other domains stay as they are. Older operators are converted
      (``optkit.opset``), newer ones too where they can be expressed.
    * Model-local functions are written out, but for those of the domain ``optkit``.
    * Nodes are in an order in which they can run. Every node and value has a name of its own, across bodies.
    * Inputs are the caller's alone: weights that old files list as inputs are not.
    * Every axis of an input is a number or has a symbol.
    * Weights are mapped from the file, never copied.

    A PyTorch module is exported, and the graph compared with the module in eager mode at the example inputs and, where
    axes are free, at two other sizes (``optkit.exporting``).

    Args:
        source: An ``.onnx`` file, its bytes, or a graph (which is copied, not changed). Or PyTorch: a module, a pair of it
            and its example inputs, an exported program, a ``.pt2`` or TorchScript file, a Hugging Face folder, or
            ``package.module:factory``.
        unsafe: Also follow external data out of the model's folder.
        check: Where nodes were rewritten for the opset, compare the numbers before and after on random inputs.
        inputs: Example inputs of a module: a tensor, a tuple of arguments, or a dict of named ones.
        dynamic: Axes of a module's inputs that stay free: names such as ``batch``, or ``{input: {axis: name}}``.
        weights: A checkpoint for the module.

    Raises:
        UsageError: There is no such file, or it is not for this function.
        ModelError: The model cannot be read, is not valid, or would compute something else.
        UnsupportedOpError: Lists all operators that nobody knows or that cannot be converted.
    """
    if is_torch(source):
        return _read_torch(source, inputs, dynamic, weights)
    if inputs is not None or dynamic or weights is not None:
        raise UsageError(
            "example inputs, dynamic axes and weights are for PyTorch modules; a graph has its own",
            hint="leave them out, or start from the module",
        )
    path = _path(source) if isinstance(source, str | Path) else None
    name = path.name if path is not None else "model"
    if isinstance(source, ir.Model):
        model = source.clone()
        onnxfile.map_external(model, name=name, unsafe=unsafe)
    elif isinstance(source, bytes):
        model = onnxfile.read(source, name=name, unsafe=unsafe)
    elif path is not None:
        model = onnxfile.read(path, name=name, unsafe=unsafe)
    else:
        raise UsageError(
            f"cannot load a {type(source).__name__}",
            hint="give an .onnx file, its bytes, an onnx_ir.Model, or a PyTorch module with example inputs",
        )
    notes: list[str] = []
    written, convert = _bring_up(model, name, notes)
    if check and convert:
        notes.append(equivalence.check(path or source, model, name=name, unsafe=unsafe))
    return _loaded(model, name, written, notes, path=path)


def _read_torch(
    source: Any, inputs: Any, dynamic: Sequence[str] | Mapping[str, Any] | None, weights: str | Path | None
) -> Loaded:
    missing = [p for p in _EXPORTERS if importlib.util.find_spec(p) is None]
    if missing:
        raise BackendUnavailableError(
            f"{source if isinstance(source, str | Path) else 'a module'}: PyTorch models need {' and '.join(missing)}",
            hint="pip install 'optkit[torch]'",
        )
    from optkit.exporting.export import export
    from optkit.exporting.sources import open_source

    found = open_source(source, inputs, dynamic, weights=weights)
    exported = export(found.module, found.inputs, found.dynamic, name=found.name)
    return proved(replace(exported, notes=(*found.notes, *exported.notes)))


def proved(exported: Exported) -> Loaded:
    """The graph of an export in the form that passes rely on, compared with the module.

    Raises:
        ModelError: It computes something else, at the example or at other sizes of its free axes.
    """
    from optkit.exporting.proof import prove

    notes = list(exported.notes)
    model = exported.model
    written, _ = _bring_up(model, exported.name, notes)
    notes += prove(model, exported)
    examples = (exported.feeds(exported.tensors),)
    return _loaded(
        model,
        exported.name,
        written,
        notes,
        examples=examples,
        axes=exported.axes.bounds,
        packages=_EXPORTERS,
    )


def _loaded(model: ir.Model, name: str, written: int, notes: list[str], **more: Any) -> Loaded:
    sorts = _sort(model, notes)
    for note in notes:
        logger.info("%s: %s", name, note)
    model.meta["optkit.notes"] = tuple(notes)
    return Loaded(model=model, name=name, opset=written, notes=tuple(notes), sorts=sorts, **more)


def _sort(model: ir.Model, notes: list[str]) -> bool:
    """Ask for the order of values where any would do: runtimes choose others, and could not be compared. Whether any were."""
    scopes = (model.graph, *(f.graph for f in model.functions.values()))
    free = [
        n
        for s in scopes
        for n in walk(s)
        if n.op_type == "TopK" and n.domain == "" and not attribute(n, "sorted", 1)
    ]
    for node in free:
        node.attributes["sorted"] = ir.AttrInt64("sorted", 1)
    if free:
        notes.append(f"any order of values would do for {len(free)} TopK; they are sorted")
    return bool(free)


def _bring_up(model: ir.Model, name: str, notes: list[str]) -> tuple[int, bool]:
    """To the form that passes rely on, in place; the opset it was written for, and whether nodes were converted."""
    written = _prepare(model, name, notes)
    nodes = [n for scope in (model.graph, *(f.graph for f in model.functions.values())) for n in walk(scope)]
    versions = {n.version for n in nodes if n.domain == ""}
    if convert := versions - {OPSET}:
        opset.convert(model, name=name)
        notes.append(
            f"converted from opset {', '.join(map(str, sorted(v for v in convert if v)))} to {OPSET}"
        )
    model.opset_imports[""] = OPSET
    _finish(model, name)
    return written, bool(convert)


def _path(source: str | Path) -> Path:
    path = Path(source)
    kind = path.suffix.lower()
    export = "export to ONNX with torch.onnx.export(model, args, 'model.onnx', dynamo=True)"
    if kind in _PICKLES:
        raise UsageError(f"{source}: pickles can run any code when loaded, and are refused", hint=export)
    return path


def _prepare(model: ir.Model, name: str, notes: list[str]) -> int:
    """Everything that comes before the conversion; returns the opset that the model was written for."""
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    written = model.opset_imports.get("", OPSET)
    newest = onnx.defs.onnx_opset_version()
    if not 0 < written <= newest:
        raise ModelError(
            f"{name}: written for opset {written}, onnx {onnx.__version__} knows 1 to {newest}",
            hint="install a newer onnx, or export with an older opset",
        )
    _drop_weight_inputs(model, notes)
    _check_interface(model, name)
    _set_versions(model)
    _write_out_functions(model, name, notes)
    # Messages about nodes need names; those that conversion adds get theirs in the end.
    fix_names(model)
    _check_operators(model, name)
    _lift_large_constants(model)
    for scope in (model.graph, *(f.graph for f in model.functions.values())):
        try:
            scope.sort()
        except ValueError as error:
            raise ModelError(f"{name}: the graph has a cycle: some nodes need their own results") from error
    for body in graphs(model):
        _name_axes(body, main=body is model.graph)
    return written


def _finish(model: ir.Model, name: str) -> None:
    model.ir_version = IR_VERSION
    used = {
        "",
        *(n.domain for n in walk(model)),
        *(n.domain for f in model.functions.values() for n in walk(f.graph)),
    }
    model.opset_imports.setdefault("", OPSET)
    for domain in sorted(used):
        model.opset_imports.setdefault(domain, 1)
    for domain in sorted(set(model.opset_imports) - used):
        del model.opset_imports[domain]
    for node in walk(model):
        node.version = None
    fix_names(model)
    try:
        infer(model)
        if any(True for _ in model.graph.subgraphs()):
            # What a body leaves open may follow from shapes that were only found behind it.
            infer(model)
        verify(model)
    except ModelError as error:
        raise ModelError(f"{name}: {error}", hint=error.hint) from error
    except (ArithmeticError, LookupError, TypeError, ValueError, onnx.checker.ValidationError) as error:
        # Sizes and attributes out of any range: inference computes with them before it looks at them.
        raise ModelError(
            f"{name}: its shapes cannot be inferred: {str(error).partition(chr(10))[0]}"
        ) from error


def _drop_weight_inputs(model: ir.Model, notes: list[str]) -> None:
    """Before IR version 4 every initializer had to be an input as well; later it meant a default."""
    inputs = model.graph.inputs
    both = [v for v in inputs if v.is_initializer()]
    if not both:
        return
    inputs[:] = [v for v in inputs if not v.is_initializer()]
    if model.ir_version < 4:
        notes.append(f"{len(both)} weights were listed as inputs, as old files do")
    else:
        names = ", ".join(repr(v.name) for v in both[:5]) + (" and others" if len(both) > 5 else "")
        notes.append(f"inputs with a default value are now constants: {names}")


def _check_interface(model: ir.Model, name: str) -> None:
    graph = model.graph
    if not graph.outputs:
        raise ModelError(f"{name}: the graph has no outputs")
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                raise ModelError(
                    f"{name}: {kind} {value.name!r} is a {type(value.type).__name__.removesuffix('Type').lower()}, not a tensor",
                    hint="cut that part off: optkit compiles from tensors to tensors",
                )
            if value.dtype == ir.DataType.STRING:
                raise ModelError(
                    f"{name}: {kind} {value.name!r} holds strings",
                    hint="keep text processing outside the model",
                )
            if kind == "input":
                try:
                    TensorSpec.of(value)
                except DataError as error:
                    raise ModelError(f"{name}: input {error}") from error


def _set_versions(model: ir.Model) -> None:
    """Note on each node the opset that it was written for: functions may differ from the graph that calls them."""
    for node in walk(model):
        node.version = model.opset_imports.get(node.domain)
    for function in model.functions.values():
        for node in walk(function.graph):
            node.version = function.opset_imports.get(node.domain, model.opset_imports.get(node.domain))


def _calls(model: ir.Model, scope: ir.Graph) -> Iterator[ir.Function]:
    for node in walk(scope):
        if (found := model.functions.get(node.op_identifier())) is not None:
            yield found


def _check_calls(model: ir.Model, name: str) -> None:
    """No function calls itself, and writing all of them out stays within bounds."""
    order: list[ir.Function] = []
    done: set[ir.OperatorIdentifier] = set()

    def visit(function: ir.Function, stack: tuple[ir.OperatorIdentifier, ...]) -> None:
        key = function.identifier()
        if key in stack:
            raise ModelError(f"{name}: function {key[0]}.{key[1]} calls itself")
        if len(stack) > _DEEPEST_CALL:
            raise ModelError(f"{name}: functions call each other more than {_DEEPEST_CALL} deep")
        if key not in done:
            for callee in _calls(model, function.graph):
                visit(callee, (*stack, key))
            done.add(key)
            order.append(function)

    for function in model.functions.values():
        visit(function, ())
    # How often each is written out, callers first.
    times = Counter(f.identifier() for f in _calls(model, model.graph))
    steps = 0
    for function in reversed(order):
        n = times[function.identifier()]
        # The inliner looks for a free name among all copies of a node.
        steps += n * n * sum(1 for _ in walk(function.graph))
        if steps > _MOST_STEPS:
            raise ModelError(
                f"{name}: function {function.domain}.{function.name} would be written out {n} times"
            )
        for callee in _calls(model, function.graph):
            times[callee.identifier()] += n


def _write_out_functions(model: ir.Model, name: str, notes: list[str]) -> None:
    if not model.functions:
        return
    _check_calls(model, name)
    inline = [f for f in model.functions.values() if f.domain != _KERNELS]
    for function in inline:
        for domain, version in function.opset_imports.items():
            if domain and model.opset_imports.get(domain, version) != version:
                raise ModelError(
                    f"{name}: function {function.domain}.{function.name} needs version {version} of domain {domain!r}, "
                    f"the model {model.opset_imports[domain]}"
                )
        # The nodes know their own versions.
        function.opset_imports[""] = model.opset_imports.setdefault("", OPSET)
    try:
        InlinePass(lambda f: f.domain != _KERNELS)(model)
    except (ValueError, RuntimeError, PassError, PreconditionError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{name}: its functions cannot be written out: {cause}") from error
    for function in inline:
        model.functions.pop(function.identifier(), None)
    if inline:
        notes.append(f"{len(inline)} model-local functions were written out")


@functools.cache
def _runtime_operators() -> frozenset[tuple[str, str]]:
    """What ONNX Runtime adds to ONNX; its own list, where this build has one."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    listed: Callable[[], Any] | None = getattr(state, "get_all_operator_schema", None)
    return frozenset((s.domain, s.name) for s in listed()) if listed is not None else frozenset()


def _check_operators(model: ir.Model, name: str) -> None:
    """Every operator is known, and every node has what its schema asks for: passes index inputs without looking."""
    problems: list[tuple[str, str]] = []
    scopes = (model.graph, *(f.graph for f in model.functions.values()))
    for node in (n for scope in scopes for n in walk(scope)):
        if model.functions.get(node.op_identifier()) is not None:
            continue
        reason = _problem(node)
        if reason is not None:
            problems.append((describe(node), reason))
    if problems:
        raise UnsupportedOpError(name, problems, hint="export the model again with standard ONNX operators")


def _problem(node: ir.Node) -> str | None:
    domain = f"{node.domain}.{node.op_type}"
    if node.domain == "" or node.domain.startswith("ai.onnx"):
        version = node.version
        if version is None:
            return f"the model does not say which version of domain {node.domain!r} it uses"
        try:
            return _misfit(node, onnx.defs.get_schema(node.op_type, version, node.domain))
        except onnx.defs.SchemaError:
            if node.domain == "":
                return f"no operator {node.op_type} in opset {version}"
            return f"no operator {domain} in version {version}"
    known = _runtime_operators()
    if node.domain.startswith("com.m"):
        return (
            None
            if not known or (node.domain, node.op_type) in known
            else f"no operator {domain} in ONNX Runtime"
        )
    return f"unknown operator {domain}, and the model has no function of that name"


def _misfit(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if not schema.min_input <= given <= schema.max_input:
        most = "or more" if schema.max_input > 1000 else f"to {schema.max_input}"
        return f"{given} inputs instead of {schema.min_input} {most}"
    required = onnx.defs.OpSchema.FormalParameterOption.Single
    for index, formal in enumerate(schema.inputs):
        if formal.option == required and node.inputs[index] is None:
            return f"its input {index} ({formal.name}) is missing"
    outputs = len([o for o in node.outputs if o.name])
    if not schema.min_output <= len(node.outputs) or outputs > schema.max_output:
        return f"{len(node.outputs)} outputs instead of {schema.min_output} to {schema.max_output}"
    for key, found in node.attributes.items():
        formal_attribute = schema.attributes.get(key)
        if formal_attribute is None:
            return f"unknown attribute {key!r}"
        # An enumeration of onnx's C++ side, with the numbers of AttributeProto.
        expected = ir.AttributeType(int(formal_attribute.type.value))  # type: ignore[attr-defined]
        if expected != found.type:
            return f"its attribute {key!r} is of type {found.type.name}, not {expected.name}"
    for key, formal_attribute in schema.attributes.items():
        if formal_attribute.required and key not in node.attributes:
            return f"its attribute {key!r} is missing"
    return None


def _lift_large_constants(model: ir.Model) -> None:
    """Weights in Constant nodes become initializers: these are never copied, nodes are whenever a graph is written."""
    for graph in graphs(model):
        for node in tuple(graph):
            tensor = (
                node.attributes["value"].value
                if node.op_type == "Constant" and "value" in node.attributes
                else None
            )
            if (
                node.domain
                or tensor is None
                or tensor.nbytes <= _LARGE
                or node.outputs[0].name in graph.initializers
            ):
                continue
            old = node.outputs[0]
            value = ir.Value(
                name=old.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            value.metadata_props.update(old.metadata_props)
            for user, index in tuple(old.uses()):
                user.replace_input_with(index, value)
            graph.outputs[:] = [value if output is old else output for output in graph.outputs]
            graph.remove(node)
            graph.register_initializer(value)


def _name_axes(graph: ir.Graph, *, main: bool) -> None:
    """Give every unnamed axis of a model's input a symbol of its own; elsewhere such an axis is simply not known."""
    inputs = set(graph.inputs)
    taken = {d.value for v in inputs if v.shape is not None for d in v.shape if isinstance(d, ir.SymbolicDim)}

    def clean(value: ir.Value, *, named: bool) -> None:
        if value.shape is None:
            return
        dims: list[int | str | None] = [d if isinstance(d, int) else d.value for d in value.shape]
        for axis, d in enumerate(dims):
            unknown = (
                d < 0 if isinstance(d, int) else d is None or not re.search(r"\w", d) or d in ("-1", "None")
            )
            if not unknown:
                continue
            dims[axis] = None
            if named:
                symbol = f"{re.sub(r'[^0-9A-Za-z_]+', '_', value.name or 'input')}_{axis}"
                while symbol in taken:
                    symbol += "_"
                taken.add(symbol)
                dims[axis] = symbol
        value.shape = ir.Shape(dims)

    for value in graph.inputs:
        clean(value, named=main)
    for value in (*graph.outputs, *(o for node in graph for o in node.outputs)):
        if value not in inputs and value.shape is not None:
            clean(value, named=False)


def fix_names(model: ir.Model) -> None:
    """Give every node a name and every name to one node, and the same for values, bodies included.

    Names that are there and free stay. A node without one is named after its first output; the second of a name gets a
    number. Names of the main graph's values never change: they are what the caller knows.
    """
    main = model.graph
    fixed = (
        *main.inputs,
        *main.outputs,
        *main.initializers.values(),
        *(o for node in main for o in node.outputs),
    )
    values = _Names(v.name for v in fixed if v.name)
    seen: set[ir.Value] = {*main.inputs, *main.initializers.values()}
    seen |= {o for node in main for o in node.outputs if o.name}
    for node in main:
        for index, output in enumerate(node.outputs):
            if not output.name and output.uses():
                output.name = values.free(f"{node.name or node.op_type}_{index}")
    for body in (g for g in graphs(model) if g is not main):
        own = (*body.inputs, *body.initializers.values(), *(o for node in body for o in node.outputs))
        for value in dict.fromkeys(own):
            if value in seen or (not value.name and not value.uses() and value.producer() is not None):
                continue
            seen.add(value)
            value.name = values.free(value.name or "value")
    names = _Names()
    for node in walk(model):
        node.name = names.free(node.name or next((o.name for o in node.outputs if o.name), node.op_type))


class _Names:
    """Names given out so far; asking for the same a million times takes a million steps, not their square."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken, self._next = set(taken), dict[str, int]()

    def free(self, name: str) -> str:
        unique, n = name, self._next.get(name, 1)
        while unique in self._taken:
            unique, n = f"{name}_{n}", n + 1
        self._next[name] = n
        self._taken.add(unique)
        return unique
