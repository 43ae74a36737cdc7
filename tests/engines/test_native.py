"""The engine in C: its memory, its references, its errors of use."""

import gc
import importlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import sysconfig
import tracemalloc
import types

import drive
import frames as fr
import pytest

import shimmercat
from shimmercat import NATIVE_ENGINE, EngineLimits

HERE = pathlib.Path(__file__).parent
SOURCES = [HERE.parent.parent / "shimmercat_ext" / "native" / name
           for name in ("engine.c", "hot.c", "wire.c")]

needs_native = pytest.mark.skipif(
    NATIVE_ENGINE is None, reason="the native engine is not built")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The engine compiled with sanitizers, and how to run Python with it."""
    if NATIVE_ENGINE is None or not shutil.which("gcc"):
        pytest.skip("no compiler or no nghttp2")
    module = tmp_path_factory.mktemp("sanitized") / "engine.so"
    include = sysconfig.get_paths()["include"]
    subprocess.run(
        ["gcc", "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         "-fno-strict-aliasing", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", "-fPIC", "-shared",
         f"-I{include}", *map(str, SOURCES), "-o", str(module), "-lnghttp2"],
        check=True, timeout=120)
    libraries = [subprocess.check_output(
        ["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")]
    # pymalloc would hide from the sanitizer where a block ends.
    return module, {
        **os.environ, "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("arguments", [["300"], ["600", "few"]],
                         ids=["memory", "no memory"])
def test_no_conversation_breaks_a_rule_of_c(sanitized, arguments):
    if arguments[-1] == "few":
        pytest.importorskip("_testcapi")
    module, environment = sanitized
    run = subprocess.run(
        [sys.executable, str(HERE / "drive.py"), str(module), *arguments],
        env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture
def driven():
    """The built engine with the words of drive.py, given back at the end."""
    native = importlib.import_module("shimmercat_ext.native")
    yield drive.load(native.engine.__file__)


@needs_native
def test_conversations_leave_nothing_behind(driven):
    def converse(seeds):
        for seed in seeds:
            drive.converse(driven, random.Random(seed))
        gc.collect()

    tracemalloc.start()
    converse(range(50))
    before, uses = tracemalloc.get_traced_memory()[0], sys.getrefcount(driven)
    converse(range(150))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # An engine is 30 KB: not one of 150 is left, nor a stream of each.
    assert after - before < 10_000
    assert sys.getrefcount(driven) == uses


@needs_native
def test_what_is_given_to_an_engine_is_let_go_of(driven):
    engine = driven(drive.Limits())
    engine.receive(fr.PREFACE + fr.settings() + fr.head(1, *drive.GET))
    piece, name, value = bytes(5000), b"x-name" * 3, b"value" * 30
    fields = [(b":status", b"200"), (name, value)]
    given = piece, name, value, fields
    before = [sys.getrefcount(x) for x in given]
    engine.headers(1, fields)
    engine.body(1, piece)
    engine.headers(1, fields[1:], True)
    with pytest.raises(drive.Gone):
        engine.headers(1, fields)
    assert [sys.getrefcount(x) for x in given] == before


@needs_native
@pytest.mark.parametrize("call", [
    lambda engine: engine.headers(1, [(":status", "200")]),
    lambda engine: engine.headers(1, [b":status"]),
    lambda engine: engine.headers(1, None),
    lambda engine: engine.headers(1, [], last=True),
    lambda engine: engine.headers(1),
    lambda engine: engine.body(1, "text"),
    lambda engine: engine.body(1, b"", True, False),
    lambda engine: engine.receive("text"),
    lambda engine: engine.reset(1),
    lambda engine: engine.sendable("1"),
    lambda engine: engine.attach(None, "1"),
    lambda engine: engine.wake(1, id, id, 0),
])
def test_a_wrong_call_is_a_type_error_and_breaks_nothing(call):
    engine = NATIVE_ENGINE(EngineLimits())
    engine.receive(fr.PREFACE + fr.settings() + fr.head(1, *drive.GET))
    with pytest.raises(TypeError):
        call(engine)
    engine.headers(1, [(b":status", b"200")], True)


@needs_native
def test_an_engine_sees_into_no_object_but_that_of_python_s_ssl():
    engine = NATIVE_ENGINE(EngineLimits())
    server, _, _ = drive.TLS.meet()
    for stranger in (None, types.SimpleNamespace(_sslobj=server)):
        assert not engine.attach(stranger, 0)
        with pytest.raises(RuntimeError, match="attach comes first"):
            engine.turn(b"", 1)


@needs_native
def test_an_engine_that_does_not_rest_leaves_the_turn_to_others():
    engine, heard = NATIVE_ENGINE(EngineLimits()), []
    engine.wake(3, heard.append, None, 0, None)
    assert heard == [3]


@needs_native
def test_numbers_that_are_none_of_streams_are_refused():
    engine = NATIVE_ENGINE(EngineLimits())
    for stream in (-1, 2**31):
        with pytest.raises(ValueError):
            engine.sendable(stream)
    with pytest.raises(OverflowError):
        engine.reset(1, -1)
    with pytest.raises(ValueError):
        NATIVE_ENGINE(EngineLimits(window_bytes=2**31))


@needs_native
def test_an_empty_end_needs_no_window():
    """nghttp2 waits for one; section 6.9.1 has it sent at once."""
    engine = NATIVE_ENGINE(EngineLimits())
    engine.receive(fr.PREFACE + fr.settings((4, 5))
                   + fr.head(1, *drive.GET))
    engine.headers(1, [(b":status", b"200")])
    engine.body(1, b"12345")
    engine.output()
    assert engine.sendable(1) == 0
    engine.body(1, b"", True)
    assert engine.output() == fr.frame(
        fr.HEADERS, fr.END_HEADERS | fr.END_STREAM, 1)


@needs_native
def test_the_words_of_another_program_are_refused():
    native = importlib.import_module("shimmercat_ext.native")
    with pytest.raises(TypeError):
        native.bind(native.ABI, (shimmercat.RequestEnded,) * 8,
                    shimmercat.StreamGone)
    with pytest.raises(TypeError):
        native.bind(native.ABI, (), shimmercat.StreamGone)
    assert native.bind(native.ABI + 1, (), shimmercat.StreamGone) is None


@needs_native
def test_who_calls_amid_a_call_is_refused():
    """A collection may run anything; it finds the engine in use."""
    engine, seen = NATIVE_ENGINE(EngineLimits()), set()

    def meddle(phase, info):
        try:
            engine.output()
        except RuntimeError as error:
            seen.add(str(error))

    octets = fr.PREFACE + fr.settings() + b"".join(
        fr.head(stream, *drive.GET) for stream in range(1, 100, 2))
    thresholds = gc.get_threshold()
    gc.callbacks.append(meddle)
    gc.set_threshold(1)
    try:
        events = engine.receive(octets)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(meddle)
    assert [event.stream for event in events] == [*range(1, 100, 2)]
    # From Python 3.12 on a collection waits for the end of the call.
    assert seen <= {"the engine is in use"}


@needs_native
def test_an_engine_without_memory_fails_and_says_so_ever_after():
    testing = pytest.importorskip("_testcapi")
    octets = fr.PREFACE + fr.settings() + fr.head(1, *drive.GET)
    failures = 0
    for patience in range(60):
        engine = NATIVE_ENGINE(EngineLimits())
        testing.set_nomemory(patience, patience + 1)
        try:
            engine.receive(octets)
        except MemoryError:
            failures += 1
        else:
            continue
        finally:
            testing.remove_mem_hooks()
        with pytest.raises(RuntimeError, match="has failed before"):
            engine.output()
    assert failures > 10


def conversation(engine):
    """What an engine writes, step by step, with heads of several frames."""
    engine.receive(fr.PREFACE + fr.settings((4, 2**20)))
    engine.receive(fr.window_update(0, 2**20))
    yield engine.output()
    for stream in (1, 3):
        engine.receive(fr.head(stream, *drive.GET))
        engine.headers(stream, drive.OK)
        engine.headers(stream, [(b"x", b"%d" % stream * 40_000)], end=True)
        yield engine.output()
        engine.receive(fr.frame(fr.PING, 0, 0, b"%8d" % stream))
        yield engine.output()


@needs_native
def test_engines_that_take_turns_do_not_disturb_each_other():
    alone = [*conversation(NATIVE_ENGINE(EngineLimits()))]
    both = [conversation(NATIVE_ENGINE(EngineLimits())) for _ in range(2)]
    assert [*zip(*both, strict=True)] == [(octets,) * 2 for octets in alone]
    assert len(alone[1]) > 20_000


@needs_native
def test_an_idle_engine_holds_little():
    def make():
        engine = NATIVE_ENGINE(EngineLimits())
        assert all(conversation(engine))
        return engine
    make()
    tracemalloc.start()
    try:
        engines = [make() for _ in range(20)]
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / len(engines) < 16_000
