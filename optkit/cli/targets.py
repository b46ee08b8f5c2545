"""``optkit targets``: the hardware that optkit knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from optkit.targets import Target


@command
def targets(terminal: Terminal, json: options.Json = False) -> int:
    """List the hardware that can be compiled for."""
    from optkit.cli.render import table
    from optkit.targets import TARGETS

    if json:
        terminal.json(
            [
                {
                    "name": t.name,
                    "vendor": t.vendor,
                    "arch": t.arch,
                    "backends": list(t.backends),
                    "formats": sorted(t.formats),
                    "runs_here": t.runs_here,
                    "saturates": t.saturates,
                    "system": t.system or None,
                    "specification": t.specification,
                    "compute_units": list(t.compute_units),
                    "memory": t.memory,
                    "bandwidth": t.bandwidth,
                    "peak": dict(t.peak),
                    "source": t.source,
                }
                for t in TARGETS.values()
            ]
        )
        return 0
    rows = [
        (t.name, t.vendor, t.arch, ", ".join(t.backends), ", ".join(sorted(t.formats)), _system(t), ", ".join(t.compute_units), "yes" if t.runs_here else "no", t.source)
        for t in TARGETS.values()
    ]  # fmt: skip
    terminal.result(
        table(
            (
                "Target",
                "Vendor",
                "Architecture",
                "Backends",
                "Formats",
                "System",
                "Units",
                "Runs here",
                "Figures",
            ),
            rows,
        )
    )
    return 0


def _system(target: Target) -> str:
    """The oldest that an artifact has to run on, and the file format that it reads."""
    return f"{target.system}, format {target.specification}" if target.specification else target.system
