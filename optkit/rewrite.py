"""Pattern rules over the graph: the one door through which passes match and replace several nodes at once.

A pattern is an ordinary function that writes the expression to look for:

    def _pattern(op, x, slope):
        return op.Add(x, op.Mul(x, slope))

Every parameter but the first is a variable that binds one value; using a variable twice asks for the same value twice.
A number in the place of an input asks for a constant scalar of that value. Keyword arguments ask for attributes.
``None`` asks for an input that is absent. The operands of commutative operators match in either order.
``op.any(a, b)`` matches what one of several expressions matches, the first that does.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, describe, graphs, scalar, subgraphs, users, walk
from optkit.inference import infer_node

logger = logging.getLogger(__name__)

COMMUTATIVE = frozenset({"Add", "Mul", "Min", "Max", "And", "Or", "Xor", "Equal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One edit of the graph.

    Attributes:
        rule: Which rule or step made it.
        node: The node at whose place it happened.
        detail: What happened, for the log; may be empty.
    """

    rule: str
    node: str
    detail: str = ""


class Match:
    """The verdict of a rule's check: true, unless ``fail`` was called."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None

    def fail(self, reason: str, at: ir.Value | ir.Node | None = None) -> Match:
        """Say why the rule does not apply, and return the verdict."""
        place = f" at {at.name}" if at is not None and at.name else ""
        self.reason = reason + place
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMiss:
    """A place where a rule's root operator stands but the rule did not apply.

    Attributes:
        depth: How many nodes of the pattern did match, the root included.
    """

    rule: str
    node: str
    reason: str
    depth: int


class _Var:
    def __init__(self, name: str) -> None:
        self.name = name


class _Expr:
    def __init__(
        self, op_type: str, inputs: Sequence[Any], attributes: Mapping[str, Any], domain: str = ""
    ) -> None:
        self.op_type, self.inputs, self.attributes = op_type, tuple(inputs), dict(attributes)
        self.domain = domain


class _Either:
    def __init__(self, *patterns: Any) -> None:
        self.patterns = patterns


class _PatternBuilder:
    any = _Either

    def of(self, domain: str, op_type: str) -> Callable[..., _Expr]:
        """An operator of another domain than ONNX's."""
        return lambda *inputs, **attributes: _Expr(op_type, inputs, attributes, domain)

    def __getattr__(self, op_type: str) -> Callable[..., _Expr]:
        return lambda *inputs, **attributes: _Expr(op_type, inputs, attributes)


class Names:
    """The names in a model, so that new ones are free everywhere, bodies included."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for part in graphs(model):
            self._taken.update(str(v.name) for v in (*part.inputs, *part.initializers.values()))
            for node in part:
                self._taken.add(str(node.name))
                self._taken.update(str(v.name) for v in node.outputs)

    def new(self, name: str) -> str:
        """``name``, or with the first free number behind it; taken from now on."""
        unique, n = name, 1
        while unique in self._taken:
            unique, n = f"{name}_{n}", n + 1
        self._taken.add(unique)
        return unique


def label(node: ir.Node) -> str:
    """What new things at the place of ``node`` are named after: the node, or its first output."""
    return node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type


class Builder:
    """Makes the nodes of a replacement: ``op.Gelu(x, approximate="tanh")``.

    Nodes are named after the root that they replace and put before it; their outputs get the types and shapes that
    follow from their inputs. A NumPy array as an input becomes an initializer of the root's graph.

    Args:
        root: The node that will be replaced.
        names: The names in the model.
    """

    def __init__(self, root: ir.Node, names: Names) -> None:
        assert root.graph is not None
        graph = root.graph if isinstance(root.graph, ir.Graph) else root.graph.graph
        self.graph: ir.Graph = graph
        self._root, self._label, self._names = root, label(root), names

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.node(op_type, inputs, attributes)[0]

    def constant(self, array: np.ndarray | ir.TensorProtocol, name: str = "c") -> ir.Value:
        """An initializer in the graph of the root, named after it."""
        return register(self.graph, self._names.new(f"{self._label}/{name}"), array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        name: str | None = None,
    ) -> Sequence[ir.Value]:
        """One node with ``outputs`` results, named ``<root>/<name or operator>``."""
        values = [self.constant(v) if isinstance(v, np.ndarray) else v for v in inputs]
        unique = self._names.new(f"{self._label}/{name or op_type}")
        node = ir.node(
            op_type,
            values,
            attributes=dict(attributes or {}),
            domain=domain,
            num_outputs=outputs,
            name=unique,
        )
        node.metadata_props.update(self._root.metadata_props)
        for index, output in enumerate(node.outputs):
            output.name = unique if index == 0 else self._names.new(f"{unique}:{index}")
        infer_node(node)
        self._root.prepend(node)
        return node.outputs


def register(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Add an initializer whose name is known to be free."""
    if isinstance(array, np.ndarray):
        base = array.base
        # A view would keep the whole array that it looks at alive.
        part = isinstance(base, np.ndarray) and base.size > array.size
        array = ir.tensor(array.copy() if part else np.asarray(array, order="C"), name=name)
    array.name = name
    shape = ir.Shape(array.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(array.dtype), const_value=array)
    graph.register_initializer(value)
    return value


