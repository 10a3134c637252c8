"""What a dry run expects a restore to take: by what a request and a byte take in the destination, and by the work."""

from __future__ import annotations

from typing import Any

import pytest
from archive_fixtures import Named
from backup_fixtures import Lived

import kvwal
from kvwal.backup.names import UnitName, parse_name
from kvwal.backup.reporting import expected_s


class Slow(Named):
    """A destination in which a request takes a time, and each byte as well."""

    def __init__(self, there: Any, pass_time: Any, request_s: float, byte_s: float) -> None:
        super().__init__(there)
        self.pass_time, self.request_s, self.byte_s = pass_time, request_s, byte_s
        self.read = 0

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        data: bytes = self.there.get(name, start=start, size=size)
        self.read += len(data)
        self.pass_time(self.request_s + self.byte_s * len(data))
        return data


class Sized:
    """Objects that have a size and nothing else."""

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        assert size is not None
        return bytes(size)


class Time:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s

    def go_on(self, seconds: float) -> None:
        self.now_s += seconds


def expected(
    objects: list[int], *, requests: int, request_s: float = 0.0, byte_s: float = 0.0, commits: int = 0
) -> Any:
    time = Time()
    place: Any = Slow(Sized(), time.go_on, request_s, byte_s)
    named = [(str(n), size) for n, size in enumerate(objects)]
    return expected_s(place, named, requests=requests, commits=commits, monotonic_s=time), place.read


def test_each_request_and_each_byte_takes_what_it_took_of_some_objects() -> None:
    work_s = 50_000_000 / 193e6
    found, _ = expected([10_000_000] * 5, request_s=0.25, requests=40)
    assert found == pytest.approx(40 * 0.25 + work_s, rel=0.001)
    found, _ = expected([10_000_000] * 5, byte_s=1e-6, requests=0)
    assert found == pytest.approx(50 + work_s, rel=0.001)


def test_without_a_time_of_the_destination_it_is_that_of_the_work() -> None:
    assert expected([193_000_000], requests=3)[0] == pytest.approx(1.0)
    assert expected([0], requests=1, commits=1_000_000)[0] == pytest.approx(5.1)
    assert expected([], requests=0, commits=0)[0] == 0.0


@pytest.mark.parametrize(("objects", "most"), [([1 << 30] * 99, 3 << 20), ([1 << 30], 1 << 20), ([100], 100)])
def test_it_reads_little_however_large_objects_are(objects: list[int], most: int) -> None:
    _, read = expected(objects, requests=1)
    assert 0 < read <= most + 3 * 256


def test_what_comes_faster_the_second_time_costs_nothing_beside_the_request() -> None:
    time = Time()
    times = iter([2.0, 0.001])

    class Kept(Sized):
        def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
            time.go_on(next(times))
            return super().get(name, size=size)

    place: Any = Kept()
    found = expected_s(place, [("a", 1000)], requests=2, commits=0, monotonic_s=time)
    assert found == pytest.approx(4.0, rel=0.001)


def test_a_dry_run_tells_it_with_the_units_bytes_and_requests() -> None:
    lived = Lived(3)
    for _ in range(40):
        lived.commit()
    lived.db.backup(lived.destination)
    place: Any = Slow(lived.destination, lived.disk.pass_time, 3.0, 0.0)
    report = kvwal.restore(place, "/r", dry_run=True, files=lived.disk)
    parsed = [parse_name(name) for name in report.objects]
    units = [name for name in parsed if isinstance(name, UnitName)]
    assert (report.units, report.bases) == (len(units), len(parsed) - len(units))
    assert report.expected_s is not None
    assert 3.0 * report.requests <= report.expected_s < 3.0 * report.requests + 0.1
    assert lived.disk.kind("/r") is None
    done = kvwal.restore(place, "/r", files=lived.disk)
    assert done.expected_s is None
    assert (done.bytes, done.units, done.bases) == (report.bytes, report.units, report.bases)
