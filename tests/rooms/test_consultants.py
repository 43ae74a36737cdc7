"""Room 11, Consultants: applications, well-behaved and otherwise."""

import contextlib
import socket
import ssl
import threading
import time

import gevent
import gevent.event
import gevent.socket
import pytest
import zoo
from exchanges import Body, body_of
from harness import eventually, free_port
from zoo import CLOSE, Origin, answer, chunk, head

from shimmercat import (
    CertificateStore,
    ClientGone,
    Consultant,
    ConsultantSettings,
    DomainSettings,
    NetworkAddress,
    PatientSocket,
    Question,
    ScratchFolder,
    Stream,
    Tweaks,
    UpstreamFailed,
    UpstreamSlow,
    consultant_of,
)

PORT = NetworkAddress.parse("8080")
HOST = [(b"host", b"a.example")]


def domain(*names):
    return DomainSettings("a.example", "elec", "devlove.yaml:3", consultants={
        name: ConsultantSettings(name, (PORT,)) for name in names})


@pytest.mark.parametrize("names, expected", [
    ([], None),
    (["default"], "default"),
    (["shop"], "shop"),
    (["shop", "default"], "default"),
    (["shop", "blog"], None),
])
def test_an_electric_domain_is_answered_by_one_consultant(names, expected):
    consultant = consultant_of(domain(*names))
    assert (consultant and consultant.name) == expected


def consultant(*origins, **settings):
    """A consultant of some origins or ports."""
    addresses = [NetworkAddress.parse(str(getattr(x, "port", x)))
                 for x in origins]
    settings.setdefault("first_byte_timeout", 5)
    return Consultant(ConsultantSettings("app", tuple(addresses), **settings),
                      Tweaks(connect_seconds=2))


def question(method="GET", target="/x?y=1", fields=(), **more):
    return Question(method, target, [*HOST, *fields], **more)


def codes(heard):
    return [record.code for record in heard]


