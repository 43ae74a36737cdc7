"""Rooms 18, Arbiter, and 18b, Slots."""

import os
import pathlib
import signal
import time

import harness
import pytest

from shimmercat import BootFailure, Slot, Terms, WorkerLine

TERMS = Terms(60, farewell=5)


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
    slot = Slot("w0", serve, lambda: TERMS)
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    assert slot.is_proven
    assert codes(said) == [20001, 20002]


def test_a_killed_process_is_replaced_at_once_and_without_a_pause(
        slots, said):
    slot = Slot("w0", serve, lambda: TERMS)
    slots.append(slot)
    for _ in range(5):
        turn_until(slot, lambda: slot.find("serving"))
        os.kill(slot.children[0].pid, signal.SIGKILL)
        turn_until(slot, lambda: slot.find("starting"), 1)
    assert 60003 not in codes(said)


def test_pauses_after_early_deaths_become_longer(slots, said):
    slot = Slot("w0", lambda name, line: 3, lambda: TERMS)
    slots.append(slot)
    begin = time.monotonic()
    turn_until(slot, lambda: codes(said).count(60002) == 4, 20)
    assert time.monotonic() - begin > 3
    pauses = [record.pieces[-1] for record in said if record.code == 60003]
    assert pauses == [1, 2, 4]


def test_the_first_that_cannot_boot_is_fatal(slots, said):
    slot = Slot("w0", lambda name, line: 3, lambda: TERMS, BootFailure)
    slots.append(slot)
    with pytest.raises(BootFailure, match="w0 died with status 3 before"):
        turn_until(slot, lambda: False)
    assert slot.children == []


def test_a_fault_in_a_child_stays_in_the_child(slots, said, capfd):
    def fail(name, line):
        raise RuntimeError("a fault")
    slot = Slot("w0", fail, lambda: TERMS)
    slots.append(slot)
    turn_until(slot, lambda: 60002 in codes(said))
    assert [record.pieces for record in said if record.code == 60002] == [
        ("w0", "with status 70")]
    assert "RuntimeError: a fault" in capfd.readouterr().err


def test_a_successor_is_ready_before_the_old_one_hears_term(slots, said):
    slot = Slot("w0", age, lambda: TERMS)
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    old, = slot.children
    turn_until(slot, lambda: 30001 in codes(said), may_replace=True)
    story = codes(said)
    assert story[:5] == [20001, 20002, 20001, 20002, 40022]
    assert old not in slot.children


def test_no_successor_comes_before_its_turn(slots, said):
    slot = Slot("w0", age, lambda: TERMS)
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
    slot = Slot("w0", report, lambda: TERMS)
    slots.append(slot)
    slot.tend(lambda: [Source()])
    report = tmp_path / "fds"
    harness.eventually(lambda: report.exists() and report.read_text())
    assert pipe not in report.read_text()
    os.close(reading)
    os.close(writing)


def test_a_slot_that_inherits_doors_wants_a_process_that_has_them(
        slots, said):
    slot = Slot("w0", serve, lambda: TERMS)
    slot.doors = ["one"]
    slots.append(slot)
    turn_until(slot, lambda: slot.find("serving"))
    slot.inherit(["one"])
    for _ in range(10):
        slot.attend()
        slot.tend(private, may_replace=True)
    assert len(slot.children) == 1
    slot.inherit(["two"])
    turn_until(slot, lambda: len(slot.find("serving")) == 1
               and slot.find("serving")[0].doors == ("one", "two"),
               may_replace=True)
    assert 40029 in codes(said) and 40022 not in codes(said)


def test_a_process_of_another_generation_is_replaced_when_it_may_be(
        slots, said):
    terms = [TERMS._replace(generation=1)]
    slot = Slot("w0", serve, lambda: terms[0])
    slots.append(slot)
    turn_until(slot, slot.is_current)
    terms[0] = TERMS._replace(generation=2)
    for _ in range(10):
        slot.attend()
        slot.tend(private, may_replace=True)
    assert len(slot.children) == 1
    assert not slot.is_current()
    turn_until(slot, lambda: 30001 in codes(said), may_renew=True)
    assert slot.is_current()
    assert codes(said)[:5] == [20001, 20002, 20001, 20002, 40029]


def linger(name, line):
    """Be a child that does not leave when it is asked to."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    serve(name, line)


def test_the_oldest_of_too_many_that_linger_is_cut_off(slots, said):
    terms = [TERMS._replace(farewell=600, lingering=2, generation=0)]
    slot = Slot("w0", linger, lambda: terms[0])
    slots.append(slot)
    for n in range(4):
        terms[0] = terms[0]._replace(generation=n)
        turn_until(slot, slot.is_current, may_renew=True)
    turn_until(slot, lambda: 30001 in codes(said), may_renew=True)
    assert [record.pieces for record in said
            if record.code in (40027, 30001)] == [
        ("w0",), ("w0", "by SIGQUIT")]
    assert len(slot.find("retiring")) == 2


def test_the_terms_of_one_that_never_was_ready_are_remembered(slots, said):
    terms = [TERMS._replace(generation=1)]
    slot = Slot("w0", lambda name, line: serve(name, line)
                if terms[0].generation == 1 else 3, lambda: terms[0])
    slots.append(slot)
    turn_until(slot, slot.is_current)
    terms[0] = TERMS._replace(generation=2)
    turn_until(slot, lambda: slot.fallen, may_renew=True)
    assert slot.fallen.generation == 2
    assert slot.find("serving")[0].terms.generation == 1


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
