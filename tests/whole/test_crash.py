"""Workers that die, stall or never come up."""

import os
import signal
import time

import pytest
from harness import PROGRAM, Server, eventually, make_site


def sabotaged(folder, place, fault):
    """Return a copy of the program with a fault put in before a line."""
    program = folder / "shimmercat.py"
    text = PROGRAM.read_text()
    assert text.count(place) == 1
    program.write_text(text.replace(place, fault + place))
    return program


def test_a_killed_worker_is_replaced_at_once(server):
    name, pid = next(iter(server.workers().items()))
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    server.await_line("M20002", 3, about="w")
    assert time.monotonic() - begin < 1
    death, = server.lines("M60002")
    assert name in death.message and "SIGKILL" in death.message
    assert server.fetch().status_code == 200


def test_a_crash_loop_backs_off_and_says_so_once_a_step(server):
    survivor, victim = server.workers().values()
    for n in range(3):
        os.kill(victim, signal.SIGSEGV)
        server.await_line("M60002", n + 1)
        server.await_line("M20002", 3 + n, about="w")
        victim = next(pid for pid in server.workers().values()
                      if pid != survivor)
    said = [line.message for line in server.lines("M60003")]
    assert [message.split()[-2] for message in said] == ["1", "2"]
    assert server.fetch().status_code == 200


def test_a_stalled_worker_is_killed_and_replaced(tmp_path):
    make_site(tmp_path, tweaks={"heartbeat-seconds": 1})
    with Server(tmp_path, "--workers", "2") as server:
        name, pid = next(iter(server.workers().items()))
        os.kill(pid, signal.SIGSTOP)
        assert name in server.await_line("M60004")[0].message
        server.await_line("M20002", 3, about="w")
        assert pid not in server.workers().values()
        assert len(server.lines("M60004")) == 1


def test_a_stalled_worker_shows_where_it_hangs(tmp_path):
    make_site(tmp_path, tweaks={"heartbeat-seconds": 1})
    program = sabotaged(tmp_path, "        self._report_ready()\n",
                        "        gevent.spawn_later(0.5, lambda: _plain("
                        "'time', 'sleep')(3600))\n")
    with Server(tmp_path, "--workers", "1", program=program) as server:
        server.await_line("M60002")
        said = "\n".join(map(str, server.lines()))
        assert "Fatal Python error: Aborted" in said
        assert 'shimmercat.py", line' in said


def test_healthy_workers_survive_an_arbiter_that_was_suspended(tmp_path):
    make_site(tmp_path, tweaks={"heartbeat-seconds": 1})
    with Server(tmp_path) as server:
        before = server.workers()
        server.signal(signal.SIGSTOP)
        time_is_up = time.monotonic() + 2.5
        while time.monotonic() < time_is_up:
            assert server.fetch(protocol="http/1.1").status_code == 200
        server.signal(signal.SIGCONT)
        server.signal(signal.SIGHUP)
        server.await_line("M40001")
        assert server.workers() == before
        assert not server.lines("M60004")


@pytest.mark.parametrize("fault", [
    "        raise RuntimeError('sabotage')\n",
    "        os.kill(os.getpid(), signal.SIGSEGV)\n"])
def test_a_first_generation_that_cannot_boot_ends_the_program(site, fault):
    program = sabotaged(site, "        self._report_ready()\n", fault)
    server = Server(site, program=program)
    server.start()
    try:
        assert server.wait() == 70, server.explained("status")
    finally:
        server.kill()
    said = "\n".join(map(str, server.lines()))
    assert "before it was ready" in said
    assert "sabotage" in said or "SIGSEGV" in said


def test_a_worker_that_is_told_to_leave_by_others_is_replaced(server):
    name, pid = next(iter(server.workers().items()))
    os.kill(pid, signal.SIGTERM)
    server.await_line("M20002", 3, about="w")
    eventually(lambda: name not in server.workers())
    assert server.fetch().status_code == 200
    assert not server.lines("M60002")


def test_a_killed_artisan_is_replaced(server):
    server.await_line("M20002", about="artisan")
    os.kill(server.artisan(), signal.SIGKILL)
    server.await_line("M60002", about="artisan")
    server.await_line("M20002", 2, about="artisan")
    assert server.fetch().status_code == 200


def test_replacements_leave_no_descriptor_open(server):
    def descriptors():
        return len(os.listdir(f"/proc/{server.pid}/fd"))
    before = eventually(descriptors)
    for n in range(30):
        os.kill(next(iter(server.workers().values())), signal.SIGKILL)
        server.await_line("M20002", 3 + n, about="w")
    eventually(lambda: descriptors() == before)
