"""The hot table: which requests it knows, and what it keeps of answers."""

import os
import sys
import time

import frames as fr
import hpack
import pytest

from shimmercat import (
    LOG,
    NATIVE_ENGINE,
    EngineLimits,
    LogRecord,
    RequestStarted,
    StreamReset,
    file_identity,
)

pytestmark = pytest.mark.skipif(
    NATIVE_ENGINE is None, reason="the native engine is not built")

ASKED = [(b":method", b"GET"), (b":scheme", b"https"),
         (b":authority", b"a.example:443"), (b":path", b"/a.css?v=1"),
         (b"accept", b"text/css"), (b"accept-encoding", b"br"),
         (b"cookie", b"secret")]
HEAD = ((b":status", b"200"), (b"etag", b'"x"'))
BODY = b"p { margin: 0 }\n" * 100
WORDS = (b"GET\0a.example\0/a.css?v=1\x00200\x001600", b"h2\0static\0identity")


class Place:
    """A table with one answer, and the file that it is made of."""

    def __init__(self, folder, limit=10**6, logs=True):
        self.path = folder / "a.css"
        self.path.write_bytes(BODY)
        self.table = NATIVE_ENGINE.hot_table(limit, "w0-1", logs)
        self.table.date = b"today"

    def put(self, fields=None, body=BODY, head=HEAD):
        """Keeps an answer of the file as it is."""
        identity = file_identity(os.stat(self.path))
        self.table.put(fields or ASKED, head, body,
                       (os.fsencode(self.path), identity), WORDS)

    def connect(self, *frames, limits=None):
        """An engine that may answer from the table."""
        engine = NATIVE_ENGINE(limits or EngineLimits())
        engine.answer_from(self.table, "192.0.2.1")
        engine.is_free = True
        engine.receive(fr.PREFACE + fr.settings() + b"".join(frames))
        engine.output()
        return engine

    def knows(self, fields):
        """Whether a request is answered from the table."""
        engine = self.connect()
        events = engine.receive(fr.head(1, *fields))
        assert bool(engine.recalled) is not bool(events)
        return not events


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.put()
    return place


def exchange_of(octets):
    """Fields and body of what an engine wrote for stream 1."""
    head, body, decoder = [], b"", hpack.Decoder()
    while octets:
        length, kind = int.from_bytes(octets[:3], "big"), octets[3]
        assert octets[5:9] == b"\0\0\0\1"
        payload, octets = octets[9:9 + length], octets[9 + length:]
        if kind == fr.HEADERS:
            head += decoder.decode(payload, raw=True)
        else:
            body += payload
    return tuple((bytes(name), bytes(value)) for name, value in head), body


def unpacked(packed):
    """The records that lie back to back."""
    records, place = [], 0
    while place < len(packed):
        record, place = LogRecord.unpack_from(packed, place)
        records.append(record)
    return records


def without(name):
    return [field for field in ASKED if field[0] != name]


def changed(name, value):
    return [(key, value if key == name else old) for key, old in ASKED]


def test_the_answer_is_sent_whole_with_the_date_of_the_moment(place):
    engine = place.connect()
    place.table.date = b"tomorrow"
    assert engine.receive(fr.head(1, *ASKED)) == []
    assert exchange_of(engine.output()) == (
        (*HEAD, (b"date", b"tomorrow")), BODY)
    assert (engine.recalled, place.table.hits) == (1, 1)


@pytest.mark.parametrize("fields", [
    without(b"cookie"), changed(b"cookie", b"another"),
    [*ASKED, (b"user-agent", b"x"), (b"referer", b"y"), (b"dnt", b"1")],
    [*ASKED, (b"priority", b"u=0, i")], [*ASKED, (b"priority", b"i")],
    [*ASKED, (b"te", b"trailers")], [*ASKED, (b"cookie", b"more")],
], ids=str)
def test_a_request_is_the_same_whatever_idle_fields_it_has(place, fields):
    assert place.knows(fields)


@pytest.mark.parametrize("fields", [
    without(b"accept"), without(b"accept-encoding"), without(b":authority"),
    changed(b"accept", b""), changed(b"accept", b"Text/css"),
    changed(b"accept-encoding", b"gzip"), changed(b":path", b"/a.css"),
    changed(b":path", b"/A.css?v=1"), changed(b":authority", b"a.example"),
    changed(b":method", b"HEAD"), changed(b":scheme", b"http"),
    [*ASKED, (b"accept", b"text/css")],
    [*ASKED, (b"priority", b"u=5")], [*ASKED, (b"priority", b"i, u=7")],
    *([*ASKED, (name, b"1")] for name in (
        b"range", b"if-range", b"if-none-match", b"if-match",
        b"if-modified-since", b"if-unmodified-since", b"expect",
        b"available-dictionary", b"dictionary-id", b"sec-ch-width",
        b"sec-ch-dpr", b"authorization", b"x-other")),
    [*ASKED, (b"content-length", b"0")],
    [*ASKED, (b"host", b"a.example:443")],
], ids=str)
def test_what_may_be_answered_otherwise_is_for_python(place, fields):
    assert not place.knows(fields)
    before = len(place.table)
    # Nor is it kept, if it was the first that was asked, under another key.
    place.put(fields)
    assert place.knows(ASKED)
    assert place.knows(fields) is (len(place.table) > before)


