"""Python loops over what tensors hold, such as the suppression of boxes in textbooks, as loops of the graph.

``torch.export`` runs a loop in Python and must know how often. The loop in which it stops is cut out of its function and
compiled by TorchScript, which knows loops, appended lists and branches; in its place stands an operator, whose ONNX is put
in when the graph is written.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import itertools
import linecache
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import torch

from optkit.exporting.eager import quiet
from optkit.exporting.explain import stopped
from optkit.exporting.shadowing import files_of

DOMAIN = "optkit.loop"
# What TorchScript's exporter can write.
_OPSET = 20
_NUMBER = itertools.count()
_LIBRARY = torch.library.Library("optkit", "FRAGMENT")
# Operator -> the loop that it stands for.
_OPERATORS: dict[Any, _Loop] = {}


@dataclass(slots=True)
class _Loop:
    """A cut-out loop; becomes an operator when it is first called with tensors that hold numbers.

    Attributes:
        parameters: Names of what it reads.
        taken: Those of them that are tensors.
        example: The tensors of the first call.
    """

    name: str
    file: dict[str, Any]
    body: Sequence[ast.stmt]
    parameters: Sequence[str]
    results: Sequence[str]
    taken: list[str] = field(default_factory=list)
    script: Any = None
    operator: Any = None
    example: tuple[torch.Tensor, ...] = ()

    def __call__(self, *values: Any) -> Any:
        tensors = tuple(v for v in values if isinstance(v, torch.Tensor))
        if self.operator is None:
            self._compile(values)
            self.example = tuple(t.detach().clone() for t in tensors)
            self._register()
        return self.operator(*tensors)

    def _compile(self, values: Sequence[Any]) -> None:
        """Numbers are written into the code; whatever is neither they nor a tensor cannot be compiled."""
        fixed = []
        for name, value in zip(self.parameters, values, strict=True):
            if isinstance(value, torch.Tensor):
                self.taken.append(name)
            elif isinstance(value, bool | int | float):
                fixed.append(f"{name} = {value!r}")
            else:
                raise TypeError(f"a loop reads {name!r}, a {type(value).__name__}")
        lines = [*fixed, *map(ast.unparse, self.body), f"return ({''.join(f'{r}, ' for r in self.results)})"]
        source = (
            f"def {self.name}({', '.join(self.taken)}):\n" + textwrap.indent("\n".join(lines), "    ") + "\n"
        )
        file = f"<{self.name}>"
        # TorchScript reads the source of a function from its file.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope = dict(self.file)
        exec(compile(source, file, "exec"), scope)  # The user's own lines.
        self.script = torch.jit.script(scope[self.name])

    def _register(self) -> None:
        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            # An operator must not give back what it was given.
            return tuple(t.clone() for t in self.script(*tensors))

        def sizes(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(
                tensors[0].new_empty(self._shape(name, result, tensors), dtype=result.dtype)
                for name, result in zip(self.results, results, strict=True)
            )

        with torch.no_grad():
            results = run(*self.example)
        arguments = ", ".join(f"Tensor t{i}" for i in range(len(self.example)))
        _LIBRARY.define(f"{self.name}({arguments}) -> ({', '.join('Tensor' for _ in results)})")
        one = len(results) == 1
        _LIBRARY.impl(self.name, lambda *t: run(*t)[0] if one else run(*t), "CPU")
        torch.library.register_fake(
            f"optkit::{self.name}", lambda *t: sizes(*t)[0] if one else sizes(*t), lib=_LIBRARY
        )
        self.operator = getattr(torch.ops.optkit, self.name).default
        _OPERATORS[self.operator] = self

    def _shape(self, name: str, result: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """What the loop leaves as it was has its old shape; of the rest the data decides the first axis, and any that may be a free one."""
        if name in self.taken:
            at = self.taken.index(name)
            if self.example[at].shape == result.shape:
                return list(tensors[at].shape)
        free = {
            size
            for now, then in zip(tensors, self.example, strict=True)
            for axis, size in zip(now.shape, then.shape, strict=True)
            if not isinstance(axis, int)
        }
        context = torch.library.get_ctx()
        return [
            context.new_dynamic_size() if axis == 0 or size in free else size
            for axis, size in enumerate(result.shape)
        ]

    def function(self) -> ir.Function:
        """The loop in ONNX."""
        names = [f"t{i}" for i in range(len(self.example))]
        written = io.BytesIO()
        torch.onnx.export(
            self.script, self.example, written, dynamo=False, opset_version=_OPSET, input_names=names,
            output_names=[f"r{i}" for i in range(len(self.results))],
            dynamic_axes={n: {a: f"{n}_{a}" for a in range(t.ndim)} for n, t in zip(names, self.example, strict=True)},
        )  # fmt: skip
        graph = ir.from_proto(onnx.load_from_string(written.getvalue())).graph
        for value in list(graph.initializers.values()):
            assert value.const_value is not None
            holder = ir.node("Constant", [], {"value": ir.AttrTensor("value", value.const_value)})
            graph.insert_before(graph[0], holder)
            ir.convenience.replace_all_uses_with(value, holder.outputs[0])
            del graph.initializers[str(value.name)]
        return ir.Function(DOMAIN, self.name, graph=graph, attributes=[])


def translations() -> dict[Any, Callable[..., Any]]:
    """By operator, for ``torch.onnx.export``: a call of a function that ``written_out`` replaces."""

    def call(loop: _Loop) -> Callable[..., Any]:
        from onnxscript import values

        kind = onnx.defs.OpSchema
        given = [kind.FormalParameter(f"t{i}", f"T{i}") for i in range(len(loop.example))]
        results = [kind.FormalParameter(f"r{i}", f"R{i}") for i in range(len(loop.results))]
        every = sorted(onnx.defs.get_schema("Identity").type_constraints[0].allowed_type_strs)
        constraints = [(p.type_str, every, "") for p in (*given, *results)]
        schema = kind(loop.name, DOMAIN, 1, inputs=given, outputs=results, type_constraints=constraints)
        operator = values.Op(values.Opset(DOMAIN, 1), loop.name, schema)
        return lambda *tensors: operator(*tensors)

    return {operator: call(loop) for operator, loop in _OPERATORS.items()}


def written_out(model: ir.Model) -> None:
    """Put the loops in where they are called."""
    called = {n.op_type for n in model.graph if n.domain == DOMAIN}
    if not called:
        return
    for loop in _OPERATORS.values():
        if loop.name in called:
            with quiet():
                function = loop.function()
            model.functions[function.identifier()] = function
    ir.passes.common.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


@contextlib.contextmanager
def compiled(module: torch.nn.Module, errors: Sequence[BaseException]) -> Iterator[bool]:
    """The loops in which tracing stopped with ``errors`` are operators; tells whether each of them is in a loop."""
    lines: dict[types.FunctionType, list[int]] = {}
    for place in map(stopped, errors):
        function = None if place is None else _function(module, *place)
        if function is None or place is None:
            yield False
            return
        lines.setdefault(function, []).append(place[1])
    cuts = {function: _cut(function, numbers) for function, numbers in lines.items()}
    old = {function: function.__code__ for function in cuts}
    try:
        for function, cut in cuts.items():
            if cut is not None:
                loops, function.__code__ = cut
                function.__globals__.update({loop.name: loop for loop in loops})
        yield all(cuts.values())
    finally:
        for function, cut in cuts.items():
            function.__code__ = old[function]
            for loop in cut[0] if cut is not None else ():
                del function.__globals__[loop.name]


def _function(module: torch.nn.Module, file: str, line: int) -> types.FunctionType | None:
    """The function of the module's files that has a line."""
    for owner in files_of(module):
        if getattr(owner, "__file__", None) != file:
            continue
        classes = [v for v in vars(owner).values() if inspect.isclass(v) and v.__module__ == owner.__name__]
        for value in [v for scope in (owner, *classes) for v in vars(scope).values()]:
            value = inspect.unwrap(value.__func__ if isinstance(value, staticmethod) else value)
            if not isinstance(value, types.FunctionType) or value.__code__.co_filename != file:
                continue
            lines, first = inspect.getsourcelines(value)
            if first <= line < first + len(lines):
                return value
    return None


