"""Room 13, Artisan: the store of alternates."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from exchanges import no_descriptors

import shimmercat
from shimmercat import LOG, AlternateStore, Mark, StoreFull

SHA = hashlib.sha256(b"source").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def store(tmp_path):
    return AlternateStore(tmp_path / "r-cache")


@pytest.fixture
def said():
    """Codes of what is said to the log."""
    codes = []
    before = LOG.sink
    LOG.configure(sink=lambda record: codes.append(record.code))
    yield codes
    LOG.configure(sink=before)


def grow_old(stored, seconds):
    """Let an alternate look as if it was used long ago."""
    moment = time.time() - seconds
    os.utime(stored.path, (moment, moment))


def test_what_was_put_is_found_and_loaded(store):
    stored = store.put(SHA, "br", 11, b"body")
    assert store.find(SHA) == [stored]
    assert (stored.form, stored.level, stored.size) == ("br", 11, 4)
    assert store.load(stored) == b"body"


def test_another_process_finds_it_too(store, tmp_path):
    stored = store.put(SHA, "gzip", 9, b"body")
    assert AlternateStore(tmp_path / "r-cache").find(SHA) == [stored]


def test_the_smallest_is_found_first(store):
    store.put(SHA, "gzip", 9, b"12345")
    store.put(SHA, "br", 11, b"123")
    store.put(OTHER, "br", 11, b"1")
    assert [found.size for found in store.find(SHA)] == [3, 5]


def test_marks_are_told_from_alternates_by_their_names(store):
    made = store.put(SHA, "br", 11, b"body")
    store.decline(SHA, "webp_320", 9900, "not smaller")
    for n, mark in enumerate(Mark):
        store.put(SHA, "br", n, b"", mark)
    assert store.find(SHA) == [made]
    assert made.path.name.startswith(f"{SHA}.br-11.4.")
    for mark in Mark:
        for found in store.find(SHA, mark):
            assert found.mark is mark
            assert found.path.name.startswith(f"{SHA}.{mark.value}.")
    assert len(store.find(SHA, None, *Mark)) == 2 + len(Mark)
    assert store.settled(SHA) == {("br", 11), ("webp_320", 9900), ("br", 0)}


def test_a_note_takes_the_place_of_the_one_before(store):
    assert store.recall(SHA) == {"sha": None, "gone": None}
    for n in range(3):
        store.remember(SHA, {"sha": OTHER, "gone": n})
    assert store.recall(SHA) == {"sha": OTHER, "gone": 2}
    assert len(store.find(SHA, Mark.NOTE)) == 1


def test_an_empty_store_has_nothing_and_needs_no_folder(store, tmp_path):
    assert store.find(SHA) == []
    assert store.evict(1) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sha", ["", "ab", "../" * 22, SHA.upper(), SHA + "/"])
def test_what_is_no_hash_is_refused(store, sha):
    with pytest.raises(ValueError, match="no SHA-256"):
        store.find(sha)
    with pytest.raises(ValueError, match="no SHA-256"):
        store.put(sha, "br", 11, b"body")


@pytest.mark.parametrize("damage", [
    lambda body: body[:-1], lambda body: body + b"x", lambda body: b"",
    lambda body: b"B" + body[1:]],
    ids=["truncated", "longer", "emptied", "changed"])
def test_a_damaged_file_is_removed_and_reported(store, said, damage):
    stored = store.put(SHA, "br", 11, b"body")
    stored.path.write_bytes(damage(b"body"))
    assert store.load(stored) is None
    assert store.find(SHA) == []
    assert said == [40013]
    again = store.put(SHA, "br", 11, b"body")
    assert store.load(again) == b"body"


def test_a_fifo_in_place_of_a_file_keeps_nobody_waiting(store):
    stored = store.put(SHA, "br", 11, b"body")
    stored.path.unlink()
    os.mkfifo(stored.path)
    assert store.load(stored) is None


def test_foreign_files_are_ignored_and_kept(store):
    stored = store.put(SHA, "br", 11, b"body")
    for name in (".draft-1", "README", "br-11.4", "br-11.4.zz", "BR-1.1.0"):
        (stored.path.parent / name).write_bytes(b"foreign")
    assert store.find(SHA) == [stored]
    assert len(list(stored.path.parent.iterdir())) == 6


def test_the_folder_may_be_cleared_at_any_time(store, tmp_path):
    stored = store.put(SHA, "br", 11, b"body")
    subprocess.run(["rm", "-r", tmp_path / "r-cache"], check=True)
    assert store.load(stored) is None
    assert store.find(SHA) == []
    assert store.load(store.put(SHA, "br", 11, b"body")) == b"body"


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "r-cache").write_text("a file")
    with pytest.raises(StoreFull, match=str(tmp_path / "r-cache")):
        AlternateStore(tmp_path / "r-cache").put(SHA, "br", 11, b"body")


def test_a_full_disk_is_named_and_leaves_no_draft(tmp_path):
    text = """
