"""Room 2, Messages."""

import ast
import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import termios

import harness
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shimmercat
from shimmercat import (
    MESSAGES,
    CodeSet,
    Console,
    Log,
    LogRecord,
    MalformedRecord,
    Message,
    Repeats,
    Severity,
    wants_colour,
)

VECTOR = bytes.fromhex(
    "6162636465666768 806f6c2a01000000 90d00300 05 569c 0c000000"
    "776f726b65722d3100393030")
REQUEST = LogRecord("w0", 1500000000.25, 5, 50001, (
    "192.0.2.7", "GET", "www.example.com", "/a.css", 200, 1024, 1.25, "h2",
    "static", "br"))
# Whole microseconds until 2096 survive the way through a double unharmed.
MICROSECONDS = st.integers(min_value=0, max_value=4_000_000_000_000_000)
PIECES = st.lists(st.text(st.characters(exclude_characters="\0",
                                        exclude_categories=["Cs"]),
                          min_size=1), max_size=6)


def written_by(console, fd, record):
    """What the console makes of one record."""
    console.write(record)
    return os.read(fd, 65_536).decode()


@contextlib.contextmanager
def pipe():
    """Both ends of a pipe, closed afterwards as far as they are open."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for fd in ends:
            with contextlib.suppress(OSError):
                os.close(fd)


# The wire format


def test_the_published_test_vector_is_packed_and_unpacked():
    record = LogRecord("abcdefgh", 1500000000.25, 5, 40022,
                       ("worker-1", "900"))
    assert record.pack() == VECTOR
    assert LogRecord.unpack(VECTOR) == record


@given(MICROSECONDS, st.sampled_from(sorted(MESSAGES)), PIECES)
def test_a_record_survives_packing(microseconds, code, pieces):
    record = LogRecord("worker-7", microseconds / 1_000_000,
                       code // 10_000, code, tuple(pieces))
    assert LogRecord.unpack(record.pack()) == record


def test_a_short_worker_name_is_padded_and_a_long_one_cut_to_eight_bytes():
    for name, expected in (("w0", "w0"), ("worker-12345", "worker-1")):
        packed = LogRecord(name, 1.0, 5, 50001, ()).pack()
        assert len(packed) == 27
        assert LogRecord.unpack(packed).worker == expected


def test_numbers_become_texts_on_the_way():
    packed = LogRecord("w0", 1.0, 4, 40022, ("w0", 900)).pack()
    assert LogRecord.unpack(packed).pieces == ("w0", "900")


def test_zero_bytes_in_a_piece_do_not_make_two_pieces():
    packed = LogRecord("w0", 1.0, 5, 50001, ("/a\0b", "c")).pack()
    assert packed[27:] == b"/a\\x00b\0c"


def test_lone_surrogates_of_file_names_can_be_packed():
    packed = LogRecord("w0", 1.0, 4, 40013, ("\udcff.css",)).pack()
    assert LogRecord.unpack(packed).pieces == ("\\udcff.css",)


def test_a_giant_piece_is_cut():
    packed = LogRecord("w0", 1.0, 4, 40013, ("x" * 1_000_000,)).pack()
    assert len(packed) == 27 + 65_536
    assert LogRecord.unpack(packed).code == 40013


@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_or_refused_as_malformed(packed):
    try:
        record = LogRecord.unpack(packed)
    except MalformedRecord:
        return
    assert record.line().endswith("\n")
    assert json.loads(record.json())


@given(st.integers(0, len(VECTOR) - 1), st.integers(0, 255))
def test_a_record_with_one_wrong_byte_is_read_or_refused(place, byte):
    packed = VECTOR[:place] + bytes([byte]) + VECTOR[place + 1:]
    try:
        record = LogRecord.unpack(packed)
    except MalformedRecord:
        return
    assert record.line().endswith("\n")
    assert json.loads(record.json())


@pytest.mark.parametrize("packed, reason", [
    (b"", "are no header"),
    (VECTOR[:26], "are no header"),
    (VECTOR[:-1], "not 12"),
    (VECTOR + b"x", "40 bytes, not 39"),
    (VECTOR[:20] + b"\x07" + VECTOR[21:], "severity 7"),
    (VECTOR[:16] + b"\x40\x42\x0f\0" + VECTOR[20:], "1000000"),
    (VECTOR[:8] + b"\xff" * 8 + VECTOR[16:], "out of range"),
])
def test_a_malformed_record_is_refused_with_the_reason(packed, reason):
    with pytest.raises(MalformedRecord, match=reason):
        LogRecord.unpack(packed)


def test_records_back_to_back_are_unpacked_one_after_the_other():
    other = REQUEST._replace(pieces=tuple(map(str, REQUEST.pieces)))
    packed = VECTOR + other.pack() + VECTOR[:-1]
    first, place = LogRecord.unpack_from(packed, 0)
    second, end = LogRecord.unpack_from(packed, place)
    assert (first, place) == (LogRecord.unpack(VECTOR), len(VECTOR))
    assert (second, end) == (other, len(packed) - len(VECTOR) + 1)
    with pytest.raises(MalformedRecord, match="11 bytes, not 12"):
        LogRecord.unpack_from(packed, end)


# The table


def test_every_message_is_declared_in_order_with_its_severity_in_its_code():
    assert list(MESSAGES) == sorted(MESSAGES)
    for code, message in MESSAGES.items():
        assert 0 < code <= 65_535
        assert 0 <= code // 10_000 <= Severity.ERROR
        assert message.meaning and not message.meaning.endswith(".")
        if message.fields:
            assert len(message.fields) == message.format.count("{}")


def test_every_call_says_as_many_pieces_as_its_format_has():
    wrong = []
    for call in ast.walk(ast.parse(harness.PROGRAM.read_text())):
        if not (isinstance(call, ast.Call) and isinstance(
                call.args and call.args[0], ast.Constant)
                and ast.unparse(call.func) == "LOG.say"):
            continue
        form = MESSAGES[call.args[0].value].format
        if (form.count("{}") != len(call.args) - 1
                and not any(isinstance(x, ast.Starred) for x in call.args)):
            wrong.append(f"line {call.lineno}: {form!r}")
    assert not wrong


def test_a_message_with_pieces_missing_or_too_many_is_still_written():
    few = LogRecord("w0", 1.0, 4, 40022, ("w0",))
    many = LogRecord("w0", 1.0, 4, 40022, ("w0", 1, 2))
    assert few.text() == "worker w0 leaves after  s and is replaced"
    assert many.text() == "worker w0 leaves after 1 s and is replaced"


def test_an_undeclared_code_shows_its_pieces():
    assert LogRecord("w0", 1.0, 1, 19999, ("a", "b")).text() == "a b"


# Lines for people and for machines


def test_an_access_line_is_readable():
    with pipe() as (reader, writer):
        line = written_by(Console(writer), reader, REQUEST)
    assert line[10] == " " and line[19:24] == ".250 "
    assert line[24:] == (
        "M50001 w0       192.0.2.7 GET www.example.com/a.css 200 1024 B"
        " 1.25 ms h2 static br\n")


def test_a_json_line_names_the_fields_of_a_request():
    with pipe() as (reader, writer):
        entry = json.loads(written_by(Console(writer, "json"), reader,
                                      REQUEST))
    assert entry["time"] == "2017-07-14T02:40:00.250Z"
    assert entry["worker"] == "w0"
    assert (entry["code"], entry["severity"]) == ("M50001", "info")
    assert entry["message"].startswith("192.0.2.7 GET www.example.com/a.css")
    assert entry["path"] == "/a.css"
    assert (entry["status"], entry["bytes"]) == (200, 1024)
    assert entry["milliseconds"] == 1.25


def test_a_json_line_of_another_message_lists_its_pieces():
    record = LogRecord("w0", 1.0, 4, 40022, ("w0", "900"))
    assert json.loads(record.json())["pieces"] == ["w0", 900]


@pytest.mark.parametrize("path", [
    "/a\n2017-07-14 02:40:00.250 M40022 w0 forged", "/a\r\nx", "/\x1b[2Jx",
    "/\x9b31m", "/\u202egnp.exe", "/a\u2028b", "/\x00", "/\x7f"])
def test_what_a_client_sends_cannot_forge_a_line_or_move_the_cursor(path):
    pieces = REQUEST.pieces[:3] + (path,) + REQUEST.pieces[4:]
    record = REQUEST._replace(pieces=pieces)
    line = record.line()
    assert line.count("\n") == 1 and line[:-1].isprintable()
    machine = record.json()
    assert machine[:-1].isascii() and machine[:-1].isprintable()
    assert json.loads(machine)["path"] == path


def test_a_forged_worker_name_is_escaped_too():
    line = LogRecord("\x1b[2J\n", 1.0, 4, 40022, ("w0", 1)).line()
    assert line[:-1].isprintable()


def test_a_traceback_keeps_its_lines_but_each_is_indented():
    record = LogRecord("w0", 1.0, 6, 60001, ("x", "one\n\x1b[2Jtwo"))
    assert record.line().split("\n")[1:] == [
        "    one", "    \\x1b[2Jtwo", ""]


def test_the_code_is_coloured_by_severity_only_when_wanted():
    assert "\x1b[33mM40022\x1b[0m" in LogRecord(
        "w0", 1.0, 4, 40022, ("w0", 1)).line(colour=True)
    assert "\x1b" not in REQUEST.line()
    assert len({LogRecord("w0", 1.0, x, 40022, ()).line(colour=True)
                for x in (4, 5, 6)}) == 3


@pytest.mark.parametrize("variable, value, wanted", [
    ("TERM", "xterm", True), ("NO_COLOR", "1", False), ("NO_COLOR", "", True),
    ("TERM", "dumb", False)])
def test_colours_are_for_terminals_of_users_who_want_them(
        monkeypatch, variable, value, wanted):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    master, slave = pty.openpty()
    try:
        assert wants_colour(slave) is wanted
    finally:
        os.close(master)
        os.close(slave)
    with pipe() as (_, writer):
        assert not wants_colour(writer)


# Many records at a time


TABLE = [REQUEST, LogRecord("arbiter", 1.0, 4, 40022, ("w0", 900)),
         LogRecord("w1", 2.5, 6, 60001, ("x", "one\ntwo")),
         REQUEST._replace(worker="\x1b[2J", moment=1e9)]


@pytest.mark.parametrize("form, written", [
    ("text", LogRecord.line), ("json", LogRecord.json)])
def test_packed_records_become_the_lines_of_each(form, written):
    packed = b"".join(record.pack() for record in TABLE)
    with pipe() as (reader, writer):
        console = Console(writer, form)
        console.take(packed, "sc_log_w0")
        console.take(packed, "sc_log_w0")
        assert not select.select([reader], [], [], 0)[0]
        assert console.pump()
        lines = os.read(reader, 65_536).decode()
    expected = "".join(written(LogRecord.unpack(record.pack()))
                       for record in TABLE)
    assert lines == 2 * expected


@pytest.mark.parametrize("packed, before, reason", [
    (b"", 0, "0 bytes are no header"),
    (b"garbage", 0, "7 bytes are no header"),
    (VECTOR + b"x", 1, "1 bytes are no header"),
    (2 * VECTOR + VECTOR[:-1], 2, "11 bytes, not 12"),
    (VECTOR + VECTOR[:20] + b"\x07" + VECTOR[21:] + VECTOR, 1,
     "time 5006716800.250000 or severity 7"),
])
def test_what_is_no_record_is_told_after_those_before_it(
        packed, before, reason):
    with pipe() as (reader, writer):
        console = Console(writer)
        console.take(packed, "sc_log_\x1b")
        console.take(VECTOR, "sc_log_w0")
        console.pump()
        lines = os.read(reader, 65_536).decode().splitlines()
    assert [line.split()[2] for line in lines] == [
        *["M40022"] * before, "M60007", "M40022"]
    assert f"on sc_log_\\x1b: {reason}" in lines[before]


def test_lines_go_out_in_few_writes():
    with pipe() as (reader, writer):
        console = Console(writer)
        console.take(REQUEST.pack() * 300, "sc_log_w0")
        console.pump()
        # More than PIPE_BUF at once: it was one write, without waiting.
        assert len(os.read(reader, 65_536).splitlines()) == 300


# --log-codes


CONNECTION = {1, 2, 3, 4, 5, 6, 7, 40010, 40011, 40012, 40016}


@pytest.mark.parametrize("expression, expected", [
    ("all", set(MESSAGES)),
    ("empty", set()),
    ("connection", CONNECTION),
    ("default", {x for x in MESSAGES if x >= 10_000}),
    ("40022", {40022}), ("M40022", {40022}), ("m40022", {40022}),
    ("M00001", {1}), ("1", {1}), ("00001", {1}),
    ("40022+M50001", {40022, 50001}),
    ("all\\connection", set(MESSAGES) - CONNECTION),
    (" all \\ connection + M00001 ", set(MESSAGES) - CONNECTION | {1}),
    ("all\\connection\\40022", set(MESSAGES) - CONNECTION - {40022}),
    ("empty\\all+1", {1}),
    ("+".join(["1"] * 5000), {1}),
])
def test_an_expression_means_a_set_of_codes(expression, expected):
    assert CodeSet.parse(expression) == expected


@pytest.mark.parametrize("expression, place, found", [
    ("", 1, "''"), ("conection", 1, "'conection'"),
    ("all\\conection", 5, "'conection'"), ("all+", 5, "''"),
    ("+all", 1, "''"), ("all++all", 5, "''"), ("all all", 1, "'all all'"),
    ("all-connection", 1, "'all-connection'"), ("M49999", 1, "'M49999'"),
    ("99999", 1, "'99999'"), ("M", 1, "'M'"), ("\u0661", 1, "'\u0661'"),
    ("1" * 5000, 1, "'" + "1" * 40 + "'"), ("(all)", 1, "'(all)'"),
])
def test_a_wrong_expression_is_refused_with_its_place(
        expression, place, found):
    with pytest.raises(ValueError) as refusal:
        CodeSet.parse(expression)
    assert f"character {place}: found {found}, expected all, default," in str(
        refusal.value)


def test_a_misspelt_set_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="nearest known: connection"):
        CodeSet.parse("all\\conection")


@given(st.text(alphabet="al(+\\) M40022connetidfumpy1", max_size=40))
def test_any_expression_is_a_set_or_refused(expression):
    with contextlib.suppress(ValueError):
        assert CodeSet.parse(expression) <= set(MESSAGES)


# The process's log


def test_a_disabled_message_is_never_made_and_an_enabled_one_is():
    log, records = Log(), []
    log.configure(worker="w3", enabled=CodeSet.parse("40022"),
                  sink=records.append)
    log.say(50001, "x")
    log.say(40022, "w3", 900)
    assert [record[2:] for record in records] == [(4, 40022, ("w3", 900))]
    assert records[0].worker == "w3"


def test_before_it_is_configured_the_log_speaks_on_stderr(capsys):
    Log().say(60008, "no socket")
    assert "M60008 main     Redis is away: no socket" in capsys.readouterr(
        ).err


# The console against readers that do not read


def filled(console, count=20_000):
    """Number of records written until the console drops lines, and more."""
    for n in range(count):
        console.write(LogRecord("w0", 1.0, 4, 40013, (f"asset-{n}" * 20,)))
    return count


def drained(reader, console):
    """All lines that come while the console is pumped."""
    received, idle = b"", 0
    while idle < 2:
        ready, _, _ = select.select([reader], [], [], 0.05)
        if ready:
            received += os.read(reader, 65_536)
        idle = 0 if ready or not console.pump() else idle + 1
    return received.decode().splitlines()


def assert_losses_are_told(lines, count):
    """Every line is whole, and those that are missing were counted."""
    told = [line for line in lines if " M60006 " in line]
    assert len(told) == 1
    lost = int(told[0].split()[4])
    assert lost > 0 and lost + len(lines) - 1 == count
    place = lines.index(told[0])
    numbers = [line.rsplit("asset-", 1)[1].split()[0] for line in lines
               if line is not told[0]]
    assert [int(x) for x in numbers] == [
        *range(place), *range(place + lost, count)]


def test_a_full_pipe_drops_the_oldest_lines_and_says_how_many():
    with pipe() as (reader, writer):
        console = Console(writer)
        count = filled(console)
        assert not console.pump()
        assert_losses_are_told(drained(reader, console), count)
        assert console.pump()
        console.close()


def test_a_full_pipe_drops_the_oldest_of_many_lines_and_says_how_many():
    with pipe() as (reader, writer):
        console = Console(writer)
        for first in range(0, 20_000, 50):
            console.take(b"".join(
                LogRecord("w0", 1.0, 4, 40013, (f"asset-{n}" * 20,)).pack()
                for n in range(first, first + 50)), "sc_log_w0")
            console.pump()
        assert_losses_are_told(drained(reader, console), 20_000)
        console.close()


def test_a_stopped_terminal_does_not_stop_the_console():
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    termios.tcflow(slave, termios.TCOOFF)
    console = Console(slave)
    count = filled(console)
    termios.tcflow(slave, termios.TCOON)
    assert_losses_are_told(drained(master, console), count)
    console.close()
    os.close(master)
    os.close(slave)


def test_the_shells_copy_of_the_terminal_stays_blocking():
    master, slave = pty.openpty()
    console = Console(slave)
    assert not fcntl.fcntl(slave, fcntl.F_GETFL) & os.O_NONBLOCK
    console.close()
    os.close(master)
    os.close(slave)


def test_a_vanished_reader_is_given_up_quietly():
    with pipe() as (reader, writer):
        console = Console(writer)
        os.close(reader)
        console.write(REQUEST)
        filled(console, 10)
        assert console.pump()
        console.close()


def test_closing_waits_for_a_slow_reader_only_so_long():
    with pipe() as (_, writer):
        console = Console(writer)
        filled(console)
        console.close(0.05)


def test_a_log_file_is_appended_to_and_opened_again_after_rotation(tmp_path):
    log, rotated = tmp_path / "log", tmp_path / "log.1"
    log.write_text("before\n")
    console = Console(-1, "json", path=log)
    console.write(REQUEST)
    log.rename(rotated)
    console.write(REQUEST)
    console.reopen()
    console.write(REQUEST)
    console.close()
    assert len(rotated.read_text().splitlines()) == 3
    assert len(log.read_text().splitlines()) == 1


def test_a_log_file_that_cannot_be_opened_again_leaves_the_old_one(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    console = Console(-1, path=folder / "log")
    folder.rename(tmp_path / "gone")
    with pytest.raises(OSError):
        console.reopen()
    console.write(REQUEST)
    console.close()
    assert "M50001" in (tmp_path / "gone" / "log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_survived_and_the_loss_bounded():
    with pytest.raises(OSError) as full:
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert full.value.errno == errno.ENOSPC
    console = Console(-1, path="/dev/full")
    filled(console, 10_000)
    assert not console.pump()
    console.close(0)


def test_rows_with_line_ends_are_the_only_kind_that_shows_them():
    assert [code for code, row in MESSAGES.items() if "\n" in row.format
            ] == [60001, 60013, 60016, 60017]
    assert isinstance(MESSAGES[60001], Message)
    assert shimmercat.LOG.enabled


def test_what_repeats_itself_is_said_once_and_then_how_often(said):
    repeats = Repeats(40041, 0.2)
    for reason in ("one", "two", "three"):
        repeats.say("/a", reason)
    repeats.say("/b", "other")
    assert [record.pieces for record in said] == [
        ("/a", "one"), ("/b", "other")]
    harness.eventually(lambda: repeats.say("/b", "more") or len(said) > 2)
    assert said[2].pieces == ("/a", "three (again, 2 times)")


def test_no_repeat_is_lost_and_few_are_remembered(said):
    repeats = Repeats(40041, 1000)
    for n in range(5000):
        for _ in range(3):
            repeats.say(f"/{n}", "reason")
    told = [record.pieces for record in said]
    assert [each for each in told if each[1] == "reason"] == [
        (f"/{n}", "reason") for n in range(5000)]
    counts = [each for each in told if each[1] != "reason"]
    assert 3900 < len(counts) < 5000
    assert set(counts) <= {
        (f"/{n}", "reason (again, 2 times)") for n in range(5000)}
