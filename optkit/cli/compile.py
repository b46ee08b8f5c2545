"""``optkit compile``: build, measure and judge candidates, and write the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from optkit.recipe import Recipe
    from optkit.request import Request

# The least that any recipe takes (measured): the reference reads the weights. More is watched for while working.
_COPIES = 1.3


@command
def compile(
    terminal: Terminal,
    model: options.Model,
    target: options.Target = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Folder to write; an artifact that is there is replaced."
        ),
    ] = Path("build"),
    recipe: options.Recipe = None,
    precision: options.Precision = None,
    calib: options.Calib = None,
    evaluate: options.Evaluate = None,
    max_drop: options.MaxDrop = None,
    backend: options.Backend = None,
    goal: Annotated[
        str | None,
        typer.Option(
            "--goal",
            metavar="GOAL",
            help="What to prefer among what keeps the limits: latency of one request at a time, throughput of many, or size.",
            show_default="latency",
        ),
    ] = None,
    sets: options.Set = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    dynamic: options.Dynamic = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    strict: options.Strict = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, say what would run, build nothing.", show_default=False
        ),
    ] = False,
    json: options.Json = False,
) -> int:
    """Compile MODEL, measure it against ONNX Runtime fp32, and write the artifact.

    Without a recipe or precision, the candidates that matter are tried and the fastest that keeps the limits is
    taken; float32 is the floor. Prints the folder of the artifact.
    """
    from optkit.cli.memory import limited, needed, parse_size
    from optkit.cli.render import show, summary
    from optkit.compiler import compile as compile_model
    from optkit.request import request

    path = options.source(model)
    budget = None if memory is None else parse_size(memory)
    least = 0 if budget is None else needed(path, copies=_COPIES)
    asked: dict[str, Any] = {
        "target": target, "recipe": recipe, "precision": precision, "data": calib, "evaluate": evaluate,
        "max_drop": max_drop, "backend": backend, "overrides": sets or (), "seed": seed, "goal": goal,
        **options.torch_given(path, dynamic, inputs, weights, calib),
    }  # fmt: skip
    if dry_run:
        wanted = request(path, **asked, out=out)
        with limited(budget, least):
            _explain(terminal, wanted, out, as_json=json)
        return 0
    with limited(budget, least):
        artifact, report = compile_model(path, **asked, out=out, strict=strict, progress=terminal.progress)
    show(terminal, summary(report, artifact.folder))
    if json:
        terminal.json(
            {"artifact": str(artifact.folder), "exit_code": report.exit_code, **options.plain(report)}
        )
    else:
        terminal.result(str(artifact.folder))
    return report.exit_code


def _explain(terminal: Terminal, asked: Request, out: Path, *, as_json: bool) -> None:
    from optkit import sentences
    from optkit.graph import count_nodes, weight_bytes
    from optkit.targets import called

    recipes = [(name, r, "") for name, r in asked.candidates] or [("recipe", asked.recipe, "")]
    rows = [(name, _steps(r), "would be built and measured") for name, r, _ in recipes]
    rows += [(name, "", "left out: needs calibration data (--calib)") for name in asked.closed]
    judge = (
        f"{asked.evaluator.metric}, drop of at most {asked.recipe.limits.max_drop}"
        if asked.evaluator
        else None
    )
    nodes, size = count_nodes(asked.loaded.model), weight_bytes(asked.loaded.model)
    if as_json:
        terminal.json(
            {
                "model": {
                    "name": asked.loaded.name,
                    "nodes": nodes,
                    "bytes": size,
                    "opset": asked.loaded.opset,
                },
                "target": asked.target.name,
                "experimental": asked.target.experimental,
                "backend": asked.backend.name,
                "recipe": asked.recipe.dump(),
                "candidates": [{"name": n, "passes": p, "verdict": v} for n, p, v in rows],
                "data": None if asked.data is None else {"name": asked.data.name, "batches": len(asked.data)},
                "metric": judge,
                "out": str(out),
                "built": False,
            }
        )
        return
    terminal.say(
        f"{asked.loaded.name}: {sentences.count(nodes, 'node')}, {sentences.megabytes(size)} of weights, opset {asked.loaded.opset}"
    )
    terminal.say(f"for {called(asked.target.name)}, with {asked.backend.name}, into {out}")
    terminal.say(
        "judged by "
        + (judge or f"fidelity to the fp32 reference: cosine of at least {asked.recipe.limits.min_cosine:g}")
    )
    if asked.data is not None:
        terminal.say(f"calibrated on {len(asked.data)} batches of {asked.data.name}")
    from optkit.cli.render import table

    terminal.say(table(("Candidate", "Passes", "What happens"), rows))
    terminal.say("nothing was built; the recipe, resolved:")
    terminal.result(asked.recipe.yaml().rstrip())


def _steps(recipe: Recipe) -> str:
    exact = [p.name for p in recipe.passes if p.exact]
    others = [p.name for p in recipe.passes if not p.exact]
    kept = f"{len(exact)} exact" if exact else "no exact passes"
    return ", ".join([kept, *others])
