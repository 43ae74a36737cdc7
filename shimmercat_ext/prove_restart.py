"""What `shimmercat.py prove-restart` does: restarts under load, counted.

A second instance is started with the operator's configuration, on a spare
port and with a scratch folder of its own.  What visitors will ask for is
asked for once, and what fails by itself is told and left out.  Then they ask
for the rest without a pause while the instance is restarted in every way; each
request must be answered whole.  Whoever is asked to leave a connection
(GOAWAY, a refused stream: RFC 9113 sections 6.8 and 8.7) asks once more on
another one, as browsers do, and the time of both counts.
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from urllib.parse import quote

import gevent
import gevent.pool
import hpack
import hyperframe.exceptions
import hyperframe.frame as frames

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW = 16 << 20  #: bytes that may come before they are acknowledged
_MOST_FRAME = 1 << 14
_VISITORS = 8  #: connections at a time
_STREAMS = 4  #: requests at a time on each
_ANSWER_SECONDS = 30  #: who waits for longer was not answered
_MOST_TRIES = 8  #: connections that one request is tried on
_MOST_PATHS = 100  #: files of each domain that are asked for
_MOST_ENTRIES = 10_000  #: of a folder that are looked at for them
_STEP_SECONDS = 60  #: until a restart must be over
_START_SECONDS = 60
_NO_ERROR, _REFUSED_STREAM = 0, 7
_MOST_TOLD = 10  #: lines about what is left out
#: what the log says of requests that fail: of applications, origins, views
_CAUSES = frozenset(("M40023", "M40041", "M60001", "M60025", "M60026"))
_CAUSE_SECONDS = 2  #: that a line may take from a worker to the log

#: s; lives of workers, short enough for apoptosis to be seen
_LIVES = "2-8"


class Ask(typing.NamedTuple):
    """What one request is for."""

    authority: str
    path: str


class Row:
    """What became of the requests that ended during one way of restarting."""

    def __init__(self):
        self.times = 0
        self.requests = 0
        #: seconds of the request that took longest
        self.longest = 0.0
        #: {what went wrong: how often}
        self.failures = collections.Counter()


class _Connection:
    """One connection of a visitor; ends when it must or may not be used.

    Speaks in frames: the h2 library takes nothing more after a GOAWAY, and
    what was asked before it is still answered.
    """

    def __init__(self, port, authority, streams):
        self._streams = streams
        context = ssl.create_default_context()
        # It is our own child at the other end, whatever its certificate says.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", port), _ANSWER_SECONDS)
        try:
            self._socket = context.wrap_socket(
                plain, server_hostname=authority)
        except BaseException:
            plain.close()
            raise
        self._authority = authority
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._next, self._received, self._unread = 1, 0, b""
        #: requests without a whole answer, by stream
        self.open = {}
        #: whether no request may be begun
        self.is_leaving = False
        settings = frames.SettingsFrame(0, {
            frames.SettingsFrame.ENABLE_PUSH: 0,
            frames.SettingsFrame.INITIAL_WINDOW_SIZE: _WINDOW})
        window = frames.WindowUpdateFrame(0, window_increment=_WINDOW)
        self._socket.sendall(
            _PREFACE + settings.serialize() + window.serialize())

    def close(self):
        """Closes the socket."""
        self._socket.close()

    def has_place(self):
        """Whether one more request may be begun."""
        return not self.is_leaving and len(self.open) < self._streams

    def ask(self, request):
        """Begins a request; raises OSError."""
        block = self._encoder.encode([
            (":method", "GET"), (":scheme", "https"),
            (":authority", self._authority), (":path", request.ask.path),
            ("accept-encoding", "br, gzip"),
            ("user-agent", "shimmercat prove-restart")])
        frame = frames.HeadersFrame(
            self._next, block, flags=["END_HEADERS", "END_STREAM"])
        request.begin()
        self.open[self._next] = request
        self._next += 2
        self._socket.sendall(frame.serialize())

    def turn(self):
        """Takes what has come; gives the requests that ended.

        Each comes with what went wrong, "" for nothing and None when it is to
        be asked again.  Raises OSError, also when the peer has closed.
        """
        data = self._socket.recv(1 << 16)
        if not data:
            raise OSError("closed without an answer")
        self._unread += data
        ended, answer = [], b""
        for frame in self._frames():
            if isinstance(frame, frames.GoAwayFrame):
                ended += self._leave(frame)
            elif isinstance(frame, frames.SettingsFrame | frames.PingFrame):
                answer += self._acknowledged(frame)
            elif frame.stream_id in self.open:
                ended += self._of_stream(frame)
            if isinstance(frame, frames.DataFrame):
                self._received += frame.flow_controlled_length
        if self._received > _WINDOW // 2:
            answer += frames.WindowUpdateFrame(
                0, window_increment=self._received).serialize()
            self._received = 0
        if answer:
            self._socket.sendall(answer)
        return ended

    def _frames(self):
        """The whole frames that have come, one after the other."""
        view, start = memoryview(self._unread), 0
        while len(view) - start >= 9:
            frame, length = frames.Frame.parse_frame_header(
                view[start:start + 9])
            if length > _MOST_FRAME:
                raise OSError(f"a frame of {length} bytes")
            if len(view) - start - 9 < length:
                break
            frame.parse_body(view[start + 9:start + 9 + length])
            start += 9 + length
            yield frame
        self._unread = bytes(view[start:])

    @staticmethod
    def _acknowledged(frame):
        """The answer to SETTINGS or PING."""
        if "ACK" in frame.flags:
            return b""
        if isinstance(frame, frames.PingFrame):
            return frames.PingFrame(
                0, frame.opaque_data, flags=["ACK"]).serialize()
        return frames.SettingsFrame(0, flags=["ACK"]).serialize()

    def _leave(self, frame):
        """The requests that a GOAWAY leaves unanswered."""
        self.is_leaving = True
        why = None if frame.error_code == _NO_ERROR else (
            f"GOAWAY with error {frame.error_code}")
        left = [n for n in self.open if n > frame.last_stream_id]
        return [(self.open.pop(n), why) for n in left]

    def _of_stream(self, frame):
        """The request of a stream, where this frame ends it."""
        number, request = frame.stream_id, self.open[frame.stream_id]
        if isinstance(frame, frames.HeadersFrame):
            if "END_HEADERS" not in frame.flags:
                raise OSError("a head in two frames")
            fields = dict(self._decoder.decode(frame.data))
            request.status = int(fields.get(":status", request.status))
            request.expected = int(fields.get("content-length", -1))
        elif isinstance(frame, frames.DataFrame):
            request.length += len(frame.data)
        elif isinstance(frame, frames.RstStreamFrame):
            del self.open[number]
            return [(request, None if frame.error_code == _REFUSED_STREAM
                     else f"reset with error {frame.error_code}")]
        if "END_STREAM" not in frame.flags:
            return []
        del self.open[number]
        return [(request, request.fault())]


class _Request:
    """One request, until it is answered or was tried often enough."""

    def __init__(self, ask):
        self.ask = ask
        self.started, self.tries, self.status = time.monotonic(), 0, 0

    def begin(self):
        """Begins one more try, of which nothing has come yet."""
        self.tries += 1
        self.status, self.expected, self.length = 0, -1, 0

    def fault(self):
        """What is wrong with the answer, or nothing."""
        if not 200 <= self.status < 500:
            return f"status {self.status}"
        if self.expected not in (-1, self.length):
            return "an answer that is not whole"
        return ""


class Crowd:
    """Visitors that ask without a pause; `row` counts what they get."""

    def __init__(self, port: int, asks: list[Ask]):
        """Knows what to ask for; nothing is sent before `start`."""
        self._port, self._asks = port, asks
        self._greenlets = []
        self._stopped = False
        self.row = Row()
        self.total = 0

    def start(self) -> None:
        """Sends the visitors on their way."""
        for number, authority in zip(range(_VISITORS), itertools.cycle(
                _by_authority(self._asks).items()), strict=False):
            self._greenlets.append(gevent.spawn(
                _visit, self._port, authority[0],
                self._fresh(authority[1], number), self._end))

    def stop(self) -> None:
        """Has them finish what they have begun; raises what they raised."""
        self._stopped = True
        gevent.joinall(self._greenlets, _ANSWER_SECONDS, raise_error=True)
        gevent.killall(self._greenlets)

    def _fresh(self, asks, number):
        """Requests without end; visitors begin at different ones."""
        for ask in itertools.islice(itertools.cycle(asks), number, None):
            if self._stopped:
                return
            yield _Request(ask)

    def _end(self, request, fault):
        """Counts a request that has ended."""
        self.total += 1
        self.row.requests += 1
        self.row.longest = max(
            self.row.longest, time.monotonic() - request.started)
        if fault:
            self.row.failures[fault] += 1


def survey(port: int, asks: list[Ask]) -> dict[Ask, tuple[int, str]]:
    """Status, and what is wrong if anything, of each request asked once."""
    answers = {}

    def end(request, fault):
        answers[request.ask] = request.status, fault

    pool = gevent.pool.Pool(_VISITORS)
    for authority, group in _by_authority(asks).items():
        # One stream, so that who is late is not held against others.
        pool.spawn(_visit, port, authority, map(_Request, group), end, 1)
    pool.join(raise_error=True)
    return {ask: answers[ask] for ask in asks}


def _by_authority(asks):
    """{authority: its requests}."""
    groups = collections.defaultdict(list)
    for ask in asks:
        groups[ask.authority].append(ask)
    return groups


def _visit(port, authority, fresh, end, streams=_STREAMS):
    """Asks what the iterator `fresh` gives; a greenlet's body.

    Connections follow one after the other; `end` gets each request and what
    went wrong, or "".
    """
    again = collections.deque()
    for request in fresh:
        again.append(request)
        while again:
            try:
                connection = _Connection(port, authority, streams)
            except OSError as error:
                end(again.popleft(), f"not connected: {error}")
                gevent.sleep(0.01)
                continue
            with contextlib.closing(connection):
                _use(connection, again, fresh, end)


def _use(connection, again, fresh, end):
    """Asks over a connection until it ends, or there is nothing to ask."""
    try:
        while True:
            while connection.has_place() and (
                    request := again.popleft() if again
                    else next(fresh, None)):
                connection.ask(request)
            if not connection.open:
                return
            for request, fault in connection.turn():
                if fault is None and request.tries < _MOST_TRIES:
                    again.append(request)
                else:
                    end(request, "refused again and again"
                        if fault is None else fault)
    except (OSError, hpack.HPACKError,
            hyperframe.exceptions.HyperframeError) as error:
        for request in connection.open.values():
            end(request, f"connection lost: {error}")


class Instance:
    """A second instance of the program, known by what its log says."""

    def __init__(self, program: Path, settings):
        """Prepares a scratch folder beside the operator's; starts nothing.

        `settings` are the operator's (room 3b of shimmercat.py).
        """
        self._folder = Path(tempfile.mkdtemp(
            prefix=".prove-restart.", dir=settings.working_dir))
        for name in ("tweaks.yaml", "cert.pem",
                     "privkey.unencrypted-pkcs8.pem"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(settings.scratch_dir / name, self._folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(settings.scratch_dir / "sni-certs",
                            self._folder / "sni-certs")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [
            sys.executable, str(program), "internet",
            "--working-dir", str(settings.working_dir),
            "--scratch-dir-name", self._folder.name,
            "--engine", settings.engine, "--workers", str(settings.workers),
            "--listen", f"127.0.0.1:{self.port}",
            "--log-format", "json", "--log-codes", "default\\M50001",
            "--unsafe-fast-apoptosis", "--apoptosis-seconds", _LIVES]
        self._process = None
        #: the arbiter, a new one after an upgrade
        self.pid = 0
        #: [process id, whether it is ready] of children by name, oldest first
        self._children = collections.defaultdict(collections.deque)
        #: how often each code was in the log, and its last lines
        self.seen = collections.Counter()
        self._said = collections.deque(maxlen=50)
        #: what it said of requests that failed
        self.causes = collections.deque(maxlen=_MOST_TOLD)

    def __enter__(self):
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True)
            self._reader = gevent.spawn(self._read)
            self.until(lambda: self.seen["M50003"], "the start",
                       _START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure):
        try:
            if self._process is not None:
                self._end()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self):
        """Ends all processes, gently while they follow."""
        for number, seconds in ((signal.SIGTERM, _STEP_SECONDS),
                                (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGTERM:
                    os.kill(self.pid or self._process.pid, number)
                else:
                    os.killpg(self._process.pid, number)
            # Its end closes the last writer of the log.
            if self._reader.join(seconds) or self._reader.dead:
                break
        self._process.wait()

    def _read(self):
        """Follows the log; a greenlet's body."""
        for line in self._process.stdout:
            try:
                self._note(json.loads(line))
            except ValueError:
                # Not the log's: what Python says when it cannot start.
                self._said.append(line.decode(errors="replace").rstrip())

    def _note(self, line):
        code, message = line["code"], line["message"]
        words = message.split()
        self.seen[code] += 1
        self._said.append(f"{code} {line['worker']} {message}")
        if code in _CAUSES:
            self.causes.append(f"{code} {message}")
        if code == "M20001":
            self._children[words[0]].append([int(words[-1]), False])
        elif code == "M20002":
            self._children[words[0]][-1][1] = True
        elif code in ("M30001", "M60002"):
            # Names of workers are unique; of others the older one leaves.
            self._children[words[0]].popleft()
        elif code == "M50003":
            self.pid = int(words[-1])

    def children(self, kind: str = "w", ready: bool = True) -> list[int]:
        """Process ids of such children, maybe of those only that are ready."""
        return [pid for name, group in self._children.items()
                if name.startswith(kind) for pid, is_ready in group
                if is_ready or not ready]

    def until(self, holds: typing.Callable[[], object], what: str,
              seconds: float = _STEP_SECONDS) -> None:
        """Waits until something holds; raises ProofBroken."""
        end = time.monotonic() + seconds
        while not holds():
            if self._reader.dead:
                raise ProofBroken(
                    f"{what}: the instance has ended", self._said)
            if time.monotonic() > end:
                raise ProofBroken(
                    f"{what}: not within {seconds:g} s", self._said)
            gevent.sleep(0.01)


