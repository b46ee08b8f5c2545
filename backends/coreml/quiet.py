"""coremltools, imported without what it prints.

On its import it warns about versions of packages that optkit never hands it, and on Linux about its missing half that runs
models; while it converts it draws progress bars and warns through NumPy.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No warnings of coremltools while it works; what it raises is for the caller."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _plain(steps: Iterable[Any], **_: Any) -> Iterable[Any]:
    return steps


def _load() -> Any:
    with silence():
        package = importlib.import_module("coremltools")
        importlib.import_module("coremltools.converters.mil.mil.passes.pass_pipeline").__dict__["tqdm"] = (
            _plain
        )
    return package


ct: Any = _load()
mil: Any = importlib.import_module("coremltools.converters.mil.mil")
mb: Any = mil.Builder
types: Any = mil.types
input_type: Any = importlib.import_module("coremltools.converters.mil.mil.input_type")
registry: Any = importlib.import_module("coremltools.converters.mil.mil.ops.registry").SSAOpRegistry
MIL_pb2: Any = importlib.import_module("coremltools.proto.MIL_pb2")
FeatureTypes_pb2: Any = importlib.import_module("coremltools.proto.FeatureTypes_pb2")
Model_pb2: Any = importlib.import_module("coremltools.proto.Model_pb2")
sanitizer: Any = importlib.import_module(
    "coremltools.converters.mil.mil.passes.defs.preprocess"
).NameSanitizer
