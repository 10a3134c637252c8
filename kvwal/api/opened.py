"""What a store and a follower have in common while they are open, and what a fork and the exit make of them."""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol, Self, TypeVar

from kvwal.api.reading import Reading
from kvwal.api.recalling import Recalling
from kvwal.db.handle import Closing
from kvwal.engine.engine import Engine
from kvwal.files import call_in_forked_child
from kvwal.finalizing import quiet_at_exit

__all__ = ["Opened", "alive", "close_each", "made_over", "open_stores"]


class Opened(Recalling, Reading, Closing):
    """An open store, or what follows one."""

    @property
    def path(self) -> str:
        """The store's directory, as it was given."""
        return self.engine.upkeep.directory.path

    @property
    def closed(self) -> bool:
        """Whether it is closed, or is just being closed."""
        return self.engine.is_closed

    def __enter__(self) -> Self:
        self._state.refuse_if_gone()
        return self

    @quiet_at_exit
    def __del__(self) -> None:
        engine: Engine | None = getattr(self, "engine", None)
        if engine is None:
            return
        # Whatever thread and moment the collector chose: take no lock, wait for nothing. Commits are as durable as
        # their durability says; the next open replays the log.
        if not engine.is_closed:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=1, source=self)
        # Also of one whose close was interrupted again and again.
        engine.abandon()


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T")
_E = TypeVar("_E", bound=Engine)
_O = TypeVar("_O", bound=Opened)

# Those of this process, until they are collected: told when it forks, and closed when it exits. By id, since a mapping
# has no hash.
open_stores: weakref.WeakValueDictionary[int, Opened] = weakref.WeakValueDictionary()


def made_over(attach: Callable[[], _E], make: Callable[[_E], _O]) -> _O:
    """What `make` makes of the engine that `attach` opens."""
    engine = attach()
    try:
        made = make(engine)
        open_stores[id(made)] = made
        return made
    except BaseException:
        engine.abandon()
        raise


def alive(these: weakref.WeakValueDictionary[int, _T]) -> list[_T]:
    """Those that were not collected."""
    # By references, which is one step, as `shared_items` says: another thread may open a store meanwhile.
    return [one for each in these.valuerefs() if (one := each()) is not None]


def close_each(these: Iterable[_Closable]) -> None:
    """Close each of them, whatever the others raise; the last failure is raised."""
    failure: Exception | None = None
    for one in these:
        try:
            one.close()
        except Exception as error:  # noqa: BLE001  # raised below: the others are closed all the same
            failure = error
    if failure is not None:
        raise failure


def _tell_child() -> None:
    for store in alive(open_stores):
        if not store.closed:
            store.engine.abandon(in_child=True)
    open_stores.clear()


def _close_all() -> None:
    stores = alive(open_stores)
    close_each(stores)


call_in_forked_child(_tell_child)
atexit.register(_close_all)
