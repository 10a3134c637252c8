"""The log: every commit, in order, on disk before it is acknowledged.

    writer | reader  >  segments, salvage  >  tail, index  >  walk  >  segment  >  record  >  intents

The formats are described where they are encoded: `intents`, `record`, `segment`, `index`. Where a log may end is
decided in `tail`.
"""

from kvwal.log.intents import decode_intents, encode_extension, encode_intents, encode_put
from kvwal.log.reader import LogReader
from kvwal.log.record import LogPosition, Record, segment_name
from kvwal.log.segment import SegmentInfo
from kvwal.log.segments import Preallocate
from kvwal.log.tail import Damage, LogEnd, TailRow
from kvwal.log.writer import LogWriter

__all__ = [
    "Damage",
    "LogEnd",
    "LogPosition",
    "LogReader",
    "LogWriter",
    "Preallocate",
    "Record",
    "SegmentInfo",
    "TailRow",
    "decode_intents",
    "encode_extension",
    "encode_intents",
    "encode_put",
    "segment_name",
]
