"""USR2: the program file is started anew, in the place of what runs."""

import os
import pathlib
import re
import shutil
import signal
import socket
import time

import pytest
from harness import DOMAIN, PROGRAM, Server, eventually, is_alive, make_site
from test_handed_sockets import AS_SYSTEMD, Handed, listener
from visitors import Visitors

BIG = os.urandom(8 << 20)


def install(folder, version="1.0.0", **changes):
    """Put a program with a version, and changes to its text, in its place.

    As an operator does: the file is replaced at once.
    """
    text = PROGRAM.read_text().replace(
        '__version__ = "1.0.0"', f'__version__ = "{version}"')
    for before, after in changes.values():
        assert before in text
        text = text.replace(before, after, 1)
    draft = folder / "draft.py"
    draft.write_text(text)
    program = folder / "shimmercat.py"
    os.replace(draft, program)
    return program


@pytest.fixture
def dropped(tmp_path):
    """A site with the program beside it, which is not started."""
    make_site(tmp_path, {"index.html": b"<h1>Hello</h1>\n", "big.bin": BIG})
    shutil.copytree(PROGRAM.parent / "shimmercat_ext",
                    tmp_path / "shimmercat_ext")
    return Server(tmp_path, "--workers", "2", program=install(tmp_path))


def upgrade(server):
    """Send USR2 and wait until the new program's workers serve."""
    count = len(server.lines("M50004"))
    server.signal(signal.SIGUSR2)
    server.await_line("M50004", count + 1, 60)


def test_the_program_is_another_and_the_process_the_same(dropped):
    with dropped as server, Visitors(server) as visitors:
        before, redis = server.workers(), server.redis()
        lock = server.folder / ".shimmercat.loves.devs" / "lock"
        for version in ("1.0.1", "1.0.2"):
            install(server.folder, version)
            upgrade(server)
            assert f"shimmercat {version} " in server.lines("M10001")[-1].text
            asked = visitors.answered
            eventually(lambda: visitors.answered > asked + 50)
        assert server.process.poll() is None
        assert server.redis() == redis
        assert lock.read_text().startswith(f"{server.pid}\n")
        eventually(lambda: not any(map(is_alive, before.values())))
        eventually(lambda: sorted(name.partition("-")[0] for name in (
            server.workers())) == ["w0", "w1"])
        server.signal(signal.SIGTTIN)
        server.await_line("M40002")
        eventually(lambda: len(server.workers()) == 3)
    assert not visitors.failures
    assert not server.lines("M60002") + server.lines("M60001")
    answers = [line for line in server.lines("M50001")
               if line.message.startswith("127.0.0.1 GET")]
    assert len(answers) == visitors.answered


def test_who_leaves_after_an_upgrade_is_as_old_as_it_is(dropped):
    with dropped as server:
        begin = time.monotonic()
        eventually(lambda: time.monotonic() - begin > 3)
        upgrade(server)
        for line in server.await_line("M40029", 2, about="w"):
            assert int(line.message.split()[3]) >= 3


def test_nothing_piles_up_over_upgrades(dropped):
    def descriptors():
        # The artisan of before has gone, and lines arrive.
        eventually(lambda: len(server.processes()) == 6)
        count = len(server.lines("M50001"))
        server.fetch()
        server.await_line("M50001", count + 1)
        return len(os.listdir(f"/proc/{server.pid}/fd"))
    with dropped as server:
        upgrade(server)
        before = descriptors()
        for _ in range(2):
            upgrade(server)
        # One may just come or go.
        assert descriptors() <= before + 1


