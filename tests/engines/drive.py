"""Drives a build of the native engine, alone: drive.py MODULE ROUNDS [few].

Run with a module that was compiled with sanitizers, by test_native.py.  With
`few`, an allocation fails in each conversation, another one each time.
"""

import collections
import contextlib
import importlib.util
import os
import random
import socket
import ssl
import sys
import types
import typing

import frames as fr

NAMES = (
    "RequestStarted stream fields ended", "RequestRefused stream status",
    "BodyReceived stream piece cost", "RequestEnded stream trailers",
    "StreamReset stream code", "PriorityChanged stream field",
    "PeerLeaving code", "ProtocolFault code reason",
)
GET = [(b":method", b"GET"), (b":scheme", b"https"),
       (b":authority", b"a.example"), (b":path", b"/")]
OK = [(b":status", b"200"), (b"server", b"x" * 40)]
#: what the hot table has, of this file; longer ones do not fit all windows
BODIES = [b"a" * 9, b"b" * 3000, b"c" * 60_000]


class Limits(typing.NamedTuple):
    """EngineLimits, small ones."""

    header_bytes: int = 1024
    header_count: int = 12
    streams: int = 4
    window_bytes: int = 30_000


class Gone(Exception):
    """Room 5's StreamGone."""


class Tls:
    """Both ends of TLS, which need no certificate."""

    def __init__(self):
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in self._server, self._client:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")

    def meet(self):
        """A server after its handshake, its client, and what that says."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = self._server.wrap_bio(to_server, to_client, server_side=True)
        client = self._client.wrap_bio(to_client, to_server)
        for end in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        server.do_handshake()
        client.do_handshake()
        return server, client, to_server


TLS = Tls()
LOOP = types.SimpleNamespace(iteration=5)


def load(path):
    """The extension from a file, with words of our own."""
    spec = importlib.util.spec_from_file_location("engine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    events = tuple(collections.namedtuple(*name.split(" ", 1))
                   for name in NAMES)
    return module.bind(module.ABI, events, Gone)


def identity(path):
    """Room 1's file_identity of a path."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
            status.st_ctime_ns)


def make_table(engine_class, dice):
    """A hot table, which may have answers to GET, or is too small."""
    table = engine_class.hot_table(dice.choice([10, 9000, 10**6]), "w0-1",
                                   True)
    table.date = b"a date"
    path = os.fsencode(__file__)
    for body in BODIES:
        fields = GET + dice.choice([[], [(b"accept", body[:5])]])
        table.put(fields, tuple(OK), body, (path, identity(path)),
                  (b"GET\0a.example\0/", b"static\0-"),
                  (dice.randrange(8), dice.random() < 0.5))
    return table


def some_frames(dice):
    """Octets of a client that is wrong at times."""
    stream = dice.choice([1, 1, 3, 5, 7, 9, 2])
    fields = GET + dice.choice([
        [], [], [(b"accept", b"ccccc")], [(b"x", b"y" * dice.randrange(900))],
        [(b"te", b"x")], [(b"content-length", b"5")], [(b"x", b"y" * 5000)]])
    data = fr.frame(fr.DATA, dice.choice([0, 1]), stream,
                    bytes(dice.choice([0, 5, 5000])))
    padded = fr.frame(fr.DATA, 8, stream, b"\x05abcde\0\0\0\0\0")
    return dice.choice([
        fr.head(stream, *fields), fr.head(stream, *fields),
        fr.frame(fr.HEADERS, fr.END_HEADERS, stream, fr.block(*fields)),
        fr.frame(fr.HEADERS, 0, stream, fr.block(*fields)),
        fr.frame(fr.CONTINUATION, 4, stream, b""),
        data, data, padded, fr.reset(stream), fr.settings((4, 9), (1, 0)),
        fr.window_update(dice.choice([0, stream]), dice.choice([5, 2**30])),
        fr.frame(fr.PING, 0, 0, bytes(8)), fr.frame(7, 0, 0, bytes(8)),
        fr.frame(16, 0, 0, stream.to_bytes(4, "big") + b"u=1"),
        dice.randbytes(dice.randrange(30)),
    ])


