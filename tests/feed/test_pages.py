"""docs/feeds.md and docs/history.md say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvwal import Change, Commit

# What a command shows that is not what the page shows otherwise.
SHOWN = {"put": "", "stats": "position", "consumers": "mailer", "history": "put"}
DOCS = Path(__file__).parent.parent.parent / "docs"
FEEDS, HISTORY = ((DOCS / name).read_text() for name in ("feeds.md", "history.md"))


@pytest.mark.parametrize(
    ("text", "least", "shows"), [(FEEDS, 9, "user:"), (HISTORY, 12, "price")], ids=["feed", "past"]
)
def test_the_code_in_the_page_runs(tmp_path: Path, text: str, least: int, shows: str) -> None:
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert source.count("assert") >= least
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    [shell] = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in shell.splitlines():
        command = [sys.executable, "-m", *line.split()]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        wanted = next((text for word, text in SHOWN.items() if f"kvwal {word}" in line), shows)
        assert wanted in shown.stdout


@pytest.mark.parametrize("kind", [Change, Commit])
def test_every_field_of_a_feed_is_named(kind: type[Change | Commit]) -> None:
    names = kind._fields if issubclass(kind, Change) else [field.name for field in fields(kind)]
    assert not [name for name in names if f"`{name}`" not in FEEDS]


@pytest.mark.parametrize("field", ["seqno", "time_us", "time", "meta", "kind", "value"])
def test_every_field_of_a_key_version_is_named(field: str) -> None:
    assert f"`{field}`" in HISTORY
