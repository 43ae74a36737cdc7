"""Rooms 7b and 7c, Views and Templates."""

import os
import threading

import gevent
import pytest
from harness import eventually
from hypothesis import given
from hypothesis import strategies as st

import shimmercat
from shimmercat import (
    AssetMissing,
    FilesystemBackend,
    PageFailed,
    RewriteRule,
    SourceChanged,
    View,
    ViewFolder,
    ViewMistaken,
    with_snippet,
)

FULL = b"""\
<!doctype html>
<!--
shimmercat:
  content-disposition: replace
  change-url:
    - / -> /app.php
    - /img/** -> static /pictures/$1
  sc-snippet-after:
    - "</body>\\n"
    - <body>
  consultant: shop
  cache-seconds: 2.5
-->
<title>Shop</title>
"""
CONSULTANTS = ("shop", "default")

#: (content, line, words of the mistake)
MISTAKES = [
    (b"<!-- shimmercat: -->", 1, "expected keys"),
    (b"<!-- shimmercat: replace -->", 1, "expected keys"),
    (b"<!--\nshimmercat:\n  consultant: shop", 2, "expected -->"),
    (b"<!-- shimmercat:\n  consultants: shop -->", 2,
     "unknown key, nearest known: consultant"),
    (b"a\nb\n<!--\n\nshimmercat:\n  content-disposition: replaced\n-->", 6,
     "expected replace or consult or use-json"),
    (b"<!--\nshimmercat: {change-url: /a -> /b}\n-->", 2, "expected a list"),
    (b"<!--\nshimmercat:\n  change-url:\n   - / -> /a\n   - /a -> b\n-->", 5,
     "column 7: expected a path"),
    (b"<!--\nshimmercat:\n  sc-snippet-after: <body>\n-->", 3, "a list"),
    (b"<!--\nshimmercat:\n  sc-snippet-after: []\n-->", 3, "1 to 16 texts"),
    (b"<!--\nshimmercat:\n  sc-snippet-after: ['']\n-->", 3, "1 to 256"),
    (b"<!--\nshimmercat:\n  sc-snippet-after: [5]\n-->", 3, "a text"),
    (b"<!--\nshimmercat:\n  consultant: shpo\n-->", 3, "expected shop"),
    (b"<!--\nshimmercat:\n  cache-seconds: long\n-->", 3, "seconds"),
    (b"<!--\nshimmercat:\n  - a\n :\n-->", 4, "not YAML"),
    (b"<!--\nshimmercat: {consultant: shop}\nviews: 1\n-->", 3, "unknown"),
    (b"<!-- shimmercat: {consultant: shop} -->\n\n<!-- shimmercat: {} -->", 3,
     "once only"),
    (b"<!--\nshimmercat:\n  sc-snippet-after: [a]\n"
     b"  content-disposition: consult\n-->", 3, "with replace only"),
    (b"<!-- shimmercat: {content-disposition: use-json} -->\n\n{% if %}", 3,
     "template: "),
    (b"<!--\nshimmercat:\n  content-disposition: use-json -->\n{{ x | y }}", 4,
     "No filter named 'y'"),
    (b"<!-- shimmercat: {consultant: shop} -->" + b" " * 262_144, None,
     "at most 256 KiB"),
]

JSON_VIEW = b"<!-- shimmercat: {content-disposition: use-json} -->\n"


def parsed(content, consultants=CONSULTANTS):
    return View.parse("/v/index.html", ("index.html",), content, consultants)


class Folder:
    """A folder of views on disk."""

    def __init__(self, path):
        self.path = path
        self.views = ViewFolder(
            path, CONSULTANTS, FilesystemBackend(path, ()).fetch)

    def write(self, name, content=b""):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".next").write_bytes(content)
        path.with_suffix(".next").rename(path)

    def found(self, path):
        """Name of the view that answers a path."""
        view = self.views.find(path)
        return view and "/".join(view.place)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_a_view_is_html_and_its_instructions():
    view = parsed(FULL)
    assert view.page == b"<!doctype html>\n<title>Shop</title>\n"
    assert view.content_disposition == "replace"
    assert view.change_url == tuple(map(RewriteRule.parse, (
        "/ -> /app.php", "/img/** -> static /pictures/$1")))
    assert view.sc_snippet_after == (b"</body>\n", b"<body>")
    assert (view.consultant, view.cache_seconds) == ("shop", 2.5)


