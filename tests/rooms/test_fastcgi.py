"""Part 11c, FastCGI: applications that speak it, and some that do not."""

import socket
import struct
import threading

import pytest
from exchanges import Body, body_of
from hypothesis import given, settings
from hypothesis import strategies as some

from shimmercat import (
    Consultant,
    ConsultantSettings,
    ForbiddenPath,
    NetworkAddress,
    Question,
    Stream,
    Tweaks,
    UpstreamFailed,
)

BEGIN, ABORT, END, PARAMS, STDIN, STDOUT, STDERR = range(1, 8)
FINE = b"content-type: text/plain\r\n\r\nhello"


def record(kind, content=b"", version=1, number=1, padding=0):
    return struct.pack(">BBHHBx", version, kind, number, len(content),
                       padding) + content + bytes(padding)


def ending(status=0, verdict=0):
    return record(END, struct.pack(">IB3x", status, verdict))


def output(text=FINE, padding=0):
    return record(STDOUT, text, padding=padding)


def whole(text=FINE):
    return output(text) + ending()


def pairs(packed):
    """The variables in the content of PARAMS."""
    found, at = {}, 0
    while at < len(packed):
        sizes = []
        for _ in range(2):
            size = packed[at]
            at += 1
            if size > 127:
                (size,) = struct.unpack(">I", packed[at - 1:at + 3])
                size -= 1 << 31
                at += 3
            sizes.append(size)
        name, value = packed[at:at + sizes[0]], packed[
            at + sizes[0]:at + sum(sizes)]
        at += sum(sizes)
        found[name.decode()] = value.decode()
    return found


class Application:
    """A FastCGI application that sends what it is given to send."""

    def __init__(self, *pieces):
        #: for each connection in turn, the last one for all that follow
        self.pieces = list(pieces)
        #: (variables, body) of all requests, and connections so far
        self.asked, self.accepted = [], 0

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def consultant(self, **more):
        return Consultant(ConsultantSettings(
            "app", (NetworkAddress.parse(str(self.port)),), "fastcgi",
            first_byte_timeout=5, **more), Tweaks(connect_seconds=2))

    def _accept(self):
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            with wire, wire.makefile("rb") as stream:
                while self._take(stream):
                    piece = self.pieces[0]
                    if len(self.pieces) > 1:
                        del self.pieces[0]
                    for part in piece if isinstance(piece, list) else [piece]:
                        wire.sendall(part)
                    if not self._goes_on(piece):
                        break

    @staticmethod
    def _goes_on(piece):
        return isinstance(piece, bytes) and piece.endswith(ending())

    def _take(self, stream):
        """Read a request; return whether there was one."""
        content = {PARAMS: b"", STDIN: b"", BEGIN: b""}
        while header := stream.read(8):
            _, kind, _, length, padding = struct.unpack(">BBHHBx", header)
            content[kind] += stream.read(length)
            stream.read(padding)
            if kind == STDIN and not length:
                self.asked.append((pairs(content[PARAMS]), content[STDIN]))
                return True
        return False


def question(method="GET", target="/x.php?y=1", fields=(), **more):
    return Question(method, target, [(b"host", b"a.example:8443"), *fields],
                    **more)


def ask(*pieces, **more):
    """The reply to a question whose answer is given, and its body."""
    with Application(*pieces) as app:
        reply = app.consultant().ask(question(**more))
        return reply, body_of(reply)


