"""What a checkpoint says in the meta beside the trees."""

from __future__ import annotations

from pathlib import Path

import kvwal


def test_the_meta_has_the_time_of_its_commit_the_wall_clock_and_the_session(tmp_path: Path) -> None:
    sessions = []
    for number in range(3):
        with kvwal.open(tmp_path / "a.kv", background=False) as db:
            before_us = db.engine._options.files.now_us()
            db[b"%d" % number] = b""
            db.checkpoint()
            meta = db.engine._pages.meta
            (newest,) = db.history(after=db.last_seqno - 1)
            assert meta.seqno == newest.seqno
            assert meta.time_us == newest.time_us
            assert before_us <= meta.wall_us <= db.engine._options.files.now_us()
            sessions.append(meta.session)
    assert sessions == sorted(set(sessions))
    assert sessions[0] > 0


def test_a_checkpoint_without_commits_keeps_the_time_of_the_last_one(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        db.update({b"%04d" % number: b"x" * 1000 for number in range(2000)})
        db.checkpoint()
        time_us = db.engine._pages.meta.time_us
        db.compact()
        assert db.engine._pages.meta.time_us == time_us
