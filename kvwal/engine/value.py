"""What a source says of a key: a value, that it was deleted, or nothing."""

from __future__ import annotations

from typing import Final, TypeAlias

__all__ = ["MISSING", "Missing", "Value"]


class Missing:
    """The type of `MISSING`: this source knows nothing of the key, ask the next older one."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()

#: None stands for a deleted key.
Value: TypeAlias = bytes | None
