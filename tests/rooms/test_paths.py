"""Room 7, Paths."""

import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    ForbiddenPath,
    Headers,
    Kind,
    RewriteRule,
    RuleError,
    asked_width,
    classify,
    plain_path,
)

#: (path, kind), reference 5.1
SHAPES = [
    ("/", Kind.DYNAMIC),
    ("/blog/", Kind.DYNAMIC),
    ("/v1.2/", Kind.DYNAMIC),
    ("/style.css", Kind.STATIC),
    ("/img/a.b/logo.png", Kind.STATIC),
    ("/a/logo%2Epng", Kind.STATIC),
    ("/a.", Kind.STATIC),
    ("/blog", Kind.REDIRECT),
    ("/v1.2/blog", Kind.REDIRECT),
]

#: (path, components)
PLAIN = [
    ("/", ("",)),
    ("/a.css", ("a.css",)),
    ("/a/b/c.js", ("a", "b", "c.js")),
    ("/a/b/", ("a", "b", "")),
    ("/k%C3%B6ln.png", ("köln.png",)),
    ("/a%20b.txt", ("a b.txt",)),
    ("/a+b~c.txt", ("a+b~c.txt",)),
    ("/100%25.txt", ("100%.txt",)),
    ("/%252e%252e/x.css", ("%2e%2e", "x.css")),
    ("/a..b/c...css", ("a..b", "c...css")),
    ("/.well-known/security.txt", (".well-known", "security.txt")),
    ("/" + "x" * 255, ("x" * 255,)),
]

FORBIDDEN = [
    "",
    "*",
    "a.css",
    "//a.css",
    "/a//b.css",
    "/a//",
    "/.",
    "/..",
    "/./a.css",
    "/../a.css",
    "/a/../b.css",
    "/%2e%2e/etc/passwd",
    "/.%2E/a.css",
    "/a/%2e%2e%2fb.css",
    "/..%2fa.css",
    "/a%2Fb.css",
    "/a%5cb.css",
    "/a\\..\\b.css",
    "/.git/config",
    "/a/.htaccess",
    "/%2egit/config",
    "/a/.well-known/x.txt",
    "/.well-known/.hidden",
    "/a%00.css",
    "/a%0a.css",
    "/a%7f.css",
    "/a%.css",
    "/a%2.css",
    "/a%zz.css",
    "/%ff.css",
    "/%c0%ae%c0%ae/a.css",  # ".." in overlong UTF-8
    "/%ed%a0%80.css",  # a surrogate
    "/" + "x" * 256,
    "/" + "%C3%B6" * 128,
    "/x" * 2049,
]

#: (rule, action, pattern, program)
RULES = [
    ("/ -> /target/+common/", None, "/", "/target/+common/"),
    ("/ -> /x?b=2", None, "/", "/x?b=2"),
    ("/a/*/*.png -> static /$2/$1", Kind.STATIC, "/a/*/*.png", "/$2/$1"),
    ("/old/** -> redirect /new/$1", Kind.REDIRECT, "/old/**", "/new/$1"),
    ("/*.php -> dynamic /app/$1/", Kind.DYNAMIC, "/*.php", "/app/$1/"),
    ("/a/*/b/** -> /$2", None, "/a/*/b/**", "/$2"),
    ("/g.js -> generated /made.js", Kind.GENERATED, "/g.js", "/made.js"),
    ("/köln -> /bönn", None, "/köln", "/bönn"),
    ("/->/x", None, "/", "/x"),
    ("  /a   ->   static   /b  ", Kind.STATIC, "/a", "/b"),
    ("/go -> redirect https://other.example/x/+common", Kind.REDIRECT,
     "/go", "https://other.example/x/+common"),
]

#: (rule, column of the trouble, a word of the message)
BROKEN = [
    ("", 1, "->"),
    ("/a /b", 4, "->"),
    ("/a b -> /c", 4, "->"),
    ("a -> /b", 1, "begins with '/'"),
    ("-> /b", 1, "begins with '/'"),
    ("/a?x -> /b", 2, "no '?'"),
    ("/a/b* -> /b", 4, "*.ext"),
    ("/a/**/b -> /b", 4, "last"),
    ("/*.x/b -> /b", 2, "last"),
    ("/*.* -> /b", 2, "*.ext"),
    ("/a ->", 6, "path"),
    ("/a -> b", 7, "begins with '/'"),
    ("/a -> sttaic /b", 7, "static"),
    ("/a -> [static] /b", 7, "static"),
    ("/a -> static", 7, "begins with '/'"),
    ("/a -> /b c", 10, "'c'"),
    ("/a -> static /b c", 17, "'c'"),
    ("/* -> /b/$2", 10, "1 wildcards"),
    ("/* -> /b/$0", 10, "'$0'"),
    ("/* -> /b/$", 10, "'$'"),
    ("/** -> $1", 8, "begins with '/'"),
    ("/ -> +common", 6, "begins with '/'"),
    ("/a -> https://other.example/", 7, "begins with '/'"),
    ("/* -> redirect https://$1.example/", 16, "begins with '/'"),
    ("/* -> redirect https://other.example", 16, "begins with '/'"),
    ("/* -> redirect https://me@other.example/", 16, "begins with '/'"),
]

