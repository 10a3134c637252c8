"""A test of the suite as a part: it is for mutants that no program of the harness meets.

`first` is the test. In this process, so that what a mutant has changed is changed for the test as well.
"""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from crashtests.console import Result
from crashtests.workers import Run

_ROOT = Path(__file__).parent.parent
_OPTIONS = ("-q", "-x", "--no-header", "--capture=sys", "--hypothesis-seed=1", "-p", "no:cacheprovider")


def run(run: Run) -> Result:
    """Run the test, as long as it takes: a violation if it fails."""
    # Not with the others: they need no test runner.
    import pytest

    began_s, said = time.monotonic(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = pytest.main([*_OPTIONS, f"--rootdir={_ROOT}", f"{_ROOT}/{run.first}"])
    result = Result("tests", states=1, seconds=time.monotonic() - began_s)
    if status == pytest.ExitCode.TESTS_FAILED:
        reasons = re.findall(r"^E +(.*)", said.getvalue(), re.MULTILINE)
        result.violations.append(reasons[0] if reasons else "the test failed")
    elif status != pytest.ExitCode.OK:
        result.violations.append(f"the harness failed: {said.getvalue()[-500:]}")
    return result