class ProofBroken(Exception):
    """What keeps a proof from being one, with what was said about it."""

    def __init__(self, what, said):
        super().__init__("\n    ".join([what, *said]))


class Proof:
    """Restarts an instance in all ways, under load; `rows` say what came."""

    def __init__(self, instance: Instance, crowd: Crowd, requests: int):
        """`requests` must end during each restart, however short it is."""
        self._instance, self._crowd = instance, crowd
        self._requests = requests
        self.rows = {name: Row() for name in (*PLANNED, *ACCIDENTS)}

    def run(self, name: str) -> None:
        """Restarts once in one of the ways; raises ProofBroken."""
        row = self._crowd.row = self.rows[name]
        enough = row.requests + self._requests
        {**PLANNED, **ACCIDENTS}[name](self._instance)
        self._instance.until(
            lambda: row.requests >= enough, f"{self._requests} requests")
        row.times += 1


def _change(number, instance):
    """Has all workers replaced: HUP or USR2."""
    old, changes = set(instance.children()), instance.seen["M50004"]
    os.kill(instance.pid, number)
    instance.until(
        lambda: instance.seen["M50004"] > changes
        and not old & set(instance.children(ready=False)), number.name)


def _apoptosis(instance):
    """Waits for a worker that is old enough to be replaced by itself."""
    leaving = instance.seen["M40022"]
    instance.until(lambda: instance.seen["M40022"] > leaving, "apoptosis")


