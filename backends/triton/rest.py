"""What has no kernel, in ONNX Runtime: segments of the graph that read and write tensors where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from optkit.backends.triton.memory import Pool, Tensor
from optkit.errors import BackendUnavailableError, ModelError
from optkit.reference import first_line, session_options, unsound
from optkit.store import detached

if TYPE_CHECKING:
    from collections.abc import Sequence

Place = Literal["cuda", "cpu"]
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def need_provider(place: Place) -> None:
    """Refuse to go on where this ONNX Runtime has no such device.

    Raises:
        BackendUnavailableError: Says what to install.
    """
    if _PROVIDERS[place] not in ort.get_available_providers():
        raise BackendUnavailableError(
            "nodes without kernel run in ONNX Runtime with CUDA, and the one that is installed does not have it",
            hint="pip install onnxruntime-gpu, or --set options.rest=cpu at compile time runs them on the processor",
        )


class Rest:
    """One segment.

    Args:
        model: The whole graph; it is not changed.
        step: Names of its inputs and outputs, and of those outputs that are wanted on the host.
        place: Where it runs.
        stream: Of the device, in whose order it runs.

    Raises:
        BackendUnavailableError: ONNX Runtime does not run there, though it was built to.
        ModelError: It does not take the nodes.
    """

    def __init__(self, model: ir.Model, step: Mapping[str, Sequence[str]], place: Place, stream: int) -> None:
        self.inputs, self.outputs = tuple(step["inputs"]), tuple(step["outputs"])
        self._host, self._place = frozenset(step["host"]), place
        graph = ir.convenience.extract(model.graph, self.inputs, self.outputs)
        part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
        options = session_options(threads=1)
        data, weights = detached(part)
        # ONNX Runtime reads this memory for as long as the session lives.
        self._weights = [
            ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w.numpy())) for w in weights.values()
        ]
        options.add_external_initializers(list(weights), self._weights)
        settings = {"user_compute_stream": str(stream)} if place == "cuda" else {}
        try:
            self._session = ort.InferenceSession(
                data, options, providers=[(_PROVIDERS[place], settings)],
                disabled_optimizers=list(unsound(part)) or None,
            )  # fmt: skip
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime does not take the nodes without kernel: {first_line(error)}"
            ) from error
        # It falls back to the processor in silence where a library of CUDA is missing.
        if self._session.get_providers()[0] != _PROVIDERS[place]:
            raise BackendUnavailableError(
                "ONNX Runtime has CUDA, but does not run with it here: a library of CUDA or cuDNN is missing",
                hint="pip install 'onnxruntime-gpu[cuda,cudnn]', or --set options.rest=cpu at compile time",
            )
        self._options = ort.RunOptions()
        if place == "cuda" and not self._host:
            # What follows is on the same stream.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, values: dict[str, Tensor], pool: Pool) -> None:
        """Add the outputs to ``values``, which has the inputs.

        Raises:
            ModelError: ONNX Runtime stopped.
        """
        binding = self._session.io_binding()
        for name in self.inputs:
            given = values[name]
            if self._place == "cuda" and given.device is not None:
                place, address = "cuda", given.device
            else:
                place, address = "cpu", given.to_host(pool)
            binding.bind_input(name, place, 0, int(given.dtype), given.shape, address)
        for name in self.outputs:
            binding.bind_output(name, "cpu" if name in self._host else self._place)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:
            raise ModelError(f"ONNX Runtime stopped: {first_line(error)}") from error
        for name, value in zip(self.outputs, binding.get_outputs(), strict=True):
            values[name] = _tensor(value)


def _tensor(value: Any) -> Tensor:
    where = "host" if value.device_name().lower() == "cpu" else "device"
    return Tensor(
        shape=tuple(value.shape()), dtype=ir.DataType(value.element_type()), owners=[value],
        **{where: value.data_ptr()},
    )  # fmt: skip
