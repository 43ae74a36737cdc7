"""Rooms 4, 4c and 11b: C reads fields as Python does."""

import harness
import pytest
from exchanges import request_for
from hypothesis import example, given
from hypothesis import strategies as st

import shimmercat
from shimmercat import BadRequest, Headers, Request, upstream_fields

LINE = [(b":method", b"GET"), (b":scheme", b"https"),
        (b":authority", b"a.example"), (b":path", b"/a?b=c")]
AGENT = (b"user-agent", b"x/1")
ODD = st.one_of(st.binary(max_size=4), st.sampled_from([
    b"", b"\t x", b"x ", b"a\0b", b"a\r\nb", b"\x7f", b"\xff", b"x" * 300]))
NAMES = st.one_of(ODD, st.sampled_from([
    b"accept", b"Accept", b"x_forwarded_for", b"X-Forwarded-For", b"x-own",
    b"x-forwarded-ssl", b"x-real-ip", b"proxy", b"proxy-x", b"proxy_x",
    b"connection", b"Connection", b"keep-alive", b"proxy-connection", b"te",
    b"upgrade", b"transfer-encoding", b"Content-Length", b"content-length",
    b"cookie", b"forwarded", b"host", b"http2-settings", b"via", b"date",
    b"proxy-authenticate", b"x-forwarded-host", b"x-forwarded-proto"]))
VALUES = st.one_of(ODD, st.sampled_from([
    b"keep-alive", b"close", b"Keep-Alive, x-own", b"chunked", b"1024"]))
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
PSEUDO = st.one_of(
    st.tuples(st.just(b":method"), st.one_of(ODD, st.sampled_from(
        [b"GET", b"get", b"OPTIONS", b"CONNECT", b"M-1", b"x" * 65]))),
    st.tuples(st.just(b":scheme"), st.sampled_from(
        [b"https", b"http", b"HTTPS", b"ftp", b""])),
    st.tuples(st.just(b":path"), st.one_of(
        ODD, st.binary(max_size=8).map(b"/".__add__),
        st.integers(32, 127).map(lambda n: b"/%c?%c" % (n, n)),
        st.sampled_from([b"*", b"/", b"/?a\\?", b"/a\\", b"/" * 8193]))),
    st.tuples(st.sampled_from([b":authority", b":protocol", b":odd"]),
              st.sampled_from([b"a.example", b"websocket"])))
HEADS = st.one_of(
    st.tuples(st.permutations(LINE), FIELDS).map(lambda x: [*x[0], *x[1]]),
    st.tuples(st.lists(PSEUDO, max_size=3), st.permutations(LINE), FIELDS).map(
        lambda x: [*{**dict(x[1]), **dict(x[0])}.items(), *x[2]]),
    st.lists(st.one_of(PSEUDO, st.tuples(NAMES, VALUES)), max_size=8))

pytestmark = pytest.mark.skipif(
    shimmercat._native_fields is None, reason="the extension is not built")


def assert_alike(work):
    """Does the work with C and without: values or refusals are the same."""
    def outcome():
        try:
            return work()
        except BadRequest as error:
            return type(error), str(error)

    native = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shimmercat, "_native_fields", None)
        assert outcome() == native


@given(HEADS)
@example([*LINE, AGENT, (b":late", b"")])
@example([*LINE, LINE[0]])
def test_heads_of_requests_are_read_alike(fields):
    assert_alike(lambda: shimmercat._read_head(fields))


@given(FIELDS, st.booleans())
@example([(b"connection", b"x-own"), (b"x-own", b"1")], False)
def test_fields_for_applications_are_chosen_alike(fields, trusted):
    request = request_for("/")
    request.headers = Headers(fields)
    assert_alike(lambda: upstream_fields(request, trusted))


@given(FIELDS, st.sampled_from([101, 103, 200, 204, 304]))
@example([(b"x", b"1")] * 300, 200)
@example([(b"Content-Length", b" 7"), (b"content-length", b"7")], 200)
def test_fields_of_answers_are_read_alike(lines, status):
    assert_alike(lambda: shimmercat._read_answer(lines, status))


def test_the_usual_is_read_in_c():
    native = shimmercat._native_fields
    lines = [(b"Content-Length", b"3"), (b"Connection", b"keep-alive"),
             (b"X-Own", b" 1")]
    assert native.request([*LINE, AGENT]) == (
        "GET", "https", "/a?b=c", b"a.example", None, [AGENT])
    assert native.passed([AGENT, (b"te", b"trailers")], False) == [AGENT]
    assert native.answer(lines, 200) == (
        [(b"content-length", b"3"), (b"x-own", b"1")], None, None, b"3", False)


def test_a_name_of_one_letter_is_another_one_in_lower_case():
    lines = [(b"Q", b"1"), (b"QQ"[:1], b"1")]
    kept, *_ = shimmercat._read_answer(lines, 200)
    assert kept == [(b"q", b"1")] * 2
    assert (lines[0][0], b"Q".lower()) == (bytes([81]), bytes([113]))


@pytest.mark.parametrize("call", [
    lambda x: x.request(()), lambda x: x.request([1]),
    lambda x: x.request([("a", "b")]), lambda x: x.passed([(b"a",)], True),
    lambda x: x.passed(None, True), lambda x: x.passed([]),
    lambda x: x.answer([None], 200), lambda x: x.answer([], "200"),
    lambda x: x.answer([(b"a", b"b", b"c")], 200)])
def test_what_are_no_fields_is_left_to_python(call):
    assert call(shimmercat._native_fields) is None


def test_a_request_is_made_of_what_was_read():
    request = Request.from_fields([*LINE, AGENT], "h2", "192.0.2.1")
    assert (request.path, request.query) == ("/a", "b=c")
    assert request.headers.get(b"user-agent") == b"x/1"


DRIVER = """
WORDS = [b":method", b":path", b":scheme", b":authority", b"/", b"GET", b"",
         b"https", b"x" * 300, b"Q", b"Connection", b"keep-alive", b" a\\t",
         b"content-length", b"Upgrade", b"te", b"x_y", b"\\0", None, "text"]
for _ in range(100_000):
    fields = [tuple(letters.choices(WORDS, k=letters.choice((2, 2, 2, 2, 3))))
              for _ in range(letters.randrange(6))]
    kept = [*fields]
    module.request(fields)
    module.passed(fields, letters.random() < 0.5)
    module.answer(fields, letters.choice((103, 200, 204)))
    assert fields == kept
"""


def test_no_fields_break_a_rule_of_c(tmp_path):
    harness.run_sanitized(tmp_path, "fields", DRIVER)
