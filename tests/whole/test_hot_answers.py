"""The hot table: what the native engine answers by itself is the same."""

import collections
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading

import pytest
from h2_client import H2Client
from harness import PROGRAM, Server, eventually, make_site
from PIL import Image

from shimmercat import NATIVE_ENGINE

pytestmark = pytest.mark.skipif(
    NATIVE_ENGINE is None, reason="the native engine is not built")

DICE = random.Random(8)
TEXT = " ".join(f"p.{DICE.randrange(10**6)} {{ margin: {n % 97}px }}"
                for n in range(300)).encode()
FILES = {
    "page.html": b"<!DOCTYPE html>" + TEXT, "style.css": TEXT,
    "app.0123456789abcdef.js": TEXT[::-1], "tiny.txt": b"tiny",
    "empty.txt": b"", "noise.bin": DICE.randbytes(9000),
    "long.bin": DICE.randbytes(63_000), "longer.bin": DICE.randbytes(99_000)}
PATHS = [*("/" + name for name in FILES), "/picture.png", "/style.css?v=1",
         "/%73tyle.css", "/none.css", "/"]
ACCEPTS = [[], [("accept", "*/*")],
           [("accept", "image/avif,image/webp,*/*;q=0.8")]]
CODINGS = [[], *([("accept-encoding", value)] for value in (
    "gzip, deflate, br, zstd", "gzip", "identity;q=0", "br;q=0.5, gzip"))]
#: what goes along with one Accept and one Accept-Encoding
OTHERS = [
    [("cookie", "a=b"), ("cookie", "c=d")], [("user-agent", "Mosaic")],
    [("if-none-match", "*")], [("if-none-match", '"other"')],
    [("if-modified-since", "Fri, 01 Jan 2100 00:00:00 GMT")],
    [("if-match", '"other"')],
    [("if-unmodified-since", "Fri, 01 Jan 2010 00:00:00 GMT")],
    [("range", "bytes=0-1")], [("range", "bytes=1000000-")],
    [("range", "bytes=0-1"), ("if-range", '"other"')],
    [("priority", "u=0")], [("priority", "u=7, i")], [("te", "trailers")],
    [("available-dictionary", f":{'A' * 43}=:"), ("accept-encoding", "dcz")],
    [("sec-ch-width", "100")], [("content-length", "0")],
    [("accept", "image/webp")], [("accept-encoding", "gzip")],
    [("expect", "100-continue")], [("x-unheard", "of")],
    [("sec-fetch-mode", "no-cors"), ("sec-fetch-site", "cross-site"),
     ("cache-control", "no-cache"), ("pragma", "no-cache")]]
#: marks what the comparison of log lines leaves out
ASIDE = "?aside"
#: how many files change while they are asked for
CHANGING = 6
METHODS = ["HEAD", "OPTIONS", "POST", "PUT"]


class Client(H2Client):
    """A client that asks for anything, more than once if need be."""

    def ask(self, path, fields=(), method="GET", count=1):
        """The streams of `count` equal requests, sent all at once."""
        return self.ask_all([(path, fields, method)] * count)

    def ask_all(self, requests):
        """The streams of requests that are sent all at once."""
        streams = []
        for path, fields, method in requests:
            stream = self._connection.get_next_available_stream_id()
            self._connection.send_headers(stream, [
                (":method", method), (":scheme", "https"), (":path", path),
                (":authority", self._authority), *fields], end_stream=True)
            self.open.add(stream)
            streams.append(stream)
        self._send()
        return streams

    def answers(self, streams):
        """What came on streams: status, fields but for the date, body."""
        self.finish()
        for stream in streams:
            assert stream not in self.resets
            head = self.heads[stream]
            assert head.pop("date")
        return [(self.heads[stream], self.bodies[stream].getvalue())
                for stream in streams]

    def widen(self):
        """Lets all come at once that streams may send."""
        self._connection.increment_flow_control_window(1 << 26)
        self._send()

    def is_hot(self, path):
        """Whether one that Python has to answer overtakes a request.

        Python writes all heads first, the engine each before its body.
        """
        path += ASIDE
        hot, other = self.ask_all([
            (path, [], "GET"), (path, [("x-unheard", "of")], "GET")])
        self.finish()
        order = [stream for stream in self.heads if stream in (hot, other)]
        return order[0] == other


@pytest.fixture(scope="module")
def folder(tmp_path_factory, configuration_home):
    """A site all of whose files have their best forms; two scratch folders."""
    folder = make_site(tmp_path_factory.mktemp("hot"), FILES, {
        "cache-status": "true", "artisan-nice": "0"})
    picture = Image.effect_noise((60, 60), 90).convert("RGB")
    picture.save(folder / "www" / "picture.png")
    subprocess.run([sys.executable, PROGRAM, "warm"], cwd=folder, check=True,
                   capture_output=True, timeout=100)
    scratch = folder / ".shimmercat.loves.devs"
    shutil.copytree(scratch, folder / ".other", symlinks=True)
    return folder


def serving(folder, engine, *flags):
    return Server(folder, "--engine", engine, "--workers", "1", *flags)


@pytest.fixture(scope="module")
def native(folder):
    with serving(folder, "native") as running:
        yield running
        assert not running.lines("M60001"), running.explained("a fault")
        assert not running.lines("M60006"), running.explained("lost lines")


@pytest.fixture(scope="module")
def pure(folder):
    with serving(folder, "python", "--scratch-dir-name", ".other") as running:
        yield running


def until_hot(server, *paths):
    """Waits until the engine answers the paths by itself."""
    with Client(server) as client:
        for path in paths:
            eventually(lambda: client.is_hot(path), what=f"{path} hot")


