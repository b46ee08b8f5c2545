"""``torch.compile(module, backend="optkit")``: each graph that torch captures becomes an artifact that answers in its place.

    fast = torch.compile(module, backend="optkit", options={"recipe": "int8-dynamic"})
    with torch.inference_mode():
        y = fast(x)

Weights are constants of the artifact; where one is changed afterwards, it is compiled again. Without options nothing is
rounded (recipe ``fp32``). For inference on the processor of this machine: all else is refused, and torch says by whom.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

import optkit
from optkit.closeness import closeness
from optkit.errors import ModelError, UsageError
from optkit.golden import min_cosine
from optkit.recipe import validated
from optkit.targets import target

logger = logging.getLogger(__name__)

_FLOATS = frozenset({"fp32", "fp16", "bf16"})
# Who asks for a recipe by name gets it, also where eager mode would be faster.
_NO_SPEED = ("limits.min_speedup=0",)


class BackendOptions(BaseModel):
    """What ``options=`` of ``torch.compile`` may hold.

    Attributes:
        recipe: Of ``optkit.compile``; ``auto`` measures which is fastest.
        target: A processor that is here.
        overrides: ``key=value`` changes of the recipe.
        out: Folder that keeps the artifacts, ``graph0``, ``graph1``, …; without it they go when torch forgets them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = "fp32"
    target: str = "cpu"
    overrides: tuple[str, ...] = Field(default=())
    out: Path | None = None


