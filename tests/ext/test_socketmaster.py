"""socketmaster, as a process above real programs that serve its socket."""

import concurrent.futures
import contextlib
import http.client
import itertools
import os
import pathlib
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import harness
import pytest

TOP = harness.PROGRAM.parent
SERVER = pathlib.Path(__file__).parent / "fd3_server.py"
RESTARTS = 50
#: of shimmercat at each of two sockets, a second of a core each
OWN_RESTARTS = RESTARTS // 2
CLIENTS = 4
#: between the requests of a client, so that starts get their share of cores
BREATH_SECONDS = 0.02


class Master:
    """socketmaster above a program; ends with TERM and status 0."""

    def __init__(self, folder, *options, program=None,
                 listen="tcp4://127.0.0.1:0", handed=None, log=None):
        self.folder = folder
        self.output = folder / "output.txt"
        self._log, self._handed, self._through = log, [], []
        if handed:
            self._handed = [handed[0]]
            self._through = [
                sys.executable, "-c", "import os, sys;"
                f"os.dup2{handed}; os.execv(sys.argv[1], sys.argv[1:])"]
        program = program or shell(
            folder, f"exec {sys.executable} -IS {SERVER}")
        self._options = [
            f"-command={program}", f"-listen={listen}", *options]

    def __enter__(self):
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [*self._through, sys.executable, "-m",
                 "shimmercat_ext.socketmaster", *self._options],
                cwd=self.folder, stdout=output, stderr=self._log or output,
                pass_fds=self._handed,
                env={**os.environ, "PYTHONPATH": str(TOP)})
        return self

    def __exit__(self, kind, error, trace):
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        try:
            assert self.process.wait(20) == 0 or kind, self.said()
            assert not [pid for pid in self.pids()
                        if harness.is_alive(pid)] or kind
        finally:
            self.process.kill()
            self.process.wait(10)

    def send(self, number):
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self):
        """Wait for its end; return its status."""
        return self.process.wait(20)

    def said(self):
        """Return all that it wrote."""
        return self.output.read_text()

    def pids(self):
        """Return the process ids of all children so far."""
        return [int(pid) for pid in re.findall(
            r"(\d+) is started", self.said())]

    def await_text(self, text, count=1):
        """Wait until it has said something so often."""
        def has_come():
            assert self.process.poll() is None, self.said()
            return self.said().count(text) >= count
        try:
            harness.eventually(has_come, 20, text)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said()}") from None

    def await_child(self, count=1):
        """Wait for a child that is ready; return its process id."""
        self.await_text("] ready\n", count)
        return self.pids()[count - 1]

    def await_end(self, pid):
        """Wait until it has told of a child's end."""
        self.await_text(f" {pid} has ended")

    def address(self):
        """Return where it listens, as the log names it."""
        self.await_text("listening at ")
        return re.search(r"listening at (\S+)", self.said())[1]

    def connect(self):
        """Return a client's socket."""
        scheme, _, place = self.address().partition("://")
        if scheme == "unix":
            client = socket.socket(socket.AF_UNIX)
            client.connect(place)
            return client
        host, _, port = place.rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host)
        return socket.create_connection((host.strip("[]"), int(port)), 20)

    def ask(self, path="/"):
        """Return the process id of who answers a request."""
        with contextlib.closing(http.client.HTTPConnection(
                "localhost")) as client:
            client.sock = self.connect()
            client.request("GET", path)
            answer = client.getresponse()
            assert answer.status == 200
            return int(answer.read())


def shell(folder, text):
    """Make a shell script; return its path."""
    script = folder / "program"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("uri, address", [
    ("tcp4://127.0.0.1:0", r"tcp4://127\.0\.0\.1:\d+"),
    ("tcp4://:0", r"tcp4://0\.0\.0\.0:\d+"),
    ("tcp://localhost:0", r"tcp://127\.0\.0\.1:\d+"),
    ("tcp6://[::1]:0", r"tcp6://\[::1\]:\d+"),
    ("unix://{}/door", "unix:///.*/door"),
])
def test_a_socket_of_each_kind_is_served(tmp_path, uri, address):
    with Master(tmp_path, listen=uri.format(tmp_path)) as master:
        assert re.fullmatch(address, master.address())
        assert master.ask() == master.await_child()


def test_tcp_without_a_host_is_both_families(tmp_path):
    with Master(tmp_path, listen="tcp://:0") as master:
        port = int(master.address().rpartition(":")[2])
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), 20).close()


