"""The `kvwal` command: its subcommands, its exit codes, and what becomes of an error.

Exit codes (scripts rely on them: never change):

| code | meaning |
|---|---|
| 0 | done |
| 1 | no such key, or the answer to a question was no |
| 2 | the command line is wrong |
| 3 | the store, or a backup, is damaged or has a gap, or a demo found a broken promise |
| 4 | another process has the store open for writing, and the command writes |
| 5 | no store or backup there, something else or another store's backup there, or a format this version does not know |
| 6 | the machine failed: no space, no permission, a read or write error; or what was read went meanwhile |
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
from typing import Any, Final

import click

from kvwal import errors
from kvwal.cli import (
    archives,
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
from kvwal.cli.terminal import ASKED, EXIT_UNREADABLE, BadInput, NoSuchKey, complain
from kvwal.files import is_full

__all__ = ["app"]


class _App(click.Group):
    """A group of commands in the order they were added, whose errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except BrokenPipeError:
            _give_up_stdout()
            raise click.exceptions.Exit(141) from None
        except OSError as error:
            # Of the help, or the version, which are printed before a command is known.
            complain(_text(error))
            _give_up_stdout()
            raise click.exceptions.Exit(6) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # Flushed here, because at the end of the interpreter a closed pipe could no longer become an exit code.
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _give_up_stdout()
            ctx.exit(141)
        except (KeyboardInterrupt, click.Abort) as error:
            # At a question click makes an Abort of an interruption, and of the end of the input, which is a no.
            if isinstance(error, click.Abort) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            complain("interrupted")
            ctx.exit(130)
        except SystemExit as error:
            # Of a codec, or of the module that has it: what was asked for is not done, whatever that says.
            complain(f"a codec ended the program, with {error!r}")
            ctx.exit(EXIT_UNREADABLE)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:  # noqa: BLE001  # every error gets its exit code here
            code = _exit_code(error, is_asked=ASKED in ctx.meta)
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


def _exit_code(error: Exception, *, is_asked: bool) -> int:
    match error:
        case errors.SnapshotTooOld() | errors.FeedGap() if not is_asked or _went(error):
            return 6
        case NoSuchKey():
            return 1
        case errors.CorruptionError():
            return 3
        case errors.LockedError():
            return 4
        case errors.StoreNotFoundError() | errors.StoreExistsError() | errors.FormatError():
            return 5
        case errors.BackupDestinationError():
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


def _went(error: Exception) -> bool:
    """Whether what was asked for was there, and went while it was read."""
    return isinstance(error, errors.SnapshotTooOld) and (error.while_read or error.limit_bytes is not None)


# What to do next is said last in a text, for programs. Here it is that for the command line.
_ADVICE: Final[dict[type[Exception], str]] = {
    errors.CodecError: "--hex and --base64 show bytes as they are",
    errors.TableNotFoundError: "`kvwal tables PATH` lists those that there are",
    errors.IndexNotDeclaredError: "only a program that declares the index can put something into the table",
    errors.FeedGap: "without --after it begins with the oldest that is kept",
}
# And where it is said in other words of Python.
_WORDS: Final = (
    ('open it with flag "c" to make one', "`kvwal put` makes one"),
    ("parents=True makes it", "make it first"),
    ('open it with flag "r" to read it', "commands that only read it may be allowed"),
    ("kvwal.salvage(path, into)", "kvwal salvage PATH INTO"),
    ("one with history=True", "one with --history"),
    ("begin again with a new one, and read it in less time, or follow with a pin", "run the command again"),
)


def _text(error: Exception) -> str:
    """What the error says, without the number that an OSError puts in front."""
    advice = _ADVICE.get(type(error))
    if advice is not None:
        return f"{str(error).rpartition('; ')[0]}; {advice}"
    if not isinstance(error, OSError) or error.strerror is None:
        text = str(error) or type(error).__name__
    else:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
        if error.filename is None and is_full(error):
            # Of a store and of a backup the file is said.
            text = f"the output cannot be written: {text}"
    if isinstance(error, errors.NotInBackup):
        text += " with --at"
    for words, instead in _WORDS:
        text = text.replace(words, instead)
    return text


def _give_up_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush is quiet."""
    try:
        place = sys.stdout.fileno()
    except OSError:
        # It was closed from the beginning.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the end
        return
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, place)
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
    archives.archive,
    reports.salvage,
):
    app.add_command(_command)
