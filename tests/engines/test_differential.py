"""Both engines for HTTP/2 are driven with the same octets and calls.

What they report, what they answer and how they end must agree.  Where the
libraries may differ, TOLERATED says so, and why.  A long search for more:

    SHIMMERCAT_DIFFERENTIAL_EXAMPLES=20000 pytest tests/engines/test_diff*
"""

import collections
import os
import typing

import frames as fr
import hpack
import hyperframe.frame as hf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmercat import (
    NATIVE_ENGINE,
    BodyReceived,
    EngineLimits,
    Http2Engine,
    ProtocolFault,
    RequestRefused,
    RequestStarted,
    StreamGone,
)

pytestmark = pytest.mark.skipif(
    NATIVE_ENGINE is None, reason="the native engine is not built")

GET = [(b":method", b"GET"), (b":scheme", b"https"),
       (b":authority", b"a.example"), (b":path", b"/")]
POST = [(b":method", b"POST"), *GET[1:]]
#: how many conversations to try that are new each time; else it is always
#: the same few of them
EXAMPLES = int(os.environ.get("SHIMMERCAT_DIFFERENTIAL_EXAMPLES", "0"))
LIMITS = EngineLimits(header_bytes=1024, header_count=12, streams=4)


class Side:
    """One engine, and all that it said."""

    def __init__(self, engine_class):
        self.engine = engine_class(LIMITS)
        self._decoder = hpack.Decoder()
        self._decoder.max_header_list_size = 1 << 20
        self.fault = None
        self.said = {}
        #: octets of body that were not given back, by stream
        self.owed = collections.Counter()
        #: 1 when a final head was sent, 2 when the answer is complete
        self.phase = {}

    def send(self, pieces):
        """Events of octets, a fault without its words."""
        events = []
        for piece in pieces:
            for event in self._receive(piece):
                if isinstance(event, ProtocolFault):
                    self.fault = int(event.code)
                    event = event._replace(reason="", code=self.fault)
                if isinstance(event, RequestStarted):
                    self.phase[event.stream] = 0
                if isinstance(event, BodyReceived):
                    self.owed[event.stream] += event.cost
                events.append(event)
        return events

    def _receive(self, piece):
        """All events of a piece, of which one engine takes a part first."""
        events = self.engine.receive(piece)
        while not (self.engine.hungry() or self.engine.closing):
            events += self.engine.receive(b"")
        return events

    def call(self, name, *arguments):
        """What a call gives, StreamGone among it."""
        try:
            return getattr(self.engine, name)(*arguments)
        except StreamGone:
            return StreamGone

    def listen(self):
        """Files what the engine wrote under its streams."""
        octets = memoryview(self.engine.output())
        while octets:
            frame, length = hf.Frame.parse_frame_header(octets[:9])
            frame.parse_body(octets[9:9 + length])
            octets = octets[9 + length:]
            self._file(frame)

    def _file(self, frame):
        if isinstance(frame, hf.WindowUpdateFrame):
            # When a window is given back is up to each; test_engines.py
            # looks whether it is.
            return
        if not frame.stream_id:
            # Among each other, frames of the connection have no order.
            self.said.setdefault(type(frame), []).append(_told(frame))
            return
        said = self.said.setdefault(frame.stream_id, [])
        if isinstance(frame, hf.HeadersFrame):
            head = self._decoder.decode(frame.data, raw=True)
            said.append([(bytes(n), bytes(v)) for n, v in head])
        elif isinstance(frame, hf.DataFrame) and frame.data:
            if not said or not isinstance(said[-1], bytes):
                said.append(b"")
            said[-1] += bytes(frame.data)
        elif isinstance(frame, hf.RstStreamFrame):
            said.append(frame.error_code)
        if "END_STREAM" in frame.flags:
            said.append("end")


def _told(frame):
    """What a frame of the connection says."""
    if isinstance(frame, hf.SettingsFrame):
        return sorted(frame.settings.items()), "ACK" in frame.flags
    if isinstance(frame, hf.GoAwayFrame):
        # nghttp2 does not count a stream that broke the connection.
        last = 0 if frame.error_code else frame.last_stream_id
        return last, frame.error_code
    return frame.opaque_data


