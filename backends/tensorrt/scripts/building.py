"""An engine out of a graph, by TensorRT on this device."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime import trt

HERE = Path(__file__).resolve().parent
BUNDLE, ENGINE, CACHE = "bundle.json", "engine.plan", "timing.cache"


class Log(trt.ILogger):  # type: ignore[misc]
    """Prints warnings and keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """One line of TensorRT's."""
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        if severity <= trt.ILogger.Severity.WARNING:
            print(message, file=sys.stderr)


def key(bundle: dict[str, object], source: Path, plugins: Sequence[Path]) -> str:
    """What an engine is built from: another model, plug-in, profile or version makes another engine."""
    digest = hashlib.sha256(source.read_bytes())
    for file in (*sorted(source.parent.glob("*.data")), *plugins):
        digest.update(file.read_bytes())
    digest.update(json.dumps([bundle["profile"], bundle["tf32"], trt.__version__], sort_keys=True).encode())
    return digest.hexdigest()


def load(plugins: Sequence[Path]) -> None:
    """Load libraries of plug-ins; a copy of each lies beside the engine, which needs it too."""
    registry: trt.IPluginRegistry = trt.get_plugin_registry()
    for library in plugins:
        own = HERE / library.name
        if library.resolve() != own:
            shutil.copyfile(library, own)
        if registry.load_library(str(own)) is None:
            raise SystemExit(f"{library.name}: TensorRT does not load it, or has its plug-ins already")


def build(*, force: bool = False, model: Path | None = None, plugins: Sequence[Path] = ()) -> Path:
    """Load plug-ins, parse, set the shape profile, build, and write engine and timing cache."""
    bundle = json.loads((HERE / BUNDLE).read_text())
    source = HERE / bundle["source"] if model is None else model
    for file in (source, *plugins):
        if not file.is_file():
            raise SystemExit(f"{file} is missing")
    engine, stamp, wanted = HERE / ENGINE, HERE / f"{ENGINE}.json", key(bundle, source, plugins)
    if not force and engine.is_file() and stamp.is_file() and json.loads(stamp.read_text())["key"] == wanted:
        print(f"{engine.name} is there already")
        return engine
    load(plugins)
    log = Log()
    builder: trt.Builder = trt.Builder(log)
    network: trt.INetworkDefinition = builder.create_network(0)
    parser: trt.OnnxParser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        for index in range(parser.num_errors):
            print(parser.get_error(index), file=sys.stderr)
        raise SystemExit("TensorRT's parser refuses the model")
    config: trt.IBuilderConfig = builder.create_builder_config()
    if not bundle["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if bundle["profile"]:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, (low, usual, high) in bundle["profile"].items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise SystemExit("the shape profile is not valid: " + "; ".join(log.errors))
    file = HERE / CACHE
    cache: trt.ITimingCache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("TensorRT built nothing: " + "; ".join(log.errors[:3]))
    beside = engine.with_suffix(".part")
    beside.write_bytes(memoryview(plan))
    beside.replace(engine)
    timing = config.get_timing_cache()
    if timing is not None:
        file.write_bytes(memoryview(timing.serialize()))
    sha = hashlib.sha256(engine.read_bytes()).hexdigest()
    made = {"key": wanted, "tensorrt": trt.__version__, "sha256": sha, "plugins": [p.name for p in plugins]}
    stamp.write_text(json.dumps(made, indent=2) + "\n")
    print(f"wrote {engine.name}, {engine.stat().st_size / 1e6:.1f} MB, with TensorRT {trt.__version__}")
    return engine
