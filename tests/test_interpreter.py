"""In which interpreters kvwal may be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

IN_SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import sys
import kvwal
code = '''
import sys
sys.path[:] = PATH
try:
    import kvwal
except ImportError as error:
    assert "sub-interpreter" in str(error), error
    sys.stdout.write("refused")
else:
    sys.stdout.write("imported")
'''.replace("PATH", repr(sys.path))
run = getattr(interpreters, "run_string", None) or interpreters.exec
one = interpreters.create()
failure = run(one, code)
assert failure is None, failure
interpreters.destroy(one)
sys.stdout.write(" there, and the main one goes on")
"""

FREE_THREADED = "import sys; sys._is_gil_enabled = lambda: False; import kvwal"
BUILT_FREE_THREADED = (
    "import sys; sys._is_gil_enabled = lambda: True; sys.version = '3.14.0 free-threading build (main)'; import kvwal"
)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_a_subinterpreter_is_refused_and_the_main_one_is_not() -> None:
    done = run(IN_SUBINTERPRETER)
    assert done.stdout == "refused there, and the main one goes on", done.stderr


@pytest.mark.parametrize("program", [FREE_THREADED, BUILT_FREE_THREADED])
def test_free_threaded_python_is_refused_at_import_with_the_reason(program: str) -> None:
    done = run(program)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: kvwal does not run on free-threaded CPython yet")


def test_the_default_build_is_not_refused() -> None:
    done = run("import sys; sys._is_gil_enabled = lambda: True; import kvwal; print(kvwal.__version__)")
    assert done.returncode == 0, done.stderr
