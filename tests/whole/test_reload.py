"""HUP and new certificates: other workers take over, and nothing is lost."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import httpx
import pytest
import websockets.exceptions
from h2_client import H2Client
from harness import (
    DOMAIN,
    PROGRAM,
    Server,
    eventually,
    free_port,
    is_alive,
    make_site,
    trusting_context,
)
from visitors import Visitors

#: a test of leaks; 500 were done by hand
RELOADS = int(os.environ.get("SHIMMERCAT_TEST_RELOADS", "20"))
OTHER = "other.example.test"
BIG = os.urandom(8 << 20)
PAIR = ("privkey.unencrypted-pkcs8.pem", "cert.pem")


def add_domain(folder, name=OTHER, root="www"):
    """Write another domain into the configuration."""
    with open(folder / "devlove.yaml", "a") as file:
        file.write(f"    {name}:\n      root-dir: {root}\n")


def write_tweaks(folder, **tweaks):
    """Replace tweaks.yaml."""
    (folder / ".shimmercat.loves.devs" / "tweaks.yaml").write_text("".join(
        f"{name.replace('_', '-')}: {value}\n"
        for name, value in tweaks.items()))


def reload(server):
    """Send HUP and wait until the new workers serve and no others start."""
    count = len(server.lines("M50004"))
    server.signal(signal.SIGHUP)
    server.await_line("M50004", count + 1)


def begin_download(server):
    """Return a socket on which a large answer has begun."""
    client = server.connect()
    client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode())
    assert client.recv(16).startswith(b"HTTP/1.1 200")
    return client


def length_of_rest(client):
    """Read an answer to its end; return how much came."""
    with client:
        count = 0
        while piece := client.recv(1 << 16):
            count += len(piece)
    return count


def test_new_settings_are_served_by_new_workers(server, site):
    before = server.workers()
    write_tweaks(site, cache_control_html="no-store")
    add_domain(site)
    reload(server)
    answer = server.fetch(domain=OTHER)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert server.fetch().headers["cache-control"] == "no-store"
    eventually(lambda: len(server.workers()) == 2)
    assert not set(server.workers().values()) & set(before.values())
    assert len(server.lines("M40029", about="w")) == 2
    assert not server.lines("M60002")


def test_an_artisan_goes_on_unless_its_own_settings_change(server, site):
    artisan = server.artisan()
    write_tweaks(site)
    reload(server)
    assert server.artisan() == artisan
    write_tweaks(site, artisan_nice=11)
    reload(server)
    eventually(lambda: not is_alive(artisan))
    assert os.getpriority(os.PRIO_PROCESS, server.artisan()) == 11


SPOILT = [
    lambda site: add_domain(site, root="no-such-folder"),
    lambda site: write_tweaks(site, backlock=16, body_seconds="long"),
    lambda site: (site / "devlove.yaml").write_text("{"),
    lambda site: (site / "devlove.yaml").unlink(),
]


def test_wrong_settings_change_nothing_and_are_told_as_check_tells_them(
        server, site):
    before, right = server.workers(), (site / "devlove.yaml").read_text()
    for count, spoil in enumerate(SPOILT, 1):
        spoil(site)
        server.signal(signal.SIGHUP)
        told = server.await_line("M60013", count)
        check = subprocess.run(
            [sys.executable, PROGRAM, "check"], cwd=site, text=True,
            capture_output=True)
        assert check.returncode == 78
        # Its other lines follow, and are indented.
        said = server.output.read_text().partition(told[-1].text)[2]
        assert all(line in said for line in check.stderr.splitlines())
        assert server.fetch().status_code == 200
        (site / "devlove.yaml").write_text(right)
        write_tweaks(site)
    assert server.workers() == before
    assert not server.lines("M40001")


@pytest.mark.parametrize("name", ["tweaks.yaml", "cert.pem"])
def test_a_file_that_has_gone_is_no_wish_for_what_would_be_made_instead(
        certified, site, name):
    file, shown_before = site / ".shimmercat.loves.devs" / name, shown(
        certified)
    text = file.read_bytes()
    file.unlink()
    for number, code in (signal.SIGHUP, "M60013"), (signal.SIGUSR2, "M60016"):
        count = len(certified.lines("M40021"))
        certified.signal(number)
        eventually(lambda code=code, count=count: certified.lines(code) or
                   len(certified.lines("M40021")) > count, 60)
    assert str(file) in certified.output.read_text()
    assert not file.exists()
    assert shown(certified) == shown_before
    file.write_bytes(text)
    reload(certified)
    assert shown(certified) == shown_before


def test_no_request_fails_over_reloads(server, site):
    with Visitors(server) as visitors:
        for n in range(5):
            if n == 2:
                add_domain(site)
            reload(server)
            asked = visitors.answered
            eventually(lambda: visitors.answered > asked + 50)
    assert not visitors.failures
    assert not server.lines("M60002") + server.lines("M40019")


@pytest.mark.parametrize("mode", ["internet", "devlove"])
def test_hups_that_come_in_a_storm_are_few_changes_and_all_heeded(site, mode):
    with Server(site, mode=mode) as server, Visitors(server, 2) as visitors:
        begin = time.monotonic()
        for n in range(100):
            server.signal(signal.SIGHUP)
            eventually(lambda n=n: time.monotonic() > begin + n / 100)
        add_domain(site)
        server.signal(signal.SIGHUP)

        def is_served():
            with contextlib.suppress(httpx.ConnectError):
                return server.fetch(domain=OTHER).status_code == 200
        eventually(is_served, 20)
        taken = time.monotonic() - begin
        changes = server.lines("M40001") or server.lines("M50004")
        assert len(changes) <= 2 + taken * (2 if mode == "internet" else 4)
    assert not visitors.failures


def test_a_download_is_finished_by_its_old_worker(tmp_path):
    make_site(tmp_path, {"big.bin": BIG})
    with Server(tmp_path, "--workers", "2") as server:
        client = begin_download(server)
        for _ in range(3):
            reload(server)
        said = server.await_line("M40026")[0].message
        assert re.fullmatch(
            r"connections that are left: 1, for 59\d s at most", said)
        assert length_of_rest(client) > len(BIG)
        eventually(lambda: len(server.workers()) == 2)


def test_who_takes_longer_than_allowed_is_cut_off(tmp_path):
    make_site(tmp_path, {"big.bin": BIG}, {"replacement-seconds": 1})
    with Server(tmp_path, "--workers", "1") as server:
        with begin_download(server) as client:
            reload(server)
            server.await_line("M40019")
            assert length_of_rest(client) < len(BIG)


def test_the_oldest_of_too_many_generations_ends(tmp_path):
    make_site(tmp_path, {"big.bin": BIG}, {"lingering-workers": 2})
    with Server(tmp_path, "--workers", "1") as server:
        clients = []
        # One who leaves may still take the next connection, and have two.
        while len(server.lines("M40027")) < 2 and len(clients) < 12:
            clients.append(begin_download(server))
            reload(server)
        server.await_line("M40027", 2)
        eventually(lambda: len(server.workers()) == 3)
        are_whole = [length_of_rest(client) > len(BIG) for client in clients]
        assert are_whole == sorted(are_whole)
        assert are_whole.count(False) >= 2 and are_whole.count(True) >= 2


def test_term_amid_a_reload_counts_for_old_and_new_workers(tmp_path):
    make_site(tmp_path, {"big.bin": BIG}, {"graceful-seconds": 1})
    with Server(tmp_path, "--workers", "3") as server:
        with begin_download(server), begin_download(server):
            server.signal(signal.SIGHUP)
            server.await_line("M40029")
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        assert server.lines()[-1].code == "M40005"


def test_sessions_outlive_a_reload(server):
    context = trusting_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def connect(session=None):
        plain = socket.create_connection(("127.0.0.1", server.port), 20)
        return context.wrap_socket(
            plain, server_hostname=DOMAIN, session=session)
    with connect() as first:
        session = first.session
    reload(server)
    with connect(session) as second:
        assert second.session_reused


def make_pair(folder, *names):
    """Make an operator's certificate; return the folder with it."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:P-256", "-nodes", "-keyout", folder / PAIR[0],
         "-out", folder / PAIR[1], "-days", "9", "-subj", f"/CN={names[0]}",
         "-addext", "subjectAltName=" + ",".join(f"DNS:{x}" for x in names)],
        check=True, capture_output=True)
    return folder


