"""Room 9, Redis."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import gevent
import harness
import pytest
import redis

import shimmercat
from shimmercat import (
    Announcements,
    Deadline,
    JobQueue,
    LocalJobQueue,
    LogRecord,
    LogSubscription,
    LogTap,
    RedisAway,
    RedisLink,
)

JOB = {"sha": "ab" * 32, "path": "/srv/www/a.css", "type": "text/css"}


def eventually(predicate, seconds=10.0):
    """The first true value of the predicate; greenlets run meanwhile."""
    return harness.eventually(lambda: gevent.sleep(0.005) or predicate(),
                              seconds)


class RedisChild:
    """A redis-server on a Unix socket, to be killed at will."""

    def __init__(self, folder):
        self.folder, self.path = folder, str(folder / "redis.sock")
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self.path,
             "--dir", str(self.folder), "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL)
        eventually(self.answers)

    def answers(self):
        with contextlib.suppress(redis.RedisError):
            with redis.Redis(unix_socket_path=self.path) as client:
                return client.ping()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def child(tmp_path):
    """A running Redis."""
    server = RedisChild(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def link(child):
    """A link to the running Redis."""
    return RedisLink(child.path)


@pytest.fixture
def client(child):
    """An independent client of the running Redis."""
    with redis.Redis(unix_socket_path=child.path) as client:
        yield client


@pytest.fixture
def subscription(child):
    """The arbiter's end of the log, subscribed."""
    reader = LogSubscription(child.path)
    reader.connect()
    yield reader
    reader.close()


@pytest.fixture
def tap(link):
    """A tap whose greenlet runs."""
    sink = LogTap(link, limit=1000)
    greenlet = gevent.spawn(sink.run)
    yield sink
    greenlet.kill()


def numbered(n):
    """A record that can be told from others."""
    return LogRecord("w0", 1500000000.25, 4, 40013, (str(n),))


def records_in(packed):
    """All records that lie in a message."""
    records, place = [], 0
    while place < len(packed):
        record, place = LogRecord.unpack_from(packed, place)
        records.append(record)
    return records


def heard(subscription):
    """The records that have arrived."""
    return [record for _, packed in subscription.read() or ()
            for record in records_in(packed)]


def read_until(subscription, count, seconds=10.0):
    """At least so many records from the subscription."""
    records = []

    def enough():
        records.extend(heard(subscription))
        return len(records) >= count

    eventually(enough, seconds)
    return records


def numbers(records):
    """What the numbered records among these are numbered."""
    return [int(x.pieces[0]) for x in records if x.code == 40013]


# The log


def test_records_arrive_in_order_as_they_were_said(tap, subscription):
    sent = [numbered(n) for n in range(500)]
    for record in sent:
        tap.append(record)
    assert read_until(subscription, 500) == sent


def test_a_record_that_is_alone_is_a_message_on_the_workers_channel(
        tap, client):
    with client.pubsub() as pubsub:
        pubsub.psubscribe("sc_log_*")
        assert pubsub.get_message(timeout=5)["type"] == "psubscribe"
        tap.append(numbered(1))
        message = eventually(lambda: pubsub.get_message(timeout=0))
    assert message["channel"] == b"sc_log_w0"
    assert message["data"] == numbered(1).pack()


def test_reading_never_blocks(subscription):
    started = time.monotonic()
    assert not subscription.read()
    assert time.monotonic() - started < 0.5


def test_records_wait_while_redis_is_away_and_the_lost_are_counted(
        tap, child, subscription):
    tap.append(numbered(0))
    assert numbers(read_until(subscription, 1)) == [0]
    child.kill()
    with pytest.raises(RedisAway):
        read_until(subscription, 1)
    for n in range(1, 1301):
        tap.append(numbered(n))
    child.start()
    subscription.connect()
    records = read_until(subscription, 1001)
    assert records[0].code == 60006
    assert records[0].pieces[0] == "300"
    assert numbers(records) == [*range(301, 1301)]


