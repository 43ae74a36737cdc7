"""Rooms 7, 10 and 13: versions of an asset, as dictionaries and in memory."""

import base64
import hashlib
import os
import random
import time

import pytest
import zstandard
from harness import eventually
from hypothesis import given
from hypothesis import strategies as st

from shimmercat import (
    AlternateStore,
    AssetKey,
    AssetMissing,
    FilesystemBackend,
    Headers,
    Mark,
    Repository,
    Tweaks,
    Workshop,
    dictionary,
    family,
    quick_form,
)

#: text that no coding makes much smaller, so that only its past helps
FIRST = random.Random(1).randbytes(9000).hex().encode()
SECOND = FIRST[:7000] + b"/* changed */" + FIRST[7000:]
FIRST_SHA = hashlib.sha256(FIRST).hexdigest()


@pytest.mark.parametrize("path, pattern", [
    ("/js/app.3f2a9c1b.js", "/js/app.*.js"),
    ("/js/app.3f2a9c1b.chunk.js", "/js/app.*.chunk.js"),
    ("/assets/index-DiwrgTda.css", "/assets/index-*.css"),
    ("/assets/index-B-x9_dQ2.js", "/assets/index-*.js"),
    ("/a.0123456789abcdef0123456789abcdef.css", "/a.*.css"),
    ("/main_8Hq2LmZx.js", "/main_*.js"),
])
def test_the_hash_in_a_name_is_found(path, pattern):
    assert family(path) == (pattern, True)


@pytest.mark.parametrize("path", [
    "/", "/app.js", "/jquery.validate.min.js", "/my-long-name.js",
    "/jquery-Validation.js", "/3f2a9c1b/app.js", "/a.deadbeef.js",
    "/photo-20261121.jpg", "/README-FIRST.txt", "/3f2a9c1b.js"])
def test_a_name_without_a_hash_is_its_own_pattern(path):
    assert family(path) == (path, False)


@pytest.mark.parametrize("path", ["/a(1).js", "/a*.js", "/a:b.js", "/{a}.js",
                                  "/a+b.js", '/a"b.js', "/ä.js"])
def test_what_means_something_else_in_a_pattern_is_no_family(path):
    assert family(path) == ("", False)


@given(st.text(st.sampled_from("/aB1.-_~%*(:\\"), max_size=40))
def test_a_pattern_differs_from_its_path_by_one_star_at_most(path):
    pattern, is_hashed = family("/" + path)
    if pattern:
        assert pattern.count("*") == is_hashed
        head, _, tail = pattern.partition("*")
        assert ("/" + path).startswith(head) and path.endswith(tail[-5:])


def asking(sha=FIRST_SHA, codings=b"gzip, br, dcz", **more):
    """Headers of a client that has a dictionary."""
    field = b":%b:" % base64.b64encode(bytes.fromhex(sha))
    return Headers([(b"available-dictionary", field),
                    (b"accept-encoding", codings),
                    *((name.replace("_", "-").encode(), value)
                      for name, value in more.items())])


def test_a_dictionary_is_read_from_its_field():
    assert dictionary(asking()) == FIRST_SHA
    assert dictionary(asking(sec_fetch_site=b"same-origin")) == FIRST_SHA


@pytest.mark.parametrize("headers", [
    asking(codings=b"br, gzip"), asking(sec_fetch_site=b"cross-site"),
    asking(sec_fetch_site=b"same-site"), asking(sha="ab" * 31),
    Headers([(b"available-dictionary", b":#:"),
             (b"accept-encoding", b"dcz")]),
    Headers([(b"available-dictionary", b""), (b"accept-encoding", b"dcz")]),
    Headers([(b"accept-encoding", b"dcz")])])
def test_what_is_no_dictionary_for_us_is_none(headers):
    assert dictionary(headers) is None


@given(st.binary(max_size=60))
def test_any_field_is_read_or_ignored(field):
    found = dictionary(Headers([(b"available-dictionary", field),
                                (b"accept-encoding", b"dcz")]))
    assert found is None or len(found) == 64


