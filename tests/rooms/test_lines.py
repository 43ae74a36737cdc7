"""Room 2, Messages: C packs and writes what Python does."""

import itertools
import os
import struct

import harness
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import shimmercat
from shimmercat import MESSAGES, Console, LogRecord, Severity

STYLES = list(itertools.product(("text", "json"), (False, True)))
PIECES = ("192.0.2.7", "GET", "www.example.com", "/a.css?v=3", "200", "1024",
          "0.5", "h2", "static", "br")

NUMBERS = st.one_of(
    st.integers(0, 10 ** 16).map(str),
    st.from_regex(r"[0-9]{1,17}(\.[0-9]{0,10})?", fullmatch=True),
    st.floats(0, 1e6).map(lambda x: f"{x:.1f}"))
WORDS = st.one_of(
    NUMBERS, st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    st.text(max_size=4), st.sampled_from(PIECES))
REQUESTS = st.builds(
    LogRecord, st.sampled_from(["w0", "w0-12", "worker-77", "", 'w"', "\xe9"]),
    st.one_of(st.integers(0, 2 ** 33 * 10 ** 6).map(lambda x: x / 1e6),
              st.floats(-1e9, 2.5e11)),
    st.just(5), st.just(50001),
    st.one_of(st.lists(WORDS, min_size=10, max_size=10),
              st.lists(WORDS, max_size=12)).map(tuple))
RECORDS = st.one_of(REQUESTS, REQUESTS, st.builds(
    LogRecord, st.just("w0"), st.just(1.5), st.integers(0, 6),
    st.sampled_from(sorted(MESSAGES)), st.lists(WORDS, max_size=3).map(tuple)))

SAID = st.builds(
    LogRecord, st.sampled_from(["w0", "w0-12", "worker-77", "", "\xe9" * 5]),
    st.one_of(st.floats(0, 2.5e11), st.integers(0, 2 ** 33)),
    st.one_of(st.sampled_from(Severity), st.integers(0, 255)),
    st.integers(0, 65_535), st.lists(st.one_of(
        WORDS, st.integers(), st.floats(), st.none(), st.just("\0a\0"),
        st.text(), st.just("\udcff"), st.builds(str.__mul__, st.just("x"),
                                                st.integers(65_530, 65_540)),
    ), max_size=6).map(tuple))

needs_native = pytest.mark.skipif(
    shimmercat._native_lines is None, reason="the extension is not built")


def request(*changed):
    """A request's record, with some of its last pieces changed."""
    return LogRecord("w0", 1500000000.25, 5, 50001,
                     PIECES[:len(PIECES) - len(changed)] + changed)


def written(form, colour, packed, record_by_record=False):
    """What a console that nobody reads has queued."""
    console = Console(1, form, colour)
    if record_by_record:
        console._request_lines = lambda packed, place: (b"", 0, place)
    console.take(packed, "sc_log_w0")
    ((lines, count),) = console._lines
    os.close(console._fd)
    return lines, count


@needs_native
@pytest.mark.parametrize("form, colour", STYLES)
@given(st.lists(RECORDS, min_size=1, max_size=8))
@example([request("0.0", "h2", "static", "br")])
@example([request("1.50", "h2", "static", "00012")])
@example([request("0.00001", "0.0001", "123456789012345.5", "1.")])
@example([request('"', "\\", "\x7f", " ")])
def test_lines_in_c_are_those_of_python(form, colour, records):
    packed = b"".join(record.pack() for record in records)
    assert written(form, colour, packed) == written(
        form, colour, packed, record_by_record=True)


@needs_native
@pytest.mark.parametrize("form, colour", STYLES)
@given(st.lists(RECORDS, max_size=3), st.data())
def test_octets_that_are_no_record_are_told_alike(form, colour, records,
                                                  data):
    packed = bytearray(b"".join(x.pack() for x in [*records, request()]))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] = data.draw(st.integers(0, 255))
    packed = bytes(packed[:data.draw(st.integers(place + 1, len(packed)))])
    # A line about what is malformed has the time at which it was made.
    seen, expected = [written(form, colour, packed, each)
                      for each in (False, True)]
    assert seen[1] == expected[1]
    for line, other in zip(*(lines.splitlines() for lines, _ in (
            seen, expected)), strict=True):
        assert line == other or b"M60007" in line and b"M60007" in other


