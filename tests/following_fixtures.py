"""What the tests of followers have their writer do."""

from __future__ import annotations

from typing import Any

import pytest

import kvwal
from kvwal.readers.now import NowPage
from kvwal.testing import SimulatedDisk

PATH = "/store"
#: A writer that does nothing by itself, and keeps no log for anyone.
WRITES: dict[str, Any] = {"background": False, "keep_history_s": 0, "segment_bytes": 16 << 10}


def all_durable(db: kvwal.Store) -> None:
    """Have the log say that all of it is on disk, as a writer does that has nothing else to do."""
    engine: Any = db.engine
    engine.queue.run(engine._log.mark_idle)


def page_of(db: kvwal.Store, path: str, files: Any, clock: Any) -> NowPage:
    """The control page as the background thread of this writer would write it, by the clock of a follower's files."""
    engine: Any = db.engine
    meta = engine._pages.meta
    page = NowPage(clock, files.open_directory(path), meta.store_id, meta.line, engine._log.session, 0o600)
    page.begin()
    return page


def said(db: kvwal.Store) -> tuple[int, int, int, int]:
    """What it would write there."""
    engine: Any = db.engine
    durable, segment, salt = engine._log.durable_end
    return durable, engine._pages.meta.generation, segment, salt


def rewrite(db: kvwal.Store, value: bytes) -> None:
    """Change every page, and bring it into the pages."""
    db.update({b"%04d" % n: value * 500 for n in range(2000)})
    db.checkpoint()


def fill(db: kvwal.Store, value: bytes) -> None:
    """The same with fewer keys."""
    db.update({b"%03d" % n: value * 1500 for n in range(300)})
    db.checkpoint()


def held(db: kvwal.Store) -> list[kvwal.Pin]:
    """The pins of followers."""
    return [pin for pin in db.pins() if pin.purpose == "follower"]


def pages(db: kvwal.Store) -> int:
    """The pages that are in use, or held."""
    figures = db.stats()
    return figures.pages_total - figures.pages_free


def offset_of(db: kvwal.Store) -> int:
    """Where the next record begins."""
    engine: Any = db.engine
    offset: int = engine._log._offset
    return offset


class AnySum:
    """A checksum that is equal to every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def look_at_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was written over has the right checksum from here on, whatever is in it."""
    for module in ("pager", "tree", "slots"):
        monkeypatch.setattr(f"kvwal.pages.{module}.crc32c", lambda *_: AnySum())


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
