"""What may change in a module: the genes of its architectures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import nn

from optkit.errors import PassError
from optkit.graph import users
from optkit.origin import MODULE
from optkit.passes.architecture.evolve import Genome
from optkit.passes.pruning.choose import matches, named, widths
from optkit.passes.pruning.dependencies import Dependencies, Group

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Widths offered in a group.
_WIDTHS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Units of a group.

    Attributes:
        order: Units, the least important first.
        options: How many stay.
    """

    group: Group
    order: tuple[int, ...]
    options: tuple[int, ...]
    kind: str = "width"

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    def said(self, option: int) -> str:
        """In words."""
        return f"{self.options[0]} -> {self.options[option]} units"

    def gone(self, option: int) -> set[int]:
        """Units that go."""
        return set(self.order[: len(self.order) - self.options[option]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """A block that can be left out, since what comes in has the shape of what goes out.

    Attributes:
        ends: Units of its input, and those at the same place of its output.
    """

    name: str
    ends: tuple[tuple[int, int], ...]
    options: tuple[bool, ...] = (True, False)
    kind: str = "depth"

    def said(self, option: int) -> str:
        """In words."""
        return "left out" if option else "stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a convolution is computed: with a kernel of some size, or as a depthwise and a pointwise one."""

    kernel: tuple[int, ...]
    separable: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.kernel))
        return f"separable {size}" if self.separable else size


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """Forms of a convolution, the first being its own."""

    name: str
    options: tuple[Form, ...]
    kind: str = "convolution"

    def said(self, option: int) -> str:
        """In words."""
        return f"{self.options[0]} -> {self.options[option]}"


