"""Room 12, Fetch backends."""

import os
import socket
import stat
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimmercat import AssetMissing, Deadline, FilesystemBackend

SECRET = b"secret"


@pytest.fixture
def root(tmp_path):
    """A root with one file, and a secret beside it."""
    (tmp_path / "www" / "sub").mkdir(parents=True)
    (tmp_path / "www" / "a.css").write_bytes(b"a")
    (tmp_path / "www" / "sub" / "b.css").write_bytes(b"b")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_bytes(SECRET)
    return tmp_path / "www"


def fetched(backend, *components):
    """The octets under a path."""
    source = backend.fetch(components)
    try:
        return os.pread(source.fd, 1000, 0)
    finally:
        os.close(source.fd)


def is_missing(backend, *components):
    """Whether nothing is served; no descriptor may be left open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AssetMissing) as failure:
        backend.fetch(components)
    assert len(os.listdir("/proc/self/fd")) == before
    return failure.value.status == 404


def test_a_file_is_opened_with_its_identity(root):
    source = FilesystemBackend(root, ()).fetch(("sub", "b.css"))
    try:
        assert os.pread(source.fd, 9, 0) == b"b"
        assert source.path == str(root / "sub" / "b.css")
        assert source.length == 1
        assert source.modified == os.stat(root / "sub" / "b.css").st_mtime
        assert not os.get_inheritable(source.fd)
    finally:
        os.close(source.fd)


@pytest.mark.parametrize("components", [
    ("nothing.css",), ("sub",), ("sub", ""), ("",), ("a.css", "x"),
    ("a.css", ""), ("x\0y",), ("x" * 300,), ("\udcff",), (".",), ("..",),
    ("..", "outside", "secret.txt"), ("sub", "..", "..", "outside",
                                      "secret.txt"),
    ("/etc/passwd",), ("", "etc", "passwd"), ("sub", "/etc/passwd"),
])
def test_what_is_no_file_below_the_root_is_missing(root, components):
    assert is_missing(FilesystemBackend(root, ()), *components)


@pytest.mark.parametrize("target", [
    "../outside/secret.txt", "{}/outside/secret.txt", "/etc/passwd",
    "/proc/self/environ", "nothing", "loop.txt"])
def test_a_link_out_of_the_root_is_missing(root, target):
    (root / "loop.txt").symlink_to(target.format(root.parent))
    assert is_missing(FilesystemBackend(root, ()), "loop.txt")


def test_a_folder_linked_from_outside_is_missing(root):
    (root / "folder").symlink_to(root.parent / "outside")
    assert is_missing(FilesystemBackend(root, ()), "folder", "secret.txt")


def test_links_within_the_root_are_served(root):
    (root / "link.css").symlink_to("sub/b.css")
    (root / "folder").symlink_to("sub")
    backend = FilesystemBackend(root, ())
    assert fetched(backend, "link.css") == b"b"
    assert fetched(backend, "folder", "b.css") == b"b"


def test_a_folder_whose_name_begins_like_the_root_is_outside(root):
    (root.parent / "www2").mkdir()
    (root.parent / "www2" / "c.css").write_bytes(SECRET)
    (root / "c.css").symlink_to(root.parent / "www2" / "c.css")
    assert is_missing(FilesystemBackend(root, ()), "c.css")


def test_a_root_may_be_a_link_itself(root):
    (root.parent / "current").symlink_to("www")
    backend = FilesystemBackend(root.parent / "current", ())
    assert fetched(backend, "a.css") == b"a"


def test_a_root_that_is_a_link_may_be_pointed_elsewhere(root):
    current = root.parent / "current"
    current.symlink_to("www")
    backend = FilesystemBackend(current, ())
    assert fetched(backend, "a.css") == b"a"
    (root.parent / "release2").mkdir()
    (root.parent / "release2" / "a.css").write_bytes(b"new")
    (root.parent / "next").symlink_to("release2")
    (root.parent / "next").rename(current)
    assert fetched(backend, "a.css") == b"new"


def test_the_file_system_may_be_the_root():
    backend = FilesystemBackend("/", ())
    assert fetched(backend, "etc", "passwd")


@pytest.mark.parametrize("path", [
    ".env", ".git/config", "sub/.hidden", "sub/.d/x.css",
    ".well-known/.x", "sub/.well-known/x"])
def test_dot_files_are_missing_even_by_a_link(root, path):
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_bytes(SECRET)
    (root / "link.css").symlink_to(root / path)
    backend = FilesystemBackend(root, ())
    assert is_missing(backend, *path.split("/"))
    assert is_missing(backend, "link.css")


def test_well_known_things_are_served(root):
    (root / ".well-known").mkdir()
    (root / ".well-known" / "security.txt").write_bytes(b"x")
    backend = FilesystemBackend(root, ())
    assert fetched(backend, ".well-known", "security.txt") == b"x"


def test_a_root_below_a_dot_folder_is_served(root):
    hidden = root.parent / ".hidden"
    root.rename(hidden)
    assert fetched(FilesystemBackend(hidden, ()), "a.css") == b"a"


def test_a_fifo_is_missing_and_nobody_waits_for_its_writer(root):
    os.mkfifo(root / "pipe.css")
    assert is_missing(FilesystemBackend(root, ()), "pipe.css")


def test_a_socket_is_missing(root):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "s.css"))
        assert is_missing(FilesystemBackend(root, ()), "s.css")


def test_devices_are_missing():
    backend = FilesystemBackend("/", ())
    assert is_missing(backend, "dev", "null")
    assert is_missing(backend, "dev", "zero")


def test_the_closed_folders_are_missing_even_by_a_link(root):
    (root / "scratch" / "r-cache").mkdir(parents=True)
    (root / "scratch" / "cert.pem").write_bytes(SECRET)
    (root / "scratch.css").write_bytes(b"open")
    (root / "link.css").symlink_to("scratch/cert.pem")
    (root / "door").symlink_to("scratch")
    backend = FilesystemBackend(root, (root / "scratch",))
    assert is_missing(backend, "scratch", "cert.pem")
    assert is_missing(backend, "link.css")
    assert is_missing(backend, "door", "cert.pem")
    assert fetched(backend, "scratch.css") == b"open"


def test_a_closed_folder_may_be_made_later(root):
    backend = FilesystemBackend(root, (root / "scratch",))
    (root / "scratch").mkdir()
    (root / "scratch" / "x.css").write_bytes(SECRET)
    assert is_missing(backend, "scratch", "x.css")


def test_an_unreadable_file_is_missing(root):
    (root / "a.css").chmod(0)
    user = os.geteuid()
    # Root may read everything, so that nobody has to ask.
    os.seteuid(user or 65534)
    try:
        assert is_missing(FilesystemBackend(root, ()), "a.css")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_that_is_swapped_while_serving_never_leads_out(
        root, is_folder):
    (root / "sub" / "secret.txt").write_bytes(b"public")
    name = root / "swapped"
    targets = ["sub", "../outside"]
    if not is_folder:
        targets = [f"{target}/secret.txt" for target in targets]
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for target in targets:
                (root / "next").symlink_to(target)
                (root / "next").rename(name)

    name.symlink_to(targets[0])
    swapper = threading.Thread(target=swap)
    swapper.start()
    backend = FilesystemBackend(root, ())
    served = set()
    components = ("swapped", "secret.txt") if is_folder else ("swapped",)
    deadline = Deadline(10)
    try:
        while len(served) < 2 and not deadline.passed():
            try:
                served.add(fetched(backend, *components))
            except AssetMissing:
                served.add(None)
    finally:
        stop.set()
        swapper.join()
    assert served == {b"public", None}


names = st.sampled_from([
    "a.css", "sub", "b.css", "..", ".", "", "out", "pipe", ".env", "scratch",
    "in", "secret.txt", "cert.pem", "outside", "/", "//etc", "x\0"]) | st.text(
        max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(names, max_size=6))
def test_what_is_served_is_a_regular_file_below_the_root(root, components):
    if not (root / "out").is_symlink():
        (root / "out").symlink_to(root.parent)
        (root / "in").symlink_to("sub/..")
        (root / ".env").write_bytes(SECRET)
        (root / "scratch").mkdir()
        (root / "scratch" / "cert.pem").write_bytes(SECRET)
        os.mkfifo(root / "pipe")
    backend = FilesystemBackend(root, (root / "scratch",))
    try:
        source = backend.fetch(tuple(components))
    except AssetMissing:
        return
    try:
        assert stat.S_ISREG(os.fstat(source.fd).st_mode)
        assert os.pread(source.fd, 9, 0) in (b"a", b"b")
        real = os.path.realpath(os.path.join(root, *components))
        assert real.startswith(f"{root}/")
        assert os.path.samestat(os.stat(real), os.fstat(source.fd))
    finally:
        os.close(source.fd)
