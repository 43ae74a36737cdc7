"""Room 4, HTTP."""

import email
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    BadRequest,
    Chain,
    FileSlice,
    Headers,
    RangeNotSatisfiable,
    Request,
    Response,
    SourceChanged,
    UriTooLong,
    byte_ranges,
    choose,
    conditional,
    content_range,
    http_date,
    multipart_ranges,
)

ETAG = b'"xyzzy"'
MODIFIED = 784111777.5  # Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110
BEFORE = http_date(MODIFIED - 10).encode()
EXACT = http_date(MODIFIED).encode()
AFTER = http_date(MODIFIED + 10).encode()


def head(method=b"GET", path=b"/", authority=b"a.example", scheme=b"https"):
    return [
        (b":method", method),
        (b":scheme", scheme),
        (b":authority", authority),
        (b":path", path),
    ]


def made(*fields, **pseudo):
    """The request with these fields, a GET of / when nothing else is said."""
    return Request.from_fields([*head(**pseudo), *fields], "h2", "192.0.2.1")


def ranges(field, length=10000):
    return byte_ranges(made((b"range", field)), ETAG, MODIFIED, length)


def drained(body, size):
    pieces = []
    while piece := body.read(size):
        assert len(piece) <= size
        pieces.append(piece)
    return b"".join(pieces)


@pytest.fixture
def opened(tmp_path):
    """Makes a file of some bytes and opens it: (bytes) -> descriptor."""
    def open_with(content):
        path = tmp_path / "file"
        path.write_bytes(content)
        return os.open(path, os.O_RDONLY)
    return open_with


def is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_fields_keep_their_order_and_are_found_by_name():
    fields = [(b"b", b"1"), (b"a", b"2"), (b"b", b"3"), (b"c", b"")]
    headers = Headers(fields)
    assert headers.fields == fields
    assert headers.get(b"a") == b"2"
    assert headers.get(b"b") == b"1, 3"
    assert headers.get(b"d") is None
    assert headers.get(b"d", b"x") == b"x"
    assert headers.get(b"c") == b""


def test_the_crumbs_of_a_cookie_are_joined_as_a_cookie():
    # RFC 9113 section 8.2.3
    headers = Headers([(b"cookie", b"a=b"), (b"cookie", b"c=d")])
    assert headers.get(b"cookie") == b"a=b; c=d"


def test_a_request_knows_its_parts():
    request = made(
        (b"accept", b"*/*"),
        path=b"/a%20b/c?d=e?f",
        authority=b"WWW.Example.com.:8443",
    )
    assert (request.method, request.scheme) == ("GET", "https")
    assert request.authority == "WWW.Example.com.:8443"
    assert request.host == "www.example.com"
    assert request.target == "/a%20b/c?d=e?f"
    assert (request.path, request.query) == ("/a%20b/c", "d=e?f")
    assert (request.protocol, request.client) == ("h2", "192.0.2.1")
    assert request.headers.fields == [(b"accept", b"*/*")]


@pytest.mark.parametrize("path, query", [
    (b"/", None), (b"/?", ""), (b"/?a", "a"), (b"/a?b=/?", "b=/?"),
])
def test_an_empty_query_is_not_an_absent_one(path, query):
    assert made(path=path).query == query


@pytest.mark.parametrize("authority, host", [
    (b"a.example", "a.example"),
    (b"A.Example:443", "a.example"),
    (b"a.example.", "a.example"),
    (b"a_b-c.example:", "a_b-c.example"),
    (b"127.0.0.1:4043", "127.0.0.1"),
    (b"[::1]:4043", "[::1]"),
    (b"[2001:DB8::1]", "[2001:db8::1]"),
    (b"localhost", "localhost"),
])
def test_the_host_is_lower_case_without_port_and_final_dot(authority, host):
    assert made(authority=authority).host == host


@pytest.mark.parametrize("authority", [
    b"", b".", b"a..example", b".example", b"user@a.example", b"a.example:x",
    b"a.example:443:1", b"a.example:123456", b"a example", b" a.example",
    b"a.example/", b"a.example?x", b"a.example, b.example",
    b"\xc3\xb6.example", b"a.example\0", b"a.example\n", b"[::1", b"::1",
    b"[a.example]x",
    b"%61.example", b"a" * 300,
])
def test_an_authority_that_is_no_host_and_port_is_refused(authority):
    with pytest.raises(BadRequest) as caught:
        made(authority=authority)
    assert caught.value.status == 400


