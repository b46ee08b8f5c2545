"""TensorRT-RTX at work, in a process of its own: its compiler may abort, and optkit must not.

Nothing of optkit is imported here but this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors; what TensorRT says otherwise is of no use to a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """One line of TensorRT's."""
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(str(message).strip()[:600])


def main(request: str) -> None:
    """Do what ``request`` (JSON) asks and print one line of JSON with the verdict."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.loads(request)
    # TensorRT writes progress to the standard output too.
    kept = os.dup(1)
    os.dup2(2, 1)
    verdict = _work(asked)
    os.write(kept, (json.dumps(verdict) + "\n").encode())
    os._exit(0)


def _work(asked: Mapping[str, Any]) -> dict[str, Any]:
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    verdict: dict[str, Any] = {"version": trt.__version__, "parsed": False, "built": False, "refused": []}
    if not parser.parse_from_file(asked["source"]):
        verdict["refused"] = [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]
        verdict["message"] = "; ".join(log.errors[:3])
        return verdict
    verdict["parsed"] = True
    config = builder.create_builder_config()
    names = asked["capabilities"]
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        known = getattr(trt.ComputeCapability, name, None)
        # Capabilities that it does not build for are accepted by the type and refused here.
        if known is None or not config.set_compute_capability(known, index):
            return verdict | {"message": f"TensorRT-RTX {trt.__version__} does not build for {name}"}
    if not asked["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if asked["profile"]:
        shapes = builder.create_optimization_profile()
        for name, (low, usual, high) in asked["profile"].items():
            shapes.set_shape(name, low, usual, high)
        if config.add_optimization_profile(shapes) < 0:
            return verdict | {"message": "; ".join(log.errors[:3]) or "the shape profile is not valid"}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return verdict | {"message": "; ".join(log.errors[:3]) or "the builder gave nothing"}
    data = memoryview(plan)
    try:
        with Path(asked["engine"]).open("wb") as file:
            file.write(data)
    except OSError as error:
        return verdict | {"unwritten": error.errno}
    return verdict | {"built": True, "bytes": data.nbytes, "sha256": hashlib.sha256(data).hexdigest()}


def _refusal(error: Any) -> dict[str, str]:
    found = {"code": "", "name": "", "op": "", "why": ""}
    for key, call in (("code", "code"), ("name", "node_name"), ("op", "node_operator"), ("why", "desc")):
        with contextlib.suppress(AttributeError):
            value = getattr(error, call)()
            found[key] = value.name if hasattr(value, "name") else str(value)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
