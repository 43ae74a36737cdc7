"""Room 15, Site."""

import argparse
import hashlib
import os
import random
import re
import threading
import time
import urllib.parse

import brotli
import pytest
from exchanges import body_of, request_for
from harness import DOMAIN, eventually, make_site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimmercat import (
    QUIET_SECONDS,
    AlternateStore,
    BadRequest,
    Deadline,
    Repository,
    ShimmerCatError,
    Site,
    SourceChanged,
    error_page,
    http_date,
    load_settings,
    quick_form,
)

PAGE = b"<h1>Hello</h1>\n"
CSS = b"".join(b"p.c%d { margin: 0 }\n" % n for n in range(500))
BIG = random.Random(15).randbytes(600_000)
FILES = {"index.html": PAGE, "a.css": CSS, "big.bin": BIG,
         "docs/index.html": b"docs", "caf\u00e9/index.html": b"coffee",
         "empty/x.txt": b"x", "none.txt": b"", "%41.txt": b"percent"}
CONFIGURATION = """\
shimmercat-devlove:
  domains:
    {domain}:
      root-dir: www
    elec app.example.test:
      root-dir: www
      consultant:
        connect-to: 127.0.0.1:8080
    api api.example.test:
      port: 8080
    elec rewritten.example.test:
      root-dir: www
      change-url:
        - /old -> /new
    elec views.example.test:
      root-dir: www
      views-dir: views
"""


class House:
    """A site over files in a folder, asked without any socket."""

    def __init__(self, folder, mode="devlove", **tweaks):
        self.folder = make_site(folder, FILES, tweaks)
        (folder / "views").mkdir(exist_ok=True)
        (folder / "devlove.yaml").write_text(
            CONFIGURATION.format(domain=DOMAIN))
        configured = load_settings(argparse.Namespace(
            mode=mode, working_dir=str(folder)))
        self.repository = Repository(
            configured.tweaks, AlternateStore(folder / "r-cache"), self,
            quick_form)
        self.site = Site(configured, self.repository)

    def put(self, job, weight=1):
        """Takes orders for the artisan, who has the day off."""

    def ask(self, target, *fields, **more):
        """Status, fields and body of an answer."""
        return seen(self.site.answer(request_for(target, *fields, **more)))

    def settle(self, target):
        """Ask until the asset is answered without waiting."""
        self.ask(target)
        return eventually(lambda: self.ask(target) and self.site.ready(
            request_for(target)))


def seen(response):
    """What a client sees of a response; its file is closed."""
    return response.status, dict(response.fields), body_of(response)


