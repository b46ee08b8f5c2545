"""Pattern rules over the graph: the one door through which passes match and replace several nodes at once.

A pattern is an ordinary function that writes the expression to look for:

    def _pattern(op, x, slope):
        return op.Add(x, op.Mul(x, slope))

Every parameter but the first is a variable that binds one value; using a variable twice asks for the same value twice.
A number in the place of an input asks for a constant scalar of that value. Keyword arguments ask for attributes.
``None`` asks for an input that is absent. The operands of commutative operators match in either order.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, describe, graphs, initializer, scalar, users

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
    def __init__(self, op_type: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> None:
        self.op_type, self.inputs, self.attributes = op_type, tuple(inputs), dict(attributes)


class _PatternBuilder:
    def __getattr__(self, op_type: str) -> Callable[..., _Expr]:
        return lambda *inputs, **attributes: _Expr(op_type, inputs, attributes)


class Builder:
    """Makes the nodes of a replacement: ``op.Gelu(x, approximate="tanh")``.

    Nodes are named after the root that they replace and put before it. A NumPy array as an input becomes an initializer.
    """

    def __init__(self, root: ir.Node) -> None:
        assert root.graph is not None
        self._root, self._nodes = root, 0
        # Initializers live in the main graph of the model; a body reads them from the outer scope.
        self.graph: ir.Graph = root.graph

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.node(op_type, inputs, attributes)[0]

    def constant(self, array: np.ndarray, name: str = "c") -> ir.Value:
        """An initializer in the graph of the root, named after it."""
        return initializer(self.graph, f"{self._root.name}/{name}", array)

    def node(
        self, op_type: str, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None, *, domain: str = "", outputs: int = 1
    ) -> Sequence[ir.Value]:
        """One node with ``outputs`` results."""
        values = [self.constant(v) if isinstance(v, np.ndarray) else v for v in inputs]
        name = f"{self._root.name}/{op_type}"
        if self._nodes:
            name += f"_{self._nodes}"
        self._nodes += 1
        node = ir.node(op_type, values, attributes=dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        node.metadata_props.update(self._root.metadata_props)
        for index, output in enumerate(node.outputs):
            output.name = name if index == 0 else f"{name}:{index}"
        self._root.prepend(node)
        return node.outputs


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
        self.expression: _Expr = pattern(_PatternBuilder(), *(_Var(n) for n in names))
        self.rewrite, self.check, self.name = rewrite, check, name

    @property
    def root(self) -> str:
        """Operator type of the pattern's last node."""
        return self.expression.op_type


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
    elif pattern is None:
        if value is None:
            yield state
        else:
            trail.miss(depth, f"{value.name} should be absent")
    elif isinstance(pattern, int | float):
        found = scalar(value)
        if found is not None and math.isclose(found, pattern, rel_tol=1e-4, abs_tol=1e-7):
            yield state
        else:
            shown = "not a constant scalar" if found is None else f"{found:.6g}"
            trail.miss(depth, f"expected the constant {pattern:.6g}, found {shown}")
    else:
        node = value.producer() if value is not None else None
        if node is None or value is None:
            trail.miss(depth, f"expected {pattern.op_type}, found {'an absent input' if value is None else f'the value {value.name}'}")
        elif node.outputs[0] is not value:
            trail.miss(depth, f"{value.name} is not the first output of {describe(node)}")
        else:
            yield from _match_node(pattern, node, state, trail)


def _same_scalar(a: ir.Value | None, b: ir.Value | None) -> bool:
    x, y = scalar(a), scalar(b)
    return x is not None and x == y


def _match_node(pattern: _Expr, node: ir.Node, state: _State, trail: _Trail) -> Iterator[_State]:
    depth = len(state.nodes)
    if node.op_type != pattern.op_type or node.domain != "":
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


def _match_inputs(patterns: Sequence[Any], values: Sequence[ir.Value | None], state: _State, trail: _Trail) -> Iterator[_State]:
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
    for state in _match_node(rule.expression, root, _State(), trail):
        if not _private(state, root, trail):
            continue
        bound: dict[str, Any] = {"root": root, **state.bound}
        verdict = rule.check(**bound) if rule.check is not None else Match()
        if verdict:
            return bound, state
        trail.miss(len(state.nodes) + 1, verdict.reason or "the check failed")
    return None


def apply(rules: Sequence[Rule], model: ir.Model) -> list[Change]:
    """Apply ``rules`` everywhere, bodies of control flow included, until none applies; the earlier rule wins.

    Returns:
        One ``Change`` a replacement, in the order in which they were made; empty when nothing matched.
    """
    changes: list[Change] = []
    for graph in tuple(graphs(model)):
        again = True
        while again:
            again = False
            for node in tuple(graph):
                if node.graph is not graph:  # removed by an earlier replacement
                    continue
                for rule in rules:
                    if rule.root == node.op_type and (found := _find(rule, node, _Trail())):
                        bound, state = found
                        _replace(rule, node, bound, state)
                        changes.append(Change(rule=rule.name, node=str(node.name)))
                        logger.debug("%s at %s", rule.name, node.name)
                        again = True
                        break
    return changes


def _replace(rule: Rule, root: ir.Node, bound: dict[str, Any], state: _State) -> None:
    graph = root.graph
    assert graph is not None
    new = rule.rewrite(Builder(root), **bound)
    substitute(root.outputs[0], new)
    # Later nodes of the match come first, so that each is unused when its turn comes.
    for node in dict.fromkeys(state.nodes):
        if node.graph is graph and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, graph outputs included, read ``new``; the name of an output of the graph stays.

    ``new`` takes over type and shape of ``old`` where it has none.
    """
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        _keep_output_name(old, new)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _keep_output_name(old: ir.Value, new: ir.Value) -> None:
    name, graph = old.name, old.graph
    assert graph is not None and name is not None
    if new.is_graph_input() or new.is_initializer() or new.is_graph_output() or new.graph is not graph:
        raise ValueError(f"{new.name} cannot become the output {name}: guard with `replaceable`")
    old.name, new.name = f"{name}/replaced", name


def replaceable(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``substitute(old, new)`` can keep the names of inputs, initializers and outputs of the graph."""
    if not old.is_graph_output():
        return True
    return not (new.is_graph_input() or new.is_initializer() or new.is_graph_output()) and new.graph is old.graph


def explain(rules: Sequence[Rule], model: ir.Model) -> list[NearMiss]:
    """Where a rule matched at least two nodes of its pattern but did not apply, deepest first."""
    misses: list[NearMiss] = []
    for graph in graphs(model):
        for node in graph:
            for rule in rules:
                if rule.root != node.op_type:
                    continue
                trail = _Trail()
                if _find(rule, node, trail) is None and trail.depth >= 2:
                    misses.append(NearMiss(rule=rule.name, node=describe(node), reason=trail.reason, depth=trail.depth))
    return sorted(misses, key=lambda m: -m.depth)