def _cut(function: types.FunctionType, lines: Sequence[int]) -> tuple[list[_Loop], types.CodeType] | None:
    """The outermost loops around lines, and the code of their function without them; None where a line is in none that can be cut out."""
    if function.__code__.co_freevars:
        return None
    source, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(source)))
    ast.increment_lineno(tree, first - 1)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    loops = []
    for line in lines:
        loop = _outlined(definition, line, function.__globals__)
        if loop is None:
            return None
        loops.append(loop)
    scope = dict(function.__globals__)
    exec(compile(tree, function.__code__.co_filename, "exec"), scope)  # The user's own lines.
    return loops, scope[definition.name].__code__


def _outlined(definition: ast.FunctionDef, line: int, file: dict[str, Any]) -> _Loop | None:
    """Put a call in the place of a loop."""
    found = _around(definition, line)
    span = None if found is None else _widened(definition, *found)
    if found is None or span is None:
        return None
    statements, at = found
    body = _without_return(statements, span)
    if any(
        isinstance(n, ast.Return | ast.Yield | ast.YieldFrom | ast.Await) for s in body for n in ast.walk(s)
    ):
        return None
    owner = definition.args.args[0].arg if definition.args.args else ""
    attributes = _Attributes(owner)
    moved = [attributes.visit(ast.parse(ast.unparse(s)).body[0]) for s in body]
    end, own = body[-1].lineno, {id(n) for s in body for n in ast.walk(s)}
    inside = [n for s in moved for n in ast.walk(s) if isinstance(n, ast.Name)]
    outside = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and id(n) not in own]
    known = {a.arg for a in (*definition.args.args, *definition.args.kwonlyargs)}
    known |= {n.id for n in outside if isinstance(n.ctx, ast.Store)}
    reads = sorted({n.id for n in inside if isinstance(n.ctx, ast.Load)} & known)
    later = {n.id for n in outside if isinstance(n.ctx, ast.Load) and n.lineno >= end}
    results = sorted({n.id for n in inside if isinstance(n.ctx, ast.Store)} & later)
    if not results or owner in {n.id for n in inside}:
        return None
    loop = _Loop(
        name=f"loop_{next(_NUMBER)}", file=file, body=moved, parameters=[*reads, *attributes.found], results=results
    )  # fmt: skip
    arguments = ", ".join([*reads, *attributes.found.values()])
    call = ast.parse(f"{', '.join(results)} = {loop.name}({arguments})").body[0]
    for node in ast.walk(call):
        if hasattr(node, "lineno"):
            ast.copy_location(node, statements[at])
    statements[span.start : span.start + len(body)] = [call]
    return loop