@pytest.mark.parametrize("content", [
    b"", b"<h1>A page</h1>", b"<!-- a comment --><p>", b"shimmercat:",
    b"<!-- see shimmercat: it is a cat -->", b"\xff\xfe<!--"])
def test_a_file_without_instructions_is_a_page_of_its_own(content):
    view = parsed(content)
    assert view.page is None
    assert view.content_disposition == "replace"


@pytest.mark.parametrize("content, line, words", MISTAKES)
def test_a_mistake_is_told_with_file_and_line(content, line, words):
    with pytest.raises(ViewMistaken) as caught:
        parsed(content)
    lines = str(caught.value).splitlines()
    place = "/v/index.html:" + (f"{line}:" if line else "")
    assert any(each.startswith(place) and words in each for each in lines)
    assert (caught.value.status, caught.value.exit_code) == (500, 78)


def test_all_mistakes_of_a_view_are_told_at_once():
    with pytest.raises(ViewMistaken) as caught:
        parsed(b"<!--\nshimmercat:\n  change-url: [a, b]\n  x: 1\n"
               b"  consultant: nobody\n-->")
    assert len(str(caught.value).splitlines()) == 4


def test_what_has_to_be_asked_needs_somebody_who_can_be():
    for word in (b"consult", b"use-json"):
        content = b"<!-- shimmercat: {content-disposition: %b} -->" % word
        assert parsed(content).content_disposition == word.decode()
        assert parsed(content, ("shop",)).consultant is None
        for consultants in ((), ("shop", "blog")):
            with pytest.raises(ViewMistaken, match="has none of its own"):
                parsed(content, consultants)


@given(st.binary(max_size=200) | st.tuples(
    st.text(max_size=20), st.text(max_size=80)).map(
        lambda x: f"{x[0]}<!-- shimmercat:{x[1]}-->".encode(
            "utf-8", "surrogatepass")))
def test_reading_a_view_raises_nothing_but_mistakes(content):
    try:
        view = parsed(content)
    except ViewMistaken as error:
        assert all(line.startswith("/v/index.html")
                   for line in str(error).splitlines())
    else:
        assert view.page is None or len(view.page) < len(content)


def test_the_nearest_view_answers(folder):
    for name in ("a/b/c/index.html", "a/b/c/__index.html", "a/b/__index.html",
                 "a/__index.html", "__index.html", "index.html"):
        folder.write(name)
    order = ["a/b/c/index.html", "a/b/c/__index.html", "a/b/__index.html",
             "a/__index.html", "__index.html", None]
    for name in order:
        assert folder.found("/a/b/c/") == name
        if name:
            (folder.path / name).unlink()
    assert folder.found("/") == "index.html"


@pytest.mark.parametrize("path, name", [
    ("/", "index.html"),
    ("/shoes/", "shoes/__index.html"),
    ("/shoes/brown/high/", "shoes/__index.html"),
    ("/shoes", "shoes/__index.html"),
    ("/bags/", "bags/index.html"),
    ("/bags", "bags/index.html"),
    ("/bags/red/", "__index.html"),
    ("/b%61gs/", "bags/index.html"),
    ("/nothing/", "__index.html"),
    ("/bags%2fx/", "__index.html"),
    ("/shoes/x%2F..%2Fy/", "shoes/__index.html"),
    ("/shoes/%FF/", "shoes/__index.html"),
    ("/.git/", "__index.html"),
    ("/" + "x/" * 3000, "__index.html"),
    ("/" + "x" * 300 + "/", "__index.html"),
])
def test_a_view_answers_for_all_below_it(folder, path, name):
    for each in ("index.html", "__index.html", "bags/index.html",
                 "shoes/__index.html", ".git/index.html", "shoes/a.css"):
        folder.write(each)
    assert folder.found(path) == name