Choice = Width | Depth | Convolution


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The architectures inside of a module.

    Attributes:
        model: Its graph, as ``dependencies`` labelled it.
        found: These labels.
        choices: Genes, in the order of ``Genome``.
    """

    model: ir.Model
    found: Dependencies
    choices: tuple[Choice, ...]

    def repaired(self, genome: Genome) -> Genome:
        """Inside of a block that is left out, nothing changes."""
        out = [c.name for c, g in zip(self.choices, genome, strict=True) if isinstance(c, Depth) and g]

        def idle(choice: Choice) -> bool:
            if isinstance(choice, Width):
                # Biases and norms follow the layers, and those that the export adds have names of their own.
                layers = [w for w, _ in choice.group.places if w.shape is not None and len(w.shape) > 1]
                return all(within(str(w.name), out) for w in layers)
            return within(choice.name, [path for path in out if path != choice.name])

        return tuple(0 if idle(c) else g for c, g in zip(self.choices, genome, strict=True))


def within(name: str, paths: Collection[str]) -> bool:
    """Whether a module or weight is one of, or inside of, modules."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def space(
    module: nn.Module,
    model: ir.Model,
    found: Dependencies,
    groups: Sequence[Group],
    importance: Sequence[np.ndarray],
    *,
    choices: Collection[str],
    multiple: int,
    least: float,
    targets: Sequence[str],
    ignore: Sequence[str],
) -> Space:
    """The choices that a module leaves.

    Args:
        groups: All of its groups of units.
        importance: Of the units of each.

    Raises:
        PassError: There are none.
    """
    genes: list[Choice] = []
    chosen = [matches(g, targets) and not matches(g, ignore) for g in groups]
    if "width" in choices:
        for group, scores, mine in zip(groups, importance, chosen, strict=True):
            ladder = _ladder(group, multiple, least) if mine else ()
            if len(ladder) > 1:
                order = tuple(group.units[k] for k in np.argsort(scores, kind="stable"))
                genes.append(Width(group=group, order=order, options=ladder))
    free = {unit for group in groups for unit in group.units}
    layers = {p: m for p, m in module.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    if "depth" in choices:
        genes += _depths(module, model.graph, found, free, layers, targets, ignore)
    for path, layer in layers.items():
        if isinstance(layer, CONVOLUTIONS) and _asked(path, targets, ignore):
            forms = _forms(layer, choices)
            if len(forms) > 1:
                genes.append(Convolution(name=path, options=forms))
    if not genes:
        raise PassError(
            f"nothing to choose: {type(module).__name__} has no {' or '.join(choices)} that may change",
            hint="widen choices or targets, or lower multiple or least",
        )
    return Space(model=model, found=found, choices=tuple(genes))


def _asked(path: str, targets: Sequence[str], ignore: Sequence[str]) -> bool:
    return named((path, f"{path}.weight"), targets) and not named((path, f"{path}.weight"), ignore)


def _ladder(group: Group, multiple: int, least: float) -> tuple[int, ...]:
    """Widths from all units down, spread evenly."""
    allowed = [w for w in reversed(widths(group, multiple)) if w >= least * len(group.units)]
    picked = np.linspace(0, len(allowed) - 1, min(_WIDTHS, len(allowed))).round().astype(int)
    return tuple(allowed[i] for i in picked.tolist())


def _forms(layer: nn.Module, choices: Collection[str]) -> tuple[Form, ...]:
    """Of a convolution, those that cost less than its own, the cheapest last."""
    assert isinstance(layer, CONVOLUTIONS)
    kernel, own = tuple(layer.kernel_size), int(np.prod(layer.kernel_size))
    if own == 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return ()
    ins, outs = layer.in_channels // layer.groups, layer.out_channels
    forms = {Form(kernel=kernel): ins * outs * own}
    # Of the centre of a kernel the output has the same size if the padding can shrink with it.
    if "kernel" in choices and all(k % 2 for k in kernel) and set(layer.dilation) == {1}:
        for less in range(2, max(kernel), 2):
            size = tuple(max(k - less, 1) for k in kernel)
            cut = tuple((k - s) // 2 for k, s in zip(kernel, size, strict=True))
            if all(p >= c for p, c in zip(layer.padding, cut, strict=True)):
                forms[Form(kernel=size)] = ins * outs * int(np.prod(size))
    if "separable" in choices and layer.groups == 1 and ins > 1:
        forms[Form(kernel=kernel, separable=True)] = ins * own + ins * outs
    full = ins * outs * own
    cheaper = [f for f, cost in forms.items() if cost < full]
    return (Form(kernel=kernel), *sorted(cheaper, key=lambda f: -forms[f]))


def _depths(
    module: nn.Module,
    graph: ir.Graph,
    found: Dependencies,
    free: Collection[int],
    layers: Collection[str],
    targets: Sequence[str],
    ignore: Sequence[str],
) -> list[Depth]:
    blocks: dict[tuple[ir.Value, ir.Value], Depth] = {}
    for path, block in module.named_modules():
        inside = [name for name in layers if within(name, [path])]
        if (
            not path
            or path in layers
            or not 0 < len(inside) < len(layers)
            or isinstance(block, nn.ModuleList)
        ):
            continue
        if not all(_asked(name, targets, ignore) for name in inside):
            continue
        ends = _ends(graph, path)
        units = _paired(found, ends, free) if ends is not None else None
        # Of modules around the same layers, the outermost.
        if ends is not None and units is not None and ends not in blocks:
            blocks[ends] = Depth(name=path, ends=units)
    return list(blocks.values())


def _ends(graph: ir.Graph, path: str) -> tuple[ir.Value, ir.Value] | None:
    """What goes into a module and what comes out, where that is one value each."""
    inside = [n for n in graph if within(n.metadata_props.get(MODULE, ""), [path])]
    own = set(inside)
    made = {o for n in inside for o in n.outputs}
    taken = {
        v for n in inside for v in n.inputs if v is not None and v not in made and not v.is_initializer()
    }
    given = {v for v in made if v.is_graph_output() or any(reader not in own for reader in users(v))}
    return (taken.pop(), given.pop()) if len(taken) == len(given) == 1 else None


def _paired(
    found: Dependencies, ends: tuple[ir.Value, ir.Value], free: Collection[int]
) -> tuple[tuple[int, int], ...] | None:
    """Units of two values at the same places; None where the shapes differ, or one cannot follow the other."""
    before, after = ends
    if before.shape is None or before.shape != after.shape:
        return None
    pairs: dict[tuple[int, int], None] = {}
    for a, b in zip(found.axes.get(before, ()), found.axes.get(after, ()), strict=False):
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            labels = found.labels.roots(a).tolist(), found.labels.roots(b).tolist()
            pairs |= dict.fromkeys(p for p in zip(*labels, strict=True) if p[0] != p[1])
    stuck = any(a in free and b not in free for a, b in pairs)
    return None if stuck else tuple(pairs)
