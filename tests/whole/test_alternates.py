"""The smaller forms of files: made beside serving, chosen by each client."""

import concurrent.futures
import hashlib
import io
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from harness import DOMAIN, PROGRAM, Server, eventually, make_site
from images import gradient, photograph, saved
from PIL import Image, ImageCms

#: what Chromium sends for an image
CHROMIUM = {"accept": "image/avif,image/webp,*/*",
            "accept-encoding": "gzip, deflate, br, zstd"}
CODINGS = {"br", "zstd", "gzip"}
FORMS = {".jpg": {"jpeg", "webp", "avif"}, ".png": {"png", "webp", "avif"},
         ".gif": {"png", "webp", "avif"}}
STORED = re.compile(r"([0-9a-f]{64})\.(?:([a-z]+)\.)?([a-z0-9_]+)-\d+"
                    r"\.(\d+)\.([0-9a-f]{16})")
TEXT = b"".join(b"p.class-%d { margin: %dpx; }\n" % (n, n * n % 97)
                for n in range(500))
#: what each visitor gets of it, whatever it holds
SCRIPTED = (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
            b"<script>document.title = 'drawn'</script>"
            + b'<rect width="3" height="3" fill="#123456"/>' * 20 + b"</svg>")


def opened(body):
    return Image.open(io.BytesIO(body))


def album(count, **options):
    return {f"photo-{n}.jpg": photograph(n, **options) for n in range(count)}


def film(count):
    """A GIF of many tiny frames, each unlike the one before."""
    ramp = Image.linear_gradient("L").resize((8, 8))
    frames = [ramp.point(lambda level: level // 2 + 2 * (n % 50))
              for n in range(count)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:],
                 duration=50, loop=0)


