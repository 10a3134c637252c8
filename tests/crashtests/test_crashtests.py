"""The crash tests themselves work: a small pass of each part, and every mutant still fits the code."""

import dataclasses
import fnmatch
import os
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path

import pytest

import kvwal
from crashtests import bitflips, faults, filesystems, interruptions, isolation
from crashtests.__main__ import PARTS
from crashtests.backup_mutations import BACKUP_MUTANTS
from crashtests.console import Progress
from crashtests.explorer import Case, Explorer, Limits, Tally
from crashtests.history import Violation
from crashtests.mutants import ALL, hunt
from crashtests.mutations import MUTANTS, DoesNotApply, Edit, Mutant, applied
from crashtests.programs import NAMED
from crashtests.session import Session
from crashtests.workers import Run
from kvwal.engine import engine
from kvwal.feed.owned import OwnedConsumer
from kvwal.testing import SimulatedDisk

ROOT = Path(__file__).parent.parent.parent
SMALL = Limits(choices=8, depth=2, nested_every=8, nested_choices=2)


def explore(program, **options):
    tally = Tally()
    Explorer(SMALL, tally, seed=1, options=options).explore(program)
    return tally


@pytest.mark.parametrize(
    "name", ["three puts", "a tail that no flush covered", "checkpoints", "killed", "rotation", "acknowledgements"]
)
def test_a_program_stands_every_cut(name):
    options, program = NAMED[name]
    tally = explore(program, **options)
    assert tally.violations == []
    assert tally.states > 50


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_every_mutant_still_fits_the_code(mutant):
    with applied(mutant):
        pass


def test_at_least_twenty_five_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 25


def test_a_violation_is_found_and_replayed_from_its_text():
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "a transaction is recovered in part")
    with applied(mutant):
        tally = explore([["batch", [[1, 30], [2, 30]]]])
        _, case = tally.violations[0]
        assert isinstance(case, Case)
        replayed = Case.parse(case.text())
        with pytest.raises(Violation):
            Explorer(SMALL, Tally(), seed=replayed.seed).replay(replayed)
    Explorer(SMALL, Tally(), seed=replayed.seed).replay(replayed)


def test_the_program_of_large_segments_has_one_shortened_and_one_gone_on_with():
    options, program = NAMED["closed large, and on"]
    disk = SimulatedDisk(seed=1)
    session = Session(disk, options=options)
    session.open()
    disk.trace = []
    session.run(program)
    shortened = [op.path for op in disk.trace if op.name == "truncate" and ".log" in op.path]
    assert len(shortened) == 1
    # The commit after the first close began the newest segment, and the one after the second close is in it as well.
    newest = session.store.engine._log.segments()[-1]
    assert newest.name not in shortened[0]
    assert newest.first_seqno <= session.store.last_seqno - 2


def test_the_same_seed_explores_the_same_states():
    program = NAMED["checkpoints"][1]
    one, other = explore(program), explore(program)
    assert (one.states, one.nested, one.points) == (other.states, other.nested, other.points)


