"""``optkit finalize``: what is left to do on the device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command


@command
def finalize(
    terminal: Terminal,
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="The folder that compile wrote.", show_default=False),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Repeat steps that are done.", show_default=False)
    ] = False,
    json: options.Json = False,
) -> int:
    """Do on the device what compile left: build the engine, compare its outputs, measure.

    It can be interrupted and started again. What was found goes into device.json, the evidence into the manifest.
    """
    from optkit.artifact import DEVICE
    from optkit.cli.render import table
    from optkit.finish import finalize
    from optkit.sentences import measured_on

    found = finalize(artifact, force=force, progress=terminal.progress)
    if json:
        terminal.json({"artifact": str(artifact), **asdict(found)})
        return 0
    terminal.say(measured_on(found))
    rows = [
        (
            ", ".join(f"{name} {shape}" for name, shape in batch["inputs"].items()),
            f"{batch['median_ms']:.4f}", f"{batch['p99_ms']:.4f}", f"{batch['stdev_ms']:.4f}", str(batch["runs"]),
        )
        for batch in found.batches
    ]  # fmt: skip
    terminal.say(table(("Inputs", ">Median ms", ">99th percentile", ">Deviation", ">Runs"), rows))
    terminal.say(f"lowest cosine to the outputs on a CPU: {found.cosine:.6f}; all of it is in {DEVICE}")
    for step in found.left:
        terminal.say(f"still to be done: {step}")
    terminal.result(str(artifact))
    return 0
