"""The bytes of a simulated file, against a plain `bytearray`."""

from __future__ import annotations

import random

from kvwal.testing.content import PAGE, Content


def test_content_is_a_bytearray_whose_copies_do_not_change_with_it(rng: random.Random) -> None:
    content, model = Content(), bytearray(8 * PAGE)
    copies: list[tuple[Content, bytes]] = []
    for _ in range(500):
        offset, size = rng.randrange(6 * PAGE), rng.choice([1, 100, PAGE, 2 * PAGE])
        if rng.random() < 0.1:
            content.cut(offset)
            model[offset:] = bytes(len(model) - offset)
            content.size = min(content.size, offset)
        else:
            data = rng.randbytes(size)
            content.write(offset, data)
            model[offset : offset + size] = data
            content.size = max(content.size, offset + size)
        start = rng.randrange(8 * PAGE)
        assert content.read(3 * PAGE, start) == model[start : min(start + 3 * PAGE, content.size)]
        if rng.random() < 0.1:
            copies.append((content.copy(), bytes(model[: content.size])))
    assert all(copy.read(copy.size, 0) == before for copy, before in copies)


def test_reserved_space_counts_as_taken_once() -> None:
    content = Content()
    content.reserve(2 * PAGE + 1)
    assert (content.blocks(), content.new_blocks(0, 4 * PAGE), content.new_blocks(PAGE, 10)) == (3, 1, 0)
    content.write(PAGE, b"in it")
    content.write(5 * PAGE, b"behind it")
    assert (content.blocks(), content.new_blocks(0, 6 * PAGE)) == (4, 2)
