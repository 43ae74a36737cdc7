"""RFC 9113, HTTP/2, sections 3 to 9, with RFC 9218's frame, over TLS.

Each case is named for the paragraph it holds the server to.  A row of a table
is what is sent, as one write, and what that must end in.
"""

import random
import ssl

import frames
import pytest
from frames import (
    ACK, COMPRESSION_ERROR, CONTINUATION, DATA, ENABLE_PUSH, END_HEADERS,
    END_STREAM, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, GOAWAY, HEADERS,
    INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS, MAX_FRAME_SIZE,
    PADDED, PING, PREFACE, PRIORITY, PRIORITY_UPDATE, PROTOCOL_ERROR,
    PUSH_PROMISE, REFUSED_STREAM, RST_STREAM, SETTINGS, STREAM_CLOSED,
    WINDOW_UPDATE, WITH_PRIORITY, Client, accepted, alive, answered, block,
    body, connection_error, frame, head, malformed, reset, settings,
    stream_error, tolerated, window_update,
)

#: a type, a setting and flags that nobody has registered
UNKNOWN_TYPE, UNKNOWN_SETTING, UNKNOWN_FLAGS = 0x7B, 0x7B7B, 0xD2
#: SETTINGS_NO_RFC7540_PRIORITIES of RFC 9218
NO_OLD_PRIORITIES = 9
RESERVED_BIT = 1 << 31
LARGEST_WINDOW = LARGEST_STREAM = 2**31 - 1
#: makes bodies of responses wait, so that their streams stay half-closed
HOLD = settings((INITIAL_WINDOW_SIZE, 0))


def case(name, octets, outcome):
    """A row: what is sent (a function of the client), how it must end."""
    return pytest.param(octets, outcome, id=name)


def play(client, octets, outcome):
    """Sends what `octets` makes in one write, and checks the outcome."""
    client.send(*octets(client))
    outcome(client)


def whole(client, stream=1):
    """The field block of a good GET."""
    return block(*client.fields())


def changed(client, name, *values):
    """The fields of a good GET, `name` there once for each of the values."""
    fields = []
    for field in client.fields():
        if field[0] == name:
            fields += [(name, value) for value in values]
        else:
            fields.append(field)
    return fields


# --- 3. Starting ---------------------------------------------------------

@pytest.mark.parametrize("offered, chosen", [
    pytest.param(["h2"], "h2", id="3.2-h2-alone"),
    pytest.param(["h2", "http/1.1"], "h2", id="3.2-h2-and-http11"),
    pytest.param(["spdy/3.1", "h2"], "h2", id="3.2-h2-and-a-stranger"),
    pytest.param(["http/1.1"], "http/1.1", id="3.2-http11-alone"),
])
def test_alpn_chooses_a_protocol_that_the_client_named(
    h2_target, offered, chosen
):
    with frames.dial(h2_target, frames.tls_context(offered)) as tls:
        assert tls.selected_alpn_protocol() == chosen


def test_3_1_h2c_is_never_chosen_over_tls(h2_target):
    try:
        with frames.dial(h2_target, frames.tls_context(["h2c"])) as tls:
            assert tls.selected_alpn_protocol() is None
    except ssl.SSLError as refusal:
        assert "NO_APPLICATION_PROTOCOL" in str(refusal).upper()


def test_3_3_http11_is_spoken_when_it_was_chosen(h2_target):
    with frames.dial(h2_target, frames.tls_context(["http/1.1"])) as tls:
        tls.sendall(
            b"HEAD %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n"
            % (h2_target.path, h2_target.authority)
        )
        assert tls.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_3_4_the_server_begins_with_settings(client):
    client.until(lambda: client.frames, "first frame")
    first = client.frames[0]
    assert isinstance(first, frames.hyperframe.frame.SettingsFrame)
    assert "ACK" not in first.flags


def test_3_4_the_server_does_not_wait_for_the_clients_preface(h2_target):
    with Client(h2_target, hello=False) as client:
        client.until(lambda: client.settings, "SETTINGS")


def test_3_4_the_preface_may_come_octet_by_octet(h2_target):
    with Client(h2_target, hello=False) as client:
        for octet in PREFACE + settings() + client.get(1):
            client.send(bytes([octet]))
        client.assert_answered(1)


def test_3_4_requests_need_not_wait_for_the_servers_settings(h2_target):
    with Client(h2_target, hello=False) as client:
        client.send(PREFACE, settings(), client.get(1))
        client.assert_answered(1)


@pytest.mark.parametrize("octets", [
    pytest.param(octets, id=f"3.4-{name}")
    for name, octets in {
        "http11-is-no-preface": b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "last-octet-wrong": PREFACE[:-1] + b"\r" + settings(),
        "first-octet-wrong": b"p" + PREFACE[1:] + settings(),
        "no-magic": settings() + frame(PING, 0, 0, bytes(8)) * 2,
        "ping-for-settings": PREFACE + frame(PING, 0, 0, bytes(8)),
        "window-update-for-settings": PREFACE + window_update(0, 1),
        "ack-for-settings": PREFACE + frame(SETTINGS, ACK, 0),
    }.items()
])
def test_a_broken_preface_ends_the_connection(h2_target, octets):
    with Client(h2_target, hello=False) as client:
        client.send(octets)
        client.assert_hung_up(PROTOCOL_ERROR)


def test_3_4_headers_for_settings_end_the_connection(h2_target):
    with Client(h2_target, hello=False) as client:
        client.send(PREFACE, client.get(1))
        client.assert_hung_up(PROTOCOL_ERROR)
        assert client.exchanges[1].status == 0


# --- 4. Frames -----------------------------------------------------------

