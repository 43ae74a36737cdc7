"""Part 10e, Purge: what is to be forgotten."""

import hashlib

import pytest

from shimmercat import (
    AlternateStore,
    AssetKey,
    DomainSettings,
    Mark,
    ScratchFolder,
    Selection,
    purge_store,
)

SITE = DomainSettings("www.a.test", "elec", "devlove.yaml:3",
                      root_dir="/srv/www")
SHARED = DomainSettings("b.test", "elec", "devlove.yaml:9", cache_key="both")


@pytest.mark.parametrize("words, path, kind, is_taken", [
    (["/a.css"], "/a.css", "", True),
    (["/a.css"], "/a.css.map", "", False),
    (["/a.css"], "/b/a.css", "", False),
    (["/a.css", "/b.css"], "/b.css", "", True),
    (["/img/"], "/img/a/b.png", "", True),
    (["/img/"], "/img.png", "", False),
    (["/img/*"], "/img/a/b.png", "", True),
    (["/*.png"], "/img/a/b.png", "", True),
    (["/img/*.png"], "/img/a.jpg", "", False),
    (["/"], "/anything", "", True),
    (["/a%20b.css"], "/a%20b.css", "", True),
    (["/a b.css"], "/a%20b.css", "", True),
    (["/a.[ch]"], "/a.c", "", False),
    (["/chart"], "/chart?year=1", "image/png", True),
    (["/chart?year=1"], "/chart?year=1", "image/png", True),
    (["/chart?year=1"], "/chart?year=2", "image/png", False),
    (["/chart?*"], "/chart?year=2", "image/png", True),
    (["images"], "/a.png", "", True),
    (["images"], "/a.css", "", False),
    (["images"], "/chart?x.css", "image/png", True),
    (["images jpg"], "/a.jpeg", "", True),
    (["images", "jpg"], "/a.png", "", False),
    (["jpg", "png"], "/a.png", "", True),
    (["/img/", "jpg"], "/img/a.jpg", "", True),
    (["/img/", "jpg"], "/b.jpg", "", False),
    (["scripts", "styles"], "/a.js", "", True),
    (["pages"], "/a.html", "text/html; charset=utf-8", True),
])
def test_of_each_sort_of_selector_one_must_match(
        words, path, kind, is_taken):
    selection = Selection.parse(words, [])
    assert selection.takes("www.a.test http 1.2.3.4:80", path,
                           kind) == is_taken


@pytest.mark.parametrize("domain, root, is_taken", [
    (SITE, "/srv/www", True), (SITE, "/srv/www2", False),
    (SITE, "www.a.test http 127.0.0.1:80", True),
    (SITE, "www.a.test generated", True),
    (SITE, "www.a.test.org generated", False),
    (SHARED, "both consultant 127.0.0.1:80", True),
    (SHARED, "b.test generated", False),
])
def test_a_domain_takes_its_own_assets_only(domain, root, is_taken):
    assert Selection.parse(["/"], [domain]).takes(
        root, "/a.css", "") == is_taken


@pytest.mark.parametrize("word, hint", [
    ("image", "nearest: images"), ("*.png", "begins with '/'"),
    ("nosuch", "an extension"), ("", "got ''"), (" ", "got ''")])
def test_a_word_that_means_nothing_is_an_error(word, hint):
    with pytest.raises(ValueError, match=hint):
        Selection.parse([word], [])


def remember(store, path, content, root="www.a.test http o:80"):
    """Put an original, an alternate and a note into a store."""
    sha = hashlib.sha256(content).hexdigest()
    store.put(sha, "file", 0, content, Mark.ORIGINAL)
    store.put(sha, "br", 11, content[:3])
    store.remember(AssetKey(root, path).memo(), {
        "sha": sha, "gone": None, "root": root, "path": path})
    return sha


def test_all_that_a_store_has_of_an_asset_goes_and_nothing_else(tmp_path):
    store = AlternateStore(tmp_path)
    gone = remember(store, "/a.css", b"one one")
    kept = remember(store, "/b.css", b"two")
    [(root, path, size)] = purge_store(store, Selection(paths=("/a.css",)))
    assert (root, path) == ("www.a.test http o:80", "/a.css")
    assert size > 10
    marks = None, Mark.ORIGINAL, Mark.NOTE
    assert not store.find(gone, *marks)
    assert not store.find(AssetKey(root, path).memo(), *marks)
    assert len(store.find(kept, *marks)) == 2
    assert purge_store(store, Selection(paths=("/a.css",))) == []


def test_notes_of_who_knows_what_are_left_alone(tmp_path):
    store = AlternateStore(tmp_path)
    store.remember("0" * 64, {"sha": "1" * 64, "gone": None})
    assert purge_store(store, Selection()) == []
    assert store.recall("0" * 64)["sha"] == "1" * 64


def test_a_folder_that_nobody_occupies_has_no_holder(tmp_path):
    assert ScratchFolder(tmp_path / "none").holder() == ""
    (tmp_path / "lock").write_text("1234\n")
    assert ScratchFolder(tmp_path).holder() == ""
