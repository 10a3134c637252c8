"""docs/coming-from.md: each program runs, and one that comes from another store prints what it printed before."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent.parent / "docs" / "coming-from.md").read_text()
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n## ")}
# What each section needs beside kvwal and Python.
NEEDS = {
    "sqlitedict": "sqlitedict",
    "diskcache": "diskcache",
    "lmdb": "lmdb",
    "Works with: zict, and what spills through it": "zict",
    "Works with: requests-cache": "requests_cache",
}


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def programs(section: str) -> list[str]:
    """Those of a section, or the reason why they cannot run here."""
    peer = NEEDS.get(section)
    if peer is not None:
        try:
            importlib.import_module(peer)
        except ImportError:
            pytest.skip(f"{peer} is not installed; the extra dev has it")
    return blocks(section)


def output_of(program: str, path: Path) -> str:
    path.mkdir()
    result = subprocess.run([sys.executable, "-c", program], cwd=path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("section", ["dbm", "shelve", "sqlitedict", "diskcache", "lmdb"])
def test_the_program_prints_the_same_before_and_after(section: str, tmp_path: Path) -> None:
    before, after = programs(section)
    assert "kvwal" not in before
    assert "kvwal" in after
    printed = output_of(before, tmp_path / "before")
    assert printed == output_of(after, tmp_path / "after")
    assert printed.strip()


@pytest.mark.parametrize("section", [name for name in SECTIONS if name.startswith(("# ", "Frameworks", "Works"))])
def test_the_other_programs_run(section: str, tmp_path: Path, server: str) -> None:
    (program,) = programs(section)
    output_of(program.replace("http://127.0.0.1:8000/", server), tmp_path / "run")


def test_every_section_is_run() -> None:
    assert len(SECTIONS) == 9
    assert NEEDS.keys() <= SECTIONS.keys()


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"hello"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/"
        served.shutdown()
        thread.join()


def test_the_mapping_for_zict_passes_the_tests_of_zict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it ships for mappings that are read and written by several threads."""
    (program,) = programs("Works with: zict, and what spills through it")
    tests = pytest.importorskip("zict.tests.utils_test", reason="zict came without its tests")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(program, names)
    stored = names["Stored"]("mapping.kv")  # type: ignore[operator]
    try:
        tests.check_mapping(stored)
        stored.clear()
        tests.check_different_keys_threadsafe(stored)
        tests.check_same_key_threadsafe(stored)
    finally:
        stored.close()
