"""Places in a torch module, and the values of its exported graph that belong to them.

A module is traced with ``torch.fx``: its own layers stay the modules that they are, so that training and evaluation,
devices and dynamic shapes work as before. Every result in the trace is a site, named as ``torch.fx`` names it.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from optkit.errors import PassError
from optkit.graph import users

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

# Where modules that passes add are kept in the user's module.
HOME = "optkit"
_TRACE = "_optkit_trace"
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class _Dropout(nn.Module):
    """A dropout that was called as a function; whether it drops is asked of the module, not of the moment of tracing."""

    def __init__(self, function: Any, p: float) -> None:
        super().__init__()
        self.function, self.p = function, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.function(x, self.p, training=self.training)
        return dropped


def home(module: nn.Module) -> nn.ModuleDict:
    """Where passes keep modules that they add, so that devices, checkpoints and optimizers reach them."""
    if not hasattr(module, HOME):
        module.add_module(HOME, nn.ModuleDict())
    found: nn.ModuleDict = getattr(module, HOME)
    return found


def add(module: nn.Module, name: str, child: nn.Module) -> str:
    """Keep ``child`` in ``module`` under the next free name; gives its path."""
    kept = home(module)
    unique, n = name, 1
    while unique in kept:
        unique, n = f"{name}_{n}", n + 1
    kept[unique] = child.train(module.training)
    return f"{HOME}.{unique}"


def trace(module: nn.Module) -> fx.Graph:
    """The module's calls as a graph, the same in training and evaluation.

    Raises:
        PassError: It cannot be traced, with the line; or it does other things in training than in evaluation.
    """
    found = []
    was = module.training
    for mode in (True, False):
        _set_mode(module, mode)
        try:
            found.append(fx.Tracer().trace(module))
        except Exception as error:
            raise PassError(
                f"{type(module).__name__} cannot be traced: {type(error).__name__}: {error}{_line(error)}",
                hint="decide by the module's settings instead of by values or sizes of tensors",
            ) from error
        finally:
            _set_mode(module, was)
    graphs = [_shared_dropout(g, module) for g in found]
    if _listing(graphs[0]) != _listing(graphs[1]):
        a, b = (_listing(g) for g in graphs)
        odd = next((x for x, y in zip(a, b, strict=False) if x != y), a[-1])
        raise PassError(
            f"{type(module).__name__} does other things in training than in evaluation, at {odd}",
            hint="put that part into a module of its own that asks self.training",
        )
    return graphs[0]


def _set_mode(module: nn.Module, mode: bool) -> None:
    # Not train(): a frozen norm stays as its owner left it.
    module.training = mode


def _line(error: BaseException) -> str:
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("sites.py")]
    return f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""


def _shared_dropout(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _DROPOUTS:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            given.apply_defaults()
            p = float(given.arguments["p"])
            name = f"dropout_{node.name}"
            if name not in home(module):
                home(module)[name] = _Dropout(node.target, p)
            node.op, node.target = "call_module", f"{HOME}.{name}"
            node.args, node.kwargs = (given.arguments["input"],), {}
    return graph


def _listing(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


def install(module: nn.Module, graph: fx.Graph) -> None:
    """Let ``module`` run ``graph``: it becomes one of a subclass of its class, with the same signature."""
    cls = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        return self.__dict__[_TRACE].forward(*given.args[1:], **given.kwargs)

    graph.lint()
    signature = inspect.signature(cls.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    # Kept beside the registered modules: its parts are those of the module itself.
    module.__dict__[_TRACE] = fx.GraphModule(module, graph)
    if _TRACE not in cls.__dict__:
        names = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, _TRACE: None}
        module.__class__ = type(cls.__name__, (cls,), names)


def _mark(x: Any, key: str) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return torch.onnx.ops.symbolic(
            "optkit::Site", (x,), {"key": key}, dtype=x.dtype, shape=x.shape, version=1
        )
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """An exported graph, and which of its values belong to which sites.

    Attributes:
        model: Without marks.
        keys: Names of values to the sites that they are, in the order of the trace.
    """

    model: ir.Model
    keys: Mapping[str, tuple[str, ...]]

    def of(self, value: ir.Value) -> tuple[str, ...]:
        """The sites that ``value`` is."""
        return self.keys.get(str(value.name), ())

    def behind(self, node: ir.Node) -> tuple[str, ...]:
        """The sites that the result of ``node`` is: its output, or what a single reader makes of it."""
        value = node.outputs[0]
        for _ in range(3):
            if found := self.of(value):
                return found
            readers = users(value)
            if len(readers) != 1:
                return ()
            value = readers[0].outputs[0]
        return ()


def export_marked(module: nn.Module, graph: fx.Graph, export: Callable[[Any], ir.Model]) -> Sites:
    """Export the trace with a mark behind every result, and take the marks out again."""
    marked = copy.deepcopy(graph)
    for node in tuple(marked.nodes):
        if node.op in ("output", "get_attr"):
            continue
        with marked.inserting_after(node):
            # Marks behind the inputs stand before nothing else: fx wants placeholders first.
            mark = marked.call_function(_mark, (node, node.name))
        node.replace_all_uses_with(mark, lambda user, mark=mark: user is not mark)
    last = [n for n in marked.nodes if n.op == "placeholder"][-1:]
    for node in tuple(marked.nodes):
        if node.op == "call_function" and node.target is _mark and node.args[0].op == "placeholder":
            last[0].append(node)
    model = export(fx.GraphModule(module, marked))
    keys: dict[str, list[str]] = {}
    for node in tuple(model.graph):
        if node.op_type != "Site" or node.domain != "optkit":
            continue
        source, marker = node.inputs[0], node.outputs[0]
        assert source is not None
        keys.setdefault(str(source.name), []).append(node.attributes["key"].as_string())
        for user, index in tuple(marker.uses()):
            user.replace_input_with(index, source)
        for index, output in enumerate(model.graph.outputs):
            if output is marker:
                model.graph.outputs[index] = source
        model.graph.remove(node)
    model.opset_imports.pop("optkit", None)
    return Sites(model=model, keys={name: tuple(found) for name, found in keys.items()})


def reads_first(node: fx.Node) -> fx.Node | None:
    """The result that ``node`` reads first."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def chosen(node: fx.Node) -> bool:
    """Whether ``node`` takes one of several results of the node before it."""
    return node.op == "call_function" and node.target is operator.getitem
