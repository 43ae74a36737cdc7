"""Room 10, Representations."""

import base64
import gzip
import hashlib
import os
import random
import time

import brotli
import gevent
import pytest
from harness import eventually
from hypothesis import given
from hypothesis import strategies as st

import shimmercat
from shimmercat import (
    AlternateStore,
    AssetKey,
    AssetMissing,
    FilesystemBackend,
    Headers,
    Mark,
    Repository,
    SourceChanged,
    Tweaks,
    content_type,
    formats_shown,
    is_compressible,
    quick_form,
    true_type,
)

CSS = b"".join(b"p.c%d { margin: %dpx; }\n" % (n, n * n % 97)
               for n in range(1000))
NOISE = random.Random(10).randbytes(5000)


class Shelf:
    """A repository, the folder it reads, and what it orders."""

    def __init__(self, folder, images="optimize", **tweaks):
        self.images = images
        self.folder = folder / "www"
        self.folder.mkdir(exist_ok=True)
        self.store = AlternateStore(folder / "r-cache")
        self.jobs, self.weights = [], []
        self.fetched = 0
        self.repository = Repository(
            Tweaks(**tweaks), self.store, self, quick_form)
        self._backend = FilesystemBackend(self.folder, ())

    def put(self, job, weight=1):
        """Takes an order for the artisan."""
        self.jobs.append(job)
        self.weights.append(weight)

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content)
        return path

    def find(self, name):
        """The asset of a file."""
        return self.repository.find(AssetKey("www", name, self.images),
                                    lambda: self._fetch(name))

    def _fetch(self, name):
        self.fetched += 1
        return self._backend.fetch((name,))

    def peek(self, name):
        return self.repository.peek(AssetKey("www", name, self.images))

    def settle(self, name):
        """The asset once it was quiet for long enough to be trusted."""
        return eventually(lambda: self.find(name) and self.peek(name))

    def work(self, asset, body=b"small"):
        """Stores what the artisan would, the same body for each form."""
        job, store = asset.job(), self.store
        for form, level in job["wanted"]:
            if body is None:
                store.decline(asset.sha, form, level, "not smaller")
            else:
                store.put(asset.sha, form, level, body)
        if job["memo"]:
            store.put(asset.sha, job["kin"], 0, b"", Mark.KIN)
            store.put(asset.sha, "file", 0, b"source", Mark.ORIGINAL)
            store.remember(job["memo"], {"sha": asset.sha, "gone": None})
        self.repository.refresh(asset.sha)

    def body(self, name, accepted=None):
        """The octets that a client gets."""
        form = self.find(name).pick(coding(accepted))
        return form.body


def coding(field):
    """Headers with an Accept-Encoding field, or without one."""
    return Headers([(b"accept-encoding", field)] if field else [])


def accept(field):
    """Headers with an Accept field."""
    return Headers([(b"accept", field)])


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def test_a_file_that_holds_still_is_read_once(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.settle("a.css")
    shelf.fetched = 0
    assert shelf.find("a.css") is asset
    assert shelf.fetched == 0
    assert asset.pick(coding(None)).body == CSS


def test_a_file_from_the_future_is_read_once_too(shelf):
    path = shelf.write("a.css", CSS)
    os.utime(path, (4e9, 4e9))
    shelf.settle("a.css")


def replace(path, content):
    (path.parent / "next").write_bytes(content)
    (path.parent / "next").rename(path)


def rewrite(path, content):
    path.write_bytes(content)


def rewrite_unseen(path, content):
    """In place, with the times of before."""
    status = path.stat()
    with open(path, "r+b") as stream:
        stream.write(content)
        stream.truncate()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replace, rewrite, rewrite_unseen])
@pytest.mark.parametrize("content", [
    CSS.replace(b"margin", b"bargin"), CSS + b"more", CSS[:900], b""],
    ids=["same size", "longer", "cut", "empty"])
@pytest.mark.parametrize("is_quiet", [True, False], ids=["quiet", "young"])
def test_a_changed_file_is_seen_at_once(shelf, change, content, is_quiet):
    path = shelf.write("a.css", CSS)
    before = (shelf.settle if is_quiet else shelf.find)("a.css")
    change(path, content)
    after = shelf.find("a.css")
    assert after.pick(coding(None)).body == content
    assert after.pick(coding(None)).etag != before.pick(coding(None)).etag
    assert after.pick(coding(None)).length == len(content)