@pytest.fixture(scope="module", params=["internet", "devlove"])
def house(request, tmp_path_factory):
    """A house in each mode, whose files are not changed."""
    return House(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def open_house(tmp_path_factory):
    """A house in devlove mode, whose files are not changed."""
    return House(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def shut_house(tmp_path_factory):
    """A house in internet mode, whose files are not changed."""
    return House(tmp_path_factory.mktemp("shut"), "internet")


@pytest.mark.parametrize("target, body, kind", [
    ("/", PAGE, b"text/html; charset=utf-8"),
    ("/index.html", PAGE, b"text/html; charset=utf-8"),
    ("/a.css", CSS, b"text/css; charset=utf-8"),
    ("/a.css?v=2", CSS, b"text/css; charset=utf-8"),
    ("/%61.css", CSS, b"text/css; charset=utf-8"),
    ("/big.bin", BIG, b"application/octet-stream"),
    ("/docs/", b"docs", b"text/html; charset=utf-8"),
    ("/caf%C3%A9/", b"coffee", b"text/html; charset=utf-8"),
    ("/none.txt", b"", b"text/plain; charset=utf-8"),
    ("/%2541.txt", b"percent", b"text/plain; charset=utf-8"),
])
def test_a_file_is_served_with_all_its_fields(house, target, body, kind):
    status, fields, got = house.ask(target)
    assert (status, got) == (200, body)
    assert fields[b"content-type"] == kind
    assert fields[b"content-length"] == b"%d" % len(body)
    assert fields[b"accept-ranges"] == b"bytes"
    assert fields[b"etag"].startswith(b'"')
    assert fields[b"last-modified"].endswith(b" GMT")
    assert fields[b"cache-control"] == (
        b"no-cache" if b"html" in kind else b"public, max-age=300")
    assert fields.get(b"vary", b"").startswith(b"accept-encoding") is (
        b"octet" not in kind)


def test_head_has_the_fields_of_get_and_no_body(house):
    for target in ("/a.css", "/big.bin", "/none.txt"):
        _, fields, _ = house.ask(target)
        status, head_fields, body = house.ask(target, method="HEAD")
        assert (status, body) == (200, b"")
        for each in (fields, head_fields):
            each.pop(b"server-timing", None)
        assert head_fields == fields


def test_the_time_of_an_answer_is_told_to_developers_only(house):
    for target in ("/a.css", "/big.bin", "/docs/"):
        _, fields, _ = house.ask(target)
        assert (b"server-timing" in fields) is (
            house.site is not None and "devlove" in str(house.folder))


def test_text_is_served_compressed_to_who_wants_it(house):
    _, plain, _ = house.ask("/a.css")
    status, fields, body = house.ask("/a.css", (b"accept-encoding", b"br"))
    assert status == 200
    assert fields[b"content-encoding"] == b"br"
    assert fields[b"etag"] != plain[b"etag"]
    assert fields[b"vary"] == b"accept-encoding, available-dictionary"
    assert brotli.decompress(body) == CSS
    assert len(body) == int(fields[b"content-length"]) < len(CSS)


@pytest.mark.parametrize("target, accepted, status", [
    ("/a.css", b"identity;q=0", 406),
    ("/a.css", b"*;q=0", 406),
    ("/a.css", b"gzip, identity;q=0", 200),
    ("/big.bin", b"gzip, identity;q=0", 200),
    ("/big.bin", b"gzip", 200),
    ("/a.css", b"zstd", 200),
])
def test_a_coding_that_is_not_there_is_not_acceptable(
        house, target, accepted, status):
    assert house.ask(target, (b"accept-encoding", accepted))[0] == status


@pytest.mark.parametrize("target", ["/a.css", "/big.bin"])
def test_a_client_that_has_it_gets_304(house, target):
    _, fields, _ = house.ask(target)
    for condition in ((b"if-none-match", fields[b"etag"]),
                      (b"if-none-match", b"W/" + fields[b"etag"]),
                      (b"if-none-match", b"*"),
                      (b"if-modified-since", fields[b"last-modified"])):
        status, kept, body = house.ask(target, condition)
        assert (status, body) == (304, b"")
        assert kept[b"etag"] == fields[b"etag"]
        assert kept[b"cache-control"] == fields[b"cache-control"]
        assert kept.get(b"vary") == fields.get(b"vary")
        assert b"content-length" not in kept
        assert house.ask(target, condition, method="HEAD")[0] == 304


def test_the_tag_of_one_coding_is_not_that_of_another(house):
    _, fields, _ = house.ask("/a.css")
    status, _, _ = house.ask("/a.css", (b"accept-encoding", b"br"),
                             (b"if-none-match", fields[b"etag"]))
    assert status == 200


@pytest.mark.parametrize("condition", [
    (b"if-match", b'"other"'),
    (b"if-unmodified-since", http_date(0).encode())])
def test_a_precondition_that_fails_is_412(house, condition):
    assert house.ask("/a.css", condition)[0] == 412


@pytest.mark.parametrize("target, whole", [("/a.css", CSS), ("/big.bin", BIG)])
@pytest.mark.parametrize("field, start, stop", [
    (b"bytes=0-0", 0, 1), (b"bytes=100-199", 100, 200),
    (b"bytes=-1", -1, None), (b"bytes=5000-", 5000, None),
    (b"bytes=0-99999999", 0, None)])
def test_a_range_is_served(house, target, whole, field, start, stop):
    status, fields, body = house.ask(target, (b"range", field))
    first = start % len(whole)
    assert (status, body) == (206, whole[start:stop])
    assert fields[b"content-length"] == b"%d" % len(body)
    assert fields[b"content-range"] == b"bytes %d-%d/%d" % (
        first, first + len(body) - 1, len(whole))


@pytest.mark.parametrize("target, whole", [("/a.css", CSS), ("/big.bin", BIG)])
def test_several_ranges_are_served_as_multipart(house, target, whole):
    status, fields, body = house.ask(target, (b"range", b"bytes=0-9,90-99"))
    assert status == 206
    assert fields[b"content-length"] == b"%d" % len(body)
    assert fields[b"content-type"].startswith(b"multipart/byteranges")
    assert whole[:10] in body and whole[90:100] in body
    assert b"content-encoding" not in fields


def test_a_range_of_a_coded_form_is_a_part_of_that(house):
    coding = (b"accept-encoding", b"br")
    _, fields, whole = house.ask("/a.css", coding)
    status, partial, body = house.ask(
        "/a.css", coding, (b"range", b"bytes=10-19"),
        (b"if-range", fields[b"etag"]))
    assert (status, body) == (206, whole[10:20])
    assert partial[b"content-encoding"] == b"br"


def test_a_range_behind_the_end_is_416_with_the_length(house):
    for target, whole in (("/a.css", CSS), ("/big.bin", BIG)):
        status, fields, _ = house.ask(target, (b"range", b"bytes=9999999-"))
        assert status == 416
        assert fields[b"content-range"] == b"bytes */%d" % len(whole)


def test_if_range_with_another_tag_sends_everything(house):
    status, _, body = house.ask("/a.css", (b"range", b"bytes=0-9"),
                                (b"if-range", b'"other"'))
    assert (status, body) == (200, CSS)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("target", ["/a.css", "/", "/nothing.css"])
def test_another_method_is_405_with_what_is_allowed(house, method, target):
    status, fields, _ = house.ask(target, method=method)
    assert status == 405
    assert fields[b"allow"] == b"GET, HEAD, OPTIONS"


@pytest.mark.parametrize("target", ["*", "/a.css"])
def test_options_tells_what_is_allowed(house, target):
    status, fields, body = house.ask(target, method="OPTIONS")
    assert (status, body) == (200, b"")
    assert fields[b"allow"] == b"GET, HEAD, OPTIONS"
    assert fields[b"content-length"] == b"0"


@pytest.mark.parametrize("target, location", [
    ("/docs", b"/docs/"), ("/nothing", b"/nothing/"), ("/a/b", b"/a/b/"),
    ("/docs?x=/y", b"/docs/?x=/y"), ("/docs?", b"/docs/?"),
    ("/caf%C3%A9", b"/caf%C3%A9/")])
def test_a_path_without_a_dot_gets_its_slash(house, target, location):
    status, fields, _ = house.ask(target)
    assert (status, fields[b"location"]) == (301, location)


@pytest.mark.parametrize("target", [
    "/nothing.css", "/empty/", "/docs/nothing.html", "/.env", "/.git/config",
    "/../a.css", "/%2e%2e/a.css", "/docs/%2e%2e/a.css", "/docs/../a.css",
    "/a.css/", "/a.css/x.css", "//a.css", "/docs//index.html", "/%00.css",
    "/%ff.css", "/%zz.css", "/docs%2findex.html", "/docs%5cindex.html",
    "/" + "x" * 300 + ".css", "/" + "x/" * 2100 + "y.css"])
def test_what_is_not_there_is_404(house, target):
    status, fields, body = house.ask(target)
    assert status == 404
    assert fields[b"cache-control"] == b"no-store"
    assert fields[b"content-type"] == b"text/html; charset=utf-8"
    assert fields[b"content-length"] == b"%d" % len(body)


def test_a_stranger_is_421(house):
    assert house.ask("/", host="other.example")[0] == 421
    assert house.ask("/", host=DOMAIN.upper() + ":4043")[0] == 200


@pytest.mark.parametrize("target", ["/", "/docs/", "/caf%C3%A9/", "/a.css"])
def test_statics_go_before_the_consultant(house, target):
    assert house.ask(target, host="app.example.test")[0] == 200


@pytest.mark.parametrize("target, more", [
    ("/nothing.css", {}), ("/.env", {}), ("/", {"host": "x.example"}),
    ("/a.css", {"method": "POST"}), ("/", {"host": "api.example.test"})])
def test_the_public_hears_nothing_about_us(shut_house, target, more):
    status, fields, body = shut_house.ask(target, **more)
    assert body == error_page(status, ())
    said = body + b"".join(b"".join(field) for field in fields.items())
    for secret in (str(shut_house.folder), "www", "devlove", "127.0.0.1",
                   "Traceback", "shimmercat.py"):
        assert secret.encode() not in said


def test_developers_see_what_was_tried(open_house):
    _, _, body = open_house.ask("/nothing.css")
    text = body.decode()
    assert str(open_house.folder / "www" / "nothing.css") in text
    assert str(open_house.folder / "devlove.yaml") in text
    assert DOMAIN in text


@pytest.mark.parametrize("target", [
    "/<script>alert(1)</script>.css", "/x.css?<img>", "/<b>/x.css"])
def test_an_error_page_is_no_place_for_markup(open_house, target):
    _, _, body = open_house.ask(target)
    assert b"<script" not in body and b"<img" not in body
    assert b"<b>" not in body


def test_a_fault_of_ours_shows_its_traceback_to_developers_only(house):
    try:
        raise ZeroDivisionError("<secret>")
    except ZeroDivisionError:
        status, _, body = seen(house.site.fail(request_for("/")))
    is_open = "devlove" in str(house.folder)
    assert status == 500
    assert (b"ZeroDivisionError: &lt;secret&gt;" in body) is is_open
    assert is_open or body == error_page(500, ())


@pytest.mark.parametrize("target", [
    "//evil.example", "//evil.example/", "//evil.example/%2f..",
    "/%2fevil.example", "/%5cevil.example", "/%2f%2fevil.example",
    "///evil.example", "/.//evil.example", "/%09/evil.example",
    "/%0d%0alocation:evil.example", "/x//evil", "/@evil.example",
    "/https:evil.example", "/?//evil.example", "/a/%2e%2e//evil",
    "/docs?x=%0d%0aset-cookie:a=b"])
def test_no_redirect_leads_elsewhere(house, target):
    stays_here(*house.ask(target)[:2])


def stays_here(status, fields):
    """Assert that a location, if any, is of this host."""
    location = fields.get(b"location", b"/").decode()
    assert not re.search(r"[\x00-\x20\x7f-\xff]", location)
    assert not re.match(r"//|[^?]*\\", location)
    place = urllib.parse.urljoin(f"https://{DOMAIN}/x/y", location)
    assert urllib.parse.urlsplit(place).netloc == DOMAIN
    assert status == 301 or b"location" not in fields


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([
    "/", "\\", "%2f", "%5c", "evil.example", "..", ".", "%2e", "docs", "a",
    "?", "@", ":", "%00", "index.html", "<", "\r\n", " ", "#", "%0d%0a",
]), max_size=8))
def test_any_target_is_answered_and_stays_here(shut_house, parts):
    try:
        request = request_for("/" + "".join(parts))
    except BadRequest:
        return
    status, fields, body = seen(shut_house.site.answer(request))
    assert status in (200, 301, 404)
    assert body in (PAGE, b"docs", b"", error_page(404, ()))
    stays_here(status, fields)


