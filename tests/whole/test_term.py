"""TERM: everything that was accepted is finished, and then all is gone."""

import os
import signal
import threading

from harness import DOMAIN, Server, eventually, make_site

BIG = os.urandom(2 << 20)


def begin_download(server, path="/big.bin"):
    """Return a socket on which the answer to a GET has begun."""
    client = server.connect()
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode())
    return client, client.recv(16)


def finish_download(client, begun):
    """Return the whole answer that has begun."""
    with client:
        pieces = [begun]
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def test_downloads_in_flight_are_finished_byte_for_byte(tmp_path):
    make_site(tmp_path, {"big.bin": BIG})
    with Server(tmp_path, "--workers", "2") as server:
        begun = [begin_download(server) for _ in range(100)]
        server.signal(signal.SIGTERM)
        server.await_line("M40004")
        assert not server.lines("M50001")
        bodies = []
        readers = [threading.Thread(target=lambda pair=pair: bodies.append(
            finish_download(*pair).partition(b"\r\n\r\n")[2]))
            for pair in begun]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert [body == BIG for body in bodies] == [True] * 100
        assert server.wait() == 0


def test_what_lies_in_the_queue_is_served(server):
    workers = server.workers().values()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    answers = []

    def ask():
        answers.append(server.fetch(protocol="http/1.1").status_code)
    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    eventually(lambda: queued_connections(server.port) == 8)
    server.signal(signal.SIGTERM)
    server.await_line("M40004")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    for client in clients:
        client.join(20)
    assert answers == [200] * 8
    assert server.wait() == 0


def queued_connections(port):
    """Return the number of established connections that nobody accepted."""
    count = 0
    with open("/proc/net/tcp") as table:
        for row in table.readlines()[1:]:
            _, local, _, state, queues = row.split()[:5]
            if local.endswith(f":{port:04X}") and state == "0A":
                count += int(queues.split(":")[1], 16)
    return count


def test_who_does_not_finish_in_time_is_cut_off(tmp_path):
    make_site(tmp_path, {"big.bin": BIG * 16}, {"graceful-seconds": 1})
    with Server(tmp_path) as server:
        client, _ = begin_download(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert server.lines("M40019")
        client.close()


def test_the_order_is_workers_then_the_log_then_redis(server):
    server.fetch("/the-last-request")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    codes = [line.code for line in server.lines()]
    assert codes[-1] == "M40005"
    left = [line.message.split()[0] for line in server.lines("M30001")]
    assert sorted(left[:2]) == ["w0-1", "w1-1"]
    assert left[2:] == ["press-1", "artisan", "redis"]
    assert any("/the-last-request" in line.text
               for line in server.lines("M50001"))
    assert not server.lines("M60002")


def test_the_last_line_of_devlove_mode_says_that_it_has_ended(site):
    with Server(site, mode="devlove") as server:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert server.lines()[-1].code == "M40005"


def test_idle_connections_do_not_hold_up_the_end(server):
    with server.client() as idle:
        assert idle.get("/", extensions={"sni_hostname": DOMAIN}
                        ).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait(8) == 0


def test_term_while_starting_ends_with_nothing_left(site):
    for code in ("M10001", "M10007", "M20001", "M20002"):
        server = Server(site)
        server.start()
        try:
            server.await_line(code, seconds=30)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0, server.explained(code)
        finally:
            server.kill()


def test_the_port_is_free_again_at_once(site):
    with Server(site) as first:
        first.fetch()
    with Server(site, port=first.port) as second:
        assert second.fetch().status_code == 200
