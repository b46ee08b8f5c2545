"""What the package's inputs and outputs are in the model: Core ML renames, narrows and knows no scalars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, model_validator

from optkit.backends.coreml.quiet import sanitizer
from optkit.backends.coreml.shapes import Axes, keys
from optkit.data import TensorSpec
from optkit.errors import DataError, ModelError
from optkit.words import Worded

FILE = "interface.json"
# What a classifier gives: the name of the likeliest class, and a dictionary of all.
LABEL, SCORES = "classLabel", "classLabel_probs"

_STORED = {
    ir.DataType.FLOAT: "fp32", ir.DataType.DOUBLE: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BOOL: "int32",
    ir.DataType.INT64: "int32", ir.DataType.INT32: "int32", ir.DataType.INT16: "int32", ir.DataType.UINT16: "int32",
    ir.DataType.INT8: "int32", ir.DataType.UINT8: "int32",
}  # fmt: skip


class Picture(Worded):
    """An input that takes pictures: the network gets ``pixel * scale + bias``.

    Attributes:
        bias: Of each channel, or one for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(allow_inf_nan=False)
    bias: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    color: Literal["RGB", "BGR", "G"] = "RGB"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.scale:
            raise ValueError("a scale of 0 makes all pixels alike")
        if len(self.bias) not in (1, self.channels):
            raise ValueError(
                f"{self.color} has {self.channels} channel(s), and bias {len(self.bias)} numbers"
            )
        return self

    @property
    def channels(self) -> int:
        """Of a picture."""
        return 1 if self.color == "G" else 3

    @property
    def biases(self) -> np.ndarray:
        """``[1, C, 1, 1]``."""
        return np.broadcast_to(np.asarray(self.bias, np.float32), self.channels).reshape(1, -1, 1, 1)

    def pixels(self, array: np.ndarray) -> np.ndarray:
        """The nearest picture, in whole numbers up to 255, to what the network gets."""
        found: np.ndarray = np.clip(np.rint(self._levels(array)), 0, 255)
        return found

    def check(self, array: np.ndarray, name: str) -> None:
        """Refuse what is no picture by more than a level.

        Raises:
            DataError: Values lie beyond those of all pixels.
        """
        levels = self._levels(array)
        if levels.size and not (levels.min() > -1 and levels.max() < 256):
            bias = ", ".join(f"{b:g}" for b in self.bias)
            raise DataError(
                f"input {name!r} holds {array.min():.4g} to {array.max():.4g}, which no picture gives as pixel * {self.scale:g} + "
                f"({bias}): pixels would be {levels.min():.4g} to {levels.max():.4g}",
                hint="give what the network gets, not pixels; if that is what was given, correct options.pictures",
            )

    def _levels(self, array: np.ndarray) -> np.ndarray:
        found: np.ndarray = (array - self.biases) / np.float32(self.scale)
        return found

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """What the network gets of a picture."""
        found: np.ndarray = pixels * np.float32(self.scale) + self.biases
        return found

    def fed(self, array: np.ndarray, *, drawn: bool) -> np.ndarray:
        """What the network gets of the nearest picture or, where ``array`` was drawn from N(0, 1), of pixels around the middle."""
        pixels = np.clip(np.rint(array * 64 + 128), 0, 255) if drawn else self.pixels(array)
        return self.values(pixels).astype(array.dtype)


class Port(BaseModel):
    """An input or output.

    Attributes:
        name: In the model.
        feature: In the package; the next value of a state goes by the name of the state.
        dtype: NumPy's name of the type in the model.
        stored: The type in the package.
        shape: In the model: sizes, and names of free axes.
        scalar: Whether the model has no axes and the package one of size 1.
        state: Whether it is kept inside between runs.
        picture: How values become pixels, where the package takes a picture.
        labels: Names of the classes in order, where the package gives a dictionary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    feature: str
    dtype: str
    stored: str
    shape: tuple[int | str | None, ...] | None
    scalar: bool = False
    state: bool = False
    picture: Picture | None = None
    labels: tuple[str, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """As sessions say it."""
        return TensorSpec(name=self.name, dtype=np.dtype(self.dtype), shape=self.shape)


class Interface(BaseModel):
    """All ports, and the sizes that free axes may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    listed: dict[str, tuple[int, ...]] = {}
    ranged: dict[str, tuple[int, int]] = {}

    def write(self, folder: Path) -> None:
        """Beside the package."""
        (folder / FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Interface:
        """What ``write`` wrote.

        Raises:
            ModelError: It is missing or not what it should be.
        """
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{FILE}: the artifact's description of its inputs cannot be read: {error}"
            ) from error


def feature(name: str, taken: set[str]) -> str:
    """``name`` as Core ML takes it: letters, digits and underscores, not a digit first, no word of its language; unique."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    plain = f"_{plain}" if plain[0].isdigit() else plain
    found, n = plain, 1
    # Words such as `state` and `tensor`: coremltools would rename them while it converts.
    while found in taken or sanitizer().sanitize_name(found) != found:
        found, n = f"{plain}_{n}", n + 1
    taken.add(found)
    return found


def describe_ports(
    model: ir.Model, axes: Axes, states: dict[str, str], pictures: dict[str, Picture], labels: dict[str, tuple[str, ...]]
) -> Interface:  # fmt: skip
    """The interface of ``model``.

    Raises:
        ModelError: An input or output has a type or a shape that Core ML has not.
    """
    taken: set[str] = {LABEL, SCORES} if labels else set()

    def port(value: ir.Value, *, state: bool, kept_in: str | None = None) -> Port:
        if value.dtype not in _STORED:
            kind = value.dtype.name.lower() if value.dtype is not None else str(value.type)
            raise ModelError(f"{value.name!r} is of type {kind}, which no input or output of Core ML has")
        if value.shape is not None and len(value.shape) > 5:
            raise ModelError(f"{value.name!r} has {len(value.shape)} axes, and Core ML has at most 5")
        shape = None if value.shape is None else tuple(axes.fixed.get(str(k), k) for k in keys(value))
        if 0 in (shape or ()):
            raise ModelError(
                f"{value.name!r} is {list(shape or ())}, and Core ML has no tensors without elements"
            )
        return Port(
            name=str(value.name), feature=kept_in or feature(str(value.name), taken), dtype=value.dtype.numpy().name,
            stored=_STORED[value.dtype], shape=shape, scalar=shape == (), state=state, picture=pictures.get(str(value.name)),
            labels=labels.get(str(value.name), ()),
        )  # fmt: skip

    inputs = [port(v, state=str(v.name) in states) for v in model.graph.inputs if not v.is_initializer()]
    features = {p.name: p.feature for p in inputs}
    kept = {output: features[name] for name, output in states.items()}
    return Interface(
        inputs=tuple(inputs),
        outputs=tuple(
            port(v, state=str(v.name) in kept, kept_in=kept.get(str(v.name))) for v in model.graph.outputs
        ),
        listed={k: tuple(v) for k, v in axes.listed.items()},
        ranged={k: (v.min, v.max) for k, v in axes.ranged.items()},
    )