@pytest.mark.parametrize("path", [
    b"", b"*", b"a", b"http://a.example/", b"/a b", b"/a\0", b"/a\r\nb",
    b"/\x7f", b"/\xc3\xb6", b"/a#b", b"/a?b#c", b"/\\evil.example", b"/a?\t",
])
def test_a_target_that_is_no_path_is_refused(path):
    with pytest.raises(BadRequest):
        made(path=path)


@pytest.mark.parametrize("path", [
    b"/", b"//", b"/a;b=c/d,e", b"/[a]|{b}^\"<>`", b"/a?[x]=\\|{}", b"/%00",
])
def test_a_target_that_browsers_send_is_read(path):
    assert made(path=path).target.encode() == path


@pytest.mark.parametrize("fields", [
    head()[1:],
    head()[:1] + head()[2:],
    head()[:3],
    [*head()[:2], *head()[3:]],
    [*head(), (b":path", b"/")],
    [*head(), (b":method", b"GET")],
    [*head(), (b":status", b"200")],
    [*head()[:3], (b"accept", b"*/*"), *head()[3:]],
    head(method=b""),
    head(method=b"GET /"),
    head(method=b"G\xc3\x96T"),
    head(method=b"X" * 65),
    head(scheme=b"gopher"),
    head(scheme=b""),
    [(b":method", b"CONNECT"), (b":authority", b"a.example:443")],
    [],
])
def test_missing_doubled_or_odd_pseudo_fields_are_refused(fields):
    with pytest.raises(BadRequest):
        Request.from_fields(fields, "h2", "192.0.2.1")


def test_a_tunnel_is_asked_for_by_a_get_that_wants_an_upgrade():
    tunnel = [*head(method=b"CONNECT"), (b":protocol", b"WebSocket")]
    request = Request.from_fields(tunnel, "h2", "192.0.2.1")
    assert (request.method, request.upgrade) == ("GET", "websocket")
    assert made().upgrade is None


@pytest.mark.parametrize(("method", "protocol", "status"), [
    (b"GET", b"websocket", 400), (b"CONNECT", b"connect-udp", 501),
    (b"CONNECT", b"", 501),
])
def test_tunnels_of_other_kinds_are_refused(method, protocol, status):
    with pytest.raises(BadRequest) as caught:
        Request.from_fields([*head(method=method), (b":protocol", protocol)],
                            "h2", "192.0.2.1")
    assert caught.value.status == status


def test_an_asterisk_is_a_target_of_options_only():
    assert made(method=b"OPTIONS", path=b"*").path == "*"


def test_a_target_of_eight_kibibytes_is_read_and_a_longer_one_is_not():
    assert made(path=b"/" * 8192).path == "/" * 8192
    with pytest.raises(UriTooLong) as caught:
        made(path=b"/" * 8193)
    assert caught.value.status == 414


@pytest.mark.parametrize("named", [
    b"a.example", b"A.example", b"a.example:443", b"a.example.",
])
def test_a_host_field_may_repeat_the_authority(named):
    assert made((b"host", named)).host == "a.example"


@pytest.mark.parametrize("named", [b"b.example", b"a.example:80", b"", b"@"])
def test_a_host_field_may_not_contradict_the_authority(named):
    # RFC 9113 section 8.3.1
    with pytest.raises(BadRequest):
        made((b"host", named))


def test_without_an_authority_the_host_field_counts():
    fields = [field for field in head() if field[0] != b":authority"]
    fields.append((b"host", b"B.example:80"))
    assert Request.from_fields(fields, "h2", "").host == "b.example"
    fields.append((b"host", b"B.example:80"))
    with pytest.raises(BadRequest):
        Request.from_fields(fields, "h2", "")


