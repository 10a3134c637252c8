"""docs/benchmarks.md: the generated parts between markers, everything else written by hand and left alone.

    <!-- bench: targets -->      a generated part
    <!-- /bench -->

The reasons come from `bench/reasons.toml`, one for each row of the targets, by hand.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from typing import Final

from bench.peers import PEERS
from bench.pictures import draw
from bench.results import Results, Verdict, ratio_to_best
from bench.show import number, settings_of
from bench.targets import ROWS

__all__ = ["write_report"]

_HERE: Final = os.path.dirname(os.path.abspath(__file__))
_PICTURES: Final = {
    "ratios": "Ratio to the best peer, for each case",
    "sizes": "Cost against the size of a value",
    "growth": "Cost against the number of keys",
    "latency": "Percentiles of single operations",
}

_TEMPLATE: Final = """\
# Benchmarks

What kvwal costs as called from Python, beside its peers. `python -m bench` measures, `python -m bench report`
writes what stands between the markers of this page; the rest is written by hand.

## Targets

A ratio above 1x over a peer means that kvwal is ahead: the peer's cost divided by kvwal's, taken round by round,
the median of the rounds, and in brackets the lowest and the highest.

<!-- bench: targets -->
<!-- /bench -->

## Pictures

<!-- bench: pictures -->
<!-- /bench -->

## How it is measured

- Every measurement runs in a fresh process. The peers take turns within a round, and who goes first changes.
- The measuring loop is the same code for all; bound methods are taken out of it, keys and values made before it.
- Peers are tuned as their own documentation advises, and get the same budgets for cache and write buffer as kvwal.
  Each adapter in `bench/peers` says what it sets and where that is advised.
- "Durable" means for all that what was acknowledged survives a power cut; "without sync", that it survives a
  killed process and that a power cut leaves a consistent store.
- Keys are 16 bytes and scattered, values incompressible. The Zipfian constant is 0.99, as in YCSB.
- Every measurement finds its files in the operating system's cache: they are read once before it.
- Memory-mapped peers share the operating system's cache, which no budget bounds: lmdb in the row of 10 million keys.
- `pwrite+fdatasync` (a bare loop on a preallocated file) and `dict` are limits, not peers.

<!-- bench: machine -->
<!-- /bench -->

## Every case

Medians; less is better. A dash: the peer does not offer it (below).

<!-- bench: cases -->
<!-- /bench -->

### Settings

<!-- bench: settings -->
<!-- /bench -->

### What could not be measured

<!-- bench: missing -->
<!-- /bench -->

## Tried, and not kept