def backend(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What torch calls with a graph and the inputs that it came with; gives back what runs instead.

    Raises:
        UsageError: The graph is for training, on another device, has sizes that no input shows, or the options do not fit.
        ModelError: It is random, changes its inputs, or optkit cannot compile it.
    """
    asked: BackendOptions = validated(BackendOptions, "torch.compile options", options or {})
    where = target(asked.target)
    if not where.runs_here:
        raise UsageError(
            f"torch.compile runs on this machine, and there is no {where.name} here",
            hint="optkit.compile writes artifacts for other hardware",
        )
    _check(inputs)
    _check_operators(graph)
    captured = _capture(graph, inputs)
    if not captured.names:
        logger.info("a graph without inputs and tensors to compute stays as it is")
        return graph.forward  # type: ignore[no-any-return]
    return _Compiled(captured, asked)


def _check(inputs: Sequence[Any]) -> None:
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UsageError(
            "optkit compiles for inference, and this graph is asked for gradients",
            hint="call it within torch.inference_mode() or torch.no_grad()",
        )
    if devices := sorted({str(x.device) for x in tensors} - {"cpu"}):
        raise UsageError(
            f"tensors are on {devices[0]}, and this backend runs on the processor",
            hint="move module and inputs to cpu; kernels for GPUs: optkit.torch.operators",
        )

    if any(x.dtype is torch.bfloat16 for x in tensors):
        raise UsageError(
            "tensors are bfloat16, which ONNX Runtime does not compute with on a processor",
            hint="compile the module in float32; optkit.compile casts for targets that have bfloat16",
        )


def _check_operators(graph: torch.fx.GraphModule) -> None:
    """Modules of torch that switch to one large operator when they are not in training."""
    whole = (torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention)
    if any(node.target in whole for node in graph.graph.nodes):
        raise UsageError(
            "torch captured its fast path for encoders, one operator that ONNX does not have",
            hint="torch.backends.mha.set_fastpath_enabled(False) before the first call",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A graph whose weights are its own.

    Attributes:
        module: Takes tensors alone.
        places: Which of the arguments they are.
        names: What the module calls them.
        axes: Names of those that may change, by input.
        weights: Whose changes matter.
        outputs: For each output of the graph: which output of the module it is, or None where it is None.
    """

    module: torch.fx.GraphModule
    places: tuple[int, ...]
    names: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    weights: tuple[torch.Tensor, ...]
    outputs: tuple[int | None, ...]


def _capture(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> _Captured:
    """Make weights attributes of the module, and sizes what they are sizes of.

    Raises:
        UsageError: A size is of no input's axis, or an output is no tensor.
    """
    module = torch.fx.GraphModule(graph, _copy(graph.graph))
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    assert len(nodes) == len(inputs)
    held, weights = {}, []
    for index, (node, given) in enumerate(zip(nodes, inputs, strict=True)):
        if not isinstance(given, torch.Tensor) or not _is_weight(node, given):
            continue
        name = held[node] = f"weight_{index}"
        if isinstance(given, torch.nn.Parameter):
            module.register_parameter(name, given)
        else:
            module.register_buffer(name, given)
        weights.append(given)
    free = [
        (n, i)
        for i, (n, x) in enumerate(zip(nodes, inputs, strict=True))
        if n not in held and isinstance(x, torch.Tensor)
    ]
    axes = _axes([n for n, _ in free])
    last = nodes[-1] if nodes else None
    for node, given in zip(nodes, inputs, strict=True):
        if isinstance(given, torch.Tensor) and node not in held:
            continue
        assert last is not None
        with module.graph.inserting_after(last):
            if node in held:
                new = module.graph.get_attr(held[node])
            else:
                symbol = str(node.meta.get("example_value", given))
                if isinstance(given, int | float) and not isinstance(given, torch.SymInt) and not node.users:
                    new = None
                elif symbol not in axes:
                    raise UsageError(
                        f"the graph takes {node.name} ({symbol}), which is not an axis of an input",
                        hint="torch.compile(..., dynamic=False) compiles for each size by itself",
                    )
                else:
                    owner, axis = axes[symbol]
                    new = module.graph.call_method("size", (owner, axis))
        if new is not None:
            node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    outputs = _outputs(module)
    module.graph.lint()
    module.recompile()
    named: dict[str, dict[int, str]] = {}
    for node, _ in free:
        for axis, size in enumerate(_shape(node)):
            if isinstance(size, torch.SymInt):
                if str(size) not in axes:
                    raise UsageError(
                        f"axis {axis} of {node.name} has the size {size}, which is worked out from others",
                        hint="torch.compile(..., dynamic=False) compiles for each size by itself",
                    )
                named.setdefault(str(node.target), {})[axis] = str(size)
    return _Captured(
        module=module, places=tuple(i for _, i in free), names=tuple(str(n.target) for n, _ in free), axes=named,
        weights=tuple(weights), outputs=outputs,
    )  # fmt: skip


def _copy(graph: torch.fx.Graph) -> torch.fx.Graph:
    new = torch.fx.Graph()
    output = new.graph_copy(graph, {})
    new.output(output)
    return new


def _is_weight(node: torch.fx.Node, given: torch.Tensor) -> bool:
    """Whether torch found it in a module, and not among the arguments of a call."""
    found = node.meta.get("tensor_dict") or {}
    return isinstance(given, torch.nn.Parameter) or "_dynamo_static_input_type" in found


def _shape(node: torch.fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _axes(nodes: Sequence[torch.fx.Node]) -> dict[str, tuple[torch.fx.Node, int]]:
    """Where a symbol is the size of an axis, the first such input."""
    found: dict[str, tuple[torch.fx.Node, int]] = {}
    for node in nodes:
        for axis, size in enumerate(_shape(node)):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                found.setdefault(str(size), (node, axis))
    return found


def _outputs(module: torch.fx.GraphModule) -> tuple[int | None, ...]:
    """Leave each tensor once in the module's outputs."""
    (last,) = (n for n in module.graph.nodes if n.op == "output")
    (returned,) = last.args
    kept: dict[Any, int] = {}
    places: list[int | None] = []
    for value in returned:
        if value is None:
            places.append(None)
            continue
        example = value.meta.get("example_value") if isinstance(value, torch.fx.Node) else value
        if not isinstance(example, torch.Tensor):
            raise UsageError(
                f"the graph gives back {value}, which is not a tensor",
                hint="torch.compile(..., dynamic=False) makes sizes constants",
            )
        places.append(kept.setdefault(value, len(kept)))
    last.args = (tuple(kept),)
    return tuple(places)


@dataclass(eq=False)
class _Compiled:
    """The artifact in the place of a graph; compiled when it is first called, as torch is in the midst of its own work before."""

    captured: _Captured
    options: BackendOptions
    _session: Any = None
    _versions: tuple[int, ...] = ()

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
        """The outputs of the graph."""
        given = [arguments[i] for i in self.captured.places]
        if self._session is None or self._versions != self._now():
            if self._session is not None:
                logger.info("weights have changed: the graph is compiled again")
            self._build(given)
        return self._run(given)

    def _run(self, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        feeds = {
            s.name: x.detach().contiguous().numpy() for s, x in zip(self._session.inputs, given, strict=True)
        }
        found = self._session.run(feeds)
        outputs = [torch.from_numpy(np.array(found[o.name])) for o in self._session.outputs]
        return tuple(None if place is None else outputs[place] for place in self.captured.outputs)

    def _now(self) -> tuple[int, ...]:
        # A tensor of inference mode counts no versions, and cannot be changed outside of it.
        return tuple(-1 if w.is_inference() else w._version for w in self.captured.weights)

    def _build(self, given: Sequence[torch.Tensor]) -> None:
        captured, asked = self.captured, self.options
        versions = self._now()
        right = _eager(captured, given)
        if asked.out is None:
            folder = tempfile.mkdtemp(prefix="optkit-torch-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            out = Path(folder) / "artifact"
        else:
            out = next(p for i in range(1 << 30) if not (p := asked.out / f"graph{i}").exists())
        with torch.inference_mode(mode=False):
            artifact, report = optkit.compile(
                captured.module, {n: x.detach().clone() for n, x in zip(captured.names, given, strict=True)},
                dynamic_shapes=captured.axes or None, target=asked.target, recipe=asked.recipe,
                overrides=[*_NO_SPEED, *asked.overrides], out=out,
            )  # fmt: skip
        if report.missed:
            raise ModelError(f"what optkit compiled misses its limits: {'; '.join(report.missed)}")
        self._session, self._versions = artifact.session(), versions
        achieved = report.manifest.achieved
        assert achieved is not None
        formats = tuple(achieved.formats)
        for index, (value, expected) in enumerate(zip(self._run(given), right, strict=True)):
            if value is None or expected is None:
                continue
            close = closeness(expected.numpy(), value.numpy())
            # Of integers, the limits of the recipe say how close they have to come.
            least = min_cosine(formats) if _FLOATS.issuperset(formats) else -1.0
            if value.shape != expected.shape or close["cosine"] < least:
                raise ModelError(
                    f"output {index} is {list(value.shape)} with cosine {close['cosine']:.5f} to eager mode's "
                    f"{list(expected.shape)}",
                    hint="optkit.compile(module, inputs) tells more",
                )


def _eager(captured: _Captured, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """What the graph computes by itself.

    Raises:
        ModelError: It changes what it is given, or computes something else each time.
    """
    held = {
        name: buffer
        for name, buffer in captured.module.named_buffers()
        if not isinstance(buffer, torch.nn.Parameter)
    }
    runs = []
    # Tensors of inference mode do not tell that they were changed.
    with torch.inference_mode(mode=False), torch.no_grad():
        for _ in range(2):
            copies = {name: buffer.clone() for name, buffer in held.items()}
            fresh = [x.detach().clone() for x in given]
            before = [t._version for t in (*copies.values(), *fresh)]
            found = torch.func.functional_call(captured.module, copies, tuple(fresh))
            if before != [t._version for t in (*copies.values(), *fresh)]:
                raise ModelError(
                    "the graph changes its inputs or buffers, which an artifact does not do",
                    hint="call module.eval() first; caches have to be given and given back",
                )
            runs.append(found)
    if not all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(*runs, strict=True)):
        raise ModelError(
            "the graph computes something else each time: it draws random numbers",
            hint="call module.eval() first, which switches dropout off",
        )
    return tuple(None if place is None else runs[0][place] for place in captured.outputs)
