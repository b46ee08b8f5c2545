"""The files of an artifact: the graph, the kernels' machine code with what was read from it, and the launches."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.backends.triton.schedule import Segment, schedule
from optkit.errors import ModelError, UnsupportedOpError
from optkit.graph import describe, rank, walk
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN, TYPES
from optkit.kernels.build import build
from optkit.kernels.expressions import symbols
from optkit.kernels.gates import gates, left_out
from optkit.kernels.rules import missed
from optkit.ops import spec
from optkit.rewrite import label
from optkit.store import save
from optkit.targets.gpu import code_kind

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.kernels.base import Kernel, Problem
    from optkit.targets import Target

MODEL, LAUNCHES, FOLDER = "model.onnx", "launches.json", "kernels"
VERSION = 4

logger = logging.getLogger(__name__)


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
            hint=missed(model, [n for n in walk(model) if _computes(n)], target.capability)
            or "the pass call-kernels makes the calls",
        )
    programs = [kernel.finalists(problem, target.capability) for _, kernel, problem in calls]
    unique = {program.digest(): program for found in programs for program in found}
    built = dict(zip(unique, build([(p, target.capability) for p in unique.values()]), strict=True))
    bad = {
        p.digest(): left_out(kernel.name, p, built[p.digest()].record)
        for (_, kernel, _), found in zip(calls, programs, strict=True)
        for p in found
    }
    fit = [[p.digest() for p in found if not bad[p.digest()]] for found in programs]
    if not all(fit):
        why = dict.fromkeys(
            w for d, found in zip(fit, programs, strict=True) if not d for p in found for w in bad[p.digest()]
        )
        raise ModelError(
            f"machine code for {target.arch} does not pass its gates: {'; '.join(map(str, why))}",
            hint="a recipe leaves a kernel out, and its nodes as they are, with call-kernels: {kernels: [...]}",
        )
    left = [gap for gaps in bad.values() for gap in gaps]
    for gap in left:
        logger.info("left out: %s", gap)
    save(model, path / MODEL)
    folder, names = path / FOLDER, {}
    folder.mkdir()
    for digest in dict.fromkeys(digest for found in fit for digest in found):
        one = built[digest]
        name = names[digest] = f"{one.record['entry']}-{digest[:12]}"
        shutil.copyfile(one.code, folder / f"{name}{one.code.suffix}")
        verdicts = [
            {"gate": g.name, "found": g.found, "passed": g.passed, "waived": g.waived}
            for g in gates(one.record)
        ]
        _json(folder / f"{name}.json", {**one.record, "gates": verdicts})
    rows = {
        node: _row(node, kernel, problem, [names[digest] for digest in found])
        for (node, kernel, problem), found in zip(calls, fit, strict=True)
    }
    launches: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for step in schedule(model.graph, rows):
        if isinstance(step, Segment):
            steps.append(step.record())
        else:
            steps.append({"launch": len(launches)})
            launches.append(rows[step])
    others = [label(node) for node in walk(model) if node not in rows and _computes(node)]
    facts = {
        "version": VERSION, "target": target.name, "arch": target.arch, "launches": launches, "steps": steps,
        "without_kernel": others, "left_out": [asdict(gap) for gap in left],
    }  # fmt: skip
    _json(path / LAUNCHES, facts)


def _row(node: ir.Node, kernel: Kernel, problem: Problem, names: list[str]) -> dict[str, Any]:
    """A call as the runtime needs it; what its programs take is in their own records."""
    axes: Any = symbols([rank(v) for v in node.inputs])
    shapes = kernel.outputs(problem, axes)
    outputs: list[dict[str, Any] | None] = []
    # What no program writes nobody reads.
    for value, shape in itertools.zip_longest(node.outputs, shapes):
        if value is None or shape is None:
            outputs.append(None)
            continue
        kind = value.dtype or TYPES[kernel.output_format(problem)]
        outputs.append({"name": value.name, "type": kind.name, "shape": [str(d) for d in shape]})
    return {
        "node": label(node), "op": node.op_type, "kernels": names,
        "inputs": [None if v is None else v.name for v in node.inputs], "outputs": outputs,
        "sizes": kernel.expressions(problem),
    }  # fmt: skip


def code(path: Path, names: Iterable[str]) -> list[Path]:
    """The files with the machine code of programs."""
    kind = code_kind(read(path)["arch"])
    return [path / FOLDER / f"{name}.{kind}" for name in names]


def ask(path: Path, min_cosine: float) -> None:
    """Write down how close a device has to come to the golden outputs."""
    _json(path / LAUNCHES, {**read(path), "min_cosine": min_cosine})


def read(path: Path) -> Mapping[str, Any]:
    """What ``write`` wrote about the launches.

    Raises:
        ModelError: It is missing, or another version of optkit wrote it.
    """
    file = path / LAUNCHES
    if not file.is_file():
        raise ModelError(f"{LAUNCHES} is missing")
    found: Mapping[str, Any] = json.loads(file.read_bytes())
    if found.get("version") != VERSION:
        raise ModelError(f"{LAUNCHES} is of another version", hint="compile again with this optkit")
    return found


def _calls(
    model: ir.Model, target: Target
) -> tuple[list[tuple[ir.Node, Kernel, Problem]], list[tuple[str, str]]]:
    """The calls of the main graph, which launches stand for; those in bodies run as ONNX with their nodes."""
    found, problems, known = [], [], kernels()
    for node in model.graph:
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