def test_a_missing_field_is_no_empty_one(tmp_path):
    place = Place(tmp_path)
    place.put(without(b"accept"))
    assert not place.knows(changed(b"accept", b""))
    place.put(changed(b"accept", b""))
    assert len(place.table) == 2


def test_a_request_with_a_body_is_for_python(place):
    engine = place.connect()
    (event,) = engine.receive(
        fr.frame(fr.HEADERS, fr.END_HEADERS, 1, fr.block(*ASKED)))
    assert event == RequestStarted(1, ASKED, False)


def test_nothing_overtakes_what_waits_to_be_sent(place):
    engine = place.connect()
    engine.is_free = False
    assert engine.receive(fr.head(1, *ASKED))
    engine.is_free = True
    assert not engine.receive(fr.head(3, *ASKED))


def test_a_priority_that_came_early_is_for_python(place):
    early = fr.frame(fr.PRIORITY_UPDATE, 0, 0, b"\0\0\0\5u=1")
    engine = place.connect(early)
    assert not engine.receive(fr.head(1, *ASKED))
    assert engine.receive(fr.head(5, *ASKED))
    assert not engine.receive(fr.head(7, *ASKED))


@pytest.mark.parametrize("change", [
    lambda path: path.write_bytes(BODY),
    lambda path: path.unlink(),
    lambda path: os.utime(path),
    lambda path: path.chmod(0o600),
    lambda path: path.rename(path.with_suffix(".old")),
], ids=["written", "gone", "touched", "ctime", "renamed"])
def test_a_changed_file_ends_all_that_was_made_of_it(place, change):
    place.put(without(b"accept"))
    # A tick of the file system's clock has to pass.
    time.sleep(0.02)
    change(place.path)
    assert not place.knows(ASKED)
    assert len(place.table) == 0


def test_what_is_dropped_is_asked_of_python(place):
    place.put(without(b"accept"))
    assert place.table.drop(b"/another") is False
    assert len(place.table) == 2
    path = os.fsencode(place.path)
    assert place.table.drop(path) is False
    assert (len(place.table), place.knows(ASKED)) == (0, False)
    place.put()
    assert place.knows(ASKED)
    assert [place.table.drop(path) for _ in range(2)] == [True, False]
    place.put()
    place.table.clear()
    assert (len(place.table), place.knows(ASKED)) == (0, False)


def test_windows_must_take_the_whole_answer(place):
    for pairs in [(4, 1599)], [(4, 0)]:
        engine = place.connect()
        engine.receive(fr.settings(*pairs))
        assert engine.receive(fr.head(1, *ASKED))
    engine = place.connect(fr.settings((4, 1600)))
    engine.receive(fr.settings((4, 1600)))
    assert not engine.receive(fr.head(1, *ASKED))
    # The connection's 65,535 octets last for 40 of them.
    engine, streams = place.connect(), range(1, 100, 2)
    events = engine.receive(b"".join(fr.head(n, *ASKED) for n in streams))
    assert [event.stream for event in events] == [*streams[40:]]


def test_output_that_nobody_takes_is_bounded(place):
    engine = place.connect(fr.window_update(0, 2**30))
    place.put(body=bytes(60_000))
    events = engine.receive(
        b"".join(fr.head(n, *ASKED) for n in range(1, 20, 2)))
    assert [event.stream for event in events] == [13, 15, 17, 19]
    assert len(engine.output()) < 384 * 1024
    assert not engine.receive(fr.head(21, *ASKED))


def test_bodies_are_of_a_size_that_goes_at_once(place):
    place.table.clear()
    place.put(body=bytes(64 * 1024 + 1))
    place.put(body=b"")
    assert len(place.table) == 0
    place.put(body=bytes(64 * 1024))
    assert len(place.table) == 1


def test_limits_of_streams_and_goodbyes_hold(place):
    engine = place.connect(limits=EngineLimits(streams=1))
    engine.receive(fr.head(1, *without(b"accept")))
    assert engine.receive(fr.head(3, *ASKED)) == []
    assert (engine.recalled, engine.nuisance) == (0, 15)
    engine = place.connect(fr.head(1, *ASKED))
    engine.goodbye()
    assert engine.receive(fr.head(3, *ASKED)) == []
    assert engine.recalled == 1


def test_malformed_requests_do_not_come_so_far(place):
    engine = place.connect()
    assert not engine.receive(fr.head(1, *ASKED, (b"X", b"y")))
    assert (engine.recalled, engine.nuisance) == (0, 15)


