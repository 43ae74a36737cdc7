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


FRESH, UNLISTED, UNREAD, CHANGED, EXPIRED = (
    shimmercat.Verdict[name]
    for name in ("FRESH", "UNLISTED", "UNREAD", "CHANGED", "EXPIRED"))


@pytest.mark.parametrize("verified, listed, verdict", [
    (79.9, None, EXPIRED), (79.9, False, EXPIRED), (79.9, True, EXPIRED),
    (80, None, UNREAD), (80, False, UNLISTED), (80, True, CHANGED),
    (95, None, UNREAD), (95, False, UNLISTED), (95, True, CHANGED),
    (95.1, None, FRESH), (95.1, False, FRESH), (95.1, True, FRESH)])
def test_freshness_follows_the_table_of_the_reference(
        verified, listed, verdict):
    # Of moment 100, with a tOld of 20 and a tNew of 5.
    assert shimmercat.freshness(verified, 80, 95, listed) is verdict


class Origin:
    """A changelist in a dictionary, and a clock for what reads it."""

    def __init__(self):
        self.files, self.asked, self.fails = {}, [], False

    def get(self, path):
        self.asked.append(path)
        if self.fails:
            raise shimmercat.ShimmerCatError("the origin is away")
        return self.files.get(path)

    def change(self, path, moment):
        slot = shimmercat.slot_path(moment)
        line = shimmercat.Change(moment, "m", path).line()
        self.files[slot] = self.files.get(slot, b"") + line


NOW = 1_700_000_000.5


@pytest.fixture
def clock(monkeypatch):
    """A time of day that stands still until it is set."""
    moments = [NOW]
    monkeypatch.setattr(shimmercat.time, "time", lambda: moments[0])
    return moments


def changelist(origin, notes=None, limits=(7200, 20)):
    return shimmercat.Changelist(
        "site", limits, origin.get, notes or shimmercat.LocalNotes())


def kept(name, verified, freshness):
    return shimmercat.Kept(
        {"sha": "0" * 64, "length": 1, "etag": None, "last_modified": None,
         "type": "", "verified": verified}, name, freshness)


def test_all_that_is_not_named_is_verified_when_the_reading_began(clock):
    origin = Origin()
    known = changelist(origin)
    origin.change("b.css", int(NOW) - 10)
    asset, changed = (kept(name, NOW - 100, known)
                      for name in ("a.css", "b.css"))
    assert known.judge(asset, NOW) is UNREAD
    known.update()
    clock[0] += 5
    assert known.judge(asset, clock[0]) is UNLISTED
    assert asset.verified == NOW
    assert known.judge(changed, clock[0]) is CHANGED
    assert known.judge(asset, NOW + 19.9) is FRESH
    clock[0] = NOW + 20
    assert known.judge(asset, clock[0]) is UNREAD