def shown(server, domain=DOMAIN):
    """Return the certificate that visitors are shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (socket.create_connection(("127.0.0.1", server.port), 20) as plain,
          context.wrap_socket(plain, server_hostname=domain) as client):
        return client.getpeercert(binary_form=True)


@pytest.fixture
def certified(site):
    """The program with an operator's certificate."""
    make_pair(site / ".shimmercat.loves.devs", DOMAIN)
    with Server(site, "--workers", "2") as running:
        yield running


def assert_renewed(server, site):
    """Check that a renewed certificate is shown soon."""
    scratch = site / ".shimmercat.loves.devs"
    pair = make_pair(site / "renewed", DOMAIN)
    before = shown(server)
    for name in PAIR:
        shutil.copy(pair / name, scratch / name)
    server.await_line("M50004")
    assert shown(server) != before
    assert not server.lines("M60013")


def test_a_renewed_certificate_is_noticed(certified, site):
    assert_renewed(certified, site)


def test_a_renewed_certificate_needs_no_settings_that_are_right(
        certified, site):
    (site / "devlove.yaml").write_text("{")
    assert_renewed(certified, site)


def test_a_broken_certificate_is_refused_once_and_the_old_one_kept(
        certified, site):
    scratch = site / ".shimmercat.loves.devs"
    pair = make_pair(site / "renewed", DOMAIN)
    before = shown(certified)
    shutil.copy(pair / PAIR[1], scratch / PAIR[1])
    certified.await_line("M60013")
    assert "does not match its key" in certified.output.read_text()
    assert shown(certified) == before
    shutil.copy(pair / PAIR[0], scratch / PAIR[0])
    certified.await_line("M50004")
    assert shown(certified) != before
    assert len(certified.lines("M60013")) == 1


