"""The examples in conf/, each with the tool that it is for."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from harness import PROGRAM, Server, eventually

CONF = PROGRAM.parent / "conf"
PYTHON = "/opt/shimmercat/bin/python"


def tool(name):
    """A program of the system, which a machine need not have."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or (
        pytest.skip(f"{name} is not installed"))


def adapted(name, replaced):
    """The text of an example, with what is elsewhere in a test."""
    text = (CONF / name).read_text()
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, str(new))
    return text


@pytest.mark.parametrize("name", ["shimmercat.service", "shimmercat.socket"])
def test_a_unit_is_valid(tmp_path, name):
    service = adapted("shimmercat.service", {PYTHON: sys.executable})
    (tmp_path / "shimmercat.service").write_text(service)
    shutil.copy(CONF / "shimmercat.socket", tmp_path)
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", tmp_path / name],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The same for keys that it only ignores.
    assert f"/{name}:" not in done.stderr


def test_the_service_exposes_little(tmp_path):
    done = subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true",
         "--threshold=20", CONF / "shimmercat.service"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Supervised(Server):
    """The program, started and watched by supervisord."""

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "program.conf").write_text(adapted("supervisord.conf", {
            f"{PYTHON} -P -m shimmercat": f"{sys.executable} {PROGRAM}",
            "0.0.0.0:4043": f"127.0.0.1:{self.port}",
            "/srv/site": folder, "user=shimmercat\n": "",
            "startsecs=5": "startsecs=1",
            "/var/log/supervisor/shimmercat.log": self.output}))
        (folder / "supervisord.conf").write_text(
            "[supervisord]\nlogfile=/dev/null\nlogfile_maxbytes=0\n"
            f"pidfile={folder}/supervisord.pid\n"
            f"[unix_http_server]\nfile={folder}/control\n"
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory ="
            " supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[supervisorctl]\nserverurl=unix://{folder}/control\n"
            "[include]\nfiles = program.conf\n")
        self._command = [
            sys.executable, "-m", "supervisor.supervisord", "--nodaemon",
            "-c", "supervisord.conf"]

    def control(self, *words):
        """Have supervisorctl do something; return what it says."""
        return subprocess.run(
            [sys.executable, "-m", "supervisor.supervisorctl", "-c",
             "supervisord.conf", *words], cwd=self.folder,
            capture_output=True, text=True, timeout=60).stdout


def test_supervisord_starts_watches_and_stops_the_program(site):
    pytest.importorskip("supervisor")
    with Supervised(site) as server:
        assert server.fetch().status_code == 200
        first = int(server.control("pid", "shimmercat"))
        os.kill(first, signal.SIGKILL)
        server.await_line("M50003", 2, seconds=30)
        assert server.fetch().status_code == 200
        assert "stopped" in server.control("stop", "shimmercat")
        # TERM alone has ended it, and Redis after all others.
        assert server.lines("M40005")
        assert not server.lines("M60006")


def test_logrotate_has_the_log_opened_anew(site, tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    rotation = tmp_path / "logrotate.conf"
    rotation.write_text(adapted("logrotate.conf", {
        "/var/log/shimmercat": log}))
    rotation.chmod(0o644)
    server = Server(site, "--log-file", str(log / "access.log"))
    server.output = log / "access.log"
    with server:
        stand_in(tmp_path, server.pid)
        for flag in ("-d", "-f"):
            done = subprocess.run(
                [tool("logrotate"), flag, "-s", tmp_path / "state", rotation],
                env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
                capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert (tmp_path / "asked").read_text() == (
            "kill --signal=USR1 --kill-who=main shimmercat.service\n")
        eventually(server.output.exists)
        server.fetch("/?after")
        server.await_line("M50001")
        assert "/?after" in server.output.read_text()
        old = (log / "access.log.1").read_text()
        assert "M50003" in old
        assert "/?after" not in old


def stand_in(folder, pid):
    """Make a systemctl that notes what it is asked for, and sends USR1."""
    script = folder / "systemctl"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\nkill -USR1 {pid}\n')
    script.chmod(0o755)
