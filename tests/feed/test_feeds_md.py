"""docs/feeds.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvwal import Change, Commit

TEXT = (Path(__file__).parent.parent.parent / "docs" / "feeds.md").read_text()


def test_the_code_in_the_document_runs(tmp_path: Path) -> None:
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    assert source.count("assert") > 8
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    [shell] = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in shell.splitlines():
        command = [sys.executable, "-m", *line.split()]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        assert "user:" in shown.stdout or line.startswith("kvwal put")


@pytest.mark.parametrize("kind", [Change, Commit])
def test_every_field_is_named(kind: type[Change | Commit]) -> None:
    for field in fields(kind):
        assert f"`{field.name}`" in TEXT
