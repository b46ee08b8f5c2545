"""What a user gets from OpenVINO and from NNCF's post-training quantization, on the same file with the same data."""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from optkit.errors import BackendUnavailableError, ModelError

MODEL = "model.xml"
_NO_TELEMETRY = "NNCF_CI"


def core() -> Any:
    """OpenVINO's ``Core``, without its telemetry.

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    if find_spec("openvino") is None:
        raise BackendUnavailableError("openvino is not installed", hint="pip install 'optkit[openvino]'")
    from optkit.backends.openvino import quiet

    return quiet.core()


def convert(model: Path, folder: Path) -> Path:
    """OpenVINO's own file of ``model``, in float32."""
    read = core().read_model(str(model))
    from optkit.backends.openvino.quiet import ov

    ov.save_model(read, str(folder / MODEL), compress_to_fp16=False)
    return folder / MODEL


def quantize(
    model: Path, batches: Sequence[Mapping[str, np.ndarray]], folder: Path, *, transformer: bool
) -> Path:
    """NNCF's post-training quantization, at its defaults but for the kind of model, which it asks users for.

    Raises:
        BackendUnavailableError: NNCF is not installed.
    """
    read = core().read_model(str(model))
    if find_spec("nncf") is None:
        raise BackendUnavailableError("nncf is not installed", hint="pip install nncf")
    from optkit.backends.openvino.quiet import ov

    with _quiet():
        nncf = importlib.import_module("nncf")
        found = nncf.quantize(
            read,
            nncf.Dataset([dict(batch) for batch in batches]),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
    ov.save_model(found, str(folder / MODEL), compress_to_fp16=False)
    return folder / MODEL


class Session:
    """A compiled model as a user runs it: one request, inputs by name.

    Args:
        outputs: Names of the outputs, in the order of the original file's.
        precision: The hint; None leaves OpenVINO's default, which is bfloat16 on many processors.
    """

    def __init__(self, file: Path, outputs: Sequence[str], precision: str | None) -> None:
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": 1,
        }
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        self.compiled = core().compile_model(str(file), "CPU", settings)
        self._request = self.compiled.create_infer_request()
        self._names = tuple(outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises:
            ModelError: OpenVINO stopped.
        """
        try:
            found = self._request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO stopped: {str(error).strip().splitlines()[-1]}") from error
        return {name: np.array(found[i]) for i, name in enumerate(self._names)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress out of the results, its advice off the terminal and its telemetry off the network."""
    before = os.environ.get(_NO_TELEMETRY)
    os.environ[_NO_TELEMETRY] = "1"
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ[_NO_TELEMETRY]
        else:
            os.environ[_NO_TELEMETRY] = before
