"""Sockets that a supervisor opens, hands over, and keeps for the next one."""

import contextlib
import os
import signal
import socket
import sys

import pytest
from harness import DOMAIN, Server, eventually, make_site

#: sets the variables that systemd sets, and becomes the program
AS_SYSTEMD = ("sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh")


@contextlib.contextmanager
def listener(family=socket.AF_INET, place=("127.0.0.1", 0)):
    """A listening socket, as a supervisor keeps it."""
    with socket.socket(family) as door:
        door.bind(place)
        door.listen(64)
        yield door


class Handed(Server):
    """The program with sockets that it inherits as descriptors 3, 4 ..."""

    def __init__(self, folder, doors, *flags, through=(), **options):
        move = "; ".join(
            f"os.dup2({door.fileno()}, {50 + n})"
            for n, door in enumerate(doors))
        place = "; ".join(f"os.dup2({50 + n}, {3 + n})"
                          for n, _ in enumerate(doors))
        run = "os.execvp(sys.argv[1], sys.argv[1:])"
        super().__init__(
            folder, "--workers", "2", *flags, **options,
            port=doors[0].getsockname()[1] if doors[0].family
            == socket.AF_INET else None,
            pass_fds=[door.fileno() for door in doors],
            through=(sys.executable, "-c",
                     f"import os, sys; {move}; {place}; {run}", *through))


def inodes(pid):
    """Return the inodes of a process's sockets by its descriptors."""
    return {fd: os.stat(f"/proc/{pid}/fd/{fd}").st_ino
            for fd in os.listdir(f"/proc/{pid}/fd")}


def test_systemd_hands_over_sockets_and_hears_how_we_are(site):
    with (listener() as door, listener() as plain,
          socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices):
        notices.bind(str(site / "notify"))
        notices.settimeout(20)
        server = Handed(site, [door, plain], environment={
            "LISTEN_FDS": "2", "LISTEN_FDNAMES": "https:redirect",
            "NOTIFY_SOCKET": str(site / "notify"),
            "WATCHDOG_USEC": "300000"}, through=AS_SYSTEMD)
        with server:
            assert server.fetch().status_code == 200
            assert "systemd" in server.lines("M10009")[0].message
            with socket.create_connection(plain.getsockname(), 10) as client:
                client.sendall(f"GET /a HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                               .encode())
                assert (f"location: https://{DOMAIN}:{server.port}/a\r\n"
                        in client.recv(4096).decode())
            heard = []
            while f"READY=1\nMAINPID={server.pid}" not in heard:
                heard.append(notices.recv(4096).decode())
            for _ in range(3):
                assert notices.recv(4096) == b"WATCHDOG=1"
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            while heard[-1] != "STOPPING=1":
                heard.append(notices.recv(4096).decode())
        with socket.create_connection(door.getsockname(), 10):
            # It is open where it came from.
            pass


def test_notices_reach_an_abstract_address(site):
    name = f"shimmercat-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(f"\0{name}")
        notices.settimeout(20)
        with Server(site, environment={"NOTIFY_SOCKET": f"@{name}"}) as server:
            assert notices.recv(4096) == (
                f"READY=1\nMAINPID={server.pid}".encode())


def test_variables_for_another_process_mean_nothing(site):
    with Server(site, environment={
            "LISTEN_PID": "1", "LISTEN_FDS": "1",
            "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1"}) as server:
        assert not server.lines("M10009")
        assert server.fetch().status_code == 200


@pytest.mark.parametrize(("environment", "status", "words"), [
    ({"EINHORN_FDS": "three"}, 78, "EINHORN_FDS"),
    ({"EINHORN_FDS": "987"}, 71, "socket-fd://987: Bad file descriptor"),
    ({"EINHORN_FDS": "0"}, 71, "socket-fd://0: "),
])
def test_what_is_no_socket_ends_the_start(site, environment, status, words):
    server = Server(site, environment=environment)
    server.start()
    assert server.wait() == status
    assert words in server.output.read_text()


def test_a_descriptor_can_be_named_and_is_in_no_program_that_we_start(site):
    with listener() as door:
        flag = f"--listen=socket-fd://{door.fileno()}"
        with Server(site, flag, port=door.getsockname()[1],
                    pass_fds=[door.fileno()]) as server:
            assert server.fetch().status_code == 200
            inode = os.fstat(door.fileno()).st_ino
            assert inode in inodes(server.pid).values()
            assert inode not in inodes(server.redis()).values()


def test_devlove_mode_serves_what_it_is_handed(site):
    with listener() as door:
        server = Server(site, mode="devlove", port=door.getsockname()[1],
                        environment={"EINHORN_FDS": str(door.fileno())},
                        pass_fds=[door.fileno()])
        with server:
            assert server.fetch().status_code == 200


def begin(site, door, *flags):
    """Return a server, not started, that is given a socket as 3."""
    return Handed(site, [door], *flags, environment={"EINHORN_FDS": "3"})


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_successor_shares_the_folder_until_the_first_has_drained(
        tmp_path, number):
    big = os.urandom(8 << 20)
    make_site(tmp_path, {"index.html": b"<h1>Hello</h1>\n", "big.bin": big})
    with listener() as door, begin(tmp_path, door) as first:
        client = first.connect()
        client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                       .encode())
        pieces = [client.recv(16)]
        with begin(tmp_path, door) as second:
            assert first.redis() != second.redis()
            first.signal(number)
            # socketmaster tells all children, each time.
            first.signal(number)
            first.await_line("M40004")
            for _ in range(20):
                assert second.fetch().status_code == 200
            scratch = tmp_path / ".shimmercat.loves.devs"
            eventually(lambda: (scratch / "lock").read_text().startswith(
                f"{second.pid}\n"))
            assert first.process.poll() is None
            with client:
                while piece := client.recv(1 << 16):
                    pieces.append(piece)
            assert b"".join(pieces).partition(b"\r\n\r\n")[2] == big
            assert first.wait() == 0
            assert not first.lines("M40006") + first.lines("M40019")
            assert second.fetch().status_code == 200
        assert not [path.name for path in scratch.glob("*.sock")]


def test_a_stranger_does_not_share_the_folder(site):
    with (listener() as door, listener() as another,
          begin(site, door)):
        stranger = begin(site, another)
        stranger.start()
        assert stranger.wait() == 75


def test_what_a_killed_one_has_left_is_swept_away(site):
    # Sockets whose paths are longer live in another folder.
    scratch, flag = site / "s", "--scratch-dir-name=s"
    with listener() as door:
        with begin(site, door, flag) as first:
            first.process.kill()
            first.process.wait(10)
            first.status = 0
            eventually(lambda: not first.processes())
        assert list(scratch.glob("press-*.sock"))
        with begin(site, door, flag) as second:
            assert [path.name for path in scratch.glob("press-*.sock")] == [
                f"press-{second.pid}.sock"]
