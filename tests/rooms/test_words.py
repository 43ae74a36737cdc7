"""Room 1, Words."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    GIB,
    KIB,
    MIB,
    Deadline,
    NetworkAddress,
    ShimmerCatError,
    YamlSheet,
    http_date,
    nearest,
    parse_http_date,
    parse_size,
    size_text,
)

# 1 January 1970 to 31 December 9999, whole seconds
MOMENTS = st.integers(min_value=0, max_value=253_402_300_799)
PORTS = st.integers(min_value=1, max_value=65_535)
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
ADDRESSES = st.one_of(
    st.builds("{}:{}".format, st.ip_addresses(v=4), PORTS),
    st.builds("[{}]:{}".format, st.ip_addresses(v=6), PORTS),
    st.builds(lambda labels, port: f"lookup({'.'.join(labels)}):{port}",
              st.lists(LABELS, min_size=1, max_size=4), PORTS),
    st.builds("unix:///{}".format,
              st.from_regex(r"[a-z/._ -]{1,90}", fullmatch=True)),
    st.builds("socket-fd://{}".format, st.integers(0, 999_999)))


@pytest.fixture
def entry(tmp_path):
    """Entry of a YAML text, as a function."""
    def of(text):
        sheet = YamlSheet(tmp_path / "x.yaml")
        sheet.path.write_text(text)
        return sheet.root()
    return of


@pytest.mark.parametrize(("text", "moment"), [
    ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),  # RFC 9110 5.6.7
    ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
    ("Sun Nov  6 08:49:37 1994", 784111777),
    ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ("Thu, 29 Feb 2024 23:59:59 GMT", 1709251199),
    ("Sat, 31 Dec 2016 23:59:60 GMT", 1483228800),  # a leap second
    ("Thu, 30 Feb 2024 00:00:00 GMT", None),
    ("Sun, 06 Nov 1994 08:49:37 CET", None),
    ("Sun, 06 Nov 1994 25:49:37 GMT", None),
    ("Sun, 06 Nov 1994 08:49:37 GMT; length=9", None),
    ("784111777", None),
    ("0", None),
    ("", None),
    ("\0" * 100_000, None),
])
def test_a_date_is_read_in_all_three_forms_and_no_other(text, moment):
    assert parse_http_date(text) == moment


@given(MOMENTS)
def test_a_written_date_is_read_as_the_same_moment(moment):
    assert parse_http_date(http_date(moment)) == moment


def test_a_date_is_written_as_rfc_9110_shows_it():
    assert http_date(784111777.9) == "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(("text", "size"), [
    (0, 0), ("0", 0), ("64", 64), (65536, 65536), ("64 bytes", 64),
    ("1 byte", 1), ("64 KiB", 64 * KIB), ("64KB", 64 * KIB),
    ("64k", 64 * KIB), ("64 kib", 64 * KIB), ("2MB", 2 * MIB),
    ("3 GiB", 3 * GIB), ("7B", 7),
])
def test_a_size_is_read_with_and_without_its_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [
    "", " ", "KiB", "-1", "1.5 MiB", "1e3", "0x10", "1 TiB", "64 KiB 2",
    "64\nKiB", "1_000", "٣ KiB", True, None, "9" * 16,
])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="expected a size such as 64 KiB"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=10 ** 15 - 1))
def test_a_written_size_is_read_as_the_same_number(size):
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize(("word", "known"), [
    ("root-dri", "root-dir"),
    ("root_dir", "root-dir"),
    ("ROOT-DIR", "root-dir"),
    ("consultnat", "consultant"),
    ("view-dir", "views-dir"),
    ("completely-else", None),
    ("", None),
    ("x" * 1_000_000, None),
])
def test_the_nearest_known_word_is_found(word, known):
    assert nearest(word, ["root-dir", "views-dir", "consultant"]) == known


def test_nothing_is_near_when_nothing_is_known():
    assert nearest("root-dir", []) is None


def test_a_deadline_passes_when_its_time_is_over():
    assert Deadline(0).passed()
    assert Deadline(-5).left() == 0
    late = Deadline(60)
    assert not late.passed()
    assert 59 < late.left() <= 60


@pytest.mark.parametrize(("text", "family", "written"), [
    ("1.2.3.4:80", "inet", "1.2.3.4:80"),
    ("0.0.0.0:4043", "inet", "0.0.0.0:4043"),
    ("4043", "inet", "127.0.0.1:4043"),
    (":4043", "inet", "127.0.0.1:4043"),
    ("lookup(host.name):3090", "lookup", "lookup(host.name):3090"),
    ("unix:///path/to/socket", "unix", "unix:///path/to/socket"),
    ("socket-fd://3", "fd", "socket-fd://3"),
    ("[::1]:80", "inet6", "[::1]:80"),
    ("[::]:443", "inet6", "[::]:443"),
    ("[2001:db8::7]:65535", "inet6", "[2001:db8::7]:65535"),
])
def test_an_address_is_read_in_all_published_forms(text, family, written):
    address = NetworkAddress.parse(text)
    assert (address.family, str(address)) == (family, written)


@pytest.mark.parametrize("text", [
    "", ":", "0", "65536", "99999", "-1", "80 ", " 80", "80\n", "http",
    "1.2.3.4", "1.2.3:80", "1.2.3.256:80", "1.2.3.4:0", "1.2.3.4:http",
    "host.name:80", "lookup(host.name)", "lookup():80", "lookup(a b):80",
    "lookup(-a.b):80", "lookup(a..b):80", "lookup(a_b):80", "::1:80",
    "[::1]", "[::1]:", "[1.2.3.4]:80", "[::g]:80", "unix://relative",
    "unix:///", "unix:///a\0b", "unix:///" + "a" * 107,
    "unix:///" + "ü" * 54, "socket-fd://", "socket-fd://x",
    "http://1.2.3.4:80", "٨٠",
])
def test_what_is_no_address_is_refused_with_all_forms_named(text):
    with pytest.raises(ValueError, match=r"lookup\(host\):80"):
        NetworkAddress.parse(text)


@given(ADDRESSES)
def test_an_address_is_written_as_it_was_read(text):
    assert str(NetworkAddress.parse(text)) == text


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text):
    try:
        address = NetworkAddress.parse(text)
    except ValueError:
        return
    assert NetworkAddress.parse(str(address)) == address


def test_a_mistake_names_file_line_keys_value_and_expectation(entry):
    def refuse(_child):
        raise ValueError("expected more")
    top = entry("a:\n  b:\n    c: 5\n")
    top.fields()["a"].fields()["b"].fields()["c"].take(refuse)
    assert top.sheet.mistakes() == [
        f"{top.sheet.path}:3: a > b > c: got '5', expected more"]


def test_an_error_of_the_program_is_a_mistake_of_the_entry(entry):
    def refuse(_child):
        raise ShimmerCatError("column 3: expected a star")
    top = entry("[x]")
    assert top.items()[0].take(refuse) is None
    assert "1: got 'x', column 3: expected a star" in top.sheet.mistakes()[0]


def test_a_key_given_twice_is_a_mistake_and_the_first_counts(entry):
    top = entry("a: 1\nb: 2\na: 3\n")
    assert top.fields()["a"].node.value == "1"
    assert top.sheet.mistakes() == [
        f"{top.sheet.path}:3: a: given twice; the first is in line 1"]


def test_an_alias_is_named_where_it_is_used_and_not_where_it_points(entry):
    top = entry("a: &it x\nb: 1\nc: *it\n")
    assert top.fields()["c"].line == 3


@pytest.mark.parametrize(("text", "place"), [
    (b"a: [", ":1:5: not YAML: "),
    (b"a: 1\n  b: 2\n", ":2:4: not YAML: "),
    (b"a:\n\tb: 1\n", ":2:1: not YAML: "),
    (b"a: *nothing\n", ":1:4: not YAML: "),
    (b"a: 1\n---\nb: 2\n", ":2:1: not YAML: "),
    (b"a: \xff\n", ": not YAML: "),
    (b"a: \0\n", ": not YAML: "),
    (b"[" * 5000, ": cannot be read: "),
])
def test_what_is_no_yaml_is_a_mistake_with_its_place(tmp_path, text, place):
    sheet = YamlSheet(tmp_path / "x.yaml")
    sheet.path.write_bytes(text)
    assert sheet.root() is None
    assert sheet.mistakes()[0].startswith(f"{sheet.path}{place}")


def test_a_file_that_is_not_there_is_a_mistake(tmp_path):
    sheet = YamlSheet(tmp_path / "none.yaml")
    assert sheet.root() is None
    assert sheet.mistakes() == [
        f"{sheet.path}: cannot be read: No such file or directory"]


def test_entries_that_contain_themselves_do_no_harm(entry):
    top = entry("a: &a [*a]")
    assert isinstance(top.fields()["a"].items()[0].node, yaml.SequenceNode)
