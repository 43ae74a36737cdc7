"""Room 15c, Pages: views and applications, asked without a client's socket."""

import argparse
import json
import os
import re
import urllib.parse

import brotli
import gevent
import pytest
from exchanges import body_of, request_for
from harness import DOMAIN, eventually, make_site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import Origin, answer, head, in_chunks, silent

from shimmercat import (
    AlternateStore,
    BadRequest,
    Repository,
    Site,
    StoreReader,
    load_settings,
    quick_form,
)

HTML = b"<!doctype html>\n<body>\n<p>Hello</p>\n</body>\n</html>\n"
TAG = (b'<script async type="text/javascript"'
       b' src="/.well-known/shimmercat/ovfs/js/agent.js"></script>')
CONFIGURATION = """\
shimmercat-devlove:
  domains:
    {domain}:
      root-dir: www
      views-dir: views
      consultants:
        default: {{connect-to: "{port}"}}
        second: {{connect-to: "{port}", use-host: second.example}}
      change-url:
        - /legacy/*.php -> dynamic /php/$1/
        - /moved -> redirect /target/+common
        - /away -> redirect https://other.example/x/+common
        - /pictures -> static /img/+common
        - /made -> generated /thumbs/+common
        - /inner/style -> /img/a.css
        - /short -> /lengthened
    elec alone.example.test:
      root-dir: www
      views-dir: views
    elec mixed.example.test:
      root-dir: mixed
      consultant: {{connect-to: "{port}"}}
    elec target.example.test:
      root-dir: www
      consultant: {{connect-to: "{port}"}}
      views-dir: target-views
      change-url:
        - / -> /target/+common/
    api api.example.test:
      port: {port}
"""
VIEWS = {
    "views/index.html": b"",
    "views/__index.html": b"",
    "views/php/__index.html":
        b"<!--\nshimmercat:\n  change-url:\n    - /php/*/ -> /$1.php\n-->",
    "views/second/index.html": b"<!-- shimmercat: {consultant: second} -->",
    "views/snippet/__index.html":
        b"<!-- shimmercat: {sc-snippet-after: ['</body>', '<body>\\n']} -->"
        .replace(b"'<body>\\n'", b'"<body>\\n"'),
    "views/consult/__index.html":
        b"<!-- shimmercat: {content-disposition: consult} -->\n" + HTML * 20,
    "views/json/__index.html":
        b"<!-- shimmercat: {content-disposition: use-json} -->\n"
        b"<h1>{{ title }}</h1>\n",
    "views/static/index.html":
        b"<!-- shimmercat: {change-url: ['/ -> static /img/a.css']} -->",
    "views/gone/index.html":
        b"<!-- shimmercat: {change-url: ['/ -> redirect /new/']} -->",
    "views/script/__index.html":
        b"<!--\nshimmercat:\n  change-url:\n    - / -> /fastcgi_0.php\n-->",
    "target-views/target/__index.html": b"",
    "mixed/index.html": HTML,
    "mixed/__index.html": b"<!-- shimmercat: {cache-seconds: 1} -->" + HTML,
    "mixed/a/index.html": b"<!-- shimmercat: {cache-seconds: 1} -->" + HTML,
    "www/img/a.css": b"p { margin: 0 }\n" * 50,
    "www/index.html": b"not a view",
}


