"""Lines of all processes come together, and never hold anybody up."""

import json
import os
import pty
import re
import signal
import socket
import subprocess

from harness import Server, eventually, make_site

from shimmercat import (
    Deadline,
    LogRecord,
    LogTap,
    RedisLink,
    ScratchFolder,
)


def redis_socket(folder):
    """Return where a site's Redis is: elsewhere if the path is long."""
    return ScratchFolder(folder / ".shimmercat.loves.devs").redis_socket


def test_lines_of_all_workers_come_in_their_order(server):
    for n in range(40):
        server.fetch(f"/{n}.css", "http/1.1")
    lines = server.await_line("M50001", 40)
    assert {line.worker for line in lines} == set(server.workers())
    for worker in server.workers():
        numbers = [int(re.search(r"/(\d+).css 404", line.text)[1])
                   for line in lines if line.worker == worker]
        assert numbers == sorted(numbers)


def test_json_lines_can_be_read_by_machines(site):
    log = site / "log.json"
    server = Server(site, "--log-format", "json", "--log-file", str(log))
    server.start()
    try:
        eventually(lambda: log.exists() and "M50003" in log.read_text(), 30)
        server.fetch("/index.html")
        eventually(lambda: "M50001" in log.read_text())
        objects = [json.loads(line) for line in log.read_text().splitlines()]
        request = next(entry for entry in objects
                       if entry["code"] == "M50001")
        assert request["path"] == "/index.html"
        assert int(request["status"]) == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()


def test_a_reader_that_does_not_read_stops_nobody(tmp_path):
    make_site(tmp_path, tweaks={"heartbeat-seconds": 2})
    reading, writing = os.pipe()
    server = Server(tmp_path, "--workers", "1", stdout=writing)
    server.start()
    os.close(writing)
    try:
        eventually(lambda: answers(server), 30)
        with server.client() as client:
            for n in range(400):
                assert client.get(f"/{'x' * 200}{n}.css").status_code == 404
        os.set_blocking(reading, False)
        said = b""
        server.signal(signal.SIGTERM)

        def has_all():
            nonlocal said
            try:
                said += os.read(reading, 1 << 20)
            except BlockingIOError:
                return False
            return b"M40005" in said
        eventually(has_all)
        assert server.wait() == 0
        assert said.count(b"M50001") == 400
    finally:
        os.close(reading)
        server.kill()


def test_of_a_flood_all_lines_are_written_in_order_or_counted(tmp_path):
    make_site(tmp_path, tweaks={"heartbeat-seconds": 2})
    reading, writing = os.pipe()
    server = Server(tmp_path, "--workers", "1", stdout=writing)
    server.start()
    os.close(writing)
    count = 30_000
    try:
        eventually(lambda: answers(server), 30)
        tap = LogTap(RedisLink(redis_socket(tmp_path)), count)
        tap.append_packed(b"".join(
            LogRecord("flood", 1.0, 5, 50001, (n,) + ("-",) * 9).pack()
            for n in range(count)))
        assert tap.flush(Deadline(30)) == 0
        # Nobody reads what is written, and the workers do not feel it.
        assert server.fetch().status_code == 200
        server.signal(signal.SIGTERM)
        with open(reading, closefd=False) as stream:
            lines = stream.read().splitlines()
        assert server.wait() == 0
        flood = [int(re.match(r".* M50001 flood +(\d+) - -- ", line)[1])
                 for line in lines if " flood " in line]
        lost = [int(line.split()[4]) for line in lines if " M60006 " in line]
        assert flood == sorted(flood)
        assert flood and lost
        # Some of those that were lost are the program's own.
        assert count <= len(flood) + sum(lost) < count + 100
    finally:
        os.close(reading)
        server.kill()


def answers(server):
    """Return whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


def test_without_a_standard_output_the_program_serves(site):
    server = Server(site, through=("sh", "-c", 'exec "$@" >&- 2>&- <&-',
                                   "sh"))
    server.start()
    try:
        eventually(lambda: answers(server), 30)
        eventually(lambda: server.fetch().status_code == 200)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()


def test_no_line_is_written_when_none_is_wanted(site):
    server = Server(site, "--log-codes", "empty")
    server.start()
    try:
        eventually(lambda: answers(server), 30)
        server.fetch()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert server.output.read_text() == ""
    finally:
        server.kill()


def is_coloured(site, **environment):
    """Return whether a start writes colours to a terminal."""
    ours, theirs = pty.openpty()
    server = Server(site, environment=environment, stdout=theirs)
    server.start()
    os.close(theirs)
    said = b""
    try:
        while b"M50003" not in said:
            said += os.read(ours, 4096)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        os.close(ours)
        server.kill()
    return b"\x1b[" in said


def test_colours_are_for_terminals_that_want_them(site):
    assert is_coloured(site, NO_COLOR="", TERM="xterm")
    assert not is_coloured(site, NO_COLOR="1", TERM="xterm")
    with Server(site) as server:
        assert "\x1b" not in server.output.read_text()


def test_a_reader_that_goes_away_stops_nobody(site):
    reading, writing = os.pipe()
    server = Server(site, stdout=writing)
    server.start()
    os.close(writing)
    os.close(reading)
    try:
        eventually(lambda: answers(server), 30)
        eventually(lambda: server.fetch().status_code == 200)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()


def test_the_log_can_be_heard_by_others(server):
    listener = subprocess.Popen(
        ["redis-cli", "-s", str(redis_socket(server.folder)),
         "psubscribe", "sc_log_*"], stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL)
    try:
        for _ in range(3):
            listener.stdout.readline()
        server.fetch("/for-others")
        said = b""
        while b"/for-others" not in said:
            line = listener.stdout.readline()
            assert line, server.explained("nothing more to hear")
            said += line
        assert b"sc_log_w" in said
    finally:
        listener.terminate()
        listener.wait(10)
        listener.stdout.close()