def test_a_trail_is_kept_only_where_somebody_reads_it():
    request = made()
    request.note("unheard")
    assert request.trail is None
    request.trail = []
    request.note("heard")
    assert request.trail == ["heard"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b":method", b":path", b":authority", b":scheme",
                             b":x", b"host", b"accept"]),
            st.sampled_from([b"GET", b"/", b"a.example", b"https"])
            | st.binary(max_size=9),
        )
    )
)
def test_no_head_raises_anything_but_bad_request(fields):
    try:
        request = Request.from_fields(fields, "h2", "")
    except BadRequest:
        return
    assert request.path[0] in "/*" and request.target.isprintable()


def test_a_response_has_its_words_for_the_log():
    response = Response(200, ((b"a", b"b"),), b"x", "static", "br")
    assert (response.answered, response.representation) == ("static", "br")
    assert Response(404).body == b""


#: (fields, status of a GET, status of a PUT), RFC 9110 section 13
CONDITIONS = [
    ({}, None, None),
    # section 13.1.1
    ({"if-match": b'"xyzzy"'}, None, None),
    ({"if-match": b'"xyzzy", "r2d2xxxx", "c3piozzzz"'}, None, None),
    ({"if-match": b"*"}, None, None),
    ({"if-match": b'"r2d2xxxx"'}, 412, 412),
    ({"if-match": b'W/"xyzzy"'}, 412, 412),
    ({"if-match": b"xyzzy"}, 412, 412),
    ({"if-match": b""}, 412, 412),
    # section 13.1.2
    ({"if-none-match": b'"xyzzy"'}, 304, 412),
    ({"if-none-match": b'W/"xyzzy"'}, 304, 412),
    ({"if-none-match": b'"xyzzy", "r2d2xxxx", "c3piozzzz"'}, 304, 412),
    ({"if-none-match": b'W/"r2d2xxxx", W/"xyzzy"'}, 304, 412),
    ({"if-none-match": b'"a,b","xyzzy"'}, 304, 412),
    ({"if-none-match": b"*"}, 304, 412),
    ({"if-none-match": b'"r2d2xxxx"'}, None, None),
    ({"if-none-match": b'"xyzz", "yzzy"'}, None, None),
    ({"if-none-match": b"xyzzy"}, None, None),
    # section 13.1.3
    ({"if-modified-since": EXACT}, 304, None),
    ({"if-modified-since": AFTER}, 304, None),
    ({"if-modified-since": BEFORE}, None, None),
    ({"if-modified-since": b"Sunday, 06-Nov-94 08:49:37 GMT"}, 304, None),
    ({"if-modified-since": b"Sun Nov  6 08:49:37 1994"}, 304, None),
    ({"if-modified-since": b"yesterday"}, None, None),
    # section 13.1.4
    ({"if-unmodified-since": EXACT}, None, None),
    ({"if-unmodified-since": AFTER}, None, None),
    ({"if-unmodified-since": BEFORE}, 412, 412),
    ({"if-unmodified-since": b"tomorrow"}, None, None),
    # section 13.2.2, who is asked first
    ({"if-match": b'"xyzzy"', "if-unmodified-since": BEFORE}, None, None),
    ({"if-match": b'"x"', "if-none-match": b'"xyzzy"'}, 412, 412),
    ({"if-match": b"*", "if-none-match": b"*"}, 304, 412),
    ({"if-none-match": b'"x"', "if-modified-since": AFTER}, None, None),
    ({"if-none-match": ETAG, "if-modified-since": BEFORE}, 304, 412),
]


@pytest.mark.parametrize("fields, read, written", CONDITIONS)
def test_preconditions_are_those_of_rfc_9110(fields, read, written):
    fields = [(name.encode(), value) for name, value in fields.items()]
    expected = {b"GET": read, b"HEAD": read, b"PUT": written}
    for method, status in expected.items():
        request = made(*fields, method=method)
        assert conditional(request, ETAG, MODIFIED) == status


