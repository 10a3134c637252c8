"""Which archiver a destination takes units from: the claim on its mark.

The mark is an object of the destination, replaced by compare-and-set. It has the line of commits, the last one that is
archived and its digest, the epoch of the claim, and random bytes that only this claim has. Each archiver takes the next
epoch once. A mark that is lost, or damaged, is put anew, by any archiver: which epoch it had may be known no longer, so
one that finds other random bytes there was superseded, whatever the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvwal.backup import state
from kvwal.backup.chain import list_held
from kvwal.backup.fetching import fetch_header
from kvwal.backup.port import Destination
from kvwal.errors import BackupDestinationError, CorruptionError, FormatError, ObjectMissing
from kvwal.keys import Seqno

__all__ = ["Claim", "Superseded"]


class Superseded(BackupDestinationError):
    """Another archiver has claimed the destination since."""


class Claim:
    """The claim of one archiver. For one thread, but for `epoch`."""

    def __init__(self, destination: Destination, line: bytes, random_bytes: Callable[[int], bytes]) -> None:
        self._destination = destination
        self._line = line
        # The mark as it was put, or found, last.
        self._claimed: bytes | None = None
        self._own = random_bytes(8).hex()
        #: Its number; 0 before it is taken.
        self.epoch = 0

    def take(self) -> Seqno | None:
        """Take the next epoch, but for one that has its own. Returns what the mark says of this line. Superseded."""
        old, members = state.read_or_empty(self._destination, state.MARK)
        is_same = members.get("line") == self._line.hex()
        marked = Seqno(_number(members, "seqno", 0)) if is_same and "seqno" in members else None
        known = self._epochs() if marked is None else []
        is_damaged = old is not None and not members
        if is_damaged:
            # It may have had the number behind the one before it.
            older = state.before(self._destination, state.MARK)
            known.append(1 + max((_number(each, "epoch", 0) for each in older), default=0))
        last = _number(members, "epoch", 0) if members else self.epoch or max(known, default=0)
        if self.epoch and members and members.get("claim") != self._own:
            raise Superseded(f"another archiver has taken over, from claim {self.epoch} by {last}")
        epoch = self.epoch or last + 1
        if any(known):
            # Before the mark, which tells of it no longer: this is not the first archiver of the line.
            state.record_beginning(self._destination, self._line, Seqno(0))
        kept = {name: value for name, value in members.items() if is_same and name in ("seqno", "digest")}
        new = self._dump({**kept, "epoch": epoch})
        if new != old and not self._destination.swap(state.MARK, old, new):
            raise BackupDestinationError("another archiver claims the destination at the same moment")
        self._claimed, self.epoch = new, epoch
        return marked

    def move(self, seqno: Seqno, digest: bytes) -> None:
        """Have the mark say that commits up to this one, of this digest, are archived. Superseded."""
        new = self._dump({"epoch": self.epoch, "seqno": seqno, "digest": digest.hex()})
        for _ in range(3):
            if new == self._claimed or self._destination.swap(state.MARK, self._claimed, new):
                self._claimed = new
                return
            # One that was made, and whose answer got lost; or another archiver's; or none, as it is lost.
            self.look()
        raise BackupDestinationError(f"{state.MARK} cannot be replaced")

    def look(self) -> None:
        """Superseded if the destination was claimed by another archiver since."""
        found, members = state.read_or_empty(self._destination, state.MARK)
        if members and members.get("claim") != self._own:
            raise Superseded(f"another archiver has taken over from claim {self.epoch}")
        self._claimed = found

    def _dump(self, members: dict[str, Any]) -> bytes:
        return state.dump({**members, "line": self._line.hex(), "claim": self._own})

    def _epochs(self) -> list[int]:
        """The numbers of claims that units have, 0 for a backup's; 1 for one that is damaged, and so may have one."""
        found: list[int] = []
        for unit in list_held(self._destination, self._line).units:
            try:
                found.append(fetch_header(self._destination, unit).epoch)
            except ObjectMissing:
                # It was merged, or pruned, since it was listed.
                continue
            except (CorruptionError, FormatError):
                found.append(1)
        return found


def _number(members: dict[str, Any], name: str, default: int) -> int:
    value = members.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise CorruptionError(state.MARK, None, f"its {name} is no number")
    return value
