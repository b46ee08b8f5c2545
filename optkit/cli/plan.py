"""``optkit plan``: what a model would take on hardware that is not at hand, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from optkit.planning import Plan


@command
def plan(
    terminal: Terminal,
    model: options.ModelOrArtifact,
    target: options.NamedTarget = None,
    precision: options.Precision = None,
    shape: options.Shape = None,
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            metavar="USD",
            min=0.0,
            help="Dollars that an hour of the target costs.",
            show_default="a list price",
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            "--prices", metavar="FILE", help="YAML with dollars an hour by target.", show_default=False
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=1, help="List this many of the longest layers.")
    ] = 20,
    dynamic: options.Dynamic = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    json: options.Json = False,
) -> int:
    """Say, layer by layer, what MODEL would take on a target by its data sheet: floors and estimates, never measurements."""
    from optkit import sentences
    from optkit.cli.render import facts, table
    from optkit.cli.running import graph, shaped
    from optkit.errors import UsageError
    from optkit.planning import dollars, precision_for
    from optkit.planning import plan as made
    from optkit.targets import target as find_target

    if target is None:
        raise UsageError("a plan needs a target", hint="--target h100; optkit targets lists them")
    where = find_target(target)
    precision_for(where, precision)
    dollar, source = _price(where.name, price, prices)
    loaded = graph(model, **options.torch_given(model, dynamic, inputs, weights))
    if free := shaped(loaded, shape or ()):
        raise UsageError(f"{model} has free axes: {', '.join(free)}", hint="--shape INPUT=SIZES fixes them")
    found = made(loaded.model, where, precision)
    batch = next((v.shape[0] for v in loaded.model.graph.inputs if v.shape is not None and len(v.shape)), 1)
    samples = batch if isinstance(batch, int) else 1
    costs = (
        None
        if dollar is None
        else [dollars(s, dollar, samples) for s in (found.floor, found.low, found.high)]
    )
    if json:
        terminal.json(_document(model, where.name, precision, samples, found, dollar, source, costs))
        return 0
    ms = [sentences.milliseconds(s * 1e3) for s in (found.floor, found.low, found.high)]
    least, cold = found.least, sentences.milliseconds(found.cold.seconds * 1e3)
    kept = (
        f", less {sentences.megabytes(where.l2)} that the last cache may keep from run to run"
        if where.l2
        else ""
    )
    compute, memory = (sentences.milliseconds(s * 1e3) for s in (least.compute, least.memory))
    rows: list[tuple[str, tuple[str, ...]]] = [
        (
            "Model",
            (f"{model}, {len(found.layers)} launches after fusion, for {where.name} ({where.source})",),
        ),
        (
            "Floor",
            (
                f"{ms[0]} a run, bound by {least.bound}; {cold} with cold caches: no engine is faster, whatever it fuses",
                f"the longer of all operations at their peaks, {compute}, and {sentences.megabytes(least.bytes)} of weights, "
                f"inputs and outputs from memory{kept}, {memory}",
            ),
        ),
        (
            "Estimate",
            (
                f"{ms[1]} to {ms[2]} a run: computed, not measured",
                "the sum of the layers: at best fused, at worst each node launched for itself and each value through memory",
            ),
        ),
    ]
    if found.uncounted:
        rows.append(
            ("Not counted", (f"what these multiply, so times are too low: {', '.join(found.uncounted)}",))
        )
    if found.notes:
        rows.append(("Assumed", found.notes))
    if costs is None:
        rows.append(("Cost", (f"no price of {where.name} is known (--price USD)",)))
    else:
        spread = f"${costs[1]:.3g} to ${costs[2]:.3g} for a million samples by the estimate, ${costs[0]:.3g} by the floor"
        rows.append(
            (
                "Cost",
                (spread, f"{sentences.count(samples, 'sample')} a run, ${dollar:.3g} an hour ({source})"),
            )
        )
    terminal.result(facts(rows))
    terminal.result("")
    longest = sorted(found.layers, key=lambda layer: -layer.high)[:top]
    us = [
        (
            layer.name, layer.op, str(layer.nodes), layer.format or "-", f"{layer.macs / 1e6:,.1f} M" if layer.macs else "",
            f"{layer.needed / 1e6:,.2f} MB", f"{layer.bytes / 1e6:,.2f} MB", layer.bound, f"{layer.floor * 1e6:,.2f}", f"{layer.low * 1e6:,.1f} to {layer.high * 1e6:,.1f}",
        )
        for layer in longest
    ]  # fmt: skip
    terminal.result(
        "Floor of a layer: its operations, or its part of those bytes. Layers may overlap, so the run's floor is not their sum."
    )
    head = (
        "Layer",
        "Operator",
        ">Nodes",
        "Format",
        ">MACs",
        ">Needed",
        ">Moved",
        "Bound by",
        ">Floor, us",
        ">Estimate, us",
    )
    terminal.result(table(head, us))
    return 0


def _price(name: str, price: float | None, prices: Path | None) -> tuple[float | None, str]:
    """Dollars an hour and where they are from."""
    import yaml

    from optkit.errors import UsageError
    from optkit.targets.prices import PRICES

    if price is not None:
        return price, "as given"
    if prices is not None:
        if not prices.is_file():
            raise UsageError(f"{prices}: no such file")
        found = yaml.safe_load(prices.read_text("utf-8"))
        rows = found if isinstance(found, dict) else {}
        if not rows or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in rows.values()
        ):
            raise UsageError(f"{prices}: not dollars an hour by target", hint="write lines such as h100: 2.5")
        if name in rows:
            return float(rows[name]), str(prices)
    known = PRICES.get(name)
    return (None, "") if known is None else (known.dollars, known.source)


def _document(
    model: str, target: str, precision: str | None, samples: int, found: Plan, dollar: float | None, source: str, costs: list[float] | None
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import asdict

    names = ("floor", "low", "high")
    return {
        "model": model, "target": target, "precision": precision, "samples": samples, "measured": False,
        "seconds": {k: getattr(found, k) for k in names}, "bound": found.least.bound,
        "cold": {"floor": found.cold.seconds, "bound": found.cold.bound}, "bytes": found.least.bytes,
        "uncounted": list(found.uncounted), "notes": list(found.notes),
        "price": None if dollar is None else {"dollars_an_hour": dollar, "source": source},
        "dollars_a_million": None if costs is None else dict(zip(names, costs, strict=True)),
        "layers": [asdict(layer) for layer in found.layers],
    }  # fmt: skip