@pytest.mark.parametrize("number", [3, 9])
def test_a_socket_that_was_handed_down_is_served(tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as door, \
            Master(tmp_path, listen=f"fd://{number}",
                   handed=(door.fileno(), number)) as master:
        port = door.getsockname()[1]
        assert master.address() == f"tcp://127.0.0.1:{port}"
        assert master.ask() == master.await_child()


def test_the_program_gets_the_socket_as_3_and_nothing_else(tmp_path):
    with Master(tmp_path) as master:
        master.await_child()
        assert "] EINHORN_FDS 3\n" in master.said()
        # 4 is the folder that it lists
        assert "] open ['0', '1', '2', '3', '4']\n" in master.said()


def test_lines_of_a_child_have_its_pid(tmp_path):
    script = shell(tmp_path, r"echo one; printf 'two\377' >&2")
    with Master(tmp_path, program=script) as master:
        assert master.wait() == 0
        (pid,) = master.pids()
        assert f"\n[{pid}] one\n[{pid}] two\\xff\n" in master.said()


def test_a_line_without_end_is_broken(tmp_path):
    script = shell(tmp_path, "head -c 200000 /dev/zero | tr '\\0' x")
    with Master(tmp_path, program=script) as master:
        assert master.wait() == 0
        (pid,) = master.pids()
        parts = re.findall(rf"^\[{pid}\] (x+)$", master.said(), re.MULTILINE)
        assert sum(map(len, parts)) == 200_000
        assert max(map(len, parts)) <= 131_072


def test_hup_starts_a_new_process_and_then_tells_the_old_one(tmp_path):
    with Master(tmp_path, "-start=300") as master:
        old = master.await_child()
        master.send(signal.SIGHUP)
        new = master.await_child(2)
        master.await_end(old)
        assert f"[{old}] told SIGHUP\n" in master.said()
        assert f"[{new}] told" not in master.said()
        assert master.ask() == new


def test_the_old_process_is_not_told_before_its_time(tmp_path):
    with Master(tmp_path, "-start=3600000") as master:
        old = master.await_child()
        master.send(signal.SIGHUP)
        new = master.await_child(2)
        # both accept
        harness.eventually(lambda: master.ask() == old)
        harness.eventually(lambda: master.ask() == new)
        assert "is sent to" not in master.said()


def test_without_start_the_old_process_is_told_at_once(tmp_path):
    with Master(tmp_path, "-start=0") as master:
        old = master.await_child()
        master.send(signal.SIGHUP)
        master.await_end(old)
        assert master.ask() == master.await_child(2)


def test_a_new_process_that_dies_early_does_not_cost_the_old_one(tmp_path):
    with Master(tmp_path, "-start=3600000", "-respawn") as master:
        old = master.await_child()
        (tmp_path / "broken").touch()
        master.send(signal.SIGHUP)
        master.await_text(f" has ended (status 3) before -start was over;"
                          f" {old} goes on\n")
        # and the next one has its chance
        (tmp_path / "broken").unlink()
        master.send(signal.SIGHUP)
        master.await_child(2)
        assert harness.is_alive(old)
        assert len(master.pids()) == 3
        assert "is sent to" not in master.said()


def test_many_hups_during_a_start_are_one_more_restart(tmp_path):
    with Master(tmp_path, "-start=400") as master:
        master.await_child()
        master.send(signal.SIGHUP)
        master.await_text("is started", 2)
        for _ in range(3):
            master.send(signal.SIGHUP)
        master.await_text("SIGHUP is sent to", 2)
        first, second, third = master.pids()
        for pid in (first, second):
            master.await_end(pid)
        assert master.ask() == third


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT"])
def test_ends_are_forwarded_to_all_processes(tmp_path, name):
    with Master(tmp_path, "-start=3600000", "-respawn") as master:
        first = master.await_child()
        master.send(signal.SIGHUP)
        second = master.await_child(2)
        master.send(signal.Signals[name])
        assert master.wait() == 0
        for pid in (first, second):
            assert f"[{pid}] told {name}\n" in master.said()
            assert not harness.is_alive(pid)


def test_what_is_in_flight_at_the_end_is_answered(tmp_path):
    with Master(tmp_path) as master, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        pid = master.await_child()
        asked = pool.submit(master.ask, "/slow")
        harness.eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) > 4)
        master.send(signal.SIGTERM)
        assert asked.result(20) == pid