@pytest.mark.parametrize(("spoil", "words"), [
    (("import argparse\n", "import argparse_\n"), "No module named"),
    (("import argparse\n", "import argparse oh\n"), "SyntaxError"),
    (("import argparse\n", "raise SystemExit(0)\n"), "said nothing"),
    (("        self._open()\n        while not self._is_finished",
      "        self._oven()\n        while not self._is_finished"), "_oven"),
    (("        self._leaving.wait()\n", "        os._exit(3)\n"),
     "died with status 3"),
    (('HERITAGE_FORMAT = "2"', 'HERITAGE_FORMAT = "1"'), "start again"),
    (("import argparse\n",
      "import argparse\nimport time; time.sleep(3600)\n"), ""),
])
def test_a_program_that_cannot_start_changes_nothing(
        dropped, spoil, words):
    if not words:
        # Too little for any trial, but the test need not take a minute.
        install(dropped.folder, limit=(
            "_TRIAL_SECONDS = 60", "_TRIAL_SECONDS = 2"))
    with dropped as server, Visitors(server, 2) as visitors:
        before = server.workers()
        install(server.folder, "2.0.0", fault=spoil)
        server.signal(signal.SIGUSR2)
        server.await_line("M60016", seconds=60)
        said = server.output.read_text()
        assert words in said.partition("M60016")[2]
        asked = visitors.answered
        eventually(lambda: visitors.answered > asked + 20)
        assert server.workers() == before
        assert not server.lines("M40030")
        assert "shimmercat 2.0.0" not in server.lines("M10001")[-1].text
        eventually(lambda: len(server.processes()) == 6)
    assert not visitors.failures


def test_only_what_was_tried_takes_over(dropped):
    with dropped as server:
        before = server.workers()
        install(server.folder, "1.0.1", sign=(
            "import argparse\n", "import argparse\nopen('tried', 'w')\n"))
        server.signal(signal.SIGUSR2)
        eventually((server.folder / "tried").exists, 60)
        install(server.folder, fault=("import argparse\n", "import oh\n"))
        server.await_line("M60016", seconds=60)
        assert "has changed since the trial" in server.output.read_text()
        assert server.workers() == before
        install(server.folder, "1.0.2")
        upgrade(server)
        assert "shimmercat 1.0.2 " in server.lines("M10001")[-1].text


#: at the moment of the take-over, a configuration that is gone
LOSE_CONFIGURATION = ("import argparse\n", """import argparse
import os
if "SHIMMERCAT_HERITAGE" in os.environ and os.path.exists("lose"):
    os.rename("lose", "lost")
    os.rename("devlove.yaml", "away.yaml")
""")
FAULT = ("    with open(int(fd), \"rb\", closefd=False) as file:\n",
         "    with oven(int(fd)) as file:\n")


@pytest.mark.parametrize(("spoil", "words"), [
    (LOSE_CONFIGURATION, "devlove.yaml: cannot be read"), (FAULT, "oven")])
def test_a_program_that_cannot_take_over_tries_again_while_workers_serve(
        dropped, spoil, words):
    with dropped as server, Visitors(server, 2) as visitors:
        before, redis = server.workers(), server.redis()
        (server.folder / "lose").touch()
        install(server.folder, fault=spoil)
        server.signal(signal.SIGUSR2)
        server.await_line("M60017", 2, 60)
        assert words in server.output.read_text().partition("M60017")[2]
        asked = visitors.answered
        eventually(lambda: visitors.answered > asked + 20)
        assert server.workers() == before
        install(server.folder, "1.0.1")
        if spoil is LOSE_CONFIGURATION:
            (server.folder / "away.yaml").rename(
                server.folder / "devlove.yaml")
        server.await_line("M50004", seconds=60)
        assert "shimmercat 1.0.1 " in server.lines("M10001")[-1].text
        assert server.redis() == redis
        eventually(lambda: not set(server.workers()) & set(before), 60)
        eventually(lambda: len(server.processes()) == 6)
    assert not visitors.failures


