"""TensorRT's interface, as far as an artifact's programs use it, computed by ONNX Runtime on the memory of the host.

An "engine" is the path of the ONNX file that it was built from, and the profile.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os

import numpy as np
import onnxruntime as ort

if os.environ.get("FAKE_TENSORRT_BROKEN"):
    raise ImportError("libnvinfer.so.11: cannot open shared object file")

__version__ = "11.4.0"

ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
BuilderFlag = enum.Enum("BuilderFlag", "TF32")
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING = range(3)


class Logger(ILogger):
    WARNING = ILogger.Severity.WARNING

    def __init__(self, severity):
        pass


class Builder:
    def __init__(self, logger):
        with open(os.environ["FAKE_TENSORRT_LOG"], "a") as log:
            log.write("a build\n")

    def create_network(self, flags):
        return {}

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        if os.environ.get("FAKE_TENSORRT_FAILS"):
            return None
        return json.dumps({"file": network["file"], "profile": config.profile}).encode()


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self._network = network

    def parse_from_file(self, file):
        with open(os.environ["FAKE_TENSORRT_LOG"], "a") as log:
            log.write(f"parsed {os.path.basename(file)}\n")
        self._network["file"] = file
        return True


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, usual, high):
        assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
        self.shapes[name] = (low, usual, high)


class Config:
    def __init__(self):
        self.profile = {}

    def clear_flag(self, flag):
        assert flag is BuilderFlag.TF32

    def add_optimization_profile(self, profile):
        self.profile = profile.shapes
        return 0

    def create_timing_cache(self, data):
        self._cache = data
        return data

    def set_timing_cache(self, cache, ignore_mismatch):
        pass

    def get_timing_cache(self):
        return Cache()


class Cache:
    def serialize(self):
        return b"timings"


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        return None if os.environ.get("FAKE_TENSORRT_REFUSES") else Engine(**json.loads(data))


class Engine:
    def __init__(self, file, profile):
        self.profile = profile
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        self._all = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self._all)

    def create_execution_context(self):
        return Context(self)

    def get_tensor_name(self, index):
        return self._all[index].name

    def get_tensor_mode(self, name):
        outputs = [v.name for v in self.session.get_outputs()]
        return TensorIOMode.OUTPUT if name in outputs else TensorIOMode.INPUT

    def get_tensor_profile_shape(self, name, index):
        assert index == 0
        fixed = next(v.shape for v in self._all if v.name == name)
        return self.profile.get(name, [fixed] * 3)

    def get_tensor_dtype(self, name):
        return next(_TYPES[v.type] for v in self._all if v.name == name)


class Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._places = engine, {}, {}

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self._places[name] = address
        return True

    def get_tensor_shape(self, name):
        feeds = {
            v.name: np.zeros(self._shapes[v.name], _TYPES[v.type]) for v in self._engine.session.get_inputs()
        }
        return self._engine.session.run([name], feeds)[0].shape

    def execute_async_v3(self, stream):
        feeds = {}
        for value in self._engine.session.get_inputs():
            feeds[value.name] = np.empty(self._shapes[value.name], _TYPES[value.type])
            ctypes.memmove(feeds[value.name].ctypes.data, self._places[value.name], feeds[value.name].nbytes)
        names = [v.name for v in self._engine.session.get_outputs()]
        for name, array in zip(names, self._engine.session.run(names, feeds), strict=True):
            found = -array if os.environ.get("FAKE_TENSORRT_WRONG") else array
            ctypes.memmove(self._places[name], np.ascontiguousarray(found).ctypes.data, found.nbytes)
        return True


class IPluginRegistry:
    def load_library(self, plugin_path):
        with open(os.environ["FAKE_TENSORRT_LOG"], "a") as log:
            log.write(f"a plug-in: {os.path.basename(plugin_path)}\n")
        return object() if os.path.getsize(plugin_path) else None


def get_plugin_registry():
    return IPluginRegistry()


def nptype(kind):
    return kind
