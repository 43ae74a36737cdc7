"""The changelist agent, as a process beside somebody who changes files."""

import contextlib
import functools
import http.server
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import harness
import pytest

import shimmercat

TOP = harness.PROGRAM.parent
FOLDER = shimmercat.CHANGELIST_FOLDER
STATE = ".sc_changelist_agent/files.sqlite3"


class Agent:
    """The agent of a folder; ends with TERM and status 0."""

    def __init__(self, folder, *flags):
        self.folder = folder
        self._flags = flags

    def __enter__(self):
        self.output = self.folder.parent / f"output-{time.monotonic_ns()}"
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shimmercat_ext.changelist_agent",
                 str(self.folder), *self._flags], cwd=TOP, stderr=output,
                stdout=output)
        try:
            self.await_text("compared:")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind, error, trace):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(20) == 0, self.output.read_text()

    def kill(self):
        """End it as a power failure would."""
        self.process.kill()
        self.process.wait(10)

    def await_text(self, text, seconds=30):
        """Wait until it has said something."""
        def has_come():
            assert self.process.poll() is None, self.output.read_text()
            return text in self.output.read_text()
        harness.eventually(has_come, seconds, text)


def changes(folder):
    """All (event, path) pairs of a folder's changelist, in order."""
    found = []
    for path in sorted((folder / FOLDER).glob("*/*/*/*")):
        slot = int("".join(path.relative_to(folder).parts[1:]) + "00", 16)
        found += shimmercat.changes_in(path.read_bytes(), slot)
    return [(change.event, change.path) for change in found]


def await_change(folder, *wanted, after=0):
    """Wait until all these changes are in the list; give the new ones."""
    harness.eventually(
        lambda: set(wanted) <= set(changes(folder)[after:]), 20, wanted)
    return changes(folder)[after:]


