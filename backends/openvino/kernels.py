"""Which kernels compute convolutions, chosen for each layer by measurement.

OpenVINO takes the first of oneDNN's implementations that can, by rules that do not know the processor's caches. The others give
the same numbers (integers exactly), and which is fastest depends on the layer: on processors with AMX the first convolution of
a network, with three channels, runs twice as fast without it. The plugin reads an order of preference from the attribute
``primitives_priority`` of a layer, which its Python interface cannot set; so it is written into the text of the model, in memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from optkit.errors import ModelError

# A family of implementations, by oneDNN's name: "jit" are generated for one convolution as a whole, "brgconv" call the
# batch-reduce GEMM.
Kernel = Literal["jit_avx512", "brgconv_avx512", "jit_avx512_amx"]

# Grouped and depthwise convolutions stay with OpenVINO's choice: there no other was ever faster.
_LAYER = "Convolution"
_AVX512, _AMX = frozenset({"avx512f", "avx512bw", "avx512vl"}), frozenset({"amx_int8", "amx_bf16"})

# Runs that are counted, and the CPU seconds that they may take; before them some that are not.
_RUNS, _SECONDS, _WARMUP = 40, 1.0, 3
# Of a layer's times the one that counts: what others of the machine do makes them longer, never shorter.
_LOW = 20
# By how much a kernel has to be faster to be taken.
_WORTH = 0.95


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a compiled model.

    Attributes:
        kernel: Name of the implementation.
        seconds: Of wall-clock, in the run that ``_LOW`` percent of the others beat.
    """

    kernel: str
    seconds: float


def available(features: frozenset[str]) -> tuple[Kernel, ...]:
    """What there is beside OpenVINO's own choice on a processor with these instruction sets."""
    if not features >= _AVX512:
        return ()
    # Without AMX the choice is "brgconv_avx512" already.
    return ("jit_avx512", "brgconv_avx512", "jit_avx512_amx") if features >= _AMX else ("jit_avx512",)


def layers(file: Path) -> list[str]:
    """Names of the convolutions of a model that kernels may be preferred for.

    Raises:
        ModelError: The file is not XML.
    """
    return [str(layer.get("name")) for layer in _parsed(file).iterfind("layers/layer") if _takes(layer)]


def preferring(file: Path, kernels: Mapping[str, Kernel]) -> bytes:
    """The text of a model whose convolutions prefer these kernels, by the layer's name; layers that it lacks are passed over.

    Raises:
        ModelError: The file is not XML.
    """
    root = _parsed(file)
    for layer in root.iterfind("layers/layer"):
        if _takes(layer) and (kernel := kernels.get(str(layer.get("name")))):
            _prefer(layer, kernel)
    text: bytes = ElementTree.tostring(root)
    return text


def fastest(
    names: Sequence[str],
    families: Sequence[Kernel],
    measure: Callable[[Mapping[str, Kernel]], Mapping[str, Layer]],
) -> list[dict[str, Kernel]]:
    """Choices of kernels worth a comparison as a whole: the fastest for each layer, and one for all that is faster in all.

    Args:
        names: Of the convolutions.
        measure: Times of the layers, with these kernels preferred.

    Layers beside convolutions count in the whole: kernels differ in the layouts that they want.
    """
    usual = measure({})
    best, mixed = dict(usual), dict[str, Kernel]()
    least, uniform = _total(usual), dict[str, Kernel]()
    for family in families:
        alone = dict.fromkeys(names, family)
        times = measure(alone)
        for name in names:
            one, other = times.get(name), best.get(name)
            if one is None or other is None or one.kernel == usual[name].kernel:
                continue
            if one.seconds < _WORTH * usual[name].seconds and one.seconds < other.seconds:
                best[name], mixed[name] = one, family
        if _total(times) < least:
            least, uniform = _total(times), alone
    return [found for found in (mixed, uniform if uniform != mixed else {}) if found]


def times(run: Callable[[], object], counters: Callable[[], Sequence[Any]]) -> dict[str, Layer]:
    """Layers of a compiled model, by name.

    Args:
        run: Runs it.
        counters: OpenVINO's, of the latest run.
    """
    for _ in range(_WARMUP):
        run()
    taken, kernels = defaultdict[str, list[float]](list), dict[str, str]()
    start = time.process_time()
    for index in range(_RUNS):
        run()
        for layer in counters():
            taken[layer.node_name].append(layer.real_time.total_seconds())
            kernels[layer.node_name] = layer.exec_type
        if index >= 4 and time.process_time() - start > _SECONDS:
            break
    return {name: Layer(kernels[name], float(np.percentile(t, _LOW))) for name, t in taken.items()}


def _total(times: Mapping[str, Layer]) -> float:
    return sum(layer.seconds for layer in times.values())


def _parsed(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        raise ModelError(f"{file.name}: is not XML: {error}") from error


def _takes(layer: ElementTree.Element) -> bool:
    return layer.get("type") == _LAYER


def _prefer(layer: ElementTree.Element, kernel: Kernel) -> None:
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        data = layer.find("data")
        layer.insert(0 if data is None else list(layer).index(data) + 1, info)
    order = f"cpu:{kernel}_1x1,cpu:{kernel}"
    ElementTree.SubElement(info, "attribute", name="primitives_priority", version="0", value=order)
