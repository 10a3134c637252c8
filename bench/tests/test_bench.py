"""The benchmark's own arithmetic. Run with: python -m pytest bench/tests"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import data, report
from bench.__main__ import _SWITCHES, _command_first, _parser, main
from bench.peers import PEERS, How
from bench.plan import Scale, cases
from bench.results import Results, ratio_to_best
from bench.run import Runner, _copy
from bench.targets import ROWS, Check


def results(**peers: list[float]) -> Results:
    found = Results()
    rounds = {
        name: [{"cost": cost, "ops": 1, "seconds": 1.0, "extra": {}} for cost in costs] for name, costs in peers.items()
    }
    found.cases["case"] = {"unit": "us", "peers": {name: {"rounds": one} for name, one in rounds.items()}}
    return found


def test_every_target_names_cases_that_exist() -> None:
    ids = {case.id for case in cases(Scale())}
    for row in ROWS:
        for check in row.checks:
            assert check.case in ids
            assert not check.other or check.other in ids


def test_a_quick_run_has_a_case_for_every_target() -> None:
    ids = {case.id for case in cases(Scale.small())}
    assert all(any(check.case in ids for check in row.checks) for row in ROWS)


def test_every_case_names_peers_that_exist_and_kvwal() -> None:
    for case in cases(Scale()):
        assert set(case.peers) <= set(PEERS)
        assert "kvwal" in case.peers


def test_the_best_peer_is_the_one_with_the_lowest_median_and_never_a_limit() -> None:
    found = ratio_to_best(results(kvwal=[1, 1, 1], lmdb=[3, 9, 3], plyvel=[4, 4, 1], dict=[0.1, 0.1, 0.1]), "case")
    assert found is not None
    assert (found.other, found.figure.median) == ("lmdb", 3)


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine was ten times slower in the second round; both were."""
    found = ratio_to_best(results(kvwal=[1, 10, 1], lmdb=[2, 20, 2]), "case")
    assert found is not None
    assert found.figure.rounds == (2, 2, 2)


@pytest.mark.parametrize(
    ("check", "met"),
    [
        (Check("case", "best", 2), True),
        (Check("case", "best", 2.1), False),
        (Check("case", "best", 5, ("sqlite3",)), True),
        (Check("case", "best", 1, ("plyvel",)), None),
        (Check("case", "limit", 10, ("dict",)), True),
        (Check("case", "limit", 9, ("dict",)), False),
        (Check("case", "itself", 1, other="case"), True),
        (Check("case", "most", 1), True),
        (Check("case", "most", 0.9), False),
        (Check("elsewhere", "most", 1), None),
    ],
)
def test_verdict(check: Check, met: bool | None) -> None:
    found = results(kvwal=[1.0], lmdb=[2.0], sqlite3=[5.0], dict=[0.1])
    assert found._verdict(check).met is met


def test_the_report_leaves_what_is_written_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "benchmarks.md"
    report.write_report(Results(), str(document))
    text = document.read_text().replace("# Benchmarks", "# Benchmarks by hand")
    document.write_text(text)
    report.write_report(Results(), str(document))
    assert document.read_text() == text


def test_keys_are_distinct_and_sorted_keys_are_the_same_ones() -> None:
    some = [data.key(n) for n in range(5000)]
    assert len(set(some)) == 5000
    assert sorted(some) == list(data.sorted_keys(5000))
    assert {len(one) for one in some} == {data.KEY_BYTES}


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 100_000])
def test_zipfian_ranks_fall_off_as_they_should(count: int) -> None:
    rank = data.zipf(count, random.Random(1))
    seen = Counter(rank() for _ in range(50_000))
    assert min(seen) >= 0
    assert max(seen) < count
    if count >= 1000:
        assert seen[0] / seen[1] == pytest.approx(2**0.99, rel=0.1)