@pytest.mark.parametrize("octets, outcome", [
    case("4.1-unknown-flags-of-headers", lambda c: [frame(
        HEADERS, END_HEADERS | END_STREAM | UNKNOWN_FLAGS, 1, whole(c)
    )], answered(1)),
    case("4.1-unknown-flags-of-settings", lambda c: [
        frame(SETTINGS, UNKNOWN_FLAGS, 0)
    ], alive),
    case("4.1-unknown-flags-of-data", lambda c: [
        c.post(1), frame(DATA, END_STREAM | 0xD6, 1, b"body")
    ], accepted(1)),
    case("4.1-unknown-flags-of-rst-stream", lambda c: [
        HOLD, c.get(1), frame(RST_STREAM, 0xFF, 1, bytes(4))
    ], alive),
    case("4.1-unknown-flags-of-window-update", lambda c: [
        frame(WINDOW_UPDATE, 0xFF, 0, b"\0\0\0\1")
    ], alive),
    case("4.1-reserved-bit-of-headers", lambda c: [frame(
        HEADERS, END_HEADERS | END_STREAM, RESERVED_BIT | 1, whole(c)
    )], answered(1)),
    case("4.1-reserved-bit-of-settings", lambda c: [
        frame(SETTINGS, 0, RESERVED_BIT)
    ], alive),
    case("4.2-data-of-16384-octets", lambda c: [
        c.post(1), body(1, bytes(16384))
    ], accepted(1)),
    case("4.2-unknown-frame-of-16384-octets", lambda c: [
        frame(UNKNOWN_TYPE, 0, 0, bytes(16384))
    ], alive),
    case("4.2-data-above-the-limit", lambda c: [
        c.post(1), body(1, bytes(c.frame_limit + 1))
    ], stream_error(1, FRAME_SIZE_ERROR)),
    case("4.2-headers-above-the-limit", lambda c: [frame(
        HEADERS, END_HEADERS | END_STREAM, 1,
        whole(c).ljust(c.frame_limit + 1, b"\x82")
    )], connection_error(FRAME_SIZE_ERROR)),
    case("4.2-continuation-above-the-limit", lambda c: [
        frame(HEADERS, END_STREAM, 1, whole(c)),
        frame(CONTINUATION, END_HEADERS, 1,
              block((b"x", b"y" * c.frame_limit))),
    ], connection_error(FRAME_SIZE_ERROR)),
    case("4.2-settings-above-the-limit", lambda c: [
        frame(SETTINGS, 0, 0, bytes(c.frame_limit // 6 * 6 + 6))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("4.2-ping-above-the-limit", lambda c: [
        frame(PING, 0, 0, bytes(c.frame_limit + 1))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("4.2-length-of-16-mebioctets", lambda c: [
        b"\xff\xff\xff" + frame(DATA, 0, 0, bytes(64))[3:]
    ], connection_error(FRAME_SIZE_ERROR, PROTOCOL_ERROR)),
])
def test_frames_have_the_form_of_section_4(client, octets, outcome):
    play(client, octets, outcome)


def test_4_1_unknown_flags_of_ping_are_ignored(client):
    client.send(frame(PING, 0xFE, 0, b"unknown?"))
    client.until(lambda: b"unknown?" in client.pongs, "PING that comes back")


def test_4_2_the_server_keeps_to_frames_of_16384_octets(client):
    client.send(client.get(1))
    client.assert_answered(1)
    assert max(taken.body_len for taken in client.frames) <= 16384


def test_4_2_a_client_that_takes_longer_frames_gets_the_same_body(h2_target):
    with Client(h2_target, (MAX_FRAME_SIZE, 20000)) as client:
        client.send(client.get(1))
        client.assert_answered(1)
        assert max(taken.body_len for taken in client.frames) <= 20000


def pieces(octets, count):
    """A request's block as HEADERS and CONTINUATION frames of `count`."""
    parts = [octets[at : at + count] for at in range(0, len(octets), count)]
    made = [frame(HEADERS, END_STREAM, 1, parts[0])]
    made += [frame(CONTINUATION, 0, 1, part) for part in parts[1:-1]]
    return [*made, frame(CONTINUATION, END_HEADERS, 1, parts[-1])]


BROKEN_BLOCK = b"\x80"


@pytest.mark.parametrize("octets, outcome", [
    case("4.3-two-frames", lambda c: pieces(whole(c), 60), answered(1)),
    case("4.3-eight-frames", lambda c: pieces(
        whole(c), len(whole(c)) // 7
    ), answered(1)),
    case("4.3-nothing-in-headers", lambda c: [
        frame(HEADERS, END_STREAM, 1),
        frame(CONTINUATION, END_HEADERS, 1, whole(c)),
    ], answered(1)),
    case("4.3-nothing-in-the-last-continuation", lambda c: [
        frame(HEADERS, END_STREAM, 1, whole(c)),
        frame(CONTINUATION, END_HEADERS, 1),
    ], answered(1)),
    case("4.3-trailers-in-many-frames", lambda c: [
        c.post(1), body(1, b"body", end=False),
        *pieces(block((b"x-sum", b"1")), 3),
    ], accepted(1)),
    case("4.3-undecodable-headers", lambda c: [
        frame(HEADERS, END_HEADERS | END_STREAM, 1, BROKEN_BLOCK)
    ], connection_error(COMPRESSION_ERROR)),
    case("4.3-undecodable-continuation", lambda c: [
        frame(HEADERS, END_STREAM, 1, whole(c)),
        frame(CONTINUATION, END_HEADERS, 1, BROKEN_BLOCK),
    ], connection_error(COMPRESSION_ERROR)),
    case("4.3-undecodable-trailers", lambda c: [
        c.post(1), frame(HEADERS, END_HEADERS | END_STREAM, 1, BROKEN_BLOCK)
    ], connection_error(COMPRESSION_ERROR)),
    case("4.3-block-that-stops-in-a-field", lambda c: [
        frame(HEADERS, END_HEADERS | END_STREAM, 1, whole(c)[:-1])
    ], connection_error(COMPRESSION_ERROR)),
    *(case(f"4.3-{name}-inside-a-block", lambda c, bad=bad: [
        frame(HEADERS, END_STREAM, 1, whole(c)[:9]),
        bad,
        frame(CONTINUATION, END_HEADERS, 1, whole(c)[9:]),
    ], connection_error(PROTOCOL_ERROR)) for name, bad in {
        "ping": frame(PING, 0, 0, bytes(8)),
        "settings": settings(),
        "data": body(1, b"body"),
        "headers-of-the-stream": frame(HEADERS, END_HEADERS, 1),
        "headers-of-another-stream": frame(HEADERS, END_HEADERS, 3),
        "priority": frame(PRIORITY, 0, 3, bytes(5)),
        "priority-update": frame(PRIORITY_UPDATE, 0, 0, b"\0\0\0\1u=1"),
        "rst-stream": reset(1),
        "window-update": window_update(0, 1),
        "goaway": frame(GOAWAY, 0, 0, bytes(8)),
        "continuation-of-another-stream": frame(CONTINUATION, 0, 3),
        "unknown-frame": frame(UNKNOWN_TYPE, 0, 0),
    }.items()),
])
def test_field_blocks_are_whole_as_section_4_3_says(client, octets, outcome):
    play(client, octets, outcome)


def test_4_3_the_block_of_a_stream_that_was_reset_counts(client):
    """The dynamic table follows blocks that nobody reads any more."""
    path = frames.literal(b":path", client.target.path, 0x40)
    bad = path + block((b"UPPER", b""), *client.fields()[:3])
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, bad))
    good = block(*client.fields()[:3]) + b"\xbe"
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, good))
    client.until(
        lambda: client.goaway or client.exchanges[3].ended, "second answer"
    )
    if client.goaway:
        client.assert_connection_error(PROTOCOL_ERROR)
    else:
        client.assert_answered(3)


# --- 5. Streams ----------------------------------------------------------

@pytest.mark.parametrize("octets, outcome", [
    case("5.1-idle-data", lambda c: [body(1)],
         connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-rst-stream", lambda c: [reset(1)],
         connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-window-update", lambda c: [window_update(1, 1)],
         connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-continuation", lambda c: [
        frame(CONTINUATION, END_HEADERS, 1, whole(c))
    ], connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-data-above-a-used-stream", lambda c: [
        c.get(1), body(3)
    ], connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-even-stream-data", lambda c: [body(2)],
         connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-even-stream-window-update", lambda c: [
        c.get(1), window_update(2, 1)
    ], connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-even-stream-rst-stream", lambda c: [
        c.get(3), reset(2)
    ], connection_error(PROTOCOL_ERROR)),
    case("5.1-idle-priority", lambda c: [
        frame(PRIORITY, 0, 1, bytes(4) + b"\x10"), c.get(1)
    ], answered(1)),
    case("5.1-priority-opens-nothing", lambda c: [
        frame(PRIORITY, 0, 5, bytes(4) + b"\x10"), c.get(3)
    ], answered(3)),
    case("5.1-half-closed-data", lambda c: [
        HOLD, c.get(1), body(1, b"more")
    ], stream_error(1, STREAM_CLOSED)),
    case("5.1-half-closed-data-after-a-body", lambda c: [
        HOLD, c.post(1), body(1, b"all"), body(1, b"more")
    ], tolerated(1, STREAM_CLOSED)),
    case("5.1-half-closed-headers", lambda c: [HOLD, c.get(1), c.get(1)],
         stream_error(1, STREAM_CLOSED)),
    case("5.1-half-closed-continuation", lambda c: [
        HOLD, c.get(1), frame(CONTINUATION, END_HEADERS, 1, b"\x82")
    ], connection_error(PROTOCOL_ERROR)),
    case("5.1-half-closed-priority", lambda c: [
        HOLD, c.get(1), frame(PRIORITY, 0, 1, bytes(5)),
        window_update(1, 65536),
    ], answered(1)),
    case("5.1-half-closed-window-update", lambda c: [
        HOLD, c.get(1), window_update(1, 1), window_update(1, 65536)
    ], answered(1)),
    case("5.1-half-closed-rst-stream", lambda c: [HOLD, c.get(1), reset(1)],
         alive),
    case("5.1-reset-data", lambda c: [
        HOLD, c.post(1), reset(1), body(1, b"late")
    ], tolerated(1, STREAM_CLOSED, PROTOCOL_ERROR)),
    case("5.1-reset-trailers", lambda c: [
        HOLD, c.post(1), reset(1), head(1, (b"x-sum", b"1"))
    ], tolerated(1, STREAM_CLOSED, PROTOCOL_ERROR)),
    case("5.1-reset-priority", lambda c: [
        HOLD, c.get(1), reset(1), frame(PRIORITY, 0, 1, bytes(5))
    ], alive),
    case("5.1-reset-window-update", lambda c: [
        HOLD, c.get(1), reset(1), window_update(1, 1)
    ], tolerated(1, STREAM_CLOSED)),
    case("5.1-window-update-meets-the-end", lambda c: [
        c.get(1), window_update(1, 1000)
    ], answered(1)),
    case("5.1-rst-stream-meets-the-end", lambda c: [c.get(1), reset(1)],
         alive),
    case("5.1.1-even-stream", lambda c: [c.get(2)],
         connection_error(PROTOCOL_ERROR)),
    case("5.1.1-lower-than-the-last", lambda c: [c.get(5), c.get(3)],
         connection_error(PROTOCOL_ERROR, STREAM_CLOSED)),
    case("5.1.1-gaps", lambda c: [c.get(1), c.get(7), c.get(101)],
         answered(1, 7, 101)),
    case("5.1.1-window-update-of-a-stream-passed-over", lambda c: [
        c.get(5), window_update(3, 1)
    ], tolerated(3, STREAM_CLOSED, PROTOCOL_ERROR)),
])
def test_streams_have_the_states_of_section_5_1(client, octets, outcome):
    play(client, octets, outcome)