streams = st.sampled_from([1, 1, 1, 3, 3, 5, 7, 9, 11, 13, 0, 2, 2**31 - 1])
few = st.sampled_from([1, 1, 1, 3, 3, 5, 7])
lengths = st.sampled_from([0, 1, 3, 5, 100, 2000, 16384])
numbers = st.sampled_from(
    [0, 1, 2, 5, 100, 16383, 16384, 16385, 65535, 2**24 - 1, 2**24,
     2**31 - 1, 2**31, 2**32 - 1])
odd_fields = st.sampled_from([
    (b"x-a", b"b"), (b"cookie", b"a=b"), (b"X", b"y"), (b"te", b"trailers"),
    (b"te", b"gzip"), (b"connection", b"x"), (b"x", b"a\nb"), (b"x", b" a"),
    (b"", b"x"), (b"x", b""), (b"host", b"A.example"), (b"host", b"b"),
    (b"content-length", b"5"), (b"content-length", b"0"),
    (b"content-length", b"3"), (b":path", b"/2"), (b":status", b"200"),
    (b"x" * 257, b"y"), (b":protocol", b"websocket"), (b":authority", b"b"),
    (b"x", b"y" * 900), (b"x", b"y" * 5000)])
requests = st.one_of(
    st.sampled_from([GET, POST, GET[1:], GET[:3], [*GET[:2], GET[3]],
                     [(b":method", b"CONNECT"), GET[2]],
                     [(b":method", b"CONNECT"), *GET[1:]],
                     [(b":method", b"CONNECT"), (b":protocol", b"websocket"),
                      *GET[1:]],
                     [*GET[:3], (b":path", b"")], []]),
    st.lists(odd_fields, max_size=13).map(lambda more: [*POST, *more]),
    st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)),
             max_size=3).map(lambda more: [*GET, *more]),
    st.lists(odd_fields, max_size=2))


@st.composite
def heads(draw):
    """HEADERS, maybe padded, with a priority, or followed by more."""
    fields, stream = draw(requests), draw(streams)
    encoder = hpack.Encoder()
    block = draw(st.sampled_from([
        fr.block(*fields), encoder.encode(fields, huffman=True),
        b"".join(fr.literal(*field, first=0x40) for field in fields)]))
    flags = draw(st.sampled_from([0, fr.END_STREAM, fr.END_STREAM]))
    if draw(st.integers(0, 4)) == 0:
        on = draw(st.sampled_from([0, 1, 3, stream]))
        block = on.to_bytes(4, "big") + b"\x10" + block
        flags |= 0x20
    if draw(st.integers(0, 5)) == 0:
        pad = draw(st.integers(0, 9))
        block = bytes([pad]) + block + bytes(pad)
        flags |= 0x8
    parts = draw(st.integers(1, 3)) if draw(st.booleans()) else 1
    size = len(block) // parts + 1
    cuts = [block[n:n + size] for n in range(0, len(block), size)] or [b""]
    octets = b""
    for n, cut in enumerate(cuts):
        last = fr.END_HEADERS if n == len(cuts) - 1 else 0
        octets += (fr.frame(fr.CONTINUATION, last, stream, cut) if n else
                   fr.frame(fr.HEADERS, flags | last, stream, cut))
    return octets


@st.composite
def bodies(draw):
    """DATA, maybe padded."""
    content, flags = b"x" * draw(lengths), draw(st.sampled_from([0, 0, 1]))
    if draw(st.integers(0, 3)) == 0 and len(content) < 16000:
        pad = draw(st.integers(0, 255))
        content, flags = bytes([pad]) + content + bytes(pad), flags | 8
    return fr.frame(fr.DATA, flags, draw(streams), content)


whole_frames = st.one_of(
    heads(), heads(), heads(), bodies(), bodies(),
    st.builds(fr.reset, streams, numbers),
    st.builds(fr.window_update, streams, numbers),
    st.lists(st.tuples(st.integers(0, 10), numbers), max_size=3).map(
        lambda pairs: fr.settings(*pairs)),
    st.builds(fr.frame, st.just(fr.SETTINGS), st.just(fr.ACK), st.just(0)),
    st.builds(fr.frame, st.just(fr.PING), st.sampled_from([0, 1]),
              st.just(0), st.just(b"12345678")),
    st.builds(lambda code: fr.frame(
        7, 0, 0, bytes(4) + code.to_bytes(4, "big")), numbers),
    st.builds(lambda stream: fr.frame(
        16, 0, 0, stream.to_bytes(4, "big") + b"u=1"), streams),
    st.builds(fr.frame, st.integers(0, 17), st.integers(0, 255), streams,
              st.binary(max_size=12)))

