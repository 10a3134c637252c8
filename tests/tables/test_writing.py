"""What threads and tasks share of the writes of a table: keys and values that are checked, one step, interruptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from store_fixtures import check_store, interrupted_at

import kvwal
from kvwal.tables.writing import at_once
from kvwal.testing import SimulatedDisk

WRITES: list[Callable[[Any, Any, Any], object]] = [
    lambda table, key, value: table.put(key, value),
    lambda table, key, value: table.update({key: value}),
    lambda table, key, value: table.setdefault(key, value),
    lambda table, key, value: table.put_if_absent(key, value),
    lambda table, key, value: table.compare_and_set(key, None, value),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("there", [False, True])
def test_no_write_stores_a_key_that_is_too_long_or_no_bytes(write: Any, there: bool) -> None:
    """A record has the length of a key in 2 bytes: one that is longer could not be read back."""

    class Loose:
        """A codec that makes what is no `bytes`."""

        name = "loose"
        version = 1
        ordered = True
        encode = staticmethod(lambda value: bytearray(value))
        decode = staticmethod(bytes)

    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        table = db.table("t", str, bytes)
        if there:
            table["x"] = b"1"
        before = db.last_seqno
        with pytest.raises(ValueError, match="65535"):
            write(table, "x" * 65_536, b"v")
        assert db.last_seqno == before
        write(table, "x" * 65_535, b"v")
        assert table["x" * 65_535] == b"v"
        loose = db.table("loose", Loose(), Loose())
        write(loose, b"k", b"v")
        rows = [(row[1], value) for row, value in db.engine.state.cache.rows.items() if isinstance(row, tuple)]
        assert (b"k", b"v") in rows
        assert {type(each) for row in rows for each in row} <= {bytes, type(None)}
        check_store(db)


def test_at_once_refuses_what_waits() -> None:
    class Never:
        def __await__(self) -> Any:
            yield

    async def waits() -> None:
        await Never()

    with pytest.raises(AssertionError):
        at_once(waits)


def test_an_interruption_before_the_first_step_warns_of_nothing() -> None:
    db = kvwal.open("/kv", files=SimulatedDisk(), background=False)
    table = db.table("t", str, int)
    stored = table._stored
    with db, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 4):
            interrupted_at(step, lambda: at_once(table._way.to_write))
        assert stored.id() is None


@pytest.mark.parametrize("known", [False, True])
# A coroutine that another one awaits: this test may interrupt between the making and the first step, no signal can.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_an_interruption_anywhere_leaves_a_write_written_or_not(known: bool) -> None:
    step = 0
    interrupted = True
    while interrupted:
        step += 1 if step < 200 else 7
        with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
            table = db.table("t", str, int)
            if known:
                table["a"] = 1
            before = dict(table)
            found = interrupted_at(step, lambda: table.add("n", 5))
            interrupted = found is not None
            # Without a note it came before, or when the commit was over.
            written = not interrupted or "was written" in str(getattr(found, "__notes__", ""))
            assert dict(table) in ([] if written else [before]) + [{**before, "n": 5}]
            check_store(db)
    assert step > 50
