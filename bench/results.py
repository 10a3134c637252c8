"""`results.json`, and what follows from it: medians, spreads, ratios, verdicts.

A ratio is taken round by round, between measurements made minutes apart at most, and then the median
of the rounds: a machine that slows down in between does not change it. Above 1, kvwal is ahead.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from bench.peers import PEERS
from bench.plan import Case
from bench.targets import ROWS, Check, Row

__all__ = ["KVWAL", "Figure", "Ratio", "Results", "Verdict", "machine", "ratio_to", "ratio_to_best"]

_SCHEMA: Final = 1
KVWAL: Final = "kvwal"


@dataclass(frozen=True)
class Figure:
    """What the rounds of one peer gave."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)


@dataclass(frozen=True)
class Ratio:
    """kvwal against one other: how many times its cost is kvwal's."""

    other: str
    figure: Figure


@dataclass(frozen=True)
class Verdict:
    """What became of one check."""

    check: Check
    met: bool | None
    text: str
    value: float | None = None


class Results:
    """The contents of a results file."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        empty: dict[str, Any] = {"schema": _SCHEMA, "machine": {}, "versions": {}, "missing": {}, "cases": {}}
        self.data = data or empty

    @classmethod
    def read(cls, path: str) -> Results:
        """The file, or nothing if there is none."""
        if not os.path.exists(path):
            return cls()
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if data.get("schema") != _SCHEMA:
            raise SystemExit(f"{path} is of another version of the benchmark; move it away")
        return cls(data)

    def write(self, path: str) -> None:
        """Replace the file whole."""
        text = json.dumps(self.data, indent=1, sort_keys=False) + "\n"
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".tmp", path)

    @property
    def cases(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["cases"]
        return found

    @property
    def older(self) -> list[str]:
        """The older commits of kvwal that took part (`bench.against`)."""
        return [name for name in self.data["versions"] if name.startswith(f"{KVWAL}@")]

    def in_order(self, plan: Iterable[Case]) -> None:
        """Put the cases into the order of the plan, whenever they were measured."""
        order = {case.id: number for number, case in enumerate(plan)}
        known = sorted(self.cases.items(), key=lambda item: order.get(item[0], len(order)))
        self.data["cases"] = dict(known)

    def figure(self, case: str, peer: str, metric: str = "cost") -> Figure | None:
        """The rounds of one peer, or None if it was not measured."""
        rounds = self.cases.get(case, {}).get("peers", {}).get(peer, {}).get("rounds")
        if not rounds:
            return None
        return Figure(tuple(_metric(one, metric) for one in rounds))

    def why_not(self, case: str, peer: str) -> str:
        """Why a peer has no figure."""
        if peer in self.data["missing"]:
            return "not installed"
        found = self.cases.get(case, {}).get("peers", {}).get(peer, {})
        for reason in ("not_offered", "missing", "failed"):
            if reason in found:
                return ("failed: " if reason == "failed" else "") + str(found[reason])
        return "not run"

    def verdicts(self, row: Row) -> list[Verdict]:
        """One for each check of the row."""
        return [self._verdict(check) for check in row.checks]

    def all_verdicts(self) -> dict[str, list[Verdict]]:
        """By row."""
        return {row.id: self.verdicts(row) for row in ROWS}

    def _verdict(self, check: Check) -> Verdict:
        ours = self.figure(check.case, KVWAL, check.metric)
        name = check.case + ("" if check.metric == "cost" else f" ({check.metric})")
        if ours is None:
            return Verdict(check, None, f"{name}: {self.why_not(check.case, KVWAL)}")
        if check.kind == "most":
            met = ours.high <= check.bound
            return Verdict(check, met, f"{name}: {ours.median:.3g} (at most {check.bound:g})", ours.median)
        if check.kind == "itself":
            other = self.figure(check.other, KVWAL, check.metric)
            if other is None:
                return Verdict(check, None, f"{name}: {check.other} was not measured")
            times = _per_round(ours, other)
            return Verdict(check, times.median <= check.bound, f"{name}: {_times(times)} {check.other}", times.median)
        if check.kind == "limit":
            limit = self.figure(check.case, check.against[0], check.metric)
            if limit is None:
                return Verdict(check, None, f"{name}: {check.against[0]} was not measured")
            times = _per_round(ours, limit)
            text = f"{name}: {_times(times)} {check.against[0]}"
            return Verdict(check, times.median <= check.bound, text, times.median)
        ratio = ratio_to_best(self, check.case, check.metric, check.against)
        if ratio is None:
            return Verdict(check, None, f"{name}: no peer to compare with")
        text = f"{name}: {_times(ratio.figure)} {ratio.other}"
        return Verdict(check, ratio.figure.median >= check.bound, text, ratio.figure.median)


def ratio_to_best(results: Results, case: str, metric: str = "cost", against: tuple[str, ...] = ()) -> Ratio | None:
    """kvwal against the peer with the lowest median, limits aside."""
    ours = results.figure(case, KVWAL, metric)
    others: list[tuple[str, Figure]] = []
    for name, peer in PEERS.items():
        if peer.kind == "peer" and (not against or name in against):
            figure = results.figure(case, name, metric)
            if figure is not None:
                others.append((name, figure))
    if ours is None or not others:
        return None
    name, best = min(others, key=lambda other: other[1].median)
    return Ratio(name, _per_round(best, ours))


def ratio_to(results: Results, case: str, other: str, metric: str = "cost") -> Ratio | None:
    """kvwal against one peer by name, or against an older commit of its own."""
    ours, theirs = results.figure(case, KVWAL, metric), results.figure(case, other, metric)
    return Ratio(other, _per_round(theirs, ours)) if ours and theirs else None


def _per_round(above: Figure, below: Figure) -> Figure:
    return Figure(tuple(a / b for a, b in zip(above.rounds, below.rounds, strict=False)))


def _times(figure: Figure) -> str:
    spread = f" ({figure.low:.2f} to {figure.high:.2f})" if len(figure.rounds) > 1 else ""
    return f"{figure.median:.2f}x{spread}"


def _metric(one: dict[str, Any], metric: str) -> float:
    if metric == "cost":
        return float(one["cost"])
    extra = one["extra"]
    return float(extra["percentiles_us"][metric] if metric not in extra else extra[metric])


def machine(directory: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "system": platform.system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "file_system": _file_system(directory),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file_system(directory: str) -> str:
    """Type and options of the mount that holds the directory."""
    path = os.path.realpath(directory)
    best = ("", "unknown")
    try:
        with open("/proc/self/mounts", encoding="utf-8") as lines:
            for line in lines:
                _, mount, kind, options = line.split()[:4]
                inside = path == mount or path.startswith(mount.rstrip("/") + "/")
                if inside and len(mount) >= len(best[0]):
                    best = mount, f"{kind} ({options})"
    except OSError:
        pass
    return best[1]
