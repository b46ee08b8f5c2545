"""An ``.aimodel`` in Core AI's runtime."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray

from optkit.backends.base import Session, misnamed, mistyped
from optkit.backends.quiet import without
from optkit.data import TensorSpec
from optkit.errors import DataError, ModelError
from optkit.reference import first_line

MODEL, INTERFACE, FUNCTION = "model.aimodel", "interface.json", "main"
# Core AI has no types of 64 bits: integers must fit into 32, and floats are rounded.
_NARROW = {
    np.dtype(a): np.dtype(b) for a, b in (("int64", "int32"), ("uint64", "uint32"), ("float64", "float32"))
}


def quietly() -> AbstractContextManager[None]:
    """Without the runtime's notes on what it loads."""
    return without("ODIE [")


class CoreAiSession(Session):
    """The program on this machine's processor. The runtime's calls are coroutines: they run in a loop on a thread of its own.

    Raises:
        ModelError: The runtime does not take the program.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / MODEL
        told = json.loads((folder / INTERFACE).read_text(encoding="utf-8"))
        self.inputs = tuple(TensorSpec.read(p) for p in told["inputs"])
        self.outputs = tuple(TensorSpec.read(p) for p in told["outputs"])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="Core AI", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._lock = threading.Lock()
        try:
            with quietly():
                self._function = self._wait(self._open())
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            raise ModelError(f"{self._file.name}: Core AI cannot load it: {first_line(error)}") from error

    async def _open(self) -> Any:
        model = await self._stack.enter_async_context(AIModelAsset.load(self._file).executable())
        return model.load_function(FUNCTION)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises:
            DataError: Names, types or shapes are not those that the program was made for, or a number needs 64 bits.
            ModelError: Core AI fails.
        """
        if feeds.keys() != {s.name for s in self.inputs}:
            raise misnamed((s.name for s in self.inputs), feeds)
        given = {spec.name: NDArray(_narrowed(feeds[spec.name], spec)) for spec in self.inputs}
        try:
            with self._lock:
                found = self._wait(self._call(given))
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"Core AI stopped: {first_line(error)}") from error
        return {s.name: found[s.name].astype(s.dtype, copy=False) for s in self.outputs}

    async def _call(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = await self._function(given)
        # The runtime gives its memory back with its arrays.
        return {name: np.array(found[name].numpy()) for name in found}

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether the shapes are those of the program."""
        return all(s.name in feeds and feeds[s.name].shape == s.shape for s in self.inputs)

    def close(self) -> None:
        """Free the program and end the thread."""
        if self._loop.is_closed():
            return
        self._function = None
        self._wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _narrowed(value: np.ndarray, spec: TensorSpec) -> np.ndarray:
    array = np.ascontiguousarray(value)
    if array.dtype != spec.dtype:
        raise mistyped(spec.name, array.dtype, spec.dtype)
    if array.shape != spec.shape:
        raise DataError(
            f"{spec.name} {list(array.shape)}: the program was made for {list(spec.shape or ())}",
            hint="give options.shapes other sizes when compiling",
        )
    narrow = _NARROW.get(array.dtype, array.dtype)
    small = array.astype(narrow, copy=False)
    if narrow.kind in "iu" and not np.array_equal(small, array):
        raise DataError(f"input {spec.name!r} holds numbers that need 64 bits, and Core AI has 32")
    return small
