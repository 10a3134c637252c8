"""`shared`: one open store for each directory and process, that all who ask for it hold, and the last one closes.

Rules:

- `_Registry.lock` comes before every other lock. A holder joins and leaves in a section of it, and there it is seen who
  was the last: that one alone ends the share. Opening is in such a section too, so stores are opened one at a time;
  closing is not.
- A finalizer may run in any section of its own thread. So it queues what it gives up, and looks at the queue only if
  the lock can be had at once. Each call that has a section looks at the queue after it.
- A share without holders is over, whatever has become of its engine: the next call of `shared` sees to it that it is
  closed, and opens the store anew. So an interruption at any place leaves nothing that a later call does not finish.
- A process that was forked has a registry of its own, which is empty.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any, Final, NoReturn, Unpack

from kvwal.api.fairness import Tickets
from kvwal.api.opened import open_stores
from kvwal.api.store import Store
from kvwal.engine.engine import Engine
from kvwal.errors import EnvironmentFailure, UsageError, closed
from kvwal.feed.status import describe
from kvwal.files import Directory, PathArgument, path_text
from kvwal.files.fork import birthmark
from kvwal.finalizing import quiet_at_exit
from kvwal.following.still import open_engine
from kvwal.locks import locked, new_lock, release
from kvwal.options import Flag, OpenOptions, Options, as_flag, taking_options

__all__ = ["SharedStore", "shared"]

# Of a close by another thread, which this one waits for before it opens the store anew.
_CLOSING_WAIT_S: Final = 60.0
# What says nothing of a store that is open: how it was made.
_OF_MAKING: Final = ("files", "mode", "parents")


class _Share:
    """A store that is open, and who holds it."""

    __slots__ = ("closer", "engine", "holders", "options", "tickets")

    def __init__(self, engine: Engine, options: Options, holder: object) -> None:
        self.engine = engine
        self.options = options
        self.tickets = Tickets()
        #: Changes in sections of `_Registry.lock`.
        self.holders: set[object] = {holder}
        #: The last holder, once it has left: its `close` closes the store.
        self.closer: object = None

    @property
    def is_over(self) -> bool:
        """Whether no new holder may join."""
        return not self.holders or self.engine.is_closed

    def refuse_others(self, path: str, flag: Flag, given: dict[str, Any]) -> None:
        """UsageError for options that are not those of the open store."""
        upkeep = self.engine.upkeep
        if flag == "n":
            raise UsageError(f'{path} is open in this process, so flag "n" cannot erase it; close it there first')
        if (flag == "r") != upkeep.is_read_only:
            raise UsageError(f"{path} is open in this process {'only' if upkeep.is_read_only else 'not only'} to read")
        # A caller that does not say how durable its commits are to be counts on the default.
        given = {"durability": Options().durability, **given}
        asked = Options(**given)
        for option in fields(Options):
            name = option.name
            wanted, found = getattr(asked, name), getattr(self.options, name)
            if name in given and name not in _OF_MAKING and wanted != found:
                raise UsageError(
                    f"{path} is open in this process with {name}={found!r}, and {wanted!r} is asked for; open it "
                    "everywhere with the same options"
                )


class _Registry:
    """The shares of one process."""

    def __init__(self) -> None:
        self.mark = birthmark()
        self.lock = new_lock()
        self.shares: dict[Directory, _Share] = {}
        #: Of finalizers, and of calls from within a section: who holds a share no longer.
        self.dropped: deque[tuple[_Share, object]] = deque()

    @locked
    def join(self, path: str, flag: Flag, given: dict[str, Any], holder: object) -> tuple[_Share, bool]:
        """A share of the store at `path`, which now has this holder; or one that is over and in the way, and False."""
        options = Options(**given)
        share = self._find(path, options)
        if share is not None:
            if share.is_over:
                return share, False
            share.refuse_others(path, flag, given)
            share.holders.add(holder)
            return share, True
        engine = open_engine(path, flag, options, describe)
        try:
            share = _Share(engine, options, holder)
            self.shares[engine.upkeep.directory] = share
        except BaseException:
            engine.abandon()
            raise
        return share, True

    def _find(self, path: str, options: Options) -> _Share | None:
        try:
            directory = options.files.open_directory(path)
        except OSError:
            return None  # What that means, opening it says.
        try:
            return self.shares.get(directory)
        finally:
            directory.close()

    @locked
    def leave(self, share: _Share, holder: object) -> None:
        """The holder has gone."""
        if share.holders == {holder}:
            share.closer = holder
        share.holders.discard(holder)

    @locked
    def forget(self, share: _Share) -> None:
        """The share is over, and its store is closed."""
        self._forget(share)

    def _forget(self, share: _Share) -> None:
        directory = share.engine.upkeep.directory
        if self.shares.get(directory) is share:
            del self.shares[directory]

    def tidy(self, end: Callable[[_Share], object]) -> None:
        """Let those go that are queued, unless another thread does, and `end` the shares that they were the last of."""
        while self.dropped and not self.lock._is_owned():
            ended = []
            try:
                if not self.lock.acquire(False):
                    return  # The thread that is in its section looks at the queue after it.
                while self.dropped:
                    share, holder = self.dropped[0]
                    if share.holders == {holder}:
                        ended.append(share)
                    share.holders.discard(holder)
                    self.dropped.popleft()
            finally:
                release(self.lock)
            for share in ended:
                end(share)

    def close(self, share: _Share) -> None:
        """Close the store of a share that is over. If another thread is at it, that one forgets the share."""
        if share.engine.close():
            self.forget(share)

    def abandon(self, share: _Share) -> None:
        """The same for a finalizer, whatever thread and moment the collector chose: see `Store.__del__`."""
        if share.engine.abandon() and not self.lock._is_owned():
            try:
                if self.lock.acquire(False):
                    self._forget(share)
            finally:
                release(self.lock)


_registry = _Registry()


def _registry_of_this_process() -> _Registry:
    global _registry
    if not _registry.mark[0]:
        _registry = _Registry()
    return _registry


class _Over:
    """What a holder that is closed has in place of the parts of a store."""

    def __getattr__(self, name: str) -> NoReturn:
        raise closed()

    def __call__(self, *args: object) -> NoReturn:
        raise closed()


_OVER: Any = _Over()


class SharedStore(Store):
    """A `Store` that others in this process may hold as well, made by `shared`: the last of them closes it.

    After its own `close` it raises `ClosedError`. What was made with it goes on until the store is closed: tables,
    which also write, feeds, consumers, snapshots and transactions. A holder that is collected counts as closed.
    """

    def __init__(self, registry: _Registry, share: _Share, holder: object) -> None:
        super().__init__(share.engine)
        self._tickets = share.tickets
        self._registry = registry
        self._holder = holder
        self._is_over = False
        # Last: a finalizer of what is not whole has nothing to do.
        self._share = share

    @property
    def path(self) -> str:
        """The store's directory, as it was given by the first that opened it."""
        return self._share.engine.upkeep.directory.path

    @property
    def closed(self) -> bool:
        """Whether this holder was closed, or the store is."""
        return self._is_over or self._share.engine.is_closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"one of its holders of {len(self._share.holders)}"
        return f"<kvwal.Store {self.path!r}, shared, {state}>"

    def close(self) -> None:
        """Let go of the store; if no other holder is left, close it as `Store.close` does. Idempotent."""
        registry, share = self._registry, self._share
        if not registry.mark[0]:
            # Only inherited: the lock of the registry may be owned by a thread that is not here.
            share.engine.close()
            return
        self._is_over = True
        self.engine = self._state = self._reads = self._cache = self._pressure = self._put = _OVER
        if registry.lock._is_owned():
            # By a signal handler or a finalizer, from within a section; that call sees to it.
            registry.dropped.append((share, self._holder))
            return
        registry.leave(share, self._holder)
        if share.closer is self._holder:
            registry.close(share)
        registry.tidy(registry.close)

    @quiet_at_exit
    def __del__(self) -> None:
        share: _Share | None = getattr(self, "_share", None)
        if share is None or share.engine.is_closed or self._holder not in share.holders:
            return
        warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=1, source=self)
        if not self._registry.mark[0]:
            share.engine.abandon(in_child=True)
            return
        self._registry.dropped.append((share, self._holder))
        self._registry.tidy(self._registry.abandon)


