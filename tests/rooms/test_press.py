"""Room 13e, Press."""

import contextlib
import gzip
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import brotli
import pytest
import zstandard
from harness import Server, eventually, make_site

import shimmercat
from shimmercat import PressDoor, PressLink, ScratchError, quick_form

TEXT = b"".join(b"p.class-%d { margin: %dpx; }\n" % (n, n * n % 97)
                for n in range(2000))
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def press(tmp_path_factory):
    """Path of the socket of a press in a process of its own."""
    path = tmp_path_factory.mktemp("press") / "press.sock"
    door, (ours, theirs) = PressDoor(path), socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", PRESS, str(door.socket.fileno()),
         str(theirs.fileno()), str(LIMIT)],
        pass_fds=[door.socket.fileno(), theirs.fileno()],
        cwd=Path(shimmercat.__file__).parent)
    theirs.close()
    try:
        ours.settimeout(30)
        assert ours.recv(1) == b"."
        yield path
        ours.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


PRESS = """
import socket, sys
from types import SimpleNamespace
import shimmercat
door, line, limit = map(int, sys.argv[1:])
sys.exit(shimmercat.Press(
    SimpleNamespace(socket=socket.socket(fileno=door)),
    socket.socket(fileno=line), limit).run())
"""


@pytest.mark.parametrize("coding, decode", [
    ("br", brotli.decompress), ("gzip", gzip.decompress),
    ("zstd", lambda body: zstandard.decompress(body))])
@pytest.mark.parametrize("body", [b"", b"x", b"\n\nbr\n", TEXT, TEXT * 15],
                         ids=len)
def test_a_text_comes_back_in_a_coding(press, coding, decode, body):
    pressed = PressLink(press).press(coding, body)
    assert pressed == quick_form(coding, body)
    assert decode(pressed) == body


def test_a_text_above_the_limit_is_refused(press):
    assert PressLink(press).press("br", bytes(2 * LIMIT)) is None
    assert PressLink(press).press("br", TEXT)


@pytest.mark.parametrize("said", [b"", b"br", b"br\nhello"])
def test_who_leaves_early_does_no_harm(press, said):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(press))
        line.sendall(said)
    assert PressLink(press).press("br", TEXT)


def test_without_a_press_there_is_an_answer_at_once(tmp_path):
    assert PressLink(tmp_path / "none.sock").press("br", TEXT) is None


def test_a_full_queue_has_an_answer_at_once(tmp_path):
    path = tmp_path / "press.sock"
    with contextlib.closing(PressDoor(path)), contextlib.ExitStack() as stack:
        with pytest.raises(BlockingIOError):
            while True:
                line = stack.enter_context(socket.socket(socket.AF_UNIX))
                line.setblocking(False)
                line.connect(str(path))
        begin = time.process_time()
        assert PressLink(path).press("br", TEXT) is None
        assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("answer", [
    b"", b"\0\0", b"\0\0\0\5half", b"\0\0\0\2more"])
def test_what_was_broken_off_is_not_taken_for_an_answer(tmp_path, answer):
    path = tmp_path / "press.sock"
    with contextlib.closing(PressDoor(path)) as door:
        def serve():
            fd, _ = door.socket._accept()
            with socket.socket(fileno=fd) as visitor:
                while visitor.recv(1 << 16):
                    continue
                visitor.sendall(answer)
        thread = threading.Thread(target=serve)
        thread.start()
        assert PressLink(path).press("br", TEXT) is None
        thread.join()


def test_a_press_that_hangs_is_waited_for_in_vain_but_not_long(tmp_path):
    path = tmp_path / "press.sock"
    with contextlib.closing(PressDoor(path)):
        assert PressLink(path).press("br", TEXT * 20) is None


def test_a_place_that_takes_no_socket_is_named(tmp_path):
    with pytest.raises(ScratchError, match="missing/press.sock"):
        PressDoor(tmp_path / "missing" / "press.sock")


# --- the press of a server ---------------------------------------------------


def visit(server, n):
    """The response to the first visitor of a text."""
    path = server.folder / "www" / f"{n}.css"
    path.write_bytes(b"/* %d */" % n + TEXT)
    os.utime(path, (1, 1))
    answer = server.fetch(f"/{n}.css", headers={"accept-encoding": "br"})
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    return answer


def is_quick(server, n):
    """Whether that first visitor gets a cheap form."""
    return visit(server, n).headers["etag"].endswith('-br-quick"')


@pytest.fixture(params=["internet", "devlove"])
def server(request, tmp_path):
    """A server of each mode, and its press at work."""
    make_site(tmp_path)
    with Server(tmp_path, mode=request.param) as running:
        running.await_line("M20002", about="press")
        yield running


def test_first_visitors_have_texts_pressed_and_who_serves_does_not_do_it(
        server):
    press, numbers = press_of(server), itertools.count()
    eventually(lambda: is_quick(server, next(numbers)))
    os.kill(press, signal.SIGSTOP)
    assert not is_quick(server, next(numbers))
    os.kill(press, signal.SIGCONT)
    eventually(lambda: is_quick(server, next(numbers)))
    os.kill(press, signal.SIGKILL)
    visit(server, next(numbers))
    eventually(lambda: is_quick(server, next(numbers)), 20)
    assert press_of(server) != press


def test_there_is_a_press_again_after_the_scratch_folder_was_removed(server):
    scratch = server.folder / ".shimmercat.loves.devs"
    scratch.rename(server.folder / ".removed")
    server.await_line("M40033")
    numbers = itertools.count()
    eventually(lambda: is_quick(server, next(numbers)), 20)


@pytest.mark.parametrize("server", ["devlove"], indirect=True)
def test_a_press_that_came_later_has_no_connection_of_clients(server):
    with server.client() as client:
        assert client.get("/").status_code == 200
        os.kill(press_of(server), signal.SIGKILL)
        server.await_line("M20002", 2, about="press")
        door, = sockets_of(server.pid) & sockets_of(press_of(server))
        assert client.get("/").status_code == 200
    eventually(lambda: is_quick(server, 0), 20)


def sockets_of(pid):
    """The kernel's names of a process's sockets."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            # Closed since it was listed.
            found.add(os.readlink(fd))
    return {name for name in found if name.startswith("socket:")}


def press_of(server):
    """Process id of the newest press."""
    return [pid for name, pid in server.started() if name[:5] == "press"][-1]