#: (field, parts of 10000 bytes), RFC 9110 section 14.1.2 first
RANGES = [
    (b"bytes=0-499", [(0, 500)]),
    (b"bytes=500-999", [(500, 1000)]),
    (b"bytes=-500", [(9500, 10000)]),
    (b"bytes=9500-", [(9500, 10000)]),
    (b"bytes=0-0,-1", [(0, 1), (9999, 10000)]),
    (b"bytes= 0-0, -1", [(0, 1), (9999, 10000)]),
    (b"bytes= 0-999, 4500-5499, -1000",
     [(0, 1000), (4500, 5500), (9000, 10000)]),
    (b"bytes=500-600,601-999", [(500, 1000)]),
    (b"bytes=500-700,601-999", [(500, 1000)]),
    (b"bytes=0-0", [(0, 1)]),
    (b"bytes=9999-9999", [(9999, 10000)]),
    (b"bytes=0-", [(0, 10000)]),
    (b"bytes=-20000", [(0, 10000)]),
    (b"bytes=9990-20000", [(9990, 10000)]),
    (b"bytes=0-9,20000-", [(0, 10)]),
    (b"bytes=, 0-9 ,", [(0, 10)]),
    (b"Bytes=0-9", [(0, 10)]),
    (b"bytes=20-29,0-9", [(20, 30), (0, 10)]),
    (b"bytes=20-29,0-9,5-15", [(0, 16), (20, 30)]),
    (b"bytes=0-,0-,0-,0-", [(0, 10000)]),
    (b"bytes=0-18446744073709551616", [(0, 10000)]),
    (b"bytes=" + b",".join(b"%d-%d" % (n, n) for n in range(0, 32, 2)),
     [(n, n + 1) for n in range(0, 32, 2)]),
    # ignored: everything is sent
    (b"bytes=" + b",".join(b"%d-%d" % (n, n) for n in range(0, 34, 2)), None),
    (b"bytes=" + b"0-," * 9000, None),
    (b"bytes=1-0", None),
    (b"bytes=0-9,9-0", None),
    (b"bytes=-", None),
    (b"bytes=", None),
    (b"bytes=,,", None),
    (b"bytes", None),
    (b"bytes=a-b", None),
    (b"bytes=0-9;10-19", None),
    (b"bytes=0 - 9", None),
    (b"bytes=+1-2", None),
    (b"bytes=--1", None),
    (b"bytes=1-2-3", None),
    (b"bytes=" + b"9" * 5000 + b"-", None),
    (b"bytes=\xb2-\xb3", None),
    (b"lines=0-9", None),
    (b"", None),
]


@pytest.mark.parametrize("field, expected", RANGES)
def test_ranges_are_those_of_rfc_9110(field, expected):
    assert ranges(field) == expected


@pytest.mark.parametrize("field", [
    b"bytes=10000-", b"bytes=10000-10001", b"bytes=-0", b"bytes=20000-,-0",
])
def test_a_range_behind_the_end_is_answered_with_the_length(field):
    with pytest.raises(RangeNotSatisfiable) as caught:
        ranges(field)
    assert caught.value.status == 416
    assert caught.value.fields == ((b"content-range", b"bytes */10000"),)


def test_ranges_of_nothing_are_ignored():
    assert ranges(b"bytes=0-", 0) is None
    assert ranges(b"bytes=-5", 0) is None


@pytest.mark.parametrize("method", [b"HEAD", b"POST"])
def test_only_a_get_has_ranges(method):
    request = made((b"range", b"bytes=0-0"), method=method)
    assert byte_ranges(request, ETAG, MODIFIED, 10) is None


@pytest.mark.parametrize("condition, is_sent", [
    (b'"xyzzy"', True),
    (b'"other"', False),
    (b'W/"xyzzy"', False),
    (EXACT, True),
    (BEFORE, False),
    (AFTER, False),
    (b"xyzzy", False),
])
def test_a_range_is_sent_if_the_rest_is_the_same(condition, is_sent):
    # RFC 9110 section 13.1.5
    request = made((b"range", b"bytes=1-2"), (b"if-range", condition))
    found = byte_ranges(request, ETAG, MODIFIED, 10)
    assert found == ([(1, 3)] if is_sent else None)


@given(
    st.integers(1, 60),
    st.lists(
        st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted)
        | st.tuples(st.integers(0, 70), st.none())
        | st.tuples(st.none(), st.integers(0, 70)),
        min_size=1,
        max_size=8,
    ),
)
def test_ranges_are_just_the_wanted_bytes_each_once(length, specs):
    places, wanted = range(length), set()
    for first, last in specs:
        stop = None if last is None else last + 1
        start = -last if first is None else first
        wanted.update(places[max(start, -length):stop] if first is not None
                      else places[max(0, length - last):])
    field = b",".join(
        b"%b-%b" % tuple(b"" if n is None else b"%d" % n for n in spec)
        for spec in specs
    )
    try:
        found = ranges(b"bytes=" + field, length)
    except RangeNotSatisfiable:
        found = []
    sent = [n for start, stop in found for n in range(start, stop)]
    assert sorted(sent) == sorted(wanted)


