"""The parent: data sets, children, and their order.

Within a case the peers take turns, round after round, so that a machine that drifts drifts for all
of them; who goes first changes with each round. Nothing else runs meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from bench.against import Older, environment_of
from bench.peers import PEERS, How, Peer
from bench.plan import Case, Scale
from bench.results import KVWAL
from bench.tasks import Job

__all__ = ["Runner", "Step"]

_ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

Answer = dict[str, Any]
Step = Callable[[str], None]


@dataclass
class Runner:
    """Runs cases below one directory, which should be on the disk that is to be measured.

    Attributes:
        peers: names of those that take part.
        older: commits that take part wherever kvwal does, by name.
        versions: of those that are installed; `missing` says why the others are not.
        data_sets: what was built, by peer, keys and size of values; a text says why it could not be.
    """

    directory: str
    scale: Scale
    peers: tuple[str, ...]
    older: Mapping[str, Older] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    data_sets: dict[tuple[str, int, int], tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.rmtree(self._stores, ignore_errors=True)
        os.makedirs(self._stores)
        for name in self.peers:
            try:
                self.versions[name] = PEERS[name].version()
            except ImportError as error:
                self.missing[name] = str(error)
        self.versions |= {name: one.version for name, one in self.older.items()}

    @property
    def _stores(self) -> str:
        return os.path.join(self.directory, "stores")

    def clean(self) -> None:
        """Remove the data sets."""
        shutil.rmtree(self._stores, ignore_errors=True)

    def taking_part(self, case: Case) -> list[str]:
        """Those of the case's peers that were asked for and are installed."""
        names = [name for name in case.peers if name in self.versions]
        if KVWAL in names:
            # Next to kvwal, so that little time passes between the two.
            after = names.index(KVWAL) + 1
            names[after:after] = self.older
        return names

    def steps(self, case: Case) -> int:
        """How many measurements the case is."""
        return len(self.taking_part(case)) * self._rounds(case)

    def _rounds(self, case: Case) -> int:
        return 1 if case.once else self.scale.rounds

    def run(self, case: Case, step: Step) -> dict[str, Any]:
        """Measure a case: what `results.json` holds of it. `step` is told before each measurement."""
        names = self.taking_part(case)
        answers: dict[str, list[Answer]] = {name: [] for name in names}
        for number in range(self._rounds(case)):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                step(name)
                earlier = answers[name]
                # What is not offered, or does not work, is not tried again.
                if not earlier or "cost" in earlier[-1]:
                    earlier.append(self._measure(case, name, seed=number + 1))
        return {
            "title": case.title,
            "unit": case.unit,
            "keys": case.keys,
            "value_bytes": case.how.value_bytes,
            "durability": case.how.durability,
            "threads": case.how.threads,
            "distribution": case.distribution,
            "options": case.options,
            "seconds": self.scale.seconds,
            "quick": self.scale.quick,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "peers": {name: _summary(found) for name, found in answers.items()},
        }

    def _measure(self, case: Case, peer: str, seed: int) -> Answer:
        scratch = os.path.join(self._stores, "scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        job = Job(
            peer,
            case.task,
            scratch,
            case.keys,
            self.scale.seconds,
            case.how,
            case.distribution,
            seed,
            dict(case.options),
        )
        try:
            if case.store == "crashed":
                return self._recover(job)
            if case.store != "empty":
                job = replace(job, how=replace(case.how, filled=True))
            if case.store != "empty" and self._driver(peer).persistent:
                path, problem = self._data_set(peer, case.keys, case.how.value_bytes)
                if problem:
                    return {"failed": f"data set: {problem}"}
                if case.store == "copy":
                    _copy(path, scratch)
                else:
                    _warm(path)
                    job = replace(job, path=path)
            return self._child(job)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _recover(self, job: Job) -> Answer:
        tail = self._child(replace(job, task="tail"), dies=True)
        if "cost" not in tail:
            return tail
        answer = self._child(replace(job, options={**job.options, "last": tail["extra"]["last"]}))
        if "cost" in answer:
            answer["extra"]["left_bytes"] = tail["extra"]["disk_bytes"]
        return answer

    def _data_set(self, peer: str, keys: int, value_bytes: int) -> tuple[str, str]:
        """Path of a data set, and what went wrong. It is built once in a run."""
        known = peer, keys, value_bytes
        if known not in self.data_sets:
            path = os.path.join(self._stores, f"{peer}-{keys}-{value_bytes}")
            how = How(durability="os", value_bytes=value_bytes)
            answer = self._child(Job(peer, "build", path, keys, 0, how))
            problem = "" if "cost" in answer else str(next(iter(answer.values())))
            self.data_sets[known] = path, problem
        return self.data_sets[known]

    def _driver(self, peer: str) -> type[Peer]:
        return PEERS[KVWAL if peer in self.older else peer]

    def _child(self, job: Job, *, dies: bool = False) -> Answer:
        """Run a job in a process of its own. `dies`: it is to kill itself after its answer."""
        older = self.older.get(job.peer)
        if older is not None:
            return _child(replace(job, peer=KVWAL), older.python, older.folder, environment_of(older), dies)
        paths = os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])
        return _child(job, sys.executable, _ROOT, {**os.environ, "PYTHONPATH": paths}, dies)