@needs_native
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_lines_of_requests_are_written_in_c(form):
    console = Console(1, form)
    packed = request().pack() * 3 + request("\xe9").pack()
    lines, count, place = console._request_lines(packed, 0)
    assert (lines.count(b"\n"), count) == (3, 3)
    assert place == 3 * len(request().pack())
    assert console._request_lines(packed, place) == (b"", 0, place)
    os.close(console._fd)


@needs_native
@pytest.mark.parametrize("change", [
    {0: "50001"}, {2: "text"}, {4: b"{}" * 17}, {5: (b"few",)},
    {5: ("text",) * 10}, {5: 7}, {6: "text"}, {7: -1}, {7: 28}])
def test_a_wrong_call_is_refused(change):
    arguments = [50001, 5, b"M50001", b"info", b"{}" * 10, (b"name",) * 10,
                 bytes(27), 0]
    assert shimmercat._native_lines(*arguments) == (b"", 0, 0)
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises((TypeError, ValueError, IndexError, OverflowError)):
        shimmercat._native_lines(*arguments)


@needs_native
@given(st.lists(SAID, max_size=5))
@example([LogRecord("w0", 1e9 + 0.999_999_9, 5, 50001, ())])
@example([LogRecord("w0", -1.5, 5, 50001, ("x",))])
def test_records_are_packed_in_c_as_in_python(records):
    assert LogRecord.pack_all(records) == b"".join(
        record.pack() for record in records)


@needs_native
@pytest.mark.parametrize("records, error", [
    ((), TypeError), ([None], AttributeError), ([(1, 2)], AttributeError),
    ([request()._replace(code=65_536)], struct.error),
    ([request()._replace(severity=-1)], struct.error),
    ([request()._replace(worker="\udcff")], UnicodeEncodeError),
    ([request(), request()._replace(moment="x")], TypeError),
])
def test_what_python_cannot_pack_is_refused_alike(records, error):
    with pytest.raises(error):
        shimmercat._native_pack(records)


@needs_native
@given(st.lists(st.builds(lambda n: request("x" * n), st.one_of(
    st.integers(0, 500), st.integers(0, 40_000))), max_size=60))
def test_records_are_put_into_messages_by_c_as_by_python(records):
    packed = LogRecord.pack_all(records)
    native = shimmercat._bundles(packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shimmercat, "_native_bundles", None)
        assert shimmercat._bundles(packed) == native
    assert b"".join(message for _, message in native) == packed
    assert all(len(message) <= 32_768 or count == 1
               for count, message in native)


@needs_native
@pytest.mark.parametrize("packed", [
    b"x", request().pack()[:-1], request().pack() + b"x"])
def test_what_is_not_whole_is_put_into_no_message(packed):
    with pytest.raises(ValueError, match="no whole record"):
        shimmercat._native_bundles(packed, 32_768)


# Random octets, most of them nearly records, under the sanitizers.
DRIVER = """
good = bytes.fromhex(sys.argv[3])
for _ in range(20_000):
    packed = bytearray(good * letters.randrange(1, 4))
    for _ in range(letters.randrange(3)):
        packed[letters.randrange(len(packed))] = letters.randrange(256)
    packed = bytes(packed[:letters.randrange(len(packed) + 1)])
    for fields in None, (b"name",) * 10:
        lines, count, end = module.lines(
            50001, 5, b"M50001", b"info", b"{} " * 10, fields, packed, 0)
        assert lines.count(b"\\n") == count and end <= len(packed)
    try:
        messages = module.bundles(packed, letters.randrange(300))
        assert b"".join(message for _, message in messages) == packed
    except ValueError:
        pass
module.lines(50001, 5, b"M50001", b"info", b"{} " * 10, (b"longer" * 9,) * 10,
             good * 20_000, 0)

class Said(tuple):
    def pack(self):
        said.clear()
        return b"packed"

class Odd:
    def __str__(self):
        if letters.random() < 0.1:
            raise RuntimeError
        return "odd" * letters.randrange(1000)

for _ in range(5_000):
    said = [Said((letters.choice(["w0", "worker-12345", "", None]),
                  letters.choice([1.5, -1.0, 1e300, float("nan"), 7]),
                  letters.choice([5, -1, 1 << 70]), 50001,
                  tuple(letters.choice(["text", 7, "\\0", Odd(), "\\xe9"])
                        for _ in range(letters.randrange(12)))))
            for _ in range(letters.randrange(40))]
    try:
        module.pack(said)
    except RuntimeError:
        pass
"""


@needs_native
def test_no_octets_break_a_rule_of_c(tmp_path):
    harness.run_sanitized(tmp_path, "lines", DRIVER, request().pack().hex())