class House:
    """A site in front of an application, asked without any client."""

    def __init__(self, folder, mode="devlove", asks=True):
        self.folder, self.said = folder, []
        self.origin = Origin(self.application)
        self.origin.come()
        make_site(folder)
        for name, content in VIEWS.items():
            self.write(name, content)
        (folder / "devlove.yaml").write_text(CONFIGURATION.format(
            domain=DOMAIN, port=self.origin.port))
        wanted = load_settings(argparse.Namespace(
            mode=mode, working_dir=str(folder)))
        store = (AlternateStore if asks else StoreReader)(folder / "r-cache")
        self.site = Site(wanted, Repository(
            wanted.tweaks, store, self, quick_form), asks=asks)

    def put(self, job, weight=1):
        """Takes orders for the artisan, who has the day off."""

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def application(self, asked):
        """Tells what it was asked; `say` has it say something else."""
        if self.said:
            return self.said[0](asked)
        body = f"{asked.method} {asked.target}".encode()
        whole = answer(body, content_type="text/plain",
                       set_cookie="a=b", etag='"of-the-application"')
        return whole[:-len(body)] if asked.method == "HEAD" else whole

    def say(self, animal):
        self.said = [animal]
        self.origin.asked.clear()

    def ask(self, target, *fields, **more):
        """Status, fields and body of an answer; its stream is closed."""
        request = request_for(target, *fields, **more)
        response = self.site.answer(request)
        body = body_of(response)
        self.trail = "\n".join(request.trail or ())
        return response.status, dict(response.fields), body

    def asked(self):
        """Method and target of all that the application was asked."""
        return [(each.method, each.target) for each in self.origin.asked]


@pytest.fixture(scope="module", params=["internet", "devlove"])
def any_house(request, tmp_path_factory):
    house = House(tmp_path_factory.mktemp(request.param), request.param)
    yield house
    house.origin.go()


@pytest.fixture(scope="module")
def one_house(tmp_path_factory):
    house = House(tmp_path_factory.mktemp("house"))
    yield house
    house.origin.go()


@pytest.fixture
def house(one_house):
    """A house whose application is as it was, and has not been asked."""
    one_house.said.clear()
    one_house.origin.asked.clear()
    return one_house


#: (host, target, what the application is asked for)
PASSED = [
    (DOMAIN, "/", "/"),
    (DOMAIN, "/a/b/?q=1&r=%2F", "/a/b/?q=1&r=%2F"),
    (DOMAIN, "/k%C3%B6ln/a%2Fb/%FF/?", "/k%C3%B6ln/a%2Fb/%FF/?"),
    (DOMAIN, "/.git/", "/.git/"),
    (DOMAIN, "/legacy/shop.php?id=5", "/shop.php?id=5"),
    (DOMAIN, "/legacy/sh%6Fp.php", "/sh%6Fp.php"),
    (DOMAIN, "/script/a/?x", "/fastcgi_0.php?x"),
    ("mixed.example.test", "/b/", "/b/"),
    ("mixed.example.test", "/a/", "/a/"),
    ("target.example.test", "/", "/target/"),
    ("target.example.test", "/a/b?c=d", "/target/a/b/?c=d"),
    ("target.example.test", "/a.css", "/target/a.css/"),
    ("api.example.test", "/x.css", "/x.css"),
    ("api.example.test", "/../x//y", "/../x//y"),
]


@pytest.mark.parametrize("host, target, passed", PASSED)
def test_a_dynamic_path_comes_to_the_application(house, host, target, passed):
    status, _, body = house.ask(target, host=host)
    assert (status, body.decode()) == (200, f"GET {passed}")


def test_an_application_gets_the_method_too(house):
    for method in ("POST", "DELETE", "OPTIONS", "PROPFIND"):
        _, _, body = house.ask("/a/", method=method)
        assert body.decode() == f"{method} /a/"


@pytest.mark.parametrize("target", [
    "/a/../b/", "/%2e%2e/", "//", "/a//", "/x%2f..%2fy/", "/%00/", "/%zz/"])
def test_no_application_sees_a_path_that_means_another_one(house, target):
    assert house.ask(target)[0] == 404
    assert not house.asked()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture],
          max_examples=150)
@given(st.sampled_from(["", "/legacy", "/script", "/consult", "/php"]),
       st.lists(st.sampled_from([
           "/", "a", ".", "..", "%2e", "%2F", "%5c", "\\", ".php", "*", "$1",
           "%00", "%FF", "?", "//", "@", "x.css", ";", "+common"]),
           max_size=7))