@pytest.mark.parametrize("target", ["/a.css", "/big.bin", "/", "/docs/"])
def test_what_is_known_is_answered_without_waiting(house, target):
    for fields in ((), ((b"range", b"bytes=1-5"),),
                   ((b"if-none-match", b"*"),)):
        house.settle(target)
        ready = seen(house.site.ready(request_for(target, *fields)))
        asked = house.ask(target, *fields)
        for _, each, _ in (ready, asked):
            each.pop(b"server-timing", None)
        assert ready == asked


@pytest.mark.parametrize("target, more", [
    ("/nothing.css", {}), ("/a.css", {"method": "POST"}),
    ("/", {"host": "other.example"}), ("/a.css", {"host": "api.example.test"}),
    ("/old", {"host": "rewritten.example.test"})])
def test_what_needs_a_page_is_not_answered_at_once(house, target, more):
    house.settle("/a.css")
    assert house.site.ready(request_for(target, **more)) is None


def test_a_changed_file_is_not_answered_from_memory(tmp_path):
    house = House(tmp_path)
    house.settle("/a.css")
    house.settle("/big.bin")
    for name in ("a.css", "big.bin"):
        (tmp_path / "www" / name).write_bytes(b"new")
        assert house.site.ready(request_for("/" + name)) is None
        assert house.ask("/" + name)[2] == b"new"