class Rule:
    """Replace what ``pattern`` matches by what ``rewrite`` builds, where ``check`` agrees.

    Args:
        pattern: ``pattern(op, *variables)`` returns the expression; its root is the last node in data order.
        rewrite: ``rewrite(op, **bound)`` returns the value that takes the root's place. ``op`` is a ``Builder``.
        check: ``check(**bound)`` returns a ``Match``; None means always.
        name: For logs, ``Change`` and ``NearMiss``.

    In ``bound`` are the variables by name, and ``root``: the matched root node (unless a variable has that name).
    """

    def __init__(
        self,
        pattern: Callable[..., Any],
        rewrite: Callable[..., ir.Value],
        check: Callable[..., Match] | None = None,
        *,
        name: str,
    ) -> None:
        names = list(inspect.signature(pattern).parameters)[1:]
        self.expression: _Expr | _Either = pattern(_PatternBuilder(), *(_Var(n) for n in names))
        self.rewrite, self.check, self.name = rewrite, check, name

        self.roots = frozenset(expression.op_type for expression in self.alternatives)

    @property
    def alternatives(self) -> tuple[_Expr, ...]:
        """The expressions that the root may be."""
        return tuple(_alternatives(self.expression))


def _alternatives(pattern: _Expr | _Either) -> Iterator[_Expr]:
    if isinstance(pattern, _Expr):
        yield pattern
    else:
        for part in pattern.patterns:
            yield from _alternatives(part)


@dataclass(slots=True)
class _State:
    bound: dict[str, ir.Value | None] = field(default_factory=dict)
    nodes: tuple[ir.Node, ...] = ()


class _Trail:
    """Remembers the failure that came furthest."""

    def __init__(self) -> None:
        self.depth, self.reason = -1, ""

    def miss(self, depth: int, reason: str) -> None:
        if depth > self.depth:
            self.depth, self.reason = depth, reason


def _match_value(pattern: Any, value: ir.Value | None, state: _State, trail: _Trail) -> Iterator[_State]:
    depth = len(state.nodes)
    if isinstance(pattern, _Var):
        if pattern.name not in state.bound:
            yield _State({**state.bound, pattern.name: value}, state.nodes)
        elif state.bound[pattern.name] is value or _same_scalar(state.bound[pattern.name], value):
            yield state
        else:
            trail.miss(depth, f"{pattern.name} would be two different values")
    elif isinstance(pattern, _Either):
        for part in pattern.patterns:
            yield from _match_value(part, value, state, trail)
    elif pattern is None:
        if value is None:
            yield state
        else:
            trail.miss(depth, f"{value.name} should be absent")
    elif isinstance(pattern, int | float):
        found = scalar(value)
        if found is not None and math.isclose(found, pattern, rel_tol=_tolerance(value), abs_tol=1e-7):
            yield state
        else:
            shown = "not a constant scalar" if found is None else f"{found:.6g}"
            trail.miss(depth, f"expected the constant {pattern:.6g}, found {shown}")
    else:
        node = value.producer() if value is not None else None
        if node is None or value is None:
            trail.miss(
                depth,
                f"expected {pattern.op_type}, found {'an absent input' if value is None else f'the value {value.name}'}",
            )
        elif node.outputs[0] is not value:
            trail.miss(depth, f"{value.name} is not the first output of {describe(node)}")
        else:
            yield from _match_node(pattern, node, state, trail)


