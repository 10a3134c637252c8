"""Eight processes of mixed load on one store (REQUIREMENTS, section 4): one writes, and each of seven reads in its way.

Each commit gives all keys one value, and that to a row of a table, so whatever is read of one moment has one value.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from following_fixtures import WRITES, all_durable

import kvwal

ROOT = Path(__file__).parent.parent.parent
LOADS = ("gets", "scans", "counts", "tables", "changes", "waits", "backups")

READER = """
    import random, sys
    import kvwal

    path, load = sys.argv[1:]
    draw = random.Random(load)
    keys = [b"%03d" % n for n in range(100)]

    def gets(live):
        with live.snapshot() as then:
            return {then[key] for key in draw.sample(keys, 20)} | set(then.get_many(keys))

    def scans(live):
        with live.snapshot() as then:
            assert list(then) == keys and list(reversed(then)) == keys[::-1]
            return {value for _, value in then.items()} | {value for _, value in then.scan(b"030", b"060")}

    def counts(live):
        with live.snapshot() as then:
            assert len(then) == then.count() == 100 and then.rank(b"050") == 50 and then.key_at(7) == b"007"
            assert (then.first()[0], then.last()[0]) == (b"000", b"099")
            return {then[keys[0]]}

    def tables(live):
        with live.snapshot() as then:
            return {live.table("t", bytes, bytes).within(then)[b"row"], then[b"050"]}

    def changes(live):
        told = {change.value for change in feed if change.table is None}
        assert not told or max(told) <= live[b"000"] or live[b"000"] == b"end"
        return {live[b"000"]}

    def waits(live):
        live.wait(live.seqno + 1, timeout_s=1)
        return {live[b"000"]}

    def backups(live):
        into = f"{path}-restored-{rounds}"
        moment = live.backup(f"{path}-backups").position
        kvwal.restore(f"{path}-backups", into, at=moment)
        with kvwal.open(into, "r") as found:
            return {value for _, value in found.items()}

    seen, rounds, last = set(), 0, 0
    with kvwal.follow(path, name=load, cache_bytes=256 << 10) as live:
        feed = live.changes(follow=True, timeout_s=0)
        print("begun", flush=True)
        while seen != {b"end"}:
            try:
                seen = globals()[load](live)
            except kvwal.SnapshotTooOld:
                pass
            except kvwal.FeedGap:
                feed = live.changes(after=live.position, follow=True, timeout_s=0)
            else:
                rounds += 1
                assert len(seen) == 1, seen
            assert live.seqno >= last
            last = live.refresh()
    print(rounds)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no pins")
def test_eight_processes_of_mixed_load(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with kvwal.open(path, **WRITES) as db:

        def commit(value: bytes) -> None:
            with db.batch() as batch:
                table.within(batch)[b"row"] = value
                for n in range(100):
                    batch.put(b"%03d" % n, value)

        table = db.table("t", bytes, bytes)
        commit(b"0000")
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(READER), str(path), load],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for load in LOADS
        ]
        for n in range(400):
            commit(b"%04d" % n)
            if n % 8 == 0:
                db.checkpoint()
            if n == 20:
                for reader in readers:
                    assert reader.stdout is not None
                    assert reader.stdout.readline() == b"begun\n"
        commit(b"end")
        all_durable(db)
        for load, reader in zip(LOADS, readers, strict=True):
            said, _ = reader.communicate(timeout=120)
            assert reader.returncode == 0, load
            assert int(said) > 0, load
        db.checkpoint()
        assert [pin for pin in db.pins() if pin.purpose == "follower"] == []
