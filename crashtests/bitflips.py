"""Part 3, at rest: every byte flipped, every page and record replaced by an older one, every file cut or missing.

The store is a small one with a tree of two levels, overflow values, a free list, two generations, three segments of
the log and an index. It is damaged in two conditions: closed cleanly, and left by a power cut.

For each damage the store must show exactly what was committed, or raise a `CorruptionError` that names the file (or a
`FormatError`, where the damage makes it look like another's): point 5 of the contract. It may never show anything
else, and never fail in another way. Left by a power cut, the commits whose own records are damaged may be missing, if
no whole record follows in the newest segment of the log: nothing younger could tell (point 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any

from crashtests.console import Result
from crashtests.explorer import Tally
from crashtests.faults import examine_damaged
from crashtests.history import History
from crashtests.looked import PATH
from crashtests.session import Program, Session
from crashtests.workers import Run, Share, beginning, spread
from kvwal.files.names import RESERVE
from kvwal.testing import SimulatedDisk

_BLOCK = 4096

PROGRAM: Program = [
    ["batch", [[n, 120] for n in range(60)]],
    ["put", 70, 5000],
    ["checkpoint"],
    ["range", 10, 20],
    ["put", 71, 3000],
    *[["put", n, 90 + n] for n in range(0, 40, 4)],
    ["checkpoint"],
    *[["put", n, 1500] for n in range(12)],
    ["del", 30],
    ["checkpoint"],
    *[["put", n, 1500] for n in range(20, 45)],
    ["put", 1, 33],
    ["batch", [[2, 20], [3, None], [90, 700]]],
    ["put", 5, 450],
]


@dataclass(frozen=True, slots=True)
class Built:
    """A store at rest, and what older versions there are of its blocks."""

    disk: SimulatedDisk
    history: History
    #: Was it closed cleanly?
    closed: bool
    #: (file, offset, earlier content of that block, commits there were when it was so).
    older: tuple[tuple[str, int, bytes, int], ...]
    #: (commit, start, end) of the records in the newest segment.
    records: tuple[tuple[int, int, int], ...]

    def least(self, start: int, stop: int) -> int:
        """The first commit that may be the last found when these bytes of the newest segment are damaged.

        A record that is whole behind the damage, or the mark of a clean close, says that all before it were on disk. If
        there is none, the ones that are damaged may count as never acknowledged.
        """
        if any(first >= stop for _, first, _ in self.records):
            return self.history.begun
        return min([self.history.begun, *(commit - 1 for commit, _, end in self.records if end > start)])

    def files(self) -> list[str]:
        return sorted(name for name in self.disk.open_directory(PATH).names() if name != "lock")


def build(*, closed: bool) -> Built:
    """Run the program and note every version of every block on the way."""
    disk = SimulatedDisk(seed=7)
    session = Session(disk)
    session.open()
    versions: dict[tuple[str, int], dict[bytes, int]] = {}

    def note() -> None:
        for name in disk.open_directory(PATH).names():
            content = disk.read(f"{PATH}/{name}")
            for offset in range(0, len(content), _BLOCK):
                versions.setdefault((name, offset), {}).setdefault(
                    content[offset : offset + _BLOCK], session.history.begun
                )

    records: list[tuple[int, str, int, int]] = []
    for step in PROGRAM:
        disk.trace = []
        session.step(step)
        records += [
            (session.history.begun, operation.path, operation.offset, operation.offset + operation.size)
            for operation in disk.trace
            if operation.name == "pwrite" and operation.offset >= _BLOCK and "/data" not in operation.path
        ]
        note()
    # A segment may have been renamed meanwhile: its records are the last ones at rising offsets.
    newest = [record for record in records if record[1] == records[-1][1]]
    if closed:
        disk.trace = []
        session.store.close()
        session.abandon()
        # The mark of a clean close says the same of the last commit.
        newest += [
            (session.history.begun + 1, operation.path, operation.offset, operation.offset + operation.size)
            for operation in disk.trace
            if operation.name == "pwrite" and operation.path == newest[-1][1] and operation.offset >= newest[-1][3]
        ]
    # At rest: the system has written what was not flushed, such as the mark of a clean close.
    found = disk.crash(-1)
    older = tuple(
        (name, offset, content, begun)
        for (name, offset), contents in versions.items()
        if found.kind(f"{PATH}/{name}") and name not in ("lock", "reserve")
        for content, begun in contents.items()
        if offset < len(now := found.read(f"{PATH}/{name}")) and content != now[offset : offset + _BLOCK]
    )
    return Built(found, session.history, closed, older, tuple((c, a, b) for c, _, a, b in newest))


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing done to the disk."""

    closed: bool
    text: str
    #: The first commit that may be the last one found.
    least: int
    act: Callable[[SimulatedDisk], None]