@pytest.mark.parametrize("end, status", [
    ("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137),
    ("kill -40 $$", 168)])
def test_it_leaves_with_the_last_process_and_its_status(
        tmp_path, end, status):
    with Master(tmp_path, program=shell(tmp_path, end)) as master:
        assert master.wait() == status
        master.process.returncode = 0


def test_a_process_that_a_signal_of_ours_ends_has_ended_as_asked(tmp_path):
    script = shell(tmp_path, "echo ready; exec sleep 60")
    with Master(tmp_path, program=script) as master:
        master.await_child()
        master.send(signal.SIGTERM)
        assert master.wait() == 0


def test_hup_after_term_starts_nothing(tmp_path):
    script = shell(tmp_path, "trap '' TERM; echo ready; exec sleep 60")
    with Master(tmp_path, program=script) as master:
        pid = master.await_child()
        master.send(signal.SIGTERM)
        master.await_text("SIGTERM is sent")
        master.send(signal.SIGHUP)
        master.await_text("HUP is ignored")
        os.kill(pid, signal.SIGKILL)
        assert master.wait() == 137
        master.process.returncode = 0
        assert master.pids() == [pid]


def test_respawn_starts_a_dead_program_again(tmp_path):
    with Master(tmp_path, "-respawn") as master:
        first = master.await_child()
        os.kill(first, signal.SIGKILL)
        # Its socket waits meanwhile.
        assert master.ask() == master.await_child(2) != first


def test_without_respawn_a_dead_program_is_the_end(tmp_path):
    with Master(tmp_path) as master:
        os.kill(master.await_child(), signal.SIGKILL)
        assert master.wait() == 137
        master.process.returncode = 0


def test_respawn_pauses_longer_and_longer(tmp_path):
    with Master(tmp_path, "-respawn", program=shell(
            tmp_path, "exit 1")) as master:
        master.await_text("it is started again in 2 s\n")
        assert "it is started again in 1 s\n" in master.said()
        # A pause is no reason to stay.
        master.send(signal.SIGTERM)
        assert master.wait() == 1
        master.process.returncode = 0


def test_hup_ends_a_pause(tmp_path):
    (tmp_path / "broken").touch()
    with Master(tmp_path, "-respawn") as master:
        master.await_text("again in 2 s\n")
        (tmp_path / "broken").unlink()
        # One that cannot be started changes nothing.
        (tmp_path / "program").rename(tmp_path / "away")
        master.send(signal.SIGHUP)
        master.await_text("cannot be started")
        (tmp_path / "away").rename(tmp_path / "program")
        master.send(signal.SIGHUP)
        master.await_text("] ready\n")
        assert master.ask() == master.pids()[-1]


def test_a_program_that_is_gone_does_not_cost_the_old_process(tmp_path):
    with Master(tmp_path, "-start=0") as master:
        old = master.await_child()
        (tmp_path / "program").unlink()
        master.send(signal.SIGHUP)
        master.await_text("cannot be started: No such file or directory\n")
        assert master.ask() == old


def test_a_log_that_nobody_reads_costs_nothing(tmp_path):
    read, write = os.pipe()
    with Master(tmp_path, "-start=0", f"-listen=unix://{tmp_path}/door",
                log=write) as master:
        os.close(write)
        os.close(read)
        master.output.write_text(f"listening at unix://{tmp_path}/door\n")
        harness.eventually((tmp_path / "door").exists)
        before = master.ask()
        master.send(signal.SIGHUP)
        harness.eventually(lambda: master.ask() != before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may")
def test_the_program_runs_as_the_user(tmp_path):
    with Master(tmp_path, "-user=nobody", program="/usr/bin/id") as master:
        assert master.wait() == 0
        assert re.search(r"\] uid=\d+\(nobody\) gid=\d+\(nogroup\)"
                         r" groups=\d+\(nogroup\)\n", master.said())


def test_only_root_may_name_a_user():
    done = subprocess.run(
        [sys.executable, "-c",
         "import encodings.idna, os; from shimmercat_ext import socketmaster;"
         "os.getuid() or os.setuid(65534); socketmaster.main()",
         "-command=true", "-user=nobody"],
        cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'nobody'; only root may start programs as others" in done.stderr


def test_syslog_gets_all_lines(tmp_path):
    try:
        log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        log.bind("/dev/log")
    except OSError as error:
        pytest.skip(f"/dev/log: {error.strerror}")
    try:
        log.settimeout(20)
        with Master(tmp_path, "-syslog", program=shell(
                tmp_path, "echo from the program")) as master:
            said = b""
            while b"has ended" not in said:
                said += log.recv(4096) + b"\n"
            assert master.wait() == 0
            assert re.search(rb"<30>.* socketmaster\[\d+\]: \[\d+\] from the"
                             rb" program\n", said)
            assert not master.said()
    finally:
        log.close()
        os.unlink("/dev/log")


@pytest.mark.parametrize("options, text", [
    ([], "the following arguments are required: -command"),
    (["-command=/no/such"], "'/no/such'; expected a program"),
    (["-command=true", "-listen=http://:80"], "'http://:80'; expected tcp://"),
    (["-command=true", "-listen=tcp://:http"], "'tcp://:http'; expected"),
    (["-command=true", "-listen=tcp://:1/a"], "'tcp://:1/a'; expected"),
    (["-command=true", "-listen=unix://door"], "'unix://door'; expected"),
    (["-command=true", "-listen=fd://x"], "'fd://x'; expected"),
    (["-command=true", "-start=1s"], "'1s'; expected milliseconds from 0"),
    (["-command=true", "-user=no-such-user"], "'no-such-user'; expected"),
    (["-command=true", "-fork"], "unrecognized arguments: -fork"),
])
def test_a_wrong_option_is_named(options, text):
    done = run(*options)
    assert done.returncode == 2
    assert text in done.stderr


def run(*options, pass_fds=()):
    """Run socketmaster to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shimmercat_ext.socketmaster", *options],
        cwd=TOP, capture_output=True, text=True, timeout=20,
        pass_fds=pass_fds)


@pytest.mark.parametrize("uri, text", [
    ("fd://99", "-listen=fd://99: Bad file descriptor"),
    ("fd://0", "-listen=fd://0: Socket operation on non-socket"),
    ("unix:///no/such/door", "door: No such file or directory"),
    ("unix:///" + 120 * "x", "AF_UNIX path too long"),
    ("tcp4://192.0.2.1:1", "Cannot assign requested address"),
])
def test_an_address_that_cannot_be_had_is_named(uri, text):
    done = run("-command=true", f"-listen={uri}")
    assert done.returncode == os.EX_OSERR
    assert text in done.stderr


def test_a_socket_that_does_not_listen_is_refused():
    with socket.socket() as deaf:
        number = deaf.fileno()
        done = run("-command=true", f"-listen=fd://{number}",
                   pass_fds=[number])
    assert done.returncode == os.EX_OSERR
    assert f"file descriptor {number} does not listen" in done.stderr


def test_a_stale_socket_file_is_replaced_and_ours_is_removed(tmp_path):
    door = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(door))
    with Master(tmp_path, listen=f"unix://{door}") as master:
        assert master.ask() == master.await_child()
    assert not door.exists()


def test_a_socket_file_in_use_and_other_files_are_left_alone(tmp_path):
    door, other = tmp_path / "door", tmp_path / "other"
    other.write_text("precious")
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(door))
        used.listen()
        for path in (door, other):
            done = run("-command=true", f"-listen=unix://{path}")
            assert done.returncode == os.EX_OSERR
            assert "Address already in use" in done.stderr
    assert door.exists()
    assert other.read_text() == "precious"


def test_no_request_fails_through_fifty_restarts(tmp_path):
    with Master(tmp_path, "-start=50") as master, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        stop, served = threading.Event(), set()
        clients = [pool.submit(ask_on, master, path, served, stop)
                   for path in CLIENTS * ["/"] + ["/slow"]]
        try:
            for count in range(RESTARTS + 1):
                if count:
                    master.send(signal.SIGHUP)
                    master.await_text("has ended", count)
                # Each process has its share of requests.
                harness.eventually(
                    lambda count=count: len(served) > count, 20)
        finally:
            stop.set()
        assert sum(client.result(20) for client in clients) > RESTARTS
        assert len(served) == RESTARTS + 1
        assert "before -start" not in master.said()


def ask_on(master, path, served, stop):
    """Ask until it is enough, noting who answers; return how often."""
    for count in itertools.count(1):
        served.add(master.ask(path))
        if stop.is_set():
            return count


@pytest.mark.parametrize("listen", ["tcp4://127.0.0.1:0", "unix://{}/door"])
def test_no_request_to_shimmercat_fails_through_restarts(tmp_path, listen):
    site = harness.make_site(tmp_path)
    # As a module with bytecode it starts in less time than as a script.
    shutil.copy(harness.PROGRAM, tmp_path)
    py_compile.compile(tmp_path / harness.PROGRAM.name)
    program = shell(tmp_path, (
        f"exec {sys.executable} -m shimmercat internet --workers 2"
        f" --working-dir {site}"))
    with Master(tmp_path, "-start=500", program=program,
                listen=listen.format(tmp_path)) as master, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        master.await_text("M50003")
        stop = threading.Event()
        clients = [pool.submit(pages, master, stop) for _ in range(CLIENTS)]
        try:
            for count in range(1, OWN_RESTARTS + 1):
                master.send(signal.SIGHUP)
                master.await_text("M50003", count + 1)
                master.await_text("SIGHUP is sent to", count)
            master.await_text("has ended", OWN_RESTARTS)
        finally:
            stop.set()
        assert sum(client.result(20) for client in clients) > OWN_RESTARTS


def pages(master, stop):
    """Ask for a page until it is enough; return how often."""
    context = harness.trusting_context()
    for count in itertools.count(1):
        with context.wrap_socket(
                master.connect(), server_hostname=harness.DOMAIN) as client:
            client.sendall(f"GET / HTTP/1.1\r\nHost: {harness.DOMAIN}\r\n"
                           "Connection: close\r\n\r\n".encode())
            said = client.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 200 ")
        assert said.endswith(b"<h1>Hello</h1>\n")
        if stop.wait(BREATH_SECONDS):
            return count
