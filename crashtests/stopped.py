"""Part 9: followers in processes of their own that are stopped and continued, anywhere, while pages are used again.

A writer commits and makes a checkpoint, over and over, with the smallest cache: what a follower is about to read is
written over within milliseconds. Followers are stopped (SIGSTOP) for about as long and continued; one of the two has
pins. Each value says its key and its commit, and what is there after a commit can be computed. So each pair that a
follower returns is checked: it is of the moment that was asked, or the follower says that the moment is gone
(`SnapshotTooOld`), which the one without pins does.

`python -m crashtests.stopped write|follow PATH SEED` are the two programs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import kvwal
from crashtests.console import Result
from crashtests.explorer import Tally
from crashtests.workers import Run, Share, spread

_ROOT = Path(__file__).resolve().parent.parent
_FOLLOWERS = 2
_KEYS = 120
# Stops in one life of a store.
_STOPS = 250
# The store's directory has this beside it when its processes are to end.
_OVER = "over"


def value_of(key: int, commit: int) -> bytes:
    """What a commit puts there: some values lie in pages of their own."""
    return b"%d:%d:" % (key, commit) * (1 + 11 * (key * commit % 97))


def change(commit: int, key: int) -> bytes | str | None:
    """What a commit does with a key: the value that it puts, None if it deletes it, "" if it leaves it alone."""
    if commit == 1 or (key - commit * 7) % _KEYS % 11 == 0:
        return value_of(key, commit)
    return None if commit % 3 == 0 and key == commit * 31 % _KEYS else ""


def expected(key: int, seqno: int) -> bytes | None:
    """The value after a commit, and all before it."""
    for commit in range(seqno, 0, -1):
        found = change(commit, key)
        if not isinstance(found, str):
            return found
    return None


def name(key: int) -> bytes:
    """The key in the store."""
    return b"key%03d" % key


def _is_over(path: str) -> bool:
    return os.path.exists(os.path.join(os.path.dirname(path), _OVER))


def write(path: str) -> None:
    """The writer's life: a commit, a checkpoint, and again."""
    with kvwal.open(path, durability="os", cache_bytes=256 << 10, keep_history_bytes=0) as db:
        while not _is_over(path):
            commit = db.last_seqno + 1
            batch = kvwal.WriteBatch()
            for key in range(_KEYS):
                found = change(commit, key)
                if isinstance(found, bytes):
                    batch.put(name(key), found)
                elif found is None:
                    batch.delete(name(key))
            if db.commit(batch) != commit:
                raise AssertionError(f"commit {commit} has another number")
            db.checkpoint()


class Reading:
    """A follower that checks all that it returns."""

    def __init__(self, live: kvwal.Follower, random: Random) -> None:
        self._live = live
        self._random = random
        self.pairs = self.gone = 0

    def once(self) -> None:
        """Read in one of several ways. Nothing is in memory before."""
        engine: Any = self._live.engine
        engine.state.cache.clear()
        engine._pages.pager.cache.resize(0)
        ways: tuple[Callable[[], None], ...] = (self._gets, self._many, self._scan, self._snapshot, self._count)
        try:
            self._random.choice(ways)()
        except kvwal.SnapshotTooOld:
            self.gone += 1
        self._live.refresh()

    def _check(self, pairs: dict[int, bytes | None], first: int, last: int) -> None:
        """All of it is there after one of these commits."""
        if not any(
            all(value == expected(key, seqno) for key, value in pairs.items()) for seqno in range(first, last + 1)
        ):
            told = {key: None if value is None else value[:20] for key, value in pairs.items()}
            raise AssertionError(f"between {first} and {last} there never was {told}")
        self.pairs += len(pairs)

    def _gets(self) -> None:
        for key in self._random.sample(range(_KEYS), 20):
            first = self._live.seqno
            value = self._live.get(name(key))
            self._check({key: value}, first, self._live.seqno)

    def _many(self) -> None:
        keys = self._random.sample(range(_KEYS), 10)
        first = self._live.seqno
        values = self._live.get_many(map(name, keys))
        self._check(dict(zip(keys, values, strict=True)), first, self._live.seqno)

    def _scan(self) -> None:
        # It is of the moment at which it began, which may be newer than the one before, and than that of its end.
        first = self._live.seqno
        pairs = self._live.scan()
        begun = next(pairs, None)
        last = self._live.seqno
        found = dict(pairs) if begun is None else dict([begun, *pairs])
        self._check({key: found.get(name(key)) for key in range(_KEYS)}, first, last)

    def _snapshot(self) -> None:
        with self._live.snapshot() as then:
            for _ in range(3):
                self._check({key: then.get(name(key)) for key in range(0, _KEYS, 9)}, then.seqno, then.seqno)
            found = dict(then)
            self._check({key: found.get(name(key)) for key in range(_KEYS)}, then.seqno, then.seqno)

    def _count(self) -> None:
        first = self._live.seqno
        count = len(self._live)
        moments = range(first, self._live.seqno + 1)
        if not any(sum(expected(key, n) is not None for key in range(_KEYS)) == count for n in moments):
            raise AssertionError(f"there never were {count} keys from {first} to {moments.stop - 1}")


