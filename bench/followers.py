"""`python -m bench.followers`: how soon a follower in another process shows a commit, and what followers cost."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from time import monotonic, perf_counter, process_time, sleep
from typing import Any, Final

import kvwal
from bench.backups import filled
from bench.data import key, values
from bench.parts import Line, Part, Setting, Size, Wrong, fresh, in_turns, ratios, run_parts, spread
from bench.results import Figure

__all__ = ["main"]

_RATE: Final = 1000
_SETTLE_S: Final = 0.3
# Cold gets, each of a leaf of its own.
_COLD: Final = 2000
# Between two commits of a writer that writes now and then.
_WRITES_S: Final = 0.05
# PATH PIN COMMITS: prints the ages at which it saw the commits, sorted, in seconds.
_FOLLOWS: Final = """
import sys, time, kvwal
path, pin, commits = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
with kvwal.follow(path, pin=pin) as live:
    assert live.pinned == pin
    changes = live.changes(after=live.seqno, follow=True, timeout_s=10)
    print("ready", flush=True)
    ages = []
    for change in changes:
        ages.append(time.monotonic() - float(change.value))
        if len(ages) == commits:
            break
print(*sorted(ages), flush=True)
"""
# PATH FOLLOWERS: so many, each of which moves every 50 ms, until its input ends.
_MANY: Final = """
import contextlib, sys, threading, time, kvwal
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
with contextlib.ExitStack() as stack:
    live = [stack.enter_context(kvwal.follow(sys.argv[1])) for _ in range(int(sys.argv[2]))]
    print("ready", flush=True)
    while not over.wait(0.05):
        for each in live:
            each.refresh()
"""
# Computes all the time, as long as its input is open: what another busy process costs on this machine.
_BUSY: Final = """
import sys, threading
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
print("ready", flush=True)
found, n = {}, 0
while not over.is_set():
    for n in range(n, n + 1000):
        found[n * 7919 % 1_000_003] = bytes(100)
"""
# PATH KEYS SECONDS SQLITE: gets of keys that are in memory, by a follower that moves every 1,000 of them or by SQLite,
# once its input has a line; prints how many.
_GETS: Final = """
import random, sqlite3, sys, time, kvwal
from bench.data import key
path, keys, seconds, lite = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "True"
wanted = [key(i) for i in random.Random(1).sample(range(keys), 1000)]
if lite:
    get_one = sqlite3.connect(path).execute
    def get(each): return get_one("SELECT v FROM t WHERE k = ?", (each,)).fetchone()[0]
    def move(): pass
else:
    live = kvwal.follow(path)
    get, move = live.get, live.refresh
for each in wanted:
    assert get(each) is not None
print("ready", flush=True)
sys.stdin.readline()
n, until_s = 0, time.monotonic() + seconds
while time.monotonic() < until_s:
    for each in wanted:
        get(each)
    move()
    n += len(wanted)
