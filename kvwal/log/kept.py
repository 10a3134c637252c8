"""What was read of a log and may be asked for again: open files, and parts of them, within bounds.

Rules:
- There is no lock: each change is one step of a dict. What two threads do at once is read twice, or dropped early.
- What is dropped stays good for those that have it. A file is closed when the last of them lets go of it, so that no
  thread reads from a descriptor that another one closed.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar
from weakref import ref

from kvwal.files import Directory, File
from kvwal.finalizing import quiet_at_exit
from kvwal.locks import shared_items
from kvwal.log.cut import Cut

__all__ = ["Kept", "KeptFiles", "Loaded", "OpenFile"]

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

# Two for each of 40 segments, and some. (A process has 1,024 on Linux, and 256 on macOS.)
_MOST_FILES: Final = 96
_MOST_BLOCK_BYTES: Final = 8 << 20
#: Of whole files in memory: four segments, and what there is of a fifth.
MOST_LOADED_BYTES: Final = 80 << 20
# What an entry takes beside what it is said to have.
_ENTRY_BYTES: Final = 150


class _Entry(Generic[_V]):
    __slots__ = ("size", "used", "value")

    def __init__(self, value: _V, size: int) -> None:
        self.value = value
        self.size = size
        # Since it was last passed over.
        self.used = True


class Kept(Generic[_K, _V]):
    """Things up to a number of bytes, and always the last one. Those that were not used for long go first."""

    __slots__ = ("_entries", "_most", "_size")

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[_K, _Entry[_V]] = {}
        # At least what they have, but for what two threads add at once; it is counted anew before something goes.
        self._size = 0

    def get(self, key: _K) -> _V | None:
        """The thing of this key, if it is there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = True
        return entry.value

    def put(self, key: _K, value: _V, size: int) -> None:
        """Add one, in place of the one of this key."""
        size += _ENTRY_BYTES
        self._entries[key] = _Entry(value, size)
        self._size += size
        if self._size > self._most:
            self._shrink(key)

    def _shrink(self, added: _K) -> None:
        entries = shared_items(self._entries)
        size = sum(entry.size for _, entry in entries)
        if size > self._most:
            # An eighth more, so that this is rare.
            enough = self._most - self._most // 8
            # What was not used since the last time goes first.
            for key, entry in sorted(entries, key=lambda item: item[1].used):
                if size <= enough:
                    break
                if key != added:
                    self._entries.pop(key, None)
                    size -= entry.size
            for _, entry in entries:
                entry.used = False
        self._size = size

    def drop(self, key: _K) -> None:
        """Forget the thing of this key, if it is there."""
        self._entries.pop(key, None)

    def keys(self) -> list[_K]:
        """Of all that is there."""
        return list(self._entries)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()


class OpenFile:
    """A file that is closed when nothing refers to it any more."""

    __slots__ = ("file",)

    def __init__(self, file: File) -> None:
        #: For those that have this object too.
        self.file = file

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`."""
        return self.file.pread(size, offset)

    def size(self) -> int:
        """As `File.size`."""
        return self.file.size()

    @quiet_at_exit
    def __del__(self) -> None:
        # An interruption may have come before there was one.
        file = getattr(self, "file", None)
        if file is not None:
            file.close()


class Loaded:
    """A whole file in memory, for as long as something refers to it."""

    __slots__ = ("__weakref__", "cuts", "data", "last")

    def __init__(self, data: bytes, last: int) -> None:
        self.data = data
        #: Commits of several intents that were verified in it, by their offset.
        self.cuts: dict[int, Cut] = {}
        #: The last commit that it is known to have.
        self.last = last

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`."""
        return self.data[offset : offset + size]


class KeptFiles:
    """Files of one directory, open for reading, and what was read of them."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._files: Kept[str, OpenFile] = Kept(_MOST_FILES * (1 + _ENTRY_BYTES))
        self._loaded: dict[str, ref[Loaded]] = {}
        #: Blocks of key indexes that were verified, by index and number.
        self.blocks: Kept[tuple[int, int], bytes] = Kept(_MOST_BLOCK_BYTES)

    def open(self, name: str) -> OpenFile:
        """The file of this name, as it was when it was opened first."""
        return self._files.get(name) or self.open_anew(name)

    def open_anew(self, name: str) -> OpenFile:
        """The file that has this name now."""
        file = OpenFile(self._directory.open(name))
        self._files.put(name, file, 1)
        return file

    def load(self, name: str, size: int, last: int) -> Loaded | None:
        """The first `size` bytes of a file, which has commits up to `last`; None if too much is in memory as it is.

        OSError if reading fails.
        """
        there = {each: loaded for each, weak in shared_items(self._loaded) if (loaded := weak()) is not None}
        for each in list(self._loaded):
            if each not in there:
                self._loaded.pop(each, None)
        loaded = there.get(name)
        if loaded is None or loaded.last < last:
            if sum(len(each.data) for each in there.values()) + size > MOST_LOADED_BYTES:
                return None
            loaded = Loaded(self.open(name).pread(size, 0), last)
            self._loaded[name] = ref(loaded)
        return loaded

    def close(self, name: str) -> None:
        """Let go of the file of this name, since it goes, or is replaced."""
        self._files.drop(name)

    def close_all(self) -> None:
        """Let go of all of them, and of what was read of them."""
        self._files.clear()
        self.blocks.clear()
