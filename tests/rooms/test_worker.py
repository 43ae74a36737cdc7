"""Room 17, Worker."""

import argparse
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import harness
import pytest

from shimmercat import (
    CannotListen,
    Child,
    Doors,
    NetworkAddress,
    Terms,
    Watch,
    WorkerLine,
    exit_text,
    load_settings,
)


def settings(folder, **flags):
    """Return settings of a small site with flags."""
    harness.make_site(folder)
    words = {name: NetworkAddress.parse(value)
             for name, value in flags.items()}
    return load_settings(argparse.Namespace(
        mode="internet", working_dir=folder, **words))


def started(tmp_path, code, patience=60):
    """Return a Child that runs Python code with a line, and says `ready`."""
    ours, theirs = WorkerLine.pair()
    os.set_inheritable(theirs.fileno(), True)
    process = subprocess.Popen(
        [sys.executable, "-c", "import os, signal, time\n"
         "def say(word): os.write(LINE, word)\n"
         f"LINE = {theirs.fileno()}\n" + code],
        pass_fds=[theirs.fileno()])
    theirs.close()
    child = Child("w0-1", process.pid, ours, (), Terms(patience))
    # Child reaps, as in the arbiter: Popen must not.
    process.returncode = 0
    return child


def await_stage(child, stage):
    """Wait until a child has come to a stage."""
    def has_come():
        child.hear()
        return child.stage == stage
    harness.eventually(has_come)


def await_death(child):
    """Press a child until it is dead; return how it ended."""
    def has_died():
        child.press_on()
        return child.is_dead()
    harness.eventually(has_died)
    return exit_text(child.status)


def test_words_arrive_in_their_order():
    ours, theirs = WorkerLine.pair()
    assert ours.hear() == b""
    theirs.say(WorkerLine.READY)
    theirs.say(WorkerLine.ALIVE)
    assert ours.hear() == b"r."
    ours.close()
    theirs.close()


def test_the_end_of_a_line_is_heard_after_the_last_words():
    ours, theirs = WorkerLine.pair()
    theirs.say(WorkerLine.DRAINED)
    theirs.close()
    assert ours.hear() == b"d"
    assert ours.hear() is None
    ours.say(WorkerLine.ALIVE)
    ours.close()
    assert ours.hear() is None


def test_a_line_that_nobody_reads_never_waits():
    ours, theirs = WorkerLine.pair()
    for _ in range(10_000):
        theirs.say(WorkerLine.ALIVE)
    assert set(ours.hear()) == set(b".")
    ours.close()
    theirs.close()


def test_doors_of_several_slots_share_a_port(tmp_path):
    wanted = settings(tmp_path, listen=f"127.0.0.1:{harness.free_port()}")
    first, = Doors.open(wanted)
    second, = Doors.open(wanted, check=False)
    assert first.secure.getsockname() == second.secure.getsockname()
    assert first.redirect is None
    for doors in (first, second):
        doors.close()


def test_a_redirect_address_opens_a_second_door(tmp_path):
    port = harness.free_port()
    doors, = Doors.open(settings(
        tmp_path, listen=f"127.0.0.1:{harness.free_port()}",
        redirect=f"127.0.0.1:{port}"))
    assert doors.redirect.getsockname()[1] == port
    doors.close()


@pytest.mark.parametrize(("address", "reason"), [
    ("192.0.2.1:4043", "Cannot assign requested address"),
    ("lookup(nowhere.invalid):4043", ""),
    ("socket-fd://999", "Bad file descriptor"),
    ("unix:///no/such/folder/socket", "No such file or directory"),
])
def test_an_address_that_cannot_be_had_is_named(tmp_path, address, reason):
    with pytest.raises(CannotListen) as caught:
        Doors.open(settings(tmp_path, listen=address))
    assert str(caught.value).startswith(f"cannot listen on {address}: ")
    assert str(caught.value).endswith(reason)
    assert caught.value.exit_code == 71


def test_a_port_of_another_program_is_refused(tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match="Address already in use"):
            Doors.open(settings(tmp_path, listen=f"127.0.0.1:{port}"))


def test_both_families_of_addresses_can_be_listened_on(tmp_path):
    port = harness.free_port()
    doors, = Doors.open(settings(tmp_path, listen=f"[::1]:{port}"))
    with socket.create_connection(("::1", port), 5):
        pass
    doors.close()


def test_the_socket_of_a_dead_server_is_swept_away(tmp_path):
    path = tmp_path / "public.sock"
    wanted = settings(tmp_path, listen=f"unix://{path}")
    doors, = Doors.open(wanted)
    doors.close()
    assert path.is_socket()
    doors, = Doors.open(wanted)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
    doors.close()


def test_the_first_word_says_that_a_child_is_ready(tmp_path, said):
    child = started(tmp_path, "say(b'r'); time.sleep(60)")
    assert child.stage == "starting"
    await_stage(child, "serving")
    assert [record.code for record in said] == [20002]
    child.retire(5)
    assert await_death(child) == "by SIGTERM"


def test_a_child_that_will_not_leave_is_pressed_harder_and_harder(
        tmp_path, said):
    child = started(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                    "say(b'r'); time.sleep(60)")
    await_stage(child, "serving")
    child.retire(0.1)
    assert await_death(child) == "by SIGQUIT"


