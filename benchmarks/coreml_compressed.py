"""What compressed Core ML packages cost: size and accuracy by the models' own evaluators, in the reference evaluator.

    python -m optkit.benchmarks.coreml_compressed --only minilm_l6 --recipe coreml-w4 --out results/

Each recipe is compiled for a Mac with the limit that it shall keep; where it does not, the layers that hurt most get more bits
until it does, and the row says how many. Where the interval leaves open whether it does, what ships is judged once more, on as many
samples as should decide it; where it does not keep the limit on these, layers are chosen anew on 3000. Rows that are measured again take the place of those that are there: sizes do
not depend on the machine, and metrics on its files alone, which are magika's samples. Sizes are shares of the float16 package of the same model. Drops are paired with
ONNX Runtime's results on the file as published, sample by sample. **Nothing here ran on Apple hardware.**
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import optkit
from optkit.artifact import Artifact
from optkit.benchmarks import suite
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.tables import WHERE, processors
from optkit.errors import OptkitError, UnknownNameError
from optkit.evaluate import Budget, Comparison, Evaluator, compare, load_python
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.report import AccuracyRecord, Report

RESULTS = Path(__file__).parent / "results"
TARGET = "mac-m4"
MODELS = ("efficientnet_lite0", "ppocr4_rec", "minilm_l6", "magika")
# Recipe -> what it may lose of the metric, and the largest share of the float16 package that it is for.
RECIPES: Mapping[str, tuple[str, float]] = {
    "coreml-w8": ("0.002", 0.55),
    "coreml-palette4": ("1%", 0.30),
    "coreml-w4": ("1%", 0.30),
    "coreml-int8": ("1%", 0.55),
    "coreml-int8-smooth": ("1%", 0.55),
}
_BATCHES = 48
# Of what would decide a limit half as many more, since it is an estimate, and at most so many samples.
_MORE, _MOST = 1.5, 12_000
# On which the bits of layers are chosen anew where what was chosen on fewer does not keep its limit.
_CHOSEN = 3000


def measure(name: str, recipe: str, folder: Path) -> dict[str, Any]:
    """One recipe on one model."""
    path, file = suite.fetch(name), EVALUATORS / SUITE[name].evaluator
    limit = Budget.parse(RECIPES[recipe][0] if recipe in RECIPES else "1%")
    data = list(islice(load_python(file, "evaluator").calibration(), _BATCHES))
    row: dict[str, Any] = {"name": name, "recipe": recipe, "limit": str(limit), "passes": _lossy(recipe)}

    def compiled(evaluator: Evaluator, out: str) -> tuple[Report, AccuracyRecord | Comparison]:
        """What ships, and what it keeps: on more samples where the first leave its limit open."""
        artifact, report = optkit.compile(
            path, target=TARGET, recipe=recipe, data=data, evaluate=evaluator, max_drop=str(limit), out=folder / out,
            overrides=["repair=true"],
        )  # fmt: skip
        seen = report.manifest.accuracy
        assert seen is not None
        is_open = seen.ci95[1] > limit.absolute(seen.reference) > seen.drop
        return report, _again(artifact, path, file, limit, seen) if is_open else seen

    try:
        report, found = compiled(Evaluator.load(file), recipe)
        if found.n > _CHOSEN and found.drop > limit.absolute(found.reference):
            # Few samples let pass by chance what more do not.
            report, found = compiled(_evaluator(file, _CHOSEN), f"{recipe}-again")
    except OptkitError as error:
        return row | {"reason": str(error)[:600]}
    manifest = report.manifest
    first = next(c for c in report.candidates if c.name == "recipe")
    return row | {
        "bytes": manifest.size.after, "metric": found.metric, "before": found.reference, "after": found.candidate,
        "ci95": found.ci95, "n": found.n, "kept": not report.missed and not report.inconclusive, "plain_drop": first.drop,
        "shipped": next(c.name for c in report.candidates if c.verdict == "shipped"),
        "bits": dict(sorted(Counter(str(layer.bits or 16) for layer in report.layers).items())),
        "seconds": round(report.resources.cpu_seconds), "missed": [*report.missed, *report.inconclusive],
    }  # fmt: skip


def _evaluator(file: Path, samples: int) -> Evaluator:
    """The one of a file on so many samples, or as many as it has."""
    return replace(Evaluator.load(file), samples=partial(load_python(file, "evaluator").samples, samples))


def _again(artifact: Artifact, path: Path, file: Path, limit: Budget, found: AccuracyRecord) -> Comparison:
    """What ships on as many samples as should decide its limit."""
    # That few samples are better than before may be chance.
    left = limit.absolute(found.reference) - max(found.drop, 0.0)
    times = _MORE * ((found.ci95[1] - found.drop) / left) ** 2
    evaluator = _evaluator(file, min(_MOST, math.ceil(times * found.n)))
    before, after = (evaluator.scores(run) for run in (ReferenceSession(path).run, artifact.run))
    return compare(evaluator, before, after, limit)


def _lossy(recipe: str) -> list[dict[str, Any]]:
    """The passes of a recipe that change numbers, with what they are told."""
    return [
        {p.name: p.model_dump(mode="json", exclude_defaults=True)}
        for p in Recipe.load(recipe).passes
        if not p.exact
    ]


def _verdict(row: Mapping[str, Any]) -> str:
    """Of the recipe: whether what ships is more than float, and its whole interval within the limit."""
    if not row["kept"]:
        return f"missed: ships {'float16' if row['shipped'] == 'unquantized' else 'float'}"
    allowed = Budget.parse(row["limit"]).absolute(row["before"])
    if row["before"] - row["after"] > allowed:
        return "missed on more samples"
    return "met" if row["ci95"][1] <= allowed else "undecided"


def _is_older(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the recipe as it was before.

    Rows that do not say which passes they are of come from before they did; of them, recipes that choose bits were measured before they did so where
    there are none, and ``coreml-w4`` before it knew tables.
    """
    if "passes" in row:
        return bool(row["passes"] != _lossy(row["recipe"]))
    if row["recipe"] == "coreml-w4":
        return True
    return (
        "bits" not in row
        and row["recipe"] in ("coreml-w8", "coreml-palette4")
        and "mixed" not in row["shipped"]
    )


