"""Room 13, Artisan."""

import contextlib
import gzip
import hashlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import brotli
import pytest
import redis
import zstandard
from harness import eventually

import shimmercat
from shimmercat import (
    AlternateStore,
    JobQueue,
    Mark,
    RedisLink,
    Tweaks,
    Workshop,
    make_alternates,
)

TEXT = b"".join(b"p.class-%d { margin: %dpx; }\n" % (n, n * n % 97)
                for n in range(2000))
TWEAKS = Tweaks(artisan_nice=0)
CODINGS = (("br", 11), ("zstd", 19), ("gzip", 9))


@pytest.fixture
def store(tmp_path):
    return AlternateStore(tmp_path / "r-cache")


def job_for(path, content=TEXT, kind="text/css; charset=utf-8",
            wanted=CODINGS):
    """Write a source; the job that asks for its alternates."""
    path.write_bytes(content)
    return {"sha": hashlib.sha256(content).hexdigest(), "path": str(path),
            "type": kind, "wanted": wanted}


def forms(store, job):
    """(form, level) of all that was made of a job's source."""
    return {stored[:2] for stored in store.find(job["sha"])}


def reasons(store, job):
    """{form: why there is none of it}."""
    return {stored.form: store.load(stored).decode()
            for stored in store.find(job["sha"], Mark.DECLINED)}


def marks(store, job):
    """Kinds of the marks that the store has of a job's source."""
    return [stored.mark for stored in store.find(job["sha"], *Mark)]


