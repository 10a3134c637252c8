"""`python -m bench.followers`: how soon a follower in another process shows a commit, and what followers cost."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Final

import kvwal
from bench.data import key, values
from bench.parts import Line, Part, Setting, Size, Wrong, in_turns, ratios, run_parts, spread
from bench.results import Figure

__all__ = ["main"]

_RATE: Final = 1000
_SETTLE_S: Final = 0.3
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
    """The writer's processor time for a put, with followers of another process that move every 50 ms."""
    pool, path, n = values(100), setting.directory / "s", 0

    def cost(followers: int) -> float:
        nonlocal n
        with kvwal.open(path, durability="os") as db, _child(_MANY, path, followers) as child:
            began_s = process_time()
            for _ in range(setting.sizes.puts):
                n += 1
                db.put(key(n % 10_000), pool[n % len(pool)])
            took_s: float = process_time() - began_s
            assert child.stdin is not None
            child.stdin.close()
        return took_s / setting.sizes.puts * 1e6

    found = in_turns({str(followers): partial(cost, followers) for followers in (0, 8, 64)}, setting)
    lines = [Line('a put at "os" without followers, processor time, us', _text(Figure(tuple(found["0"]))))]
    for followers in ("8", "64"):
        ratio = ratios(found[followers], found["0"])
        lines.append(Line(f"with {followers} followers, to none", spread(ratio), "at most 1.03x", ratio.median <= 1.03))
    return lines


_PARTS: Final = {
    "stale": Part("how soon a durable commit is shown in another process", _stale),
    "puts": Part("what followers cost a put", _puts),
}
_SIZES: Final = {
    "commits": Size(5_000, 1_000, "commits, 1,000 a second"),
    "puts": Size(300_000, 50_000, "puts in each round"),
}

if __name__ == "__main__":
    sys.exit(main())
