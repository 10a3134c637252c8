"""The interface of the standard library's `dbm` over a kvwal store: `import kvwal.compat.dbm as dbm`.

- Keys and values may be str, which are encoded as UTF-8; what comes back is bytes.
- Each write is a commit of its own, durable when it returns unless `durability=` says otherwise. `dbm` promises less.
- A database is a directory. Keys come in their order, and `keys`, `values` and `items` are lists, each of one moment.
- What kvwal raises is an `error` here, with the error of kvwal as its cause. TypeError, ValueError and KeyError stay.
"""

from __future__ import annotations

import dbm
import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar, Unpack, overload

import kvwal.api.open
from kvwal.api.store import Store
from kvwal.db.handle import Closing
from kvwal.engine.value import MISSING
from kvwal.errors import Error, FormatError
from kvwal.files import PathArgument, parent_and_name, path_text, system_files
from kvwal.files.names import DATA
from kvwal.keys import BytesLike, as_key
from kvwal.log.segment import store_id_of_log
from kvwal.options import Flag, OpenOptions

__all__ = ["error", "library", "open", "open_flags", "whichdb"]

library: Final = "kvwal"
#: The flags that `open` knows.
open_flags: Final = "rwcn"

_T = TypeVar("_T")
_P = ParamSpec("_P")
_Text: TypeAlias = str | BytesLike


class error(Error, OSError):  # noqa: N801  # as every module of `dbm` names it
    """What failed. `__cause__` is the error of kvwal; `errno` is set where that has one."""


def _as_error(failure: Error) -> error:
    if isinstance(failure, OSError):
        result = error(failure.errno, failure.strerror, failure.filename)
    else:
        result = error(str(failure))
    result.__cause__ = failure
    return result


def _raising_error(function: Callable[_P, _T]) -> Callable[_P, _T]:
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except Error as failure:
            raise _as_error(failure) from failure

    return call


def _encoded(data: _Text) -> BytesLike:
    return data.encode() if isinstance(data, str) else data


@_raising_error
def open(file: PathArgument, flag: Flag = "r", mode: int = 0o666, **options: Unpack[OpenOptions]) -> Database:
    """Open the database at `file`.

    Args:
        file: a directory.
        flag: "r" to read; "w" to read and write; "c" makes it if it is missing; "n" makes it anew, empty.
        mode: permissions of new files, less the umask.
        options: those of `kvwal.open`, by keyword.

    Raises `error`, also where another module of `dbm` has its files and kvwal none, unless flag is "n"; ValueError for
    another flag.
    """
    path = path_text(file)
    if flag == "n":
        _remove_empty_file(path)
    else:
        _refuse_files_of_others(path)
    return Database(kvwal.api.open.open(path, flag, mode, **options))


def _refuse_files_of_others(path: str) -> None:
    """FormatError if the standard library has a database of this name, beside which an empty one would be made."""
    try:
        system_files().open_directory(path).close()
    except OSError:
        if other := dbm.whichdb(path):
            raise FormatError(
                f"{path} is a database of {other}, and none of kvwal yet: open a new one under another name, and move "
                "over what is there, new.update(old)"
            ) from None


def _remove_empty_file(path: str) -> None:
    """A program may have taken the name by an empty file, as `tempfile` does. A file with something in it stays."""
    parent, name = parent_and_name(path)
    try:
        directory = system_files().open_directory(parent)
    except OSError:
        return
    try:
        if name and directory.kind(name) == "file":
            file = directory.open(name)
            try:
                is_empty = not file.size()
            finally:
                file.close()
            if is_empty:
                directory.unlink(name)
    finally:
        directory.close()


def whichdb(filename: PathArgument) -> str | None:
    """The name of the module that opens the database: "kvwal.compat.dbm", or what `dbm.whichdb` says."""
    try:
        directory = system_files().open_directory(path_text(filename))
        try:
            if directory.kind(DATA) == "file" and store_id_of_log(directory) is not None:
                return __name__
        finally:
            directory.close()
    except OSError:
        pass
    return dbm.whichdb(filename)


class Database(MutableMapping[Any, bytes], Closing):
    """An open database, made by `open`. Any thread may use it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @_raising_error
    def __getitem__(self, key: _Text) -> bytes:
        return self._store[_encoded(key)]

    @_raising_error
    def __setitem__(self, key: _Text, value: _Text) -> None:
        self._store.put(_encoded(key), _encoded(value))

    @_raising_error
    def __delitem__(self, key: _Text) -> None:
        del self._store[_encoded(key)]

    @_raising_error
    def __contains__(self, key: object) -> bool:
        return (key.encode() if isinstance(key, str) else key) in self._store

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._store.keys()
        except Error as failure:
            raise _as_error(failure) from failure

    @_raising_error
    def __len__(self) -> int:
        return len(self._store)

    @overload
    def get(self, key: _Text) -> bytes | None: ...
    @overload
    def get(self, key: _Text, default: bytes | _T) -> bytes | _T: ...
    @_raising_error
    def get(self, key: _Text, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        return self._store.get(_encoded(key), default)

    @_raising_error
    def setdefault(self, key: _Text, default: _Text = b"") -> bytes:
        """The value of `key`; if there is none, `default` is put first."""
        return self._store.setdefault(_encoded(key), _encoded(default))

    @_raising_error
    def pop(self, key: _Text, default: Any = MISSING) -> Any:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there."""
        return self._store.pop(_encoded(key), default)

    @_raising_error
    def popitem(self) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key and return it; KeyError if there is none."""
        return self._store.popitem()

    @_raising_error
    def update(self, other: Any = (), /, **keywords: _Text) -> None:
        """Put every pair, in one commit."""
        pairs = dict(other, **keywords)
        self._store.update({_encoded(key): _encoded(value) for key, value in pairs.items()})

    @_raising_error
    def clear(self) -> None:
        """Remove every key, in one commit."""
        self._store.clear()

    @_raising_error
    def keys(self) -> list[bytes]:  # type: ignore[override]  # a list, as in `dbm`
        """All keys, in their order."""
        return list(self._store.keys())

    @_raising_error
    def values(self) -> list[bytes]:  # type: ignore[override]  # a list, as in `dbm`
        """All values, in the order of their keys."""
        return list(self._store.values())

    @_raising_error
    def items(self) -> list[tuple[bytes, bytes]]:  # type: ignore[override]  # a list, as in `dbm`
        """All pairs, in the order of their keys."""
        return list(self._store.items())

    @_raising_error
    def firstkey(self) -> bytes | None:
        """The smallest key; None if there is none."""
        return next(iter(self._store.keys(limit=1)), None)

    @_raising_error
    def nextkey(self, key: _Text) -> bytes | None:
        """The key that comes after `key`, which need not be there; None if there is none."""
        last = as_key(_encoded(key))
        return next((following for following in self._store.keys(last, limit=2) if following != last), None)

    @_raising_error
    def sync(self) -> None:
        """Make every write so far durable, whatever durability it was made with."""
        self._store.sync()

    @_raising_error
    def reorganize(self) -> None:
        """Give back the space of what was removed, as far as no past moment needs it: opened with `keep_history_s=0`,
        none does.
        """
        self._store.compact()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._store.closed

    @_raising_error
    def close(self) -> None:
        """Close it. Idempotent."""
        self._store.close()

    def __repr__(self) -> str:
        return f"<kvwal.compat.dbm.Database {self._store.path!r}, {'closed' if self.closed else 'open'}>"
