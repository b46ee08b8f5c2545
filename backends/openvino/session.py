"""A model running in OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.base import Session, misnamed, mistyped
from optkit.backends.openvino.convert import SUFFIX
from optkit.backends.openvino.kernels import Kernel, preferring
from optkit.backends.openvino.messages import reason
from optkit.backends.openvino.quiet import core, ov
from optkit.backends.openvino.requests import BFLOAT16, Request
from optkit.data import TensorSpec
from optkit.errors import DataError, ModelError

_INT32 = np.iinfo(np.int32)
# Shapes of inputs that are remembered as fit.
_SHAPES = 4096


class _Compiled:
    """The model compiled, on demand, with its requests that are free."""

    def __init__(
        self,
        file: Path,
        settings: Mapping[str, object],
        shape: Mapping[int, list[int]],
        kernels: Mapping[str, Kernel],
    ) -> None:
        self._file, self._settings, self._shape, self._kernels = file, settings, shape, kernels
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what was compiled."""
        self.idle: list[Request] = []
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The compiled model.

        Raises:
            ModelError: OpenVINO does not take the file.
        """
        with self._lock:
            if self._model is None:
                self._model = self._compile()
        return self._model

    def _compile(self) -> Any:
        try:
            # By its path it is found in the cache without being read.
            if not self._shape and not self._kernels:
                return core().compile_model(str(self._file), "CPU", self._settings)
            model = _read(self._file, self._kernels)
            if self._shape:
                model.reshape(self._shape)
            return core().compile_model(model, "CPU", self._settings)
        except RuntimeError as error:
            raise ModelError(f"{self._file.name}: OpenVINO cannot load it: {reason(error)}") from error


class OpenVinoSession(Session):
    """``model.xml`` on the CPU plugin; several threads may call ``run`` at the same time.

    The plugin (2026.4) takes inputs whose shapes do not fit inside the model: it reports success, and the outputs are empty or
    what the call before left in them. So shapes that are new are first inferred through the graph, which does notice. What
    depends on values is not seen there, but by the requests.

    Args:
        usual: Shapes of all inputs that get a compiled model without free axes, which runs faster; the one that takes any
            shape is compiled when another comes.
        kernels: That convolutions prefer, by the layer's name.

    Raises:
        ModelError: OpenVINO does not take the file.
    """

    def __init__(
        self,
        file: Path,
        settings: Mapping[str, object],
        usual: Mapping[str, tuple[int, ...]] | None = None,
        kernels: Mapping[str, Kernel] | None = None,
    ) -> None:
        self._file, kernels = file, kernels or {}
        self._any = _Compiled(file, dict(settings), {}, kernels)
        ports = self._read() if usual else self._any.model
        self.inputs = tuple(_spec(port, file) for port in ports.inputs)
        self.outputs = tuple(_spec(port, file) for port in ports.outputs)
        self._names = frozenset(s.name for s in self.inputs)
        self._free = any(s.shape is None or None in s.shape for s in self.inputs)
        self._usual, self._fixed = None, self._any
        if usual and self._free:
            shapes = {i: list(usual[s.name]) for i, s in enumerate(self.inputs)}
            self._usual = tuple(tuple(shape) for shape in shapes.values())
            self._fixed = _Compiled(file, dict(settings), shapes, kernels)
        _ = self._fixed.model
        self._fit: set[tuple[tuple[int, ...], ...]] = set()
        self._graph: Any = None
        self._latest: Request | None = None
        self._lock = threading.Lock()

    @property
    def compiled(self) -> Any:
        """The compiled model that usual inputs run in."""
        return self._fixed.model

    def _read(self) -> Any:
        try:
            return _read(self._file)
        except RuntimeError as error:
            raise ModelError(f"{self._file.name}: OpenVINO cannot load it: {reason(error)}") from error

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises:
            DataError: Names, types or shapes are not those of the inputs.
            ModelError: The shapes do not fit inside the model, integers are beyond the 32 bits that OpenVINO computes in, or it
                fails, with an error or without.
        """
        if feeds.keys() != self._names:
            raise misnamed((s.name for s in self.inputs), feeds)
        arrays = [_array(feeds[s.name], s) for s in self.inputs]
        where = self._fixed if tuple(a.shape for a in arrays) == self._usual else self._any
        if self._free and where is self._any:
            self._check_shapes(arrays)
        try:
            request = where.idle.pop() if where.idle else Request(where.model, self.outputs)
            if stale := request.run(arrays):
                # The state of the compiled model is not to be trusted either.
                where.reset()
                raise ModelError(
                    f"{self._file.name}: OpenVINO reported success and did not compute {', '.join(stale)} "
                    f"for {self._shapes(arrays)}",
                    hint="leave the model to --backend onnxruntime",
                )
            outputs = request.outputs()
        except RuntimeError as error:
            raise ModelError(f"OpenVINO stopped: {reason(error)}") from error
        where.idle.append(request)
        self._latest = request
        return outputs

    def counters(self) -> list[Any]:
        """Of the layers in the latest run, where the settings ask for them."""
        return [] if self._latest is None else self._latest.counters()

    def _shapes(self, arrays: list[np.ndarray]) -> str:
        return ", ".join(f"{s.name} {list(a.shape)}" for s, a in zip(self.inputs, arrays, strict=True))

    def _check_shapes(self, arrays: list[np.ndarray]) -> None:
        shapes = tuple(a.shape for a in arrays)
        if shapes in self._fit:
            return
        with self._lock:
            if self._graph is None:
                self._graph = self._read()
            try:
                self._graph.reshape(dict(enumerate(map(list, shapes))))
            except RuntimeError as error:
                raise ModelError(
                    f"{self._file.name}: {self._shapes(arrays)} does not fit inside the model: {reason(error)}"
                ) from error
            if len(self._fit) < _SHAPES:
                self._fit.add(shapes)

    def close(self) -> None:
        """Free the model."""
        self._any.reset()
        self._fixed.reset()
        self._graph = self._latest = None


def _read(file: Path, kernels: Mapping[str, Kernel] | None = None) -> Any:
    if not kernels:
        return core().read_model(str(file))
    return core().read_model(preferring(file, kernels), file.with_suffix(".bin").read_bytes())


def _spec(port: Any, file: Path) -> TensorSpec:
    name, kind = str(port.get_node().friendly_name).removesuffix(SUFFIX), port.element_type
    try:
        dtype = BFLOAT16 if kind == ov.Type.bf16 else np.dtype(kind.to_dtype())
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"{file.name}: {name} has a type that NumPy does not: {kind}") from error
    shape = port.partial_shape
    axes = (
        None if shape.rank.is_dynamic else tuple(int(d.get_length()) if d.is_static else None for d in shape)
    )
    return TensorSpec(name=name, dtype=dtype, shape=axes)


def _array(value: np.ndarray, spec: TensorSpec) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype != spec.dtype:
        raise mistyped(spec.name, array.dtype, spec.dtype)
    axes = array.shape if spec.shape is None else spec.shape
    if len(axes) != array.ndim or any(d not in (None, n) for d, n in zip(axes, array.shape, strict=True)):
        raise DataError(f"input {spec.name!r} is {list(array.shape)}, the model takes {spec}")
    if array.dtype == np.int64 and array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
        raise ModelError(
            f"input {spec.name!r} has {array.min()} to {array.max()}, and OpenVINO computes int64 in 32 bits",
            hint="leave the model to --backend onnxruntime",
        )
    return array