def _tolerance(value: ir.Value | None) -> float:
    # Half precision rounds by up to 2**-11; others were typed with five digits or more.
    half = value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return 5e-4 if half else 2e-5


def _same_scalar(a: ir.Value | None, b: ir.Value | None) -> bool:
    x, y = scalar(a), scalar(b)
    return x is not None and x == y


def _match_node(pattern: _Expr, node: ir.Node, state: _State, trail: _Trail) -> Iterator[_State]:
    depth = len(state.nodes)
    if node.op_type != pattern.op_type or node.domain != pattern.domain:
        trail.miss(depth, f"expected {pattern.op_type}, found {describe(node)}")
        return
    for name, wanted in pattern.attributes.items():
        found = attribute(node, name)
        found = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else found
        if found != (list(wanted) if isinstance(wanted, tuple) else wanted):
            trail.miss(depth, f"{describe(node)}: {name} is {found}, not {wanted}")
            return
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None and len(inputs) > len(pattern.inputs):
        inputs.pop()
    inputs += [None] * (len(pattern.inputs) - len(inputs))
    if len(inputs) != len(pattern.inputs):
        trail.miss(depth, f"{describe(node)} has {len(inputs)} inputs, not {len(pattern.inputs)}")
        return
    orders = [inputs]
    if node.op_type in COMMUTATIVE and len(inputs) == 2:
        orders.append(inputs[::-1])
    for order in orders:
        yield from _match_inputs(pattern.inputs, order, _State(state.bound, (*state.nodes, node)), trail)


def _match_inputs(
    patterns: Sequence[Any], values: Sequence[ir.Value | None], state: _State, trail: _Trail
) -> Iterator[_State]:
    if not patterns:
        yield state
        return
    for after in _match_value(patterns[0], values[0], state, trail):
        yield from _match_inputs(patterns[1:], values[1:], after, trail)


def _private(state: _State, root: ir.Node, trail: _Trail) -> bool:
    """Whether nothing outside the match reads what the match computes on the way."""
    inside = set(state.nodes)
    for node in state.nodes:
        if node is root:
            continue
        for output in node.outputs:
            outside = [user for user in users(output) if user not in inside]
            if outside or output.is_graph_output():
                who = describe(outside[0]) if outside else "an output of the graph"
                trail.miss(len(state.nodes), f"{output.name} is also read by {who}")
                return False
    return True


def _find(rule: Rule, root: ir.Node, trail: _Trail) -> tuple[dict[str, Any], _State] | None:
    for state in (s for e in rule.alternatives for s in _match_node(e, root, _State(), trail)):
        if not _private(state, root, trail):
            continue
        bound: dict[str, Any] = {"root": root, **state.bound}
        verdict = rule.check(**bound) if rule.check is not None else Match()
        if verdict:
            return bound, state
        # Of a single node that is everywhere, that it is not the one looked for tells nothing.
        depth = len(state.nodes) + 1 if len(state.nodes) > 1 else 1
        trail.miss(depth, verdict.reason or "the check failed")
    return None


_misses: ContextVar[list[NearMiss] | None] = ContextVar("near misses", default=None)


@contextlib.contextmanager
def near_misses() -> Iterator[list[NearMiss]]:
    """Collect what ``explain`` finds for the rules of all passes that run inside, each on the graph as it left it."""
    misses: list[NearMiss] = []
    token = _misses.set(misses)
    try:
        yield misses
    finally:
        _misses.reset(token)


