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
    rewritten,
    sound_path,
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
    ("/* -> redirect https://a\\b.example/", 16, "begins with '/'"),
    ("/a -> /b//c", 9, "'//'"),
    ("/a -> redirect https://other.example//c", 37, "'//'"),
    ("/a -> /b/../c", 9, "'..'"),
    ("/a -> /b/.", 9, "'..'"),
    ("/a -> /b#c", 9, "'#'"),
    ("/a -> /b?x#c", 11, "'#'"),
    ("/a -> /b\\c", 9, "backslash"),
]

#: (rule, target, what it becomes; None when the rule does not match)
CHANGES = [
    ("/ -> /fastcgi_0.php", "/", "/fastcgi_0.php"),
    ("/ -> /fastcgi_0.php", "/a/b/?x=1", "/fastcgi_0.php?x=1"),
    ("/ -> /target/+common/", "/", "/target/"),
    ("/ -> /target/+common/", "/a/b", "/target/a/b/"),
    ("/ -> /target/+common/", "/a/b/", "/target/a/b/"),
    ("/ -> /target/+common", "/a.css?", "/target/a.css?"),
    ("/old -> /new", "/old", "/new"),
    ("/old -> /new", "/old/x", "/new"),
    ("/old -> /new/+common", "/old", "/new/"),
    ("/old -> /new/+common", "/old/", "/new/"),
    ("/old -> /new/+common", "/old/a/b.c?d=e?f", "/new/a/b.c?d=e?f"),
    ("/old -> /new", "/older", None),
    ("/old -> /new", "/a/old", None),
    ("/old/ -> /new/+common", "/old", None),
    ("/old/ -> /new/+common", "/old/x", "/new/x"),
    ("/a/* -> /b/$1", "/a/x", "/b/x"),
    ("/a/* -> /b/$1", "/a/x/", None),
    ("/a/* -> /b/$1", "/a/", None),
    ("/a/* -> /b/$1", "/a/x/y", None),
    ("/a/*/ -> /b/$1/+common", "/a/x/", "/b/x/x/"),
    ("/*/*.png -> /$2/$1/$2", "/a/b.png", "/b/a/b"),
    ("/*.tar.gz -> /$1", "/x.tar.gz", "/x"),
    ("/*.png -> /$1", "/.png", None),
    ("/*.png -> /$1", "/a.PNG", None),
    ("/old/** -> /$1", "/old/", "/"),
    ("/old/** -> /$1", "/old/a/b/", "/a/b/"),
    ("/old/** -> /$1", "/old", None),
    ("/** -> /x/$1/y", "/", "/x/y"),
    ("/a/*/b/** -> /$2/$1?p=+common", "/a/1/b/2/3", "/2/3/1?p=1/b/2/3"),
    ("/a/*/** -> /x-$1/$2", "/a/b/c", "/x-b/c"),
    ("/k\u00f6ln -> /b\u00f6nn/+common", "/k%C3%b6ln/x", "/b%C3%B6nn/x"),
    ("/k%c3%b6ln -> /b%c3%b6nn", "/k%C3%B6ln", "/b%c3%b6nn"),
    ("/it's -> /x", "/%69t%27s", "/x"),
    ("/a%2Fb -> /x", "/a/b", None),
    ("/a%2Fb -> /x", "/a%2fb", "/x"),
    ("/100% -> /x", "/100%25", "/x"),
    ("/a.b -> /x", "/aXb", None),
    ("/* -> /app/$1", "/a%2Fb%20c%3F%25", "/app/a%2Fb%20c%3F%25"),
    ("/* -> /app?page=$1", "/a&b=c%26+d?x=1", "/app?page=a%26b%3Dc%26%2Bd"),
    ("/* -> /app?", "/a?x=1", "/app?"),
    ("/go -> redirect https://other.example/x/+common", "/go/a?b",
     "https://other.example/x/a?b"),
    ("/go -> redirect https://other.example/", "/go",
     "https://other.example/"),
]

UNSOUND = [
    "", "*", "a", "//", "//a/", "/a//b", "/.", "/..", "/a/./b", "/a/../b",
    "/%2e%2E/a", "/.%2e/", "/a/%2e", "/a%2f..%2fb", "/a%5C..%5cb", "/..%5cb",
    "/a\\..", "/a%00", "/%0d%0a", "/%7f", "/a%", "/a%2", "/%zz",
]