def some_records(dice, client, sealed):
    """Octets of a client's TLS, which may be cut, wrong or the last ones."""
    client.write(some_frames(dice))
    if dice.random() < 0.1:
        with contextlib.suppress(ssl.SSLError):
            client.unwrap()
    octets = sealed.read()
    if dice.random() < 0.1:
        octets += dice.randbytes(9)
    return octets[:dice.choice([7, len(octets), len(octets)])]


def take_turns(engine, dice):
    """Turns that the engine takes alone, until nothing can be sent."""
    (ours, theirs), pending = socket.socketpair(), b""
    server, client, sealed = TLS.meet()
    with ours, theirs:
        assert engine.attach(server, ours.fileno())
        theirs.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(dice.randrange(9)):
            # The last is what Python's ssl makes of a want of memory.
            with contextlib.suppress(BlockingIOError, ssl.SSLError,
                                     SystemError):
                theirs.send(some_records(dice, client, sealed))
                theirs.recv(dice.choice([1, 10_000]))
            most = dice.choice([0, 9, 65536])
            if engine.rests and not pending:
                engine.wake(1, id, id, most, LOOP)
            else:
                done = engine.turn(pending, most)
                pending = done[1] or b"" if isinstance(done, tuple) else b""
                engine.rests = done is True
            engine.judged = engine.nuisance
        theirs.close()
        engine.turn(pending, 9)


def converse(engine_class, dice):
    """A conversation of an engine's whole life, with all of its methods."""
    engine, table = engine_class(Limits()), make_table(engine_class, dice)
    engine.answer_from(dice.choice([table, table, None]), "a client")
    engine.receive(fr.PREFACE + fr.settings())
    if dice.random() < 0.5:
        take_turns(engine, dice)
    for _ in range(dice.randrange(25)):
        engine.serve(dice.choice([0, 1, 20_000, 10**6]))
        octets, stream = some_frames(dice), dice.choice([1, 3, 5])
        at = dice.randrange(len(octets) + 1)
        engine.receive(octets[:at])
        engine.receive(memoryview(octets)[at:])
        try:
            engine.headers(stream, OK, dice.random() < 0.2)
            while (room := engine.sendable(stream)) > 9000:
                engine.body(stream, bytes(room))
            engine.body(stream, b"end", end=True)
        except Gone:
            engine.consumed(stream, 500)
        if dice.random() < 0.1:
            engine.reset(stream, 8)
            engine.goodbye(0, 2**31 - 1)
        if dice.random() < 0.5:
            engine.output()
        if dice.random() < 0.1:
            engine.reprioritize(stream, dice.randrange(8), dice.random() < 0.5)
            engine.backlog(), engine.waiting, engine.recalled
        if dice.random() < 0.05:
            engine.abandon()
        if dice.random() < 0.1:
            table.drop(os.fsencode(__file__))
        if dice.random() < 0.1:
            table.drain(), table.clear(), len(table), table.hits
        engine.midway(), engine.hungry(), engine.nuisance, engine.closing
    engine.time_out()
    return engine.output()


def starve(engine_class, dice, patience):
    """A conversation in which an allocation fails, which is no crash."""
    import _testcapi

    _testcapi.set_nomemory(patience, patience + 1)
    try:
        converse(engine_class, dice)
    except (MemoryError, RuntimeError):
        return
    finally:
        _testcapi.remove_mem_hooks()


def main(path, rounds, few=False):
    """Exits with 0 when nothing broke."""
    engine_class = load(path)
    for seed in range(int(rounds)):
        dice = random.Random(seed)
        if few:
            starve(engine_class, dice, seed % 997)
        else:
            converse(engine_class, dice)


if __name__ == "__main__":
    main(*sys.argv[1:])
