"""The terminal's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.peers import PEERS
from bench.results import KVWAL, Figure, Results, Verdict, ratio_to, ratio_to_best
from bench.targets import ROWS

__all__ = ["number", "show_against", "show_cases", "show_settings", "show_targets"]

_SHORT: Final = {"pwrite+fdatasync": "pwrite +sync", "dbm.sqlite3": "dbm .sqlite3"}


def number(value: float) -> str:
    """Three digits that matter."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def show_cases(console: Console, results: Results, only: Iterable[str] | None = None) -> None:
    """Every case: cost of each peer, and the ratio to the best of them."""
    wanted = set(only) if only is not None else set(results.cases)
    names = [name for name in PEERS if any(name in case["peers"] for id, case in results.cases.items() if id in wanted)]
    wide = console.width >= 80 + 11 * len(names)
    title = "cost (median, less is better); ratio to the best peer (above 1, kvwal is ahead)"
    table = Table(title=title, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("unit")
    shown = names if wide else [KVWAL]
    for name in shown:
        table.add_column(_SHORT.get(name, name), justify="right", style="dim" if PEERS[name].kind == "limit" else "")
    if not wide:
        table.add_column("best peer", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("spread", justify="right", style="dim")
    for id, case in results.cases.items():
        if id not in wanted:
            continue
        cells: list[str | Text] = [_cell(results, id, name) for name in shown]
        ratio = ratio_to_best(results, id)
        if not wide:
            best = results.figure(id, ratio.other) if ratio else None
            cells.append(f"{ratio.other} {number(best.median)}" if ratio and best else "")
        if ratio is None:
            cells += ["", ""]
        else:
            good = ratio.figure.median >= 1
            cells += [
                Text(f"{ratio.figure.median:.2f}x", style="green" if good else "red"),
                f"{ratio.figure.low:.2f}-{ratio.figure.high:.2f}",
            ]
        table.add_row(id, case["unit"], *cells)
    console.print(table)


def show_against(console: Console, results: Results, only: Iterable[str] | None = None) -> None:
    """An older commit beside today: every case, and every other figure that a target names."""
    wanted = set(only) if only is not None else set(results.cases)
    named = {(check.case, check.metric): None for row in ROWS for check in row.checks}
    for older in results.older:
        table = Table(title=f"against {results.data['versions'][older]} (above 1, today is ahead)", pad_edge=False)
        table.add_column("case", no_wrap=True)
        table.add_column("unit")
        for column in (older, KVWAL, "ratio", "spread"):
            table.add_column(column, justify="right")
        table.add_column("beyond its spread")
        for id in (id for id in results.cases if id in wanted and older in results.cases[id]["peers"]):
            unit = results.cases[id]["unit"]
            for metric in ["cost", *(metric for case, metric in named if case == id and metric != "cost")]:
                name = id if metric == "cost" else f"{id} ({metric})"
                table.add_row(name, unit, *_against(results, id, older, metric))
        if table.row_count:
            console.print(table)


def _against(results: Results, case: str, older: str, metric: str) -> list[str | Text]:
    """The cells of one line: then, now, ratio, spread, and the word where the whole spread is on one side of 1."""
    then, now = results.figure(case, older, metric), results.figure(case, KVWAL, metric)
    ratio = ratio_to(results, case, older, metric)
    if then is None or now is None or ratio is None:
        reason = results.why_not(case, KVWAL if now is None else older)
        return [number(then.median) if then else "-", number(now.median) if now else "-", "", "", reason]
    times = ratio.figure
    # Of three rounds all are on one side in a quarter of the cases where nothing has changed; of five in a sixteenth.
    sure = len(times.rounds) >= 5 and not times.low <= 1 <= times.high
    word, style = (("faster", "green") if times.median > 1 else ("slower", "red")) if sure else ("", "dim")
    cells: list[str | Text] = [number(then.median), number(now.median), Text(f"{times.median:.2f}x", style=style)]
    return [*cells, f"{times.low:.2f}-{times.high:.2f}", Text(word, style=style)]


def _cell(results: Results, case: str, peer: str) -> str | Text:
    figure: Figure | None = results.figure(case, peer)
    if figure is not None:
        return number(figure.median)
    reason = results.why_not(case, peer)
    return Text("failed", style="bold red") if reason.startswith("failed") else Text("-", style="dim")


def show_targets(console: Console, results: Results) -> None:
    """The targets and what became of them."""
    table = Table(title="targets", show_lines=True)
    for column in ("workload", "target", "measured", "verdict"):
        table.add_column(column, justify="left")
    for row in ROWS:
        verdicts = results.verdicts(row)
        measured = Text("\n").join(Text(v.text, style=_style(v)) for v in verdicts)
        table.add_row(row.workload, row.target, measured, _word(verdicts))
    console.print(table)


def _style(verdict: Verdict) -> str:
    return {True: "green", False: "red", None: "dim"}[verdict.met]


def _word(verdicts: list[Verdict]) -> Text:
    if any(v.met is False for v in verdicts):
        return Text("falls short", style="bold red")
    if any(v.met is None for v in verdicts):
        return Text("not all measured", style="yellow")
    return Text("met", style="bold green")


def show_settings(console: Console, results: Results) -> None:
    """How each peer was set, at each durability; and what could not be measured."""
    table = Table(title="settings", show_lines=True)
    table.add_column("peer")
    table.add_column("version")
    table.add_column("durability")
    table.add_column("settings", ratio=1)
    for name, version in results.data["versions"].items():
        for durability, settings in settings_of(results, name).items():
            table.add_row(name, version, durability, ", ".join(f"{k}={v}" for k, v in settings.items()))
    console.print(table)
    for name, reason in results.data["missing"].items():
        console.print(f"[yellow]{name} was not measured: {reason}[/yellow]")
    for id, case in results.cases.items():
        for name, found in case["peers"].items():
            if "failed" in found:
                console.print(f"[red]{id}: {name} failed: {found['failed']}[/red]")


def settings_of(results: Results, peer: str) -> dict[str, dict[str, Any]]:
    """By durability: the settings of the first case that has them."""
    found: dict[str, dict[str, Any]] = {}
    for case in results.cases.values():
        one = case["peers"].get(peer, {})
        if "settings" in one:
            found.setdefault(case["durability"], one["settings"])
    return found
