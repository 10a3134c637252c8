"""The log: every commit, in order, on disk before it is acknowledged.

    segmentlog  >  writer, key_history  >  stretch  >  segment_keys  >  cursor, segments, carry  >  reader, fetch  >
    chain  >  tail, index, key_table, retention  >  keys  >  walk, kept  >  segment, protocol, clock  >  record  >
    columns  >  intents  >  extension.
    Beside them, over reader and chain: seek, verify, salvage, and watch for the log of another process.

What the engine needs of any log is `protocol.Log`; `SegmentLog` is the one that keeps segments, and `RefusingLog`
stands in for one.

The formats are described where they are encoded: `extension`, `intents`, `record`, `segment`, `index`, `keys`. Where a
log may end is decided in `tail`.
"""

from kvwal.log.chain import Chain
from kvwal.log.clock import StoreClock
from kvwal.log.columns import decode_intents
from kvwal.log.cursor import SegmentCursor, hold_kept, read_kept
from kvwal.log.extension import CAUSE, EXPIRE, Extension, extension_of, meta_of
from kvwal.log.intents import encode_intents, encode_put, encode_writes, is_of_users, size_of_writes, writes_body
from kvwal.log.key_history import KeyCursor, KeyHistory, KeyRecord
from kvwal.log.protocol import Log, LogCursor, LogIdentity, LogOptions, LogStats, LogWriter, Preallocate, RefusingLog
from kvwal.log.reader import LogReader, Replay
from kvwal.log.record import LogPosition, Record
from kvwal.log.retention import ArchiveLimits, Hold, HoldInfo, Limits, sealed_beyond
from kvwal.log.run import Run
from kvwal.log.salvage import salvage_log
from kvwal.log.seek import Seek
from kvwal.log.segment import SegmentInfo, replay_count, unneeded_bytes
from kvwal.log.segmentlog import SegmentLog
from kvwal.log.stretch import Stretch
from kvwal.log.tail import LogEnd, TailRow
from kvwal.log.verify import verify_log
from kvwal.log.watch import FollowedCursor, Heard, Watch

__all__ = [
    "CAUSE",
    "EXPIRE",
    "ArchiveLimits",
    "Chain",
    "Extension",
    "FollowedCursor",
    "Heard",
    "Hold",
    "HoldInfo",
    "KeyCursor",
    "KeyHistory",
    "KeyRecord",
    "Limits",
    "Log",
    "LogCursor",
    "LogEnd",
    "LogIdentity",
    "LogOptions",
    "LogPosition",
    "LogReader",
    "LogStats",
    "LogWriter",
    "Preallocate",
    "Record",
    "RefusingLog",
    "Replay",
    "Run",
    "Seek",
    "SegmentCursor",
    "SegmentInfo",
    "SegmentLog",
    "StoreClock",
    "Stretch",
    "TailRow",
    "Watch",
    "decode_intents",
    "encode_intents",
    "encode_put",
    "encode_writes",
    "is_of_users",
    "size_of_writes",
    "writes_body",
    "extension_of",
    "hold_kept",
    "meta_of",
    "read_kept",
    "replay_count",
    "salvage_log",
    "sealed_beyond",
    "unneeded_bytes",
    "verify_log",
]
