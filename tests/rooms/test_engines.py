"""Room 5, Engines."""

import collections
import random

import hpack
import hyperframe.frame as hf
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shimmercat
from shimmercat import (
    BodyReceived,
    EngineLimits,
    Http1Engine,
    Http2Engine,
    PeerLeaving,
    PriorityChanged,
    ProtocolFault,
    RequestEnded,
    RequestRefused,
    RequestStarted,
    StreamGone,
    StreamReset,
    make_engine,
)

HOST = b"Host: a.example\r\n"
OK = [(b":status", b"200")]
SIX = [*OK, (b"content-length", b"6")]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GET = [(b":method", b"GET"), (b":scheme", b"https"),
       (b":authority", b"a.example"), (b":path", b"/")]
POST = [(b":method", b"POST"), *GET[1:]]
PROTOCOL_ERROR, REFUSED_STREAM, CALM = 1, 7, 11


@pytest.fixture(scope="module", params=[
    Http2Engine,
    pytest.param(shimmercat.NATIVE_ENGINE, marks=pytest.mark.skipif(
        shimmercat.NATIVE_ENGINE is None, reason="not built"))],
    ids=["h2", "native"])
def engine_class(request):
    """Each engine for HTTP/2; both must do the same."""
    return request.param


def pieces_of(octets, seed):
    """The octets cut at random places."""
    dice = random.Random(seed)
    cuts = sorted(dice.sample(range(len(octets)), dice.randrange(
        min(12, len(octets)))))
    return [octets[start:stop] for start, stop in
            zip([0, *cuts], [*cuts, len(octets)], strict=True)]


def ways_to_cut(octets):
    """Whole, octet by octet, and five times at random."""
    yield [octets]
    yield [octets[n:n + 1] for n in range(len(octets))]
    for seed in range(5):
        yield pieces_of(octets, seed)


def events_of(engine, pieces):
    """What happens, however it was cut: bodies joined, ends told apart."""
    events = []
    for piece in pieces:
        for event in engine.receive(piece):
            add_plainly(events, event)
        while not engine.closing and not engine.hungry() and (
                engine.protocol == "h2"):
            for event in engine.receive(b""):
                add_plainly(events, event)
        if engine.closing:
            break
    return events


def add_plainly(events, event):
    if isinstance(event, RequestStarted):
        events.append(event._replace(ended=None))
        if event.ended:
            events.append(RequestEnded(event.stream))
        return
    last = events[-1] if events else None
    if (isinstance(event, BodyReceived) and isinstance(last, BodyReceived)
            and last.stream == event.stream):
        events[-1] = BodyReceived(event.stream, last.piece + event.piece, 0)
    elif isinstance(event, ProtocolFault):
        events.append(event._replace(reason=""))
    else:
        events.append(event._replace(cost=0) if isinstance(
            event, BodyReceived) else event)


# HTTP/1.1


def http1(**limits):
    return Http1Engine(EngineLimits(**limits))


def request(start=b"GET / HTTP/1.1", *lines, host=HOST):
    return b"%b\r\n%b%b\r\n" % (
        start, host, b"".join(line + b"\r\n" for line in lines))


def chunked(octets=b""):
    return request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked") + octets


def fields_of(event):
    return dict(event.fields)


def test_a_request_has_the_pseudo_fields_of_http2():
    engine = http1()
    (event,) = engine.receive(request(
        b"GET /a?b HTTP/1.1", b"X-Y:  z \t", b"x-y: 2"))
    assert event == RequestStarted(1, [
        (b":method", b"GET"), (b":scheme", b"https"),
        (b":authority", b"a.example"), (b":path", b"/a?b"),
        (b"x-y", b"z"), (b"x-y", b"2")], True)


def test_a_body_comes_in_pieces_and_then_its_end():
    engine = http1()
    (started,) = engine.receive(request(
        b"POST / HTTP/1.1", b"Content-Length: 6"))
    assert not started.ended
    assert engine.receive(b"abc") == [BodyReceived(1, b"abc", 3)]
    assert engine.receive(b"def") == [
        BodyReceived(1, b"def", 3), RequestEnded(1)]


def test_a_chunked_body_comes_without_its_chunks():
    events = events_of(http1(), [chunked(
        b"3;ext=1\r\nabc\r\n0A\r\n0123456789\r\n0\r\nX-Trailer: t\r\n\r\n")])
    assert events[1:] == [
        BodyReceived(1, b"abc0123456789", 0),
        RequestEnded(1, ((b"x-trailer", b"t"),))]


def test_an_answer_waits_for_its_turn():
    engine = http1()
    first = engine.receive(request(b"GET /1 HTTP/1.1")
                           + request(b"GET /2 HTTP/1.1")
                           + request(b"GET /3 HTTP/1.1"))
    assert [event.stream for event in first] == [1]
    assert not engine.hungry()
    for stream in (1, 3, 5):
        assert engine.sendable(stream) > 0
        assert not engine.sendable(stream + 2)
        with pytest.raises(StreamGone):
            engine.headers(stream + 2, OK)
        engine.headers(stream, OK, True)
        following = engine.receive(b"")
        assert [event.stream for event in following] == (
            [stream + 2] if stream < 5 else [])
    assert engine.hungry()
    assert engine.output().count(b"HTTP/1.1 200 OK\r\n") == 3


def test_what_comes_while_an_answer_is_under_way_is_kept():
    engine = http1()
    engine.receive(request())
    assert engine.receive(request(b"GET /2 HTTP/1.1")) == []
    engine.headers(1, OK, True)
    (second,) = engine.receive(b"")
    assert fields_of(second)[b":path"] == b"/2"


@pytest.mark.parametrize("version, lines, keeps", [
    (b"1.1", [], True),
    (b"1.1", [b"Connection: close"], False),
    (b"1.1", [b"Connection: x, Close"], False),
    (b"1.1", [b"Connection: keep-alive"], True),
    (b"1.0", [], False),
    (b"1.0", [b"Connection: keep-alive"], True),
    (b"1.0", [b"Connection: Keep-Alive, x"], True),
    (b"1.0", [b"Connection: close"], False),
])
def test_a_connection_is_kept_as_the_client_wants(version, lines, keeps):
    engine = http1()
    engine.receive(request(b"GET / HTTP/" + version, *lines))
    engine.headers(1, SIX)
    assert not engine.closing
    engine.body(1, b"abcdef", True)
    assert engine.closing is not keeps
    head = engine.output().partition(b"\r\n\r\n")[0].lower()
    assert (b"connection: close" in head) is not keeps
    assert (b"connection: keep-alive" in head) is (keeps and version == b"1.0")


def test_an_answer_before_the_end_of_the_request_ends_the_connection():
    engine = http1()
    engine.receive(request(b"POST / HTTP/1.1", b"Content-Length: 9"))
    engine.headers(1, OK, True)
    assert engine.closing
    assert b"connection: close" in engine.output()


