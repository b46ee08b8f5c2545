"""``optkit prune``: channels or single weights go, and what that is worth is measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.pruning import Pruned

# The weights as they were and as they become, for the whole of the work.
_COPIES = 2.5


@command
def prune(
    terminal: Terminal,
    model: options.Model,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio",
            metavar="SHARE",
            help="Share of the channels, heads and features to remove: 0.5 or 50%.",
            show_default=False,
        ),
    ] = None,
    speedup: Annotated[
        str | None,
        typer.Option(
            "--speedup",
            metavar="FACTOR",
            help="Remove enough to make it this many times as fast, by measurement: 1.5x.",
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            metavar="PATTERN",
            help="Set weights to 0 instead: 2:4, or a share. Refused where no kernel of the target is faster for it.",
            show_default=False,
        ),
    ] = None,
    target: options.Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="An .onnx file, or a folder for model.onnx.",
            show_default="MODEL-pruned.onnx",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write zeros that make nothing faster.", show_default=False)
    ] = False,
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
    """Remove the least important channels, heads and features of MODEL from all weights that they touch, without training.

    Kept widths are multiples of 16, which kernels run fast; --set passes.prune-channels.multiple=8 changes that;
    criterion, least, targets and ignore are set the same way. The pruned model computes what MODEL computes with the removed weights at 0, so it
    has to be trained afterwards (optkit.training, from the PyTorch module). Prints the file.
    """  # fmt: skip
    from optkit.cli.memory import limited, needed, parse_size
    from optkit.cli.writing import check_runs, move, place
    from optkit.legalize import legalize
    from optkit.passes.pruning.structured import PruneChannels
    from optkit.passes.pruning.zeros import ZeroWeights
    from optkit.pruning import prune_channels, zero_weights
    from optkit.request import request
    from optkit.store import save, temporary_folder

    wanted = _passes(ratio, speedup, sparsity)
    path = options.source(model)
    budget = None if memory is None else parse_size(memory)
    with limited(budget, 0 if budget is None else needed(path, copies=_COPIES)):
        asked = request(
            path, target=target, recipe={"recipe": 1, "passes": [wanted]}, data=calib, backend=backend, overrides=sets or (),
            seed=seed, **options.torch_given(path, dynamic, inputs, weights, calib),
        )  # fmt: skip
        step = asked.recipe.passes[0]
        final = place(out, path, "pruned")
        with temporary_folder(final.with_name(f"{final.name}.parts")) as folder:
            work = asked.work(folder, terminal.progress)
            with terminal.progress.task("prune and time"):
                if isinstance(step, PruneChannels):
                    found = prune_channels(work, step, folder, None if speedup is None else _factor(speedup))
                else:
                    assert isinstance(step, ZeroWeights)
                    found = zero_weights(work, step, folder, force=force)
            legalize(found.graph.clone(), asked.backend, asked.target, name=asked.loaded.name)
            written = save(found.graph, folder / final.name)
            check_runs(written[0], found.graph, work.feeds[0])
            files = move(written, final)
    if json:
        terminal.json(_document(found, str(final), files, asked.loaded.model))
    else:
        _show(terminal, found, files, asked.loaded.model, work.inputs)
        terminal.result(str(final))
    if found.missed is not None:
        terminal.say(f"missed: {found.missed}")
        return 3
    return 0


def _passes(ratio: str | None, speedup: str | None, sparsity: str | None) -> dict[str, Any]:
    if sum(v is not None for v in (ratio, speedup, sparsity)) != 1:
        raise UsageError(
            "say how much to prune", hint="one of --ratio 0.5, --speedup 1.5x and --sparsity 2:4"
        )
    if ratio is not None:
        return {"prune-channels": {"ratio": _share(ratio, "--ratio")}}
    if speedup is not None:
        if _factor(speedup) <= 1:
            raise UsageError(f"--speedup {speedup}: is not more than 1")
        return {"prune-channels": {}}
    assert sparsity is not None
    if ":" in sparsity:
        return {"zero-weights": {"pattern": sparsity}}
    return {"zero-weights": {"sparsity": _share(sparsity, "--sparsity")}}


def _share(text: str, option: str) -> float:
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UsageError(f"{option} {text!r}: not a share", hint="write 0.5 or 50%")
    return value


def _factor(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*[xX×]?\s*", text)
    if found is None:
        raise UsageError(f"--speedup {text!r}: not a factor", hint="write 1.5x")
    return float(found[1])


def _document(found: Pruned, file: str, files: list[Path], before: ir.Model) -> dict[str, Any]:
    from dataclasses import asdict

    from optkit.graph import count_parameters

    return {
        "model": file,
        "files": [str(f) for f in files],
        "bytes": sum(f.stat().st_size for f in files),
        "parameters": {"before": count_parameters(before), "after": count_parameters(found.graph)},
        "pass": {found.step.name: found.step.model_dump(mode="json")},
        "changes": [asdict(c) for c in found.changes],
        "measured": None if found.measured is None else asdict(found.measured),
        "missed": found.missed,
    }


def _show(terminal: Terminal, found: Pruned, files: list[Path], before: ir.Model, inputs: str) -> None:
    from optkit import sentences
    from optkit.cli.render import facts, show, table
    from optkit.graph import count_parameters, weight_bytes

    rows = [(c.node, c.detail) for c in found.changes]
    size = sum(f.stat().st_size for f in files)
    lines: list[tuple[str, tuple[str, ...]]] = [
        (
            "Model",
            (
                f"{count_parameters(before):,} -> {count_parameters(found.graph):,} parameters, "
                f"{sentences.megabytes(weight_bytes(before))} -> {sentences.megabytes(size)} of weights",
            ),
        )
    ]
    if found.measured is not None:
        m = found.measured
        lines.append(
            (
                "Latency",
                (
                    f"{m.reference.median * 1e3:.3g} -> {m.candidate.median * 1e3:.3g} ms, {m.ratio:.2f}x faster "
                    f"({m.ci95[0]:.2f} to {m.ci95[1]:.2f}), measured in float32 on one thread, on {inputs}",
                ),
            )
        )
    lines.append(
        (
            "Not done",
            ("no accuracy was measured, and nothing was trained: optkit eval, then optkit.training",),
        )
    )
    show(terminal, [table(("Weight", "Change"), rows), "", facts(lines)])
