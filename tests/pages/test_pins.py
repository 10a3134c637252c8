"""Pins: what is no longer kept cannot be pinned, and a holder that asks for it keeps what it had."""

from __future__ import annotations

import pytest

from kvwal.pages.pins import Pins


def test_a_holder_that_is_refused_keeps_what_it_had() -> None:
    pins = Pins({3, 4})
    pins.hold("a reader", {3})
    assert pins.keep_only({4, 5}) == {3, 4, 5}
    for holder in ("a reader", "another"):
        with pytest.raises(ValueError, match="2 is no longer kept"):
            pins.hold(holder, {2, 4})
        assert pins.counts() == {3: 1}
    # What one has pinned, another may pin as well.
    pins.hold("another", {3, 5})
    assert pins.counts() == {3: 2, 5: 1}
    pins.hold("a reader", ())
    pins.hold("another", ())
    assert pins.counts() == {}
    with pytest.raises(ValueError, match="3 is no longer kept"):
        pins.hold("a reader", {3})