class Shelf:
    """A repository whose artisan works at once."""

    def __init__(self, folder, **tweaks):
        self.folder = folder / "www"
        self.folder.mkdir(exist_ok=True)
        self.store = AlternateStore(folder / "r-cache")
        self._tweaks = Tweaks(artisan_nice=0, **tweaks)
        self.jobs = []
        self.repository = Repository(
            self._tweaks, self.store, self, quick_form)
        self._backend = FilesystemBackend(self.folder, ())

    def put(self, job, weight=1):
        """Takes an order for the artisan."""
        self.jobs.append(job)

    def work(self):
        """Does what was ordered, and tells the repository."""
        while self.jobs:
            job = self.jobs.pop(0)
            assert Workshop(self.store, self._tweaks).do(job) == ""
            self.repository.refresh(job["sha"])

    def key(self, name):
        return AssetKey(str(self.folder), f"/{name}", "optimize")

    def serve(self, name, content):
        """The asset of a file that has just been written."""
        (self.folder / name).write_bytes(content)
        asset = eventually(lambda: self.find(name))
        self.work()
        return asset

    def find(self, name):
        return self.repository.find(
            self.key(name), lambda: self._backend.fetch((name,)))

    def answer(self, asset, headers):
        """What a client gets, once the artisan had its time."""
        for _ in range(2):
            if asset.lacks(headers) == "dcz":
                self.repository.relate(asset, dictionary(headers))
            self.work()
        return asset.pick(headers)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def undone(body, known):
    """The content of a dcz body, read as RFC 9842 section 5 says."""
    assert body[:8] == bytes.fromhex("5e2a4d1820000000")
    assert body[8:40] == hashlib.sha256(known).digest()
    raw = zstandard.ZstdCompressionDict(
        known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=raw).decompress(body[40:])


@pytest.mark.parametrize("old, new", [
    ("app.js", "app.js"), ("app.3f2a9c1b.js", "app.77c0ffee.js")])
def test_who_has_an_old_version_gets_what_changed(shelf, old, new):
    shelf.serve(old, FIRST)
    (shelf.folder / old).unlink()
    asset = shelf.serve(new, SECOND)
    form = shelf.answer(asset, asking())
    assert undone(form.body, FIRST) == SECOND
    assert len(form.body) < 300
    fields = dict(form.fields)
    assert fields[b"content-encoding"] == b"dcz"
    assert fields[b"content-length"] == b"%d" % len(form.body)
    assert fields[b"vary"] == b"accept-encoding, available-dictionary"
    assert fields[b"etag"] != dict(asset.pick(Headers([])).fields)[b"etag"]


def test_every_old_version_gets_its_change(shelf):
    third = SECOND + b"/* and more */"
    shelf.serve("app.0a1b2c31.js", FIRST)
    shelf.serve("app.0a1b2c32.js", SECOND)
    asset = shelf.serve("app.0a1b2c33.js", third)
    for known in (SECOND, FIRST):
        sha = hashlib.sha256(known).hexdigest()
        form = shelf.answer(asset, asking(sha))
        assert undone(form.body, known) == third


def test_a_text_that_no_coding_shrinks_comes_as_what_changed(shelf):
    first = random.Random(2).randbytes(4000)
    shelf.serve("app.css", first)
    asset = shelf.serve("app.css", first + b"more")
    sha = hashlib.sha256(first).hexdigest()
    assert len(shelf.answer(asset, asking(sha)).body) < 200


def test_what_was_replaced_by_something_else_is_not_served_any_more(shelf):
    name = "app.3f2a9c1b.js"
    shelf.serve(name, FIRST)
    (shelf.folder / name).unlink()
    with pytest.raises(AssetMissing) as gone:
        shelf.find(name)
    assert gone.value.is_gone
    for replace in (os.mkdir, lambda path: path.symlink_to("/etc/passwd")):
        replace(shelf.folder / name)
        with pytest.raises(AssetMissing) as refused:
            shelf.find(name)
        assert not refused.value.is_gone
        os.rename(shelf.folder / name, shelf.folder / f"{name}.{replace!r:.9}")


def test_every_version_is_offered_as_a_dictionary(shelf):
    asset = shelf.serve("app.3f2a9c1b.js", FIRST)
    for headers in (Headers([]), Headers([(b"accept-encoding", b"br")])):
        fields = dict(asset.pick(headers).fields)
        assert fields[b"use-as-dictionary"] == b'match="/app.*.js"'
        assert fields[b"vary"] == b"accept-encoding, available-dictionary"
        assert b"use-as-dictionary" not in dict(asset.pick(headers).kept)


