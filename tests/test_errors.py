"""The tree of errors: what each says, and that none is lost or poorer on its way between processes."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

import kvwal
from kvwal import errors
from kvwal.errors import (
    CorruptionError,
    DiskFullError,
    Error,
    FeedGap,
    Finding,
    NotInBackup,
    PoisonedError,
    SnapshotTooOld,
    StoreNotFoundError,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)

# One of each class, as kvwal makes it: (class, arguments, keywords).
MADE: list[tuple[type[Error], tuple[Any, ...], dict[str, Any]]] = [
    (errors.Error, ("text",), {}),
    (errors.UsageError, ("text",), {}),
    (errors.ClosedError, ("text",), {}),
    (errors.ReadOnlyError, ("text",), {}),
    (errors.ForkedError, (), {}),
    (errors.ReentrancyError, ("put",), {}),
    (errors.TransactionTooLargeError, (256 << 20,), {}),
    (errors.StoreNotFoundError, (2, "there is no store", "/a.kv"), {}),
    (errors.StoreExistsError, (17, "something is there: /a.kv"), {}),
    (errors.ConsumerExistsError, ("mailer",), {}),
    (errors.FencedError, ("mailer",), {}),
    (errors.CodecError, ("json", b"\xff{", "it is not UTF-8"), {}),
    (
        errors.SnapshotTooOld,
        (NOON, 7, 90),
        {"oldest_time": NOON, "newest_time": NOON, "nearest": (3, 8), "lost_commits": 4, "forked_at": 2},
    ),
    (errors.SnapshotTooOld, (5, 90, 90), {"limit_bytes": 1 << 30}),
    (errors.NotInBackup, (5, [(7, 80), (82, 90)]), {"nearest": (None, 7)}),
    (errors.StaleError, (0.75, 0.5), {}),
    (errors.FeedGap, (5, 7, 90), {"oldest_time": NOON, "nearest": (None, 8), "lost_commits": 2}),
    (errors.CorruptionError, ("data", 4096, "the checksum is wrong"), {}),
    (errors.FormatError, ("text",), {}),
    (errors.ObjectMissing, ("0/unit/0/1-2.r0", "/mnt/b"), {}),
    (errors.ArchiveDiverged, (7,), {}),
    (errors.ForkDiverged, (b"12345678", b"87654321", 7), {}),
    (errors.EnvironmentFailure, ("text",), {}),
    (errors.BackupDestinationError, ("text",), {}),
    (errors.LockedError, ("/a.kv", 77), {"own": False}),
    (errors.LockedError, ("/a.kv", 77), {"own": True, "consumer": "mailer", "thread": "MainThread"}),
    (errors.PoisonedError, ("text",), {}),
    (errors.ArchiveBehindError, ("text",), {}),
    (errors.DiskFullError, ("text",), {}),
    (errors.SystemCallError, (5, "the disk fails", "/a.kv/data"), {}),
    (errors.RefusedError, (24, "too many open files", "/a.kv/data"), {}),
    (errors.StoreRemovedError, (2, "it is gone", "/a.kv"), {}),
    (errors.ConflictError, (b"k\xff", 9, "key b'k'"), {}),
    (errors.TableNotFoundError, ("users",), {}),
    (errors.TableExistsError, ("users",), {}),
    (errors.TableCodecError, ("users", "keys", "str", "int"), {}),
    (errors.IndexNotFoundError, ("users", "by_city"), {}),
    (errors.IndexNotDeclaredError, ("users", "by_city"), {}),
    (errors.IndexNotReadyError, ("users", "by_city", 10, 200), {}),
    (errors.IndexNotReadyError, ("users", "by_city", 10, 200, ValueError("no city")), {}),
    (errors.IndexesChangedError, (16,), {}),
    (errors.InternalError, ("text",), {}),
]
CLASSES = {
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Error) and not kind.__name__.startswith("_")
}


def facts(error: BaseException) -> dict[str, Any]:
    """All that a caller can read of an error; the cause by what it is in turn."""
    names = ["errno", "strerror", "filename"] if isinstance(error, OSError) else []
    cause = None if error.__cause__ is None else facts(error.__cause__)
    return {
        "class": type(error),
        "text": str(error),
        "args": error.args,
        "attributes": dict(vars(error)),
        "cause": cause,
    } | {name: getattr(error, name) for name in names}


def test_every_class_is_tried_here_exported_and_drawn_in_the_tree() -> None:
    assert {kind for kind, _, _ in MADE} == CLASSES
    assert {kind.__name__ for kind in CLASSES} <= set(kvwal.__all__)
    tree = errors.__doc__ or ""
    for kind in CLASSES - {Error}:
        line = next(line for line in tree.splitlines() if f"-- {kind.__name__} " in line)
        depth = line.index("-- ")
        above = [other for other in tree[: tree.index(line)].splitlines() if other.strip()]
        parent = next(other for other in reversed(above) if len(other) - len(other.lstrip(" |`-")) < depth)
        assert parent.strip(" |`-").split()[0] == kind.__mro__[1].__name__.replace("_NotKeptError", "UsageError")


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("kind", "arguments", "keywords"), MADE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_copy_says_all_that_the_error_said(kind: Any, arguments: Any, keywords: Any, way: Any) -> None:
    error = kind(*arguments, **keywords)
    error.add_note("kvwal: commit 7 was written")
    error.__cause__ = OSError(5, "Input/output error", "/a.kv/data")
    again = way(error)
    assert again is not error
    assert facts(again) == facts(error)
    with pytest.raises(kind):
        raise again


def test_a_cause_of_kvwals_own_travels_with_its_cause() -> None:
    error = errors.poisoned(errors.poisoned(OSError(5, "Input/output error")))
    assert facts(pickle.loads(pickle.dumps(error))) == facts(error)


def test_a_cause_that_may_not_be_picklable_stays_behind_and_takes_nothing_with_it() -> None:
    class Local(Exception):
        pass

    error = CorruptionError("data", 1, "why")
    error.__cause__ = Local()
    again = pickle.loads(pickle.dumps(error))
    assert again.__cause__ is None
    assert (again.file, again.offset, again.reason, str(again)) == ("data", 1, "why", str(error))


@pytest.fixture(scope="module")
def pool() -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize(("kind", "arguments", "keywords"), MADE, ids=lambda value: getattr(value, "__name__", ""))
def test_an_error_raised_in_a_process_pool_arrives_and_the_pool_goes_on(
    pool: ProcessPoolExecutor, kind: Any, arguments: Any, keywords: Any
) -> None:
    program = f"import datetime, kvwal.errors\nraise kvwal.errors.{kind.__name__}(*{arguments!r}, **{keywords!r})"
    with pytest.raises(kind) as caught:
        pool.submit(exec, program).result()
    expected = facts(kind(*arguments, **keywords))
    # The pool puts the worker's traceback there.
    assert facts(caught.value) | {"cause": None} == expected
    assert pool.submit(abs, -1).result() == 1


def test_an_error_of_the_system_is_found_as_the_standard_library_names_it() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        raise StoreNotFoundError(2, "there is no store", "/a.kv")
    assert (caught.value.errno, caught.value.filename) == (2, "/a.kv")
    assert issubclass(errors.StoreExistsError, FileExistsError)
    assert issubclass(errors.RefusedError, OSError)


def test_bytes_that_a_codec_cannot_read_are_in_its_error_and_begin_its_text() -> None:
    error = errors.CodecError("json", b"x" * 33, "it is no JSON")
    assert (error.codec, error.data, error.reason) == ("json", b"x" * 33, "it is no JSON")
    assert str(error).startswith(f"codec json cannot read 33 bytes, {b'x' * 32!r}...: it is no JSON; use the")
    assert isinstance(error, ValueError)


def test_a_damage_is_a_finding() -> None:
    assert CorruptionError("data", 8192, "why").finding == Finding("data", 8192, "why")
    assert str(Finding("data", 8192, "why")) == "data at byte 8192: why"
    assert str(Finding("data", None, "why")) == "data: why"
    assert str(CorruptionError("data", 8192, "why")).startswith("data at byte 8192: why. Restore")
    of_object = str(CorruptionError("0123456789abcdef/unit/0/a", 0, "why"))
    assert of_object.startswith("0123456789abcdef/unit/0/a at byte 0: why. It is an object of a backup")
    assert str(CorruptionError("data", None, "why", advice="Do this")) == "data: why. Do this"


def test_a_position_that_is_not_kept_is_refused_with_what_is() -> None:
    error: SnapshotTooOld | FeedGap = SnapshotTooOld(5, 7, 90, oldest_time=NOON, nearest=(3, 8))
    assert str(error) == (
        "what was from commit 5 on is no longer all kept; kept are commits 7 of 2030-01-01T12:00:00+00:00 to 90; the "
        "nearest moments that are kept are those of commit 3 and 8; ask for one of these"
    )
    error = FeedGap(5, 7, 90, lost_commits=1)
    assert "changes after commit 5" in str(error)
    assert "(lost are 1)" in str(error)
    assert (error.nearest, error.oldest_time, error.forked_at) == ((None, None), None, None)
    assert "another line, which left this one after commit 4" in str(FeedGap(5, 7, 90, forked_at=4))


def test_bounds_that_have_what_was_asked_for_are_not_named() -> None:
    went = SnapshotTooOld(4, 4, 4, while_read=True)
    assert str(went).startswith("the moment of commit 4 went while it was read: ")
    assert "kept" not in str(went)
    assert pickle.loads(pickle.dumps(went)).while_read
    # A log of which nothing is left.
    assert "; no commit is kept; the newest is 7; begin again" in str(FeedGap(5, 8, 7))


def test_a_moment_that_a_backup_does_not_have_is_refused_with_the_stretches_that_it_has() -> None:
    error = NotInBackup(5, [(0, 3), (4, 4), (7, 9)], nearest=(4, 7))
    assert str(error) == (
        "the backup does not have the moment of commit 5; it has those of commits 0 to 3, 4, 7 to 9; the nearest ones "
        "are those of commit 4 and 7; a plain backup has one moment, and one with history=True, or kvwal.archive, "
        "those between too; ask for one of these"
    )
    timed = NotInBackup(NOON, [(0, 3), (7, 9)], nearest=(3, 7), nearest_times=(NOON, None))
    assert "the nearest ones are those of commit 3 (2030-01-01T12:00:00+00:00) and 7; a plain" in str(timed)
    assert str(timed).endswith("; ask for one of these by its number")
    assert (error.stretches, error.oldest, error.newest) == (((0, 3), (4, 4), (7, 9)), 0, 9)
    many = NotInBackup(51, [(n, n) for n in range(0, 100, 2)], nearest=(50, 52))
    assert "those of commits 46, 48, 50, 52, 54, 56, and 44 stretches that are further away; the" in str(many)
    assert pickle.loads(pickle.dumps(many)).stretches == many.stretches


def test_a_stalled_commit_says_what_stands_in_the_way() -> None:
    cause = OSError(5, "Input/output error")
    poisoned = errors.poisoned(cause)
    assert poisoned.__cause__ is cause
    assert "Input/output error" in str(poisoned)
    assert "(MemoryError)" in str(errors.poisoned(MemoryError()))
    assert errors.stalled(poisoned) is poisoned
    full = errors.stalled(DiskFullError("a file may not be larger"))
    assert isinstance(full, DiskFullError)
    assert "a file may not be larger" in str(full)
    refused = errors.stalled(errors.RefusedError(24, "too many open files", "/a"))
    assert isinstance(refused, errors.RefusedError)
    assert "too many open files" in str(refused)
    assert "earlier" not in str(refused)
    assert isinstance(errors.stalled(cause), PoisonedError)


def test_a_poisoned_store_names_its_first_failure_once() -> None:
    failure = OSError(5, "the device failed")
    again = errors.poisoned(errors.poisoned(errors.poisoned(failure)))
    assert str(again) == str(errors.poisoned(failure))
    assert str(again).count("an earlier write or flush failed") == 1
    assert again.__cause__ is failure