def follow(path: str, seed: int) -> None:
    """A follower's life, with pins if the seed is odd.

    It prints that it has begun; at its end, what it returned and how often moments were gone.
    """
    with kvwal.follow(path, cache_bytes=256 << 10, pin=bool(seed % 2)) as live:
        reading = Reading(live, Random(seed))
        reading.once()
        print("begun", flush=True)
        while not _is_over(path):
            reading.once()
        print(reading.pairs, reading.gone, live.rebases, flush=True)


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "crashtests.stopped", *map(str, arguments)]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def one_life(directory: str, seed: int, stops: int = _STOPS, over: Callable[[], bool] = lambda: False) -> list[int]:
    """Stop and continue followers of one store; returns stops, pairs, moments that were gone, and rebases.

    AssertionError if one returned what never was, or ended otherwise than it should.
    """
    random = Random(seed)
    path = os.path.join(directory, "kv")
    kvwal.open(path).close()
    writer = _start("write", path)
    followers = [_start("follow", path, seed + n) for n in range(_FOLLOWERS)]
    done = 0
    try:
        for follower in followers:
            assert follower.stdout is not None
            follower.stdout.readline()
        while done < stops and not over() and all(each.poll() is None for each in (writer, *followers)):
            follower = random.choice(followers)
            follower.send_signal(signal.SIGSTOP)
            time.sleep(random.choice((0.001, 0.01, 0.03)) * random.random())
            follower.send_signal(signal.SIGCONT)
            done += 1
            time.sleep(0.004 * random.random())
        Path(directory, _OVER).touch()
        totals = [done, 0, 0, 0]
        for each in (*followers, writer):
            out, err = each.communicate(timeout=60)
            if each.returncode:
                raise AssertionError(f"a process ended with {each.returncode}: {err[-2000:]}")
            if each is not writer:
                totals[1:] = [total + int(word) for total, word in zip(totals[1:], out.split(), strict=True)]
        return totals
    finally:
        for each in (*followers, writer):
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()
            for pipe in (each.stdout, each.stderr):
                assert pipe is not None
                pipe.close()


def work(share: Share) -> Iterator[Tally]:
    number = 0
    while not share.over():
        seed = share.run.seed * 10_000 + number * share.count + share.index
        number += 1
        directory = tempfile.mkdtemp(prefix="kvwal-crashtests-")
        tally = Tally()
        try:
            stops, pairs, gone, rebases = one_life(directory, seed, over=share.run.over)
            tally.states, tally.faults = pairs, stops
            if stops == _STOPS and not (gone and rebases):
                tally.violations.append((f"moments gone: {gone}; passed: {rebases}", f"--seed {share.run.seed}"))
        except Exception as error:  # noqa: BLE001  # every exception is a violation
            tally.violations.append((f"{type(error).__name__}: {error}", f"--seed {share.run.seed}"))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        yield tally


def run(run: Run) -> Result:
    """Run the part: states are the pairs that followers returned, faults the stops."""
    return spread("stopped", work, run)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        follow(sys.argv[2], int(sys.argv[3]))