def test_no_descriptor_is_left_open(house):
    requests = [
        ("/big.bin", {}, ()), ("/big.bin", {"method": "HEAD"}, ()),
        ("/big.bin", {}, ((b"range", b"bytes=9999999-"),)),
        ("/big.bin", {}, ((b"range", b"bytes=0-9,90-99"),)),
        ("/big.bin", {}, ((b"if-none-match", b"*"),)),
        ("/nothing.css", {}, ()), ("/docs", {}, ())]
    house.ask("/big.bin")
    before = len(os.listdir("/proc/self/fd"))
    for target, more, fields in requests:
        house.ask(target, *fields, **more)
    assert len(os.listdir("/proc/self/fd")) == before


def rename(path, content):
    next_path = path.with_suffix(".next")
    next_path.write_bytes(content)
    next_path.rename(path)


def write_through(path, content):
    """In place, in one write."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [40_000, 900_000], ids=["small", "large"])
@pytest.mark.parametrize("write", [rename, write_through])
def test_readers_never_get_a_mixture(tmp_path, size, write):
    house = House(tmp_path)
    path = tmp_path / "www" / "a.bin"
    contents = [bytes([n]) * (size + n) for n in b"ABC"]
    if write is write_through:
        contents = [content[:size] for content in contents]
    rename(path, contents[0])
    for _ in range(5):
        tags, (outcomes, slowest) = {}, readings_under_writes(
            house, lambda content: write(path, content), contents)
        if slowest < QUIET_SECONDS:
            break
    else:
        pytest.skip("the machine is busy: writes stand still for too long")
    for tag, body in filter(None, outcomes):
        assert body in contents
        assert tags.setdefault(tag, body) == body
    last = eventually(lambda: reading(house))
    assert last[1] == path.read_bytes()


def readings_under_writes(house, write, contents):
    """Outcomes while a file is written; seconds of the longest write."""
    stop, times = threading.Event(), [0]

    def keep_writing():
        while not stop.is_set():
            for content in contents:
                begin = time.monotonic()
                write(content)
                times.append(time.monotonic() - begin)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        outcomes = list(readings(house))
    finally:
        stop.set()
        writer.join()
    return outcomes, max(times)


def readings(house):
    """Outcomes of as many readings as fit into two seconds."""
    deadline = Deadline(2)
    while not deadline.passed():
        yield reading(house)


def reading(house):
    """Tag and body of an answer, None when it was cut or put off."""
    response = house.site.answer(request_for("/a.bin"))
    assert response.status in (200, 503)
    try:
        status, fields, body = seen(response)
    except SourceChanged:
        return None
    assert int(fields[b"content-length"]) == len(body)
    return (fields[b"etag"], body) if status == 200 else None


def test_a_tag_belongs_to_the_octets_it_came_with(tmp_path):
    house = House(tmp_path)
    path = tmp_path / "www" / "a.css"
    for n in range(8):
        content = b"%03d" % n * 100
        write_through(path, content)
        _, fields, body = house.ask("/a.css")
        assert body == content
        assert house.ask("/a.css")[1][b"etag"] == fields[b"etag"]


def test_a_page_says_its_status_and_nothing_else():
    page = error_page(404, ())
    assert b"404 Not Found" in page
    assert page.startswith(b"<!DOCTYPE html>")
    assert b"What was tried" not in page


@given(st.text(max_size=30))
def test_any_text_in_a_page_is_text(text):
    page = error_page(500, (text,))
    inside = page.decode("utf-8", "replace").partition("<li><pre>")[2]
    assert "<" not in inside.partition("</pre>")[0]


def test_errors_raised_on_purpose_have_a_page(house):
    status, _, body = seen(house.site.refuse(ShimmerCatError("why"), None))
    assert status == 500
    assert (b"why" in body) is ("devlove" in str(house.folder))


def test_equal_files_have_equal_tags(house):
    _, fields, _ = house.ask("/a.css")
    assert hashlib.sha256(CSS).hexdigest()
    assert fields[b"etag"] == house.ask("/%61.css")[1][b"etag"]


def test_cache_status_tells_where_an_answer_came_from(tmp_path):
    house = House(tmp_path, "internet", **{"cache-status": "true"})
    _, first, _ = house.ask("/a.css")
    assert first[b"cache-status"] == (
        b'shimmercat;fwd=uri-miss;detail="identity"')
    house.settle("/a.css")
    _, fields, _ = house.ask("/a.css", (b"accept-encoding", b"gzip"))
    assert fields[b"cache-status"] == b'shimmercat;hit;detail="gzip"'
    _, kept, _ = house.ask("/a.css", (b"if-none-match", b"*"))
    assert kept[b"cache-status"] == b'shimmercat;hit;detail="identity"'


def test_cache_status_is_for_those_who_want_it(tmp_path):
    _, fields, _ = House(tmp_path, "internet").ask("/a.css")
    assert b"cache-status" not in fields


def test_the_way_to_an_answer_tells_why_each_form_is_chosen_or_not(tmp_path):
    house = House(tmp_path)
    request = request_for("/a.css", (b"accept-encoding", b"br, gzip"))
    seen(house.site.answer(request))
    trail = "\n".join(request.trail)
    assert "form br: " in trail and "bytes, chosen" in trail
    assert f"form identity: {len(CSS)} bytes, larger" in trail
    assert "form zstd: not made yet" in trail