answers = st.sampled_from([
    [(b":status", b"200")], [(b":status", b"200"), (b"content-length", b"6")],
    [(b":status", b"103"), (b"link", b"</a>")], [(b"x-sum", b"1")]])
steps = st.one_of(
    st.tuples(st.just("send"), whole_frames),
    st.tuples(st.just("send"), whole_frames),
    st.tuples(st.just("send"), whole_frames),
    st.tuples(st.just("headers"), few, answers, st.booleans()),
    st.tuples(st.just("body"), few, lengths, st.booleans()),
    st.tuples(st.just("reset"), few, st.sampled_from([0, 1, 7, 8])),
    st.tuples(st.just("consumed"), few, lengths),
    st.tuples(st.just("goodbye"), st.sampled_from([0, 11]),
              st.sampled_from([None, 2**31 - 1])))


class Tolerated(typing.NamedTuple):
    """A step after which two engines need not be compared any more."""

    reason: str
    applies: typing.Callable
    example: tuple  #: frames, of which the last is such a step


def _is(kind, step):
    """Whether a step sends a frame of a kind, or several from one on."""
    return step[0] == "send" and step[1][3:4] == bytes([kind])


def _payloads(octets):
    """What is left of whole frames without their heads."""
    left = b""
    while octets:
        end = 9 + int.from_bytes(octets[:3], "big")
        left, octets = left + octets[9:end], octets[end:]
    return left


def _of_length(step, pure, native):
    # 0x5c is the name's place in the static table.
    names = b"content-length", b"\x5c"
    return (_is(fr.HEADERS, step)
            and any(name in _payloads(step[1]) for name in names)
            and pure[-1:] == [ProtocolFault(1, "")]
            and native[:len(pure) - 1] == pure[:-1])


def _of_padding(step, pure, native):
    return (_is(fr.HEADERS, step) and step[1][4] & 8
            and [ProtocolFault(1, "")] in (pure, native))


def _of_scheme(step, pure, native):
    return (_is(fr.SETTINGS, step) and b"\0\x09\0\0\0" in step[1]
            and (pure, native) == ([], [ProtocolFault(1, "")]))


def _of_measure(step, pure, native):
    return (_is(fr.HEADERS, step) and pure == [ProtocolFault(11, "")]
            and not any(isinstance(event, RequestStarted) for event in native))


def _of_order(step, pure, native):
    return ([type(event) for event in pure[-1:] + native[-1:]]
            == [ProtocolFault] * 2 and pure[:-1] == native[:-1]
            and (pure[-1].code, native[-1].code) in {
                (11, 1), (9, 1), (1, 6), (3, 1), (6, 1)})


TOLERATED = [
    Tolerated("h2 makes a connection error of a content-length that is no "
              "number, contradicts another or an empty body; RFC 9113 section "
              "8.1.1 wants a stream error, section 5.4.1 allows for more",
              _of_length, (fr.head(1, *POST, (b"content-length", b"x")),)),
    Tolerated("hyperframe wants a fragment beside the padding of HEADERS, "
              "where RFC 9113 section 6.2 allows for none, and lets padding "
              "reach into the octets of a priority", _of_padding,
              (fr.frame(fr.HEADERS, 0xd, 1, b"\1\0"),)),
    Tolerated("SETTINGS_NO_RFC7540_PRIORITIES that changes may be an error; "
              "RFC 9218 section 2.1", _of_scheme, (fr.settings((9, 1)),)),
    Tolerated("a header block on a closed stream is decoded and dropped by "
              "nghttp2 without regard to its length", _of_measure,
              (fr.head(1, *GET), fr.head(1, *GET, (b"x", b"y" * 5000)))),
    Tolerated("a frame that breaks two rules: either may be named", _of_order,
              (fr.frame(fr.SETTINGS, 0, 1, b"x"),)),
]


