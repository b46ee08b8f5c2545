"""``optkit quantize``: the passes of one recipe, written as ONNX; no timing, no reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import PassError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from optkit.report import PassRecord
    from optkit.request import Request

# Weights are mapped, and quantized one at a time while they are written (measured on 2.1 GB of weights).
_COPIES = 0.3


@command
def quantize(
    terminal: Terminal,
    model: options.Model,
    target: options.Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="An .onnx file, or a folder for model.onnx.",
            show_default="MODEL-RECIPE.onnx",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help="Name of a shipped recipe, or a .yaml file.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", "-p", metavar="NAME", help="int8, int8-dyn or fp16.", show_default="int8"
        ),
    ] = None,
    calib: options.Calib = None,
    backend: options.Backend = None,
    sets: options.Set = None,
    dynamic: options.Dynamic = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> int:
    """Quantize MODEL and write it as ONNX, with QuantizeLinear and DequantizeLinear or dynamic integer products.

    The graph is the one that `optkit compile` builds from the same recipe and data, to the byte. Nothing is timed or
    judged: use compile for that. Prints the file.
    """  # fmt: skip
    from optkit import sentences
    from optkit.cli.memory import limited, needed, parse_size
    from optkit.cli.render import facts, show, table
    from optkit.cli.writing import check_runs, move, place
    from optkit.graph import count_nodes, weight_bytes
    from optkit.legalize import legalize
    from optkit.readback import scheme
    from optkit.recipe import Recipe
    from optkit.request import request
    from optkit.store import save, temporary_folder

    path = options.source(model)
    budget = None if memory is None else parse_size(memory)
    named = (
        recipe if recipe is not None else None if precision not in (None, "int8", "INT8") else "int8-static"
    )
    if recipe is not None and precision is not None:
        raise UsageError("a recipe and a precision were given", hint="leave one out")
    if named is not None and (several := Recipe.load(named).candidates):
        raise UsageError(
            f"recipe {named} chooses among {', '.join(several)} by measuring, and quantize measures nothing",
            hint="name one of these, or use optkit compile",
        )
    with limited(budget, 0 if budget is None else needed(path, copies=_COPIES)):
        asked = request(
            path, target=target, recipe=named, precision=None if named else precision, data=calib, backend=backend,
            overrides=sets or (), seed=seed, **options.torch_given(path, dynamic, inputs, weights, calib),
        )  # fmt: skip
        final = place(out, path, Path(named or str(precision)).stem.lower())
        with temporary_folder(final.with_name(f"{final.name}.parts")) as folder:
            work = asked.work(folder, terminal.progress)
            graph, records, _ = work.transform(asked.recipe)
            _check_changed(asked, records, path)
            legalize(graph.clone(), asked.backend, asked.target, name=asked.loaded.name)
            notes = [*asked.loaded.notes, *_ends(graph)]
            written = save(graph, folder / final.name)
            check_runs(written[0], graph, work.feeds[0])
            nodes, kinds = count_nodes(graph), scheme(graph)
            files = move(written, final)
    size = sum(f.stat().st_size for f in files)
    if json:
        terminal.json(
            {
                "model": str(final),
                "files": [str(f) for f in files],
                "bytes": size,
                "nodes": {"before": count_nodes(asked.loaded.model), "after": nodes},
                "scheme": kinds,
                "notes": notes,
                "passes": [options.plain(r) for r in records],
                "recipe": asked.recipe.dump(),
            }
        )
        return 0
    before = count_nodes(asked.loaded.model)
    rows = [
        (r.name, str(r.changes), f"{r.nodes_before:,} -> {r.nodes_after:,}") for r in records if r.changes
    ]
    given = sentences.megabytes(weight_bytes(asked.loaded.model))
    show(
        terminal,
        [
            table(("Pass", ">Changes", ">Nodes"), rows),
            "",
            facts(
                [
                    (
                        "Model",
                        (
                            f"{before:,} -> {nodes:,} nodes, {given} -> {sentences.megabytes(size)} of weights",
                        ),
                    ),
                    ("Formats", (kinds,)),
                    *([("Notes", notes)] if notes else []),
                    (
                        "Not done",
                        (
                            "nothing was timed, and no accuracy was measured: optkit bench, optkit eval, or optkit compile",
                        ),
                    ),
                ]
            ),
        ],
    )
    terminal.result(str(final))
    return 0


def _ends(graph: ir.Model) -> Iterator[str]:
    """What has to be known to load the file."""
    from optkit.graph import walk
    from optkit.reference import turned_operand

    if any(turned_operand(node) is not None for node in walk(graph)):
        yield (
            "ONNX Runtime 1.32 ends the process when it loads this for a processor, unless it is told "
            "disabled_optimizers=['MatmulTransposeFusion']; what optkit compile makes for the processor is spelled otherwise"
        )


def _check_changed(asked: Request, records: Sequence[PassRecord], model: Path | str) -> None:
    lossy = {p.name for p in asked.recipe.passes if not p.exact}
    if lossy and not any(r.changes for r in records if r.name in lossy):
        raise PassError(
            f"{', '.join(sorted(lossy))}: nothing in {asked.loaded.name} was changed",
            hint=f"optkit inspect {model} --why says why its layers stay in float",
        )
