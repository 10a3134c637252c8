"""The tool that draws small mutants: what it changes, what it calls dead, and what it remembers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from crashtests import mutate
from crashtests.small_mutants import KINDS, changes

ROOT = Path(__file__).parent.parent.parent

SOURCE = '''
"""A module."""

class Door:
    def enter(self, n, seen):
        """Doc."""
        assert n < 9
        if n >= 2 and seen:
            self.open = True
            seen.append(n)
        while not n:
            n = 3
        return n
'''

CHANGED = {
    "Door.enter:negate:1": "        if (not (n >= 2 and seen)):",
    "Door.enter:negate:2": "        while (not (not n)):",
    "Door.enter:bound:1": "        if n > 2 and seen:",
    "Door.enter:constant:1": "        if n >= 3 and seen:",
    "Door.enter:constant:2": "            n = 4",
    "Door.enter:drop:1": "            pass",
    "Door.enter:swap:1": "            seen.append(n)\n            self.open = True",
    "Door.enter:return:1": "        return\n        if n >= 2 and seen:",
    "Door.enter:return:2": "        return\n        while not n:",
    "Door.enter:return:3": "            return\n            self.open = True",
    "Door.enter:return:4": "            return\n            seen.append(n)",
    "Door.enter:return:5": "            return\n            n = 3",
}


def test_each_change_is_one_of_those_that_are_named() -> None:
    found = {change.name: change for change in changes(SOURCE)}
    assert set(found) == set(CHANGED)
    for name, text in CHANGED.items():
        assert text + "\n" in found[name].source, name
        assert SOURCE.splitlines()[found[name].line - 1].split()[0] in text or ":swap:" in name or ":drop:" in name
        added = [line[1:] for line in found[name].diff(SOURCE, "door.py").splitlines()[2:] if line.startswith("+")]
        assert added, name


def test_statements_that_name_what_the_other_assigns_keep_their_order() -> None:
    for body in ("a = f()\n    g(a)", "g(a)\n    a = f()", "a = 1\n    b = 2", "import a\n    f()"):
        source = f"def one(a=0):\n    {body}\n"
        assert not [change for change in changes(source) if change.kind == "swap"], body


def test_positions_count_bytes_and_not_letters() -> None:
    source = 'def one():\n    f("\u00e9\u00e8", 1); g(2)\n'
    texts = {change.name: change.source for change in changes(source)}
    assert texts["one:constant:1"] == 'def one():\n    f("\u00e9\u00e8", 2); g(2)\n'
    assert texts["one:drop:2"] == 'def one():\n    f("\u00e9\u00e8", 1); pass\n'


def test_every_kind_is_drawn_from_the_package_compiles_and_changes_something() -> None:
    drawn = mutate.draw(str(ROOT), ["kvwal.log", "kvwal.pages"], seed=random.randrange(1000), count=60)
    assert len({one.name for one in drawn}) == 60
    assert {one.change.kind for one in drawn} == set(KINDS)
    for one in drawn:
        original = (ROOT / one.path).read_text(encoding="utf-8")
        compile(one.change.source, one.path, "exec")
        assert one.change.diff(original, one.path).startswith(f"--- {one.path}\n+++ {one.path}\n@@")


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    def names(seed: int) -> list[str]:
        return [one.name for one in mutate.draw(str(ROOT), ["kvwal.log"], seed, 20)]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_a_part_of_a_module_is_all_that_is_drawn_from() -> None:
    drawn = mutate.draw(str(ROOT), ["kvwal.pages.tree:Tree.get"], 1, 1000)
    assert drawn
    assert {one.change.function for one in drawn} == {"Tree.get"}


def test_the_stages_begin_with_the_tests_that_mirror_the_module() -> None:
    found = [stage.name for stage in mutate.stages(str(ROOT), "kvwal.log.writer", 1.0)]
    assert found == ["tests/log/test_writer.py", "tests/log", "tests", "crash run"]
    assert [stage.name for stage in mutate.stages(str(ROOT), "kvwal.nowhere", 0.0)] == ["tests"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of two functions, of which the tests ask for one."""
    root = tmp_path / "tree"
    for folder in ("doors", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "doors" / "__init__.py").write_text("")
    (root / "doors" / "old.py").write_text(
        "def asked(n):\n    if n > 2:\n        n = 7\n    return n\n\n\n"
        "def unasked(n):\n    if n > 2:\n        n = 7\n    return n\n"
    )
    (root / "tests" / "test_old.py").write_text(
        "from doors.old import asked\n\n\ndef test_it():\n    assert (asked(2), asked(3)) == (2, 7)\n"
    )
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['slow: is slow']\n")
    return root


def run(tree: Path, *arguments: str) -> int:
    fixed = ["--module", "doors.old", "--tree", str(tree), "--jobs", "2", "--minutes", "0", "--tests", "tests"]
    return mutate.main([*fixed, "--out", str(tree / "known.jsonl"), *arguments])


def test_what_a_test_asks_for_dies_and_what_none_asks_for_survives(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, "--count", "100") == 1
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tree / "known.jsonl").read_text().splitlines()[1:]]
    killers = {line["mutant"].removeprefix("doors.old:"): line["killer"] for line in lines}
    assert set(killers) == {f"{of}:{kind}" for of in ("asked", "unasked") for kind in OF_EACH}
    for name, killer in killers.items():
        assert killer == ("tests: tests/test_old.py::test_it" if name.startswith("asked") else ""), name
    assert "survived: doors.old:unasked:bound:1 (doors/old.py:8)\n--- doors/old.py" in printed
    assert "5 of 10 mutants were killed, 5 survived" in printed
    assert (tree / "doors" / "old.py").read_text().count("n > 2") == 2, "the tree itself is left alone"


OF_EACH = ("negate:1", "bound:1", "constant:1", "constant:2", "return:1")


def test_a_second_run_goes_on_behind_the_first(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tree, "--only", "asked:bound:1")
    capsys.readouterr()
    assert run(tree, "--only", "asked:bound:1", "--only", "asked:negate:1") == 0
    assert "2 mutants, 1 of them known" in capsys.readouterr().out
    assert len((tree / "known.jsonl").read_text().splitlines()) == 3


def test_outcomes_of_another_text_are_refused(tree: Path) -> None:
    run(tree, "--only", "asked:bound:1")
    (tree / "doors" / "old.py").write_text("def asked(n):\n    return n + 0\n")
    with pytest.raises(SystemExit, match="another text"):
        run(tree)


def test_tests_that_fail_without_a_mutant_are_said_and_prove_nothing(tree: Path) -> None:
    (tree / "tests" / "test_old.py").write_text("def test_it():\n    raise AssertionError\n")
    with pytest.raises(SystemExit, match="fails without a mutant"):
        run(tree, "--only", "asked:bound:1")


def test_a_mutant_that_hangs_is_dead(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutate, "_GRACE_S", 1.0)
    (tree / "doors" / "old.py").write_text("def asked(n):\n    while n > 7:\n        n = n - 1\n    return min(n, 7)\n")
    (tree / "tests" / "test_old.py").write_text(
        "from doors.old import asked\n\n\ndef test_it():\n    assert asked(0) == 0\n"
    )
    assert run(tree, "--only", "asked:negate:1") == 0
    assert "took more than" in (tree / "known.jsonl").read_text()
