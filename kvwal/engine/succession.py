"""The succession of versions: a checkpoint sets the memtable aside, and installs its tree.

Invariant: the pages of a version stay while it is the current one or has a reader.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvwal.engine.gaps import TableGaps
from kvwal.engine.keeping import Keeping
from kvwal.engine.memtable import Memtable, combine
from kvwal.engine.past_version import PastVersion
from kvwal.engine.pressure import WritePressure
from kvwal.engine.state import State
from kvwal.engine.version import Version
from kvwal.errors import SnapshotTooOld
from kvwal.keys import Seqno
from kvwal.locks import locked_by_state
from kvwal.pages import PageFile, Tree

__all__ = ["Succession"]


class Succession:
    """Replaces the version of one open store, and lets go of the former ones."""

    def __init__(
        self, state: State, gaps: TableGaps, pages: PageFile, pressure: WritePressure, keeping: Keeping
    ) -> None:
        self._state = state
        self._gaps = gaps
        self._pages = pages
        self._pressure = pressure
        self._keeping = keeping
        # Versions that were replaced, and had a reader when that was looked at last.
        self._former: list[Version] = []

    @locked_by_state
    def freeze(self) -> Memtable | None:
        """Set the memtable aside for a checkpoint; None if it is empty. Requires: none is set aside now."""
        state = self._state
        state.finish()
        version = state.version
        assert version.frozen is None, "a frozen memtable is still there"
        if not version.memtable:
            return None
        state.cache.drop_aside()
        self._replace(Version(self._new_memtable(state.seqno), version.memtable, version.tree))
        return version.memtable

    def combine(self) -> None:
        """Add what was committed since to the frozen memtable, so that one checkpoint can take both.

        Unless too much would stay of the two: then writers are to wait, as for any checkpoint. Requires: no commit is
        under way.
        """
        version = self._state.version
        assert version.frozen is not None, "no memtable is frozen"
        # Without the lock: it is a walk, and readers go on.
        combined = self._new_memtable(version.memtable.last_seqno)
        combine(version.frozen, version.memtable, into=combined)
        if not self._pressure.would_stall(combined):
            self._install_combined(version, combined)

    @locked_by_state
    def _install_combined(self, version: Version, combined: Memtable) -> None:
        self._state.cache.drop_aside()
        self._replace(Version(self._new_memtable(self._state.seqno), combined, version.tree))

    def _new_memtable(self, after: Seqno) -> Memtable:
        return Memtable(after, *self._state.locks())

    @locked_by_state
    def install(self, tree: Tree, *, done: bool = True) -> None:
        """Readers from here on use this tree. `done`: it holds the frozen memtable, which is then needed no more."""
        version = self._state.version
        self._replace(Version(version.memtable, None if done else version.frozen, tree))
        if done:
            # A gap is still true, and there is nothing left to pass over but what was deleted since.
            self._gaps.clear()

    @locked_by_state
    def go_over(self, version: Version, seqno: Seqno) -> None:
        """Readers from here on use this version, which holds all commits up to `seqno` and was made from the files.

        For a follower, whose memtable cannot be divided as the writer's was. Requires: no commit before the newest
        visible one is missing in it.
        """
        state = self._state
        state.finish()
        state.unfinished = self._go_over, (version, seqno)
        state.finish()

    def _go_over(self, version: Version, seqno: Seqno) -> None:
        # Requires: lock. Doing it again is harmless.
        state = self._state
        if seqno == state.seqno:
            state.cache.drop_aside()
        else:
            state.horizon = seqno
            state.cache.clear()
            # A name may mean another table.
            state.cache.names.now = object()
        state.plain = False
        self._gaps.clear()
        self._replace(version)
        state.seqno = seqno

    def _replace(self, version: Version) -> None:
        # Requires: lock. Interrupted after any step, no version that is read loses its pages, and the next look at the
        # former ones lets go of the rest.
        state = self._state
        self._pages.pins.hold(state, _generations(version, state.version, *self._former))
        self._former = [*self._former, state.version]
        state.version = version
        self._release_pages()

    def past(self, made: PastVersion) -> PastVersion:
        """The version of a past moment that is to be read, or the one of the same base that is read already.

        ValueError if its pages are no longer kept. Requires: lock, and that a reader is registered before it is given
        back.
        """
        state = self._state
        for former in self._former:
            if isinstance(former, PastVersion) and former.tree.is_as_good_as(made.tree):
                return former
        self._pages.pins.hold(state, _generations(state.version, made, *self._former))
        # They go first when readers hold too much: theirs are the oldest moments.
        self._former = [made, *self._former]
        return made

    @locked_by_state
    def release_pages(self) -> None:
        """Let go of the pages of versions that have no reader any more."""
        self._release_pages()

    def bound_readers(self, most: int) -> bool:
        """Give up the readers of the oldest versions while those of former ones hold more than `most` bytes.

        For the thread of checkpoints. O(versions), and O(extents) for each that is given up. Whether one was.
        """
        self.release_pages()
        window = {base.generation for base in self._keeping.bases}
        # What reads a base of the window holds no more than that does.
        former = held = [each for each in self._former if each.tree.meta.generation not in window]
        while former and self._held_bytes(former) > most:
            self._give_up(former[0], most)
            former = former[1:]
        return former is not held

    def held_bytes(self, version: Version) -> int:
        """What could go without a version, if nothing else held it."""
        return self._held_bytes([version])

    def _held_bytes(self, versions: Sequence[Version]) -> int:
        """What would be free without these: their memtables, pages, and log."""
        now = self._state.version
        tables = {id(table): table for each in versions for table in (each.memtable, each.frozen) if table is not None}
        for table in (now.memtable, now.frozen):
            tables.pop(id(table), None)
        pages = self._pages.space.held_bytes(self._pages.meta, _generations(*versions))
        after = min((each.tree.meta.seqno for each in versions if isinstance(each, PastVersion)), default=None)
        log = 0 if after is None else self._keeping.log_bytes_before(after)
        return pages + log + sum(table.bytes_used for table in tables.values())

    @locked_by_state
    def _give_up(self, version: Version, most: int) -> None:
        newest = self._state.seqno
        for reader in version.readers.all():
            reader.give_up(SnapshotTooOld(reader.seqno, newest, newest, limit_bytes=most))
        if isinstance(version, PastVersion):
            # Its readers may be kept by those who were given them.
            version.let_go()
        self._release_pages()

    def _release_pages(self) -> None:
        # Requires: lock.
        self._former = [version for version in self._former if version.readers]
        self._pages.pins.hold(self._state, _generations(self._state.version, *self._former))


def _generations(*versions: Version) -> set[int]:
    """Those that have pages."""
    return {each.tree.meta.generation for each in versions if each.tree.meta.generation}
