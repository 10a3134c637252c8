"""Followers that are stopped and continued while the writer uses pages again return no wrong pair."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from crashtests.stopped import change, expected, one_life, value_of

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")


@pytest.mark.parametrize(
    "stops", [pytest.param(30, id="some"), pytest.param(2000, id="many", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_follower_that_is_stopped_anywhere_returns_no_wrong_pair(tmp_path: Path, seed: int, stops: int) -> None:
    done, pairs, gone, rebases = one_life(str(tmp_path), seed, stops)
    assert done == stops
    assert pairs > 100 * stops
    assert rebases
    assert gone or stops < 100


def test_what_is_expected_is_what_the_commits_did() -> None:
    content: dict[int, bytes | None] = {}
    for commit in range(1, 60):
        for key in range(120):
            found = change(commit, key)
            if not isinstance(found, str):
                content[key] = found
        assert {key: expected(key, commit) for key in range(120)} == content
    assert None in content.values()
    assert max(len(value_of(key, 9)) for key in range(120)) > 4096 > min(len(value_of(key, 9)) for key in range(120))
