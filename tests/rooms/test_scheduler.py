"""Room 6, Scheduler."""

import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import Scheduler, Urgency

USUAL = Urgency()
TURN = 16384

#: (field, urgency), the examples of RFC 9218 and what breaks its rules
PRIORITY_FIELDS = [
    (None, (3, False)),
    (b"", (3, False)),
    (b"u=0", (0, False)),  # section 4.1, a style sheet
    (b"u=5, i", (5, True)),  # section 4.2, an image
    (b"i", (3, True)),
    (b"i=?0", (3, False)),
    (b"i=?1", (3, True)),
    (b"u=7", (7, False)),
    (b"u=8", (3, False)),
    (b"u=-1", (3, False)),
    (b"u=-0", (0, False)),
    (b"u=07", (7, False)),
    (b"u=1.0", (3, False)),
    (b"u", (3, False)),
    (b"u=", (3, False)),
    (b"u=?1", (3, False)),
    (b"i=1", (3, False)),
    (b"i=yes, u=2", (2, False)),
    (b"u=2;x=9, i;y", (2, True)),
    (b"u=1, u=6", (6, False)),
    (b"U=1", (3, False)),
    (b"ui=1", (3, False)),
    (b'x="a, u=1", i', (3, True)),
    (b'x="a\\", u=1", u=4', (4, False)),
    (b"x=(1 2), u=2", (2, False)),
    (b"\tu=1\t,\ti", (1, True)),
    (b"u=1,", (1, False)),
    (b"\x00\xff=,,;u=", (3, False)),
    (b"u=1" + b" " * 300, (3, False)),
]

streams = st.integers(0, 40).map(lambda n: 2 * n + 1)
urgencies = st.builds(Urgency, st.integers(0, 7), st.booleans())
bodies = st.dictionaries(
    streams,
    st.tuples(urgencies, st.integers(1, 10 * TURN)),
    min_size=1,
    max_size=12,
)


def able(stream):
    return TURN


def waiting(streams):
    """A scheduler in which `streams`, {number: urgency}, wait."""
    scheduler = Scheduler()
    for stream, urgency in streams.items():
        scheduler.add(stream, urgency)
    return scheduler


def turns(scheduler, count, sendable=able):
    return [scheduler.next(sendable)[0] for _ in range(count)]


@pytest.mark.parametrize("field, expected", PRIORITY_FIELDS)
def test_a_priority_field_says_what_rfc_9218_says(field, expected):
    assert Urgency.parse(field, USUAL) == expected


def test_a_response_overrides_only_what_it_mentions():
    # RFC 9218 section 8
    asked = Urgency.parse(b"u=5, i", USUAL)
    assert Urgency.parse(b"u=1", asked) == (1, True)
    assert Urgency.parse(b"i=?0", asked) == (5, False)


@given(st.binary() | st.text("ui=?01 ,;\"\\-9").map(str.encode), urgencies)
def test_no_priority_field_raises_or_leaves_the_range(field, default):
    level, incremental = Urgency.parse(field, default)
    assert 0 <= level <= 7
    assert isinstance(incremental, bool)


def test_nobody_waits_in_an_empty_scheduler():
    scheduler = Scheduler()
    assert scheduler.next(able) is None
    assert len(scheduler) == 0
    scheduler.remove(1)
    scheduler.reprioritize(1, USUAL)
    assert len(scheduler) == 0


def test_a_stream_alone_gets_all_it_can_send():
    assert waiting({1: USUAL}).next(lambda stream: 10**9) == (1, 10**9)


def test_a_turn_among_others_is_one_frame():
    scheduler = waiting({1: USUAL, 3: USUAL})
    assert scheduler.next(lambda stream: 10**9) == (1, TURN)


def test_without_incremental_the_lowest_stream_is_finished_first():
    scheduler = waiting({5: USUAL, 1: USUAL, 3: USUAL})
    assert turns(scheduler, 4) == [1, 1, 1, 1]
    scheduler.remove(1)
    assert turns(scheduler, 3) == [3, 3, 3]


def test_incremental_streams_take_turns():
    scheduler = waiting({n: Urgency(3, True) for n in (5, 1, 3)})
    assert turns(scheduler, 6) == [5, 1, 3, 5, 1, 3]


def test_both_kinds_of_one_level_take_turns():
    image = Urgency(3, True)
    scheduler = waiting({1: USUAL, 3: USUAL, 5: image, 7: image})
    assert turns(scheduler, 6) == [1, 5, 7, 1, 5, 7]


def test_an_urgent_stream_goes_before_those_that_wait():
    scheduler = waiting({1: Urgency(5), 3: Urgency(5)})
    assert turns(scheduler, 2) == [1, 1]
    scheduler.add(9, Urgency(0))
    assert turns(scheduler, 3) == [9, 9, 9]


def test_a_stream_without_a_window_keeps_its_place():
    scheduler = waiting({n: Urgency(3, True) for n in (1, 3, 5)})
    assert turns(scheduler, 2, {1: 0, 3: 100, 5: 100}.get) == [3, 5]
    assert turns(scheduler, 1) == [1]


