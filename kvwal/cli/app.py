"""The `kvwal` command: its subcommands, its exit codes, and what becomes of an error.

Exit codes (scripts rely on them: never change):

| code | meaning |
|---|---|
| 0 | done |
| 1 | no such key, or the answer to a question was no |
| 2 | the command line is wrong |
| 3 | the store is damaged, or a demo found a broken promise |
| 4 | another process has the store open for writing, and the command writes |
| 5 | no store there, something else there, or a store of a format this version does not know |
| 6 | the machine failed: no space, no permission, a read or write error |
| 7 | a line of the input of `load` is not what it should be |
| 8 | a value of a table, or a key, cannot be read with its codec |
| 69 | click or rich is not installed |
| 70 | a bug in kvwal; the traceback is shown |
| 130 | interrupted |
| 141 | the program that read the output has gone (as for any program that SIGPIPE ends) |

Results go to standard output, everything else to standard error. Colour, tables, the pager and progress bars are
for terminals only: in a pipe the output is plain, one thing a line, its fields separated by tabs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from importlib import metadata
from typing import Any

import click

from kvwal import errors
from kvwal.cli import (
    backups,
    changes,
    consumers,
    entries,
    history,
    key_history,
    migrate,
    moments,
    reports,
    tables,
    transfer,
)
from kvwal.cli.terminal import EXIT_UNREADABLE, BadInput, NoSuchKey, complain

__all__ = ["app"]


class _App(click.Group):
    """A group of commands in the order they were added, whose errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # Flushed here, because at the end of the interpreter a closed pipe could no longer become an exit code.
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _give_up_stdout()
            ctx.exit(141)
        except KeyboardInterrupt:
            complain("interrupted")
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001  # every error gets its exit code here
            code = _exit_code(error)
            if code == 70:
                traceback.print_exc()
                complain("this is a bug in kvwal; please report it with the lines above")
            else:
                complain(_text(error))
            try:
                sys.stdout.flush()
            except OSError:
                _give_up_stdout()
            ctx.exit(code)


def _exit_code(error: Exception) -> int:
    match error:
        case NoSuchKey():
            return 1
        case errors.CorruptionError():
            return 3
        case errors.LockedError():
            return 4
        case errors.StoreNotFoundError() | errors.StoreExistsError() | errors.FormatError():
            return 5
        case BadInput():
            return 7
        case errors.CodecError():
            return EXIT_UNREADABLE
        case errors.InternalError():
            return 70
        case errors.ReadOnlyError() | errors.EnvironmentFailure() | OSError() | MemoryError():
            return 6
        case errors.UsageError():
            return 2
        case errors.Error():
            return 6
        case _:
            return 70


def _text(error: Exception) -> str:
    """What the error says, without the number that an OSError puts in front."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"


def _give_up_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush is quiet."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _version() -> str:
    try:
        return metadata.version("kvwal")
    except metadata.PackageNotFoundError:
        return "unknown (run from its sources)"


@click.group(cls=_App, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version())
def app() -> None:
    """An embedded, ordered, transactional key-value store that survives power loss.

    PATH is the store's directory. Start with: kvwal demo
    """


for _command in (
    entries.get,
    entries.put,
    entries.delete,
    entries.scan,
    transfer.load,
    transfer.dump,
    tables.tables,
    tables.table,
    migrate.migrate,
    reports.stats,
    reports.verify,
    history.log,
    changes.changes,
    key_history.history,
    moments.diff,
    consumers.consumers,
    reports.checkpoint,
    reports.compact,
    backups.backup,
    backups.restore,
    reports.salvage,
):
    app.add_command(_command)
