"""kvwal: an embedded, ordered, transactional key-value store that survives power loss.

    import kvwal

    with kvwal.open("app.kv") as db:
        db[b"user:1"] = b"ada"                  # durable when the line returns
        with db.transaction() as txn:           # serializable
            txn[b"n"] = b"%d" % (int(txn.get(b"n", b"0")) + 1)
        for key, value in db.scan(prefix=b"user:"):
            print(key, value)
"""

# First of all: it refuses an interpreter in which what follows would fail later, and say less.
from kvwal import (
    codecs,
    interpreter,  # noqa: F401  # importing it is the check
)
from kvwal.api.followed_table import FollowedTable
from kvwal.api.follower import Follower
from kvwal.api.following import follow
from kvwal.api.naming import IndexInfo, TableInfo
from kvwal.api.open import open
from kvwal.api.shared import shared
from kvwal.api.store import Store
from kvwal.api.table import Table, TableDifference, TableVersion
from kvwal.backup.archive import Archive, ArchiveStatus, archive
from kvwal.backup.keeping import Keep
from kvwal.backup.making import BackupReport
from kvwal.backup.restoring import RestoreReport, restore
from kvwal.batch import WriteBatch
from kvwal.codecs import SEQNO
from kvwal.db.cursor import Cursor
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.engine.own_commits import OwnCommits
from kvwal.engine.parked import Parked
from kvwal.engine.recovery import RecoveryReport
from kvwal.engine.stats import Pin, Stats
from kvwal.engine.verify import VerifyReport
from kvwal.errors import (
    ArchiveBehindError,
    ArchiveDiverged,
    BackupDestinationError,
    ClosedError,
    CodecError,
    ConflictError,
    ConsumerExistsError,
    CorruptionError,
    DiskFullError,
    EnvironmentFailure,
    Error,
    FeedGap,
    FencedError,
    Finding,
    ForkDiverged,
    ForkedError,
    FormatError,
    IndexesChangedError,
    IndexNotDeclaredError,
    IndexNotFoundError,
    IndexNotReadyError,
    InternalError,
    LockedError,
    NotInBackup,
    ObjectMissing,
    PoisonedError,
    ReadOnlyError,
    ReentrancyError,
    RefusedError,
    SnapshotTooOld,
    StaleError,
    StoreExistsError,
    StoreNotFoundError,
    StoreRemovedError,
    SystemCallError,
    TableCodecError,
    TableExistsError,
    TableNotFoundError,
    TransactionTooLargeError,
    UsageError,
)
from kvwal.features import VERSION
from kvwal.feed.change import Change
from kvwal.feed.changes import Bootstrap, Changes
from kvwal.feed.commits import Commit
from kvwal.feed.consumer import Consumer
from kvwal.feed.key_versions import KeyVersion, KeyVersions
from kvwal.feed.lag import ConsumerInfo
from kvwal.feed.owned import Batch
from kvwal.following.progress import Lag
from kvwal.keys import END, MAX_BATCH_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES, End, Seqno, prefix_stop
from kvwal.options import OpenOptions
from kvwal.positions import Position
from kvwal.salvaging import SalvageReport, salvage
from kvwal.tables.index import Index, IndexEntry, IndexWithin
from kvwal.tables.migration import MigrationReport
from kvwal.tables.within import BatchTable, SnapshotTable, TransactionTable

__version__ = VERSION

__all__ = [
    "END",
    "MAX_BATCH_BYTES",
    "MAX_KEY_BYTES",
    "MAX_VALUE_BYTES",
    "SEQNO",
    "Archive",
    "ArchiveBehindError",
    "ArchiveDiverged",
    "ArchiveStatus",
    "BackupDestinationError",
    "BackupReport",
    "Batch",
    "BatchTable",
    "Bootstrap",
    "Change",
    "Changes",
    "ClosedError",
    "CodecError",
    "Commit",
    "ConflictError",
    "Consumer",
    "ConsumerExistsError",
    "ConsumerInfo",
    "CorruptionError",
    "Cursor",
    "DiskFullError",
    "End",
    "EnvironmentFailure",
    "Error",
    "FeedGap",
    "FencedError",
    "Finding",
    "FollowedTable",
    "Follower",
    "ForkDiverged",
    "ForkedError",
    "FormatError",
    "Index",
    "IndexEntry",
    "IndexInfo",
    "IndexNotDeclaredError",
    "IndexNotFoundError",
    "IndexNotReadyError",
    "IndexWithin",
    "IndexesChangedError",
    "InternalError",
    "Keep",
    "KeyVersion",
    "KeyVersions",
    "Lag",
    "LockedError",
    "NotInBackup",
    "MigrationReport",
    "ObjectMissing",
    "OpenOptions",
    "OwnCommits",
    "Parked",
    "Pin",
    "PoisonedError",
    "ReadOnlyError",
    "RecoveryReport",
    "ReentrancyError",
    "RefusedError",
    "RestoreReport",
    "SalvageReport",
    "Position",
    "Seqno",
    "Snapshot",
    "SnapshotTable",
    "SnapshotTooOld",
    "StaleError",
    "Stats",
    "Store",
    "StoreExistsError",
    "StoreNotFoundError",
    "StoreRemovedError",
    "SystemCallError",
    "Table",
    "TableCodecError",
    "TableDifference",
    "TableExistsError",
    "TableInfo",
    "TableNotFoundError",
    "TableVersion",
    "Transaction",
    "TransactionTable",
    "TransactionTooLargeError",
    "UsageError",
    "VerifyReport",
    "WriteBatch",
    "archive",
    "codecs",
    "follow",
    "open",
    "prefix_stop",
    "restore",
    "salvage",
    "shared",
]
