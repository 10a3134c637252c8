"""Finds isolation anomalies in histories of list-append transactions (the method of Elle).

Every transaction reads lists and appends values that no other appends. The lists that were read tell the order of the
appends, hence who wrote before whom (ww), who read whose write (wr), and who read what another then overwrote (rw).
A cycle of these is an anomaly that no serial order explains:

| name | cycle of | what it is |
|---|---|---|
| G0 | ww | dirty write |
| G1c | ww, wr | circular flow of information |
| G-single | ww, wr and one rw | read skew, lost update |
| G2 | ww, wr and several rw | write skew, phantoms |

Before that, without a graph: G1a (a read of what was aborted), G1b (a read of what its writer went on to change),
lists of which none is a prefix of the other, lost appends, and transactions of which a part took effect.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["ListTxn", "anomalies"]

Edges = Mapping[int, set[int]]


@dataclass(slots=True)
class ListTxn:
    """One transaction, as its client saw it."""

    number: int
    reads: list[tuple[bytes, tuple[int, ...]]] = field(default_factory=list)
    appends: list[tuple[bytes, int]] = field(default_factory=list)
    #: "ok": acknowledged; "aborted": never took effect; "unknown": the client died or was told nothing.
    status: str = "unknown"


def anomalies(txns: Iterable[ListTxn], final: Mapping[bytes, tuple[int, ...]]) -> list[str]:
    """What is wrong with the history, given the lists as they are in the end."""
    txns = list(txns)
    found: list[str] = []
    writer = {(key, value): txn for txn in txns for key, value in txn.appends}
    order = dict(final)
    for key, values in final.items():
        if len(set(values)) != len(values):
            found.append(f"a value is twice in {key!r}: {values}")
        found += [f"{value} in {key!r} was appended by nobody" for value in values if (key, value) not in writer]
    for txn in txns:
        present = [value in final.get(key, ()) for key, value in txn.appends]
        if txn.status == "ok" and not all(present):
            found.append(f"lost: transaction {txn.number} was acknowledged, and its appends are {present}")
        elif txn.status == "aborted" and any(present):
            found.append(f"G1a: transaction {txn.number} was aborted, and its appends are {present}")
        elif any(present) and not all(present):
            found.append(f"torn: transaction {txn.number} took effect in part: {present}")
    # Of the others, whose clients died, nothing was ever told to anybody.
    real = [txn for txn in txns if txn.status == "ok" or (txn.status == "unknown" and _took_effect(txn, final))]
    for txn in real:
        for key, values in txn.reads:
            if values != order.get(key, ())[: len(values)]:
                found.append(f"transaction {txn.number} read {values} of {key!r}, which became {order.get(key)}")
            elif values:
                last = writer.get((key, values[-1]))
                later = [v for k, v in last.appends if k == key] if last is not None else []
                if later and later[-1] != values[-1] and last is not txn:
                    found.append(f"G1b: transaction {txn.number} read {key!r} in the middle of its writer's work")
    return found or list(_cycles(real, writer, order))


def _took_effect(txn: ListTxn, final: Mapping[bytes, tuple[int, ...]]) -> bool:
    return any(value in final.get(key, ()) for key, value in txn.appends)


def _cycles(
    txns: list[ListTxn], writer: Mapping[tuple[bytes, int], ListTxn], order: Mapping[bytes, tuple[int, ...]]
) -> Iterator[str]:
    ww: dict[int, set[int]] = defaultdict(set)
    wr: dict[int, set[int]] = defaultdict(set)
    rw: dict[int, set[int]] = defaultdict(set)

    def link(edges: dict[int, set[int]], before: ListTxn, after: ListTxn) -> None:
        if before is not after:
            edges[before.number].add(after.number)

    for key, values in order.items():
        for one, other in pairwise(values):
            link(ww, writer[key, one], writer[key, other])
    for txn in txns:
        for key, values in txn.reads:
            if values:
                link(wr, writer[key, values[-1]], txn)
            if len(values) < len(order.get(key, ())):
                link(rw, txn, writer[key, order[key][len(values)]])
    flow = _union(ww, wr)
    for name, edges in (("G0", ww), ("G1c", flow)):
        for component in _components(edges):
            yield f"{name}: a cycle among transactions {sorted(component)[:8]}"
            return
    every = _union(flow, rw)
    for component in _components(every):
        for before in component:
            for after in rw.get(before, ()):
                if after in component and _reaches(flow, after, before):
                    yield f"G-single: transaction {before} read what {after} overwrote, and depends on it"
                    return
        yield f"G2: a cycle among transactions {sorted(component)[:8]}"
        return


def _union(one: Edges, other: Edges) -> dict[int, set[int]]:
    both: dict[int, set[int]] = defaultdict(set)
    for edges in (one, other):
        for node, targets in edges.items():
            both[node] |= targets
    return both


def _reaches(edges: Edges, start: int, goal: int) -> bool:
    seen = {start}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node == goal:
            return True
        for target in edges.get(node, ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return False


def _components(edges: Edges) -> Iterator[set[int]]:
    """Strongly connected components of more than one node (Tarjan, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in list(edges):
        if root in index:
            continue
        work = [(root, iter(edges.get(root, ())))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, iter(edges.get(target, ()))))
                    break
                if target in on_stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: set[int] = set()
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.add(member)
                        if member == node:
                            break
                    if len(component) > 1:
                        yield component