@taking_options
def shared(path: PathArgument, flag: Flag = "c", mode: int = 0o600, **options: Unpack[OpenOptions]) -> Store:
    """Open the store in the directory `path`, or hold it too where this process has it open by `shared` already.

    For frameworks and libraries that know a path and not each other. The store is found by its directory, whatever the
    path. The last holder that is closed, or collected, closes it. A forked child has none: it opens its own.

    Args: those of `kvwal.open`. Where the store is open, an option that is not given is as the first holder chose, but
        `durability`, which is "commit" then; "w" and "c" are the same; and `mode` and `parents` say nothing.

    Returns: a store for each call, to be closed by each.

    Raises: what `kvwal.open` raises, and UsageError where the store is open with other options, or is to be erased.
    """
    registry = _registry_of_this_process()
    text, given = path_text(path), {"mode": mode, **options}
    as_flag(flag)
    holder = object()
    store: SharedStore | None = None
    try:
        while True:
            share, joined = registry.join(text, flag, given, holder)
            if joined:
                break
            _wait_until_closed(registry, share)
        store = SharedStore(registry, share, holder)
        open_stores[id(store)] = store
        registry.tidy(registry.close)
        return store
    except BaseException:
        if store is not None:
            store.close()
        for share in list(registry.shares.values()):
            if holder in share.holders:
                registry.dropped.append((share, holder))
        registry.tidy(registry.abandon)
        raise


def _wait_until_closed(registry: _Registry, share: _Share) -> None:
    """Have a share that is over closed by this thread, or by the one that is at it."""
    with suppress(EnvironmentFailure):
        share.engine.close(wait_s=_CLOSING_WAIT_S)
    registry.forget(share)
