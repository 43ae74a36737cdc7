"""A server that is abused goes on serving others, and does not grow.

Meanwhile a polite client, in a process of its own, asks it all the time.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import random
import socket
import ssl
import subprocess
import sys
import time

import pytest
from harness import DOMAIN, Server, eventually, make_site
from zoo import CLOSE, Origin, answer
from zoo import head as head_of

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "engines"))

import frames
import test_floods
import test_smuggling

from shimmercat import NATIVE_ENGINE

HERE = pathlib.Path(__file__).parent
API = test_smuggling.DOMAIN
P99_SECONDS, GROWTH_BYTES = 0.25, 64 << 20
HUGE_BYTES = 100 << 20
PAGE_BYTES = 1 << 20
#: whole octets of a text that memory holds
TEXT = random.Random(6).randbytes(128 << 10).hex().encode()
TWEAKS = {"handshake-seconds": 2, "header-seconds": 1, "body-seconds": 1,
          "send-seconds": 1}
PATIENCE_SECONDS = 20


def make_files(folder, origin):
    folder = make_site(folder, {
        "index.html": b"hello", "text.txt": TEXT}, TWEAKS)
    with open(folder / "www" / "huge.bin", "wb") as huge:
        huge.truncate(HUGE_BYTES)
    with open(folder / "devlove.yaml", "a") as settings:
        settings.write(f"    api {API}:\n      port: {origin.port}\n")
    return folder


def resident_bytes(server):
    """Return the resident octets of the one worker."""
    [pid] = server.workers().values()
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def open_files(server):
    """Return how many descriptors the one worker has."""
    [pid] = server.workers().values()
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture(scope="module")
def origin():
    """An application with a large page, and events that come seldom."""
    def animal(asked):
        if asked.target != "/events":
            return [answer(bytes(PAGE_BYTES))]
        return [head_of("200 OK", content_type="text/event-stream"),
                b"data: 1\n\n", 2.2, b"data: 2\n\n", CLOSE]

    with Origin(animal) as running:
        yield running


@pytest.fixture(scope="module", params=[
    "python", pytest.param("native", marks=pytest.mark.skipif(
        NATIVE_ENGINE is None, reason="the native engine is not built"))])
def server(request, tmp_path_factory, configuration_home, origin):
    """The server to be abused; it forgets nothing from attack to attack."""
    folder = make_files(tmp_path_factory.mktemp(request.param), origin)
    flags = "--workers", "1", "--engine", request.param
    with Server(folder, *flags) as running:
        for protocol in ("h2", "http/1.1"):
            for path in ("/", "/text.txt", "/huge.bin"):
                with running.client(protocol) as client:
                    assert client.head(path, extensions={
                        "sni_hostname": DOMAIN}).status_code == 200
        at_first = resident_bytes(running)
        yield running
        assert resident_bytes(running) - at_first < 2 * GROWTH_BYTES
        odd = [line for line in running.lines() if line.code[:2] == "M6"]
        assert not odd


@pytest.fixture(scope="module")
def polite(server):
    """A function that tells the seconds of all answers since it was called."""
    [pid] = server.workers().values()
    command = [sys.executable, HERE / "polite_client.py", str(server.port),
               str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE) as process:
        def told():
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        yield told
        process.stdin.close()


@pytest.fixture
def others(server, polite):
    """What must hold for others while a test attacks the server."""
    before = resident_bytes(server)
    polite()
    yield
    seconds, grown = sorted(polite()), resident_bytes(server) - before
    assert seconds[len(seconds) * 99 // 100] < P99_SECONDS
    assert grown < GROWTH_BYTES


def target(server, domain=DOMAIN, path=b"/"):
    """The server as a client that speaks frame by frame sees it."""
    authority = f"{domain}:{server.port}".encode()
    return frames.Target("127.0.0.1", server.port, authority, path, b"")


@pytest.fixture
def wires(server):
    """A function that connects; what it made is closed in the end."""
    with contextlib.ExitStack() as stack:
        def connect(protocol=None, receive_bytes=0):
            wire = stack.enter_context(socket.socket())
            wire.settimeout(PATIENCE_SECONDS)
            if receive_bytes:
                wire.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            wire.connect(("127.0.0.1", server.port))
            if not protocol:
                return wire
            tls = frames.tls_context([protocol]).wrap_socket(
                wire, server_hostname=DOMAIN)
            return stack.enter_context(tls)
        yield connect


def has_ended(wire):
    """Read to the end; return whether it comes."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while wire.recv(1 << 16):
            continue
    return True


def request(line, *fields, host=DOMAIN):
    return "\r\n".join([line, f"Host: {host}", *fields, "", ""]).encode()


def hello():
    """What a client says first in its handshake."""
    to_read, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = frames.tls_context().wrap_bio(
        to_read, to_send, server_hostname=DOMAIN)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return to_send.read()


