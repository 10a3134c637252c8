"""Part 4: real processes on a real file system, killed at random and at named points, with several writer threads.

What a writer was told is kept outside of its process. After each death the store must hold: of every thread all that
was acknowledged to it and at most one more; its two keys equal; the shared counter as high as all commits together.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import kvwal
from crashtests.console import Result
from crashtests.dying import POINTS
from crashtests.explorer import Tally
from crashtests.history import Violation
from crashtests.sizes import some_sizes
from crashtests.workers import Run, Share, spread

_ROOT = Path(__file__).resolve().parent.parent
_THREADS = 4


class Witness:
    """Everything the writers of one store were told, over all their lives."""

    def __init__(self, threads: int = _THREADS) -> None:
        self.threads = threads
        self.begun = [0] * threads
        self.done = [0] * threads
        self.seqno = 0
        self.closed = False

    def hear(self, text: bytes) -> None:
        """One life's output. A last line that was cut off says nothing."""
        self.closed = False
        for line in text.split(b"\n")[:-1]:
            words = line.split()
            if words[0] == b"begin":
                self.begun[int(words[1])] = int(words[2])
            elif words[0] == b"done":
                self.done[int(words[1])] = int(words[2])
            elif words[0] == b"closed":
                self.closed = True

    def judge(self, store: Any) -> None:
        """Compare with what is there; raises Violation. Then the truth is what is there."""
        total = 0
        for thread in range(self.threads):
            a, b = (int(store.get(b"t%d/%s" % (thread, name), b"0")) for name in (b"a", b"b"))
            if a != b:
                raise Violation(f"a transaction is there in part: {a} and {b}")
            if not self.done[thread] <= a <= self.begun[thread]:
                raise Violation(f"thread {thread} has {a}, was told {self.done[thread]} and began {self.begun[thread]}")
            if a and store.get(b"t%d/v%02d" % (thread, a % 50), b"").lstrip(b"0")[: len(b"%d" % a)] != b"%d" % a:
                raise Violation(f"thread {thread}: the last transaction {a} is there in part")
            self.begun[thread] = self.done[thread] = a
            total += a
        count = int(store.get(b"count", b"0"))
        if count != total:
            raise Violation(f"the counter is {count}, and {total} transactions are there")
        report = store.verify()
        if not report.ok:
            raise Violation(f"verify: {report.problems[:3]}")


def start(
    path: str,
    witness: Witness,
    seed: int,
    *,
    point: str = "",
    nth: int = 1,
    commits: int = 200,
    quiet: bool = False,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """A writer, running."""
    about = {
        "path": path,
        "threads": witness.threads,
        "commits": commits,
        "seed": seed,
        "first": [done + 1 for done in witness.done],
        "point": point,
        "nth": nth,
        "options": {"segment_bytes": 32 << 10, "memtable_bytes": 64 << 10, "cache_bytes": 1 << 20} | options,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "crashtests.dying", json.dumps(about)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
    )


def one_death(path: str, witness: Witness, seed: int) -> None:
    """One life that ends, and what is found then."""
    random = Random(seed)
    point = random.choice(["", *POINTS])
    writer = start(
        path,
        witness,
        seed,
        point=point,
        nth=random.randrange(1, 40 if point in ("mid-commit", "mid-write", "mid-recovery") else 12),
        background=random.random() < 0.7,
        **(some_sizes(random) if random.random() < 0.5 else {}),
    )
    if not point:
        time.sleep(random.uniform(0.1, 0.6))
        writer.send_signal(signal.SIGKILL)
    try:
        output = writer.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        writer.kill()
        raise Violation("a writer hangs") from None
    if writer.returncode not in (0, -signal.SIGKILL):
        raise Violation(f"a writer ended with {writer.returncode}")
    witness.hear(output)
    judge_found(path, witness, close=random.random() < 0.5)


def judge_found(path: str, witness: Witness, *, close: bool = True) -> None:
    """Open what is found, and judge it."""
    if not os.path.isdir(path):
        if any(witness.done):
            raise Violation("the store is gone")
        return
    store = kvwal.open(path, background=False)
    try:
        witness.judge(store)
    finally:
        if close:
            store.close()
        else:
            # As a process that dies while it reads.
            store.engine._log.abandon()
            store.engine._directory.close()
            store.engine.is_closed = True


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    number = 0
    while not share.over():
        directory = tempfile.mkdtemp(prefix="kvwal-crashtests-")
        path = os.path.join(directory, "kv")
        witness = Witness()
        try:
            for _ in range(12):
                seed = run.seed * 10_000 + number * share.count + share.index
                number += 1
                tally = Tally(states=1, faults=1)
                try:
                    one_death(path, witness, seed)
                except Exception as error:  # noqa: BLE001  # every exception is a violation
                    kept = tempfile.mkdtemp(prefix="kvwal-violation-")
                    shutil.copytree(directory, kept, dirs_exist_ok=True)
                    tally.violations.append(
                        (f"{type(error).__name__}: {error} (the store is kept in {kept})", f"--seed {run.seed}")
                    )
                yield tally
                if tally.violations or share.over():
                    break
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def run(run: Run) -> Result:
    """Run the part."""
    return spread("processes", work, run)
