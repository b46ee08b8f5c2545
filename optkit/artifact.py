"""An artifact: a folder with the backend's files, a manifest, the resolved recipe and the report."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from optkit.backends import BACKENDS
from optkit.data import validate
from optkit.errors import DataError, ModelError, UsageError
from optkit.graph import digest
from optkit.report import Manifest
from optkit.targets import target

if TYPE_CHECKING:
    import numpy as np

    from optkit.backends.base import Backend, Options, Session

MANIFEST, RECIPE, REPORT, PAGE = "manifest.json", "recipe.yaml", "report.json", "report.html"
# What was found on the device afterwards; the manifest names no file of it.
DEVICE = "device.json"


@dataclass(frozen=True)
class Artifact:
    """What ``compile`` wrote.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            UsageError: The folder is not an artifact, or of another version.
        """
        file = self.folder / MANIFEST
        if not file.is_file():
            raise UsageError(
                f"{self.folder}: not an artifact: it has no {MANIFEST}",
                hint="give the folder that optkit compile wrote",
            )
        try:
            return Manifest.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise _unreadable(file, error) from error

    @cached_property
    def backend(self) -> Backend:
        """Whose files it holds."""
        return BACKENDS[self.manifest.backend]()  # type: ignore[no-any-return]

    @cached_property
    def options(self) -> Options:
        """The backend's, as the manifest holds them.

        Raises:
            UsageError: The backend has no such options.
        """
        try:
            return self.backend.options.model_validate(self.manifest.options)
        except ValidationError as error:
            raise _unreadable(self.folder / MANIFEST, error, "options") from error

    def verify(self) -> None:
        """Check that every file is the one that the manifest names.

        Raises:
            ModelError: A file is missing or has other bytes.
        """
        for record in self.manifest.files:
            file = self.folder / record.path
            if not file.is_file():
                raise ModelError(f"{self.folder}: {record.path} is missing")
            if file.stat().st_size != record.bytes or digest(file) != record.sha256:
                raise ModelError(
                    f"{self.folder}: {record.path} is not the file that was written", hint="compile again"
                )

    def session(
        self, *, threads: int | None = None, streams: int | None = None, predict: bool = False
    ) -> Session:
        """Load it with the options that the manifest holds.

        Args:
            threads: Instead of the number in the options; 0 leaves it to the runtime.
            streams: Requests at the same time, on one thread each, instead of what the options say.
            predict: Give the numbers that the target gives, where this machine's differ; slower.
        """
        options = self.options
        if streams is not None:
            options = self.backend.parallel(options, threads=streams, streams=streams) or options
        opened = self.backend.predict if predict else self.backend.load
        return opened(self.folder, target(self.manifest.target), options, threads=threads)

    def on_device(self) -> Session:
        """Load it on the GPU that it is for, where ``session`` opens what stands in for it on a processor.

        Raises:
            BackendUnavailableError: There is no such device or driver here, or a package is missing.
            UsageError: The device is another one, or the backend has no runtime for it.
        """
        return self.backend.on_device(self.folder, target(self.manifest.target), self.options)

    @cached_property
    def streams(self) -> int:
        """How many requests it is meant to run at the same time."""
        return self.backend.parallelism(self.options)[1]

    @property
    def prediction(self) -> str | None:
        """What ``session(predict=True)`` does to give the target's numbers on this machine; None where nothing is needed."""
        return self.backend.prediction(target(self.manifest.target))

    @cached_property
    def _session(self) -> Session:
        return self.session()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name for one batch; the session is opened at the first call and kept.

        What the runtime does not take as it is (float64, lists, tensors of torch on the CPU) is converted as calibration data are.

        Raises:
            DataError: A name, type or size does not fit the inputs.
            ModelError: The runtime stops for another reason.
        """
        session = self._session
        if not isinstance(feeds, Mapping):
            validate(feeds, session.inputs)
        try:
            return session.run(feeds)
        except (ModelError, DataError):
            # Where the sizes are to blame, this names the axis.
            kept = [s for s in session.kept if s.name in feeds]
            fitting = validate(feeds, (*session.inputs, *kept))
            if all(fitting[name] is feeds[name] for name in fitting):
                raise
        return session.run(fitting)

    def reset(self) -> None:
        """Let ``run`` begin another sequence, where the artifact keeps states from run to run."""
        self._session.reset()

    def run_all(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of every batch, in order, with as many requests at the same time as the artifact has streams."""
        waiting: deque[Future[dict[str, np.ndarray]]] = deque()
        _ = self._session  # Opened once, and not by each of the threads.
        with ThreadPoolExecutor(self.streams) as pool:
            for feeds in batches:
                waiting.append(pool.submit(self.run, feeds))
                # As many again as run lie ready, so that no stream waits for the reader.
                if len(waiting) > 2 * self.streams:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def load(folder: str | Path, *, verify: bool = True) -> Artifact:
    """Open an artifact.

    Args:
        verify: Whether to check the digests of its files first.

    Raises:
        UsageError: Not an artifact.
        ModelError: Its files are not those that were written.
    """
    artifact = Artifact(Path(folder))
    _ = artifact.manifest
    if verify:
        artifact.verify()
    return artifact


def _unreadable(file: Path, error: ValidationError, *inside: str) -> UsageError:
    """What a manifest says that this version does not know."""
    first = error.errors()[0]
    place = ".".join((*inside, *(str(p) for p in first["loc"])))
    return UsageError(
        f"{': '.join(filter(None, (str(file), place)))}: {first['msg'].lower()}",
        hint="it was edited, or written by another version",
    )
