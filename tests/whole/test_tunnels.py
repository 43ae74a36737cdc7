"""WebSockets to an application, over HTTP/1.1 and over HTTP/2."""

import asyncio
import base64
import contextlib
import hashlib
import pathlib
import signal
import socket
import ssl
import sys
import threading

import pytest
import websockets.asyncio.client
import websockets.asyncio.server
import websockets.exceptions
import zoo
from harness import (
    Server,
    eventually,
    free_port,
    make_site,
    trusting_context,
)
from websockets.frames import Frame, Opcode
from websockets.http11 import Response

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "engines"))

import frames

DOMAIN, SITE = "api.example.test", "www.example.test"
LARGE = bytes(range(256)) * 4096
PATIENCE_SECONDS = 20
CONFIGURATION = """
shimmercat-devlove:
  domains:
    api.example.test:
      port: {port}
    www.example.test:
      root-dir: www
      consultant: {{connect-to: {port}}}
    raw.example.test:
      port: {raw}
    files.example.test:
      root-dir: www
    tls.example.test:
      root-dir: www
      consultant:
        {{connect-to: {tls}, application-protocol: https, verify: false}}
    php.example.test:
      root-dir: www
      consultant: {{connect-to: {raw}, application-protocol: fastcgi}}
"""


class Application:
    """An echo of WebSockets that does other things when it is told to."""

    def __init__(self, port=0, tls=None):
        self.requests, self.ends = [], []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._listen(port, tls))
        self.port = self._server.sockets[0].getsockname()[1]

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(
            coroutine, self._loop).result(PATIENCE_SECONDS)

    async def _listen(self, port, tls):
        return await websockets.asyncio.server.serve(
            self._talk, "127.0.0.1", port, process_request=self._judge,
            max_size=None, compression=None, ping_interval=None, ssl=tls,
            select_subprotocol=lambda _, offered: [*offered, None][0])

    async def _leave(self):
        self._server.close()
        await self._server.wait_closed()

    def close(self):
        self._run(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _judge(self, connection, request):
        self.requests.append(request)
        if request.path.startswith("/refuse"):
            return connection.respond(403, "not for you\n")
        return None

    async def _talk(self, connection):
        try:
            async for message in connection:
                if message == "close":
                    await connection.close(4321, "as you said")
                elif message == "many":
                    for number in range(2000):
                        await connection.send(f"message {number}")
                else:
                    await connection.send(message)
        except websockets.exceptions.ConnectionClosedError:
            # Without a farewell: what some tests want to see.
            pass
        self.ends.append(connection.request.path)


class Wire:
    """A WebSocket over HTTP/1.1 to the end of a block.

    It has a loop of its own.  The package's client without a loop reads and
    writes TLS in two threads, which loses a handshake now and then.
    """

    def __init__(self, server, path="/echo", domain=DOMAIN, **options):
        self._loop = asyncio.new_event_loop()
        options.setdefault("compression", None)
        plain = socket.create_connection(("127.0.0.1", server.port), 20)
        plain.setblocking(False)

        async def connect():
            return await websockets.asyncio.client.connect(
                f"wss://{domain}{path}", sock=plain, ssl=trusting_context(),
                max_size=None, proxy=None, open_timeout=PATIENCE_SECONDS,
                ping_interval=None, **options)

        try:
            self.itself = self._run(connect())
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self._run(self.itself.close())
        self._loop.close()

    def _run(self, awaitable, seconds=PATIENCE_SECONDS):
        return self._loop.run_until_complete(
            asyncio.wait_for(awaitable, seconds))

    def send(self, message):
        self._run(self.itself.send(message))

    def recv(self, seconds=PATIENCE_SECONDS):
        return self._run(self.itself.recv(), seconds)

    def ping(self):
        """Sends a ping and waits until it came back."""
        self._run(self._run(self.itself.ping()))

    def vanish(self):
        """Leaves without a word."""
        self.itself.transport.abort()
        self._run(self.itself.wait_closed())
        self._loop.close()


@pytest.fixture(scope="module")
def application():
    """The application that talks through WebSockets."""
    running = Application()
    yield running
    running.close()


@pytest.fixture(scope="module")
def raw():
    """An application whose animal is set by each test."""
    with zoo.Origin(zoo.silent) as origin:
        yield origin


def make_folder(folder, application, raw, tls=1, **tweaks):
    """A site of which all is said that these tests ask for."""
    make_site(folder, tweaks={
        name.replace("_", "-"): value for name, value in tweaks.items()})
    (folder / "devlove.yaml").write_text(CONFIGURATION.format(
        port=application.port, raw=raw.port, tls=tls))
    return folder


@pytest.fixture(scope="module")
def tls_port():
    """The port of the application that wants TLS."""
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory, configuration_home, application, raw, tls_port):
    """The program before all of them."""
    folder = make_folder(
        tmp_path_factory.mktemp("site"), application, raw, tls_port,
        body_seconds="0.5", max_body_bytes="64 KiB")
    with Server(folder, mode="devlove") as running:
        yield running
        assert not running.lines("M60001"), running.explained("a fault")


