"""What rooms that answer and rooms that ask are tested with."""

import contextlib
import os
import resource
import time

import gevent
from harness import DOMAIN

from shimmercat import Request


class Body:
    """A request's body that is there, or comes when a gate opens."""

    def __init__(self, *pieces, length=None, trailers=(), gate=None):
        self._pieces, self.length = list(pieces), length
        self.trailers, self._gate = trailers, gate
        self.was_read = False

    def read(self):
        self.was_read = True
        if self._gate:
            self._gate.wait()
        piece = self._pieces.pop(0) if self._pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


def request_for(target, *fields, method="GET", host=DOMAIN,
                client="192.0.2.1"):
    """A request over HTTP/2 that came just now."""
    request = Request.from_fields([
        (b":method", method.encode()), (b":scheme", b"https"),
        (b":authority", host.encode()), (b":path", target.encode()),
        *fields], "h2", client)
    request.started = time.monotonic()
    return request


def body_of(answer):
    """All octets of a reply or response, which is over then."""
    body = answer.body
    if isinstance(body, bytes):
        return body
    try:
        return b"".join(getattr(body, "pieces", None) or iter(
            lambda: body.read(50_000), b""))
    finally:
        body.close()


@contextlib.contextmanager
def no_descriptors():
    """Let this process open nothing more, after the event loop."""
    gevent.sleep(0)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.dup(0)
    os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
