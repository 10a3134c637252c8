"""One seed for a whole run, printed first, so that any failure can be run again: `pytest --hypothesis-seed=N`.

In CI (where the variable CI is set) Hypothesis takes the same examples each time, so that a change is judged by
itself; everywhere else it explores.
"""

from __future__ import annotations

import gc
import os
import random
import signal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine

# Under `python -O` only the asserts that pytest rewrites are left.
pytest.register_assert_rewrite(
    "aio_fixtures",
    "archive_fixtures",
    "backup_fixtures",
    "engine_fakes",
    "group_fixtures",
    "log_rig",
    "pages_fixtures",
    "past_fixtures",
    "recorded_feeds",
    "recorded_programs",
    "store_fixtures",
    "two_programs",
    "wrapped_files",
)

# No deadline for an example, nor for making one: the machine may be busy, and pytest's own timeout ends what hangs.
settings.register_profile("kvwal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvwal")
# Hypothesis makes a failing example smaller for up to five minutes, which is the limit of a test: pytest would end it
# with nothing reported. There is no public setting; tests/test_reports.py notices if this one has gone.
engine.MAX_SHRINKING_SECONDS = 60


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed before Hypothesis reads its option, and take Ctrl-C."""
    # A shell lets what runs in its background ignore the signal, and so would programs that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(int.from_bytes(os.urandom(4)))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: repeat this run with --hypothesis-seed={config.getoption('--hypothesis-seed')}"


@pytest.fixture(autouse=True, scope="module")
def _heap_of_this_module() -> None:
    """Collections look at what this module made and not at all before: a run takes a tenth less."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that differs between tests and is the same when the run's seed is."""
    run = request.config.getoption("--hypothesis-seed")
    return random.Random(f"{run}:{request.node.nodeid}").getrandbits(64)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Randomness for a test, repeatable from the run's seed."""
    return random.Random(seed)
