"""Files whose every open file is wrapped by a test, to see or to change what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Wrapped:
    """Something as it is, but for what a class of a test answers in its place."""

    def __init__(self, there: Any, name: str = "") -> None:
        """`name`: that of an open file."""
        self.there = there
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.there, name)


class WrappedFiles(Wrapped):
    """The given files, except that `wrap` makes something of each file that is opened, and of its name."""

    def __init__(self, files: Any, wrap: Callable[[Any, str], Any]) -> None:
        super().__init__(files)
        self._wrap = wrap

    def open_directory(self, path: str) -> WrappedDirectory:
        return WrappedDirectory(self.there.open_directory(path), self._wrap)


class WrappedDirectory(Wrapped):
    """An open directory of `WrappedFiles`."""

    def __init__(self, directory: Any, wrap: Callable[[Any, str], Any]) -> None:
        super().__init__(directory)
        self._wrap = wrap

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WrappedDirectory) and bool(self.there == other.there)

    def __hash__(self) -> int:
        return hash(self.there)

    def open(self, name: str, **options: Any) -> Any:
        return self._wrap(self.there.open(name, **options), name)