def test_a_shorter_limit_wins(tmp_path, said):
    child = started(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: None)"
                    "\nsay(b'r')\nwhile True: time.sleep(60)")
    await_stage(child, "serving")
    child.retire(300)
    child.retire(0.1)
    child.retire(300)
    assert await_death(child) == "by SIGQUIT"


def test_a_child_hears_how_long_it_has_before_it_is_told_to_leave(
        tmp_path, said):
    child = started(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: "
                    "os._exit(int(os.read(LINE, 9))))\nsay(b'r')\n"
                    "while True: time.sleep(60)")
    await_stage(child, "serving")
    assert child.retire(42.5)
    assert await_death(child) == "with status 42"


def test_who_does_not_leave_soon_lingers(tmp_path, said, monkeypatch):
    child = started(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: None)"
                    "\nsay(b'r')\nwhile True: time.sleep(60)")
    await_stage(child, "serving")
    assert not child.soon.passed()
    child.retire(300)
    assert not child.soon.passed()
    later = time.monotonic() + 6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert child.soon.passed()
    monkeypatch.undo()
    child.retire(0, signal.SIGKILL)
    await_death(child)


def test_a_change_is_told_once_and_when_it_has_settled(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    value = ["old"]
    watch = Watch(lambda: value[0], "old")

    def look():
        clock[0] += 1.5
        return watch.has_changed()
    assert not look()
    value[0] = "half written"
    assert not watch.has_changed()
    assert not look()
    value[0] = "new"
    assert [look() for _ in range(4)] == [False, True, False, False]
    value[0] = "another"
    assert not look()
    value[0] = "new"
    assert [look() for _ in range(3)] == [False, False, False]
    value[0] = "known otherwise"
    watch.settle()
    assert [look() for _ in range(3)] == [False, False, False]


def test_looks_that_take_long_are_rare(monkeypatch):
    clock, looks = [0.0], []
    for name in ("monotonic", "thread_time"):
        monkeypatch.setattr(time, name, lambda: clock[0])

    def look():
        looks.append(clock[0])
        clock[0] += 0.1
    watch = Watch(look, None)
    while clock[0] < 100:
        clock[0] += 0.5
        watch.has_changed()
    assert len(looks) <= 10


def test_a_silent_child_is_aborted(tmp_path, said):
    child = started(tmp_path, "say(b'r'); time.sleep(60)", patience=0.2)
    await_stage(child, "serving")
    assert await_death(child) == "by SIGABRT"
    assert [record.code for record in said] == [20002, 60004]


def test_words_put_off_the_end_of_patience(tmp_path, said):
    child = started(tmp_path, "say(b'r')\n"
                    "for n in range(20): time.sleep(0.05); say(b'.')\n"
                    "os._exit(4)", patience=0.5)

    def has_died():
        child.hear()
        child.press_on()
        return child.is_dead()
    harness.eventually(has_died)
    assert exit_text(child.status) == "with status 4"
    assert 60004 not in [record.code for record in said]


def test_a_child_asks_for_a_successor(tmp_path, said):
    child = started(tmp_path, "say(b'r'); say(b'a'); time.sleep(60)")
    harness.eventually(lambda: child.hear() or child.wants_successor)
    child.retire(5)
    await_death(child)


def test_who_stands_apart_goes_with_its_parent(tmp_path):
    middle = subprocess.Popen([sys.executable, "-c", f"""
import os, signal, sys, time
sys.path.insert(0, {str(harness.PROGRAM.parent)!r})
import shimmercat
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
reading, writing = os.pipe()
if os.fork() == 0:
    shimmercat.stand_apart(signal.SIGTERM)
    os.write(writing, b"%d %d" % (os.getpid(), os.getsid(0)))
    time.sleep(60)
print(os.read(reading, 99).decode(), flush=True)
time.sleep(60)
"""], stdout=subprocess.PIPE, text=True)
    pid, session = map(int, middle.stdout.readline().split())
    assert session == pid
    middle.kill()
    middle.wait(10)
    middle.stdout.close()
    harness.eventually(lambda: not harness.is_alive(pid))


def test_a_worker_may_open_as_many_descriptors_as_the_system_allows(site):
    resource_limits = (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    with harness.Server(site) as server:
        pid = next(iter(server.workers().values()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, resource_limits)
        os.kill(pid, signal.SIGKILL)
        server.await_line("M20002", 3, about="w")
        for pid in server.workers().values():
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            assert soft == hard


def test_a_child_keeps_no_line_or_listener_of_its_siblings_open(server):
    ends = {}
    for pid in [*server.workers().values(), server.artisan()]:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:"):
                ends.setdefault(target, set()).add(pid)
    assert not [pids for pids in ends.values() if len(pids) > 1]


def test_workers_have_one_thread_and_ignore_what_is_for_the_group(server):
    for pid in server.workers().values():
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        status = dict(re.findall(r"^(\w+):\s+(\w+)", text, re.MULTILINE))
        ignored = int(status["SigIgn"], 16)
        assert int(status["Threads"]) == 1
        assert not int(status["SigBlk"], 16)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            assert ignored >> (number - 1) & 1