class Tunnel(contextlib.AbstractContextManager):
    """A WebSocket over HTTP/2 (RFC 8441), frame by frame."""

    def __init__(self, server, path=b"/echo", domain=DOMAIN, window=2**20,
                 pseudo=()):
        target = frames.Target(
            "127.0.0.1", server.port, domain.encode(), path, b"")
        self.client = frames.Client(
            target, (frames.INITIAL_WINDOW_SIZE, window))
        self.exchange = self.client.exchanges[1]
        self._taken = self._sent = 0
        fields = {b":method": b"CONNECT", b":protocol": b"websocket",
                  b":scheme": b"https", b":path": path,
                  b":authority": domain.encode(), **dict(pseudo)}
        self.client.until(lambda: self.client.settings, "SETTINGS")
        self.client.send(frames.frame(
            frames.HEADERS, frames.END_HEADERS, 1, frames.block(
                *fields.items(), (b"sec-websocket-version", b"13"),
                (b"sec-websocket-protocol", b"echo"),
                (b"origin", b"https://a.example"))))
        self.client.until(lambda: self.exchange.heads or self.is_over(),
                          "a head")

    def __exit__(self, *failure):
        self.client.__exit__(*failure)

    def is_over(self):
        return self.exchange.ended or self.exchange.reset is not None

    def send(self, opcode, octets=b""):
        """Sends a frame of a WebSocket in frames of HTTP/2."""
        octets = Frame(opcode, octets).serialize(mask=True)
        for start in range(0, len(octets), 16384):
            piece = octets[start:start + 16384]
            # The window is what the server has given so far.
            self.client.until(lambda: self.room() >= 16384, "a window")
            self.push(piece)

    def push(self, piece):
        """Sends octets of the tunnel in one frame."""
        self._sent += len(piece)
        self.client.send(frames.body(1, piece, end=False))

    def room(self):
        """Octets that the windows allow to be sent."""
        window = self.client.settings[frames.INITIAL_WINDOW_SIZE]
        return min(65535 + self.client.credit[0],
                   window + self.client.credit[1]) - self._sent

    def take(self, length):
        """The next octets, which it gives back as window."""
        self.client.until(lambda: len(self.exchange.body) >= self._taken
                          + length, f"{length} octets")
        start = self._taken
        self._taken += length
        self.client.send(frames.window_update(1, length))
        return self.exchange.body[start:self._taken]


def framed(opcode, octets):
    """A frame as a server sends it."""
    return Frame(opcode, octets).serialize(mask=False)


def test_messages_of_http_1_1_come_back(server, application):
    with Wire(server, subprotocols=["echo"]) as wire:
        assert wire.itself.subprotocol == "echo"
        wire.send("hello")
        assert wire.recv() == "hello"
        wire.send(LARGE)
        assert wire.recv() == LARGE
        for _ in range(200):
            wire.ping()
    assert wire.itself.close_code == 1000
    request = application.requests[-1]
    assert request.headers["host"] == DOMAIN
    assert request.headers["x-forwarded-for"] == "127.0.0.1"
    assert request.headers["via"] == "1.1 shimmercat"


