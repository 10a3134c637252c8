"""Traps for one who reads beside a writer, each by the name that the requirements gave it; T11 has its own file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from following_fixtures import PATH, Primary, all_durable

import kvwal
from kvwal.files.names import segment_name


def test_t4_segment_replaced() -> None:
    """A recovery puts a new segment in the place of one of the same name: the open file is one that is no more."""
    primary = Primary()
    name = f"{PATH}/{segment_name(1)}"
    with primary.follow() as live:
        for n in range(5):
            primary.db.put(b"durable", b"%d" % n)
            primary.db.put(b"not yet", b"%d" % n, durability="os")
            live.refresh()
            before = primary.disk.read(name)
            primary.restart()
            assert [name for name in primary.disk.open_directory(PATH).names() if ".log" in name] == [segment_name(1)]
            assert primary.disk.read(name)[:256] != before[:256]
            assert live.refresh() == primary.db.last_seqno == 2 * (n + 1)
            assert dict(live) == {b"durable": b"%d" % n, b"not yet": b"%d" % n}
        primary.db.close()


def test_t8_preallocated_tail() -> None:
    """The size of the newest segment says nothing: it is that of the space, and not of what is there."""
    primary = Primary()
    name = f"{PATH}/{segment_name(1)}"
    size = len(primary.disk.read(name))
    with primary.db as db, primary.follow() as live:
        for n in range(50):
            db.put(b"key", b"%d" % n)
            all_durable(db)
            assert live.refresh() == n + 1
            assert len(primary.disk.read(name)) == size


def test_t9_lock_refuses_readers(tmp_path: Path) -> None:
    """The writer's lock excludes writers, and no reader."""
    with kvwal.open(tmp_path / "db") as db:
        db.put(b"key", b"value")
        with kvwal.open(tmp_path / "db", "r") as reader, kvwal.follow(tmp_path / "db") as live:
            assert live.wait(db.last_seqno, 10)
            assert live[b"key"] == b"value"
            assert len(reader) <= 1
        with pytest.raises(kvwal.LockedError):
            kvwal.open(tmp_path / "db")


FORKING = """
    import os, sys, time, kvwal
    db = kvwal.open(sys.argv[1])
    db.put(b"key", b"of the parent")
    child = os.fork()
    if not child:
        # Only now has it run what lets go of the lock.
        print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_t10_fork_keeps_flock(tmp_path: Path) -> None:
    """A child that outlives the writer keeps neither the next writer out, nor a follower from what that writes."""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORKING), str(tmp_path / "db")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        with kvwal.follow(tmp_path / "db") as live:
            parent.kill()
            parent.wait()
            with kvwal.open(tmp_path / "db") as db:
                assert live.refresh() == 1
                db.put(b"key", b"of the next")
                assert live.wait(db.last_seqno, 10)
                assert live[b"key"] == b"of the next"
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()
