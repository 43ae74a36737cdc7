"""The scratch folder is full, read-only or gone while the site is served."""

import base64
import contextlib
import os
import resource
import shutil
import signal
import subprocess

import pytest
import zoo
from harness import DOMAIN, Server, eventually, make_site

NAMES = ("known", "first", "second", "third", "later")
FILES = {f"{name}.css": "".join(
    f".{name}-{n} {{ width: {n}px }}\n" for n in range(200)).encode()
    for name in NAMES}
#: its best form is not kept in memory, but sent from r-cache
FILES["large.txt"] = base64.b64encode(os.urandom(40_000))
HEALTH = "/.well-known/shimmercat/health"


@pytest.fixture
def server(tmp_path):
    """A site, two files of which have their smaller forms."""
    folder = make_site(tmp_path, FILES, {"small-file-bytes": "16 KiB"})
    with Server(folder, "--workers", "2") as running:
        running.cache = folder / ".shimmercat.loves.devs" / "r-cache"
        for name in ("known.css", "large.txt"):
            fetch(running, name)
            eventually(lambda name=name: made(running, name), 30)
            fetch(running, name)
        yield running


@pytest.fixture
def edge(tmp_path):
    """A site whose files come from an origin; one was fetched already."""
    (tmp_path / "views").mkdir()
    with zoo.Origin(zoo.Files({f"/{name}": content for name, content
                               in FILES.items()})) as origin:
        (tmp_path / "devlove.yaml").write_text(
            f"shimmercat-devlove:\n  domains:\n    {DOMAIN}:\n"
            "      root-dir:\n        fetch-backend: http\n"
            f'        http-port: "127.0.0.1:{origin.port}"\n'
            "      views-dir: views\n")
        with Server(tmp_path, "--workers", "2") as running:
            running.cache = tmp_path / ".shimmercat.loves.devs" / "r-cache"
            fetch(running, "known.css")
            yield running


def fetch(server, name):
    """Ask for a file, which must come whole; return the response."""
    answer = server.fetch(f"/{name}", headers={"accept-encoding": "br"})
    assert answer.status_code == 200
    assert answer.content == FILES[name]
    return answer


def made(server, name):
    """Lines that tell of a best form of a file."""
    path = server.folder / "www" / name
    return server.lines("M20004", f"br made from {path}: ")


@contextlib.contextmanager
def mounted(server, *options):
    """Mount something over r-cache."""
    done = subprocess.run(["mount", *options, server.cache],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr}")
    try:
        yield
    finally:
        # Who has a file open there just now is gone in an instant.
        subprocess.run(["umount", "--lazy", server.cache], check=True)


@contextlib.contextmanager
def full(server):
    """A file system without room."""
    with mounted(server, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        with (contextlib.suppress(OSError),
              open(server.cache / "filler", "wb", 0) as filler):
            while filler.write(bytes(4096)):
                continue
        yield "No space left on device"


@contextlib.contextmanager
def read_only(server):
    """A file system that is read-only from here on."""
    with mounted(server, "--bind", server.cache):
        # While a file is written there it is busy.
        eventually(lambda: not subprocess.run(
            ["mount", "-o", "remount,bind,ro", server.cache],
            capture_output=True).returncode)
        yield "Read-only file system"


@contextlib.contextmanager
def limited(server):
    """A limit that every write exceeds, but for the arbiter's log."""
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)

    def limit(size):
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                if pid != server.pid:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    limit(0)
    yield "File too large"
    limit(hard)


@contextlib.contextmanager
def in_the_way(server):
    """A file where the folder was."""
    def took_the_place():
        away = server.cache.with_name("away")
        shutil.rmtree(server.cache.rename(away))
        with contextlib.suppress(IsADirectoryError):
            # It was made anew meanwhile.
            return server.cache.write_text("in the way")

    eventually(took_the_place)
    yield "File exists"
    server.cache.unlink()


@pytest.mark.parametrize("trouble", [full, read_only, limited, in_the_way])
def test_serving_goes_on_from_the_source(server, trouble):
    with trouble(server) as cause:
        for name in (*FILES, *FILES):
            fetch(server, name)
        server.await_line("M60014")
        assert server.fetch(HEALTH).json()["store"] == cause
        # What was said is not said again, whoever meets it.
        for name in FILES:
            fetch(server, name)
        assert said(server).count(cause) == 1
    await_later(server)
    assert server.fetch(HEALTH).json()["store"] == "ok"


@pytest.mark.parametrize("trouble", [full, read_only, limited, in_the_way])
def test_what_is_fetched_is_passed_on(edge, trouble):
    with trouble(edge) as cause:
        for name in (*FILES, *FILES):
            fetch(edge, name)
        assert said(edge).count(cause) == 1
        assert not edge.lines("M60001")
    # Not kept for a few seconds, then as before.
    eventually(lambda: fetch(edge, "first.css") and any(
        edge.cache.glob("v3/*/*.original.*")), 30)


def said(server):
    """Return the causes that were told: also what a job in flight met."""
    place = f"r-cache takes no more files: {server.cache}/v3: "
    return [line.message.removeprefix(place)
            for line in server.lines("M60014")]


def await_later(server):
    """Wait until a file that had no smaller form so far gets one."""
    path = server.folder / "www" / "later.css"
    assert not made(server, "later.css")
    eventually(lambda: fetch(server, "later.css") and made(
        server, "later.css"), 30, path)


def test_the_end_is_told_and_the_next_trouble_is_told_again(server):
    path = server.folder / "www" / "first.css"

    def has_changed(code, count):
        path.write_text(f"{os.urandom(9).hex()} {{}}\n" * 99)
        server.fetch("/first.css")
        return len(server.lines(code)) >= count

    for count in (1, 2):
        with limited(server):
            eventually(lambda: has_changed("M60014", count))
        if count == 1:
            eventually(lambda: has_changed("M40014", 1), 30)
    assert len(server.lines("M60014")) == 2


def test_an_r_cache_that_was_removed_is_made_anew(server):
    shutil.rmtree(server.cache)
    for name in ("known.css", "large.txt", "first.css"):
        fetch(server, name)
    await_later(server)
    assert server.cache.stat().st_mode & 0o777 == 0o700
    assert not server.lines("M60014")


def test_a_scratch_folder_that_was_removed_is_made_anew(server):
    scratch, redis = server.cache.parent, server.redis()
    shutil.rmtree(scratch.rename(server.folder / "away"))
    for name in ("known.css", "large.txt", "first.css"):
        fetch(server, name)
    server.await_line("M40033")
    eventually(lambda: server.redis() not in (None, redis))
    assert scratch.stat().st_mode & 0o777 == 0o700
    # All that begins from here on finds what it needs.
    server.signal(signal.SIGTTIN)
    server.await_line("M20002", 3, about="w")
    await_later(server)
    assert server.fetch(HEALTH).json() == {
        "state": "ready", "workers": 3, "redis": "ok", "store": "ok"}
    assert len(server.lines("M40033")) == 1
    other = Server(server.folder)
    other.start()
    assert other.process.wait(20) == 75
