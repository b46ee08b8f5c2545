"""Which kernels compute convolutions.

OpenVINO takes the first of oneDNN's implementations that can: on x86 those that call the batch-reduce GEMM ("brgconv"). The
older ones, generated for one convolution as a whole ("jit"), give the same numbers and are faster on some processors and
shapes. The plugin reads an order of preference from the attribute ``primitives_priority`` of a layer, which its Python
interface cannot set; so it is written into the text of the model, in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from optkit.errors import ModelError

Kernels = Literal["default", "jit"]

# Grouped and depthwise convolutions stay with OpenVINO's choice: there the older kernels were never faster.
_LAYER = "Convolution"
_ORDER = "cpu:jit_avx512_1x1,cpu:jit_avx512"
# Instruction sets with and without which these kernels are worth a measurement.
_WITH, _WITHOUT = frozenset({"avx512f", "avx512bw", "avx512vl"}), frozenset({"amx_int8"})


def proposed(features: frozenset[str]) -> bool:
    """Whether a processor with these instruction sets may be faster with the older kernels."""
    return features >= _WITH and not features & _WITHOUT


def preferring(file: Path) -> bytes:
    """The text of a model whose convolutions prefer the older kernels.

    Raises:
        ModelError: The file is no XML.
    """
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        raise ModelError(f"{file.name}: is no XML: {error}") from error
    for layer in root.iterfind("layers/layer"):
        if layer.get("type") == _LAYER:
            _prefer(layer)
    text: bytes = ElementTree.tostring(root)
    return text


def _prefer(layer: ElementTree.Element) -> None:
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        data = layer.find("data")
        layer.insert(0 if data is None else list(layer).index(data) + 1, info)
    ElementTree.SubElement(info, "attribute", name="primitives_priority", version="0", value=_ORDER)
