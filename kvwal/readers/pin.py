"""The follower's side of a pin: a locked file that says what its process needs.

- It is made under a temporary name, locked, written, and only then given its name. So the writer finds no pin that is
  not locked but for those of processes that ended.
- It counts as long as its file has its one name. The writer breaks it by unlinking it, before it frees anything. A hard
  link, as a copy of the directory may make, ends it for its follower, since that would stay when it is broken.
- Closing any descriptor of a file gives up this process's lock on it. So a writer in the same process opens none of the
  pins that were made here, and knows them by their names.
"""

from __future__ import annotations

import errno
import logging
from itertools import count
from typing import Final

from kvwal.files import Directory, File, Files, inside, process_id, program_name
from kvwal.files.names import READERS, pin_name, temporary_name
from kvwal.readers.record import NAME_BYTES, NO_LOG, PinRecord, encode_pin

__all__ = ["HeldPin", "PinMaker", "pin_of_this_process"]

_log = logging.getLogger("kvwal")
# Each takes at most four bytes.
_PROGRAM_CHARACTERS: Final = NAME_BYTES // 4
_ATTEMPTS: Final = 10
_NOT_WRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_numbers: Final = count(1)

#: The pins that were made in this process, by the names of their files.
_made: dict[str, HeldPin] = {}


def pin_of_this_process(name: str) -> PinRecord | None:
    """What the pin in this file says, if it was made here, and not in a process that this was forked from."""
    held = _made.get(name)
    return None if held is None or held.is_inherited else held.record


class HeldPin:
    """A pin that this process made. From any thread."""

    __slots__ = ("_directory", "_file", "_name", "record")

    def __init__(self, directory: Directory, name: str, record: PinRecord) -> None:
        self._directory = directory
        self._name = name
        self._file: File | None = None
        self.record = record

    def make(self, readers: Directory) -> None:
        """Make the file."""
        temporary = temporary_name(self._name)
        # Known before it is there, so that a writer in this process never opens it.
        _made[self._name] = self
        try:
            # The process that writes may be another user's, and a pin has no secret.
            self._file = readers.open(temporary, create=True, mode=0o644)
            self._file.lock_record()
            self._file.pwrite(encode_pin(self.record), 0)
            readers.rename(temporary, self._name)
            # From here on each change of its names counts.
            self._file.has_name()
        except BaseException:
            _unlink(self._directory, temporary)
            self.release()
            raise

    @property
    def is_inherited(self) -> bool:
        """Whether the process that made it is one that this was forked from."""
        return self._directory.inherited

    def is_held(self) -> bool:
        """Whether the writer still honours it: what it needs, and was read before this was asked, was there. One call.

        Invariant: the writer unlinks a pin before it writes over a page, or removes a segment, that the pin needs.
        """
        file = self._file
        try:
            return file is not None and file.has_name()
        except OSError:
            # It may be that another thread has released it just now.
            if self._file is None:
                return False
            raise

    def release(self) -> None:
        """Need nothing any more. Idempotent; takes no lock, so that a finalizer may call it."""
        file, self._file = self._file, None
        if not self.is_inherited and _made.pop(self._name, None) is not None:
            _unlink(self._directory, self._name)
        if file is not None:
            file.close()


class PinMaker:
    """Makes the pins of one follower. From any thread, one at a time."""

    def __init__(self, files: Files, directory: Directory, name: str | None) -> None:
        """`name`: what the follower is called; None: after its program. ValueError for one of more than 64 bytes."""
        self._files = files
        self._directory = directory
        self._called = program_name()[:_PROGRAM_CHARACTERS] if name is None else name
        if len(self._called.encode()) > NAME_BYTES:
            raise ValueError(f"the name of a follower has at most {NAME_BYTES} bytes of UTF-8")
        self._is_refused = False

    def pin(self, store_id: bytes, line: bytes, generation: int, after: int = NO_LOG) -> HeldPin | None:
        """Pin this generation (0: none), and the log beyond `after`. None if that cannot be done here.

        What was to be pinned may be gone by now: look again.
        """
        record = PinRecord(store_id, line, generation, after, process_id(), self._files.now_us(), self._called)
        try:
            return self._made(record)
        except OSError as error:
            if self._directory.inherited:
                raise
            if not self._is_refused:
                self._is_refused = True
                _log.warning(
                    "no pin can be made in %s/%s (%s), so the writer of the store does not keep what is read here, and "
                    "a long read may raise SnapshotTooOld%s",
                    self._directory.path,
                    READERS,
                    error.strerror or error,
                    "; let this program write to that directory" if error.errno in _NOT_WRITABLE else "",
                )
            return None

    def _made(self, record: PinRecord) -> HeldPin:
        for attempt in count(1):
            readers = inside(self._directory, READERS, make=True)
            try:
                name = pin_name(f"{record.pid}-{next(_numbers)}-{self._files.random_bytes(6).hex()}")
                held = HeldPin(self._directory, name, record)
                held.make(readers)
                return held
            except FileNotFoundError:
                # The writer has looked twice before it was locked, and took it for one that was left.
                if attempt == _ATTEMPTS:
                    raise
            finally:
                readers.close()
        raise AssertionError("it counts on for ever")


def _unlink(directory: Directory, name: str) -> None:
    try:
        readers = inside(directory, READERS)
        try:
            readers.unlink(name)
        finally:
            readers.close()
    except OSError:
        # It was broken already; or it will be found without a lock.
        return