def test_records_wait_until_somebody_reads_them(tap, client, child):
    tap.append(numbered(1))

    def was_tried_again():
        tried = client.info("commandstats").get("cmdstat_publish")
        return tried and tried["calls"] > 1

    eventually(was_tried_again)
    late = LogSubscription(child.path)
    late.connect()
    tap.append(numbered(2))
    assert read_until(late, 2) == [numbered(1), numbered(2)]
    late.close()


def test_nothing_is_lost_uncounted_when_redis_is_killed_again_and_again(
        tap, child, subscription):
    received, sent = [], 0
    for _ in range(5):
        for _ in range(150):
            tap.append(numbered(sent))
            sent += 1
        received += read_until(subscription, 1)
        child.kill()
        with contextlib.suppress(RedisAway):
            while True:
                received += heard(subscription)
        child.start()
        subscription.connect()
    tap.append(numbered(sent))

    def arrived():
        received.extend(heard(subscription))
        return numbers(received)[-1:] == [sent]

    eventually(arrived)
    # What Redis had acknowledged but not sent on when it was killed is
    # lost with it; all else is there, and doubles were announced.
    seen = numbers(received)
    assert len(set(seen)) > sent - 150
    doubled = len(seen) - len(set(seen))
    announced = sum(int(x.pieces[0]) for x in received if x.code == 40015)
    assert doubled <= announced


def test_a_stalled_redis_stops_nobody_and_nothing_is_lost(
        tap, child, subscription):
    os.kill(child.process.pid, signal.SIGSTOP)
    for n in range(500):
        tap.append(numbered(n))
        gevent.sleep(0)
    assert not subscription.read()
    os.kill(child.process.pid, signal.SIGCONT)
    assert numbers(read_until(subscription, 500)) == [*range(500)]


def test_flushing_hands_over_what_waits(link, subscription):
    tap = LogTap(link)
    for n in range(700):
        tap.append(numbered(n))
    assert tap.flush(Deadline(5.0)) == 0
    assert numbers(read_until(subscription, 700)) == [*range(700)]


def test_flushing_without_redis_ends_in_time_and_says_what_is_left(tmp_path):
    tap = LogTap(RedisLink(tmp_path / "no.sock"))
    tap.append(numbered(1))
    started = time.monotonic()
    assert tap.flush(Deadline(0.2)) == 1
    assert time.monotonic() - started < 2


def test_flushing_a_stalled_redis_ends_in_time(link, child, subscription):
    tap = LogTap(link)
    tap.append(numbered(1))
    os.kill(child.process.pid, signal.SIGSTOP)
    assert tap.flush(Deadline(0.2)) >= 1
    os.kill(child.process.pid, signal.SIGCONT)


def test_a_record_from_another_thread_is_published(tap, subscription):
    pool = gevent.get_hub().threadpool
    for n in range(20):
        pool.apply(tap.append, (numbered(n),))
    assert numbers(read_until(subscription, 20)) == [*range(20)]


def test_a_message_comes_with_the_channel_that_it_was_published_on(
        link, subscription):
    link.call("PUBLISH", b"sc_log_\xff", b"anything")
    assert eventually(subscription.read) == [("sc_log_\\xff", b"anything")]


def messages_of(client, count):
    """A function that gives what is published: so many records."""
    pubsub = client.pubsub()
    pubsub.psubscribe("sc_log_*")
    assert pubsub.get_message(timeout=5)["type"] == "psubscribe"

    def read():
        messages, missing = [], count
        while missing > 0:
            said = eventually(lambda: pubsub.get_message(timeout=0))
            messages.append(said["data"])
            missing -= len(records_in(said["data"]))
        pubsub.close()
        return messages
    return read


