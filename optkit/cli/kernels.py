"""``optkit kernels``: list, build, check and inspect the fused kernels."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from optkit.targets import Target
    from optkit.workbench import Sheet

app = typer.Typer(rich_markup_mode=None)

_Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KERNEL]...", help="Names of kernels; all by default.", show_default=False),
]
_Targets = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", help="A GPU; may be repeated. By default one of each architecture."),
]
_Rows = Annotated[int, typer.Option("--rows", min=1, help="Size of the free axis that floors are for.")]
# One of each architecture.
_DEFAULT = ("a100", "l4", "h100", "b200", "rtx5090")
_NOT_RUN = "compiled and inspected here; nothing was run on a GPU; floors (cold caches) and estimates are no measurements"


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """List, build, check and inspect the fused kernels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
@command
def list_(terminal: Terminal, json: options.Json = False) -> int:
    """List the kernels: what they compute, in which formats, and where the method comes from."""
    from optkit.cli.render import table
    from optkit.workbench import chosen

    rows: list[dict[str, Any]] = [
        {
            "name": k.name, "op": f"optkit.{k.op}", "formats": list(k.formats), "source": k.source,
            "what": str(type(k).__doc__).partition("\n")[0].replace("``", ""),
        }
        for k in chosen(())
    ]  # fmt: skip
    if json:
        terminal.json(rows)
    else:
        terminal.result(
            table(
                ("Kernel", "Operator", "Formats", "What it computes", "Source"),
                [(r["name"], r["op"], ", ".join(r["formats"]), r["what"], r["source"]) for r in rows],
            )
        )
    return 0


@app.command("build")
@command
def build(
    terminal: Terminal,
    kernels: _Names = None,
    target: _Targets = None,
    rows: _Rows = 4096,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compile what is in the cache too.", show_default=False)
    ] = False,
    json: options.Json = False,
) -> int:
    """Compile kernels to machine code, without a GPU, and tell what is in it.

    The files stay in $OPTKIT_CACHE/kernels. Exit code 1 where a gate fails.
    """
    from optkit.workbench import refused, sheets

    targets = _targets(target)
    found = sheets(kernels or (), targets, rows=rows, fresh=fresh)
    for line in refused(kernels or (), targets):
        terminal.log(f"not built: {line}")
    if json:
        terminal.json([_record(sheet) for sheet in found])
    else:
        terminal.result(_table(found))
        terminal.say(
            f"{sum(not s.cached for s in found)} compiled, {sum(s.cached for s in found)} from the cache"
        )
        terminal.say(_NOT_RUN)
    return _refused(terminal, found)


@app.command("check")
@command
def check(
    terminal: Terminal, kernels: _Names = None, target: _Targets = None, json: options.Json = False
) -> int:
    """Build, hold the machine code against the gates, and the arithmetic in Triton's interpreter against float64.

    All programs among which a device chooses are built; those that a bundle would leave out are named.

    Where the package ttsem is installed, every access is held against the tensors, and blocks against each other, too.
    Exit code 1 where a gate, a number or an access fails.
    """
    from optkit.cli.render import table
    from optkit.kernels.numerics import sanitizer
    from optkit.workbench import finalists, memory, numerics, sheets

    targets = _targets(target)
    found = sheets(kernels or (), targets)
    choice = finalists(kernels or (), targets)
    missing = [(f.target, one) for f in choice for one in f.left_out]
    capabilities = sorted({t.capability for t in targets if t.capability})
    numbers = [n for c in capabilities for n in numerics(kernels or (), c)]
    accesses = [m for c in capabilities for m in memory(kernels or (), c)] if sanitizer() else None
    faults = [m for m in accesses or () if m.fault]
    wrong = [n for n in numbers if not n.steps <= n.allowed]
    if json:
        terminal.json(
            {
                "kernels": [_record(sheet) for sheet in found],
                "left_out": [{**asdict(one), "target": name} for name, one in missing],
                "numerics": [asdict(n) for n in numbers],
                "memory": None if accesses is None else [asdict(m) for m in accesses],
                "ran_on_device": False,
            }
        )
    else:
        worst: dict[tuple[str, str], Any] = {}
        for n in numbers:
            at = (n.kernel, str(n.problem["format"]))
            worst[at] = max(worst.get(at, n), n, key=lambda n: n.steps / n.allowed)
        terminal.result(_table(found))
        terminal.say(
            f"{sum(bool(f.left_out) for f in choice)} of {len(choice)} finalists, among which a device chooses, are left out"
        )
        terminal.result(
            table(
                ("Kernel", "Format", ">Worst error, steps", ">Allowed", ">Launches"),
                [
                    (
                        *at,
                        f"{n.steps:.2f}",
                        f"{n.allowed:.2f}",
                        str(sum((m.kernel, m.problem["format"]) == at for m in numbers)),
                    )
                    for at, n in worst.items()
                ],
            )
        )
        terminal.say("numbers are those of Triton's interpreter on this CPU, against float64")
        if accesses is None:
            terminal.say("accesses and races were not checked: ttsem is not installed (pip install ttsem)")
        else:
            judged = sum(not m.unjudged for m in accesses)
            terminal.say(
                f"accesses and races: {judged} of {len(accesses)} launches checked by ttsem, {len(faults)} faults"
            )
        terminal.say(_NOT_RUN)
    for name, one in missing:
        terminal.log(f"left out: {one.kernel} ({one.config}) for {name}: {one.gate}: {one.found}")
    for n in wrong:
        terminal.log(
            f"{n.kernel} {dict(n.problem)}, {n.rows} rows: {n.steps:.3g} steps off, {n.allowed:.3g} allowed"
        )
    for m in faults:
        terminal.log(f"{m.kernel} {dict(m.problem)}, {m.rows} rows: {m.fault}")
    return max(_refused(terminal, found), int(bool(wrong or faults)))


