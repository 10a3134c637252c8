"""What the tests of the page file share: a scratch file, a plain dict as its model, files that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from wrapped_files import WrappedFiles

from kvwal.files import Buffer, Directory, File, system_files
from kvwal.keys import KeyRange, Seqno
from kvwal.pages import Changes, Columns, Keep, Meta, PageFile, Tree, check, create_page_file
from kvwal.pages.catalogue import roots

STORE_ID = b"0123456789abcdef"

Updates = dict[bytes, bytes | None]
Model = dict[bytes, bytes]


class FailingFile:
    """A file whose nth write-side or read-side call fails."""

    def __init__(self, file: File, before: Callable[[str, int, int], None]) -> None:
        self._file = file
        self._before = before

    def pread(self, size: int, offset: int) -> bytes:
        self._before("pread", offset, size)
        return self._file.pread(size, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._before("pwrite", offset, len(data))
        self._file.pwrite(data, offset)

    def pwrite_all(self, chunks: Sequence[Buffer], offset: int) -> None:
        self._before("pwrite", offset, sum(map(len, chunks)))
        self._file.pwrite_all(chunks, offset)

    def datasync(self) -> None:
        self._before("sync", 0, 0)
        self._file.datasync()

    def sync(self) -> None:
        self._before("sync", 0, 0)
        self._file.sync()

    def truncate(self, size: int) -> None:
        self._before("truncate", size, 0)
        self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class WatchedFiles(WrappedFiles):
    """The system's files, with a call before each operation on an open file that may raise."""

    def __init__(self) -> None:
        super().__init__(system_files(), lambda file, name: FailingFile(file, lambda *call: self.before(*call)))
        self.before: Callable[[str, int, int], None] = lambda operation, offset, size: None


def columns(pairs: Iterable[tuple[bytes, bytes | None]], run: int = 1000) -> Iterator[Columns]:
    """The pairs as a checkpoint takes them: runs of keys and of values."""
    rest = iter(pairs)
    while part := list(islice(rest, run)):
        yield [key for key, _ in part], [value for _, value in part]


class Scratch:
    """A page file and a dict that says what must be in it."""

    def __init__(self, directory: str, *, cache_bytes: int = 1 << 20, files: Any = None) -> None:
        self.files: Any = system_files() if files is None else files
        self.directory: Directory = self.files.open_directory(directory)
        self.path = f"{directory}/data"
        self.cache_bytes = cache_bytes
        create_page_file(self.directory, STORE_ID, time_us=1)
        self.model: Model = {}
        #: The tables beside table 0.
        self.tables: dict[int, Model] = {}
        self.pages = self.open()

    def open(self, *, writable: bool = True) -> PageFile:
        return PageFile(self.directory, cache_bytes=self.cache_bytes, writable=writable)

    def reopen(self) -> None:
        self.pages.close()
        self.pages = self.open()

    def checkpoint(
        self,
        updates: Updates,
        ranges: Sequence[tuple[bytes, bytes | None]] = (),
        tables: Mapping[int, tuple[Updates, Sequence[tuple[bytes, bytes | None]]]] = MappingProxyType({}),
        *,
        compact: bool = False,
        append: bool = False,
        keep: Keep | None = None,
        drop: Sequence[int] = (),
    ) -> None:
        """Checkpoint, then let the models know."""
        ranges = [KeyRange(*bounds) for bounds in ranges]
        tables = {table: (each, [KeyRange(*bounds) for bounds in gone]) for table, (each, gone) in tables.items()}
        seqno = Seqno(self.pages.meta.seqno + 1)
        changes = {table: Changes(columns(sorted(each.items())), gone) for table, (each, gone) in tables.items()}
        self.pages.checkpoint(
            columns(sorted(updates.items())),
            ranges,
            tables=changes,
            seqno=seqno,
            time_us=int(seqno),
            compact=compact,
            append=append,
            keep=keep,
            drop=drop,
        )
        self.model = applied(self.model, updates, ranges)
        self.tables = tables_after(self.tables, tables)

    def verify(self) -> None:
        """The file is sound and the trees are the models."""
        assert list(check(self.pages)) == []
        assert contents(self.pages.tree()) == self.model
        assert len(self.pages.tree()) == len(self.model)
        assert table_ids(self.pages) == sorted(self.tables.keys() | ({0} if self.model else set()))
        for table, model in self.tables.items():
            tree = self.pages.tree(table=table)
            assert contents(tree) == model
            assert len(tree) == len(model)


def two_generations(directory: Any) -> Scratch:
    """A page file of which both generations have pages."""
    scratch = Scratch(str(directory))
    scratch.checkpoint({b"%04d" % index: b"old" for index in range(500)})
    scratch.checkpoint({b"%04d" % index: b"new" for index in range(0, 500, 7)})
    return scratch


def overwrite(scratch: Scratch, offset: int, data: bytes) -> None:
    """Change bytes of a page file behind its back."""
    with open(scratch.path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def table_ids(pages: PageFile, meta: Meta | None = None) -> list[int]:
    """The tables of a generation that have entries, ascending; of the newest if none is named."""
    return [table for table, _ in roots(pages.pager, pages.meta if meta is None else meta)]


def tables_after(
    tables: Mapping[int, Model], changes: Mapping[int, tuple[Updates, Sequence[tuple[bytes, bytes | None]]]]
) -> dict[int, Model]:
    """What a checkpoint makes of the tables beside table 0: those that are empty are no more."""
    after = {table: applied(tables.get(table, {}), *changes.get(table, ({}, ()))) for table in {*tables, *changes}}
    return {table: model for table, model in after.items() if model}


def applied(
    model: dict[bytes, bytes], updates: Updates, ranges: Iterable[tuple[bytes, bytes | None]]
) -> dict[bytes, bytes]:
    """What a checkpoint makes of a dict."""
    result = {
        key: value
        for key, value in model.items()
        if not any(start <= key and (stop is None or key < stop) for start, stop in ranges)
    }
    for key, value in updates.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def entries(tree: Tree, start: bytes | None = None, stop: bytes | None = None, *, reverse: bool = False) -> list[Any]:
    """The entries of a range, one by one."""
    found = []
    for keys, values in tree.chunks(start, stop, reverse=reverse):
        assert keys, "a chunk is never empty"
        found += zip(keys, values, strict=True)
    return found


def contents(tree: Tree) -> dict[bytes, bytes]:
    """Everything, and the proof that it came in order."""
    found = entries(tree)
    assert [key for key, _ in found] == sorted({key for key, _ in found})
    assert found[::-1] == entries(tree, reverse=True)
    return dict(found)


_pinned: WeakKeyDictionary[PageFile, list[int]] = WeakKeyDictionary()


def pin(pages: PageFile, generation: int) -> None:
    """Hold a generation, once more if it is held already."""
    held = [*_pinned.get(pages, []), generation]
    pages.pins.hold("a test", held)
    _pinned[pages] = held


def unpin(pages: PageFile, generation: int) -> None:
    """Take back one `pin`."""
    held = _pinned[pages]
    held.remove(generation)
    pages.pins.hold("a test", held)