def test_records_that_gather_go_in_few_messages_of_bounded_size(tap, client):
    read = messages_of(client, 700)
    sent = [numbered(n) for n in range(699)]
    sent.append(LogRecord("w0", 1.0, 4, 40013, ("x" * 65_536,)))
    for record in sent:
        tap.append(record)
    messages = read()
    assert [x for packed in messages for x in records_in(packed)] == sent
    assert len(messages) <= 6
    assert max(map(len, messages[:-1])) <= 32_768
    assert messages[-1] == sent[-1].pack()


def test_a_quarter_of_what_may_wait_is_published_at_once(
        tap, subscription, monkeypatch):
    monkeypatch.setattr(shimmercat, "_TICK_SECONDS", 3600)
    for n in range(250):
        tap.append(numbered(n))
    assert numbers(read_until(subscription, 250)) == [*range(250)]
    tap.append_packed(b"".join(numbered(n).pack() for n in range(250)))
    assert numbers(read_until(subscription, 250)) == [*range(250)]


def test_packed_records_are_published_as_they_are(tap, client):
    read = messages_of(client, 900)
    packed = [numbered(n).pack() for n in range(900)]
    tap.append_packed(b"".join(packed[:600]))
    tap.append_packed(b"")
    tap.append_packed(b"".join(packed[600:]))
    messages = read()
    assert b"".join(messages) == b"".join(packed)
    assert len(messages) <= 4
    assert max(map(len, messages)) <= 32_768


def test_of_too_many_packed_records_the_oldest_are_lost_and_counted(
        link, subscription):
    tap = LogTap(link, limit=1000)
    for first in range(0, 5000, 500):
        tap.append_packed(b"".join(
            numbered(n).pack() for n in range(first, first + 500)))
    assert tap.flush(Deadline(5.0)) == 0
    first, *records = read_until(subscription, 1001)
    assert (first.code, first.pieces[0]) == (60006, "4000")
    assert numbers(records) == [*range(4000, 5000)]


def test_what_is_left_after_a_failure_is_counted_by_the_record(tmp_path):
    tap = LogTap(RedisLink(tmp_path / "no.sock"))
    tap.append_packed(b"".join(numbered(n).pack() for n in range(2000)))
    tap.append(numbered(2000))
    assert tap.flush(Deadline(0.1)) == 2001


def test_what_may_be_doubled_is_counted_by_the_record(
        tap, child, subscription):
    os.kill(child.process.pid, signal.SIGSTOP)
    for n in range(150):
        tap.append(numbered(n))
    gevent.sleep(0.3)
    child.kill()
    child.start()
    subscription.connect()
    records = read_until(subscription, 151)
    assert numbers(records) == [*range(150)]
    assert [x.pieces[0] for x in records if x.code == 40015] == ["150"]


def test_without_a_reader_what_waits_does_not_grow(link):
    tap, waiting = LogTap(link, limit=100), []
    for _ in range(12):
        for n in range(120):
            tap.append(numbered(n))
        waiting.append(tap.flush(Deadline(0.06)))
    # What is in hand, led by a line about losses, and what comes after it.
    assert max(waiting) <= 101 + 100


def test_a_subscription_can_be_selected_like_a_file(tap, subscription):
    tap.append(numbered(1))

    def readable():
        return select.select([subscription], [], [], 0)[0]

    eventually(readable)
    assert heard(subscription) == [numbered(1)]


def test_subscribing_without_redis_says_so(tmp_path):
    subscription = LogSubscription(tmp_path / "no.sock")
    with pytest.raises(RedisAway, match=r"no\.sock"):
        subscription.connect()


def test_who_leaves_in_order_has_all_that_was_received(child, tap):
    reader = LogSubscription(child.path)
    reader.connect()
    for n in range(50):
        tap.append(numbered(n))
    got = []
    eventually(lambda: got.extend(heard(reader)) or got)
    for n in range(50, 100):
        tap.append(numbered(n))
    gevent.sleep(0.1)
    got += [record for _, packed in reader.leave()
            for record in records_in(packed)]
    tap.append(numbered(100))
    gevent.sleep(0.2)
    # What nobody receives waits for the next one who listens.
    reader.connect()
    eventually(lambda: got.extend(heard(reader)) or len(got) > 100)
    reader.close()
    assert got == [numbered(n) for n in range(101)]


