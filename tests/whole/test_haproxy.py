"""HAProxy in front, which tells with the PROXY protocol who is behind it."""

import shutil
import signal
import socket
import subprocess

import pytest
from harness import (
    DOMAIN,
    PROGRAM,
    Server,
    eventually,
    free_port,
    make_site,
    trusting_context,
)

#: the kernel takes all of 127.0.0.0/8 for this host
PROXY, VISITOR = "127.0.0.1", "127.0.0.2"
TWEAKS = {"proxy-protocol": "true", "trusted-proxies": f"[{PROXY}]",
          "handshake-seconds": "2"}
CONFIGURATION = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
listen first
    bind 127.0.0.1:{v1}
    server a 127.0.0.1:{server} send-proxy
listen second
    bind 127.0.0.1:{v2}
    default-server check check-send-proxy inter 50ms
    server a 127.0.0.1:{server} send-proxy-v2-ssl-cn
listen third
    bind 127.0.0.1:{plain}
    server a 127.0.0.1:{server}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, configuration_home):
    """The program, which trusts the proxy."""
    folder = make_site(tmp_path_factory.mktemp("site"), tweaks=TWEAKS)
    with Server(folder, "--log-codes", "all", mode="devlove") as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    """Ports of HAProxy by what it sends ahead."""
    ports = {name: free_port() for name in ("v1", "v2", "plain")}
    config = tmp_path_factory.mktemp("proxy") / "haproxy.cfg"
    config.write_text(CONFIGURATION.format(server=server.port, **ports))
    process = subprocess.Popen([
        haproxy(), "-db", "-f", str(config)])
    try:
        eventually(lambda: is_open(ports["plain"]))
        yield ports
    finally:
        process.terminate()
        process.wait(10)


def haproxy():
    """HAProxy's program."""
    program = shutil.which("haproxy") or shutil.which(
        "haproxy", path="/usr/sbin")
    return program or pytest.skip("haproxy is not installed")


SAMPLE = PROGRAM.parent / "conf" / "haproxy.cfg"


def test_the_sample_is_right():
    done = subprocess.run([haproxy(), "-c", "-f", str(SAMPLE)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_the_sample_serves_and_sees_who_is_well(tmp_path):
    folder, front, said = (
        make_site(tmp_path, tweaks=TWEAKS), free_port(), tmp_path / "said")
    with Server(folder, mode="devlove") as hidden:
        text = SAMPLE.read_text()
        for old, new in (("bind :443", f"bind 127.0.0.1:{front}"),
                         ("127.0.0.1:4043", f"127.0.0.1:{hidden.port}"),
                         ("maxconn 20000", "maxconn 100"),
                         ("inter 2s", "inter 100ms"),
                         ("timeout check 5s", "timeout check 1s")):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "haproxy.cfg").write_text(text)
        with (open(said, "wb") as output, subprocess.Popen(
                [haproxy(), "-db", "-f", tmp_path / "haproxy.cfg"],
                stderr=output) as process):
            try:
                hidden.await_line("M50001", 2)
                assert b" 200 " in asked(front, "/?sample")
                assert client_of(hidden, "/?sample") == VISITOR
                (check, *_) = hidden.lines("M50001")
                assert "health/.well-known/shimmercat/health 200" in (
                    check.message)
                assert "DOWN" not in said.read_text()
                # Who does not answer is asked nothing, until he does.
                hidden.signal(signal.SIGSTOP)
                eventually(lambda: "here is DOWN" in said.read_text(), 20)
                hidden.signal(signal.SIGCONT)
                eventually(lambda: "here is UP, reason: Layer7 check passed"
                           in said.read_text(), 20)
            finally:
                process.terminate()


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def asked(port, path, source=VISITOR, ahead=()):
    """The first line of the answer, after octets ahead of TLS."""
    plain = socket.create_connection(
        ("127.0.0.1", port), 20, source_address=(source, 0))
    for octets in ahead:
        plain.sendall(octets)
    with trusting_context().wrap_socket(
            plain, server_hostname=DOMAIN) as tls:
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {DOMAIN}\r\n"
                    "Connection: close\r\n\r\n".encode())
        return tls.makefile("rb").readline()


def client_of(server, path):
    """The client that the log names for a path."""
    (line,) = eventually(lambda: [
        line for line in server.lines("M50001") if path in line.message])
    return line.message.split()[0]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_log_names_who_is_behind_the_proxy(server, proxy, version):
    assert b" 200 " in asked(proxy[version], f"/?{version}")
    assert client_of(server, f"/?{version}") == VISITOR
    assert server.await_line("M00007", about=f"{PROXY} speaks for {VISITOR}")


def test_a_trusted_proxy_must_say_whom_it_speaks_for(server, proxy):
    with pytest.raises(OSError):
        asked(proxy["plain"], "/?silent")
    server.await_line("M40016", about=f"connection from {PROXY} refused:"
                      " no PROXY header that can be read")


def test_who_is_no_proxy_is_served_without_a_header(server):
    assert b" 200 " in asked(server.port, "/?direct")
    assert client_of(server, "/?direct") == VISITOR


def test_a_header_that_is_not_trusted_ends_the_connection(server):
    with pytest.raises(OSError):
        asked(server.port, "/?liar",
              ahead=[b"PROXY TCP4 192.0.2.7 192.0.2.1 1 443\r\n"])
    server.await_line("M40016", about=f"connection from {VISITOR} refused:"
                      " its PROXY header is not trusted")


def test_a_header_in_pieces_and_with_the_handshake_is_read(server):
    head = b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n"
    ahead = [head[n:n + 1] for n in range(len(head))]
    assert b" 200 " in asked(server.port, "/?pieces", PROXY, ahead)
    assert client_of(server, "/?pieces") == "2001:db8::7"


def test_a_proxy_that_asks_for_itself_is_named_itself(server):
    local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
    assert b" 200 " in asked(server.port, "/?local", PROXY, [local])
    assert client_of(server, "/?local") == PROXY


def test_a_header_that_does_not_come_has_the_time_of_a_handshake(server):
    with socket.create_connection(
            ("127.0.0.1", server.port), 20,
            source_address=(PROXY, 0)) as silent:
        silent.sendall(b"PROXY ")
        assert silent.recv(1) == b""
    server.await_line("M00006", about=f"{PROXY} took too long: handshake")


def test_a_health_check_is_no_news(server, proxy):
    # those of HAProxy go on meanwhile
    before = len(server.lines("M40016"))
    for _ in range(3):
        socket.create_connection(("127.0.0.1", server.port), 20).close()
    assert b" 200 " in asked(server.port, "/?after")
    assert len(server.lines("M40016")) == before


def test_a_socket_of_a_proxy_may_be_a_path(tmp_path):
    folder = make_site(tmp_path, tweaks={
        "proxy-protocol": "true", "trusted-proxies": "[unix]"})
    path = str(tmp_path / "door")
    with Server(folder, "--listen", f"unix://{path}",
                mode="devlove") as hidden:
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(path)
        plain.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 1 443\r\n")
        with trusting_context().wrap_socket(
                plain, server_hostname=DOMAIN) as tls:
            tls.sendall(f"GET /?path HTTP/1.1\r\nHost: {DOMAIN}\r\n"
                        "Connection: close\r\n\r\n".encode())
            assert b" 200 " in tls.makefile("rb").readline()
        assert client_of(hidden, "/?path") == "192.0.2.7"
