"""``optkit eval``: the metric of a model or artifact, and its drop against another."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import UsageError

if TYPE_CHECKING:
    from optkit.evaluate import Comparison, Evaluator


@command
def evaluate(
    terminal: Terminal,
    model: options.ModelOrArtifact,
    evaluator: Annotated[
        Path,
        typer.Option(
            "--eval", metavar="FILE", help="A Python file with samples() and score().", show_default=False
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Compare with this model or artifact, sample by sample.",
            show_default=False,
        ),
    ] = None,
    max_drop: options.MaxDrop = None,
    json: options.Json = False,
) -> int:
    """Compute the metric of MODEL over the samples of an evaluator file.

    Where an artifact is for another processor, whose numbers differ, its metric is predicted by emulation, and the output
    says so. With --against and --max-drop it is a gate: exit code 0 met, 3 missed, 5 where the samples do not decide.
    """  # fmt: skip
    from optkit.cli.render import facts, table
    from optkit.cli.running import Remarks, opened
    from optkit.evaluate import Budget, Evaluator, compare

    budget = None if max_drop is None else Budget.parse(max_drop)
    if budget is not None and against is None:
        raise UsageError("--max-drop needs --against: a drop is between two models")
    judge = Evaluator.load(evaluator)
    scores: list[list[Any]] = []
    remarks = Remarks()
    for name in (against, model):
        if name is not None:
            with ExitStack() as stack:
                one = stack.enter_context(opened(name, predict=True))
                remarks.add(one)
                checked = judge.checked((*one.inputs, *one.kept))
                scores.append(_scores(terminal, checked, one.name, one.run))
    *before, after = scores
    remarks.say(terminal)
    value = judge.total(after)
    if not before:
        if json:
            terminal.json(
                {"model": model, "metric": judge.metric, "value": value, "n": len(after), **remarks.fields}
            )
        else:
            terminal.result(table(("Model", judge.metric, ">n"), [(model, f"{value:.4f}", str(len(after)))]))
        return 0
    found = compare(judge, before[0], after, budget)
    code = {"missed": 3, "inconclusive": 5}.get(found.verdict or "", 0)
    if json:
        fields = (
            "metric",
            "reference",
            "candidate",
            "drop",
            "ci95",
            "n",
            "method",
            "budget",
            "verdict",
            "needed",
            "constant",
        )
        terminal.json(
            {
                "model": model,
                "against": against,
                **{f: getattr(found, f) for f in fields},
                **remarks.fields,
                "exit_code": code,
            }
        )
        return code
    rows = [
        (str(against), f"{found.reference:.4f}", str(found.n)),
        (model, f"{found.candidate:.4f}", str(found.n)),
    ]
    terminal.result(table(("Model", judge.metric, ">n"), rows))
    terminal.result("")
    terminal.result(facts([("Drop", _words(found))]))
    return code


def _scores(terminal: Terminal, judge: Evaluator, name: str, run: Any) -> list[Any]:
    with terminal.progress.task(f"evaluate {name}") as task:
        return judge.scores(run, progress=task.advance)


def _words(found: Comparison) -> tuple[str, ...]:
    from optkit.report import AccuracyRecord
    from optkit.sentences import accuracy

    record = AccuracyRecord(
        metric=found.metric, reference=found.reference, candidate=found.candidate, drop=found.drop, ci95=found.ci95,
        n=found.n, method=found.method, budget=found.budget, met=found.verdict, needed=found.needed,
        constant=found.constant,
    )  # fmt: skip
    return accuracy(record)
