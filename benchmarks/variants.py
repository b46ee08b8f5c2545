"""The ways to run one model that are compared: the original, optkit's artifacts, and what other tools make of it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import optkit
from optkit.backends import BACKENDS
from optkit.backends.base import Backend, Executed
from optkit.benchmarks.peers import Batches, Peer
from optkit.benchmarks.peers_openvino import Session
from optkit.errors import BackendUnavailableError
from optkit.evaluate import Run
from optkit.reference import ReferenceSession
from optkit.targets import target

logger = logging.getLogger(__name__)

REFERENCE = "ORT fp32"
OURS, OURS_ORT, OURS_EXACT = "optkit", "optkit, ONNX Runtime alone", "optkit, exact only"

# ONNX Runtime with every optimizer that it has, as users get it.
_STOCK = {"disabled_optimizers": ()}

Feeds = Mapping[str, np.ndarray]


@dataclass(slots=True, kw_only=True)
class Variant:
    """A way to run the model, or why there is none.

    Attributes:
        open: Gives ``run`` once more, in another process.
        executed: What the runtime really runs for some feeds.
        seconds: CPU time that making it took.
    """

    name: str
    open: Callable[[], Run] | None = None
    run: Run | None = None
    bytes: int | None = None
    note: str = ""
    error: str | None = None
    seconds: float = 0.0
    executed: Callable[[Feeds], Sequence[Executed]] | None = None


@dataclass(slots=True, kw_only=True)
class Work:
    """One model, and what all its variants are made from."""

    model: Path
    batches: Batches
    folder: Path
    reference: ReferenceSession
    made: dict[str, Path | Exception] = field(default_factory=dict)


def variants(work: Work, ours: Mapping[str, Mapping[str, Any]], peers: Sequence[Peer]) -> Iterator[Variant]:
    """The reference, then optkit's with the options given for each, then the peers.

    A variant that cannot be made is one with its error.
    """
    yield _variant(REFERENCE, partial(_original, work))
    for name, options in ours.items():
        yield _variant(name, partial(_compiled, work, name, options))
    for peer in peers:
        yield _variant(peer.name, partial(_stock, work, peer))


def _variant(name: str, make: Callable[[], Variant]) -> Variant:
    logger.info("  making %s", name)
    start = time.process_time()
    try:
        variant = make()
    except BackendUnavailableError as error:
        variant = Variant(name=name, error=str(error))
    except Exception as error:  # noqa: BLE001  (the quantizers raise anything; the row says what)
        variant = Variant(name=name, error=brief(f"{type(error).__name__}: {error}"))
    variant.seconds = time.process_time() - start
    return variant


def brief(message: str) -> str:
    """One line without folders, which differ from machine to machine."""
    return re.sub(r"(?:/[\w.@+~-]+)+/", "", " ".join(message.split()))[:300]


def _original(work: Work) -> Variant:
    folder = work.folder / "reference"
    folder.mkdir()
    (folder / "model.onnx").symlink_to(work.model.resolve())
    return Variant(
        name=REFERENCE,
        open=partial(_reference, work.model),
        run=work.reference.run,
        bytes=work.model.stat().st_size,
        executed=partial(_executed, "onnxruntime", folder, _STOCK),
    )


def _compiled(work: Work, name: str, options: Mapping[str, Any]) -> Variant:
    out = work.folder / name.replace(" ", "-").replace(",", "")
    artifact, report = optkit.compile(work.model, target="cpu", out=out, **options)
    shipped = next((c.name for c in report.candidates if c.verdict == "shipped"), "")
    notes = [shipped if shipped != "recipe" else "", *report.missed, *report.inconclusive]
    return Variant(
        name=name,
        open=partial(_artifact, out),
        run=_artifact(out),
        bytes=sum(f.bytes for f in artifact.manifest.files),
        note="; ".join(filter(None, notes)),
        executed=lambda feeds: artifact.backend.executed(out, target("cpu"), artifact.options, feeds),
    )


def _stock(work: Work, peer: Peer) -> Variant:
    maker = peer.like or peer.name
    if maker not in work.made:
        folder = work.folder / maker.replace(" ", "-").replace(",", "")
        folder.mkdir()
        try:
            work.made[maker] = peer.make(work.model, work.batches, folder)
        except Exception as error:
            work.made[maker] = error
            raise
    file = work.made[maker]
    if isinstance(file, Exception):
        raise file
    if peer.runtime == "openvino":
        open_: Callable[[], Run] = partial(_openvino, file, work.reference.outputs, peer.precision)
        size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
        options: Mapping[str, Any] = {"precision": peer.precision or "auto"}
    else:
        size, options = file.stat().st_size, _STOCK
        file = file.rename(file.with_name("model.onnx"))
        open_ = partial(_reference, file)
    return Variant(
        name=peer.name,
        open=open_,
        run=open_(),
        bytes=size,
        executed=partial(_executed, peer.runtime, file.parent, options),
    )


def _reference(file: Path) -> Run:
    return ReferenceSession(file).run


def _artifact(folder: Path) -> Run:
    return optkit.load(folder).session(threads=1).run


def _openvino(file: Path, outputs: Sequence[str], precision: str | None) -> Run:
    return Session(file, outputs, precision).run


def _executed(backend: str, folder: Path, options: Mapping[str, Any], feeds: Feeds) -> Sequence[Executed]:
    engine: Backend = BACKENDS[backend]()
    return engine.executed(folder, target("cpu"), engine.options.model_validate(options), feeds)
