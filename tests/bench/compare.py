"""Compares shimmercat with its peers: same machine, cores, files, minute.

    python tests/bench/compare.py [--rounds 3] [--seconds 2] [--idle 2000]
        [--measure rates,latency,large,handshakes,memory,workers]
        [--servers shimmercat,nginx,...|all] [--plot FILE.png]

Every server, all its processes included, runs on one core, the load on
another.  Rounds go over all servers in turn, so that a slow minute of the
machine hurts all of them; the tables show medians, as reStructuredText.
Where a server used less than nine tenths of its core, the load was the limit:
the figure has a `>`, and the processor time per request says more.

rates
    Requests per second of small files, with the processor time (utime and
    stime of all processes of the server) that each took.
latency
    Of 1 KiB at one stream: at full load, where the mean is the number of
    connections divided by the rate, and at half of the server's own maximum.
    There each connection sends about every 10 ms what is due by then, so the
    99th percentile is that of bursts that overlap.
large
    A file of 100 MB, over one connection and over several.
handshakes
    TLS handshakes, full and resumed.  The client (handshakes.py, Python's
    ssl on eight threads) has to check what a server signs and so does more
    than a server in C; so there is, beside what one core of client brought
    about, how many a server makes in a second of its processor time.
memory
    Of idle connections, the kernel's account (PSS) after minus before; after
    each round, that of all processes and of the worker, and what the worker
    shares with none.
workers
    With two cores there is none left for the load.  So each worker shares a
    core with a load of its own: one such pair on one core, then two on both.
    Perfect scaling doubles the rate.  This shows locks, workers with unequal
    work and processes that all workers wait for.  It cannot show two workers
    at the full speed of a core, and since the loads double, too, it flatters
    servers that are cheap beside them; so twice the processor time per
    request of one worker, over that of two, is given as well, which in turn
    does not show waiting.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import ipaddress
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from figures import MARKS_EXPLAINED, Figures, Row
from h2load import CONNECTIONS, NoFigure, load
from servers import SERVERS, first_line

HERE = Path(__file__).parent
ASSETS = {"1k.js": 1024, "10k.js": 10 * 1024, "100k.js": 100 * 1000}
ASSET_NAMES = {"1k.js": "1 KiB", "10k.js": "10 KiB", "100k.js": "100 KB"}
#: of a type that nobody tries to compress, of octets that nobody could
LARGE, LARGE_OCTETS = "large.zip", 100_000_000
LARGE_CONNECTIONS = (1, 8)
STREAMS = (1, 32)
HALF = 0.5
#: a paced load that does not come so near to its pace is no such load
PACE_KEPT = 0.95
MEASURES = ("rates", "latency", "large", "handshakes", "memory", "workers")
#: those in Python are so much slower that they are measured when asked for
USUAL = ("shimmercat", "nginx", "h2o", "nghttpd", "caddy")
SETTLE_SECONDS = 3
#: time that one connection of the idle test may take to be opened
OPEN_SECONDS = 0.05


class Bench:
    """The folder, files and certificate that all servers share."""

    def __init__(self, folder, server_core):
        self.folder = folder
        self.server_core = server_core
        self.www = folder / "www"
        self.certificate = folder / "certificate.pem"
        self.key = folder / "key.pem"

    def prepare(self):
        """Write the assets and the certificate."""
        self.www.mkdir()
        letters = random.Random(1)
        for name, length in ASSETS.items():
            body = bytes(letters.choices(b"abcdefgh =();\n", k=length))
            (self.www / name).write_bytes(body)
        self._write_certificate()

    def add_large(self):
        """Write the large file."""
        with open(self.www / LARGE, "wb") as large:
            for _ in range(LARGE_OCTETS // 1_000_000):
                large.write(random.randbytes(1_000_000))

    def _write_certificate(self):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(
            x509.NameOID.COMMON_NAME, "localhost")])
        today = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        names = x509.SubjectAlternativeName([
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name)
            .public_key(key.public_key()).serial_number(1)
            .not_valid_before(today - day).not_valid_after(today + 7 * day)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .sign(key, hashes.SHA256()))
        pem = serialization.Encoding.PEM
        self.certificate.write_bytes(certificate.public_bytes(pem))
        self.key.write_bytes(key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()))


def free_port():
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def requests_per_second(server, asset, streams, options):
    """Return the rate of one load, whose every answer was a 200."""
    return load(server, asset, options, streams=streams).rate


def plural(count, noun):
    """Return a number with its noun."""
    return f"{count} {noun}{'s' if count > 1 else ''}"


def measure_rate(asset, streams, server, options, figures):
    """Requests per second of an asset, and their processor time."""
    case = f"{ASSET_NAMES[asset]}, {plural(streams, 'stream')}"
    done = load(server, asset, options, streams=streams)
    figures.add(Row("requests per second", case, "requests/s"),
                server.name, done.rate, done.busy)
    figures.add(Row("processor time per request", f"CPU, {case}", "µs", 1,
                    False), server.name, done.cost)


def measure_latency(server, options, figures):
    """Times of a small asset, at full load and at half of it."""
    full = load(server, "1k.js", options, timed=True)
    half = load(server, "1k.js", options, streams=max(STREAMS), timed=True,
                pace=HALF * full.rate)
    if half.rate < PACE_KEPT * HALF * full.rate:
        raise NoFigure(f"{half.rate:.0f}/s is less than half of the full "
                       f"load, {full.rate:.0f}/s")
    for name, done in ("full load", full), ("half load", half):
        for percent in 50, 99:
            figures.add(Row("latency", f"p{percent}, {name}", "ms", 2,
                            False),
                        server.name, done.milliseconds(percent))


def measure_large(connections, server, options, figures):
    """Megabytes per second of a large file."""
    done = load(server, LARGE, options, connections=connections)
    case = f"100 MB, {plural(connections, 'connection')}"
    figures.add(Row("a large file", case, "MB/s"),
                server.name, done.octets / 1e6, done.busy)
    figures.add(Row("a large file", f"CPU, {case}", "µs/MB", 0, False),
                server.name, 1e12 * done.busy / done.octets)


def measure_handshakes(kind, server, options, figures):
    """TLS handshakes per second, full or resumed."""
    words = ["taskset", "-c", options.client_core, sys.executable,
             HERE / "handshakes.py", server.port, options.seconds, kind]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE,
                          text=True) as client:
        try:
            if client.stdout.readline() != "begin\n":
                raise NoFigure("the client did not begin")
            begun, spent = time.monotonic(), server.cpu_seconds()
            count, _ = client.communicate(timeout=options.seconds + 60)
            passed = time.monotonic() - begun
            spent = server.cpu_seconds() - spent
        finally:
            client.kill()
    server.forget_log()
    if client.returncode:
        raise NoFigure("handshakes failed")
    figures.add(Row("TLS handshakes", f"handshakes, {kind}", "per second"),
                server.name, int(count) / passed, spent / passed)
    figures.add(Row("TLS handshakes", f"CPU, handshakes, {kind}",
                    "per CPU second"), server.name, int(count) / spent)


def measure_worker_memory(server, _options, figures):
    """Memory of a server that has had its loads."""
    figures.add(Row("memory", "all processes", "MiB", 1, False),
                server.name, server.memory_bytes() / 2 ** 20)
    for name, value in zip(("worker, PSS", "worker, private"),
                           server.worker_bytes(), strict=True):
        figures.add(Row("memory", name, "MiB", 1, False),
                    server.name, value / 2 ** 20)


def measure_workers(pairs, server, options, figures):
    """One worker beside its load on a core, and two on two."""
    both = [options.server_core, options.client_core]
    one = load(server, "1k.js", options, cores=both[:1])
    two = load(pairs[server.name], "1k.js", options, cores=both)
    group = "two workers"
    figures.add(Row(group, "one worker, one core", "requests/s",
                    is_compared=False),
                server.name, one.rate)
    figures.add(Row(group, "two workers, two cores", "requests/s",
                    is_compared=False),
                server.name, two.rate)
    figures.add(Row(group, "two workers / one, by rate", digits=2),
                server.name, two.rate / one.rate)
    figures.add(Row(group, "two workers / one, by CPU", digits=2),
                server.name, 2 * one.cost / two.cost)


def steps_of_a_round(measures):
    """Return the functions that each round calls for every server."""
    steps = []
    if "rates" in measures:
        steps += [functools.partial(measure_rate, asset, streams)
                  for asset in ASSETS for streams in STREAMS]
    if "latency" in measures:
        steps.append(measure_latency)
    if "large" in measures:
        steps += [functools.partial(measure_large, count)
                  for count in LARGE_CONNECTIONS]
    if "handshakes" in measures:
        steps += [functools.partial(measure_handshakes, kind)
                  for kind in ("full", "resumed")]
    if "memory" in measures:
        steps.append(measure_worker_memory)
    return steps


def run_rounds(steps, servers, rounds, options, figures):
    """Take all steps with all servers in turn, some times over."""
    for turn in range(rounds):
        order = servers[turn % len(servers):] + servers[:turn % len(servers)]
        for number, step in enumerate(steps, 1):
            name = getattr(step, "func", step).__name__
            note(f"round {turn + 1}/{rounds}, step {number}/{len(steps)}: "
                 f"{name}")
            for server in order:
                try:
                    step(server, options, figures)
                except (NoFigure, subprocess.TimeoutExpired) as error:
                    figures.missing.append(f"{server.name}, {name} of round "
                                           f"{turn + 1}: {error}")
                    note(figures.missing[-1])


def measure_idle(server, options, figures):
    """Memory per idle connection."""
    before = settled_memory(server)
    limit = 60 + options.idle * OPEN_SECONDS
    words = ["taskset", "-c", options.client_core, "timeout", limit,
             sys.executable, HERE / "idle.py", server.port, options.idle,
             server.bench.certificate]
    with subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as client:
        try:
            if client.stdout.readline() != f"open {options.idle}\n":
                raise NoFigure("idle connections were refused")
            after = settled_memory(server)
        finally:
            client.stdin.close()
    server.forget_log()
    if client.returncode:
        raise NoFigure("idle connections were closed")
    figures.add(Row("memory", f"{options.idle:,} idle connections",
                    "KiB each", 1, False),
                server.name, (after - before) / options.idle / 1024)


def settled_memory(server):
    """Return the server's memory once it has stopped changing."""
    last, end = -1, time.monotonic() + 10 * SETTLE_SECONDS
    while time.monotonic() < end:
        now = server.memory_bytes()
        if abs(now - last) < 256 * 1024:
            break
        last = now
        time.sleep(SETTLE_SECONDS)
    return server.memory_bytes()


