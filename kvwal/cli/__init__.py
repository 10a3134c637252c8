"""The command line. It needs click and rich, which `pip install 'kvwal[cli]'` brings; the library does not."""

from __future__ import annotations

import io
import sys

__all__ = ["main"]

#: sysexits.h: something that the program needs is not there.
_EXIT_UNAVAILABLE = 69


def main() -> None:
    """Run the command line with `sys.argv` and exit. The exit codes are listed in `kvwal.cli.app`."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        sys.stderr.write(f"kvwal: the command line needs {error.name}; install it with: pip install 'kvwal[cli]'\n")
        sys.exit(_EXIT_UNAVAILABLE)
    from kvwal.cli.app import app

    _buffer_stdout()
    app(prog_name="kvwal")


def _buffer_stdout() -> None:
    """Under `python -u` and PYTHONUNBUFFERED, standard output drops the rest of a write that a pipe took in part."""
    if isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(sys.stdout.buffer), encoding="utf-8", line_buffering=True)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
