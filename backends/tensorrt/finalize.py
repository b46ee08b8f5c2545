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
from optkit.kernels import cuda

if TYPE_CHECKING:
    from optkit.backends.base import Mark, Task
    from optkit.targets import Target

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
    facts = bundle.read(path)
    device = _device(
        path / "device.py",
        "optkit finalize runs on the machine with the GPU; copy the artifact's folder there",
    )
    if device["arch"] != facts["arch"].rstrip("a"):
        raise UsageError(
            f"the artifact is for {facts['target']} ({facts['arch']}), the device is {device['device']} ({device['arch']})",
            hint=f"compile for it: optkit targets lists what is {device['arch']}",
        )
    package = facts["runtime"]
    if importlib.util.find_spec(package) is None:
        raise BackendUnavailableError(
            f"the engine runs in {package}, which is not installed", hint=_PACKAGES[package]
        )
    if facts["runtime"] == bundle.TENSORRT:
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


def at_hand(target: Target) -> None:
    """Refuse to build for ``target`` on this machine, where that cannot be.

    Raises:
        BackendUnavailableError: TensorRT, the driver or a device is missing, or the device is another one.
    """
    later = "--set options.mode=bundle to build it on the machine with the GPU"
    package = f"{_PACKAGES['tensorrt']}, or {later}"
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendUnavailableError(
            f"an engine for {target.name} is built here by TensorRT, which is not installed", hint=package
        )
    device = _device(Path(cuda.__file__), later)
    if device["arch"] != target.arch.rstrip("a"):
        raise BackendUnavailableError(
            f"the device here is {device['device']} ({device['arch']}), not {target.name} ({target.arch})",
            hint=later,
        )
    done = _python("-c", "import tensorrt")
    if done.returncode:
        raise BackendUnavailableError(f"TensorRT does not load: {_last(done)}", hint=package)


def _device(program: Path, hint: str) -> dict[str, Any]:
    """Name, driver and capability of the device here."""
    done = _python(str(program))
    if done.returncode:
        raise BackendUnavailableError(_last(done), hint=hint)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _run(path: Path, program: str, *arguments: str, fails: bool = False) -> None:
    """Run one of the artifact's programs; with ``fails`` its exit code 1 says something else than that it broke."""
    done = _python(str((path / program).resolve()), *arguments)
    if done.returncode == BackendUnavailableError.exit_code:
        what, _, hint = _last(done).rpartition(": ")
        raise BackendUnavailableError(f"{program}: {what}", hint=hint)
    if done.returncode and not (fails and done.returncode == 1 and done.stdout.strip()):
        raise ModelError(
            f"{program}: {_last(done)}", hint=f"python {program} in the artifact's folder shows all of it"
        )


def _written(
    path: Path, name: str, device: dict[str, Any], program: str, *, fails: bool = False
) -> dict[str, Any]:
    """What one of the artifact's programs wrote."""
    _run(path, program, fails=fails)
    found = _record(path, name, device)
    assert found is not None
    return found


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """What it said last."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start Python anew: what a vendor's library does there, even abort, stays there."""
    command = [sys.executable, "-B", *arguments]
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