def test_a_subscription_works_in_a_thread_without_a_hub(child, tap):
    got = []

    def arbiter():
        reader = LogSubscription(child.path)
        reader.connect()
        ready.append(True)
        deadline = time.monotonic() + 10
        while not got and time.monotonic() < deadline:
            got.extend(heard(reader))
        reader.close()

    ready = []
    thread = gevent.get_hub().threadpool.spawn(arbiter)
    eventually(lambda: ready)
    tap.append(numbered(7))
    thread.get(timeout=10)
    assert got == [numbered(7)]


# Jobs


def test_a_job_is_queued_once_until_it_is_done(link):
    queue = JobQueue(link)
    assert queue.put(JOB)
    assert not queue.put(dict(reversed(JOB.items())))
    assert queue.take(1) == JOB
    assert not queue.put(JOB)
    assert queue.take(0.01) is None
    queue.done(JOB)
    assert queue.put(JOB)


def test_a_job_that_was_given_back_is_there_for_another(link):
    queue = JobQueue(link)
    queue.put(JOB)
    assert queue.take(1) == JOB
    queue.give_back(JOB)
    assert queue.take(1) == JOB


def test_the_most_wanted_job_is_taken_first_and_then_none(link):
    queue = JobQueue(link)
    jobs = [{**JOB, "sha": str(n)} for n in range(5)]
    for job, weight in zip(jobs, (1, 16, 2, 8, 4), strict=True):
        assert queue.put(job, weight)
    assert not queue.put(jobs[0], 32)
    assert not queue.put(jobs[1], 1)
    assert [queue.take(1)["sha"] for _ in jobs] == ["0", "1", "3", "4", "2"]
    assert queue.take(0.01) is None


def test_a_full_queue_drops_the_job_that_is_wanted_least(link):
    queue = JobQueue(link, limit=2)
    one, two, three = [{**JOB, "sha": str(n)} for n in range(3)]
    assert queue.put(one, 2) and queue.put(two, 4)
    assert not queue.put(three, 2)
    assert queue.put(three, 3)
    assert [queue.take(1)["sha"] for _ in range(2)] == ["1", "2"]
    assert queue.put(one)


def test_a_source_is_worked_on_by_one_artisan_at_a_time(link):
    queue, other = JobQueue(link), JobQueue(link)
    queue.put(JOB)
    queue.put({**JOB, "path": "/elsewhere"})
    taken = queue.take(1)
    assert other.take(1) is None
    assert not other.lease(JOB)
    queue.done(taken)
    assert other.lease(JOB)


def test_what_is_no_job_is_passed_over(link):
    queue = JobQueue(link)
    for text in ("not JSON", "[1]", "{}", "7"):
        link.call("ZADD", "sc_jobs", 9, text)
    queue.put(JOB)
    assert [queue.take(0.01) for _ in range(5)] == [None] * 4 + [JOB]


def test_another_job_of_a_source_waits_until_the_first_is_done(link):
    queue, other = JobQueue(link), {**JOB, "wanted": [["br", 11]]}
    queue.put(JOB)
    queue.take(1)
    assert queue.put(other)
    queue.done(JOB)
    assert queue.take(1) == other


def test_a_source_whose_artisan_died_can_be_worked_on_again_in_time(
        link, client):
    queue = JobQueue(link, lease_seconds=30.5)
    queue.put(JOB)
    queue.take(1)
    (key,) = client.keys("sc_lease_*")
    assert 0 < client.ttl(key) <= 31


