"""A failed system call becomes one of kvwal's errors, which says whether anything was done, and what to do now."""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.errors import EnvironmentFailure, RefusedError, SystemCallError
from kvwal.files import system_files
from kvwal.files.failures import failed, is_full


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINTR])
def test_what_the_system_refuses_was_not_done(code: int) -> None:
    error = failed(OSError(code, "no"), "/s/data")
    assert isinstance(error, RefusedError)
    assert isinstance(error, EnvironmentFailure)
    assert (error.errno, error.filename) == (code, "/s/data")
    assert str(error).startswith(f"[Errno {code}] no: ")
    assert len(str(error)) > 40, "there is advice"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_for_which_there_is_no_space_leaves_nothing_unknown(code: int) -> None:
    assert isinstance(failed(OSError(code, "no"), "f", "write"), RefusedError)
    assert not isinstance(failed(OSError(code, "no"), "f", "flush"), RefusedError)


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.EINTR, errno.ESTALE])
def test_other_failed_writes_and_all_failed_flushes_leave_it_unknown(code: int) -> None:
    for during in ("write", "flush"):
        error = failed(OSError(code, "no"), "f", during)  # type: ignore[arg-type]
        assert isinstance(error, SystemCallError)
        assert not isinstance(error, RefusedError)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY])
def test_what_is_an_answer_stays_what_it_is(code: int) -> None:
    error = OSError(code, "no")
    assert failed(error, "f") is error


@pytest.mark.parametrize("code", [errno.EISDIR, errno.ELOOP])
def test_something_else_in_the_place_of_a_file_is_a_failure_and_no_refusal(code: int) -> None:
    error = failed(OSError(code, "no"), "f")
    assert type(error) is SystemCallError
    assert "where a file should be" in str(error)


def test_a_failure_is_translated_once() -> None:
    error = failed(OSError(errno.EIO, "no"), "f")
    assert failed(error, "g") is error


def test_a_quota_that_is_used_up_is_a_full_disk() -> None:
    assert [is_full(OSError(code, "")) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_directory_that_may_not_be_opened_to_be_flushed_was_refused_and_is_no_failed_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    directory = system_files().open_directory(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(code, 0))
        with pytest.raises(RefusedError):
            directory.sync_parent()
    directory.close()


def refusing(code: int, after: int) -> Any:
    """`os.open`, refused from this call on."""
    real, calls = os.open, count()

    def refuse(*args: Any, **options: Any) -> int:
        if next(calls) >= after:
            raise OSError(code, "refused")
        return real(*args, **options)

    return refuse


@pytest.mark.parametrize("how", ["store", "follower"])
def test_a_backup_that_has_no_descriptor_left_is_refused_whichever_was_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with kvwal.open(tmp_path / "s", background=False) as db, kvwal.follow(tmp_path / "s") as live:
        db.put(b"a", b"1")
        for after in count():
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", refusing(errno.EMFILE, after))
                try:
                    (db if how == "store" else live).backup(tmp_path / f"to{after}")
                except RefusedError as error:
                    assert "ulimit -n" in str(error)
                else:
                    break
        assert after > 5
