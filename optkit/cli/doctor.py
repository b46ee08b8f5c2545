"""``optkit doctor``: what this machine can do, and whether a model is fit to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import OptkitError

if TYPE_CHECKING:
    from optkit.frontend import Loaded

_PACKAGES = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "pydantic",
    "torch",
    "onnxscript",
    "tensorrt-rtx-cu13",
    "openvino",
    "coremltools",
    "coreai-core",
    "coreai-onnx",
    "ai-edge-litert",
    "triton",
)


@command
def doctor(
    terminal: Terminal,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="An .onnx file to check.", show_default=False)
    ] = None,
    target: options.Target = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> int:
    """Show versions, backends and the processor; with MODEL also check what commonly goes wrong with it.

    Exit code 1 when MODEL cannot be compiled.
    """
    from optkit.cli.render import facts, table

    machine, backends = _machine(), _backends()
    checks = [] if model is None else _checks(model, target, backend)
    if json:
        document: dict[str, Any] = {"machine": machine, "packages": _versions(), "backends": backends}
        if model is not None:
            document |= {"model": model, "checks": checks, "ok": all(c["state"] != "failed" for c in checks)}
        terminal.json(document)
    else:
        packages = ", ".join(f"{n} {v}" for n, v in _versions().items() if v)
        missing = ", ".join(n for n, v in _versions().items() if not v) or "none"
        terminal.result(
            facts(
                [
                    *((k, (v,)) for k, v in machine.items()),
                    ("packages", (packages,)),
                    ("not installed", (missing,)),
                ]
            )
        )
        terminal.result("")
        terminal.result(
            table(
                ("Backend", "State", "To install"), [(b["name"], b["state"], b["install"]) for b in backends]
            )
        )
        if model is not None:
            terminal.result("")
            terminal.result(
                table(("Check", "State", f"{model}"), [(c["check"], c["state"], c["detail"]) for c in checks])
            )
    return 1 if any(c["state"] == "failed" for c in checks) else 0


def _machine() -> dict[str, str]:
    import os

    from optkit.targets.host import machine

    found = machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found["cores"] = str(cores)
    if "features" in found:
        found["features"] = found["features"] or "none of those that speed up int8"
    return found


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    import optkit

    found: dict[str, str | None] = {"optkit": optkit.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _backends() -> list[dict[str, str]]:
    from optkit.backends import BACKENDS

    rows = []
    for name in BACKENDS:
        try:
            reason = BACKENDS[name]().available()
        except OptkitError as error:
            rows.append({"name": name, "state": str(error), "install": error.hint or ""})
        else:
            rows.append({"name": name, "state": reason or "ready", "install": ""})
    return rows


def _checks(model: str, target: str | None, backend: str | None) -> list[dict[str, str]]:
    """Each thing that can go wrong, in the order in which it would."""
    from optkit.frontend import read

    checks: list[dict[str, str]] = []
    loaded: Loaded | None = None

    def check(name: str, look: Callable[[], tuple[str, str]]) -> None:
        try:
            state, detail = look()
        except OptkitError as error:
            state, detail = "failed", f"{error}" + (f" ({error.hint})" if error.hint else "")
        checks.append({"check": name, "state": state, "detail": detail})

    def load() -> tuple[str, str]:
        nonlocal loaded
        loaded = read(options.source(model))
        return "ok", "; ".join(loaded.notes) or "nothing had to be changed"

    check("loads", load)
    if loaded is None:
        return checks
    ready = loaded
    check("opset", lambda: _opset(ready))
    check("operators", lambda: _operators(ready, target, backend))
    check("control flow", lambda: _control_flow(ready))
    check("weights", lambda: _weights(ready))
    check("free axes", lambda: _axes(ready))
    check("runs", lambda: _runs(ready))
    return checks


def _opset(loaded: Loaded) -> tuple[str, str]:
    from optkit.graph import OPSET

    same = loaded.opset == OPSET
    return "ok", f"{loaded.opset}" + ("" if same else f", brought to {OPSET}")


def _operators(loaded: Loaded, target: str | None, backend: str | None) -> tuple[str, str]:
    from optkit.backends import BACKENDS
    from optkit.graph import walk
    from optkit.legalize import legalize
    from optkit.ops import spec
    from optkit.targets import target as find_target

    where = find_target(target or "cpu")
    engine = BACKENDS[backend or where.backends[0]]()
    legalize(loaded.model.clone(), engine, where, name=loaded.name)
    unknown = sorted({n.op_type for n in walk(loaded.model) if spec(n) is None and n.op_type != "Constant"})
    detail = f"{engine.name} runs all of them"
    return "ok", detail + (f"; stay as they are: {', '.join(unknown)}" if unknown else "")


def _control_flow(loaded: Loaded) -> tuple[str, str]:
    from optkit.graph import walk

    kinds = [n.op_type for n in walk(loaded.model) if n.op_type in ("If", "Loop", "Scan")]
    if not kinds:
        return "ok", "none"
    found = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))
    return "note", f"{found}: bodies are cleaned up; static quantization leaves them in float"


def _weights(loaded: Loaded) -> tuple[str, str]:
    import onnx_ir as ir

    from optkit import sentences
    from optkit.graph import graphs, weight_bytes

    size = weight_bytes(loaded.model)
    outside = {
        str(v.const_value.location)
        for g in graphs(loaded.model)
        for v in g.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    names = f", in {', '.join(sorted(outside)[:3])}" if outside else ", inside the file"
    return "ok", sentences.megabytes(size) + names


def _axes(loaded: Loaded) -> tuple[str, str]:
    from optkit.data import specs

    inputs = specs(loaded.model)[0]
    free = [s for s in inputs if s.shape is None or any(not isinstance(d, int) for d in s.shape)]
    if not free:
        return "ok", "none: every input has a fixed shape"
    return "note", f"{'; '.join(map(str, free))}: calibrate with the sizes that will be used"


def _runs(loaded: Loaded) -> tuple[str, str]:
    import numpy as np

    from optkit import sentences
    from optkit.data import draw, specs, trial_sizes
    from optkit.reference import ReferenceSession

    session = ReferenceSession(loaded.original)
    outputs, reason = None, ""
    try:
        for sizes in trial_sizes(specs(loaded.model)[0]):
            try:
                outputs = session.run(draw(loaded.model, np.random.default_rng(0), sizes))
                break
            except OptkitError as error:
                # Sizes of free axes are a guess: many models take few of them.
                reason = reason or str(error)
    finally:
        session.close()
    if outputs is None:
        return "note", f"on none of the inputs drawn at random, with several sizes of the free axes: {reason}"
    bad = [
        name for name, array in outputs.items() if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]
    if bad:
        return "note", f"{', '.join(bad)}: not finite on inputs drawn at random"
    return "ok", f"one run on random inputs, {sentences.count(len(outputs), 'output')}"
