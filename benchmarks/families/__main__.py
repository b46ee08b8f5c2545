"""Run the families through every stage and write the matrix.

    pip install 'optkit[families]'
    python -m optkit.benchmarks.families --only vision,text

Each family runs in a process of its own on one thread, within limits on processor time and memory. With ``--only`` the other
rows stay as they are.
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
from optkit.benchmarks.families.stages import Row, examine
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
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder for families.md and results/families.json"
    )
    given = parser.parse_args(arguments)
    wanted = _wanted([name.strip() for name in given.only.split(",") if name.strip()], parser)
    place = given.out / "results" / "families.json"
    rows: dict[str, dict[str, Any]] = {}
    if place.exists():
        rows = {r["name"]: r for r in json.loads(place.read_text())["rows"]}
    torch.set_num_threads(1)
    for row in _run(wanted, given.jobs):
        rows[row["name"]] = row
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
        found = {"processor": processor()["name"], "versions": used, "rows": kept}
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "families.md").write_text(matrix.written(found))
    return 0


def _wanted(names: Sequence[str], parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    found = []
    for name in names:
        kinds = [name] if name in KINDS else [k for k in KINDS if name in table(k)]
        if not kinds:
            parser.error(f"no kind or family is called {name!r}")
        found += [(kind, family) for kind in kinds for family in table(kind) if name in (kind, family)]
    return found


def _run(wanted: Sequence[tuple[str, str]], jobs: int) -> Any:
    """Rows as they come; a child is forked once its libraries are imported, which would take longer than its work."""
    context = multiprocessing.get_context("fork")
    left, running = list(wanted), list[_Running]()
    while left or running:
        while left and len(running) < jobs:
            kind, name = left.pop(0)
            table(kind)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(kind, name, theirs))
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


def _child(kind: str, name: str, out: Connection[Any, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    out.send(asdict(examine(name, kind, table(kind)[name])))


if __name__ == "__main__":
    sys.exit(main())