@pytest.mark.parametrize("target, configured, script, rest", [
    ("/index.php", {}, "/index.php", ""),
    ("/index.php/a/b/", {}, "/index.php", "/a/b/"),
    ("/a.php/b.php/c", {}, "/a.php", "/b.php/c"),
    ("/a.phpx/b", {}, "/a.phpx/b", ""),
    ("/caf%C3%A9.php/%C3%A5", {}, "/caf\xe9.php", "/\xe5"),
    ("/shop/", {"document_root": "/srv"}, "/shop/index.php", ""),
    ("/", {"document_root": "/srv/"}, "/index.php", ""),
    ("/shop/", {}, "/shop/", ""),
    ("/shop/", {"script_name": "/index.php"}, "/index.php", ""),
    ("/wp-login.php", {"script_name": "/index.php"}, "/wp-login.php", ""),
    ("/app/x/", {"script_name": "/app"}, "/app", "/x/"),
    ("/apple/", {"script_name": "/app"}, "/app", "/apple/"),
    ("/x/", {"script_name": "/"}, "", "/x/"),
])
def test_a_path_is_a_script_and_what_is_for_it(
        target, configured, script, rest):
    with Application(whole()) as app:
        app.consultant(**configured).ask(question(target=target))
        variables, _ = app.asked[0]
    assert variables["SCRIPT_NAME"] == script
    assert variables["PATH_INFO"] == rest
    assert variables["REQUEST_URI"] == target
    root = configured.get("document_root")
    assert variables.get("SCRIPT_FILENAME") == (
        root and root.rstrip("/") + script)


@pytest.mark.parametrize("target", [
    "/../x.php", "/a/%2e%2e/x.php", "//x.php", "/a//x.php", "/%2fx.php",
    "/x.php%00.jpg", "/.hidden/x.php", "/a\\..\\x.php"])
def test_a_path_that_is_no_plain_one_is_refused(target):
    with Application(whole()) as app, pytest.raises(ForbiddenPath):
        app.consultant().ask(question(target=target))
    assert not app.asked


def test_fields_are_variables_except_what_could_pose_as_others():
    with Application(whole()) as app:
        app.consultant().ask(question(fields=[
            (b"x-a", b"1"), (b"x-a", b"2"), (b"x_a", b"evil"),
            (b"proxy", b"evil"), (b"content-type", b"a/b"),
            (b"x.y", b"evil"), (b"accept", b"x" * 300)]))
        variables, _ = app.asked[0]
    assert variables["HTTP_X_A"] == "1, 2"
    assert variables["CONTENT_TYPE"] == "a/b"
    assert variables["HTTP_ACCEPT"] == "x" * 300
    assert (variables["HTTP_HOST"], variables["SERVER_NAME"],
            variables["SERVER_PORT"]) == ("a.example:8443", "a.example",
                                          "8443")
    assert not {x for x in variables if "PROXY" in x or "evil" in variables[x]}
    assert "CONTENT_LENGTH" not in variables


def test_more_variables_than_a_record_holds_are_told():
    with Application(whole()) as app:
        app.consultant().ask(question(
            target="/x.php?" + "y" * 70_000, fields=[(b"x-a", b"last")]))
        assert len(app.asked[0][0]["QUERY_STRING"]) == 70_000


@pytest.mark.parametrize("length", [None, 200_003])
def test_a_body_arrives_whole_with_its_length(length):
    with Application(whole()) as app:
        app.consultant().ask(question("POST", body=Body(
            b"abc", b"x" * 200_000, length=length)))
        variables, body = app.asked[0]
    assert body == b"abc" + b"x" * 200_000
    assert variables["CONTENT_LENGTH"] == "200003"


