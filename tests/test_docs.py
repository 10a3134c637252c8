"""The documents say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_code_in_the_readme_runs(tmp_path: Path) -> None:
    """As one program, in an empty directory, with every assert in it holding."""
    source = "\n".join(blocks(ROOT / "README.md", "python"))
    assert source.count("assert") > 10
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the shell lines are for a POSIX shell")
def test_the_shell_lines_in_the_readme_run(tmp_path: Path) -> None:
    script = [block for block in blocks(ROOT / "README.md", "sh") if block.startswith("kvwal ")]
    assert len(script) == 1
    function = f'kvwal() {{ "{sys.executable}" -m kvwal "$@"; }}\n'
    result = subprocess.run(
        ["sh", "-e", "-c", function + script[0]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "hello" in result.stdout
    assert "everything holds" in result.stdout


def test_the_exit_codes_are_the_same_wherever_they_are_listed() -> None:
    row = re.compile(r"^\| (\d+) \|", re.MULTILINE)
    from kvwal.cli import app

    readme = [int(code) for code in row.findall((ROOT / "README.md").read_text())]
    assert set(readme) <= {int(code) for code in row.findall(app.__doc__ or "")}


def test_the_limits_in_the_readme_are_those_of_the_code() -> None:
    from kvwal import MAX_BATCH_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES

    text = (ROOT / "README.md").read_text()
    assert f"| key | 0 to {MAX_KEY_BYTES:,} bytes |" in text
    assert f"| value | 0 to {MAX_VALUE_BYTES >> 30} GiB |" in text
    assert f"| one commit | {MAX_BATCH_BYTES >> 30} GiB of keys and values" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`((?:kvwal|tests|docs)/[\w/]+\.\w+)`", document.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
