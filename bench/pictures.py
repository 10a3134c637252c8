"""The pictures of docs/benchmarks.md, as SVG: ratios, cost against size, percentiles."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

from bench.peers import PEERS
from bench.results import KVWAL, Results, ratio_to_best
from bench.targets import ROWS
from bench.tasks.latency import PERCENTILES

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; kvwal is the black line.
_PALETTE: Final = "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #8c6d31 #999999 #bbbbbb"
_COLOURS: Final = dict(zip(PEERS, _PALETTE.split(), strict=True))


def draw(results: Results, directory: str) -> list[str]:
    """Write the pictures that the results allow; their file names."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    # The same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "kvwal", "svg.fonttype": "none", "font.size": 9})
    plt = importlib.import_module("matplotlib.pyplot")
    os.makedirs(directory, exist_ok=True)
    written = []
    for name, picture in (("ratios", _ratios), ("sizes", _sizes), ("growth", _growth), ("latency", _latency)):
        figure = picture(plt, results)
        if figure is not None:
            path = os.path.join(directory, f"bench-{name}.svg")
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
            written.append(os.path.basename(path))
            plt.close(figure)
    return written


def _ratios(plt: Any, results: Results) -> Any:
    """A bar for each case: how many times the best peer's cost is kvwal's, with its target where it has one."""
    targets = {c.case: c.bound for row in ROWS for c in row.checks if c.kind == "best" and c.metric == "cost"}
    bars = [(id, found) for id in results.cases if (found := ratio_to_best(results, id)) is not None]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.21 * len(bars)))
    for at, (id, ratio) in enumerate(bars):
        middle = ratio.figure.median
        axes.barh(at, middle - 1, left=1, color="#009E73" if middle >= 1 else "#D55E00", height=0.7)
        axes.plot([ratio.figure.low, ratio.figure.high], [at, at], color="#333333", linewidth=0.8)
        if id in targets:
            axes.plot([targets[id]] * 2, [at - 0.42, at + 0.42], color="#0072B2", linewidth=1.8)
        axes.text(max(middle, ratio.figure.high, 1) * 1.04, at, f"{middle:.2f}x {ratio.other}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [id for id, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("cost of the best peer / cost of kvwal (right of 1: kvwal is ahead; blue: target)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    _plain(axes)
    return figure


def _sizes(plt: Any, results: Results) -> Any:
    """Cost against the size of a value."""
    families = ("put.commit.1", "put.os.1", "batch", "get.hot", "scan.full")
    return _curves(
        plt,
        results,
        {f: {f"{f}{s}": _value_bytes(results, f"{f}{s}") for s in ("", ".1k", ".64k")} for f in families},
        "bytes of a value",
    )


def _growth(plt: Any, results: Results) -> Any:
    """Cost against the number of keys."""
    families = ("growth.put", "growth.get", "growth.hot", "open")
    return _curves(
        plt,
        results,
        {f: {f"{f}.{t}": _keys(results, f"{f}.{t}") for t in ("s", "m", "l", "xl")} for f in families},
        "keys in the store",
    )


def _value_bytes(results: Results, case: str) -> int:
    return int(results.cases.get(case, {}).get("value_bytes", 0))


def _keys(results: Results, case: str) -> int:
    return int(results.cases.get(case, {}).get("keys", 0))


def _curves(plt: Any, results: Results, families: dict[str, dict[str, int]], what: str) -> Any:
    """One panel for each family of cases, one line for each peer."""
    shown = {name: cases for name, cases in families.items() if sum(map(bool, cases.values())) > 1}
    if not shown:
        return None
    figure, panels = plt.subplots(1, len(shown), figsize=(3 * len(shown), 3), squeeze=False)
    lines: dict[str, Any] = {}
    for axes, (family, cases) in zip(panels[0], shown.items(), strict=True):
        unit = next(results.cases[case]["unit"] for case in cases if case in results.cases)
        for peer in PEERS:
            points = [(x, f.median) for case, x in cases.items() if x and (f := results.figure(case, peer))]
            if len(points) > 1:
                width = 2.2 if peer == KVWAL else 1.1
                (lines[peer],) = axes.plot(*zip(*points, strict=True), "o-", color=_COLOURS[peer], lw=width, ms=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(family, fontsize=9)
        axes.set_xlabel(what)
        axes.set_ylabel(unit)
        _plain(axes)
    _legend(figure, {peer: lines[peer] for peer in PEERS if peer in lines})
    return figure


def _latency(plt: Any, results: Results) -> Any:
    """Percentiles of single operations: idle drawn through, busy dashed."""
    shown = [op for op in ("put", "get") if f"latency.{op}.idle" in results.cases]
    if not shown:
        return None
    names = [*PERCENTILES, "max"]
    figure, panels = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False)
    lines: dict[str, Any] = {}
    for axes, operation in zip(panels[0], shown, strict=True):
        for state, style in (("idle", "-"), ("busy", "--")):
            for peer in PEERS:
                found = [results.figure(f"latency.{operation}.{state}", peer, name) for name in names]
                heights = [figure.median for figure in found if figure is not None]
                if len(heights) == len(names):
                    width = 2.2 if peer == KVWAL else 1.1
                    (line,) = axes.plot(names, heights, style, color=_COLOURS[peer], lw=width)
                    lines.setdefault(peer, line)
        axes.set_yscale("log")
        axes.set_ylabel("us")
        text = "durable put" if operation == "put" else "hot get"
        axes.set_title(f"{text}: idle (-), while it tends itself (- -)", fontsize=9)
        _plain(axes)
    _legend(figure, lines)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", linewidth=0.3)
    axes.set_axisbelow(True)


def _legend(figure: Any, lines: dict[str, Any]) -> None:
    figure.tight_layout()
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=6, bbox_to_anchor=(0.5, -0.12), frameon=False)