def _shipped(row: Mapping[str, Any]) -> str:
    """Its name, and how many layers have how many bits where they were chosen."""
    if not row.get("bits"):
        return str(row["shipped"])
    found = sorted(row["bits"].items(), key=lambda kv: int(kv[0]))
    return f"{row['shipped']}: {', '.join(f'{n} of {bits} bits' for bits, n in found)}"


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    named = [{**row, "name": f"{row['name']} {row['recipe']}"} for row in result["models"]]
    lines = [
        "# Compressed Core ML packages",
        "",
        f"{processors({**result, 'models': named})}. " + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()) + ".",
        "",
        "Verified by the reference evaluator, not executed on Apple hardware. The drop as the recipe alone has it, and of what ships: layers that",
        "hurt most get more bits where it misses its limit. Sizes are shares of the float16 package. Undecided: the drop keeps the limit, the",
        "end of its 95% interval does not, nor on more samples, as far as there are any. Missed on more samples: on those that it was chosen",
        "with it kept the limit.",
        "Written by `python -m optkit.benchmarks.coreml_compressed`, which says how.",
        "",
        "| model | recipe | metric | samples | float → shipped (drop at most) | allowed | limit | recipe alone loses | ships | of float16's size | goal |",
        "|" + " --- |" * 11,
    ]  # fmt: skip
    halves = {
        m["name"]: m["bytes"] for m in result["models"] if m["recipe"] == "coreml-fp16" and "bytes" in m
    }
    for row in result["models"]:
        if "reason" in row:
            lines.append(f"| {row['name']} | {row['recipe']} | fails |" + " - |" * 8)
            continue
        share = row["bytes"] / halves[row["name"]]
        goal = RECIPES[row["recipe"]][1] if row["recipe"] in RECIPES else 1.0
        alone = "-" if row["plain_drop"] is None else f"{row['plain_drop']:+.4f}"
        lines.append(
            f"| {row['name']} | {row['recipe']}{' ¹' if _is_older(row) else ''} | {row['metric']} | {row['n']} | {row['before']:.4f} → {row['after']:.4f} ({row['ci95'][1]:+.4f}) "
            f"| {row['limit']} | {_verdict(row)} | {alone} | {_shipped(row)} | {share:.2f} | {'≤' if share <= goal else '>'} {goal:g} |"
        )
    reasons = [
        f"* {m['name']}, {m['recipe']}: {' '.join(m['reason'].split())}"
        for m in result["models"]
        if "reason" in m
    ]
    if any("reason" not in m and _is_older(m) for m in result["models"]):
        lines += [
            "", "¹ Of the recipe as it was before, when it knew fewer forms or weights did not make up for each other's errors; not measured again yet."
        ]  # fmt: skip
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def merged(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, in the order of models and recipes; what is new takes the place of what was there."""
    every = {(r["name"], r["recipe"]): r for r in (*before, *after)}
    order = ("coreml-fp16", *RECIPES)
    return sorted(
        every.values(), key=lambda r: ([*MODELS, r["name"]].index(r["name"]), order.index(r["recipe"]))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.coreml_compressed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a model of the suite; may be repeated"
    )
    parser.add_argument(
        "--recipe", action="append", metavar="NAME", help="one of the recipes; may be repeated"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="for coreml_compressed.{json,md}"
    )
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in SUITE:
            raise UnknownNameError("model", name, SUITE)
    every = ("coreml-fp16", *RECIPES)
    for name in options.recipe or ():
        if name not in every:
            raise UnknownNameError("recipe", name, every)
    rows = []
    for name in options.only or MODELS:
        for recipe in options.recipe or every:
            print(name, recipe, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f"optkit-{name}-") as folder:
                rows.append({**measure(name, recipe, Path(folder)), WHERE: processor()["name"]})
    options.out.mkdir(parents=True, exist_ok=True)
    if (kept := options.out / "coreml_compressed.json").is_file():
        before = json.loads(kept.read_text("utf-8"))
        # Rows that stay were perhaps measured elsewhere.
        where = before["machine"]["processor"]["name"]
        rows = merged([{WHERE: where, **row} for row in before["models"]], rows)
    result = {"schema": 1, "machine": {"processor": processor(), "versions": versions()}, "models": rows}
    (options.out / "coreml_compressed.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (options.out / "coreml_compressed.md").write_text(markdown(result), "utf-8")
    print(markdown(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
