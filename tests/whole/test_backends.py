"""Applications behind the program: what reaches them, and what comes back."""

import contextlib
import hashlib
import json
import pathlib
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import zoo
from h2_client import H2Client
from harness import (
    DOMAIN,
    Server,
    authority_file,
    eventually,
    free_port,
)
from zoo import Origin, answer, chunk, head

HERE = pathlib.Path(__file__).parent
PROTOCOLS = ["http/1.1", "h2"]
LARGE_BYTES = 63 << 20
SPARE_BYTES = 24 << 20


def make_domains(folder, tweaks="", **backends):
    """Write a site whose domains have an application each, by its port."""
    (folder / "www").mkdir(exist_ok=True)
    (folder / "www" / "a.css").write_text("p {}\n")
    entries = "".join(
        f"    elec {name}.test:\n      root-dir: www\n"
        f"      consultant: {{connect-to: {port},"
        " first-byte-timeout: 2}\n" for name, port in backends.items())
    (folder / "devlove.yaml").write_text(
        f"shimmercat-devlove:\n  domains:\n{entries}"
        f"    elec {DOMAIN}:\n      root-dir: www\n")
    scratch = folder / ".shimmercat.loves.devs"
    scratch.mkdir(mode=0o700, exist_ok=True)
    (scratch / "tweaks.yaml").write_text(tweaks)
    return folder


@contextlib.contextmanager
def running_shop(folder):
    """Run the shop under gunicorn; give its port."""
    port = free_port()
    with open(folder / "gunicorn.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}",
             "--worker-class", "gthread", "--threads", "4",
             "application:app"], cwd=HERE, stdout=output, stderr=output)
    try:
        eventually(lambda: _accepts(port), 20)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def animal():
    """An origin whose animal each test chooses."""
    with Origin(lambda _: answer(b"idle")) as origin:
        yield origin


