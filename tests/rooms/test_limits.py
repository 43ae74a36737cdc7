"""Room 16, Connections: how many there may be, and who makes way."""

import contextlib
import socket
import struct
import time

import hpack
import hyperframe.frame as hf
import pytest
from harness import (
    DOMAIN,
    Server,
    eventually,
    make_site,
    trusting_context,
)
from zoo import Origin, answer, silent

from shimmercat import Tweaks, connection_limit

HUGE_BYTES = 100 << 20
MOST, OF_PEER, OF_HANDSHAKES = 10, 4, 3
TWEAKS = {
    "connections-per-worker": MOST, "connections-per-peer": OF_PEER,
    "handshakes-per-worker": OF_HANDSHAKES, "handshake-seconds": 60,
    "trusted-proxies": "[127.0.2.0/24]"}
PROXY, PEER, OTHER = "127.0.2.1", "127.0.1.1", "127.0.1.2"
GET = f"GET /%s HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"


def make_files(folder, tweaks):
    folder = make_site(folder, {"index.html": b"hello"}, tweaks)
    with open(folder / "www" / "huge.bin", "wb") as huge:
        huge.truncate(HUGE_BYTES)
    return folder


@pytest.fixture
def server(tmp_path):
    """The program with room for few connections."""
    folder = make_files(tmp_path, TWEAKS)
    with Server(folder, "--log-codes", "all", mode="devlove") as running:
        yield running
        assert not running.lines("M60001"), running.explained("a fault")


class Peer:
    """A connection from an address of the loopback network."""

    def __init__(self, server, address, protocol="http/1.1", header=b""):
        plain = socket.create_connection(
            ("127.0.0.1", server.port), 20, (address, 0))
        plain.sendall(header)
        context = trusting_context()
        context.set_alpn_protocols([protocol])
        try:
            self.socket = context.wrap_socket(plain, server_hostname=DOMAIN)
        except OSError:
            plain.close()
            raise

    def get(self):
        """Ask for something small; return whether it came."""
        self.socket.sendall((GET % "").encode())
        return self.socket.recv(4096).startswith(b"HTTP/1.1 200 ")

    def download(self):
        """Ask for something large, and read but its begin."""
        self.socket.sendall((GET % "huge.bin").encode())
        return self.socket.recv(4096).startswith(b"HTTP/1.1 200 ")

    def has_ended(self):
        """Return whether the server closes the connection."""
        with contextlib.suppress(ConnectionError):
            return not self.socket.recv(4096)
        return True


@pytest.fixture
def peers():
    """A function that connects; what it made is closed in the end."""
    with contextlib.ExitStack() as stack:
        def connect(*words, **more):
            peer = Peer(*words, **more)
            stack.enter_context(peer.socket)
            return peer
        yield connect


def test_of_a_peer_with_too_many_the_longest_idle_one_leaves(server, peers):
    oldest, *others = [peers(server, PEER) for _ in range(OF_PEER)]
    stranger = peers(server, OTHER)
    # Idle since it was asked, not since it came.
    assert all(peer.get() for peer in (stranger, oldest, *others))
    assert oldest.get()
    newest = peers(server, PEER)
    assert others[0].has_ended()
    assert all(peer.get() for peer in (oldest, *others[1:], newest, stranger))
    [line] = server.lines("M40048")
    assert f"connections of {PEER} as allowed: {OF_PEER}" in line.message


def test_a_peer_with_too_many_that_are_busy_is_refused(server, peers):
    busy = [peers(server, PEER) for _ in range(OF_PEER)]
    assert all(peer.download() for peer in busy)
    with pytest.raises(OSError):
        peers(server, PEER)
    assert peers(server, OTHER).get()
    busy[0].socket.close()
    eventually(lambda: server.lines("M00002"))
    assert peers(server, PEER).get()


def test_a_trusted_proxy_is_not_one_peer(server, peers):
    behind = [peers(server, PROXY) for _ in range(2 * OF_PEER)]
    assert all(peer.get() for peer in behind)
    assert all(peer.get() for peer in behind)


def test_of_too_many_connections_the_longest_idle_one_leaves(server, peers):
    first, *others = [
        peers(server, f"127.0.1.{n}", "h2" if n == 1 else "http/1.1")
        for n in range(1, MOST + 1)]
    assert all(peer.get() for peer in others)
    assert peers(server, PEER).get()
    said = first.socket.recv(65536)
    while more := first.socket.recv(65536):
        said += more
    # GOAWAY of no error, at the end
    assert said[-17:-8] == struct.pack(">HBBBL", 0, 8, 7, 0, 0)
    assert said[-4:] == bytes(4)
    assert all(peer.get() for peer in others)


def test_without_an_idle_connection_accepting_pauses_and_says_so_once(
        server, peers):
    busy = [peers(server, f"127.0.1.{n}") for n in range(MOST)]
    assert all(peer.download() for peer in busy)
    with socket.create_connection(("127.0.0.1", server.port)):
        server.await_line("M40010")
        # Long enough for two attempts more.
        time.sleep(1.2)
    assert len(server.lines("M40010")) == 1
    assert not server.lines("M40011")
    busy[0].socket.close()
    server.await_line("M40011")
    assert peers(server, PEER).get()


