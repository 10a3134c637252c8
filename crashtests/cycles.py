"""Looks for what may not be in the history of list-append transactions: Elle's method (Kingsbury and Alvaro, 2020).

Every append adds an element that no other append has, and elements tell who wrote them. So the longest list of a key
shows the order of all its versions, and a read shows which of them it saw. From that come the dependencies

| edge | from | to |
|---|---|---|
| ww | who wrote a version | who wrote the next one |
| wr | who wrote a version | who read it |
| rw | who read a version | who wrote the next one |
| rt | who ended | who began later |

and a cycle of them is an anomaly: G0 (ww alone), G1c (with wr), G-single (with one rw), G2 (with more), each of them
"-realtime" if it needs an rt edge. Besides: G1a, a read of what was aborted; G1b, a read of a list as it was within a
transaction; a read of a list that never was; an element that is there twice, that is lost, or that came from nowhere; a
transaction that is there in part; a transaction that does not read its own appends.

Transactions that did not commit read a snapshot all the same: their reads take part, as those of a reader.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

List = tuple[int, ...]
Kind = Literal["ww", "wr", "rw", "rt"]

#: One transaction appends fewer elements than this.
MAX_APPENDS = 16


def encode(elements: Iterable[int]) -> bytes:
    return b" ".join(b"%d" % element for element in elements)


def decode(value: bytes | None) -> List:
    return tuple(map(int, value.split())) if value else ()


def writer_of(element: int) -> int:
    return element // MAX_APPENDS


@dataclass(slots=True)
class Observed:
    """One transaction as its client saw it. Numbers are from 1."""

    number: int
    #: Place in real time, on a counter that all clients share.
    begun: int = 0
    #: None: its client was not told how it ended.
    ended: int | None = None
    #: "maybe": it may have been committed, or not (the machine died before it answered).
    outcome: Literal["ok", "failed", "maybe"] = "maybe"
    seqno: int | None = None
    #: What it read, without its own appends, in the order it read.
    reads: list[tuple[bytes, List]] = field(default_factory=list)
    appends: dict[bytes, list[int]] = field(default_factory=dict)
    #: What it saw that contradicts itself.
    complaints: list[str] = field(default_factory=list)

    def read(self, key: bytes, elements: List) -> None:
        """It read this, its own appends included."""
        own = tuple(self.appends.get(key, ()))
        if own and elements[-len(own) :] != own:
            self.complaints.append(f"internal: transaction {self.number} does not read its own appends to {key!r}")
        foreign = elements[: len(elements) - len(own)]
        for earlier_key, earlier in self.reads:
            if earlier_key == key and earlier != foreign:
                self.complaints.append(f"transaction {self.number} read {key!r} twice, and differently")
        self.reads.append((key, foreign))

    def append(self, key: bytes) -> int:
        """The element to append."""
        element = self.number * MAX_APPENDS + sum(map(len, self.appends.values()))
        self.appends.setdefault(key, []).append(element)
        return element


Graph = dict[int, dict[int, set[Kind]]]
"""From, to, and why. Numbers below zero are moments in real time, not transactions."""


def find(final: dict[bytes, List], history: Iterable[Observed]) -> list[str]:
    """Everything that is wrong with the history. `final` are the lists when all was over."""
    observed = {txn.number: txn for txn in history}
    problems = [complaint for txn in observed.values() for complaint in txn.complaints]
    problems += _check_elements(final, observed)
    if problems:
        # The order of versions is not known.
        return problems
    graph: Graph = {}
    for key, order in final.items():
        problems += _add_dependencies(graph, key, order, observed)
    _add_real_time(graph, observed.values())
    if not problems:
        problems += _anomalies(graph)
    return [*problems, *_check_numbers(final, observed)]


def _check_elements(final: dict[bytes, List], observed: dict[int, Observed]) -> Iterator[str]:
    for key, order in final.items():
        if len(set(order)) != len(order):
            yield f"an append to {key!r} took effect twice: {order}"
        for element in order:
            txn = observed.get(writer_of(element))
            if txn is None or element not in txn.appends.get(key, ()):
                yield f"no transaction appended {element} to {key!r}"
            elif txn.outcome == "failed":
                yield f"transaction {txn.number} failed, but its {element} is in {key!r}"
    for txn in observed.values():
        there = [element in final.get(key, ()) for key, elements in txn.appends.items() for element in elements]
        if txn.outcome == "ok" and not all(there):
            yield f"transaction {txn.number} was acknowledged and is missing: {txn.appends}"
        elif any(there) and not all(there):
            yield f"transaction {txn.number} is there in part: {txn.appends}, {there}"


def _add_dependencies(graph: Graph, key: bytes, order: List, observed: dict[int, Observed]) -> Iterator[str]:
    # The versions of a key, as far as they may be seen: (last element, writer).
    versions: list[tuple[int, int]] = []
    for element, following in itertools.zip_longest(order, order[1:]):
        writer = writer_of(element)
        if following is None or writer_of(following) != writer:
            versions.append((element, writer))
    for (_, one), (_, other) in itertools.pairwise(versions):
        _edge(graph, one, other, "ww")
    place = {element: index for index, (element, _) in enumerate(versions)}
    for txn in observed.values():
        for read_key, seen in txn.reads:
            if read_key != key:
                continue
            aborted = [e for e in seen if (w := observed.get(writer_of(e))) is not None and w.outcome == "failed"]
            if aborted:
                yield f"G1a: transaction {txn.number} read {aborted} of {key!r}, which were aborted"
                continue
            if seen != order[: len(seen)]:
                yield f"transaction {txn.number} read a list of {key!r} that never was: {seen}, not a prefix of {order}"
                continue
            following = 0
            if seen:
                if seen[-1] not in place:
                    yield f"G1b: transaction {txn.number} read {key!r} as it was within {writer_of(seen[-1])}"
                    continue
                following = place[seen[-1]] + 1
                _edge(graph, versions[following - 1][1], txn.number, "wr")
            if following < len(versions):
                # A transaction does not depend on its own append.
                _edge(graph, txn.number, versions[following][1], "rw")


def _add_real_time(graph: Graph, history: Iterable[Observed]) -> None:
    """Add a chain of moments, one for each end: a transaction leads to its end, an end to those that began later."""
    moments: list[tuple[int, int, Observed]] = []
    for txn in history:
        moments.append((txn.begun, 1, txn))
        if txn.ended is not None:
            moments.append((txn.ended, 0, txn))
    last = 0
    for _, begins, txn in sorted(moments, key=lambda moment: moment[:2]):
        if begins:
            if last:
                _edge(graph, last, txn.number, "rt")
        else:
            _edge(graph, txn.number, last - 1, "rt")
            if last:
                _edge(graph, last, last - 1, "rt")
            last -= 1


def _edge(graph: Graph, one: int, other: int, kind: Kind) -> None:
    if one != other:
        graph.setdefault(one, {}).setdefault(other, set()).add(kind)
        graph.setdefault(other, {})


def _check_numbers(final: dict[bytes, List], observed: dict[int, Observed]) -> Iterator[str]:
    """The store's own numbers of the commits rise along each list."""
    for key, order in final.items():
        seqnos = [s for e in order if (s := observed[writer_of(e)].seqno) is not None]
        if sorted(seqnos) != seqnos:
            yield f"the list of {key!r} is not in the order of the commits' seqnos: {seqnos}"


