"""Room 16, Connections: the program over real sockets."""

import concurrent.futures
import contextlib
import fcntl
import io
import itertools
import os
import pathlib
import random
import signal
import socket
import ssl
import struct
import termios
import time

import hpack
import hyperframe.frame as hf
import pytest
from harness import (
    DOMAIN,
    Server,
    eventually,
    free_port,
    make_site,
    trusting_context,
)
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import Pace, Tweaks

PAGE = b"<h1>Hello</h1>\n"
CSS = b"p { margin: 0 }\n" * 64
MEDIUM = random.Random(16).randbytes(12 << 20)
HUGE_BYTES = 100 << 20
FILES = {"index.html": PAGE, "a.css": CSS, "medium.bin": MEDIUM}
PROTOCOLS = ["http/1.1", "h2"]
PING = b"\0\0\x08\6\0\0\0\0\0" + bytes(8)
PATIENCE_SECONDS = 20
#: small times and sizes, so that each is seen within a second or two
QUICK = {"handshake-seconds": "0.3", "header-seconds": "0.3",
         "idle-seconds": "1", "send-seconds": "1", "max-header-bytes": "2048",
         "max-headers": "20", "max-body-bytes": "1000",
         "max-streams": "5"}


def make_files(folder, tweaks=None):
    folder = make_site(folder, FILES, tweaks)
    with open(folder / "www" / "huge.bin", "wb") as huge:
        huge.truncate(HUGE_BYTES)
    return folder


def assert_no_fault(server):
    assert not server.lines("M60001"), server.explained("a fault")
    assert "Traceback" not in server.output.read_text(errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory, configuration_home):
    """The program in devlove mode with its own limits."""
    folder = make_files(tmp_path_factory.mktemp("usual"))
    with Server(folder, mode="devlove") as running:
        for name in ("huge.bin", "medium.bin"):
            assert running.client().head(f"/{name}").status_code == 200
        yield running
        assert_no_fault(running)


@pytest.fixture(scope="module")
def quick_server(tmp_path_factory, configuration_home):
    """The program in devlove mode with small limits, telling all."""
    folder = make_files(tmp_path_factory.mktemp("quick"), QUICK)
    with Server(folder, "--log-codes", "all", mode="devlove") as running:
        yield running
        assert_no_fault(running)


@pytest.fixture(scope="module")
def public_server(tmp_path_factory, configuration_home):
    """The program in internet mode with two workers and a redirect port."""
    folder = make_files(tmp_path_factory.mktemp("public"))
    port = free_port()
    with Server(folder, "--workers", "2", "-t", f"127.0.0.1:{port}"
                ) as running:
        running.redirect_port = port
        yield running
        assert_no_fault(running)