#: preface of a client whose windows are as wide as can be, and as none
WIDE = frames.PREFACE + frames.settings(
    (frames.INITIAL_WINDOW_SIZE, 2**31 - 1)) + frames.window_update(
        0, 2**31 - 1 - 65535)
SHUT = frames.PREFACE + frames.settings((frames.INITIAL_WINDOW_SIZE, 0))
STREAMS = range(1, 200, 2)


def head(stream, path=b"/", *more, domain=DOMAIN, method=b"GET", flags=5):
    """HEADERS of a request, whole and without a body unless told otherwise."""
    return frames.frame(frames.HEADERS, flags, stream, frames.block(
        (b":method", method), (b":scheme", b"https"),
        (b":authority", domain.encode()), (b":path", path), *more))


def gets(path, domain=DOMAIN):
    """HEADERS of as many requests as may be open at a time."""
    return b"".join(head(stream, path, domain=domain) for stream in STREAMS)


def test_floods_of_frames(server, others):
    def flood(row):
        points, begin, octets = row.values
        with frames.Client(target(server)) as client:
            client.send(begin(client))
            test_floods.drown(client, octets(client), points)
            client.assert_connection_error(frames.ENHANCE_YOUR_CALM)

    with concurrent.futures.ThreadPoolExecutor(8) as attackers:
        assert len(list(attackers.map(flood, test_floods.FLOODS))) > 20


def test_what_can_be_read_in_two_ways(server, others):
    vectors = [(test_smuggling.http1, octets.encode("latin-1"))
               for octets in (*test_smuggling.REFUSED.values(),
                              *test_smuggling.PASSED.values())]
    vectors += [(test_smuggling.http2, octets)
                for octets in (*test_smuggling.REFUSED_2.values(),
                               *test_smuggling.PASSED_2.values())]
    with concurrent.futures.ThreadPoolExecutor(64) as attackers:
        told = list(attackers.map(
            lambda vector: vector[0](server, vector[1]), vectors))
    assert len(told) > 100


def test_handshakes_that_stall(others, wires):
    stalled = [wires() for _ in range(500)]
    for wire, length in zip(stalled, itertools.cycle((0, 5, 100, 10_000))):
        wire.sendall(hello()[:length])
    assert all(map(has_ended, stalled))


def test_handshakes_without_end(server, others):
    def attack(until):
        count = 0
        while time.monotonic() < until:
            with frames.dial(target(server), frames.tls_context()):
                count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(8) as attackers:
        counts = list(attackers.map(attack, [time.monotonic() + 1] * 8))
    assert sum(counts) > 50


def drip(wires, octets):
    """Send octets, one to each wire at a time, until all have ended."""
    wires = list(wires)
    for octet in itertools.cycle(octets):
        for wire in tuple(wires):
            try:
                wire.sendall(bytes([octet]))
            except OSError:
                wires.remove(wire)
        if not wires:
            return
        time.sleep(0.05)


def test_heads_that_drip(others, wires):
    heads = [wires("http/1.1") for _ in range(50)]
    for wire in heads:
        wire.sendall(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(50):
        heads.append(wires("h2"))
        heads[-1].sendall(WIDE + head(1, b"/" * 8000)[:20])
    drip(heads, b"x")


def test_bodies_that_drip(others, wires):
    bodies = [wires("http/1.1") for _ in range(60)]
    for wire in bodies:
        wire.sendall(request("POST / HTTP/1.1", "Content-Length: 100000",
                             host=API))
    drip(bodies, b"x")


def test_streams_whose_bodies_drip(server, others):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(frames.Client(
            target(server, API))) for _ in range(10)]
        for client in clients:
            client.send(*map(client.post, STREAMS[:10]))
        for _ in range(30):
            for client in clients:
                client.send(*(frames.body(stream, b"x", end=False)
                              for stream in STREAMS[:10]))
            time.sleep(0.05)
        for client in clients:
            for stream in STREAMS[:10]:
                exchange = client.exchanges[stream]
                client.until(lambda: exchange.ended or exchange.resets, "end")
                assert exchange.status in (408, 503)
            client.assert_alive()


def test_readers_that_do_not_read(server, others, wires):
    before = open_files(server)
    readers = [wires("http/1.1", 4096) for _ in range(60)]
    for wire in readers:
        wire.sendall(request("GET /huge.bin HTTP/1.1"))
    # Above max-waiting they would get 503, and be idle.
    for _ in range(9):
        readers.append(wires("h2", 4096))
        readers[-1].sendall(WIDE + gets(b"/huge.bin"))
    # Their connections end, though they read nothing of that.
    eventually(lambda: open_files(server) < before + 20, PATIENCE_SECONDS)