def test_settings_of_views_are_never_merged(folder):
    folder.write("__index.html", FULL)
    folder.write("a/__index.html", b"<!-- shimmercat: {cache-seconds: 1} -->")
    view = folder.views.find("/a/b/")
    assert (view.cache_seconds, view.consultant, view.change_url) == (
        1, None, ())


def test_an_edited_view_is_what_answers_next(folder):
    for n in range(5):
        folder.write("index.html",
                     b"<!-- shimmercat: {cache-seconds: %d} -->" % n)
        assert folder.views.find("/").cache_seconds == n


def test_a_view_that_stays_is_parsed_once(folder):
    folder.write("index.html", FULL)
    os.utime(folder.path / "index.html")
    eventually(lambda: folder.views.find("/") is folder.views.find("/"))


def test_a_mistaken_edit_does_not_leave_the_old_view_in_place(folder):
    folder.write("index.html", FULL)
    assert folder.views.find("/").consultant == "shop"
    folder.write("index.html", FULL.replace(b"shop", b"shpo"))
    for _ in range(2):
        with pytest.raises(ViewMistaken, match=r"index\.html:11: .*shpo"):
            folder.views.find("/")
    folder.write("index.html", FULL)
    assert folder.views.find("/").consultant == "shop"


def test_a_view_that_is_written_into_is_one_or_the_other(folder):
    path = folder.path / "index.html"
    contents = [FULL, FULL.replace(b"2.5", b"3.5")]
    path.write_bytes(contents[0])
    stop = threading.Event()

    def keep_writing():
        with open(path, "r+b", buffering=0) as file:
            while not stop.is_set():
                for content in contents:
                    os.pwrite(file.fileno(), content, 0)
                    stop.wait(0.13)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(8):
            try:
                view = folder.views.find("/")
            except SourceChanged:
                continue
            assert view.cache_seconds in (2.5, 3.5)
    finally:
        stop.set()
        writer.join()


def test_a_view_does_not_come_from_elsewhere(tmp_path):
    (tmp_path / "views" / ".hidden").mkdir(parents=True)
    (tmp_path / "secret.html").write_bytes(FULL)
    (tmp_path / "views" / ".hidden" / "x.html").write_bytes(FULL)
    folder = Folder(tmp_path / "views")
    for target in ("../secret.html", ".hidden/x.html"):
        (folder.path / "index.html").symlink_to(target)
        with pytest.raises(AssetMissing, match="leads"):
            folder.views.find("/")
        (folder.path / "index.html").unlink()
    os.mkfifo(folder.path / "index.html")
    with pytest.raises(AssetMissing, match="regular"):
        folder.views.find("/")


def test_the_mistakes_of_all_views_are_found(folder):
    folder.write("index.html", FULL)
    folder.write("b/__index.html", b"<!-- shimmercat: {a: 1, b: 2} -->")
    folder.write("a/index.html", b"<!-- shimmercat: {c: 1} -->")
    folder.write("a/other.html", b"<!-- shimmercat: {c: 1} -->")
    folder.write(".x/index.html", b"<!-- shimmercat: {c: 1} -->")
    (folder.path / "c").mkdir()
    (folder.path / "c" / "index.html").symlink_to("/etc/passwd")
    found = folder.views.mistakes()
    assert [line.partition(": ")[0] for line in found] == [
        f"{folder.path}/{place}:1" for place in (
            "a/index.html", "b/__index.html", "b/__index.html")]


def rendered(template, **values):
    view = parsed(JSON_VIEW + template)
    return view.template.render(values).decode()


def test_a_template_shows_what_the_application_said():
    assert rendered(b"<b>{{ name }}</b>\n{% for x in list %}{{ x }};"
                    b"{% endfor %}\n", name="K\xf6ln", list=[1, 2]) == (
        "<b>K\xf6ln</b>\n1;2;\n")


