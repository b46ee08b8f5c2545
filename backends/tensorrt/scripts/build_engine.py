"""Build the engine on the device that will run it.

    python build_engine.py

Precision comes from the types and the Q/DQ pairs of the graph alone. The timing cache is kept beside the engine, so that a
rebuild takes the same kernels. Nothing is done where the engine is there already (--force builds it anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

try:
    import tensorrt as trt
except ImportError as error:
    raise SystemExit(f"TensorRT does not load ({error}): pip install tensorrt-cu13") from None

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


def key(bundle: dict[str, object]) -> str:
    """What an engine is built from: another model, profile or version makes another engine."""
    digest = hashlib.sha256((HERE / str(bundle["source"])).read_bytes())
    for data in sorted(HERE.glob("*.data")):
        digest.update(data.read_bytes())
    digest.update(json.dumps([bundle["profile"], bundle["tf32"], trt.__version__], sort_keys=True).encode())
    return digest.hexdigest()


def build(*, force: bool = False) -> Path:
    """Parse, set the shape profile, build, and write engine and timing cache."""
    bundle = json.loads((HERE / BUNDLE).read_text())
    engine, stamp, wanted = HERE / ENGINE, HERE / f"{ENGINE}.json", key(bundle)
    if not force and engine.is_file() and stamp.is_file() and json.loads(stamp.read_text())["key"] == wanted:
        print(f"{engine.name} is there already")
        return engine
    log = Log()
    builder: trt.Builder = trt.Builder(log)
    network: trt.INetworkDefinition = builder.create_network(0)
    parser: trt.OnnxParser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(HERE / bundle["source"])):
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
    stamp.write_text(json.dumps({"key": wanted, "tensorrt": trt.__version__, "sha256": sha}, indent=2) + "\n")
    print(f"wrote {engine.name}, {engine.stat().st_size / 1e6:.1f} MB, with TensorRT {trt.__version__}")
    return engine


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--force", action="store_true", help="build although the engine is there")
    build(force=arguments.parse_args().force)
