"""What reaches a backend is one well-formed request for each that is answered.

A recording backend keeps every octet.  h11, which has no code in common with
the program, must read them as exactly the requests that were answered; after
each vector a request in good faith goes the same way, unharmed.
"""

import collections
import contextlib
import itertools
import pathlib
import socket
import sys
import threading

import h11
import pytest
from harness import Server, eventually, make_site, trusting_context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "engines"))

import frames

DOMAIN = "api.example.test"
HOST = f"Host: {DOMAIN}\r\n"
#: what no vector may get to the backend as a request, and how it would look
SMUGGLED = "GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"
FORGED = b"x-forged"
PATIENCE_SECONDS = 10


class Recorder:
    """A backend that answers everything and keeps all octets that it gets."""

    def __init__(self):
        #: (number of the connection, request) and what h11 could not read
        self.requests, self.faults = [], []
        #: how many requests have begun, and were broken off
        self.begun = self.broken_off = 0
        self._numbers = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(wire,),
                                 daemon=True).start()

    def _serve(self, wire):
        peer, octets = h11.Connection(h11.SERVER), b""
        number = next(self._numbers)
        with wire, contextlib.suppress(OSError):
            while piece := wire.recv(65536):
                octets += piece
                try:
                    peer.receive_data(piece)
                    self._answer(peer, wire, number)
                except h11.RemoteProtocolError as error:
                    self.faults.append((error, octets))
                    return
            # A client that leaves cancels what it asked: that is no fault.
            self.broken_off += peer.their_state is h11.SEND_BODY

    def _answer(self, peer, wire, number):
        """Answers each request that is complete."""
        while True:
            event = peer.next_event()
            if peer.they_are_waiting_for_100_continue:
                wire.sendall(peer.send(h11.InformationalResponse(
                    status_code=100, headers=[])))
            if isinstance(event, h11.Request):
                self._asked = number, event
                self.begun += 1
            elif isinstance(event, h11.EndOfMessage):
                self.requests.append(self._asked)
                wire.sendall(b"".join(map(peer.send, (
                    h11.Response(status_code=200,
                                 headers=[("content-length", "3")]),
                    h11.Data(data=b"ok\n"), h11.EndOfMessage()))))
                peer.start_next_cycle()
            elif event in (h11.NEED_DATA, h11.PAUSED):
                return


@pytest.fixture(scope="module")
def recorder():
    """The recording backend."""
    backend = Recorder()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, configuration_home, recorder):
    """The program before an API that is the recorder."""
    folder = make_site(tmp_path_factory.mktemp("site"))
    (folder / "devlove.yaml").write_text(
        "shimmercat-devlove:\n  domains:\n"
        f"    {DOMAIN}:\n      port: {recorder.port}\n")
    with Server(folder, mode="devlove") as running:
        yield running
        assert not running.lines("M60001"), running.explained("a fault")


@pytest.fixture(scope="module")
def faithful(server):
    """Asks in good faith, over a connection kept for that: (path)."""
    with dial(server) as tls, tls.makefile("rb") as stream:
        def ask(path):
            tls.sendall(f"GET {path} HTTP/1.1\r\n{HOST}\r\n".encode())
            lines = list(iter(stream.readline, b"\r\n"))
            assert b" 200 " in lines[0]
            assert stream.read(3) == b"ok\n"
        yield ask


def dial(server):
    """A connection of HTTP/1.1 to the program."""
    plain = socket.create_connection(
        ("127.0.0.1", server.port), PATIENCE_SECONDS)
    context = trusting_context()
    context.set_alpn_protocols(["http/1.1"])
    return context.wrap_socket(plain, server_hostname=DOMAIN)


def http1(server, octets):
    """Sends octets over HTTP/1.1; gives the statuses of all answers.

    Waits for the end of the connection, or for a pause after an answer.
    """
    received, statuses, data = b"", [], b"-"
    with dial(server) as tls, contextlib.suppress(OSError):
        tls.sendall(octets)
        tls.settimeout(1)
        while data:
            data = tls.recv(65536)
            received += data
            statuses = [int(part[:3])
                        for part in received.split(b"HTTP/1.1 ")[1:]]
            if statuses and statuses[-1] >= 200:
                tls.settimeout(0.05)
    return statuses


