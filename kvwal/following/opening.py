"""Following a store."""

from __future__ import annotations

from kvwal.api.open import open_stores
from kvwal.files import Files, PathArgument, path_text, system_files
from kvwal.following.engine import FollowedEngine
from kvwal.following.follower import Follower
from kvwal.options import Options

__all__ = ["follow"]

_CACHE_BYTES = Options().cache_bytes


def follow(
    path: PathArgument,
    *,
    pin: bool = True,
    name: str | None = None,
    cache_bytes: int = _CACHE_BYTES,
    files: Files | None = None,
) -> Follower:
    """Read the store in the directory `path`, which another process may be writing meanwhile.

    Args:
        path: a directory with a store. Permission to read is enough.
        pin: keep what is read, by a file in `readers/` that the writer honours, within its `hold_s` and `hold_bytes`.
            Where none can be made, and with False, nothing is written, and what is read may be taken away.
        name: what `Store.pins` calls it, at most 64 bytes of UTF-8; None: after its program.
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
    engine = FollowedEngine.attach(path_text(path), options, pin=pin, name=name)
    try:
        follower = Follower(engine)
        open_stores[id(follower)] = follower
        return follower
    except BaseException:
        engine.abandon()
        raise
