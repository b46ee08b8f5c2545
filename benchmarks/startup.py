"""What a user waits for and what a user installs: CPU time of ``optkit --help``, and the size of an environment.

    python -m optkit.benchmarks.startup --runs 20
    python -m optkit.benchmarks.startup --install .

``--install`` makes a fresh environment, installs what it is given with pip, and adds up the files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optkit.benchmarks.machine import processor, versions

_COMMANDS = {
    "python": ["-c", "pass"],
    "import optkit": ["-c", "import optkit"],
    "optkit --help": ["-m", "optkit", "--help"],
    "import numpy": ["-c", "import numpy"],
    "import onnxruntime": ["-c", "import onnxruntime"],
}


def startup(runs: int) -> dict[str, dict[str, float]]:
    """Median and largest CPU milliseconds of each command, in turn, after one run that fills the caches."""
    times: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for i in range(runs + 1):
        for name, arguments in _COMMANDS.items():
            before = os.times()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            spent = (
                after.children_user + after.children_system - before.children_user - before.children_system
            )
            if i:
                times[name].append(spent * 1e3)
    return {
        name: {"cpu_ms": round(statistics.median(ms)), "largest_ms": round(max(ms))}
        for name, ms in times.items()
    }


def _children() -> float:
    """CPU seconds of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def installed(requirement: str) -> dict[str, Any]:
    """Megabytes of a fresh environment with ``requirement`` and what that needs, by package folder."""
    with tempfile.TemporaryDirectory(prefix="optkit-venv-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        empty = _size(Path(folder))
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        site = next(Path(folder).glob("[Ll]ib*/**/site-packages"))
        largest = sorted(((_size(p), p.name) for p in site.iterdir() if p.is_dir()), reverse=True)[:8]
        total = _size(Path(folder)) - empty
    return {
        "added_mb": round(total / 1e6),
        "largest_mb": {name: round(size / 1e6) for size, name in largest},
    }


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=20, help="of each command")
    parser.add_argument(
        "--install", metavar="REQUIREMENT", help="what pip installs: a folder, a wheel, or a name"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, beside the one on stdout")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"schema": 1, "processor": processor(), "versions": versions()}
    record["startup"] = startup(options.runs)
    if options.install:
        record["installed"] = installed(options.install)
    text = json.dumps(record, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