def test_whatever_is_asked_for_no_path_reaches_out(house, start, parts):
    house.origin.asked.clear()
    try:
        request = request_for(start + "/" + "".join(parts))
    except BadRequest:
        return
    response = house.site.answer(request)
    if not isinstance(response.body, bytes):
        response.body.close()
    assert response.status in (200, 301, 404)
    for asked in house.origin.asked:
        path = asked.target.partition("?")[0]
        decoded = urllib.parse.unquote_to_bytes(path)
        assert "//" not in path
        assert not {b".", b".."} & set(re.split(rb"[/\\]", decoded))
        assert not re.search(rb"[\x00-\x1f]", decoded)


def test_a_view_names_its_consultant(house):
    house.ask("/second/")
    assert house.origin.asked[0].field("host") == "second.example"


def test_a_rule_of_the_domain_can_say_who_answers(house):
    for target, location in (
            ("/moved", "/target/"), ("/moved/a/b?c", "/target/a/b?c"),
            ("/away/a", "https://other.example/x/a")):
        status, fields, body = house.ask(target)
        assert (status, fields[b"location"]) == (301, location.encode())
        assert (body, fields[b"cache-control"]) == (b"", b"no-store")
    assert house.ask("/moved", method="POST")[0] == 308
    css = VIEWS["www/img/a.css"]
    for target in ("/pictures/a.css", "/inner/style", "/pictures/a.css?x"):
        assert house.ask(target)[2] == css
        eventually(lambda target=target: house.ask(target) and (
            house.site.ready(request_for(target))))
    assert not house.asked()


def test_a_rule_of_a_view_can_say_who_answers(house):
    assert house.ask("/static/")[2] == VIEWS["www/img/a.css"]
    status, fields, _ = house.ask("/gone/?a")
    assert (status, fields[b"location"]) == (301, b"/new/?a")
    assert not house.asked()


def test_a_client_is_sent_to_its_own_path_with_a_slash(house):
    status, fields, _ = house.ask("/short?a=b")
    assert (status, fields[b"location"]) == (301, b"/short/?a=b")
    assert house.ask("/short/")[2] == b"GET /lengthened"


def test_a_page_that_stands_alone_is_what_the_file_has(any_house):
    house = any_house
    for name in ("alone/index.html", "alone/deep/__index.html"):
        house.write(f"views/{name}",
                    b"<!-- shimmercat: {cache-seconds: 60} -->\n" + HTML * 40)
    for target in ("/alone/", "/alone/deep/er/"):
        status, fields, body = house.ask(
            target, host="alone.example.test")
        assert (status, body) == (200, HTML * 40)
        assert fields[b"content-type"] == b"text/html; charset=utf-8"
        assert fields[b"cache-control"] == b"public, max-age=60"
        status, fields, body = house.ask(
            target, (b"accept-encoding", b"br"), host="alone.example.test")
        assert brotli.decompress(body) == HTML * 40
        for conditions, expected in (
                ([(b"if-none-match", fields[b"etag"]),
                  (b"accept-encoding", b"br")], 304),
                ([(b"range", b"bytes=0-4")], 206)):
            assert house.ask(target, *conditions,
                             host="alone.example.test")[0] == expected
        assert house.ask(target, method="HEAD", host="alone.example.test")[
            ::2] == (200, b"")
        assert house.ask(target, method="POST", host="alone.example.test")[
            0] == 405
    house.write("views/alone/index.html", b"<p>plain")
    assert house.ask("/alone/", host="alone.example.test")[2] == b"<p>plain"
    house.write("views/alone/index.html",
                b"<p><!-- shimmercat: {cache-seconds: 1} -->new")
    assert house.ask("/alone/", host="alone.example.test")[2] == b"<p>new"


def test_a_plain_page_among_statics_goes_before_the_application(house):
    assert house.ask("/", host="mixed.example.test")[2] == HTML
    assert not house.asked()
    assert house.ask("/b/", host="mixed.example.test")[2] == b"GET /b/"


@pytest.mark.parametrize("target", [
    "/__index.html", "/a/index.html", "/%5f_index.html"])
def test_instructions_are_nobodys_business(house, target):
    status, _, body = house.ask(target, host="mixed.example.test")
    assert status == 404
    assert b"cache-seconds" not in body


