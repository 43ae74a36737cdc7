"""Room 9c, Notes."""

import time

import harness
import pytest
from harness import eventually

from shimmercat import LocalNotes, Notes, RedisLink


@pytest.fixture(params=["redis", "local"])
def pair(request, tmp_path):
    """Notes as two processes see them."""
    if request.param == "local":
        notes = LocalNotes()
        yield notes, notes
    else:
        with harness.running_redis(tmp_path) as path:
            yield Notes(RedisLink(path)), Notes(RedisLink(path))


def test_what_one_writes_another_reads_until_its_time_is_over(pair):
    ours, theirs = pair
    assert theirs.read("a") is None
    ours.write("a", b"\x00text", 60)
    assert theirs.read("a") == b"\x00text"
    theirs.write("a", b"short", 0.05)
    eventually(lambda: ours.read("a") is None)


def test_a_lease_has_one_holder_until_it_is_dropped_or_over(pair):
    ours, theirs = pair
    assert ours.claim("lease", b"ours", 60)
    assert not theirs.claim("lease", b"theirs", 60)
    assert theirs.read("lease") == b"ours"
    ours.drop("lease")
    assert theirs.claim("lease", b"theirs", 0.05)
    eventually(lambda: ours.claim("lease", b"ours", 60))


def test_no_time_at_all_is_no_note(pair):
    ours, theirs = pair
    ours.write("a", b"x", 0)
    eventually(lambda: theirs.read("a") is None)


def test_without_redis_each_process_has_its_own_and_asks_again_later(
        tmp_path, monkeypatch):
    with harness.running_redis(tmp_path) as path:
        ours, theirs = Notes(RedisLink(path)), Notes(RedisLink(path))
        ours.write("a", b"shared", 60)
    assert theirs.read("a") is None
    assert ours.claim("lease", b"", 60) and theirs.claim("lease", b"", 60)
    assert not ours.claim("lease", b"", 60)
    with harness.running_redis(tmp_path):
        ours.write("b", b"own", 60)
        assert ours.read("b") == b"own"
        later = time.monotonic() + 5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        ours.write("c", b"shared", 60)
        assert theirs.read("c") == b"shared"


def test_the_oldest_of_very_many_notes_of_one_process_go(monkeypatch):
    monkeypatch.setattr("shimmercat._MOST_NOTES", 3)
    notes = LocalNotes()
    for n in range(5):
        notes.write(str(n), b"x", 60)
    assert [notes.read(str(n)) for n in range(5)] == [
        None, None, b"x", b"x", b"x"]
