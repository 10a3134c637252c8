"""What can be set when a store is opened: each option with its meaning, type, default and limits, once.

`OpenOptions` names the keyword arguments of `kvwal.open` and `kvwal.aio.open` for type checkers and editors, and says
what they mean. `Options` has the defaults and limits, and is what the engine reads; `taking_options` shows the same to
`help` and `inspect.signature`. A test holds the two lists of names against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypedDict, TypeVar, get_args, get_type_hints

from kvwal.events import Listener
from kvwal.files import Files, system_files
from kvwal.keys import as_int, as_seconds

__all__ = [
    "RESERVE_BYTES",
    "Durability",
    "Flag",
    "OpenOptions",
    "Options",
    "Preallocate",
    "as_flag",
    "taking_options",
]

Durability: TypeAlias = Literal["commit", "interval", "os"]
Flag: TypeAlias = Literal["r", "w", "c", "n"]
Preallocate: TypeAlias = Literal["allocate", "zeros"]

# Held back on disk so that deletes, and the checkpoint that frees their pages, work on a full disk.
RESERVE_BYTES: Final = 4 << 20

MIN_SEGMENT_BYTES: Final = 16 << 10
MAX_SEGMENT_BYTES: Final = 1 << 30


class OpenOptions(TypedDict, total=False):
    """Options of `kvwal.open` and `kvwal.aio.open` by keyword. Not stored: each open may choose anew.

    Sizes are in bytes, times in seconds; integers are whatever has an `__index__`, NumPy's among them.

    parents: True makes the directories above the store that are missing, with the permissions of its own.
    durability: when a commit returns. "commit": it is on disk, and survives a power cut. "interval": it survives a kill
        of the process, and a power cut once `sync_delay_s` has passed. "os": it survives a kill of the process; the
        system decides when it is on disk. What is recovered is a prefix of the commits in any case.
    sync_delay_s: longest time a commit of durability "interval" stays unflushed, but for the time that flushes take.
    cache_bytes: memory for pages and rows of the page file.
    memtable_bytes: memory of commits that are not in the pages yet; more starts a checkpoint. At twice as much, writers
        wait for the one under way, which may be at work on as much again.
    segment_bytes: the log goes on in a new file at this size.
    checkpoint_log_bytes: a checkpoint also starts when this much log was written since the last one.
    checkpoint_interval_s: and when the oldest commit that is not in the pages yet is this old.
    keep_history_s: how far back past moments stay readable, within `keep_history_bytes`; 0: nothing is kept for them.
    keep_history_bytes: what the log and pages that are kept for past moments may take. None: the least of 256 MiB, a
        tenth of the free space, and the size of the data, which counts as 16 MiB at least. 0: nothing is kept for them.
    history_base_bytes: at least this much log lies between two bases, which reading past moments begins from.
    max_snapshot_bytes: what snapshots, transactions and scans of former moments may hold, in memory and of the page
        file. Beyond it the oldest are given up after a checkpoint: their next read raises `SnapshotTooOld`.
    hold_s: how long followers in other processes may keep pages and log that would be free without them.
    hold_bytes: and how much of them, together. Beyond either their pins are broken, the oldest first: their next read
        of what was kept raises `SnapshotTooOld`.
    preallocate: how the log's space is taken: "allocate" asks the file system, "zeros" writes it.
    background: False starts no thread. "interval" then flushes each commit. A commit makes the checkpoint that is due
        by memory, or, after a segment is full, by log bytes or by age; after that it also removes what has expired, for
        10 ms. Where no segment gets full, neither comes before the store is opened with a thread. Indexes of tables are
        built by the call that asks for them.
    files: another file system, such as `kvwal.testing.SimulatedDisk`.
    listeners: what is told of commits, flushes, checkpoints and failures: see `kvwal.events`.
    """

    parents: bool
    durability: Durability
    sync_delay_s: float
    cache_bytes: int
    memtable_bytes: int
    segment_bytes: int
    checkpoint_log_bytes: int
    checkpoint_interval_s: float
    keep_history_s: float
    keep_history_bytes: int | None
    history_base_bytes: int
    max_snapshot_bytes: int
    hold_s: float
    hold_bytes: int
    preallocate: Preallocate
    background: bool
    files: Files
    listeners: Sequence[Listener]


def _checked_by(check: Callable[[str, Any], object]) -> dict[str, Callable[[str, Any], object]]:
    return {"check": check}


def _int(least: int, most: int | None = None) -> dict[str, Callable[[str, Any], object]]:
    return _checked_by(partial(as_int, least=least, most=most))


def _one_of(choices: Any) -> dict[str, Callable[[str, Any], object]]:
    return _checked_by(partial(_as_one_of, choices=get_args(choices)))


def _as_bytes_or_none(name: str, value: object) -> object:
    return None if value is None else as_int(name, value, 0)


def _as_one_of(name: str, value: object, choices: tuple[str, ...]) -> object:
    if value not in choices:
        raise ValueError(f"{name} is {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, not {value!r}")
    return value


def _as_bool(name: str, value: object) -> object:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {type(value).__name__}")
    return value


def _as_files(name: str, value: Files | None) -> Files:
    return system_files() if value is None else value


def _as_listeners(name: str, value: object) -> tuple[Listener, ...]:
    listeners = tuple(value) if isinstance(value, Iterable) else (value,)
    for listener in listeners:
        if not isinstance(listener, Listener):
            raise TypeError(f"{name} are objects of classes that inherit from kvwal.events.Listener, not {listener!r}")
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} is a sequence of listeners, not one of them; use [...]")
    return listeners


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of an open store, checked; see `OpenOptions`. TypeError or ValueError for what cannot be right."""

    mode: int = field(default=0o600, metadata=_int(0, 0o7777))
    parents: bool = field(default=False, metadata=_checked_by(_as_bool))
    durability: Durability = field(default="commit", metadata=_one_of(Durability))
    sync_delay_s: float = field(default=0.1, metadata=_checked_by(as_seconds))
    cache_bytes: int = field(default=64 << 20, metadata=_int(256 << 10))
    memtable_bytes: int = field(default=64 << 20, metadata=_int(16 << 10))
    segment_bytes: int = field(default=16 << 20, metadata=_int(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES))
    checkpoint_log_bytes: int = field(default=64 << 20, metadata=_int(4 << 10))
    checkpoint_interval_s: float = field(default=300.0, metadata=_checked_by(as_seconds))
    keep_history_s: float = field(default=86_400.0, metadata=_checked_by(as_seconds))
    keep_history_bytes: int | None = field(default=None, metadata=_checked_by(_as_bytes_or_none))
    history_base_bytes: int = field(default=16 << 20, metadata=_int(0))
    max_snapshot_bytes: int = field(default=1 << 30, metadata=_int(0))
    hold_s: float = field(default=60.0, metadata=_checked_by(as_seconds))
    hold_bytes: int = field(default=256 << 20, metadata=_int(0))
    preallocate: Preallocate = field(default="allocate", metadata=_one_of(Preallocate))
    background: bool = field(default=True, metadata=_checked_by(_as_bool))
    files: Files = field(default_factory=system_files, metadata=_checked_by(_as_files))
    listeners: Sequence[Listener] = field(default=(), metadata=_checked_by(_as_listeners))

    #: Whether what a salvage has not finished may be opened.
    opens_unfinished: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)

    @property
    def directory_mode(self) -> int:
        """The files' mode with the right to enter wherever there is the right to read."""
        return self.mode | (self.mode & 0o444) >> 2

    @property
    def keeps_history(self) -> bool:
        """Whether more of the past is kept than recovery needs."""
        return self.keep_history_s > 0 and self.keep_history_bytes != 0

    def wants_sync(self, durability: Durability | None = None) -> bool:
        """Whether a commit at this durability returns only after a flush; None: at the store's own.

        "interval" does where nothing would flush it later. ValueError for an unknown name.
        """
        if durability is None:
            durability = self.durability
        _as_one_of("durability", durability, get_args(Durability))
        if durability == "interval":
            return self.durability == "os" or not self.background
        return durability == "commit"


def as_flag(flag: Flag) -> Flag:
    """The flag. ValueError if it is none."""
    if flag not in get_args(Flag):
        raise ValueError(f'flag is one of "r", "w", "c" and "n", not {flag!r}')
    return flag


_F = TypeVar("_F", bound=Callable[..., Any])


def taking_options(function: _F) -> _F:
    """Show a function's `**options` as the keyword arguments they stand for, to `help` and `inspect.signature`."""
    signature = inspect.signature(function)
    types = get_type_hints(Options)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {each.name for each in own}
    options = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if option.default is MISSING else option.default,
            annotation=types[option.name],
        )
        for option in fields(Options)
        if option.name not in names
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
