"""RFC 7541, header compression for HTTP/2, over TLS.

A decoder is judged by what it does with :path: the table of the server and
ours are the same when a request made of indexes brings the right file.
"""

import frames
import pytest
from frames import (
    COMPRESSION_ERROR,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    answered,
    body,
    connection_error,
    frame,
    integer,
    literal,
    text,
)
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
#: the first eight bits set, and more ones than any padding may have
EOS = b"\xff\xff\xff\xff"
#: indexes of the static table (Appendix A)
AUTHORITY, GET, PATH, HTTPS, USER_AGENT = 1, 2, 4, 7, 58
LAST_STATIC = 61
FIRST_DYNAMIC, SECOND_DYNAMIC = 62, 63
INDEXED, INDEXING, RESIZE, NEVER = 0x80, 0x40, 0x20, 0x10
#: octets of the table that every connection begins with (RFC 9113, 6.5.2)
TABLE = 4096


def request(octets, stream=1, flags=END_HEADERS | END_STREAM):
    """A HEADERS frame with a block made by hand."""
    return frame(HEADERS, flags, stream, octets)


def indexed(index):
    """An indexed field (section 6.1)."""
    return integer(index, 7, INDEXED)


def resize(octets):
    """A dynamic table size update (section 6.3)."""
    return integer(octets, 5, RESIZE)


def huffman(octets):
    """A string with Huffman coding (section 5.2)."""
    coded = HUFFMAN.encode(octets)
    return integer(len(coded), 7, 0x80) + coded


def authority(client):
    """:authority as a literal that leaves the table alone."""
    return integer(AUTHORITY, 4) + text(client.target.authority)


def start(client):
    """A request's block with everything but :path."""
    return indexed(GET) + indexed(HTTPS) + authority(client)


def plain_path(client):
    """:path as a literal that leaves the table alone."""
    return integer(PATH, 4) + text(client.target.path)


def kept_path(client):
    """:path as a literal that enters the dynamic table."""
    return integer(PATH, 6, INDEXING) + text(client.target.path)


def path_size(client):
    """What :path takes in the dynamic table (section 4.1)."""
    return len(b":path") + len(client.target.path) + 32


def filler(size):
    """A field that enters the dynamic table and takes `size` octets there."""
    return literal(b"x", b"y" * (size - 33), INDEXING)


def whole(client):
    """A good block of indexes and literals without indexing."""
    return start(client) + plain_path(client)


BAD = connection_error(COMPRESSION_ERROR)


def case(name, octets, outcome):
    """A row: the block (a function of the client), how it must end."""
    return pytest.param(octets, outcome, id=name)


@pytest.mark.parametrize("octets, outcome", [
    case("6.1-indexes-of-the-static-table", whole, answered(1)),
    case("6.1-index-0", lambda c: whole(c) + b"\x80", BAD),
    case("2.3.3-first-index-of-an-empty-table",
         lambda c: whole(c) + indexed(FIRST_DYNAMIC), BAD),
    case("2.3.3-index-far-beyond-the-tables",
         lambda c: whole(c) + indexed(70_000), BAD),
    case("2.3.3-index-behind-the-last-entry",
         lambda c: start(c) + kept_path(c) + indexed(SECOND_DYNAMIC), BAD),
    case("2.3.3-last-index-of-the-static-table",
         lambda c: whole(c) + indexed(LAST_STATIC), answered(1)),
    case("6.2.1-name-of-the-static-table", lambda c: start(c) + kept_path(c),
         answered(1)),
    case("6.2.1-new-name", lambda c: start(c) + literal(
        b":path", c.target.path, INDEXING
    ), answered(1)),
    case("6.2.1-name-of-the-dynamic-table", lambda c: whole(c)
         + literal(b"x-name", b"1", INDEXING)
         + integer(FIRST_DYNAMIC, 6, INDEXING) + text(b"2"), answered(1)),
    case("6.2.1-name-of-an-empty-table", lambda c: whole(c) + integer(
        FIRST_DYNAMIC, 6, INDEXING) + text(b"v"), BAD),
    case("6.2.2-new-name", lambda c: start(c) + literal(
        b":path", c.target.path
    ), answered(1)),
    case("6.2.2-name-of-an-empty-table", lambda c: whole(c) + integer(
        FIRST_DYNAMIC, 4) + text(b"v"), BAD),
    case("6.2.2-enters-no-table", lambda c: start(c) + plain_path(c)
         + indexed(FIRST_DYNAMIC), BAD),
    case("6.2.3-name-of-the-static-table", lambda c: start(c) + integer(
        PATH, 4, NEVER) + text(c.target.path), answered(1)),
    case("6.2.3-new-name", lambda c: start(c) + literal(
        b":path", c.target.path, NEVER
    ), answered(1)),
    case("6.2.3-name-of-an-empty-table", lambda c: whole(c) + integer(
        FIRST_DYNAMIC, 4, NEVER) + text(b"v"), BAD),
    case("6.2.3-enters-no-table", lambda c: start(c) + integer(
        PATH, 4, NEVER) + text(c.target.path) + indexed(FIRST_DYNAMIC), BAD),
    case("6.2-block-ends-before-the-name",
         lambda c: whole(c) + bytes([INDEXING]), BAD),
    case("6.2-block-ends-before-the-value",
         lambda c: whole(c) + bytes([INDEXING]) + text(b"x"), BAD),
    case("6.2-block-ends-behind-an-index",
         lambda c: whole(c) + integer(USER_AGENT, 6, INDEXING), BAD),
])
def test_fields_are_represented_as_section_6_says(client, octets, outcome):
    client.send(request(octets(client)))
    outcome(client)


