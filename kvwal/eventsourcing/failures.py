"""What the library raises in place of kvwal's errors, which are the causes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from eventsourcing.persistence import (
    DatabaseError,
    DataError,
    InterfaceError,
    InternalError,
    OperationalError,
    PersistenceError,
)

from kvwal.errors import (
    CodecError,
    ConflictError,
    CorruptionError,
    EnvironmentFailure,
    Error,
    FormatError,
    TableCodecError,
    UsageError,
)

__all__ = ["encoding", "raising_persistence_errors"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

# The first that fits.
_KINDS: Final[list[tuple[type[Error], type[PersistenceError]]]] = [
    (CodecError, DataError),
    (TableCodecError, DataError),
    (UsageError, InterfaceError),
    (EnvironmentFailure, OperationalError),
    (ConflictError, OperationalError),
    (CorruptionError, InternalError),
    (FormatError, InternalError),
]


def raising_persistence_errors(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: what kvwal raises becomes an error of the library."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except Error as error:
            kind = next((theirs for ours, theirs in _KINDS if isinstance(error, ours)), DatabaseError)
            raise kind(str(error)) from error

    return call


def encoding(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator of what makes bytes: a value that cannot be stored is a DataError."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except (ValueError, OverflowError) as error:
            raise DataError(str(error)) from error

    return call