def note(text):
    """Say on stderr how far the work is."""
    print(text, file=sys.stderr, flush=True)


def machine(options):
    """Return a paragraph that says where and how it was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.+)", cpuinfo)
    versions = ", ".join(f"{kind.name} {kind.version()}"
                         for kind in installed(options.servers))
    h2load = first_line("h2load", "--version").rpartition("/")[2]
    lines = [
        f"{datetime.date.today()}: {model[1] if model else 'unknown CPU'}, "
        f"{os.cpu_count()} cores, Linux {platform.release()}.",
        f"{versions}.",
        "Each server with all its processes on one core, the load on "
        "another; TLS 1.3, one EC P-256 certificate; access logs on (nghttpd "
        "has none).",
        f"Rates: h2load {h2load}, {CONNECTIONS} connections, "
        f"{options.seconds:g} s after {options.warm_up:g} s of warm-up, "
        f"median of {options.rounds} rounds.",
        f"Command: ``python tests/bench/compare.py {options.words}``."]
    return "\n".join(lines) + "\n"


def installed(names):
    """Return the classes of the servers that are here."""
    kinds = [kind for kind in SERVERS if kind.name in names]
    return [kind for kind in kinds if kind.program()]


def parse(words):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--servers", default=",".join(USUAL), help="or all; default: "
        "%(default)s")
    add("--measure", default=",".join(MEASURES), help="default: %(default)s")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=2, help="length of one load")
    add("--warm-up", type=float, default=0.5,
        help="seconds before it counts")
    add("--idle", type=int, default=2000, help="idle connections")
    add("--plot", metavar="FILE.png", help="draw the ratios to nginx")
    add("--server-core", type=int, default=0)
    add("--client-core", type=int, default=1)
    options = parser.parse_args(words)
    options.words = " ".join(words)
    names = [kind.name for kind in SERVERS]
    options.servers = (names if options.servers == "all"
                       else options.servers.split(","))
    options.measure = options.measure.split(",")
    check(options, names, parser.error)
    return options


def check(options, names, error):
    """Call `error` with what is wrong with the options."""
    if unknown := set(options.servers) - set(names):
        error(f"unknown servers {unknown}, known are {names}")
    if unknown := set(options.measure) - set(MEASURES):
        error(f"unknown measures {unknown}, known are {MEASURES}")
    if min(options.rounds, options.idle) < 1 or options.seconds <= 0:
        error("rounds, idle connections and seconds are positive")
    for tool in ("h2load", "taskset"):
        if not shutil.which(tool):
            error(f"{tool} is not installed")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        error("--plot needs matplotlib: pip install '.[bench]'")
    if options.plot and not {"shimmercat", "nginx"} <= {
            kind.name for kind in installed(options.servers)}:
        error("--plot needs shimmercat and nginx")
    if max(options.server_core, options.client_core) >= os.cpu_count():
        error("server and load need a core each")


def start(kinds, bench, stack, workers=1, cores=None):
    """Start servers, and look whether they serve what they should."""
    servers = [stack.enter_context(kind(bench, free_port(), workers, cores))
               for kind in kinds]
    for server in servers:
        for path in bench.www.iterdir():
            if server.get(f"/{path.name}") != path.read_bytes():
                raise RuntimeError(f"{server.name} alters {path.name}")
    return servers


def measure(bench, options):
    """Return all figures that are asked for."""
    kinds, figures = installed(options.servers), Figures()
    if "memory" in options.measure:
        # By servers of their own: not all give back what they took for it.
        with contextlib.ExitStack() as stack:
            run_rounds([measure_idle], start(kinds, bench, stack), 1,
                       options, figures)
    with contextlib.ExitStack() as stack:
        servers = start(kinds, bench, stack)
        run_rounds(steps_of_a_round(options.measure), servers,
                   options.rounds, options, figures)
        if "workers" in options.measure:
            both = f"{options.server_core},{options.client_core}"
            pairs = {server.name: server for server in start(
                kinds, bench, stack, 2, both)}
            run_rounds([functools.partial(measure_workers, pairs)], servers,
                       options.rounds, options, figures)
    return figures


def main(words):
    """Measure what is asked for, print the tables and draw the plot."""
    options = parse(words)
    # Ended by `timeout`, it still ends the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="shimmercat-bench.") as folder:
        bench = Bench(Path(folder), options.server_core)
        bench.prepare()
        if "large" in options.measure:
            bench.add_large()
        figures = measure(bench, options)
    names = [kind.name for kind in installed(options.servers)]
    print(machine(options))
    print(figures.values_table(names))
    if "shimmercat" in names and len(names) > 1:
        print(figures.ratios_table("shimmercat", [
            name for name in names if name != "shimmercat"]))
    print(MARKS_EXPLAINED)
    for sentence in figures.missing:
        print(f"Missing: {sentence}")
    if options.plot:
        import plot
        caption = "\n".join(machine(options).splitlines()[:2])
        plot.draw(figures, options.plot, caption)


if __name__ == "__main__":
    main(sys.argv[1:])
