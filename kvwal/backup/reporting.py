"""What a restore did, or would do; and how long it is expected to take.

That is the sum of three parts:

- the requests: each takes what one for a few bytes took, of some objects of the plan;
- the bytes: at the rate at which the same objects were read, up to a mebibyte of each;
- the work, by what docs/benchmarks.md says of the machine there: bytes at the rate of a full backup, which reads,
  proves and writes pages as a restore does, and 5.1 us a commit, as of a restore that needs more than its memory.

So it follows the destination, whose speed differs most, and not the machine that restores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvwal.backup.choosing import Chosen
from kvwal.backup.names import UnitName
from kvwal.backup.port import Destination
from kvwal.keys import Seqno
from kvwal.positions import Position

__all__ = ["RestoreReport", "expected_s", "report_of"]

# A base is read in requests of this size.
_REQUEST_BYTES: Final = 1 << 20
# The first, the middle and the last one of a plan.
_SAMPLES: Final = 3
_SMALL_BYTES: Final = 256
_SAMPLE_BYTES: Final = 1 << 20
_WORK_BYTES_S: Final = 193e6
_COMMIT_S: Final = 5.1e-6


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did, or would do.

    Attributes:
        restored: the moment: a commit, on the line that it was backed up from.
        position: the newest commit of the new store, on its own line: the one that says whence the line came. None if
            nothing was done.
        objects: what was read, or would be, in order. bytes: of these. requests: reads of the destination that take.
            Those that only consumers of that moment need are not among them in a dry run: it does not read the pages,
            which tell their positions.
        commits: how many came from units, and were replayed.
        damaged: objects that are damaged and were done without, since older ones give the same moment.
        resumed: whether an interrupted restore went on.
        seconds: how long it took.
        bases, units: how many of the objects are which.
        expected_s: of a dry run, how many seconds the restore is expected to take; None if it was done. The time of
            requests and bytes is measured on a few of the objects, that of the work is of the machine in
            docs/benchmarks.md: it is an estimate.
        earlier_units, earlier_bytes: of a dry run, how many more units are there that lead to the base, and their
            bytes. At most about so much is read as well, where a consumer of that moment is behind the base.
    """

    restored: Position
    position: Position | None
    objects: tuple[str, ...]
    bytes: int
    requests: int
    commits: int
    damaged: tuple[str, ...]
    resumed: bool
    seconds: float
    bases: int
    units: int
    expected_s: float | None
    earlier_units: int = 0
    earlier_bytes: int = 0


def report_of(
    destination: Destination,
    chosen: Chosen,
    units: tuple[UnitName, ...],
    after: Seqno,
    position: Position | None,
    *,
    damaged: tuple[str, ...],
    resumed: bool,
    began_s: float,
    monotonic_s: Callable[[], float],
) -> RestoreReport:
    """What was done with `units` behind `after`, as `position` says; if that is None, what would be."""
    plan = chosen.plan
    sizes = {str(name): chosen.held.sizes[str(name)] for name in (*plan.bases, *units)}
    requests = sum(2 + sizes[str(name)] // _REQUEST_BYTES for name in plan.bases) + len(units)
    commits = plan.at - after if units else 0
    expected: float | None = None
    earlier: tuple[UnitName, ...] = ()
    if position is None:
        earlier = chosen.held.units_before(plan)
        objects = list(sizes.items())
        expected = expected_s(destination, objects, requests=requests, commits=commits, monotonic_s=monotonic_s)
    return RestoreReport(
        Position(chosen.line, plan.at),
        position,
        tuple(sizes),
        sum(sizes.values()),
        requests,
        commits,
        damaged,
        resumed,
        monotonic_s() - began_s,
        len(plan.bases),
        len(units),
        expected,
        len(earlier),
        sum(chosen.held.sizes[str(name)] for name in earlier),
    )


def expected_s(
    destination: Destination,
    objects: Sequence[tuple[str, int]],
    *,
    requests: int,
    commits: int,
    monotonic_s: Callable[[], float],
) -> float:
    """How many seconds it takes to restore from these objects; their sizes are in bytes. Reads at most 3 MiB of them.

    Raises what the destination raises.
    """
    size = sum(each for _, each in objects)
    request_s, byte_s = _measured(destination, _spread(objects), monotonic_s)
    return requests * request_s + size * byte_s + size / _WORK_BYTES_S + commits * _COMMIT_S


def _spread(objects: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    last = len(objects) - 1
    return [objects[i] for i in sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)})] if objects else []


def _measured(
    destination: Destination, objects: Sequence[tuple[str, int]], monotonic_s: Callable[[], float]
) -> tuple[float, float]:
    """Seconds that a request takes, and a byte beside that."""
    small_s = rest_s = 0.0
    rest = 0
    for name, size in objects:
        began_s = monotonic_s()
        destination.get(name, size=min(size, _SMALL_BYTES))
        read_s = monotonic_s()
        small_s += read_s - began_s
        if size > _SMALL_BYTES:
            rest += min(size, _SAMPLE_BYTES) - _SMALL_BYTES
            destination.get(name, size=min(size, _SAMPLE_BYTES))
            rest_s += monotonic_s() - read_s - (read_s - began_s)
    # What was read a second time may come faster than the first time.
    return small_s / max(1, len(objects)), max(0.0, rest_s) / max(1, rest)