@given(st.binary() | st.text("bytes=0123456789-, ").map(str.encode))
def test_any_range_field_is_read_or_ignored(field):
    try:
        found = ranges(field, 100)
    except RangeNotSatisfiable:
        return
    assert found is None or all(0 <= x < y <= 100 for x, y in found)


def test_content_range_counts_the_last_byte():
    # RFC 9110 section 14.4
    assert content_range(42, 1234, 1234) == b"bytes 42-1233/1234"
    assert content_range(0, 1, 10) == b"bytes 0-0/10"


ALL = ("br", "gzip", "identity")

#: (Accept-Encoding, what is chosen among ALL), RFC 9110 12.5.3 first
CODINGS = [
    (b"compress, gzip", "gzip"),
    (b"", "identity"),
    (b"*", "br"),
    (b"compress;q=0.5, gzip;q=1.0", "gzip"),
    (b"gzip;q=1.0, identity; q=0.5, *;q=0", "gzip"),
    (None, "identity"),
    (b"gzip, deflate, br, zstd", "br"),
    (b"gzip;q=0", "identity"),
    (b"gzip;q=0.000", "identity"),
    (b"gzip;q=0, *", "br"),
    (b"br;q=0, *", "gzip"),
    (b"identity;q=0", None),
    (b"*;q=0", None),
    (b"*;q=0, identity", "identity"),
    (b"identity;q=0, gzip", "gzip"),
    (b"identity;q=0, *;q=0.1", "br"),
    (b"br;q=0.5, gzip", "gzip"),
    (b"br;q=0.5, gzip;q=0.5", "br"),
    (b"identity, br;q=0.5", "identity"),
    (b"identity;q=0.5, br;q=0.001", "identity"),
    (b"br;q=0.001", "br"),
    (b"GZIP;Q=1", "gzip"),
    (b"x-gzip", "gzip"),
    (b"\tgzip ;\tq=1 ,", "gzip"),
    (b"gzip;q=1, gzip;q=0", "identity"),
    (b"gzip;q=2", "identity"),
    (b"gzip;q=-1", "identity"),
    (b"gzip;q=", "identity"),
    (b"gzip;q=0.1234", "identity"),
    (b"gzip;level=9", "identity"),
    (b"br;q=nan, gzip;q=0.2", "gzip"),
    (b"brr, gzipp", "identity"),
    (b",;=\x00\xff", "identity"),
    (b"zstd", "identity"),
]


@pytest.mark.parametrize("field, expected", CODINGS)
def test_the_coding_is_the_one_the_client_likes(field, expected):
    assert choose(ALL, field) == expected


def test_between_equal_weights_the_smallest_body_wins():
    assert choose(("gzip", "br", "identity"), b"br, gzip") == "gzip"
    assert choose(("identity", "br"), b"br, identity") == "identity"


@given(
    st.permutations(ALL),
    st.lists(
        st.tuples(
            st.sampled_from(["br", "gzip", "identity", "*", "zstd"]),
            st.sampled_from(["", ";q=0", ";q=0.0", ";q=0.3", ";q=1", ";q=x"]),
        )
    ),
)
def test_a_refused_coding_is_never_served(offers, elements):
    field = ", ".join(coding + weight for coding, weight in elements)
    chosen = choose(tuple(offers), field.encode())
    refused = {coding for coding, weight in elements
               if weight in (";q=0", ";q=0.0")}
    named = {coding for coding, _ in elements}
    assert chosen not in refused
    assert chosen in named or "*" in named or chosen in ("identity", None)
    if "*" in refused:
        assert chosen is None or chosen in named


@given(st.binary())
def test_any_accept_encoding_is_answered(field):
    assert choose(ALL, field) in (*ALL, None)


