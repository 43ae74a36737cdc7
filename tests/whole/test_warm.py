"""`warm` makes ahead what visitors would have made; `explain` says why."""

import base64
import collections
import contextlib
import hashlib
import io
import os
import pathlib
import pty
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from harness import DOMAIN, PROGRAM, Server, eventually, make_site
from images import animation, photograph
from PIL import Image

CHROMIUM = {"accept": "image/avif,image/webp,image/apng,*/*;q=0.8",
            "accept-encoding": "gzip, deflate, br, zstd"}
CODINGS = {"br", "zstd", "gzip"}
FORMS = {".jpg": {"jpeg", "webp", "avif"}}
TEXT = b"".join(b"p.class-%d { margin: %dpx; }\n" % (n, n * n % 97)
                for n in range(500))


def album(count, **options):
    return {f"photo-{n}.jpg": photograph(n, **options) for n in range(count)}


def kept(folder):
    """All files of the store and what tells whether they were replaced."""
    cache = folder / ".shimmercat.loves.devs" / "r-cache"
    return {path: (path.stat().st_ino, path.stat().st_ctime_ns)
            for path in cache.rglob("*")
            # Drafts come and go.
            if path.name[0] != "." and path.is_file()}


def stored(folder, source, *marks):
    """{form: length} of the alternates of a source, or of its marks."""
    sha, found = hashlib.sha256(source).hexdigest(), {}
    for path in kept(folder):
        if path.name.startswith(sha):
            _, *mark, form, size, _ = path.name.split(".")
            if mark == [*marks]:
                found[form.rpartition("-")[0]] = int(size)
    return found


def is_settled(folder, name):
    """Whether each form of a file was made, or is known not to be had."""
    path = folder / "www" / name
    source = path.read_bytes()
    found = stored(folder, source) | stored(folder, source, "declined")
    return found.keys() >= FORMS.get(path.suffix, CODINGS)


def command(*words):
    return [sys.executable, str(PROGRAM), *words]


def run(folder, *words):
    """What a command of the program said and how it ended."""
    return subprocess.run(command(*words), cwd=folder, capture_output=True,
                          text=True, timeout=120)


