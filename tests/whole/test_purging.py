"""The command `purge`, with and without a running instance."""

import os
import signal
import subprocess
import sys

import harness
import pytest
import zoo

REMOTE = "far.example.test"


def purge(folder, *words):
    """Run the command; return what came of it."""
    return subprocess.run(
        [sys.executable, harness.PROGRAM, "purge", *words], cwd=folder,
        capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def origin():
    animal = zoo.Files({})
    with zoo.Origin(animal) as running:
        yield running


def make_site(folder, origin):
    """A site with files here and, as another domain, at an origin."""
    harness.make_site(folder, {
        "index.html": b"hello", "text.css": b"a { color: red }\n" * 500})
    with open(folder / "devlove.yaml", "a") as text:
        text.write(f"    {REMOTE}:\n      root-dir:\n"
                   f"        fetch-backend: http\n"
                   f"        http-port: {origin.port}\n"
                   f"      views-dir: www\n")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, origin):
    folder = make_site(tmp_path_factory.mktemp("purge"), origin)
    with harness.Server(folder, "--workers", "2") as running:
        yield running


def fill(origin, name, suffix=b"one"):
    """Give the origin three files that begin with a name."""
    for end in ("a.css", "b.js", "c.txt"):
        origin.animal.files[f"/{name}/{end}"] = suffix
    # Copies with the same content go together.
    origin.animal.files[f"/{name}/c.txt"] += b" as well"


def texts(server, name, count=6):
    """What both workers have of these files, as far as chance may tell."""
    return {server.fetch(f"/{name}/{end}", domain=REMOTE).text
            for end in ("a.css", "b.js", "c.txt") for _ in range(count)}


def test_what_was_fetched_is_forgotten_by_all_workers(server, origin):
    fill(origin, "all")
    assert texts(server, "all") == {"one", "one as well"}
    fill(origin, "all", b"two")
    assert texts(server, "all") == {"one", "one as well"}
    done = purge(server.folder, "/all/")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines[:3]] == [
        f"{REMOTE} http 127.0.0.1:{origin.port}/all/{end}"
        for end in ("a.css", "b.js", "c.txt")]
    assert lines[3].startswith("3 assets purged, ")
    assert texts(server, "all") == {"two", "two as well"}


def test_words_choose_by_type(server, origin):
    fill(origin, "kinds")
    texts(server, "kinds", 1)
    fill(origin, "kinds", b"two")
    done = purge(server.folder, "/kinds/", "styles", "scripts")
    assert "2 assets purged" in done.stdout
    assert [server.fetch(f"/kinds/{end}", domain=REMOTE).text for end in (
        "a.css", "b.js", "c.txt")] == ["two", "two", "one as well"]


def test_a_domain_limits_what_goes(server, origin):
    fill(origin, "domain")
    texts(server, "domain", 1)
    done = purge(server.folder, "/domain/", "--domain", harness.DOMAIN)
    assert (done.returncode, done.stdout) == (0, "0 assets purged, 0 bytes\n")
    done = purge(server.folder, "/domain/", "--domain", REMOTE)
    assert "3 assets purged" in done.stdout


def test_what_was_missing_is_asked_for_again(server, origin):
    for _ in range(6):
        assert server.fetch("/late/a.css", domain=REMOTE).status_code == 404
    fill(origin, "late")
    assert purge(server.folder, "/late/a.css").returncode == 0
    for _ in range(6):
        assert server.fetch("/late/a.css", domain=REMOTE).text == "one"


def test_smaller_forms_of_local_files_are_made_anew(server):
    store = server.folder / ".shimmercat.loves.devs" / "r-cache"

    def forms():
        return list(store.glob("v*/*/*.br-11.*"))

    server.fetch("/text.css")
    harness.eventually(forms)
    assert "/text.css: " in purge(server.folder, "/text.css").stdout
    assert not forms()
    server.fetch("/text.css")
    harness.eventually(forms)


def test_wrong_words_are_refused(server):
    for words in (("image",), ("/", "--domain", "nosuch.test")):
        done = purge(server.folder, *words)
        assert done.returncode == 64, done
        assert "expected" in done.stderr


def test_the_store_is_purged_when_no_instance_runs(tmp_path, origin):
    folder = make_site(tmp_path, origin)
    fill(origin, "off")
    with harness.Server(folder, "--workers", "1") as server:
        texts(server, "off", 1)
    done = purge(folder, "/off/*.css")
    assert done.stdout.endswith("1 assets purged, " + done.stdout.split()[-2]
                                + " bytes\n")
    fill(origin, "off", b"two")
    with harness.Server(folder, "--workers", "1") as server:
        assert [server.fetch(f"/off/{end}", domain=REMOTE).text
                for end in ("a.css", "c.txt")] == ["two", "one as well"]


def test_an_instance_that_cannot_be_told_is_an_error(tmp_path):
    harness.make_site(tmp_path)
    with harness.Server(tmp_path, mode="devlove") as server:
        done = purge(tmp_path, "/")
        assert done.returncode == 69
        assert f"process {server.pid}" in done.stderr


def test_a_worker_that_does_not_answer_is_an_error(server):
    stopped = min(server.workers().values())
    os.kill(stopped, signal.SIGSTOP)
    try:
        done = purge(server.folder, "/nothing")
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert done.returncode == 69
    assert "1 of 2 workers" in done.stderr