@app.command("inspect")
@command
def inspect(
    terminal: Terminal,
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="Its name.", show_default=False)],
    target: _Targets = None,
    rows: _Rows = 4096,
    json: options.Json = False,
) -> int:
    """Show all that is known of a kernel's machine code."""
    from optkit.cli.render import facts
    from optkit.workbench import sheets

    found = sheets([kernel], _targets(target), rows=rows)
    if json:
        terminal.json([_record(sheet) for sheet in found])
        return 0
    for sheet in found:
        terminal.result(facts([(name, lines) for name, lines in _facts(sheet)]))
    terminal.say(_NOT_RUN)
    return 0


def _targets(names: list[str] | None) -> list[Target]:
    from optkit.targets import target

    return [target(name) for name in names or _DEFAULT]


def _problem(sheet: Sheet) -> str:
    return " ".join(
        str(v) if isinstance(v, str) else f"{k}={v}" for k, v in sheet.problem.items() if k != "epsilon"
    )


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}"


def _table(found: list[Sheet]) -> Any:
    from optkit.cli.render import table

    rows = []
    for s in found:
        r, e = s.record, s.estimate
        failed = [g.name for g in s.gates if not g.passed and not g.waived]
        rows.append(
            (
                s.kernel, _problem(s), s.target, r["arch"], str(r["registers"]), str(r["stack"]), str(r["shared"]),
                str(r["warps"]), f"{s.occupancy.share:.0%}", _microseconds(e.floor),
                f"{_microseconds(e.low)} - {_microseconds(e.high)}", e.bound, ", ".join(failed) or "all pass",
            )
        )  # fmt: skip
    heads = (
        "Kernel", "Problem", "Target", "Code", ">Registers", ">Stack", ">Shared", ">Warps", ">Occupancy", ">Floor us",
        ">Estimate us", "Bound", "Gates",
    )  # fmt: skip
    return table(heads, rows)


def _refused(terminal: Terminal, found: list[Sheet]) -> int:
    bad = [(s, g) for s in found for g in s.gates if not g.passed and not g.waived]
    for sheet, gate in bad:
        terminal.log(f"{sheet.kernel} {_problem(sheet)} for {sheet.target}: {gate.name}: {gate.found}")
    return int(bool(bad))


def _facts(sheet: Sheet) -> list[tuple[str, list[str]]]:
    record, program, o, e = sheet.record, sheet.record["program"], sheet.occupancy, sheet.estimate
    shapes = " ".join(str(list(shape)) for shape in sheet.shapes)
    return [
        (sheet.kernel, [f"{_problem(sheet)} for {sheet.target} ({record['arch']})"]),
        ("Source", [program["function"]]),
        ("Constants", [", ".join(f"{k}={v}" for k, v in program["constants"].items() if v is not None)]),
        ("Arguments", [f"{a['name']}: {a['type']} = {a['binds']}" for a in program["arguments"]]),
        ("Promised", ["multiples of 16: " + ", ".join(a["name"] for a in program["arguments"] if a["aligned"])]),
        ("Grid", [" x ".join(program["grid"])]),
        ("Code", [f"{record['bytes']} bytes, sha256 {record['sha256']}, Triton {record['triton']}"]),
        ("Registers", [f"{record['registers']} a thread, {record['stack']} bytes of stack"]),
        ("Shared memory", [f"{record['shared']} bytes, {record['scratch']} bytes of global scratch a block"]),
        ("Occupancy", [f"{o.blocks} blocks of {record['warps']} warps, {o.share:.0%} of the warps, by {o.limit}"]),
        ("Instructions", [", ".join(f"{n} {k}" for k, n in _mix(record["instructions"]))]),
        ("Floor", [f"{_microseconds(e.floor)} us with cold caches, {e.bound}, for {shapes}: not a measurement"]),
        ("Estimate", [f"{_microseconds(e.low)} to {_microseconds(e.high)} us: an expectation, not a measurement"]),
        ("Gates", [f"{'pass' if g.passed else 'waived: ' + g.waived if g.waived else 'FAIL'}: {g.name}, {g.found}" for g in sheet.gates]),
    ]  # fmt: skip


def _mix(instructions: dict[str, int]) -> list[tuple[str, int]]:
    """Counts that tell how a kernel works: memory, matrices, barriers."""
    kinds = (
        "LD",
        "ST",
        "UTMA",
        "UBLKCP",
        "HMMA",
        "IMMA",
        "QMMA",
        "HGMMA",
        "IGMMA",
        "QGMMA",
        "UTC",
        "BAR",
        "SHFL",
        "MUFU",
    )
    found = [(name, n) for name, n in instructions.items() if name.startswith(kinds)]
    return sorted(found, key=lambda row: (-row[1], row[0]))[:16]


def _record(sheet: Sheet) -> dict[str, Any]:
    return {**asdict(sheet), "passed": sheet.passed, "ran_on_device": False}