def test_nothing_is_said_about_a_body_whose_answer_is_finished():
    engine = http1()
    engine.receive(request(b"POST / HTTP/1.1", b"Content-Length: 3"))
    engine.headers(1, OK, True)
    engine.receive(b"abc")
    assert engine.closing


def test_a_body_of_known_length_goes_out_as_it_is():
    engine = http1()
    engine.receive(request())
    engine.headers(1, SIX)
    engine.body(1, b"abc")
    engine.body(1, b"def", True)
    assert engine.output() == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcdef")


def test_a_body_of_unknown_length_goes_out_in_chunks():
    engine = http1()
    engine.receive(request())
    engine.headers(1, OK)
    engine.body(1, b"abc")
    engine.body(1, b"")
    engine.body(1, b"0123456789abcdef", True)
    head, _, body = engine.output().partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert body == b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n"
    assert not engine.closing


def test_the_answer_after_a_chunked_one_is_not_chunked():
    engine = http1()
    engine.receive(request() + request())
    engine.headers(1, OK)
    engine.body(1, b"a", True)
    engine.output()
    engine.receive(b"")
    engine.headers(3, SIX)
    engine.body(3, b"abcdef", True)
    assert engine.output().endswith(b"\r\n\r\nabcdef")


def test_http10_knows_no_chunks_so_the_end_is_the_end():
    engine = http1()
    engine.receive(request(b"GET / HTTP/1.0", b"Connection: keep-alive"))
    engine.headers(1, OK)
    engine.body(1, b"abc", True)
    head, _, body = engine.output().partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"connection: close" in head
    assert body == b"abc" and engine.closing


@pytest.mark.parametrize("status", [b"204", b"304"])
def test_an_answer_that_has_no_body_gets_no_length(status):
    engine = http1()
    engine.receive(request())
    engine.headers(1, [(b":status", status)], True)
    head = engine.output()
    assert b"content-length" not in head and b"chunked" not in head
    assert not engine.closing


def test_an_empty_answer_says_so():
    engine = http1()
    engine.receive(request())
    engine.headers(1, OK, True)
    assert b"content-length: 0\r\n" in engine.output()


def test_the_answer_to_head_keeps_its_length_and_has_no_body():
    engine = http1()
    engine.receive(request(b"HEAD / HTTP/1.1") + request())
    engine.headers(1, SIX, True)
    assert engine.output() == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
    assert not engine.closing
    assert len(engine.receive(b"")) == 1


def test_a_body_given_for_head_is_not_sent():
    engine = http1()
    engine.receive(request(b"HEAD / HTTP/1.1"))
    engine.headers(1, SIX)
    engine.body(1, b"abcdef", True)
    assert engine.output().endswith(b"\r\n\r\n")


@pytest.mark.parametrize("version, reaches", [(b"1.1", True), (b"1.0", False)])
def test_interim_answers_are_for_those_who_know_them(version, reaches):
    engine = http1()
    engine.receive(request(b"GET / HTTP/" + version))
    engine.headers(1, [(b":status", b"103"), (b"link", b"</a>")])
    engine.headers(1, OK, True)
    output = engine.output()
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200"
    assert output.startswith(hints) is reaches
    assert output.count(b"HTTP/1.1") == 1 + reaches


@pytest.mark.parametrize("head, status", [
    (request(host=b""), 400),
    (request(b"GET / HTTP/1.1", HOST.strip()), 400),
    (request(b"GET / HTTP/1.1", b"host: b.example"), 400),
    (request(b"GET / HTTP/1.1", b"X: " + b"x" * 2000), 431),
    (request(b"GET / HTTP/1.1", *[b"X: x"] * 20), 431),
    (request(b"GET /" + b"x" * 3000 + b" HTTP/1.1"), 431),
    (request(b"GET / HTTP/2.0"), 505),
    (request(b"GET / HTTP/3.0"), 400),
    (request(b"GET / HTTP/1.10"), 400),
    (request(b"get / HTTP/1.1"), 400),
    (request(b"GET /a b HTTP/1.1"), 400),
    (request(b"GET\t/ HTTP/1.1"), 400),
    (request(b"GET /\0 HTTP/1.1"), 400),
    (request(b"GET /\xff HTTP/1.1"), 400),
    (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 400),
    (PREFACE, 400),
])
def test_a_head_that_is_not_in_order_is_refused(head, status):
    engine = http1(header_bytes=1024, header_count=16)
    assert engine.receive(head)[0] == RequestRefused(1, status)
    assert not engine.hungry()
    engine.headers(1, [(b":status", b"%d" % status)], True)
    assert engine.closing
    assert engine.output().startswith(b"HTTP/1.1 %d " % status)


def test_nothing_follows_a_head_that_was_refused():
    for pieces in ways_to_cut(
            request(b"POST / HTTP/1.1", b"Content-Length: 2", host=b"")
            + b"ab" + request()):
        engine = http1()
        assert events_of(engine, pieces) == [RequestRefused(1, 400)]
        engine.headers(1, OK, True)
        assert engine.receive(request()) == []


def test_http10_may_leave_the_host_out():
    (event,) = http1().receive(request(b"GET / HTTP/1.0", host=b""))
    assert isinstance(event, RequestStarted)


def test_an_unfinished_head_gets_408_in_the_end():
    engine = http1()
    assert not engine.midway()
    engine.receive(b"GET / HT")
    assert engine.midway()
    assert engine.time_out() == [RequestRefused(1, 408)]
    engine.headers(1, [(b":status", b"408")], True)
    assert engine.closing
    assert engine.output().startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_only_heads_are_midway():
    engine = http1()
    engine.receive(request(b"POST / HTTP/1.1", b"Content-Length: 9"))
    assert not engine.midway()
    engine.receive(b"123456789")
    assert not engine.midway()
    engine.headers(1, OK, True)
    engine.receive(b"G")
    assert engine.midway()


@pytest.mark.parametrize("target, authority, path", [
    (b"http://B.example/x?y", b"B.example", b"/x?y"),
    (b"HTTPS://b.example:8/x", b"b.example:8", b"/x"),
    (b"https://b.example", b"b.example", b"/"),
    (b"https://b.example?y=/", b"b.example", b"/?y=/"),
    (b"/http://b.example/", b"a.example", b"/http://b.example/"),
    (b"*", b"a.example", b"*"),
])
def test_the_authority_of_the_target_wins(target, authority, path):
    (event,) = http1().receive(request(b"OPTIONS %b HTTP/1.1" % target))
    fields = fields_of(event)
    assert (fields[b":authority"], fields[b":path"]) == (authority, path)
    assert b"host" not in fields