@pytest.mark.parametrize("octets", [
    pytest.param(lambda c: body(1, b"late"), id="5.1-closed-data"),
    pytest.param(lambda c: window_update(1, 1), id="5.1-closed-window"),
    pytest.param(lambda c: reset(1), id="5.1-closed-rst-stream"),
    pytest.param(lambda c: head(1, (b"x-sum", b"1")),
                 id="5.1-closed-trailers"),
])
def test_a_frame_on_a_finished_stream_is_ignored_or_too_late(client, octets):
    client.send(client.get(1))
    client.assert_answered(1)
    client.send(octets(client))
    client.assert_tolerated(1, STREAM_CLOSED, PROTOCOL_ERROR)


def test_5_1_closed_priority_is_ignored(client):
    client.send(client.get(1))
    client.assert_answered(1)
    client.send(frame(PRIORITY, 0, 1, bytes(5)))
    client.assert_alive()


def test_5_1_1_a_finished_streams_number_is_not_used_again(client):
    client.send(client.get(1))
    client.assert_answered(1)
    client.send(client.get(1))
    client.assert_tolerated(1, STREAM_CLOSED, PROTOCOL_ERROR)
    assert len(client.exchanges[1].heads) == 1


def test_5_1_1_the_last_number_of_all_can_be_used(client):
    client.send(client.get(LARGEST_STREAM))
    exchange = client.answer(LARGEST_STREAM)
    assert exchange.body == client.target.content


def test_5_1_frames_under_way_to_a_stream_that_was_reset_are_dropped(client):
    """Without a second RST_STREAM: section 5.4.2 wants one."""
    bad = block((b"UPPER", b""), *client.fields(b"POST"))
    client.send(
        frame(HEADERS, END_HEADERS, 1, bad),
        body(1, b"under way", end=False), window_update(1, 1),
        body(1, b"under way", end=False), head(1, (b"x-sum", b"1")),
    )
    client.assert_malformed(1)
    assert client.goaway or client.exchanges[1].resets == [PROTOCOL_ERROR]


def test_5_1_data_on_a_stream_that_was_reset_is_given_back(client):
    """Discarded DATA counts in the connection's window all the same."""
    bad = block((b"UPPER", b""), *client.fields(b"POST"))
    for stream in range(1, 21, 2):
        client.send(frame(HEADERS, END_HEADERS, stream, bad))
        pour(client, stream, body(stream, bytes(12000), end=False), 12000)
        client.barrier()
        if client.goaway:
            client.assert_connection_error(PROTOCOL_ERROR)
            return
    client.assert_alive()


