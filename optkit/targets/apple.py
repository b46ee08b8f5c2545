"""Apple's devices. Core ML decides what runs on the Neural Engine, the GPU or the processor; the rows say what they can do."""

from __future__ import annotations

from optkit.targets.spec import Target

_GIB = 1 << 30
# coremltools guide, "Quantization Overview": "int8-int8 compute is available on the Neural Engine from A17 Pro and M4 on".
_FLOATS = frozenset({"fp32", "fp16"})
_INT8 = _FLOATS | {"int8"}
# The system that all of these devices run (Apple, "iPhone models compatible with iOS 18" and its like for iPadOS 18 and
# macOS 15, which read the same version of ML Programs), and the first with every compressed form of weights.
_SYSTEM = "iOS18"
# coremltools 9.0: _SPECIFICATION_VERSION_IOS_18, which is that of macOS 15 as well.
_SPECIFICATION = 9
# All of them have the three (Apple, specifications of A14 to A19 and M1 to M5).
_UNITS = ("Neural Engine", "GPU", "CPU")
_READ = (
    "file format of the system: coremltools 9.0; compute units: coremltools guide, 'Set the Compute Units'"
)
# MIL takes no more (coremltools: "Core ML only supports tensors with rank <= 5").
_AXES = 5


def _phone(number: str, chip: str, memory: int, formats: frozenset[str]) -> Target:
    return Target(
        name=f"iphone{number}", vendor="apple", arch=chip, backends=("coreml",), formats=formats, memory=memory * _GIB, system=_SYSTEM,
        specification=_SPECIFICATION, compute_units=_UNITS, axes=_AXES,
        source="chip: Apple, technical specifications of the model; memory: reported by developers' tools, Apple states neither it nor "
        f"the bandwidth; {_READ}",
    )  # fmt: skip


def _mac(name: str, chip: str, memory: int, bandwidth: float, formats: frozenset[str], source: str) -> Target:
    return Target(
        name=name, vendor="apple", arch=chip, backends=("coreml",), formats=formats, memory=memory * _GIB,
        bandwidth=bandwidth * 1e9, system=_SYSTEM, specification=_SPECIFICATION, compute_units=_UNITS, axes=_AXES,
        source=f"{source}; memory: of the smallest configuration; {_READ}",
    )  # fmt: skip


ROWS = (
    _phone("12", "A14", 4, _FLOATS),
    _phone("13", "A15", 4, _FLOATS),
    _phone("14", "A15", 6, _FLOATS),
    _phone("15", "A16", 6, _FLOATS),
    _phone("15-pro", "A17 Pro", 8, _INT8),
    _phone("16", "A18", 8, _INT8),
    _phone("17", "A19", 8, _INT8),
    _mac("ipad-m4", "M4", 8, 120, _INT8, "Apple newsroom, 7 May 2024: 120 GB/s"),
    _mac("mac-m1", "M1", 8, 68.25, _FLOATS, "Apple, MacBook Air (M1, 2020) specifications: 68.25 GB/s"),
    _mac("mac-m2", "M2", 8, 100, _FLOATS, "Apple newsroom, 6 June 2022: 100 GB/s"),
    _mac("mac-m3", "M3", 8, 100, _FLOATS, "Apple, MacBook Air (M3, 2024) specifications: 100 GB/s"),
    _mac("mac-m4", "M4", 16, 120, _INT8, "Apple, MacBook Pro (14-inch, M4, 2024) specifications: 120 GB/s"),
    _mac("mac-m5", "M5", 16, 153, _INT8, "Apple newsroom, 15 October 2025: 153 GB/s"),
    Target(
        name="apple-ane", vendor="apple", arch="Neural Engine", backends=("coreml",), formats=frozenset({"fp16"}), system=_SYSTEM,
        specification=_SPECIFICATION, compute_units=_UNITS, convolves=True, axes=4, lacks={"fp32": "the Neural Engine computes in float16"},
        source="any device since A14 and M1; the Neural Engine computes in float16 (Apple, ml-ane-transformers), and what it does not "
        f"take runs on the other units; {_READ}",
    ),
    Target(
        name="coreai", vendor="apple", arch="Core AI on iOS 27 and macOS 27; experimental", backends=("coreai",), formats=_FLOATS,
        experimental=True, system="iOS27", source="Apple, coreai-core 1.0.0b3: the oldest system that its assets are serialized for is 27",
    ),
)  # fmt: skip