def _one_more_and_less(instance):
    """Has one worker more, and then as many as before."""
    more, less = instance.seen["M40002"], instance.seen["M40003"]
    os.kill(instance.pid, signal.SIGTTIN)
    instance.until(lambda: instance.seen["M40002"] > more, "TTIN")
    os.kill(instance.pid, signal.SIGTTOU)
    instance.until(lambda: instance.seen["M40003"] > less, "TTOU")


def _kill(kind, instance):
    """Kills a process without warning; another must take its place."""
    instance.until(lambda: instance.children(kind), f"a {kind} to kill")
    old = instance.children(kind)
    with contextlib.suppress(ProcessLookupError):
        # It may just have left by itself.
        os.kill(old[-1], signal.SIGKILL)
    instance.until(
        lambda: old[-1] not in instance.children(kind)
        and len(instance.children(kind)) >= len(old),
        f"a new process after KILL of {old[-1]}")


#: restarts that an operator asks for or that are due; they must cost nothing
PLANNED = {
    "HUP": functools.partial(_change, signal.SIGHUP),
    "USR2": functools.partial(_change, signal.SIGUSR2),
    "apoptosis": _apoptosis,
    "TTIN, TTOU": _one_more_and_less,
}
#: what a killed worker had in hand is lost with it, and nothing else is
ACCIDENTS = {
    "KILL of a worker": functools.partial(_kill, "w"),
    "KILL of Redis": functools.partial(_kill, "redis"),
    "KILL of the artisan": functools.partial(_kill, "artisan"),
}


