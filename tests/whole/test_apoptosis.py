"""Workers that have served long enough are replaced, one by one."""

import os

from harness import DOMAIN, Server, make_site

FAST = ("--apoptosis-seconds", "1-2", "--unsafe-fast-apoptosis")


def test_replacements_cost_no_request_and_come_one_at_a_time(site):
    with Server(site, "--workers", "3", *FAST) as server:
        most = 0
        while len(server.lines("M40022")) < 6:
            assert server.fetch(protocol="http/1.1").status_code == 200
            most = max(most, len(server.workers()))
        assert 3 <= most <= 4
        assert not server.lines("M60002")


def test_the_successor_is_ready_before_the_old_one_leaves(site):
    with Server(site, "--workers", "1", *FAST) as server:
        server.await_line("M30001", 2)
        story = [(line.code, line.message.removeprefix("worker ").split()[0])
                 for line in server.lines()
                 if line.code in ("M20002", "M40022", "M30001")
                 and "w0" in line.message]
    assert story[:5] == [
        ("M20002", "w0-1"), ("M20002", "w0-2"), ("M40022", "w0-1"),
        ("M30001", "w0-1"), ("M20002", "w0-3")]


def test_a_download_outlives_the_place_of_its_worker(tmp_path):
    content = os.urandom(8 << 20)
    make_site(tmp_path, {"big.bin": content})
    with Server(tmp_path, "--workers", "1", *FAST) as server:
        with server.connect() as client:
            client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n"
                           "Connection: close\r\n\r\n".encode())
            pieces = [client.recv(16)]
            server.await_line("M40022")
            while piece := client.recv(1 << 16):
                pieces.append(piece)
        body = b"".join(pieces).partition(b"\r\n\r\n")[2]
        assert body == content


def test_lives_under_a_quarter_of_an_hour_need_the_unsafe_flag(site):
    server = Server(site, "--apoptosis-seconds", "1-2")
    server.start()
    assert server.wait() == 64
    assert "--unsafe-fast-apoptosis" in server.output.read_text()
