"""Whether kvwal may run in this interpreter: looked at by importing this module, before anything else of the package.

Two kinds of interpreter are refused, because what kvwal promises was never shown there:

- Free-threaded CPython: that a commit becomes visible as one `dict.update`, and that a dict keeps the order of its
  keys while another thread adds some, is the doing of the global interpreter lock.
- Sub-interpreters: two of one process would each have a copy of what is to be there once a process, and a thread that
  writes a store could outlive the interpreter that began it.
"""

from __future__ import annotations

import importlib
import sys


def _refuse_unsupported() -> None:
    """Raise ImportError in an interpreter where kvwal was never shown to work."""
    # What the build is counts, not what it is set to: with PYTHON_GIL=1 it has a lock that was never tried here either.
    if not getattr(sys, "_is_gil_enabled", lambda: True)() or "free-threading build" in sys.version:
        raise ImportError(
            "kvwal does not run on free-threaded CPython yet: its guarantees to several threads lean on the global "
            "interpreter lock; use the default build of Python"
        )
    if _in_subinterpreter():
        raise ImportError(
            "kvwal does not run in a sub-interpreter: import it in the main one, and use threads or processes; under "
            "mod_wsgi, set WSGIApplicationGroup %{GLOBAL}"
        )


def _in_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


_refuse_unsupported()