| idea | figure | why not |
|---|---|---|
"""


def write_report(results: Results, document: str) -> list[str]:
    """Bring the document and its pictures up to date; what there is to say about it."""
    directory = os.path.dirname(os.path.abspath(document))
    pictures = draw(results, os.path.join(directory, "pictures"))
    reasons = _reasons()
    parts: dict[str, Callable[[], str]] = {
        "targets": lambda: _targets(results, reasons),
        "pictures": lambda: _shown(pictures),
        "machine": lambda: _machine(results),
        "cases": lambda: _cases(results),
        "settings": lambda: _settings(results),
        "missing": lambda: _missing(results),
    }
    text = _TEMPLATE
    if os.path.exists(document):
        with open(document, encoding="utf-8") as file:
            text = file.read()
    said = [f"{document}: {', '.join(pictures) or 'no pictures'}"]
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        body = part()
        text, count = pattern.subn(lambda found, body=body: found[1] + body + found[2], text)  # type: ignore[misc]
        if not count:
            said.append(f"no marker for {name}; it was left out")
    with open(document, "w", encoding="utf-8") as file:
        file.write(text)
    for row in ROWS:
        short = any(verdict.met is False for verdict in results.verdicts(row))
        if short and row.id not in reasons:
            said.append(f"{row.id} falls short and bench/reasons.toml gives no reason")
        if not short and row.id in reasons:
            said.append(f"{row.id} no longer falls short; its reason in bench/reasons.toml can go")
    return said


def _reasons() -> dict[str, str]:
    with open(os.path.join(_HERE, "reasons.toml"), "rb") as file:
        return {row: " ".join(text.split()) for row, text in tomllib.load(file).items()}


def _table(head: list[str], rows: list[list[str]], right: bool = False) -> str:
    rule = ["---", *(["---:" if right else "---"] * (len(head) - 1))]
    lines = [head, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _targets(results: Results, reasons: dict[str, str]) -> str:
    rows = []
    for row in ROWS:
        verdicts = results.verdicts(row)
        measured = "<br>".join(_marked(verdict) for verdict in verdicts)
        short = any(verdict.met is False for verdict in verdicts)
        reason = reasons.get(row.id, "no reason written yet") if short else ""
        rows.append([row.workload, row.target, measured, _word(verdicts), reason])
    return _table(["workload", "target", "measured", "verdict", "why it falls short"], rows)


def _marked(verdict: Verdict) -> str:
    return f"**{verdict.text}**" if verdict.met is False else verdict.text


def _word(verdicts: list[Verdict]) -> str:
    if any(verdict.met is False for verdict in verdicts):
        return "falls short"
    return "not all measured" if any(verdict.met is None for verdict in verdicts) else "met"


def _shown(pictures: list[str]) -> str:
    lines = []
    for name, text in _PICTURES.items():
        if f"bench-{name}.svg" in pictures:
            lines.append(f"![{text}](pictures/bench-{name}.svg)\n")
    return "\n".join(lines)


def _machine(results: Results) -> str:
    machine = results.data["machine"]
    if not machine:
        return ""
    whens = sorted(case["when"][:10] for case in results.cases.values())
    rows = [[name.replace("_", " "), str(value)] for name, value in machine.items()]
    rows.append(["measured", whens[0] if whens[0] == whens[-1] else f"{whens[0]} to {whens[-1]}"])
    rows += [[name, version] for name, version in results.data["versions"].items() if name in PEERS]
    if any(case["quick"] for case in results.cases.values()):
        rows.append(["note", "from a quick run: smaller and noisier than the figures this page is for"])
    return _table(["", ""], rows)


def _cases(results: Results) -> str:
    names = [name for name in PEERS if any(results.figure(id, name) for id in results.cases)]
    rows = []
    for id, case in results.cases.items():
        cells = []
        for name in names:
            figure = results.figure(id, name)
            cells.append(number(figure.median) if figure else "-")
        ratio = ratio_to_best(results, id)
        rows.append([f"`{id}` {case['title']}", case["unit"], *cells, f"{ratio.figure.median:.2f}x" if ratio else ""])
    return _table(["case", "unit", *names, "ratio"], rows, right=True)


def _settings(results: Results) -> str:
    rows = []
    for name in (name for name in results.data["versions"] if name in PEERS):
        for durability, settings in settings_of(results, name).items():
            listed = [f"{key}={value}" for key, value in settings.items()]
            if PEERS[name].kind == "peer":
                listed.append(f"asyncio: executor of {PEERS[name].executor_threads}")
            rows.append([name, durability, ", ".join(listed)])
    return _table(["peer", "durability", "settings"], rows)


def _missing(results: Results) -> str:
    """Reasons, each with the cases it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for id, case in results.cases.items():
        for name in (name for name in case["peers"] if name in PEERS):
            if PEERS[name].kind == "peer" and results.figure(id, name) is None:
                found.setdefault((name, results.why_not(id, name)), []).append(id)
    rows = [[name, reason, _listed(ids)] for (name, reason), ids in found.items()]
    rows += [[name, f"not installed: {reason}", "all"] for name, reason in results.data["missing"].items()]
    return _table(["peer", "reason", "cases"], sorted(rows))


def _listed(ids: list[str]) -> str:
    return ", ".join(f"`{id}`" for id in ids)
