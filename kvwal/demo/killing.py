"""A child process that writes, and is killed at a random moment; its acknowledgements outlive it.

The child says on its standard output, a pipe that this process reads: `start` (before it opens the store), `open`
(recovery is over), `ack ...` (a commit returned) and `done`. What the child wrote into the pipe before it was
killed can still be read, so an acknowledgement that this process does not hear was not given.
"""

from __future__ import annotations

import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Literal

__all__ = ["ChildFailed", "Death", "Plan", "live", "plan"]

# A child that is silent for longer than this hangs.
_SILENCE_LIMIT_S = 60.0
# The share of kills that are aimed at recovery and the first commits after it.
_SHARE_WHILE_OPENING = 0.3
_OPENING_DELAY_S = 0.05
_WRITING_DELAY_S = 0.03


class ChildFailed(Exception):
    """The writing process ended by itself with an error, or hangs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """When to kill: after this number of acknowledgements (0: from the start on), and a delay."""

    acknowledgements: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended."""

    moment: Literal["opening", "writing", "finished"]
    acknowledgements: int
    seconds: float


def plan(rng: random.Random, gap: float) -> Plan:
    """A random moment: while the store is being opened, or after `gap` acknowledgements on average."""
    if rng.random() < _SHARE_WHILE_OPENING:
        return Plan(0, rng.uniform(0, _OPENING_DELAY_S))
    return Plan(max(1, round(rng.uniform(0, 2 * gap))), rng.uniform(0, _WRITING_DELAY_S))


def live(arguments: Sequence[str], until: Plan | None, heard: Callable[[list[str]], None]) -> Death:
    """Start a child and kill it as planned (None: let it finish). `heard` gets every acknowledgement's words.

    Raises:
        ChildFailed: the child ended with an error, or said nothing for a minute.
    """
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "kvwal.demo.child", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    try:
        assert child.stdout is not None
        reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
        reader.start()
        opened, count = _follow(lines, until, heard)
    finally:
        child.kill()
        code = child.wait()
    # What was in the pipe when the child died.
    while (line := lines.get(timeout=_SILENCE_LIMIT_S)) is not None:
        opened, count = _take(line, heard, opened, count)
    reader.join()
    child.stdout.close()
    if code == 0:
        moment: Literal["opening", "writing", "finished"] = "finished"
    elif code < 0 or sys.platform == "win32":
        moment = "writing" if opened else "opening"
    else:
        raise ChildFailed(f"the writing process ended with exit code {code}")
    return Death(moment, count, time.monotonic() - began)


def _read(stream: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        # A line without its end was being written when the child died: nothing was acknowledged by it.
        if line.endswith(b"\n"):
            lines.put(line.decode())
    lines.put(None)


def _follow(
    lines: queue.SimpleQueue[str | None], until: Plan | None, heard: Callable[[list[str]], None]
) -> tuple[bool, int]:
    """Listen until it is time to kill, or the child has closed its pipe."""
    opened, count = False, 0
    kill_at: float | None = None
    while True:
        timeout = _SILENCE_LIMIT_S if kill_at is None else max(0.0, kill_at - time.monotonic())
        try:
            line = lines.get(timeout=timeout)
        except queue.Empty:
            if kill_at is None:
                raise ChildFailed(f"the writing process said nothing for {_SILENCE_LIMIT_S:.0f} s") from None
            return opened, count
        if line is None:
            # For the reader of the rest.
            lines.put(None)
            time.sleep(0.05)
            return opened, count
        opened, count = _take(line, heard, opened, count)
        if until is not None and kill_at is None and count >= until.acknowledgements:
            kill_at = time.monotonic() + until.delay_s


def _take(line: str, heard: Callable[[list[str]], None], opened: bool, count: int) -> tuple[bool, int]:
    word, *rest = line.split()
    if word == "ack":
        heard(rest)
        count += 1
    return opened or word == "open", count