@pytest.mark.parametrize("small_file_bytes", [0, 1 << 20])
def test_changes_within_one_tick_of_the_clock_are_seen(
        tmp_path, small_file_bytes):
    shelf = Shelf(tmp_path, small_file_bytes=small_file_bytes)
    path = shelf.write("a.css", b"0" * 300)
    with open(path, "r+b", buffering=0) as stream:
        for n in range(8):
            content = b"%03d" % n * 100
            os.pwrite(stream.fileno(), content, 0)
            asset = shelf.find("a.css")
            assert asset.sha == hashlib.sha256(content).hexdigest()


def test_what_may_have_been_half_written_is_read_again(shelf, monkeypatch):
    path = shelf.write("a.bin", b"old")
    asset = shelf.settle("a.bin")
    identity = asset.identity
    # The rest of a write that stood still: nothing tells of it.
    path.write_bytes(b"new")
    monkeypatch.setattr(shimmercat, "file_identity", lambda status: identity)
    assert shelf.body("a.bin") == b"old"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.1)
    assert eventually_body(shelf) == b"new"


def eventually_body(shelf):
    """The body once the file was left alone for long enough to be read."""
    for _ in range(500):
        if shelf.body("a.bin") != b"old":
            break
        gevent.sleep(0.02)
    return shelf.body("a.bin")


def test_a_file_that_is_gone_is_missing_at_once(shelf):
    path = shelf.write("a.css", CSS)
    shelf.settle("a.css")
    path.unlink()
    assert shelf.peek("a.css") is None
    with pytest.raises(AssetMissing):
        shelf.find("a.css")


def test_the_tag_is_made_of_the_octets_alone(tmp_path, shelf):
    shelf.write("a.css", CSS)
    shelf.write("b.css", CSS)
    digest = hashlib.sha256(CSS).digest()
    tag = b'"%b"' % base64.urlsafe_b64encode(digest[:16]).rstrip(b"=")
    assert shelf.find("a.css").pick(coding(None)).etag == tag
    assert shelf.find("b.css").pick(coding(None)).etag == tag
    assert shelf.find("a.css").sha == digest.hex()


def test_a_file_above_the_limit_stays_on_disk(tmp_path):
    shelf = Shelf(tmp_path, small_file_bytes=1000)
    path = shelf.write("a.bin", NOISE)
    form = shelf.find("a.bin").pick(coding(None))
    assert form.body is None
    assert form.path == str(path)
    assert form.length == len(NOISE)
    assert shelf.find("a.bin").sha == hashlib.sha256(NOISE).hexdigest()