# -- cycles ---------------------------------------------------------------------------------------


def _anomalies(graph: Graph) -> Iterator[str]:
    if cycle(graph) is None:
        return
    for suffix, extra in (("", set[Kind]()), ("-realtime", set[Kind](("rt",)))):
        kinds: list[tuple[str, set[Kind]]] = [("G0", {"ww"}), ("G1c", {"ww", "wr"})]
        for name, allowed in kinds:
            found = cycle(_only(graph, allowed | extra))
            if found is not None:
                yield _tell(name + suffix, graph, found)
                return
        # One rw edge, and a way back without another.
        way_back = _only(graph, {"ww", "wr"} | extra)
        for one, others in graph.items():
            for other in (other for other, why in others.items() if "rw" in why):
                path = _path(way_back, other, one)
                if path is not None:
                    yield _tell("G-single" + suffix, graph, [one, *path[:-1]])
                    return
        found = cycle(_only(graph, {"ww", "wr", "rw"} | extra))
        if found is not None:
            yield _tell("G2" + suffix, graph, found)
            return


def _only(graph: Graph, allowed: set[Kind]) -> Graph:
    return {one: {other: why for other, why in others.items() if why & allowed} for one, others in graph.items()}


def _tell(name: str, graph: Graph, found: list[int]) -> str:
    names = [f"T{node}" if node > 0 else "a moment" for node in found]
    steps = []
    for index, one in enumerate(found):
        why = graph[one][found[(index + 1) % len(found)]]
        steps.append(f"{names[index]} -{'/'.join(sorted(why))}->")
    return f"{name}: {' '.join(steps)} {names[0]}"


def _path(graph: Graph, start: int, goal: int) -> list[int] | None:
    came: dict[int, int] = {start: start}
    ahead = deque([start])
    while ahead:
        node = ahead.popleft()
        if node == goal:
            path = [node]
            while path[-1] != start:
                path.append(came[path[-1]])
            return path[::-1]
        for other in graph.get(node, ()):
            if other not in came:
                came[other] = node
                ahead.append(other)
    return None


def cycle(graph: Graph) -> list[int] | None:
    """A cycle of the graph, if there is one."""
    done: set[int] = set()
    for root in graph:
        if root in done:
            continue
        path, on_path = [root], {root}
        ahead = [iter(graph[root])]
        while ahead:
            for other in ahead[-1]:
                if other in on_path:
                    return path[path.index(other) :]
                if other not in done:
                    path.append(other)
                    on_path.add(other)
                    ahead.append(iter(graph.get(other, ())))
                    break
            else:
                ahead.pop()
                done.add(path[-1])
                on_path.discard(path.pop())
    return None


__all__ = ["MAX_APPENDS", "Observed", "cycle", "decode", "encode", "find", "writer_of"]