def test_a_file_becomes_a_view_and_is_hidden_from_then_on(tmp_path):
    house = House(tmp_path)
    host = {"host": "mixed.example.test"}
    for target in ("/index.html", "/"):
        eventually(lambda target=target: house.ask(target, **host) and (
            house.site.ready(request_for(target, **host))))
    house.write("mixed/index.html", VIEWS["mixed/a/index.html"])
    for target in ("/index.html", "/"):
        assert house.site.ready(request_for(target, **host)) is None
    assert house.ask("/index.html", **host)[0] == 404
    assert house.ask("/", **host)[2] == b"GET /"
    house.origin.go()


def test_neither_view_nor_application_is_404(house):
    (house.folder / "views" / "__index.html").rename(
        house.folder / "views" / "aside.html")
    try:
        status, _, body = house.ask("/x/", host="alone.example.test")
        assert status == 404
        assert b"no view for /x/" in body
    finally:
        (house.folder / "views" / "aside.html").rename(
            house.folder / "views" / "__index.html")


def test_a_mistaken_view_is_500_and_tells_developers_why(any_house):
    house = any_house
    house.write("views/bad/index.html", b"<!-- shimmercat: {x: 1} -->")
    status, _, body = house.ask("/bad/")
    assert status == 500
    assert (b"index.html:1: shimmercat &gt; x: unknown key" in body) is (
        "devlove" in str(house.folder))
    house.write("views/bad/index.html", b"")
    assert house.ask("/bad/")[2] == b"GET /bad/"


#: (answer of the application, whether the tag comes into it)
TAGGED = [
    (answer(HTML, content_type="text/html"), True),
    (answer(HTML, content_type="Text/HTML; charset=utf-8"), True),
    (answer(HTML, content_type="text/plain"), False),
    (answer(HTML), False),
    (answer(HTML, content_type="text/html", status="404 Not Found"), False),
    (answer(HTML, content_type="text/html", content_encoding="x"), False),
    (answer(HTML, content_type="text/html", cache_control="no-transform"),
     False),
    (answer(b"<p>", content_type="text/html"), None),
]


@pytest.mark.parametrize("said, is_tagged", TAGGED)
def test_the_tag_comes_into_pages_and_nothing_else(house, said, is_tagged):
    house.say(lambda asked: said)
    status, fields, body = house.ask(
        "/snippet/", (b"accept-encoding", b"br"), (b"if-none-match", b'"x"'),
        (b"range", b"bytes=0-1"))
    original = said.partition(b"\r\n\r\n")[2]
    changed = original.replace(b"<body>\n", b"<body>\n" + TAG)
    assert body == (changed if is_tagged else original)
    assert (b"content-length" in fields) is (is_tagged is False)
    asked = house.origin.asked[0]
    assert asked.field("accept-encoding") == "identity"
    assert asked.field("if-none-match") is asked.field("range") is None


def test_the_tag_is_found_across_the_pieces_of_a_stream(house):
    house.say(in_chunks(b"<html><bo", 0.05, b"dy", b">\n<p>", b"x",
                        content_type="text/html", etag='"x"'))
    status, fields, body = house.ask("/snippet/")
    assert body == b"<html><body>\n" + TAG + b"<p>x"
    assert b"etag" not in fields
    house.say(lambda asked: head(
        content_type="text/html", content_length=500))
    _, fields, body = house.ask("/snippet/", method="HEAD")
    assert (body, b"content-length" in fields) == (b"", False)


def test_a_consulted_application_decides_and_the_view_is_shown(house):
    status, fields, body = house.ask(
        "/consult/a/?b", (b"if-none-match", b'"of-the-application"'))
    assert (status, body) == (200, HTML * 20)
    assert fields[b"content-type"] == b"text/html; charset=utf-8"
    assert fields[b"content-length"] == b"%d" % len(HTML * 20)
    assert fields[b"set-cookie"] == b"a=b"
    assert not {b"etag", b"last-modified", b"cache-control"} & set(fields)
    assert house.asked() == [("HEAD", "/consult/a/?b")]
    _, fields, body = house.ask("/consult/", (b"accept-encoding", b"br"))
    assert brotli.decompress(body) == HTML * 20
    assert house.ask("/consult/", method="HEAD")[::2] == (200, b"")