@pytest.mark.parametrize("text, status, fields, body", [
    (FINE, 200, [(b"content-type", b"text/plain")], b"hello"),
    (b"Status: 404 Not Found\nA: b\n\nno", 404, [(b"a", b"b")], b"no"),
    (b"status: 500\r\n\r\n", 500, [], b""),
    (b"Location: /x\r\n\r\n", 302, [(b"location", b"/x")], b""),
    (b"Status: 301\r\nLocation: /x\r\n\r\n", 301, [(b"location", b"/x")],
     b""),
    (b"A: 1\r\nA: 2\r\nConnection: a\r\nTransfer-Encoding: chunked\r\n\r\nx",
     200, [(b"a", b"1"), (b"a", b"2")], b"x"),
    (b"A: caf\xe9\r\n\r\n\r\n\r\n", 200, [(b"a", b"caf\xe9")], b"\r\n\r\n"),
    (b"Content-Length: 2\r\n\r\nabc", 200, [(b"content-length", b"2")],
     b"ab"),
    (b"\r\nno head", 200, [], b"no head"),
])
def test_heads_of_cgi_are_understood(text, status, fields, body):
    reply, got = ask(whole(text))
    assert (reply.status, got) == (status, body)
    known = [x for x in reply.fields if x[0] != b"content-length"]
    assert known == [x for x in fields if x[0] != b"content-length"]
    assert [int(value) for name, value in reply.fields
            if name == b"content-length"] == [len(body)]


@settings(max_examples=30)
@given(cuts=some.lists(some.integers(1, 60), max_size=8),
       padding=some.integers(0, 7))
def test_an_answer_may_come_in_any_pieces(cuts, padding):
    sent = output(FINE[:9], padding) + record(STDERR, b"hm") + output(
        FINE[9:27]) + output(FINE[27:], padding) + output(b"") + ending()
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(sent[at:at + cut])
        at += cut
    reply, body = ask([*pieces, sent[at:]])
    assert (reply.status, body) == (200, b"hello")


def test_a_long_answer_of_unknown_length_has_a_sure_end():
    with Application(output(b"A: b\r\n\r\n") + 3 * output(b"x" * 60_000)
                     + ending()) as app:
        reply = app.consultant().ask(question())
        assert isinstance(reply.body, Stream) and reply.body.is_framed
        assert body_of(reply) == b"x" * 180_000


def test_a_head_request_has_no_body_whatever_is_sent():
    reply, body = ask(whole(b"Content-Length: 5\r\n\r\nhello"), method="HEAD")
    assert body == b""
    assert (b"content-length", b"5") in reply.fields


@pytest.mark.parametrize("sent, cause", [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no FastCGI"),
    (record(STDOUT, FINE, number=2), "no FastCGI"),
    (record(STDIN, b"x"), "record of type 5"),
    (output(b"no field\r\n\r\n") + ending(), "no field"),
    (output(b"A: b\r\n c\r\n\r\n") + ending(), "several lines"),
    (output(b"Status: ok\r\n\r\n") + ending(), "status"),
    (output(b"Status: 103\r\n\r\n") + ending(), "status"),
    (output(b"A: b\0c\r\n\r\n") + ending(), "header value"),
    (output(b"A: b") + ending(), "without an answer"),
    (ending(), "without an answer"),
    (ending(verdict=2), "overloaded"),
    (record(END, b"x"), "malformed"),
    (output(b"Content-Length: 9\r\n\r\nhello") + ending(), "complete"),
    (whole() + output(b"more"), "after the end"),
    ([output(FINE)], "complete"),
    ([output(b"A: b\r\n")], "complete"),
    ([output(b"A: " + b"b" * 60_000)] * 3, "does not end"),
    ([b"\1\6"], "complete"),
])
def test_an_answer_that_breaks_a_rule_is_none(sent, cause):
    with pytest.raises(UpstreamFailed, match=cause):
        ask(sent)


def test_a_connection_is_used_again():
    with Application(whole()) as app:
        asked = app.consultant()
        for _ in range(3):
            assert body_of(asked.ask(question())) == b"hello"
    assert len(app.asked) == 3 and app.accepted < 3


def test_complaints_are_logged_up_to_a_limit(said):
    ask([record(STDERR, b"one\n"), record(STDERR, b"x" * 9000),
         record(STDERR, b"nobody hears this"), output() + ending(status=3)])
    texts = [entry.pieces[1] for entry in said if entry.code == 40028]
    assert texts[0] == "one" and texts[1].endswith("x ...")
    assert texts[2:] == ["ended with status 3"]
    assert sum(map(len, texts)) < 4200
