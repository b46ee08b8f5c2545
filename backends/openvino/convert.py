"""ONNX to OpenVINO's own files, in a process of its own: what a converter or compiler does there ends with it.

The process is fresh for each model also for the sake of the bytes: OpenVINO numbers the constants that it adds, and counts
on through all models of a process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.backends.openvino.messages import reason, refused
from optkit.errors import ModelError, UnsupportedOpError

logger = logging.getLogger(__name__)

_CHILD = "import sys; from optkit.backends.openvino.convert import main; main(*sys.argv[1:])"

_SECONDS = 1800
# What follows the names of inputs and outputs in those of their nodes, which no other node shall have.
SUFFIX = "/port"


def convert(
    source: Path, target: Path, settings: Mapping[str, object], nodes: Mapping[str, Sequence[str]]
) -> None:
    """Write ``target`` (``.xml``) and the ``.bin`` beside it, and compile them once.

    Args:
        source: An ONNX file, with the names of inputs and outputs in a ``.json`` beside it.
        settings: What to compile with.
        nodes: For messages, the nodes of each operator.

    Raises:
        UnsupportedOpError: The front end refuses operators; lists them with its reasons.
        ModelError: OpenVINO fails in another way, or dies.
    """
    # -P keeps the working directory, which may hold anything, off the child's path.
    command = [
        sys.executable, "-P", "-c", _CHILD,
        str(source), str(target), json.dumps(settings, sort_keys=True),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, text=True, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"OpenVINO did not finish converting the graph within {_SECONDS} seconds") from error
    logger.debug("stderr of the conversion: %s", done.stderr)
    verdicts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not verdicts:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ModelError(f"the process in which OpenVINO converts died ({how}){last and ': '}{last}")
    verdict = verdicts[-1]
    if verdict.get("refused"):
        raise UnsupportedOpError(
            "OpenVINO cannot read the graph",
            [(node, why) for place, why in verdict["refused"] for node in nodes.get(place, [place])],
            hint="leave it to --backend onnxruntime",
        )
    if "error" in verdict:
        raise ModelError(f"OpenVINO cannot {verdict['step']} the graph: {verdict['error']}")


def main(source: str, target: str, settings: str) -> None:
    """What the child does; prints one line of JSON with the verdict."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdict = _work(Path(source), Path(target), json.loads(settings))
    print(json.dumps(verdict), flush=True)  # noqa: T201
    # Nothing is left to do, and plugins that crash while they are unloaded would hide the verdict.
    sys.stdout.flush()
    os._exit(0)


def _work(source: Path, target: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    from optkit.backends.openvino.quiet import core, ov

    step = "read"
    try:
        model = core().read_model(str(source))
        wanted = json.loads(source.with_suffix(".json").read_text())
        step = "simplify"
        simplify(model)
        _name(model.get_parameters(), model.inputs, wanted["inputs"])
        _name(model.get_results(), model.outputs, wanted["outputs"])
        step = "write"
        ov.serialize(model, str(target), str(target.with_suffix(".bin")))
        del model
        _strip(target)
        step = "compile"
        core().compile_model(str(target), "CPU", dict(settings))
    except RuntimeError as error:
        if problems := refused(str(error)):
            return {"refused": problems}
        return {"step": step, "error": reason(error)}
    return {"done": True}


def simplify(model: Any) -> None:
    """What OpenVINO's own converter does after reading: shorter files that load faster, the same arithmetic."""
    from openvino._offline_transformations import apply_fused_names_cleanup, apply_moc_transformations

    apply_moc_transformations(model, cf=False)
    apply_fused_names_cleanup(model)


def _name(ends: Sequence[Any], ports: Sequence[Any], wanted: Sequence[str]) -> None:
    """Name parameters and results after the graph's: tensors collect the names of others that are found equal to them."""
    kept = [name in port.get_names() for name, port in zip(wanted, ports, strict=False)]
    if len(wanted) != len(ports) or not all(kept):
        found = ", ".join("/".join(sorted(port.get_names())) for port in ports)
        raise RuntimeError(f"{', '.join(wanted)} became {found}")
    for end, name in zip(ends, wanted, strict=True):
        end.set_friendly_name(f"{name}{SUFFIX}")


def _strip(target: Path) -> None:
    """Take out the indentation, a fifth of the file."""
    text = target.read_bytes()
    target.write_bytes(re.sub(rb"\n\t+", b"\n", text))
