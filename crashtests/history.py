"""The oracle: what a store may hold, by points 1 to 3 of the durability contract.

A history is the list of states that the commits of one client led through, in commit order, and two
bounds. `durable` is the last commit that was acknowledged at durability "commit" (or that a checkpoint, a sync
or a recovery that answered has made durable); `len(states) - 1` is the last that was ever begun. A store that
is found after a crash must hold exactly one of the states between the two: no acknowledged commit is missing,
none is there in part, none without all before it.
"""

from __future__ import annotations

from collections.abc import Iterable

State = dict[bytes, bytes]


class Violation(Exception):
    """The contract does not hold."""


class History:
    """The states of one store, and which of them it may be found in.

    Rule: a state that was appended is never changed; forks share them.
    """

    __slots__ = ("before_last", "durable", "returned", "states", "system")

    def __init__(
        self,
        states: list[State] | None = None,
        durable: int = 0,
        returned: int = 0,
        system: frozenset[int] = frozenset(),
    ) -> None:
        self.states: list[State] = [{}] if states is None else states
        self.durable = durable
        #: The last commit that returned, or that the store was found with: no reader may see a later one.
        self.returned = max(durable, returned)
        #: What was durable before the last flush: a write that was lost unseen can only take back what came after.
        self.before_last = durable
        #: The commits that wrote nothing to users' tables.
        self.system = system

    @property
    def begun(self) -> int:
        """Number of the last commit that was begun."""
        return len(self.states) - 1

    @property
    def newest(self) -> State:
        """The state after the last commit that was begun."""
        return self.states[-1]

    def fork(self) -> History:
        """The same past; the futures are apart."""
        return History(self.states.copy(), self.durable, self.returned, self.system)

    def begin(self, state: State, *, system: bool = False) -> int:
        """A commit that leads to `state` is being tried."""
        self.states.append(state)
        self.system = self.system | {self.begun} if system else self.system - {self.begun}
        return self.begun

    def retract(self) -> None:
        """The last commit was refused: it must never be seen."""
        self.states.pop()

    def complete(self) -> None:
        """The last commit returned, at whatever durability."""
        self.returned = self.begun

    def acknowledge(self, number: int | None = None) -> None:
        """Commit `number` (None: the last) and all before it are durable from now on."""
        number = self.begun if number is None else number
        if number > self.durable:
            self.before_last = self.durable
            self.durable = number

    def identify(self, content: Iterable[tuple[bytes, bytes]], seqno: int | None = None) -> int:
        """Which commit is the last one of a store that was found with this content; later ones are forgotten.

        Raises `Violation` if it is none that the contract allows. `seqno`: what the store calls that commit.
        """
        found = dict(content)
        candidates = [n for n in range(self.begun, self.durable - 1, -1) if self.states[n] == found]
        if not candidates:
            raise Violation(self._explain(found))
        number = candidates[0]
        if seqno is not None:
            # Two commits may lead to equal states; the number tells which one it is.
            if seqno not in candidates:
                raise Violation(f"the content is that of commit {candidates}, but the store says {seqno}")
            number = seqno
        del self.states[number + 1 :]
        self.durable = self.returned = number
        return number

    def _explain(self, found: State) -> str:
        for number, state in enumerate(self.states[: self.durable]):
            if state == found:
                return f"acknowledged commits are missing: found commit {number}, but {self.durable} is durable"
        close = min(
            range(self.durable, self.begun + 1),
            key=lambda n: len(self.states[n].items() ^ found.items()),
        )
        state = self.states[close]
        missing = {key: state[key][:24] for key in state.keys() - found.keys()}
        extra = {key: found[key][:24] for key in found.keys() - state.keys()}
        wrong = {
            key: (state[key][:24], found[key][:24]) for key in state.keys() & found.keys() if state[key] != found[key]
        }
        return (
            f"the content is that of no commit from {self.durable} to {self.begun}; next to commit {close}: "
            f"missing {missing}, extra {extra}, wrong (expected, found) {wrong}"
        )