SMUGGLED = [
    request(b"POST / HTTP/1.1", *lines) + body for lines, body in (
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"],
         b"0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 5"],
         b"0\r\n\r\n"),
        ([b"Content-Length: 1", b"Content-Length: 1"], b"x"),
        ([b"Content-Length: 1", b"Content-Length: 2"], b"xx"),
        ([b"Content-Length: 1, 1"], b"x"),
        ([b"Content-Length: +1"], b"x"),
        ([b"Content-Length: -1"], b""),
        ([b"Content-Length: 0x1"], b"x"),
        ([b"Content-Length: 1 1"], b"x"),
        ([b"Content-Length:"], b""),
        ([b"Content-Length: 18446744073709551617"], b"x"),
        ([b"Transfer-Encoding: xchunked"], b"0\r\n\r\n"),
        ([b"Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked, identity"], b"0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked, chunked"], b"0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked"] * 2, b"0\r\n\r\n"),
        ([b"Transfer-Encoding: identity", b"Content-Length: 1"], b"x"),
        ([b"Transfer-Encoding:", b"Content-Length: 1"], b"x"),
        ([b"Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n"),
        ([b"Transfer-Encoding : chunked"], b"0\r\n\r\n"),
        ([b"Content-Length : 1"], b"x"),
        ([b"X: y", b" folded: z"], b""),
        ([b"X:", b"\ty"], b""),
        ([b" Content-Length: 1"], b"x"),
        ([b"X: a\rContent-Length: 1"], b"x"),
        ([b"X: a\nContent-Length: 1"], b"x"),
        ([b"X: a\0b"], b""),
        ([b"X: a\x0bb"], b""),
        ([b"no colon"], b""),
        ([b": no name"], b""),
        ([b"X(: y"], b""),
        ([b"X\0: y"], b""),
    )] + [
    request().replace(b"\r\n", b"\n"),
    b"GET / HTTP/1.1\n" + HOST + b"\r\n",
    b"GET / HTTP/1.1\r\n" + HOST + b"\n",
    b"GET / HTTP/1.1\r\nHost: a.example\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a.example\r\r\n\r\n",
    b"GET / HTTP/1.1\r\n " + HOST + b"\r\n",
    request(b"POST / HTTP/1.0", b"Connection: keep-alive",
            b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
]


@pytest.mark.parametrize("octets", SMUGGLED)
def test_what_another_server_may_read_otherwise_is_refused(octets):
    engine = http1()
    events = engine.receive(octets + request())
    assert [type(event) for event in events] in (
        [RequestRefused], [RequestStarted, StreamReset]), events
    assert not engine.hungry()


@pytest.mark.parametrize("chunks", [
    b"0x1\r\na\r\n0\r\n\r\n",
    b"+1\r\na\r\n0\r\n\r\n",
    b"-1\r\na\r\n0\r\n\r\n",
    b"1 \r\na\r\n0\r\n\r\n",
    b" 1\r\na\r\n0\r\n\r\n",
    b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    b"\r\na\r\n0\r\n\r\n",
    b"10000000000000001\r\na\r\n0\r\n\r\n",
    b"1\na\n0\n\n",
    b"1\r\na\n0\r\n\r\n",
    b"1\r\naXX0\r\n\r\n",
    b"1\r\nab\r\n0\r\n\r\n",
    b"1;x\ny\r\na\r\n0\r\n\r\n",
    b"1;x\ry\r\na\r\n0\r\n\r\n",
    b"0\r\n\n",
    b"0\r\nContent-Length: 9\r\n\r\n",
    b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"0\r\nno colon\r\n\r\n",
])
def test_chunks_are_read_by_the_letter(chunks):
    for pieces in ways_to_cut(chunked(chunks) + request()):
        engine = http1()
        events = events_of(engine, pieces)
        assert isinstance(events[-1], StreamReset)
        assert RequestEnded(1) not in events
        assert not engine.hungry()
        # nothing else may be waited for: this would be for ever
        assert engine.closing


@pytest.mark.parametrize("octets", [
    b"GET /" + b"a" * 4000,
    b"GET / HTTP/1.1\r\nX: " + b"a" * 4000,
    b"GET / HTTP/1.1\r\n" + b"a" * 4000,
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 700,
], ids=["target", "value", "name", "fields"])
def test_a_head_without_end_is_refused(octets):
    for pieces in ways_to_cut(octets):
        engine = http1(header_bytes=2048)
        events = events_of(engine, pieces)
        assert [type(event) for event in events] == [RequestRefused]
        assert events[0].status in (400, 431)
        assert not engine.hungry()


@pytest.mark.parametrize("octets", [
    b"1;" + b"x" * 4000,
    b"0\r\nx: " + b"y" * 4000,
    b"0\r\n" + b"x: y\r\n" * 700,
    b"00000000001\r\na\r\n" * 500,
    b"1;xxxxxxxxx\r\na\r\n" * 500,
], ids=["extension", "trailer", "trailers", "zeros", "extensions"])
def test_framing_without_end_is_refused(octets):
    for pieces in ways_to_cut(chunked(octets)):
        engine = http1(header_bytes=2048)
        events = events_of(engine, pieces)
        assert isinstance(events[-1], StreamReset)
        assert not engine.hungry()


def test_honest_chunks_of_one_octet_pass():
    engine = http1(header_bytes=1024)
    events = events_of(engine, [chunked(), *[b"1\r\na\r\n"] * 4000,
                                b"0\r\n\r\n"])
    assert events[1:] == [BodyReceived(1, b"a" * 4000, 0), RequestEnded(1)]


@pytest.mark.parametrize("last", [
    b"GARBAGE\r\n\r\n", request(host=b""),
    request(b"GET / HTTP/1.1", b"Connection: upgrade", b"Upgrade: x")])
def test_requests_ahead_of_the_last_one_are_answered(last):
    engine = http1()
    pending = engine.receive(request() + request() + last)
    for stream in (1, 3, 5):
        assert pending[0].stream == stream
        assert not engine.closing
        engine.headers(stream, OK, True)
        pending = engine.receive(b"")
    assert engine.closing
    output = engine.output()
    assert output.count(b"HTTP/1.1 200") == 3
    assert output.count(b"connection: close") == 1


def test_many_small_requests_in_one_write_pass():
    engine = http1(header_bytes=1024)
    pending = engine.receive(request() * 300)
    for stream in range(1, 600, 2):
        assert [event.stream for event in pending] == [stream]
        engine.headers(stream, OK, True)
        pending = engine.receive(b"")
    assert engine.hungry()


HANDSHAKE = request(
    b"GET /a HTTP/1.1", b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket", b"Sec-WebSocket-Key: x")


def test_a_handshake_begins_a_tunnel_that_has_all_that_follows():
    """RFC 6455 section 4.1, in the words of RFC 8441."""
    for pieces in ways_to_cut(HANDSHAKE + b"\x81\0GET / HTTP/1.1\r\n\r\n"):
        engine = http1()
        started, *rest = events_of(engine, pieces)
        assert not started.ended
        fields = dict(started.fields)
        assert fields[b":method"] == b"CONNECT"
        assert fields[b":protocol"] == b"websocket"
        assert fields[b":path"] == b"/a"
        assert fields[b"sec-websocket-key"] == b"x"
        assert {type(event) for event in rest} == {BodyReceived}
        assert b"".join(event.piece for event in rest) == (
            b"\x81\0GET / HTTP/1.1\r\n\r\n")


def test_a_tunnel_is_opened_by_101_and_passes_octets_as_they_are():
    engine = http1()
    engine.receive(HANDSHAKE)
    engine.headers(1, [(b":status", b"101"), (b"upgrade", b"websocket"),
                       (b"connection", b"upgrade")])
    assert engine.output() == (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
        b"connection: upgrade\r\n\r\n")
    engine.body(1, b"\x81\0")
    assert (engine.output(), engine.closing) == (b"\x81\0", False)
    engine.body(1, b"\x88\0", True)
    assert (engine.output(), engine.closing) == (b"\x88\0", True)


def test_a_tunnel_has_no_more_under_way_than_a_body_may_have():
    engine = http1(window_bytes=1000)
    engine.receive(HANDSHAKE)
    assert engine.hungry()
    engine.receive(bytes(1000))
    assert not engine.hungry()
    engine.consumed(1, 1000)
    assert engine.hungry()


def test_a_tunnel_that_is_refused_was_the_last_request():
    engine = http1()
    engine.receive(HANDSHAKE)
    engine.headers(1, [(b":status", b"403")], True)
    assert b"connection: close\r\n" in engine.output()
    assert engine.closing


@pytest.mark.parametrize("octets", [
    HANDSHAKE.replace(b"GET", b"POST"),
    HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    HANDSHAKE.replace(b", Upgrade", b""),
    HANDSHAKE.replace(b"WebSocket\r", b"websocket, h2c\r"),
    HANDSHAKE.replace(b"Sec-WebSocket-Key: x", b"Content-Length: 1") + b"x",
])
def test_what_is_not_quite_a_handshake_is_a_plain_request(octets):
    started, *_ = http1().receive(octets)
    assert b":protocol" not in dict(started.fields)


def test_an_upgrade_is_not_taken_and_ends_the_connection():
    engine = http1()
    (event,) = engine.receive(request(
        b"GET / HTTP/1.1", b"Connection: Upgrade", b"Upgrade: h2c")
        + b"\0garbage")
    assert event.ended
    engine.headers(1, OK, True)
    assert engine.closing


def test_giving_a_stream_up_ends_the_connection():
    engine = http1()
    engine.receive(request())
    engine.headers(1, SIX)
    engine.reset(1, 0)
    assert engine.closing
    assert engine.receive(request()) == []


def test_goodbye_lets_the_answer_in_hand_finish():
    engine = http1()
    engine.receive(request())
    engine.goodbye()
    assert not engine.closing and not engine.hungry()
    engine.headers(1, OK, True)
    assert engine.closing
    assert b"connection: close" in engine.output()


def test_goodbye_without_an_answer_in_hand_is_the_end():
    engine = http1()
    engine.goodbye()
    assert engine.closing


def test_goodbye_in_the_middle_of_an_answer_ends_after_it():
    engine = http1()
    engine.receive(request())
    engine.headers(1, SIX)
    engine.goodbye()
    assert not engine.closing
    engine.body(1, b"abcdef", True)
    assert engine.closing


GOOD_1 = [
    request(),
    request(b"GET /1 HTTP/1.1") + request(b"GET /2 HTTP/1.0"),
    b"\r\n" + request(b"HEAD / HTTP/1.1"),
    request(b"POST / HTTP/1.1", b"Content-Length: 5") + b"abcde" + request(),
    chunked(b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nT: u\r\n\r\n") + request(),
    chunked(b"3\r\nabc\r\nx"),
    request() + b"GARBAGE\r\n\r\n" + request(),
    request(b"GET / HTTP/1.1", b"Connection: close") + request(),
    request(b"GET / HTTP/1.1", b"Connection: upgrade", b"Upgrade: x") + b"y",
    request(b"CONNECT a:1 HTTP/1.1") + request(),
    request(host=b"") + request(),
    request() + request(b"GET / HTTP/2.0") + request(),
]


@pytest.mark.parametrize("octets", GOOD_1)
def test_http1_is_the_same_however_it_is_cut(octets):
    histories = [history_1(pieces) for pieces in ways_to_cut(octets)]
    assert all(history == histories[0] for history in histories)


def history_1(pieces):
    """Events of pieces, each request being answered when all have come."""
    engine = http1()
    events = events_of(engine, pieces)
    while events and not engine.closing:
        stream = events[-1].stream
        try:
            engine.headers(stream, OK, True)
        except StreamGone:
            break
        for event in engine.receive(b""):
            add_plainly(events, event)
    return events


tokens = st.text("abcXYZ-", min_size=1, max_size=9).map(str.encode)
heads = st.builds(
    lambda method, path, version, fields: (
        method, b"/" + path, version, [
            (b"x-" + name.lower(), value) for name, value in fields]),
    st.sampled_from([b"GET", b"HEAD", b"POST"]), tokens,
    st.sampled_from([b"1.0", b"1.1"]),
    st.lists(st.tuples(tokens, tokens), max_size=4))


@given(st.lists(st.tuples(heads, st.none() | st.binary(max_size=60),
                          st.booleans()), min_size=1, max_size=4),
       st.randoms(use_true_random=False))
def test_what_was_asked_is_what_is_read(asked, dice):
    octets = b""
    for (method, path, version, fields), body, in_chunks in asked:
        lines = [b"%b: %b" % field for field in fields]
        lines.append(b"Connection: keep-alive")
        in_chunks = in_chunks and version == b"1.1"
        if body is not None and in_chunks:
            lines.append(b"Transfer-Encoding: chunked")
            size = len(body)
            body = (b"%x\r\n%b\r\n" % (size, body) if body else b"")
            body += b"0\r\n\r\n"
        elif body is not None:
            lines.append(b"Content-Length: %d" % len(body))
        octets += request(b"%b %b HTTP/%b" % (method, path, version), *lines)
        octets += body or b""
    pieces = pieces_of(octets, dice.random())
    events = history_1(pieces)
    started = [event for event in events if isinstance(event, RequestStarted)]
    assert [(fields_of(event)[b":method"], fields_of(event)[b":path"])
            for event in started] == [
        (method, path) for (method, path, _, _), _, _ in asked]
    for event, ((_, _, _, fields), body, _) in zip(
            started, asked, strict=True):
        assert [field for field in event.fields
                if field[0][:2] == b"x-"] == fields
        assert b"".join(piece.piece for piece in events if isinstance(
            piece, BodyReceived) and piece.stream == event.stream) == (
            body or b"")
        assert RequestEnded(event.stream) in events


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_octets_break_the_engine(noise, at):
    octets = chunked(b"3\r\nabc\r\n0\r\n\r\n") + request()
    octets = octets[:at] + noise + octets[at:]
    histories = [history_1(pieces) for pieces in ways_to_cut(octets)]
    assert all(history == histories[0] for history in histories)


# HTTP/2


def head(stream, fields=GET, end=True, whole=True):
    flags = ["END_STREAM"] * end + ["END_HEADERS"] * whole
    frame = hf.HeadersFrame(stream, flags=flags)
    frame.data = hpack.Encoder().encode(fields, huffman=False)
    return frame


def body(stream, octets=b"", end=False, pad=0):
    flags = ["END_STREAM"] * end + ["PADDED"] * bool(pad)
    return hf.DataFrame(stream, octets, pad_length=pad, flags=flags)


def raw(kind, stream, payload):
    """A frame that hyperframe does not know."""
    return (len(payload).to_bytes(3, "big") + bytes([kind, 0])
            + stream.to_bytes(4, "big") + payload)


def octets_of(frames):
    return b"".join(frame if isinstance(frame, bytes) else frame.serialize()
                    for frame in frames)


class Client:
    """What a client sends to an engine, and what it gets from it."""

    def __init__(self, engine_class, window=None, **limits):
        self.engine = engine_class(EngineLimits(**limits))
        self._decoder = hpack.Decoder()
        self.heads = {}
        values = {} if window is None else {4: window}
        settings = hf.SettingsFrame(0, settings=values)
        assert self.send(PREFACE, settings) == []
        self.greeting = self.read()

    def send(self, *frames):
        """The events of frames."""
        return self.engine.receive(octets_of(frames))

    def read(self):
        """The frames that the engine wrote; heads are decoded on the way."""
        octets, frames = memoryview(self.engine.output()), []
        while octets:
            frame, length = hf.Frame.parse_frame_header(octets[:9])
            frame.parse_body(octets[9:9 + length])
            octets = octets[9 + length:]
            frames.append(frame)
            if isinstance(frame, hf.HeadersFrame):
                self.heads[frame.stream_id] = self._decoder.decode(
                    frame.data, raw=True)
        return frames

    def resets(self):
        """{stream: code} of the streams that the engine gave up."""
        return {frame.stream_id: frame.error_code for frame in self.read()
                if isinstance(frame, hf.RstStreamFrame)}

    def is_alive(self):
        """Whether a ping comes back."""
        assert self.send(hf.PingFrame(0, b"12345678")) == []
        return any(isinstance(frame, hf.PingFrame) and "ACK" in frame.flags
                   for frame in self.read())


@pytest.fixture
def client(engine_class):
    return Client(engine_class)


def test_alpn_decides_on_the_engine():
    assert isinstance(make_engine("http/1.1", EngineLimits()), Http1Engine)
    assert not isinstance(make_engine("h2", EngineLimits()), Http1Engine)


def test_the_greeting_tells_the_limits(engine_class):
    client = Client(engine_class, streams=7, header_bytes=5000)
    first = client.greeting[0]
    assert isinstance(first, hf.SettingsFrame)
    assert first.settings[hf.SettingsFrame.MAX_CONCURRENT_STREAMS] == 7
    assert first.settings[hf.SettingsFrame.MAX_HEADER_LIST_SIZE] == 5000
    assert first.settings[hf.SettingsFrame.ENABLE_PUSH] == 0
    assert first.settings[9] == 1, "RFC 9218 section 2.1"


def test_a_get_is_one_event(client):
    assert client.send(head(1)) == [RequestStarted(1, GET, True)]


def test_a_body_costs_its_padding_too(client):
    assert client.send(head(1, POST, end=False)) == [
        RequestStarted(1, POST, False)]
    assert client.send(body(1, b"abc", pad=10)) == [
        BodyReceived(1, b"abc", 14)]
    assert client.send(body(1, b"def", end=True)) == [
        BodyReceived(1, b"def", 3), RequestEnded(1)]


def test_an_empty_piece_of_body_is_no_event(client):
    client.send(head(1, POST, end=False))
    assert client.send(body(1)) == []
    assert client.send(body(1, pad=9)) == []
    assert client.send(body(1, end=True)) == [RequestEnded(1)]


def test_trailers_end_a_request(client):
    client.send(head(1, POST, end=False))
    assert client.send(head(1, [(b"x-sum", b"1")])) == [
        RequestEnded(1, ((b"x-sum", b"1"),))]


def test_trailers_end_a_response(client):
    client.send(head(1))
    client.engine.headers(1, OK)
    client.engine.body(1, b"abc")
    client.engine.headers(1, [(b"x-sum", b"1")], True)
    *_, last = client.read()
    assert isinstance(last, hf.HeadersFrame)
    assert {"END_STREAM", "END_HEADERS"} <= last.flags
    with pytest.raises(StreamGone):
        client.engine.headers(1, OK)


def test_trailers_go_behind_the_last_chunk():
    engine = http1()
    engine.receive(request(b"GET / HTTP/1.1"))
    engine.headers(1, OK)
    engine.body(1, b"abc")
    engine.headers(1, [(b"x-sum", b"1")], True)
    assert engine.output().endswith(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n")
    assert not engine.closing
    assert [event.stream for event in engine.receive(
        request(b"GET / HTTP/1.1"))] == [3]


def test_a_body_that_nobody_takes_is_not_read_for_ever():
    engine = http1(window_bytes=1000)
    engine.receive(request(b"POST / HTTP/1.1", b"content-length: 5000"))
    engine.receive(b"x" * 999)
    assert engine.hungry()
    engine.receive(b"x")
    assert not engine.hungry()
    engine.consumed(1, 1)
    assert engine.hungry()


def test_a_head_may_come_in_fragments(client):
    whole = head(1)
    block = whole.data
    start = head(1, whole=False)
    start.data = block[:5]
    rest = hf.ContinuationFrame(1, block[5:], flags=["END_HEADERS"])
    assert client.send(start) == []
    assert client.engine.midway()
    assert client.send(rest) == [RequestStarted(1, GET, True)]
    assert not client.engine.midway()


@pytest.mark.parametrize("frame, events", [
    (hf.RstStreamFrame(1, 8), [StreamReset(1, 8)]),
    (hf.WindowUpdateFrame(1, 9), []),
    (hf.WindowUpdateFrame(0, 9), []),
    (hf.SettingsFrame(0, settings={4: 9}), []),
    (hf.SettingsFrame(0, settings={1: 0}), []),
    (hf.SettingsFrame(0, flags=["ACK"]), []),
    (hf.PingFrame(0, b"12345678"), []),
    (hf.GoAwayFrame(0, error_code=2), [PeerLeaving(2)]),
    (raw(0x10, 0, b"\0\0\0\1u=0, i"),
     [PriorityChanged(1, b"u=0, i")]),
    (raw(0x10, 0, b"\0\0\0\7"), [PriorityChanged(7, b"")]),
    (raw(0x33, 5, b"x"), []),
    (hf.PriorityFrame(1, depends_on=3), []),
])
def test_each_frame_has_its_event(client, frame, events):
    client.send(head(1, POST, end=False))
    assert client.send(frame) == events
    assert client.is_alive()


def with_field(*field):
    return [*GET, field]


@pytest.mark.parametrize("length", [b"x", b"-1", b"9" * 5000])
def test_a_length_that_is_none_ends_stream_or_connection(client, length):
    """RFC 9113 section 5.4.1 leaves it to us; the h2 library escalates."""
    events = client.send(head(1, with_field(b"content-length", length)))
    assert events == [] or events[-1].code == PROTOCOL_ERROR
    assert not any(isinstance(event, RequestStarted) for event in events)


@pytest.mark.parametrize("fields", [
    with_field(b"X-Upper", b"y"),
    with_field(b"connection", b"close"),
    with_field(b"keep-alive", b"1"),
    with_field(b"proxy-connection", b"x"),
    with_field(b"transfer-encoding", b"chunked"),
    with_field(b"upgrade", b"x"),
    with_field(b"te", b"gzip"),
    with_field(b"x y", b"z"),
    with_field(b"", b"z"),
    with_field(b"x", b"a\rb"),
    with_field(b"x", b"a\nb"),
    with_field(b"x", b"a\0b"),
    with_field(b"x", b" a"),
    with_field(b"x", b"a\t"),
    with_field(b"host", b"b.example"),
    with_field(b":path", b"/2"),
    with_field(b":status", b"200"),
    with_field(b":protocol", b"websocket"),
    with_field(b"x" * 257, b"y"),
    GET[1:], GET[:1] + GET[2:], GET[:3],
    [*GET[:3], (b":path", b"")],
    [*GET[:3], (b":path", b"/a\nb")],
    [(b"x", b"y"), *GET],
    [GET[0], *GET],
    [(b":method", b"CONNECT"), *GET[1:]],
    [(b":method", b"CONNECT")],
])
def test_a_malformed_request_costs_its_stream_only(client, fields):
    client.send(head(1, POST, end=False))
    assert client.send(head(3, fields)) == []
    assert client.resets() == {3: PROTOCOL_ERROR}
    assert client.is_alive()
    assert client.send(body(1, b"x", end=True)) == [
        BodyReceived(1, b"x", 1), RequestEnded(1)]


@pytest.mark.parametrize("length, octets, end", [
    (b"3", b"abcd", False), (b"3", b"ab", True), (b"0", b"a", False)])
def test_a_body_unlike_its_length_costs_its_stream_only(
        client, length, octets, end):
    client.send(head(1, [*POST, (b"content-length", length)], end=False))
    events = client.send(body(1, octets, end=end))
    assert events[-1] == StreamReset(1, PROTOCOL_ERROR)
    assert RequestEnded(1) not in events
    assert client.resets() == {1: PROTOCOL_ERROR}
    assert client.is_alive()


@pytest.mark.parametrize("trailers", [
    [(b":path", b"/")], [(b"connection", b"x")], [(b"X", b"y")]])
def test_malformed_trailers_cost_their_stream_only(client, trailers):
    client.send(head(1, POST, end=False))
    assert client.send(head(1, trailers)) == [StreamReset(1, PROTOCOL_ERROR)]
    assert client.resets() == {1: PROTOCOL_ERROR}
    assert client.is_alive()


TUNNEL = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *GET[1:]]


def test_a_tunnel_is_taken_and_stays_open_both_ways(client):
    assert client.send(head(1, TUNNEL, end=False)) == [
        RequestStarted(1, TUNNEL, False)]
    client.engine.headers(1, [(b":status", b"200")])
    assert client.send(body(1, b"\x81\0")) == [BodyReceived(1, b"\x81\0", 2)]
    client.engine.body(1, b"\x81\0")
    assert client.send(body(1, b"", end=True)) == [RequestEnded(1)]
    client.engine.body(1, b"\x88\0", True)
    assert client.is_alive()


@pytest.mark.parametrize("fields", [
    TUNNEL[:2] + TUNNEL[3:], TUNNEL[:3] + TUNNEL[4:], TUNNEL[:4],
    [TUNNEL[0], (b":protocol", b""), *TUNNEL[2:]],
    [(b":method", b"GET"), *TUNNEL[1:]], TUNNEL[1:],
    [*TUNNEL[:2], (b":authority", b"a.example:443")],
])
def test_a_tunnel_that_lacks_something_costs_its_stream_only(client, fields):
    """RFC 8441 section 4."""
    assert client.send(head(1, fields, end=False)) == []
    assert client.resets() == {1: PROTOCOL_ERROR}
    assert client.is_alive()


@pytest.mark.parametrize("fields", [
    with_field(b"te", b"trailers"),
    with_field(b"te", b"Trailers"),
    with_field(b"host", b"A.example"),
    with_field(b"x", b""),
    with_field(b"x", b"a\tb \xff"),
    GET[:2] + GET[3:],
    [(b":method", b"CONNECT"), (b":authority", b"a:1")],
])
def test_an_odd_request_is_taken(client, fields):
    assert client.send(head(1, fields)) == [RequestStarted(1, fields, True)]


@pytest.mark.parametrize("fields", [
    with_field(b"x", b"y" * 2000), [*GET, *[(b"x", b"y")] * 20]])
def test_a_head_above_the_limits_is_refused(engine_class, fields):
    client = Client(engine_class, header_bytes=1024, header_count=16)
    assert client.send(head(1, fields)) == [RequestRefused(1, 431)]
    client.engine.headers(1, [(b":status", b"431")], True)
    assert client.is_alive()
    assert client.heads[1] == [(b":status", b"431")]


def test_a_stream_above_the_limit_is_refused_and_may_come_again(
        engine_class):
    client = Client(engine_class, streams=2)
    client.send(head(1), head(3))
    assert client.send(head(5), head(7)) == []
    assert client.resets() == {5: REFUSED_STREAM, 7: REFUSED_STREAM}
    client.engine.headers(1, OK, True)
    assert client.send(head(9)) == [RequestStarted(9, GET, True)]
    assert client.resets() == {}


def test_streams_end_one_by_one(client):
    for stream in range(1, 2001, 2):
        assert client.send(head(stream)) == [
            RequestStarted(stream, GET, True)]
        client.engine.headers(stream, OK, True)
    assert client.is_alive()


def test_an_answer_is_framed_by_the_windows(engine_class):
    client = Client(engine_class, window=40_000)
    client.send(head(1))
    engine = client.engine
    engine.headers(1, OK)
    sent = 0
    while room := engine.sendable(1):
        assert room <= 16384
        engine.body(1, b"x" * room)
        sent += room
    assert sent == 40_000
    assert client.send(hf.WindowUpdateFrame(1, 5)) == []
    assert engine.sendable(1) == 5
    engine.body(1, b"y" * 5, True)
    assert engine.sendable(1) == 0
    data = [frame for frame in client.read()
            if isinstance(frame, hf.DataFrame)]
    assert b"".join(frame.data for frame in data) == b"x" * 40_000 + b"y" * 5
    assert "END_STREAM" in data[-1].flags


def test_a_window_may_shrink_below_zero(engine_class):
    client = Client(engine_class, window=1000)
    client.send(head(1))
    client.engine.headers(1, OK)
    client.engine.body(1, b"x" * 600)
    client.send(hf.SettingsFrame(0, settings={4: 100}))
    assert client.engine.sendable(1) == 0
    client.send(hf.WindowUpdateFrame(1, 501))
    assert client.engine.sendable(1) == 1


def test_a_window_is_withheld_until_the_body_is_consumed(engine_class):
    client = Client(engine_class, window_bytes=65_535)
    credit = collections.Counter()
    for stream in (1, 3, 5, 7):
        client.send(head(stream, POST, end=False))
        events = client.send(*[body(stream, b"x" * 16383)] * 4)
        assert sum(event.cost for event in events) == 65532
        assert not any(isinstance(frame, hf.WindowUpdateFrame)
                       for frame in client.read())
    for stream in (1, 3, 5, 7):
        client.engine.consumed(stream, 65532)
        for frame in client.read():
            credit[frame.stream_id] += frame.window_increment
    # The connection's window is that of four streams; what one of them used
    # is less than half of it, and waits for more.
    assert credit == {0: 3 * 65532, 1: 65532, 3: 65532, 5: 65532, 7: 65532}


def test_a_client_that_overruns_its_window_is_stopped(engine_class):
    client = Client(engine_class, window_bytes=65_535)
    client.send(head(1, POST, end=False))
    events = client.send(*[body(1, b"x" * 16384)] * 4)
    assert [event.code for event in events
            if isinstance(event, ProtocolFault)] == [3]


@pytest.mark.parametrize("pad", [0, 200])
def test_a_long_upload_is_neither_starved_nor_given_too_much(
        engine_class, pad):
    client = Client(engine_class, window_bytes=65535)
    client.send(head(1, POST, end=False))
    whole = 65535 + sum(frame.window_increment for frame in client.greeting
                        if isinstance(frame, hf.WindowUpdateFrame))
    sent, credit = 0, {0: whole, 1: 65535}
    while sent < 2_000_000:
        frame = body(1, b"x" * 1000, pad=pad)
        cost = len(frame.serialize()) - 9
        assert min(credit.values()) >= cost, "starved"
        events = client.send(frame)
        assert events == [BodyReceived(1, b"x" * 1000, cost)]
        client.engine.consumed(1, cost)
        sent += cost
        for answer in client.read():
            credit[answer.stream_id] += answer.window_increment
        credit = {stream: room - cost for stream, room in credit.items()}
        assert credit[0] <= whole and credit[1] <= 65535


def test_the_window_of_padding_alone_comes_back_by_itself(client):
    client.send(head(1, POST, end=False))
    for _ in range(1000):
        assert client.send(body(1, pad=255)) == []
    assert client.is_alive()


@pytest.mark.parametrize("close", [
    lambda client: client.engine.reset(1, 8),
    lambda client: client.send(hf.RstStreamFrame(1, 8)),
    lambda client: client.engine.headers(1, OK, True),
], ids=["by us", "by the client", "answered"])
def test_a_stream_that_is_gone_says_so(client, close):
    client.send(head(1))
    close(client)
    engine = client.engine
    assert engine.sendable(1) == 0
    with pytest.raises(StreamGone):
        engine.headers(1, OK)
    with pytest.raises(StreamGone):
        engine.body(1, b"x")
    engine.consumed(1, 0)
    engine.reset(1, 8)
    assert client.is_alive()


def test_a_stream_that_never_was_is_gone_too(client):
    assert client.engine.sendable(99) == 0
    client.engine.reset(99, 8)
    with pytest.raises(StreamGone):
        client.engine.headers(99, OK)


def test_resetting_twice_writes_one_frame(client):
    client.send(head(1))
    client.engine.reset(1, 8)
    client.engine.reset(1, 8)
    assert client.resets() == {1: 8}


def goaways(client):
    return [(frame.last_stream_id, frame.error_code)
            for frame in client.read() if isinstance(frame, hf.GoAwayFrame)]


def test_goodbye_comes_in_two_steps_and_streams_finish(client):
    engine = client.engine
    client.send(head(1))
    engine.goodbye(0, 2**31 - 1)
    assert goaways(client) == [(2**31 - 1, 0)]
    assert client.send(head(3)) == [RequestStarted(3, GET, True)]
    engine.goodbye()
    assert goaways(client) == [(3, 0)]
    assert client.send(head(5)) == []
    assert client.resets() == {5: REFUSED_STREAM}
    for stream in (3, 1):
        engine.headers(stream, SIX)
        engine.body(stream, b"abcdef", True)
    assert {frame.stream_id for frame in client.read() if isinstance(
        frame, hf.DataFrame)} == {1, 3}
    assert not engine.closing


def test_a_last_stream_is_never_raised_again(client):
    client.send(head(1))
    client.engine.goodbye()
    client.engine.goodbye(0, 2**31 - 1)
    assert goaways(client) == [(1, 0), (1, 0)]


def test_a_client_that_leaves_still_gets_its_answers(client):
    client.send(head(1))
    assert client.send(hf.GoAwayFrame(0, error_code=0)) == [PeerLeaving(0)]
    client.engine.headers(1, SIX)
    client.engine.body(1, b"abcdef", True)
    assert b"abcdef" in [frame.data for frame in client.read()
                         if isinstance(frame, hf.DataFrame)]
    assert client.is_alive()


@pytest.mark.parametrize("frames, code", [
    ([b"GET / HTTP/1.1\r\n"], 1),
    ([PREFACE, head(1)], 1),
    ([PREFACE, hf.SettingsFrame(0), body(1, b"x")], 1),
    ([PREFACE, hf.SettingsFrame(0), b"\0\x40\1" + bytes(6)], 6),
    ([PREFACE, hf.SettingsFrame(0), hf.RstStreamFrame(1, 8)], 1),
    ([PREFACE, hf.SettingsFrame(0), head(2)], 1),
    ([PREFACE, hf.SettingsFrame(0),
      hf.PushPromiseFrame(1, 2, flags=["END_HEADERS"])], 1),
    ([PREFACE, hf.SettingsFrame(0), b"\0\0\1\1\5\0\0\0\1\xff"], 9),
    ([PREFACE, hf.SettingsFrame(0), b"\0\0\4\7\0\0\0\0\0abcd"], 6),
    ([PREFACE, hf.SettingsFrame(0), b"\0\0\3\x10\0\0\0\0\0abc"], 6),
    ([PREFACE, hf.SettingsFrame(0), b"\0\0\4\x10\0\0\0\0\0\0\0\0\2"], 1),
    ([PREFACE, hf.SettingsFrame(0), hf.WindowUpdateFrame(0, 2**31 - 1)], 3),
])
def test_broken_input_ends_in_a_fault_with_its_code(
        engine_class, frames, code):
    for pieces in ways_to_cut(octets_of(frames)):
        engine = engine_class(EngineLimits())
        events = events_of(engine, pieces)
        assert events == [ProtocolFault(code, "")]
        assert engine.closing
        assert engine.output()[-4:] == code.to_bytes(4, "big")


def test_requests_before_a_fault_are_reported(client):
    events = client.send(head(1), head(3), hf.DataFrame(99, b"x"))
    assert [type(event) for event in events] == [
        RequestStarted, RequestStarted, ProtocolFault]


def test_a_frame_that_never_ends_is_given_up(client):
    assert not client.engine.midway()
    client.send(head(1).serialize()[:-1])
    assert client.engine.midway()
    (event,) = client.engine.time_out()
    assert event.code == CALM and client.engine.closing
    assert goaways(client) == [(0, CALM)]


@pytest.mark.parametrize("frame, least", [
    (lambda n: octets_of([head(n), hf.RstStreamFrame(n, 8)]), 10),
    (lambda n: head(n, GET[1:]), 10),
    (lambda n: hf.PingFrame(0, b"12345678"), 2),
    (lambda n: hf.SettingsFrame(0), 5),
    (lambda n: hf.WindowUpdateFrame(0, 1), 1),
    (lambda n: hf.PriorityFrame(1), 1),
    (lambda n: raw(0x10, 0, b"\0\0\0\1u=1"), 1),
    (lambda n: raw(0x77, 0, b""), 1),
    (lambda n: hf.GoAwayFrame(0), 1),
    (lambda n: body(1), 1),
    (lambda n: body(1, pad=1), 1),
], ids=["resets", "malformed", "pings", "settings", "windows", "priorities",
        "updates", "unknown", "goaways", "empty", "padding"])
def test_what_costs_us_more_than_the_peer_is_counted(client, frame, least):
    client.send(head(1, POST, end=False))
    before = client.engine.nuisance
    for n in range(100):
        client.send(frame(2 * n + 3))
    assert client.engine.nuisance - before >= 100 * least


def test_streams_that_we_refuse_count_as_resets(engine_class):
    client = Client(engine_class, streams=1)
    client.send(head(1))
    before = client.engine.nuisance
    for stream in range(3, 23, 2):
        client.send(head(stream))
    assert client.engine.nuisance - before >= 100


def test_fragments_of_a_head_are_bounded(client):
    events = client.send(head(1, whole=False))
    for _ in range(100):
        events += client.send(hf.ContinuationFrame(1, b""))
        if events:
            break
    assert isinstance(events[-1], ProtocolFault)


def test_good_faith_costs_nothing(client):
    engine = client.engine
    before = engine.nuisance
    for stream in range(1, 201, 2):
        client.send(head(stream, POST, end=False), body(stream, b"x" * 99),
                    body(stream, end=True))
        engine.consumed(stream, 99)
        engine.headers(stream, OK)
        for _ in range(4):
            engine.body(stream, b"x" * 2000)
            client.send(hf.WindowUpdateFrame(stream, 2000),
                        hf.WindowUpdateFrame(0, 2000))
        engine.body(stream, b"", True)
        client.read()
    assert engine.nuisance <= before


def test_a_head_beyond_reason_ends_the_connection(engine_class):
    client = Client(engine_class, header_bytes=1024)
    frames = [head(1, with_field(b"x", b"y" * 16000), whole=False)]
    events = client.send(*frames)
    for _ in range(80):
        if events:
            break
        events = client.send(hf.ContinuationFrame(1, b"\0\1a\1b" * 3000))
    assert [type(event) for event in events] == [ProtocolFault]


CONVERSATIONS = [
    [head(1), head(3), head(5, GET[1:]), head(7)],
    [head(1, POST, end=False), body(1, b"abc"), body(1, b"def", end=True)],
    [head(1, POST, end=False), body(1, b"abc", pad=7), head(3),
     head(1, [(b"x", b"y")])],
    [head(1, whole=False), hf.ContinuationFrame(1, b"", flags=[
        "END_HEADERS"]), hf.PingFrame(0, b"12345678")],
    [head(1), hf.RstStreamFrame(1, 8), hf.GoAwayFrame(0), head(3)],
    [head(1), raw(0x10, 0, b"\0\0\0\3i"), head(3),
     hf.WindowUpdateFrame(0, 5), hf.SettingsFrame(0, settings={4: 7})],
    [head(1), hf.DataFrame(99, b"x"), head(3)],
    [head(1), head(3, with_field(b"x", b"y" * 70000)[:4]), b"\xff" * 9],
]


@pytest.mark.parametrize("frames", CONVERSATIONS)
def test_http2_is_the_same_however_it_is_cut(engine_class, frames):
    octets = PREFACE + octets_of([hf.SettingsFrame(0), *frames])
    histories = []
    for pieces in ways_to_cut(octets):
        engine = engine_class(EngineLimits())
        histories.append((events_of(engine, pieces), engine.output()))
    assert all(history == histories[0] for history in histories)


some_frames = st.lists(st.sampled_from([
    head(1), head(1, POST, end=False), head(3), head(5, GET[2:]),
    head(3, whole=False), hf.ContinuationFrame(3, b"", flags=["END_HEADERS"]),
    body(1, b"abc"), body(1, end=True), body(3, b"x", pad=3), body(1),
    hf.RstStreamFrame(1, 8), hf.RstStreamFrame(3, 0), hf.PingFrame(0),
    hf.WindowUpdateFrame(0, 9), hf.WindowUpdateFrame(1, 2**31 - 1),
    hf.SettingsFrame(0, settings={4: 0}), hf.GoAwayFrame(0),
    hf.SettingsFrame(0, flags=["ACK"]), hf.PriorityFrame(3),
    raw(0x10, 0, b"\0\0\0\1u=1"), b"\0\0\2\0\0\0\0\0\1ab",
]), max_size=12)


@given(some_frames, st.randoms(use_true_random=False))
def test_any_order_of_frames_is_the_same_however_it_is_cut(
        engine_class, frames, dice):
    octets = PREFACE + octets_of([hf.SettingsFrame(0), *frames])
    histories = []
    for pieces in ([octets], [octets[n:n + 1] for n in range(len(octets))],
                   pieces_of(octets, dice.random())):
        engine = engine_class(EngineLimits())
        histories.append((events_of(engine, pieces), engine.output()))
    assert histories[0] == histories[1] == histories[2]
    faults = [event for event in histories[0][0]
              if isinstance(event, ProtocolFault)]
    assert not faults or faults == histories[0][0][-1:]


@given(some_frames, st.binary(min_size=1, max_size=40), st.integers(0, 200))
def test_no_frames_break_the_engine(engine_class, frames, noise, at):
    octets = octets_of(frames)
    client = Client(engine_class)
    client.send(octets[:at] + noise + octets[at:])
    client.engine.output()
    for stream in (1, 3, 5):
        assert client.engine.sendable(stream) >= 0
        client.engine.reset(stream, 8)
    client.engine.goodbye()
    assert client.engine.output()


def test_the_pure_engine_takes_few_frames_at_a_time():
    engine = Http2Engine(EngineLimits())
    pings = [hf.PingFrame(0, b"%08d" % n).serialize() for n in range(100)]
    engine.receive(PREFACE + hf.SettingsFrame(0).serialize())
    engine.output()
    engine.receive(b"".join(pings))
    answers, turns = engine.output(), 1
    assert not engine.hungry()
    while not engine.hungry():
        assert engine.receive(b"") == []
        answers, turns = answers + engine.output(), turns + 1
    # All of them, in their order: flags ACK are all the difference.
    assert answers == b"".join(
        ping[:4] + b"\1" + ping[5:] for ping in pings)
    assert 5 < turns < 20
