"""A ``.tflite`` file in the LiteRT runtime."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from optkit.backends.base import Session, misnamed, mistyped
from optkit.backends.litert.quiet import interpreter, silence
from optkit.data import TensorSpec
from optkit.errors import DataError, ModelError
from optkit.reference import first_line

MODEL, INTERFACE = "model.tflite", "interface.json"


class LiteRtSession(Session):
    """The file on the processor, in XNNPACK's kernels where it has them; a signature for each set of shapes.

    Raises:
        ModelError: LiteRT does not take the file.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self._file = folder / MODEL
        told = json.loads((folder / INTERFACE).read_text(encoding="utf-8"))
        self.inputs = tuple(TensorSpec.read(p) for p in told["inputs"])
        self.outputs = tuple(TensorSpec.read(p) for p in told["outputs"])
        self._keys = {tuple(map(tuple, shapes)): key for key, shapes in told["signatures"].items()}
        try:
            self._interpreter = interpreter(str(self._file), threads)
            self._runners = {key: self._interpreter.get_signature_runner(key) for key in self._keys.values()}
            # The first run chooses kernels, and says so.
            for shapes, key in self._keys.items():
                empty = zip(self.inputs, shapes, strict=True)
                with silence():
                    self._runners[key](**{s.name: np.zeros(shape, s.dtype) for s, shape in empty})
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{self._file.name}: LiteRT cannot load it: {first_line(error)}") from error
        self._lock = threading.Lock()

    def key(self, feeds: Mapping[str, np.ndarray]) -> str:
        """The signature for these inputs.

        Raises:
            DataError: There is none.
        """
        names = [s.name for s in self.inputs]
        if set(feeds) != set(names):
            raise misnamed(names, feeds)
        for spec in self.inputs:
            if feeds[spec.name].dtype != spec.dtype:
                raise mistyped(spec.name, feeds[spec.name].dtype, spec.dtype)
        shapes = tuple(feeds[name].shape for name in names)
        if shapes not in self._keys:
            given = ", ".join(f"{n} {list(s)}" for n, s in zip(names, shapes, strict=True))
            known = "; ".join(
                ", ".join(f"{n} {list(s)}" for n, s in zip(names, key, strict=True)) for key in self._keys
            )
            raise DataError(
                f"{given}: the file was made for {known}",
                hint="give options.shapes other sizes when compiling",
            )
        found: str = self._keys[shapes]
        return found

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether the file has a signature for these shapes."""
        try:
            self.key(feeds)
        except DataError:
            return False
        return True

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises:
            DataError: Names, types or shapes are not those that the file was made for.
            ModelError: LiteRT fails.
        """
        # Not `ascontiguousarray`, which gives scalars an axis.
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        key = self.key(arrays)
        try:
            # The interpreter's buffers are one set for all callers.
            with self._lock:
                found = self._runners[key](**arrays)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"LiteRT stopped: {first_line(error)}") from error
        return {spec.name: found[spec.name] for spec in self.outputs}

    def close(self) -> None:
        """Free the model."""
        self._runners = {}
        del self._interpreter