def explained(folder, url, *headers):
    """What `explain` prints; it ends well, whatever would be answered."""
    words = [word for header in headers for word in ("--header", header)]
    done = run(folder, "explain", url, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def ask(server, path, **headers):
    return server.fetch(path, headers=CHROMIUM | headers)


def table(text):
    """{type: (files, bytes before, bytes after)} of what `warm` printed."""
    head, *rows = text.splitlines()
    assert head.split() == ["type", "files", "bytes", "before", "after",
                            "saved"]
    found = {}
    for row in rows:
        kind, *numbers, share, _ = row.split()
        files, before, after = map(int, numbers)
        assert float(share) == pytest.approx(
            100 * (before - after) / before, abs=0.06)
        found[kind] = files, before, after
    return found


def expected_table(folder, files):
    """What the table should hold by what the store has."""
    kinds = {"jpg": "image/jpeg", "css": "text/css", "html": "text/html",
             "bin": "application/octet-stream"}
    sums = collections.defaultdict(lambda: np.zeros(3, int))
    for name, source in files.items():
        forms = stored(folder, source).items()
        smallest = min([len(source)] + [
            size for form, size in forms if form in FORMS[".jpg"] | CODINGS])
        sums[kinds[name.rpartition(".")[2]]] += 1, len(source), smallest
    return {kind: tuple(numbers) for kind, numbers in sums.items()}


# --- warm --------------------------------------------------------------------


def test_all_is_made_once_and_the_table_says_how_much_is_saved(tmp_path):
    files = {**album(8), "style.css": TEXT,
             "index.html": b"<!DOCTYPE html>" + TEXT, "data.bin": TEXT[::-1]}
    make_site(tmp_path, files)

    def seconds():
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    begin = seconds()
    first = run(tmp_path, "warm")
    between = seconds()
    assert first.returncode == 0
    made = kept(tmp_path)
    assert all(is_settled(tmp_path, name) for name in files
               if name != "data.bin")
    assert table(first.stdout) == expected_table(tmp_path, files)
    assert "11/11 files" in first.stderr.splitlines()[-1]

    second = run(tmp_path, "warm")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert kept(tmp_path) == made
    assert seconds() - between < (between - begin) / 2


def test_a_warm_up_that_was_killed_goes_on_where_it_was(tmp_path):
    files = album(8)
    make_site(tmp_path, files)
    with subprocess.Popen(command("warm"), cwd=tmp_path,
                          stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        eventually(lambda: any(is_settled(tmp_path, x) for x in files), 30)
        process.kill()
    settled = {name for name in files if is_settled(tmp_path, name)}
    assert 0 < len(settled) < len(files)
    before = kept(tmp_path)
    assert run(tmp_path, "warm").returncode == 0
    assert all(is_settled(tmp_path, name) for name in files)
    assert before.items() <= kept(tmp_path).items()


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_warm_up_may_be_ended_any_number_of_times(tmp_path, number, status):
    files = {f"{n}.jpg": photograph(n, (128, 96)) for n in range(2)}
    for name, source in files.items():
        # On a busy machine what comes first may be made before the end.
        make_site(tmp_path, {name: source})
        with subprocess.Popen(command("warm"), cwd=tmp_path,
                              stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            eventually(lambda: children(process.pid), 30)
            process.send_signal(number)
            assert process.wait(10) == status
    done = run(tmp_path, "warm")
    assert (done.returncode, "died" in done.stderr) == (0, False)
    for source in files.values():
        assert {"jpeg", "webp", "avif"} <= stored(tmp_path, source).keys()


def test_the_bar_of_a_warm_up_stays_in_its_place_on_a_terminal(tmp_path):
    make_site(tmp_path, album(2, size=(128, 96)))
    terminal, its_end = pty.openpty()
    with subprocess.Popen(command("warm"), cwd=tmp_path, stderr=its_end,
                          stdout=subprocess.DEVNULL) as process:
        os.close(its_end)
        shown = b""
        # A terminal ends with an error: EIO.
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 4096):
                shown += piece
    os.close(terminal)
    assert process.returncode == 0
    bar = rb"\r\[[# ]{30}\] \d/2 files, \d\.\d MiB saved"
    assert re.fullmatch(
        rb"(%b(, \d+ s left)?\x1b\[K)*%b\x1b\[K\r\n" % (bar, bar), shown)


def children(pid):
    """Process ids of a process's children: of the jobs that it has done."""
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_what_was_refused_is_tried_again_when_that_is_wanted(tmp_path):
    source = photograph(1)
    make_site(tmp_path, {"large.jpg": source, "style.css": TEXT},
              {"image-pixels": 1000})
    assert run(tmp_path, "warm").returncode == 0
    make_site(tmp_path, {}, {"image-pixels": 10_000})
    assert run(tmp_path, "warm").returncode == 0
    refused = stored(tmp_path, source, "declined")
    assert refused.keys() == {"jpeg", "webp", "avif"}
    text = stored(tmp_path, TEXT)
    assert run(tmp_path, "warm", "www/large.jpg", "--again").returncode == 0
    assert stored(tmp_path, source).keys() >= {"jpeg", "avif"}
    assert stored(tmp_path, TEXT) == text


def test_nothing_is_left_to_be_made_for_visitors(tmp_path):
    page = b"<!DOCTYPE html>" + TEXT
    files = {"index.html": page, "sub/index.html": page + b"<p>",
             "a b+c.css": TEXT, ".well-known/notes.txt": TEXT + b"notes",
             "copy.css": TEXT, "photo.png": photograph(1),
             "photo.jpg": photograph(1)}
    make_site(tmp_path, files)
    done = run(tmp_path, "warm")
    assert done.returncode == 0
    assert sum(row[0] for row in table(done.stdout).values()) == len(files)
    with Server(tmp_path, "--workers", "2") as server:
        made = kept(tmp_path)
        for path in ("/", "/sub/", "/sub/index.html", "/a%20b+c.css",
                     "/a%20b%2Bc.css", "/.well-known/notes.txt", "/photo.png",
                     "/photo.jpg", "/copy.css"):
            answer = ask(server, path)
            assert answer.status_code == 200
            assert re.search(r'-(avif|br)-\d+"', answer.headers["etag"]), path
        # What is asked for last is made last.
        (tmp_path / "www" / "late.css").write_bytes(TEXT + b"late")
        eventually(lambda: ask(server, "/late.css") and server.lines(
            "M20004"), 20)
        assert all("late.css" in line.message
                   for line in server.lines("M20004"))
        assert made.items() <= kept(tmp_path).items()


def test_copies_of_a_file_do_not_get_into_each_others_way(tmp_path):
    make_site(tmp_path, {f"{n}.jpg": photograph(1) for n in range(6)})
    with Server(tmp_path, "--workers", "2"):
        done = run(tmp_path, "warm")
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_what_is_not_made_ahead_is_said(tmp_path):
    make_site(tmp_path, {"a.css": TEXT})
    with (tmp_path / "devlove.yaml").open("a") as stream:
        stream.write("    api api.test: {port: 9000}\n")
    done = run(tmp_path, "warm")
    assert done.returncode == 0
    said, = (line for line in done.stderr.splitlines() if ".test: " in line)
    assert said == "api.test: left out, has no statics on this machine"


def assert_warm(server, answers):
    """Each target is answered from what was made, and nothing is made.

    `answers` are {(target, Accept): (start of its ETag's last part, width)}.
    """
    made = kept(server.folder)
    for (target, accept), (form, width) in answers.items():
        answer = ask(server, target, accept=accept)
        assert answer.status_code == 200
        assert re.search(rf'-{form}-\d+"', answer.headers["etag"]), target
        if width:
            assert opened(answer).width == width, target
    # What is asked for last is made last.
    (server.folder / "www" / "late.css").write_bytes(TEXT + b"late")
    eventually(lambda: ask(server, "/late.css") and server.lines("M20004"), 20)
    assert all("late.css" in x.message for x in server.lines("M20004"))
    assert made.items() <= kept(server.folder).items()


def opened(answer):
    return Image.open(io.BytesIO(answer.content))


def test_all_widths_of_images_are_made_ahead(tmp_path):
    files = {"photo.jpg": photograph(1, (400, 60)), "style.css": TEXT,
             "moving.gif": animation()}
    make_site(tmp_path, files, {"images": "scale"})
    with subprocess.Popen(command("warm"), cwd=tmp_path,
                          stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        eventually(lambda: "avif_160" in stored(tmp_path, files["photo.jpg"]),
                   30)
        process.kill()
    # Marks are set anew by the job that was broken off.
    before = {path: known for path, known in kept(tmp_path).items()
              if not re.search(r"\.(note|kin)\.", path.name)}
    done = run(tmp_path, "warm")
    assert done.returncode == 0
    assert before.items() <= kept(tmp_path).items()
    found = stored(tmp_path, files["photo.jpg"])
    assert found.keys() >= {
        f"{form}{width}" for form in ("jpeg", "avif")
        for width in ("", "_160", "_320")}
    # An image counts once, in its own width.
    counted = table(done.stdout)
    assert counted["image/jpeg"] == (
        1, len(files["photo.jpg"]),
        min(found[form] for form in FORMS[".jpg"] & found.keys()))
    assert "3/3 files" in done.stderr.splitlines()[-1]
    assert run(tmp_path, "warm").stdout == done.stdout
    everything, modern = CHROMIUM["accept"], "(avif|webp)"
    with Server(tmp_path, "--workers", "2") as server:
        assert_warm(server, {
            ("/photo.jpg", everything): (modern, 400),
            ("/photo.jpg?sc-width=100", everything): (f"{modern}_160", 160),
            ("/photo.jpg?sc-width=320", "*/*"): ("jpeg_320", 320),
            ("/photo.jpg?sc-width=399", everything): (modern, 400),
            ("/photo.jpg?sc-width=2560", "*/*"): ("jpeg", 400),
            ("/moving.gif?sc-width=16", everything): (modern, 48)})


VIEWS = {
    "about/index.html": "cache-seconds: 60",
    "shop/__index.html": "content-disposition: consult\n  consultant: shop",
    "data/index.html": "content-disposition: use-json\n  consultant: shop",
    "app/index.html": "consultant: shop"}


def test_pages_of_views_are_made_ahead_where_they_are_kept(tmp_path):
    views = {name: f"<p>{name}\n<!--\nshimmercat:\n  {words}\n-->\n".encode()
             + TEXT for name, words in VIEWS.items()}
    make_site(tmp_path, {"plain/index.html": TEXT + b"plain",
                         "v2/style.css": TEXT, **views})
    with (tmp_path / "devlove.yaml").open("a") as stream:
        # Two are named, so that neither is the domain's own.
        stream.write("      change-url: [/v1 -> /v2/+common]\n"
                     "      consultants:\n"
                     "        shop: {connect-to: 127.0.0.1:1}\n"
                     "        other: {connect-to: 127.0.0.1:1}\n")
    done = run(tmp_path, "warm")
    assert (done.returncode, done.stderr.count(".html")) == (0, 0)
    assert table(done.stdout)["text/html"][0] == 3
    for name, content in views.items():
        # Nobody is sent the instructions.
        assert not stored(tmp_path, content), name
    with Server(tmp_path) as server:
        assert_warm(server, {
            (path, "*/*"): ("br", None) for path in (
                "/about/", "/plain/", "/plain/index.html", "/v1/style.css")})
    page = page_of(views["shop/__index.html"])
    assert stored(tmp_path, page).keys() == CODINGS
    for name in ("data/index.html", "app/index.html"):
        assert not stored(tmp_path, page_of(views[name])), name


def page_of(content):
    """A view without its instructions."""
    head, _, rest = content.partition(b"<!--")
    return head + rest.partition(b"-->\n")[2]


def test_what_changed_in_a_text_is_made_ahead_for_those_who_hold_the_old_one(
        tmp_path):
    old, new = TEXT + b"old", TEXT + b"p.added { margin: 0 }\n"
    make_site(tmp_path, {"style.css": old, "photo.jpg": photograph(1)})
    assert run(tmp_path, "warm").returncode == 0
    make_site(tmp_path, {"style.css": new})
    for _ in range(2):
        done = run(tmp_path, "warm")
        assert (done.returncode, "2/2 files" in done.stderr) == (0, True)
    held = hashlib.sha256(old).digest()
    assert f"dcz_{held.hex()[:16]}" in stored(tmp_path, new)
    with Server(tmp_path) as server:
        answer = ask(server, "/style.css", **{
            "accept-encoding": "dcz, br", "available-dictionary":
            f":{base64.b64encode(held).decode()}:"})
        assert answer.headers["content-encoding"] == "dcz"
        assert int(answer.headers["content-length"]) < 200
        assert not server.lines("M20004")


def test_a_view_with_mistakes_is_named(tmp_path):
    make_site(tmp_path, {"style.css": TEXT, "bad/index.html":
                         b"<!--\nshimmercat:\n  consultant: none\n-->\n"})
    done = run(tmp_path, "warm")
    assert done.returncode == 78
    assert "bad/index.html" in done.stderr


def test_what_took_too_long_is_named_and_what_was_refused_is_not(tmp_path):
    files = {"large.jpg": photograph(1, (1200, 900)),
             "broken.jpg": photograph(2)[:-600], "style.css": TEXT}
    make_site(tmp_path, files, {"artisan-job-seconds": 1})
    done = run(tmp_path, "warm")
    assert done.returncode == 1
    failure = done.stderr.splitlines()[-1]
    assert re.search(r"www/large\.jpg: took longer than 1 s", failure)
    assert "broken.jpg" not in done.stderr
    assert all(is_settled(tmp_path, name) for name in files)
    assert table(done.stdout) == expected_table(tmp_path, files)


def test_a_running_instance_serves_at_once_what_was_made_beside_it(tmp_path):
    files = {**album(3), "style.css": TEXT}
    make_site(tmp_path, files)
    with Server(tmp_path, "--workers", "2") as server:
        # Suspended: whatever is made, it is not by the instance.
        os.kill(server.artisan(), signal.SIGSTOP)
        try:
            for name, source in files.items():
                for _ in range(6):
                    assert ask(server, f"/{name}").content == source
            assert not kept(tmp_path)
            assert run(tmp_path, "warm").returncode == 0

            def etags():
                return [ask(server, f"/{name}").headers["etag"]
                        for name in files for _ in range(6)]
            eventually(lambda: all(re.search(r'-(avif|webp|br)-\d+"', tag)
                                   for tag in etags()), 2)
        finally:
            os.kill(server.artisan(), signal.SIGCONT)
        assert not server.lines("M20004")
        assert not server.lines("M60002")


def test_a_folder_limits_what_is_made(tmp_path):
    files = {"album/one.jpg": photograph(1), "album/deep/two.jpg":
             photograph(2), "other/three.jpg": photograph(3),
             "albums.css": TEXT}
    site = make_site(tmp_path / "site", files)
    for folder, words in (
            (site, ["www/album/deep"]),
            (tmp_path, [str(site / "www/album"), "--working-dir", str(site)])):
        done = run(folder, "warm", *words)
        assert done.returncode == 0
        inside = {name: source for name, source in files.items()
                  if (site / "www" / name).is_relative_to(site / words[0])}
        assert 0 < len(inside) < len(files)
        assert table(done.stdout) == expected_table(site, inside)
        assert {name for name in files if is_settled(site, name)} == {*inside}
        assert all(stored(site, source) for source in inside.values())
        assert not any(stored(site, files[name])
                       for name in files.keys() - inside.keys())


# --- explain -----------------------------------------------------------------


@pytest.fixture(scope="module")
def warm_site(tmp_path_factory):
    """A site of a text and a photograph of which all was made."""
    folder = make_site(tmp_path_factory.mktemp("warm"), {
        "index.html": b"<h1>Hello</h1>\n", "style.css": TEXT,
        "photo.jpg": photograph(1)})
    assert run(folder, "warm").returncode == 0
    return folder


def form_lines(text):
    """{form: (bytes, judgement)} of the forms that `explain` prints."""
    found = re.findall(r"^form (\w+): (\d+) bytes, (.*)$", text, re.MULTILINE)
    return {form: (int(size), words) for form, size, words in found}


def test_explain_tells_the_forms_of_a_text_and_which_is_chosen(warm_site):
    said = explained(warm_site, f"https://{DOMAIN}/style.css")
    forms, sizes = form_lines(said), stored(warm_site, TEXT)
    assert {form: size for form, (size, _) in forms.items()} == {
        **{form: sizes[form] for form in CODINGS}, "identity": len(TEXT)}
    chosen = min(CODINGS, key=sizes.get)
    for form, (_, words) in forms.items():
        assert words == ("chosen" if form == chosen else "larger")
    assert f"200 OK: static, {chosen}" in said
    assert f"content-encoding: {chosen}" in said
    assert f"content-length: {sizes[chosen]}" in said


def test_explain_tells_why_a_smaller_form_is_not_chosen(warm_site):
    url = f"https://{DOMAIN}/photo.jpg"
    said = explained(warm_site, url)
    assert form_lines(said)["avif"][1] == "chosen"
    assert "200 OK: static, avif" in said
    said = explained(warm_site, url, "accept: */*")
    assert form_lines(said)["avif"][1] == (
        "not acceptable to this client, or liked less")
    assert form_lines(said)["jpeg"][1] == "chosen"
    assert form_lines(said)["identity"][1] == "larger"
    assert "200 OK: static, jpeg" in said
    assert "content-type: image/jpeg" in said and "vary: accept" in said
    said = explained(warm_site, url, "accept: image/webp", "range: bytes=0-9")
    assert "206 Partial Content" in said and "content-type: image/webp" in said


def test_explain_tells_what_was_not_made_yet_and_what_will_not_be(tmp_path):
    broken = photograph(1)[:-600]
    make_site(tmp_path, {"photo.jpg": photograph(1), "broken.jpg": broken})
    said = explained(tmp_path, f"https://{DOMAIN}/photo.jpg")
    for form in ("jpeg", "webp", "avif"):
        assert f"form {form}: not made yet" in said
    assert form_lines(said) == {"identity": (len(photograph(1)), "chosen")}
    assert not kept(tmp_path)
    assert run(tmp_path, "warm").returncode == 0
    said = explained(tmp_path, f"https://{DOMAIN}/broken.jpg")
    assert len(re.findall(r"form \w+: none, .*truncated", said)) == 3


@pytest.mark.parametrize("url, answer, reason", [
    (f"https://{DOMAIN}/missing.png", "404 Not Found",
     "www/missing.png: No such file or directory\n"),
    ("https://foreign.test/photo.jpg", "421 Misdirected Request",
     "foreign.test")])
def test_explain_tells_what_is_not_served(warm_site, url, answer, reason):
    said = explained(warm_site, url)
    assert answer in said and reason in said
    assert not form_lines(said)


def test_explain_speaks_for_internet_mode(warm_site):
    said = explained(warm_site, f"https://{DOMAIN}/style.css")
    assert "server-timing" not in said and "cache-status" not in said
    with Server(warm_site, "--workers", "1") as server:
        fields = ask(server, "/style.css", accept="*/*").headers
    assert {line.split(":")[0].strip() for line in said.splitlines()
            if line[:4] == "    "} == {*fields} - {"date"}


def test_explain_tells_forms_that_are_made_quickly_from_the_best(tmp_path):
    make_site(tmp_path, {"style.css": TEXT})
    said = explained(tmp_path, f"https://{DOMAIN}/style.css")
    assert "made quickly" in form_lines(said)["br"][1]
    assert "form br: not made yet" not in said
    assert "form zstd: not made yet" in said


def test_explain_reads_and_writes_nothing(tmp_path):
    """Neither what serving would note nor what it would heal."""
    name, www = "app.3f2a9c1b.js", tmp_path / "www"
    make_site(tmp_path, {name: TEXT, "style.css": TEXT + b"more"})
    assert run(tmp_path, "warm").returncode == 0
    (www / name).unlink()
    damaged = next(path for path in kept(tmp_path) if ".br-11." in path.name
                   and hashlib.sha256(TEXT + b"more").hexdigest() in path.name)
    damaged.write_bytes(b"damage")
    for path in kept(tmp_path):
        os.utime(path, (1, 1))
    before = kept(tmp_path), os.listdir(tmp_path)
    said = explained(tmp_path, f"https://{DOMAIN}/{name}")
    assert "keep-removed-days" in said and "200 OK" in said
    assert "200 OK" in explained(tmp_path, f"https://{DOMAIN}/style.css")
    assert (kept(tmp_path), os.listdir(tmp_path)) == before


def test_explain_and_a_running_instance_agree_and_leave_each_other_alone(
        warm_site):
    with Server(warm_site, "--workers", "2") as server:
        before, made = server.processes(), kept(warm_site)
        said_before = [line.text for line in server.lines()]
        for name, accept in (
                ("style.css", "*/*"), ("", "*/*"), ("photo.jpg", "*/*"),
                ("photo.jpg", CHROMIUM["accept"])):
            said = explained(warm_site, f"https://{DOMAIN}/{name}",
                             f"accept: {accept}")
            answer = ask(server, f"/{name}", accept=accept)
            assert answer.status_code == 200
            for field in ("etag", "content-length", "content-type"):
                assert f"{field}: {answer.headers[field]}\n" in said
        assert server.processes() == before
        assert kept(warm_site) == made
        assert [line.text for line in server.lines()
                if line.code != "M50001"] == said_before
