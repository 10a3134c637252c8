"""Following a store."""

from __future__ import annotations

from kvwal.api.follower import Follower
from kvwal.api.opened import made_over
from kvwal.files import Files, PathArgument, path_text, system_files
from kvwal.following.engine import FollowedEngine
from kvwal.keys import as_seconds
from kvwal.options import Options

__all__ = ["CACHE_BYTES", "follow"]

#: Memory for pages and rows, unless something else is asked for.
CACHE_BYTES = Options().cache_bytes


def follow(
    path: PathArgument,
    *,
    pin: bool = True,
    name: str | None = None,
    max_lag_s: float | None = None,
    cache_bytes: int = CACHE_BYTES,
    files: Files | None = None,
) -> Follower:
    """Read the store in the directory `path`, which another process may be writing meanwhile.

    Args:
        path: a directory with a store. Permission to read is enough.
        pin: keep what is read, by a file in `readers/` that the writer honours, within its `hold_s` and `hold_bytes`.
            Where none can be made, and with False, nothing is written, and what is read may be taken away.
        name: what `Store.pins` calls it, at most 64 bytes of UTF-8; None: after its program.
        max_lag_s: a read of now shows every commit that was made longer ago than this, in seconds: where it may not, it
            moves the follower, waits for up to 0.25 s where its writer is about to say that what there is is on disk,
            and raises `StaleError` if that does not help. A writer says within 0.1 s that a commit is on disk, so less
            than 0.4 is little. None: reads move nothing.
        cache_bytes: memory for pages and rows of the page file; twice as much while a snapshot or scan of a former
            checkpoint is read.
        files: another file system, such as `kvwal.testing.SimulatedDisk`.

    Returns: the follower, at the newest commit that the log says is on disk, which one that was made in the last 0.1 s
        may be beyond: `Follower.wait` for that. Use it in a `with` block, or close it.

    Raises:
        StoreNotFoundError: there is no store.
        CorruptionError: acknowledged data is damaged or missing.
        FormatError: not a store, or one of a newer format.
        RefusedError: the system refused a call (too many open files, no permission to read).
        SystemCallError: a call of the system failed. Both are an OSError, too.
        TypeError, ValueError: an argument cannot be right.
    """
    lag_s = None if max_lag_s is None else as_seconds("max_lag_s", max_lag_s)
    options = Options(cache_bytes=cache_bytes, files=system_files() if files is None else files)

    def attach() -> FollowedEngine:
        engine = FollowedEngine.attach(path_text(path), options, pin=pin, name=name)
        engine.progress.freshness.max_lag_s = lag_s
        return engine

    return made_over(attach, Follower)
