"""The first process is killed: nobody stays, nothing in flight is lost."""

import os
import pathlib
import re
import signal

from harness import DOMAIN, Server, eventually, make_site

BIG = os.urandom(8 << 20)


def killed(server):
    """Kill the first process as the kernel would when memory runs out."""
    server.process.kill()
    server.process.wait(10)
    # It was the test that ended it, and no fault of the program.
    server.status = 0


def test_nothing_but_the_artisan_itself_reaps_its_jobs(server):
    """A handler of SIGCHLD, as libev installs one, would be faster."""
    for name, pid in server.started():
        if name == "redis":
            continue
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        assert not caught >> (signal.SIGCHLD - 1) & 1, name


def test_all_children_leave_when_the_arbiter_is_killed(server):
    assert len(server.processes()) == 6
    killed(server)
    eventually(lambda: not server.processes(), 10)


def test_no_press_stays_when_devlove_mode_is_killed(site):
    with Server(site, mode="devlove") as server:
        server.await_line("M20002", about="press")
        assert len(server.processes()) == 2
        killed(server)
        eventually(lambda: not server.processes(), 10)


def test_a_download_in_flight_is_finished_after_the_arbiter_is_killed(
        tmp_path):
    make_site(tmp_path, {"big.bin": BIG})
    with Server(tmp_path) as server:
        with server.connect() as client:
            client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n"
                           "Connection: close\r\n\r\n".encode())
            pieces = [client.recv(16)]
            killed(server)
            while piece := client.recv(1 << 16):
                pieces.append(piece)
        assert b"".join(pieces).partition(b"\r\n\r\n")[2] == BIG
        eventually(lambda: not server.processes(), 10)


def test_the_next_start_works_at_once_after_a_kill(site):
    with Server(site) as first:
        killed(first)
        with Server(site, port=first.port) as second:
            assert second.fetch().status_code == 200
        eventually(lambda: not first.processes(), 10)


def test_an_orphan_that_does_not_finish_is_bounded(tmp_path):
    make_site(tmp_path, {"big.bin": BIG * 4}, {"graceful-seconds": 2})
    with Server(tmp_path) as server, server.connect() as client:
        client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                       .encode())
        client.recv(16)
        killed(server)
        eventually(lambda: not server.processes(), 10)


def test_workers_go_on_serving_while_the_arbiter_is_stopped(server):
    server.signal(signal.SIGSTOP)
    for _ in range(5):
        assert server.fetch().status_code == 200
    server.signal(signal.SIGCONT)
