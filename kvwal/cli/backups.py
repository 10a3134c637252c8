"""`backup` and `restore`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime

import click

import kvwal
from kvwal.backup.choosing import Moment, as_moment
from kvwal.backup.making import BaseKind
from kvwal.cli.moments import MOMENT
from kvwal.cli.terminal import ASKED, PathType, complain, count, human_bytes, print_json, progress_bar, store_path

__all__ = ["WHEN", "backup", "earlier", "restore"]


@click.command()
@store_path
@click.argument("dest", type=PathType())
@click.option("--full", is_flag=True, help="All pages, also those that an earlier backup has.")
@click.option("--history", is_flag=True, help="Also every moment of the window.")
@click.option("--quiet", is_flag=True, help="Say nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def backup(path: str, dest: str, full: bool, history: bool, quiet: bool, as_json: bool) -> None:
    """Put the store PATH as it is now into the directory DEST, also beside a program that writes to it.

    What an earlier backup in DEST has is not written again. DEST is for one store, and those restored from it.
    """
    base: BaseKind = "full" if full else "auto"
    with kvwal.open(path, "r") as db, progress_bar("backup", quiet=quiet or as_json) as progress:
        task = progress.add_task("backup", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        report = db.backup(dest, base=base, history=history, progress=told)
    if as_json:
        _print_json(report)
    elif not quiet:
        made = f"{count(len(report.made), 'object')}, {human_bytes(report.bytes)}" if report.made else "nothing was new"
        click.echo(f"every commit up to {int(report.position)} is in {dest}: {made}, in {report.seconds:.2f} s")


def earlier(units: int, size: int) -> str:
    """That units before the base may be read as well."""
    before = f"{count(units, 'unit')} before it, {human_bytes(size)},"
    return f"if a consumer of that moment is behind the base, up to {before} are read as well"


def _print_json(report: kvwal.BackupReport | kvwal.RestoreReport) -> None:
    members = {field.name: getattr(report, field.name) for field in fields(report)}
    print_json({name: str(value) if isinstance(value, kvwal.Position) else value for name, value in members.items()})


class _WhenType(click.ParamType):  # type: ignore[type-arg]  # it has none before 8.2
    """What is restored."""

    name = "moment"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Moment:
        text = str(value)
        if ctx is not None:
            ctx.meta[ASKED] = True
        with suppress(ValueError):
            return as_moment(text)
        moment = MOMENT.convert(text, param, ctx)
        if isinstance(moment, datetime) and moment > datetime.now(UTC):
            self.fail(f"{text!r} is still to come; without --at it is the newest moment", param, ctx)
        return moment


#: As for `kvwal.restore`.
WHEN = _WhenType()


@click.command()
@click.argument("src", type=PathType())
@click.argument("into", type=PathType())
@click.option(
    "--at",
    type=WHEN,
    default="latest",
    help="The state after this commit (also as LINE:COMMIT), at this time (2026-01-31T12:00:00Z), or before:COMMIT. "
    "Otherwise the newest.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be read, and about how long it takes.")
@click.option("--quiet", is_flag=True, help="Say nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def restore(src: str, into: str, at: Moment, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Make a new store INTO of the backups, or the archive, in the directory SRC.

    INTO is nothing yet, or an empty directory, and no symbolic link. If this is interrupted, the same command goes on
    with what is done.

    --dry-run lists the objects for the moment itself, and says how much there is before the base: a restore reads the
    units of it that a consumer of that moment has not handled, and only the pages tell which.
    """
    with progress_bar("restore", quiet=quiet or as_json) as progress:
        task = progress.add_task("restore", total=None)
        report = kvwal.restore(
            src,
            into,
            at=at,
            dry_run=dry_run,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for name in report.damaged:
        complain(f"{name} is damaged and was done without; kvwal archive verify looks for more")
    if as_json:
        _print_json(report)
    elif dry_run:
        for name in report.objects:
            click.echo(name)
        read = f"{count(report.bases, 'base')} and {count(report.units, 'unit')}, {human_bytes(report.bytes)}"
        read += f" in {count(report.requests, 'request')}, {count(report.commits, 'commit')} to replay"
        complain(f"{read}: about {report.expected_s:.1f} s; nothing was done")
        if report.earlier_units:
            complain(earlier(report.earlier_units, report.earlier_bytes))
    elif not quiet:
        what = f"{human_bytes(report.bytes)} read, {count(report.commits, 'commit')} replayed"
        click.echo(f"{into} is as after commit {int(report.restored)}: {what}, in {report.seconds:.2f} s")
