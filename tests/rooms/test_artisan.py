"""Room 13, Artisan."""

import contextlib
import gzip
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import brotli
import pytest
import redis

import shimmercat
from shimmercat import (
    LOG,
    AlternateStore,
    JobQueue,
    RedisLink,
    make_alternates,
)

TEXT = b"".join(b"p.class-%d { margin: %dpx; }\n" % (n, n * n % 97)
                for n in range(2000))
TWEAKS = SimpleNamespace(compress_limit_bytes=1 << 20,
                         r_cache_limit_bytes=1 << 30)


@pytest.fixture
def store(tmp_path):
    return AlternateStore(tmp_path / "r-cache")


@pytest.fixture
def said():
    """What is said to the log."""
    records = []
    before, enabled = LOG.sink, LOG.enabled
    LOG.configure(sink=records.append,
                  enabled=frozenset(shimmercat.MESSAGES))
    yield records
    LOG.configure(sink=before, enabled=enabled)


def job_for(path, content=TEXT, kind="text/css; charset=utf-8"):
    """Write a source; the job that asks for its alternates."""
    path.write_bytes(content)
    return {"sha": hashlib.sha256(content).hexdigest(), "path": str(path),
            "type": kind}


def codings(alternates):
    return {(stored.coding, stored.level) for stored in alternates}


