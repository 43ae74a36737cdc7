"""What a warm-up costs the visitors of a site that is served meanwhile.

    python tests/bench/warm_up.py [--rounds 5] [--images 200] [--seconds 10]

The server with all its processes and the load share one core: h2load asks
for small cached assets over HTTP/2 all the time.  The other core has, in
turn, nothing to do; a loop that does nothing (what the machine itself takes
away); and `shimmercat.py warm` for a part of the images, until all parts
are done.  h2load logs every request: rates and 99th percentiles are of the
requests that ended in each stretch of time.

The images are crops of the demo's photographs, all different.
"""

import argparse
import bisect
import collections
import contextlib
import io
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import Bench, free_port, machine, note
from figures import table
from h2load import CONNECTIONS
from PIL import Image
from representations import CODINGS, DEMO, IMAGES, verdict
from servers import Shimmercat

SIZE = (400, 300)
QUALITY = 90
ASSETS = ("css/site.css", "js/gallery.js", "js/theme.js", "favicon.svg",
          "index.html", "photos/small/*.jpg")
#: what h2load gets before anything is measured, and after
SETTLE_SECONDS = 3
STATES = ("nothing", "a loop", "a warm-up")
LEAST_RATE, MOST_LATENCY = 0.9, 2.0


class Stretch:
    """A time during which the other core did one thing."""

    def __init__(self, state):
        self.state = state
        self.begin, self.end = time.time(), None
        self.microseconds = []

    def close(self):
        """Say that it is over, and return it."""
        self.end = time.time()
        note(f"{self.state}: {self.end - self.begin:.1f} s")
        return self

    def rate(self):
        """Requests per second."""
        return len(self.microseconds) / (self.end - self.begin)

    def percentile(self):
        """Milliseconds within which 99 % of the requests ended."""
        ordered = sorted(self.microseconds)
        return ordered[len(ordered) * 99 // 100] / 1000


class Yard(Bench):
    """Small assets that are asked for, and images nobody has seen yet."""

    def prepare(self):
        """Copy the assets."""
        super().prepare()
        for pattern in ASSETS:
            for path in (DEMO / "www").glob(pattern):
                place = self.site / path.relative_to(DEMO / "www")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)

    @property
    def site(self):
        """The folder of the assets that are asked for."""
        return self.www / "site"

    def part(self, number):
        """The folder of one round's images."""
        return self.www / "fresh" / str(number)

    def add_images(self, count, rounds):
        """Write the images, an equal part for each round."""
        photographs = [Image.open(path).convert("RGB") for path
                       in sorted((DEMO / "www" / "photos").glob("*.jpg"))]
        bodies = set()
        for number in range(count):
            folder = self.part(number % rounds)
            folder.mkdir(parents=True, exist_ok=True)
            body = cropped(photographs[number % len(photographs)],
                           random.Random(number))
            (folder / f"{number}.jpg").write_bytes(body)
            bodies.add(body)
        if len(bodies) < count:
            raise RuntimeError("two images are the same")


def cropped(photograph, dice):
    """Return a JPEG of some part of a photograph."""
    width, height = SIZE
    most = min(photograph.width / width, photograph.height / height)
    scale = dice.uniform(min(1, most), most)
    width, height = int(width * scale), int(height * scale)
    left = dice.randint(0, photograph.width - width)
    top = dice.randint(0, photograph.height - height)
    image = photograph.resize(
        SIZE, Image.Resampling.LANCZOS,
        box=(left, top, left + width, top + height))
    body = io.BytesIO()
    image.save(body, "JPEG", quality=QUALITY)
    return body.getvalue()


