"""The hot table: which requests it knows, and what it keeps of answers."""

import os
import socket
import sys
import time
import types

import drive
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
WORDS = b"GET\0a.example\0/a.css?v=1\x00200", b"static\0identity"
#: urgency of requests that do not say theirs
USUAL = (3, False)


class Place:
    """A table with one answer, and the file that it is made of."""

    def __init__(self, folder, limit=10**6, logs=True):
        self.path = folder / "a.css"
        self.path.write_bytes(BODY)
        self.table = NATIVE_ENGINE.hot_table(limit, "w0-1", logs)
        self.table.date = b"today"

    def put(self, fields=None, body=BODY, head=HEAD, urgency=USUAL):
        """Keeps an answer of the file as it is."""
        identity = file_identity(os.stat(self.path))
        self.table.put(fields or ASKED, head, body,
                       (os.fsencode(self.path), identity), WORDS, urgency)

    def connect(self, *frames, limits=None):
        """An engine that may answer from the table."""
        engine = NATIVE_ENGINE(limits or EngineLimits())
        engine.answer_from(self.table, "192.0.2.1")
        engine.receive(fr.PREFACE + fr.settings() + b"".join(frames))
        written(engine)
        return engine

    def knows(self, fields):
        """Whether a request is answered from the table."""
        engine = self.connect()
        events = engine.receive(fr.head(1, *fields))
        assert bool(engine.recalled) is not bool(events)
        return not events


class Visitor:
    """A connection whose engine is called by a loop."""

    def __init__(self, place):
        self.engine, self.stream = place.connect(), -1
        self.engine.judged = self.engine.nuisance
        self.ours, self.theirs = socket.socketpair()
        server, self.tls, self.sealed = drive.TLS.meet()
        assert self.engine.attach(server, self.ours.fileno())

    def knows(self, iteration, before=b""):
        """Whether the table has what is asked for, in a round of the loop."""
        self.stream += 2
        heard, self.engine.rests = [], True
        for octets in filter(None, (before, fr.head(self.stream, *ASKED))):
            self.tls.write(octets)
        self.theirs.sendall(self.sealed.read())
        self.engine.wake(1, heard.append, heard.append, 2**20,
                         types.SimpleNamespace(iteration=iteration))
        assert self.engine.rests is not bool(heard)
        return not heard

    def leave(self):
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def visitors(place):
    visitors = Visitor(place), Visitor(place)
    yield visitors
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.put()
    return place


def written(engine, most=2**20):
    """What an engine writes when it may send so much of bodies."""
    engine.serve(most)
    return engine.output()


def frames_of(octets):
    """(kind, stream, payload) of each frame."""
    while octets:
        length = int.from_bytes(octets[:3], "big")
        yield octets[3], octets[8], octets[9:9 + length]
        octets = octets[9 + length:]


def exchange_of(octets):
    """Fields and body of what an engine wrote for stream 1."""
    head, body, decoder = [], b"", hpack.Decoder()
    for kind, stream, payload in frames_of(octets):
        assert stream == 1
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
    assert exchange_of(written(engine)) == (
        (*HEAD, (b"date", b"tomorrow")), BODY)
    assert (engine.recalled, place.table.hits) == (1, 1)


