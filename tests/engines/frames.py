"""A client that speaks HTTP/2 frame by frame, lawfully or not.

What it sends is made by hand here; what it reads is parsed by hyperframe and
hpack, so that no one implementation's opinion is on both sides.  Waiting is
always for a condition and up to a deadline; that nothing happened is shown by
a PING that comes back.
"""

import collections
import functools
import operator
import os
import socket
import ssl
import time
import typing

import hpack
import hyperframe.frame

(DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY,
 WINDOW_UPDATE, CONTINUATION) = range(10)
PRIORITY_UPDATE = 16
ACK = END_STREAM = 1
END_HEADERS = 4
PADDED = 8
WITH_PRIORITY = 32
(NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR,
 SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL,
 COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM) = range(12)
(HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE,
 MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE) = range(1, 7)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: what a read may take before the case has failed
PATIENCE_SECONDS = 5
#: first stream of the requests that show that a connection still lives
_SPARE_STREAM = 1_000_001


class Target(typing.NamedTuple):
    """A server, and one file that it is known to serve."""

    host: str
    port: int
    authority: bytes
    path: bytes
    content: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Any frame, legal or not; `stream` may have its reserved bit set."""
    length = len(payload).to_bytes(3, "big")
    return length + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def settings(*pairs: tuple) -> bytes:
    """A SETTINGS frame with pairs of identifier and value in their order."""
    entries = (
        identifier.to_bytes(2, "big") + value.to_bytes(4, "big")
        for identifier, value in pairs
    )
    return frame(SETTINGS, 0, 0, b"".join(entries))


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def reset(stream: int, code: int = CANCEL) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """An HPACK integer with a prefix of `bits` (RFC 7541 section 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([first | value])
    octets = [first | limit]
    value -= limit
    while value >= 128:
        octets.append(value & 127 | 128)
        value >>= 7
    return bytes([*octets, value])


def text(octets: bytes) -> bytes:
    """An HPACK string without Huffman coding (RFC 7541 section 5.2)."""
    return integer(len(octets), 7) + octets


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    """A literal field with a new name; `first` 0x40 indexes it as well."""
    return bytes([first]) + text(name) + text(value)


def block(*fields: tuple) -> bytes:
    """A field block that leaves the dynamic table alone."""
    return b"".join(literal(name, value) for name, value in fields)


def tls_context(
    alpn: typing.Sequence = ("h2",), version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """A client's context that believes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(alpn)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


def dial(target: Target, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A TLS connection on which nothing was sent yet."""
    plain = socket.create_connection(target[:2], PATIENCE_SECONDS)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = target.authority.decode().rpartition(":")[0]
    try:
        return context.wrap_socket(
            plain, server_hostname=name or target.authority.decode()
        )
    except BaseException:
        plain.close()
        raise


class Exchange:
    """What the server sent on one stream."""

    def __init__(self):
        self.heads = []
        self.body = b""
        self.ended = False
        self.resets = []

    @property
    def reset(self) -> int | None:
        """The code of the first RST_STREAM, None as long as there is none."""
        return self.resets[0] if self.resets else None

    @property
    def status(self) -> int:
        """The status of the final response, 0 as long as there is none."""
        codes = [int(dict(head).get(b":status", 0)) for head in self.heads]
        return next((code for code in codes if code >= 200), 0)

    @property
    def fields(self) -> dict:
        """The fields of the last head that came."""
        return dict(self.heads[-1])


class Client:
    """One connection, and all that was read from it.

    `windows` False leaves the connection's window at its 65,535 octets, and
    `hello` False sends neither preface nor SETTINGS.
    """

    def __init__(self, target, *pairs, windows=True, hello=True):
        self.target = target
        self.exchanges = collections.defaultdict(Exchange)
        self.settings = {}
        self.frames = []
        self.acks = 0
        self.pongs = []
        self.credit = collections.Counter()
        self.goaway = None
        self.closed = False
        self._decoder = hpack.Decoder()
        self._decoder.max_header_list_size = 1 << 20
        self._fragments = b""
        self._head_ends_stream = False
        self._buffer = b""
        self._spare = _SPARE_STREAM
        self._socket = dial(target, tls_context())
        if hello:
            self.send(PREFACE, settings(*pairs))
            if windows:
                self.send(window_update(0, 2**30))

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self._socket.close()

    def fields(self, method: bytes = b"GET", *more: tuple) -> tuple:
        """The fields of a good request for the target's file."""
        return (
            (b":method", method),
            (b":scheme", b"https"),
            (b":authority", self.target.authority),
            (b":path", self.target.path),
            *more,
        )

    def get(self, stream: int, *more: tuple) -> bytes:
        """A good GET as one HEADERS frame, with `more` fields at its end."""
        return head(stream, *self.fields(b"GET", *more))

    def post(self, stream: int, *more: tuple) -> bytes:
        """The head of a good POST whose body is to follow."""
        fields = self.fields(b"POST", *more)
        return frame(HEADERS, END_HEADERS, stream, block(*fields))

    def send(self, *octets: bytes) -> None:
        """Writes all at once; a connection that is gone is found by reads."""
        try:
            self._socket.sendall(b"".join(octets))
        except OSError:
            # What the server said before it went is still to be read, and
            # the next read finds the end.
            self._socket.settimeout(PATIENCE_SECONDS)

    @property
    def frame_limit(self) -> int:
        """The longest payload that the server wants to see."""
        self.until(lambda: self.settings, "SETTINGS")
        return self.settings.get(MAX_FRAME_SIZE, 16384)

    def limit_table(self, octets: int) -> None:
        """Has the server's encoder keep within `octets` of dynamic table."""
        acks = self.acks
        self.send(settings((HEADER_TABLE_SIZE, octets)))
        self.until(lambda: self.acks > acks, "SETTINGS acknowledged")
        self._decoder.max_allowed_table_size = octets

    def until(self, condition: typing.Callable, what: str) -> None:
        """Reads until `condition` holds; fails when it cannot any more."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert not self.closed, f"closed before {what}: {self.frames}"
            received = self._receive(deadline)
            assert received is not None, f"no {what} in time: {self.frames}"
            self._feed(received)

    def answer(self, stream: int) -> Exchange:
        """The complete response on `stream`."""
        exchange = self.exchanges[stream]
        self.until(
            lambda: exchange.ended or exchange.reset is not None
            or self.goaway, f"answer on stream {stream}"
        )
        assert exchange.ended, self.frames
        return exchange

    def barrier(self) -> None:
        """Returns when what was sent has been acted upon, or was too bad."""
        token = os.urandom(8)
        self.send(frame(PING, 0, 0, token))
        self.until(
            lambda: token in self.pongs or self.goaway, "PING that comes back"
        )

    def assert_alive(self) -> None:
        """A good request is answered, and nobody spoke of an error."""
        stream, self._spare = self._spare, self._spare + 2
        self.send(head(stream, *self.fields(b"HEAD")))
        assert self.answer(stream).status == 200, self.frames
        assert self.goaway is None, self.frames

    def assert_answered(self, *streams: int) -> None:
        """Each stream brings the target's file, and the connection lives."""
        for stream in streams:
            exchange = self.answer(stream)
            assert exchange.status == 200, exchange.heads
            assert exchange.body == self.target.content
            assert exchange.reset is None, self.frames
        self._assert_calm()

    def assert_accepted(self, stream: int) -> None:
        """The request is answered in some way other than as a broken one."""
        exchange = self.answer(stream)
        assert exchange.status not in (0, 400), exchange.heads
        assert exchange.reset in (None, NO_ERROR), self.frames
        self._assert_calm()

    def assert_connection_error(self, *codes: int) -> None:
        """GOAWAY with one of the codes comes, and the connection ends."""
        self.until(lambda: self.goaway, f"GOAWAY({codes})")
        assert self.goaway.error_code in codes, self.frames
        self.until(lambda: self.closed, "end of the connection")

    def assert_hung_up(self, *codes: int) -> None:
        """The connection ends, with GOAWAY or without (section 3.4)."""
        self.until(lambda: self.closed, "end of the connection")
        assert not self.goaway or self.goaway.error_code in codes

    def assert_stream_error(self, stream: int, *codes: int) -> None:
        """RST_STREAM and a live connection, or the GOAWAY of section 5.4.1."""
        exchange = self.exchanges[stream]
        self.until(
            lambda: exchange.reset is not None or self.goaway,
            f"RST_STREAM({codes}) on stream {stream}",
        )
        self._assert_no_worse_than(exchange, codes)

    def assert_malformed(self, stream: int) -> None:
        """A stream error or status 400 (sections 8.1.1 and 8.2.1)."""
        exchange = self.exchanges[stream]
        self.until(
            lambda: exchange.ended or exchange.reset is not None
            or self.goaway, f"refusal of stream {stream}"
        )
        assert exchange.status in (0, 400), exchange.heads
        codes = (PROTOCOL_ERROR, NO_ERROR if exchange.ended else None)
        self._assert_no_worse_than(exchange, codes)

    def assert_tolerated(self, stream: int, *codes: int) -> None:
        """Nothing happens, or else an error with one of the codes."""
        self.barrier()
        self._assert_no_worse_than(self.exchanges[stream], codes)

    def _assert_calm(self):
        self.barrier()
        assert self.goaway is None, self.frames

    def _assert_no_worse_than(self, exchange, codes):
        if self.goaway:
            self.assert_connection_error(*codes)
            return
        assert exchange.reset is None or exchange.reset in codes, self.frames
        self.assert_alive()

    def _receive(self, deadline):
        """Octets, none at the end of the connection, None when late."""
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            return self._socket.recv(65536)
        except TimeoutError:
            return None
        except OSError:
            # A reset, or TLS without its close: an end all the same.
            return b""

    def _feed(self, received):
        self.closed = not received
        self._buffer += received
        while len(self._buffer) >= 9:
            taken, length = hyperframe.frame.Frame.parse_frame_header(
                memoryview(self._buffer[:9])
            )
            if len(self._buffer) < 9 + length:
                return
            taken.parse_body(memoryview(self._buffer[9 : 9 + length]))
            taken.body_len = length
            self._buffer = self._buffer[9 + length :]
            self.frames.append(taken)
            self._take(taken)

    def _take(self, taken):
        name = type(taken).__name__.removesuffix("Frame").lower()
        take = getattr(self, f"_take_{name}", None)
        if take:
            take(taken, self.exchanges[taken.stream_id])

    def _take_data(self, taken, exchange):
        exchange.body += taken.data
        exchange.ended = "END_STREAM" in taken.flags

    def _take_headers(self, taken, exchange):
        self._head_ends_stream = "END_STREAM" in taken.flags
        self._take_continuation(taken, exchange)

    def _take_continuation(self, taken, exchange):
        self._fragments += taken.data
        if "END_HEADERS" in taken.flags:
            fields = self._decoder.decode(self._fragments, raw=True)
            exchange.heads.append([(bytes(n), bytes(v)) for n, v in fields])
            exchange.ended = self._head_ends_stream
            self._fragments = b""

    def _take_rststream(self, taken, exchange):
        exchange.resets.append(taken.error_code)

    def _take_settings(self, taken, exchange):
        if "ACK" in taken.flags:
            self.acks += 1
        else:
            self.settings.update(taken.settings)
            self.send(frame(SETTINGS, ACK, 0))

    def _take_ping(self, taken, exchange):
        if "ACK" in taken.flags:
            self.pongs.append(taken.opaque_data)
        else:
            self.send(frame(PING, ACK, 0, taken.opaque_data))

    def _take_goaway(self, taken, exchange):
        # A warning to come (section 6.8) is not yet the end.
        if taken.error_code or taken.last_stream_id != 2**31 - 1:
            self.goaway = taken

    def _take_windowupdate(self, taken, exchange):
        self.credit[taken.stream_id] += taken.window_increment


def head(stream: int, *fields: tuple) -> bytes:
    """HEADERS with a whole block and the end of the stream."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block(*fields))


def body(stream: int, octets: bytes = b"", end: bool = True) -> bytes:
    """DATA, with the end of the stream unless told otherwise."""
    return frame(DATA, END_STREAM if end else 0, stream, octets)


# What a case may end in, to be called with the client.
connection_error = functools.partial(
    operator.methodcaller, "assert_connection_error"
)
stream_error = functools.partial(operator.methodcaller, "assert_stream_error")
malformed = functools.partial(operator.methodcaller, "assert_malformed")
tolerated = functools.partial(operator.methodcaller, "assert_tolerated")
answered = functools.partial(operator.methodcaller, "assert_answered")
accepted = functools.partial(operator.methodcaller, "assert_accepted")
alive = operator.methodcaller("assert_alive")
