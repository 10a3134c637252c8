"""The oracles of the crash tests find what they are for."""

import pytest

from crashtests.cycles import Observed, cycle, find
from crashtests.history import History, Violation

A, B = b"a", b"b"


class Client:
    """Writes a history of transactions down, one after the other unless told otherwise."""

    def __init__(self):
        self.history = []

    def txn(self, reads=(), appends=(), outcome="ok", *, begun=None, seqno=None):
        """Returns it, and its elements. `begun=1`: it overlaps all others."""
        number = len(self.history) + 1
        found = Observed(number, 10 * number if begun is None else begun, outcome=outcome, seqno=seqno)
        found.ended = None if outcome == "maybe" else 10 * number + 5
        for key, elements in reads:
            found.read(key, tuple(elements))
        self.history.append(found)
        return found, [found.append(key) for key in appends]

    def problem(self, **final):
        problems = find({key.encode(): tuple(elements) for key, elements in final.items()}, self.history)
        return problems[0] if problems else ""


@pytest.fixture
def client():
    return Client()


def test_a_serial_history_has_no_anomaly(client):
    _, (x,) = client.txn([(A, ())], [A])
    _, (y,) = client.txn([(A, (x,))], [A])
    client.txn([(A, (x, y))])
    assert client.problem(a=(x, y), b=()) == ""


def test_a_dirty_write_is_a_cycle_of_writes(client):
    _, (x, y) = client.txn([], [A, B], begun=1)
    _, (v, w) = client.txn([], [A, B], begun=1)
    assert client.problem(a=(x, v), b=(w, y)).startswith("G0:")


def test_circular_information_flow_is_found(client):
    one, (x,) = client.txn([], [A], begun=1)
    _, (y,) = client.txn([(A, (x,))], [B], begun=1)
    one.read(B, (y,))
    assert client.problem(a=(x,), b=(y,)).startswith("G1c:")


def test_a_lost_update_is_g_single(client):
    _, (x,) = client.txn([(A, ())], [A], begun=1)
    _, (y,) = client.txn([(A, ())], [A], begun=1)
    assert client.problem(a=(x, y), b=()).startswith("G-single:")


def test_write_skew_is_g2(client):
    _, (x,) = client.txn([(A, ()), (B, ())], [A], begun=1)
    _, (y,) = client.txn([(A, ()), (B, ())], [B], begun=1)
    assert client.problem(a=(x,), b=(y,)).startswith("G2:")


def test_a_stale_read_is_a_cycle_with_real_time(client):
    _, (x,) = client.txn([], [A])
    client.txn([(A, ())])
    assert client.problem(a=(x,), b=()).startswith("G-single-realtime")


def test_what_overlaps_may_come_in_either_order(client):
    _, (x,) = client.txn([], [A], begun=1)
    client.txn([(A, ())], begun=1)
    assert client.problem(a=(x,), b=()) == ""


def test_a_read_of_an_aborted_append_is_g1a(client):
    _, (x,) = client.txn([], [A], "failed")
    client.txn([(A, (x,))])
    assert client.problem(a=(), b=()).startswith("G1a:")


def test_an_aborted_append_that_took_effect_is_found(client):
    _, (x,) = client.txn([], [A], "failed")
    assert "failed, but" in client.problem(a=(x,), b=())


def test_a_read_in_the_middle_of_a_transaction_is_g1b(client):
    _, (x, y) = client.txn([], [A, A])
    client.txn([(A, (x,))])
    assert client.problem(a=(x, y), b=()).startswith("G1b:")


def test_a_lost_append_and_a_torn_transaction_are_found(client):
    _, (x, y) = client.txn([], [A, B], "maybe")
    assert "there in part" in client.problem(a=(x,), b=())
    client.txn([], [A])
    assert any("was acknowledged and is missing" in p for p in find({A: (x,), B: (y,)}, client.history))


def test_an_element_twice_or_from_nowhere_is_found(client):
    _, (x,) = client.txn([], [A])
    assert "took effect twice" in client.problem(a=(x, x), b=())
    assert "no transaction appended" in client.problem(a=(x, 999), b=())


def test_a_transaction_that_does_not_read_its_own_append_is_found(client):
    found, (x,) = client.txn([], [A])
    found.read(A, ())
    assert client.problem(a=(x,), b=()).startswith("internal")


def test_a_read_that_changes_within_a_transaction_is_found(client):
    _, (x,) = client.txn([], [A], begun=1)
    client.txn([(A, ()), (A, (x,))], begun=1)
    assert "twice, and differently" in client.problem(a=(x,), b=())


def test_numbers_that_do_not_follow_the_order_of_the_writes_are_found(client):
    _, (x,) = client.txn([], [A], begun=1, seqno=2)
    _, (y,) = client.txn([], [A], begun=1, seqno=1)
    assert "not in the order of the commits' seqnos" in client.problem(a=(x, y), b=())


def test_a_transaction_without_an_answer_may_be_there_or_not(client):
    _, (x,) = client.txn([(A, ())], [A], "maybe")
    assert client.problem(a=(), b=()) == ""
    assert client.problem(a=(x,), b=()) == ""


def test_a_cycle_is_found_and_nothing_else_is():
    assert cycle({1: {2: {"ww"}}, 2: {3: {"ww"}}, 3: {}}) is None
    assert cycle({1: {2: {"ww"}}, 2: {3: {"ww"}}, 3: {2: {"rw"}}}) == [2, 3]


def history():
    found = History()
    for number in range(1, 5):
        found.begin({b"k": b"%d" % number})
    found.acknowledge(2)
    return found


def test_any_state_from_the_last_acknowledged_to_the_last_begun_is_allowed():
    for number in (2, 3, 4):
        assert history().identify([(b"k", b"%d" % number)], number) == number


def test_a_missing_acknowledged_commit_is_a_violation():
    with pytest.raises(Violation, match="acknowledged commits are missing"):
        history().identify([(b"k", b"1")])


def test_a_state_that_never_was_is_a_violation():
    with pytest.raises(Violation, match="the content is that of no commit"):
        history().identify([(b"k", b"3"), (b"x", b"")])


def test_the_number_must_be_that_of_the_state():
    with pytest.raises(Violation, match="the store says 4"):
        history().identify([(b"k", b"3")], 4)


def test_equal_states_are_told_apart_by_their_number():
    found = History([{}, {b"k": b""}, {}], 0)
    assert found.fork().identify([], 0) == 0
    assert found.identify([], 2) == 2
