#!/usr/bin/env python
"""A web server of several processes over one store: one process writes, and workers that follow it answer reads.

    python examples/prefork_web.py shop.kv --port 8000 --workers 4

    curl -X PUT --data ada  localhost:8000/user:1            # {"seqno": 1}
    curl localhost:8000/user:1                               # ada
    curl 'localhost:8000/user:1?after=1'                     # as above, and shows commit 1 at the least

The parent holds two sockets and no store. It starts the writer and the workers, and starts again what dies. A worker
opens its follower after the fork. It sends a PUT on to the writer, and says with each answer which commit that is from
(`Kvwal-Seqno`). A client that sends the seqno of its own PUT as `after` reads what it wrote, whichever worker it meets.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

import kvwal

# A worker that cannot show a commit for so long says so (503), and the client asks again.
WAIT_S = 2.0
# Without `after`: an answer is at most this old.
MAX_LAG_S = 0.5
# A client that sends nothing does not hold up a worker.
IDLE_S = 2.0


class _Handler(BaseHTTPRequestHandler):
    timeout = IDLE_S

    def key(self) -> bytes:
        return unquote_to_bytes(urlsplit(self.path).path[1:])

    def body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        if size < 0:
            raise ValueError(f"a body of {size} bytes")
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client has gone in the middle of the body")
        return body

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ValueError as error:
            # What is no number, and no key: nothing was answered yet.
            self.close_connection = True
            self.answer(HTTPStatus.BAD_REQUEST, str(error).encode())

    def answer(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # the name that the class has
        pass


class _Server(HTTPServer):
    """Takes connections from a socket that it inherited."""

    def __init__(self, listening: socket.socket, handler: type[_Handler]) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._parent = os.getppid()

    def service_actions(self) -> None:
        if os.getppid() != self._parent:
            os._exit(1)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client has gone; the next one is served."""


def write(path: str, listening: socket.socket) -> None:
    """The writer: each PUT is a commit, which is on disk when it is answered."""
    with kvwal.open(path) as db:

        class Writing(_Handler):
            def do_PUT(self) -> None:
                key, value = self.key(), self.body()
                # Two keys, so that one can see that they change together.
                with db.own_commits() as own, db.batch() as batch:
                    batch.put(key, value)
                    batch.put(b"copy of " + key, value)
                self.answer(HTTPStatus.OK, json.dumps({"seqno": own.last}).encode())

        _Server(listening, Writing).serve_forever()


def work(path: str, listening: socket.socket, writer: tuple[str, int]) -> None:
    """A worker: answers from what it follows."""
    with kvwal.follow(path, max_lag_s=MAX_LAG_S) as live:

        class Working(_Handler):
            def do_GET(self) -> None:
                after = int(parse_qs(urlsplit(self.path).query).get("after", ["0"])[0])
                try:
                    if not live.wait(after, WAIT_S):
                        self.answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not shown yet")
                        return
                    with live.snapshot() as now:
                        value, copy, seqno = now.get(self.key()), now.get(b"copy of " + self.key()), now.seqno
                except (kvwal.StaleError, kvwal.SnapshotTooOld) as error:
                    self.answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode())
                    return
                status = HTTPStatus.NOT_FOUND if value is None else HTTPStatus.OK
                self.answer(status, value or b"", Kvwal_Seqno=seqno, Same=value == copy, Worker=os.getpid())

            def do_PUT(self) -> None:
                connection = http.client.HTTPConnection(*writer, timeout=WAIT_S)
                try:
                    connection.request("PUT", self.path, self.body())
                    found = connection.getresponse()
                    self.answer(found.status, found.read())
                except (OSError, http.client.HTTPException):
                    # It may be written, or not.
                    self.answer(HTTPStatus.BAD_GATEWAY, b"the writer did not answer")
                finally:
                    connection.close()

        _Server(listening, Working).serve_forever()


def _listening(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    found.listen(64)
    # Several processes wake up for one connection.
    found.setblocking(False)
    return found


_AWAITED = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


def _start(name: str, role: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        print(name, pid, flush=True)
        return pid
    code = 1
    try:
        for number in _AWAITED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        role()
    except kvwal.LockedError:
        # The former writer is being killed.
        time.sleep(0.05)
    except BaseException as error:  # noqa: BLE001  # the parent starts it again
        print(f"{name}: {error!r}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    finally:
        os._exit(code)


def main() -> None:
    """The parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=4)
    given = parser.parse_args()
    kvwal.open(given.path).close()
    front, back = _listening(given.port), _listening(0)
    roles: list[tuple[str, Callable[[], None]]] = [("writer", lambda: write(given.path, back))]
    roles += [("worker", lambda: work(given.path, front, back.getsockname()))] * given.workers
    print("port", front.getsockname()[1], flush=True)
    # They wait until they are asked for: a handler could come between a fork and the note of who was started.
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {_start(*role): role for role in roles}
    while signal.sigwait(_AWAITED) == signal.SIGCHLD:
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            role = running.pop(pid)
            running[_start(*role)] = role
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