print(n, flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the figures. Exit status: 1 if a follower missed a commit."""
    return run_parts("python -m bench.followers", __doc__, _PARTS, _SIZES, arguments)


def _child(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise Wrong("the follower did not begin")
    sleep(_SETTLE_S)
    return child


def _ages(path: Path, commits: int, pin: bool) -> list[float]:
    """How old each commit was when a follower had it, in ms, sorted; durable commits, 1,000 a second."""
    with kvwal.open(path) as db, _child(_FOLLOWS, path, pin, commits) as child:
        due_s = monotonic()
        for n in range(commits):
            due_s += 1 / _RATE
            sleep(max(0.0, due_s - monotonic()))
            # The last one too is shown by the next record, or by what an idle writer says.
            db.put(key(n % 100), b"%.6f" % monotonic())
        assert child.stdout is not None
        found = [float(each) * 1000 for each in child.stdout.readline().split()]
    if len(found) != commits:
        raise Wrong(f"of {commits} commits {len(found)} came")
    return found


def _text(figure: Figure) -> str:
    return f"{figure.median:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def _stale(setting: Setting) -> list[Line]:
    """A follower with a pin, and one without."""
    path, commits = setting.directory / "s", setting.sizes.commits
    found = in_turns({pin: partial(_ages, path, commits, pin == "pin") for pin in ("pin", "none")}, setting)

    def percentile(pin: str, share: float) -> Figure:
        each = sorted(ages[int(len(ages) * share)] for ages in found[pin])
        return Figure(tuple(each))

    lines = []
    for pin, name, most in (("pin", "with a pin", 5), ("none", "without", 60)):
        p50, p99 = percentile(pin, 0.5), percentile(pin, 0.99)
        lines.append(Line(f"age of a commit that is shown, {name}: median, ms", _text(p50)))
        lines.append(Line(f"{name}: p99, ms", _text(p99), f"at most {most} ms", p99.median <= most))
    return lines


def _puts(setting: Setting) -> list[Line]:
    """A put with followers of another process that move every 50 ms: its processor time, and how long a durable one
    takes; that also beside a process that only computes.
    """
    pool, path, n = values(100), setting.directory / "s", 0

    def cost(followers: int, durability: Any, count: int, code: str = _MANY) -> float:
        nonlocal n
        clock = perf_counter if durability == "commit" else process_time
        with kvwal.open(path, durability=durability) as db, _child(code, path, followers) as child:
            began_s = clock()
            for _ in range(count):
                n += 1
                db.put(key(n % 10_000), pool[n % len(pool)])
            took_s: float = clock() - began_s
            assert child.stdin is not None
            child.stdin.close()
        return took_s / count * 1e6

    lines = []
    sizes = setting.sizes
    for what, durability, count in (
        ('a put at "os", processor time', "os", sizes.puts),
        ("a durable put", "commit", sizes.durable),
    ):
        costs = {str(each): partial(cost, each, durability, count) for each in (0, 8, 64)}
        if durability == "commit":
            costs["busy"] = partial(cost, 0, durability, count, _BUSY)
        found = in_turns(costs, setting)
        lines.append(Line(f"{what}, without followers, us", _text(Figure(tuple(found["0"])))))
        for followers in ("8", "64"):
            ratio = ratios(found[followers], found["0"])
            lines.append(
                Line(f"{what}, with {followers}, to none", spread(ratio), "at most 1.03x", ratio.median <= 1.03)
            )
        if "busy" in found:
            lines.append(Line(f"{what}, beside a process that computes", spread(ratios(found["busy"], found["0"]))))
    return lines


def _reads_of(path: Path, keys: int, follows: bool) -> dict[str, float]:
    """What reads cost in a process of their own, in us."""
    store: Any = kvwal.follow(path) if follows else kvwal.open(path)
    with store:
        chosen = Random(1).sample(range(0, keys, keys // _COLD), _COLD)
        for i in chosen[: _COLD // 10]:
            # The inner pages. No leaf is read twice.
            store.get(key(i))
        cold = [key(i) for i in chosen[_COLD // 10 :]]
        began_s = perf_counter()
        for each in cold:
            store.get(each)
        took = {"cold get": (perf_counter() - began_s) / len(cold)}
        hot = cold[:1000]
        for each in hot:
            store.get(each)
        began_s = perf_counter()
        for _ in range(100):
            for each in hot:
                store.get(each)
        took["hot get"] = (perf_counter() - began_s) / (100 * len(hot))
        began_s = perf_counter()
        if sum(1 for _ in store.scan()) != keys:
            raise Wrong("the scan misses keys")
        took["scan, a key"] = (perf_counter() - began_s) / keys
    return {name: each * 1e6 for name, each in took.items()}


def _reads(setting: Setting) -> list[Line]:
    """The same reads by a follower beside an idle writer, and by a writer."""
    path, keys = setting.directory / "s", setting.sizes.keys
    filled(path, keys).close()

    def followed() -> dict[str, float]:
        with kvwal.open(path):
            return fresh(_reads_of, path, keys, True)

    found = in_turns({"follower": followed, "writer": partial(fresh, _reads_of, path, keys, False)}, setting)
    lines = []
    for name in found["writer"][0]:
        own = [each[name] for each in found["writer"]]
        ratio = ratios([each[name] for each in found["follower"]], own)
        lines.append(Line(f"{name} of the writer, us", _text(Figure(tuple(own)))))
        lines.append(Line(f"{name}: follower / writer", spread(ratio), "at most 1.2x", ratio.median <= 1.2))
    return lines


def _readers(setting: Setting) -> list[Line]:
    """Gets of one and of two processes, while this one commits every 50 ms; the same of SQLite."""
    path, keys, seconds = setting.directory / "s", setting.sizes.keys, setting.sizes.seconds
    filled(path, keys).close()
    lite, pool = setting.directory / "lite", values(100)
    db = kvwal.open(path)
    other = sqlite3.connect(lite, isolation_level=None)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("CREATE TABLE t (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID")
    other.execute("BEGIN")
    other.executemany("INSERT INTO t VALUES (?, ?)", ((key(i), pool[i % len(pool)]) for i in range(keys)))
    other.execute("COMMIT")

    def gets(processes: int, is_lite: bool) -> float:
        with ExitStack() as stack:
            arguments = lite if is_lite else path, keys, seconds, is_lite
            children = [stack.enter_context(_child(_GETS, *arguments)) for _ in range(processes)]
            for child in children:
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
            for n in range(int(seconds / _WRITES_S)):
                sleep(_WRITES_S)
                if is_lite:
                    other.execute("UPDATE t SET v = ? WHERE k = ?", (pool[n % len(pool)], key(n)))
                else:
                    db.put(key(n), pool[n % len(pool)])
            return sum(int(child.communicate()[0]) for child in children) / seconds

    measures = {f"{n} {name}": partial(gets, n, name == "SQLite") for n in (1, 2) for name in ("kvwal", "SQLite")}
    found = in_turns(measures, setting)
    db.close()
    other.close()
    both, ahead = ratios(found["2 kvwal"], found["1 kvwal"]), ratios(found["2 kvwal"], found["2 SQLite"])
    return [
        Line("gets a second of one reading process", f"{Figure(tuple(found['1 kvwal'])).median:,.0f}"),
        Line("of two together, to one", spread(both), "at least 1.7x", both.median >= 1.7),
        Line("of two together, to two of SQLite", spread(ahead), "above 1x", ahead.median > 1),
    ]


_PARTS: Final = {
    "stale": Part("how soon a durable commit is shown in another process", _stale),
    "puts": Part("what followers cost a put", _puts),
    "reads": Part("what reads of a follower cost, beside those of its writer", _reads),
    "readers": Part("gets of two processes together, beside one, and SQLite's", _readers),
}
_SIZES: Final = {
    "commits": Size(5_000, 1_000, "commits, 1,000 a second"),
    "puts": Size(300_000, 50_000, "puts in each round"),
    "durable": Size(3_000, 300, "durable puts in each round"),
    "keys": Size(200_000, 20_000, "keys that are read, with values of 100 bytes"),
    "seconds": Size(5, 1, "seconds of gets in each round"),
}

if __name__ == "__main__":
    sys.exit(main())