@pytest.mark.parametrize("status, body", [
    ("404 Not Found", b"its own page"), ("302 Found", b""),
    ("500 Internal Server Error", b"oh")])
def test_what_a_consulted_application_declines_is_its_own_page(
        house, status, body):
    def decline(asked):
        whole = answer(body, status, location="/x", set_cookie="c=d")
        return whole[:len(whole) - len(body)] if (
            asked.method == "HEAD") else whole

    house.say(decline)
    got, fields, page = house.ask("/consult/x/")
    assert (got, page) == (int(status[:3]), body)
    assert fields[b"set-cookie"] == b"c=d"
    assert house.asked() == [
        ("HEAD", "/consult/x/"), ("GET", "/consult/x/")]
    assert house.ask("/consult/x/", method="HEAD")[0] == int(status[:3])


def test_an_application_that_knows_no_head_is_asked_again(house):
    house.say(lambda asked: head("405 No", content_length=0)
              if asked.method == "HEAD" else answer(b"long" * 90_000))
    status, _, body = house.ask("/consult/")
    assert (status, body) == (200, HTML * 20)
    house.said.clear()
    assert house.ask("/consult/")[2] == HTML * 20


def test_what_is_no_question_goes_through_a_consulting_view(house):
    assert house.ask("/consult/", method="POST")[2] == b"POST /consult/"


@pytest.mark.parametrize("target, host", [
    ("/consult/", DOMAIN), ("/json/", DOMAIN), ("/snippet/", DOMAIN),
    ("/", "mixed.example.test"), ("/img/a.css", DOMAIN)])
def test_a_tunnel_is_the_applications_whatever_the_view_says(
        house, target, host):
    house.say(lambda asked: answer(b"no tunnels", "403 Forbidden"))
    request = request_for(target, host=host)
    request.upgrade = "websocket"
    response = house.site.answer(request)
    assert response.status == 403
    assert house.asked() == [("GET", target)]
    assert house.origin.asked[0].field("upgrade") == "websocket"


def says_json(what, **named):
    named.setdefault("content_type", "application/json")
    body = what if isinstance(what, bytes) else json.dumps(what).encode()
    return lambda asked: answer(body, set_cookie="a=b", etag='"x"', **named)


def test_json_is_shown_by_the_template(house):
    house.say(says_json({"title": "A & <B>"}, cache_control="max-age=5",
                        status="201 Created"))
    status, fields, body = house.ask(
        "/json/a/", (b"accept", b"text/html"), (b"accept-encoding", b"br"))
    assert (status, body) == (201, b"<h1>A &amp; &lt;B&gt;</h1>\n")
    assert fields[b"content-type"] == b"text/html; charset=utf-8"
    assert fields[b"content-length"] == b"%d" % len(body)
    assert fields[b"set-cookie"] == b"a=b"
    assert fields[b"cache-control"] == b"max-age=5"
    assert b"etag" not in fields
    asked = house.origin.asked[0]
    assert (asked.field("accept"), asked.field("accept-encoding")) == (
        "application/json", "identity")
    house.ask("/json/", method="HEAD")
    assert house.asked()[1] == ("GET", "/json/")
    house.write("views/json/__index.html",
                b"<!-- shimmercat: {content-disposition: use-json} -->"
                b"{{ title }}!")
    assert house.ask("/json/")[2] == b"A &amp; &lt;B&gt;!"
    house.write("views/json/__index.html", VIEWS["views/json/__index.html"])


@pytest.mark.parametrize("said", [
    says_json(b"it is gone", status="404 Not Found"),
    says_json(b"", status="302 Found", location="/x/")])