def http2(server, octets):
    """Sends frames over HTTP/2; gives the status on stream 1, if any."""
    target = frames.Target(
        "127.0.0.1", server.port, DOMAIN.encode(), b"/", b"")
    with frames.Client(target) as client:
        client.send(octets)
        exchange = client.exchanges[1]
        client.until(lambda: exchange.ended or exchange.reset is not None
                     or client.goaway, "end of stream 1")
        return [exchange.status] if exchange.status else []


@pytest.fixture
def judge(server, recorder, faithful):
    """Sends a vector; checks that the backend saw what was answered.

    (client, octets) gives the statuses and the requests that it saw; after
    them one in good faith went the same way, unharmed.
    """
    def of(client, octets):
        recorder.requests.clear()
        statuses = client(server, octets)
        faithful("/faith")
        faults = [recorder.faults.pop() for _ in list(recorder.faults)]
        assert not faults
        *seen, (wire, last) = recorder.requests
        assert last.target == b"/faith"
        assert {name for name, _ in last.headers} == EXPECTED
        answered = statuses.count(200)
        # One may have been cut off while its body came; none is new.
        assert answered <= len(seen) <= max(1, answered)
        for number, request in seen:
            assert_lawful(request)
            assert number == wire or not answered
        return statuses, [request for _, request in seen]
    return of


#: all that a request in good faith arrives with
EXPECTED = {b"host", b"x-forwarded-for", b"x-forwarded-proto", b"via",
            b"x-forwarded-host", b"forwarded"}


def assert_lawful(request):
    """No request carries what could be read in two ways."""
    names = collections.Counter(name for name, _ in request.headers)
    assert names[b"host"] == 1
    assert names[b"content-length"] + names[b"transfer-encoding"] <= 1
    assert not {FORGED, b"connection", b"upgrade", b"http2-settings",
                b"keep-alive", b"proxy-connection"} & names.keys()
    fields = dict(request.headers)
    assert fields[b"host"] == DOMAIN.encode()
    assert fields[b"x-forwarded-for"] == b"127.0.0.1"
    assert fields.get(b"transfer-encoding", b"chunked") == b"chunked"
    assert not request.target.startswith(b"/smuggled")
    assert all(0x20 < octet < 0x7F for octet in request.target)
    for name, value in request.headers:
        assert not {0, 10, 13} & {*name, *value}


def post(*lines, body=""):
    """A POST with these lines in its head."""
    head = "".join(f"{line}\r\n" for line in lines)
    return f"POST /victim HTTP/1.1\r\n{HOST}{head}\r\n{body}"


def get(*lines, target="/victim", first="GET {} HTTP/1.1"):
    head = "".join(f"{line}\r\n" for line in lines)
    return f"{first.format(target)}\r\n{HOST}{head}\r\n"


