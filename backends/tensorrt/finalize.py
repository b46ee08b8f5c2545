"""What is left to do on the device: build, compare with the golden outputs, measure; each step once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.backends.base import Finished
from optkit.backends.records import TIMED, VERIFIED, proved
from optkit.backends.tensorrt import bundle
from optkit.errors import BackendUnavailableError, ModelError, UsageError

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Task

_PACKAGES = {"tensorrt": "pip install tensorrt-cu13", "tensorrt_rtx": "pip install 'optkit[tensorrt]'"}
# What the records name the device by; with the engine's digest it decides whether a record is of this very pair.
_DEVICE = ("device", "cuda_driver", "major", "minor")


def finalize(path: Path, task: Task, mark: Mark, *, force: bool) -> Finished:
    """Carry out in ``path`` what is left there; steps whose record fits engine and device are not repeated.

    Raises:
        BackendUnavailableError: There is no device or driver, or the runtime's package is missing.
        UsageError: The device is not the one that the artifact is for.
        ModelError: A step fails, or the engine's outputs are not those of the graph.
    """
    facts = json.loads((path / bundle.BUNDLE).read_text(encoding="utf-8"))
    device = _device(path)
    if (found := f"sm_{device['major']}{device['minor']}") != facts["arch"].rstrip("a"):
        raise UsageError(
            f"the artifact is for {facts['target']} ({facts['arch']}), the device is {device['device']} ({found})",
            hint=f"compile for it: optkit targets lists what is {found}",
        )
    package = facts["runtime"]
    if importlib.util.find_spec(package) is None:
        raise BackendUnavailableError(
            f"the engine runs in {package}, which is not installed", hint=_PACKAGES[package]
        )
    if facts["runtime"] == "tensorrt":
        with task("build the engine"):
            _run(path, "build_engine.py", *(["--force"] if force else []))
        mark("compiled", True)
    verified, timed = proved(
        lambda name: None if force else _record(path, name, device),
        lambda: _written(path, VERIFIED, device, "verify.py", fails=True),
        lambda: _written(path, TIMED, device, "bench.py"),
        task=task,
        mark=mark,
        against="the golden outputs",
        wrong="the engine does not compute what the graph computes",
        hint="try another --precision",
    )
    return Finished(
        device={key: device[key] for key in sorted(device)},
        cosine=min(o["cosine"] for o in verified["outputs"]),
        batches=tuple(timed["batches"]),
    )


def _device(path: Path) -> dict[str, Any]:
    """Name, driver and capability, asked for by the artifact's own program."""
    done = _start(path, "device.py")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise BackendUnavailableError(
            last, hint="optkit finalize runs on the machine with the GPU; copy the artifact's folder there"
        )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _run(path: Path, program: str, *arguments: str, fails: bool = False) -> None:
    """Run one of the artifact's programs; with ``fails`` its exit code 1 says something else than that it broke."""
    done = _start(path, program, *arguments)
    if done.returncode and not (fails and done.returncode == 1 and done.stdout.strip()):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(
            f"{program}: {last}", hint=f"python {program} in the artifact's folder shows all of it"
        )


def _written(
    path: Path, name: str, device: dict[str, Any], program: str, *, fails: bool = False
) -> dict[str, Any]:
    """What one of the artifact's programs wrote."""
    _run(path, program, fails=fails)
    found = _record(path, name, device)
    assert found is not None
    return found


def _start(path: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str((path / program).resolve()), *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )


def _record(path: Path, name: str, device: dict[str, Any]) -> dict[str, Any] | None:
    """A step's record, if it is of this engine on this device."""
    file, engine = path / name, path / bundle.ENGINE
    if not file.is_file() or not engine.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    same = found["engine"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    return found if same and all(found[key] == device[key] for key in _DEVICE) else None
