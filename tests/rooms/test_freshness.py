"""Room 10d: which copies of a remote file are still good."""

import calendar
import os

import pytest
from hypothesis import given
from hypothesis import strategies as some

import shimmercat

FILE_NAMES = some.binary(min_size=1, max_size=40).filter(
    lambda name: not set(name) & {0} and not name.startswith(b"/"))


def test_the_worked_example_of_the_reference_names_three_files():
    first = calendar.timegm((2018, 1, 22, 13, 45, 0))
    last = calendar.timegm((2018, 1, 22, 13, 50, 0))
    assert (first, last) == (0x5a65eadc, 0x5a65ec08)
    assert [shimmercat.slot_path(slot)
            for slot in shimmercat.slots_between(first, last)] == [
        "__sc_changelist__/0/5a/65/ea", "__sc_changelist__/0/5a/65/eb",
        "__sc_changelist__/0/5a/65/ec"]


@pytest.mark.parametrize("moment, path", [
    (0, "0/00/00/00"), (255, "0/00/00/00"), (256, "0/00/00/01"),
    (2 ** 32 - 1, "0/ff/ff/ff"), (2 ** 32, "1/00/00/00")])
def test_octets_are_two_lower_case_digits(moment, path):
    assert shimmercat.slot_path(moment) == f"__sc_changelist__/{path}"


@given(first=some.integers(0, 2 ** 33), seconds=some.integers(0, 5000),
       at=some.floats(0, 1))
def test_every_moment_of_a_span_lies_in_one_of_its_slots(first, seconds, at):
    slots = shimmercat.slots_between(first, first + seconds)
    assert shimmercat.slot_path(first + int(seconds * at)) in set(
        map(shimmercat.slot_path, slots))


@given(moment=some.integers(0, 2 ** 33), event=some.sampled_from("cmd"),
       name=FILE_NAMES)
def test_a_line_is_read_as_it_was_written_whatever_the_name(
        moment, event, name):
    change = shimmercat.Change(moment, event, os.fsdecode(name))
    line = change.line()
    assert line.isascii() and line.count(b"\n") == 1
    assert list(shimmercat.changes_in(line, moment)) == [change]


@pytest.mark.parametrize("line, change", [
    (b"dc m css/a%20b.css", (0x5a65eadc, "m", "css/a b.css")),
    (b"DC d /a.css", (0x5a65eadc, "d", "a.css")),
    (b"dc c a.css\r", (0x5a65eadc, "c", "a.css")),
    (b"css/main.css", (0x5a65eaff, "m", "css/main.css")),
    (b"a b/c.css", (0x5a65eaff, "m", "a b/c.css")),
    (b"dc x a.css", (0x5a65eaff, "m", "dc x a.css")),
    ("\N{SNOWMAN}.png".encode(), (0x5a65eaff, "m", "\N{SNOWMAN}.png")),
])
def test_lines_of_other_writers_are_understood(line, change):
    assert list(shimmercat.changes_in(line, 0x5a65eadc)) == [change]


@given(some.binary(max_size=200))
def test_any_octets_are_read_without_an_error(content):
    for change in shimmercat.changes_in(content, 0x5a65ea00):
        assert change.path and 0x5a65ea00 <= change.moment <= 0x5a65eaff
