"""Every limit, at the limit and one beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY, problems_of, wait_until

import kvwal
from kvwal import MAX_BATCH_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES, WriteBatch

OPTIONS = {**TINY, "background": False, "durability": "os"}


@pytest.mark.parametrize("size", [0, 1, 255, 256, 4095, 4096, 8192, 65_534, 65_535])
def test_a_key_of_any_size_up_to_the_limit_comes_back(tmp_path: Path, size: int) -> None:
    keys = [b"k" * size, b"\0" * size, b"\xff" * size]
    model = {key: b"%d" % number for number, key in enumerate(keys)}
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        db.update(model)
        assert dict(db) == model
        db.checkpoint()
        assert dict(db) == model
        assert [db[key] for key in model] == list(model.values())
        assert list(db.keys(prefix=keys[2])) == [keys[2]] or size == 0
        assert problems_of(db) == []
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        assert dict(db) == model
        db.delete(keys[0])
        db.checkpoint()
        assert keys[0] not in db


def test_a_key_one_byte_too_long_is_refused_everywhere(tmp_path: Path) -> None:
    key = b"k" * (MAX_KEY_BYTES + 1)
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        with db.transaction() as txn, db.snapshot() as snapshot:
            calls: list[Any] = [
                lambda: db.put(key, b""),
                lambda: db.get(key),
                lambda: db[key],
                lambda: db.get_many([key]),
                lambda: db.delete(key),
                lambda: db.update({b"fine": b"", key: b""}),
                lambda: db.update([(b"fine", b""), (key, b"")]),
                lambda: db.delete_range(key),
                lambda: db.scan(key),
                lambda: db.pop(key, None),
                lambda: db.setdefault(key, b""),
                lambda: txn.put(key, b""),
                lambda: txn.get(key),
                lambda: snapshot.get(key),
                lambda: WriteBatch().put(key, b""),
            ]
            for number, call in enumerate(calls):
                with pytest.raises(ValueError, match="65536"):
                    pytest.fail(f"call {number} gave {call()!r}")
        assert db.last_seqno == 0, "nothing was written"


# Around the place where a value moves out of its leaf, the size of pages and of nodes, and chunks of the log.
SIZES = sorted(
    {0, 1, 1000, *range(2000, 2700, 50), 2599, 2601, 4000, 4095, 4096, 4097, 8192, 32_767, 32_768, 65_536, 300_000}
)


def test_values_around_every_threshold_come_back(tmp_path: Path) -> None:
    model = {b"%07d" % size: bytes([size % 251]) * size for size in SIZES}
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        for key, value in model.items():
            db[key] = value
        assert dict(db) == model
        db.checkpoint()
        assert dict(db) == model
        assert problems_of(db) == []
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        assert list(db.items(reverse=True)) == sorted(model.items(), reverse=True)
        # Each becomes the next one's size, so that every threshold is crossed, both ways.
        for key, value in zip(model, reversed(list(model.values())), strict=True):
            db[key] = value
        db.checkpoint()
        assert list(db.values()) == list(reversed(list(model.values())))
        assert problems_of(db) == []
        db.clear()
        for _ in range(3):
            db[b"a"] = b""
            db.checkpoint()
        assert db.stats().data_bytes < 200_000, "the space of what was deleted was given back"


def test_a_value_one_byte_too_long_is_refused(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        large = bytes(MAX_VALUE_BYTES + 1)
        with pytest.raises(ValueError, match=str(MAX_VALUE_BYTES)):
            db.put(b"k", large)
        with pytest.raises(ValueError, match=str(MAX_VALUE_BYTES)):
            db.update({b"fine": b"", b"k": large})
        assert db.last_seqno == 0


@pytest.mark.slow
def test_a_value_of_a_gibibyte_is_stored_and_comes_back(tmp_path: Path) -> None:
    value = bytes(range(256)) * (MAX_VALUE_BYTES // 256)
    with kvwal.open(tmp_path / "a.kv", background=False, durability="os") as db:
        db[b"k"] = value
        db.checkpoint()
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        assert db[b"k"] == value


def test_a_batch_too_large_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    """The same gibibyte four times: a batch of 4 GiB that takes one."""
    value = bytes(MAX_BATCH_BYTES // 3)
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        with pytest.raises(ValueError, match="in parts"), db.batch() as batch:
            for number in range(4):
                batch.put(b"%d" % number, value)
        assert db.last_seqno == 0


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        ("cache_bytes", 256 << 10, None),
        ("memtable_bytes", 16 << 10, None),
        ("segment_bytes", 16 << 10, 1 << 30),
        ("checkpoint_log_bytes", 4 << 10, None),
        ("keep_history_bytes", 0, None),
        ("history_base_bytes", 0, None),
        ("mode", 0o600, 0o7777),
        ("sync_delay_s", 0, None),
        ("checkpoint_interval_s", 0, None),
        ("keep_history_s", 0, None),
    ],
)
def test_an_option_works_at_its_limit_and_is_refused_one_beyond(
    tmp_path: Path, option: str, least: int, most: int | None
) -> None:
    with kvwal.open(tmp_path / "a.kv", **{option: least}) as db:
        db.update({b"%d" % number: b"v" * 100 for number in range(300)})
        db.checkpoint()
        assert len(db) == 300
    for value in [-1 if option == "mode" else least - 1] + ([most + 1] if most else []):
        with pytest.raises(ValueError, match=option):
            kvwal.open(tmp_path / "b.kv", **{option: value})
    for value in ["1", True, b"1", *([None] if option != "keep_history_bytes" else [])]:
        with pytest.raises(TypeError, match=option):
            kvwal.open(tmp_path / "b.kv", **{option: value})  # type: ignore[arg-type]
    assert not (tmp_path / "b.kv").exists()


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("durability", "none", ValueError),
        ("durability", None, ValueError),
        ("preallocate", "holes", ValueError),
        ("background", 1, TypeError),
        ("sync_delay_s", float("nan"), ValueError),
        ("checkpoint_interval_s", float("nan"), ValueError),
        ("keep_history_s", -0.1, ValueError),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(tmp_path: Path, option: str, value: Any, error: Any) -> None:
    with pytest.raises(error, match=option):
        kvwal.open(tmp_path / "b.kv", **{option: value})
    assert not (tmp_path / "b.kv").exists()


@pytest.mark.parametrize("option", ["sync_delay_s", "checkpoint_interval_s", "keep_history_s"])
def test_times_without_an_end_work(tmp_path: Path, option: str) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="interval", **{option: float("inf")}) as db:
        for number in range(200):
            db[b"%d" % number] = b"x"
        db.checkpoint()
        db[b"more"] = b""
        assert db.engine._background is not None
        # Idle, the thread dozes: as long as it is told, and no error comes of it.
        wait_until(lambda: db.engine._log._on_append is not None, "the wait")
        db[b"again"] = b""
        wait_until(lambda: db.durable_seqno == db.last_seqno or option == "sync_delay_s", "the flush")
        assert db.engine._background._thread.is_alive()
        assert db.engine._background.failure is None
    with kvwal.open(tmp_path / "a.kv") as db:
        assert len(db) == 202


@pytest.mark.parametrize("durability", ["sync", "", None, 1])
def test_an_unknown_durability_of_one_commit_is_refused(tmp_path: Path, durability: Any) -> None:
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        if durability is not None:
            with pytest.raises(ValueError, match="durability"):
                db.put(b"a", b"", durability=durability)
            with pytest.raises(ValueError, match="durability"):
                db.transaction(durability=durability)
        assert b"a" not in db


def test_a_limit_that_is_no_count_is_refused(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        for limit, error in ((-1, ValueError), ("1", TypeError), (1.0, TypeError)):
            with pytest.raises(error):
                db.scan(limit=limit)  # type: ignore[arg-type]
        assert list(db.scan(limit=0)) == []
