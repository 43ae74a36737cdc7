"""Statics from elsewhere: a server in front of real origins."""

import concurrent.futures
import contextlib
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
import time

import brotli
import httpx
import pytest
import zoo
from h2_client import H2Client
from harness import DOMAIN, Server, eventually, free_port

from shimmercat import Change, slot_path

CSS = b"".join(b"p.c%d { margin: 0 }\n" % n for n in range(2000))
BIG = random.Random(4).randbytes(3_000_000)
#: domains in front of one origin
ROOT = """\
shimmercat-devlove:
  domains:
    {domain}:
      root-dir:
        fetch-backend: http
        http-port: "127.0.0.1:{port}"
      views-dir: views
    lasting.example.test:
      root-dir:
        fetch-backend: http
        http-port: "127.0.0.1:{port}"
      views-dir: views
      changelist-settings: {{tOld: 7200, tNew: 1}}
    consulting.example.test:
      root-dir: {{use-consultant: origin}}
      views-dir: views
      consultants:
        origin: {{connect-to: "127.0.0.1:{port}"}}
    generating.example.test:
      root-dir: views
      consultant: {{connect-to: "127.0.0.1:{port}"}}
      change-url:
        - /made/** -> generated /make/$1
"""
LASTING, CONSULTING, GENERATING = (
    f"{name}.example.test" for name in ("lasting", "consulting", "generating"))


@contextlib.contextmanager
def edge(folder, port, workers=3, **tweaks):
    """Run the program in front of an origin, in devlove mode with none."""
    (folder / "views").mkdir(parents=True)
    (folder / "views" / "__index.html").write_bytes(
        b"<!-- shimmercat:\n  cache-seconds: 100\n-->\n")
    (folder / "devlove.yaml").write_text(
        ROOT.format(domain=DOMAIN, port=port))
    scratch = folder / ".shimmercat.loves.devs"
    scratch.mkdir(mode=0o700)
    tweaks = {"cache_status": "true", **tweaks}
    (scratch / "tweaks.yaml").write_text("".join(
        f"{key.replace('_', '-')}: {value}\n"
        for key, value in tweaks.items()))
    flags = ("--workers", str(workers)) if workers else ()
    mode = "internet" if workers else "devlove"
    with Server(folder, *flags, mode=mode) as server:
        yield server


class Files(zoo.Files):
    """A dictionary, slow where that is asked for."""

    def __init__(self, files):
        super().__init__(files)
        self.special = {}

    def __call__(self, asked):
        animal = self.special.get(asked.target.partition("?")[0])
        return animal(asked) if animal else super().__call__(asked)


@pytest.fixture(scope="module")
def origin():
    """An origin for the tests that share a server."""
    with zoo.Origin(Files({"/a.css": CSS, "/big.bin": BIG})) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory, origin):
    """Three workers in front of the shared origin."""
    with edge(tmp_path_factory.mktemp("edge"), origin.port,
              static_seconds=2, generated_seconds=1, missing_seconds=1,
              fetch_limit_bytes="8 MiB") as running:
        yield running


