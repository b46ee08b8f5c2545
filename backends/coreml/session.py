"""A package running: in the reference evaluator, or on a Mac in Core ML itself."""

from __future__ import annotations

import importlib
import platform
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends.base import Session, misnamed, mistyped
from optkit.backends.coreml.interface import SCORES, Interface, Picture, Port
from optkit.backends.coreml.package import PACKAGE
from optkit.backends.coreml.quiet import ct, silence
from optkit.backends.coreml.reference.machine import Machine, Watch
from optkit.backends.coreml.reference.program import Package
from optkit.errors import BackendUnavailableError, DataError, ModelError

_KINDS = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32}
_INT32 = np.iinfo(np.int32)


class PackageSession(Session):
    """What both have in common: the model's own names and types outside, the package's inside."""

    def __init__(self, folder: Path) -> None:
        self.interface = Interface.read(folder)
        self.inputs = tuple(p.spec for p in self.interface.inputs if not p.state)
        self.outputs = tuple(p.spec for p in self.interface.outputs if not p.state)
        self.kept = tuple(p.spec for p in self.interface.inputs if p.state)

    @abstractmethod
    def compute(self, features: dict[str, np.ndarray]) -> Mapping[str, Any]:
        """Outputs of the package by its own names."""

    @abstractmethod
    def state(self, feature: str) -> np.ndarray:
        """What is kept now."""

    @abstractmethod
    def keep(self, feature: str, value: np.ndarray) -> None:
        """Let a state be ``value``, in float16."""

    def features(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The package's inputs, and states where they are given.

        Raises:
            DataError: Names, types, sizes or values are not those that the package takes.
        """
        ports = self._ports(feeds)
        if set(feeds) != {p.name for p in ports}:
            raise misnamed((p.name for p in ports), feeds)
        sizes: dict[str, int] = {}
        found = {p.feature: self._stored(p, np.asarray(feeds[p.name]), sizes) for p in ports}
        self._check_sizes(sizes)
        return found

    def _ports(self, feeds: Mapping[str, np.ndarray]) -> list[Port]:
        """What ``feeds`` has to hold: states as well as soon as it has one of them."""
        states = [p for p in self.interface.inputs if p.state]
        whole = any(p.name in feeds for p in states)
        return [p for p in self.interface.inputs if whole or not p.state]

    def _stored(self, port: Port, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        if array.dtype != np.dtype(port.dtype):
            raise mistyped(port.name, array.dtype, port.dtype)
        shape = port.shape or ()
        if array.ndim != len(shape):
            raise DataError(f"input {port.name!r} is {list(array.shape)}, the package takes {port.spec}")
        for have, want in zip(array.shape, shape, strict=True):
            if isinstance(want, str):
                want = sizes.setdefault(want, have)
            if want is not None and have != want:
                raise DataError(f"input {port.name!r} is {list(array.shape)}, the package takes {port.spec}")
        wide = array.dtype in (np.int64, np.uint64) and array.size > 0
        if wide and (array.min() < _INT32.min or array.max() > _INT32.max):
            raise DataError(f"input {port.name!r} holds integers beyond 32 bits, and Core ML has none")
        if port.picture is not None:
            port.picture.check(array, port.name)
            array = port.picture.pixels(array)
        array = array.reshape(1) if port.scalar else array
        return np.ascontiguousarray(array.astype(_KINDS[port.stored], copy=False))

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        hint = "give options.shapes other sizes when compiling"
        for name, size in sizes.items():
            low, high = self.interface.ranged.get(name, (size, size))
            if not low <= size <= high:
                raise DataError(f"axis {name} is {size}; the package takes {low} to {high}", hint=hint)
        listed = self.interface.listed
        if listed and tuple(sizes[k] for k in listed) not in set(zip(*listed.values(), strict=True)):
            given = ", ".join(f"{k} {sizes[k]}" for k in listed)
            known = "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in listed.items())
            raise DataError(f"{given} is none of the listed sizes ({known})", hint=hint)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, in the model's own types.

        With states among ``feeds`` these are set before, and their next values are among the outputs: what the graph does.
        """
        features = self.features(feeds)
        states = [p.feature for p in self._ports(feeds) if p.state]
        for name in states:
            self.keep(name, features.pop(name))
        found = self.compute(features)
        outputs = {}
        for port in self.interface.outputs:
            if port.state and not states:
                continue
            array = self.state(port.feature) if port.state else _array(port, found)
            array = array.reshape(()) if port.scalar else array
            outputs[port.name] = array.astype(np.dtype(port.dtype))
        return outputs

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether the package's sizes are those of ``feeds``."""
        try:
            self.features(feeds)
        except DataError:
            return False
        return True


def _array(port: Port, found: Mapping[str, Any]) -> np.ndarray:
    if not port.labels:
        return np.asarray(found[port.feature])
    scores = found[SCORES]
    return np.asarray([scores[name] for name in port.labels]).reshape([int(d or 1) for d in port.shape or ()])


class ReferenceSession(PackageSession):
    """The package in the reference evaluator.

    Raises:
        ModelError: The package cannot be read, or has operations that the evaluator does not know.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        package = Package(folder / PACKAGE)
        if "main" not in package.functions:
            raise ModelError(f"{PACKAGE}: has no function 'main'")
        self.machine = Machine(package.functions["main"])

    def compute(self, features: dict[str, np.ndarray], watch: Watch | None = None) -> Mapping[str, Any]:
        """One run of the machine."""
        return self.machine.run(features, watch)

    def state(self, feature: str) -> np.ndarray:
        """As the machine keeps it."""
        return self.machine.state[feature]

    def keep(self, feature: str, value: np.ndarray) -> None:
        """In the type that the program declares."""
        self.machine.state[feature] = value.astype(self.machine.state[feature].dtype)

    def reset(self) -> None:
        """All states are 0 again."""
        self.machine.reset()

    def close(self) -> None:
        """Forget the program and its constants."""
        del self.machine


class MacSession(PackageSession):
    """The package in Core ML; on a Mac alone.

    Raises:
        ModelError: Core ML does not take it.
    """

    def __init__(self, folder: Path, units: str) -> None:
        super().__init__(folder)
        self._pictures = {p.feature: p.picture for p in self.interface.inputs if p.picture is not None}
        try:
            with silence():
                self._model = ct.models.MLModel(str(folder / PACKAGE), compute_units=ct.ComputeUnit[units])
                self._state = (
                    self._model.make_state() if any(p.state for p in self.interface.inputs) else None
                )
        except Exception as error:
            raise ModelError(f"{PACKAGE}: Core ML cannot load it: {error}") from error

    def compute(self, features: dict[str, np.ndarray]) -> Mapping[str, Any]:
        """One prediction."""
        # Core ML frees what it is given on a thread of its own; so it gets copies that stay.
        self._held = {k: self._given(k, v) for k, v in features.items()}
        try:
            found: Mapping[str, Any] = self._model.predict(self._held, state=self._state)
        except Exception as error:
            raise ModelError(f"Core ML stopped: {error}") from error
        return found

    def _given(self, feature: str, array: np.ndarray) -> Any:
        picture = self._pictures.get(feature)
        return array.copy() if picture is None else _image(array, picture)

    def state(self, feature: str) -> np.ndarray:
        """As Core ML keeps it."""
        assert self._state is not None
        return np.asarray(self._state.read_state(feature))

    def keep(self, feature: str, value: np.ndarray) -> None:
        """In float16, which states have."""
        assert self._state is not None
        self._state.write_state(feature, value.astype(np.float16))

    @property
    def compiled(self) -> str:
        """Where Core ML put the compiled model, as long as this is open."""
        return str(self._model.get_compiled_model_path())

    def reset(self) -> None:
        """A state of zeros."""
        if self._state is not None:
            self._state = self._model.make_state()

    def close(self) -> None:
        """Free the model."""
        del self._model


def _image(pixels: np.ndarray, picture: Picture) -> Any:
    """``pixels [1, C, H, W]`` as the picture that Core ML takes: grey, or red first whatever the network wants first."""
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise BackendUnavailableError(
            "pictures are handed to Core ML through pillow, which is missing", hint="pip install pillow"
        ) from error
    whole = pixels[0].astype(np.uint8)
    if picture.color == "G":
        return pillow.fromarray(whole[0])
    order = [2, 1, 0] if picture.color == "BGR" else [0, 1, 2]
    return pillow.fromarray(np.ascontiguousarray(whole[order].transpose(1, 2, 0)))


def has_core_ml() -> bool:
    """Whether this machine runs packages itself."""
    return platform.system() == "Darwin"
