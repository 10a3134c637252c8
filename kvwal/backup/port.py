"""Where backups go: five calls that a directory and an object store can both do.

Rules for every implementation of `Destination`:

- A name is made of parts of `a-z`, `0-9`, `.` and `-` with `/` between them, at most 200 characters. Other names are
  foreign: they are neither listed nor changed.
- An object is there whole or not at all, and never changes. `put_new` never replaces one, and raises where its name is
  taken by what is no object.
- What `put_new` and `swap` have put is durable when they return, also where they return False because the name was
  taken: one whose answer got lost can be asked again.
- A call that raised may have done its work all the same.
- All methods may be called from any thread.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final, Protocol, TypeAlias, runtime_checkable

from kvwal.errors import BackupDestinationError, ObjectMissing, StoreNotFoundError
from kvwal.files import Buffer, Directory, File, Files, PathArgument, outwards, path_text, rooted, system_files
from kvwal.files.names import DATA
from kvwal.log.segment import list_segments

__all__ = [
    "MAX_NAME_CHARS",
    "Destination",
    "DirectoryDestination",
    "Where",
    "destination_at",
    "is_object_name",
    "sweep",
]

MAX_NAME_CHARS: Final = 200
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*(?:/[a-z0-9][a-z0-9.-]*)*")

_TEMPORARY: Final = ".tmp"
# Of one that its process locks before the first byte, and until it has its name.
_HELD: Final = ".held"
# Those of this process, whose own locks it does not see, and loses when it opens the file a second time.
_writing: Final[set[str]] = set()
# A version of an object that `swap` replaces. "~" is in no object's name.
_VERSION: Final = re.compile(r"(.+)~([0-9]{20})")
_MAX_VERSION: Final = 10**20 - 1
# This number of older versions stays: a listing, which is no snapshot, would have to miss all of them to mislead.
_VERSIONS_KEPT: Final = 4
# A temporary whose size stood still for this time has no writer any more.
_ABANDONED_AFTER_S: Final = 3600.0


def is_object_name(name: str) -> bool:
    """Whether an object may have this name."""
    return len(name) <= MAX_NAME_CHARS and not name.endswith(_TEMPORARY) and _NAME.fullmatch(name) is not None


@runtime_checkable
class Destination(Protocol):
    """What a backup is written to and read from. The rules are in the docstring of the module."""

    def put_new(self, name: str, data: bytes | Iterable[Buffer]) -> bool:
        """Make an object; durable on return. False, and nothing changed, if there is one of this name."""
        ...

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Up to `size` bytes (None: all) of an object from `start`; fewer only where it ends, none behind its end.

        ObjectMissing if there is no such object.
        """
        ...

    def list_after(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        """Names that begin with `prefix` and are beyond `after`, in order, each with its size in bytes."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; durable on return. Nothing happens if there is none."""
        ...

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        """Replace a small object that is `old` (None: there is none) by `new`; durable on return. False if it is not.

        Such objects are made by `swap` alone. Of several that swap the same `old` at most one gets True. One
        whose `new` was replaced by another at once may get False.
        """
        ...


#: What a user may give for a destination: a path, or an object with its five calls.
Where: TypeAlias = PathArgument | Destination


def destination_at(where: Where, files: Files | None = None) -> Destination:
    """The destination that a user named. TypeError, ValueError as `DirectoryDestination` raises them."""
    return where if isinstance(where, Destination) else DirectoryDestination(where, files=files)


class DirectoryDestination:
    """A directory as a destination, on any file system that has hard links.

    A relative path is taken from the working directory of when this is made. The directory is opened once, at the first
    call. If another one, or none, is at its path later (a disk that was unmounted), calls raise
    `BackupDestinationError`: nothing is written there, and nothing there counts as missing.
    """

    def __init__(self, path: PathArgument, *, files: Files | None = None, mode: int = 0o600) -> None:
        """
        Args:
            path: of the directory. It is made by the first object that is put, if the one that holds it is there.
            files: where it is; None: the operating system's.
            mode: permissions of new files.

        Raises TypeError and ValueError for what is no path. Nothing is opened yet.
        """
        self.path = path_text(path)
        self._files = system_files() if files is None else files
        # Absolute now: the archive's thread uses it for as long as the process lives, which may go elsewhere.
        self._place = rooted(self.path, self._files)
        self._mode = mode
        self._root: Directory | None = None
        # Directories whose own entries are on disk.
        self._durable: set[str] = set()
        # Temporaries by path: their size, and since when it has been that.
        self._seen: dict[str, tuple[int, float]] = {}

    def __repr__(self) -> str:
        return f"DirectoryDestination({self.path!r})"

    # -- the five calls -----------------------------------------------------------------------

    def put_new(self, name: str, data: bytes | Iterable[Buffer]) -> bool:
        where, leaf = _split(name)
        directory = self._make(where)
        try:
            if directory.kind(leaf) is None:
                if self._publish(directory, leaf, leaf, data):
                    return True
            else:
                # Durability: the one that made it may have been killed before it flushed the directory.
                directory.sync()
            if directory.kind(leaf) not in ("file", None):
                # Never read as an object, and so no backup may count on it.
                raise BackupDestinationError(
                    f"{name} in {self.path} is not a regular file, so the object of that name cannot be made; "
                    "move it away"
                )
            return False
        finally:
            directory.close()

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        where, leaf = _split(name)
        try:
            directory = self._open(where)
        except FileNotFoundError:
            raise ObjectMissing(name, self.path) from None
        try:
            while True:
                entries = list(_entries(directory, leaf))
                for each in entries:
                    with suppress(FileNotFoundError):
                        return _read(directory, each, start, size)
                if len(entries) == 1:
                    raise ObjectMissing(name, self.path)
                # Newer versions came meanwhile, and those that were seen are gone.
        finally:
            directory.close()

    def list_after(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        where = prefix.rpartition("/")[0]
        if where and not is_object_name(where):
            raise ValueError(f"no object's name begins with {prefix!r}")
        return self._list(where, prefix, after)

    def delete(self, name: str) -> None:
        where, leaf = _split(name)
        try:
            directory = self._open(where)
        except FileNotFoundError:
            return
        try:
            if directory.kind(leaf) is not None:
                entries = [leaf]
            else:
                # The newest version last: cut off in between, an older one does not come back.
                entries = [each for _, each in sorted(_versions(directory, leaf).items())]
            for each in entries:
                with suppress(FileNotFoundError):
                    directory.unlink(each)
            directory.sync()
        finally:
            directory.close()

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        where, leaf = _split(name)
        directory = self._make(where)
        try:
            if directory.kind(leaf) is not None:
                raise BackupDestinationError(f"{name} in {self.path} is not an object that swap made; move it away")
            versions = _versions(directory, leaf)
            newest = max(versions, default=0)
            if (old is None) != (not versions):
                return False
            if old is not None and _read(directory, versions[newest], size=len(old) + 1) != old:
                return False
            if newest == _MAX_VERSION:
                raise BackupDestinationError(f"{versions[newest]} in {self.path} is not of kvwal; move it away")
            if not self._publish(directory, f"{leaf}~{newest + 1:020d}", leaf, new):
                return False
            versions = _versions(directory, leaf)
            if max(versions, default=0) > newest + 1:
                # It came so late that its number was free again.
                return False
            for version, each in versions.items():
                if version <= newest + 1 - _VERSIONS_KEPT:
                    with suppress(FileNotFoundError):
                        directory.unlink(each)
            return True
        except FileNotFoundError:
            # The version that was read is gone, so newer ones have come.
            return False
        finally:
            directory.close()

    # -- beside them --------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the directory. Idempotent; the next call opens what is at the path then."""
        root, self._root = self._root, None
        if root is not None:
            root.close()

    def older(self, name: str) -> Iterator[bytes]:
        """What an object that `swap` made was before, the newest first, as far as that is still there."""
        where, leaf = _split(name)
        directory = self._open(where)
        try:
            for each in list(_entries(directory, leaf))[2:]:
                with suppress(FileNotFoundError):
                    yield _read(directory, each)
        finally:
            directory.close()

    def sweep(self) -> int:
        """Remove what writers that died have left. Returns how many files. Call it now and then.

        A temporary goes when no process holds it; where the file system has no locks, when it kept its size for an
        hour, by this object's own look at it.
        """
        now_s, seen, removed = self._files.monotonic_s(), self._seen, 0
        self._seen = {}
        waiting = [""]
        while waiting:
            where = waiting.pop()
            try:
                directory = self._open(where)
            except FileNotFoundError:
                continue
            try:
                for each in directory.names():
                    path = f"{where}/{each}" if where else each
                    kind = directory.kind(each)
                    if kind == "directory" and is_object_name(path):
                        waiting.append(path)
                    elif kind == "file" and _is_temporary(each):
                        # It may get its name, or go, at any time.
                        with suppress(FileNotFoundError):
                            if each in _writing:
                                continue
                            size, is_held = _size_and_lock(directory, each)
                            if is_held:
                                continue
                            known, since_s = seen.get(path, (size, now_s))
                            is_old = known == size and now_s - since_s >= _ABANDONED_AFTER_S
                            if is_old or (size and _is_lockable(each)):
                                directory.unlink(each)
                                removed += 1
                            else:
                                self._seen[path] = size, since_s if known == size else now_s
            finally:
                directory.close()
        return removed

    # -- how ----------------------------------------------------------------------------------

    def _publish(self, directory: Directory, target: str, leaf: str, data: bytes | Iterable[Buffer]) -> bool:
        """Make the file `target` of this content, durably; False if there is one."""
        temporary, file = self._temporary(directory, leaf)
        try:
            try:
                offset = 0
                for chunk in (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data:
                    file.pwrite(chunk, offset)
                    offset += len(chunk)
                # Durability: the content before the name, or a name could survive a power cut without it.
                file.datasync()
                if not _is_lockable(temporary):
                    # Where no file can be locked, none may be renamed while it is open.
                    file.close()
                directory.rename(temporary, target, replace=False)
                made = True
            finally:
                file.close()
        except BaseException as error:
            with suppress(OSError):
                directory.unlink(temporary)
            if not isinstance(error, FileExistsError):
                raise
            made = False
        finally:
            _writing.discard(temporary)
        # Durability: and then the name. Also if another one made it, who may not have come so far.
        directory.sync()
        return made

    def _temporary(self, directory: Directory, leaf: str) -> tuple[str, File]:
        """A new file, locked by this process for as long as it is open, where files can be locked; and its name."""
        for held in (_HELD, ""):
            name = f"{leaf}.{self._files.random_bytes(8).hex()}{held}{_TEMPORARY}"
            _writing.add(name)
            try:
                file = directory.open(name, create=True, bulk=True, mode=self._mode)
            except BaseException:
                _writing.discard(name)
                raise
            is_made = False
            try:
                # What fails has no locks.
                with suppress(OSError):
                    is_made = not held or file.lock_record()
            finally:
                if not is_made:
                    file.close()
                    with suppress(OSError):
                        directory.unlink(name)
                    _writing.discard(name)
            if is_made:
                return name, file
        raise AssertionError("unreachable")

    def _list(self, where: str, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        try:
            directory = self._open(where)
        except FileNotFoundError:
            return
        try:
            entries = [(each + "/" if directory.kind(each) == "directory" else each) for each in directory.names()]
            newest: dict[str, str] = {}
            for each in sorted(entries):
                version = _VERSION.fullmatch(each)
                newest[version[1] if version else each] = each
            for leaf in sorted(newest):
                name = f"{where}/{leaf}" if where else leaf
                if name.endswith("/"):
                    inside = name.startswith(prefix) or prefix.startswith(name)
                    if inside and (name > after or after.startswith(name)) and is_object_name(name[:-1]):
                        yield from self._list(name[:-1], prefix, after)
                elif name.startswith(prefix) and name > after and is_object_name(name):
                    # What is no regular file is foreign, and what is gone by now was not there.
                    with suppress(FileNotFoundError):
                        if directory.kind(newest[leaf]) == "file":
                            size = _size(directory, newest[leaf])
                            yield name, size
        finally:
            directory.close()

    def _path(self, where: str) -> str:
        return f"{self._place.rstrip('/') or '/'}/{where}" if where else self._place

    def _open(self, where: str) -> Directory:
        """A directory of the destination. FileNotFoundError if it is not there, or the destination never was yet."""
        try:
            found = self._files.open_directory(self._place)
        except FileNotFoundError:
            if self._root is None:
                raise
            self._durable.discard("")
            raise BackupDestinationError(
                f"{self.path} is not there any more: it was removed, or its disk was unmounted"
            ) from None
        except NotADirectoryError:
            raise BackupDestinationError(f"{self.path} is not a directory; backups need one of their own") from None
        try:
            root = self._root
            if root is None or root.inherited:
                self._root = root = self._files.open_directory(self._place)
            if root != found:
                raise BackupDestinationError(
                    f"{self.path} is another directory than before: it was replaced, or its disk was unmounted"
                )
            if not where:
                return found
        except BaseException:
            found.close()
            raise
        found.close()
        try:
            return self._files.open_directory(self._path(where))
        except FileNotFoundError:
            # It may be that the whole destination went just now.
            self._open("").close()
            raise

    def _make(self, where: str) -> Directory:
        """A directory of the destination, which is made if need be; its entry is durable."""
        parts = where.split("/") if where else []
        directory: Directory | None = None
        for i in range(len(parts) + 1):
            if directory is not None:
                directory.close()
            directory = self._make_one("/".join(parts[:i]))
        assert directory is not None
        return directory

    def _refuse_in_store(self) -> None:
        for depth, place in enumerate(outwards(self._place)):
            # What may not be looked into, or is not there yet, tells nothing.
            with suppress(OSError):
                directory = self._files.open_directory(place)
                try:
                    is_store = directory.kind(DATA) is not None
                    if depth:
                        # Many directories that hold others have something else of that name.
                        is_store = is_store and bool(list_segments(directory))
                finally:
                    directory.close()
                if is_store:
                    lies = f" lies in {place}, which" if depth else ""
                    raise BackupDestinationError(
                        f"{self.path}{lies} holds a store; give its backups a directory of their own, outside of it"
                    )

    def _make_one(self, where: str) -> Directory:
        if not where and where not in self._durable:
            self._refuse_in_store()
        try:
            directory = self._open(where)
        except FileNotFoundError:
            self._durable.discard(where)
            try:
                with suppress(FileExistsError):
                    self._files.make_directory(self._path(where), self._mode | (self._mode & 0o444) >> 2)
            except FileNotFoundError:
                text = "the directory that should hold it is not there; make it first, or see if its disk is mounted"
                raise StoreNotFoundError(errno.ENOENT, text, self._path(where)) from None
            directory = self._open(where)
        if where not in self._durable:
            try:
                # Durability: else all that is in it could be gone after a power cut.
                directory.sync_parent()
            except BaseException:
                directory.close()
                raise
            self._durable.add(where)
        return directory


def _split(name: str) -> tuple[str, str]:
    if not is_object_name(name):
        raise ValueError(f"no object may have the name {name!r}")
    where, _, leaf = name.rpartition("/")
    return where, leaf


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r".+\.[0-9a-f]{16}(\.held)?\.tmp", name) is not None


def _is_lockable(name: str) -> bool:
    return name.endswith(_HELD + _TEMPORARY)


def _versions(directory: Directory, leaf: str) -> dict[int, str]:
    found = [_VERSION.fullmatch(each) for each in directory.names()]
    return {int(each[2]): each[0] for each in found if each is not None and each[1] == leaf}


def _entries(directory: Directory, leaf: str) -> Iterator[str]:
    """The files that may hold an object, the newest one first."""
    yield leaf
    versions = _versions(directory, leaf)
    for version in sorted(versions, reverse=True):
        yield versions[version]


def _read(directory: Directory, name: str, start: int = 0, size: int | None = None) -> bytes:
    file = directory.open(name)
    try:
        left = max(0, file.size() - start)
        # Memory is taken for what is there, and not for what is asked for.
        return file.pread(left if size is None else min(size, left), start)
    finally:
        file.close()


def _size(directory: Directory, name: str) -> int:
    file = directory.open(name)
    try:
        return file.size()
    finally:
        file.close()


def _size_and_lock(directory: Directory, name: str) -> tuple[int, bool]:
    """The size of a temporary, and whether another process holds it; it may where that cannot be asked."""
    file = directory.open(name)
    try:
        # In this order: it is locked before it has a byte.
        size = file.size()
        try:
            return size, file.holder() is not None
        except OSError:
            return size, _is_lockable(name)
    finally:
        file.close()


def sweep(destination: Destination) -> None:
    """Have a destination that can do so remove what dead writers have left. Where that fails, nothing else does."""
    with suppress(OSError, BackupDestinationError):
        getattr(destination, "sweep", lambda: 0)()