def test_twenty_greenlets_queue_a_job_only_once(link):
    queue = JobQueue(link)
    puts = [gevent.spawn(queue.put, JOB) for _ in range(20)]
    gevent.joinall(puts, timeout=10)
    assert [x.value for x in puts].count(True) == 1


def test_without_redis_no_job_is_queued_and_taking_says_so(tmp_path):
    queue = JobQueue(RedisLink(tmp_path / "no.sock"))
    assert queue.put(JOB) is False
    for asking in (lambda: queue.take(1), lambda: queue.done(JOB)):
        with pytest.raises(RedisAway):
            asking()


def test_everything_works_again_after_redis_was_killed(link, child):
    queue = JobQueue(link)
    assert queue.put(JOB)
    child.kill()
    assert not queue.put(JOB)
    child.start()
    assert queue.put(JOB)
    assert queue.take(1) == JOB


WAITER = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
sys.path.insert(0, sys.argv[1])
from shimmercat import JobQueue, RedisLink
queue = JobQueue(RedisLink(sys.argv[2]))
taking = gevent.spawn(queue.take, 5)
gevent.sleep(0)
assert not taking.ready() and queue.put({"sha": "1"})
assert taking.get(timeout=4) == {"sha": "1"}
"""


def test_in_a_patched_process_waiting_lets_other_greenlets_run(child):
    subprocess.run([sys.executable, "-c", WAITER, harness.PROGRAM.parent,
                    child.path], check=True, timeout=30)


def test_local_jobs_are_done_one_by_one_each_once():
    at_work, most, done = [], [], []

    def work(job):
        at_work.append(job)
        most.append(len(at_work))
        done.append(job["sha"])
        at_work.remove(job)

    queue = LocalJobQueue(work, limit=3)
    jobs = [{**JOB, "sha": str(n)} for n in range(4)]
    assert [queue.put(job) for job in [*jobs[:3], jobs[0], jobs[3]]] == [
        True, True, True, False, False]
    eventually(lambda: len(done) == 3)
    assert done == ["0", "1", "2"] and set(most) == {1}
    eventually(lambda: queue.put(jobs[0]))


def test_a_local_job_that_fails_does_not_stop_the_next():
    done = []

    def work(job):
        done.append(job["sha"])
        if len(done) == 1:
            raise ValueError("no such type")

    queue = LocalJobQueue(work)
    queue.put(JOB)
    queue.put({**JOB, "sha": "2"})
    eventually(lambda: len(done) == 1)
    queue.put({**JOB, "sha": "3"}, 2)
    eventually(lambda: len(done) == 3)
    assert done[1:] == ["3", "2"]


def test_the_most_wanted_local_job_is_done_first():
    done = []
    queue = LocalJobQueue(lambda job: done.append(job["sha"]))
    for sha, weight in (("a", 1), ("b", 4), ("c", 2), ("a", 8)):
        queue.put({**JOB, "sha": sha}, weight)
    eventually(lambda: len(done) == 3)
    assert done == ["a", "b", "c"]


def test_what_is_being_done_locally_ends_when_the_queue_is_closed():
    ended = []

    def work(job):
        try:
            gevent.sleep(60)
        finally:
            ended.append(job)

    queue = LocalJobQueue(work)
    queue.put(JOB)
    gevent.sleep(0)
    queue.close()
    assert ended == [JOB]


# Announcements


def test_announcements_reach_every_worker_again_after_redis_was_away(
        link, child):
    heard = [[], []]
    workers = [gevent.spawn(Announcements(link).run, each.append)
               for each in heard]
    speaker = Announcements(link)

    def all_heard(text):
        speaker.publish(text)
        return all(text in each for each in heard)

    eventually(lambda: all_heard("new alternates of ä"))
    child.kill()
    with pytest.raises(RedisAway):
        speaker.publish("nobody")
    child.start()
    eventually(lambda: all_heard("again"))
    gevent.killall(workers)