@pytest.mark.parametrize("fields", [
    without(b"cookie"), changed(b"cookie", b"another"),
    [*ASKED, (b"user-agent", b"x"), (b"referer", b"y"), (b"dnt", b"1")],
    *([*ASKED, (b"priority", value)]
      for value in (b"u=0, i", b"i", b"u=7", b"i,u=5", b"u=1, u=2")),
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
    *([*ASKED, (b"priority", value)] for value in (
        b"", b"u", b"u=8", b"u=10", b"u=1;x", b"i=?0", b"i=?1", b"u=1,",
        b"u=1 , i", b"x, i", b"i, " * 99 + b"i")),
    [*ASKED, (b"priority", b"i"), (b"priority", b"i")],
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


def order_of(engine):
    """Streams in the order in which their bodies come."""
    return [stream for kind, stream, _ in frames_of(written(engine))
            if kind == fr.DATA]


def wishes(*fields):
    """A request on stream 1, 3, ... with each of these priorities."""
    return b"".join(
        fr.head(2 * n + 1, *ASKED, *([(b"priority", field)] if field else []))
        for n, field in enumerate(fields))


def test_of_answers_that_wait_the_most_urgent_is_first(place):
    engine = place.connect()
    assert engine.receive(wishes(b"u=5", b"u=2", b"", b"u=0")) == []
    assert (engine.waiting, engine.backlog()) == (4, 0)
    assert order_of(engine) == [7, 3, 5, 1]
    assert (engine.waiting, engine.backlog()) == (0, 8)
    engine = place.connect()
    engine.receive(wishes(b"u=5", b"u=5", b"u=4"))
    engine.reprioritize(1, 0, True)
    engine.reprioritize(99, 0, True)
    assert engine.backlog() == 0
    assert order_of(engine) == [1, 5, 3]


def test_who_says_nothing_gets_the_urgency_that_is_usual(place):
    place.put(urgency=(1, True))
    engine = place.connect()
    engine.receive(wishes(b"u=2", b""))
    assert order_of(engine) == [3, 1]


def test_incremental_answers_take_turns_and_others_follow_each_other(place):
    place.put(body=bytes(40_000))
    engine = place.connect(fr.window_update(0, 2**30))
    engine.receive(wishes(b"u=3", b"u=3"))
    assert order_of(engine) == [1, 1, 1, 3, 3, 3]
    engine = place.connect(fr.window_update(0, 2**30))
    engine.receive(wishes(b"i", b"i"))
    assert order_of(engine) == [1, 3, 1, 3, 1, 3]


def test_no_answer_waits_for_ever_for_more_urgent_ones(place):
    place.put(body=bytes(160_000))
    engine = place.connect(fr.settings((4, 2**30)), fr.window_update(0, 2**30))
    engine.receive(wishes(b"u=0", b"u=0", b"u=7"))
    assert order_of(engine).index(5) < 16


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


def test_one_look_does_for_all_whose_requests_were_there_before_it(
        place, visitors):
    assert visitors[0].knows(7)
    time.sleep(0.02)
    place.path.write_bytes(BODY)
    assert visitors[1].knows(7)
    assert not visitors[1].knows(8)


def test_what_came_behind_the_first_record_may_be_newer_than_a_look(
        place, visitors):
    assert visitors[0].knows(7)
    time.sleep(0.02)
    place.path.write_bytes(BODY)
    assert not visitors[1].knows(7, before=fr.frame(fr.PING, 1, 0, bytes(8)))


def test_a_loop_that_counts_no_rounds_has_all_looked_at(place, visitors):
    assert visitors[0].knows(-1)
    time.sleep(0.02)
    place.path.write_bytes(BODY)
    assert not visitors[1].knows(-1)


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


def test_answers_wait_for_windows(place):
    engine = place.connect(fr.settings((4, 1599)))
    assert engine.receive(fr.head(1, *ASKED)) == []
    assert exchange_of(first := written(engine))[1] == BODY[:1599]
    assert (engine.waiting, engine.backlog(), engine.serve(9)) == (1, 8, 0)
    engine.receive(fr.window_update(1, 1))
    assert engine.backlog() == 3
    assert exchange_of(first + written(engine))[1] == BODY
    assert engine.waiting == 0
    # The connection's 65,535 octets last for 40 of them.
    engine, streams = place.connect(), range(1, 100, 2)
    assert not engine.receive(b"".join(fr.head(n, *ASKED) for n in streams))
    assert order_of(engine) == [*streams[:41]]
    engine.receive(fr.window_update(0, 2**30))
    assert order_of(engine) == [*streams[40:]]


def test_no_more_is_written_than_is_asked_for(place):
    engine = place.connect(fr.window_update(0, 2**30))
    place.put(body=bytes(60_000))
    assert not engine.receive(
        b"".join(fr.head(n, *ASKED) for n in range(1, 20, 2)))
    assert len(engine.output()) < 100
    assert 65536 <= engine.serve(65536) < 65536 + 16384
    assert len(engine.output()) < 65536 + 2 * 16384
    assert engine.waiting == 9
    assert engine.serve(10**7) + 65536 + 16384 > 600_000
    assert engine.waiting == 0


def test_bodies_are_of_a_size_that_many_fit_in(tmp_path):
    place = Place(tmp_path, limit=10**7)
    place.put(body=bytes(1024 * 1024 + 1))
    place.put(body=b"")
    assert len(place.table) == 0
    place.put(body=bytes(1024 * 1024))
    assert len(place.table) == 1


def test_an_answer_outlives_its_place_in_the_table(place):
    engine = place.connect(fr.settings((4, 100)))
    engine.receive(fr.head(1, *ASKED))
    first = written(engine)
    place.table.clear()
    engine.receive(fr.window_update(1, 10_000))
    assert exchange_of(first + written(engine))[1] == BODY


@pytest.mark.parametrize("end", [
    lambda engine: engine.receive(fr.reset(1)),
    lambda engine: engine.abandon(),
    lambda engine: engine.reset(1, 2),
    lambda engine: engine.answer_from(None, ""),
], ids=["client", "abandon", "server", "table"])
def test_an_answer_that_is_broken_off_is_logged_as_cut(place, end):
    engine = place.connect(fr.settings((4, 100)))
    engine.receive(fr.head(1, *ASKED))
    written(engine)
    assert unpacked(place.table.drain()[0]) == []
    end(engine)
    (record,) = unpacked(place.table.drain()[0])
    assert record.pieces[5:6] + record.pieces[7:] == (
        "100", "h2", "cut", "identity")
    assert (engine.waiting, engine.serve(9)) == (0, 0)


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


def test_a_reset_may_come_before_the_answer(place):
    engine = place.connect()
    assert engine.receive(fr.head(1, *ASKED) + fr.reset(1)) == [
        StreamReset(1, 8)]
    assert (engine.waiting, written(engine)) == (0, b"")


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
    written(engine)
    packed, lost = place.table.drain()
    first, second = unpacked(packed)
    for record in first, second:
        assert record[:1] + record[2:4] == ("w0-1", 5, 50001)
        assert before - 0.001 <= record.moment <= time.time() + 0.001
        words = (*WORDS[0].decode().split("\0"), str(len(BODY)),
                 record.pieces[6], "h2", *WORDS[1].decode().split("\0"))
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
                    (os.fsencode(place.path), identity), words, USUAL)
    engine = place.connect()
    for stream in range(1, 801, 2):
        engine.receive(fr.head(stream, *fields))
        written(engine)
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
    (), (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), WORDS),
    (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), WORDS, (3,)),
    (ASKED, HEAD, "text", (b"/", (1, 2, 3, 4, 5)), WORDS, USUAL),
    (ASKED, [HEAD], BODY, (b"/", (1, 2, 3, 4, 5)), WORDS, USUAL),
    (ASKED, (HEAD,), BODY, (b"/", (1, 2, 3, 4, 5)), WORDS, USUAL),
    (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4)), WORDS, USUAL),
    (ASKED, HEAD, BODY, ("/", (1, 2, 3, 4, 5)), WORDS, USUAL),
    (ASKED, HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), ("a", "b"), USUAL),
    ([b"x"], HEAD, BODY, (b"/", (1, 2, 3, 4, 5)), WORDS, USUAL),
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
        place.table.put(ASKED, HEAD, BODY, (b"/\0", (1, 2, 3, 4, 5)), WORDS,
                        USUAL)
    with pytest.raises(ValueError):
        place.table.drop(b"/\0")
