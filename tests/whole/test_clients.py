"""Clients that others wrote get the demo site, byte for byte."""

import email
import gzip
import re
import shutil
import subprocess

import brotli
import pytest
from h2_client import H2Client
from harness import DEMO, Server, authority_file, copy_demo, free_port

HOST = "localhost"
FILES = {path.relative_to(DEMO / "www").as_posix(): path.read_bytes()
         for path in sorted((DEMO / "www").rglob("*")) if path.is_file()}
PHOTO = "photos/raindrops.jpg"
DECODE = {"": bytes, "gzip": gzip.decompress, "br": brotli.decompress}

needs_curl = pytest.mark.skipif(
    not shutil.which("curl"), reason="curl is not installed")
needs_nghttp = pytest.mark.skipif(
    not shutil.which("nghttp"), reason="nghttp is not installed")
both_versions = pytest.mark.parametrize("version", ["1.1", "2"])
both_protocols = pytest.mark.parametrize("protocol", ["http/1.1", "h2"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo site in internet mode, its images byte for byte."""
    folder = copy_demo(tmp_path_factory.mktemp("demo"))
    (folder / ".shimmercat.loves.devs").mkdir(mode=0o700)
    (folder / ".shimmercat.loves.devs/tweaks.yaml").write_text(
        "images: none\n")
    plain_port = free_port()
    with Server(folder, "--workers", "2",
                "-t", f"127.0.0.1:{plain_port}") as server:
        server.plain_url = f"http://{HOST}:{plain_port}"
        yield server


def url(server, name):
    return f"https://{HOST}:{server.port}/{name}"


def expected_coding(name, coding):
    """Return the Content-Encoding that a file comes with, or ""."""
    is_text = name.endswith((".html", ".css", ".js", ".svg"))
    return coding if is_text and coding != "identity" else ""


def said_by(*command):
    """Return what a client wrote to its standard output."""
    done = subprocess.run([str(word) for word in command], timeout=60,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def curl(*words, version="2"):
    """Return what curl wrote, which trusts our development CA alone."""
    protocol = "--http2" if version == "2" else "--http1.1"
    return said_by("curl", "--silent", "--show-error", "--cacert",
                   authority_file(), protocol, *words).decode()


def each_file_into(folder, server):
    """Return words that make curl get every file into a folder."""
    words = ["--create-dirs"]
    for name in FILES:
        words += ["--output", folder / name, url(server, name)]
    return words


@needs_curl
@both_versions
@pytest.mark.parametrize("coding", ["identity", "gzip", "br"])
def test_curl_gets_every_file_byte_for_byte(demo, tmp_path, version, coding):
    said = curl(*each_file_into(tmp_path, demo),
                "--header", f"accept-encoding: {coding}",
                "--write-out", "%{http_code} %{http_version}"
                " %{size_download} %header{content-length}"
                " %header{content-encoding}\\n", version=version)
    lines = said.splitlines()
    assert len(lines) == len(FILES)
    for line, name in zip(lines, FILES, strict=True):
        status, spoken, size, length, used = (line + " ").split(" ")[:5]
        assert (status, spoken, size) == ("200", version, length), name
        assert used == expected_coding(name, coding), name
        body = (tmp_path / name).read_bytes()
        assert DECODE[used](body) == FILES[name], name
        assert not used or len(body) < len(FILES[name]), name


@needs_curl
def test_curl_gets_all_files_at_once_over_one_connection(demo, tmp_path):
    said = curl("--parallel", "--write-out", "%{http_code} %{num_connects}\n",
                *each_file_into(tmp_path, demo))
    statuses, connects = zip(*map(str.split, said.splitlines()), strict=True)
    assert statuses == ("200",) * len(FILES)
    assert sum(map(int, connects)) == 1
    for name, content in FILES.items():
        assert (tmp_path / name).read_bytes() == content, name


@needs_curl
@both_versions
@pytest.mark.parametrize("coding", ["identity", "gzip", "br"])
def test_curl_does_not_get_twice_what_it_has(demo, tmp_path, version, coding):
    for name in ("index.html", PHOTO):
        etag, body = tmp_path / "etag", tmp_path / "body"
        words = ("--header", f"accept-encoding: {coding}", "--output", body,
                 "--write-out", "%{http_code} %{size_download}",
                 url(demo, name))
        first = curl("--etag-save", etag, *words, version=version)
        assert first.split()[0] == "200"
        again = curl("--etag-compare", etag, *words, version=version)
        # The artisan may have made a smaller form, which has its own ETag.
        if again.split()[0] == "200" and coding != "identity":
            curl("--etag-save", etag, *words, version=version)
            again = curl("--etag-compare", etag, *words, version=version)
        assert again == "304 0"


@needs_curl
@both_versions
def test_curl_gets_nothing_when_the_date_is_not_older(
        demo, tmp_path, version):
    body = tmp_path / "body"
    words = (url(demo, PHOTO), "--write-out", "%{http_code}")
    assert curl("--remote-time", "--output", body, *words,
                version=version) == "200"
    assert curl("--time-cond", body, *words, version=version) == "304"


@needs_curl
@both_versions
def test_curl_gets_the_same_head_for_head_and_get(demo, version):
    def head(*words):
        said = curl(url(demo, PHOTO), *words, version=version)
        return sorted(line for line in said.splitlines()
                      if not line.startswith("date:"))
    of_head = head("--head")
    assert of_head == head("--dump-header", "-", "--output", "/dev/null")
    assert f"content-length: {len(FILES[PHOTO])}" in of_head


@needs_curl
@both_versions
def test_curl_goes_on_with_a_download_that_broke_off(
        demo, tmp_path, version):
    body = tmp_path / "body"
    body.write_bytes(FILES[PHOTO][:654_321])
    said = curl("--continue-at", "-", "--output", body, "--write-out",
                "%{http_code} %{size_download}", url(demo, PHOTO),
                version=version)
    assert said == f"206 {len(FILES[PHOTO]) - 654_321}"
    assert body.read_bytes() == FILES[PHOTO]


@needs_curl
@both_versions
def test_curl_is_led_from_plain_http_to_the_same_place(demo, version):
    said = curl("--location", f"{demo.plain_url}/gallery/?from=here",
                "--write-out", "%{num_redirects} %{http_version}"
                " %{url_effective}", version=version)
    page = FILES["gallery/index.html"].decode()
    assert said == f"{page}1 {version} {url(demo, 'gallery/?from=here')}"


@both_protocols
@pytest.mark.parametrize("coding", ["identity", "gzip", "br"])
def test_httpx_gets_every_file_byte_for_byte(demo, protocol, coding):
    version = {"h2": "HTTP/2", "http/1.1": "HTTP/1.1"}[protocol]
    with demo.client(protocol, HOST) as client:
        for name, content in FILES.items():
            answer = client.get(f"/{name}",
                                headers={"accept-encoding": coding},
                                extensions={"sni_hostname": HOST})
            assert (answer.status_code, answer.http_version) == (200, version)
            assert answer.headers.get("content-encoding", "") == (
                expected_coding(name, coding))
            assert answer.content == content, name


@both_protocols
def test_httpx_gets_pages_by_the_names_of_their_folders(demo, protocol):
    for place in ("", "gallery/", "notes/looking-slowly/", "credits/"):
        answer = demo.fetch(f"/{place}", protocol, HOST)
        assert answer.content == FILES[f"{place}index.html"]
    answer = demo.fetch("/gallery?from=here", protocol, HOST)
    assert answer.status_code == 301
    assert answer.headers["location"] == "/gallery/?from=here"


@both_protocols
@pytest.mark.parametrize(("spec", "start", "stop"), [
    ("0-0", 0, 1), ("-7", -7, None), ("100000-", 100_000, None),
    ("5-70000", 5, 70_001)])
def test_httpx_gets_a_range_byte_for_byte(demo, protocol, spec, start, stop):
    answer = demo.fetch(f"/{PHOTO}", protocol, HOST,
                        headers={"range": f"bytes={spec}"})
    assert answer.status_code == 206
    assert answer.content == FILES[PHOTO][start:stop]
    length = len(FILES[PHOTO])
    first, last = (place % length for place in (start, (stop or 0) - 1))
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{length}"


@both_protocols
def test_httpx_gets_several_ranges_byte_for_byte(demo, protocol):
    answer = demo.fetch(f"/{PHOTO}", protocol, HOST,
                        headers={"range": "bytes=0-99,5000-69999,-1"})
    assert answer.status_code == 206
    kind = answer.headers["content-type"]
    message = email.message_from_bytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + answer.content)
    wanted = [FILES[PHOTO][:100], FILES[PHOTO][5000:70_000],
              FILES[PHOTO][-1:]]
    # Its payloads would be text: octets are cut by hand.
    boundary = message.get_boundary().encode()
    parts = answer.content.split(b"--" + boundary)[1:-1]
    bodies = [part.partition(b"\r\n\r\n")[2][:-2] for part in parts]
    assert bodies == wanted


@both_protocols
def test_httpx_learns_what_ranges_there_are(demo, protocol):
    answer = demo.fetch(f"/{PHOTO}", protocol, HOST,
                        headers={"range": "bytes=9999999-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(FILES[PHOTO])}"


@needs_nghttp
def test_nghttp_gets_every_file_byte_for_byte(demo):
    for name, content in FILES.items():
        assert said_by("nghttp", url(demo, name)) == content, name


@needs_nghttp
def test_nghttp_gets_all_files_at_once_over_one_connection(demo):
    said = said_by("nghttp", "--verbose", "--null-out", "--no-verify-peer",
                   "--header=accept-encoding: identity",
                   *(url(demo, name) for name in FILES)).decode()
    asked = dict(re.findall(r"stream_id=(\d+)>\n(?:.*\n){3}.*:method: GET\n"
                            r".*:path: /(\S+)", said))
    assert sorted(asked.values()) == sorted(FILES)
    assert said.count("send GOAWAY frame") == 1
    for stream, name in asked.items():
        assert f"(stream_id={stream}) :status: 200" in said, name
        frames = re.findall(rf"recv DATA frame <length=(\d+), flags=0x(\d+),"
                            rf" stream_id={stream}>", said)
        assert sum(int(length) for length, _ in frames) == len(FILES[name])
        assert [flags for _, flags in frames] == (
            ["00"] * (len(frames) - 1) + ["01"]), name


@needs_nghttp
def test_nghttp_gets_a_page_and_all_that_it_needs(demo):
    said = said_by("nghttp", "--get-assets", "--null-out", "--stat",
                   url(demo, "")).decode()
    rows = re.findall(r"^ *\d+ .* (\d{3}) +\S+ (/\S*)$", said, re.MULTILINE)
    paths = {path for _, path in rows}
    assert {"/", "/css/site.css", "/js/theme.js", "/photos/dune.jpg"} <= paths
    assert {status for status, _ in rows} == {"200"}


def test_h2_gets_all_files_at_once_over_one_connection(demo):
    with H2Client(demo, HOST) as client:
        streams = {client.get(f"/{name}"): name for name in FILES}
        client.finish()
        assert not client.open and not client.resets
        for stream, name in streams.items():
            assert client.heads[stream][":status"] == "200", name
            assert client.bodies[stream].getvalue() == FILES[name], name
