"""Run the families through every stage and write the matrix.

    pip install 'optkit[families]'
    python -m optkit.benchmarks.families --only vision,text --stages litert

Each family runs in a process of its own on one thread, within limits on processor time and memory. With ``--only`` the other
rows stay as they are, with ``--stages`` what others found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from optkit.benchmarks.families import matrix
from optkit.benchmarks.families.catalogue import KINDS, table
from optkit.benchmarks.families.stages import STAGES, Row, examine
from optkit.benchmarks.machine import processor

FOLDER = Path(__file__).parents[1]
_SECONDS, _BYTES = 240, 8 << 30
_PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "coremltools",
    "ai-edge-litert",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    kind: str
    name: str
    process: Any
    mine: Connection[Any, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m optkit.benchmarks.families", description=__doc__)
    parser.add_argument(
        "--only", default=",".join(KINDS), help=f"kinds or families; kinds: {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES[2:]), help=f"behind the export: {', '.join(STAGES[2:])}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder for families.md and results/families.json"
    )
    given = parser.parse_args(arguments)
    wanted = _wanted([name.strip() for name in given.only.split(",") if name.strip()], parser)
    place = given.out / "results" / "families.json"
    rows: dict[str, dict[str, Any]] = {}
    processors: dict[str, str] = {}
    if place.exists():
        before = json.loads(place.read_text())
        rows, processors = {r["name"]: r for r in before["rows"]}, before["processors"]
    torch.set_num_threads(1)
    stages = [name.strip() for name in given.stages.split(",")]
    if odd := sorted(set(stages) - set(STAGES[2:])):
        parser.error(f"no stage is called {', '.join(odd)}")
    processors |= dict.fromkeys((*STAGES[:2], *stages), processor()["name"])
    for row in _run(wanted, given.jobs, stages):
        rows[row["name"]] = _merged(rows.get(row["name"]), row, stages)
        print(
            f"{row['name']}: {', '.join(row['passed']) or 'nothing'} in {row['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
        for stage, reason in row["failed"].items():
            print(f"  {stage}: {reason}", file=sys.stderr, flush=True)
        order = [name for kind in KINDS for name in table(kind)]
        kept = [rows[name] for name in order if name in rows]
        used = {name: version(name) for name in _PACKAGES}
        found = {"processors": processors, "versions": used, "rows": kept}
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "families.md").write_text(matrix.written(found))
    return 0


def _merged(old: dict[str, Any] | None, new: dict[str, Any], stages: Sequence[str]) -> dict[str, Any]:
    """The row with what ``old`` has of stages that did not run anew."""
    if old is None or "onnx" not in new["passed"] or len(stages) == len(STAGES[2:]):
        return new
    anew = {*STAGES[:2], *stages}
    passed = {*new["passed"], *(s for s in old["passed"] if s not in anew)}
    merged = {
        key: new[key] | {stage: found for stage, found in old[key].items() if stage not in anew}
        for key in ("errors", "failed")
    }
    kept = {
        "seconds": old["seconds"],
        **({} if "onnxruntime" in stages else {"nodes": old["nodes"]}),
        **({} if "coreml" in stages else {"fixed": old["fixed"]}),
        **({} if "int8" in stages else {"in_float": old["in_float"]}),
    }
    return new | merged | kept | {"passed": [s for s in STAGES if s in passed]}


def _wanted(names: Sequence[str], parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    found = []
    for name in names:
        kinds = [name] if name in KINDS else [k for k in KINDS if name in table(k)]
        if not kinds:
            parser.error(f"no kind or family is called {name!r}")
        found += [(kind, family) for kind in kinds for family in table(kind) if name in (kind, family)]
    return found


def _run(wanted: Sequence[tuple[str, str]], jobs: int, stages: Sequence[str]) -> Any:
    """Rows as they come; a child is forked once its libraries are imported, which would take longer than its work."""
    context = multiprocessing.get_context("fork")
    left, running = list(wanted), list[_Running]()
    while left or running:
        while left and len(running) < jobs:
            kind, name = left.pop(0)
            table(kind)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(kind, name, theirs, stages))
            process.start()
            theirs.close()
            running.append(_Running(kind=kind, name=name, process=process, mine=mine))
        for child in [c for c in running if c.mine.poll(0.1)]:
            running.remove(child)
            try:
                yield child.mine.recv()
            except EOFError:
                child.process.join()
                lost = Row(name=child.name, kind=child.kind)
                code = child.process.exitcode
                lost.failed["export"] = f"the process ended with {code}: out of time or memory, or a crash"
                yield asdict(lost)
            child.process.join()


def _child(kind: str, name: str, out: Connection[Any, Any], stages: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    out.send(asdict(examine(name, kind, table(kind)[name], stages)))


if __name__ == "__main__":
    sys.exit(main())
