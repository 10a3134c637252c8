"""What `verify` remembers in the destination: what it has proved, and what it has found damaged.

`state/verified` has `units`: by the name of the object, when it was proved (wall clock, us) and whether deeply; and
`damaged`: by the name, when that was found, whether a deep check alone finds it, the offset or null, and the reason.
Damage is forgotten when the object is gone, or a check that would have found it has proved the object.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from kvwal.backup import state
from kvwal.backup.names import STATE
from kvwal.backup.port import Destination
from kvwal.errors import Finding
from kvwal.times import time_of

__all__ = ["Damage", "Results", "damaged", "known_damage", "proved"]


class Damage(NamedTuple):
    """What was found in an object, and when."""

    at_us: int
    deep: bool
    offset: int | None
    reason: str

    def finding(self, name: str) -> Finding:
        """As it is reported."""
        when = time_of(self.at_us).isoformat(" ")
        return Finding(name, self.offset, f"{self.reason} (verify found that at {when})")


def proved(members: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """When each object was proved, in us, and whether deeply. What has another form was not."""
    found: dict[str, tuple[int, bool]] = {}
    for name, result in _of(members, "units"):
        if isinstance(result, list) and len(result) == 2 and isinstance(result[0], int):
            found[name] = max(0, result[0]), bool(result[1])
    return found


def damaged(members: dict[str, Any]) -> dict[str, Damage]:
    """What is known to be damaged. What has another form is not."""
    found: dict[str, Damage] = {}
    for name, entry in _of(members, "damaged"):
        match entry:
            case [int(at_us), bool(deep), int() | None as offset, str(reason)]:
                found[name] = Damage(max(0, at_us), deep, offset, reason)
    return found


def known_damage(destination: Destination) -> dict[str, Damage]:
    """The same of a destination. CorruptionError if what is remembered there is damaged, until `verify` is run."""
    _, members = state.read(destination, state.VERIFIED)
    return damaged(members)


def _of(members: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    entries = members.get(name, {})
    return list(entries.items()) if isinstance(entries, dict) else []


class Results:
    """What one check has found so far."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: of all the objects that there are."""
        self._names = names
        #: Objects that hold: when that was proved, and whether deeply.
        self.done: dict[str, tuple[int, bool]] = {}
        #: Objects that are gone.
        self.gone: set[str] = set()
        #: Whether all of it was checked deeply, to its end.
        self.all_deep = False
        self._damaged: dict[str, Damage] = {}

    @property
    def checked(self) -> int:
        """Of how many objects there is a result."""
        return len((self.done.keys() | self.gone) | self._damaged.keys())

    def add(self, finding: Finding, at_us: int, *, deep: bool) -> None:
        """Something that does not hold; what was found of an object first stays."""
        self._damaged.setdefault(finding.file, Damage(at_us, deep, finding.offset, finding.reason))

    def save(self, destination: Destination) -> None:
        """Write it into the destination, over what was known before."""

        def with_results(members: dict[str, Any]) -> dict[str, Any]:
            results = {**proved(members), **self.done}
            known = {name: each for name, each in damaged(members).items() if not self._is_over(name, each)}
            known |= self._damaged
            kept = {
                name: list(result)
                for name, result in results.items()
                if name in self._names and name not in self.gone and name not in self._damaged
            }
            return {**members, "units": kept, "damaged": {name: list(each) for name, each in known.items()}}

        state.change(destination, state.VERIFIED, with_results)

    def _is_over(self, name: str, damage: Damage) -> bool:
        if damage.deep:
            is_proved = self.all_deep
        else:
            is_proved = name in self.done
        # What a deep check finds may be of an object of `state/`, which is not in the list.
        return is_proved or (name not in self._names and not name.startswith(STATE))
