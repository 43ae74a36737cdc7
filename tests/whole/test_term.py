"""TERM: everything that was accepted is finished, and then all is gone."""

import os
import pathlib
import signal
import socket
import threading

import pytest
from harness import DOMAIN, Server, eventually, free_port, make_site

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


def left_behind(folder):
    """Return the files of a scratch folder that only processes need."""
    scratch = folder / ".shimmercat.loves.devs"
    return [str(path) for path in scratch.rglob("*")
            if path.is_socket() or path.name.startswith(".draft-")]


def end_amid(server, begin):
    """Do something to a server and end it in that state."""
    begin(server)
    server.signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert server.lines()[-1].code == "M40005"
    assert not server.lines("M60001")
    assert not left_behind(server.folder)


def kill_redis(server):
    os.kill(server.redis(), signal.SIGKILL)
    server.await_line("M60002", about="redis")


def stop_redis(server):
    """Leave a Redis that does not answer."""
    os.kill(server.redis(), signal.SIGSTOP)


def kill_press(server):
    os.kill(dict(server.started())["press-1"], signal.SIGKILL)


def kill_worker(server):
    os.kill(server.workers()["w0-1"], signal.SIGKILL)


def grow(server):
    server.signal(signal.SIGTTIN)


def shrink(server):
    server.signal(signal.SIGTTOU)


def break_configuration(server):
    (server.folder / "devlove.yaml").write_text("{")
    server.signal(signal.SIGHUP)


@pytest.mark.parametrize("begin", [
    kill_redis, stop_redis, kill_press, kill_worker, grow, shrink,
    break_configuration])
def test_term_amid_trouble_and_changes_leaves_nothing(server, begin):
    end_amid(server, begin)


def test_term_amid_an_apoptosis_leaves_nothing(site):
    with Server(site, "--apoptosis-seconds", "1-2",
                "--unsafe-fast-apoptosis") as server:
        end_amid(server, lambda server: server.await_line("M40022"))


def test_term_amid_a_job_of_the_artisan_leaves_nothing(tmp_path):
    text = b"".join(b"%d lines of text, none the same\n" % n
                    for n in range(300_000))
    make_site(tmp_path, {"big.txt": text})

    def ask(server):
        with server.client() as client:
            client.get("/big.txt", extensions={"sni_hostname": DOMAIN},
                       headers={"accept-encoding": "br"})
        children = pathlib.Path(f"/proc/{server.artisan()}/task"
                                f"/{server.artisan()}/children")
        eventually(children.read_text)
    with Server(tmp_path, "--workers", "1") as server:
        end_amid(server, ask)


def test_term_amid_a_fetch_that_stalls_leaves_nothing(tmp_path):
    port = free_port()
    make_site(tmp_path, tweaks={"graceful-seconds": 1})
    (tmp_path / "devlove.yaml").write_text(
        "shimmercat-devlove:\n  domains:\n"
        f"    {DOMAIN}:\n      views-dir: www\n      root-dir:\n"
        "        fetch-backend: http\n"
        f"        http-port: 127.0.0.1:{port}\n")
    with (socket.create_server(("127.0.0.1", port)) as origin,
          Server(tmp_path, "--workers", "1") as server,
          server.connect() as client):
        client.sendall(f"GET /a.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                       .encode())
        answering, _ = origin.accept()
        with answering:
            answering.recv(4096)
            answering.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999999"
                              b"\r\nContent-Type: image/png\r\n\r\n"
                              + bytes(100_000))
            assert client.recv(4096)
            end_amid(server, lambda server: eventually(
                lambda: left_behind(server.folder)))