def warm(server, folder, core):
    """Warm a folder up on a core; raise unless all its files were done."""
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, server.program(),
         "warm", "--working-dir", server.folder, folder],
        capture_output=True, text=True, check=False,
        env=os.environ | {"HOME": str(server.folder)})
    counts = re.findall(r"^\S+/\S+ +(\d+) ", done.stdout, re.MULTILINE)
    files = sum(path.is_file() for path in folder.rglob("*"))
    if done.returncode or sum(map(int, counts)) != files:
        raise RuntimeError(f"{done.returncode}: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def load(server, options):
    """Have h2load ask for the assets all the time; give its log's path."""
    site = server.bench.site
    uris = server.folder / "uris"
    uris.write_text("".join(
        f"https://localhost:{server.port}/{path.relative_to(site.parent)}\n"
        for path in sorted(site.rglob("*")) if path.is_file()))
    log = server.folder / "h2load.log"
    words = ["taskset", "-c", options.server_core, "h2load",
             f"--connect-to=127.0.0.1:{server.port}", "--threads=1",
             f"--clients={CONNECTIONS}", "--max-concurrent-streams=1",
             f"--warm-up-time={options.warm_up}", "--duration=86400",
             f"--header=accept: {IMAGES}",
             f"--header=accept-encoding: {CODINGS}",
             f"--log-file={log}", f"--input-file={uris}"]
    process = subprocess.Popen(list(map(str, words)),
                               stdout=subprocess.DEVNULL)
    try:
        time.sleep(options.warm_up + SETTLE_SECONDS)
        yield log
        # What ended in the last stretch is to be in the log.
        time.sleep(SETTLE_SECONDS)
        if process.poll() is not None:
            raise RuntimeError(f"h2load ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def measure(server, options):
    """Return the stretches of all rounds, with their requests."""
    stretches = []
    with load(server, options) as log:
        for number in range(options.rounds):
            server.forget_log()
            for state in STATES:
                stretch = Stretch(state)
                spend(state, server, number, options)
                stretches.append(stretch.close())
    sort_requests(log, stretches)
    return stretches


def spend(state, server, number, options):
    """Give the other core something to do, and wait for it."""
    if state == "a warm-up":
        warm(server, server.bench.part(number), options.client_core)
    elif state == "a loop":
        endless = subprocess.Popen(
            ["taskset", "-c", str(options.client_core), sys.executable,
             "-c", "while True: pass"])
        time.sleep(options.seconds)
        endless.kill()
        endless.wait()
    else:
        time.sleep(options.seconds)


def sort_requests(log, stretches):
    """Give each stretch the requests that ended in it."""
    begins = [stretch.begin for stretch in stretches]
    with open(log, encoding="ascii") as lines:
        for line in lines:
            fields = line.split()
            # The last line may have been written in part.
            if len(fields) < 3 or not line.endswith("\n"):
                continue
            start, status, microseconds = map(int, fields[:3])
            if status != 200:
                raise RuntimeError(f"status {status}")
            end = (start + microseconds) / 1e6
            place = bisect.bisect(begins, end) - 1
            if place >= 0 and end < stretches[place].end:
                stretches[place].microseconds.append(microseconds)


def results_table(stretches):
    """Return the table of medians over all rounds."""
    rates, latencies = by_state(stretches)
    return table(
        ["The other core has", "requests/s", "p99, ms", "requests/s ratio",
         "p99 ratio"],
        [[state, f"{statistics.median(rates[state]):,.0f}",
          f"{statistics.median(latencies[state]):.2f}",
          f"{ratio(rates, state):.3f}", f"{ratio(latencies, state):.2f}"]
         for state in STATES])


def rounds_table(stretches):
    """Return the table of all stretches."""
    return table(
        ["Round", "the other core has", "seconds", "requests/s", "p99, ms"],
        [[str(n // len(STATES) + 1), x.state, f"{x.end - x.begin:.1f}",
          f"{x.rate():,.0f}", f"{x.percentile():.2f}"]
         for n, x in enumerate(stretches)])


def by_state(stretches):
    """Return ({state: rates}, {state: percentiles}), by rounds."""
    rates = collections.defaultdict(list)
    latencies = collections.defaultdict(list)
    for stretch in stretches:
        rates[stretch.state].append(stretch.rate())
        latencies[stretch.state].append(stretch.percentile())
    return rates, latencies


def ratio(values, state):
    """Return the median of a state's ratios to rest in the same round."""
    return statistics.median(map(lambda with_it, without: with_it / without,
                                 values[state], values[STATES[0]]))


def verdicts(stretches):
    """Return lines that say whether what was wanted holds."""
    rates, latencies = by_state(stretches)
    rate, latency = ratio(rates, STATES[-1]), ratio(latencies, STATES[-1])
    return [
        f"* Requests per second, with / without warm-up: {rate:.3f}; at "
        f"least {LEAST_RATE} {verdict(rate >= LEAST_RATE)}.",
        f"* 99th percentile, with / without warm-up: {latency:.2f}; less "
        f"than {MOST_LATENCY} {verdict(latency < MOST_LATENCY)}."]


def conditions(options):
    """Return a paragraph about the machine and the load."""
    first, second, *_ = machine(argparse.Namespace(
        servers=["shimmercat"], seconds=0, warm_up=0, rounds=0, words="")
    ).splitlines()
    return "\n".join([
        first, second,
        "The server with all its processes and h2load on core "
        f"{options.server_core}, the warm-up on core {options.client_core};"
        f" {CONNECTIONS} connections of one stream each; TLS 1.3; access "
        "log on.",
        f"{options.images} images of {SIZE[0]} x {SIZE[1]} pixels in "
        f"{options.rounds} rounds; medians of rounds.",
        f"Command: ``python tests/bench/warm_up.py {options.words}``.", ""])


def parse(words):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--images", type=int, default=200, help="of all rounds together")
    add("--seconds", type=int, default=10, help="length of a stretch "
        "without warm-up")
    add("--warm-up", type=int, default=2, help="seconds of h2load's own")
    add("--server-core", type=int, default=0, help="has the load, too")
    add("--client-core", type=int, default=1, help="warms images up")
    options = parser.parse_args(words)
    options.words = " ".join(words)
    for tool in ("h2load", "taskset"):
        if not shutil.which(tool):
            parser.error(f"{tool} is not installed")
    if max(options.server_core, options.client_core) >= os.cpu_count():
        parser.error("server and warm-up need a core each")
    if options.images < options.rounds:
        parser.error("every round needs an image")
    return options


def main(words):
    """Measure and print the tables."""
    options = parse(words)
    with tempfile.TemporaryDirectory(prefix="shimmercat-bench.") as folder:
        bench = Yard(Path(folder), options.server_core)
        bench.prepare()
        with Shimmercat(bench, free_port()) as server:
            warm(server, bench.site, options.client_core)
            bench.add_images(options.images, options.rounds)
            stretches = measure(server, options)
    print(conditions(options))
    print(results_table(stretches))
    print("\n".join(verdicts(stretches)), "\n")
    print(rounds_table(stretches))
    seconds = sum(x.end - x.begin for x in stretches
                  if x.state == STATES[-1])
    print(f"{options.images} images took {seconds:.0f} s of warm-up.")


if __name__ == "__main__":
    main(sys.argv[1:])
