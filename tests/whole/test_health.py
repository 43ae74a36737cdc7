"""What the instance says of itself to those who are near."""

import os
import signal
import socket

import pytest
from harness import DOMAIN, Server, eventually, make_site, trusting_context

HEALTH = "/.well-known/shimmercat/health"
UNKNOWN = "/.well-known/shimmercat/unknown"


@pytest.fixture(scope="module")
def server(tmp_path_factory, configuration_home):
    """The program in internet mode, which trusts one peer beside itself."""
    folder = make_site(tmp_path_factory.mktemp("site"), tweaks={
        "trusted-proxies": "[192.0.2.0/24]"})
    with Server(folder, "--workers", "2") as running:
        yield running


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_an_instance_that_is_well_says_so(server, protocol):
    answer = server.fetch(HEALTH, protocol)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "state": "ready", "workers": 2, "redis": "ok", "store": "ok"}


def test_it_is_told_whatever_the_host_is_called(server):
    with server.client("http/1.1") as client:
        answer = client.get(HEALTH, headers={"host": "127.0.0.1"},
                            extensions={"sni_hostname": DOMAIN})
    assert answer.json()["state"] == "ready"


def test_it_is_only_read(server):
    with server.client("http/1.1") as client:
        sni = {"sni_hostname": DOMAIN}
        assert client.head(HEALTH, extensions=sni).status_code == 200
        assert client.post(HEALTH, extensions=sni).status_code == 405


@pytest.mark.parametrize("field", [
    "X-Forwarded-For: 192.0.2.7", "X-Real-IP: 192.0.2.7",
    "Forwarded: for=192.0.2.7"])
def test_who_is_asked_for_by_a_proxy_is_a_stranger(server, field):
    name, _, value = field.partition(": ")
    answer = server.fetch(HEALTH, headers={name: value})
    assert answer.status_code == 404
    assert answer.content == server.fetch(UNKNOWN).content


@pytest.mark.parametrize("client, status", [
    (b"198.51.100.7", b"404"), (b"192.0.2.7", b"200"), (b"127.0.0.9", b"200"),
])
def test_strangers_get_what_an_unknown_path_gets(tmp_path, client, status):
    folder = make_site(tmp_path, tweaks={
        "proxy-protocol": "true", "trusted-proxies":
        "[127.0.0.1, 192.0.2.0/24]"})
    with Server(folder, mode="devlove") as running:
        plain = socket.create_connection(("127.0.0.1", running.port), 20)
        plain.sendall(b"PROXY TCP4 %b 192.0.2.1 1 443\r\n" % client)
        with trusting_context().wrap_socket(
                plain, server_hostname=DOMAIN) as tls:
            tls.sendall(request(HEALTH))
            assert tls.makefile("rb").readline().split()[1] == status


def request(path):
    """A request that ends its connection."""
    return (f"GET {path} HTTP/1.1\r\nHost: {DOMAIN}\r\n"
            "Connection: close\r\n\r\n").encode()


def test_devlove_mode_has_no_redis(site):
    with Server(site, mode="devlove") as running:
        assert running.fetch(HEALTH).json() == {
            "state": "ready", "workers": 1, "redis": "none", "store": "ok"}


def test_a_worker_more_is_told(server):
    server.process.send_signal(signal.SIGTTIN)
    eventually(lambda: server.fetch(HEALTH).json()["workers"] == 3)
    server.process.send_signal(signal.SIGTTOU)
    eventually(lambda: server.fetch(HEALTH).json()["workers"] == 2)


def test_who_starts_and_who_leaves_are_no_workers_more(server):
    before = len(server.lines("M50004"))
    server.signal(signal.SIGHUP)
    counts = set()
    while len(server.lines("M50004")) == before:
        counts.add(server.fetch(HEALTH).json()["workers"])
    assert counts == {2}


def test_a_redis_that_hangs_is_told_and_serving_goes_on(server):
    os.kill(server.redis(), signal.SIGSTOP)
    try:
        answer = server.fetch(HEALTH)
    finally:
        os.kill(server.redis(), signal.SIGCONT)
    assert answer.status_code == 200
    assert answer.json()["redis"] == "away"
    assert server.fetch(HEALTH).json()["redis"] == "ok"


def test_a_store_that_cannot_be_written_is_told(server):
    store = server.folder / ".shimmercat.loves.devs" / "r-cache"
    store.rename(store.with_name("away"))
    store.write_text("in the way")
    try:
        answer = server.fetch(HEALTH)
    finally:
        store.unlink()
        store.with_name("away").rename(store)
    assert answer.status_code == 200
    assert answer.json()["store"] == "File exists"


@pytest.mark.parametrize("mode", ["internet", "devlove"])
def test_who_drains_wants_no_more_requests(site, mode):
    flags = ("--workers", "2") if mode == "internet" else ()
    with Server(site, *flags, mode=mode) as running:
        with running.connect() as client:
            head, tail = request(HEALTH)[:9], request(HEALTH)[9:]
            client.sendall(head)
            # The server must have it, or the connection counts as idle.
            assert running.fetch("/").status_code == 200
            eventually(lambda: unread(running.port) == 0)
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: is_refused(running.port))
            client.sendall(tail)
            answer = client.makefile("rb").read()
        assert answer.split()[1] == b"503"
        assert b'{"state": "draining", "workers": ' in answer
        assert running.wait() == 0


def is_refused(port):
    """Whether nobody listens any more."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def unread(port):
    """Octets that have come for a local port and were not read."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    return sum(int(row[4].partition(":")[2], 16) for row in rows
               if row[1].endswith(f":{port:04X}") and row[3] == "01")