def inked():
    """A CMYK JPEG with a profile for inks."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    octets = profile.tobytes()
    return saved(gradient(1).convert("CMYK"), "JPEG", quality=92,
                 icc_profile=octets[:16] + b"CMYK" + octets[20:])


def cache(folder):
    return folder / ".shimmercat.loves.devs" / "r-cache"


def stored(folder, source, *marks):
    """{form: file} of the alternates of a source, or of its marks."""
    sha = hashlib.sha256(source).hexdigest()
    return {match[3]: path for path in cache(folder).rglob(f"{sha}.*")
            if (match := STORED.fullmatch(path.name))
            and match[2] == (marks[0] if marks else None)}


def is_settled(folder, name):
    """Whether each form of a file was made, or is known not to be had."""
    path = folder / "www" / name
    source = path.read_bytes()
    found = stored(folder, source) | stored(folder, source, "declined")
    return found.keys() >= FORMS.get(path.suffix, CODINGS)


def settle(folder, names, seconds=60):
    """Wait until all is made of the files that is to be made."""
    for name in names:
        eventually(lambda: is_settled(folder, name), seconds, name)


def visit(server, names, headers=CHROMIUM, method="GET"):
    """{name: response} of requests over one connection."""
    with server.client() as client:
        return {name: client.request(
            method, f"/{name}", headers=headers,
            extensions={"sni_hostname": DOMAIN}) for name in names}


def ask(server, name, accept=CHROMIUM["accept"], method="GET", **fields):
    """The response to one request over a connection of its own."""
    headers = {**CHROMIUM, "accept": accept} | {
        field.replace("_", "-"): value for field, value in fields.items()}
    return visit(server, [name], headers, method)[name]


def assert_right(response, source):
    """A 200 with the source itself, or a picture that looks like it."""
    assert response.status_code == 200
    if response.content == source:
        return
    kind, shown = response.headers["content-type"], opened(response.content)
    assert kind == f"image/{shown.format.lower()}"
    assert int(response.headers["content-length"]) == len(response.content)
    assert len(response.content) < len(source)
    expected = np.asarray(opened(source).convert("RGB"), float)
    found = np.asarray(shown.convert("RGB"), float)
    assert found.shape == expected.shape
    assert abs(found - expected).mean() < 10


def children(server):
    return server.workers(), server.artisan(), server.redis()


def run(folder, *words):
    """What a command of the program said and how it ended."""
    return subprocess.run([sys.executable, str(PROGRAM), *words], cwd=folder,
                          capture_output=True, text=True, timeout=120)


# --- sources that are out of the ordinary ------------------------------------


ODDITIES = {
    "huge.png": lambda: saved(Image.new("1", (12_000, 12_000)), "PNG"),
    "truncated.jpg": lambda: photograph(1)[:-600],
    "pixel.gif": lambda: saved(Image.new("P", (1, 1)), "GIF"),
    "film.gif": lambda: film(500),
    "inks.jpg": inked,
    "scripted.svg": lambda: SCRIPTED}


@pytest.fixture(scope="module")
def oddities(tmp_path_factory):
    """A server of all odd sources, settled: its answers before and after."""
    folder = make_site(tmp_path_factory.mktemp("odd"), {
        name: make() for name, make in ODDITIES.items()})
    with Server(folder, "--workers", "2") as server:
        before = children(server)
        first = visit(server, ODDITIES)
        # Below 128 octets nothing is tried.
        settle(folder, ODDITIES.keys() - {"pixel.gif"})
        eventually(lambda: "avif" in visit(server, ["film.gif"])[
            "film.gif"].headers["content-type"], 2)
        yield server, first, visit(server, ODDITIES)
        assert children(server) == before
        assert not server.lines("M60002")


def odd_answer(oddities, name):
    """The source and what was answered at last; at first it was whole."""
    server, first, then = oddities
    source = (server.folder / "www" / name).read_bytes()
    assert first[name].status_code == then[name].status_code == 200
    assert first[name].content == source
    return source, then[name]


@pytest.mark.parametrize("name, reason", [
    ("huge.png", "12000x12000"), ("truncated.jpg", "truncated")])
def test_what_is_refused_is_served_as_it_is_and_the_log_says_why(
        oddities, name, reason):
    source, answer = odd_answer(oddities, name)
    assert answer.content == source
    assert answer.headers["vary"] == "accept"
    said, = (line.message for line in oddities[0].lines("M60010")
             if name in line.message)
    assert reason in said
    assert answer.headers["content-type"] == {
        "h": "image/png", "t": "image/jpeg"}[name[0]]


def test_a_gif_of_one_pixel_is_served_as_it_is(oddities):
    source, answer = odd_answer(oddities, "pixel.gif")
    assert answer.content == source
    assert answer.headers["content-type"] == "image/gif"
    # It is too small for any form, so nothing depends on the client.
    assert "vary" not in answer.headers
    assert not stored(oddities[0].folder, source)


def test_an_animation_keeps_its_frames_and_times(oddities):
    source, answer = odd_answer(oddities, "film.gif")
    assert answer.headers["content-type"] == "image/avif"
    assert answer.headers["vary"] == "accept"
    assert len(answer.content) < len(source)
    shown = opened(answer.content)
    assert (shown.size, shown.n_frames) == ((8, 8), 500)
    shown.seek(499)
    shown.load()
    assert shown.info["duration"] == 50


def test_a_cmyk_image_stays_cmyk_and_keeps_its_profile(oddities):
    source, answer = odd_answer(oddities, "inks.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["vary"] == "accept"
    assert len(answer.content) < len(source)
    shown, original = opened(answer.content), opened(source)
    assert (shown.size, shown.mode) == (original.size, "CMYK")
    assert shown.info["icc_profile"] == original.info["icc_profile"]


def test_an_svg_with_a_script_is_compressed_and_nothing_else(oddities):
    source, answer = odd_answer(oddities, "scripted.svg")
    assert answer.content == source
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.headers["content-encoding"] in CODINGS
    assert answer.headers["vary"] == "accept-encoding"


# --- which form a client gets ------------------------------------------------


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A server of a photograph and a drawing of which all is made."""
    drawing = saved(gradient(2, (64, 48)), "PNG", compress_level=0)
    folder = make_site(tmp_path_factory.mktemp("gallery"), {
        "photo.jpg": photograph(1), "drawing.png": drawing})
    assert run(folder, "warm").returncode == 0
    with Server(folder, "--workers", "2") as server:
        yield server


@pytest.mark.parametrize("name", ["photo.jpg", "drawing.png"])
@pytest.mark.parametrize("accept", [
    "*/*", "", "image/*", "text/html", "image/png", "image/jpeg",
    "image/webp", "image/avif", "image/webp,*/*", "IMAGE/AVIF ; q=0.1",
    "image/avif;q=0,image/webp", "image/avif; q=0.000, */*",
    "image/avifs,*/*", CHROMIUM["accept"]])
def test_no_image_comes_in_a_form_that_was_not_named(gallery, name, accept):
    answer = ask(gallery, name, accept)
    source = (gallery.folder / "www" / name).read_bytes()
    assert_right(answer, source)
    own = {"jpg": "jpeg", "png": "png"}[name[-3:]]
    named = {own} | {form for form in ("webp", "avif") if re.search(
        rf"image/{form} *(,|; *q=0\.1|$)", accept.lower())}
    best = min(path.stat().st_size for form, path in stored(
        gallery.folder, source).items() if form in named)
    assert answer.headers["content-type"] in {f"image/{x}" for x in named}
    assert len(answer.content) == min(best, len(source))
    assert answer.headers["vary"] == "accept"


