"""What is still referred to when the interpreter ends: no finalizer of it says anything."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import kvwal
from kvwal.finalizing import quiet_at_exit

KEPT = {
    "a destination": "from kvwal.backup.port import DirectoryDestination\n"
    "kept = DirectoryDestination('backups')\nlist(kept.list_after(''))",
    "a closed archive": "store = kvwal.open('store')\nkept = kvwal.archive(store, 'backups')\n"
    "assert kept.flush(10)\nkept.close()\nstore.close()",
    "an archive": "store = kvwal.open('store')\nkept = [kvwal.archive(store, 'backups'), store]\n"
    "assert kept[0].flush(10)",
    "a directory": "from kvwal.files import system_files\nkept = system_files().open_directory('store')",
    "a locked directory": "from kvwal.files import system_files\n"
    "kept = system_files().open_directory('store')\nkept.lock(shared=False)",
    "a control page": "from kvwal.files import system_files\nfrom kvwal.readers.now import _Open\n"
    "kept = _Open(system_files().open_directory('store').open('data'))",
    "a follower that was opened at exit": "import atexit\natexit._run_exitfuncs()\n"
    "kept = [kvwal.follow('store'), kvwal.open('store', 'r')]",
    "a follower, its snapshot and its feed": "live = kvwal.follow('store')\n"
    "kept = [live, live.snapshot(), live.changes(), iter(live.scan())]\nnext(kept[2])\nnext(kept[3])",
    "a store, what reads it, and a consumer": "store = kvwal.open('store')\n"
    "kept = [store, store.snapshot(), iter(store.scan()), store.consumer('c'), store.changes()]\nnext(kept[2])",
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_until_the_interpreter_ends_says_nothing_then(tmp_path: Path, what: str) -> None:
    """A hook that another module keeps goes late: after the names of the modules of kvwal."""
    with kvwal.open(tmp_path / "store") as db:
        db[b"key"] = b"value"
        db.backup(tmp_path / "backups")
    program = f"import kvwal\n{KEPT[what]}\nimport json\njson.hook = lambda: kept"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_before_the_end_a_finalizer_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @quiet_at_exit
        def __del__(self) -> None:
            raise ValueError("it failed")

    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    failing: list[Failing] = [Failing()]
    failing.clear()
    gc.collect()
    assert [str(each) for each in told] == ["it failed"]