def test_an_extension_is_agreed_on_between_the_ends(server):
    with Wire(server, compression="deflate") as wire:
        wire.send("hello" * 1000)
        assert wire.recv() == "hello" * 1000


def test_messages_of_http_2_come_back(server, application):
    with Tunnel(server) as tunnel:
        assert tunnel.client.settings[8] == 1
        assert tunnel.exchange.status == 200
        fields = tunnel.exchange.fields
        assert fields[b"sec-websocket-protocol"] == b"echo"
        assert not {b"sec-websocket-accept", b"connection", b"upgrade"
                    } & fields.keys()
        tunnel.send(Opcode.TEXT, b"hello")
        assert tunnel.take(7) == framed(Opcode.TEXT, b"hello")
        tunnel.send(Opcode.PING, b"ping")
        assert tunnel.take(6) == framed(Opcode.PONG, b"ping")
    request = application.requests[-1]
    assert request.headers["via"] == "2 shimmercat"
    assert request.headers["origin"] == "https://a.example"


def test_a_message_of_a_megabyte_passes_windows_of_64_kib(server):
    with Tunnel(server, window=65535) as tunnel:
        tunnel.send(Opcode.BINARY, LARGE)
        expected = framed(Opcode.BINARY, LARGE)
        received = b""
        while len(received) < len(expected):
            received += tunnel.take(min(30_000, len(expected) - len(received)))
        assert received == expected


@pytest.mark.parametrize("domain", [SITE, DOMAIN])
def test_any_path_may_be_a_tunnel(server, application, domain):
    for path in ("/", "/chat", "/chat/", "/chat.io?a=b"):
        with Wire(server, path, domain) as wire:
            wire.send("here")
            assert wire.recv() == "here"
        assert application.requests[-1].path == path


def test_what_the_application_sends_unasked_arrives(server):
    with Wire(server) as wire:
        wire.send("many")
        assert [wire.recv() for _ in range(2000)] == [
            f"message {number}" for number in range(2000)]


def test_the_application_may_say_goodbye(server):
    with Wire(server) as wire:
        wire.send("close")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            wire.recv()
        assert (wire.itself.close_code, wire.itself.close_reason) == (
            4321, "as you said")
    with Tunnel(server) as tunnel:
        tunnel.send(Opcode.TEXT, b"close")
        goodbye = framed(Opcode.CLOSE, (4321).to_bytes(2, "big")
                         + b"as you said")
        assert tunnel.take(len(goodbye)) == goodbye
        tunnel.send(Opcode.CLOSE, (4321).to_bytes(2, "big"))
        tunnel.client.until(tunnel.is_over, "the end of the stream")
        assert tunnel.exchange.ended
        tunnel.client.barrier()


@pytest.mark.parametrize("end", ["socket", "stream", "reset", "connection"])
def test_a_client_that_disappears_ends_it_for_the_application(
        server, application, end):
    path = f"/gone-{end}"
    if end == "socket":
        Wire(server, path).vanish()
    else:
        tunnel = Tunnel(server, path.encode())
        if end == "stream":
            tunnel.client.send(frames.body(1))
        elif end == "reset":
            tunnel.client.send(frames.reset(1))
        else:
            tunnel.client._socket.close()
    eventually(lambda: path in application.ends)


def test_a_refusal_passes_as_it_is(server):
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        Wire(server, "/refuse")
    assert isinstance(caught.value.response, Response)
    assert caught.value.response.status_code == 403
    assert caught.value.response.body == b"not for you\n"
    with Tunnel(server, b"/refuse") as tunnel:
        tunnel.client.until(tunnel.is_over, "the refusal")
        assert tunnel.exchange.status == 403
        assert tunnel.exchange.body == b"not for you\n"


