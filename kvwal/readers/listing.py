"""The writer's side of pins: which there are, and whose.

It opens the files, and takes no lock: asking who has it is enough. A pin without a lock is one of a process that ended,
and is unlinked. Whatever else lies in the directory is left alone.
"""

from __future__ import annotations

import errno
import logging
from typing import Final, NamedTuple

from kvwal.files import Directory, inside
from kvwal.files.names import READERS, is_pin, is_temporary_pin
from kvwal.readers.pin import pin_of_this_process
from kvwal.readers.record import PIN_BYTES, PinRecord, decode_pin

__all__ = ["FoundPin", "PinListing"]

_log = logging.getLogger("kvwal")
# The file is there, and is another user's.
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM)


class FoundPin(NamedTuple):
    """A pin that a process holds. `record`: None if it does not verify, is of a newer version, or cannot be read."""

    record: PinRecord | None
    pid: int


class PinListing:
    """The pins on one store. One thread at a time."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        # What they say, since it never changes.
        self._records: dict[str, PinRecord | None] = {}
        # Those that were being made when it was looked last, and without a lock.
        self._unlocked: frozenset[str] = frozenset()
        # What was warned of, by the names of files that are there still.
        self._warned: set[tuple[str, str]] = set()

    def look(self) -> dict[str, FoundPin]:
        """The pins that are held, by the names of their files. OSError if that cannot be found out."""
        if self._directory.kind(READERS) != "directory":
            return {}
        try:
            readers = inside(self._directory, READERS)
        except FileNotFoundError:
            # It was removed just now, and so was every pin in it.
            return {}
        try:
            return self._look(readers)
        finally:
            readers.close()

    def are_there(self) -> bool:
        """Whether there seem to be pins: whether they are held is not looked at. OSError as `look`."""
        if self._directory.kind(READERS) != "directory":
            return False
        try:
            readers = inside(self._directory, READERS)
        except FileNotFoundError:
            return False
        try:
            return any(map(is_pin, readers.names()))
        finally:
            readers.close()

    def _look(self, readers: Directory) -> dict[str, FoundPin]:
        found: dict[str, FoundPin] = {}
        unlocked: list[str] = []
        names = readers.names()
        for name in names:
            if is_pin(name):
                pin = self._found(readers, name)
                if pin is not None:
                    found[name] = pin
            elif is_temporary_pin(name) and not self._is_locked(readers, name):
                unlocked.append(name)
        for name in self._unlocked.intersection(unlocked):
            # Between being made and being locked there is no time for two looks, if its process lives.
            self._clear(readers, name)
        self._unlocked = frozenset(unlocked)
        self._warned = {(name, what) for name, what in self._warned if name in names}
        self._records = {name: record for name, record in self._records.items() if name in found}
        return found

    def _found(self, readers: Directory, name: str) -> FoundPin | None:
        """What is pinned there; None if it is not held. It may vanish at any time."""
        own = pin_of_this_process(name)
        if own is not None:
            return FoundPin(own, own.pid)
        try:
            file = readers.open(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if readers.kind(name) != "file":
                return None
            if error.errno not in _FORBIDDEN:
                raise
            # Whether it is held cannot be found out: as one that does not verify.
            self._warn(name, "read", error)
            known = self._records.get(name)
            return FoundPin(known, 0 if known is None else known.pid)
        try:
            pid = file.holder()
            if pid is None:
                self._clear(readers, name)
                return None
            if self._records.get(name) is None:
                # One that does not verify now may later on.
                self._records[name] = decode_pin(file.pread(PIN_BYTES + 1, 0))
        finally:
            file.close()
        record = self._records[name]
        return FoundPin(record, pid or (0 if record is None else record.pid))

    def _is_locked(self, readers: Directory, name: str) -> bool:
        if pin_of_this_process(name.removesuffix(".tmp")) is not None:
            return True
        try:
            file = readers.open(name)
        except OSError:
            return True
        try:
            return file.holder() is not None
        finally:
            file.close()

    def break_pins(self, names: list[str]) -> frozenset[str]:
        """Unlink these: from then on what they need may be freed. Returns those that are there still."""
        try:
            readers = inside(self._directory, READERS)
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            for name in names:
                self._warn(name, "removed", error)
            return frozenset(names)
        try:
            return frozenset(name for name in names if not self._clear(readers, name))
        finally:
            readers.close()

    def _clear(self, readers: Directory, name: str) -> bool:
        """Unlink it, if it is there. False if that cannot be done."""
        try:
            readers.unlink(name)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(name, "removed", error)
            return False
        return True

    def _warn(self, name: str, what: str, error: OSError) -> None:
        if (name, what) not in self._warned:
            self._warned.add((name, what))
            _log.warning("the pin %r cannot be %s: %s", name, what, error)