def test_term_ends_a_program_that_cannot_take_over_and_its_workers(dropped):
    with dropped as server:
        client = server.connect()
        client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                       .encode())
        count = len(client.recv(16))
        (server.folder / "lose").touch()
        install(server.folder, fault=LOSE_CONFIGURATION)
        server.signal(signal.SIGUSR2)
        server.await_line("M60017", seconds=60)
        server.signal(signal.SIGTERM)
        with client:
            while piece := client.recv(1 << 16):
                count += len(piece)
        assert count > len(BIG)
        assert server.wait(30) == 0
        scratch = server.folder / ".shimmercat.loves.devs"
        assert not list(scratch.glob("*.sock"))


def test_after_a_wrong_configuration_an_upgrade_may_be_tried_again(dropped):
    with dropped as server:
        before = (server.folder / "devlove.yaml").read_text()
        (server.folder / "devlove.yaml").write_text("{")
        server.signal(signal.SIGUSR2)
        server.await_line("M60016", seconds=60)
        assert "devlove.yaml:1:2" in server.output.read_text()
        assert server.fetch().status_code == 200
        (server.folder / "devlove.yaml").write_text(before)
        upgrade(server)
        assert server.fetch().status_code == 200


def test_a_download_is_finished_by_the_old_program(dropped):
    with dropped as server:
        client = server.connect()
        client.sendall(f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n"
                       .encode())
        count = len(client.recv(16))
        for _ in range(2):
            upgrade(server)
        with client:
            while piece := client.recv(1 << 16):
                count += len(piece)
        assert count > len(BIG)
        eventually(lambda: len(server.workers()) == 2)
        assert "/big.bin" in server.await_line("M50001")[-1].text


@pytest.mark.parametrize("moment", ["M40020", "M40030", "M40029"])
def test_term_amid_an_upgrade_ends_all(dropped, moment):
    with dropped as server:
        server.signal(signal.SIGUSR2)
        server.await_line(moment, seconds=60)
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.lines()[-1].code == "M40005"
        scratch = server.folder / ".shimmercat.loves.devs"
        assert not list(scratch.glob("*.sock"))


def test_a_log_file_goes_on(dropped):
    log = dropped.folder / "server.log"
    server = Server(dropped.folder, "--workers", "2", "--log-file", str(log),
                    program=dropped.folder / "shimmercat.py")
    server.output = log
    with server:
        upgrade(server)
        server.fetch("/after-the-upgrade")
        assert "/after-the-upgrade" in server.await_line("M50001")[-1].text
        assert len(server.lines("M10001")) == 2


def test_systemd_hears_of_the_change(dropped):
    path = dropped.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(path))
        notices.settimeout(60)
        with Server(dropped.folder, program=dropped.folder / "shimmercat.py",
                    environment={"NOTIFY_SOCKET": str(path)}) as server:
            ready = f"READY=1\nMAINPID={server.pid}".encode()
            assert notices.recv(4096) == ready
            server.signal(signal.SIGUSR2)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+",
                                notices.recv(4096))
            assert notices.recv(4096) == ready


def test_devlove_mode_says_that_it_does_not(site):
    with Server(site, mode="devlove") as server:
        server.signal(signal.SIGUSR2)
        server.await_line("M40021")
        assert server.fetch().status_code == 200


def test_the_arbiter_has_no_more_memory_than_after_a_start(dropped):
    def memory():
        status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    with dropped as server:
        before = memory()
        upgrade(server)
        assert memory() < before + 4096


def test_sockets_of_systemd_are_kept_over_reload_and_upgrade(dropped):
    program = dropped.folder / "shimmercat.py"
    with (listener() as door,
          Handed(dropped.folder, [door], environment={"LISTEN_FDS": "1"},
                 through=AS_SYSTEMD, program=program) as server,
          Visitors(server, 2) as visitors):
        server.signal(signal.SIGHUP)
        server.await_line("M50004")
        upgrade(server)
        upgrade(server)
        assert len(server.lines("M10009")) == 3
        assert server.fetch().status_code == 200
    assert not visitors.failures
