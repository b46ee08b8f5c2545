"""``optkit diff``: how far the outputs of a model or artifact are from those of another, on the same inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from optkit.evaluate import Fidelity

    Outputs = Mapping[str, np.ndarray]

# That are compared at most, and drawn without data.
_BATCHES = 8


@command
def diff(
    terminal: Terminal,
    model: options.ModelOrArtifact,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="The model or artifact whose outputs are the right ones.",
            show_default=False,
        ),
    ],
    calib: options.Calib = None,
    shape: options.Shape = None,
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", min=1, help="Run at most this many batches.")
    ] = _BATCHES,
    min_sqnr: Annotated[
        float | None,
        typer.Option(
            "--min-sqnr", metavar="DB", help="SQNR that each float output must reach.", show_default=False
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            metavar="COSINE",
            min=-1.0,
            max=1.0,
            help="Cosine that each float output must reach.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> int:
    """Run MODEL and another on the same inputs, and say how far each output is from the other's.

    Where an artifact is for another processor, whose numbers differ, they are predicted, as in `optkit eval`; the output says
    what did not run on its target. With --min-sqnr or --min-cosine it is a gate: exit code 0 met, 3 missed; integers and shapes that differ miss any gate.
    """  # fmt: skip
    from optkit.cli.render import table
    from optkit.cli.running import Remarks, feeds, opened
    from optkit.evaluate import fidelity

    # A model says more of its axes than what it was compiled to.
    given, source = feeds(against, calib, shape or (), 1, batches)
    runs: list[list[Outputs]] = []
    remarks = Remarks()
    for name in (model, against):
        with opened(name, predict=True) as one, terminal.progress.task(f"run {name}") as task:
            remarks.add(one)
            wanted = [s.name for s in one.inputs]
            if missing := [n for n in wanted if n not in given[0]]:
                raise DataError(
                    f"{name} takes {', '.join(wanted)}, and {against} has no input {', '.join(missing)}; it has {', '.join(given[0])}",
                    hint="both must be of one model: inputs are told apart by name",
                )
            outputs: list[Outputs] = []
            for batch in given:
                outputs.append(one.run(batch))
                task.advance()
            runs.append(outputs)
    found, expected = runs
    if missing := [n for n in expected[0] if n not in found[0]]:
        raise DataError(
            f"{model} has no output {', '.join(missing)}, which {against} has; it has {', '.join(found[0])}",
            hint="both must be of one model: outputs are told apart by name",
        )
    apart = {
        name: fidelity(lambda i, n=name: {n: expected[i][n]}, lambda i, n=name: {n: found[i][n]}, range(len(given)))  # type: ignore[misc,arg-type]
        for name in expected[0]
    }  # fmt: skip
    gated = min_sqnr is not None or min_cosine is not None
    rows = {name: _row(f, expected[0][name]) for name, f in apart.items()}
    missed = [n for n, row in rows.items() if gated and _misses(row, min_sqnr, min_cosine)]
    code = 3 if missed else 0
    if json:
        terminal.json(
            {
                "model": model, "against": against, "inputs": source, "batches": len(given), "outputs": rows,
                **remarks.fields, **({"missed": missed} if gated else {}), "exit_code": code,
            }
        )  # fmt: skip
        return code
    remarks.say(terminal)
    heads = ("Output", ">Largest difference", ">SQNR", ">Cosine", ">Top-1 or equal", "")
    shown = [(n, *_words(row), "missed" if n in missed else "") for n, row in rows.items()]
    terminal.result(table(heads[: 6 if missed else 5], [row[: 6 if missed else 5] for row in shown]))
    terminal.say(f"on {source}; the largest difference is a share of the output's range")
    return code


def _row(f: Fidelity, first: np.ndarray) -> dict[str, Any]:
    """Of one output; a number that it has no meaning for is None."""
    floats = first.dtype.kind == "f"
    return {
        "shapes_equal": f.shapes_equal, "largest": f.largest if floats else None, "sqnr_db": f.sqnr if floats else None,
        "cosine": f.cosine if floats else None, "agreement": f.agreement,
    }  # fmt: skip


def _misses(row: Mapping[str, Any], min_sqnr: float | None, min_cosine: float | None) -> bool:
    if not row["shapes_equal"]:
        return True
    if row["cosine"] is None:
        return row["agreement"] is not None and row["agreement"] < 1
    limits = ((row["sqnr_db"], min_sqnr), (row["cosine"], min_cosine))
    return any(least is not None and not value >= least for value, least in limits)


def _words(row: Mapping[str, Any]) -> tuple[str, ...]:
    if not row["shapes_equal"]:
        return ("shapes differ", "", "", "")
    largest, sqnr, cosine, agreement = (row[k] for k in ("largest", "sqnr_db", "cosine", "agreement"))
    return (
        "" if largest is None else f"{largest:.2g}",
        "" if sqnr is None else "equal" if largest == 0 else f"{sqnr:.1f} dB",
        "" if cosine is None else f"{cosine:.6f}" if math.isfinite(cosine) else "not finite",
        "" if agreement is None else f"{agreement:.2%}",
    )