def test_each_form_has_an_etag_of_its_own(gallery):
    tags = [ask(gallery, "photo.jpg", accept).headers["etag"]
            for accept in ("*/*", "image/webp", "image/avif") * 2]
    assert len(set(tags)) == 3
    assert tags[:3] == tags[3:]


def test_a_validator_counts_for_its_own_form_only(gallery):
    kinds = "*/*", "image/webp", "image/avif"
    tags = {kind: ask(gallery, "photo.jpg", kind).headers["etag"]
            for kind in kinds}
    for known, tag in tags.items():
        for kind in kinds:
            answer = ask(gallery, "photo.jpg", kind, if_none_match=tag)
            assert answer.status_code == (304 if kind == known else 200)
            assert answer.headers["etag"] == tags[kind]
            assert answer.headers["vary"] == "accept"
            assert bool(answer.content) == (kind != known)


def test_ranges_are_parts_of_the_form_that_is_chosen(gallery):
    whole = ask(gallery, "photo.jpg")
    assert whole.headers["content-type"] == "image/avif"
    assert whole.headers["accept-ranges"] == "bytes"
    size, tag = len(whole.content), whole.headers["etag"]
    for spec, part in (("0-99", slice(0, 100)), ("100-", slice(100, None)),
                       ("-50", slice(-50, None))):
        answer = ask(gallery, "photo.jpg", range=f"bytes={spec}", if_range=tag)
        assert answer.status_code == 206
        assert answer.content == whole.content[part]
        assert answer.headers["content-type"] == "image/avif"
        assert answer.headers["content-range"].endswith(f"/{size}")
    beyond = ask(gallery, "photo.jpg", range=f"bytes={size}-")
    assert beyond.status_code == 416
    other = ask(gallery, "photo.jpg", "*/*", range="bytes=0-9", if_range=tag)
    assert other.status_code == 200


@pytest.mark.parametrize("accept", ["*/*", "image/webp", "image/avif"])
@pytest.mark.parametrize("name", ["photo.jpg", "drawing.png"])
def test_head_has_the_fields_of_get(gallery, name, accept):
    full, head = (ask(gallery, name, accept, method)
                  for method in ("GET", "HEAD"))
    assert head.status_code == 200 and not head.content
    fields = [{key: value for key, value in answer.headers.items()
               if key != "date"} for answer in (full, head)]
    assert fields[0] == fields[1]


# --- how forms come ----------------------------------------------------------


def test_all_workers_switch_within_a_second_of_the_last_form(tmp_path):
    source = photograph(1)
    make_site(tmp_path, {"photo.jpg": source})
    with Server(tmp_path, "--workers", "2") as server:
        assert ask(server, "photo.jpg").content == source
        for _ in range(8):
            # Each worker comes to know the original.
            assert_right(ask(server, "photo.jpg"), source)
        server.await_line("M20004", about="avif made", seconds=60)
        time_is_up = time.monotonic() + 1
        while time.monotonic() < time_is_up:
            assert_right(ask(server, "photo.jpg"), source)
        kinds = {ask(server, "photo.jpg").headers["content-type"]
                 for _ in range(20)}
        assert kinds == {"image/avif"}


def seconds_of(*pids, with_children=False):
    """CPU seconds in user mode of processes, and of their dead children."""
    ticks = 0
    for pid in pids:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        numbers = text.rpartition(")")[2].split()
        ticks += int(numbers[11]) + with_children * int(numbers[13])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_no_worker_ever_encodes(tmp_path):
    photos = album(12, size=(64, 48))
    make_site(tmp_path, photos)
    with Server(tmp_path, "--workers", "2") as server:
        def spent():
            return np.array([
                seconds_of(*server.workers().values(), with_children=True),
                seconds_of(server.artisan(), with_children=True)])
        begin = spent()
        for _ in range(4):
            for name, answer in visit(server, photos).items():
                assert_right(answer, photos[name])
        settle(tmp_path, photos)
        workers, artisan = spent() - begin
        assert artisan > 0.5
        assert workers < artisan / 2


def assert_whole(folder, photos):
    """All in the store is what its name says, and shows its source."""
    by_sha = {hashlib.sha256(x).hexdigest(): x for x in photos.values()}
    for path in cache(folder).rglob("*"):
        if path.is_dir() or path.name.startswith(".draft-"):
            # A kill leaves drafts, of which nobody knows.
            continue
        sha, mark, form, size, digest = STORED.fullmatch(path.name).groups()
        body = path.read_bytes()
        assert len(body) == int(size)
        assert hashlib.sha256(body).hexdigest()[:16] == digest
        if form in FORMS[".jpg"] and not mark:
            shown = opened(body)
            shown.load()
            assert shown.format.lower() == form
            assert shown.size == opened(by_sha[sha]).size