import resource, signal, sys, shimmercat
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    shimmercat.AlternateStore(Path(sys.argv[1])).put(
        "ab" * 32, "br", 11, bytes(5000))
except shimmercat.StoreFull as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)], check=True, timeout=60,
        capture_output=True, text=True,
        cwd=Path(shimmercat.__file__).parent)
    assert "File too large" in done.stdout
    assert f"M60014 main     r-cache takes no more files: {tmp_path}/" in (
        done.stderr)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_want_of_descriptors_is_not_told_as_trouble_of_the_disk(store, said):
    with no_descriptors(), pytest.raises(StoreFull):
        store.put(SHA, "br", 11, b"smaller")
    assert not said


def test_loading_marks_a_file_as_used_but_not_each_time(store):
    stored = store.put(SHA, "br", 11, b"body")
    grow_old(stored, 600)
    before = stored.path.stat().st_mtime
    store.load(stored)
    assert stored.path.stat().st_mtime == before
    grow_old(stored, 7200)
    store.load(stored)
    assert time.time() - stored.path.stat().st_mtime < 600


def test_the_least_used_leaves_first_when_there_is_too_much(store):
    kept = store.put(SHA, "br", 11, bytes(400))
    gone = store.put(OTHER, "gzip", 9, bytes(500))
    grow_old(kept, 7200)
    grow_old(gone, 9000)
    assert store.evict(700) == 500
    assert store.find(OTHER) == []
    assert store.find(SHA) == [kept]


def test_nothing_leaves_below_the_limit(store):
    stored = store.put(SHA, "br", 11, bytes(1000))
    assert store.evict(1000) == 0
    assert store.find(SHA) == [stored]


def test_drafts_that_a_crash_left_count_and_leave_too(store):
    stored = store.put(SHA, "br", 11, bytes(400))
    draft = stored.path.parent / ".draft-left"
    draft.write_bytes(bytes(600))
    os.utime(draft, (1, 1))
    assert store.evict(900) == 600
    assert store.find(SHA) == [stored]


def test_the_limit_is_kept_while_more_and_more_is_stored(store, tmp_path):
    for n in range(200):
        sha = hashlib.sha256(b"%d" % n).hexdigest()
        store.put(sha, "br", 11, bytes(1000))
        store.evict(20_000)
    left = sum(path.stat().st_size for path in tmp_path.rglob("*")
               if path.is_file())
    assert 15_000 <= left <= 22_000


def test_writers_and_readers_at_once_never_see_half_a_file(store, tmp_path):
    text = """
import sys, shimmercat
from pathlib import Path
store = shimmercat.AlternateStore(Path(sys.argv[1]))
for n in range(300):
    store.put("ab" * 32, "br", 11, bytes([n % 7]) * 100_000)
    store.evict(150_000)
"""
    writers = [subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path / "r-cache")],
        cwd=Path(shimmercat.__file__).parent) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        for stored in store.find("ab" * 32):
            body = store.load(stored)
            assert body is None or body == body[:1] * 100_000
            seen.add(body and body[:1])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen - {None}