def test_members_of_an_object_hide_what_python_has_under_the_name():
    assert rendered(b"{{ cart.items | length }} {{ cart['get'] }}"
                    b" {% for name in cart.keys() %}{{ name }} {% endfor %}",
                    cart={"items": [1, 2], "get": 5}) == "2 5 items get "


def test_values_are_escaped_in_a_template():
    assert rendered(b"<b title='{{ a }}'>", a="<script>'\"&") == (
        "<b title='&lt;script&gt;&#39;&#34;&amp;'>")
    assert rendered(b"{{ a | safe }}", a="<b>") == "<b>"


@pytest.mark.parametrize("template, words", [
    (b"\n{{ missing }}", "index.html:3: UndefinedError: 'missing'"),
    (b"{{ 1 // 0 }}", "ZeroDivisionError"),
    (b"{{ a.b.c }}", "UndefinedError"),
    (b"{{ a + 'x' }}", "TypeError"),
    (b"{{ ''.__class__.__mro__ }}", "SecurityError"),
    (b"{{ a.__init__.__globals__ }}", "Error"),
    (b"{% include '/etc/passwd' %}", "no loader"),
    (b"{% for x in range(10**9) %}{% endfor %}", "OverflowError"),
    (b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Recursion"),
    (b"{% for x in range(99999) %}" + b"x" * 100 + b"{% endfor %}", "8 MiB"),
    (b"{{ 'a' * 10**9 }}", "8 MiB"),
    (b"{{ 10**9 * 'a' }}", "8 MiB"),
    (b"{{ ([1] * 10**7) | length }}", "8 MiB"),
    (b"{{ 9 ** 999999999 }}", "8 MiB"),
    (b"{{ '%999999999d' % 1 }}", "8 MiB"),
    (b"{{ '%*d' % (999999999, 1) }}", "a width that is none"),
    (b"{{ '%999999999d' | format(1) }}", "8 MiB"),
    (b"{{ '{:>999999999}'.format(1) }}", "8 MiB"),
    (b"{{ '{:>{}}'.format(1, 999999999) }}", "a width that is none"),
    (b"{{ '{:{}}'.format(1, '>999999999') }}", "a width that is none"),
    (b"{{ 1 | round(999999999, 'ceil') }}", "8 MiB"),
    (b"{{ 'a'.center(999999999) }}", "8 MiB"),
    (b"{{ 'a' | center(999999999) }}", "8 MiB"),
    (b"{{ 'a\nb' | indent(width=999999999) }}", "8 MiB"),
    (b"{{ [1] | batch(999999999, 0) | list }}", "8 MiB"),
    (b"{{ [1] | slice(999999999) | list }}", "8 MiB"),
    (b"{{ a | tojson(indent=999999999) }}", "8 MiB"),
    (b"{% set n = namespace(x='abcdefgh') %}{% for y in range(99) %}"
     b"{% set n.x = n.x ~ n.x %}{% endfor %}", "8 MiB"),
    (b"{% set n = namespace(x=[0]) %}{% for y in range(99) %}"
     b"{% set n.x = n.x + n.x %}{% endfor %}", "8 MiB"),
    (b"{{ lipsum(999999) }}", "'lipsum' is undefined"),
])
def test_a_template_that_fails_says_where_and_why(template, words):
    with pytest.raises(PageFailed) as caught:
        rendered(template, a={"b": 1})
    assert words in str(caught.value)
    assert "/v/index.html" in str(caught.value)
    assert caught.value.status == 500


BUSY = [
    b"{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}"
    b"{% endfor %}",
    b"{% for x in list %}{% for y in list recursive %}{% for z in list if 0 %}"
    b"{% endfor %}{% endfor %}{% endfor %}",
    b"{% macro f(n) %}{% if n %}{% set _ = f(n - 1) ~ f(n - 1) %}{% endif %}"
    b"{% endmacro %}{{ f(60) }}"]


@pytest.mark.parametrize("template", BUSY)
def test_a_template_that_works_without_output_ends_and_others_get_on(
        template, monkeypatch):
    monkeypatch.setattr(shimmercat, "_RENDER_SECONDS", 0.3)
    turns = []

    def take_turns():
        while True:
            turns.append(gevent.sleep(0))

    other = gevent.spawn(take_turns)
    try:
        with pytest.raises(PageFailed, match=r"takes more than 0.3 s"):
            rendered(template, list=list(range(3000)))
    finally:
        other.kill()
    assert len(turns) > 10


def test_limits_leave_what_pages_do_as_it_is():
    assert rendered(
        b"{% for x in list %}{{ loop.index }}/{{ loop.length }}"
        b"{% if loop.last %}.{% endif %}{% else %}none{% endfor %}"
        b"{% for k, v in a.items() %}{{ k ~ '=' ~ v }}{% endfor %}",
        list=["x", "y"], a={"<": "&"}) == "1/22/2.&lt;=&amp;"
    assert rendered(
        b"{% for x in tree recursive %}{{ x.n }}{{ loop(x.below) }}"
        b"{% endfor %}", tree=[{"n": 1, "below": [{"n": 2, "below": []}]}]
    ) == "12"
    assert rendered(
        b"{{ '%d of %s' % (10**9, 'b') }} {{ '{} {:>3}'.format(10**9, 1) }}"
        b" {{ n | tojson }} {{ [n, n] | join('+') }} {{ 2 ** 0.5 > 1 }}"
        b" {{ '-' * 3 + '>' }} {{ [1] + [2] }} {{ 'a'.center(3) }}"
        b" {{ 7 % 4 * 2.5 }} {{ '99999999'.replace('99999999', 'x') }}",
        n=10**12) == (
        "1000000000 of b 1000000000   1 1000000000000"
        " 1000000000000+1000000000000 True ---&gt; [1, 2]  a  7.5 x")


def inserted(pieces, *literals):
    return list(with_snippet(pieces, literals, b"[TAG]"))


@pytest.mark.parametrize("body, literals, expected", [
    (b"<p></body>\n</html>", (b"</body>\n",), b"<p></body>\n[TAG]</html>"),
    (b"<a><b><b>", (b"<b>", b"<a>"), b"<a>[TAG]<b><b>"),
    (b"<a><b>", (b"<c>",), b"<a><b>"),
    (b"abcdef", (b"abcdef", b"cd"), b"abcd[TAG]ef"),
    (b"aaab", (b"aab",), b"aaab[TAG]"),
    (b"aaaa", (b"aa", b"aa"), b"aa[TAG]aa"),
    (b"a.c abc", (b"a.c",), b"a.c[TAG] abc"),
    (b"", (b"a",), b""),
])
def test_the_tag_comes_after_what_is_found_first(body, literals, expected):
    assert b"".join(inserted([body], *literals)) == expected
    octets = [body[n:n + 1] for n in range(len(body))]
    assert b"".join(inserted(octets, *literals)) == expected


def test_nothing_is_held_back_but_the_beginning_of_a_literal():
    pieces = [b"<p>one", b"two</bo", b"x", b"</body", b">three", b"</body>"]
    assert inserted(pieces, b"</body>") == [
        b"<p>one", b"two", b"</box", b"</body>[TAG]three", b"</body>"]


small = st.text("ab<", min_size=1, max_size=4).map(str.encode)


@given(st.lists(st.text("ab<", max_size=6).map(str.encode), max_size=8),
       st.lists(small, min_size=1, max_size=4))
def test_where_pieces_end_makes_no_difference(pieces, literals):
    body = b"".join(pieces)
    end = next((n for n in range(len(body) + 1)
                if body[:n].endswith(tuple(literals))), None)
    expected = body if end is None else body[:end] + b"[TAG]" + body[end:]
    assert b"".join(inserted(pieces, *literals)) == expected
