"""``optkit inspect``: what is in a model or an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.cost import Costs
    from optkit.report import Manifest


@command
def inspect(
    terminal: Terminal,
    model: options.ModelOrArtifact,
    shape: options.Shape = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="List every node.", show_default=False)] = False,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="List what quantization leaves in float and which rules nearly matched.",
            show_default=False,
        ),
    ] = False,
    target: options.NamedTarget = None,
    backend: options.Backend = None,
    dynamic: options.Dynamic = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    json: options.Json = False,
) -> int:
    """Show what MODEL is made of: operators, parameters, multiply-accumulates, bytes; with --target also the least time there."""
    from optkit.cli.render import facts, table
    from optkit.cli.running import graph, holds_graph, shaped
    from optkit.cost import costs

    if not holds_graph(model):
        asked = {"--shape": shape, "--nodes": nodes, "--why": why, "--target": target}
        return _stored(terminal, model, [name for name, value in asked.items() if value], as_json=json)
    loaded = graph(model, **options.torch_given(model, dynamic, inputs, weights))
    free = shaped(loaded, shape or ())
    cost = costs(loaded.model)
    macs = {node: c.macs for node, c in cost.nodes.items()}
    found = _facts(loaded.model, macs)
    found["families"] = _families(loaded.model, cost)
    if target is not None:
        found["floor"] = _floor(cost, target)
    found = {"name": model, "opset": loaded.opset, "notes": list(loaded.notes), **found}
    manifest = _manifest(model)
    if manifest is not None:
        found["artifact"] = options.plain(manifest)
    if nodes:
        found["nodes_listed"] = _nodes(loaded.model, macs)
    if why:
        found["why"] = _why(loaded.model, target, backend)
    if json:
        terminal.json(found)
        return 0
    terminal.result(facts(_lines(found, free, manifest)))
    terminal.result("")
    rows = [
        (op, str(f["count"]), _n(f["parameters"]), _macs(f["macs"]), _share(f["macs"], found["macs"]))
        for op, f in found["operators"].items()
    ]
    terminal.result(table(("Operator", ">Nodes", ">Parameters", ">MACs", ">Share"), rows))
    terminal.result("")
    by_family = [
        (name, str(f["nodes"]), _n(f["parameters"]), _macs(f["macs"]), _bytes(f["bytes"]), _intensity(f["intensity"]))
        for name, f in found["families"].items()
    ]  # fmt: skip
    head = ("Family", ">Nodes", ">Parameters", ">MACs", ">Bytes moved", ">Operations/byte")
    terminal.result(table(head, by_family))
    if nodes:
        terminal.result("")
        listed = [
            (
                n["name"],
                n["op"],
                n["inputs"],
                n["outputs"],
                _macs(n["macs"]),
                ", ".join(p for p in (n["module"], n["source"]) if p),
            )
            for n in found["nodes_listed"]
        ]
        titles = ("Node", "Operator", "Inputs", "Outputs", ">MACs", "From")
        # Where a model comes from without its Python code, the last column would be empty.
        width = len(titles) if any(row[-1] for row in listed) else len(titles) - 1
        terminal.result(table(titles[:width], [row[:width] for row in listed]))
    if why:
        terminal.result("")
        reasons = [(w["node"], w["rule"], w["reason"]) for w in found["why"]]
        terminal.result(table(("Node", "Rule", "Why it does not apply"), reasons))
        if not reasons:
            terminal.say(
                "every rule that came near applies, and nothing that could be quantized stays in float"
            )
    return 0


def _facts(model: ir.Model, macs_by_node: Mapping[str, int | None]) -> dict[str, Any]:
    from optkit.cost import is_integer
    from optkit.data import specs
    from optkit.graph import count_nodes, count_parameters, graphs, walk, weight_bytes

    operators: dict[str, dict[str, Any]] = {}
    products = integer = 0
    for node in walk(model):
        if node.op_type == "Constant":
            continue
        name = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
        row = operators.setdefault(name, {"count": 0, "parameters": 0, "macs": 0})
        row["count"] += 1
        row["parameters"] += sum(
            v.const_value.size
            for v in dict.fromkeys(node.inputs)
            if v is not None and v.const_value is not None
        )
        macs = macs_by_node[str(node.name)]
        if macs is None:
            row["macs"] = None
        elif row["macs"] is not None:
            row["macs"] += macs
            products += macs
            integer += macs if is_integer(node) else 0
    complete = all(row["macs"] is not None for row in operators.values())
    weights: dict[str, int] = {}
    for part in graphs(model):
        for value in part.initializers.values():
            if value.const_value is not None:
                kind = value.const_value.dtype.name.lower()
                weights[kind] = weights.get(kind, 0) + value.const_value.nbytes
    inputs, outputs = specs(model)
    return {
        "inputs": [str(s) for s in inputs],
        "outputs": [str(s) for s in outputs],
        "nodes": count_nodes(model),
        "graphs": sum(1 for _ in graphs(model)),
        "parameters": count_parameters(model),
        "bytes": weight_bytes(model),
        "weights": dict(sorted(weights.items(), key=lambda kv: -kv[1])),
        "macs": products if complete else None,
        "int8_share": integer / products if complete and products else None,
        "operators": dict(sorted(operators.items(), key=lambda kv: (-kv[1]["count"], kv[0]))),
    }


def _families(model: ir.Model, found: Costs) -> dict[str, Any]:
    from optkit.cost import by_family

    return {
        name: {
            "nodes": f.nodes,
            "parameters": f.parameters,
            "macs": f.macs,
            "bytes": f.bytes,
            "intensity": f.intensity,
        }
        for name, f in by_family(model, found).items()
    }


def _everywhere(bandwidth: float, size: float) -> float:
    return bandwidth


def _floor(found: Costs, name: str) -> dict[str, Any]:
    """The least time on a target, and the ceilings that it comes from; or why it is not known."""
    from optkit.cost import floor
    from optkit.targets import target as find_target

    where = find_target(name)
    peak, bandwidth, source = dict(where.peak), where.bandwidth, where.source
    reading: Callable[[float], float] | None = None if bandwidth is None else partial(_everywhere, bandwidth)
    if (not peak or bandwidth is None) and where.runs_here:
        from optkit.roofline import ceilings

        machine = ceilings()
        peak, bandwidth, source = dict(machine.operations), machine.bytes, "measured here, one thread"
        reading = machine.reading
    shown: dict[str, Any] = {"target": where.name, "peak": peak, "bandwidth": bandwidth, "source": source}
    needed = found.operations
    missing = sorted(fmt for fmt in needed or () if fmt not in peak)
    if reading is None or missing:
        lacks = [f"peak of {fmt}" for fmt in missing] + ([] if bandwidth else ["bandwidth"])
        return shown | {"ms": None, "why": f"no {', no '.join(lacks)} is known"}
    least = floor(found, peak, reading)
    if least is None:
        return shown | {"ms": None, "why": "depends on free axes (--shape INPUT=SIZES fixes them)"}
    shown["bandwidth"] = reading(least.bytes)
    formats = {fmt: count / sum(needed.values()) for fmt, count in needed.items()} if needed else {}
    return shown | {
        "ms": least.seconds * 1e3,
        "bound": least.bound,
        "bytes": least.bytes,
        "intensity": least.intensity,
        "formats": formats,
    }


def _nodes(model: ir.Model, macs_by_node: Mapping[str, int | None]) -> list[dict[str, Any]]:
    from optkit.graph import walk

    def shown(values: Iterable[ir.Value | None]) -> str:
        return ", ".join("-" if v is None else _value(v) for v in values)

    rows = []
    for node in walk(model):
        macs = macs_by_node[str(node.name)]
        op = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
        rows.append(
            {
                "name": node.name,
                "op": op,
                "inputs": shown(node.inputs),
                "outputs": shown(node.outputs),
                "macs": macs,
                "module": node.metadata_props.get("optkit.module", ""),
                "source": node.metadata_props.get("optkit.source", ""),
            }
        )
    return rows


def _value(value: ir.Value) -> str:
    kind = "?" if value.dtype is None else value.dtype.name.lower()
    axes = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
    return f"{'' if value.const_value is not None else f'{value.name}: '}{kind}[{axes}]"


def _why(model: ir.Model, target: str | None, backend: str | None) -> list[dict[str, str]]:
    """What static quantization leaves in float, and the rules that matched a part of their pattern."""
    from optkit.backends import BACKENDS
    from optkit.passes.base import Context
    from optkit.passes.quantization.plan import make_plan
    from optkit.pipeline import run_passes
    from optkit.recipe import Recipe
    from optkit.rewrite import near_misses
    from optkit.targets import target as find_target

    where = find_target(target or "cpu")
    placements = BACKENDS[backend or where.backends[0]]().placements
    cleaned = model.clone()
    with near_misses() as misses:
        exact = [p for p in Recipe.load("int8-static").passes if p.exact]
        run_passes(cleaned, exact, Context(target=where, placements=placements))
    reasons = []
    if "default" in placements:
        plan = make_plan(cleaned.graph, placements["default"], ("*",), ())
        reasons = [{"node": node, "rule": "quantize-static", "reason": reason} for node, reason in plan.left]
    found = dict.fromkeys((m.node, m.rule, m.reason) for m in misses)
    return reasons + [{"node": node, "rule": rule, "reason": reason} for node, rule, reason in found]


def _manifest(model: str) -> Manifest | None:
    from optkit.artifact import load

    return load(model, verify=False).manifest if Path(model).is_dir() else None


def _lines(
    found: dict[str, Any], free: Sequence[str], manifest: Manifest | None
) -> list[tuple[str, Sequence[str]]]:
    from optkit import sentences

    weights = ", ".join(f"{kind} {sentences.megabytes(n)}" for kind, n in found["weights"].items()) or "none"
    bodies = "" if found["graphs"] == 1 else f" in {found['graphs']} graphs (bodies of control flow)"
    rows: list[tuple[str, Sequence[str]]] = [
        ("Model", (f"{found['name']}, opset {found['opset']}",)),
        ("Inputs", found["inputs"]),
        ("Outputs", found["outputs"]),
        ("Nodes", (f"{found['nodes']:,}{bodies}",)),
        ("Parameters", (f"{found['parameters']:,}",)),
        ("Weights", (f"{sentences.megabytes(found['bytes'])}: {weights}",)),
    ]
    if found["macs"] is None:
        axes = f": {', '.join(free)}" if free else ""
        rows.append(("MACs", (f"depend on free axes{axes} (--shape INPUT=SIZES fixes them)",)))
    else:
        share = (
            ""
            if not found["int8_share"]
            else f", {sentences.percent(found['int8_share'])} of them between int8 tensors"
        )
        rows.append(("MACs", (f"{_macs(found['macs'])} a run{share}",)))
    if "floor" in found:
        rows.append(("Floor", _floor_lines(found["floor"])))
    if found["notes"]:
        rows.append(("Loading", found["notes"]))
    if manifest is not None:
        rows += _told(found["name"], manifest)
    return rows


def _stored(terminal: Terminal, model: str, asked: Sequence[str], *, as_json: bool) -> int:
    """What an artifact says of itself that holds files of its runtime and no graph."""
    from optkit import sentences
    from optkit.artifact import load
    from optkit.cli.render import facts, table
    from optkit.cli.running import interface
    from optkit.data import specs
    from optkit.errors import UsageError

    artifact = load(model, verify=False)
    manifest = artifact.manifest
    if asked:
        raise UsageError(
            f"{model}: {' and '.join(asked)}: the graph is needed, and the artifact holds only files of {manifest.backend}",
            hint=f"give the file that it was compiled from, {manifest.model.name}",
        )
    inputs = [str(s) for s in specs(interface(model).model)[0]]
    operators = manifest.achieved.operators if manifest.achieved is not None else {}
    if as_json:
        terminal.json(
            {"name": model, "inputs": inputs, "operators": operators, "artifact": options.plain(manifest)}
        )
        return 0
    size = (
        f"{sentences.megabytes(manifest.size.after)}, of {sentences.megabytes(manifest.size.before)} before"
    )
    terminal.result(
        facts([("Model", (model,)), ("Inputs", inputs), ("Size", (size,)), *_told(model, manifest)])
    )
    if operators:
        terminal.result("")
        counted = sorted(operators.items(), key=lambda kv: (-kv[1], kv[0]))
        terminal.result(
            table(("Operator, as the runtime names it", ">Nodes"), [(op, str(n)) for op, n in counted])
        )
    return 0


def _told(name: str, manifest: Manifest) -> list[tuple[str, Sequence[str]]]:
    """What the manifest of an artifact says."""
    from optkit import sentences
    from optkit.artifact import DEVICE
    from optkit.targets import called

    rows: list[tuple[str, Sequence[str]]] = [
        ("Artifact", (f"for {called(manifest.target)} with {manifest.backend}, from {manifest.model.name}",))
    ]
    if manifest.achieved is not None:
        shares = ", ".join(f"{k} {sentences.percent(v)}" for k, v in manifest.achieved.formats.items())
        # A device that finished the artifact later has not been asked again.
        here = manifest.evidence.ran_on_device and not (Path(name) / DEVICE).is_file()
        how = "as measured" if here else "as read back"
        where = ", ".join(manifest.achieved.placement)
        said = f"{shares} of the multiply-accumulates, {how} when it was compiled: {where}"
        rows.append(("Computes in", (said, manifest.achieved.scheme)))
    if manifest.accuracy is not None:
        rows.append(("Accuracy", sentences.accuracy(manifest.accuracy)))
    if manifest.fidelity is not None:
        rows.append(("Fidelity", sentences.fidelity(manifest.fidelity)))
    return rows


def _floor_lines(found: dict[str, Any]) -> tuple[str, ...]:
    from optkit import sentences

    if found["ms"] is None:
        return (f"not known on {found['target']}: {found['why']}",)
    used = [f"{fmt} {_macs(int(found['peak'][fmt])).strip()}op/s" for fmt in found["formats"]]
    peaks = ", ".join([*used, f"memory {_macs(int(found['bandwidth'])).strip()}B/s"])
    return (
        f"{sentences.milliseconds(found['ms'])} a run on {found['target']}, bound by {found['bound']}: no kernel can be faster",
        f"{found['intensity']:.3g} operations a byte of weights, inputs and outputs; {peaks} ({found['source']})",
    )


def _bytes(n: int | None) -> str:
    if not n:
        return _macs(n)
    return f"{_macs(n)}B" if n >= 1e3 else f"{n} B"


def _intensity(x: float | None) -> str:
    return f"{x:.3g}" if x else ""


def _n(n: int) -> str:
    return f"{n:,}" if n else ""


def _macs(n: int | None) -> str:
    if n is None:
        return "?"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n) if n else ""


def _share(n: int | None, total: int | None) -> str:
    return f"{n / total * 100:.1f}%" if n and total else ""
