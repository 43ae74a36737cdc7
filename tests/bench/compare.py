"""Compares shimmercat with its peers: same machine, cores, files, minute.

    python tests/bench/compare.py [--rounds 5] [--seconds 4] [--idle 2000]

Every server, all its processes included, runs on one core, the load on
another.  Rounds go over all servers in turn, so that a slow minute of the
machine hurts all of them; the tables show medians, as reStructuredText.
"""

import argparse
import contextlib
import datetime
import ipaddress
import os
import platform
import random
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from servers import SERVERS, first_line

HERE = Path(__file__).parent
ASSETS = {"1k.js": 1024, "10k.js": 10 * 1024, "100k.js": 100 * 1000}
ASSET_NAMES = {"1k.js": "1 KiB", "10k.js": "10 KiB", "100k.js": "100 KB"}
STREAMS = (1, 32)
CONNECTIONS = 32
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
    url = f"https://localhost:{server.port}/{asset}"
    done = subprocess.run(
        ["taskset", "-c", str(options.client_core), "h2load",
         f"--connect-to=127.0.0.1:{server.port}",
         "--threads=1", f"--clients={CONNECTIONS}",
         f"--max-concurrent-streams={streams}",
         f"--warm-up-time={options.warm_up}",
         f"--duration={options.seconds}", url],
        capture_output=True, text=True, check=True,
        timeout=options.warm_up + options.seconds + 60)
    server.forget_log()
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored",
                       done.stdout)
    rate = re.search(r"([\d.]+) req/s", done.stdout)
    statuses = re.search(r"(\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx",
                         done.stdout)
    broken = [*map(int, counts.groups()[1:] + statuses.groups()[1:])]
    if any(broken) or not int(counts[1]):
        raise RuntimeError(f"{server.name}, {asset}: {done.stdout}")
    return float(rate[1])


def measure_rates(servers, options):
    """Return {(asset, streams): {server: median rate}}."""
    rates = {(asset, streams): {server.name: [] for server in servers}
             for asset in ASSETS for streams in STREAMS}
    for turn in range(options.rounds):
        order = servers[turn % len(servers):] + servers[:turn % len(servers)]
        for (asset, streams), row in rates.items():
            for server in order:
                rate = requests_per_second(server, asset, streams, options)
                row[server.name].append(rate)
                note(f"round {turn + 1}/{options.rounds} {asset} "
                     f"x{streams} {server.name}: {rate:.0f}/s")
    return {case: {name: statistics.median(row[name]) for name in row}
            for case, row in rates.items()}


def measure_memory(server, options):
    """Return bytes per idle connection."""
    before = settled_memory(server)
    limit = 60 + options.idle * OPEN_SECONDS
    words = ["taskset", "-c", options.client_core, "timeout", limit,
             sys.executable, HERE / "idle.py", server.port, options.idle,
             server.bench.certificate]
    with subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as client:
        try:
            if client.stdout.readline() != f"open {options.idle}\n":
                raise RuntimeError(f"{server.name} did not hold them")
            after = settled_memory(server)
        finally:
            client.stdin.close()
    server.forget_log()
    return (after - before) / options.idle


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


def table(head, rows):
    """Return a simple table of reStructuredText."""
    rows = [head, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    texts = ["  ".join(
        cell.ljust(width) if n == 0 else cell.rjust(width)
        for n, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip() for row in rows]
    return "\n".join([rule, texts[0], rule, *texts[1:], rule, ""])


def case_name(case):
    """Return the first cell of a row."""
    asset, streams = case
    plural = "s" if streams > 1 else ""
    return f"{ASSET_NAMES[asset]}, {streams} stream{plural}"


def rates_table(rates):
    """Return the table of requests per second."""
    names = list(next(iter(rates.values())))
    return table(["Requests per second", *names], [
        [case_name(case), *(f"{row[name]:,.0f}" for name in names)]
        for case, row in rates.items()])


def ratios_table(rates):
    """Return the table of shimmercat's rates relative to all peers'."""
    names = [n for n in next(iter(rates.values())) if n != "shimmercat"]
    return table(["shimmercat / peer", *names], [
        [case_name(case),
         *(f"{row['shimmercat'] / row[name]:.2f}" for name in names)]
        for case, row in rates.items()])


def memory_table(memory, count):
    """Return the table of memory per idle connection."""
    return table([f"{count:,} idle connections", "KiB each"], [
        [name, f"{value / 1024:.1f}"] for name, value in memory.items()])


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
        "another; TLS 1.3, one EC P-256 certificate; access logs on.",
        f"Rates: h2load {h2load}, {CONNECTIONS} connections, "
        f"{options.seconds} s after {options.warm_up} s of warm-up, "
        f"median of {options.rounds} rounds.",
        f"Command: ``python tests/bench/compare.py {options.words}``."]
    return "\n".join(lines) + "\n"


def installed(names):
    """Return the classes of the servers that are here."""
    kinds = [kind for kind in SERVERS if kind.name in names]
    return [kind for kind in kinds if kind.program()]


def parse(words):
    """Read the command line."""
    names = [kind.name for kind in SERVERS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--servers", default=",".join(names), help="default: %(default)s")
    add("--rounds", type=int, default=5, help="0: no rates")
    add("--seconds", type=int, default=4, help="length of one load")
    add("--warm-up", type=int, default=1, help="seconds before it counts")
    add("--idle", type=int, default=2000,
        help="idle connections; 0: no memory")
    add("--server-core", type=int, default=0)
    add("--client-core", type=int, default=1)
    options = parser.parse_args(words)
    options.words = " ".join(words)
    options.servers = options.servers.split(",")
    unknown = set(options.servers) - set(names)
    if unknown:
        parser.error(f"unknown servers {unknown}, known are {names}")
    for tool in ("h2load", "taskset"):
        if not shutil.which(tool):
            parser.error(f"{tool} is not installed")
    if max(options.server_core, options.client_core) >= os.cpu_count():
        parser.error("server and load need a core each")
    return options


def main(words):
    """Measure what is asked for and print the tables."""
    options = parse(words)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rates, memory = {}, {}
    with tempfile.TemporaryDirectory(prefix="shimmercat-bench.") as folder, \
            contextlib.ExitStack() as stack:
        bench = Bench(Path(folder), options.server_core)
        bench.prepare()
        servers = [stack.enter_context(kind(bench, free_port()))
                   for kind in installed(options.servers)]
        for server in servers:
            for asset in ASSETS:
                if server.get(f"/{asset}") != (bench.www / asset).read_bytes():
                    raise RuntimeError(f"{server.name} alters {asset}")
        if options.idle:
            for server in servers:
                memory[server.name] = measure_memory(server, options)
                note(f"idle {server.name}: {memory[server.name]:.0f} bytes")
        if options.rounds:
            rates = measure_rates(servers, options)
    print(machine(options))
    if rates:
        print(rates_table(rates))
    if rates and "shimmercat" in options.servers:
        print(ratios_table(rates))
    if memory:
        print(memory_table(memory, options.idle))


if __name__ == "__main__":
    main(sys.argv[1:])