def test_nothing_in_the_store_is_half_after_fifty_kills(tmp_path):
    photos, chance = album(24, size=(64, 48)), random.Random(50)
    make_site(tmp_path, photos, {"artisan-job-seconds": 1})
    with Server(tmp_path, "--workers", "2") as server:
        for n in range(50):
            server.await_line("M20002", n + 1, about="artisan", seconds=20)
            moment = time.monotonic() + chance.uniform(0, 0.2)
            # More at first, that there is work; then some of them again.
            names = list(photos) if n % 10 == 0 else chance.sample(
                list(photos), 4)
            for name, answer in visit(server, names).items():
                assert_right(answer, photos[name])
            eventually(lambda: time.monotonic() > moment)
            os.kill(server.artisan(), signal.SIGKILL)
        server.await_line("M20002", 51, about="artisan", seconds=20)
        assert_whole(tmp_path, photos)
    # Without Redis no lease of the dead is left.
    make_site(tmp_path, photos, {"artisan-job-seconds": 60})
    assert run(tmp_path, "warm").returncode == 0
    settle(tmp_path, photos)
    assert_whole(tmp_path, photos)
    with Server(tmp_path, "--workers", "2") as server:
        for name, answer in visit(server, photos).items():
            assert_right(answer, photos[name])
            bodies = {path.read_bytes() for path in stored(
                tmp_path, photos[name]).values()} | {photos[name]}
            assert answer.content in bodies


def clear(folder):
    for path in cache(folder).iterdir():
        shutil.rmtree(path, ignore_errors=True)


def test_the_store_may_be_cleared_while_it_is_served_from(tmp_path):
    files = {**album(4, size=(64, 48)), "style.css": TEXT}
    # Whatever is served is read from its file each time.
    make_site(tmp_path, files, {"small-file-bytes": 0})
    with (Server(tmp_path, "--workers", "2") as server,
          concurrent.futures.ThreadPoolExecutor() as pool):
        before = children(server)

        def is_small():
            return all(answer.num_bytes_downloaded < len(files[name]) / 1.2
                       for name, answer in visit(server, files).items())
        for n in range(7):
            if n % 3 == 0:
                eventually(is_small, 20)
            visits = [pool.submit(visit, server, [*files] * 5)
                      for _ in range(2)]
            while not all(found.done() for found in visits):
                clear(tmp_path)
            for found in visits:
                for name, answer in found.result().items():
                    assert_right(answer, files[name])
        eventually(is_small, 20)
        assert children(server) == before
        assert not server.lines("M60001")


# --- policy ------------------------------------------------------------------


def assert_only_one_is_worked_on(folder, files, known):
    """Everything but `known`, the last that the artisan does, is as it is."""
    with Server(folder, "--workers", "2") as server:
        for _ in range(2):
            for name, answer in visit(server, files).items():
                assert answer.status_code == 200
                if name != known:
                    assert answer.num_bytes_downloaded == len(files[name])
                    assert answer.content == files[name]
                    assert "content-encoding" not in answer.headers
                if name.endswith(".jpg"):
                    assert "vary" not in answer.headers
            settle(folder, [known])
    shas = {hashlib.sha256(source).hexdigest() for name, source
            in files.items() if name != known}
    assert not [path for path in cache(folder).rglob("*")
                if path.name.partition(".")[0] in shas]


def test_tweaks_can_leave_images_alone(tmp_path):
    files = {"a.css": TEXT, **album(2)}
    make_site(tmp_path, files, {"images": "none"})
    assert_only_one_is_worked_on(tmp_path, files, "a.css")


def test_a_domain_can_leave_images_alone(tmp_path):
    files = {"a.css": TEXT, **album(2)}
    make_site(tmp_path, files)
    with (tmp_path / "devlove.yaml").open("a") as stream:
        stream.write("      images: none\n")
    assert_only_one_is_worked_on(tmp_path, files, "a.css")


def test_nothing_is_made_of_what_must_not_be_transformed(tmp_path):
    files = {"a.html": TEXT, "style.css": TEXT + b"p {}\n", **album(2)}
    make_site(tmp_path, files, {
        "cache-control": "public, max-age=60, no-transform"})
    assert_only_one_is_worked_on(tmp_path, files, "a.html")