@pytest.mark.parametrize("octets, outcome", [
    case("5.1-integer-in-one-octet", whole, answered(1)),
    case("5.1-integer-that-fills-the-prefix", lambda c: whole(c) + literal(
        b"x", b"y" * 127), answered(1)),
    case("5.1-integer-in-three-octets", lambda c: whole(c) + literal(
        b"x", b"y" * 1337), answered(1)),
    case("5.1-integer-cut-short", lambda c: whole(c) + b"\xff\xff", BAD),
    case("5.1-integer-without-its-second-octet",
         lambda c: whole(c) + b"\xff", BAD),
    case("5.1-index-above-64-bits", lambda c: whole(c)
         + b"\xff" + b"\xff" * 10 + b"\x7f", BAD),
    case("5.1-index-above-32-bits", lambda c: whole(c)
         + b"\xff" + b"\xff" * 5 + b"\x0f", BAD),
    case("5.1-length-above-64-bits", lambda c: whole(c)
         + b"\x00\x01x\x7f" + b"\xff" * 10 + b"\x7f", BAD),
    case("5.1-length-of-2-to-the-32", lambda c: whole(c)
         + b"\x00\x01x" + integer(2**32, 7), BAD),
    case("5.1-integer-of-endless-zeros", lambda c: whole(c)
         + b"\xff" + b"\x80" * 1000 + b"\x00", BAD),
    case("5.1-size-update-above-64-bits", lambda c:
         b"\x3f" + b"\xff" * 10 + b"\x7f" + whole(c), BAD),
    case("5.2-empty-value", lambda c: whole(c) + literal(b"x", b""),
         answered(1)),
    case("5.2-string-longer-than-the-block", lambda c: whole(c)
         + b"\x00\x01x\x0aless", BAD),
    case("5.2-name-longer-than-the-block", lambda c: whole(c)
         + b"\x00\x0aless", BAD),
    case("5.2-huffman-path", lambda c: start(c) + integer(PATH, 4)
         + huffman(c.target.path), answered(1)),
    case("5.2-huffman-name", lambda c: start(c) + b"\x00"
         + huffman(b":path") + text(c.target.path), answered(1)),
    case("5.2-huffman-of-nothing", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x80", answered(1)),
    case("5.2-huffman-of-every-lawful-octet", lambda c: whole(c)
         + b"\x00" + text(b"x") + huffman(
             b"v" + bytes([9, *range(32, 127), *range(128, 256)]) + b"v"
         ), answered(1)),
    case("5.2-huffman-of-whole-octets", lambda c: whole(c)
         + b"\x00" + text(b"x") + huffman(b"&&&&&&&&"), answered(1)),
    case("5.2-huffman-padding-of-eight-bits", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x82" + HUFFMAN.encode(b"&") + b"\xff",
         BAD),
    case("5.2-huffman-padding-and-an-octet-more", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x83" + HUFFMAN.encode(b"00")
         + b"\xff", BAD),
    case("5.2-huffman-padding-of-zeros", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x81\x00", BAD),
    case("5.2-huffman-with-the-end-symbol", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x84" + EOS, BAD),
    case("5.2-huffman-end-symbol-behind-text", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x85" + HUFFMAN.encode(b"&") + EOS, BAD),
    case("5.2-huffman-longer-than-the-block", lambda c: whole(c)
         + b"\x00" + text(b"x") + b"\x8a" + HUFFMAN.encode(b"&"), BAD),
    case("5.2-huffman-name-with-the-end-symbol", lambda c: whole(c)
         + b"\x00\x84" + EOS + text(b"v"), BAD),
])
def test_integers_and_strings_are_as_section_5_says(client, octets, outcome):
    client.send(request(octets(client)))
    outcome(client)


@pytest.mark.parametrize("octets, outcome", [
    case("6.3-to-nothing", lambda c: resize(0) + whole(c), answered(1)),
    case("6.3-to-what-was-allowed", lambda c: resize(TABLE) + whole(c),
         answered(1)),
    case("6.3-down-and-up", lambda c: resize(0) + resize(TABLE)
         + start(c) + kept_path(c), answered(1)),
    case("6.3-above-the-setting", lambda c: resize(TABLE + 1) + whole(c),
         BAD),
    case("6.3-far-above-the-setting", lambda c: resize(2**31) + whole(c),
         BAD),
    case("4.2-behind-a-field", lambda c: indexed(GET) + resize(0)
         + whole(c)[1:], BAD),
    case("4.2-at-the-end-of-a-block", lambda c: whole(c) + resize(0), BAD),
    case("4.2-between-two-fields-after-one-at-the-start", lambda c:
         resize(0) + indexed(GET) + resize(TABLE) + whole(c)[1:], BAD),
    case("6.3-cut-short", lambda c: b"\x3f", BAD),
    case("4.3-empties-the-table", lambda c: resize(0) + whole(c)
         + literal(b"x", b"y", INDEXING) + indexed(FIRST_DYNAMIC), BAD),
])
def test_the_table_is_resized_as_section_4_2_says(client, octets, outcome):
    if client.frame_limit and client.settings.get(1, TABLE) != TABLE:
        pytest.skip("the server has another size of table")
    client.send(request(octets(client)))
    outcome(client)


# --- A table that lives through several blocks ---------------------------

def test_2_3_2_entries_are_found_by_later_blocks(client):
    client.send(request(start(client) + kept_path(client)))
    client.send(request(start(client) + indexed(FIRST_DYNAMIC), 3))
    client.assert_answered(1, 3)


def test_2_3_2_the_newest_entry_has_the_lowest_index(client):
    octets = start(client) + kept_path(client)
    client.send(request(octets + filler(50) + filler(60)))
    client.send(request(start(client) + indexed(FIRST_DYNAMIC + 2), 3))
    client.assert_answered(1, 3)


def test_2_3_2_an_entry_may_be_there_twice(client):
    octets = start(client) + kept_path(client) + literal(
        b"x", b"y", INDEXING) * 2
    client.send(request(octets))
    client.send(request(
        start(client) + indexed(FIRST_DYNAMIC + 2)
        + indexed(FIRST_DYNAMIC) + indexed(SECOND_DYNAMIC), 3
    ))
    client.assert_answered(1, 3)


def test_2_2_trailers_share_the_table_with_heads(client):
    post = b"\x83" + whole(client)[1:]
    client.send(
        request(post, 1, END_HEADERS), body(1, b"body", end=False),
        request(literal(b"x-sum", b"1", INDEXING), 1),
        request(whole(client) + indexed(FIRST_DYNAMIC), 3),
    )
    client.answer(1)
    client.assert_answered(3)


def test_4_1_a_table_takes_entries_to_the_last_octet(client):
    client.send(request(start(client) + kept_path(client)))
    rest = TABLE - path_size(client)
    client.send(request(whole(client) + filler(rest), 3))
    client.send(request(start(client) + indexed(SECOND_DYNAMIC), 5))
    client.assert_answered(1, 3, 5)


def test_4_4_an_octet_too_much_evicts_the_oldest_entry(client):
    client.send(request(start(client) + kept_path(client)))
    rest = TABLE - path_size(client)
    client.send(request(whole(client) + filler(rest + 1), 3))
    client.assert_answered(1, 3)
    client.send(request(start(client) + indexed(SECOND_DYNAMIC), 5))
    client.assert_connection_error(COMPRESSION_ERROR)


def test_4_4_an_entry_may_fill_the_table(client):
    client.send(request(whole(client) + filler(TABLE)))
    client.send(request(whole(client) + indexed(FIRST_DYNAMIC), 3))
    client.assert_answered(1, 3)


def test_4_4_an_entry_larger_than_the_table_empties_it(client):
    client.send(request(start(client) + kept_path(client)))
    client.send(request(whole(client) + filler(TABLE + 1), 3))
    client.assert_answered(1, 3)
    client.send(request(start(client) + indexed(FIRST_DYNAMIC), 5))
    client.assert_connection_error(COMPRESSION_ERROR)


def test_4_4_a_name_may_come_from_the_entry_that_it_evicts(client):
    name = b"n" * 200
    client.send(request(whole(client) + literal(name, b"v" * 3700, INDEXING)))
    again = integer(FIRST_DYNAMIC, 6, INDEXING) + text(b"w" * 3800)
    client.send(request(whole(client) + again, 3))
    client.send(request(whole(client) + indexed(FIRST_DYNAMIC), 5))
    client.assert_answered(1, 3, 5)


def test_4_3_a_smaller_table_evicts_the_oldest_entries(client):
    client.send(request(start(client) + kept_path(client) + filler(100)))
    client.send(request(
        resize(100) + whole(client) + indexed(FIRST_DYNAMIC), 3
    ))
    client.assert_answered(1, 3)
    client.send(request(start(client) + indexed(SECOND_DYNAMIC), 5))
    client.assert_connection_error(COMPRESSION_ERROR)


def test_4_3_an_emptied_table_can_be_used_again(client):
    client.send(request(start(client) + kept_path(client)))
    client.send(request(
        resize(0) + resize(TABLE) + start(client) + kept_path(client), 3
    ))
    client.send(request(start(client) + indexed(FIRST_DYNAMIC), 5))
    client.assert_answered(1, 3, 5)
    client.send(request(start(client) + indexed(SECOND_DYNAMIC), 7))
    client.assert_connection_error(COMPRESSION_ERROR)


def test_4_2_a_smaller_table_stays_smaller(client):
    size = path_size(client)
    client.send(request(resize(size) + start(client) + kept_path(client)))
    client.send(request(whole(client) + filler(40), 3))
    client.assert_answered(1, 3)
    client.send(request(start(client) + indexed(SECOND_DYNAMIC), 5))
    client.assert_connection_error(COMPRESSION_ERROR)


def test_2_3_2_hundreds_of_entries_come_and_go(client):
    """An index stays right while entries are inserted and evicted."""
    for stream in range(1, 41, 2):
        fields = b"".join(
            literal(b"x-%d-%d" % (stream, n), b"v" * 20, INDEXING)
            for n in range(10)
        )
        client.send(request(start(client) + kept_path(client) + fields,
                            stream))
    client.send(request(start(client) + indexed(FIRST_DYNAMIC + 10), 41))
    client.assert_answered(*range(1, 42, 2))


def test_2_3_2_each_connection_has_a_table_of_its_own(client, h2_target):
    client.send(request(start(client) + kept_path(client)))
    client.assert_answered(1)
    with frames.Client(h2_target) as other:
        other.send(request(start(other) + indexed(FIRST_DYNAMIC)))
        other.assert_connection_error(COMPRESSION_ERROR)
    client.send(request(start(client) + indexed(FIRST_DYNAMIC), 3))
    client.assert_answered(3)


# --- The server's own encoder --------------------------------------------

@pytest.mark.parametrize("octets", [
    pytest.param(0, id="4.2-no-table"),
    pytest.param(64, id="4.2-a-table-for-one-entry"),
    pytest.param(4096, id="4.2-the-usual-table"),
    pytest.param(65536, id="4.2-a-large-table"),
])
def test_the_servers_encoder_keeps_to_our_table(client, octets):
    client.limit_table(octets)
    for stream in (1, 3, 5):
        client.send(client.get(stream))
        client.assert_answered(stream)


def test_4_2_the_servers_encoder_follows_a_table_down_and_up(client):
    for turn, octets in enumerate((4096, 0, 4096, 100, 0, 1000)):
        client.limit_table(octets)
        client.send(client.get(2 * turn + 1))
        assert client.answer(2 * turn + 1).status == 200


def test_4_2_two_changes_at_once_are_both_obeyed(client):
    """The smaller of them empties the table, though the larger is last."""
    client.send(client.get(1))
    client.answer(1)
    client.send(frames.settings((1, 0), (1, 4096)))
    client.until(lambda: client.acks == 2, "acknowledgement")
    client.send(client.get(3), client.get(5))
    client.assert_answered(3, 5)
