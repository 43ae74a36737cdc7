"""What the program does when it is sent a signal."""

import os
import pathlib
import signal
import time

import pytest
from harness import DOMAIN, Server, eventually, make_site

SLOW = {"index.html": b"<h1>Hello</h1>\n", "big.bin": os.urandom(24 << 20)}


@pytest.fixture
def busy_server(tmp_path):
    """A server with a download under way that its client does not read."""
    make_site(tmp_path, SLOW)
    with Server(tmp_path, "--workers", "2") as running:
        with running.connect() as stuck:
            stuck.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                          .encode())
            assert stuck.recv(1000).startswith(b"HTTP/1.1 200")
            yield running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_end_at_once_whatever_is_in_flight(busy_server, number):
    begin = time.monotonic()
    busy_server.signal(number)
    assert busy_server.wait() == 0
    assert time.monotonic() - begin < 4
    assert busy_server.lines("M40006")


def test_a_second_term_ends_at_once(busy_server):
    busy_server.signal(signal.SIGTERM)
    busy_server.await_line("M40004")
    begin = time.monotonic()
    busy_server.signal(signal.SIGTERM)
    assert busy_server.wait() == 0
    assert time.monotonic() - begin < 4


def test_control_c_reaches_the_group_and_the_last_lines_are_written(server):
    server.fetch()
    for pid in [server.pid, *server.workers().values()]:
        os.kill(pid, signal.SIGINT)
    assert server.wait() == 0
    assert server.lines("M50001")
    assert server.lines()[-1].code == "M40005"


def test_what_is_not_offered_is_refused_with_a_line(server):
    before = server.workers()
    server.signal(signal.SIGUSR2)
    server.await_line("M40020")
    assert server.fetch().status_code == 200
    assert server.workers() == before


@pytest.mark.parametrize("number", [signal.SIGWINCH, signal.SIGPIPE])
def test_signals_about_terminals_and_pipes_change_nothing(server, number):
    server.signal(number)
    for pid in server.workers().values():
        os.kill(pid, number)
    assert server.fetch().status_code == 200


def test_usr1_opens_the_log_file_anew(site):
    log = site / "server.log"
    server = Server(site, "--log-file", str(log))
    server.output = log
    with server:
        log.rename(site / "server.log.1")
        server.signal(signal.SIGUSR1)
        eventually(log.exists)
        server.await_line("M30002")
        server.fetch("/after-rotation")
        assert "/after-rotation" in server.await_line("M50001")[-1].text
    assert "M50003" in (site / "server.log.1").read_text()


def test_ttin_adds_a_worker_and_ttou_takes_one_but_never_the_last(server):
    server.signal(signal.SIGTTIN)
    server.await_line("M20002", 3, about="w")
    assert len(server.workers()) == 3
    for _ in range(4):
        server.signal(signal.SIGTTOU)
        time_of_one = len(server.lines("M40003"))
        server.await_line("M40003", time_of_one + 1)
    eventually(lambda: len(server.workers()) == 1)
    assert server.fetch().status_code == 200
    server.signal(signal.SIGTTIN)
    eventually(lambda: len(server.workers()) == 2)


def test_no_connection_is_lost_when_slots_come_and_go(server):
    for number in [signal.SIGTTOU, signal.SIGTTIN] * 3:
        server.signal(number)
        for _ in range(25):
            assert server.fetch(protocol="http/1.1").status_code == 200


def test_a_foreign_child_is_reaped_and_means_nothing(site):
    # Process 1 of a container is given the orphans of others.
    through = ("sh", "-c", 'sleep 1.5 & exec "$@"', "sh")
    with Server(site, through=through) as server:
        children = pathlib.Path(
            f"/proc/{server.pid}/task/{server.pid}/children")

        def has_foreign_child():
            return any(pathlib.Path(f"/proc/{pid}/comm").read_text()
                       == "sleep\n" for pid in children.read_text().split())
        eventually(lambda: not has_foreign_child())
        assert server.fetch().status_code == 200
        assert not server.lines("M60002")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_devlove_mode_ends_gracefully(site, number):
    with Server(site, mode="devlove") as server:
        assert server.fetch().status_code == 200
        (_, press), = server.started()
        assert sorted(server.processes()) == sorted([server.pid, press])
        server.signal(number)
        assert server.wait() == 0
        assert not server.processes()
