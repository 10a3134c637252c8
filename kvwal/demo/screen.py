"""What the demo shows: a row for every kill, a picture, the answers and what was proved. 80 columns are enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from kvwal.cli.picture import LEGEND, Extent, bar, coloured, drawing
from kvwal.cli.terminal import human_bytes
from kvwal.demo.killing import Death
from kvwal.demo.promise import Answer, Recount

if TYPE_CHECKING:
    from kvwal.engine.recovery import RecoveryReport

__all__ = ["Inspection", "Screen"]

_PICTURE_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found after a kill. Without a report there was no store yet, and nothing acknowledged."""

    death: Death
    acked: int
    recovery: RecoveryReport | None = None
    extent: Extent | None = None
    finding: Recount | None = None
    read_only: bool = False


class _Console(Console):
    """A console that leaves a reader that has gone to the command line, which has an exit code for it."""

    def on_broken_pipe(self) -> None:
        # It is called where the BrokenPipeError is handled.
        raise


class Screen:
    """Prints the demo. `quiet` prints nothing (the result goes out as JSON)."""

    def __init__(self, *, quiet: bool, unit: str) -> None:
        self._console = _Console(quiet=quiet, highlight=False)
        self._errors = _Console(stderr=True, highlight=False)
        self._unit = unit

    def introduce(self, text: str, kills: int, seed: int) -> None:
        """Say what will happen, and head the table."""
        self._console.print(text)
        self._console.print(
            f"The writing process is killed (SIGKILL) {kills} times, at random moments; each time the store is opened "
            f"and compared with the real thing. Repeat with --seed {seed}."
        )
        self._print(Text(f"\n{LEGEND}\n", style="dim"))
        head = f"{'kill':>4} {'while':<7} {'acked':>6} {'found':>6} {'replayed':>13} {'cut':>6} {'opened':>6} commits"
        self._print(Text(head, style="bold"))

    def row(self, number: int | None, inspection: Inspection) -> None:
        """A kill, or (None) the life that was allowed to finish, and what was there after it."""
        death, report = inspection.death, inspection.recovery
        label = "" if number is None or death.moment == "finished" else str(number)
        moment = "-" if death.moment == "finished" else death.moment
        line = Text(f"{label:>4} {moment:<7} {inspection.acked:>6,} ")
        if report is None or inspection.extent is None or inspection.finding is None:
            line.append("no store yet, and nothing acknowledged")
        else:
            replayed = f"{report.records:,} {human_bytes(report.bytes_replayed):>7}"
            cut = human_bytes(report.cut_bytes) if report.cut_bytes else "-"
            line.append(f"{inspection.finding.found:>6,} {replayed:>13} {cut:>6} {report.seconds * 1000:>3.0f} ms ")
            line.append_text(bar(inspection.extent, _PICTURE_COLUMNS))
            line.append(" ok", style="green")
        self._print(line)

    def last_picture(self, inspection: Inspection) -> None:
        """The store as the last opening found it, larger."""
        if inspection.extent is None or inspection.recovery is None or inspection.finding is None:
            return
        self._console.print()
        for line in drawing(inspection.extent, 40):
            self._print(line)
        self._console.print(f"check {inspection.finding.text}")

    def answer(self, answer: Answer) -> None:
        """A question and its answer."""
        self._console.print(f"\n[bold]{answer.question}[/bold]")
        for line in answer.lines:
            self._print(coloured(f"  {line}"))

    def proved(self, killed: int, text: str, verified: Any, seconds: float) -> None:
        """The end of a run in which everything held."""
        kills = "one kill" if killed == 1 else f"{killed} kills"
        self._console.print(
            f"\n[bold green]Proved[/bold green] with {kills} in {seconds:.0f} s: {text}. "
            f"verify read {verified.pages:,} pages and {verified.records:,} log records, and everything holds."
        )
        self._console.print(
            "Not proved here: a power cut. A kill leaves the system's cache alone; crashtests/ cuts the power of a "
            "simulated disk.",
            style="dim",
        )

    def note(self, text: str) -> None:
        """Something the reader should know."""
        self._console.print(f"Note: {text}.", style="yellow")

    def broken(self, text: str, path: str, seed: int) -> None:
        """The end of a run in which something did not hold."""
        self._errors.print(Text(f"BROKEN: {text}", style="bold red"), soft_wrap=True)
        self._errors.print(f"The store is kept in {path}; the seed was {seed}.", soft_wrap=True)

    def _print(self, line: Text) -> None:
        # A row stays one line: a narrow terminal cuts it off, a pipe gets all of it. (A lone `soft_wrap` means "as it
        # is"; with `no_wrap` or `overflow` beside it rich folds after all.)
        if self._console.is_terminal:
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(line, soft_wrap=True)
