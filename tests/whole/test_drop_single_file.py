"""The one file serves from a folder that holds nothing else of ours."""

import pathlib
import shutil
import sys
import sysconfig

import pytest
from harness import DOMAIN, PROGRAM, Server, make_site

PAGE = b"<h1>Alone</h1>\n" * 40
FILES = {"index.html": PAGE, "big.bin": bytes(range(256)) * 8192}


@pytest.fixture
def folder(tmp_path):
    """A folder with shimmercat.py, devlove.yaml and www."""
    place = tmp_path / "site"
    place.mkdir()
    make_site(place, FILES)
    shutil.copy(PROGRAM, place)
    assert sorted(path.name for path in place.iterdir()) == [
        "devlove.yaml", "shimmercat.py", "www"]
    return place


@pytest.fixture
def libraries(tmp_path):
    """A folder with what is installed beside us, and nothing of ours.

    shimmercat itself is installed too where .ci/run tests.
    """
    place = tmp_path / "libraries"
    place.mkdir()
    for kind in ("purelib", "platlib"):
        for path in pathlib.Path(sysconfig.get_path(kind)).iterdir():
            link = place / path.name
            if "shimmercat" not in path.name and not link.is_symlink():
                link.symlink_to(path)
    return place


def alone(folder, libraries, mode):
    """Return the server of a program that can import nothing of ours.

    -S leaves out what is installed, -P the folder itself.
    """
    server = Server(folder, mode=mode, program=folder / "shimmercat.py",
                    environment={"PYTHONPATH": str(libraries)})
    server._command[:2] = [sys.executable, "-S", "-P", "shimmercat.py"]
    return server


@pytest.mark.parametrize("mode", ["internet", "devlove"])
def test_the_file_alone_serves(folder, libraries, mode):
    with alone(folder, libraries, mode) as server:
        for protocol in ("h2", "http/1.1"):
            answer = server.fetch("/", protocol)
            assert (answer.status_code, answer.content) == (200, PAGE)
            assert answer.headers["content-encoding"] in (
                "br", "zstd", "gzip")
            answer = server.fetch("/big.bin", protocol)
            assert answer.content == FILES["big.bin"]


@pytest.mark.parametrize("mode", ["internet", "devlove"])
def test_the_file_alone_serves_from_an_isolated_python(folder, mode):
    server = Server(folder, mode=mode)
    server._command[:2] = [sys.executable, "-I", "shimmercat.py"]
    with server:
        assert server.fetch("/").content == PAGE


def test_the_file_alone_makes_all_that_it_needs(folder, libraries):
    with alone(folder, libraries, "internet") as server:
        assert server.fetch("/").status_code == 200
        assert f"domain {DOMAIN}" in server.output.read_text()
        scratch = folder / ".shimmercat.loves.devs"
        assert {"cert.pem", "privkey.pem", "tweaks.yaml", "r-cache"} <= {
            path.name for path in scratch.iterdir()}
    left = {path.name for path in folder.iterdir()} - {server.output.name}
    assert left == {"devlove.yaml", "shimmercat.py", "www", scratch.name}