def test_a_copy_keeps_the_data_and_the_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.write(b"head")
        file.seek(50 << 20)
        file.write(b"middle")
        file.truncate(1 << 30)
    _copy(str(source), str(tmp_path / "target"))
    copied = os.stat(tmp_path / "target" / "sparse")
    assert copied.st_size == 1 << 30
    assert copied.st_blocks * 512 < 1 << 20
    with open(tmp_path / "target" / "sparse", "rb") as file:
        assert file.read(4) == b"head"
        file.seek(50 << 20)
        assert file.read(6) == b"middle"


def test_a_case_runs_in_children_and_a_missing_operation_is_said(tmp_path: Path) -> None:
    scale = Scale(keys=200, big=2000, load=200, rounds=2, seconds=0.01)
    case = next(case for case in cases(scale) if case.id == "scan.100")
    runner = Runner(str(tmp_path), scale, ("sqlite3", "dict"))
    steps: list[str] = []
    found: dict[str, Any] = runner.run(case, steps.append)
    assert len(found["peers"]["sqlite3"]["rounds"]) == 2
    assert found["peers"]["dict"] == {"not_offered": "no ordered scan"}
    assert steps == ["sqlite3", "dict", "dict", "sqlite3"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], ["run"]),
        (["--quick", "--width", "90"], ["run", "--quick", "--width", "90"]),
        (["--width", "90", "show"], ["show", "--width", "90"]),
        (["--width=90", "show"], ["show", "--width=90"]),
        (["--quick", "run", "--rounds", "1"], ["run", "--quick", "--rounds", "1"]),
        (["--only", "show", "--quick"], ["run", "--only", "show", "--quick"]),
        (["show", "--width", "90"], ["show", "--width", "90"]),
        (["--help"], ["--help"]),
        (["--quick", "--help"], ["run", "--quick", "--help"]),
    ],
)
def test_options_may_stand_before_the_command_and_run_may_be_left_out(given: list[str], read: list[str]) -> None:
    assert _command_first(given) == read


def test_every_option_without_a_value_is_known_as_one() -> None:
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    assert commands is not None
    options = [action for command in commands.values() for action in command._actions if action.nargs == 0]
    assert {name for action in options for name in action.option_strings} == set(_SWITCHES)


def test_show_takes_the_width_before_and_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "results.json")
    results(kvwal=[1.0], lmdb=[2.0]).write(path)
    widths = []
    for given in (["--width", "90", "show", "--results", path], ["show", "--results", path, "--width", "90"]):
        assert main(given) == 0
        widths.append(max(map(len, capsys.readouterr().out.splitlines())))
    assert widths == [90, 90]


def test_a_busy_thread_beside_is_measured_and_its_pace_said(tmp_path: Path) -> None:
    scale = Scale(keys=200, big=200_000, rounds=1, seconds=0.01)
    case = next(case for case in cases(scale) if case.id == "put.commit.8.busy")
    found = Runner(str(tmp_path), scale, ("kvwal",)).run(case, lambda peer: None)
    assert found["peers"]["kvwal"]["rounds"][0]["extra"]["busy_turns_per_s"] > 0


def test_open_put_close_is_measured_on_a_store_that_is_there(tmp_path: Path) -> None:
    scale = Scale(keys=200, big=200_000, rounds=1, seconds=0.01)
    case = next(case for case in cases(scale) if case.id == "open.put")
    found = Runner(str(tmp_path), scale, ("kvwal", "sqlite3")).run(case, lambda peer: None)
    for name in ("kvwal", "sqlite3"):
        assert found["peers"][name]["rounds"][0]["ops"] == 25
    assert {case.id for case in cases(Scale.small())} >= {"open.put", "put.commit.8.busy", "put.commit.64.busy"}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_gives_back_what_was_put(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]
    try:
        peer.version()
    except ImportError as error:
        pytest.skip(str(error))
    if name in ("ZODB", "pwrite+fdatasync"):
        pytest.skip("no single put and get")
    how = How(durability="commit" if name == "dbm.sqlite3" else "os")
    store = peer(str(tmp_path / "store"), how)
    put = store.putter()
    for pair in data.pairs(list(range(50)), 100):
        put(*pair)
    assert store.getter(stable=False)(data.key(7)) == data.pairs(list(range(50)), 100)[7][1]
    store.close()
