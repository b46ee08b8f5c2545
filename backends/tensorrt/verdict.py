"""What TensorRT-RTX said about a graph, and what its plan shows, as it is kept in the artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from optkit.arithmetic import FLOATS
from optkit.backends.tensorrt import plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optkit.backends.tensorrt.rtx import Verdict

FILE = "rtx.json"


class Record(BaseModel):
    """One attempt to build.

    Attributes:
        capability: What it was built for, as TensorRT-RTX calls it.
        proxy: Whether that is another card than the target.
        message: Why nothing was built; empty where it was.
        sha256: Of the engine.
        operations: Launches by their kind, as the plan shows them; empty where it is not readable.
        products: ONNX nodes with products -> what the plan multiplies them in; those that it does not name are missing.
        unused: What the graph has its quantized products in, where the plan shows none of them in anything but floats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    capability: str
    proxy: bool
    built: bool
    message: str
    bytes: int
    sha256: str
    operations: dict[str, int]
    products: dict[str, str]
    unused: str = ""

    @classmethod
    def of(
        cls, said: Verdict, engine: Path, formats: Mapping[str, str], *, capability: str, proxy: bool
    ) -> Record:
        """What was said, with what the plan in ``engine`` shows of the products whose ``formats`` the graph has by name."""
        found = plan.read(engine.read_bytes()) if said.built else []
        kinds = Counter(operation.kind for operation in found if not operation.nested)
        products = plan.product_formats(found, list(formats))
        shown = {n: fmt for n, fmt in products.items() if formats[n] not in FLOATS}
        idle = bool(shown) and set(shown.values()) <= FLOATS
        return cls(
            version=said.version, capability=capability, proxy=proxy, built=said.built, message=said.message,
            bytes=said.bytes, sha256=said.sha256, operations=dict(sorted(kinds.items())),
            products=products, unused=", ".join(sorted({formats[n] for n in shown})) if idle else "",
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record of an artifact; None where nothing was tried."""
        file = path / FILE
        return cls.model_validate_json(file.read_bytes()) if file.is_file() else None

    def save(self, path: Path) -> None:
        """Keep it in the folder ``path``."""
        (path / FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @property
    def where(self) -> str:
        """For the placement of products."""
        return f"TensorRT-RTX plan for {self.capability}{' (proxy)' if self.proxy else ''}"
