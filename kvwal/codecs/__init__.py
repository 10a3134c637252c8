"""Codecs: keys and values of Python's types as bytes, and back.

from kvwal import codecs

key = codecs.key_codec(tuple[str, int])
key.encode(("order", 7))                 # bytes that sort as the tuples do
key.prefix("order")                      # the range of all keys that begin with it
"""

from kvwal.codecs.codec import Codec, KeyCodec
from kvwal.codecs.key_codecs import int64, key_codec
from kvwal.codecs.parts import SEQNO, Float32, Versionstamp
from kvwal.codecs.tuples import TupleCodec, pack, unpack
from kvwal.codecs.value_codecs import compressed, counter, json, msgpack, pickle, value_codec
from kvwal.codecs.versions import Versioned, versioned

__all__ = [
    "SEQNO",
    "Codec",
    "Float32",
    "KeyCodec",
    "TupleCodec",
    "Versioned",
    "Versionstamp",
    "compressed",
    "counter",
    "int64",
    "json",
    "key_codec",
    "msgpack",
    "pack",
    "pickle",
    "unpack",
    "value_codec",
    "versioned",
]