def test_a_tunnel_through_which_nothing_comes_is_closed(
        tmp_path, application, raw):
    folder = make_folder(tmp_path, application, raw, tunnel_idle_seconds="1")
    with Server(folder, mode="devlove") as impatient:
        with Wire(impatient, "/quiet") as wire:
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                wire.recv()
        eventually(lambda: "/quiet" in application.ends)


def test_a_tunnel_keeps_a_worker_that_leaves(tmp_path, application, raw):
    folder = make_folder(tmp_path, application, raw, graceful_seconds="2")
    with (Server(folder, "--workers", "1") as leaving,
          Wire(leaving, "/stay") as wire):
        leaving.signal(signal.SIGTERM)
        leaving.await_line("M40004")
        wire.send("still there?")
        assert wire.recv() == "still there?"
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            wire.recv()
        assert leaving.wait(PATIENCE_SECONDS) == 0
    eventually(lambda: "/stay" in application.ends)


def test_an_application_may_want_tls(server, tls_port):
    scratch = server.folder / ".shimmercat.loves.devs"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        scratch / "cert.pem", scratch / "privkey.unencrypted-pkcs8.pem")
    secret = Application(tls_port, context)
    try:
        with Wire(server, "/secret", "tls.example.test") as wire:
            wire.send(LARGE)
            assert wire.recv() == LARGE
        Wire(server, "/gone", "tls.example.test").vanish()
        eventually(lambda: secret.ends == ["/secret", "/gone"])
    finally:
        secret.close()


def test_an_application_is_no_faster_than_its_client(server, raw):
    sent = []

    def flood():
        for _ in range(1024):
            yield bytes(65536)
            sent.append(65536)

    raw.animal = accepting(flood)
    with Tunnel(server, domain="raw.example.test", window=65535) as tunnel:
        tunnel.take(5)
        tunnel.client.until(
            lambda: len(tunnel.exchange.body) >= 65535, "a window of it")
        # What it could send fills the kernel's buffers, and that is all.
        eventually(lambda: is_steady(sent), what="an application that waits")
        assert sum(sent) < 32 << 20


def is_steady(sent):
    """Whether nothing is added for a while."""
    before = len(sent)
    try:
        eventually(lambda: len(sent) > before, 0.3)
    except AssertionError:
        return True
    return False


def test_a_client_is_no_faster_than_its_application(server, raw):
    raw.animal = accepting(600.0)
    with Tunnel(server, domain="raw.example.test") as tunnel:
        piece, count = bytes(16384), 0
        while tunnel.room() >= len(piece) and count < 64 << 20:
            tunnel.push(piece)
            count += len(piece)
            tunnel.client.barrier()
        assert count < 32 << 20


def test_a_tunnel_outlives_the_seconds_of_bodies(server):
    with Wire(server) as wire, Tunnel(server) as tunnel:
        # twice as long as a body may keep somebody waiting
        with pytest.raises(TimeoutError):
            wire.recv(1)
        wire.send("still here")
        assert wire.recv() == "still here"
        tunnel.send(Opcode.TEXT, b"hello")
        assert tunnel.take(7) == framed(Opcode.TEXT, b"hello")


def handshake(*lines, domain="raw.example.test", path="/"):
    return "\r\n".join([
        f"GET {path} HTTP/1.1", f"Host: {domain}", "Upgrade: websocket",
        "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *lines, "", ""
    ]).encode()


def accepting(*pieces):
    """Opens a tunnel as the client's key wants it, and sends pieces."""
    def answer(asked):
        key = asked.field("sec-websocket-key").encode()
        proof = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11")
        yield zoo.head("101 Switching Protocols", upgrade="WebSocket",
                       connection="Upgrade", sec_websocket_accept=base64
                       .b64encode(proof.digest()).decode()) + b"early"
        for piece in pieces:
            yield from piece() if callable(piece) else [piece]
    return answer


@contextlib.contextmanager
def spoken(server, octets):
    """A raw connection on which octets were sent, as a stream."""
    with server.connect(domain="raw.example.test") as tls:
        tls.sendall(octets)
        yield tls.makefile("rb")


