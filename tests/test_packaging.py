"""What a user installs."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("kvwal").joinpath("py.typed").is_file()


def test_ci_runs_exactly_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2, "the README has one line that runs the main job and one that runs the tests"
    assert commands[1] in script.splitlines()


def test_the_versions_that_were_run_are_named() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [one.rpartition(" ")[2] for one in classifiers if one.startswith("Programming Language :: Python :: 3.")]
    assert named == ["3.11", "3.13", "3.14", "3.15"]
    assert f"other={named[2]}\n" in (ROOT / ".ci" / "run").read_text()


def test_everything_the_tests_need_is_in_the_extra_test() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cli", "msgspec", "eventsourcing", "test", "dev", "bench"} == set(extras)
    assert "kvwal[cli,msgspec,eventsourcing]" in extras["test"]
