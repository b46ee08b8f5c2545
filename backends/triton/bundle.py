"""The files of an artifact: the graph, the kernels' machine code with what was read from it, and the launches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import ModelError, UnsupportedOpError
from optkit.graph import describe, walk
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN
from optkit.kernels.build import build
from optkit.kernels.gates import failures, gates
from optkit.ops import spec
from optkit.rewrite import label
from optkit.store import save

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.kernels.base import Kernel, Problem
    from optkit.targets import Target

MODEL, LAUNCHES, FOLDER = "model.onnx", "launches.json", "kernels"


def kernels() -> dict[str, Kernel]:
    """Every kernel, by its operator."""
    return {kernel.op: kernel for kernel in (KERNELS[name]() for name in KERNELS)}


def refusal(node: ir.Node, target: Target) -> str | None:
    """Why a call of the domain ``optkit`` has no program for a target; None for all other nodes."""
    if node.domain != DOMAIN:
        return None
    kernel = kernels().get(node.op_type)
    if kernel is None:
        return "no kernel has this name"
    found = kernel.problem(node)
    assert target.capability is not None
    return found if isinstance(found, str) else kernel.unsupported(found, target.capability)


def write(model: ir.Model, target: Target, path: Path) -> None:
    """Compile what the graph calls, hold it against the gates, and write all files.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: The graph calls no kernel, or machine code does not pass its gates.
        UnsupportedOpError: Lists the calls that have no program.
    """
    assert target.capability is not None
    calls, problems = _calls(model, target)
    if problems:
        raise UnsupportedOpError(f"kernels for {target.name}", problems)
    if not calls:
        raise ModelError(
            "the graph calls no kernel, so there is nothing to compile",
            hint="the pass call-kernels makes the calls; optkit inspect MODEL --why tells what it left alone",
        )
    programs = [kernel.program(problem, target.capability) for _, kernel, problem in calls]
    unique = {program.digest(): program for program in programs}
    built = build([(program, target.capability) for program in unique.values()])
    bad = [
        f"{program.function} {why}"
        for program, one in zip(unique.values(), built, strict=True)
        for why in failures(one.record)
    ]
    if bad:
        raise ModelError(f"machine code for {target.arch} does not pass its gates: {'; '.join(bad)}")
    save(model, path / MODEL)
    folder, names = path / FOLDER, {}
    folder.mkdir()
    for digest, one in zip(unique, built, strict=True):
        name = names[digest] = f"{one.record['entry']}-{digest[:12]}"
        shutil.copyfile(one.cubin, folder / f"{name}.cubin")
        verdicts = [
            {"gate": g.name, "found": g.found, "passed": g.passed, "waived": g.waived}
            for g in gates(one.record)
        ]
        _json(folder / f"{name}.json", {**one.record, "gates": verdicts})
    rows = [
        {
            "node": label(node), "op": node.op_type, "kernel": names[program.digest()],
            "inputs": [None if v is None else v.name for v in node.inputs],
            "outputs": [v.name if v.uses() or v.is_graph_output() else None for v in node.outputs],
            "sizes": kernel.expressions(problem), "grid": list(program.grid),
        }
        for (node, kernel, problem), program in zip(calls, programs, strict=True)
    ]  # fmt: skip
    left = [label(node) for node in walk(model) if node.domain != DOMAIN and _computes(node)]
    _json(path / LAUNCHES, {"launches": rows, "without_kernel": left})


def read(path: Path) -> Mapping[str, Any]:
    """What ``write`` wrote about the launches.

    Raises:
        ModelError: It is missing.
    """
    file = path / LAUNCHES
    if not file.is_file():
        raise ModelError(f"{LAUNCHES} is missing")
    found: Mapping[str, Any] = json.loads(file.read_bytes())
    return found


def _calls(
    model: ir.Model, target: Target
) -> tuple[list[tuple[ir.Node, Kernel, Problem]], list[tuple[str, str]]]:
    found, problems, known = [], [], kernels()
    for node in walk(model):
        if node.domain != DOMAIN:
            continue
        if (why := refusal(node, target)) is not None:
            problems.append((describe(node), why))
            continue
        kernel = known[node.op_type]
        problem = kernel.problem(node)
        assert not isinstance(problem, str)
        found.append((node, kernel, problem))
    return found, problems


def _computes(node: ir.Node) -> bool:
    known = spec(node)
    quiet = node.op_type == "Constant" or (known is not None and known.family == "shape")
    return not quiet


def _json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
