"""The heart of the pages tests: any sequence of checkpoints and reopens does to the file what it does to a dict."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pages_fixtures import Scratch, applied, contents, entries, pin, unpin

from kvwal.pages import Meta, check
from kvwal.pages.node import OVERFLOW_THRESHOLD

short = st.binary(max_size=3)
keys = st.one_of(short, st.builds(lambda head, size: head + b"k" * size, short, st.sampled_from([5, 300, 5000])))
large = [500, OVERFLOW_THRESHOLD, OVERFLOW_THRESHOLD + 1, 4096, 4097, 9000]
sizes = st.one_of(st.integers(0, 40), st.sampled_from(large))
values = st.builds(lambda fill, size: bytes([fill]) * size, st.integers(0, 255), sizes)
updates = st.dictionaries(keys, st.one_of(st.none(), values), max_size=30)
ranges = st.lists(st.tuples(keys, st.one_of(st.none(), keys)), max_size=2)


class Checkpoints(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.scratch = Scratch(self.directory.name, cache_bytes=20_000)
        self.pinned: list[tuple[Meta, dict[bytes, bytes]]] = []

    def teardown(self) -> None:
        self.scratch.pages.close()
        self.directory.cleanup()

    @rule(updates=updates, ranges=ranges)
    def checkpoint(self, updates: Any, ranges: Any) -> None:
        self.scratch.checkpoint(updates, ranges)

    @rule(seed=st.integers(0, 2**32), n=st.integers(100, 1500), shape=st.sampled_from(["random", "sorted", "fixed"]))
    def bulk(self, seed: int, n: int, shape: str) -> None:
        """Enough entries for several levels, which Hypothesis would not write down one by one."""
        rng = random.Random(seed)
        if shape == "fixed":
            batch = {b"%08d" % rng.randrange(10_000): b"v" * 100 for _ in range(n)}
        elif shape == "sorted":
            batch = {b"s%06d" % (seed % 1000 + i): rng.randbytes(i % 90) for i in range(n)}
        else:
            batch = {rng.randbytes(rng.randrange(1, 40)): rng.randbytes(rng.randrange(200)) for _ in range(n)}
        self.scratch.checkpoint(dict(batch))

    @precondition(lambda self: self.scratch.model)
    @rule(seed=st.integers(0, 2**32), share=st.sampled_from([0.02, 0.5, 1.0]))
    def delete(self, seed: int, share: float) -> None:
        rng = random.Random(seed)
        self.scratch.checkpoint({key: None for key in self.scratch.model if rng.random() < share})

    @precondition(lambda self: self.scratch.model)
    @rule(seed=st.integers(0, 2**32))
    def delete_between_two_keys(self, seed: int) -> None:
        rng = random.Random(seed)
        present = sorted(self.scratch.model)
        start, stop = sorted((rng.choice(present), rng.choice(present)))
        self.scratch.checkpoint({start: b"again"} if seed % 2 else {}, [(start, stop)])

    @rule()
    def pin(self) -> None:
        pin(self.scratch.pages, self.scratch.pages.meta.generation)
        self.pinned.append((self.scratch.pages.meta, self.scratch.model))

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 100))
    def unpin(self, which: int) -> None:
        meta, model = self.pinned.pop(which % len(self.pinned))
        assert contents(self.scratch.pages.tree(meta)) == model
        unpin(self.scratch.pages, meta.generation)

    @rule()
    def reopen(self) -> None:
        self.pinned.clear()
        self.scratch.reopen()

    @rule(bounds=st.tuples(keys, keys))
    def read_range(self, bounds: tuple[bytes, bytes]) -> None:
        start, stop = sorted(bounds)
        expected = sorted((k, v) for k, v in self.scratch.model.items() if start <= k < stop)
        tree = self.scratch.pages.tree()
        assert entries(tree, start, stop) == expected
        assert entries(tree, start, stop, reverse=True) == expected[::-1]
        assert tree.count(start, stop) == len(expected)
        assert tree.get(start) == self.scratch.model.get(start)

    @invariant()
    def sound(self) -> None:
        self.scratch.verify()
        tree = self.scratch.pages.tree()
        for key, value in list(self.scratch.model.items())[:50]:
            assert tree.get(key) == value
        if self.pinned:
            meta, model = self.pinned[0]
            assert list(check(self.scratch.pages, meta, whole=False)) == []
            assert contents(self.scratch.pages.tree(meta)) == model


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("value_bytes", [20, 3000])
@pytest.mark.parametrize("key_bytes", [4, 16, 0])
def test_random_checkpoints_leave_what_a_dict_would_hold(
    tmp_path: Any, rng: random.Random, key_bytes: int, value_bytes: int
) -> None:
    """Longer histories than the state machine's, over keys that meet often."""
    scratch = Scratch(str(tmp_path), cache_bytes=100_000)

    def key() -> bytes:
        if key_bytes:
            return b"%0*d" % (key_bytes, rng.randrange(2000))
        return bytes(rng.randrange(97, 100) for _ in range(rng.randrange(9)))

    for _ in range(15):
        batch = {
            key(): None if rng.random() < 0.3 else rng.randbytes(rng.randrange(value_bytes))
            for _ in range(rng.choice([0, 1, 10, 300, 1000]))
        }
        ranges = [(key(), key()) for _ in range(rng.randrange(3))] if rng.random() < 0.3 else []
        scratch.checkpoint(batch, ranges)
        scratch.verify()
        if rng.random() < 0.2:
            scratch.reopen()
    scratch.pages.close()


def test_applied_is_what_the_documents_say() -> None:
    """Ranges first, then updates; the model itself is worth one example."""
    assert applied({b"a": b"1", b"b": b"2", b"c": b"3"}, {b"b": b"4", b"c": None}, [(b"a", b"c")]) == {b"b": b"4"}
