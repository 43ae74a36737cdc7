"""What a line of the log costs: processor time of each process on its way.

    python tests/bench/log_cost.py [--records 200000] [--rounds 3]

Records of requests go the way of internet mode as fast as they can: they are
said and published here, as in a worker; a Redis hands them on; a process like
the arbiter makes lines of them and writes these to a file.  Prints medians of
microseconds for each record, as reStructuredText: for records that are said
one by one and for those that come packed, lines for people and JSON, with and
without the extension in C.
"""

import argparse
import itertools
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import table

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import shimmercat
from shimmercat import (
    LOG,
    Console,
    Deadline,
    LogSubscription,
    LogTap,
    RedisAway,
    RedisLink,
)

REQUEST = (50001, "192.0.2.7", "GET", "www.example.com", "/css/main.css?v=3",
           200, 1024, "0.5", "h2", "static", "br")
#: what the extension does, where it is built
NATIVE = ("_native_bundles", "_native_lines", "_native_pack")
#: how many are said, or come packed, before they are published
GATHERED = 5000
PATIENCE_SECONDS = 120


class Way:
    """A Redis and a process that writes, for `count` records."""

    def __init__(self, folder, form, count):
        self.path = folder / "redis.sock"
        self.redis = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(self.path),
             "--save", "", "--appendonly", "no", "--dir", str(folder)],
            stdout=subprocess.DEVNULL)
        self.link = RedisLink(self.path)
        self._await_redis()
        self._reading, writing = os.pipe()
        self.writer = os.fork()
        if self.writer == 0:
            console = Console(-1, form, path=folder / "log")
            octets = count * len(LOG.record(*REQUEST).pack())
            spent = write_lines(self.path, console, octets, writing)
            os.write(writing, str(spent).encode())
            os._exit(0)
        os.close(writing)
        os.read(self._reading, 1)

    def _await_redis(self):
        """Wait until Redis answers."""
        deadline = Deadline(PATIENCE_SECONDS)
        while not deadline.passed():
            try:
                self.link.call("PING")
                return
            except RedisAway:
                time.sleep(0.02)

    def redis_seconds(self):
        """Return the processor time of Redis until now."""
        told = self.link.call("INFO", "cpu")
        return float(told["used_cpu_sys"]) + float(told["used_cpu_user"])

    def end(self):
        """End both processes; the processor time of the one that wrote."""
        spent = float(os.read(self._reading, 64))
        os.close(self._reading)
        os.waitpid(self.writer, 0)
        self.redis.terminate()
        self.redis.wait()
        return spent


def write_lines(path, console, octets, ready):
    """Write lines as the arbiter does, of so many octets of records."""
    subscription = LogSubscription(path)
    subscription.connect()
    os.write(ready, b"r")
    started = time.process_time()
    while octets > 0:
        select.select([subscription], [], [], PATIENCE_SECONDS)
        for channel, packed in subscription.read() or ():
            octets -= len(packed)
            console.take(packed, channel)
        console.pump()
    return time.process_time() - started


def hand_over(tap, count, packed):
    """Give `count` records to the tap; the processor time of saying them."""
    said = 0
    for _ in range(count // GATHERED):
        started = time.process_time()
        if packed:
            tap.append_packed(packed)
        else:
            for _ in range(GATHERED):
                LOG.say(*REQUEST)
        said += time.process_time() - started
        tap.flush(Deadline(PATIENCE_SECONDS))
    return said


def measure(form, is_packed, count):
    """Microseconds for a record: said, published, in Redis, written."""
    with tempfile.TemporaryDirectory(prefix="log-cost.") as folder:
        way = Way(Path(folder), form, count)
        tap = LogTap(way.link, 2 * GATHERED)
        LOG.configure(worker="w0-1", sink=tap.append)
        packed = LOG.record(*REQUEST).pack() * GATHERED if is_packed else b""
        redis, started = way.redis_seconds(), time.process_time()
        said = hand_over(tap, count, packed)
        published = time.process_time() - started - said
        redis = way.redis_seconds() - redis
        spent = [said, published, redis, way.end()]
    return [1e6 * seconds / count for seconds in (*spent, sum(spent))]


def main():
    """Measure all kinds in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    native = [getattr(shimmercat, name) for name in NATIVE]
    cases = list(itertools.product(
        (True, False) if all(native) else (False,), ("text", "json"),
        (False, True)))
    found = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            in_c, form, is_packed = case
            for name, function in zip(NATIVE, native, strict=True):
                setattr(shimmercat, name, function if in_c else None)
            found[case].append(measure(form, is_packed, options.records))
    print(table(["microseconds for a record", "said", "published", "Redis",
                 "written", "all"], [
        [f"{'packed' if is_packed else 'said'}, {form}, "
         f"{'C' if in_c else 'Python'}",
         *(f"{statistics.median(column):.2f}"
           for column in zip(*found[in_c, form, is_packed], strict=True))]
        for in_c, form, is_packed in cases]))


if __name__ == "__main__":
    main()
