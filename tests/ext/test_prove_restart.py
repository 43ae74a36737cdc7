"""prove-restart, as its operator runs it before going live."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
from harness import PROGRAM, eventually, free_port, is_alive, make_site
from zoo import Origin, answer

PATIENCE_SECONDS = 120
ROW = re.compile(r"(.{22}) *(\d+) +(\d+) +(\d+) +(\d+) ms")


class Proof:
    """One run of prove-restart in the folder of a site."""

    def __init__(self, folder, *flags, program=PROGRAM):
        self.folder = folder
        self._mark = uuid.uuid4().hex.encode()
        self.process = subprocess.Popen(
            [sys.executable, str(program), "prove-restart", "--workers", "2",
             *flags], cwd=folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "SHIMMERCAT_PROOF": self._mark.decode()})

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=10)

    def end(self):
        """Wait for the end; return status, table and all else that is said."""
        table, said = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert not self.processes(), said
        assert not self.folders()
        return self.process.returncode, table, said

    def processes(self):
        """Return the ids of all processes of the proof that are alive."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                is_ours = entry.name.isdigit() and self._mark in (
                    entry / "environ").read_bytes()
            except OSError:
                continue
            if is_ours and is_alive(entry.name):
                found.append(int(entry.name))
        return found

    def folders(self):
        """Return the scratch folders of the instances under test."""
        return list(self.folder.glob(".prove-restart.*"))


def rows(table):
    """Return {restart: (times, requests, failed, longest)} of a table."""
    return {name.strip(): tuple(map(int, numbers))
            for name, *numbers in map(re.Match.groups, ROW.finditer(table))}


def test_every_way_of_restarting_is_counted_and_planned_ones_cost_nothing(
        tmp_path):
    make_site(tmp_path)
    with Proof(tmp_path, "--restarts", "5", "--requests", "500") as proof:
        status, table, said = proof.end()
    assert status == 0, said
    counted = rows(table)
    assert [row[0] for row in counted.values()] == [2, 1, 1, 1, 1, 1, 1]
    planned = [counted[name] for name in (
        "HUP", "USR2", "apoptosis", "TTIN, TTOU")]
    assert all(requests >= 100 for _, requests, _, _ in planned)
    requests = sum(row[1] for row in planned)
    assert f"planned: 5 restarts, {requests} requests, 0 failed" in table
    assert "8/8 restarts" in said
    # The operator's own scratch folder was not made, or used.
    assert not (tmp_path / ".shimmercat.loves.devs").exists()


def make_api(folder, port):
    """Add a domain that is an application to those of a folder."""
    with open(folder / "devlove.yaml", "a") as settings:
        settings.write(f"    api.example.test:\n      port: {port}\n")


def test_answers_that_are_errors_are_failures(tmp_path):
    def animal(_):
        # Once it answers, before the load.
        return [answer(b"well") if origin.count() == 1 else answer(
            b"", "500 Internal Server Error")]

    (tmp_path / "devlove.yaml").write_text("shimmercat-devlove:\n  domains:\n")
    with Origin(animal) as origin:
        make_api(tmp_path, origin.port)
        with Proof(tmp_path, "--restarts", "1", "--requests", "20") as proof:
            status, table, said = proof.end()
    assert status == 1
    assert "HUP" in rows(table), said
    _, requests, failed, _ = rows(table)["HUP"]
    assert requests == failed >= 20
    assert re.search(r"HUP: \d+ x status 500", said)


def test_what_is_not_answered_before_the_load_is_told_and_left_out(tmp_path):
    make_site(tmp_path)
    # Nobody listens where the application should.
    port = free_port()
    make_api(tmp_path, port)
    with Proof(tmp_path, "--restarts", "1", "--requests", "20") as proof:
        status, table, said = proof.end()
    assert status == 0, said
    assert "2 URLs were asked once: 1 x status 200, 1 x status 502\n" in said
    assert "left out:\n    https://api.example.test/: status 502\n" in said
    assert re.search(rf"M40023 consultant .*127.0.0.1:{port}.* refused", said)
    assert table.startswith("left out: 1 of 2 URLs")
    assert "0 failed" in table


def test_without_any_answer_nothing_is_proved(tmp_path):
    (tmp_path / "devlove.yaml").write_text("shimmercat-devlove:\n  domains:\n")
    make_api(tmp_path, free_port())
    with Proof(tmp_path) as proof:
        status, table, said = proof.end()
    assert (status, table) == (1, "")
    assert "not proved: nothing is answered, with or without " in said
    assert "https://api.example.test/: status 502\n" in said
    assert "M40023 consultant " in said


def test_a_restart_that_fails_is_told_with_the_end_of_the_log(tmp_path):
    make_site(tmp_path)
    with Proof(tmp_path, "--restarts", "1000") as proof:
        folder, = eventually(proof.folders, 30)
        eventually(lambda: (folder / "lock").exists()
                   and (folder / "lock").read_text(), 30)
        arbiter = int((folder / "lock").read_text().split()[0])
        os.kill(arbiter, signal.SIGKILL)
        status, table, said = proof.end()
    assert status == 1
    assert not table
    assert "not proved: " in said and "the instance has ended" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_proof_that_is_broken_off_leaves_nothing(tmp_path, number):
    make_site(tmp_path)
    with Proof(tmp_path, "--restarts", "1000") as proof:
        eventually(lambda: len(proof.processes()) > 4, 30)
        proof.process.send_signal(number)
        status, table, said = proof.end()
    assert status == 128 + number
    assert not table
    assert "KeyboardInterrupt" not in said


def test_a_wrong_configuration_is_told_as_check_tells_it(tmp_path):
    (tmp_path / "devlove.yaml").write_text("shimmercat-devlove: [1]\n")
    with Proof(tmp_path) as proof:
        status, _, said = proof.end()
    assert status == 78
    assert "devlove.yaml" in said


def test_a_file_that_was_dropped_alone_says_what_it_lacks(tmp_path):
    make_site(tmp_path)
    shutil.copy(PROGRAM, tmp_path)
    # So that no installed one is found.
    (tmp_path / "shimmercat_ext").mkdir()
    (tmp_path / "shimmercat_ext" / "__init__.py").touch()
    with Proof(tmp_path, program=tmp_path / "shimmercat.py") as proof:
        status, _, said = proof.end()
    assert status == 69
    assert "prove-restart needs" in said