def test_5_1_2_a_stream_above_the_limit_is_refused(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.barrier()
        limit = client.settings.get(MAX_CONCURRENT_STREAMS)
        if limit is None or limit > 1000:
            pytest.skip("the server does not limit streams")
        streams = range(1, 2 * limit, 2)
        client.send(*map(client.get, streams))
        client.send(client.get(2 * limit + 1))
        refused = client.exchanges[2 * limit + 1]
        client.until(
            lambda: refused.reset is not None or client.goaway, "refusal"
        )
        if client.goaway:
            client.assert_connection_error(REFUSED_STREAM, PROTOCOL_ERROR)
            return
        assert refused.reset in (REFUSED_STREAM, PROTOCOL_ERROR)
        client.send(settings((INITIAL_WINDOW_SIZE, 65535)))
        client.assert_answered(*streams)


def test_5_1_2_streams_that_ended_do_not_count(client):
    client.barrier()
    limit = min(client.settings.get(MAX_CONCURRENT_STREAMS, 100), 130)
    for stream in range(1, 2 * limit + 20, 2):
        client.send(head(stream, *client.fields(b"HEAD")))
        assert client.answer(stream).status == 200


def test_5_1_2_streams_that_were_reset_do_not_count(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.barrier()
        limit = min(client.settings.get(MAX_CONCURRENT_STREAMS, 100), 130)
        for stream in range(1, 2 * limit + 20, 2):
            client.send(client.get(stream), reset(stream))
        client.assert_alive()


# --- 5.2, 6.9: flow control ----------------------------------------------

def ledger(client, stream, sent):
    """What may still be sent on `stream` after `sent`, connection aside."""
    first = client.settings.get(INITIAL_WINDOW_SIZE, 65535)
    return first + client.credit[stream] - sent


def pour(client, stream, octets, cost, count=1):
    """Sends a frame `count` times as fast as both windows let it."""
    exchange = client.exchanges[stream]
    spent = vars(client).setdefault("spent", [0])
    sent = 0

    def over():
        return exchange.ended or exchange.reset is not None or client.goaway

    for _ in range(count):
        client.until(
            lambda: over() or ledger(client, stream, sent) >= cost,
            f"window of stream {stream}",
        )
        if over():
            return
        client.until(
            lambda: 65535 + client.credit[0] - spent[0] >= cost,
            "window of the connection",
        )
        client.send(octets)
        spent[0] += cost
        sent += cost


@pytest.mark.parametrize("padding", [
    pytest.param(0, id="6.9-what-was-read-is-given-back"),
    pytest.param(255, id="6.1-padding-is-given-back-too"),
])
def test_windows_open_again_for_bodies_of_requests(client, padding):
    client.barrier()
    octets = bytes(1000 if not padding else 1)
    if padding:
        octets = bytes([padding]) + octets + bytes(padding)
    flags = PADDED if padding else 0
    for stream in range(1, 11, 2):
        client.send(client.post(stream))
        pour(
            client, stream, frame(DATA, flags, stream, octets),
            len(octets), 30_000 // len(octets),
        )
        client.send(body(stream))
        assert client.answer(stream).status not in (0, 400)
    client.assert_alive()


def test_5_2_1_a_client_that_overruns_its_window_is_stopped(client):
    """Or it is not, when the server opened the window in the meantime."""
    client.barrier()
    size = 16384
    window = 65535 + client.credit[0]
    count = min(window // size + 1, 200)
    client.send(client.post(1), *[body(1, bytes(size), end=False)] * count)
    client.barrier()
    if client.goaway:
        client.assert_connection_error(FLOW_CONTROL_ERROR)
    elif client.exchanges[1].reset != FLOW_CONTROL_ERROR:
        assert 65535 + client.credit[0] >= count * size
        client.assert_alive()


def test_6_9_1_headers_pass_a_closed_window_and_data_does_not(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.send(client.get(1))
        client.until(lambda: client.exchanges[1].status, "head")
        client.barrier()
        assert client.exchanges[1].body == b""
        assert not client.exchanges[1].ended
        client.send(window_update(1, len(client.target.content)))
        client.assert_answered(1)


def test_6_9_1_each_octet_of_window_brings_an_octet(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 1)) as client:
        client.send(client.get(1))
        exchange = client.exchanges[1]
        for count in range(1, 20):
            client.until(lambda: len(exchange.body) >= count, "octet")
            client.barrier()
            assert len(exchange.body) == count
            client.send(window_update(1, 1))
        client.send(window_update(1, 2**20))
        client.assert_answered(1)


def test_6_9_1_windows_of_odd_sizes_give_an_exact_body(h2_target):
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        exchange, given = client.exchanges[1], 0
        client.send(client.get(1))
        while given < len(client.target.content):
            step = dice.randint(1, 9000)
            given = min(given + step, len(client.target.content))
            client.send(window_update(1, given - len(exchange.body)))
            client.until(lambda: len(exchange.body) == given, "octets")
        client.assert_answered(1)


def drained(target):
    """A client whose connection's window went to streams 1 and, partly, 3."""
    client = Client(target, windows=False)
    client.send(client.get(1), client.get(3))
    bodies = [client.exchanges[stream] for stream in (1, 3)]
    client.until(
        lambda: sum(len(exchange.body) for exchange in bodies) >= 65535,
        "first 65,535 octets",
    )
    return client


def test_6_9_1_the_connections_window_holds_for_all_streams(h2_target):
    with drained(h2_target) as client:
        client.barrier()
        got = [len(client.exchanges[stream].body) for stream in (1, 3)]
        assert sum(got) == 65535
        client.send(window_update(0, 1))
        client.barrier()
        got = [len(client.exchanges[stream].body) for stream in (1, 3)]
        assert sum(got) == 65536
        client.send(window_update(0, 2**20))
        client.assert_answered(1, 3)


def test_6_9_2_the_settings_leave_the_connections_window_alone(h2_target):
    with drained(h2_target) as client:
        client.send(settings((INITIAL_WINDOW_SIZE, 2**20)))
        client.barrier()
        got = [len(client.exchanges[stream].body) for stream in (1, 3)]
        assert sum(got) == 65535


def test_6_9_1_a_streams_window_must_not_overflow(h2_target):
    with drained(h2_target) as client:
        stream = 1 if not client.exchanges[1].ended else 3
        client.send(window_update(stream, LARGEST_WINDOW))
        client.assert_stream_error(stream, FLOW_CONTROL_ERROR)


def test_6_9_2_the_settings_must_not_overflow_a_streams_window(h2_target):
    with drained(h2_target) as client:
        stream = 1 if not client.exchanges[1].ended else 3
        client.send(window_update(stream, LARGEST_WINDOW - 65535))
        client.send(settings((INITIAL_WINDOW_SIZE, LARGEST_WINDOW)))
        client.assert_connection_error(FLOW_CONTROL_ERROR)


def test_6_9_2_a_larger_initial_window_opens_waiting_streams(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.send(client.get(1), client.get(3))
        client.barrier()
        client.send(settings((INITIAL_WINDOW_SIZE, 7)))
        client.until(
            lambda: len(client.exchanges[1].body)
            == len(client.exchanges[3].body) == 7, "7 octets each"
        )
        client.send(settings((INITIAL_WINDOW_SIZE, 65535)))
        client.assert_answered(1, 3)


def test_6_9_2_a_window_can_be_negative(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 20)) as client:
        exchange = client.exchanges[1]
        client.send(client.get(1))
        client.until(lambda: len(exchange.body) == 20, "20 octets")
        client.send(
            settings((INITIAL_WINDOW_SIZE, 5)), window_update(1, 15)
        )
        client.barrier()
        assert len(exchange.body) == 20
        client.send(window_update(1, 10))
        client.until(lambda: len(exchange.body) >= 30, "10 octets more")
        client.barrier()
        assert len(exchange.body) == 30
        client.send(window_update(1, 2**20))
        client.assert_answered(1)


def test_5_2_1_a_waiting_stream_does_not_hold_up_another(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.send(client.get(1), client.get(3), window_update(3, 2**20))
        assert client.answer(3).body == client.target.content
        assert client.exchanges[1].body == b""
        client.send(window_update(1, 2**20))
        client.assert_answered(1)


def test_5_4_2_nothing_follows_on_a_stream_that_the_client_reset(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 10)) as client:
        client.send(client.get(1))
        client.until(lambda: len(client.exchanges[1].body) == 10, "body")
        client.send(reset(1), settings((INITIAL_WINDOW_SIZE, 65535)))
        client.barrier()
        client.assert_alive()
        assert len(client.exchanges[1].body) == 10
        assert client.exchanges[1].reset is None


@pytest.mark.parametrize("octets, outcome", [
    case("6.9-nothing-for-a-stream", lambda c: [
        HOLD, c.get(1), window_update(1, 0)
    ], stream_error(1, PROTOCOL_ERROR)),
    case("6.9-nothing-for-the-connection", lambda c: [window_update(0, 0)],
         connection_error(PROTOCOL_ERROR)),
    case("6.9-reserved-bit-and-nothing", lambda c: [
        frame(WINDOW_UPDATE, 0, 0, b"\x80\0\0\0")
    ], connection_error(PROTOCOL_ERROR)),
    case("6.9-reserved-bit-is-ignored", lambda c: [
        frame(WINDOW_UPDATE, 0, 0, b"\x80\0\0\1")
    ], alive),
    case("6.9-three-octets", lambda c: [frame(WINDOW_UPDATE, 0, 0, bytes(3))],
         connection_error(FRAME_SIZE_ERROR)),
    case("6.9-five-octets", lambda c: [
        HOLD, c.get(1), frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1\0")
    ], connection_error(FRAME_SIZE_ERROR)),
    case("6.9.1-overflow-of-the-connection", lambda c: [
        window_update(0, LARGEST_WINDOW)
    ], connection_error(FLOW_CONTROL_ERROR)),
    case("6.9.1-the-largest-window", lambda c: [
        window_update(0, LARGEST_WINDOW - 2**30 - 65535)
    ], alive),
])
def test_window_update_frames_obey_section_6_9(client, octets, outcome):
    play(client, octets, outcome)


# --- 5.3 priorities, 5.4 errors, 5.5 extensions --------------------------

@pytest.mark.parametrize("octets, outcome", [
    case("5.3-of-an-unknown-parent", lambda c: [
        frame(PRIORITY, 0, 1, b"\0\0\0\x63\x0f"), c.get(1)
    ], answered(1)),
    case("5.3-exclusive", lambda c: [
        HOLD, c.get(1), c.get(3), frame(PRIORITY, 0, 3, b"\x80\0\0\1\xff"),
        settings((INITIAL_WINDOW_SIZE, 65535)),
    ], answered(1, 3)),
    case("5.3-in-a-ring", lambda c: [
        HOLD, c.get(1), c.get(3), frame(PRIORITY, 0, 1, b"\0\0\0\3\0"),
        frame(PRIORITY, 0, 3, b"\0\0\0\1\0"),
        settings((INITIAL_WINDOW_SIZE, 65535)),
    ], answered(1, 3)),
    case("5.3-priority-of-itself", lambda c: [
        HOLD, c.get(1), frame(PRIORITY, 0, 1, b"\0\0\0\1\x10")
    ], tolerated(1, PROTOCOL_ERROR)),
    case("5.3-headers-of-itself", lambda c: [frame(
        HEADERS, WITH_PRIORITY | END_HEADERS | END_STREAM, 1,
        b"\0\0\0\1\x10" + whole(c),
    )], tolerated(1, PROTOCOL_ERROR)),
    case("5.5-unknown-frame-of-the-connection", lambda c: [
        frame(UNKNOWN_TYPE, 0xFF, 0, b"whatever")
    ], alive),
    case("5.5-unknown-frame-of-an-idle-stream", lambda c: [
        frame(UNKNOWN_TYPE, 0xFF, 1, b"whatever"), c.get(1)
    ], answered(1)),
    case("5.5-unknown-frame-of-an-open-stream", lambda c: [
        c.post(1), frame(UNKNOWN_TYPE, 0xFF, 1, b"whatever"), body(1, b"x")
    ], accepted(1)),
    case("5.5-unknown-frame-of-a-half-closed-stream", lambda c: [
        HOLD, c.get(1), frame(UNKNOWN_TYPE, 0, 1), window_update(1, 2**20)
    ], answered(1)),
    case("5.5-unknown-frame-without-payload", lambda c: [
        frame(0xFF, 0, 0)
    ], alive),
    case("5.5-unknown-setting", lambda c: [
        settings((UNKNOWN_SETTING, 2**32 - 1), (0, 0))
    ], alive),
    case("5.5-alternative-services-from-a-client", lambda c: [
        frame(10, 0, 0, b"\0\0whatever")
    ], alive),
])
def test_priorities_and_strangers_do_no_harm(client, octets, outcome):
    play(client, octets, outcome)


def test_5_4_1_goaway_names_the_last_stream_that_was_served(client):
    client.send(client.get(1), client.get(5))
    client.assert_answered(1, 5)
    served = max(client.exchanges)
    client.send(frame(PING, 0, 0))
    client.assert_connection_error(FRAME_SIZE_ERROR)
    assert client.goaway.last_stream_id == served


def test_5_4_1_requests_before_the_error_in_one_write_count(client):
    client.send(client.get(1), frame(PING, 0, 0))
    client.assert_connection_error(FRAME_SIZE_ERROR)
    assert client.goaway.last_stream_id == 1


def test_5_4_2_rst_stream_is_not_answered_with_rst_stream(client):
    client.send(client.get(1))
    client.assert_answered(1)
    client.send(reset(1), reset(1))
    client.assert_tolerated(1, STREAM_CLOSED, PROTOCOL_ERROR)


@pytest.mark.parametrize("octets", [
    pytest.param(lambda c: [], id="5.4.3-after-the-preface"),
    pytest.param(lambda c: [b"\0\0"], id="5.4.3-inside-a-frames-head"),
    pytest.param(lambda c: [c.get(1)[:30]], id="5.4.3-inside-a-payload"),
    pytest.param(lambda c: [frame(HEADERS, 0, 1, whole(c)[:9])],
                 id="5.4.3-inside-a-block"),
    pytest.param(lambda c: [HOLD, c.get(1)], id="5.4.3-inside-a-response"),
    pytest.param(lambda c: [c.post(1), body(1, b"x", end=False)],
                 id="5.4.3-inside-a-request"),
])
def test_a_client_that_vanishes_harms_nobody_else(h2_target, octets):
    with Client(h2_target) as client:
        client.barrier()
        client.send(*octets(client))
    with Client(h2_target) as client:
        client.send(client.get(1))
        client.assert_answered(1)


# --- 6. Frame definitions ------------------------------------------------

def padded(kind, flags, stream, octets, count, fill=b"\0"):
    """A frame that says it has `count` octets of padding, and has them."""
    payload = bytes([count]) + octets + fill * count
    return frame(kind, flags | PADDED, stream, payload)


@pytest.mark.parametrize("octets, outcome", [
    case("6.1-stream-0", lambda c: [body(0, b"body")],
         connection_error(PROTOCOL_ERROR)),
    case("6.1-empty-body", lambda c: [c.post(1), body(1)], accepted(1)),
    case("6.1-empty-frame-between", lambda c: [
        c.post(1), body(1, end=False), body(1, b"body")
    ], accepted(1)),
    case("6.1-padding", lambda c: [
        c.post(1), padded(DATA, END_STREAM, 1, b"body", 100)
    ], accepted(1)),
    case("6.1-nothing-but-padding", lambda c: [
        c.post(1), padded(DATA, END_STREAM, 1, b"", 255)
    ], accepted(1)),
    case("6.1-padding-of-no-length", lambda c: [
        c.post(1), padded(DATA, END_STREAM, 1, b"body", 0)
    ], accepted(1)),
    case("6.1-padding-as-long-as-the-payload", lambda c: [
        c.post(1), frame(DATA, PADDED | END_STREAM, 1, b"\5body")
    ], connection_error(PROTOCOL_ERROR)),
    case("6.1-padding-longer-than-the-payload", lambda c: [
        c.post(1), frame(DATA, PADDED | END_STREAM, 1, b"\xffbody")
    ], connection_error(PROTOCOL_ERROR)),
    case("6.1-no-room-for-the-length-of-padding", lambda c: [
        c.post(1), frame(DATA, PADDED | END_STREAM, 1)
    ], connection_error(FRAME_SIZE_ERROR, PROTOCOL_ERROR)),
])
def test_data_frames_obey_section_6_1(client, octets, outcome):
    play(client, octets, outcome)


ALL = END_HEADERS | END_STREAM


@pytest.mark.parametrize("octets, outcome", [
    case("6.2-stream-0", lambda c: [c.get(0)],
         connection_error(PROTOCOL_ERROR)),
    case("6.2-padding", lambda c: [padded(HEADERS, ALL, 1, whole(c), 99)],
         answered(1)),
    case("6.2-priority", lambda c: [frame(
        HEADERS, ALL | WITH_PRIORITY, 1, b"\0\0\0\0\xff" + whole(c)
    )], answered(1)),
    case("6.2-padding-and-priority", lambda c: [padded(
        HEADERS, ALL | WITH_PRIORITY, 1, b"\x80\0\0\0\0" + whole(c), 7
    )], answered(1)),
    case("6.2-padding-and-continuation", lambda c: [
        padded(HEADERS, END_STREAM, 1, whole(c)[:20], 50),
        frame(CONTINUATION, END_HEADERS, 1, whole(c)[20:]),
    ], answered(1)),
    case("6.2-padding-longer-than-the-payload", lambda c: [
        frame(HEADERS, ALL | PADDED, 1, b"\xff" + whole(c)[:100])
    ], connection_error(PROTOCOL_ERROR)),
    case("6.2-padding-as-long-as-the-payload", lambda c: [
        frame(HEADERS, ALL | PADDED, 1, bytes([6]) + b"\x82" * 5)
    ], connection_error(PROTOCOL_ERROR)),
    case("6.2-padding-over-the-priority", lambda c: [
        frame(HEADERS, ALL | PADDED | WITH_PRIORITY, 1, b"\4" + bytes(7))
    ], stream_error(1, PROTOCOL_ERROR, FRAME_SIZE_ERROR)),
    case("6.2-no-room-for-the-length-of-padding", lambda c: [
        frame(HEADERS, ALL | PADDED, 1)
    ], connection_error(FRAME_SIZE_ERROR, PROTOCOL_ERROR)),
    case("6.2-no-room-for-the-priority", lambda c: [
        frame(HEADERS, ALL | WITH_PRIORITY, 1, bytes(4))
    ], connection_error(FRAME_SIZE_ERROR, PROTOCOL_ERROR)),
    case("6.3-stream-0", lambda c: [frame(PRIORITY, 0, 0, bytes(5))],
         connection_error(PROTOCOL_ERROR)),
    case("6.3-four-octets", lambda c: [
        HOLD, c.get(1), frame(PRIORITY, 0, 1, bytes(4))
    ], stream_error(1, FRAME_SIZE_ERROR)),
    case("6.3-six-octets", lambda c: [
        HOLD, c.get(1), frame(PRIORITY, 0, 1, bytes(6))
    ], stream_error(1, FRAME_SIZE_ERROR)),
    case("6.4-stream-0", lambda c: [reset(0)],
         connection_error(PROTOCOL_ERROR)),
    case("6.4-idle-stream", lambda c: [c.get(1), reset(3)],
         connection_error(PROTOCOL_ERROR)),
    case("6.4-three-octets", lambda c: [
        HOLD, c.get(1), frame(RST_STREAM, 0, 1, bytes(3))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("6.4-five-octets", lambda c: [
        HOLD, c.get(1), frame(RST_STREAM, 0, 1, bytes(5))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("6.4-an-open-request", lambda c: [
        c.post(1), body(1, b"half", end=False), reset(1)
    ], alive),
])
def test_stream_frames_obey_sections_6_2_to_6_4(client, octets, outcome):
    play(client, octets, outcome)


@pytest.mark.parametrize("octets, outcome", [
    case("6.5-ack-with-a-payload", lambda c: [
        frame(SETTINGS, ACK, 0, bytes(6))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("6.5-on-a-stream", lambda c: [frame(SETTINGS, 0, 1)],
         connection_error(PROTOCOL_ERROR)),
    case("6.5-ack-on-a-stream", lambda c: [frame(SETTINGS, ACK, 1)],
         connection_error(PROTOCOL_ERROR)),
    *(case(f"6.5-{count}-octets", lambda c, count=count: [
        frame(SETTINGS, 0, 0, bytes(count))
    ], connection_error(FRAME_SIZE_ERROR)) for count in (1, 3, 5, 7)),
    *(case(f"6.5.2-enable-push-{value}", lambda c, value=value: [
        settings((ENABLE_PUSH, value))
    ], connection_error(PROTOCOL_ERROR)) for value in (2, 2**32 - 1)),
    *(case(f"6.5.2-enable-push-{value}", lambda c, value=value: [
        settings((ENABLE_PUSH, value))
    ], alive) for value in (0, 1)),
    *(case(f"6.5.2-initial-window-{value}", lambda c, value=value: [
        settings((INITIAL_WINDOW_SIZE, value))
    ], connection_error(FLOW_CONTROL_ERROR)) for value in (2**31, 2**32 - 1)),
    case("6.5.2-largest-initial-window", lambda c: [
        settings((INITIAL_WINDOW_SIZE, LARGEST_WINDOW)), c.get(1)
    ], answered(1)),
    *(case(f"6.5.2-max-frame-size-{value}", lambda c, value=value: [
        settings((MAX_FRAME_SIZE, value))
    ], connection_error(PROTOCOL_ERROR))
      for value in (0, 16383, 2**24, 2**32 - 1)),
    *(case(f"6.5.2-max-frame-size-{value}", lambda c, value=value: [
        settings((MAX_FRAME_SIZE, value)), c.get(1)
    ], answered(1)) for value in (16384, 2**24 - 1)),
    case("6.5.2-no-streams-of-the-server", lambda c: [
        settings((MAX_CONCURRENT_STREAMS, 0)), c.get(1)
    ], answered(1)),
    case("6.5.2-small-header-list-is-advice", lambda c: [
        settings((frames.MAX_HEADER_LIST_SIZE, 2**20)), c.get(1)
    ], answered(1)),
    case("6.5.3-a-good-and-a-bad-value", lambda c: [
        settings((UNKNOWN_SETTING, 1), (ENABLE_PUSH, 5))
    ], connection_error(PROTOCOL_ERROR)),
])
def test_settings_frames_obey_section_6_5(client, octets, outcome):
    play(client, octets, outcome)


def test_6_5_3_each_settings_frame_is_acknowledged(client):
    client.send(settings(), settings((ENABLE_PUSH, 0)), settings())
    client.until(lambda: client.acks == 4, "four acknowledgements")
    client.barrier()
    assert client.acks == 4


def test_6_5_3_values_are_taken_in_their_order(client):
    client.send(
        settings((INITIAL_WINDOW_SIZE, 900), (INITIAL_WINDOW_SIZE, 5)),
        client.get(1),
    )
    client.until(lambda: client.exchanges[1].body, "first octets")
    client.barrier()
    assert len(client.exchanges[1].body) == 5


def test_6_5_2_the_servers_own_settings_are_lawful(client):
    client.until(lambda: client.settings, "SETTINGS")
    own = client.settings
    assert own.get(ENABLE_PUSH, 0) == 0
    assert own.get(INITIAL_WINDOW_SIZE, 65535) <= LARGEST_WINDOW
    assert 2**14 <= own.get(MAX_FRAME_SIZE, 2**14) < 2**24
    assert own.get(MAX_CONCURRENT_STREAMS, 100) >= 100


PROMISE = b"\0\0\0\2\x82"


@pytest.mark.parametrize("octets, outcome", [
    case("6.6-on-a-half-closed-stream", lambda c: [
        HOLD, c.get(1), frame(PUSH_PROMISE, END_HEADERS, 1, PROMISE)
    ], connection_error(PROTOCOL_ERROR)),
    case("6.6-on-an-open-stream", lambda c: [
        c.post(1), frame(PUSH_PROMISE, END_HEADERS, 1, PROMISE)
    ], connection_error(PROTOCOL_ERROR)),
    case("6.6-on-stream-0", lambda c: [
        frame(PUSH_PROMISE, END_HEADERS, 0, PROMISE)
    ], connection_error(PROTOCOL_ERROR)),
    case("6.6-with-a-block-that-goes-on", lambda c: [
        HOLD, c.get(1), frame(PUSH_PROMISE, 0, 1, PROMISE),
        frame(CONTINUATION, END_HEADERS, 1, b"\x84"),
    ], connection_error(PROTOCOL_ERROR)),
    *(case(f"6.7-{count}-octets", lambda c, count=count: [
        frame(PING, 0, 0, bytes(count))
    ], connection_error(FRAME_SIZE_ERROR)) for count in (0, 7, 9)),
    case("6.7-ack-of-seven-octets", lambda c: [
        frame(PING, ACK, 0, bytes(7))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("6.7-on-a-stream", lambda c: [
        HOLD, c.get(1), frame(PING, 0, 1, bytes(8))
    ], connection_error(PROTOCOL_ERROR)),
    case("6.7-ack-that-nobody-asked-for", lambda c: [
        frame(PING, ACK, 0, b"surprise")
    ], alive),
    case("6.8-on-a-stream", lambda c: [
        HOLD, c.get(1), frame(GOAWAY, 0, 1, bytes(8))
    ], connection_error(PROTOCOL_ERROR)),
    case("6.8-seven-octets", lambda c: [frame(GOAWAY, 0, 0, bytes(7))],
         connection_error(FRAME_SIZE_ERROR)),
    case("6.10-stream-0", lambda c: [
        frame(HEADERS, END_STREAM, 1, whole(c)[:9]),
        frame(CONTINUATION, END_HEADERS, 0, whole(c)[9:]),
    ], connection_error(PROTOCOL_ERROR)),
    case("6.10-after-the-end-of-the-block", lambda c: [
        c.post(1), frame(CONTINUATION, END_HEADERS, 1, b"\x82")
    ], connection_error(PROTOCOL_ERROR)),
    case("6.10-after-the-end-in-a-continuation", lambda c: [
        frame(HEADERS, 0, 1, whole(c)),
        frame(CONTINUATION, END_HEADERS, 1),
        frame(CONTINUATION, END_HEADERS, 1),
    ], connection_error(PROTOCOL_ERROR)),
    case("6.10-after-data", lambda c: [
        c.post(1), body(1, b"x", end=False),
        frame(CONTINUATION, END_HEADERS, 1, b"\x82"),
    ], connection_error(PROTOCOL_ERROR)),
    case("6.10-end-stream-means-nothing-here", lambda c: [
        frame(HEADERS, END_STREAM, 1, whole(c)[:9]),
        frame(CONTINUATION, END_HEADERS | END_STREAM, 1, whole(c)[9:]),
    ], answered(1)),
    case("7-unknown-code-of-rst-stream", lambda c: [
        HOLD, c.get(1), reset(1, 0xFEEDBEEF)
    ], alive),
])
def test_other_frames_obey_sections_6_6_to_7(client, octets, outcome):
    play(client, octets, outcome)


def test_6_6_the_server_promises_nothing_to_who_wants_no_push(h2_target):
    with Client(h2_target, (ENABLE_PUSH, 0)) as client:
        client.send(client.get(1))
        client.assert_answered(1)
        kinds = {taken.type for taken in client.frames}
        assert PUSH_PROMISE not in kinds


def test_6_7_ping_comes_back_as_it_was(client):
    client.send(frame(PING, 0, 0, b"\x00\xffpayload"[:8]))
    client.until(lambda: client.pongs, "PING that comes back")
    assert client.pongs == [b"\x00\xffpayload"[:8]]


def test_6_7_pings_come_back_while_responses_wait(h2_target):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.send(client.get(1), frame(PING, 0, 0, b"octets 8"))
        client.until(lambda: client.pongs, "PING that comes back")
        assert not client.exchanges[1].ended


@pytest.mark.parametrize("octets", [
    pytest.param(frame(GOAWAY, 0, 0, bytes(8)), id="6.8-goaway"),
    pytest.param(frame(GOAWAY, 0, 0, bytes(8) + b"debug"),
                 id="6.8-goaway-with-debug-data"),
    pytest.param(frame(GOAWAY, 0, 0, bytes(4) + b"\xfe\xed\xbe\xef"),
                 id="7-goaway-with-an-unknown-code"),
    pytest.param(
        frame(GOAWAY, 0, 0, b"\x7f\xff\xff\xfe" + bytes(4))
        + frame(GOAWAY, 0, 0, bytes(8)), id="6.8-goaway-twice"),
])
def test_open_streams_finish_after_a_goaway_of_the_client(h2_target, octets):
    with Client(h2_target, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.send(client.get(1), client.get(3))
        client.barrier()
        client.send(octets, window_update(1, 2**20), window_update(3, 2**20))
        for stream in (1, 3):
            assert client.answer(stream).body == client.target.content


# --- RFC 9218 ------------------------------------------------------------

def priority_update(target, value=b"u=3", stream=0):
    """A PRIORITY_UPDATE frame."""
    payload = target.to_bytes(4, "big") + value
    return frame(PRIORITY_UPDATE, 0, stream, payload)


@pytest.mark.parametrize("octets, outcome", [
    case("9218-7.1-of-an-idle-stream", lambda c: [
        priority_update(1, b"u=1, i"), c.get(1)
    ], answered(1)),
    case("9218-7.1-of-a-waiting-stream", lambda c: [
        HOLD, c.get(1), priority_update(1, b"u=7"), priority_update(1, b""),
        window_update(1, 2**20),
    ], answered(1)),
    case("9218-7.1-of-a-stream-that-was-reset", lambda c: [
        HOLD, c.get(1), reset(1), priority_update(1)
    ], alive),
    case("9218-7.1-reserved-bit", lambda c: [
        priority_update(RESERVED_BIT | 1), c.get(1)
    ], answered(1)),
    case("9218-7.1-unparsable-value", lambda c: [
        HOLD, c.get(1), priority_update(1, b"=!\xff")
    ], tolerated(1, PROTOCOL_ERROR)),
    case("9218-4.1-values-out-of-range", lambda c: [
        priority_update(1, b"u=9, i=7, z=?0"), c.get(1)
    ], answered(1)),
    case("9218-7.1-on-a-stream", lambda c: [
        HOLD, c.get(1), priority_update(1, stream=1)
    ], connection_error(PROTOCOL_ERROR)),
    case("9218-7.1-of-stream-0", lambda c: [priority_update(0)],
         connection_error(PROTOCOL_ERROR)),
    case("9218-7.1-of-an-idle-push", lambda c: [priority_update(2)],
         connection_error(PROTOCOL_ERROR)),
    case("9218-7.1-three-octets", lambda c: [
        frame(PRIORITY_UPDATE, 0, 0, bytes(3))
    ], connection_error(FRAME_SIZE_ERROR)),
    case("9218-4-priority-field", lambda c: [
        c.get(1, (b"priority", b"u=0, i")), c.get(3, (b"priority", b"u=7")),
        c.get(5, (b"priority", b"=broken!")),
    ], answered(1, 3, 5)),
])
def test_priority_updates_obey_rfc_9218(client, octets, outcome):
    play(client, octets, outcome)


def test_9218_2_1_a_client_may_do_without_the_old_priorities(h2_target):
    with Client(h2_target, (NO_OLD_PRIORITIES, 1)) as client:
        client.send(client.get(1))
        client.assert_answered(1)


def test_9218_2_1_no_old_priorities_is_yes_or_no(h2_target):
    with Client(h2_target, (NO_OLD_PRIORITIES, 2)) as client:
        client.assert_connection_error(PROTOCOL_ERROR)


def test_9218_7_1_priorities_of_idle_streams_count_as_streams(client):
    client.barrier()
    limit = client.settings.get(MAX_CONCURRENT_STREAMS, 2000)
    client.send(*map(priority_update, range(1, 2 * limit + 20, 2)))
    client.assert_connection_error(PROTOCOL_ERROR)


# --- 8. HTTP -------------------------------------------------------------

@pytest.mark.parametrize("octets, outcome", [
    case("8.1-trailers", lambda c: [
        c.post(1), body(1, b"body", end=False), head(1, (b"x-sum", b"1"))
    ], accepted(1)),
    case("8.1-trailers-without-a-body", lambda c: [
        c.post(1), head(1, (b"x-sum", b"1"))
    ], accepted(1)),
    case("8.1-empty-trailers", lambda c: [
        c.post(1), body(1, b"body", end=False), head(1)
    ], accepted(1)),
    case("8.1-trailers-that-do-not-end", lambda c: [
        c.post(1), frame(HEADERS, END_HEADERS, 1, block((b"x-sum", b"1"))),
        body(1),
    ], malformed(1)),
    case("8.1-data-after-trailers", lambda c: [
        c.post(1), head(1, (b"x-sum", b"1")), body(1, b"more")
    ], tolerated(1, STREAM_CLOSED)),
    case("8.1.1-content-length-that-is-true", lambda c: [
        c.post(1, (b"content-length", b"4")), body(1, b"bo", end=False),
        body(1, b"dy"),
    ], accepted(1)),
    case("8.1.1-padding-is-no-content", lambda c: [
        c.post(1, (b"content-length", b"4")),
        padded(DATA, END_STREAM, 1, b"body", 9),
    ], accepted(1)),
    case("8.1.1-content-length-true-before-trailers", lambda c: [
        c.post(1, (b"content-length", b"4")), body(1, b"body", end=False),
        head(1, (b"x-sum", b"1")),
    ], accepted(1)),
    case("8.1.1-content-length-too-small", lambda c: [
        c.post(1, (b"content-length", b"3")), body(1, b"body")
    ], malformed(1)),
    case("8.1.1-content-length-too-large", lambda c: [
        c.post(1, (b"content-length", b"5")), body(1, b"body")
    ], malformed(1)),
    case("8.1.1-content-length-wrong-in-sum", lambda c: [
        c.post(1, (b"content-length", b"4")), body(1, b"bod", end=False),
        body(1, b"y!"),
    ], malformed(1)),
    case("8.1.1-content-length-and-nothing", lambda c: [
        head(1, *c.fields(b"POST", (b"content-length", b"1")))
    ], malformed(1)),
    case("8.1.1-content-length-and-only-trailers", lambda c: [
        c.post(1, (b"content-length", b"1")), head(1, (b"x-sum", b"1"))
    ], malformed(1)),
    case("8.1.1-content-length-of-nothing", lambda c: [
        head(1, *c.fields(b"POST", (b"content-length", b"0")))
    ], accepted(1)),
    *(case(f"8.1.1-content-length-{name}", lambda c, value=value: [
        c.post(1, (b"content-length", value)), body(1, b"body")
    ], malformed(1)) for name, value in {
        "in-words": b"four", "signed": b"+4", "negative": b"-4",
        "empty": b"", "in-hex": b"0x4",
    }.items()),
    case("8.1.1-two-content-lengths", lambda c: [
        c.post(1, (b"content-length", b"4"), (b"content-length", b"5")),
        body(1, b"body"),
    ], malformed(1)),
])
def test_messages_are_framed_as_section_8_1_says(client, octets, outcome):
    play(client, octets, outcome)


def bad_field(name, value):
    """A GET with one field more."""
    return lambda c: [c.get(1, (name, value))]


@pytest.mark.parametrize("octets, outcome", [
    *(case(f"8.2.1-name-with-{name}", bad_field(octets, b"v"), malformed(1))
      for name, octets in {
          "upper-case": b"x-Upper", "space": b"x y", "nul": b"x\0y",
          "line-feed": b"x\ny", "carriage-return": b"x\ry", "tab": b"x\ty",
          "delete": b"x\x7f", "octet-80": b"x\x80", "octet-ff": b"x\xff",
          "colon": b"x:y", "nothing": b"",
      }.items()),
    *(case(f"8.2.1-value-with-{name}", bad_field(b"x", value), malformed(1))
      for name, value in {
          "nul": b"a\0b", "line-feed": b"a\nb", "carriage-return": b"a\rb",
          "split-response": b"a\r\nx: b", "vertical-tab": b"a\x0bb",
          "delete": b"a\x7f", "space-before": b" a",
          "space-behind": b"a ", "tab-before": b"\ta", "tab-behind": b"a\t",
          "nothing-but-space": b" ",
      }.items()),
    *(case(f"8.2.1-value-with-{name}", bad_field(b"x", value), answered(1))
      for name, value in {
          "nothing": b"", "inner-space": b"a b\tc", "colon": b"a:b",
          "octets-80-ff": b"\x80\xff", "one-octet": b"a",
      }.items()),
    case("8.2.1-name-with-all-of-token",
         bad_field(b"x!#$%&'*+-.^_`|~09az", b"v"), answered(1)),
    *(case(f"8.2.2-{name.decode()}", bad_field(name, value), malformed(1))
      for name, value in {
          b"connection": b"close", b"keep-alive": b"timeout=5",
          b"proxy-connection": b"keep-alive",
          b"transfer-encoding": b"chunked", b"upgrade": b"websocket",
          b"te": b"gzip",
      }.items()),
    case("8.2.2-te-trailers-and-more", bad_field(b"te", b"trailers, gzip"),
         malformed(1)),
    case("8.2.2-te-trailers", bad_field(b"te", b"trailers"), answered(1)),
    case("8.2.2-te-twice", lambda c: [
        c.get(1, (b"te", b"trailers"), (b"te", b"gzip"))
    ], malformed(1)),
    case("8.2.3-cookie-in-crumbs", lambda c: [
        c.get(1, (b"cookie", b"a=b"), (b"cookie", b"c=d"))
    ], answered(1)),
    *(case(f"8.2-trailers-with-{name}", lambda c, field=field: [
        c.post(1), body(1, b"body", end=False), head(1, field)
    ], malformed(1)) for name, field in {
        "upper-case": (b"X-Sum", b"1"), "nul": (b"x-sum", b"\0"),
        "a-pseudo-field": (b":path", b"/"),
        "a-connection-field": (b"connection", b"close"),
    }.items()),
])
def test_fields_are_as_section_8_2_says(client, octets, outcome):
    play(client, octets, outcome)


@pytest.mark.parametrize("octets, outcome", [
    *(case(f"8.3.1-no-{name.decode()[1:]}", lambda c, name=name: [
        head(1, *changed(c, name))
    ], malformed(1)) for name in (b":method", b":scheme", b":path")),
    *(case(f"8.3.1-empty-{name.decode()[1:]}", lambda c, name=name: [
        head(1, *changed(c, name, b""))
    ], malformed(1)) for name in (b":method", b":scheme", b":path")),
    *(case(f"8.3.1-two-of-{name.decode()[1:]}", lambda c, name=name: [
        head(1, *changed(c, name, *[dict(c.fields())[name]] * 2))
    ], malformed(1))
      for name in (b":method", b":scheme", b":path", b":authority")),
    *(case(f"8.3.1-{name.decode()[1:]}-with-a-line-feed",
           lambda c, name=name: [
               head(1, *changed(c, name, dict(c.fields())[name] + b"\nx"))
           ], malformed(1))
      for name in (b":method", b":scheme", b":path", b":authority")),
    case("8.3.1-path-with-nul", lambda c: [
        head(1, *changed(c, b":path", c.target.path + b"\0"))
    ], malformed(1)),
    case("8.3.1-path-without-slash", lambda c: [
        head(1, *changed(c, b":path", c.target.path[1:]))
    ], malformed(1)),
    case("8.3.1-star-is-for-options", lambda c: [
        head(1, *changed(c, b":path", b"*"))
    ], malformed(1)),
    case("8.3.1-options-of-star", lambda c: [head(
        1, (b":method", b"OPTIONS"), *changed(c, b":path", b"*")[1:]
    )], accepted(1)),
    case("8.3.1-path-with-a-query", lambda c: [
        head(1, *changed(c, b":path", c.target.path + b"?a=b&c"))
    ], answered(1)),
    case("8.3.1-host-for-authority", lambda c: [head(
        1, *changed(c, b":authority"), (b"host", c.target.authority)
    )], answered(1)),
    case("8.3.1-host-like-authority", lambda c: [
        c.get(1, (b"host", c.target.authority))
    ], answered(1)),
    case("8.3.1-host-against-authority", lambda c: [
        c.get(1, (b"host", b"elsewhere.example"))
    ], malformed(1)),
    case("8.3.1-authority-with-userinfo", lambda c: [
        head(1, *changed(c, b":authority", b"me@" + c.target.authority))
    ], malformed(1)),
    case("8.3-pseudo-fields-in-any-order", lambda c: [
        head(1, *reversed(c.fields()))
    ], answered(1)),
    case("8.3-pseudo-field-after-another", lambda c: [
        head(1, *c.fields()[:3], (b"x", b"y"), c.fields()[3])
    ], malformed(1)),
    case("8.3-unknown-pseudo-field", lambda c: [
        head(1, (b":unknown", b"x"), *c.fields())
    ], malformed(1)),
    case("8.3-pseudo-field-without-a-name", lambda c: [
        head(1, (b":", b"x"), *c.fields())
    ], malformed(1)),
    case("8.3-pseudo-field-of-responses", lambda c: [
        head(1, (b":status", b"200"), *c.fields())
    ], malformed(1)),
    case("8.3-pseudo-field-in-upper-case", lambda c: [
        head(1, *c.fields()[:3], (b":PATH", c.target.path))
    ], malformed(1)),
    case("8.3-no-fields-at-all", lambda c: [head(1)], malformed(1)),
    case("8441-4-tunnel-to-nobody", lambda c: [head(
        1, (b":method", b"CONNECT"), (b":protocol", b"websocket"),
        *c.fields()[1:],
    )], accepted(1)),
    case("8441-4-tunnel-of-another-kind", lambda c: [head(
        1, (b":method", b"CONNECT"), (b":protocol", b"connect-udp"),
        *c.fields()[1:],
    )], accepted(1)),
    case("8441-4-protocol-without-connect", lambda c: [head(
        1, (b":protocol", b"websocket"), *c.fields(),
    )], malformed(1)),
    *(case(f"8441-4-tunnel-without-{name.decode()[1:]}",
           lambda c, name=name: [head(
               1, (b":method", b"CONNECT"), (b":protocol", b"websocket"),
               *changed(c, name)[1:])], malformed(1))
      for name in (b":scheme", b":path", b":authority")),
    case("8.5-connect-with-scheme-and-path", lambda c: [
        head(1, *c.fields(b"CONNECT"))
    ], malformed(1)),
    case("8.5-connect-without-authority", lambda c: [
        head(1, (b":method", b"CONNECT"))
    ], malformed(1)),
])
def test_requests_are_as_sections_8_3_to_8_5_say(client, octets, outcome):
    play(client, octets, outcome)


def test_8_1_1_a_malformed_body_does_not_harm_other_streams(client):
    client.send(
        HOLD, client.get(1), client.post(3, (b"content-length", b"1")),
        body(3, b"too much"),
    )
    client.assert_malformed(3)
    if not client.goaway:
        client.send(window_update(1, 2**20))
        client.assert_answered(1)


def test_8_1_interim_responses_do_not_end_the_stream(client):
    client.send(client.post(1, (b"expect", b"100-continue")))
    client.until(lambda: client.exchanges[1].heads, "first head")
    client.send(body(1, b"body"))
    exchange = client.answer(1)
    assert exchange.status >= 200
    codes = [int(dict(head)[b":status"]) for head in exchange.heads]
    assert all(code < 200 for code in codes[:-1])


def test_8_1_a_response_to_head_has_no_body(client):
    client.send(head(1, *client.fields(b"HEAD")))
    exchange = client.answer(1)
    length = str(len(client.target.content)).encode()
    assert exchange.body == b""
    assert exchange.fields.get(b"content-length", length) == length


@pytest.mark.parametrize("method, path", [
    pytest.param(b"GET", None, id="8.3.2-a-file"),
    pytest.param(b"HEAD", None, id="8.3.2-a-head"),
    pytest.param(b"GET", b"/no/such/file.txt", id="8.3.2-an-error"),
    pytest.param(b"POST", None, id="8.3.2-a-post"),
])
def test_responses_have_lawful_fields(client, method, path):
    fields = dict(client.fields(method))
    fields[b":path"] = path or client.target.path
    client.send(head(1, *fields.items()))
    answer = client.answer(1).heads[-1]
    names = [name for name, _ in answer]
    assert names[0] == b":status"
    assert [name for name in names if name.startswith(b":")] == [b":status"]
    assert all(name == name.lower() for name in names)
    assert not {b"connection", b"keep-alive", b"transfer-encoding",
                b"upgrade", b"proxy-connection"} & set(names)
    for _, value in answer:
        assert value == value.strip() and not set(value) & set(b"\0\r\n")


def test_8_1_the_length_of_a_response_is_true_for_errors_too(client):
    fields = changed(client, b":path", b"/no/such/file.txt")
    client.send(head(1, *fields))
    exchange = client.answer(1)
    assert exchange.status == 404
    length = int(exchange.fields.get(b"content-length", len(exchange.body)))
    assert length == len(exchange.body)


def test_8_5_connect_is_not_for_a_server_that_is_no_proxy(client):
    client.send(frame(HEADERS, END_HEADERS, 1, block(
        (b":method", b"CONNECT"), (b":authority", b"elsewhere.example:443")
    )))
    exchange = client.exchanges[1]
    client.until(
        lambda: exchange.heads or exchange.reset is not None, "refusal"
    )
    assert exchange.status >= 400 or exchange.reset is not None
    client.assert_alive()


def test_8_6_fifty_streams_at_once_come_whole(client):
    streams = range(1, 101, 2)
    client.send(*map(client.get, streams))
    client.assert_answered(*streams)


# --- 9. Connections ------------------------------------------------------

def test_9_2_tls12_comes_without_compression_and_with_aead(h2_target):
    context = frames.tls_context(version=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ECDHE+AES128:!SHA256:!SHA1")
    with frames.dial(h2_target, context) as tls:
        assert tls.version() == "TLSv1.2"
        assert tls.selected_alpn_protocol() == "h2"
        assert tls.compression() is None
        assert "ECDHE" in tls.cipher()[0] and "GCM" in tls.cipher()[0]


def test_9_2_2_ciphers_of_appendix_a_do_not_carry_h2(h2_target):
    context = frames.tls_context(version=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("AES+SHA1:AES+SHA256:!AESGCM:!AESCCM:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        frames.dial(h2_target, context).close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_9_2_tls_below_12_is_refused(h2_target):
    context = frames.tls_context(version=ssl.TLSVersion.TLSv1_1)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        frames.dial(h2_target, context).close()
