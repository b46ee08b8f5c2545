"""Requests to a compiled model, whose outputs are known to be of the run that they are taken from.

The plugin (2026.4) may report success without having computed an output, which then holds what the call before left in it. So
some elements are overwritten before each run and must have changed after it. What a small model computes takes tens of
microseconds; so everything that can be looked up once is: where the sizes of an output are fixed, a request owns its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from optkit.backends.openvino.quiet import ov
from optkit.data import TensorSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Elements of an output that are marked before a run, and the byte written to them; a second one for types so narrow that
# a computed value may well be the first.
_MARKS, _PATTERNS, _WIDE = 16, (0xA5, 0x5A), 4
# Bytes of an input up to which copying takes less than telling OpenVINO where it lies.
_COPIED = 256 << 10


class Request:
    """One request at a time.

    Args:
        model: What OpenVINO compiled.
        outputs: Its outputs, in order.
    """

    def __init__(self, model: Any, outputs: Sequence[TensorSpec]) -> None:
        self._request, self._specs = model.create_infer_request(), outputs
        self._own = [self._owned(index, port) for index, port in enumerate(model.inputs)]
        self._kept: list[_Output | None] = []
        for index, port in enumerate(model.outputs):
            tensor = None
            if port.partial_shape.is_static:
                tensor = ov.Tensor(port.element_type, port.get_shape())
                self._request.set_output_tensor(index, tensor)
            self._kept.append(None if tensor is None else _Output(tensor))

    def run(self, inputs: Sequence[np.ndarray]) -> list[str]:
        """Compute the outputs; the names of those that were not written.

        Args:
            inputs: In order, in the types and sizes of the model.

        Raises:
            RuntimeError: OpenVINO's.
        """
        shared = []
        for index, (own, array) in enumerate(zip(self._own, inputs, strict=True)):
            if own is not None:
                own[...] = array
            else:
                # OpenVINO does not hold the memory: what holds it lives until the run is over.
                shared.append(_shared(array))
                self._request.set_input_tensor(index, shared[-1])
        stale = self._marked(range(len(self._specs)), _PATTERNS[0])
        narrow = [i for i in stale if self._specs[i].dtype.itemsize < _WIDE]
        if narrow and narrow == stale:
            stale = self._marked(narrow, _PATTERNS[1])
        return [self._specs[i].name for i in stale]

    def outputs(self) -> dict[str, np.ndarray]:
        """Copies of what the last run computed."""
        return {spec.name: self._output(k).copied(spec.dtype) for k, spec in enumerate(self._specs)}

    def counters(self) -> list[Any]:
        """OpenVINO's ``ProfilingInfo`` of the layers in the last run."""
        return list(self._request.get_profiling_info())

    def _owned(self, index: int, port: Any) -> np.ndarray | None:
        """Memory for an input that is copied."""
        if not port.partial_shape.is_static or port.element_type == ov.Type.bf16:
            return None
        tensor = ov.Tensor(port.element_type, port.get_shape())
        if tensor.byte_size > _COPIED:
            return None
        self._request.set_input_tensor(index, tensor)
        data: np.ndarray = tensor.data
        return data

    def _output(self, index: int) -> _Output:
        # Where sizes are free, each run may have other memory.
        return self._kept[index] or _Output(self._request.get_output_tensor(index))

    def _marked(self, indices: Sequence[int], pattern: int) -> list[int]:
        """Run; those of the outputs in which all marks are left."""
        for index in indices:
            self._output(index).marks[...] = pattern
        # ``infer`` would copy all outputs into a dictionary.
        self._request.start_async()
        self._request.wait()
        return [index for index in indices if self._output(index).holds(pattern)]


class _Output:
    """The memory of an output, and the bytes of a few elements spread over it, ``[n, bytes]``."""

    __slots__ = ("_data", "_tensor", "marks")

    def __init__(self, tensor: Any) -> None:
        self._tensor, self._data = tensor, tensor.data
        flat = self._data.reshape(-1).view(np.uint8).reshape(self._data.size, self._data.itemsize)
        self.marks: np.ndarray = flat[:: max(1, len(flat) // _MARKS)]

    def holds(self, pattern: int) -> bool:
        """Whether all marks are left."""
        # Most often the first byte tells.
        marks = self.marks
        return bool(marks.size and marks[0, 0] == pattern and (marks == pattern).all())

    def copied(self, dtype: np.dtype[Any]) -> np.ndarray:
        data: np.ndarray = self._data.copy()
        return data.view(BFLOAT16) if dtype == BFLOAT16 else data


def _shared(array: np.ndarray) -> Any:
    if array.dtype == BFLOAT16:
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(array.shape)))
        tensor.data.view(np.uint16)[...] = np.ascontiguousarray(array).view(np.uint16)
        return tensor
    # OpenVINO shares the memory of arrays that lie in order and may be written; it does not write to them.
    shared = array.flags.c_contiguous and array.flags.writeable
    return ov.Tensor(array if shared else np.array(array, order="C"), shared_memory=True)