def test_the_first_visitor_has_a_cheap_alternate_made(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    assert asset.pick(coding(b"br")).form == "identity"
    assert asset.lacks(coding(b"br, gzip")) == "br"
    assert asset.lacks(coding(b"gzip")) == "gzip"
    assert asset.lacks(coding(None)) is None
    assert asset.lacks(coding(b"identity")) is None
    shelf.repository.hasten(asset, "br")
    shelf.repository.hasten(asset, "gzip")
    assert asset.lacks(coding(b"br, gzip")) is None
    assert brotli.decompress(asset.pick(coding(b"br")).body) == CSS
    assert gzip.decompress(asset.pick(coding(b"gzip")).body) == CSS
    tags = {asset.pick(coding(field)).etag for field in (None, b"br", b"gzip")}
    assert len(tags) == 3


def test_cheap_alternates_are_the_same_on_every_worker(tmp_path):
    bodies = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shelf = Shelf(tmp_path / name)
        shelf.write("a.css", CSS)
        asset = shelf.find("a.css")
        shelf.repository.hasten(asset, "gzip")
        form = asset.pick(coding(b"gzip"))
        bodies.add((form.etag, form.body))
    assert len(bodies) == 1


def test_the_best_alternate_takes_the_place_of_the_cheap_one(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    shelf.repository.hasten(asset, "br")
    quick = asset.pick(coding(b"br"))
    best = brotli.compress(CSS, quality=11)
    shelf.store.put(asset.sha, "br", 11, best)
    shelf.repository.refresh(asset.sha)
    form = asset.pick(coding(b"br"))
    assert (form.body, form.length) == (best, len(best))
    assert form.etag != quick.etag
    assert dict(form.fields)[b"content-length"] == b"%d" % len(best)
    assert dict(form.fields)[b"content-encoding"] == b"br"


def test_an_alternate_that_is_not_smaller_is_never_served(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    shelf.repository.hasten(asset, "br")
    quick = asset.pick(coding(b"br"))
    shelf.store.put(asset.sha, "br", 11, quick.body + b"x")
    shelf.store.put(asset.sha, "gzip", 9, CSS + b"x")
    shelf.repository.refresh(asset.sha)
    assert asset.pick(coding(b"br")) is quick
    assert asset.pick(coding(b"gzip, br;q=0")).form == "identity"


def test_what_does_not_shrink_is_served_as_it_is(shelf):
    shelf.write("a.css", NOISE)
    asset = shelf.find("a.css")
    for name in ("br", "gzip"):
        shelf.repository.hasten(asset, name)
        assert asset.pick(coding(name.encode())).form == "identity"
        assert asset.lacks(coding(name.encode())) is None


def test_alternates_in_the_store_are_used_from_the_start(shelf):
    shelf.write("a.css", CSS)
    best = brotli.compress(CSS, quality=11)
    sha = hashlib.sha256(CSS).hexdigest()
    shelf.store.put(sha, "br", 11, best)
    shelf.store.put(sha, "gzip", 9, gzip.compress(CSS))
    shelf.store.decline(sha, "zstd", 19, "not smaller")
    asset = shelf.find("a.css")
    assert asset.pick(coding(b"br")).body == best
    assert asset.lacks(coding(b"br")) is None
    assert shelf.jobs == []


def test_a_damaged_alternate_is_not_used(shelf):
    shelf.write("a.css", CSS)
    sha = hashlib.sha256(CSS).hexdigest()
    stored = shelf.store.put(sha, "br", 11, brotli.compress(CSS))
    stored.path.write_bytes(b"x" * stored.size)
    assert shelf.find("a.css").pick(coding(b"br")).form == "identity"


@pytest.mark.parametrize("name, content, orders", [
    ("a.css", CSS, 1), ("a.svg", CSS, 1), ("a.json", CSS, 1),
    ("a.png", CSS, 1), ("a.woff2", CSS, 0), ("a.zip", CSS, 0),
    ("a.css", CSS[:127], 0), ("a.css", b"", 0)])
def test_the_artisan_is_asked_for_what_may_become_smaller(
        shelf, name, content, orders):
    path = shelf.write(name, content)
    asset = shelf.find(name)
    assert len(shelf.jobs) == orders
    for job in shelf.jobs:
        assert job["sha"] == asset.sha
        assert job["path"] == str(path)


def test_large_text_is_left_to_the_artisan(tmp_path):
    shelf = Shelf(tmp_path, quick_compress_limit_bytes=1000)
    shelf.write("a.css", CSS)
    assert shelf.find("a.css").lacks(coding(b"br")) is None
    assert len(shelf.jobs) == 1


def test_huge_text_is_served_as_it_is(tmp_path):
    shelf = Shelf(tmp_path, compress_limit_bytes=1000)
    shelf.write("a.css", CSS)
    assert shelf.find("a.css").lacks(coding(b"br")) is None
    assert shelf.jobs == []


def test_a_missed_announcement_is_made_up_for(shelf):
    shelf.write("a.css", CSS)
    asset, now = shelf.find("a.css"), time.monotonic()
    assert not shelf.repository.is_due(asset, now)
    assert shelf.repository.is_due(asset, now + 61)
    shelf.work(asset)
    assert asset.pick(coding(b"gzip")).body == b"small"
    assert not shelf.repository.is_due(asset, now + 1000)


def test_a_form_that_is_not_to_be_had_is_not_asked_for_again(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    shelf.work(asset, None)
    assert asset.best
    assert asset.lacks(coding(b"br, zstd, gzip")) is None
    assert asset.pick(coding(b"br")).form == "identity"


def test_the_more_visits_an_asset_has_the_more_its_forms_are_wanted(shelf):
    shelf.write("a.css", CSS)
    shelf.settle("a.css")
    for _ in range(40):
        shelf.peek("a.css")
    gevent.idle()
    assert 32 in shelf.weights
    assert shelf.weights == sorted(shelf.weights)
    assert len(shelf.jobs) <= 8


@pytest.mark.parametrize("field, best", [
    (b"image/avif,image/webp,*/*;q=0.8", "avif"),
    (b"image/webp,*/*", "webp"), (b"*/*", "jpeg"), (b"image/*", "jpeg"),
    (b"image/avif;q=0, image/webp;q=0.1", "webp"),
    (b"text/html", "jpeg"), (b"", "jpeg"), (b"IMAGE/AVIF ; x=1", "avif"),
    (b"image/avif;q=0.0, image/webp", "webp"), (b"image/avif; q=0.", "jpeg"),
    (b"image/avif;q=much, image/webp", "webp"),
    (b"image/avif;q=0.5, image/webp;q=0.7, */*;q=0.1", "webp"),
    (b"image/avif;q=0.5;x=1, image/webp;q=0.5, */*;q=0.1", "avif"),
    (b"image/avif;q=0.3, image/jpeg;q=0.4", "jpeg"),
    (b"image/avif;q=0.3, */*", "jpeg"), (b"image/webp, image/*;q=0", "webp"),
    (b"image/jpeg;q=0, image/webp;q=0.001", "webp"),
    (b"image/jpeg;q=0", "jpeg")])
def test_an_image_comes_in_the_smallest_format_that_the_client_names(
        shelf, field, best):
    shelf.write("a.jpg", NOISE)
    asset = shelf.find("a.jpg")
    for (form, level), size in zip(asset.wanted, (3000, 2000, 1000),
                                   strict=True):
        shelf.store.put(asset.sha, form, level, bytes(size))
    shelf.repository.refresh(asset.sha)
    form = asset.pick(accept(field))
    assert form.form == best
    fields = dict(form.fields)
    assert fields[b"content-type"] == b"image/" + best.encode()
    assert fields[b"vary"] == dict(form.kept)[b"vary"] == b"accept"
    assert b"content-encoding" not in fields


@pytest.mark.parametrize("name", ["a.jpg", "a.woff2", "a.mp4"])
@pytest.mark.parametrize("field", [b"identity;q=0", b"br, *;q=0", b"*;q=0"])
def test_what_has_no_codings_is_sent_to_those_who_want_one(
        shelf, name, field):
    shelf.write(name, NOISE)
    assert shelf.find(name).pick(coding(field)).form == "identity"


@pytest.mark.parametrize("options", [
    {"images": "none"}, {"cache_control": "public, no-transform"}])
def test_images_are_left_alone_where_that_is_wanted(tmp_path, options):
    shelf = Shelf(tmp_path, **options)
    shelf.write("a.jpg", NOISE)
    form = shelf.find("a.jpg").pick(accept(b"image/avif"))
    assert b"vary" not in dict(form.fields)
    assert shelf.jobs == []


def test_a_job_that_was_lost_is_put_again(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    shelf.jobs.clear()
    shelf.repository.renew(asset)
    assert [job["sha"] for job in shelf.jobs] == [asset.sha]
    shelf.work(asset)
    shelf.jobs.clear()
    shelf.repository.renew(asset)
    assert shelf.jobs == []


def test_an_announcement_of_an_unknown_source_does_nothing(shelf):
    shelf.repository.refresh("0" * 64)


def test_a_source_that_changed_is_not_compressed_for_the_old_one(tmp_path):
    shelf = Shelf(tmp_path, small_file_bytes=0)
    path = shelf.write("a.css", CSS)
    asset = shelf.find("a.css")
    path.write_bytes(CSS[::-1])
    shelf.repository.hasten(asset, "br")
    assert asset.pick(coding(b"br")).form == "identity"


def test_no_more_memory_is_used_than_allowed(tmp_path):
    shelf = Shelf(tmp_path, memory_cache_bytes=100_000)
    names = [f"{n}.bin" for n in range(40)]
    for name in names:
        shelf.write(name, NOISE)
    shelf.settle(names[-1])
    for name in names:
        shelf.find(name)
    known = [name for name in names if shelf.peek(name)]
    assert known == names[-len(known):]
    assert 10 <= len(known) <= 20


def test_the_least_used_is_forgotten_first(tmp_path):
    shelf = Shelf(tmp_path, memory_cache_bytes=30_000)
    for n in range(20):
        shelf.write(f"{n}.bin", NOISE)
    shelf.settle("19.bin")
    favourite = shelf.find("0.bin")
    for n in range(1, 20):
        shelf.find(f"{n}.bin")
        assert shelf.peek("0.bin") is favourite
    assert shelf.peek("1.bin") is None


def test_alternates_count_as_memory(tmp_path):
    shelf = Shelf(tmp_path, memory_cache_bytes=3 * 2048 + 3 * len(CSS))
    for n in range(3):
        shelf.write(f"{n}.css", b"%d" % n + CSS[1:])
    shelf.settle("2.css")
    assets = [shelf.find(f"{n}.css") for n in range(3)]
    for asset in assets:
        shelf.repository.hasten(asset, "br")
        shelf.repository.hasten(asset, "gzip")
    assert shelf.peek("0.css") is None
    assert shelf.peek("2.css") is assets[2]


def test_memory_is_given_back_when_files_change(tmp_path):
    shelf = Shelf(tmp_path, memory_cache_bytes=40_000)
    shelf.write("keep.bin", NOISE)
    kept = shelf.settle("keep.bin")
    path = shelf.write("a.css", CSS[:5000])
    for n in range(8):
        path.write_bytes(b"%03d" % n + CSS[3:5000])
        asset = shelf.find("a.css")
        shelf.repository.hasten(asset, "br")
        shelf.store.put(asset.sha, "gzip", 9, b"x" * 100)
        shelf.repository.refresh(asset.sha)
    assert shelf.peek("keep.bin") is kept


def test_a_cache_of_nothing_still_serves(tmp_path):
    shelf = Shelf(tmp_path, memory_cache_bytes=0)
    shelf.write("a.css", CSS)
    assert shelf.body("a.css") == CSS
    assert shelf.peek("a.css") is None


def test_a_forgotten_asset_is_read_again(shelf):
    shelf.write("a.css", CSS)
    asset = shelf.settle("a.css")
    shelf.repository.forget(asset)
    assert shelf.peek("a.css") is None
    assert shelf.find("a.css") is not asset
    shelf.repository.forget(asset)


def test_many_who_want_the_same_have_it_read_once(tmp_path):
    shelf = Shelf(tmp_path, small_file_bytes=0)
    shelf.write("a.bin", NOISE * 1000)
    finders = [gevent.spawn(shelf.find, "a.bin") for _ in range(50)]
    gevent.joinall(finders, timeout=20, raise_error=True)
    assert len({id(finder.value) for finder in finders}) == 1
    # Opened again while it was too young to be read, but not for each.
    assert shelf.fetched < 5


def test_many_who_want_what_cannot_be_read_all_hear_of_it(shelf):
    def fetch():
        gevent.idle()
        raise AssetMissing("not there")

    key = AssetKey("www", "key")
    finders = [gevent.spawn(shelf.repository.find, key, fetch)
               for _ in range(5)]
    gevent.joinall(finders, timeout=20)
    assert all(isinstance(finder.exception, AssetMissing)
               for finder in finders)
    with pytest.raises(AssetMissing):
        shelf.repository.find(key, fetch)


def test_a_file_that_never_holds_still_is_given_up(tmp_path):
    shelf = Shelf(tmp_path, small_file_bytes=0)
    path = shelf.write("a.bin", NOISE)

    def fetch():
        source = FilesystemBackend(shelf.folder, ()).fetch(("a.bin",))
        path.write_bytes(os.urandom(len(NOISE)))
        return source

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceChanged):
        shelf.repository.find(AssetKey("www", "key"), fetch)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name, sample, expected", [
    ("a.html", b"x", b"text/html; charset=utf-8"),
    ("A.HTML", b"x", b"text/html; charset=utf-8"),
    ("a.html", "é".encode(), b"text/html; charset=utf-8"),
    ("a.html", "é".encode()[:1], b"text/html; charset=utf-8"),
    ("a.html", "é".encode("latin-1") + b"x", b"text/html"),
    ("a.txt", b"\xff\xfea\0", b"text/plain"),
    ("a.css", b"", b"text/css; charset=utf-8"),
    ("a.js", b"x", b"text/javascript; charset=utf-8"),
    ("a.png", b"\xff\xd8\xff\xe0", b"image/jpeg"),
    ("a.JPG", b"\x89PNG\r\n\x1a\n", b"image/png"),
    ("a.webp", b"GIF89a", b"image/gif"),
    ("a.gif", b"RIFF\n\0\0\0WEBPVP8 ", b"image/webp"),
    ("a.jpg", b"RIFF\n\0\0\0WAVE", b"image/jpeg"),
    ("a.txt", b"GIF89a", b"text/plain; charset=utf-8"),
    ("a.bin", b"GIF89a", b"application/octet-stream"),
    ("a.mjs", b"x", b"text/javascript; charset=utf-8"),
    ("a.json", b"x", b"application/json"),
    ("a.svg", b"x", b"image/svg+xml"),
    ("a.png", b"x", b"image/png"),
    ("a.webp", b"x", b"image/webp"),
    ("a.avif", b"x", b"image/avif"),
    ("a.woff2", b"x", b"font/woff2"),
    ("a.wasm", b"x", b"application/wasm"),
    ("a.pdf", b"x", b"application/pdf"),
    ("a.mp4", b"x", b"video/mp4"),
    ("a.unknown", b"x", b"application/octet-stream"),
    ("html", b"x", b"application/octet-stream"),
    ("/x.html/y", b"x", b"application/octet-stream"),
])
def test_a_name_tells_the_type_and_utf8_the_charset(name, sample, expected):
    assert content_type(name, sample) == expected


@pytest.mark.parametrize("kind, sample, expected", [
    (b"image/png", b"\xff\xd8\xff\xe0", b"image/jpeg"),
    (b"image/png", b"nothing", b"image/png"), (b"text/css", b"GIF89a",
                                               b"text/css")])
def test_a_type_from_elsewhere_is_put_right_too(kind, sample, expected):
    assert true_type(kind, sample) == expected


@pytest.mark.parametrize("name", [
    "a.tar.gz", "a.html.gz", "a.svgz", "a.css.br", "a.tar.bz2", "a.tgz",
    "a.txt.xz"])
def test_what_is_packed_has_not_the_type_of_its_content(name):
    kind = content_type(name, NOISE)
    assert kind.startswith(b"application/")
    assert not is_compressible(kind)
    assert kind != b"application/x-tar"


@pytest.mark.parametrize("kind, expected", [
    (b"text/html; charset=utf-8", True), (b"text/css", True),
    (b"application/json", True), (b"image/svg+xml", True),
    (b"application/ld+json", True), (b"application/wasm", True),
    (b"font/ttf", True), (b"image/x-icon", True), (b"image/png", False),
    (b"image/jpeg", False), (b"font/woff2", False), (b"video/mp4", False),
    (b"application/zip", False), (b"application/octet-stream", False)])
def test_text_is_worth_compressing(kind, expected):
    assert is_compressible(kind) is expected


@given(st.text(max_size=20), st.binary(max_size=20))
def test_any_name_has_a_type(name, sample):
    assert b"/" in content_type(name, sample)


@given(st.binary(max_size=80))
def test_any_accept_field_is_read(field):
    named, others = formats_shown(field)
    assert all(0 <= weight <= 1 for weight in (*named.values(), others))


@given(st.dictionaries(st.sampled_from([
    b"image/avif", b"image/webp", b"image/jpeg", b"*/*", b"text/html"]),
    st.integers(0, 1000).map(lambda n: n / 1000)))
def test_a_named_type_has_its_weight_and_others_that_of_the_best(weights):
    named, others = formats_shown(b", ".join(
        b"%b ; q=%.3f" % item for item in weights.items()))
    wild = weights.pop(b"*/*", 0)
    weights.pop(b"text/html", None)
    assert named == weights
    assert others == max(wild, *weights.values(), 0 if weights else 1)


def test_every_change_of_what_an_asset_is_answered_with_is_told(shelf):
    told = []
    path = str(shelf.write("a.css", CSS))
    asset = shelf.settle("a.css")
    shelf.repository.on_change = told.append
    assert not asset.is_settled()
    shelf.repository.hasten(asset, "gzip")
    assert told == [path]
    shelf.work(asset)
    assert len(told) > len(asset.job()["wanted"])
    assert asset.is_settled() is (asset.trusted_until == float("inf"))
    del told[:]
    shelf.repository.purge(lambda *place: True)
    assert told == [path]
    assert shelf.settle("a.css") is not asset
    shelf.write("a.css", CSS[::-1])
    del told[:]
    shelf.settle("a.css")
    assert path in told


def test_what_engines_use_is_not_taken_for_unused(tmp_path):
    # Three of them find room.
    shelf = Shelf(tmp_path, memory_cache_bytes=22_000)
    for number in range(4):
        shelf.write(f"{number}.bin", NOISE)
    assets = [shelf.settle(f"{number}.bin") for number in range(3)]
    used = {assets[0].path}

    def change(path):
        """Whether it was used, which is told once."""
        is_used = path in used
        used.discard(path)
        return is_used
    shelf.repository.on_change = change
    shelf.settle("3.bin")
    known = [shelf.peek(f"{number}.bin") for number in range(3)]
    assert known == [assets[0], None, assets[2]]
