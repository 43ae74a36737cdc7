"""Images come in the width that is asked for, where that is allowed."""

import io
import pathlib
import re

import pytest
from harness import DEMO, DOMAIN, Server, eventually, make_site
from images import animation
from PIL import Image

PHOTO = (DEMO / "www/photos/small/petals.jpg").read_bytes()
ACCEPT = {"accept": "image/avif,image/webp,*/*"}
OWN = 400

#: sources that tests have to themselves: equal but for what follows the image
NAMES = [f"{n}.jpg" for n in range(12)]


def small_photo():
    stream = io.BytesIO()
    Image.open(io.BytesIO(PHOTO)).resize((OWN, 100)).save(
        stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture(scope="module")
def scaling(tmp_path_factory):
    folder, photo = tmp_path_factory.mktemp("scaling"), small_photo()
    make_site(folder, {
        "index.html": b"<p>Hello\n",
        **{name: photo + name.encode() for name in NAMES}},
        {"images": "scale"})
    with Server(folder) as server:
        yield server


def width_of(server, target, **fields):
    """Return the width of an image as it is served now."""
    answer = server.fetch(target, headers={**ACCEPT, **fields})
    assert answer.status_code == 200
    assert answer.headers["vary"] == "accept, sec-ch-width, sec-ch-dpr"
    return Image.open(io.BytesIO(answer.content)).width


def await_forms(server, name, count=1):
    """Wait until so many forms of a file were made."""
    eventually(lambda: sum(name in line.message for line in server.lines(
        "M20004")) >= count, 60)


@pytest.mark.parametrize("name, query, fields, width", [
    ("0.jpg", "sc-width=100", {}, 160), ("1.jpg", "v=1&sc-width=160", {}, 160),
    ("2.jpg", "sc-width=161", {}, 320),
    ("3.jpg", "sc-width=100", {"sec-ch-dpr": "2.0"}, 320),
    ("4.jpg", "", {"sec-ch-width": "300"}, 320)])
def test_an_image_comes_in_the_next_step_of_its_width(
        scaling, name, query, fields, width):
    target = f"/{name}?{query}"
    assert width_of(scaling, target, **fields) == OWN
    eventually(lambda: width_of(scaling, target, **fields) == width, 30)


@pytest.mark.parametrize("target", [
    "/5.jpg?sc-width=2000", "/6.jpg?sc-width=99999", "/7.jpg?sc-width=0",
    "/8.jpg?sc-width=-5", "/9.jpg?sc-width=ten", "/10.jpg?xsc-width=100"])
def test_an_image_is_never_made_larger_than_it_is(scaling, target):
    width_of(scaling, target)
    await_forms(scaling, target.partition("?")[0], 2)
    assert width_of(scaling, target) == OWN


def test_nobody_can_have_more_forms_made_than_there_are_steps(scaling):
    with scaling.client() as client:
        for n in range(1, 700, 7):
            client.get(f"/11.jpg?sc-width={n}", headers=ACCEPT,
                       extensions={"sni_hostname": DOMAIN})
    await_forms(scaling, "/11.jpg", 7)
    cache = pathlib.Path(scaling.folder, ".shimmercat.loves.devs", "r-cache")
    made = {path.name.split(".")[1].partition("-")[0]
            for path in cache.rglob("*.*-*.*")} - {"declined"}
    assert {name.partition("_")[2] for name in made} == {"", "160", "320"}


def test_pages_ask_browsers_for_the_width_of_images(scaling):
    assert scaling.fetch("/").headers["accept-ch"] == (
        "Sec-CH-Width, Sec-CH-DPR")


def test_without_the_policy_a_width_means_nothing(tmp_path):
    make_site(tmp_path, {"a.jpg": small_photo()})
    with Server(tmp_path) as server:
        first = server.fetch("/a.jpg?sc-width=100", headers=ACCEPT)
        assert first.content == small_photo()
        assert first.headers["vary"] == "accept"
        assert "accept-ch" not in server.fetch("/").headers
        await_forms(server, "/a.jpg")
        later = server.fetch("/a.jpg?sc-width=100", headers=ACCEPT)
        assert Image.open(io.BytesIO(later.content)).width == OWN


def test_what_is_not_made_narrower_comes_in_the_forms_of_its_own_width(
        tmp_path):
    make_site(tmp_path, {
        "narrow.jpg": small_photo(), "moving.gif": animation()},
        {"images": "scale"})
    with Server(tmp_path) as server:
        for target, width in (("/narrow.jpg?sc-width=401", OWN),
                              ("/moving.gif?sc-width=20", 48)):
            shown = eventually(lambda target=target: smaller(server, target))
            assert shown.width == width
            assert shown.format in ("AVIF", "WEBP")


def smaller(server, target):
    """An image, opened, once it comes in a form that was made."""
    answer = server.fetch(target, headers=ACCEPT)
    return re.search(r'-(avif|webp)-\d+"', answer.headers["etag"]) and (
        Image.open(io.BytesIO(answer.content)))