def head_of(stream):
    """Status and fields of an answer of HTTP/1.1."""
    status = int(stream.readline().split()[1])
    lines = iter(stream.readline, b"\r\n")
    return status, dict(line.decode().strip().lower().split(": ", 1)
                        for line in lines)


def test_what_comes_with_a_handshake_is_kept(server, raw):
    raw.animal = accepting(b" and late", zoo.CLOSE)
    # What the client says early reaches nobody before the tunnel is open.
    with spoken(server, handshake() + b"eager") as stream:
        status, fields = head_of(stream)
        assert status == 101
        assert fields["upgrade"] == "websocket"
        assert fields["connection"] == "upgrade"
        assert fields["sec-websocket-accept"] == "s3pplmbitxaq9kygzzhzrbk+xoo="
        assert stream.read() == b"early and late"
    with Tunnel(server, domain="raw.example.test") as tunnel:
        assert tunnel.exchange.status == 200
        assert tunnel.take(14) == b"early and late"


@pytest.mark.parametrize("animal", [
    # no proof, no upgrade, another one
    lambda asked: zoo.head("101 Switching Protocols", upgrade="websocket",
                           connection="Upgrade", sec_websocket_accept="x"),
    lambda asked: zoo.head("101 Switching Protocols"),
    lambda asked: zoo.head("101 Switching Protocols", upgrade="h2c",
                           connection="Upgrade"),
    # a page, which would pass for a tunnel
    lambda asked: zoo.answer(b"<h1>Hello</h1>"),
    zoo.in_chunks(b"<h1>Hello</h1>", 600.0),
    zoo.closing_early, zoo.garbage,
])
def test_what_opens_no_tunnel_is_502_over_http_2(server, raw, animal):
    raw.animal = animal
    with Tunnel(server, domain="raw.example.test") as tunnel:
        tunnel.client.until(tunnel.is_over, "an answer")
        assert tunnel.exchange.status == 502


def test_an_application_may_ignore_an_upgrade_of_http_1_1(server, raw):
    raw.animal = lambda asked: zoo.answer(b"page\n")
    with spoken(server, handshake()) as stream:
        status, fields = head_of(stream)
        assert (status, fields["connection"]) == (200, "close")
        assert stream.read() == b"page\n"


@pytest.mark.parametrize("line", [
    "Content-Length: 5", "Transfer-Encoding: chunked"])
def test_a_handshake_with_a_body_is_a_plain_request(server, raw, line):
    raw.animal = lambda asked: zoo.answer(b"page\n")
    body = b"5\r\nhello\r\n0\r\n\r\n"
    with spoken(server, handshake(line) + body) as stream:
        assert head_of(stream)[0] == 200
    assert raw.asked[-1].field("upgrade") is None


def test_files_are_no_tunnels(server):
    for path in (b"/", b"/index.html", b"/.well-known/shimmercat/x"):
        with Tunnel(server, path, "files.example.test") as tunnel:
            assert 400 <= tunnel.exchange.status < 500
    with pytest.raises(websockets.exceptions.InvalidStatus):
        Wire(server, "/", "files.example.test")


def test_fastcgi_has_no_tunnels(server):
    with Tunnel(server, b"/chat", "php.example.test") as tunnel:
        assert tunnel.exchange.status == 501


@pytest.mark.parametrize(("pseudo", "status"), [
    ({b":protocol": b"connect-udp"}, 501),
    ({b":protocol": b""}, 0),
    ({b":method": b"GET"}, 0),
    ({b":path": b""}, 0),
    ({b":scheme": b""}, 0),
    ({b":authority": b""}, 0),
])
def test_other_tunnels_are_refused(server, pseudo, status):
    with Tunnel(server, pseudo=pseudo) as tunnel:
        tunnel.client.until(tunnel.is_over, "a refusal")
        assert tunnel.exchange.status == status
        tunnel.client.barrier()
        assert not tunnel.client.goaway
