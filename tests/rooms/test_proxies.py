"""Room 16f, Proxies: headers of the PROXY protocol on a socket."""

import contextlib
import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import ProxyHeader, ProxyHeaderRefused

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
HELLO = b"\x16\x03\x01 what follows is TLS"


def binary(payload, command=1, family=0x11, length=None):
    """A header of version 2, section 2.2 of the specification."""
    length = len(payload) if length is None else length
    return (SIGNATURE + bytes((0x20 | command, family))
            + length.to_bytes(2, "big") + payload)


def addresses(source, port=1234):
    """The addresses of a connection from `source`."""
    packed = ipaddress.ip_address(source).packed
    return packed * 2 + struct.pack("!HH", port, 443)


def heard(*pieces, is_trusted=True):
    """The client that pieces tell which come one by one, and what is left."""
    ends, rest = ends_heard(*pieces, is_trusted=is_trusted)
    return ends and ends.client, rest


def ends_heard(*pieces, is_trusted=True):
    """What pieces tell that come one by one, and what is left."""
    header = ProxyHeader(is_trusted)
    far, near = socket.socketpair()
    with far, near:
        near.setblocking(False)
        for piece in pieces[:-1]:
            far.sendall(piece)
            with contextlib.suppress(BlockingIOError):
                return header.read(near), near.recv(1 << 16)
        far.sendall(pieces[-1])
        return header.read(near), near.recv(1 << 16)


HEADERS = [
    (b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\r\n", "192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n", "2001:db8::7"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    (binary(addresses("192.0.2.7")), "192.0.2.7"),
    (binary(addresses("2001:db8::7"), family=0x21), "2001:db8::7"),
    (binary(b"/run/client".ljust(108, b"\0") + b"/run/us".ljust(108, b"\0"),
            family=0x31), "unix"),
    (binary(bytes(216), family=0x31), "unix"),
    # LOCAL: the proxy asks for itself, whatever follows
    (binary(b"", command=0, family=0), None),
    (binary(addresses("192.0.2.7"), command=0), None),
    (binary(b"", family=0), None),
    # type-length-values: PP2_TYPE_AUTHORITY, PP2_TYPE_NOOP
    (binary(addresses("192.0.2.7") + b"\x02\0\x09a.example"
            + b"\x04" + (1500).to_bytes(2, "big") + bytes(1500)),
     "192.0.2.7"),
]


@pytest.mark.parametrize(("header", "client"), HEADERS)
def test_a_header_tells_the_client_and_what_follows_is_left(header, client):
    assert heard(header + HELLO) == (client, HELLO)
    by_byte = [header[n:n + 1] for n in range(len(header))]
    assert heard(*by_byte[:-1], by_byte[-1] + HELLO) == (client, HELLO)


@pytest.mark.parametrize(("header", "ends"), [
    (HEADERS[0][0], ("192.0.2.7", "56324", "192.0.2.1")),
    (HEADERS[1][0], ("2001:db8::7", "56324", "2001:db8::1")),
    (HEADERS[4][0], ("192.0.2.7", "1234", "192.0.2.7")),
    (HEADERS[6][0], ("unix", "", ""))])
def test_a_header_tells_what_the_client_has_connected_to(header, ends):
    assert ends_heard(header + HELLO) == (ends, HELLO)


@given(st.sampled_from(HEADERS), st.data())
def test_a_header_may_come_in_any_pieces(case, data):
    header, client = case
    cuts = sorted(data.draw(st.lists(st.integers(1, len(header) - 1))))
    ends = [0, *cuts, len(header)]
    pieces = [header[ends[n]:ends[n + 1]] for n in range(len(ends) - 1)]
    assert heard(*pieces[:-1], pieces[-1] + HELLO) == (client, HELLO)


@pytest.mark.parametrize("header", [
    HELLO,
    b"GET / HTTP/1.1\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 56324\r\n",
    b"PROXY TCP4 2001:db8::7 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 192.0.2.256 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 65536 443\r\n",
    b"PROXY TCP5 192.0.2.7 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\n",
    b"PROXY " + b"x" * 102,
    SIGNATURE + b"\x11\x11\0\0",
    binary(addresses("192.0.2.7"), command=2),
    binary(addresses("192.0.2.7")[:-1]),
    binary(bytes(2033)),
    binary(b"", length=65535),
])
def test_what_is_no_header_or_too_long_is_refused(header):
    with pytest.raises(ProxyHeaderRefused):
        heard(header)


def test_a_peer_that_leaves_before_its_header_is_no_news():
    far, near = socket.socketpair()
    with near:
        far.close()
        with pytest.raises(ConnectionResetError):
            ProxyHeader(True).read(near)


@pytest.mark.parametrize("header", [HEADERS[0][0], HEADERS[4][0]])
def test_the_header_of_a_stranger_is_refused(header):
    with pytest.raises(ProxyHeaderRefused, match="not trusted"):
        heard(header, is_trusted=False)


def test_a_stranger_without_a_header_is_heard():
    assert heard(HELLO, is_trusted=False) == (None, HELLO)


@given(st.binary(max_size=64) | st.builds(
    lambda tail: b"PROXY " + tail, st.binary(max_size=120)) | st.builds(
        lambda *parts: binary(*parts), st.binary(max_size=240),
        st.integers(0, 15), st.integers(0, 255), st.integers(0, 300)))
def test_whatever_comes_ends_in_one_of_four_ways(octets):
    if not octets:
        return
    try:
        client, _ = heard(octets + HELLO)
    except (ProxyHeaderRefused, BlockingIOError):
        return
    if client not in (None, "unix"):
        ipaddress.ip_address(client)