def damages(built: Built, random: Random) -> Iterator[Damage]:
    """All of them, flips last: they are many."""
    disk = built.disk
    newest = max((name for name in built.files() if name.endswith(".log")), default="")

    def damage(
        text: str, name: str, start: int, stop: int, act: Callable[[SimulatedDisk], None], least: int | None = None
    ) -> Damage:
        # A closed segment that is not there, or not whole, is missed: its name and its size are known.
        missed = built.closed and text.partition(":")[0] in ("remove", "cut")
        allowed = built.history.begun if name != newest or missed else built.least(start, stop)
        if least is not None and name == newest:
            allowed = min(allowed, least)
        return Damage(built.closed, text, allowed, act)

    for name in built.files():
        path = f"{PATH}/{name}"
        size = len(disk.read(path))
        yield damage(f"remove:{name}", name, 0, size, lambda d, p=path: d.remove(p))
        if name == RESERVE:
            # What is in it is never read.
            continue
        for at in sorted({0, 1, size // 2, size - 1, *range(0, size, _BLOCK), *range(512, size, 1536)}):
            if at < size:
                yield damage(f"cut:{name}:{at}", name, at, size, lambda d, p=path, a=at: d.cut(p, a))
        yield damage(f"append:{name}", name, size, size + 1, lambda d, p=path, s=size: d.damage(p, s, b"\x5a" * 700))
        for at in range(0, size, 512):
            yield damage(
                f"zero:{name}:{at}",
                name,
                at,
                at + 512,
                lambda d, p=path, a=at, s=size: d.damage(p, a, bytes(min(512, s - a))),
            )
        blocks = range(0, size - size % _BLOCK, _BLOCK)
        for at in blocks:
            other = random.choice(blocks)
            content = disk.read(path)[other : other + _BLOCK]
            if content != disk.read(path)[at : at + _BLOCK]:
                yield damage(
                    f"swap:{name}:{at}:{other}",
                    name,
                    at,
                    at + _BLOCK,
                    lambda d, p=path, a=at, c=content: d.damage(p, a, c),
                )
    for number, (name, offset, content, begun) in enumerate(built.older):
        path = f"{PATH}/{name}"
        yield damage(
            f"older:{name}:{offset}:{number}",
            name,
            offset,
            offset + _BLOCK,
            lambda d, p=path, a=offset, c=content: d.damage(p, a, c),
            begun,
        )
    # Headers and slots first, because they are a small part and much depends on them.
    for heads in (True, False):
        places = [
            (name, at)
            for name in built.files()
            if name != RESERVE
            for at in range(len(disk.read(f"{PATH}/{name}")))
            if (at % 2048 < 128 and at <= 2 * _BLOCK) == heads
        ]
        random.shuffle(places)
        for name, at in places:
            bit = random.randrange(8)
            yield damage(
                f"flip:{name}:{at}:{bit}", name, at, at + 1, lambda d, p=f"{PATH}/{name}", a=at, b=bit: d.flip(p, a, b)
            )


def examine(built: Built, damage: Damage) -> None:
    """Raises what is wrong."""
    disk = built.disk.copy()
    damage.act(disk)
    history = built.history.fork()
    history.durable = damage.least
    session = Session(disk, history)
    try:
        examine_damaged(session)
    finally:
        session.abandon()


def case_of(case: tuple[Built, Damage]) -> str:
    return f"{'closed' if case[1].closed else 'cut'}:{case[1].text}"


def every_damage(seed: int) -> Iterator[tuple[Built, Damage]]:
    """Both conditions, in turn."""
    return _every_damage(_built(), seed)


def _built() -> list[Built]:
    return [build(closed=True), build(closed=False)]


def _count(built: Built, seed: int) -> int:
    """How many there are. Flips are one for each byte."""
    others = takewhile(lambda damage: not damage.text.startswith("flip:"), damages(built, Random(seed)))
    return sum(1 for _ in others) + sum(len(built.disk.read(f"{PATH}/{name}")) for name in built.files())


def _every_damage(both: list[Built], seed: int) -> Iterator[tuple[Built, Damage]]:
    streams = [(built, damages(built, Random(seed))) for built in both]
    while streams:
        for stream in list(streams):
            damage = next(stream[1], None)
            if damage is None:
                streams.remove(stream)
            else:
                yield stream[0], damage


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    tally = Tally()
    both = _built()
    for number, (built, damage) in enumerate(
        share.mine(beginning(run.first, lambda: _every_damage(both, run.seed), case_of))
    ):
        try:
            examine(built, damage)
        except Exception as error:  # noqa: BLE001  # every exception is a violation
            tally.violations.append(
                (f"{type(error).__name__}: {error}", f"--seed {run.seed} --case {case_of((built, damage))}")
            )
        tally.states += 1
        tally.faults += 1
        if number % 50 == 0 or tally.violations:
            yield tally
            tally = Tally()
        if share.over():
            break
    yield tally


def run(run: Run) -> Result:
    """Run the part."""
    result = spread("bitflips", work, run)
    if not run.stop_at_first:
        total = sum(_count(built, run.seed) for built in _built())
        result.notes.append(f"bitflips: {result.faults:,} of {total:,} damages (bytes, blocks, records, files)")
    return result


def replay(text: str, run: Run) -> int:
    """Run one case with its traceback."""
    condition, wanted = text.split(":", 1)
    for built, damage in every_damage(run.seed):
        if damage.closed == (condition == "closed") and damage.text == wanted:
            print({name: len(built.disk.read(f"{PATH}/{name}")) for name in built.files()})
            examine(built, damage)
            print("nothing is wrong")
            return 0
    print(f"no such case: {text}")
    return 2


__all__: list[Any] = ["build", "examine", "every_damage", "replay", "run"]
