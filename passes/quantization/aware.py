"""Quantization-aware training at work: where the quantizers go, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx, nn

from optkit.errors import PassError, UnknownNameError
from optkit.formats import FORMATS, Format
from optkit.ops import spec
from optkit.passes.base import Attached, Batch, Context, call
from optkit.passes.modes import evaluating
from optkit.passes.quantization.fake import FakeQuantize, OnGrid, QuantizedLayer, unfit
from optkit.passes.quantization.plan import Plan, make_plan
from optkit.passes.quantization.sites import Sites, add, export_marked, install, reads_first, trace
from optkit.rewrite import Change
from optkit.saturation import SAFE
from optkit.training_sharded import spread_like, whole

if TYPE_CHECKING:
    from optkit.passes.quantization.qat import QuantizeAware
    from optkit.placement import Placement

logger = logging.getLogger(__name__)

_IN_PLACE = (torch.relu_, F.relu_, "relu_")
_RELUS = (torch.relu, F.relu, "relu", *_IN_PLACE)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def attach(options: QuantizeAware, module: nn.Module, context: Context) -> Attached:
    """Insert the quantizers and give them their first ranges."""
    training = context.training
    assert training is not None
    if options.placement not in context.placements:
        raise UnknownNameError("placement", options.placement, context.placements)
    graph = trace(module)
    marked = export_marked(module, graph, training.export)
    marked = Sites(model=training.clean(marked.model), keys=marked.keys)
    found = _Found(graph, module, marked)
    placement = context.placements[options.placement]
    saturates = context.target.saturates and options.activation_bits is not None
    layers = found.insert(
        found.plan(placement, options), options, FORMATS[placement.activation], saturates=saturates
    )
    install(module, graph)
    quantizers = found.quantizers
    _observe(module, training.batches)
    for key, quantizer in quantizers.items():
        if not quantizer.observed():
            raise PassError(
                f"{key} is infinite or NaN on the example inputs, so it has no range",
                hint="give inputs of the kind that the module is trained on as example=",
            )
    return _Aware(options, module, layers, quantizers, training.steps)


def _observe(module: nn.Module, batches: Sequence[Batch]) -> None:
    with evaluating(module), torch.no_grad():
        for batch in batches:
            call(module, batch)


class _Found:
    """The plan of the graph, carried over to the trace."""

    def __init__(self, graph: fx.Graph, module: nn.Module, sites: Sites) -> None:
        self._graph, self._module, self._sites = graph, module, sites
        self._nodes = {n.name: n for n in graph.nodes}
        self._layers = dict(module.named_modules(remove_duplicate=False))
        self.quantizers: dict[str, FakeQuantize] = {}

    def plan(self, placement: Placement, options: QuantizeAware) -> Plan:
        """What ``quantize-static`` would quantize, as far as the trace has a place for it."""
        refused: dict[ir.Node, str] = {}
        for node in self._sites.model.graph:
            layer = self._layer(node)
            if layer is not None:
                # Patterns are held against paths of modules.
                node.metadata_props.setdefault("optkit.module", str(layer.target))
        while True:
            plan = make_plan(self._sites.model.graph, placement, options.targets, options.ignore, refused)
            new = {
                n: reason for n, row in plan.nodes.items() if (reason := self._obstacle(n, row.role, plan))
            }
            if not new:
                break
            refused |= new
        left = [*((str(n.name), r) for n, r in refused.items()), *plan.left]
        for name, reason in left:
            logger.info("%s stays in float: %s", name, reason)
        if not any(row.role == "compute" for row in plan.nodes.values()):
            reasons = "; ".join(f"{n}: {r}" for n, r in left[:5])
            raise PassError(
                f"nothing in {type(self._module).__name__} can be quantized: {reasons or 'it has no layer with weights'}",
                hint="see targets and ignore of the recipe",
            )
        return plan

    def _obstacle(self, node: ir.Node, role: str, plan: Plan) -> str | None:
        if role == "compute":
            layer = self._layer(node)
            if layer is None:
                return "it does not belong to one module of the trace"
            if reason := unfit(self._layers[str(layer.target)]):
                return reason
        wrong = next((v for v in plan.around(node) if not self._sites.of(v)), None)
        return None if wrong is None else f"{wrong.name} is nowhere to be found in the module's own code"

    def _layer(self, node: ir.Node) -> fx.Node | None:
        """The call of the layer whose product ``node`` computes; where its norm was folded, the layer before the norm."""
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        for key in self._sites.behind(node):
            call: fx.Node | None = self._nodes[key]
            assert call is not None
            while call is not None and call.op == "call_module":
                layer = self._layers[str(call.target)]
                if not isinstance(layer, _NORMS) and hasattr(layer, "weight"):
                    return call
                first = call.args[0] if call.args else None
                call = first if isinstance(first, fx.Node) and isinstance(layer, _NORMS) else None
        return None

    def _norm(self, call: fx.Node) -> fx.Node | None:
        readers = list(call.users)
        if len(readers) != 1 or readers[0].op != "call_module":
            return None
        layer = self._layers[str(readers[0].target)]
        ready = isinstance(layer, _NORMS) and layer.track_running_stats and layer.running_var is not None
        return readers[0] if ready else None

    def insert(
        self, plan: Plan, options: QuantizeAware, fmt: Format, *, saturates: bool
    ) -> dict[str, QuantizedLayer]:
        """Put layers and quantizers into the trace and the module."""
        layers: dict[str, QuantizedLayer] = {}
        made: dict[nn.Module, QuantizedLayer] = {}
        outer = _outer(self._sites.model.graph, plan)
        readers: dict[fx.Node, ir.Node] = {}
        for node, row in plan.nodes.items():
            if row.role != "compute":
                for key in self._sites.behind(node)[:1]:
                    readers[self._nodes[key]] = node
                continue
            call = self._layer(node)
            assert call is not None
            readers[call] = node
            path = str(call.target)
            if path in layers:
                continue
            layer, norm = self._layers[path], self._norm(call)
            if layer not in made:
                inner = None if norm is None else self._layers[str(norm.target)]
                bits: int = (
                    max(options.weight_bits, options.outer_bits) if node in outer else options.weight_bits
                )
                if saturates and not _depthwise(layer):
                    bits = min(bits, SAFE.bit_length())
                made[layer] = QuantizedLayer(layer, inner, bits)
                if norm is not None:
                    _replace(self._module, str(norm.target), nn.Identity())
            layers[path] = made[layer]
            _replace(self._module, path, made[layer])
        if options.activation_bits is not None:
            grids = self._grids(plan, readers, fmt)
            for call, node in readers.items():
                x = node.inputs[0]
                if plan.nodes[node].role == "compute" and x in plan.pairs:
                    layers[str(call.target)].read(grids[plan.pairs[x]])
        return layers

    def _grids(
        self, plan: Plan, readers: Mapping[fx.Node, ir.Node], fmt: Format
    ) -> dict[ir.Value, FakeQuantize]:
        """A quantizer for every grid, and a call of it for every pair."""
        grids: dict[ir.Value, FakeQuantize] = {}
        paths: dict[ir.Value, str] = {}
        kept: set[fx.Node] = set()
        for value, origin in plan.pairs.items():
            site = self._nodes[self._sites.of(value)[-1]]
            if origin not in grids:
                grids[origin] = FakeQuantize(fmt).to(_device(self._module))
                paths[origin] = add(self._module, f"grid_{site.name}", grids[origin])
                self.quantizers[site.name] = grids[origin]
            after = site
            if site.op == "placeholder":
                # What comes in stays what was observed, and a gradient of it would cost one through the first layer.
                grids[origin].log_scale.requires_grad_(False)
                after = [n for n in self._graph.nodes if n.op == "placeholder"][-1]
            with self._graph.inserting_after(after):
                call = self._graph.call_module(paths[origin], (site,))
            owned = value in plan.owners
            site.replace_all_uses_with(
                call, lambda u, call=call, owned=owned: u is not call and (owned or u in readers)
            )
            # A reader may stand behind another site of the same value.
            assert call.users, f"{site.name}: nothing reads the pair"
            if _chosen_from(value, origin, plan):
                kept.add(call)
        by_path = {paths[origin]: grid for origin, grid in grids.items()}
        self._spare(kept, by_path)
        self._absorb(by_path)
        return grids

    def _spare(self, kept: Collection[fx.Node], grids: Mapping[str, FakeQuantize]) -> None:
        """Round no value again that was chosen from rounded ones."""
        there = {n: str(n.target) for n in self._graph.nodes if n.op == "call_module" and n.target in grids}
        for pair, path in there.items():
            site = pair.args[0]
            if pair in kept and isinstance(site, fx.Node) and there.get(reads_first(site)) == path:
                pair.target = add(self._module, f"grid_{site.name}", OnGrid(grids[path]))

    def _absorb(self, grids: Mapping[str, FakeQuantize]) -> None:
        """Let quantizers do the work of the ReLUs in front of them: a node less each way, and the same numbers."""
        pairs = [n for n in self._graph.nodes if n.op == "call_module" and n.target in grids]
        for pair in pairs:
            relu = pair.args[0]
            before = relu.args[0] if isinstance(relu, fx.Node) and relu.args else None
            alone = len(relu.users) == 1 and sum(p.target == pair.target for p in pairs) == 1
            if not alone or not isinstance(before, fx.Node) or not self._is_relu(relu):
                continue
            # One that works in place changes what others see.
            if len(before.users) > 1 and self._in_place(relu):
                continue
            layer = self._layers[str(relu.target)] if relu.op == "call_module" else None
            grids[str(pair.target)].absorb(layer)
            pair.replace_input_with(relu, before)
            self._graph.erase_node(relu)

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self._layers[str(node.target)]) is nn.ReLU
        return node.target in _RELUS

    def _in_place(self, relu: fx.Node) -> bool:
        if relu.op == "call_module":
            return bool(getattr(self._layers[str(relu.target)], "inplace", False))
        # The second argument of F.relu.
        return relu.target in _IN_PLACE or bool(relu.kwargs.get("inplace", relu.args[1:]))


def _chosen_from(value: ir.Value, origin: ir.Value, plan: Plan) -> bool:
    """Whether the value holds nothing but values of another one that is on the grid of ``origin``."""
    node = value.producer()
    if node is None or node not in plan.nodes or (row := spec(node)) is None:
        return False
    first = node.inputs[0]
    return row.keeps_grid(node) and first is not None and plan.pairs.get(first) is origin


def _outer(graph: ir.Graph, plan: Plan) -> set[ir.Node]:
    """The quantized layers before which there is none, and those behind which there is none."""
    layers = {node for node, row in plan.nodes.items() if row.role == "compute"}
    walk = [(n, n.inputs, n.outputs) for n in graph]
    found: set[ir.Node] = set()
    for steps in (walk, [(n, made, read) for n, read, made in reversed(walk)]):
        reached: set[ir.Value | None] = set()
        for node, read, made in steps:
            there = not reached.isdisjoint(read)
            if node in layers and not there:
                found.add(node)
            if node in layers or there:
                reached.update(made)
    return found


def _depthwise(layer: Any) -> bool:
    """Whether each channel is a convolution of its own, for which kernels widen before they multiply."""
    groups = getattr(layer, "groups", None)
    return groups is not None and bool(groups == layer.in_channels == layer.out_channels)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


class _Aware(Attached):
    """Schedules while training; integers at the end."""

    def __init__(
        self,
        options: QuantizeAware,
        module: nn.Module,
        layers: Mapping[str, QuantizedLayer],
        quantizers: Mapping[str, FakeQuantize],
        steps: int,
    ) -> None:
        self._options, self._module, self._layers, self._quantizers = options, module, layers, quantizers
        self._steps = steps
        self._frozen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._progress = 0.0

    def on_step(self, step: int) -> None:
        """Freeze what is due, and undo what the optimizer did to what is frozen."""
        for parameter, value in self._frozen:
            parameter.copy_(value)
        before, self._progress = self._progress, step / self._steps if self._steps else 0.0
        self._advance(before, self._progress)

    def _advance(self, before: float, now: float) -> None:
        options = self._options
        if before < options.freeze_ranges <= now:
            for layer in self._layers.values():
                self._freeze(layer.log_scale)
            for quantizer in self._quantizers.values():
                self._freeze(quantizer.log_scale)
        if before < options.freeze_batch_norm <= now:
            for layer in self._layers.values():
                layer.settle()
        if options.freeze_layers is not None:
            parts = list(dict.fromkeys(self._layers.values()))
            span = 1 - options.freeze_layers
            for index, layer in enumerate(parts):
                due = options.freeze_layers + span * (index + 1) / len(parts)
                if before < due <= now:
                    self._freeze(layer.weight)

    def _freeze(self, parameter: torch.Tensor) -> None:
        # Not requires_grad: wrappers such as DDP count on a gradient for every parameter that they were given.
        self._frozen.append((parameter, parameter.detach().clone()))

    def moved(self, parameters: Mapping[Any, Any]) -> None:
        """Follow those that are frozen; the layers hold their own."""
        self._frozen = [(parameters[p], spread_like(whole(v), parameters[p])) for p, v in self._frozen]

    def state(self) -> dict[str, Any]:
        """How far it is; frozen values are the module's own."""
        return {"progress": self._progress}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Freeze what was frozen, at the values that the module has now."""
        self._progress = float(state["progress"])
        self._frozen.clear()
        self._advance(0.0, self._progress)

    def finish(self) -> Sequence[Change]:
        """Store integers; the module's results are those of the artifact from now on."""
        self._module.eval()
        for layer in dict.fromkeys(self._layers.values()):
            layer.store()
        for quantizer in self._quantizers.values():
            quantizer.store()
        grid = f"{bits} bits" if (bits := self._options.activation_bits) else "float"
        return [
            Change(
                rule="quantize-aware",
                node=path,
                detail=f"weights in {layer.bits} bits, activations in {grid}",
            )
            for path, layer in self._layers.items()
        ]
