"""The graph with the bodies of its kernels in ONNX Runtime: what can be run of the artifact where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.backends.base import Session
from optkit.data import specs, validate
from optkit.errors import ModelError
from optkit.graph import weight_bytes
from optkit.reference import LARGE, ReferenceSession, unsound


class FunctionBodySession(Session):
    """``model.onnx`` on the CPU: calls of kernels run as the ONNX functions that they carry, no machine code of a GPU.

    Raises:
        ModelError: The file is missing, or ONNX Runtime does not take it.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise ModelError(f"{file.name} is missing")
        model = ir.load(file)
        self.inputs, self.outputs = specs(model)
        large = weight_bytes(model) > LARGE
        self._session = ReferenceSession(file, large=large, disabled=unsound(model))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        return self._session.run(validate(feeds, self.inputs))

    def close(self) -> None:
        """Free the session."""
        self._session.close()