def miss(found: NearMiss) -> None:
    """Note a near miss that no pattern tells of, for whoever collects them."""
    if (misses := _misses.get()) is not None:
        misses.append(found)


def apply(rules: Sequence[Rule], model: ir.Model) -> list[Change]:
    """Apply ``rules`` everywhere, bodies of control flow included, until none applies; the earlier rule wins.

    Returns:
        One ``Change`` a replacement, in the order in which they were made; empty when nothing matched.
    """
    changes: list[Change] = []
    names = Names(model)
    for graph in tuple(graphs(model)):
        again = True
        while again:
            again = False
            for node in tuple(graph):
                if node.graph is not graph:  # removed by an earlier replacement
                    continue
                for rule in rules:
                    if node.op_type in rule.roots and (found := _find(rule, node, _Trail())):
                        bound, state = found
                        place = label(node)
                        _replace(rule, node, bound, state, names)
                        changes.append(Change(rule=rule.name, node=place))
                        logger.debug("%s at %s", rule.name, place)
                        again = True
                        break
    if (misses := _misses.get()) is not None:
        misses.extend(explain(rules, model))
    return changes


def _replace(rule: Rule, root: ir.Node, bound: dict[str, Any], state: _State, names: Names) -> None:
    new = rule.rewrite(Builder(root, names), **bound)
    substitute(root.outputs[0], new)
    remove_unused(state.nodes)


def remove(node: ir.Node) -> None:
    """Take a node that nothing reads out of its graph, with all that its bodies read.

    Nodes of a body would go on counting as readers of values outside.
    """
    assert node.graph is not None
    for body in subgraphs(node):
        for inner in walk(body):
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    node.graph.remove(node, safe=True)


def remove_unused(nodes: Iterable[ir.Node]) -> None:
    """Remove those of ``nodes`` that nothing reads any more, also those that only removed ones read."""
    left = list(dict.fromkeys(nodes))
    while unused := [
        n for n in left if n.graph is not None and not any(o.uses() or o.is_graph_output() for o in n.outputs)
    ]:
        for node in unused:
            remove(node)


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, graph outputs included, read ``new``; the name of an output of the graph stays.

    ``new`` takes over what was known about type and shape of ``old`` and not of itself; an output of the graph keeps
    the type and shape that it was declared with.
    """
    if old.is_graph_output():
        _become_output(old, new)
    if new.type is None:
        new.type = old.type
    if new.shape is None or (old.is_graph_output() and old.shape is not None):
        new.shape = old.shape
    elif old.shape is not None and len(old.shape) == len(new.shape):
        new.shape = ir.Shape(_sharper(a, b) for a, b in zip(new.shape, old.shape, strict=True))
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _sharper(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    return b if isinstance(b, int) or (not isinstance(a, int) and a.value is None) else a


def _become_output(old: ir.Value, new: ir.Value) -> None:
    if not replaceable(old, new):
        raise ValueError(f"{new.name} cannot become the output {old.name}: guard with `replaceable`")
    name = old.name
    assert name is not None
    old.name, new.name = f"{name}/replaced", name


def replaceable(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``substitute(old, new)`` can keep the names of inputs, initializers and outputs of the graph."""
    if not old.is_graph_output():
        return True
    return (
        not (new.is_graph_input() or new.is_initializer() or new.is_graph_output()) and new.graph is old.graph
    )


def explain(rules: Sequence[Rule], model: ir.Model, least: int = 2) -> list[NearMiss]:
    """Where a rule matched at least so many nodes of its pattern but did not apply, deepest first."""
    misses: list[NearMiss] = []
    for graph in graphs(model):
        for node in graph:
            for rule in rules:
                if node.op_type not in rule.roots:
                    continue
                trail = _Trail()
                if _find(rule, node, trail) is None and trail.depth >= least:
                    misses.append(
                        NearMiss(rule=rule.name, node=describe(node), reason=trail.reason, depth=trail.depth)
                    )
    return sorted(misses, key=lambda m: -m.depth)