def test_a_certificate_of_a_domain_of_its_own_is_noticed(certified, site):
    own = site / ".shimmercat.loves.devs" / "sni-certs" / DOMAIN
    before = shown(certified)
    os.rename(make_pair(site / "own", DOMAIN), own)
    certified.await_line("M50004")
    assert shown(certified) != before
    shutil.rmtree(own)
    certified.await_line("M50004", 2)
    assert shown(certified) == before


def test_a_certificate_that_misses_a_domain_is_not_taken(certified, site):
    scratch = site / ".shimmercat.loves.devs"
    pair = make_pair(site / "foreign", "foreign.example.test")
    before = shown(certified)
    for name in PAIR:
        shutil.copy(pair / name, scratch / name)
    certified.await_line("M60013")
    assert f"misses the domain {DOMAIN}" in certified.output.read_text()
    assert shown(certified) == before


def test_a_certificate_of_a_domain_is_kept_where_no_other_is_for_it(
        certified, site):
    add_domain(site)
    scratch = site / ".shimmercat.loves.devs"
    own = make_pair(scratch / "sni-certs" / OTHER, OTHER)
    reload(certified)
    before = shown(certified, OTHER)
    own.rename(site / "away")
    certified.await_line("M60013")
    for number, code in (signal.SIGHUP, "M60013"), (signal.SIGUSR2, "M40021"):
        count = len(certified.lines(code))
        certified.signal(number)
        certified.await_line(code, count + 1)
    assert (f"{scratch}/cert.pem misses the domain {OTHER}"
            in certified.lines("M40021")[0].message)
    assert shown(certified, OTHER) == before
    (site / "away").rename(own)
    reload(certified)
    assert shown(certified, OTHER) == before


def test_a_certificate_that_is_gone_is_served_until_there_is_another(
        certified, site):
    scratch = site / ".shimmercat.loves.devs"
    before = shown(certified)
    shutil.rmtree(scratch.rename(site / "away"))
    certified.await_line("M60013")
    certified.signal(signal.SIGHUP)
    certified.await_line("M60013", 2)
    assert shown(certified) == before
    assert not certified.lines("M30003")
    pair = make_pair(site / "renewed", DOMAIN)
    for name in PAIR:
        shutil.copy(pair / name, scratch / name)
    certified.await_line("M50004")
    assert shown(certified) != before


