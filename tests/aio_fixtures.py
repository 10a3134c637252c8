"""What the tests of asyncio share: a gate before each flush, and a loop in debug mode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from wrapped_files import WrappedFiles

import kvwal
import kvwal.aio
from kvwal.aio import AsyncStore
from kvwal.files import system_files
from kvwal.testing import SimulatedDisk

SLOW_S = 30


class Gate:
    """Counts data flushes, and can hold them up, or make them fail."""

    def __init__(self) -> None:
        self.syncs = 0
        self.failure: OSError | None = None
        #: Name of the only file that is meant; None for all.
        self.only: str | None = None
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def close(self) -> None:
        """From here on, a flush waits."""
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """A flush waits at the closed gate."""
        await asyncio.to_thread(self.wait_until_reached)

    def is_reached(self) -> bool:
        """Whether a flush has come to the gate since it was closed."""
        return self._reached.is_set()

    def wait_until_reached(self) -> None:
        """The same for a thread."""
        if not self._reached.wait(SLOW_S):
            raise TimeoutError("no flush came to the gate")

    def pass_through(self, path: str) -> None:
        if self.only is not None and not path.endswith(self.only):
            return
        self.syncs += 1
        self._reached.set()
        if not self._open.wait(SLOW_S):
            raise TimeoutError("the gate was not opened")
        if self.failure is not None:
            raise self.failure


class GatedFile:
    def __init__(self, file: Any, path: str, gate: Gate) -> None:
        self._file = file
        self._path = path
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def datasync(self) -> None:
        self._gate.pass_through(self._path)
        self._file.datasync()


class GatedFiles(WrappedFiles):
    """The system's files with a gate before each data flush."""

    def __init__(self) -> None:
        super().__init__(system_files(), lambda file, name: GatedFile(file, name, self.gate))
        self.gate = Gate()


def held_files() -> tuple[Any, Gate]:
    """Such files, and what holds their flushes."""
    files = GatedFiles()
    return files, files.gate


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run in debug mode, which finds calls from the wrong thread and the like."""

    async def bounded() -> Any:
        # How long a step takes is of no interest here.
        asyncio.get_running_loop().slow_callback_duration = SLOW_S
        async with asyncio.timeout(SLOW_S):
            return await main

    return asyncio.run(bounded(), debug=True)


def gated(path: Path, **options: Any) -> tuple[Any, Gate]:
    files: Any = GatedFiles()
    return kvwal.aio.open(path / "s", files=files, background=False, **options), files.gate


def opened(**options: Any) -> Any:
    """A store on a simulated disk, with small segments."""
    small = {"background": False, "segment_bytes": 1 << 16, "keep_history_bytes": 0}
    return kvwal.aio.open("/kv", **{"files": SimulatedDisk(), **small, **options})


def holds(db: AsyncStore) -> list[Any]:
    return db.store.engine._log.holds()  # type: ignore[union-attr]


async def ready() -> None:
    """Every task that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