@pytest.fixture(scope="module", params=["internet", "devlove"])
def server(request, tmp_path_factory, animal, configuration_home):
    """The program before a shop, a zoo, and nobody."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--workers", "1"] if request.param == "internet" else []
    with running_shop(folder) as port:
        make_domains(folder, "max-body-bytes: 64 MiB\nbody-seconds: 0.5\n",
                     shop=port, zoo=animal.port, nobody=free_port())
        with Server(folder, *flags, mode=request.param) as running:
            yield running
            assert not running.lines("M60001"), running.explained("a fault")


def client(server, domain, protocol="h2"):
    return server.client(protocol, f"{domain}.test", follow_redirects=False)


def ask(server, domain, method, path, protocol="h2", **more):
    """The answer to a request over a connection of its own."""
    with client(server, domain, protocol) as asking:
        return asking.request(method, path, extensions={
            "sni_hostname": f"{domain}.test"}, **more)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wsgi_application_is_served(server, protocol):
    page = ask(server, "shop", "GET", "/", protocol)
    assert page.status_code == 200
    assert page.text == "<h1>Shop</h1><p>shop.test https 127.0.0.1"
    assert len(page.headers.get_list("date")) == 1
    form = ask(server, "shop", "POST", "/basket/", protocol,
               data={"thing": "lamp"})
    assert form.status_code == 303
    assert form.headers["location"] == "/basket/done/"
    assert len(form.headers.get_list("set-cookie")) == 2
    done = ask(server, "shop", "GET", "/basket/done/", protocol,
               headers=[("cookie", "thing=lamp"), ("cookie", "count=1")])
    assert done.json() == {"thing": "lamp", "count": "1"}
    head = ask(server, "shop", "HEAD", "/", protocol)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(page.content))
    assert ask(server, "shop", "GET", "/a.css", protocol).text == "p {}\n"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fault_of_the_application_stays_its_own(server, protocol):
    page = ask(server, "shop", "GET", "/fault/", protocol)
    assert page.status_code == 500
    assert "only the application" not in page.text


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("framing", ["length", "pieces"])
def test_uploads_arrive_whole(server, protocol, framing):
    body = bytes(range(256)) * 4000
    content = body if framing == "length" else (
        body[n:n + 30_011] for n in range(0, len(body), 30_011))
    said = ask(server, "shop", "PUT", "/upload/", protocol,
               content=content).json()
    assert said["count"] == len(body)
    assert said["sha"] == hashlib.sha256(body).hexdigest()


@contextlib.contextmanager
def watched_memory(server):
    """Watch a server's memory; the list gets its peak growth at the end."""
    before, found, done = server.memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.05):
            found[0] = max(found[0], server.memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def curl(server, domain, path, *words):
    """What curl prints of the status; its body goes nowhere."""
    name = f"{domain}.test"
    done = subprocess.run(
        ["curl", "--silent", "--cacert", authority_file(), "--max-time", "100",
         "--resolve", f"{name}:{server.port}:127.0.0.1", "--output",
         "/dev/null", "--write-out", "%{http_code} %{size_download}", *words,
         f"https://{name}:{server.port}{path}"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2"])
def test_large_bodies_pass_in_bounded_memory(server, protocol, tmp_path):
    large = tmp_path / "large"
    with open(large, "wb") as stream:
        stream.truncate(LARGE_BYTES)
    ask(server, "shop", "GET", f"/download/{1 << 20}/")
    with watched_memory(server) as growth:
        assert curl(server, "shop", f"/download/{LARGE_BYTES}/", protocol) == (
            0, f"200 {LARGE_BYTES}")
        status, said = curl(server, "shop", "/upload/", protocol,
                            "--data-binary", f"@{large}")
        assert (status, said[:3]) == (0, "200")
    assert growth[0] < SPARE_BYTES


def test_a_client_that_does_not_read_slows_the_application_down(
        server, animal):
    sent = []

    def endless(_asked):
        yield head(transfer_encoding="chunked")
        while len(sent) < 2000:
            sent.append(1)
            yield chunk(b"x" * 65_536)

    animal.animal = endless
    with server.connect("http/1.1", "zoo.test") as sock:
        sock.sendall(b"GET /endless/ HTTP/1.1\r\nHost: zoo.test\r\n\r\n")
        sock.recv(100)
        count = -1

        def stands_still():
            nonlocal count
            count, before = len(sent), count
            return threading.Event().wait(0.3) or count == before
        eventually(stands_still, 20)
    assert 0 < len(sent) < 1000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_events_are_passed_on_one_by_one(server, animal, protocol):
    gates = [threading.Event() for _ in range(5)]

    def events(_asked):
        yield head("200 OK", content_type="text/event-stream",
                   transfer_encoding="chunked")
        for n, gate in enumerate(gates):
            assert gate.wait(20)
            yield chunk(b"data: %d\n\n" % n)
        yield chunk(b"")

    animal.animal = events
    with (client(server, "zoo", protocol) as asking,
          asking.stream("GET", "/events/", extensions={
              "sni_hostname": "zoo.test"}) as reply):
        pieces = reply.iter_raw()
        for n, gate in enumerate(gates):
            gate.set()
            assert next(pieces) == b"data: %d\n\n" % n
        assert next(pieces, None) is None


def test_trailers_and_early_hints_reach_the_client(server, animal):
    animal.animal = lambda _: (
        b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
        + head("200 OK", content_type="application/grpc",
               transfer_encoding="chunked")
        + chunk(b"abc") + b"0\r\ngrpc-status: 0\r\n\r\n")
    done = subprocess.run(
        ["nghttp", "-v", f"https://127.0.0.1:{server.port}/call/",
         "-H", ":authority: zoo.test", "-H", "te: trailers",
         "--timeout=20"], capture_output=True, text=True)
    seen = [line.split("] ")[-1].strip() for line in done.stdout.splitlines()
            if "recv (stream_id" in line]
    fields = [line.partition(") ")[2] for line in seen]
    assert fields.index(":status: 103") < fields.index(
        "link: </a.css>; rel=preload") < fields.index(":status: 200")
    assert fields[-1] == "grpc-status: 0"
    assert animal.asked[-1].field("te") == "trailers"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "reading"])
def test_a_client_that_leaves_ends_what_it_asked_for(
        server, animal, protocol, begun):
    path = f"/leaves/{protocol[-1]}{begun:d}/"
    animal.animal = lambda _: [
        head(content_length=9) if begun else b"", 600.0]
    if protocol == "h2":
        with H2Client(server, "zoo.test") as leaving:
            leaving.get(path)
            eventually(lambda: animal.count(path))
            if begun:
                while not leaving.heads:
                    leaving.turn()
    else:
        with server.connect(protocol, "zoo.test") as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: zoo.test\r\n\r\n"
                         .encode())
            eventually(lambda: animal.count(path))
            if begun:
                sock.recv(100)
    line, = server.await_line("M50001", about=f"127.0.0.1 GET zoo.test{path}")
    assert line.message.split()[3] == ("200" if begun else "499")
    assert line.message.split()[-2] == "cut"