@pytest.fixture
def folder(tmp_path):
    """A folder with two files that an agent knows already."""
    folder = tmp_path / "www"
    (folder / "css").mkdir(parents=True)
    (folder / "index.html").write_text("one")
    (folder / "css" / "a.css").write_text("one")
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A folder with an agent at work."""
    folder = tmp_path_factory.mktemp("watched") / "www"
    folder.mkdir()
    with Agent(folder):
        yield folder


def test_files_that_were_never_seen_are_created_ones(folder):
    with Agent(folder):
        assert changes(folder) == [("c", "css/a.css"), ("c", "index.html")]


def test_a_new_a_changed_and_a_removed_file_are_told(watched):
    (watched / "a.txt").write_text("one")
    await_change(watched, ("c", "a.txt"))
    (watched / "a.txt").write_text("two")
    await_change(watched, ("m", "a.txt"))
    (watched / "a.txt").unlink()
    assert await_change(watched, ("d", "a.txt"))[-1] == ("d", "a.txt")


def test_a_file_that_is_only_touched_has_not_changed(watched):
    (watched / "touched.txt").write_text("one")
    await_change(watched, ("c", "touched.txt"))
    os.utime(watched / "touched.txt")
    (watched / "touched.txt").write_text("one")
    (watched / "later.txt").write_text("one")
    await_change(watched, ("c", "later.txt"))
    assert ("m", "touched.txt") not in changes(watched)


def test_a_file_replaced_by_renaming_has_changed(watched):
    (watched / "page.html").write_text("one")
    await_change(watched, ("c", "page.html"))
    (watched / ".page.html.tmp").write_text("two")
    (watched / ".page.html.tmp").rename(watched / "page.html")
    await_change(watched, ("m", "page.html"))


def test_a_change_that_keeps_size_and_time_is_told(watched):
    path = watched / "sly.txt"
    path.write_text("one")
    await_change(watched, ("c", "sly.txt"))
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    await_change(watched, ("m", "sly.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_becomes_unreadable_is_told_as_gone(watched):
    (watched / "secret.txt").write_text("one")
    await_change(watched, ("c", "secret.txt"))
    (watched / "secret.txt").chmod(0)
    await_change(watched, ("d", "secret.txt"))


def test_a_move_is_an_end_and_a_beginning(watched):
    (watched / "old.txt").write_text("moved")
    await_change(watched, ("c", "old.txt"))
    (watched / "old.txt").rename(watched / "new.txt")
    await_change(watched, ("d", "old.txt"), ("c", "new.txt"))


def test_a_folder_that_comes_moves_and_goes_is_told_file_by_file(
        watched, tmp_path):
    names = [f"{a}/{b}.txt" for a in ("x", "y/z") for b in range(3)]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    shutil.copytree(tmp_path / "tree", watched / "copied")
    await_change(watched, *(("c", f"copied/{name}") for name in names))
    shutil.move(tmp_path / "tree", watched / "moved in")
    await_change(watched, *(("c", f"moved in/{name}") for name in names))
    (watched / "copied").rename(watched / "renamed")
    await_change(watched, *(("d", f"copied/{name}") for name in names),
                 *(("c", f"renamed/{name}") for name in names))
    (watched / "renamed/y/z/0.txt").write_text("inside")
    await_change(watched, ("m", "renamed/y/z/0.txt"))
    shutil.rmtree(watched / "renamed")
    await_change(watched, *(("d", f"renamed/{name}") for name in names))


@pytest.mark.parametrize("name", [
    b"with space.css", b"two\nlines.css", b"latin-\xe9.css", b"100%25.css",
    "sn\N{SNOWMAN}w.css".encode(), b"c m d.css", b"#?&;=.css"])
def test_any_name_can_be_told(watched, name):
    path = os.path.join(os.fsencode(watched), name)
    with open(path, "wb") as stream:
        stream.write(b"one")
    await_change(watched, ("c", os.fsdecode(name)))
    with open(path, "wb") as stream:
        stream.write(b"two")
    await_change(watched, ("m", os.fsdecode(name)))


def test_a_change_is_told_under_all_names_that_links_give_it(watched):
    (watched / "releases/1").mkdir(parents=True)
    (watched / "releases/2").mkdir()
    (watched / "releases/1/app.js").write_text("one")
    (watched / "releases/2/app.js").write_text("two")
    (watched / "current").symlink_to("releases/1")
    (watched / "app.js").symlink_to("current/app.js")
    await_change(watched, ("c", "current/app.js"), ("c", "app.js"))
    (watched / "releases/1/app.js").write_text("one and a half")
    await_change(watched, ("m", "releases/1/app.js"),
                 ("m", "current/app.js"), ("m", "app.js"))
    (watched / "next").symlink_to("releases/2")
    (watched / "next").rename(watched / "current")
    after = len(changes(watched))
    (watched / "releases/2/app.js").write_text("three")
    await_change(watched, ("m", "current/app.js"), after=after)


def test_links_in_circles_and_to_nowhere_end_nothing(watched):
    (watched / "round").mkdir()
    (watched / "round/round").symlink_to("..")
    (watched / "nowhere").symlink_to("/nonexistent/file")
    os.mkfifo(watched / "fifo.txt")
    (watched / "round/file.txt").write_text("one")
    await_change(watched, ("c", "round/file.txt"))
    (watched / "round/round").unlink()
    assert ("c", "nowhere") not in changes(watched)


def test_what_is_never_served_is_not_told(watched):
    (watched / ".git").mkdir()
    (watched / ".git/HEAD").write_text("one")
    (watched / ".hidden").write_text("one")
    (watched / ".well-known").mkdir()
    (watched / ".well-known/security.txt").write_text("one")
    await_change(watched, ("c", ".well-known/security.txt"))
    assert not [path for _, path in changes(watched)
                if path.startswith((".git", ".hidden", ".sc_", FOLDER))]


def test_others_can_read_the_list_but_not_the_database(watched):
    (watched / "readable.txt").write_text("one")
    await_change(watched, ("c", "readable.txt"))
    for path in (watched / FOLDER).rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH
    assert not (watched / STATE).parent.stat().st_mode & 0o077


def test_a_second_agent_of_a_folder_is_refused(watched):
    done = subprocess.run(
        [sys.executable, "-m", "shimmercat_ext.changelist_agent",
         str(watched)], cwd=TOP, capture_output=True, text=True, timeout=60)
    assert done.returncode == 73
    assert "locked" in done.stderr


def test_a_time_that_is_none_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "shimmercat_ext.changelist_agent",
         str(tmp_path), "--keep-days", "0"], cwd=TOP, capture_output=True,
        text=True, timeout=30)
    assert done.returncode == 2
    assert "argument --keep-days: '0'; expected a number above" in done.stderr


@pytest.mark.parametrize("words, status", [
    (["/nonexistent"], os.EX_NOINPUT),
    ([".", "--refresh-seconds", "-1"], 2)])
def test_wrong_words_are_refused(words, status):
    done = subprocess.run(
        [sys.executable, "-m", "shimmercat_ext.changelist_agent", *words],
        cwd=TOP, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr


def test_what_changes_while_it_is_dead_is_told_by_the_next(folder):
    with Agent(folder) as agent:
        agent.kill()
    before = len(changes(folder))
    (folder / "css/a.css").write_text("two")
    (folder / "index.html").unlink()
    (folder / "new.txt").write_text("one")
    with Agent(folder):
        assert sorted(changes(folder)[before:]) == [
            ("c", "new.txt"), ("d", "index.html"), ("m", "css/a.css")]


def test_killed_at_any_moment_it_misses_no_change(folder):
    """Each file's last change is told after all that was told before it."""
    before, seed = {}, random.randrange(2 ** 32)
    chance = random.Random(seed)
    ended = threading.Event()

    def change():
        while not ended.wait(0.01):
            name = f"f{chance.randrange(20)}.txt"
            before[name] = len(changes(folder))
            (folder / name).write_text(str(chance.random()))

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(3):
            with Agent(folder) as agent:
                enough = len(changes(folder)) + chance.randrange(20)
                harness.eventually(lambda: len(changes(folder)) > enough)
                agent.kill()
    finally:
        ended.set()
        writer.join()
    with Agent(folder):
        told = [path for _, path in changes(folder)]
    assert len(before) == 20
    assert not [name for name, count in before.items()
                if name not in told[count:]], seed


