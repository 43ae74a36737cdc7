"""Runs h2load (nghttp2-client) and reads what it prints.

Its output is for people: what cannot be read in it for certain, and any
answer but 2xx, is an error here and never a figure.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import time

CONNECTIONS = 32
#: TLS_AES_128_GCM_SHA256 is what RFC 8446 obliges all to have; left alone,
#: nghttpd takes AES-256 and the others AES-128
CIPHERS = "TLS_AES_128_GCM_SHA256"
#: above its duration, for the handshakes and the end
PATIENCE_SECONDS = 30
#: the part of the duration, at either end, in which processor time is not
#: counted: h2load's clock starts some milliseconds after ours
MARGIN = 0.1

STATUSES = re.compile(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, "
                      r"(\d+) 5xx$", re.MULTILINE)
REQUESTS = re.compile(
    r"^requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, "
    r"(\d+) failed, (\d+) errored, (\d+) timeout$", re.MULTILINE)
RATE = re.compile(r"^finished in [\d.]+m?s, ([\d.]+) req/s, ", re.MULTILINE)
TRAFFIC = re.compile(r"^traffic: \S+ \((\d+)\) total, ", re.MULTILINE)
PROTOCOL = re.compile(r"^TLS Protocol: (\S+)$", re.MULTILINE)


class NoFigure(Exception):
    """h2load's output does not say what was asked for, or says that
    something failed."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a server did under a load."""

    #: requests per second that ended
    rate: float
    #: bytes per second, frames and their heads, before encryption
    octets: float
    #: processor seconds per second, of all processes of the server
    busy: float
    #: how long requests took, in microseconds, in order; empty if not asked
    times: tuple = ()

    @property
    def cost(self):
        """Processor time of the server for a request, in microseconds."""
        return 1e6 * self.busy / self.rate

    def milliseconds(self, percent):
        """Return the time within which so many per cent of all ended."""
        return self.times[(len(self.times) - 1) * percent // 100] / 1000


def parse(output, seconds):
    """Return requests and bytes per second of a load with a duration.

    Raises `NoFigure` if a request failed, nothing came, or the output is of
    another form.  What h2load counts is of its main phase alone, but for the
    statuses and the data.
    """
    found = [pattern.search(output) for pattern in
             (STATUSES, REQUESTS, RATE, TRAFFIC, PROTOCOL)]
    if not all(found):
        raise NoFigure(f"h2load said something else: {output}")
    statuses, requests, rate, traffic, protocol = found
    done, succeeded, *broken = map(int, requests.groups())
    if any(broken) or done != succeeded or any(
            map(int, statuses.groups()[1:])):
        raise NoFigure(f"requests failed: {output}")
    if protocol[1] != "TLSv1.3":
        raise NoFigure(f"TLS 1.3 is wanted: {output}")
    if not int(traffic[1]):
        raise NoFigure(f"nothing came: {output}")
    return float(rate[1]), int(traffic[1]) / seconds


def parse_times(lines):
    """Return the microseconds in a log of h2load, in order.

    Requests whose header came before the main phase and whose end came in it
    have status 0 there; they are left out.  Raises `NoFigure` on any other
    status but 200.
    """
    times = []
    for line in lines:
        _, status, microseconds = line.split()[:3]
        if status == "200":
            times.append(int(microseconds))
        elif status != "0":
            raise NoFigure(f"status {status} in h2load's log")
    if not times:
        raise NoFigure("no request in h2load's log")
    return tuple(sorted(times))


def load(server, path, options, *, streams=1, connections=CONNECTIONS,
         cores=None, pace=None, timed=False):
    """Put a load on a server and return a `Load`.

    One h2load with so many connections runs on each of `cores`, by default
    on that of the load.  `pace` limits the requests per second of all
    together: each connection sends, about every 10 ms, what is due at once.
    With `timed` all times are kept.  Raises `NoFigure` or
    `subprocess.TimeoutExpired`.
    """
    cores = [options.client_core] if cores is None else cores
    words = ["h2load", f"--connect-to=127.0.0.1:{server.port}", "--threads=1",
             f"--clients={connections}", f"--tls13-ciphers={CIPHERS}",
             f"--max-concurrent-streams={streams}",
             f"--warm-up-time={round(options.warm_up * 1000)}ms",
             f"--duration={round(options.seconds * 1000)}ms",
             f"https://localhost:{server.port}/{path}"]
    if pace is not None:
        each = pace / connections / len(cores)
        words.insert(1, f"--rps={each:.2f}")
    with tempfile.NamedTemporaryFile("r", dir=server.folder) as log:
        if timed:
            words.insert(1, f"--log-file={log.name}")
        try:
            outputs, busy = run(server, words, cores, options)
        finally:
            server.forget_log()
        times = parse_times(log) if timed else ()
    if not busy:
        raise NoFigure(f"{server.name} had no processor time")
    figures = [parse(output, options.seconds) for output in outputs]
    return Load(sum(rate for rate, _ in figures),
                sum(octets for _, octets in figures), busy, times)


def run(server, words, cores, options):
    """Run a command on each core; return all outputs, and the processor
    seconds per second that the server takes in the middle of them."""
    with contextlib.ExitStack() as stack:
        running = []
        for core in cores:
            process = stack.enter_context(subprocess.Popen(
                ["taskset", "-c", str(core), *words], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
            stack.callback(process.kill)
            running.append(process)
        time.sleep(options.warm_up + MARGIN * options.seconds)
        begun, spent = time.monotonic(), server.cpu_seconds()
        time.sleep((1 - 2 * MARGIN) * options.seconds)
        busy = (server.cpu_seconds() - spent) / (time.monotonic() - begun)
        return [process.communicate(timeout=PATIENCE_SECONDS)[0]
                for process in running], busy
