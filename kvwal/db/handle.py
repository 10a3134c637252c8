"""What a store, a snapshot and a transaction are to Python: handles, of which there is one each.

A copy of a handle would close the original when it ends, and one in another process would write past the lock. So copy,
deepcopy and pickle raise; they do for all that holds something to be closed, as a feed and a cursor do. A subclass of a
handle could not be made, since `kvwal.open` and the store's methods make the handles, so that raises as well, where the
class is defined. A `with` block closes what is to be closed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import NoReturn, Self

__all__ = ["Closing", "Handle", "Uncopied"]


class Uncopied:
    """Something of which there is one: it is neither copied nor pickled."""

    __slots__ = ()

    # Raised before there is a second one, whose finalizer would close what the first one holds.
    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can be neither copied nor pickled: {self._instead()}")

    def _instead(self) -> str:
        """What the error advises."""
        return "share this one, or make another one as this one was made"


class Handle(Uncopied):
    """Something open that is neither copied, nor pickled, nor inherited from outside of kvwal."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.partition(".")[0] != "kvwal":
            base = cls.__mro__[1].__name__
            raise TypeError(f"{base} cannot be inherited from, because kvwal makes it; hold one in a class of your own")

    def _instead(self) -> str:
        return (
            "share this one; or keep the path, and open the store by kvwal.shared(path): another process can when it "
            "is closed here; dict() copies what is in it"
        )


class Closing(Uncopied, ABC):
    """What is closed, by a `with` block at its end if not before."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