def test_thousands_of_files_are_told_each_once(folder):
    with Agent(folder):
        before = len(changes(folder))
        for n in range(3000):
            (folder / "css" / f"{n}.css").write_text(str(n))
        wanted = [("c", f"css/{n}.css") for n in range(3000)]
        new = await_change(folder, *wanted, after=before)
    assert sorted(new) == sorted(wanted)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_words):
        """Says nothing."""


def test_a_shimmercat_elsewhere_shows_what_the_agent_tells_of(
        folder, tmp_path):
    origin = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=origin.serve_forever, daemon=True).start()
    edge = tmp_path / "edge"
    (edge / "views").mkdir(parents=True)
    (edge / "devlove.yaml").write_text(f"""
shimmercat-devlove:
  domains:
    {harness.DOMAIN}:
      root-dir: {{fetch-backend: http, http-port: {origin.server_port}}}
      views-dir: views
      changelist-settings: {{tOld: 600, tNew: 1}}
""")
    with Agent(folder), harness.Server(edge, "--workers", "2") as server:
        def shown():
            return server.fetch("/css/a.css").text
        assert shown() == "one"
        (folder / "css/a.css").write_text("two")
        harness.eventually(lambda: shown() == "two")
        (folder / "css/a.css").unlink()
        harness.eventually(
            lambda: server.fetch("/css/a.css").status_code == 404)
    origin.shutdown()
    origin.server_close()


def test_a_line_broken_off_by_a_crash_spoils_no_other(folder):
    with Agent(folder):
        pass
    slot = folder / shimmercat.slot_path(int(time.time()))
    slot.parent.mkdir(parents=True, exist_ok=True)
    with open(slot, "ab") as stream:
        stream.write(b"0a m brok")
    (folder / "index.html").write_text("two")
    with Agent(folder):
        assert ("m", "index.html") in changes(folder)


def test_a_damaged_database_means_that_everything_may_have_changed(folder):
    with Agent(folder):
        pass
    (folder / STATE).write_bytes(b"no database at all" * 1000)
    before = len(changes(folder))
    with Agent(folder):
        assert len(changes(folder)) == before + 2


def test_old_slots_are_removed_and_nothing_else(folder):
    list_ = folder / FOLDER
    old = folder / shimmercat.slot_path(int(time.time()) - 3 * 86_400)
    young = folder / shimmercat.slot_path(int(time.time()) - 1 * 86_400)
    foreign = list_ / "0/5a/65/README"
    for path in (old, young, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"00 m a.css\n")
    with Agent(folder, "--keep-days", "2", "--refresh-seconds", "0.2"):
        harness.eventually(lambda: not old.exists())
        assert young.exists() and foreign.exists()


def test_the_database_can_lie_elsewhere(folder, tmp_path):
    with Agent(folder, "--database", str(tmp_path / "far" / "state")):
        assert (tmp_path / "far" / "state").exists()
    assert not (folder / STATE).exists()


def test_a_root_that_is_a_link_may_be_pointed_to_another_folder(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text("same")
        (tmp_path / name / "other.txt").write_text(name)
    root = tmp_path / "www"
    root.symlink_to("1")
    with Agent(root, "--database", str(tmp_path / "state")):
        (tmp_path / "link").symlink_to("2")
        (tmp_path / "link").rename(root)
        assert await_change(root, ("m", "other.txt")) == [("m", "other.txt")]
        (tmp_path / "2/same.txt").write_text("not the same")
        await_change(root, ("m", "same.txt"))


def test_a_folder_that_is_not_there_for_a_while_is_waited_for(folder):
    with Agent(folder, "--database", str(folder.parent / "state")):
        folder.rename(folder.parent / "away")
        with contextlib.suppress(AssertionError):
            harness.eventually(folder.exists, 0.5)
        shutil.copytree(folder.parent / "away", folder)
        (folder / "new.txt").write_text("one")
        await_change(folder, ("c", "new.txt"))