CHUNKS = "5\r\nhello\r\n0\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"
#: vectors that must be answered with 400 and its kind, or with nothing
REFUSED = {
    # two ways to tell the length of a body
    "CL.TE": post("Content-Length: 6", CHUNKED, body="0\r\n\r\nG"),
    "TE.CL": post(CHUNKED, "Content-Length: 4",
                  body=f"{len(SMUGGLED):x}\r\n{SMUGGLED}\r\n0\r\n\r\n"),
    "CL.CL": post("Content-Length: 3", "Content-Length: 5", body="hello"),
    "CL list": post("Content-Length: 5, 5", body="hello"),
    "CL list of two": post("Content-Length: 0, 44", body=SMUGGLED),
    "CL twice alike": post("Content-Length: 5", "Content-Length: 5",
                           body="hello"),
    "CL plus": post("Content-Length: +5", body="hello"),
    "CL minus": post("Content-Length: -5", body="hello"),
    "CL hexadecimal": post("Content-Length: 0x5", body="hello"),
    "CL two words": post("Content-Length: 5 5", body="hello"),
    "CL underscored": post("Content-Length: 1_0", body="hellohello"),
    "CL without digits": post("Content-Length: ", body=""),
    "CL beyond 64 bits": post(f"Content-Length: {2**64 + 5}", body="hello"),
    "CL with NUL": post("Content-Length: 5\0", body="hello"),
    "CL vertical tab": post("Content-Length: \x0b5", body="hello"),
    # codings that others might not see, or not understand
    "TE identity": post("Transfer-Encoding: identity", body=CHUNKS),
    "TE chunked, identity": post(
        "Transfer-Encoding: chunked, identity", body=CHUNKS),
    "TE identity, chunked": post(
        "Transfer-Encoding: identity, chunked", body=CHUNKS),
    "TE gzip, chunked": post("Transfer-Encoding: gzip, chunked", body=CHUNKS),
    "TE chunked, chunked": post(
        "Transfer-Encoding: chunked, chunked", body=CHUNKS),
    "TE twice": post(CHUNKED, CHUNKED, body=CHUNKS),
    "TE twice, one unknown": post(
        CHUNKED, "Transfer-Encoding: cow", body=CHUNKS),
    "TE vertical tab": post("Transfer-Encoding: \x0bchunked", body=CHUNKS),
    "TE form feed behind": post("Transfer-Encoding: chunked\x0c", body=CHUNKS),
    "TE xchunked": post("Transfer-Encoding: xchunked", body=CHUNKS),
    "TE quoted": post('Transfer-Encoding: "chunked"', body=CHUNKS),
    "TE with parameter": post("Transfer-Encoding: chunked;q=1", body=CHUNKS),
    "TE space before colon": post("Transfer-Encoding : chunked", body=CHUNKS),
    "TE tab before colon": post("Transfer-Encoding\t: chunked", body=CHUNKS),
    "TE space before name": post(" Transfer-Encoding: chunked", body=CHUNKS),
    "TE folded": post("Transfer-Encoding:\r\n chunked", body=CHUNKS),
    "TE in 1.0": "POST /victim HTTP/1.0\r\n" + HOST + CHUNKED + "\r\n\r\n"
                 + CHUNKS,
    # chunks
    "chunk 0x": post(CHUNKED, body="0x5\r\nhello\r\n0\r\n\r\n"),
    "chunk plus": post(CHUNKED, body="+5\r\nhello\r\n0\r\n\r\n"),
    "chunk minus": post(CHUNKED, body="-5\r\nhello\r\n0\r\n\r\n"),
    "chunk underscored": post(CHUNKED, body="0_5\r\nhello\r\n0\r\n\r\n"),
    "chunk without size": post(CHUNKED, body="\r\nhello\r\n0\r\n\r\n"),
    "chunk beyond 64 bits": post(
        CHUNKED, body="1" + "0" * 16 + "5\r\nhello\r\n0\r\n\r\n"),
    "chunk too long": post(CHUNKED, body="5\r\nhello!!\r\n0\r\n\r\n"),
    "chunk size ends in LF": post(CHUNKED, body="5\nhello\r\n0\r\n\r\n"),
    "chunk size ends in CR": post(CHUNKED, body="5\rhello\r\n0\r\n\r\n"),
    "chunk ends in LF": post(CHUNKED, body="5\r\nhello\n0\r\n\r\n"),
    "chunk extension with LF": post(
        CHUNKED, body="5;a\nhello\r\n0\r\n\r\n"),
    "chunk extension with CR": post(
        CHUNKED, body="5;a\rx\r\nhello\r\n0\r\n\r\n"),
    "a trailer of framing": post(
        CHUNKED, body="5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    # lines
    "LF in a value": get("X-A: 1\nX-Forged: 1"),
    "CR in a value": get("X-A: 1\rX-Forged: 1"),
    "NUL in a value": get("X-A: 1\0X-Forged: 1"),
    "a head that ends in LF": f"GET /victim HTTP/1.1\n{HOST}\n",
    "a folded line": get("X-A: 1\r\n X-Forged: 1"),
    "a folded first line": f"GET /victim HTTP/1.1\r\n X-A: 1\r\n{HOST}\r\n",
    "a line without colon": get("X-Forged"),
    "a space in a name": get("X Forged: 1"),
    "a NUL in a name": get("X\0Forged: 1"),
    "a bracket in a name": get("X[Forged: 1"),
    "an empty name": get(": 1"),
    "a name that is not ASCII": get("X-\xe9: 1"),
    # the request line
    "a space in the target": get(target="/victim /x"),
    "a tab in the line": get(first="GET\t/victim\tHTTP/1.1"),
    "a version twice": get(first="GET /victim HTTP/1.1 HTTP/1.1"),
    "CR in the target": get(target="/victim\rX-Forged: 1"),
    "NUL in the target": get(target="/victim\0"),
    "a backslash in the target": get(target="/victim\\..\\x"),
    "a fragment": get(target="/victim#x"),
    "a target that is not ASCII": get(target="/victim\xe9"),
    "no slash": get(target="victim"),
    "a user in the target": get(target=f"https://user@{DOMAIN}/victim"),
    "another scheme": get(target=f"ftp://{DOMAIN}/victim"),
    "CONNECT": get(target=f"{DOMAIN}:443", first="CONNECT {} HTTP/1.1"),
    "an unknown version": get(first="GET /victim HTTP/1.2"),
    "HTTP/2 within 1.1": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": "GET /victim\r\n",
    "a method with a colon": get(first="GET: /victim HTTP/1.1"),
    "a method that nobody knows": get(first="SMUGGLE /victim HTTP/1.1"),
    "a small method": get(first="get /victim HTTP/1.1"),
    # hosts
    "two hosts": get(f"Host: {DOMAIN}"),
    "two hosts that differ": get("Host: evil.example"),
    "no host": "GET /victim HTTP/1.1\r\n\r\n",
    "host with a path": f"GET / HTTP/1.1\r\nHost: {DOMAIN}/x\r\n\r\n",
    "host with a user": f"GET / HTTP/1.1\r\nHost: a@{DOMAIN}\r\n\r\n",
    "host list": f"GET / HTTP/1.1\r\nHost: {DOMAIN}, evil.example\r\n\r\n",
    "another host in the target": get(target="http://evil.example/victim"),
}
#: vectors that are lawful: each is passed as one request, made anew
PASSED = {
    "CL": post("Content-Length: 5", body="hello"),
    "CL after spaces": post("Content-Length: \t 5 ", body="hello"),
    "TE": post(CHUNKED, body=CHUNKS),
    "TE after spaces": post("Transfer-Encoding:   chunked  ", body=CHUNKS),
    "an extension of a chunk": post(
        CHUNKED, body="5;a=b\r\nhello\r\n0\r\n\r\n"),
    "a request as a body": post(
        f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
    "a request as a chunk": post(
        CHUNKED, body=f"{len(SMUGGLED):x}\r\n{SMUGGLED}\r\n0\r\n\r\n"),
    "underscores instead of hyphens": get(
        "Content_Length: 9", "Transfer_Encoding: chunked",
        "X_Forwarded_For: 1.2.3.4", "X-Forwarded_For: 1.2.3.4"),
    "connection names fields of ours": get(
        "Connection: close, Host, X-Forwarded-For, Via, Content-Length"),
    "connection names its own": get(
        "Connection: X-Forged", "X-Forged: 1", "Keep-Alive: timeout=5"),
    "proxies": get("Proxy-Connection: keep-alive", "Proxy: evil.example:80",
                   "Proxy-Authorization: Basic YTpi"),
    "who speaks for others": get(
        "X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4",
        "X-Forwarded-Host: evil.example", "X-Real-IP: 1.2.3.4"),
    "another host in the field": f"GET https://{DOMAIN}/victim HTTP/1.1\r\n"
                                 "Host: evil.example\r\n\r\n",
    "encoded line ends": get(
        target="/victim%0d%0aX-Forged:%201%0d%0a%00%20HTTP/1.1"),
    "another host in the path": get(target="//evil.example/victim"),
    "climbing": get(target="/victim/../%2e%2e/x"),
    "h2c": get("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings",
               "HTTP2-Settings: AAMAAABkAAQAAP__"),
    "Expect with a body": post(
        "Content-Length: 5", "Expect: 100-continue", body="hello"),
    "Expect without a body": get("Expect: 100-continue"),
    "Expect of something else": get("Expect: 200-ok"),
    "TE as trailers": get("TE: gzip, trailers", "Connection: TE"),
    "a GET with a body": get("Content-Length: 3") + "abc",
    "lines before": "\r\n\r\n" + get(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(judge, name):
    statuses, seen = judge(http1, REFUSED[name].encode("latin-1"))
    assert not seen
    assert all(400 <= status < 506 and status not in (500, 502, 504)
               for status in statuses), statuses


@pytest.mark.parametrize("name", PASSED)
def test_what_is_lawful_is_passed_as_one_request(judge, name):
    statuses, seen = judge(http1, PASSED[name].encode("latin-1"))
    assert statuses[-1] == 200
    assert len(seen) == 1


@pytest.mark.parametrize("lines, begin", [
    (["Content-Length: 10"], "hello"),
    ([CHUNKED], "5\r\nhello\r\n"),
    ([CHUNKED], "5\r\nhello\r\n0\r\n"),
])
def test_a_body_that_is_cut_off_is_no_request(judge, recorder, lines, begin):
    def leave(server, octets):
        begun, before = recorder.begun, recorder.broken_off
        with dial(server) as tls:
            tls.sendall(octets)
            eventually(lambda: recorder.begun > begun)
        # at once, not when the body is given up for lost
        eventually(lambda: recorder.broken_off > before)
        return []

    _, seen = judge(leave, post(*lines, body=begin).encode())
    assert not seen


def test_two_requests_at_once_are_two(judge):
    octets = post("Content-Length: 5", body="hello") + get(target="/second")
    statuses, seen = judge(http1, octets.encode())
    assert statuses == [200, 200]
    assert [request.target for request in seen] == [b"/victim", b"/second"]


def fields(*more, method=b"GET", path=b"/victim", authority=None,
           scheme=b"https"):
    """The fields of a request over HTTP/2."""
    return ((b":method", method), (b":scheme", scheme),
            (b":authority", authority or DOMAIN.encode()), (b":path", path),
            *more)


def headers(*more, body=None, **pseudo):
    """A request over HTTP/2 in frames."""
    block = frames.block(*fields(*more, **pseudo))
    ended = 0 if body is not None else frames.END_STREAM
    head = frames.frame(frames.HEADERS, frames.END_HEADERS | ended, 1, block)
    return head + (frames.body(1, body) if body is not None else b"")


def trailed(*trailers):
    """A request over HTTP/2 with a body and trailers."""
    head = frames.block(*fields(method=b"POST"))
    ended = frames.END_HEADERS | frames.END_STREAM
    return (frames.frame(frames.HEADERS, frames.END_HEADERS, 1, head)
            + frames.body(1, b"hello", end=False)
            + frames.frame(frames.HEADERS, ended, 1, frames.block(*trailers)))


SPLIT = b"1\r\nX-Forged: 1"
REFUSED_2 = {
    "CRLF in a value": headers((b"x-a", SPLIT)),
    "LF in a value": headers((b"x-a", b"1\nx-forged: 1")),
    "CR in a value": headers((b"x-a", b"1\rx-forged: 1")),
    "NUL in a value": headers((b"x-a", b"1\0")),
    "a request in a value": headers(
        (b"x-a", b"1\r\n\r\n" + SMUGGLED.encode())),
    "a space before a value": headers((b"x-a", b" 1")),
    "CRLF in a name": headers((b"x-a: 1\r\nx-forged", b"1")),
    "a colon in a name": headers((b"x-forged:", b"1")),
    "a space in a name": headers((b"x forged", b"1")),
    "an empty name": headers((b"", b"1")),
    "capitals in a name": headers((b"X-Forged", b"1")),
    "a name that is not ASCII": headers((b"x-\xe9", b"1")),
    "CRLF in a cookie": headers((b"cookie", b"a=1\r\nx-forged: 1")),
    "CRLF in the path": headers(
        path=b"/victim HTTP/1.1\r\nx-forged: 1\r\nx: "),
    "a request in the path": headers(
        path=b"/victim HTTP/1.1\r\n\r\n" + SMUGGLED.encode()),
    "a space in the path": headers(path=b"/victim HTTP/1.1"),
    "a fragment in the path": headers(path=b"/victim#x"),
    "an absolute path": headers(path=b"https://evil.example/victim"),
    "no slash in the path": headers(path=b"victim"),
    "an empty path": headers(path=b""),
    "a path that is not ASCII": headers(path=b"/victim\xe9"),
    "NUL in the path": headers(path=b"/victim\0"),
    "a backslash in the path": headers(path=b"/victim\\x"),
    "an asterisk for a GET": headers(path=b"*"),
    "a request in the method": headers(
        method=b"GET /smuggled HTTP/1.1\r\nhost: evil.example\r\n\r\nGET"),
    "a space in the method": headers(method=b"GET /smuggled"),
    "an empty method": headers(method=b""),
    "CONNECT with a path": headers(method=b"CONNECT"),
    "CRLF in the authority": headers(
        authority=DOMAIN.encode() + b"\r\nx-forged: 1"),
    "a user in the authority": headers(authority=b"a@" + DOMAIN.encode()),
    "a path in the authority": headers(authority=DOMAIN.encode() + b"/x"),
    "another host": headers((b"host", b"evil.example")),
    "CRLF in the scheme": headers(scheme=b"https\r\nx-forged: 1"),
    "a URL in the scheme": headers(scheme=b"https://evil.example/?"),
    "a pseudo-field twice": headers((b":path", b"/smuggled")),
    "a pseudo-field behind": headers((b"x-a", b"1"), (b":path", b"/x")),
    "an unknown pseudo-field": headers((b":forged", b"1")),
    "transfer-encoding": headers((b"transfer-encoding", b"chunked"),
                                 method=b"POST", body=CHUNKS.encode()),
    "connection": headers((b"connection", b"keep-alive")),
    "upgrade": headers((b"upgrade", b"h2c")),
    "keep-alive": headers((b"keep-alive", b"timeout=5")),
    "proxy-connection": headers((b"proxy-connection", b"close")),
    "te": headers((b"te", b"chunked")),
    "a body longer than said": headers(
        (b"content-length", b"3"), method=b"POST", body=b"hello"),
    "a body shorter than said": headers(
        (b"content-length", b"50"), method=b"POST", body=b"hello"),
    "no body though said": headers((b"content-length", b"5"),
                                   method=b"POST"),
    "two lengths": headers((b"content-length", b"5"),
                           (b"content-length", b"6"),
                           method=b"POST", body=b"hello"),
    "a length with a sign": headers(
        (b"content-length", b"+5"), method=b"POST", body=b"hello"),
    "a length with CRLF": headers(
        (b"content-length", b"5\r\nx-forged: 1"), method=b"POST",
        body=b"hello"),
    "a length in a list": headers(
        (b"content-length", b"5, 5"), method=b"POST", body=b"hello"),
    "CRLF in a trailer": trailed((b"x-a", SPLIT)),
    "a name with CRLF in a trailer": trailed((b"x\r\nx-forged", b"1")),
    "a pseudo-field in a trailer": trailed((b":path", b"/smuggled")),
    "transfer-encoding in a trailer": trailed(
        (b"transfer-encoding", b"chunked")),
}
PASSED_2 = {
    "a body of a length": headers(
        (b"content-length", b"5"), method=b"POST", body=b"hello"),
    "a body of no length": headers(method=b"POST", body=b"hello"),
    "a request as a body": headers(method=b"POST", body=SMUGGLED.encode()),
    "chunks as a body": headers(method=b"POST", body=CHUNKS.encode()),
    "trailers": trailed((b"x-sum", b"1")),
    "te as trailers": headers((b"te", b"trailers")),
    "cookies in pieces": headers((b"cookie", b"a=1"), (b"cookie", b"b=2")),
    "the host twice": headers((b"host", DOMAIN.upper().encode())),
    "encoded line ends": headers(path=b"/victim%0d%0ax-forged:%201"),
    "underscores instead of hyphens": headers(
        (b"content_length", b"9"), (b"transfer_encoding", b"chunked"),
        (b"x_forwarded_for", b"1.2.3.4")),
    "who speaks for others": headers(
        (b"x-forwarded-for", b"1.2.3.4"), (b"forwarded", b"for=1.2.3.4")),
    "an expectation": headers((b"expect", b"100-continue"),
                              method=b"POST", body=b"hello"),
    "settings of h2c": headers((b"http2-settings", b"AAMAAABkAAQAAP__")),
    "the scheme http": headers(scheme=b"http"),
}


@pytest.mark.parametrize("name", REFUSED_2)
def test_what_is_malformed_in_http2_is_refused(judge, name):
    statuses, seen = judge(http2, REFUSED_2[name])
    assert not seen
    assert not statuses or 400 <= statuses[0] < 500, statuses


@pytest.mark.parametrize("name", PASSED_2)
def test_what_is_lawful_in_http2_is_passed_as_one_request(judge, name):
    statuses, seen = judge(http2, PASSED_2[name])
    assert statuses == [200]
    assert len(seen) == 1


def test_a_body_that_must_not_come_is_not_passed(judge):
    # The head was complete before the body broke its word.
    statuses, seen = judge(http2, headers(
        (b"content-length", b"0"), method=b"POST", body=SMUGGLED.encode()))
    assert not statuses
    assert all(dict(request.headers)[b"content-length"] == b"0"
               for request in seen)


ODD = st.binary(max_size=6) | st.sampled_from(
    [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"chunked", b"5", b"\t"])


@settings(max_examples=40,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([b"x-a", b"content-length", b"cookie", b"te",
                             b"expect", b"via", b"host"]),
       value=st.lists(ODD, max_size=3).map(b"".join))
def test_no_field_of_http2_can_become_two(judge, name, value):
    judge(http2, headers((name, value)))
