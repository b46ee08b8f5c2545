"""A model running in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from optkit.backends.base import Session, misnamed
from optkit.data import TensorSpec
from optkit.errors import ModelError
from optkit.reference import first_line, session_options

if TYPE_CHECKING:
    from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions

_TYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "int64": "int64", "int32": "int32",
    "int16": "int16", "int8": "int8", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "bool": "bool",
}  # fmt: skip


def _spec(value: ort.NodeArg) -> TensorSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(name=value.name, dtype=np.dtype(_TYPES.get(kind, "object")), shape=tuple(value.shape))


class OnnxRuntimeSession(Session):
    """``model.onnx`` on the CPU provider.

    Args:
        precise: Keep int8 products from saturating in 16 bits on processors where they would.

    Raises:
        ModelError: ONNX Runtime does not take the file.
    """

    def __init__(
        self,
        file: Path,
        options: OnnxRuntimeOptions,
        *,
        threads: int | None = None,
        profile: Path | None = None,
        precise: bool = False,
    ) -> None:
        settings = session_options(
            threads=options.threads if threads is None else threads,
            large=not options.prepacking,
            precise=precise,
        )
        settings.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", str(options.accuracy_level)
        )
        if profile is not None:
            settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
        try:
            self._session = ort.InferenceSession(
                str(file),
                settings,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(options.disabled_optimizers) or None,
            )
        except Exception as error:
            raise ModelError(f"{file.name}: ONNX Runtime cannot load it: {first_line(error)}") from error
        self.inputs = tuple(_spec(v) for v in self._session.get_inputs())
        self.outputs = tuple(_spec(v) for v in self._session.get_outputs())
        # Small models take less time than looking these up in every run.
        self._taken = frozenset(s.name for s in self.inputs)
        self._given = [s.name for s in self.outputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        if feeds.keys() != self._taken:
            raise misnamed((s.name for s in self.inputs), feeds)
        try:
            results = self._session.run(self._given, feeds if type(feeds) is dict else dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime stopped: {first_line(error)}") from error
        return dict(zip(self._given, results, strict=True))

    def end_profiling(self) -> Path:
        """Stop the profiler that ``profile`` started; the file it wrote."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session."""
        del self._session
