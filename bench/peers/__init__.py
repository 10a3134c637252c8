"""The stores that are measured, in the order of the tables."""

from __future__ import annotations

from bench.peers.base import Durability, How, NotOffered, Peer
from bench.peers.dbm_sqlite import DbmSqlite
from bench.peers.disk_cache import DiskCache
from bench.peers.kvwal_store import Kvwal
from bench.peers.leveldb import LevelDb
from bench.peers.limits import BareDict, BareFile
from bench.peers.lmdb import Lmdb
from bench.peers.rocks import Rocks
from bench.peers.sqlite import Sqlite
from bench.peers.zodb import Zodb

__all__ = ["PEERS", "Durability", "How", "NotOffered", "Peer"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Kvwal, Sqlite, Lmdb, Rocks, LevelDb, DiskCache, DbmSqlite, Zodb, BareFile, BareDict)
}