def fetch_at_once(server, target, count=20, domain=DOMAIN):
    """Return the answers to many GETs over connections of their own."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [*pool.map(lambda _: server.fetch(target, domain=domain),
                          range(count))]


@pytest.mark.parametrize("domain", [DOMAIN, CONSULTING])
def test_many_visitors_of_all_workers_cost_one_fetch(server, origin, domain):
    target = f"/{domain}.css"
    origin.animal.special[target] = zoo.slow(
        lambda asked: zoo.answer(CSS), 0.5)
    answers = fetch_at_once(server, target, domain=domain)
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (200, CSS)}
    assert origin.count(target) == 1


def test_its_best_form_is_made_as_of_local_files(server, origin):
    def length():
        with server.client() as client:
            return int(client.get("/a.css", headers={
                "accept-encoding": "br"}, extensions={
                "sni_hostname": DOMAIN}).headers["content-length"])
    best = len(brotli.compress(CSS, mode=brotli.MODE_TEXT, lgwin=22))
    eventually(lambda: length() == best, 20)
    assert server.fetch("/a.css").content == CSS


def test_what_an_origin_wants_as_it_is_comes_as_it_is(server, origin):
    body = CSS + b"p.fixed {}"
    origin.animal.special["/fixed.css"] = lambda asked: zoo.answer(
        body, cache_control="max-age=60, No-Transform")
    for _ in range(2):
        answer = server.fetch("/fixed.css", headers={"accept-encoding": "br"})
        assert answer.content == body
        assert "content-encoding" not in answer.headers


def test_visitors_of_all_workers_get_the_first_bytes_while_it_comes(
        server, origin):
    go_on = threading.Event()

    def halting(_asked):
        yield zoo.head(content_length=len(BIG))
        yield BIG[:1_000_000]
        go_on.wait(20)
        yield BIG[1_000_000:]

    origin.animal.special["/halting.bin"] = halting
    begun, ended = threading.Semaphore(0), []

    def watch():
        with server.client() as client, client.stream(
                "GET", "/halting.bin",
                extensions={"sni_hostname": DOMAIN}) as answer:
            body = b""
            for piece in answer.iter_raw():
                body += piece
                if len(body) >= 900_000 > len(body) - len(piece):
                    begun.release()
            ended.append(body == BIG)

    watchers = [threading.Thread(target=watch) for _ in range(9)]
    for watcher in watchers:
        watcher.start()
    for _ in watchers:
        assert begun.acquire(timeout=20)
    assert not ended
    go_on.set()
    for watcher in watchers:
        watcher.join(20)
    assert ended == [True] * 9
    assert origin.count("/halting.bin") == 1
    assert server.fetch("/halting.bin").content == BIG


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_what_comes_slowly_in_chunks_is_passed_on_whole(
        server, origin, protocol):
    target = f"/slow/{protocol.replace('/', '')}.bin"
    origin.animal.special[target] = zoo.in_chunks(
        BIG[:1000], 0.5, BIG[1000:])
    for _ in range(2):
        assert server.fetch(target, protocol).content == BIG
    assert origin.count(target) == 1


@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_breaks_off_is_broken_off_for_all_and_not_kept(
        server, origin, is_chunked):
    target = f"/broken{is_chunked}.bin"

    def breaking(_asked):
        if is_chunked:
            yield zoo.head(transfer_encoding="chunked") + zoo.chunk(BIG[:9999])
        else:
            yield zoo.head(content_length=len(BIG)) + BIG[:9999]
        yield 0.7
        yield zoo.CLOSE

    origin.animal.special[target] = breaking
    with pytest.raises(httpx.RemoteProtocolError):
        server.fetch(target)
    server.await_line("M40041", about=(
        f"{DOMAIN} http 127.0.0.1:{origin.port}{target}"))
    origin.animal.special[target] = lambda asked: zoo.answer(CSS)
    eventually(lambda: server.fetch(target).content == CSS)


def test_what_is_too_large_to_be_kept_needs_no_memory(server, origin):
    piece, count = BIG[:1 << 20], 100
    origin.animal.special["/huge.bin"] = lambda asked: [
        zoo.head(content_length=len(piece) * count), *[piece] * count]

    def memory():
        return max(int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(
            f"/proc/{pid}/status").read_text())[1])
            for pid in server.workers().values())

    before, got = memory(), 0
    with server.client() as client, client.stream(
            "GET", "/huge.bin", extensions={
                "sni_hostname": DOMAIN}) as answer:
        for chunk in answer.iter_raw():
            got += len(chunk)
    assert got == len(piece) * count
    assert memory() - before < 30_000


def test_who_leaves_what_is_for_one_alone_leaves_the_others_alone(
        server, origin):
    dripping = zoo.dripping(b"x" * 50_000, 0.1, 1000, cache_control="private")
    origin.animal.special["/private.bin"] = dripping
    origin.animal.special["/secret.bin"] = zoo.slow(dripping, 0.2)
    with H2Client(server) as client:
        kept = client.get("/a.css")
        for path in ("/private.bin", "/secret.bin") * 3:
            left = client.get(path)
            while left not in client.heads:
                assert client.turn()
            client.reset(left)
        last = client.get("/private.bin")
        while {kept, last} & client.open:
            assert client.turn()
        assert len(client.bodies[last].getvalue()) == 50_000
    assert not server.lines("M60001")


def test_a_worker_that_is_killed_leaves_its_fetch_to_others(tmp_path):
    began = threading.Event()

    def first_hangs(asked):
        if not began.is_set():
            began.set()
            yield 60.0
        yield zoo.answer(CSS)

    with (zoo.Origin(first_hangs) as origin,
          edge(tmp_path, origin.port, 2, static_seconds=60) as server,
          server.connect() as wire):
        wire.sendall(b"GET /a.css HTTP/1.1\r\nHost: %b\r\n\r\n"
                     % DOMAIN.encode())
        assert began.wait(10)
        pid, = [pid for pid in server.workers().values()
                if is_connected(pid, origin.port)]
        os.kill(pid, signal.SIGKILL)
        answer = eventually(lambda: served(server, "/a.css"), 20)
        assert answer.content == CSS
        assert origin.count() == 2


def served(server, target):
    """Return an answer 200, or None."""
    with contextlib.suppress(httpx.TransportError):
        # The killed worker's queue goes with it.
        answer = server.fetch(target)
        return answer if answer.status_code == 200 else None
    return None


def is_connected(pid, port):
    """Return whether a process has a connection in use to a port."""
    wanted = f"0100007F:{port:04X}"
    rows = map(str.split, pathlib.Path(
        f"/proc/{pid}/net/tcp").read_text().splitlines())
    inodes = {row[9] for row in rows if row[2] == wanted and row[3] == "01"}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/{pid}/fd/{name}")
            if link.startswith("socket:[") and link[8:-1] in inodes:
                return True
    return False


def test_an_origin_that_is_too_slow_has_no_such_asset(server, origin):
    origin.animal.special["/silent.css"] = zoo.silent
    answer = server.fetch("/silent.css")
    assert answer.status_code == 404
    assert "127.0.0.1" not in answer.text
    assert server.await_line("M40041", about=(
        f"{DOMAIN} http 127.0.0.1:{origin.port}/silent.css"))


def test_the_changelist_is_never_served(server, origin):
    origin.animal.files["/__sc_changelist__/0/a.txt"] = b"secret"
    for domain in (DOMAIN, LASTING, CONSULTING):
        assert server.fetch("/__sc_changelist__/0/a.txt",
                            domain=domain).status_code == 404


def test_generated_assets_are_kept_by_their_original_url(server, origin):
    origin.animal.special["/make/a"] = zoo.slow(lambda asked: zoo.answer(
        asked.target.encode() * 99, content_type="text/x-made"), 0.4)
    answers = fetch_at_once(server, "/made/a?n=1", 12, GENERATING)
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (200, b"/make/a?n=1" * 99)}
    assert answers[0].headers["content-type"] == "text/x-made"
    assert server.fetch("/made/a?n=1", domain=GENERATING).headers[
        "content-encoding"]
    assert origin.count("/make/a?n=1") == 1
    assert server.fetch("/made/a?n=2", domain=GENERATING).content == (
        b"/make/a?n=2" * 99)
    assert origin.count("/make/a?n=1") == 1
    assert server.fetch("/made/a?n=1", domain=GENERATING).headers[
        "cache-status"].startswith("shimmercat;hit; ttl=9")


@pytest.mark.parametrize("fields", [
    {"set_cookie": "a=b"}, {"cache_control": "no-store"},
    {"cache_control": "no-cache"}])
def test_a_generated_asset_that_may_be_personal_is_made_each_time(
        server, origin, fields):
    path = f"/make/{'-'.join(fields.values()).replace('=', '-')}"
    origin.animal.special[path] = lambda asked: zoo.answer(b"x", **fields)
    for count in (1, 2):
        answer = server.fetch(path.replace("make", "made"), domain=GENERATING)
        assert answer.content == b"x"
        assert "set-cookie" not in answer.headers
        assert origin.count(path) == count


def test_a_generated_asset_that_takes_too_long_is_404(server, origin):
    origin.animal.special["/make/slow"] = zoo.silent
    assert server.fetch(
        "/made/slow", domain=GENERATING).status_code == 404
    assert server.await_line("M40041", about=f"{GENERATING} generated/made/sl")


def personal_origin():
    """An origin with an asset that is for each client alone."""
    files = Files({"/a.css": CSS})
    files.special["/own.bin"] = lambda asked: zoo.answer(
        8 * BIG, cache_control="no-store")
    return zoo.Origin(files)


@contextlib.contextmanager
def slow_reader(server):
    """Ask for that asset and read its head only; give what reads on."""
    with server.connect() as client:
        client.sendall(f"GET /own.bin HTTP/1.1\r\nhost: {DOMAIN}\r\n"
                       "connection: close\r\n\r\n".encode())
        reader = client.makefile("rb")
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
        yield reader


def test_slow_clients_of_what_is_not_kept_leave_others_the_connections(
        tmp_path):
    with (personal_origin() as origin,
          edge(tmp_path, origin.port, 1, fetch_connections=1) as server,
          slow_reader(server), slow_reader(server) as reader):
        assert server.fetch("/a.css").content == CSS
        assert reader.read().endswith(b"\r\n\r\n" + 8 * BIG)


def test_few_clients_may_be_slower_than_what_waits_for_them(tmp_path):
    with (personal_origin() as origin,
          edge(tmp_path, origin.port, 1, fetch_connections=2,
               static_seconds=1, missing_seconds=0.1,
               fetch_limit_bytes="1 MiB") as server,
          slow_reader(server) as first, slow_reader(server) as second):
        eventually(lambda: server.fetch("/a.css").content == CSS)
        assert first.read().endswith(b"\r\n\r\n" + 8 * BIG)
        assert 1 << 16 < len(second.read()) < 8 * len(BIG)
        server.await_line("M40017", about=(
            "/own.bin was cut off: too many clients are too slow"))


def test_devlove_mode_tells_developers_why_an_asset_is_missing(tmp_path):
    files = Files({"/a.css": CSS})
    files.special["/slow.bin"] = zoo.in_chunks(BIG[:1000], 0.5, BIG[1000:])
    files.special["/bad.css"] = zoo.garbage
    with (zoo.Origin(files) as origin,
          edge(tmp_path, origin.port, workers=0) as server):
        assert server.fetch("/a.css").content == CSS
        assert server.fetch("/slow.bin").content == BIG
        answer = server.fetch("/bad.css")
        assert answer.status_code == 404
        assert f"http 127.0.0.1:{origin.port}" in answer.text
        assert "this is not HTTP" in answer.text


def test_an_origin_that_is_down_fails_no_request_for_what_is_kept(
        tmp_path):
    files = {f"/{n}.css": CSS + b"%d" % n for n in range(20)}
    with (zoo.Origin(zoo.Files(files)) as origin,
          edge(tmp_path, origin.port, fetched_seconds=0.3,
               static_seconds=1) as server):
        for name in files:
            assert server.fetch(name).content == files[name]
        failed, count, over = [], [0], threading.Event()

        def ask(seed):
            choices = random.Random(seed)
            with server.client() as client:
                while not over.is_set():
                    name = choices.choice([*files])
                    answer = client.get(
                        name, extensions={"sni_hostname": DOMAIN})
                    count[0] += 1
                    if answer.content != files[name]:
                        failed.append(answer)

        askers = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for asker in askers:
            asker.start()

        def lasts(number):
            wanted = count[0] + number
            eventually(lambda: count[0] > wanted, 30)

        lasts(50)
        for animal in (None, zoo.failing, zoo.silent, zoo.resetting):
            if animal:
                origin.animal = animal
                origin.come()
            lasts(80)
            origin.go()
        over.set()
        for asker in askers:
            asker.join(20)
        assert not failed
        status = server.fetch("/1.css").headers["cache-status"]
        assert "ttl=-" in status or "fwd=stale" in status


NGINX = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log;
  types {{ text/css css; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;
  fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4;
  scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {folder}/www; }}
}}
"""


