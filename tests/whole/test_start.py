"""What keeps the program from starting, and how it says so."""

import os
import signal
import socket

import pytest
from harness import Server, eventually, make_site


def refused(server):
    """Return status and words of a start that fails."""
    server.start()
    try:
        status = server.wait(30)
    finally:
        server.kill()
    return status, server.output.read_text()


@pytest.mark.parametrize("mode", ["internet", "devlove"])
def test_a_port_in_use_is_named(site, mode):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = Server(site, mode=mode, port=other.getsockname()[1])
        status, said = refused(server)
    assert status == 71
    assert f"127.0.0.1:{server.port}: Address already in use" in said


def test_two_instances_cannot_share_a_port_by_mistake(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        make_site(tmp_path / name)
    with Server(tmp_path / "a") as first:
        status, said = refused(Server(tmp_path / "b", port=first.port))
    assert status == 71
    assert str(first.port) in said


def test_two_instances_cannot_share_a_folder(site):
    with Server(site) as first:
        status, said = refused(Server(site))
    assert status == 75
    assert str(first.pid) in said


def test_a_log_file_that_cannot_be_opened_is_named(site):
    status, said = refused(Server(site, "--log-file", "no/such/folder.log"))
    assert status == 73
    assert "no/such/folder.log: No such file or directory" in said


def test_a_scratch_folder_that_cannot_be_made_is_named(site):
    (site / "occupied").write_text("")
    status, said = refused(Server(site, "--scratch-dir-name", "occupied"))
    assert status == 73
    assert f"scratch folder {site}/occupied: File exists\n" in said


def test_a_first_start_writes_tweaks_yaml(site):
    with Server(site):
        written = site / ".shimmercat.loves.devs" / "tweaks.yaml"
        assert "\nidle-seconds: 180\n" in written.read_text()


def test_a_unix_socket_where_somebody_serves_is_left_to_him(site):
    path = site / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        status, said = refused(Server(site, "--listen", f"unix://{path}"))
        assert path.exists()
    assert status == 71
    assert f"unix://{path}: Address already in use" in said


def test_a_unix_socket_that_nobody_serves_any_more_is_taken(site):
    path = site / "public.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with (Server(site, "--listen", f"unix://{path}"),
          socket.socket(socket.AF_UNIX) as probe):
        probe.connect(str(path))


def test_a_unix_socket_serves_and_is_swept_away(site):
    path = site / "public.sock"
    with Server(site, "--listen", f"unix://{path}") as server:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
        before = server.workers()
        server.signal(signal.SIGTTOU)
        eventually(lambda: len(server.workers()) == len(before) - 1)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    assert not path.exists()


def test_an_inherited_socket_serves_all_workers(site):
    with socket.create_server(("127.0.0.1", 0)) as door:
        os.set_inheritable(door.fileno(), True)
        server = Server(site, "--listen", f"socket-fd://{door.fileno()}",
                        port=door.getsockname()[1],
                        pass_fds=(door.fileno(),))
        with server:
            assert server.fetch().status_code == 200


def test_a_descriptor_that_is_no_socket_is_refused(site):
    status, said = refused(Server(site, "--listen", "socket-fd://77"))
    assert status == 71
    assert "socket-fd://77: Bad file descriptor" in said
