"""Room 18, Arbiter."""

import os
import pathlib
import signal
import time

import harness
import pytest

from shimmercat import BootFailure, Slot, WorkerLine


@pytest.fixture
def slots(said):
    """A list of slots whose processes are ended after the test."""
    found = []
    yield found
    for slot in found:
        for child in slot.children:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def serve(name, line):
    """Be a child that is well."""
    line.say(WorkerLine.READY)
    time.sleep(60)


def age(name, line):
    """Be a child that wants a successor at once."""
    line.say(WorkerLine.READY)
    line.say(WorkerLine.REPLACE)
    time.sleep(60)


def private():
    """Return what children must not keep open."""
    return []


def turn_until(slot, predicate, seconds=10, **words):
    """Attend and tend a slot until a predicate is true."""
    def has_come():
        slot.attend()
        slot.tend(private, **words)
        return predicate()
    harness.eventually(has_come, seconds)


def codes(said):
    """Return the codes of what was said."""
    return [record.code for record in said]


def test_a_slot_fills_itself(slots, said):
    slot = Slot("w0", serve, 60)
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    assert slot.is_proven
    assert codes(said) == [20001, 20002]


def test_a_killed_process_is_replaced_at_once_and_without_a_pause(
        slots, said):
    slot = Slot("w0", serve, 60)
    slots.append(slot)
    for _ in range(5):
        turn_until(slot, lambda: slot.find("serving"))
        os.kill(slot.children[0].pid, signal.SIGKILL)
        turn_until(slot, lambda: slot.find("starting"), 1)
    assert 60003 not in codes(said)


def test_pauses_after_early_deaths_become_longer(slots, said):
    slot = Slot("w0", lambda name, line: 3, 60)
    slots.append(slot)
    begin = time.monotonic()
    turn_until(slot, lambda: codes(said).count(60002) == 4, 20)
    assert time.monotonic() - begin > 3
    pauses = [record.pieces[-1] for record in said if record.code == 60003]
    assert pauses == [1, 2, 4]


def test_the_first_that_cannot_boot_is_fatal(slots, said):
    slot = Slot("w0", lambda name, line: 3, 60, BootFailure)
    slots.append(slot)
    with pytest.raises(BootFailure, match="w0 died with status 3 before"):
        turn_until(slot, lambda: False)
    assert slot.children == []


def test_a_fault_in_a_child_stays_in_the_child(slots, said, capfd):
    def fail(name, line):
        raise RuntimeError("a fault")
    slot = Slot("w0", fail, 60)
    slots.append(slot)
    turn_until(slot, lambda: 60002 in codes(said))
    assert [record.pieces for record in said if record.code == 60002] == [
        ("w0", "with status 70")]
    assert "RuntimeError: a fault" in capfd.readouterr().err


def test_a_successor_is_ready_before_the_old_one_hears_term(slots, said):
    slot = Slot("w0", age, 60)
    slot.farewell_seconds = 5
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    old, = slot.children
    turn_until(slot, lambda: 30001 in codes(said), may_replace=True)
    story = codes(said)
    assert story[:5] == [20001, 20002, 20001, 20002, 40022]
    assert old not in slot.children


def test_no_successor_comes_before_its_turn(slots, said):
    slot = Slot("w0", age, 60)
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    turn_until(slot, lambda: slot.children[0].wants_successor)
    for _ in range(10):
        slot.attend()
        slot.tend(private, may_replace=False)
    assert len(slot.children) == 1


def test_children_keep_nothing_private_open(slots, said, tmp_path):
    reading, writing = os.pipe()

    class Source:
        def close(self):
            os.close(reading)
            os.close(writing)

    def report(name, line):
        line.say(WorkerLine.READY)
        (tmp_path / "fds").write_text(" ".join(
            target for fd in os.listdir("/proc/self/fd")
            for target in [os.path.realpath(f"/proc/self/fd/{fd}")]))
        time.sleep(60)
    pipe = os.path.realpath(f"/proc/self/fd/{reading}")
    slot = Slot("w0", report, 60)
    slots.append(slot)
    slot.tend(lambda: [Source()])
    report = tmp_path / "fds"
    harness.eventually(lambda: report.exists() and report.read_text())
    assert pipe not in report.read_text()
    os.close(reading)
    os.close(writing)


def test_a_slot_that_inherits_doors_wants_a_process_that_has_them(
        slots, said):
    slot = Slot("w0", serve, 60)
    slot.doors = ["one"]
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    slot.inherit(["one"])
    assert not slot.children[0].wants_successor
    slot.inherit(["two"])
    assert slot.children[0].wants_successor
    turn_until(slot, lambda: len(slot.find("serving")) == 1
               and slot.find("serving")[0].doors == ("one", "two"),
               may_replace=True)


def test_the_arbiter_has_no_greenlets_and_one_thread(server):
    names = [os.readlink(f"/proc/{server.pid}/fd/{fd}")
             for fd in os.listdir(f"/proc/{server.pid}/fd")]
    assert "anon_inode:[eventpoll]" not in names
    assert len(os.listdir(f"/proc/{server.pid}/task")) == 1


def test_an_idle_arbiter_costs_next_to_nothing(server):
    def spent():
        words = pathlib.Path(f"/proc/{server.pid}/stat").read_text()
        ticks = map(int, words.rpartition(")")[2].split()[11:13])
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
    begin, before = time.monotonic(), spent()
    harness.eventually(lambda: time.monotonic() - begin > 2)
    assert spent() - before < 0.1