SOUND = [
    "/", "/a/", "/a%2Fb/", "/%FF/", "/.git/", "/a..b/...", "/..a/a..",
    "/%25%32e%25%32e/", "/a%2f%2fb", "/@:;,&=+$!~*'()/", "/%5cx",
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
    assert RewriteRule.parse(text)[:4] == (text, action, pattern, program)


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


@pytest.mark.parametrize("text, target, changed", CHANGES)
def test_a_rule_changes_what_it_matches_and_nothing_else(
        text, target, changed):
    rule = RewriteRule.parse(text)
    assert rewritten([rule], target) == (
        (None, target) if changed is None else (rule, changed))


def test_the_first_rule_that_matches_wins():
    rules = [RewriteRule.parse(text) for text in (
        "/a/b -> /1", "/a -> dynamic /2/", "/ -> /3")]
    assert rewritten(rules, "/a/b/c") == (rules[0], "/1")
    assert rewritten(rules, "/a/c") == (rules[1], "/2/")
    assert rewritten(rules, "/c?d") == (rules[2], "/3?d")
    assert rewritten([], "/c?d") == (None, "/c?d")


@pytest.mark.parametrize("path", UNSOUND)
def test_a_path_that_could_be_read_as_another_is_not_there(path):
    with pytest.raises(ForbiddenPath):
        sound_path(path)


@pytest.mark.parametrize("path", SOUND)
def test_what_only_an_application_understands_is_sound(path):
    assert sound_path(path) == path


pieces = st.lists(st.sampled_from([
    "/", "a", "b", ".", "..", "%2e", "%2F", "%5c", "..%2f", "php", ".php",
    "+common", "$1", "@", ":", "evil.example", "%C3%B6", "%", "&", "=", "+",
    ";", "~"]), max_size=10).map(lambda parts: "/" + "".join(parts))
patterns = st.tuples(
    st.lists(st.sampled_from(["/*", "/a", "/b", "/.."]), max_size=3),
    st.sampled_from(["", "/", "/**", "/*.php"])).map(
        lambda parts: "".join(parts[0]) + parts[1])
programs = st.sampled_from([
    "/+common", "/x/+common/", "/x/+common.y", "/.+common", "/x/$1", "/$1$1",
    "/x?y=$1&z=+common", "/x$1/+common?", "/$1.", "/x/.$1./y"])


@given(patterns, programs, pieces)
def test_what_is_matched_never_leaves_its_place(pattern, program, path):
    try:
        rule = RewriteRule.parse(f"{pattern} -> {program}")
        sound_path(path)
        changed = rule.apply(path, None)
    except (RuleError, ForbiddenPath):
        return
    if changed is not None:
        place, mark, query = changed.partition("?")
        assert sound_path(place) == place
        assert mark == ("?" if "?" in program else "")
        assert not set(query) & set("#?"), "the query is one"
        assert query.count("&") <= program.count("&")
        assert query.count("=") <= program.count("=")
        away = RewriteRule.parse(
            f"{pattern} -> redirect https://other.example{program}")
        assert away.apply(path, None) == "https://other.example" + changed


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4),
       st.randoms())
def test_a_rule_keeps_how_a_path_is_written(names, dice):
    def written(name):
        return "".join(f"%{octet:{dice.choice(['02x', '02X'])}}"
                       if dice.random() < 0.5 or not chr(octet).isalnum()
                       or octet > 126 else chr(octet)
                       for octet in name.encode("utf-8", "surrogatepass"))

    path = "/" + "/".join(map(written, names))
    try:
        sound_path(path)
    except ForbiddenPath:
        return
    for text in ("/ -> /x/+common", "/** -> /x/$1",
                 f"{'/*' * len(names)} -> /x" + "".join(
                     f"/${n + 1}" for n in range(len(names)))):
        assert RewriteRule.parse(text).apply(path, "q") == f"/x{path}?q"


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=3))
def test_a_literal_matches_every_way_to_write_it(names):
    literal = "/" + "/".join(
        urllib.parse.quote(name, safe="", errors="surrogatepass")
        for name in names)
    escaped = "/" + "/".join(
        "".join(f"%{octet:02x}"
                for octet in name.encode("utf-8", "surrogatepass"))
        for name in names)
    try:
        sound_path(escaped)
        rule = RewriteRule.parse(f"{literal} -> /x/+common")
    except (ForbiddenPath, RuleError):
        return
    for path in (literal, escaped, literal + "/", escaped + "/rest"):
        assert rule.apply(path).startswith("/x/")