def test_of_too_many_handshakes_the_oldest_is_given_up(server, peers):
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(socket.create_connection(
            ("127.0.0.1", server.port), 20, (f"127.0.1.{n}", 0)))
            for n in range(OF_HANDSHAKES)]
        server.await_line("M00001", OF_HANDSHAKES)
        assert peers(server, PEER).get()
        assert stalled[0].recv(1) == b""


def test_who_a_proxy_speaks_for_is_the_peer(tmp_path, peers):
    folder = make_files(tmp_path, {
        "connections-per-peer": 2, "proxy-protocol": "true",
        "trusted-proxies": f"[{PROXY}]"})
    def behind(client):
        return peers(server, PROXY, header=(
            f"PROXY TCP4 {client} 192.0.2.9 5000 443\r\n".encode()))
    with Server(folder, mode="devlove") as server:
        mine = [behind("192.0.2.1") for _ in range(3)]
        others = [behind(f"192.0.2.{n}") for n in range(2, 6)]
        assert mine[0].has_ended()
        assert all(peer.get() for peer in (*mine[1:], *others))


def test_who_would_wait_behind_too_many_is_told_when_to_come_again(
        tmp_path, peers):
    folder = make_files(tmp_path, {"max-waiting": 3})
    with Origin(silent) as origin:
        with open(folder / "devlove.yaml", "a") as settings:
            settings.write(f"    api api.test:\n      port: {origin.port}\n")
        with Server(folder, mode="devlove") as server:
            waiting = [peers(server, PEER) for _ in range(4)]
            assert waiting[0].get()
            asked = b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n"
            for peer in waiting[:3]:
                peer.socket.sendall(asked)
            eventually(lambda: origin.count() == 3)
            waiting[3].socket.sendall(asked)
            said = waiting[3].socket.recv(4096)
            assert said.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 2\r\n" in said
            # What takes no waiting is answered all the same.
            assert peers(server, PEER).get()
            for peer in waiting:
                peer.socket.close()
            eventually(lambda: server.fetch("/huge.bin", headers={
                "range": "bytes=0-3"}).status_code == 206)


def test_running_out_of_descriptors_is_survived(tmp_path, peers):
    folder = make_files(tmp_path, {"idle-seconds": 60, "max-streams": 200})
    (folder / "www" / "another.txt").write_text("another")
    with Origin(lambda _: answer(b"of the application")) as origin:
        with open(folder / "devlove.yaml", "a") as settings:
            settings.write(f"    api api.test:\n      port: {origin.port}\n")
        with Server(folder, mode="devlove", through=(
                "prlimit", "--nofile=128:128")) as server:
            run_out(server, peers)
        assert not server.lines("M60001"), server.explained("a fault")


def run_out(server, peers):
    """Have a server run out of descriptors, and find some again."""
    def ask(client, path, domain):
        return client.get(path, headers={"host": domain}, extensions={
            "sni_hostname": DOMAIN})

    asked = [("/another.txt", DOMAIN, "another"),
             ("/", "api.test", "of the application")]
    # Busy, so that nobody makes way.
    with server.client() as early, early.stream(
            "GET", "/huge.bin", extensions={"sni_hostname": DOMAIN}):
        greedy = peers(server, PEER, "h2")
        # Each request holds a file open.
        block = hpack.Encoder().encode([
            (":method", "GET"), (":scheme", "https"),
            (":authority", DOMAIN), (":path", "/huge.bin")])
        greedy.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + hf.SettingsFrame(0).serialize() + b"".join(
                hf.HeadersFrame(stream, block, flags=[
                    "END_HEADERS", "END_STREAM"]).serialize()
                for stream in range(1, 400, 2)))
        server.await_line("M40049")
        for path, domain, _ in asked:
            refused = ask(early, path, domain)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
        with socket.create_connection(("127.0.0.1", server.port)):
            server.await_line("M40010")
        assert not server.lines("M40023")
        greedy.socket.close()
        server.await_line("M40011")
        for path, domain, text in asked:
            assert ask(early, path, domain).text == text
    assert peers(server, OTHER).get()


@pytest.mark.parametrize("descriptors, most", [
    (-1, 20_000), (1 << 20, 20_000), (20_000, 15_000), (1024, 768),
    (128, 64), (32, 1)])
def test_a_quarter_of_the_descriptors_is_for_files_and_applications(
        descriptors, most):
    assert connection_limit(Tweaks(), descriptors) == most


@pytest.mark.parametrize("wanted, said", [
    ({"connections-per-worker": 1000}, ["768 connections at most"]), ({}, [])])
def test_fewer_descriptors_than_the_connections_asked_for_are_told(
        tmp_path, wanted, said):
    folder = make_files(tmp_path, wanted)
    through = ("prlimit", "--nofile=1024:1024")
    with Server(folder, "--workers", "2", through=through) as server:
        assert [line.message[:23] for line in server.lines("M40047")] == said
