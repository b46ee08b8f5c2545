"""What a user gets from other tools, on the same file with the same calibration data; here ONNX Runtime's own quantizers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from optkit.benchmarks import peers_openvino

Batches = Sequence[Mapping[str, np.ndarray]]

# Per-channel scales need DequantizeLinear-13; 17 also has LayerNormalization.
_OPSET = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to make a model faster, and to run it.

    Args:
        make: ``make(model, batches, folder)`` gives the file it wrote in ``folder``.
        runtime: What runs it.
        precision: OpenVINO's hint; None is its own default.
        like: Name of the peer whose file this one runs too.
    """

    name: str
    make: Callable[[Path, Batches, Path], Path]
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    precision: str | None = None
    like: str | None = None


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Batches) -> None:
        self._next: Iterator[Mapping[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._next, None)
        return None if batch is None else dict(batch)


def _static_defaults(model: Path, batches: Batches, folder: Path) -> Path:
    path = folder / "static-defaults.onnx"
    with _quiet():
        quantize_static(str(model), str(path), _Reader(batches))
    return path


def _static_u8s8(model: Path, batches: Batches, folder: Path) -> Path:
    """The set-up that ONNX Runtime's documentation advises for x86 with VNNI."""
    path, prepared = folder / "static-u8s8.onnx", folder / "prepared.onnx"
    with _quiet():
        prepare(model, prepared)

        def quantize(**extra: bool) -> None:
            quantize_static(
                str(prepared),
                str(path),
                _Reader(batches),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=extra,
            )

        try:
            quantize()
        except ValueError:
            # ONNX Runtime 1.32 stumbles where it widens weight scales for the sake of a bias.
            quantize(QDQDisableWeightAdjustForInt32Bias=True)
    return path


def prepare(model: Path, path: Path) -> None:
    """Opset 17 at least, then ONNX Runtime's own preparation; without symbolic shapes where those fail."""
    path = path.resolve()
    graph = onnx.load(model)
    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    raised = path.with_suffix(".raised.onnx")
    onnx.save(graph if opset >= _OPSET else version_converter.convert_version(graph, _OPSET), raised)
    # It leaves files in the working directory where it fails.
    with contextlib.chdir(path.parent):
        try:
            quant_pre_process(str(raised), str(path))
        except Exception:  # noqa: BLE001  (symbolic shape inference raises bare Exception)
            quant_pre_process(str(raised), str(path), skip_symbolic_shape=True)


def _dynamic(model: Path, folder: Path, name: str, **options: Any) -> Path:
    path = folder / f"{name}.onnx"
    with _quiet():
        quantize_dynamic(str(model), str(path), per_channel=True, weight_type=QuantType.QInt8, **options)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizers' advice off the root logger, which they write to."""
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.root.setLevel(level)


ORT_PEERS = (
    Peer(name="ORT static, defaults", make=_static_defaults),
    Peer(name="ORT static, U8S8 per channel", make=_static_u8s8),
    Peer(name="ORT dynamic", make=lambda m, _, folder: _dynamic(m, folder, "dynamic")),
    Peer(
        name="ORT dynamic, MatMul only",
        make=lambda m, _, folder: _dynamic(m, folder, "dynamic-matmul", op_types_to_quantize=["MatMul"]),
    ),
)


def peers(*, transformer: bool) -> tuple[Peer, ...]:
    """All of them, for a model that is an encoder or not."""

    def fp32(model: Path, batches: Batches, folder: Path) -> Path:
        return peers_openvino.convert(model, folder)

    def nncf(model: Path, batches: Batches, folder: Path) -> Path:
        return peers_openvino.quantize(model, batches, folder, transformer=transformer)

    return (
        *ORT_PEERS,
        Peer(name="OpenVINO fp32", make=fp32, runtime="openvino", precision="f32"),
        Peer(name="NNCF, hint f32", make=nncf, runtime="openvino", precision="f32"),
        Peer(name="NNCF, defaults", make=nncf, runtime="openvino", like="NNCF, hint f32"),
    )