def test_what_is_not_right_is_not_shown_by_the_template(house, said):
    house.say(said)
    whole = said(None)
    status, _, body = house.ask("/json/")
    assert (status, body) == (int(whole.split()[1]),
                              whole.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("said, status, words", [
    (says_json(b"{"), 502, "expected a JSON object"),
    (says_json(b"[1]"), 502, "got a list"),
    (says_json(b"\xff\xff\xff"), 502, "expected a JSON object"),
    (says_json(b'{"a":' * 100_000), 502, "expected a JSON object"),
    (says_json({}, content_type="text/html"), 502, "got text/html"),
    (says_json({}, content_encoding="gzip"), 502, "the coding gzip"),
    (says_json(b" " * 9_000_000), 502, "8 MiB"),
    (says_json({"name": 5}), 500, "is undefined"),
])
def test_a_page_that_cannot_be_made_is_told_to_developers_only(
        any_house, said, status, words):
    any_house.say(said)
    got, _, body = any_house.ask("/json/")
    assert got == status
    assert (words in body.decode()) is ("devlove" in str(any_house.folder))
    if "internet" in str(any_house.folder):
        assert b"JSON" not in body and b"json" not in body
    any_house.say(says_json({"title": 1}))
    assert any_house.ask("/json/")[2] == b"<h1>1</h1>\n"


def test_the_script_measures_and_says_so_to_developers_only(any_house):
    target = "/.well-known/shimmercat/ovfs/js/agent.js"
    status, fields, body = any_house.ask(target)
    assert status == 200
    assert fields[b"content-type"] == b"text/javascript; charset=utf-8"
    assert fields[b"content-length"] == b"%d" % len(body)
    assert (b"console.info" in body) is ("devlove" in str(any_house.folder))
    assert not re.search(rb"fetch|XMLHttp|sendBeacon|cookie|://", body)
    assert body.count(b"{") == body.count(b"}")
    assert any_house.ask(target, method="POST")[0] == 405


def test_the_reserved_space_is_nobody_elses(house):
    house.write("www/.well-known/shimmercat/x.txt", b"x")
    for target in ("/.well-known/shimmercat/", "/.well-known/shimmercat/x.txt",
                   "/.well-known/shimmercat/a/b/"):
        assert house.ask(target)[0] == 404
    assert not house.asked()


def test_no_application_is_asked_by_who_only_explains(tmp_path):
    house = House(tmp_path, asks=False)
    for target, words in (
            ("/legacy/a.php?b", ["rule 1 of", "/legacy/*.php -> dynamic",
                                 "makes /php/a/?b", "views/php/__index.html",
                                 "makes /a.php?b", "consultant default at",
                                 "GET /a.php?b"]),
            ("/consult/", ["HEAD /consult/"]), ("/json/", ["GET /json/"]),
            ("/moved/a", ["rule 2 of", "/moved -> redirect /target/+common"]),
            ("/x", ["none of 7 rules", "takes /x for redirect"])):
        assert house.ask(target)[0] in (200, 301)
        for each in words:
            assert each in house.trail, house.trail
    house.ask("/alone/", host="alone.example.test")
    assert not house.asked()
    assert not os.path.exists(tmp_path / "r-cache")
    house.origin.go()


def test_a_client_that_leaves_withdraws_what_was_asked_for_it(house):
    house.say(silent)
    for target in ("/consult/", "/json/", "/snippet/", "/"):
        before = len(house.asked())
        request = request_for(target)
        running = gevent.spawn(house.site.answer, request)
        eventually(lambda before=before: gevent.sleep(0.01) or (
            len(house.asked()) > before))
        request.withdraw()
        assert running.get(timeout=20).status == 400


def test_a_client_that_leaves_withdraws_the_second_question_too(house):
    house.say(lambda asked: answer(b"", "404 Not Found")
              if asked.method == "HEAD" else silent(asked))
    request = request_for("/consult/")
    running = gevent.spawn(house.site.answer, request)
    eventually(lambda: gevent.sleep(0.01) or len(house.asked()) == 2)
    request.withdraw()
    assert running.get(timeout=20).status == 400