def test_a_dictionary_of_another_family_is_of_no_use(shelf):
    shelf.serve("other.js", FIRST)
    asset = shelf.serve("app.js", SECOND)
    assert shelf.answer(asset, asking()).form != "dcz"
    assert shelf.answer(asset, asking("00" * 32)).form != "dcz"
    assert shelf.jobs == []


def test_what_the_dictionary_does_not_make_smaller_is_not_sent(shelf):
    shelf.serve("app.js", FIRST)
    asset = shelf.serve("app.js", b"p { margin: 0 }\n" * 1000)
    form = shelf.answer(asset, asking())
    assert form.form == "br"
    assert asset.lacks(asking()) is None


def test_a_client_that_does_not_ask_gets_no_delta(shelf):
    shelf.serve("app.js", FIRST)
    asset = shelf.serve("app.js", SECOND)
    assert shelf.answer(asset, asking()).form.startswith("dcz")
    for headers in (asking(codings=b"br"), Headers([]),
                    asking(codings=b"br, dcz;q=0")):
        assert not asset.pick(headers).form.startswith("dcz")


def test_no_more_dictionaries_are_remembered_than_there_are_versions(shelf):
    asset = shelf.serve("app.js", FIRST)
    for n in range(1000):
        shelf.repository.relate(asset, f"{n:064x}")
    assert len(asset.deltas) <= 16
    assert shelf.jobs == []


def test_dictionaries_can_be_switched_off(tmp_path):
    shelf = Shelf(tmp_path, dictionaries=False)
    asset = shelf.serve("app.js", FIRST)
    fields = dict(asset.pick(asking()).fields)
    assert b"use-as-dictionary" not in fields
    assert fields[b"vary"] == b"accept-encoding"
    assert asset.lacks(asking()) != "dcz"


@pytest.mark.parametrize("name, content", [
    ("app.3f2a9c1b.js", FIRST), ("photo-8Hq2LmZx.jpg", os.urandom(900))])
def test_a_file_with_a_hash_is_served_when_it_is_gone(shelf, name, content):
    shelf.serve(name, content)
    (shelf.folder / name).unlink()
    with pytest.raises(AssetMissing):
        shelf.find(name)
    asset = eventually(lambda: shelf.repository.find_removed(shelf.key(name)))
    form = asset.pick(Headers([]))
    assert form.body == content
    assert form.kind == (b"text/javascript; charset=utf-8" if ".js" in name
                         else b"image/jpeg")


def test_a_file_without_a_hash_is_gone_at_once(shelf):
    shelf.serve("app.js", FIRST)
    (shelf.folder / "app.js").unlink()
    assert shelf.repository.find_removed(shelf.key("app.js")) is None


def test_what_is_gone_for_long_is_gone(shelf, monkeypatch):
    shelf.serve("app.3f2a9c1b.js", FIRST)
    (shelf.folder / "app.3f2a9c1b.js").unlink()
    key, now = shelf.key("app.3f2a9c1b.js"), time.time()
    assert eventually(lambda: shelf.repository.find_removed(key))
    for days, is_there in ((6.9, True), (7.1, False)):
        monkeypatch.setattr(time, "time", lambda days=days: (
            now + days * 86_400))
        assert bool(shelf.repository.find_removed(key)) is is_there


def test_what_comes_back_counts_its_days_anew(shelf):
    name = "app.3f2a9c1b.js"
    shelf.serve(name, FIRST)
    (shelf.folder / name).unlink()
    eventually(lambda: shelf.repository.find_removed(shelf.key(name)))
    assert shelf.store.recall(shelf.key(name).memo())["gone"]
    asset = shelf.serve(name, FIRST)
    assert asset.best
    note = shelf.store.recall(shelf.key(name).memo())
    assert (note["sha"], note["gone"]) == (asset.sha, None)


def test_nothing_is_kept_of_removed_files_if_that_is_not_wanted(tmp_path):
    shelf = Shelf(tmp_path, keep_removed_days=0, dictionaries=False)
    shelf.serve("app.3f2a9c1b.js", FIRST)
    assert not shelf.store.find(FIRST_SHA, Mark.ORIGINAL)
    (shelf.folder / "app.3f2a9c1b.js").unlink()
    assert shelf.repository.find_removed(
        shelf.key("app.3f2a9c1b.js")) is None