def test_text_gets_the_best_of_all_codings(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    make_alternates(job, store, TWEAKS)
    assert forms(store, job) == set(CODINGS)
    bodies = {stored.form: store.load(stored)
              for stored in store.find(job["sha"])}
    assert brotli.decompress(bodies["br"]) == TEXT
    assert gzip.decompress(bodies["gzip"]) == TEXT
    assert zstandard.decompress(bodies["zstd"]) == TEXT
    assert bodies["br"] == brotli.compress(
        TEXT, mode=brotli.MODE_TEXT, quality=11, lgwin=22)


def test_zstd_keeps_to_the_window_that_browsers_have(store, tmp_path):
    job = job_for(tmp_path / "a.css", TEXT * 200, wanted=[("zstd", 19)])
    assert len(TEXT * 200) > 9 << 20
    make_alternates(job, store, TWEAKS)
    stored, = store.find(job["sha"])
    frame = zstandard.get_frame_parameters(store.load(stored))
    assert frame.window_size <= 8 << 20


def test_the_same_source_gives_the_same_bytes_at_any_time(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    make_alternates(job, store, TWEAKS)
    other = AlternateStore(tmp_path / "other")
    os.utime(tmp_path / "a.css", (1, 1))
    make_alternates(job, other, TWEAKS)
    assert {stored.digest for stored in store.find(job["sha"])} == {
        stored.digest for stored in other.find(job["sha"])}


def test_what_is_said_names_source_and_sizes(store, tmp_path, said):
    make_alternates(job_for(tmp_path / "a.css"), store, TWEAKS)
    lines = [record.text() for record in said if record.code == 20004]
    assert len(lines) == 3
    assert all(str(tmp_path / "a.css") in line and str(len(TEXT)) in line
               for line in lines)


def test_what_is_there_is_not_made_again(store, tmp_path, said):
    job = job_for(tmp_path / "a.css")
    make_alternates(job, store, TWEAKS)
    said.clear()
    make_alternates(job, store, TWEAKS)
    assert not said


def test_a_damaged_alternate_is_made_again(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    make_alternates(job, store, TWEAKS)
    for stored in store.find(job["sha"]):
        stored.path.write_bytes(b"damage")
        assert store.load(stored) is None
    make_alternates(job, store, TWEAKS)
    assert forms(store, job) == set(CODINGS)
    assert all(map(store.load, store.find(job["sha"])))


@pytest.mark.parametrize("content", [
    b"a", os.urandom(5000)], ids=["tiny", "random"])
def test_what_does_not_save_enough_is_not_kept(store, tmp_path, content):
    job = job_for(tmp_path / "a.css", content)
    make_alternates(job, store, TWEAKS)
    assert set(reasons(store, job)) == {"br", "zstd", "gzip"}
    assert all(reason.startswith("not smaller: ") and reason.endswith(
        f" of {len(content)} bytes")
        for reason in reasons(store, job).values())


def test_only_what_is_wanted_is_made(store, tmp_path):
    job = job_for(tmp_path / "a", wanted=[("gzip", 9)])
    make_alternates(job, store, TWEAKS)
    assert forms(store, job) == {("gzip", 9)}


def test_nothing_is_made_of_a_source_that_changed(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    (tmp_path / "a.css").write_bytes(TEXT + b" ")
    make_alternates(job, store, TWEAKS)
    assert not forms(store, job)


@pytest.mark.parametrize("replace", [
    lambda path: None, os.mkdir, os.mkfifo], ids=["gone", "folder", "fifo"])
def test_nothing_is_made_of_what_is_no_file_any_more(
        store, tmp_path, replace):
    job = job_for(tmp_path / "a.css")
    (tmp_path / "a.css").unlink()
    replace(tmp_path / "a.css")
    make_alternates(job, store, TWEAKS)
    assert not forms(store, job)


def test_a_source_above_the_limit_is_refused(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    for limit, expected in ((len(TEXT) - 1, 0), (len(TEXT), 3)):
        make_alternates(job, store, Tweaks(compress_limit_bytes=limit))
        assert len(forms(store, job)) == expected


def test_the_limit_of_the_store_is_kept(store, tmp_path):
    workshop = Workshop(store, Tweaks(
        artisan_nice=0, r_cache_limit_bytes=50_000))
    for n in range(10):
        job = job_for(tmp_path / f"{n}.css", b"%d" % n + TEXT)
        assert workshop.do(job) == ""
    sizes = [path.stat().st_size for path in store_files(tmp_path)]
    assert 10_000 < sum(sizes) <= 52_500


def store_files(folder):
    return [path for path in (folder / "r-cache").rglob("*")
            if path.is_file()]


@pytest.fixture
def faulty(monkeypatch):
    """Sets what a job does instead of its work, in its own process."""
    def install(fault):
        monkeypatch.setattr(shimmercat, "make_alternates", fault)
    return install


def out_of_memory(*_):
    raise MemoryError


def hang(*_):
    while True:
        sum(range(1000))


@pytest.mark.parametrize("fault, reason", [
    (lambda *_: os.kill(os.getpid(), signal.SIGKILL),
     "its process ended by SIGKILL"),
    (lambda *_: os.kill(os.getpid(), signal.SIGSEGV),
     "its process ended by SIGSEGV"),
    (out_of_memory, "ran out of memory (artisan-memory-bytes)"),
    (hang, "took longer than 1 s")],
    ids=["killed", "crashed", "memory", "slow"])
def test_a_job_that_fails_is_tried_twice_and_then_declined_for_good(
        store, tmp_path, said, faulty, fault, reason):
    faulty(fault)
    job = job_for(tmp_path / "a.css")
    workshop = Workshop(store, Tweaks(artisan_nice=0, artisan_job_seconds=1))
    assert workshop.do(job) == reason
    failures = [record.text() for record in said if record.code == 60010]
    assert len(failures) == 2
    assert all(reason in failure and job["path"] in failure
               for failure in failures)
    assert reasons(store, job) == dict.fromkeys(("br", "zstd", "gzip"), reason)
    assert not forms(store, job)
    assert marks(store, job) == [Mark.DECLINED] * 3
    assert store.settled(job["sha"]) >= set(CODINGS)


def test_a_job_that_fails_once_is_done_the_second_time(
        store, tmp_path, faulty):
    begun = tmp_path / "begun"
    original = make_alternates

    def stumble(*words):
        if not begun.exists():
            begun.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(*words)

    faulty(stumble)
    job = job_for(tmp_path / "a.css")
    Workshop(store, TWEAKS).do(job)
    assert forms(store, job) == set(CODINGS)


def test_a_job_that_two_artisans_died_of_is_not_tried_again(store, tmp_path):
    job = job_for(tmp_path / "a.css")
    for n in range(2):
        store.put(job["sha"], "job", n, b"", Mark.ATTEMPT)
    Workshop(store, TWEAKS).do(job)
    assert set(reasons(store, job).values()) == {"the artisan died of it"}
    assert not forms(store, job)
    assert marks(store, job) == [Mark.DECLINED] * 3


def test_the_process_of_a_job_is_nice_and_its_memory_is_capped(
        store, tmp_path, faulty):
    def report(*_):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        (tmp_path / "report").write_text(
            f"{limits[0]} {os.getpriority(os.PRIO_PROCESS, 0)}")
    faulty(report)
    Workshop(store, Tweaks(artisan_nice=7, artisan_memory_bytes=1 << 30)).do(
        job_for(tmp_path / "a.css"))
    assert (tmp_path / "report").read_text() == f"{1 << 30} 7"


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
            if message["data"] == job["sha"].encode():
                return True

    def end(self):
        self.line.close()
        for child in (self.process, self.redis):
            child.kill()
            child.wait()


@pytest.fixture
def artisan(tmp_path):
    running = ArtisanProcess(tmp_path)
    try:
        running.wait_for_beat()
        yield running
    finally:
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
    made = AlternateStore(tmp_path / "scratch/r-cache")
    assert forms(made, job) == set(CODINGS)


def test_a_job_that_is_nonsense_does_not_stop_the_next(artisan, tmp_path):
    job = job_for(tmp_path / "a.css")
    with listening(artisan) as subscription:
        artisan.put({"sha": "../../etc", "path": "/etc/passwd"})
        artisan.put({"sha": "nothing"})
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
    wait_until_busy(eventually(lambda: children(artisan.process.pid))[0])
    artisan.process.send_signal(signal.SIGTERM)
    assert artisan.process.wait(5) == 0
    assert not [path for path in (tmp_path / "scratch").rglob("*")
                if path.is_file()]


def children(pid):
    """Process ids of a process's children."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


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
tweaks = shimmercat.Tweaks(artisan_nice=7, artisan_memory_bytes=1 << 30)
shimmercat.Artisan(
    SimpleNamespace(tweaks=tweaks),
    shimmercat.ScratchFolder(sys.argv[1]),
    socket.socket(fileno=int(sys.argv[2]))).run()
"""
