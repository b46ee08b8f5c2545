"""The engine of this folder, loaded and run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from device import CudaError, Device
from runtime import not_here, trt

HERE = Path(__file__).resolve().parent


def opened() -> Device:
    """The device of this machine; the program ends where there is none."""
    try:
        return Device()
    except CudaError as error:
        not_here(f"{error}: run this on the machine with the GPU")


class Engine:
    """``engine.plan`` on one device. Inputs go to the device at every run; outputs come back."""

    def __init__(self, device: Device) -> None:
        self.bundle: dict[str, Any] = json.loads((HERE / "bundle.json").read_text())
        self._device = device
        plan = HERE / "engine.plan"
        if not plan.is_file():
            raise SystemExit(f"{plan.name} is missing: python build_engine.py builds it")
        data = plan.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        stamp = plan.with_name(f"{plan.name}.json")
        registry: trt.IPluginRegistry = trt.get_plugin_registry()
        for name in json.loads(stamp.read_text()).get("plugins", ()) if stamp.is_file() else ():
            if registry.load_library(str(HERE / name)) is None:
                raise SystemExit(f"{name}: TensorRT does not load it, and the engine needs its plug-ins")
        runtime: trt.Runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise SystemExit(
                "the engine does not load: another device, driver or TensorRT than it was built with"
            )
        self._runtime, self._engine = runtime, engine
        context: trt.IExecutionContext = engine.create_execution_context()
        self._context = context
        self._outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}

    def bind(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy inputs to the device and make room for the outputs of their sizes; others than the engine takes are refused."""
        context: trt.IExecutionContext = self._context
        engine: trt.ICudaEngine = self._engine
        for name, array in feeds.items():
            self._fits(name, array)
            context.set_tensor_address(name, self._device.put(array))
        self._outputs = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT:
                continue
            shape = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise SystemExit(
                    f"output {name!r} has a size that depends on values; this program does not do that"
                )
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            address = self._device.empty(int(np.prod(shape)) * dtype.itemsize)
            context.set_tensor_address(name, address)
            self._outputs[name] = (address, shape, dtype)

    def _fits(self, name: str, array: np.ndarray) -> None:
        """Set the shape of an input; its bytes are read as what the engine takes, so the type must be the same."""
        context: trt.IExecutionContext = self._context
        engine: trt.ICudaEngine = self._engine
        wanted = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if array.dtype != wanted:
            raise SystemExit(
                f"input {name!r} is {array.dtype}, the engine takes {wanted}: convert it with .astype"
            )
        if not context.set_input_shape(name, array.shape):
            low, _, high = (list(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            raise SystemExit(
                f"input {name!r} has shape {list(array.shape)}, which the engine was not built for: the profile is "
                f"from {low} to {high}"
            )

    def enqueue(self) -> None:
        """Start one run of what is bound."""
        context: trt.IExecutionContext = self._context
        if not context.execute_async_v3(self._device.stream):
            raise SystemExit("TensorRT did not run the engine")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        self.bind(feeds)
        self.enqueue()
        self._device.wait()
        return {name: self._device.get(*place) for name, place in self._outputs.items()}