def what_to_ask(settings) -> list[Ask]:
    """Requests for files of each domain, for `/` where there are none."""
    asks = []
    for name, domain in settings.domains.items():
        paths = []
        if domain.root_dir is not None:
            paths = list(_files(domain.root_dir))
        asks += [Ask(name, path) for path in paths or ["/"]]
    return asks


def _files(root):
    """Paths of URLs of some files below a folder."""
    found = (Path(folder, file) for folder, _, files in os.walk(root)
             for file in sorted(files))
    paths = (quote(f"/{path.relative_to(root)}") for path in
             itertools.islice(found, _MOST_ENTRIES))
    return itertools.islice(
        (path for path in paths if "/." not in path), _MOST_PATHS)


def prove(program: Path, settings, requests: int, restarts: int,
          draw: typing.Callable[..., None]) -> int:
    """Proves and prints; 1 where a planned restart has cost a request.

    `restarts` planned ones, and `requests` during them, at the least; then
    accidents.  `draw` shows how many of all are done, and a text.
    """
    # So that nothing is left behind; gevent prints a KeyboardInterrupt.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    names = [*itertools.islice(itertools.cycle(PLANNED), restarts), *ACCIDENTS]
    try:
        with Instance(program, settings) as instance:
            asks, left_out = _answered(instance, what_to_ask(settings))
            crowd = Crowd(instance.port, asks)
            proof = Proof(instance, crowd, -(-requests // restarts))
            crowd.start()
            for count, name in enumerate(names):
                draw(count, len(names),
                     f"restarts, {crowd.total} requests, {name}")
                proof.run(name)
            crowd.stop()
            draw(len(names), len(names),
                 f"restarts, {crowd.total} requests, done", is_last=True)
    except ProofBroken as error:
        print(f"\nnot proved: {error}", file=sys.stderr)
        return 1
    if left_out:
        print(f"left out: {left_out} of {left_out + len(asks)} URLs, which"
              " were not answered before")
    return _report(proof.rows)


def _answered(instance, asks):
    """The requests that are answered without a restart, and how many not.

    Tells which ones are, and why others are not; raises ProofBroken when it is
    none.
    """
    answers = survey(instance.port, asks)
    counts = collections.Counter(
        fault or f"status {status}" for status, fault in answers.values())
    print(f"{len(asks)} URLs were asked once: " + ", ".join(
        f"{count} x {what}" for what, count in counts.most_common()),
        file=sys.stderr)
    bad = [f"https://{ask.authority}{ask.path}: {fault}"
           for ask, (_, fault) in answers.items() if fault]
    if not bad:
        return asks, 0
    with contextlib.suppress(ProofBroken):
        # Then nothing is known but the status.
        instance.until(lambda: instance.causes, "a cause", _CAUSE_SECONDS)
    told = [*bad[:_MOST_TOLD], *(f"and {len(bad) - _MOST_TOLD} more"
                                 for _ in bad[_MOST_TOLD:_MOST_TOLD + 1]),
            *dict.fromkeys(instance.causes)]
    if len(bad) == len(asks):
        raise ProofBroken("nothing is answered, with or without restarts",
                          told)
    print("\n    ".join(["left out:", *told]), file=sys.stderr)
    return [ask for ask in asks if not answers[ask][1]], len(bad)


def _report(rows):
    """Prints the table; 1 where a planned restart has cost a request."""
    print(f"{'restart':22}{'times':>7}{'requests':>10}{'failed':>8}"
          f"{'longest':>11}")
    for name, row in rows.items():
        print(f"{name:22}{row.times:7}{row.requests:10}"
              f"{row.failures.total():8}{row.longest * 1000:8.0f} ms")
    planned = [rows[name] for name in PLANNED]
    requests, failed = (
        sum(row.requests for row in planned),
        sum(row.failures.total() for row in planned))
    print(f"planned: {sum(row.times for row in planned)} restarts,"
          f" {requests} requests, {failed} failed")
    for name, row in rows.items():
        for fault, count in row.failures.most_common(5):
            print(f"{name}: {count} x {fault}", file=sys.stderr)
    return 1 if failed else 0