def test_the_first_reading_has_all_slots_of_t_old_and_the_next_has_one(clock):
    origin = Origin()
    known = changelist(origin)
    known.update()
    assert len(origin.asked) in (29, 30)
    clock[0] = (NOW // 256 + 1) * 256 + 30
    known.update()
    del origin.asked[:]
    clock[0] += 21
    known.update()
    assert origin.asked == [shimmercat.slot_path(int(clock[0]))]
    known.update()
    assert len(origin.asked) == 1


def test_a_line_that_comes_late_at_the_end_of_a_slot_is_read(clock):
    origin = Origin()
    known = changelist(origin)
    border = int(NOW // 256 + 1) * 256
    clock[0] = border + 0.5
    known.update()
    asset = kept("a.css", border - 30, known)
    assert known.judge(asset, clock[0]) is UNLISTED
    origin.change("a.css", border - 1)
    clock[0] += 21
    known.update()
    assert known.judge(asset, clock[0]) is CHANGED


def test_who_shares_notes_shares_readings(clock):
    origin, notes = Origin(), shimmercat.LocalNotes()
    origin.change("b.css", int(NOW) - 10)
    changelist(origin, notes).update()
    count = len(origin.asked)
    known = changelist(origin, notes)
    known.update()
    assert len(origin.asked) == count
    assert known.judge(kept("b.css", NOW - 100, known), NOW) is CHANGED


def test_an_origin_that_is_away_leaves_it_unread_and_is_let_alone(clock):
    origin = Origin()
    known = changelist(origin)
    origin.fails = True
    with pytest.raises(shimmercat.ShimmerCatError):
        known.update()
    known.update()
    assert len(origin.asked) == 1
    assert known.judge(kept("a.css", NOW - 100, known), NOW) is UNREAD


def test_too_many_changes_count_as_if_all_had_changed(clock, monkeypatch):
    monkeypatch.setattr(shimmercat, "_MOST_CHANGES", 3)
    origin = Origin()
    known = changelist(origin)
    for n in range(4):
        origin.change(f"{n}.css", int(NOW) - 10)
    known.update()
    assert known.judge(kept("a.css", NOW - 100, known), NOW) is EXPIRED
    assert known.judge(kept("a.css", NOW, known), NOW + 19) is FRESH


def test_a_list_that_is_too_long_counts_as_if_all_had_changed(clock):
    def get(path):
        raise shimmercat.TooManyChanges(path)

    known = shimmercat.Changelist(
        "site", (7200, 20), get, shimmercat.LocalNotes())
    known.update()
    assert known.judge(kept("a.css", NOW - 100, known), NOW) is EXPIRED
    assert known.judge(kept("b.css", NOW, known), NOW) is FRESH


def test_very_long_times_are_not_read_whole(clock):
    origin = Origin()
    known = changelist(origin, limits=(10 ** 9, 20))
    known.update()
    assert len(origin.asked) <= 66
    assert known.judge(kept("a.css", NOW - 10_000, known), NOW) is UNLISTED
    assert known.judge(kept("a.css", NOW - 20_000, known), NOW) is EXPIRED


@pytest.mark.parametrize("note", [
    b"", b"7", b"[1]", b"[1, 2, 3]", b'["a", "b", {}]', b"{}", b"\xff"])
def test_notes_of_others_that_make_no_sense_are_read_anew(clock, note):
    origin, notes = Origin(), shimmercat.LocalNotes()
    notes.write("changes_site", note, 100)
    known = changelist(origin, notes)
    known.update()
    assert origin.asked
    assert known.judge(kept("a.css", NOW - 100, known), NOW) is UNLISTED


@given(verified=some.floats(0, 100), change=some.integers(0, 99),
       reading=some.integers(0, 100))
def test_an_edit_never_hides_behind_a_reading(verified, change, reading):
    changes = shimmercat.Changes(0, 0, {}).followed_by(
        0, reading, [shimmercat.Change(change, "m", "a")] * (
            change < reading), 0)
    if verified <= change < reading:
        assert changes.names("a", verified)
    elif change + 2 < verified:
        assert not changes.names("a", verified)


def test_ten_thousand_unchanged_assets_cost_one_reading_in_t_new(clock):
    origin = Origin()
    known = changelist(origin)
    assets = [kept(f"{n}.css", NOW - 100, known) for n in range(10_000)]
    known.update()
    del origin.asked[:]
    for _ in range(5):
        clock[0] += 20
        for asset in assets:
            if known.judge(asset, clock[0]) is UNREAD:
                known.update()
            assert known.judge(asset, clock[0]) in (UNLISTED, FRESH)
    # Five files, and one more where a slot ended.
    assert len(origin.asked) in (5, 6)


def test_an_origin_that_cannot_be_read_is_said_once(clock, said):
    origin = Origin()
    known = changelist(origin)
    origin.fails = True
    for _ in range(3):
        with pytest.raises(shimmercat.ShimmerCatError):
            known.update()
        known._pause = shimmercat.Deadline(0)
    assert [record.code for record in said] == [40043]
    origin.fails = False
    known.update()
    assert known.judge(kept("a.css", NOW - 100, known), NOW) is UNLISTED


def test_a_clock_that_is_set_back_leaves_nothing_fresh_for_long(clock):
    origin = Origin()
    known, lifetime = changelist(origin), shimmercat.Lifetime(60)
    known.update()
    by_list, by_age = (kept("a.css", NOW - 1, how)
                       for how in (known, lifetime))
    assert known.is_fresh(by_list) and lifetime.is_fresh(by_age)
    clock[0] -= 3600
    assert not known.is_fresh(by_list) and not lifetime.is_fresh(by_age)
    count = len(origin.asked)
    known.update()
    assert len(origin.asked) > count
    by_list.verified = clock[0] - 100
    assert known.judge(by_list, clock[0]) is UNLISTED