@pytest.mark.parametrize("animal, body", [
    (lambda _: answer(b"hello"), b"hello"),
    (lambda _: answer(b""), b""),
    (zoo.in_chunks(b"he", 0.01, b"llo"), b"hello"),
    (zoo.dripping(b"hello", 0.005), b"hello"),
    (lambda _: [head("200 OK", connection="close") + b"hel", b"lo", CLOSE],
     b"hello"),
    (lambda _: [b"HTTP/1.0 200 OK\r\n\r\nhello", CLOSE], b"hello"),
    (lambda _: answer(b"x" * 3_000_000), b"x" * 3_000_000),
    (lambda _: [b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
])
def test_an_answer_arrives_however_its_body_is_framed(animal, body):
    with Origin(animal) as origin:
        app = consultant(origin)
        for _ in range(3):
            reply = app.ask(question())
            assert reply.status in (200, 204)
            assert body_of(reply) == body
        assert origin.count("/x?y=1", "GET") == 3


@pytest.mark.parametrize("animal", [
    lambda _: head("200 OK", content_length=5),
    lambda _: head("200 OK", transfer_encoding="chunked"),
    lambda _: head("304 Not Modified", content_length=5)])
def test_an_answer_without_body_ends_with_its_head(animal):
    with Origin(animal) as origin:
        app = consultant(origin)
        for _ in range(3):
            reply = app.ask(question("HEAD"))
            assert reply.body == b""
            assert (b"content-length", b"0") not in reply.fields
        assert origin.accepted == 1


def test_an_answer_that_has_no_content_has_no_length():
    with Origin(lambda _: head("204 No Content", content_length=5)) as origin:
        app = consultant(origin)
        for _ in range(3):
            assert app.ask(question()) == (204, [], b"")
        assert origin.accepted == 1


@pytest.mark.parametrize("excess", [
    b"0\r\nx: " + b"y" * 300_000, b"3;" + b"y" * 300_000])
def test_what_is_around_a_body_has_a_limit(excess):
    with Origin(lambda _: [head(transfer_encoding="chunked") + chunk(b"abc"),
                           0.02, excess, 60.0]) as origin:
        with pytest.raises(UpstreamFailed, match="trailer"):
            body_of(consultant(origin).ask(question()))


def test_connections_are_used_again():
    with Origin(lambda _: answer(b"hello")) as origin:
        app = consultant(origin)
        for _ in range(20):
            assert body_of(app.ask(question())) == b"hello"
        assert origin.accepted == 1


@pytest.mark.parametrize("odd", [
    ("HEAD", head(content_length=9)),
    ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
            + answer(b"early")),
    ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n"),
    ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("GET", head(transfer_encoding="chunked", trailer="X-T") + chunk(b"abc")
            + b"0\r\nX-T: 1\r\n\r\n"),
], ids=["HEAD", "103", "304", "204", "trailers"])
def test_each_answer_on_a_connection_is_read_for_itself(odd):
    method, octets = odd
    with Origin(lambda asked: octets if asked.target == "/odd"
                else answer(b"plain", x_own="1")) as origin:
        app = consultant(origin)
        for _ in range(2):
            body_of(app.ask(question(method, "/odd")))
            reply = app.ask(question())
            assert (reply.status, reply.body) == (200, b"plain")
            assert dict(reply.fields)[b"x-own"] == b"1"
            assert b"x-t" not in dict(reply.fields)
        assert origin.accepted == 1


def test_time_for_an_answer_starts_anew_with_each_question():
    with Origin(zoo.slow(lambda _: answer(b"late"), 0.2)) as origin:
        app = consultant(origin)
        for seconds in (30, 0.5, 30, 0.5):
            reply = app.ask(question("POST", seconds=seconds))
            assert body_of(reply) == b"late"
        with pytest.raises(UpstreamSlow, match="silent for 0.05 s"):
            app.ask(question("POST", seconds=0.05))
        assert origin.accepted == 1


def test_an_answer_that_drips_has_time_for_each_piece():
    with Origin(zoo.dripping(b"x" * 12, 0.1)) as origin:
        app = consultant(origin, first_byte_timeout=1)
        assert body_of(app.ask(question("POST"))) == b"x" * 12


def test_an_application_may_be_silent_while_a_body_is_sent():
    gate = gevent.event.Event()
    gevent.spawn_later(1, gate.set)
    with Origin(zoo.slow(lambda asked: answer(asked.body), 0.2)) as origin:
        app = consultant(origin, first_byte_timeout=0.8)
        reply = app.ask(question("POST", body=Body(b"x", length=1, gate=gate)))
        assert body_of(reply) == b"x"


def test_a_connection_is_not_used_again_after_more_than_an_answer(said):
    with Origin(zoo.overlong(b"hello")) as origin:
        app = consultant(origin)
        for _ in range(3):
            assert body_of(app.ask(question())) == b"hello"
        assert origin.accepted == 3


def test_a_connection_that_was_closed_while_idle_is_not_a_failure(said):
    with Origin(lambda _: [answer(b"hello"), CLOSE]) as origin:
        app = consultant(origin)
        for _ in range(3):
            assert body_of(app.ask(question("POST"))) == b"hello"
            eventually(lambda: not origin.has_open())
    assert codes(said) == []


def test_what_is_asked_is_one_request_built_of_its_parts():
    with Origin(lambda _: answer(b"")) as origin:
        app = consultant(origin)
        app.ask(question("POST", "/p", [(b"x-a", b"1")]))
        app.ask(question("PUT", "/q", body=Body(b"ab", b"c", length=3)))
        app.ask(question("PUT", "/r", body=Body(
            b"ab", b"c", trailers=[(b"x-sum", b"7")])))
        app.ask(question())
        eventually(lambda: len(origin.asked) == 4)
        plain, known, chunked, get = origin.asked
    assert plain.head == (b"POST /p HTTP/1.1\r\nhost: a.example\r\nx-a: 1\r\n"
                          b"content-length: 0\r\n\r\n")
    assert known.field("content-length") == "3"
    assert (known.body, chunked.body) == (b"abc", b"abc")
    assert chunked.field("transfer-encoding") == "chunked"
    assert chunked.field("content-length") is None
    assert get.head == b"GET /x?y=1 HTTP/1.1\r\nhost: a.example\r\n\r\n"


def test_fields_of_the_connection_stay_behind():
    fields = ("connection", "keep-alive, X-Hop"), ("x-hop", "1"), (
        "keep-alive", "timeout=5"), ("x-end", "2"), ("set-cookie", "a=1"), (
        "set-cookie", "b=2")
    with Origin(lambda _: head("200 OK", *fields, content_length=0)) as origin:
        reply = consultant(origin).ask(question())
    assert reply.fields == [
        (b"x-end", b"2"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"),
        (b"content-length", b"0")]


def test_interim_answers_and_trailers_pass():
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    body = (head("200 OK", transfer_encoding="chunked") + chunk(b"abc")
            + b"0\r\nx-sum: 7\r\n\r\n")
    early = []
    with Origin(lambda _: hints + body) as origin:
        reply = consultant(origin).ask(question(
            inform=lambda *what: early.append(what)))
        assert early == [(103, [(b"link", b"</a.css>")])]
        assert body_of(reply) == b"abc"
        assert reply.body.trailers == [(b"x-sum", b"7")]


def test_a_body_is_read_when_the_application_says_go_ahead():
    body = Body(b"abc", length=3)
    early = []

    def expecting(wire):
        early.append(wire.recv(65_536))
        early.append(body.was_read)
        wire.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        early.append(wire.recv(65_536))
        wire.sendall(answer(b"done"))

    with raw_origin(expecting) as port:
        reply = consultant(port).ask(question(
            "PUT", fields=[(b"expect", b"100-continue")], body=body))
        assert body_of(reply) == b"done"
    assert early[0].endswith(b"\r\n\r\n")
    assert early[1:] == [False, b"abc"]


def test_a_body_is_sent_though_the_application_says_no_go_ahead():
    with Origin(lambda asked: answer(asked.body)) as origin:
        reply = consultant(origin).ask(question(
            "PUT", fields=[(b"expect", b"100-continue")],
            body=Body(b"abc", length=3)))
        assert body_of(reply) == b"abc"


def test_an_answer_may_come_before_the_body_was_sent():
    never = gevent.event.Event()

    def impatient(wire):
        wire.recv(65_536)
        wire.sendall(answer(b"too large", "413 Payload Too Large"))

    with raw_origin(impatient) as port:
        reply = consultant(port).ask(question(
            "PUT", body=Body(b"x", length=9, gate=never)))
        assert (reply.status, body_of(reply)) == (413, b"too large")


@contextlib.contextmanager
def raw_origin(serve):
    """The port of a server that calls `serve` with one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def run():
            wire, _ = listener.accept()
            with wire:
                serve(wire)
                ended.wait(10)
        ended = threading.Event()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        ended.set()


@pytest.mark.parametrize("animal, status, cause", [
    (zoo.closing_early, 502, "without an answer"),
    (zoo.resetting, 502, "reset"),
    (zoo.closing_in_head, 502, "before its answer was complete"),
    (zoo.garbage, 502, "HTTP"),
    (zoo.silent, 504, "silent for 0.3 s"),
    (lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", 502,
     "transfer coding gzip"),
    (lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2"
               b"\r\n\r\n", 502, "Content-Length"),
    (lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
               b"Content-Length: 2\r\n\r\n", 502, "Content-Length"),
    (lambda _: b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n"
               b"Connection: upgrade\r\n\r\n", 502, "unasked"),
    (lambda _: b"HTTP/1.1 099 Odd\r\n\r\n", 502, "99"),
    (lambda _: b"HTTP/1.1 700 Odd\r\nContent-Length: 0\r\n\r\n", 502, "700"),
    (lambda _: [b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 400 + b"\r\n"], 502,
     "256 fields"),
    (lambda _: [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 400_000, 5.0], 502,
     "does not end"),
])
def test_what_is_no_answer_is_told_with_its_cause(animal, status, cause):
    with Origin(animal) as origin:
        app = consultant(origin, first_byte_timeout=0.3)
        with pytest.raises(UpstreamFailed, match=cause) as caught:
            app.ask(question("POST"))
        assert caught.value.status == status
        assert f"127.0.0.1:{origin.port}" in str(caught.value)
        assert origin.count() == 1


@pytest.mark.parametrize("animal", [
    zoo.truncating(b"x" * 100_000), zoo.truncating_chunks(b"x" * 100_000),
    zoo.truncating(b"xy")])
def test_an_answer_that_breaks_off_is_never_taken_for_whole(animal):
    with Origin(animal) as origin:
        app = consultant(origin)
        with pytest.raises(UpstreamFailed, match="before its answer was"):
            body_of(app.ask(question()))
        assert origin.count() == 1


def test_nobody_there_is_502_and_nobody_who_accepts_is_504():
    with pytest.raises(UpstreamFailed, match="refused") as caught:
        consultant(free_port()).ask(question())
    assert caught.value.status == 502
    with pytest.raises(UpstreamFailed, match="invalid") as caught:
        consultant("lookup(nobody.invalid):80").ask(question())
    assert caught.value.status == 502


def test_an_idempotent_question_is_asked_again_elsewhere(said):
    with Origin(zoo.closing_early) as bad, Origin(
            lambda _: answer(b"good")) as good:
        app = consultant(bad, good)
        for _ in range(8):
            assert body_of(app.ask(question())) == b"good"
        # After three failures it is left out.
        assert bad.count() == 3
    assert codes(said).count(40024) == 1


def test_a_question_that_changes_something_is_asked_once():
    with Origin(zoo.closing_early) as bad:
        app = consultant(bad, bad, bad)
        with pytest.raises(UpstreamFailed):
            app.ask(question("POST"))
        with pytest.raises(UpstreamFailed):
            app.ask(question("PUT", body=Body(b"x", length=1)))
        assert bad.count() == 2


def test_any_question_is_asked_elsewhere_while_nothing_was_sent():
    with Origin(lambda asked: answer(asked.body)) as good:
        app = consultant(free_port(), free_port(), good)
        for _ in range(3):
            body = Body(b"abc", length=3)
            assert body_of(app.ask(question("POST", body=body))) == b"abc"


def test_an_address_that_was_left_out_is_probed_and_taken_back(said):
    with Origin(zoo.closing_early) as moody:
        app = consultant(moody)
        for _ in range(3):
            with pytest.raises(UpstreamFailed):
                app.ask(question())
        moody.animal = lambda _: answer(b"well")
        # The only address is asked though it is left out.
        assert body_of(app.ask(question())) == b"well"
    assert codes(said)[-2:] == [40024, 40025]


def test_an_only_address_that_fails_all_the_time_is_told_of_seldom(said):
    app = consultant(free_port())
    for _ in range(50):
        with pytest.raises(UpstreamFailed):
            app.ask(question())
    assert codes(said) == [40023] * 3 + [40024]


def test_the_address_with_the_fewest_questions_is_asked():
    with Origin(zoo.slow(lambda _: answer(b"slow"), 0.5)) as slow, Origin(
            lambda _: answer(b"quick")) as quick:
        app = consultant(slow, quick)
        busy = gevent.spawn(lambda: body_of(app.ask(question())))
        other = gevent.spawn(lambda: body_of(app.ask(question())))
        gevent.joinall([other], timeout=0.2)
        for _ in range(6):
            assert body_of(app.ask(question())) == b"quick"
        assert {busy.get(), other.get()} == {b"slow", b"quick"}
        assert slow.count() == 1


def test_no_more_connections_are_made_than_allowed():
    with Origin(zoo.slow(lambda _: answer(b"x"), 0.1)) as origin:
        app = consultant(origin, max_connections=2)
        asked = [gevent.spawn(lambda: body_of(app.ask(question())))
                 for _ in range(6)]
        assert [one.get() for one in asked] == [b"x"] * 6
        assert origin.accepted == 2


def test_a_question_that_waits_for_a_place_is_withdrawn_at_once():
    with Origin(zoo.silent) as origin:
        app = consultant(origin, max_connections=1)
        first, waiting, last = question(), question(), question()
        asking = [gevent.spawn(app.ask, one) for one in (first, waiting, last)]
        eventually(lambda: gevent.sleep(0.01) or origin.count() == 1)
        waiting.withdraw()
        # Others get their place after 10 s.
        asking[1].join(5)
        assert isinstance(asking[1].exception, ClientGone)
        origin.animal = lambda _: answer(b"x")
        first.withdraw()
        assert body_of(asking[2].get(timeout=5)) == b"x"
        assert body_of(app.ask(question())) == b"x"


def test_a_body_that_nobody_reads_on_gives_its_place_back():
    with Origin(zoo.dripping(b"x" * 100_000, 0.01, 1000)) as origin:
        app = consultant(origin, max_connections=1)
        for _ in range(3):
            reply = app.ask(question())
            assert isinstance(reply.body, Stream)
            reply.body.close()
            reply.body.close()
        assert origin.accepted == 3


def test_who_lets_go_of_an_answer_late_leaves_the_next_one_alone():
    with Origin(zoo.dripping(b"hello", 0.005)) as origin:
        app = consultant(origin, max_connections=1)
        first = app.ask(question())
        assert b"".join(first.body.pieces) == b"hello"
        second = app.ask(question())
        first.body.close()
        assert body_of(second) == b"hello"
        assert origin.accepted == 1
        # Its place was given back once.
        assert body_of(app.ask(question())) == b"hello"


def test_who_reads_on_in_an_answer_that_he_let_go_of_is_told():
    with Origin(zoo.dripping(b"x" * 100_000, 0.01, 1000)) as origin:
        reply = consultant(origin).ask(question())
        assert next(reply.body.pieces)
        reply.body.close()
        with pytest.raises((ClientGone, UpstreamFailed)):
            b"".join(reply.body.pieces)


@pytest.mark.parametrize("animal", [
    zoo.silent, lambda _: [head("200 OK", content_length=9), 60.0]])
def test_a_question_that_is_withdrawn_ends_at_once(animal):
    with Origin(animal) as origin:
        app = consultant(origin, first_byte_timeout=60, max_connections=1)
        asked = question()

        def ask():
            return body_of(app.ask(asked))

        waiting = gevent.spawn(ask)
        eventually(lambda: gevent.sleep(0.01) or origin.count() == 1)
        gevent.sleep(0.05)
        asked.withdraw()
        waiting.join(5)
        assert isinstance(waiting.exception, (ClientGone, UpstreamFailed))
        origin.animal = lambda _: answer(b"next")
        assert body_of(app.ask(question())) == b"next"


def test_a_client_that_leaves_in_its_body_ends_the_question(said):
    with Origin(lambda _: answer(b"")) as origin:
        app = consultant(origin)
        for _ in range(4):
            with pytest.raises(ClientGone):
                app.ask(question("POST", body=Body(
                    b"abc", ClientGone("left"), length=9)))
    # That is no fault of the application.
    assert not codes(said)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """PEM files of a certificate for app.example, and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    scratch = ScratchFolder(folder)
    store = CertificateStore(scratch, ["app.example"], authority_dir=folder)
    store.ensure()
    return folder / "cert.pem", folder / "privkey.pem", store.ca_file


def say_hello(tls):
    """Answer each request, to the end of the connection."""
    while tls.recv(65_536):
        tls.sendall(answer(b"hello"))


@contextlib.contextmanager
def tls_origin(certificate, talk=say_hello):
    """The port of an origin that speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate[:2])
    ended = threading.Event()

    def serve(wire):
        with (contextlib.suppress(OSError),
              context.wrap_socket(wire, server_side=True) as tls):
            talk(tls)

    def run():
        with contextlib.suppress(OSError):
            while not ended.is_set():
                wire, _ = listener.accept()
                threading.Thread(
                    target=serve, args=(wire,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]
        ended.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def test_an_application_behind_tls_has_to_prove_its_name(certificate):
    with tls_origin(certificate) as port:
        named = {"application_protocol": "https", "ca_file": certificate[2]}
        app = consultant(port, use_host="app.example", **named)
        for _ in range(2):
            assert body_of(app.ask(question())) == b"hello"
        with pytest.raises(UpstreamFailed, match="(?i)certificate"):
            consultant(port, use_host="other.example", **named).ask(question())
        with pytest.raises(UpstreamFailed, match="(?i)certificate"):
            consultant(port, application_protocol="https").ask(question())
        assert body_of(consultant(
            port, application_protocol="https", verify=False).ask(
                question())) == b"hello"


def test_a_question_that_is_withdrawn_as_it_is_answered_ends(certificate):
    with tls_origin(certificate) as port, contextlib.ExitStack() as ends:
        app = consultant(port, use_host="app.example", ca_file=certificate[2],
                         application_protocol="https", max_connections=1)
        # Both come in one turn of the loop: end of the client, and answer.
        client, server = map(ends.enter_context, socket.socketpair())
        asked = question()

        def leave():
            gevent.socket.wait_read(server.fileno())
            asked.withdraw()

        gevent.spawn(leave)
        asking = gevent.spawn(app.ask, asked)
        eventually(lambda: gevent.sleep(0) or asked.cut.__name__ == "close")
        client.send(b"x")
        time.sleep(0.2)
        asking.join(5)
        assert asking.successful() or isinstance(
            asking.exception, ClientGone)


@pytest.mark.parametrize("unread", [b"", b"u" * 100_000])
def test_a_tunnel_with_tls_ends_one_way_and_then_the_other(
        certificate, unread):
    heard = []

    def talk(tls):
        tls.recv(65_536)
        tls.sendall(head("101 Switching Protocols", upgrade="websocket",
                         connection="upgrade") + b"early")
        while piece := tls.recv(65_536):
            heard.append(piece)
            if len(heard) == 1:
                tls.sendall(unread)
        # The end has come, and there is more to say.
        for n in range(200):
            tls.sendall(b"%d," % n)

    with tls_origin(certificate, talk) as port:
        app = consultant(port, use_host="app.example", ca_file=certificate[2],
                         application_protocol="https")
        reply = app.ask(question(
            upgrade="websocket", body=Body(b"said" * 50_000, b"last")))
        assert reply.status == 101
        # What the application sends has come before our end, or comes after.
        eventually(lambda: gevent.sleep(0.01) or b"".join(heard).endswith(
            b"last"))
        said = body_of(reply)
    assert b"".join(heard) == b"said" * 50_000 + b"last"
    assert said == b"early" + unread + b"".join(
        b"%d," % n for n in range(200))


def test_an_application_may_be_at_a_unix_socket(tmp_path):
    path = tmp_path / "app.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run():
            wire, _ = listener.accept()
            with wire:
                wire.recv(65_536)
                wire.sendall(answer(b"hello"))

        threading.Thread(target=run, daemon=True).start()
        assert body_of(consultant(f"unix://{path}").ask(
            question())) == b"hello"


@pytest.fixture
def patient():
    """A PatientSocket and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = PatientSocket(socket.AF_INET, socket.SOCK_STREAM)
        here.settimeout(5)
        here.connect(listener.getsockname())
        there, _ = listener.accept()
    with here, there:
        yield here, there


def test_who_waits_at_a_socket_hears_that_it_is_closed(patient):
    here, _ = patient
    gevent.spawn_later(0.02, here.close)
    for _ in range(2):
        with pytest.raises(OSError):
            here.recv(99)


def test_octets_that_nobody_wants_cost_no_processor(patient):
    here, there = patient
    there.sendall(b"first")
    assert here.recv(99) == b"first"
    there.sendall(b"second")
    before = time.process_time()
    gevent.sleep(0.3)
    assert time.process_time() - before < 0.2
    there.sendall(b"third")
    got = b""
    while len(got) < 11:
        got += here.recv(4)
    assert got == b"secondthird"
    there.close()
    assert here.recv(99) == b""


def test_each_wait_at_a_socket_has_its_own_time(patient):
    here, there = patient
    here.settimeout(60)
    gevent.spawn_later(0.02, there.sendall, b"x")
    assert here.recv(99) == b"x"
    for seconds in (0.05, 0.2):
        here.settimeout(seconds)
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            here.recv(99)
        assert time.monotonic() - before >= seconds - 0.01
    gevent.spawn_later(0.02, there.sendall, b"y")
    here.settimeout(5)
    assert here.recv(99) == b"y"


def test_as_many_connections_are_kept_as_were_needed_at_a_time():
    with Origin(lambda _: [0.2, answer(b"hello")]) as origin:
        app = consultant(origin)
        asked = [gevent.spawn(app.ask, question()) for _ in range(80)]
        gevent.joinall(asked, raise_error=True)
        assert origin.accepted == 80
        assert body_of(app.ask(question())) == b"hello"
        assert origin.accepted == 80


def test_a_slow_reader_holds_little_of_a_large_answer():
    with Origin(lambda _: answer(b"x" * (64 << 20))) as origin:
        reply = consultant(origin).ask(question())
        first = next(reply.body.pieces)
        assert len(first) <= 65_536
        reply.body.close()


def test_slow_is_a_kind_of_failed():
    assert issubclass(UpstreamSlow, UpstreamFailed)
