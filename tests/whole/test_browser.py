"""A browser shows the demo site: all over HTTP/2, without one complaint."""

import base64
import hashlib
import os
import pathlib

import pytest
from browser import CHROMIUM, Browser
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from harness import Server, copy_demo

PAGES = ("/", "/gallery/", "/notes/looking-slowly/", "/credits/")

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed")


def key_of(folder):
    """Return the SHA-256 of a site's public key, as Chromium wants it."""
    path = folder / ".shimmercat.loves.devs" / "cert.pem"
    leaf = x509.load_pem_x509_certificate(path.read_bytes())
    spki = leaf.public_key().public_bytes(
        serialization.Encoding.DER,
        serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo site in internet mode."""
    folder = copy_demo(tmp_path_factory.mktemp("demo"))
    with Server(folder, "--workers", "2") as server:
        server.url = f"https://localhost:{server.port}"
        yield server


@pytest.fixture(scope="module")
def browser(demo, tmp_path_factory):
    """A browser that trusts the demo site's certificate and no other."""
    trust = f"--ignore-certificate-errors-spki-list={key_of(demo.folder)}"
    with Browser(tmp_path_factory.mktemp("browser"), trust) as running:
        yield running


@pytest.mark.parametrize("page", PAGES)
def test_every_request_of_a_page_is_answered_with_200_over_h2(
        demo, browser, page):
    browser.call("Network.setCacheDisabled", cacheDisabled=True)
    browser.visit(demo.url + page)
    answers = {one["requestId"]: one["response"]
               for one in browser.told("Network.responseReceived")}
    asked = browser.requests()
    assert len(asked) > 4 and demo.url + page in asked.values()
    for number, url in asked.items():
        assert url.startswith(demo.url + "/")
        answer = answers[number]
        assert (answer["protocol"], answer["status"]) == ("h2", 200), url
        assert not answer.get("fromDiskCache"), url
    assert browser.complaints() == []


def test_the_page_looks_as_its_author_wanted(demo, browser, tmp_path):
    browser.visit(demo.url + "/")
    assert browser.run("document.fonts.check('16px \"EB Garamond\"')")
    assert browser.run("[...document.images].every(i => i.naturalWidth)")
    picture = browser.screenshot()
    assert picture.startswith(b"\x89PNG")
    wanted = [tmp_path / "demo.png"]
    if place := os.environ.get("SHIMMERCAT_SCREENSHOT"):
        wanted.append(pathlib.Path(place))
    for path in wanted:
        path.write_bytes(picture)


def test_the_gallery_opens_its_photographs(demo, browser):
    browser.visit(demo.url + "/gallery/")
    browser.run("document.querySelector('.gallery a').click()")
    browser.run("document.querySelector('.lightbox img').decode()")
    assert browser.run("document.querySelector('.lightbox img')"
                       ".naturalWidth") == 1680
    for _ in range(8):
        browser.run("document.querySelector('.lightbox .next').click()")
        browser.run("document.querySelector('.lightbox img').decode()")
    browser.wait_until(lambda: not browser.unfinished())
    photographs = [one["response"] for one in browser.told(
        "Network.responseReceived")
        if "/photos/" in one["response"]["url"]]
    assert {one["status"] for one in photographs} <= {200, 304}
    assert {one["protocol"] for one in photographs} == {"h2"}
    assert browser.complaints() == []


def test_a_second_visit_asks_again_only_for_the_page(demo, browser):
    browser.call("Network.setCacheDisabled", cacheDisabled=False)
    browser.visit(demo.url + "/notes/looking-slowly/")
    browser.visit(demo.url + "/notes/looking-slowly/")
    asked_again = {
        one["response"]["url"] for one in browser.told(
            "Network.responseReceived")
        if not one["response"].get("fromDiskCache")
        and one["requestId"] not in {
            cached["requestId"] for cached in browser.told(
                "Network.requestServedFromCache")}}
    assert asked_again == {demo.url + "/notes/looking-slowly/"}
    assert browser.complaints() == []


def test_a_browser_that_was_told_nothing_refuses_the_certificate(
        demo, tmp_path):
    with Browser(tmp_path) as stranger:
        done = stranger.call("Page.navigate", url=demo.url + "/")
        assert done["errorText"] == "net::ERR_CERT_AUTHORITY_INVALID"