def dial(server, protocol="http/1.1", receive_bytes=0, context=None,
         session=None):
    """A TLS connection whose receive buffer may be kept small."""
    plain = socket.socket()
    plain.settimeout(PATIENCE_SECONDS)
    if receive_bytes:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    plain.connect(("127.0.0.1", server.port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = context or trusting_context()
    context.set_alpn_protocols([protocol])
    return context.wrap_socket(plain, server_hostname=DOMAIN, session=session)


def request(line, *lines, host=DOMAIN):
    return "\r\n".join([line, f"Host: {host}", *lines, "", ""]).encode()


class Answer:
    """One response of HTTP/1.1, read from a buffered stream."""

    def __init__(self, stream, method="GET"):
        first = stream.readline()
        assert first, "closed instead of answered"
        self.status = int(first.split()[1])
        self.fields = {}
        while line := stream.readline().rstrip(b"\r\n"):
            name, _, value = line.partition(b":")
            self.fields[name.decode()] = value.strip().decode()
        length = int(self.fields.get("content-length", 0))
        bodiless = method == "HEAD" or self.status == 304
        self.body = b"" if bodiless else stream.read(length)
        self.is_whole = bodiless or len(self.body) == length


def raw(kind, stream, payload):
    """A frame that hyperframe does not know."""
    return (len(payload).to_bytes(3, "big") + bytes([kind, 0])
            + stream.to_bytes(4, "big") + payload)


class Browser:
    """A client of HTTP/2 that sends and reads frame by frame."""

    def __init__(self, server, window=2**31 - 1, receive_bytes=0):
        self.socket = dial(server, "h2", receive_bytes)
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._buffer = b""
        self.heads = {}
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                  hf.SettingsFrame(0, settings={4: window}),
                  hf.WindowUpdateFrame(0, 2**31 - 1 - 65535))

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.socket.close()

    def send(self, *frames):
        self.socket.sendall(b"".join(
            frame if isinstance(frame, bytes) else frame.serialize()
            for frame in frames))

    def head(self, stream, path, *fields, method="GET", end=True):
        """A HEADERS frame; to be sent in the order in which it is made."""
        frame = hf.HeadersFrame(
            stream, flags=["END_HEADERS"] + ["END_STREAM"] * end)
        frame.data = self._encoder.encode([
            (":method", method), (":scheme", "https"),
            (":authority", DOMAIN), (":path", path), *fields])
        return frame

    def frames(self):
        """All frames until the end of the connection."""
        while True:
            while len(self._buffer) >= 9:
                frame, length = hf.Frame.parse_frame_header(
                    memoryview(self._buffer[:9]))
                if len(self._buffer) < 9 + length:
                    break
                frame.parse_body(memoryview(self._buffer[9:9 + length]))
                self._buffer = self._buffer[9 + length:]
                if isinstance(frame, hf.HeadersFrame):
                    self.heads[frame.stream_id] = dict(
                        self._decoder.decode(frame.data))
                yield frame
            try:
                received = self.socket.recv(16384)
            except ConnectionError:
                return
            if not received:
                return
            self._buffer += received

    def until(self, condition):
        """The frames up to the first that meets a condition."""
        frames = []
        for frame in self.frames():
            frames.append(frame)
            if condition(frame):
                return frames
        raise AssertionError(f"closed after {frames[-5:]}")

    def body(self, stream):
        """The whole body of an answer."""
        frames = self.until(lambda frame: frame.stream_id == stream
                            and "END_STREAM" in frame.flags)
        return octets(frames, stream)


def octets(frames, stream):
    return b"".join(frame.data for frame in frames if isinstance(
        frame, hf.DataFrame) and frame.stream_id == stream)


def priority_update(stream, field):
    return raw(0x10, 0, struct.pack(">I", stream) + field)


def is_data_of(stream):
    return lambda frame: (isinstance(frame, hf.DataFrame)
                          and frame.stream_id == stream)


def is_reset_of(stream):
    return lambda frame: (isinstance(frame, hf.RstStreamFrame)
                          and frame.stream_id == stream)


def is_goaway(frame):
    return isinstance(frame, hf.GoAwayFrame)


def resident_bytes(server):
    pages = pathlib.Path(f"/proc/{server.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(server):
    text = pathlib.Path(f"/proc/{server.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stalled(sock):
    """Wait until nothing more comes to a socket that nobody reads."""
    counts = []

    def holds_still():
        answer = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
        counts.append(struct.unpack("i", answer)[0])
        # What is less than a record is TLS talking to itself.
        return counts[-1] > 16384 and counts[-20:] == counts[-1:] * 20

    eventually(holds_still)
    return counts[-1]


@contextlib.contextmanager
def asking(server, protocol, path, receive_bytes=0):
    """A connection on which a file was asked for and nothing was read."""
    if protocol == "h2":
        with Browser(server, receive_bytes=receive_bytes) as browser:
            browser.send(browser.head(1, path))
            yield browser.socket
    else:
        with dial(server, receive_bytes=receive_bytes) as sock:
            sock.sendall(request(f"GET {path} HTTP/1.1"))
            yield sock


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_arrives_whole(server, protocol):
    assert server.fetch("/medium.bin", protocol).content == MEDIUM


def test_the_best_form_is_served_as_soon_as_it_is_made(server):
    def is_best():
        with server.client() as client:
            answer = client.get("/a.css", headers={"accept-encoding": "br"})
        assert answer.content == CSS
        return answer.headers["etag"].endswith('-br-11"')

    eventually(is_best)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_reader_that_stops_holds_little_memory(server, protocol):
    with asking(server, protocol, "/huge.bin", 65536) as sock:
        stalled(sock)
    before = resident_bytes(server)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stalled(stack.enter_context(
                asking(server, protocol, "/huge.bin", 65536)))
        assert resident_bytes(server) - before < 2 << 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_stops_is_cut_off_and_costs_no_processor(
        quick_server, protocol):
    count = len(quick_server.lines("M00006"))
    with asking(quick_server, protocol, "/huge.bin", 65536) as sock:
        stalled(sock)
        # Each of these may make the server write, until it cannot any more.
        for _ in range(400 if protocol == "h2" else 1):
            sock.sendall(PING if protocol == "h2"
                         else request("GET / HTTP/1.1"))
        before = processor_seconds(quick_server)
        line = quick_server.await_line("M00006", count + 1)[-1]
        assert line.message.endswith("send")
        assert processor_seconds(quick_server) - before < 0.4


def test_a_window_below_zero_costs_no_processor(quick_server):
    count = len(quick_server.lines("M00006"))
    with Browser(quick_server, window=1000) as browser:
        browser.send(browser.head(1, "/medium.bin"))
        browser.until(is_data_of(1))
        browser.send(hf.SettingsFrame(0, settings={4: 0}))
        before = processor_seconds(quick_server)
        quick_server.await_line("M00006", count + 1)
        assert processor_seconds(quick_server) - before < 0.4


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 10**6))
def test_who_keeps_up_the_least_rate_is_waited_for_without_end(waits, rate):
    pace, count = Pace(3, Tweaks(least_bytes_per_second=rate)), 0
    for is_awaited in waits:
        count += rate
        assert pace.bears(is_awaited, count)


@given(st.floats(1, 60), st.integers(2, 10**6))
def test_who_sends_next_to_nothing_has_twice_the_time_at_most(seconds, rate):
    pace, sweeps = Pace(seconds, Tweaks(least_bytes_per_second=rate)), 0
    # A sweep is half a second.
    while pace.bears(True, sweeps * rate / 4):
        sweeps += 1
    assert 2 * seconds - 1 <= sweeps / 2 <= 2 * seconds + 1


def test_a_client_that_is_held_up_now_and_then_is_borne():
    pace = Pace(2, Tweaks())
    for _ in range(100):
        assert pace.bears(True, 0)
        assert pace.bears(False, 0)


@pytest.fixture(scope="module", params=["python", "native"])
def strict_server(request, tmp_path_factory, configuration_home):
    """The program in devlove mode, with a rate that drips are below."""
    folder = make_files(tmp_path_factory.mktemp(request.param), {
        "send-seconds": "1", "least-bytes-per-second": "100000"})
    with Server(folder, "--log-codes", "all", "--engine", request.param,
                mode="devlove") as running:
        yield running
        assert_no_fault(running)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_reads_drop_by_drop_is_cut_off(strict_server, protocol):
    count = len(strict_server.lines("M00006"))
    with asking(strict_server, protocol, "/huge.bin", 65536) as sock:
        eventually(lambda: sock.recv(256) and strict_server.lines(
            "M00006")[count:])
    assert strict_server.lines("M00006")[-1].message.endswith("send")


def test_windows_that_open_drop_by_drop_are_no_progress(strict_server):
    count = len(strict_server.lines("M00006"))
    with Browser(strict_server, window=1000) as browser:
        browser.send(browser.head(1, "/medium.bin"))
        # What is sent besides, for its PING, is none either.
        eventually(lambda: browser.send(
            hf.WindowUpdateFrame(1, 100), PING) or strict_server.lines(
            "M00006")[count:])
        browser.until(is_reset_of(1))
        browser.send(browser.head(3, "/a.css"), hf.WindowUpdateFrame(3, 9999))
        assert browser.body(3) == CSS


def test_a_stream_that_is_held_up_is_reset_and_the_others_go_on(
        strict_server):
    with Browser(strict_server, window=0) as browser:
        browser.send(browser.head(1, "/medium.bin"),
                     browser.head(3, "/huge.bin"))
        browser.send(hf.WindowUpdateFrame(3, 1 << 16))
        for frame in browser.frames():
            if is_reset_of(1)(frame):
                break
            if is_data_of(3)(frame):
                # Slowly enough to be still at it by then.
                time.sleep(0.001)
                browser.send(hf.WindowUpdateFrame(3, len(frame.data)))
        assert frame.error_code == 8
        browser.send(browser.head(5, "/a.css"), hf.WindowUpdateFrame(5, 9999))
        assert browser.body(5) == CSS


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02"])
def test_a_handshake_has_its_time(quick_server, hello):
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", quick_server.port)) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.sendall(hello)
        assert sock.recv(1000) == b""
    assert 0.2 < time.monotonic() - begin < 3


def test_what_came_while_the_server_stood_still_is_not_late(tmp_path):
    folder = make_files(tmp_path, {
        "handshake-seconds": "2", "header-seconds": "2", "idle-seconds": "2"})
    with (Server(folder, "--log-codes", "all", mode="devlove") as server,
          socket.create_connection(("127.0.0.1", server.port)) as fresh,
          dial(server) as idle, dial(server) as half,
          concurrent.futures.ThreadPoolExecutor(1) as other):
        half.sendall(b"GET /a.css HTTP/1.1\r\n")
        server.await_line("M00001", 3)
        server.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        shaken = other.submit(
            trusting_context().wrap_socket, fresh, server_hostname=DOMAIN)
        half.sendall(f"Host: {DOMAIN}\r\n\r\n".encode())
        idle.sendall(request("GET /a.css HTTP/1.1"))
        eventually(lambda: time.monotonic() - stopped > 2.5)
        server.signal(signal.SIGCONT)
        with shaken.result(PATIENCE_SECONDS) as answered:
            answered.sendall(request("GET /a.css HTTP/1.1"))
            for sock in (answered, half, idle):
                assert sock.recv(12) == b"HTTP/1.1 200"
        assert not server.lines("M00006")


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_plain_http_at_the_port_for_tls_is_told_so(server, method):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.sendall(method + b" / HTTP/1.1\r\ncontent-length: 9000\r\n\r\n"
                     + bytes(9000))
        answer = b"".join(iter(lambda: sock.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"begin the address with https://\n" in answer
    assert server.fetch("/").status_code == 200


@pytest.mark.parametrize("hello", [b"SSH-2.0-x\r\n\r\n", b"\0" * 50])
def test_what_is_no_handshake_is_closed(server, hello):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.sendall(hello)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                continue
    assert server.fetch("/").status_code == 200


@pytest.mark.parametrize("octets_before", [b"", request("GET / HTTP/1.1")])
def test_a_slow_head_gets_408(quick_server, octets_before):
    with dial(quick_server) as sock:
        sock.sendall(octets_before + b"GET / HTTP/1.1\r\nHost:")
        with sock.makefile("rb") as stream:
            if octets_before:
                assert Answer(stream).status == 200
            answer = Answer(stream)
            assert answer.status == 408
            assert answer.fields["connection"] == "close"
            assert stream.read() == b""


def test_a_head_that_drips_gets_408_all_the_same(quick_server):
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.settimeout(0.1)
        begin = time.monotonic()
        sock.sendall(b"GET / HTTP/1.1\r\n")
        for n in itertools.count():
            with contextlib.suppress(TimeoutError):
                assert sock.recv(20).startswith(b"HTTP/1.1 408")
                break
            sock.sendall(b"X-%d: y\r\n" % n)
        assert time.monotonic() - begin < 3
        assert not stream.closed


@pytest.mark.parametrize("octets_before", [b"", b"PRI * HTTP/2.0\r\n"])
def test_a_slow_frame_ends_in_goaway(quick_server, octets_before):
    with Browser(quick_server) as browser:
        browser.send(browser.head(1, "/").serialize()[:-3])
        assert browser.until(is_goaway)[-1].error_code == 11
        assert not [*browser.frames()]


def test_an_idle_connection_is_closed_without_a_word(quick_server):
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.sendall(request("GET / HTTP/1.1"))
        assert Answer(stream).body == PAGE
        begin = time.monotonic()
        assert stream.read() == b""
        assert 0.5 < time.monotonic() - begin < 4


def test_an_idle_connection_of_http2_hears_goaway(quick_server):
    with Browser(quick_server) as browser:
        browser.send(browser.head(1, "/"))
        assert browser.body(1) == PAGE
        goodbye = browser.until(is_goaway)[-1]
        assert (goodbye.error_code, goodbye.last_stream_id) == (0, 1)
        assert not [*browser.frames()]


def close_one_way(browser):
    """Ends what the client says, without close_notify."""
    socket.socket.shutdown(browser.socket, socket.SHUT_WR)


def test_a_client_of_http2_that_says_goodbye_is_answered(server):
    with Browser(server) as browser:
        browser.send(browser.head(1, "/"))
        assert browser.body(1) == PAGE
        # Raises where there is no close_notify from the other side.
        browser.socket.unwrap().close()


def test_a_client_of_http2_that_goes_without_goodbye_is_told_nothing(server):
    with Browser(server) as browser:
        browser.send(browser.head(1, "/"))
        assert browser.body(1) == PAGE
        close_one_way(browser)
        assert socket.socket.recv(browser.socket, 1) == b""


def test_a_client_of_http2_that_says_no_more_gets_its_answers(server):
    with Browser(server) as browser:
        browser.send(browser.head(1, "/medium.bin"))
        close_one_way(browser)
        assert browser.body(1) == MEDIUM
        assert not [*browser.frames()]


TOO_LARGE = [[("x-large", "y" * 3000)], [("x-many", "y")] * 30]


@pytest.mark.parametrize("fields", TOO_LARGE, ids=["large", "many"])
def test_a_large_head_gets_431(quick_server, fields):
    lines = [f"{name}: {value}" for name, value in fields]
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.sendall(request("GET / HTTP/1.1", *lines))
        assert Answer(stream).status == 431
        assert stream.read() == b""
    with Browser(quick_server) as browser:
        browser.send(browser.head(1, "/", *fields))
        browser.body(1)
        assert browser.heads[1][":status"] == "431"
        browser.send(browser.head(3, "/"))
        assert browser.body(3) == PAGE


def test_a_body_that_is_announced_too_large_gets_413(quick_server):
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.sendall(request("POST / HTTP/1.1", "Content-Length: 1001"))
        assert Answer(stream).status == 413
        assert stream.read() == b""
    with Browser(quick_server) as browser:
        browser.send(browser.head(
            1, "/", ("content-length", "1001"), method="POST", end=False))
        assert browser.until(is_reset_of(1))[-1].error_code == 0
        assert browser.heads[1][":status"] == "413"
        browser.send(browser.head(3, "/"))
        assert browser.body(3) == PAGE


def test_an_answer_arrives_though_the_body_is_not_complete(quick_server):
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.sendall(request("POST /a.css HTTP/1.1", "Content-Length: 900")
                     + b"x" * 800)
        answer = Answer(stream)
        assert answer.status == 405
        assert answer.is_whole
        assert stream.read() == b""


@pytest.mark.parametrize("head", [
    request("POST /a.css HTTP/1.1", "Content-Length: 3000000"),
    request("POST /a.css HTTP/1.1", "Transfer-Encoding: chunked"),
    request("GET / HTTP/1.1", "X: " + "y" * 2000)],
    ids=["413", "chunked", "431"])
def test_an_answer_arrives_though_the_client_still_sends(quick_server, head):
    with dial(quick_server) as sock, sock.makefile("rb") as stream:
        sock.sendall(head)
        for _ in range(100):
            sock.sendall(b"7530\r\n" + b"x" * 30_000 + b"\r\n")
        answer = Answer(stream)
        assert answer.status in (405, 413, 431)
        assert answer.is_whole
        assert stream.read() == b""


@pytest.mark.parametrize("way", ["at once", "octet by octet"])
def test_pipelined_requests_are_answered_in_their_order(server, way):
    asked = [("GET", "/", PAGE), ("HEAD", "/a.css", b""),
             ("GET", "/a.css", CSS), ("HEAD", "/nothing.css", b""),
             ("GET", "/", PAGE), ("HEAD", "/a\\b.css", b""),
             ("GET", "/a.css", CSS)] * 5
    octets = b"".join(request(f"{method} {path} HTTP/1.1")
                      for method, path, _ in asked)
    with dial(server) as sock, sock.makefile("rb") as stream:
        size = len(octets) if way == "at once" else 1
        for at in range(0, len(octets), size):
            sock.sendall(octets[at:at + size])
        for method, path, body in asked:
            answer = Answer(stream, method)
            assert answer.status == {"/nothing.css": 404, "/a\\b.css": 400
                                     }.get(path, 200)
            assert answer.body == body


@pytest.mark.parametrize("path, status", [
    ("/a.css", "200"), ("/nothing.css", "404"), ("/a\\b.css", "400")])
def test_head_over_http2_gets_no_body(server, path, status):
    with Browser(server) as browser:
        browser.send(browser.head(1, path, method="HEAD"))
        assert browser.body(1) == b""
        assert browser.heads[1][":status"] == status


def said_at_once(server, octets):
    """All that is answered to octets that are followed by close_notify."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting_context().wrap_bio(
        incoming, outgoing, server_hostname=DOMAIN)
    place = ("127.0.0.1", server.port)
    with socket.create_connection(place, PATIENCE_SECONDS) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(16384))
        tls.write(octets)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read())
        while received := sock.recv(65536):
            incoming.write(received)
    answered = []
    with contextlib.suppress(ssl.SSLZeroReturnError):
        while True:
            answered.append(tls.read(65536))
    return b"".join(answered)


def test_a_client_that_has_said_all_still_gets_its_answers(server):
    stream = io.BytesIO(said_at_once(server, b"".join(
        request(f"GET {path} HTTP/1.1")
        for path in ("/a.css", "/medium.bin", "/"))))
    assert Answer(stream).body == CSS
    assert Answer(stream).body == MEDIUM
    assert Answer(stream).body == PAGE
    assert stream.read() == b""


@pytest.mark.parametrize("is_talkative", [False, True])
def test_an_urgent_answer_overtakes_a_download_under_way(
        server, is_talkative):
    with Browser(server, receive_bytes=65536) as browser:
        # Once, so that its worker need not read it when it is urgent.
        browser.send(browser.head(1, "/a.css"))
        browser.until(is_data_of(1))
        browser.send(browser.head(3, "/huge.bin", ("priority", "u=5")))
        for _ in range(100):
            browser.until(is_data_of(3))
            if is_talkative:
                browser.send(hf.WindowUpdateFrame(3, 1))
        browser.send(browser.head(5, "/a.css", ("priority", "u=0")))
        passed = browser.until(is_data_of(5))
        # What kernel and client hold already; it was 5 MiB without lowat.
        assert len(octets(passed, 3)) < 1 << 20


def test_an_answer_of_no_urgency_waits_for_the_others(server):
    with Browser(server, receive_bytes=65536) as browser:
        browser.send(browser.head(1, "/medium.bin", ("priority", "u=3")),
                     browser.head(3, "/medium.bin", ("priority", "u=7")))
        passed = browser.until(lambda frame: frame.stream_id == 1
                               and "END_STREAM" in frame.flags)
        assert octets(passed, 1) == MEDIUM
        assert len(octets(passed, 3)) < len(MEDIUM) // 8
        rest = browser.body(3)
        assert octets(passed, 3) + rest == MEDIUM


def test_incremental_answers_share_the_way(server):
    with Browser(server, receive_bytes=65536) as browser:
        browser.send(browser.head(1, "/medium.bin", ("priority", "u=3, i")),
                     browser.head(3, "/medium.bin", ("priority", "u=3, i")))
        passed = browser.until(lambda frame: "END_STREAM" in frame.flags)
        shares = sorted(len(octets(passed, stream)) for stream in (1, 3))
        assert shares[0] > shares[1] * 0.8


def test_a_priority_may_change_under_way(server):
    with Browser(server, receive_bytes=65536) as browser:
        browser.send(browser.head(1, "/medium.bin", ("priority", "u=1")),
                     browser.head(3, "/medium.bin", ("priority", "u=6")))
        browser.until(is_data_of(1))
        browser.send(priority_update(3, b"u=0"))
        passed = browser.until(lambda frame: "END_STREAM" in frame.flags)
        assert passed[-1].stream_id == 3
        assert len(octets(passed, 1)) < len(MEDIUM) // 2


def test_a_priority_may_come_before_its_request(server):
    with Browser(server, receive_bytes=65536) as browser:
        browser.send(browser.head(1, "/medium.bin"),
                     priority_update(3, b"u=0"),
                     browser.head(3, "/medium.bin", ("priority", "u=7")))
        passed = browser.until(lambda frame: "END_STREAM" in frame.flags)
        assert passed[-1].stream_id == 3


def test_a_priority_may_come_while_the_answer_is_made(server):
    (server.folder / "www" / "unknown.bin").write_bytes(MEDIUM[::2])
    with Browser(server, receive_bytes=65536) as browser:
        browser.send(browser.head(1, "/huge.bin", ("priority", "u=1")),
                     browser.head(3, "/unknown.bin"),
                     priority_update(3, b"u=0"))
        passed = browser.until(lambda frame: "END_STREAM" in frame.flags)
        assert passed[-1].stream_id == 3


def test_priorities_of_streams_that_never_come_are_forgotten(server):
    with Browser(server, receive_bytes=65536) as browser:
        for stream in range(1, 600, 2):
            browser.send(browser.head(stream, "/", method="HEAD"),
                         priority_update(stream, b"u=1"))
            browser.until(lambda frame: "END_STREAM" in frame.flags)
        browser.send(browser.head(601, "/medium.bin"),
                     priority_update(603, b"u=0"),
                     browser.head(603, "/medium.bin"))
        passed = browser.until(lambda frame: "END_STREAM" in frame.flags)
        assert passed[-1].stream_id == 603


@pytest.fixture
def fresh(server):
    """A file that a test may replace: path in the site, path on disk."""
    path = server.folder / "www" / "fresh.bin"
    path.write_bytes(MEDIUM)
    server.fetch("/fresh.bin")
    return path


def replace(path):
    path.with_suffix(".next").write_bytes(MEDIUM[::-1])
    path.with_suffix(".next").rename(path)


def write_into(path):
    with open(path, "r+b") as stream:
        stream.seek(len(MEDIUM) - 10)
        stream.write(b"something!")


def cut(path):
    os.truncate(path, len(MEDIUM) - 1)


def downloading(server, protocol, change):
    """Octets of a download during which the file is changed; how it ends.

    The end is the code of the reset, "cut", or "whole".
    """
    with asking(server, protocol, "/fresh.bin", 65536) as sock:
        stalled(sock)
        change()
        if protocol == "h2":
            return rest_of_stream(sock)
        with sock.makefile("rb") as stream:
            answer = Answer(stream)
            return answer.body, "whole" if answer.is_whole else "cut"


def rest_of_stream(sock):
    """The body of stream 1, read frame by frame, and its end."""
    body = []
    with sock.makefile("rb") as stream:
        while head := stream.read(9):
            frame, length = hf.Frame.parse_frame_header(memoryview(head))
            payload = stream.read(length)
            if isinstance(frame, hf.RstStreamFrame):
                return b"".join(body), int.from_bytes(payload, "big")
            if isinstance(frame, hf.DataFrame):
                body.append(payload)
                if "END_STREAM" in frame.flags:
                    return b"".join(body), "whole"
    return b"".join(body), "cut"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("change", [replace, os.unlink])
def test_a_file_that_is_replaced_goes_out_as_it_was(
        server, fresh, protocol, change):
    body, end = downloading(server, protocol, lambda: change(fresh))
    assert end == "whole"
    assert body == MEDIUM


@pytest.mark.parametrize("protocol, expected", [("http/1.1", "cut"),
                                                ("h2", 2)])
@pytest.mark.parametrize("change", [write_into, cut])
def test_a_file_that_is_written_into_is_never_sent_to_its_end(
        server, fresh, protocol, expected, change):
    body, end = downloading(server, protocol, lambda: change(fresh))
    assert end == expected
    assert MEDIUM.startswith(body)
    assert server.fetch("/fresh.bin").content == fresh.read_bytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_reset_while_it_is_asked_for_harms_nobody(server, protocol):
    if protocol == "h2":
        with Browser(server) as browser:
            for stream in range(1, 60, 2):
                browser.send(octets_of(browser.head(stream, "/a.css"),
                                       hf.RstStreamFrame(stream, 8)))
            browser.send(browser.head(61, "/"))
            assert browser.body(61) == PAGE
    else:
        for _ in range(5):
            with dial(server) as sock:
                sock.sendall(request("GET /medium.bin HTTP/1.1"))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack("ii", 1, 0))
        assert server.fetch("/", protocol).content == PAGE


def octets_of(*frames):
    return b"".join(frame.serialize() for frame in frames)


def test_a_fault_behind_a_good_request_is_still_told(server):
    with Browser(server) as browser:
        browser.send(octets_of(browser.head(1, "/a.css"),
                               hf.DataFrame(99, b"x")))
        assert browser.until(is_goaway)[-1].error_code == 1


def test_too_many_cheap_frames_end_the_connection(server):
    with Browser(server) as browser:
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                browser.send(*[hf.PingFrame(0, b"12345678")] * 10)
        assert browser.until(is_goaway)[-1].error_code == 11
    assert server.fetch("/").status_code == 200


def test_streams_above_the_limit_are_refused_and_the_others_served(
        quick_server):
    with Browser(quick_server, window=0) as browser:
        browser.send(*[browser.head(stream, "/a.css")
                       for stream in range(1, 17, 2)])
        frames = browser.until(is_reset_of(15))
        refused = [frame.stream_id for frame in frames
                   if isinstance(frame, hf.RstStreamFrame)]
        assert refused == [11, 13, 15]
        browser.send(hf.SettingsFrame(0, settings={4: 65535}))
        frames = []
        for _ in range(5):
            frames += browser.until(
                lambda frame: "END_STREAM" in frame.flags)
        for stream in range(1, 11, 2):
            assert octets(frames, stream) == CSS


# The redirect port


def plainly(server, octets):
    """The answer to what is said at the redirect port, and when it closes."""
    place = ("127.0.0.1", server.redirect_port)
    with socket.create_connection(place, PATIENCE_SECONDS) as sock:
        sock.sendall(octets)
        with sock.makefile("rb") as stream:
            answer = Answer(stream, octets.split(b" ")[0].decode("latin-1"))
            assert stream.read() == b"", "not closed after the answer"
            return answer


@pytest.mark.parametrize("line, host, path", [
    ("GET / HTTP/1.1", DOMAIN, "/"),
    ("GET / HTTP/1.0", DOMAIN, "/"),
    ("GET /a/b.css?c=d&e=/f HTTP/1.1", DOMAIN, "/a/b.css?c=d&e=/f"),
    ("GET /a? HTTP/1.1", DOMAIN.upper() + ":80", "/a?"),
    ("POST /form HTTP/1.1", DOMAIN, "/form"),
    (f"GET http://{DOMAIN}/x HTTP/1.1", DOMAIN, "/x"),
    ("GET //evil.example/x HTTP/1.1", DOMAIN, "//evil.example/x"),
    ("GET /%0d%0aset-cookie:x HTTP/1.1", DOMAIN, "/%0d%0aset-cookie:x"),
    ("OPTIONS * HTTP/1.1", DOMAIN, "/"),
])
def test_plain_http_is_told_where_https_is(public_server, line, host, path):
    answer = plainly(public_server, request(line, host=host))
    assert answer.status == 301
    assert answer.fields["location"] == (
        f"https://{DOMAIN}:{public_server.port}{path}")
    assert answer.fields["connection"] == "close"
    assert answer.is_whole


def test_head_at_the_redirect_port_gets_no_body(public_server):
    answer = plainly(public_server, request("HEAD /x HTTP/1.1"))
    assert answer.status == 301


@pytest.mark.parametrize("octets, status", [
    (request("GET / HTTP/1.1", host="evil.example"), 421),
    (request("GET / HTTP/1.1", host=f"{DOMAIN}.evil.example"), 421),
    (request("GET / HTTP/1.1", host=f"evil.example#{DOMAIN}"), 400),
    (request("GET / HTTP/1.1", host=f"{DOMAIN}@evil.example"), 400),
    (request("GET / HTTP/1.1", host=f"{DOMAIN}/x"), 400),
    (request("GET / HTTP/1.1", host=f"{DOMAIN}\tx"), 400),
    (request("GET / HTTP/1.1", host=""), 400),
    (request("GET / HTTP/1.1", host=f"{DOMAIN}\r\nHost: x"), 400),
    (request("GET http://evil.example/ HTTP/1.1"), 421),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.0\r\n\r\n", 400),
    (request("GET /a b HTTP/1.1"), 400),
    (request("GET /\\evil.example HTTP/1.1"), 400),
    (request("GET /\r\nX: y HTTP/1.1"), 505),
    (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", 400),
    (request("GET / HTTP/1.1", "X: " + "y" * 20_000), 431),
    (request("CONNECT a.example:443 HTTP/1.1"), 400),
])
def test_strangers_are_sent_nowhere(public_server, octets, status):
    answer = plainly(public_server, octets)
    assert answer.status == status
    assert "location" not in answer.fields
    assert answer.is_whole


@pytest.mark.parametrize("words", [b"", b"GET / HT"])
def test_a_silent_client_of_the_redirect_port_is_closed(public_server, words):
    place = ("127.0.0.1", public_server.redirect_port)
    begin = time.monotonic()
    with socket.create_connection(place, PATIENCE_SECONDS) as sock:
        sock.sendall(words)
        received = sock.makefile("rb").read()
    assert 1 < time.monotonic() - begin < 4.5
    assert received[:12] in (b"", b"HTTP/1.1 408")


def test_the_redirect_arrives_though_the_client_still_sends(public_server):
    answer = plainly(public_server, request(
        "POST /x HTTP/1.1", "Content-Length: 2000000") + b"x" * 2_000_000)
    assert answer.status == 301


# TLS


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_sessions_are_resumed_at_every_worker(public_server, version):
    context = trusting_context()
    number = getattr(ssl.TLSVersion, version)
    context.minimum_version = context.maximum_version = number
    session, reused = None, []
    for _ in range(8):
        with dial(public_server, context=context, session=session) as sock:
            sock.sendall(request("GET /a.css HTTP/1.1"))
            with sock.makefile("rb") as stream:
                assert Answer(stream).body == CSS
            reused.append(sock.session_reused)
            session = sock.session
    assert reused == [False] + [True] * 7


def end_usually(server):
    with contextlib.closing(dial(server)) as client:
        client.sendall(request("GET /a.css HTTP/1.1", "Connection: close"))
        while client.recv(65536):
            pass


def end_by_reset(server):
    client = dial(server, "h2")
    client.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def end_before_tls(server):
    address = "127.0.0.1", server.port
    with socket.create_connection(address, PATIENCE_SECONDS) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while client.recv(65536):
            pass


@pytest.mark.parametrize("end", [end_usually, end_by_reset, end_before_tls])
def test_connections_that_end_leave_nothing_for_the_garbage_collector(
        tmp_path, configuration_home, end):
    (tmp_path / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    folder = make_site(tmp_path / "site", FILES)
    environment = {"PYTHONPATH": str(tmp_path)}
    with Server(folder, mode="devlove", environment=environment) as running:
        for _ in range(50):
            end(running)
        before = running.memory()
        for _ in range(200):
            end(running)
        # One that waits for the collector holds 30 to 60 KB.
        assert running.memory() - before < 2 << 20
