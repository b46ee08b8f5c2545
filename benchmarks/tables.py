"""The command line of benchmarks that write a page with a row for each model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.benchmarks.machine import processor, versions
from optkit.errors import UnknownNameError

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
WHERE = "measured_on"
"""In a row, the processor."""


def processors(result: Mapping[str, Any]) -> str:
    """What the rows of a table were measured on; of several processors all but the commonest with the names of their rows."""
    named: dict[str, list[str]] = {}
    for row in result["models"]:
        named.setdefault(row.get(WHERE, result["machine"]["processor"]["name"]), []).append(row["name"])
    first, *others = sorted(named, key=lambda name: -len(named[name]))
    return "; ".join([first, *(f"{', '.join(named[name])}: {name}" for name in others)])


def table(
    name: str,
    doc: str | None,
    arguments: Sequence[str] | None,
    *,
    known: Sequence[str],
    measure: Callable[[str], Row],
    markdown: Callable[[Mapping[str, Any]], str],
    more: Callable[[], Mapping[str, Any]] = dict,
) -> list[Row]:
    """Measure models, write ``<name>.json`` and ``<name>.md``, and print the page.

    With ``--only`` the rows of other models stay as they are.

    Args:
        doc: Of the module, for ``--help``.
        known: All models, in the order of the rows.
        more: Gives what the record holds beside machine and rows.

    Returns:
        All rows of the page.

    Raises:
        UnknownNameError: ``--only`` names none of ``known``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m optkit.benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a model; may be repeated; the other rows stay as they are",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help=f"for {name}.{{json,md}}")
    options = parser.parse_args(arguments)
    for one in options.only or ():
        if one not in known:
            raise UnknownNameError("model", one, known)
    place = options.out / f"{name}.json"
    before = json.loads(place.read_text("utf-8")) if options.only and place.is_file() else {"models": []}
    # Rows that stay were perhaps measured elsewhere.
    rows = {row["name"]: {WHERE: before["machine"]["processor"]["name"], **row} for row in before["models"]}
    for one in options.only or known:
        print(one, file=sys.stderr, flush=True)
        rows[one] = {**measure(one), WHERE: processor()["name"]}
    models = [rows[one] for one in known if one in rows]
    machine = {"processor": processor(), "versions": versions()}
    result = {"schema": 1, **more(), "machine": machine, "models": models}
    options.out.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (options.out / f"{name}.md").write_text(markdown(result), "utf-8")
    print(markdown(result), end="")
    return models
