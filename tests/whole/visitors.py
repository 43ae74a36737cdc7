"""Visitors who ask again and again, and remember who was not answered."""

import contextlib
import re
import threading

from h2_client import H2Client
from harness import DOMAIN

_AT_ONCE = 4
#: between two turns of one, so that the server is what has the processor
_PAUSE_SECONDS = 0.005


class Visitors:
    """Threads that ask for the first page until the end of a block.

    Half of them speak HTTP/2 and come back when they are told to go, half
    speak HTTP/1.1; every fifth visit has a connection of its own.
    """

    def __init__(self, server, count=4, path="/"):
        self._server, self._path = server, path
        self._stop = threading.Event()
        #: requests that were answered by 200
        self.answered = 0
        #: what happened to the others
        self.failures = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._visit, args=(work,))
                         for n in range(count)
                         for work in [(self._http2, self._http1)[n % 2]]]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)

    def _visit(self, work):
        while not self._stop.is_set():
            try:
                work()
            except (OSError, AssertionError, ValueError) as error:
                self.failures.append(repr(error))

    def _count(self, count):
        with self._lock:
            self.answered += count

    def _http2(self):
        """Ask over one connection until the server leaves."""
        with H2Client(self._server) as client:
            asked = []
            while not (client.goaways or self._stop.is_set()):
                while len(client.open) < _AT_ONCE:
                    asked.append(client.get(self._path))
                if not client.turn():
                    break
                self._stop.wait(_PAUSE_SECONDS)
            client.finish()
            answered = [stream for stream in asked
                        if stream not in client.open
                        and stream not in client.resets
                        and client.heads[stream][":status"] == "200"]
            self._count(len(answered))
            assert len(answered) == len(asked), (
                f"{len(asked) - len(answered)} of {len(asked)}, goaways"
                f" {client.goaways}, resets {client.resets}")

    def _http1(self):
        """Ask over a connection that is kept, then over one that is not."""
        question = (f"GET {self._path} HTTP/1.1\r\nHost: {DOMAIN}\r\n"
                    .encode())
        for rest, count in (b"\r\n", 5), (b"Connection: close\r\n\r\n", 1):
            with self._server.connect() as client:
                for _ in range(count):
                    client.sendall(question + rest)
                    head = _answer(client)
                    assert head.startswith(b"HTTP/1.1 200 "), head
                    self._count(1)
                    self._stop.wait(_PAUSE_SECONDS)
                    if b"connection: close" in head.lower():
                        break
                with contextlib.suppress(OSError):
                    client.unwrap()


def _answer(client):
    """Take a whole answer; return its head."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(1 << 16)
        assert piece, f"ended after {received!r}"
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    while len(body) < length:
        piece = client.recv(1 << 16)
        assert piece, f"ended within a body, {len(body)} of {length}"
        body += piece
    return head
