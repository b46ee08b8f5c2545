"""The typed graph in ONNX Runtime: what can be run of a TensorRT artifact where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.backends.base import Session
from optkit.backends.tensorrt.profiles import free_axes
from optkit.data import specs, validate
from optkit.errors import DataError, ModelError
from optkit.graph import weight_bytes
from optkit.reference import LARGE, ReferenceSession, unsound


class TypedGraphSession(Session):
    """``model.onnx`` of an artifact, with its types and Q/DQ pairs, on the CPU.

    Args:
        profile: Smallest, usual and largest shape of inputs with free axes that the engine takes.

    Raises:
        ModelError: ONNX Runtime does not take the file.
    """

    def __init__(self, file: Path, profile: Mapping[str, Sequence[Sequence[int]]]) -> None:
        if not file.is_file():
            raise ModelError(f"{file.name} is missing")
        model = ir.load(file)
        self.inputs, self.outputs = specs(model)
        self._profile = profile
        large = weight_bytes(model) > LARGE
        self._session = ReferenceSession(file, large=large, disabled=unsound(model))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        return self._session.run(validate(feeds, self.inputs))

    def admit(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Refuse what lies outside the profile of the engine."""
        for name, spec, axis in free_axes(self.inputs):
            low, usual, high = (shape[axis] for shape in self._profile[spec.name])
            size = feeds[spec.name].shape[axis]
            if not low <= size <= high:
                wanted = [min(low, size), usual, max(high, size)]
                raise DataError(
                    f"{spec.name} has {size} along axis {axis} ({name}), and the engine takes {low} to {high}",
                    hint=f"--set options.sizes.{name}={wanted}",
                )

    def close(self) -> None:
        """Free the session."""
        self._session.close()