def test_a_store_that_is_closed_within_a_cut_is_closed_when_that_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close from within a call is ended by another thread: what a cut then finds would be a matter of luck."""
    closing: list[threading.Thread] = []
    monkeypatch.setattr(engine, "_closing", closing)
    options, program = NAMED["a tail that no flush covered"]
    assert explore(program, **options).violations == []
    assert closing == []


def test_some_faults_of_each_kind_are_answered_as_the_contract_says():
    seen = set()
    for name, operation, way in faults.listed(seed=3):
        kind = (way.effect, way.error, way.forever, way.after)
        if kind not in seen:
            seen.add(kind)
            faults.FaultCase(name, operation, way).run()
    assert len(seen) > 20


def test_some_damage_of_each_kind_is_answered_with_right_data_or_an_error():
    seen = {}
    for built, damage in bitflips.every_damage(seed=3):
        kind = (damage.closed, damage.text.split(":")[0])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 6:
            bitflips.examine(built, damage)
        elif kind[1] == "flip":
            break
    assert len(seen) >= 12


@pytest.mark.parametrize(("way", "least"), [("put", 20), ("prepared-roll", 60), ("roll", 60), ("checkpoint", 50)])
@pytest.mark.parametrize("error", ["K", "M"])
def test_an_interrupted_step_is_written_or_not(way, least, error):
    places = interruptions.places_of(way, error)
    assert places > least
    for place in range(1, places, 1 + places // 60):
        case = interruptions.Case.parse(f"{way}:{place}:{error}")
        assert str(case) == f"{way}:{place}:{error}"
        interruptions.examine(case)


def test_a_place_that_there_is_not_is_no_case():
    assert not interruptions.examine(interruptions.Case("put", "K", 10_000))


@pytest.mark.parametrize("way", isolation.WAYS)
def test_rounds_of_list_appends_are_strictly_serializable(way):
    for seed in range(3):
        played, error = isolation.try_round(way, seed)
        assert error is None, (way, seed)
        assert played.deaths >= 3


def test_a_round_of_steps_is_the_same_every_time():
    one, other = (isolation.try_round("steps", 7)[0] for _ in range(2))
    assert one.history == other.history


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc who is alive")
def test_what_a_killed_run_left_behind_is_swept_away_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # No process has this number: it is beyond what Linux gives out.
    dead, alive, foreign = (tmp_path / f"kvwal-filesystems-{n}-x" for n in ("999999999", os.getpid(), "mine"))
    for directory in (dead, alive, foreign):
        (directory / "ext4").mkdir(parents=True)
    assert filesystems.sweep() == [str(dead)]
    assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()


@pytest.mark.parametrize("lie", ["nothing", "another", "one less"])
def test_a_store_that_lies_about_what_its_commits_say_is_found(lie, monkeypatch):
    session = Session(SimulatedDisk())
    session.open()
    session.run([["said", 1, 50], ["put", 2, 50], ["said", 3, 50], ["kill"], ["look"]])
    told = list(session.store.commits())
    lies = {
        "nothing": [dataclasses.replace(commit, meta={}) for commit in told],
        "another": [dataclasses.replace(commit, meta={"commit": "1"}) for commit in told],
        "one less": told[:-1],
    }
    monkeypatch.setattr(kvwal.Store, "commits", lambda store: iter(lies[lie]))
    with pytest.raises(Violation, match="commits say"):
        session.look()


@pytest.mark.parametrize("lie", ["one less", "one twice", "an old one", "another position"])
def test_a_consumer_that_lies_is_found(lie, monkeypatch):
    session = Session(SimulatedDisk())
    session.open()
    session.run([["project"], ["put", 1, 50], ["project"], ["put", 2, 50], ["put", 3, 50]])
    collect, change = OwnedConsumer._collect, OwnedConsumer._change

    def collected(consumer, feed):
        changes = collect(consumer, feed)
        lies = {"one less": changes[:-1], "one twice": changes + changes[-1:], "an old one": changes[:1] * 2}
        return lies.get(lie, changes)

    def changed(consumer, function, *arguments, **options):
        if lie == "another position":
            position = consumer._row.position + 1
            return change(consumer, lambda row: dataclasses.replace(row, position=position), *arguments, **options)
        return change(consumer, function, *arguments, **options)

    monkeypatch.setattr(OwnedConsumer, "_collect", collected)
    monkeypatch.setattr(OwnedConsumer, "_change", changed)
    with pytest.raises(Violation):
        session.run([["project"], ["look"]])


def test_every_step_of_the_random_programs_exists():
    session = Session(SimulatedDisk())
    for _, program in NAMED.values():
        for step in program:
            assert hasattr(session, "_do_" + step[0])


def test_the_example_in_the_documentation_runs():
    text = Path(__file__).parent.parent.parent.joinpath("docs", "crash-testing.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    namespace = {}
    exec(example, namespace)
    namespace["test_payments_survive_every_power_cut"]()


def test_the_documentation_names_every_part():
    text = Path(__file__).parent.parent.parent.joinpath("docs", "crash-testing.md").read_text(encoding="utf-8")
    for part in PARTS:
        assert f"| {part} |" in text


def test_what_a_mutant_begins_with_are_cases_that_exist():
    """Else the search still finds it, but not at once, and the run takes minutes longer."""
    names = {
        "exhaustive": set(NAMED),
        "faults": {faults.case_of(*case) for case in faults.listed(seed=1)},
        "bitflips": {bitflips.case_of(case) for case in islice(bitflips.every_damage(seed=1), 5000)},
        "isolation": {*islice(isolation.rounds(seed=1), 9), *map(str, islice(interruptions.cases(seed=1), 2000))},
    }
    for mutant in MUTANTS:
        if mutant.first and mutant.part != "tests":
            assert fnmatch.filter(names[mutant.part], mutant.first), mutant.name


def test_a_test_that_kills_a_defect_exists():
    by_tests = [mutant for mutant in ALL if mutant.part == "tests"]
    assert len(by_tests) > len(BACKUP_MUTANTS)
    for mutant in by_tests:
        path, _, name = mutant.first.partition("::")
        assert f"def {name}(" in ROOT.joinpath(path).read_text(encoding="utf-8"), mutant.name


def test_a_defect_is_killed_by_its_test_and_by_nothing_else():
    mutant = next(mutant for mutant in BACKUP_MUTANTS if mutant.name == "what thinning leaves is not proved")
    code = (
        "from crashtests.console import Progress\n"
        "from crashtests.mutants import ALL, hunt\n"
        "from crashtests.suite import run\n"
        "from crashtests.workers import Run\n"
        f"mutant = next(mutant for mutant in ALL if mutant.name == {mutant.name!r})\n"
        "whole = Run(1, 0.0, 0.0, 1, Progress(quiet=True), True, mutant.first)\n"
        "print(hunt(mutant, whole).violations, run(whole).violations)\n"
    )
    # In a process of its own: this one has a test runner at work.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['Failed: DID NOT RAISE BackupDestinationError'] []\n"


def test_a_mutant_that_changes_nothing_does_not_apply():
    same = Edit("kvwal.engine.commit:CommitQueue.put", "log.sync()", "log.sync()")
    with pytest.raises(DoesNotApply, match="the same as before"), applied(Mutant("none", "exhaustive", (same,))):
        pass


def test_a_mutant_is_hunted_until_the_part_that_is_named_finds_it():
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "a read error is the end of the log")
    found = hunt(mutant, Run(1, 0.0, 0.0, 1, Progress(quiet=True)))
    assert "acknowledged commits are missing" in found.violations[0]