def test_nothing_is_sent_when_no_window_is_open():
    scheduler = waiting({1: USUAL, 3: Urgency(0, True)})
    assert scheduler.next(lambda stream: 0) is None
    assert len(scheduler) == 2


def test_a_new_priority_acts_at_once():
    scheduler = waiting({1: USUAL, 3: USUAL})
    scheduler.reprioritize(3, Urgency(1))
    assert turns(scheduler, 2) == [3, 3]
    scheduler.reprioritize(3, Urgency(6, True))
    assert turns(scheduler, 2) == [1, 1]
    scheduler.remove(1)
    assert turns(scheduler, 1) == [3]


def test_adding_a_stream_again_does_not_cost_its_turn():
    scheduler = waiting({n: Urgency(3, True) for n in (1, 3)})
    scheduler.add(1, Urgency(3, True))
    assert len(scheduler) == 2
    assert turns(scheduler, 1) == [1]


def test_the_reserved_turn_is_not_lost_while_the_connection_is_blocked():
    scheduler = waiting({1: Urgency(0), 3: Urgency(7)})
    served = []
    for _ in range(4):
        served += turns(scheduler, 15)
        assert scheduler.next(lambda stream: 0) is None
    assert served.count(3) == 60 // 16


@given(bodies, st.integers(0, 2**32))
def test_every_byte_is_sent_exactly_once(bodies, seed):
    chance = random.Random(seed)
    scheduler = waiting({n: urgency for n, (urgency, _) in bodies.items()})
    left = {stream: size for stream, (_, size) in bodies.items()}
    sent = collections.Counter()
    while left:
        window = {n: chance.choice((0, 1, 700, TURN, 10**6)) for n in left}
        turn = scheduler.next(lambda n: min(window[n], left[n]))
        if turn is None:
            assert not any(window.values())
            continue
        stream, count = turn
        assert 0 < count <= min(window[stream], left[stream])
        sent[stream] += count
        left[stream] -= count
        if not left[stream]:
            del left[stream]
            scheduler.remove(stream)
    assert sent == {n: size for n, (_, size) in bodies.items()}
    assert len(scheduler) == 0


@given(st.dictionaries(streams, urgencies, min_size=2, max_size=12))
def test_fifteen_of_sixteen_turns_go_to_the_most_urgent_level(wanted):
    served = turns(waiting(wanted), 160)
    top = min(urgency.level for urgency in wanted.values())
    urgent = [wanted[stream].level == top for stream in served]
    assert sum(urgent) >= 150


@given(st.dictionaries(streams, urgencies, min_size=2, max_size=12))
def test_nobody_waits_longer_than_sixteen_turns_for_each_stream(wanted):
    bound = 16 * len(wanted)
    served = turns(waiting(wanted), 3 * bound)
    for start in range(2 * bound):
        assert set(served[start:start + bound]) == set(wanted)


@given(st.sets(streams, min_size=2, max_size=12), st.integers(1, 20))
def test_incremental_streams_share_fairly(numbers, rounds):
    wanted = {stream: Urgency(3, True) for stream in numbers}
    served = collections.Counter(turns(waiting(wanted), 16 * rounds))
    shares = [served[stream] for stream in wanted]
    # the reserved turns come on top of the shares
    assert max(shares) - min(shares) <= 1 + rounds


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("add", "reprioritize", "remove", "next")),
            streams,
            urgencies,
        ),
        max_size=60,
    )
)
def test_any_sequence_of_calls_keeps_the_books_right(calls):
    scheduler, known = Scheduler(), {}
    for call, stream, urgency in calls:
        if call == "add":
            scheduler.add(stream, urgency)
            known[stream] = urgency
        elif call == "reprioritize":
            scheduler.reprioritize(stream, urgency)
            known.update({stream: urgency} if stream in known else {})
        elif call == "remove":
            scheduler.remove(stream)
            known.pop(stream, None)
        else:
            turn = scheduler.next(able)
            assert (turn is None) == (not known)
            assert turn is None or turn[0] in known
        assert len(scheduler) == len(known)


@pytest.mark.parametrize("level, turns", [
    (3, {True: 16, False: 16}), (2, {True: 30, False: 2}),
    (4, {True: 2, False: 30}), (8, {False: 32})])
def test_somebody_else_gets_turns_by_urgency(level, turns):
    scheduler = Scheduler()
    scheduler.add(1, USUAL)
    scheduler.add(3, Urgency(6))
    assert turns == collections.Counter(
        scheduler.yields(able, level) for _ in range(32))


def test_somebody_else_gets_all_turns_that_nobody_can_use():
    scheduler = Scheduler()
    assert scheduler.yields(able, 7)
    scheduler.add(1, Urgency(0))
    assert all(scheduler.yields(lambda stream: 0, 7) for _ in range(32))
    assert not scheduler.yields(lambda stream: 0, 8)
