"""Following a store."""

from __future__ import annotations

from kvwal.api.open import open_stores
from kvwal.files import Files, PathArgument, path_text, system_files
from kvwal.following.engine import FollowedEngine
from kvwal.following.follower import Follower
from kvwal.options import Options

__all__ = ["follow"]

_CACHE_BYTES = Options().cache_bytes


def follow(path: PathArgument, *, cache_bytes: int = _CACHE_BYTES, files: Files | None = None) -> Follower:
    """Read the store in the directory `path`, which another process may be writing meanwhile.

    Args:
        path: a directory with a store. Nothing is written there, not even a lock: permission to read is enough.
        cache_bytes: memory for pages and rows of the page file; twice as much while a snapshot or scan of a former
            checkpoint is read.
        files: another file system, such as `kvwal.testing.SimulatedDisk`.

    Returns: the follower, at the newest commit that the log says is on disk. Use it in a `with` block, or close it.

    Raises:
        StoreNotFoundError: there is no store.
        CorruptionError: acknowledged data is damaged or missing.
        FormatError: not a store, or one of a newer format.
        RefusedError: the system refused a call (too many open files, no permission to read).
        SystemCallError: a call of the system failed. Both are an OSError, too.
        TypeError, ValueError: an argument cannot be right.
    """
    options = Options(cache_bytes=cache_bytes, files=system_files() if files is None else files)
    engine = FollowedEngine.attach(path_text(path), options)
    try:
        follower = Follower(engine)
        open_stores[id(follower)] = follower
        return follower
    except BaseException:
        engine.abandon()
        raise
