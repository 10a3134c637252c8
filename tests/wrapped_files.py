"""Files whose every open file is wrapped by a test, to see or to change what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WrappedFiles:
    """The given files, except that `wrap` makes something of each file that is opened, and of its name."""

    def __init__(self, files: Any, wrap: Callable[[Any, str], Any]) -> None:
        self._files = files
        self._wrap = wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open_directory(self, path: str) -> WrappedDirectory:
        return WrappedDirectory(self._files.open_directory(path), self._wrap)


class WrappedDirectory:
    """An open directory of `WrappedFiles`."""

    def __init__(self, directory: Any, wrap: Callable[[Any, str], Any]) -> None:
        self._directory = directory
        self._wrap = wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._directory, name)

    def open(self, name: str, **options: Any) -> Any:
        return self._wrap(self._directory.open(name, **options), name)
