"""`python -m bench.feeds`: many subscribers of one store, and whether each is told of each commit once, in order.

Threads write; subscribers follow; one of them rests for a while, so that it has to catch up from the log. The exit code
is 1 if one of them missed a commit, or was told of one twice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter, sleep

import kvwal
from bench.data import key


def main(arguments: list[str] | None = None) -> int:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.feeds", description=__doc__)
    parser.add_argument("--commits", type=int, default=1_000_000)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--subscribers", type=int, default=10)
    parser.add_argument("--rest", type=int, default=100_000, help="commits for which one subscriber rests")
    parser.add_argument("--dir", default=None, help="where the store is made")
    options = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        return _run(directory / "store", options)
    finally:
        shutil.rmtree(directory)


def _run(path: Path, options: argparse.Namespace) -> int:
    commits, rest = options.commits, options.rest
    told = [0] * options.subscribers
    wrong: list[str] = []
    # A subscriber that is behind holds the log, whatever the window is.
    with kvwal.open(path, durability="interval", sync_delay_s=0.01) as db:

        def subscribe(number: int) -> None:
            with db.changes(0, follow=True, timeout_s=60) as changes:
                for expected, change in enumerate(changes, 1):
                    if change.seqno != expected:
                        wrong.append(f"subscriber {number} was told of {change.seqno} and not of {expected}")
                        return
                    told[number] = expected
                    if not number and expected == commits // 4:
                        while db.last_seqno < min(expected + rest, commits):
                            sleep(0.01)
                    if expected == commits:
                        return
            wrong.append(f"subscriber {number} waited in vain behind {told[number]}")

        def write(number: int) -> None:
            for each in range(number, commits, options.writers):
                db.put(key(each % 100_000), bytes(100))
                if not each % 64:
                    # As fast as the slowest of those that do not rest, or they would measure a disk.
                    while db.last_seqno - min(told[1:] or [each]) > 50_000 and not wrong:
                        sleep(0.001)

        began_s = perf_counter()
        threads = [threading.Thread(target=subscribe, args=(number,)) for number in range(options.subscribers)]
        threads += [threading.Thread(target=write, args=(number,)) for number in range(options.writers)]
        for thread in threads:
            thread.start()
        largest = first = 0
        while any(thread.is_alive() for thread in threads):
            sleep(0.2)
            used = _memory_mib()
            largest = max(largest, used)
            if not first and db.last_seqno > commits // 10:
                first = used
        seconds = perf_counter() - began_s
    for line in wrong:
        print(line)
    print(f"{commits:,} commits, {options.writers} writers, {options.subscribers} subscribers: {seconds:,.1f} s")
    print(f"memory: {first} MiB after a tenth, {largest} MiB at most")
    return 1 if wrong else 0


def _memory_mib() -> int:
    """Of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
