"""Room 7, Paths."""

import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    ForbiddenPath,
    Kind,
    RewriteRule,
    RuleError,
    classify,
    plain_path,
    rewrite,
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

#: (rule, path, what comes out as "action path"; None: no match)
REWRITINGS = [
    ("/ -> /target/+common/", "/a/b", "None /target/a/b/"),
    ("/ -> /target/+common/", "/a/b/", "None /target/a/b/"),
    ("/ -> /target/+common/", "/", "None /target/"),
    ("/ -> /fastcgi_0.php", "/any/thing.html", "None /fastcgi_0.php"),
    ("/a -> /b/+common", "/a/x.css", "None /b/x.css"),
    ("/a -> /b/+common", "/a", "None /b/"),
    ("/a -> /b/+common", "/ab", None),
    ("/a -> /b/+common", "/x/a", None),
    ("/a/ -> /b/+common", "/a/x", "None /b/x"),
    ("/a/ -> /b/+common", "/a", None),
    ("/*/edit -> /edit/$1/", "/post/edit", "None /edit/post/"),
    ("/*/edit -> /edit/$1/", "/a/b/edit", None),
    ("/*/edit -> /edit/$1/", "//edit", None),
    ("/old/** -> redirect /new/$1", "/old/a/b", "redirect /new/a/b"),
    ("/old/** -> redirect /new/$1", "/old/", "redirect /new/"),
    ("/old/** -> redirect /new/$1", "/old", None),
    ("/*.php -> dynamic /app/$1/", "/index.php", "dynamic /app/index/"),
    ("/*.php -> dynamic /app/$1/", "/indexxphp", None),
    ("/*.php -> dynamic /app/$1/", "/a/index.php", None),
    ("/a/*/*.png -> static /$2/$1", "/a/b/c.png", "static /c/b"),
    ("/a/*/b/** -> /+common", "/a/x/b/y/z", "None /x/b/y/z"),
    ("/a/*/b/** -> /$2", "/a/x/b/y/z", "None /y/z"),
    ("/g.js -> generated /made.js", "/g.js", "generated /made.js"),
    ("/köln -> /bonn", "/k%C3%B6ln", "None /bonn"),
    ("/k -> /bönn", "/k", "None /b%C3%B6nn"),
    ("/a.b -> /c", "/axb", None),
    ("/c++ -> /c+/+common", "/c++/x", "None /c+/x"),
    ("/** -> redirect /$1", "//evil.example", "redirect /evil.example"),
    ("/->/x", "/a", "None /x"),
    ("  /a   ->   static   /b  ", "/a", "static /b"),
    (
        "/go -> redirect https://other.example/x/+common",
        "/go/there",
        "redirect https://other.example/x/there",
    ),
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


@pytest.mark.parametrize("text, path, expected", REWRITINGS)
def test_a_rule_rewrites_what_it_matches(text, path, expected):
    rule = RewriteRule.parse(text)
    assert rule.matches(path) is (expected is not None)
    made = rule.rewrite(path, None)
    if expected is None:
        assert made is None
    else:
        action = made.action.value if made.action else None
        assert f"{action} {made.path}" == expected


@pytest.mark.parametrize("text, column, word", BROKEN)
def test_a_broken_rule_is_refused_with_its_column(text, column, word):
    with pytest.raises(RuleError) as caught:
        RewriteRule.parse(text)
    assert caught.value.column == column
    assert f"column {column}: " in str(caught.value)
    assert word in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("text, query, expected", [
    ("/ -> /x", None, None),
    ("/ -> /x", "a=1", "a=1"),
    ("/ -> /x", "", ""),
    ("/ -> /x?b=2", "a=1", "b=2"),
    ("/ -> /x?", "a=1", ""),
    ("/ -> /x?u=http://y//z", None, "u=http://y//z"),
    ("/** -> /x?path=$1", "a=1", "path=p/q"),
])
def test_the_query_is_kept_unless_the_program_has_one(text, query, expected):
    made = RewriteRule.parse(text).rewrite("/p/q", query)
    assert (made.path, made.query) == ("/x", expected)


def test_the_first_rule_that_matches_wins():
    texts = ("/a/b -> /one", "/a -> redirect /two", "/ -> /three")
    rules = [RewriteRule.parse(text) for text in texts]
    assert rewrite(rules, "/a/b", "q") == (None, "/one", "q")
    assert rewrite(rules, "/a/c", None) == (Kind.REDIRECT, "/two", None)
    assert rewrite(rules, "/c", None) == (None, "/three", None)


def test_without_a_matching_rule_nothing_changes():
    rules = [RewriteRule.parse("/a -> /b")]
    assert rewrite(rules, "/c", "q") == (None, "/c", "q")


@given(st.text(st.sampled_from("/*a.$1+common ->?ö:")) | st.text())
def test_parsing_a_rule_raises_nothing_but_rule_errors(text):
    try:
        rule = RewriteRule.parse(text)
    except RuleError as error:
        assert 1 <= error.column <= len(text) + 1
    else:
        assert rule.text == text


@given(hostile, st.sampled_from(["/ -> redirect /+common",
                                 "/** -> redirect /$1",
                                 "/* -> redirect /$1/"]))
def test_no_path_makes_a_redirect_leave_the_site(tail, text):
    made = RewriteRule.parse(text).rewrite("/" + tail, None)
    assert made is None or (made.path[0] == "/" and made.path[1:2] != "/")
