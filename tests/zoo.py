"""Small HTTP/1.1 backends in threads, well-behaved and otherwise.

An animal is what an `Origin` is made of: a function that gets what was asked
(an `Asked`) and gives what is sent, as bytes or as pieces.  A piece is bytes
to be sent, a number of seconds to wait, or CLOSE or RESET: the end of the
connection.
"""

import contextlib
import email.utils
import hashlib
import os
import socket
import struct
import threading
import typing

CLOSE, RESET = "close", "reset"


class Asked(typing.NamedTuple):
    """A request as it came in."""

    method: str
    target: str
    #: (lower-case name, value) in their order
    fields: list
    body: bytes
    #: the head's octets, for those who look for smuggled things
    head: bytes

    def field(self, name):
        """Return the values of a field, joined, or None."""
        values = [value for key, value in self.fields if key == name]
        return ", ".join(values) if values else None


class Origin:
    """A backend on a port of its own that counts what it is asked.

    A context manager; `animal` may be replaced at any time.  With `path` it
    listens on a Unix socket.
    """

    def __init__(self, animal, path=None):
        self.animal, self._path = animal, path
        #: all requests so far
        self.asked = []
        self.port = None
        #: connections accepted so far
        self.accepted = 0
        self._ended = threading.Event()
        self._listener = None
        self._open = set()
        self._lock = threading.Lock()

    def __enter__(self):
        self.come()
        return self

    def __exit__(self, kind, error, trace):
        self._ended.set()
        self.go()

    def come(self):
        """Listen, on the same port as before if there was one."""
        if self._path:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._path))
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port or 0))
            self.port = listener.getsockname()[1]
        listener.listen(512)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,),
                         daemon=True).start()

    def go(self):
        """Be down: nobody listens, and all connections end."""
        listener, self._listener = self._listener, None
        if listener:
            # Wakes the thread in accept, which close alone doesn't.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for wire in self._open:
                with contextlib.suppress(OSError):
                    wire.shutdown(socket.SHUT_RDWR)

    def count(self, target=None, method=None):
        """Return how many requests came, to a target or in all."""
        return sum(target in (None, asked.target)
                   and method in (None, asked.method)
                   for asked in tuple(self.asked))

    def has_open(self):
        """Return whether a connection has not been closed yet."""
        return bool(self._open)

    def _accept(self, listener):
        while True:
            try:
                wire, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(wire,),
                             daemon=True).start()

    def _serve(self, wire):
        with self._lock:
            self._open.add(wire)
        try:
            stream = wire.makefile("rb")
            while asked := _read_request(stream):
                self.asked.append(asked)
                if not self._send(wire, self.animal(asked)):
                    break
        except OSError:
            # The other side has left; that is its right.
            pass
        finally:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
            wire.close()
            with self._lock:
                self._open.discard(wire)

    def _send(self, wire, pieces):
        """Send the pieces of an answer; return whether to go on."""
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            if piece == RESET:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack("ii", 1, 0))
                # A close would wait for the file that was made of it.
                os.close(wire.detach())
                return False
            if piece == CLOSE:
                return False
            if isinstance(piece, bytes):
                wire.sendall(piece)
            elif self._ended.wait(piece):
                return False
        return True


def _read_request(stream):
    """Return the next request, or None at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline(65_536)
        if not line:
            return None
        head += line
    line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = line.split(" ", 2)
    fields = [(name.lower(), value.strip()) for name, _, value in (
        line.partition(":") for line in lines)]
    named = dict(fields)
    body = b""
    if "chunked" in named.get("transfer-encoding", ""):
        body = _read_chunks(stream)
    elif "content-length" in named:
        body = stream.read(int(named["content-length"]))
    return Asked(method, target, fields, body, head)


def _read_chunks(stream):
    body = b""
    while line := stream.readline():
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        body += stream.read(size)
        stream.readline()
    else:
        raise ConnectionResetError("cut off in a body")
    while stream.readline().strip():
        continue
    return body


def head(status="200 OK", *fields, **named):
    """Return the head of an answer; names are given as words_with_bars."""
    lines = [f"{name}: {value}" for name, value in (
        *fields, *((key.replace("_", "-"), value)
                   for key, value in named.items()))]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode(
        "latin-1")


def answer(body=b"", status="200 OK", **named):
    """Return a whole answer with its length."""
    return head(status, content_length=len(body), **named) + body


def chunk(piece):
    """Return a chunk; an empty one is the last."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


class Files:
    """Serves a dictionary of files like a web server does.

    With validators, conditional answers, and 404 for the rest.
    """

    def __init__(self, files, **named):
        """`named` fields go into each answer."""
        self.files, self._named = dict(files), named
        self.modified = 1_500_000_000

    def __call__(self, asked):
        body = self.files.get(asked.target)
        if body is None:
            return answer(b"none\n", "404 Not Found")
        etag = f'"{hashlib.sha256(body).hexdigest()[:12]}"'
        validators = {"etag": etag, "last_modified": email.utils.formatdate(
            self.modified, usegmt=True), **self._named}
        if asked.field("if-none-match") == etag:
            return head("304 Not Modified", **validators)
        whole = answer(body, **validators)
        return whole[:-len(body)] if asked.method == "HEAD" and body else whole


def slow(animal, seconds):
    """Answers like another animal, after a while."""
    def wait(asked):
        yield seconds
        pieces = animal(asked)
        yield from [pieces] if isinstance(pieces, bytes) else pieces
    return wait


def dripping(body, seconds, size=1, **named):
    """Sends its body a little at a time."""
    def drip(_asked):
        yield head(content_length=len(body), **named)
        for start in range(0, len(body), size):
            yield body[start:start + size]
            yield seconds
    return drip


def in_chunks(*pieces, **named):
    """Sends chunks, and the last one; pieces may be seconds, too."""
    def send(_asked):
        yield head(transfer_encoding="chunked", **named)
        for piece in pieces:
            yield chunk(piece) if isinstance(piece, bytes) else piece
        yield chunk(b"")
    return send


def truncating(body, **named):
    """Promises a length, sends half of it, and closes."""
    def send(_asked):
        yield head(content_length=len(body), **named)
        yield body[:len(body) // 2]
        yield CLOSE
    return send


def truncating_chunks(body):
    """Closes within a body in chunks."""
    def send(_asked):
        yield head(transfer_encoding="chunked") + chunk(body)
        yield CLOSE
    return send


def overlong(body, excess=b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX"):
    """Sends more than it has promised, which looks like an answer."""
    return lambda _asked: answer(body) + excess


def closing_early(_asked):
    """Closes instead of answering."""
    return [CLOSE]


def resetting(_asked):
    """Resets the connection instead of answering."""
    return [RESET]


def closing_in_head(_asked):
    """Closes within the head."""
    return [b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE]


def garbage(_asked):
    """Sends what is not HTTP."""
    return [b"\x16\x03\x01 this is not HTTP\r\n\r\n" * 4, CLOSE]


def failing(_asked):
    """Answers 503."""
    return answer(b"overload\n", "503 Service Unavailable")


def silent(_asked):
    """Accepts, reads, and never answers."""
    return [600.0]
