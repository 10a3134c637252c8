"""A persistence module for the Python library `eventsourcing`: `PERSISTENCE_MODULE=kvwal.eventsourcing`.

See docs/eventsourcing.md. `pip install 'kvwal[eventsourcing]'` has what it needs.
"""

from kvwal.eventsourcing.dcb import KvwalDCBRecorder
from kvwal.eventsourcing.factory import KvwalFactory
from kvwal.eventsourcing.recorders import (
    KvwalAggregateRecorder,
    KvwalApplicationRecorder,
    KvwalProcessRecorder,
    KvwalTrackingRecorder,
)

__all__ = [
    "Factory",
    "KvwalAggregateRecorder",
    "KvwalApplicationRecorder",
    "KvwalDCBRecorder",
    "KvwalFactory",
    "KvwalProcessRecorder",
    "KvwalTrackingRecorder",
]

#: As the library's own modules name it.
Factory = KvwalFactory