def sabotaged(folder):
    """Return a copy of the program whose workers die while a file is there."""
    text = PROGRAM.read_text()
    ready = "    def _report_ready(self):\n"
    assert ready in text
    program = folder / "shimmercat.py"
    program.write_text(text.replace(ready, (
        f"{ready}        if os.path.exists({str(folder / 'die')!r}):\n"
        "            os._exit(9)\n"), 1))
    shutil.copytree(PROGRAM.parent / "shimmercat_ext",
                    folder / "shimmercat_ext")
    return program


def test_where_no_worker_starts_the_settings_before_are_kept(site):
    with Server(site, "--workers", "2", program=sabotaged(site)) as server:
        before = server.workers()
        (site / "die").touch()
        add_domain(site)
        server.signal(signal.SIGHUP)
        server.await_line("M60015")
        with server.client() as client:
            assert client.get("/", headers={"host": OTHER}, extensions={
                "sni_hostname": DOMAIN}).status_code == 421
        assert set(before.values()) <= set(server.workers().values())
        (site / "die").unlink()
        os.kill(before["w0-1"], signal.SIGKILL)
        eventually(lambda: len(server.workers()) == 2)
        reload(server)
        assert server.fetch(domain=OTHER).status_code == 200


def resources(pid):
    """Return descriptors, threads and resident KiB of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return (len(os.listdir(f"/proc/{pid}/fd")),
            *(int(re.search(rf"{name}:\s+(\d+)", status)[1])
              for name in ("Threads", "VmRSS")))


def test_many_reloads_leave_nothing_behind(server):
    children = pathlib.Path(f"/proc/{server.pid}/task/{server.pid}/children")
    usual = len(children.read_text().split())

    def settled():
        # Those that ended are listed until the arbiter has heard of it.
        eventually(lambda: len(children.read_text().split()) == usual, 30)
        return resources(server.pid)

    for _ in range(5):
        reload(server)
    fds, threads, memory = settled()
    for _ in range(RELOADS):
        reload(server)
    print("before", fds, threads, memory, "after", settled())
    after = settled()
    assert after[:2] == (fds, threads)
    assert after[2] < memory + 4096
    assert not server.lines("M60002")


class Echo:
    """An application that speaks WebSockets, in a process of its own."""

    PROGRAM = """
import asyncio, sys, websockets.asyncio.server
async def echo(socket):
    async for message in socket:
        await socket.send(message)
async def main():
    async with websockets.asyncio.server.serve(
            echo, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""

    def __init__(self):
        self.port = free_port()

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, str(self.port)])
        eventually(self._answers)
        return self

    def __exit__(self, *failure):
        self._process.kill()
        self._process.wait(10)

    def _answers(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True


def test_a_websocket_outlives_reloads(tmp_path):
    from test_tunnels import Wire
    with Echo() as application:
        make_site(tmp_path)
        (tmp_path / "devlove.yaml").write_text(
            "shimmercat-devlove:\n  domains:\n    api.example.test:\n"
            f"      port: {application.port}\n")
        with (Server(tmp_path, "--workers", "2") as server,
              Wire(server, "/") as wire):
            for n in range(3):
                reload(server)
                wire.send(f"still there? {n}")
                assert wire.recv() == f"still there? {n}"
            server.await_line("M40026")
            server.signal(signal.SIGQUIT)
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                wire.recv()


def test_devlove_mode_takes_over_what_is_saved(site):
    with Server(site, mode="devlove") as server, H2Client(server) as client:
        client.get("/")
        client.finish()
        with Visitors(server, 2) as visitors:
            add_domain(site)
            server.await_line("M50004")
            assert server.fetch(domain=OTHER).status_code == 200
            # Who has a connection is asked to come again.
            while not client.goaways:
                assert client.turn()
            (site / "devlove.yaml").write_text("{")
            server.await_line("M60013")
            assert server.fetch(domain=OTHER).status_code == 200
        assert not visitors.failures


def test_devlove_mode_reads_again_on_hup(site):
    with Server(site, mode="devlove") as server:
        server.await_line("M20002", about="press")
        reload(server)
        assert server.fetch().status_code == 200
        # The connection of the request may still be among them.
        fds, threads, _ = resources(server.pid)
        for _ in range(5):
            reload(server)
        assert server.fetch().status_code == 200
        eventually(lambda: resources(server.pid)[0] <= fds)
        assert resources(server.pid)[1] <= threads