def _without_return(statements: list[ast.stmt], span: slice) -> list[ast.stmt]:
    """The statements of a span; a return at its end becomes names, returned behind it."""
    last = statements[span.stop - 1]
    if isinstance(last, ast.Return) and last.value is not None:
        values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        names = [f"returned_{i}" for i in range(len(values))]
        own = [ast.Assign([ast.Name(n, ast.Store())], v) for n, v in zip(names, values, strict=True)]
        back: list[ast.expr] = [ast.Name(n, ast.Load()) for n in names]
        behind = ast.Return(ast.Tuple(back, ast.Load()) if isinstance(last.value, ast.Tuple) else back[0])
        for node in (*own, behind):
            ast.fix_missing_locations(ast.copy_location(node, last))
        statements[span.stop - 1 : span.stop] = [*own, behind]
        return [*statements[span.start : span.stop - 1], *own]
    return statements[span]


def _around(definition: ast.FunctionDef, line: int) -> tuple[list[ast.stmt], int] | None:
    """The list of statements that holds the outermost loop around a line, and its place in it."""
    for node in ast.walk(definition):
        for part in ("body", "orelse", "finalbody"):
            statements = getattr(node, part, None)
            if not isinstance(statements, list):
                continue
            for at, statement in enumerate(statements):
                if isinstance(statement, ast.While | ast.For) and statement.lineno <= line <= (
                    statement.end_lineno or 0
                ):
                    return statements, at
    return None


def _widened(definition: ast.FunctionDef, statements: list[ast.stmt], at: int) -> slice | None:
    """The loop and what is around it, so that no list goes in or out: operators take tensors."""
    lists = {
        n.func.value.id
        for n in ast.walk(statements[at])
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("append", "extend", "insert", "pop") and isinstance(n.func.value, ast.Name)
    }  # fmt: skip
    first = last = at
    for i, statement in enumerate(statements):
        if lists & {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}:
            first, last = min(first, i), max(last, i)
    named = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id in lists]
    inside = {id(n) for s in statements[first : last + 1] for n in ast.walk(s)}
    if any(id(n) not in inside for n in named) or lists & {a.arg for a in definition.args.args}:
        return None
    return slice(first, last + 1)


class _Attributes(ast.NodeTransformer):
    """Attributes of the module that a loop reads become parameters: ``self.limit`` is ``self_limit``."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.found: dict[str, str] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Only whole chains that begin at the module."""
        text = ast.unparse(node)
        if not text.startswith(f"{self._owner}.") or not all(p.isidentifier() for p in text.split(".")):
            self.generic_visit(node)
            return node
        name = text.replace(".", "_")
        self.found[name] = text
        return ast.Name(id=name, ctx=ast.Load())