@given(st.binary(max_size=200), st.data())
def test_a_slice_yields_its_bytes_and_no_others(tmp_path_factory, body, data):
    path = tmp_path_factory.mktemp("slice") / "file"
    path.write_bytes(body)
    start = data.draw(st.integers(0, len(body)))
    stop = data.draw(st.integers(start, len(body)))
    fd = os.open(path, os.O_RDONLY)
    source = FileSlice(fd, start, stop - start, lambda: True)
    assert source.length == stop - start
    assert drained(source, data.draw(st.integers(1, 50))) == body[start:stop]
    source.close()


def test_a_slice_is_closed_once(opened):
    fd = opened(b"abc")
    source = FileSlice(fd, 0, 3, lambda: True)
    source.close()
    again = os.dup(1)
    assert again == fd
    source.close()
    assert is_open(again)
    os.close(again)
    with pytest.raises(SourceChanged):
        source.read(1)


def test_a_file_that_became_shorter_is_noticed(opened, tmp_path):
    source = FileSlice(opened(b"x" * 100), 0, 100, lambda: True)
    assert source.read(50) == b"x" * 50
    os.truncate(tmp_path / "file", 60)
    with pytest.raises(SourceChanged):
        source.read(50)
    source.close()


def test_a_change_is_looked_for_after_each_read(opened, tmp_path):
    path = tmp_path / "file"
    fd = opened(b"old bytes")
    seen = os.fstat(fd).st_ino
    source = FileSlice(fd, 0, 9, lambda: os.stat(path).st_ino == seen)
    assert source.read(3) == b"old"
    (tmp_path / "new").write_bytes(b"new bytes")
    os.rename(tmp_path / "new", path)
    with pytest.raises(SourceChanged):
        source.read(3)
    source.close()


def test_parts_share_a_file_that_is_closed_with_the_whole(opened):
    fd = opened(b"0123456789")
    source = FileSlice(fd, 0, 10, lambda: True)
    one, two = source.part(1, 3), source.part(6, 10)
    assert (one.read(9), two.read(2), two.read(9)) == (b"12", b"67", b"89")
    assert is_open(fd)
    source.close()
    assert not is_open(fd)


def test_a_chain_is_one_body(opened):
    fd = opened(b"0123456789")
    source = FileSlice(fd, 0, 10, lambda: True)
    parts = [b"<", source.part(2, 4), b"", b"><", source.part(0, 1), b">"]
    chain = Chain(parts, source)
    assert chain.length == 7
    assert [chain.read(4), chain.read(4), chain.read(4)] == [
        b"<23>", b"<0>", b""]
    chain.close()
    chain.close()
    assert not is_open(fd)


def test_a_chain_left_early_closes_its_file(opened):
    fd = opened(b"0123456789")
    source = FileSlice(fd, 0, 10, lambda: True)
    chain = Chain([b"<", source.part(2, 4)], source)
    assert chain.read(1) == b"<"
    chain.close()
    assert not is_open(fd)


@pytest.mark.parametrize("is_memory", [True, False])
def test_several_ranges_are_a_multipart_body(opened, is_memory):
    content = bytes(range(256)) * 40
    body = content if is_memory else FileSlice(
        opened(content), 0, len(content), lambda: True)
    wanted = [(0, 1), (500, 1000), (9999, 10240)]
    fields, chain = multipart_ranges(body, wanted, b"image/png", b"THIS")
    fields, length = dict(fields), chain.length
    sent = drained(chain, 100)
    chain.close()
    assert int(fields[b"content-length"]) == length == len(sent)
    assert fields[b"content-type"] == b"multipart/byteranges; boundary=THIS"
    empty, *parts, end = sent.split(b"\r\n--THIS")
    assert (empty, end) == (b"", b"--\r\n")
    for (start, stop), part in zip(wanted, parts, strict=True):
        names, _, piece = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        assert piece == content[start:stop]
        assert names.split(b"\r\n") == [
            b"content-type: image/png",
            b"content-range: " + content_range(start, stop, len(content))]


def test_the_standard_library_reads_the_multipart_body():
    fields, chain = multipart_ranges(
        b"0123456789", [(0, 2), (7, 9)], b"text/plain", b"THIS")
    text = b"Content-Type: " + fields[0][1] + b"\r\n\r\n" + chain.read(9999)
    message = email.message_from_bytes(text)
    found = [part.get_payload() for part in message.get_payload()]
    assert found == ["01", "78"]