@contextlib.contextmanager
def nginx(folder):
    """Run nginx for files in `folder`/www; give its port."""
    (folder / "www").mkdir(parents=True)
    port = free_port()
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    process = subprocess.Popen(
        ["nginx", "-p", folder, "-c", folder / "nginx.conf"],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)


def answers(port):
    """Return whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_edit_at_nginx_shows_after_t_new(tmp_path):
    with (nginx(tmp_path / "origin") as port,
          edge(tmp_path / "edge", port) as server):
        www = tmp_path / "origin" / "www"
        os.chmod(tmp_path, 0o755)
        (www / "a.css").write_bytes(CSS)
        (www / "b.css").write_bytes(CSS)

        def seen(name="/a.css"):
            return server.fetch(name, domain=LASTING).content

        assert seen() == seen("/b.css") == CSS
        (www / "a.css").write_bytes(b"edited")
        now = int(time.time())
        slot = www / slot_path(now)
        slot.parent.mkdir(parents=True)
        slot.write_bytes(Change(now, "m", "a.css").line())
        # How soon to the second, tests of room 10d tell by their own clock.
        eventually(lambda: seen() == b"edited")
        assert seen("/b.css") == CSS
        log = (tmp_path / "origin" / "access.log").read_text()
        assert log.count("GET /b.css") == 1
        assert " 304 " not in log