def test_nobody_is_asked_for_what_is_withdrawn_at_once(server, animal):
    animal.animal = lambda _: answer(b"here")
    with H2Client(server, "zoo.test") as hasty:
        for _ in range(50):
            hasty.get_and_reset("/hasty/")
        last = hasty.get("/patient/")
        while last not in hasty.heads:
            hasty.turn()
    assert not animal.count("/hasty/")


@pytest.mark.parametrize("domain, kind, status, cause", [
    ("nobody", None, 502, "refused"),
    ("zoo", zoo.closing_early, 502, "without an answer"),
    ("zoo", zoo.garbage, 502, "HTTP"),
    ("zoo", zoo.silent, 504, "silent for 2 s")])
def test_what_is_wrong_is_for_the_log_and_for_developers(
        server, animal, domain, kind, status, cause):
    animal.animal = kind
    page = ask(server, domain, "GET", "/x/")
    assert page.status_code == status
    where = "127.0.0.1:"
    if server.mode == "devlove":
        assert cause in page.text and where in page.text
    else:
        assert cause not in page.text and where not in page.text
    eventually(lambda: any(
        cause in line.message for line in server.lines("M40023")))


@pytest.mark.parametrize("protocol, expected", [
    ("--http1.1", {18, 56, 92}), ("--http2", {92})])
@pytest.mark.parametrize("kind", [
    zoo.truncating(b"x" * 500_000), zoo.truncating_chunks(b"x" * 500_000)],
    ids=["length", "chunks"])
def test_a_body_that_breaks_off_never_ends_well(
        server, animal, protocol, expected, kind):
    animal.animal = kind
    status, _ = curl(server, "zoo", "/cut/", protocol)
    assert status in expected
    assert server.await_line("M40017", about="/cut/")


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2"])
def test_a_body_that_the_application_refuses_does_not_hang(
        server, animal, protocol, tmp_path):
    large = tmp_path / "large"
    with open(large, "wb") as stream:
        stream.truncate(60 << 20)
    with socket.create_server(("127.0.0.1", animal_port(server))) as listener:
        def refuse():
            wire, _ = listener.accept()
            with wire:
                wire.recv(1000)
                wire.sendall(answer(b"no", "403 Forbidden"))
                # Lets the answer through before the rest is reset.
                wire.shutdown(socket.SHUT_WR)
                wire.recv(1000)
        threading.Thread(target=refuse, daemon=True).start()
        status, said = curl(server, "nobody", "/refused/", protocol,
                            "--data-binary", f"@{large}")
    assert said[:3] == "403", (status, said)


def animal_port(server):
    """The port of the domain where nobody listens."""
    text = (server.folder / "devlove.yaml").read_text()
    return int(text.partition("nobody.test")[2].partition(
        "connect-to: ")[2].split(",")[0])


def test_a_body_that_stops_coming_is_408(server, animal):
    animal.animal = lambda asked: answer(asked.body)
    with server.connect("http/1.1", "zoo.test") as sock:
        sock.sendall(b"POST /slow/ HTTP/1.1\r\nHost: zoo.test\r\n"
                     b"Content-Length: 10\r\n\r\nabc")
        assert sock.makefile("rb").readline() == (
            b"HTTP/1.1 408 Request Timeout\r\n")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_body_above_the_limit_is_413(server, protocol):
    path = f"/upload/?{protocol[-1]}"
    with contextlib.suppress(httpx.TransportError):
        # The answer may come while the client still writes.
        said = ask(server, "shop", "POST", path, protocol,
                   content=(bytes(1 << 20) for _ in range(80)))
        assert said.status_code == 413
    line, = server.await_line(
        "M50001", about=f"127.0.0.1 POST shop.test{path}")
    assert line.message.split()[3] == "413"
    assert line.message.split()[-2] == "error"


def test_every_request_says_who_answered(server, animal):
    animal.animal = lambda _: answer(b"{}", content_type="application/json")
    assert ask(server, "zoo", "GET", "/log/").json() == json.loads("{}")
    line, = server.await_line("M50001", about="127.0.0.1 GET zoo.test/log/")
    assert line.message.split()[-2:] == ["consultant", "default"]
