"""Run a model as it was given and as it was converted on the same random inputs, and compare.

ONNX Runtime runs in a process of its own, with a limit on memory and time: what a hostile or broken model does there
does not reach the caller.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.data import draw, specs, trial_sizes
from optkit.errors import ModelError, OptkitError
from optkit.graph import RANDOM, walk, weight_bytes
from optkit.inference import windows_fit
from optkit.store import detached, save

logger = logging.getLogger(__name__)

# Larger models are not run: the nodes that conversion touches are the same in small ones.
_LARGEST = 1 << 30
_SECONDS = 120
_SPARE_MEMORY = 4 << 30


def check(source: Path | bytes | ir.Model, converted: ir.Model, *, name: str, unsafe: bool = False) -> str:
    """Compare, and say in a sentence what was compared or why it was not.

    Args:
        source: What ``converted`` was made from.
        converted: At the working opset.
        name: For messages.
        unsafe: As in loading.

    Raises:
        ModelError: The conversion changed the numbers, or what was converted does not run.
    """
    if weight_bytes(converted) > _LARGEST:
        return "not run to compare it with the original: too large"
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        path = Path(folder) / "original.onnx"
        try:
            if isinstance(source, Path):
                path = source.absolute()
            elif isinstance(source, bytes):
                path.write_bytes(source)
            else:
                save(source, path)
        except (OSError, OptkitError) as error:
            return f"not compared with the original: {error}"
        return _judgement(_run_child(path, unsafe), name)


def _judgement(verdict: dict[str, Any], name: str) -> str:
    if "note" in verdict:
        return f"not compared with the original: {verdict['note']}"
    if "wrong" in verdict:
        raise ModelError(
            f"{name}: converting its opset changed it: {verdict['wrong']}",
            hint="export the model with the opset that optkit works in, and report this model",
        )
    return f"computes the same as before on random inputs (largest difference {verdict['difference']:.1e} of the largest value)"


def _run_child(path: Path, unsafe: bool) -> dict[str, Any]:
    # -P keeps the working directory, which may hold anything, off the child's path.
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from optkit.equivalence import main; main(*sys.argv[1:])",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            [*command, str(path), str(int(unsafe))],
            stdin=subprocess.DEVNULL, capture_output=True, env=environment, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"note": f"it did not finish within {_SECONDS} seconds"}
    except OSError as error:
        return {"note": f"no process for ONNX Runtime could be started: {error}"}
    logger.debug("stderr of the comparison: %s", done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines and "ran" not in lines[-1]:
        return lines[-1]  # type: ignore[no-any-return]
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    if lines:
        return {"wrong": f"ONNX Runtime ran the original, and died of the converted model ({how})"}
    return {"note": f"ONNX Runtime died of the original ({how})"}


def main(path: str, unsafe: str) -> None:
    """What the child does; prints one line of JSON when the original ran, and one with the verdict."""
    from optkit.frontend import read

    model = read(Path(path), unsafe=bool(int(unsafe)), check=False).model
    limit = _SPARE_MEMORY + 4 * weight_bytes(model)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (4 * _SECONDS, 4 * _SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def tell(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)  # noqa: T201

    tell(compare(Path(path), model, unsafe=bool(int(unsafe)), original_ran=lambda: tell({"ran": True})))


def compare(
    path: Path, model: ir.Model, *, unsafe: bool = False, original_ran: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The verdict: ``note`` (could not be compared), ``wrong``, or ``difference``."""
    from optkit import onnxfile

    seeded = any(node.op_type in RANDOM for node in walk(model))
    try:
        if seeded:
            original = onnxfile.read(path, name=path.name, unsafe=unsafe)
            _seed(original)
            _seed(model)
            before = _session(original)
        else:
            before = _load(str(path))
        feeds, expected = _first_run(before, model)
    except (OptkitError, RuntimeError) as error:
        return {"note": f"ONNX Runtime cannot run it on random inputs: {error}"}
    del before
    original_ran()
    try:
        found = _run(_session(model), feeds)
    except (OptkitError, RuntimeError) as error:
        return {"wrong": f"it no longer runs: {error}"}
    return _judge(expected, found)


def _seed(model: ir.Model) -> None:
    """Make what is drawn at random the same in each run."""
    for node in walk(model):
        if node.op_type in RANDOM:
            node.attributes["seed"] = ir.AttrFloat32("seed", 1.0)


def _load(source: str | bytes, weights: dict[str, ir.TensorProtocol] | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    # Both as written: what fusion makes of them is not the question.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeError(_first_line(error)) from error


def _session(model: ir.Model) -> Any:
    return _load(*detached(model))


def _run(session: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:
        raise RuntimeError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].removeprefix("[ONNXRuntimeError] : ")[:300]


def _first_run(session: Any, model: ir.Model) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The first random inputs that the model runs on, and its outputs; rather some that no window is larger than."""
    failure, small = RuntimeError(""), None
    for sizes in trial_sizes(specs(model)[0]):
        feeds = draw(model, np.random.default_rng(0), sizes)
        try:
            found = feeds, _run(session, feeds)
        except RuntimeError as error:
            failure = error
            continue
        if windows_fit(model, {name: x.shape for name, x in feeds.items()}):
            return found
        small = small or found
    if small is None:
        raise failure
    return small


def _judge(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, Any]:
    worst = 0.0
    if list(expected) != list(found):
        return {"wrong": f"its outputs are {', '.join(found)} instead of {', '.join(expected)}"}
    for name, a in expected.items():
        b = found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return {
                "wrong": f"output {name!r} is {b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
            }
        if a.dtype.kind != "f":
            if not np.array_equal(a, b):
                return {"wrong": f"output {name!r} differs in {int((a != b).sum())} of {a.size} elements"}
            continue
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return {"wrong": f"output {name!r} is not finite in other places"}
        a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        if not a.size:
            continue
        difference = float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny))
        # Sums may be added in another order: a few roundings of the type that the output has.
        if difference > max(1e-5, 8 * float(np.finfo(expected[name].dtype).eps)):
            return {"wrong": f"output {name!r} differs by {difference:.1e} of its largest value"}
        worst = max(worst, difference)
    return {"difference": worst}
