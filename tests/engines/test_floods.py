"""What costs a client nothing and a server much is bounded (RFC 9113, 10.5).

The server counts points for such frames, and bears BURST of them and some
more per second.  Each flood here is twice of what it bears, so that it must
have ended before its own end, and nothing else of it is lost.
"""

import itertools

import pytest
from frames import (
    CANCEL,
    CONTINUATION,
    END_HEADERS,
    ENHANCE_YOUR_CALM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    NO_ERROR,
    PING,
    PRIORITY,
    PRIORITY_UPDATE,
    REFUSED_STREAM,
    SETTINGS,
    Client,
    block,
    body,
    frame,
    head,
    literal,
    reset,
    settings,
    window_update,
)

#: points of default tweaks, and of the frames
BURST = 2000
RESET, SETTING, ECHO, OTHER = 10, 5, 2, 1
STREAMS = range(1, 2**31, 2)
BATCH = 50


def drown(client, octets, points):
    """Sends pieces of a flood of twice BURST points, or until cut off."""
    pieces = itertools.islice(octets, 2 * BURST // points)
    while batch := list(itertools.islice(pieces, BATCH)):
        client.send(*batch)


def flood(name, points, begin, octets):
    """A row: points per piece, what is sent before, pieces without end."""
    return pytest.param(points, begin, octets, id=name)


def nothing(client):
    """Begins no request."""
    return b""


def shut(client):
    """Lets no body come, so that every answer stays under way."""
    return settings((INITIAL_WINDOW_SIZE, 0))


#: all that is counted, one row for each way to be a nuisance
FLOODS = [
    flood("10.5-requests-that-are-reset-at-once", RESET, nothing, lambda c: (
        c.get(stream) + reset(stream, CANCEL) for stream in STREAMS)),
    flood("10.5-requests-that-must-be-reset", RESET, nothing, lambda c: (
        c.get(stream, (b"UPPER", b"")) for stream in STREAMS)),
    flood("10.5-heads-without-fields", RESET, nothing, lambda c: (
        frame(HEADERS, END_HEADERS, stream) for stream in STREAMS)),
    flood("10.5-requests-whose-window-overflows", RESET, nothing,
          lambda c: (c.get(stream) + window_update(stream, 2**31 - 1)
                     for stream in STREAMS)),
    flood("10.5-data-behind-the-end", RESET, shut, lambda c: (
        c.get(stream) + body(stream, b"late") for stream in STREAMS)),
    flood("10.5-fields-behind-the-end", RESET, shut, lambda c: (
        c.get(stream) + head(stream, (b"x", b"late")) for stream in STREAMS)),
    flood("10.5-bodies-longer-than-announced", RESET, shut, lambda c: (
        c.post(stream, (b"content-length", b"1")) + body(stream, b"more")
        for stream in STREAMS)),
    flood("10.5-bodies-shorter-than-announced", RESET, shut, lambda c: (
        c.get(stream, (b"content-length", b"1")) for stream in STREAMS)),
    flood("10.5-trailers-that-must-be-reset", RESET, shut, lambda c: (
        c.post(stream) + head(stream, (b":status", b"200"))
        for stream in STREAMS)),
    flood("10.5-priorities-cut-short", RESET, shut, lambda c: (
        c.get(stream) + frame(PRIORITY, 0, stream, bytes(4))
        for stream in STREAMS)),
    flood("10.5-settings", SETTING, nothing, lambda c: itertools.repeat(
        settings())),
    flood("10.5-settings-that-change-something", SETTING, nothing,
          lambda c: (settings((INITIAL_WINDOW_SIZE, 60000 + n))
                     for n in itertools.count())),
    flood("10.5-pings", ECHO, nothing, lambda c: itertools.repeat(
        frame(PING, 0, 0, b"echo me!"))),
    flood("10.5-empty-data", OTHER, lambda c: c.post(1),
          lambda c: itertools.repeat(body(1, end=False))),
    flood("10.5-empty-continuations", OTHER,
          lambda c: frame(HEADERS, 0, 1, block(*c.fields())),
          lambda c: itertools.repeat(frame(CONTINUATION, 0, 1))),
    flood("10.5-continuations", OTHER,
          lambda c: frame(HEADERS, 0, 1, block(*c.fields())),
          lambda c: itertools.repeat(
              frame(CONTINUATION, 0, 1, literal(b"x", b"y" * 100)))),
    flood("10.5-priorities", OTHER, nothing, lambda c: itertools.repeat(
        frame(PRIORITY, 0, 1, bytes(5)))),
    flood("10.5-priority-updates", OTHER, nothing, lambda c: itertools.repeat(
        frame(PRIORITY_UPDATE, 0, 0, b"\0\0\0\1u=1"))),
    flood("10.5-windows-of-the-connection", OTHER, nothing,
          lambda c: itertools.repeat(window_update(0, 1))),
    flood("10.5-windows-of-a-stream", OTHER,
          lambda c: settings((INITIAL_WINDOW_SIZE, 0)) + c.get(1),
          lambda c: itertools.repeat(
              window_update(1, 1) + window_update(1, 1))),
    flood("10.5-unknown-frames", OTHER, nothing,
          lambda c: itertools.repeat(frame(0x7B, 0, 0))),
    flood("10.5-acknowledgements", OTHER, nothing,
          lambda c: itertools.repeat(frame(PING, 1, 0, bytes(8)))),
]


@pytest.mark.parametrize("points, begin, octets", FLOODS)
def test_a_flood_ends_the_connection(client, points, begin, octets):
    client.barrier()
    client.send(begin(client))
    drown(client, octets(client), points)
    client.assert_connection_error(ENHANCE_YOUR_CALM)


def test_a_flood_is_over_for_others_when_it_is_cut_off(client, h2_target):
    drown(client, itertools.repeat(frame(SETTINGS, 0, 0)), SETTING)
    client.assert_connection_error(ENHANCE_YOUR_CALM)
    with Client(h2_target) as other:
        other.send(other.get(1))
        other.assert_answered(1)


def test_a_block_that_never_ends_is_cut_off(client):
    """CVE-2024-27316: what is not a whole block is still held in memory."""
    client.barrier()
    client.send(frame(HEADERS, 0, 1, block(*client.fields())))
    piece = literal(b"x", b"y" * 16000)
    for _ in range(64):
        client.send(frame(CONTINUATION, 0, 1, piece))
    client.assert_connection_error(ENHANCE_YOUR_CALM)


def test_a_client_in_good_faith_is_borne(client):
    """It gives each piece back twice, and now and then asks for a PING."""
    for stream in range(1, 401, 2):
        client.send(client.get(stream), window_update(0, 1))
        exchange = client.answer(stream)
        assert exchange.body == client.target.content
        client.send(*[window_update(0, 16384)] * 4)
        if stream % 20 == 1:
            client.barrier()
    client.assert_alive()


def test_a_page_that_is_left_early_is_borne(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        streams = range(1, 161, 2)
        client.send(*map(client.get, streams))
        client.send(*map(reset, streams))
        client.assert_alive()


# --- Limits --------------------------------------------------------------

def blocks(stream, fields):
    """HEADERS and CONTINUATION frames for a block of any length."""
    octets = block(*fields)
    parts = [octets[at : at + 16000] for at in range(0, len(octets), 16000)]
    made = [frame(HEADERS, 1, stream, parts[0])]
    made += [frame(CONTINUATION, 0, stream, part) for part in parts[1:]]
    return [*made, frame(CONTINUATION, END_HEADERS, stream)]


@pytest.mark.parametrize("fields", [
    pytest.param([(b"x", b"y" * 15000)] * 5, id="6.5.2-octets"),
    # nghttp2 decodes no field that is longer than 64 KiB.
    pytest.param([(b"x", b"y" * 65500)], id="6.5.2-one-long-field"),
    pytest.param([(b"x", b"")] * 2500, id="6.5.2-overhead-of-fields"),
    pytest.param([(b"x-%d" % n, b"y") for n in range(400)], id="10.5.1-count"),
])
def test_a_head_above_the_limits_is_answered_with_431(client, fields):
    client.send(*blocks(1, client.fields(b"GET", *fields)))
    assert client.answer(1).status == 431
    client.assert_alive()


def test_a_head_below_the_limits_is_served(client):
    fields = client.fields(b"GET", *[(b"x", b"y" * 5000)] * 10)
    client.send(*blocks(1, fields))
    client.assert_answered(1)


def test_a_small_block_that_unpacks_into_a_large_head_is_refused(client):
    """An entry of 4,000 octets, named 4,000 times: 16 MB from 8 kB."""
    octets = block(*client.fields()) + literal(b"x", b"y" * 4000, 0x40)
    client.send(frame(HEADERS, 5, 1, octets + b"\xbe" * 4000))
    client.until(
        lambda: client.goaway or client.exchanges[1].status, "refusal"
    )
    if client.goaway:
        client.assert_connection_error(ENHANCE_YOUR_CALM)
    else:
        assert client.exchanges[1].status == 431
        client.assert_alive()


def test_a_body_above_the_limit_is_answered_with_413(client):
    client.send(client.post(1, (b"content-length", b"%d" % 2**40)))
    exchange = client.answer(1)
    assert exchange.status == 413
    assert exchange.reset in (None, NO_ERROR)
    client.assert_alive()


def test_a_stream_too_many_is_refused_and_harms_no_other(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.barrier()
        limit = client.settings[MAX_CONCURRENT_STREAMS]
        streams = range(1, 2 * limit, 2)
        surplus = range(2 * limit + 1, 2 * limit + 20, 2)
        client.send(*map(client.get, (*streams, *surplus)))
        for stream in surplus:
            refused = client.exchanges[stream]
            client.until(lambda: refused.resets or client.goaway, "refusal")
            assert refused.reset == REFUSED_STREAM
        client.send(settings((INITIAL_WINDOW_SIZE, 65535)))
        client.assert_answered(*streams)
        client.send(head(2 * limit + 101, *client.fields(b"HEAD")))
        assert client.answer(2 * limit + 101).status == 200