def _child(job: Job, python: str, folder: str, environment: dict[str, str], dies: bool) -> Answer:
    # Far above what it takes: a hang must not stop the rest. The slowest peer needs some 100 us for a key.
    touched = job.keys * (1 + int(job.options.get("passes", 0))) + int(job.options.get("tail_bytes", 0)) // 100
    timeout_s = 90 + 40 * job.seconds + touched * 300e-6
    try:
        done = subprocess.run(
            [python, "-m", "bench.child"],
            input=json.dumps(job.as_json()),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        answer: Answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"}
    if "failed" in answer:
        answer["trace"] = done.stderr.strip()[-2000:]
    elif "cost" in answer and done.returncode != (-signal.SIGKILL if dies else 0):
        return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"}
    return answer


def _copy(source: str, target: str) -> None:
    """A copy that is on the disk already, so that the first flush of a measurement does not pay for it."""
    shutil.copytree(source, target, copy_function=_copy_file)


def _copy_file(source: str, target: str) -> None:
    """Copy the data and leave the holes: a file that is mapped for writing is as long as its map."""
    read = os.open(source, os.O_RDONLY)
    write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for at, end in _extents(read):
            while at < end:
                at += os.copy_file_range(read, write, end - at, at, at)
        os.ftruncate(write, os.fstat(read).st_size)
        os.fsync(write)
    finally:
        os.close(read)
        os.close(write)


def _warm(path: str) -> None:
    """Read the files once, so that all peers find theirs in the operating system's cache.

    Some write past it: what RocksDB's SstFileWriter leaves would first have to come from the disk.
    """
    for root, _, names in os.walk(path):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                for at, end in _extents(fd):
                    while at < end:
                        at += len(os.pread(fd, min(4 << 20, end - at), at))
            finally:
                os.close(fd)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: start and end, in order."""
    size = os.fstat(fd).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # no data behind this point
            return
        end = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, end
        at = end


def _summary(answers: list[Answer]) -> dict[str, Any]:
    """The rounds of one peer in one case; or why there are none."""
    rounds = [answer for answer in answers if "cost" in answer]
    if len(rounds) < len(answers):
        # One round that failed is not hidden behind those that did not.
        return next(answer for answer in answers if "cost" not in answer)
    kept = ("cost", "ops", "seconds", "extra")
    return {
        "rounds": [{name: answer[name] for name in kept} for answer in rounds],
        "note": rounds[-1]["note"],
        "settings": rounds[-1]["settings"],
    }
