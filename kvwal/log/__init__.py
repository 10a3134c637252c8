"""The log: every commit, in order, on disk before it is acknowledged.

    writer | seek, verify  >  segments | reader, salvage  >  chain  >  tail, index  >  walk  >  segment  >  record
    >  intents

The formats are described where they are encoded: `intents`, `record`, `segment`, `index`. Where a log may end is
decided in `tail`.
"""

from kvwal.log.chain import Chain
from kvwal.log.intents import decode_intents, encode_extension, encode_intents, encode_put
from kvwal.log.reader import LogReader, Replay
from kvwal.log.record import LogPosition, Record
from kvwal.log.salvage import salvage_log
from kvwal.log.seek import Seek
from kvwal.log.segment import SegmentInfo
from kvwal.log.tail import LogEnd, TailRow
from kvwal.log.verify import verify_log
from kvwal.log.writer import LogWriter

__all__ = [
    "Chain",
    "LogEnd",
    "LogPosition",
    "LogReader",
    "LogWriter",
    "Record",
    "Replay",
    "Seek",
    "SegmentInfo",
    "TailRow",
    "decode_intents",
    "encode_extension",
    "encode_intents",
    "encode_put",
    "salvage_log",
    "verify_log",
]
