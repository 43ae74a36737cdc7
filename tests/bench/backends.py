"""Compares shimmercat with its peers in front of an application.

    python tests/bench/backends.py [--rounds 5] [--seconds 3] [--gigabytes 1]

The application is an nginx of its own that answers at once, over HTTP/1.1 on
kept connections; it shares a core with the load, each proxy with all its
processes has the other.  Three things are measured: requests per second of
1 KiB answers; what a proxy adds to the median time of a request when nothing
else goes on; and the memory that it takes while gigabytes pass through it,
down and up.
"""

import argparse
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from compare import (
    STREAMS,
    Bench,
    free_port,
    machine,
    note,
    requests_per_second,
)
from figures import table
from servers import Caddy, Nginx, Server, Shimmercat

PATH = "1k.js"
GIGABYTE = 1 << 30
SAMPLE_SECONDS = 0.05


class Application(Server):
    """Answers everything with 1 KiB, gives a gigabyte and swallows one."""

    name = "application"
    scheme = "http"
    program = Nginx.program

    def prepare(self):
        """Write nginx.conf, and a large file that takes no room."""
        with open(self.folder / "large", "wb") as large:
            large.truncate(GIGABYTE)
        (self.folder / "nginx.conf").write_text(f"""
daemon off;
user root;
worker_processes 1;
pid {self.folder}/pid;
error_log {self.folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_max_body_size 0;
    client_body_temp_path {self.folder}/bodies;
    server {{
        listen 127.0.0.1:{self.port} backlog=4096;
        location / {{ return 200 "{'x' * 1024}"; }}
        location /sink {{
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_pass http://127.0.0.1:{self.bench.sink};
        }}
        location /large {{ alias {self.folder}/large; }}
    }}
}}
""")

    def command(self):
        """On the core of the load."""
        return ["taskset", "-c", self.bench.client_core, self.program(),
                "-p", self.folder, "-e", "error.log",
                "-c", self.folder / "nginx.conf"]

    def _wait_until_it_serves(self):
        """Nothing to do: who is in front of it waits."""


class ShimmercatProxy(Shimmercat):
    """An api domain: all requests go to the application."""


    def prepare(self):
        """Write devlove.yaml anew."""
        super().prepare()
        (self.folder / "devlove.yaml").write_text(
            "shimmercat-devlove:\n  domains:\n    api localhost:\n"
            f"      port: 127.0.0.1:{self.bench.application.port}\n")
        (self.folder / ".shimmercat.loves.devs/tweaks.yaml").write_text(
            "connections-per-peer: 20000\nmax-body-bytes: 999 GiB\n"
            "max-waiting: 2000\n")


class NginxProxy(Nginx):
    """proxy_pass with kept connections and nothing put away on disk."""

    def prepare(self):
        """Write nginx.conf anew: what is said of files means proxies."""
        super().prepare()
        path = self.folder / "nginx.conf"
        port = self.bench.application.port
        path.write_text(path.read_text().replace("    server {", f"""
    upstream application {{
        server 127.0.0.1:{port};
        keepalive 64;
        keepalive_requests 1000000000;
    }}
    client_max_body_size 0;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering off;
    proxy_request_buffering off;
    server {{""").replace(f"root {self.bench.www};",
                          "location / { proxy_pass http://application; }"))


class CaddyProxy(Caddy):
    """reverse_proxy as it comes."""

    def prepare(self):
        """Write the Caddyfile anew."""
        super().prepare()
        path = self.folder / "Caddyfile"
        port = self.bench.application.port
        path.write_text(path.read_text().replace(
            f"root * {self.bench.www}", "").replace(
                "file_server", f"reverse_proxy 127.0.0.1:{port}"))


@contextlib.contextmanager
def running_sink():
    """Run what reads a body whole before it answers; give its port."""
    def swallow(wire):
        with wire, wire.makefile("rb") as stream:
            left = 0
            while line := stream.readline().strip().lower():
                name, _, value = line.partition(b":")
                left = int(value) if name == b"content-length" else left
            while left > 0:
                left -= len(stream.read(min(left, 1 << 16)))
            wire.sendall(b"HTTP/1.1 204 No Content\r\n"
                         b"connection: close\r\n\r\n")

    def accept():
        # It ends when the listener is shut down.
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=swallow, daemon=True, args=(
                    listener.accept()[0],)).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


PROXIES = (ShimmercatProxy, NginxProxy, CaddyProxy)


