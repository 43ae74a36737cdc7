"""Room 4b, Forwarding."""

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    BadRequest,
    Request,
    forwarded_fields,
    is_trusted,
    peer_of,
    upstream_fields,
)

NETWORKS = (ipaddress.ip_network("10.0.0.0/8"),
            ipaddress.ip_network("2001:db8::/32"))
#: RFC 9110 section 5.6.2 and 5.5, in lower case
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
VALUE = re.compile(rb"[^\0\r\n]*")


def made(*fields, client="192.0.2.1", protocol="h2", authority=b"a.example"):
    """A request with these fields."""
    return Request.from_fields([
        (b":method", b"GET"), (b":scheme", b"https"),
        (b":authority", authority), (b":path", b"/"), *fields],
        protocol, client)


def passed(*fields, trusted=False, **about):
    """What of these fields an application gets, without what we add."""
    added = (b"host", b"x-forwarded-for", b"x-forwarded-proto",
             b"x-forwarded-host", b"forwarded", b"via")
    return [field for field in upstream_fields(
        made(*fields, **about), trusted) if field[0] not in added]


@pytest.mark.parametrize(("client", "trusted"), [
    ("10.1.2.3", True),
    ("11.1.2.3", False),
    ("2001:db8::7", True),
    ("2001:db9::7", False),
    # IPv4 through a socket of IPv6, and an address with its interface
    ("::ffff:10.1.2.3", True),
    ("::ffff:11.1.2.3", False),
    ("fe80::1%eth0", False),
    ("unix", False),
])
def test_a_client_is_trusted_when_it_lies_in_a_network(client, trusted):
    assert is_trusted(client, NETWORKS) is trusted
    assert not is_trusted(client, ())


def test_unix_sockets_are_trusted_by_their_name():
    assert is_trusted("unix", (*NETWORKS, "unix"))
    assert not is_trusted("192.0.2.1", ("unix",))


@pytest.mark.parametrize("one, other, same", [
    ("192.0.2.1", "192.0.2.1", True),
    ("192.0.2.1", "192.0.2.2", False),
    ("192.0.2.1", "::ffff:192.0.2.1", True),
    ("2a00:1:2:3::1", "2a00:1:2:3:ffff::2", True),
    ("2a00:1:2:3::1", "2a00:1:2:4::1", False),
    ("::1", "::2", True),
    ("fe80::1%eth0", "fe80::2%eth1", True)])
def test_a_peer_is_an_address_or_a_network_of_64_bits(one, other, same):
    assert (peer_of(one, NETWORKS) == peer_of(other, NETWORKS)) is same
    assert peer_of(one, NETWORKS) is not None


@pytest.mark.parametrize("client", ["unix", "10.1.2.3", "2001:db8::9"])
def test_behind_proxies_there_are_many_peers(client):
    assert peer_of(client, NETWORKS) is None


@pytest.mark.parametrize(("client", "address", "node"), [
    ("192.0.2.1", b"192.0.2.1", b"192.0.2.1"),
    ("2001:db8::1", b"2001:db8::1", b'"[2001:db8::1]"'),
    ("::ffff:192.0.2.1", b"192.0.2.1", b"192.0.2.1"),
    ("fe80::1%eth0", b"fe80::1", b'"[fe80::1]"'),
    ("unix", b"unknown", b"unknown"),
])
def test_an_application_learns_who_asked_for_what(client, address, node):
    assert forwarded_fields(
        made(client=client, authority=b"a.example:8443"), False) == [
        (b"x-forwarded-for", address),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"a.example:8443"),
        (b"forwarded",
         b'for=%b;host="a.example:8443";proto=https' % node),
        (b"via", b"2 shimmercat")]


SAID = [(b"x-forwarded-for", b"203.0.113.9"), (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"other.example"),
        (b"forwarded", b"for=203.0.113.9;proto=http"), (b"via", b"1.0 fred")]


def test_what_a_stranger_says_of_its_origin_is_replaced():
    plain = dict(forwarded_fields(made(), False))
    assert dict(forwarded_fields(made(*SAID), False)) == {
        **plain, b"via": b"1.0 fred, 2 shimmercat"}


def test_what_a_trusted_proxy_says_is_kept_and_continued():
    assert forwarded_fields(made(*SAID, protocol="http/1.1"), True) == [
        (b"x-forwarded-for", b"203.0.113.9, 192.0.2.1"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"other.example"),
        (b"forwarded", b"for=203.0.113.9;proto=http,"
         b' for=192.0.2.1;host="a.example";proto=https'),
        (b"via", b"1.0 fred, 1.1 shimmercat")]


def test_several_fields_of_a_trusted_proxy_are_one_list():
    twice = [(b"x-forwarded-for", b"198.51.100.1"),
             (b"x-forwarded-for", b"198.51.100.2")]
    assert forwarded_fields(made(*twice), True)[0] == (
        b"x-forwarded-for", b"198.51.100.1, 198.51.100.2, 192.0.2.1")