@pytest.mark.parametrize("path, domain", [(b"/text.txt", DOMAIN), (b"/", API)])
@pytest.mark.parametrize("opening", [WIDE, SHUT], ids=["wide", "shut"])
def test_streams_that_nobody_reads(others, wires, opening, path, domain):
    greedy = [wires("h2", 4096) for _ in range(20)]
    for wire in greedy:
        wire.sendall(opening + gets(path, domain))
    time.sleep(0.5)


def test_requests_in_a_row_whose_answers_nobody_reads(others, wires):
    asked = request("GET /text.txt HTTP/1.1") * 2000
    for _ in range(50):
        wire = wires("http/1.1", 4096)
        wire.settimeout(0.02)
        with contextlib.suppress(TimeoutError):
            wire.sendall(asked)
    time.sleep(0.5)


def in_frames(block, kind=frames.HEADERS, stream=1):
    """A header block of any length, as frames."""
    parts = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    kinds = itertools.chain((kind,), itertools.repeat(frames.CONTINUATION))
    return b"".join(
        frames.frame(kind, 5 if part is parts[-1] else 1, stream, part)
        for kind, part in zip(kinds, parts, strict=False))


X = b"x" * (2 << 20)
FIELDS = [(b":method", b"GET"), (b":scheme", b"https"),
          (b":authority", DOMAIN.encode())]
CHUNKED = request("POST / HTTP/1.1", "Transfer-Encoding: chunked", host=API)
OVERSIZE = {
    "a target": b"GET /" + X,
    "a method": X,
    "a version": b"GET / HTTP/" + b"1" * len(X),
    "a field": b"GET / HTTP/1.1\r\nX: " + X,
    "a name": b"GET / HTTP/1.1\r\n" + X,
    "fields": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "lines before": b"\r\n" * 1_000_000,
    "an extension": CHUNKED + b"5;" + X,
    "extensions": CHUNKED + (b"1;" + b"x" * 1000 + b"\r\nx\r\n") * 2000,
    "a size": CHUNKED + b"0" * len(X),
    "a trailer": CHUNKED + b"0\r\nX: " + X,
    "trailers": CHUNKED + b"0\r\n" + b"X: y\r\n" * 100_000,
    "a length": request("POST / HTTP/1.1", f"Content-Length: {2**62}",
                        host=API) + X,
}
OVERSIZE_2 = {
    "a path": in_frames(frames.block(*FIELDS, (b":path", X))),
    "a field": in_frames(frames.block(
        *FIELDS, (b":path", b"/"), (b"x", X))),
    "fields": in_frames(frames.block(
        *FIELDS, (b":path", b"/"), *[(b"x", b"y")] * 100_000)),
    # An entry of the table that is named again and again
    "a small block": in_frames(frames.block(
        *FIELDS, (b":path", b"/")) + frames.literal(
            b"x", b"y" * 4000, 0x40) + b"\xbe" * 30_000),
    "trailers": head(1, b"/", domain=API, method=b"POST", flags=4)
                + in_frames(frames.block((b"x", X))),
    "padding": head(1, b"/", domain=API, method=b"POST", flags=4)
               + frames.frame(frames.DATA, frames.PADDED, 1,
                              b"\xff" + bytes(255)) * 8000,
    "a frame": b"\xff\xff\xff\0\0\0\0\0\1" + X,
    "settings": frames.settings(*[(9999, 1)] * 2700) * 200,
    "a table": frames.settings((frames.HEADER_TABLE_SIZE, 2**32 - 1))
               + gets(b"/text.txt"),
    "priorities": b"".join(
        frames.frame(frames.PRIORITY_UPDATE, 0, 0, stream.to_bytes(4, "big")
                     + bytes(16000)) for stream in range(1, 400, 2)),
    "an echo": frames.frame(frames.PING, 0, 0, X[:16384]) * 100,
    "a goodbye": frames.frame(frames.GOAWAY, 0, 0, X[:16384]) * 100,
}


def test_what_is_too_large(others, wires):
    def send(protocol, octets):
        wire = wires(protocol)
        wire.settimeout(1)
        said = b""
        with contextlib.suppress(OSError):
            wire.sendall(octets)
            while more := wire.recv(1 << 16):
                said += more[:10 - len(said)]
        assert protocol == "h2" or said in (b"", b"HTTP/1.1 4")

    with concurrent.futures.ThreadPoolExecutor(16) as attackers:
        tasks = [attackers.submit(send, "http/1.1", octets)
                 for octets in OVERSIZE.values()]
        tasks += [attackers.submit(send, "h2", WIDE + octets)
                  for octets in OVERSIZE_2.values()]
        for task in tasks:
            task.result()


def test_who_waits_for_events_is_not_slow(server):
    with concurrent.futures.ThreadPoolExecutor(2) as readers:
        for events in readers.map(lambda protocol: server.fetch(
                "/events", protocol, API), ["h2", "http/1.1"]):
            assert events.text == "data: 1\n\ndata: 2\n\n"