def median_milliseconds(url, port, options):
    """Return the median time of a request, one at a time."""
    with tempfile.NamedTemporaryFile(dir=options.folder) as log:
        subprocess.run(
            ["taskset", "-c", str(options.client_core), "h2load",
             *(["--h1"] if url.startswith("http:") else []),
             f"--connect-to=127.0.0.1:{port}", "--threads=1", "--clients=1",
             "--max-concurrent-streams=1", f"--log-file={log.name}",
             f"--duration={options.seconds}", url],
            capture_output=True, check=True, timeout=options.seconds + 60)
        times = [int(line.split()[2]) for line in log]
    return statistics.median(times) / 1000


def peak_growth(server, words):
    """Return the bytes by which a server grows while a command runs."""
    before = peak = server.memory_bytes()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, server.memory_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        begin = time.monotonic()
        status = subprocess.run(words, capture_output=True, check=True,
                                text=True, timeout=600).stdout
        spent = time.monotonic() - begin
    finally:
        done.set()
        watcher.join()
    server.forget_log()
    if status not in ("200", "204"):
        raise RuntimeError(f"{server.name}: {words} ended in {status}")
    return peak - before, spent


def transfers(server, options):
    """Return {way: (bytes grown, seconds)} of gigabytes down and up."""
    base = f"https://localhost:{server.port}"
    common = ["taskset", "-c", str(options.client_core), "curl", "--silent",
              "--show-error", "--fail", "--http2", "--cacert",
              str(server.bench.certificate), "--output", "/dev/null",
              "--write-out", "%{http_code}"]
    large = str(server.bench.application.folder / "large")
    return {"down": peak_growth(server, [*common, f"{base}/large"]),
            "up": peak_growth(server, [
                *common, "--upload-file", large, f"{base}/sink"])}


def parse(words):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--seconds", type=int, default=3, help="length of one load")
    add("--warm-up", type=int, default=1)
    add("--gigabytes", type=int, default=1, choices=(0, 1))
    add("--server-core", type=int, default=0)
    add("--client-core", type=int, default=1)
    options = parser.parse_args(words)
    options.words = " ".join(words)
    options.servers = [kind.name for kind in PROXIES]
    return options


def measure(servers, options):
    """Return rates by streams, and added milliseconds, by server."""
    rates = {(streams, server.name): []
             for streams in STREAMS for server in servers}
    added = {server.name: [] for server in servers}
    direct = servers[0].bench.application.port
    for turn in range(options.rounds):
        base = median_milliseconds(
            f"http://localhost:{direct}/{PATH}", direct, options)
        for server in servers:
            for streams in STREAMS:
                rate = requests_per_second(server, PATH, streams, options)
                rates[streams, server.name].append(rate)
                note(f"round {turn + 1} x{streams} {server.name}: {rate:.0f}")
            through = median_milliseconds(
                f"https://localhost:{server.port}/{PATH}", server.port,
                options)
            added[server.name].append(through - base)
    return ({key: statistics.median(row) for key, row in rates.items()},
            {name: statistics.median(row) for name, row in added.items()})


def report(rates, added, moved):
    """Print the tables."""
    names = list(added)
    rows = [[f"requests/s, {streams} stream{'s' if streams > 1 else ''}",
             *(f"{rates[streams, name]:,.0f}" for name in names)]
            for streams in STREAMS]
    rows += [["shimmercat / peer", *(
        f"{rates[streams, names[0]] / rates[streams, name]:.2f}"
        for name in names)] for streams in STREAMS]
    rows.append(["added to the median, ms",
                 *(f"{added[name]:.2f}" for name in names)])
    for way in ("down", "up") if moved else ():
        rows.append([f"1 GiB {way}, MiB grown", *(
            f"{moved[name][way][0] / 2 ** 20:.1f}" for name in names)])
        rows.append([f"1 GiB {way}, MiB/s", *(
            f"{1024 / moved[name][way][1]:,.0f}" for name in names)])
    print(table(["Before an application", *names], rows))


def main(words):
    """Measure and print the tables."""
    options = parse(words)
    with (tempfile.TemporaryDirectory(prefix="shimmercat-bench.") as folder,
          contextlib.ExitStack() as stack):
        options.folder = folder
        bench = Bench(Path(folder), options.server_core)
        bench.client_core = options.client_core
        bench.prepare()
        bench.sink = stack.enter_context(running_sink())
        bench.application = stack.enter_context(
            Application(bench, free_port()))
        servers = [stack.enter_context(kind(bench, free_port()))
                   for kind in PROXIES if kind.program()]
        rates, added = measure(servers, options)
        moved = {}
        if options.gigabytes:
            moved = {server.name: transfers(server, options)
                     for server in servers}
    print(machine(options).replace("compare.py", "backends.py"))
    report(rates, added, moved)


if __name__ == "__main__":
    for tool in ("h2load", "taskset", "curl", "nginx"):
        if not (shutil.which(tool) or Nginx.program()):
            sys.exit(f"{tool} is not installed")
    main(sys.argv[1:])