@pytest.mark.parametrize("name", [
    b"x_forwarded_for", b"x-forwarded_for", b"x-forwarded-port", b"x-real-ip",
    b"x_real_ip", b"x-forwarded-anything"])
def test_a_stranger_cannot_speak_for_others_under_a_similar_name(name):
    assert passed((name, b"203.0.113.9")) == []


def test_a_trusted_proxy_may_say_more():
    said = [(b"x-real-ip", b"203.0.113.9"), (b"x-forwarded-port", b"443")]
    assert passed(*said, trusted=True) == said
    # but not twice what we continue
    assert passed((b"x_forwarded_for", b"1.2.3.4"), trusted=True) == []


def test_host_comes_first_and_may_be_configured():
    request = made((b"accept", b"*/*"), (b"host", b"A.example"))
    fields = upstream_fields(request, False)
    assert fields[:2] == [(b"host", b"a.example"), (b"accept", b"*/*")]
    assert [name for name, _ in fields].count(b"host") == 1
    configured = upstream_fields(request, False, "app.internal:8000")
    assert configured[0] == (b"host", b"app.internal:8000")
    assert (b"x-forwarded-host", b"a.example") in configured


@pytest.mark.parametrize("name", [
    b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding",
    b"upgrade", b"http2-settings", b"content-length", b"content_length",
    b"transfer_encoding", b"proxy", b"proxy-authorization",
    b"proxy-anything"])
def test_what_concerns_one_hop_does_not_pass(name):
    fields = ((b"accept", b"*/*"), (name, b"x"))
    assert passed(*fields, protocol="http/1.1") == [(b"accept", b"*/*")]


def test_fields_named_by_connection_do_not_pass():
    assert passed(
        (b"connection", b"Close, X-Mine"), (b"x-mine", b"1"),
        (b"connection", b"cookie"), (b"cookie", b"a=1"), (b"x-other", b"2"),
    ) == [(b"x-other", b"2")]


def test_what_we_add_cannot_be_taken_away_by_connection():
    nominate = (b"connection", b"host, x-forwarded-for, forwarded, via")
    fields = upstream_fields(made(nominate), False)
    assert fields[0] == (b"host", b"a.example")
    assert fields[1:] == forwarded_fields(made(), False)


@pytest.mark.parametrize(("fields", "expected"), [
    ([(b"te", b"trailers")], [(b"te", b"trailers")]),
    ([(b"te", b"gzip, Trailers"), (b"connection", b"te")],
     [(b"te", b"trailers")]),
    ([(b"te", b"gzip")], []),
    ([(b"te", b"")], []),
])
def test_te_passes_as_trailers_only(fields, expected):
    assert passed(*fields) == expected


def test_expectations_and_trailers_announced_pass():
    fields = [(b"expect", b"100-continue"), (b"trailer", b"x-sum")]
    assert passed(*fields) == fields


def test_a_cookie_in_pieces_is_one_field():
    assert passed((b"cookie", b"a=1"), (b"accept", b"*/*"), (b"cookie", b"b=2")
                  ) == [(b"accept", b"*/*"), (b"cookie", b"a=1; b=2")]


@pytest.mark.parametrize("field", [
    (b"x-a", b"1\r\nx-b: 2"), (b"x-a", b"1\n"), (b"x-a", b"1\0"),
    (b"x-a", b"\r"), (b"x a", b"1"), (b"x-a\r\nx-b", b"1"), (b"", b"1"),
    (b"x-a:", b"1"), (b"cookie", b"a\nb"), (b"via", b"1\r\n1"),
])
def test_what_could_end_a_line_is_refused(field):
    with pytest.raises(BadRequest):
        upstream_fields(made(field), False)


NAMES = st.sampled_from([
    b"connection", b"te", b"cookie", b"via", b"host", b"x-forwarded-for",
    b"forwarded", b"x-a", b"x_a", b"content-length", b"upgrade"]) | st.binary(
        max_size=8)
VALUES = st.sampled_from([
    b"close", b"x-a", b"x-a, te", b"trailers", b"a.example", b"host"]
    ) | st.binary(max_size=12)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8), st.booleans())
def test_nothing_passes_that_could_be_read_as_two_requests(fields, trusted):
    try:
        given_on = upstream_fields(made(*fields), trusted)
    except BadRequest:
        return
    names = [name for name, _ in given_on]
    assert all(TOKEN.fullmatch(name) and VALUE.fullmatch(value)
               for name, value in given_on)
    assert names[0] == b"host"
    for name in (b"host", b"cookie", b"te", b"via", b"x-forwarded-for"):
        assert names.count(name) <= 1
    assert not {b"connection", b"content-length", b"upgrade",
                b"transfer-encoding"} & {*names}
    if not trusted:
        assert dict(given_on)[b"x-forwarded-for"] == b"192.0.2.1"
