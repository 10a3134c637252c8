"""The oracles of the crash tests find what they are for."""

import pytest

from crashtests.cycles import ListTxn, anomalies
from crashtests.history import History, Violation


def txn(number, reads=(), appends=(), status="ok"):
    return ListTxn(number, list(reads), list(appends), status)


A, B = b"a", b"b"


def test_a_serial_history_has_no_anomaly():
    txns = [txn(1, [(A, ())], [(A, 1)]), txn(2, [(A, (1,))], [(A, 2)]), txn(3, [(A, (1, 2))])]
    assert anomalies(txns, {A: (1, 2)}) == []


def test_a_dirty_write_is_a_cycle_of_writes():
    txns = [txn(1, [], [(A, 1), (B, 1)]), txn(2, [], [(A, 2), (B, 2)])]
    assert anomalies(txns, {A: (1, 2), B: (2, 1)})[0].startswith("G0")


def test_circular_information_flow_is_found():
    txns = [txn(1, [(B, (2,))], [(A, 1)]), txn(2, [(A, (1,))], [(B, 2)])]
    assert anomalies(txns, {A: (1,), B: (2,)})[0].startswith("G1c")


def test_a_lost_update_is_g_single():
    txns = [txn(1, [(A, ())], [(A, 1)]), txn(2, [(A, ())], [(A, 2)])]
    assert anomalies(txns, {A: (1, 2)})[0].startswith("G-single")


def test_write_skew_is_g2():
    txns = [txn(1, [(A, ()), (B, ())], [(A, 1)]), txn(2, [(A, ()), (B, ())], [(B, 2)])]
    assert anomalies(txns, {A: (1,), B: (2,)})[0].startswith("G2")


def test_a_read_of_an_aborted_append_is_g1a():
    assert anomalies([txn(1, [], [(A, 1)], "aborted")], {A: (1,)})[0].startswith("G1a")


def test_a_read_in_the_middle_of_a_transaction_is_g1b():
    txns = [txn(1, [], [(A, 1), (A, 2)]), txn(2, [(A, (1,))])]
    assert anomalies(txns, {A: (1, 2)})[0].startswith("G1b")


def test_a_lost_append_and_a_torn_transaction_are_found():
    assert anomalies([txn(1, [], [(A, 1)])], {A: ()})[0].startswith("lost")
    assert anomalies([txn(1, [], [(A, 1), (B, 1)], "unknown")], {A: (1,)})[0].startswith("torn")


def test_a_transaction_that_nobody_was_told_of_may_be_there_or_not():
    txns = [txn(1, [(A, ())], [(A, 1)], "unknown")]
    assert anomalies(txns, {A: ()}) == []
    assert anomalies(txns, {A: (1,)}) == []


def history():
    found = History()
    for number in range(1, 5):
        found.begin({b"k": b"%d" % number})
    found.acknowledge(2)
    return found


def test_any_state_from_the_last_acknowledged_to_the_last_begun_is_allowed():
    for number in (2, 3, 4):
        assert history().settle([(b"k", b"%d" % number)], number) == number


def test_a_missing_acknowledged_commit_is_a_violation():
    with pytest.raises(Violation, match="acknowledged commits are missing"):
        history().settle([(b"k", b"1")])


def test_a_state_that_never_was_is_a_violation():
    with pytest.raises(Violation, match="the content is that of no commit"):
        history().settle([(b"k", b"3"), (b"x", b"")])


def test_the_number_must_be_that_of_the_state():
    with pytest.raises(Violation, match="the store says 4"):
        history().settle([(b"k", b"3")], 4)


def test_equal_states_are_told_apart_by_their_number():
    found = History([{}, {b"k": b""}, {}], 0)
    assert found.fork().settle([], 0) == 0
    assert found.settle([], 2) == 2
