"""Measurements as they are kept: JSON with a schema, a Markdown page, a table on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optkit.report import Ceilings


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Machine(_Record):
    """Where and with what it was measured."""

    processor: dict[str, Any]
    versions: dict[str, str]


class Row(_Record):
    """One way to run a model.

    Attributes:
        bytes: Of its file or files.
        note: What shipped, and what the request missed.
        make_seconds: CPU time that compiling or quantizing took.
        error: Why there is no more to say.
        speedup: Median over rounds of ``reference / this``.
        drop: ``reference - this`` in units of the metric.
        roofline: Share of this machine's roofline that it reaches, for the first inputs; None where nothing tells.
        formats: Share of the multiply-accumulates by arithmetic, read back from the runtime.
        verdict: Of the drop against 1 % of the reference's metric: met, missed, or inconclusive with these samples.
    """

    name: str
    bytes: int | None
    note: str
    make_seconds: float
    error: str | None
    cpu_ms: float | None = None
    p99_ms: float | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    metric: float | None = None
    drop: float | None = None
    drop_ci95: tuple[float, float] | None = None
    n: int | None = None
    verdict: Literal["met", "missed", "inconclusive"] | None = None
    roofline: float | None = None
    formats: dict[str, float] | None = None


class Versus(_Record):
    """One of optkit's own against the fastest peer that stays within the accuracy budget, or may: rounds in turn.

    Attributes:
        ratio: Median over rounds of ``peer / ours``.
        drop: ``peer - ours`` in units of the metric, on the samples that both saw; None where one was not evaluated.
        drop_ci95: Its 95 % interval, sample by sample.
    """

    ours: str
    peer: str
    ratio: float
    ci95: tuple[float, float]
    drop: float | None = None
    drop_ci95: tuple[float, float] | None = None


class ModelResult(_Record):
    """All ways to run a model, the reference first."""

    name: str
    kind: str
    requirement: str
    accurate: bool
    metric: str | None
    calibration: int
    rounds: int
    rows: tuple[Row, ...]
    versus: tuple[Versus, ...] = ()
    peak_bytes: int | None = None
    ceilings: Ceilings | None = None


class CpuResult(_Record):
    """A run of the CPU benchmark."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    machine: Machine
    models: tuple[ModelResult, ...]

    def merged_into(self, older: CpuResult) -> CpuResult:
        """These models in place of the same ones of ``older``, if that is of the same machine and versions.

        How many of its cores a run was allowed does not count: all is timed on one thread.
        """
        same = older.machine.processor | {"cores": 0} == self.machine.processor | {"cores": 0}
        if not same or older.machine.versions != self.machine.versions:
            return self
        models = {model.name: model for model in (*older.models, *self.models)}
        return CpuResult(machine=self.machine, models=tuple(models.values()))


def read(file: Path) -> CpuResult:
    """Read what ``write`` wrote."""
    return CpuResult.model_validate_json(file.read_text("utf-8"))


def write(result: CpuResult, folder: Path) -> None:
    """Write ``cpu.json`` and ``cpu.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(result.model_dump_json(by_alias=True, indent=1) + "\n", "utf-8")
    (folder / "cpu.md").write_text(markdown(result), "utf-8")


HEAD = (
    "variant",
    "CPU ms",
    "speed-up [95 %]",
    "metric",
    "drop [95 %]",
    "budget kept",
    "roofline",
    "MB",
    "note",
)


def markdown(result: CpuResult) -> str:
    """The page for readers."""
    chip = result.machine.processor
    lines = [
        "# CPU",
        "",
        f"{chip['name']} ({', '.join(chip['flags']) or chip['architecture']}), one thread. "
        + ", ".join(f"{name} {number}" for name, number in result.machine.versions.items())
        + ".",
        "",
        "Median CPU time of a call; variants in turn, in random order, each in its process; ratios within a round to",
        "ONNX Runtime fp32 with its default settings on the file as published. Every quantizer had the same calibration",
        "data. Written by `python -m optkit.benchmarks.cpu`, which says how.",
    ]
    for model in result.models:
        lines += [
            "",
            f"## {model.name}",
            "",
            _caption(model),
            "",
            f"| {' | '.join(HEAD)} |",
            f"|{' --- |' * len(HEAD)}",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(model)]
        if model.versus:
            lines += ["", *map(_against, model.versus)]
    return "\n".join(lines) + "\n"


def render(result: CpuResult) -> None:
    """Print the tables; as Markdown where nobody watches."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(markdown(result), end="")
        return
    for model in result.models:
        table = Table(*HEAD, title=model.name, caption=_caption(model))
        for cells in _cells(model):
            table.add_row(*cells)
        console.print(table)


def _against(found: Versus) -> str:
    line = f"* {found.ours} over {found.peer}: {found.ratio:.2f}{interval(found.ci95, '.2f')}"
    if found.drop is None:
        return line
    return f"{line}, of the metric it loses {found.drop:+.4f}{interval(found.drop_ci95, '+.4f')} to that"


def _caption(model: ModelResult) -> str:
    origin = f" ({model.requirement})" if model.requirement else ""
    samples = next((row.n for row in model.rows if row.n), None)
    judged = f"{model.metric}, n = {samples}"
    if not model.accurate:
        judged += ", random weights: no accuracy"
    return f"{model.kind}{origin}; {judged}; {model.calibration} calibration batches; {model.rounds} rounds."


def _cells(model: ModelResult) -> Iterator[tuple[str, ...]]:
    for row in model.rows:
        if row.cpu_ms is None:
            yield (
                row.name,
                *["-"] * 6,
                _megabytes(row.bytes),
                f"failed: {row.error}".replace("|", "/"),
            )
            continue
        note = (f"failed: {row.error}" if row.error else row.note).replace("|", "/")
        yield (
            row.name,
            f"{row.cpu_ms:.2f}",
            "1" if row.speedup is None else f"{row.speedup:.2f}{interval(row.speedup_ci95, '.2f')}",
            "-" if row.metric is None else f"{row.metric:.4f}",
            "-" if row.drop is None else f"{row.drop:+.4f}{interval(row.drop_ci95, '+.4f')}",
            row.verdict or "-",
            "-" if row.roofline is None else f"{row.roofline * 100:.0f} %",
            _megabytes(row.bytes),
            note,
        )


def interval(bounds: tuple[float, float] | None, style: str) -> str:
    """Behind a number, in brackets; nothing where there is none."""
    return "" if bounds is None else f" [{bounds[0]:{style}}, {bounds[1]:{style}}]"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"