hostile = st.text(
    st.sampled_from(["/", ".", "%", "2", "e", "E", "f", "5", "c", "0", "\\",
                     "a", "\0", "ö", "\ud800"])
)


@pytest.mark.parametrize("path, kind", SHAPES)
def test_the_shape_of_a_path_says_what_answers(path, kind):
    assert classify(path) is kind


@pytest.mark.parametrize("path, components", PLAIN)
def test_a_harmless_path_becomes_its_decoded_components(path, components):
    assert plain_path(path) == components


@pytest.mark.parametrize("path", FORBIDDEN)
def test_a_path_that_leaves_or_hides_is_not_there(path):
    with pytest.raises(ForbiddenPath) as caught:
        plain_path(path)
    assert caught.value.status == 404


@given((hostile | st.text()).map(lambda text: "/" + text))
def test_no_component_is_ever_dangerous(path):
    try:
        components = plain_path(path)
    except ForbiddenPath:
        return
    assert all(components[:-1])
    for n, component in enumerate(components):
        assert not set(component) & set("/\\\0")
        assert component[:1] != "." or (n, component) == (0, ".well-known")


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6))
def test_quoted_names_come_back_as_they_were(names):
    names = ["n" + name for name in names]
    path = "/" + "/".join(urllib.parse.quote(name, safe="") for name in names)
    if set("".join(names)) & set("/\\\x7f" + "".join(map(chr, range(32)))):
        with pytest.raises(ForbiddenPath):
            plain_path(path)
    else:
        assert plain_path(path) == tuple(names)


@pytest.mark.parametrize("text, action, pattern, program", RULES)
def test_a_rule_is_read_into_its_parts(text, action, pattern, program):
    assert RewriteRule.parse(text) == (text, action, pattern, program)


@pytest.mark.parametrize("text, column, word", BROKEN)
def test_a_broken_rule_is_refused_with_its_column(text, column, word):
    with pytest.raises(RuleError) as caught:
        RewriteRule.parse(text)
    assert caught.value.column == column
    assert f"column {column}: " in str(caught.value)
    assert word in str(caught.value)
    assert caught.value.exit_code == 78


@given(st.text(st.sampled_from("/*a.$1+common ->?ö:")) | st.text())
def test_parsing_a_rule_raises_nothing_but_rule_errors(text):
    try:
        rule = RewriteRule.parse(text)
    except RuleError as error:
        assert 1 <= error.column <= len(text) + 1
    else:
        assert rule.text == text


@pytest.mark.parametrize("query, fields, width", [
    ("sc-width=1", {}, 160), ("sc-width=160", {}, 160),
    ("sc-width=161", {}, 320), ("a=b&sc-width=641&c", {}, 960),
    ("sc-width=2560", {}, 2560), ("sc-width=2561", {}, 0),
    ("sc-width=0", {}, 0), ("sc-width=", {}, 0), ("sc-width=1e3", {}, 0),
    ("sc-width=999999", {}, 0), ("xsc-width=5", {}, 0), ("", {}, 0),
    (None, {}, 0), (None, {"sec-ch-width": "500"}, 640),
    ("sc-width=100", {"sec-ch-width": "900"}, 160),
    ("sc-width=100", {"sec-ch-dpr": "1.7"}, 320),
    ("sc-width=100", {"sec-ch-dpr": "0"}, 0),
    ("sc-width=100", {"sec-ch-dpr": "99"}, 0),
    (None, {"sec-ch-width": "500", "sec-ch-dpr": "3"}, 640),
    (None, {"sec-ch-width": "wide"}, 0)])
def test_a_width_is_rounded_up_to_a_step(query, fields, width):
    headers = Headers([(name.encode(), value.encode())
                       for name, value in fields.items()])
    assert asked_width(query, headers) == width
