"""The command line, `kvwal` or `python -m kvwal`. It needs click and rich, which `pip install 'kvwal[cli]'` brings."""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

__all__ = ["main", "whole_app"]

#: sysexits.h: something that the program needs is not there.
_EXIT_UNAVAILABLE = 69
_EXIT_INTERRUPTED = 130
_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line with `sys.argv` and exit. The exit codes are listed in `kvwal.cli.app`."""
    try:
        import click  # noqa: F401  # only whether it is there
        import rich  # noqa: F401  # only whether it is there

        app = whole_app()
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        sys.stderr.write(f"kvwal: the command line needs {error.name}; install it with: pip install 'kvwal[cli]'\n")
        sys.exit(_EXIT_UNAVAILABLE)
    except KeyboardInterrupt:
        # While modules are loaded, which takes a good part of a short command.
        sys.stderr.write("kvwal: interrupted\n")
        sys.exit(_EXIT_INTERRUPTED)
    _see_to_stdin()
    _buffer_stdout()
    app(prog_name="kvwal")


def whole_app() -> click.Group:
    """The commands and the demos."""
    from kvwal.cli.app import app
    from kvwal.demo import demo

    app.add_command(demo)
    return app


class _Closed(io.RawIOBase):
    """Standard input or output where there is none."""

    def __init__(self, name: str, *, output: bool) -> None:
        self._name = name
        self._output = output
        self._is_told = False

    def readable(self) -> bool:
        return not self._output

    def writable(self) -> bool:
        return self._output

    def readinto(self, buffer: object) -> int:
        raise OSError(errno.EBADF, "it is closed", self._name)

    def write(self, data: Any) -> int:
        if self._is_told:
            # What is left is flushed once more as the interpreter ends, which would print that it fails.
            return memoryview(data).nbytes
        self._is_told = True
        raise OSError(errno.EBADF, "it is closed", self._name)


def _see_to_stdin() -> None:
    """A closed standard input is None, and then whatever looks at it fails: let only reading it fail."""
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Closed("standard input", output=False)), encoding="utf-8")


def _buffer_stdout() -> None:
    """Under `python -u` and PYTHONUNBUFFERED, standard output drops the rest of a write that a pipe took in part."""
    if sys.stdout is None:
        # It was closed: what prints fails, and nothing else does.
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Closed("standard output", output=True)), encoding="utf-8")
    elif isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(sys.stdout.buffer), encoding="utf-8", line_buffering=True)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


if __name__ == "__main__":
    main()
