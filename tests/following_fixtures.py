"""What the tests of followers have their writer do."""

from __future__ import annotations

from typing import Any

import kvwal
from kvwal.testing import SimulatedDisk

PATH = "/store"


def all_durable(db: kvwal.Store) -> None:
    """Have the log say that all of it is on disk, as a writer does that has nothing else to do."""
    engine: Any = db.engine
    engine.queue.run(engine._log.mark_idle)


def rewrite(db: kvwal.Store, value: bytes) -> None:
    """Change every page, and bring it into the pages."""
    db.update({b"%04d" % n: value * 500 for n in range(2000)})
    db.checkpoint()


def offset_of(db: kvwal.Store) -> int:
    """Where the next record begins."""
    engine: Any = db.engine
    offset: int = engine._log._offset
    return offset


class Primary:
    """A writer that can be opened again, beside a follower of the same store."""

    def __init__(self, **options: Any) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_directory(PATH)
        self._options = {"files": self.disk, "background": False, "keep_history_s": 0, **options}
        self.db = kvwal.open(PATH, **self._options)

    def reopen(self) -> None:
        self.db.close()
        self.db = kvwal.open(PATH, **self._options)

    def die(self) -> None:
        """Killed: nothing says that its last commits are on disk, nor that it has ended."""
        self.db.engine.abandon()

    def restart(self) -> None:
        self.die()
        self.db = kvwal.open(PATH, **self._options)

    def follow(self, files: Any = None) -> kvwal.Follower:
        return kvwal.follow(PATH, pin=False, files=files or self.disk)