def cut(octets, dice):
    """The octets in random pieces."""
    places = sorted(dice.randrange(len(octets) + 1)
                    for _ in range(dice.randrange(3)))
    return [octets[a:b] for a, b in
            zip([0, *places], [*places, len(octets)], strict=True)]


def take(sides, step, dice):
    """The same step on both sides; what each made of it."""
    kind, *rest = step
    if kind == "send":
        pieces = cut(rest[0], dice)
        return [side.send(pieces) for side in sides]
    if kind != "goodbye" and rest[0] not in sides[0].phase:
        return None, None
    if kind == "body":
        stream, length, end = rest
        if sides[0].phase[stream] != 1:
            return None, None
        for side in sides:
            side.phase[stream] += end
        rooms = [side.engine.sendable(stream) for side in sides]
        assert rooms[0] == rooms[1]
        return [side.call("body", stream, b"z" * min(length, rooms[0]), end)
                for side in sides]
    if kind == "consumed":
        stream, count = rest
        count = min(count, sides[0].owed[stream])
        if not count:
            return None, None
        for side in sides:
            side.owed[stream] -= count
        rest = stream, count
    if kind == "headers":
        stream, fields, end = rest
        phase = sides[0].phase[stream]
        interim = fields[0][1] == b"103"
        if phase != (fields[0][0] != b":status"):
            return None, None
        end = (end or phase == 1) and not interim
        rest = stream, fields, end
        for side in sides:
            side.phase[stream] += 1 - interim + end
    return [side.call(kind, *rest) for side in sides]


@settings(max_examples=EXAMPLES or 200, derandomize=not EXAMPLES)
@given(st.lists(steps, max_size=25), st.randoms(use_true_random=False))
def test_both_engines_do_the_same(conversation, dice):
    sides = [Side(Http2Engine), Side(NATIVE_ENGINE)]
    begin = fr.PREFACE + fr.settings()
    for step in [("send", begin), *conversation]:
        pure, native = take(sides, step, dice)
        if pure != native:
            assert any(row.applies(step, pure, native)
                       for row in TOLERATED), (step, pure, native)
            return
        if sides[0].fault is not None:
            break
        assert sides[0].engine.nuisance == sides[1].engine.nuisance, step
        assert sides[0].engine.midway() == sides[1].engine.midway(), step
        for stream in (1, 3, 5):
            rooms = [side.engine.sendable(stream) for side in sides]
            assert rooms[0] == rooms[1], step
    for side in sides:
        side.listen()
        if side.fault is not None:
            # h2 acknowledges the SETTINGS that it then refuses.
            side.said.pop(hf.SettingsFrame)
    assert sides[0].said == sides[1].said


@pytest.mark.parametrize(
    "row", TOLERATED, ids=lambda row: row.applies.__name__)
def test_what_is_tolerated_has_its_reason_and_happens(row):
    sides = [Side(Http2Engine), Side(NATIVE_ENGINE)]
    for octets in (fr.PREFACE + fr.settings(), *row.example):
        pure, native = [side.send([octets]) for side in sides]
    assert row.reason and pure != native
    assert row.applies(("send", octets), pure, native)


def test_a_field_above_64_kib_ends_the_connection_of_the_native_engine():
    """nghttp2 decodes none (NGHTTP2_HD_MAX_NV, no option changes it), and what
    was not decoded leaves both dynamic tables at odds: RFC 7541 section 2.2
    has no way back.  h2 decodes it, and only the request is refused."""
    octets = fr.block(*GET, (b"x", b"yz" * 33_000))
    parts = [octets[n:n + 16000] for n in range(0, len(octets), 16000)]
    frames = fr.frame(fr.HEADERS, fr.END_STREAM, 1, parts[0]) + b"".join(
        fr.frame(fr.CONTINUATION, fr.END_HEADERS * (part is parts[-1]), 1,
                 part) for part in parts[1:])
    events = []
    for engine_class in Http2Engine, NATIVE_ENGINE:
        engine = engine_class(EngineLimits())
        engine.receive(fr.PREFACE + fr.settings())
        events.append(engine.receive(frames))
    ((refused,), (fault,)) = events
    assert refused == RequestRefused(1, 431)
    assert fault[:1] == (fr.COMPRESSION_ERROR,)
    assert isinstance(fault, ProtocolFault)
