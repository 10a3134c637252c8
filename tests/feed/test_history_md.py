"""docs/history.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent.parent / "docs" / "history.md").read_text()


def test_the_code_in_the_document_runs(tmp_path: Path) -> None:
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    assert source.count("assert") > 6
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    [shell] = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in shell.splitlines():
        command = [sys.executable, "-m", *line.split()]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        assert "put" in shown.stdout


@pytest.mark.parametrize("field", ["seqno", "time_us", "time", "meta", "kind", "value"])
def test_every_field_of_a_key_version_is_named(field: str) -> None:
    assert f"`{field}`" in TEXT
