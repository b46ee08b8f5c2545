"""What a TensorRT-RTX engine will run, read from the file.

The format is not documented. In version 1.7.1 the program of the compiler lies in the file as text: tensors with their
types, then one line for each operation with the ONNX layers that it stands for. Only that is read here, and a file in which
it is not found gives nothing, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_PROGRAM = re.compile(rb"header \{\n.*?\nmain \{\n(.*?)(?=\nshape_main \{|\nheader \{|\n\})", re.DOTALL)
_TARGET = re.compile(r"accelerators=\{(sm\d+[a-z]?)")
_TENSOR = re.compile(r'tensor=\{ [^\n]*?name="([^"]*)"[^\n]*?type=(\w+)')
_OPERATION = re.compile(r"^  (\w+)=\{ name=(.*?)(?=^  \w+=\{ name=|\Z)", re.DOTALL | re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_LIST = re.compile(r'\b(?:input|input_args)=\{ ?((?:"[^"]*" ?)*)')
# Operations that move values or compute sizes.
_MOVES = frozenset({"copy", "memset", "shape_call", "label"})
_PRODUCTS = frozenset({"fully_connected", "corrltn", "convolution", "deconvolution", "gemm", "batch_matmul"})
_FORMATS = {
    "float": "fp32", "half": "fp16", "bf16": "bf16", "int8": "int8", "fp8_e4m3": "fp8", "e4m3": "fp8", "fp8": "fp8",
    "int4": "int4", "fp4_e2m1": "nvfp4", "fp4": "nvfp4", "e2m1": "nvfp4",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One launch.

    Attributes:
        kind: ``fully_connected``, ``convolution``, ``function`` (elementwise, norms …), ``runtime_fusion`` …
        layers: ONNX nodes that it does, by name.
        formats: Of its inputs, in order; ``?`` where the file does not say.
        nested: Whether it is a part of a fused operation of the main program, which has the same layers.
    """

    kind: str
    name: str
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    nested: bool = False

    @property
    def product(self) -> bool:
        """Whether its arithmetic is a matrix product or convolution."""
        return self.kind in _PRODUCTS or (self.kind == "function" and self.name.startswith("_gemm"))


def read(engine: bytes) -> list[Operation]:
    """The operations of ``engine`` in order; empty where the text is not found."""
    found: list[Operation] = []
    for match in _PROGRAM.finditer(engine):
        text = match[0].decode("latin-1")
        nested = _TARGET.search(text) is None
        found.extend(_operations(match[1].decode("latin-1"), dict(_TENSOR.findall(text)), nested=nested))
    return found


def _operations(text: str, types: Mapping[str, str], *, nested: bool) -> Iterator[Operation]:
    for match in _OPERATION.finditer(text):
        kind, rest = match[1], match[2]
        if kind in _MOVES:
            continue
        inputs = _LIST.search(rest)
        names = re.findall(r'"([^"]*)"', inputs[1]) if inputs else []
        formats = tuple(_FORMATS.get(kind_, kind_) for kind_ in (_type(n, types) for n in names))
        name = rest.split('"', 2)[1] if rest.startswith('"') else rest.split(None, 1)[0]
        yield Operation(
            kind=kind,
            name=name,
            layers=tuple(dict.fromkeys(_LAYER.findall(rest))),
            formats=formats,
            nested=nested,
        )


def _type(name: str, types: Mapping[str, str]) -> str:
    """The type of a tensor; a view of it may be called ``name^deref``, a later value ``name_12``."""
    plain = name.removesuffix("^deref")
    return types.get(name) or types.get(plain) or types.get(re.sub(r"_\d+$", "", plain)) or "?"


def product_formats(operations: Sequence[Operation], products: Sequence[str]) -> dict[str, str]:
    """For each ONNX node of ``products`` the format that the plan multiplies it in; those it does not name are left out.

    Both operands decide: integers times integers is ``int8``; where they differ, it is the wider float.
    """
    found: dict[str, str] = {}
    for operation in operations:
        pair = operation.formats[:2]
        if not operation.product or len(pair) < 2 or "?" in pair:
            continue
        fmt = (
            pair[0]
            if pair[0] == pair[1]
            else next((f for f in ("fp32", "bf16", "fp16") if f in pair), pair[0])
        )
        for layer in (*operation.layers, *operation.name.split("+")):
            if layer in products:
                found.setdefault(layer, fmt)
    return found