def requests(etags):
    """All that is asked: (path, fields, method)."""
    for path, accept, coding in itertools.product(PATHS, ACCEPTS, CODINGS):
        yield path, [*accept, *coding], "GET"
    usual = [*ACCEPTS[1], *CODINGS[1]]
    for path, other in itertools.product(PATHS[::2], OTHERS):
        yield path, [*usual, *other], "GET"
    for path, method in itertools.product(PATHS, METHODS):
        yield path, usual, method
    for path, etag in etags.items():
        yield path, [*usual, ("if-none-match", etag)], "GET"


def words(server, count):
    """How often each line about a request was said, but for its time."""
    def has_come():
        lines = [line.message for line in server.lines("M50001")
                 if ASIDE not in line.message]
        return len(lines) >= count and lines
    found = collections.Counter()
    for line in eventually(has_come):
        before, _, after = line.partition(" ms ")
        found[before.rpartition(" ")[0], after] += 1
    return found


def test_no_answer_and_no_line_differs_from_what_python_says(native, pure):
    until_hot(native, "/noise.bin", "/picture.png", "/page.html")
    with Client(native) as hot, Client(pure) as plain:
        etags = {}
        for client, path in itertools.product((hot, plain), PATHS):
            # Both know all assets from here on.
            ((head, _),) = client.answers(client.ask(path + ASIDE))
            etags[path] = head.get("etag", '"none"')
        asked = list(requests(etags))
        for request in asked:
            (expected,) = plain.answers(plain.ask(*request))
            streams = hot.ask(*request) + hot.ask(*request, count=2)
            for answer in hot.answers(streams):
                assert answer == expected, request
    said, expected = (words(server, count * len(asked))
                      for server, count in ((native, 3), (pure, 1)))
    assert said == {line: 3 * count for line, count in expected.items()}


@pytest.mark.parametrize("hot, other", [(1, 6), (6, 1)])
def test_answers_of_engine_and_python_come_by_urgency(native, hot, other):
    path = "/longer.bin" + ASIDE
    until_hot(native, "/longer.bin")
    with Client(native) as client:
        client.widen()
        streams = client.ask_all([
            (path, [("priority", f"u={hot}")], "GET"),
            (path, [("priority", f"u={other}"), ("x-unheard", "of")], "GET")])
        while len(client.open) == 2:
            client.turn()
        assert client.open == {streams[hot < other]}
        client.finish()
        assert [client.bodies[stream].getvalue() for stream in streams] == [
            FILES["longer.bin"]] * 2


def test_what_the_socket_does_not_take_at_once_comes_later(native):
    until_hot(native, "/longer.bin")
    with Client(native) as client:
        client.widen()
        streams = client.ask("/longer.bin" + ASIDE, count=80)
        client.finish()
        assert {client.bodies[stream].getvalue() for stream in streams} == {
            FILES["longer.bin"]}


@pytest.fixture(scope="module")
def changing(tmp_path_factory, configuration_home):
    """A server of files that change."""
    folder = make_site(tmp_path_factory.mktemp("changing"), {
        f"{n}.css": version(0) for n in range(CHANGING)})
    with serving(folder, "native") as running:
        yield running
        assert not running.lines("M60001"), running.explained("a fault")


def version(number):
    """The content of a file as it is for the n-th time, long or short."""
    return f"p {{ order: {number} }}\n".encode() * (200 + 90 * (number % 3))


def order_of(answer):
    """Which version an answer is; a mixture of two fails."""
    head, body = answer
    if head[":status"] == "503":
        # The file did not hold still, which is an honest answer.
        return None
    assert head[":status"] == "200"
    number = int(body.split()[3])
    assert body == version(number)
    return number


def replace(path, content):
    """Puts another file in a file's place."""
    path.with_suffix(".part").write_bytes(content)
    os.rename(path.with_suffix(".part"), path)


def rewrite(path, content):
    """Writes into a file, at once: who is slow at it makes mixtures."""
    assert path.stat().st_size == len(content)
    with open(path, "r+b", buffering=0) as file:
        file.write(content)


def hammer(server, stop, done, failures):
    """Asks for all files again and again; no answer may be out of date."""
    try:
        with Client(server) as client:
            while not stop.is_set():
                for n in range(CHANGING):
                    least = done[n]
                    for answer in client.answers(client.ask(
                            f"/{n}.css", count=3)):
                        number = order_of(answer)
                        assert number is None or number >= least
    except BaseException as error:
        # For the thread that waits for us.
        failures.append(error)


@pytest.mark.parametrize(
    "number, change", [(1, replace), (4, rewrite), (5, replace)])
def test_no_answer_is_a_mixture_or_out_of_date(changing, number, change):
    done, failures, stop = [0] * CHANGING, [], threading.Event()
    thread = threading.Thread(
        target=hammer, args=(changing, stop, done, failures))
    thread.start()
    try:
        until_hot(changing, *(f"/{n}.css" for n in range(CHANGING)))
        with Client(changing) as client:
            for n in range(CHANGING):
                change(changing.folder / "www" / f"{n}.css", version(number))
                done[n] = number
                for answer in client.answers(client.ask(f"/{n}.css")):
                    assert order_of(answer) in (None, number)
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_what_is_gone_or_purged_is_not_remembered(changing):
    until_hot(changing, "/1.css", "/2.css")
    with Client(changing) as client:
        before = client.answers(client.ask("/2.css"))
        (changing.folder / "www" / "1.css").unlink()
        ((head, _),) = client.answers(client.ask("/1.css"))
        assert head[":status"] == "404"
        subprocess.run([sys.executable, PROGRAM, "purge", "css"],
                       cwd=changing.folder, check=True, timeout=60)
        assert not client.is_hot("/2.css")
        assert client.answers(client.ask("/2.css")) == before
