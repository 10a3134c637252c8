"""The web server of `examples/prefork_web.py`, of which processes are killed and stopped: every answer is checked."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvwal

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Site:
    """The running server, and the pids of its processes."""

    def __init__(self, path: str, workers: int) -> None:
        command = [sys.executable, str(ROOT / "examples" / "prefork_web.py"), path, "--port", "0"]
        self.parent = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.parent.stdout is not None
        self.port = int(self.parent.stdout.readline().split()[1])
        self.pids: dict[int, str] = {}
        self.started = 0
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.parent.stdout is not None
        for line in self.parent.stdout:
            name, pid = line.split()
            self.pids[int(pid)] = name
            self.started += 1

    def signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def end(self) -> None:
        self.parent.terminate()
        self.parent.wait(20)
        self._reading.join(20)
        assert not self._reading.is_alive(), "a process of the site has outlived it"
        assert self.parent.stdout is not None
        self.parent.stdout.close()


@contextlib.contextmanager
def site(path: str, workers: int = 4) -> Iterator[Site]:
    found = Site(path, workers)
    try:
        yield found
    finally:
        found.end()


class Client(threading.Thread):
    """Puts numbers, each larger than the one before, into a key of its own, and reads them from any worker."""

    def __init__(self, port: int, name: str, until_s: float) -> None:
        super().__init__(name=name)
        self._port = port
        self._until_s = until_s
        self.acknowledged = self.asked = self.seqno = 0
        self.answers = self.puts = self.refused = 0
        self.workers: set[str] = set()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self._until_s:
                self.put()
                for _ in range(3):
                    self.get(self.seqno)
                self.get(0)
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
            self.failure = error

    def ask(self, method: str, target: str, body: bytes | None = None) -> tuple[http.client.HTTPResponse, bytes] | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=3)
        try:
            connection.request(method, target, body)
            response = connection.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException):
            # A process was killed.
            self.refused += 1
            return None
        finally:
            connection.close()

    def put(self) -> None:
        self.asked += 1
        found = self.ask("PUT", f"/{self.name}", b"%d" % self.asked)
        if found is None or found[0].status != 200:
            self.refused += 1
            return
        seqno = json.loads(found[1])["seqno"]
        assert seqno > self.seqno
        self.acknowledged, self.seqno = self.asked, seqno
        self.puts += 1

    def get(self, after: int) -> None:
        found = self.ask("GET", f"/{self.name}?after={after}")
        if found is None or found[0].status == 503:
            self.refused += 1
            return
        response, body = found
        shown = int(response.headers["Kvwal-Seqno"])
        value = int(body or b"0")
        assert response.headers["Same"] == "True"
        assert shown >= after
        if after:
            assert self.acknowledged <= value, (self.name, self.acknowledged, value, shown, self.seqno)
        # What was asked for and not acknowledged may be there, or not.
        assert value <= self.asked
        self.workers.add(response.headers["Worker"])
        self.answers += 1


def storm(path: str, seconds: float, seed: int, clients: int = 4) -> tuple[int, int]:
    """Clients while processes are killed and stopped; returns how many answers there were, and kills."""
    rng = random.Random(seed)
    kills = 0
    with site(path) as server:
        until_s = time.monotonic() + seconds
        asking = [Client(server.port, f"client{n}", until_s) for n in range(clients)]
        for client in asking:
            client.start()
        while time.monotonic() < until_s:
            time.sleep(rng.uniform(0.02, 0.2))
            pid = rng.choice(list(server.pids))
            if rng.random() < 0.5:
                server.signal(pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0, 0.3))
                server.signal(pid, signal.SIGCONT)
            else:
                del server.pids[pid]
                server.signal(pid, signal.SIGKILL)
                kills += 1
        for client in asking:
            client.join(60)
            if client.failure is not None:
                raise client.failure
        # What was acknowledged is there when all is over.
    with kvwal.open(path, "r") as db:
        for client in asking:
            assert client.acknowledged <= int(db.get(client.name.encode(), b"0")) <= client.asked
            assert db.get(client.name.encode()) == db.get(b"copy of " + client.name.encode())
        assert db.verify().ok
    assert any(client.puts for client in asking)
    assert len(set.union(*(client.workers for client in asking))) >= 2
    return sum(client.answers for client in asking), kills


def test_workers_that_follow_answer_right_while_processes_are_killed(tmp_path: Path) -> None:
    answers, kills = storm(str(tmp_path / "web.kv"), 4.0, seed=1)
    # How many there are says how busy the machine is; each of them was checked.
    assert answers > 4
    assert kills > 1


def test_a_put_whose_sender_is_killed_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "web.kv")
    with site(path, workers=1) as server:
        client = Client(server.port, "client", 0)
        client.put()
        assert client.acknowledged == 1
        for body in ("", "9"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sender:
                sender.sendall(f"PUT /client HTTP/1.1\r\nContent-Length: 5\r\n\r\n{body}".encode())
                sender.shutdown(socket.SHUT_WR)
                while sender.recv(1000):
                    pass
        client.get(client.seqno)
    with kvwal.open(path, "r") as db:
        assert (db[b"client"], db.last_seqno) == (b"1", 1)


def test_what_cannot_be_right_is_said_to_be_bad(tmp_path: Path) -> None:
    asked: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/key?after=x", {}),
        ("GET", "/key?after=-1", {}),
        ("PUT", "/key", {"Content-Length": "many"}),
        ("PUT", "/key", {"Content-Length": "-1"}),
    ]
    with site(str(tmp_path / "web.kv"), workers=1) as server:
        for method, target, headers in asked:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request(method, target, headers=headers)
            assert connection.getresponse().status == 400, (method, target, headers)
            connection.close()
        client = Client(server.port, "client", 0)
        client.put()
        assert client.acknowledged == 1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_storm(tmp_path: Path, seed: int) -> None:
    answers, kills = storm(str(tmp_path / "web.kv"), 60.0, seed=seed, clients=8)
    print(f"{answers} answers, {kills} kills")
    assert answers > 100
    assert kills > 50