def test_text_gets_the_best_brotli_and_gzip(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    made = make_alternates(job, store, TWEAKS)
    assert codings(made) == {("br", 11), ("gzip", 9)}
    bodies = {stored.coding: store.load(stored) for stored in made}
    assert brotli.decompress(bodies["br"]) == TEXT
    assert gzip.decompress(bodies["gzip"]) == TEXT
    assert bodies["br"] == brotli.compress(
        TEXT, mode=brotli.MODE_TEXT, quality=11, lgwin=22)


def test_the_same_source_gives_the_same_bytes_at_any_time(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    first = make_alternates(job, store, TWEAKS)
    other = AlternateStore(tmp_path / "other")
    os.utime(tmp_path / "a.css", (1, 1))
    second = make_alternates(job, other, TWEAKS)
    assert {stored.digest for stored in first} == {
        stored.digest for stored in second}


def test_what_is_said_names_source_and_sizes(store, tmp_path, said):
    make_alternates(job_for(tmp_path / "a.css"), store, TWEAKS)
    lines = [record.text() for record in said if record.code == 20004]
    assert len(lines) == 2
    assert all(str(tmp_path / "a.css") in line and str(len(TEXT)) in line
               for line in lines)


def test_what_is_there_is_not_made_again(store, tmp_path, said):
    job = job_for(tmp_path / "a.css")
    made = make_alternates(job, store, TWEAKS)
    said.clear()
    assert set(make_alternates(job, store, TWEAKS)) == set(made)
    assert not said


def test_a_damaged_alternate_is_made_again(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    for stored in make_alternates(job, store, TWEAKS):
        stored.path.write_bytes(b"damage")
        store.load(stored)
    assert len(make_alternates(job, store, TWEAKS)) == 2


@pytest.mark.parametrize("content", [
    b"", b"a", os.urandom(5000)], ids=["empty", "tiny", "random"])
def test_what_does_not_save_enough_is_not_kept(store, tmp_path, content):
    job = job_for(tmp_path / "a.css", content)
    assert make_alternates(job, store, TWEAKS) == []


@pytest.mark.parametrize("kind", [
    "image/jpeg", "font/woff2", "video/mp4", "application/zip"])
def test_what_is_compressed_by_its_type_is_left_alone(store, tmp_path, kind):
    job = job_for(tmp_path / "a", kind=kind)
    assert make_alternates(job, store, TWEAKS) == []


def test_nothing_is_made_of_a_source_that_changed(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    (tmp_path / "a.css").write_bytes(TEXT + b" ")
    assert make_alternates(job, store, TWEAKS) == []


@pytest.mark.parametrize("replace", [
    lambda path: None, os.mkdir, os.mkfifo], ids=["gone", "folder", "fifo"])
def test_nothing_is_made_of_what_is_no_file_any_more(
        store, tmp_path, replace):
    job = job_for(tmp_path / "a.css")
    (tmp_path / "a.css").unlink()
    replace(tmp_path / "a.css")
    assert make_alternates(job, store, TWEAKS) == []


def test_a_source_above_the_limit_is_refused(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    for limit, expected in ((len(TEXT) - 1, 0), (len(TEXT), 2)):
        tweaks = SimpleNamespace(compress_limit_bytes=limit,
                                 r_cache_limit_bytes=1 << 30)
        assert len(make_alternates(job, store, tweaks)) == expected


def test_the_limit_of_the_store_is_kept(store, tmp_path):
    tweaks = SimpleNamespace(compress_limit_bytes=1 << 20,
                             r_cache_limit_bytes=10_000)
    for n in range(10):
        make_alternates(job_for(tmp_path / f"{n}.css", b"%d" % n + TEXT),
                        store, tweaks)
    sizes = [path.stat().st_size for path in store_files(tmp_path)]
    assert 0 < sum(sizes) <= 20_000


def store_files(folder):
    return [path for path in (folder / "r-cache").rglob("*")
            if path.is_file()]


def test_beats_come_while_a_large_text_is_made(store, tmp_path):
    beats = []
    job = job_for(tmp_path / "a.css", TEXT * 10)
    make_alternates(job, store, TWEAKS, lambda: beats.append(0))
    assert len(beats) >= len(TEXT * 10) // (128 * 1024)


class ArtisanProcess:
    """An artisan in its own process, as the arbiter forks it, and a Redis."""

    def __init__(self, folder):
        self.folder = folder
        self.redis_path = folder / "scratch" / "redis.sock"
        self.redis_path.parent.mkdir(mode=0o700)
        self.redis = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self.redis_path,
             "--save", "", "--dir", folder], stdout=subprocess.DEVNULL)
        self.line, far = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ARTISAN, str(folder / "scratch"),
             str(far.fileno())], pass_fds=[far.fileno()],
            cwd=Path(shimmercat.__file__).parent)
        far.close()

    def wait_for_beat(self):
        """Return once the artisan works; what it sent before is dropped."""
        self.line.settimeout(30)
        assert set(self.line.recv(65536)) == set(b".")

    def put(self, job):
        """Queue a job as a worker does."""
        link = RedisLink(self.redis_path)
        deadline = time.monotonic() + 30
        while not JobQueue(link).put(job):
            assert time.monotonic() < deadline
            select.select([], [], [], 0.02)

    def announced(self, job, subscription):
        """Wait until the source of a job is announced."""
        while True:
            message = subscription.get_message(timeout=30)
            assert message is not None
            if message["type"] == "message":
                return message["data"].decode() == job["sha"]

    def end(self):
        self.line.close()
        for child in (self.process, self.redis):
            child.kill()
            child.wait()


@pytest.fixture
def artisan(tmp_path):
    running = ArtisanProcess(tmp_path)
    running.wait_for_beat()
    yield running
    running.end()


def listening(artisan):
    """A subscription to the artisan's news that Redis has confirmed."""
    subscription = redis.Redis(
        unix_socket_path=str(artisan.redis_path)).pubsub()
    subscription.subscribe("sc_news")
    assert subscription.get_message(timeout=30)["type"] == "subscribe"
    return contextlib.closing(subscription)


def test_the_artisan_does_jobs_and_announces_them(artisan, tmp_path):
    job = job_for(tmp_path / "a.css")
    with listening(artisan) as subscription:
        artisan.put(job)
        assert artisan.announced(job, subscription)
    made = AlternateStore(tmp_path / "scratch/r-cache").find(job["sha"])
    assert codings(made) == {("br", 11), ("gzip", 9)}


def test_a_job_that_is_nonsense_does_not_stop_the_next(artisan, tmp_path):
    job = job_for(tmp_path / "a.css")
    with listening(artisan) as subscription:
        artisan.put({"sha": "../../etc", "path": "/etc/passwd"})
        artisan.put({"nothing": None})
        artisan.put(job)
        assert artisan.announced(job, subscription)


def test_a_job_may_be_put_again_when_it_is_done(artisan, tmp_path):
    job = job_for(tmp_path / "a.css")
    with listening(artisan) as subscription:
        for _ in range(2):
            artisan.put(job)
            assert artisan.announced(job, subscription)


def test_the_artisan_is_nice_and_its_memory_is_capped(artisan):
    assert os.getpriority(os.PRIO_PROCESS, artisan.process.pid) == 7
    limits = Path(f"/proc/{artisan.process.pid}/limits").read_text()
    assert "Max address space         1073741824" in limits


def test_term_ends_it_soon_without_a_fault(artisan):
    artisan.process.send_signal(signal.SIGTERM)
    assert artisan.process.wait(5) == 0


def test_term_ends_a_long_job_soon_and_leaves_no_half_file(
        artisan, tmp_path):
    artisan.put(job_for(tmp_path / "a.css", os.urandom(4 << 20).hex()
                        .encode()))
    wait_until_busy(artisan.process.pid)
    artisan.process.send_signal(signal.SIGTERM)
    assert artisan.process.wait(5) == 0
    assert not [path for path in (tmp_path / "scratch").rglob("*")
                if path.is_file()]


def wait_until_busy(pid):
    """Return when a process has computed for half a second."""
    deadline = time.monotonic() + 30
    tick = os.sysconf("SC_CLK_TCK")
    begin = None
    while time.monotonic() < deadline:
        used = int(Path(f"/proc/{pid}/stat").read_text().split()[13]) / tick
        begin = used if begin is None else begin
        if used > begin + 0.5:
            return
        select.select([], [], [], 0.02)
    raise AssertionError("never busy")


def test_it_leaves_by_itself_when_the_arbiter_is_gone(artisan):
    artisan.line.close()
    assert artisan.process.wait(5) == 0


def test_it_waits_for_redis_to_come_back(artisan):
    artisan.redis.kill()
    artisan.redis.wait()
    artisan.wait_for_beat()
    artisan.wait_for_beat()
    assert artisan.process.poll() is None


ARTISAN = """
from gevent import monkey
monkey.patch_all()
import socket, sys
from types import SimpleNamespace
import shimmercat
tweaks = SimpleNamespace(
    artisan_nice=7, artisan_memory_bytes=1 << 30, artisan_queue_jobs=100,
    log_ring_records=100, compress_limit_bytes=16 << 20,
    r_cache_limit_bytes=1 << 30)
shimmercat.Artisan(
    SimpleNamespace(tweaks=tweaks),
    shimmercat.ScratchFolder(sys.argv[1]),
    socket.socket(fileno=int(sys.argv[2]))).run()
"""