def test_a_reset_finds_the_stream_closed(place):
    engine = place.connect()
    events = engine.receive(fr.head(1, *ASKED) + fr.reset(1))
    assert not [x for x in events if not isinstance(x, StreamReset)]
    assert exchange_of(engine.output())[1] == BODY


def test_the_least_used_answers_go_first(tmp_path):
    place = Place(tmp_path, limit=10_000)

    def asked(number):
        return changed(b":path", b"/%d.css" % number)
    for number in range(3):
        place.put(asked(number))
    assert place.knows(asked(0))
    for number in range(3, 6):
        place.put(asked(number))
        assert place.knows(asked(0))
    assert not place.knows(asked(1))
    assert len(place.table) == 4
    for number in range(3000):
        place.put(asked(number), b"x")
    assert len(place.table) < 20
    place = Place(tmp_path)
    for number in range(3000):
        place.put(asked(number), b"x")
    assert len(place.table) < 2048
    huge = Place(tmp_path, limit=10**9)
    for number in range(3000):
        huge.put(asked(number), b"x")
    assert len(huge.table) == 2048


def test_each_answer_leaves_a_record_as_python_would_write_it(place):
    engine = place.connect()
    before = time.time()
    engine.receive(fr.head(1, *ASKED) + fr.head(3, *ASKED))
    packed, lost = place.table.drain()
    first, second = unpacked(packed)
    for record in first, second:
        assert record[:1] + record[2:4] == ("w0-1", 5, 50001)
        assert before - 0.001 <= record.moment <= time.time() + 0.001
        words = (*WORDS[0].decode().split("\0"), record.pieces[6],
                 *WORDS[1].decode().split("\0"))
        assert record.pieces == ("192.0.2.1", *words)
        assert 0 <= float(record.pieces[6]) < 5000
        assert LOG.record(50001, *record.pieces)._replace(
            worker="w0-1", moment=record.moment).pack() == record.pack()
    assert (lost, place.table.drain()) == (0, (b"", 0))


def test_records_that_nobody_takes_are_counted(tmp_path):
    place = Place(tmp_path)
    path = b"/" + b"x" * 1900
    words = (path * 30, b"")
    identity = file_identity(os.stat(place.path))
    fields = changed(b":path", path)
    place.table.put(fields, HEAD, b"x",
                    (os.fsencode(place.path), identity), words)
    engine = place.connect()
    for stream in range(1, 801, 2):
        engine.receive(fr.head(stream, *fields))
        engine.output()
    packed, lost = place.table.drain()
    assert len(packed) <= 16 * 1024 * 1024
    assert lost > 0
    assert len(unpacked(packed)) + lost == 400


def test_without_log_lines_there_are_no_records(tmp_path):
    place = Place(tmp_path, logs=False)
    place.put()
    assert place.knows(ASKED)
    assert place.table.drain() == (b"", 0)


def test_what_is_put_in_is_let_go_of(place):
    body, head = b"body" * 50, (*HEAD, (b"x-name" * 3, b"value" * 30))
    given = [body, head, head[2][0], ASKED, ASKED[6][1], place.table]

    def counts():
        return [sys.getrefcount(x) for x in given]
    before = counts()
    place.put(body=body, head=head)
    # The request, whose cookies are nobody's business, is not held.
    assert counts()[3:5] == before[3:5]
    engine = place.connect(fr.head(1, *ASKED))
    assert engine.recalled == 1
    place.table.clear()
    engine.answer_from(None, "")
    assert counts() == before


@pytest.mark.parametrize("arguments", [
    (), (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4, 5))),
    (ASKED, HEAD, "text", (b"/", (1, 2, 3, 4, 5)), WORDS),
    (ASKED, [HEAD], BODY, (b"/", (1, 2, 3, 4, 5)), WORDS),
    (ASKED, (HEAD,), BODY, (b"/", (1, 2, 3, 4, 5)), WORDS),
    (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4)), WORDS),
    (ASKED, HEAD, BODY, ("/", (1, 2, 3, 4, 5)), WORDS),
    (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), ("a", "b")),
    ([b"x"], HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), WORDS),
], ids=lambda arguments: str(arguments)[-40:])
def test_a_wrong_call_is_a_type_error_and_changes_nothing(place, arguments):
    with pytest.raises(TypeError):
        place.table.put(*arguments)
    with pytest.raises(TypeError):
        place.table.date = "today"
    with pytest.raises(TypeError):
        place.table.drop("/")
    assert place.knows(ASKED)


def test_a_table_must_be_one_and_zero_octets_are_in_no_path(place):
    engine = place.connect()
    for arguments in ((), (place.table,), ({}, "a"), (place.table, b"a")):
        with pytest.raises(TypeError):
            engine.answer_from(*arguments)
    with pytest.raises(ValueError):
        place.table.put(ASKED, HEAD, BODY, (b"/\0", (1, 2, 3, 4, 5)), WORDS)
    with pytest.raises(ValueError):
        place.table.drop(b"/\0")
