"""Room 13, Pictures: real encoders, made images, real photographs."""

import functools
import io
import tracemalloc

import numpy as np
import pytest
from harness import DEMO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageOps

import shimmercat
from shimmercat import (
    Form,
    PictureRefused,
    ShimmerCatError,
    Tweaks,
    picture_forms,
    similarity,
)

THRESHOLD = Tweaks().image_similarity
PHOTOS = DEMO / "www" / "photos"
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif",
           "WEBP": "image/webp"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
#: a header is what this room reads of a profile
INKS = SRGB[:16] + b"CMYK" + SRGB[20:]
GREYS = SRGB[:16] + b"GRAY" + SRGB[20:]


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def opened(body):
    return Image.open(io.BytesIO(body))


def made(source, kind, threshold, most_pixels, width):
    found = list(picture_forms(source, kind, threshold, most_pixels, width))
    assert all(form.reason for form in found)
    return {form.form: form for form in found}


#: the same question is asked by many tests
made_once = functools.cache(made)


def forms(source, kind="image/png", threshold=THRESHOLD,
          most_pixels=50_000_000, width=0):
    return made_once(source, kind, threshold, most_pixels, width)


def refusal(source, kind="image/png", most_pixels=50_000_000):
    with pytest.raises(PictureRefused) as caught:
        forms(source, kind, most_pixels=most_pixels)
    assert isinstance(caught.value, ShimmerCatError)
    return str(caught.value)


@functools.cache
def photo(size=(80, 60), name="petals"):
    return Image.open(PHOTOS / f"{name}.jpg").resize(
        size, Image.Resampling.LANCZOS)


def noise(image, amount, seed=1):
    """The image with noise of so many levels."""
    pixels = np.asarray(image, np.float32)
    shift = np.random.default_rng(seed).normal(0, amount, pixels.shape)
    return Image.fromarray(np.clip(pixels + shift, 0, 255).astype(np.uint8))


def page(lines=40, size=(1024, 768)):
    """Paper with words in one corner."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for n in range(lines):
        draw.text((16, 16 + 12 * n), f"line {n}: jumps over", fill="black")
    return image


def animation(count, size=(24, 16), form="GIF", **options):
    base = photo(size).copy()
    frames = [ImageDraw.Draw(base).point((n % size[0], n // size[0]), n % 251)
              or base.copy() for n in range(count)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:],
                 **options)


# --- the metric --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 64), (130, 65)])
def test_an_image_is_wholly_similar_to_itself(mode, size):
    image = photo(size).convert(mode)
    assert similarity(image, image.copy()) == 1


def test_similarity_is_the_same_in_both_directions():
    image, other = photo(), noise(photo(), 8)
    assert similarity(image, other) == pytest.approx(
        similarity(other, image), abs=1e-4)


def test_more_noise_is_less_similar():
    scores = [similarity(photo(), noise(photo(), n))
              for n in (0, 2, 4, 8, 16, 32)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_a_shift_of_colour_is_noticed():
    luma, blue, red = photo().convert("YCbCr").split()
    shifted = Image.merge("YCbCr", (luma, blue, red.point(lambda n: n + 10)))
    assert similarity(photo(), shifted.convert("RGB")) < 0.9


def test_lost_chroma_detail_is_noticed():
    dots = np.zeros((64, 64, 3), np.uint8)
    dots[::2, :, 0], dots[1::2, :, 2] = 200, 200
    image = Image.fromarray(dots)
    assert similarity(image, opened(saved(
        image, "JPEG", quality=95, subsampling="4:2:0"))) < 0.9


def test_one_blurred_word_on_a_page_is_noticed():
    sharp, blurred = page(), page()
    box = (16, 16, 80, 40)
    blurred.paste(sharp.crop(box).filter(ImageFilter.GaussianBlur(1)), box)
    assert similarity(sharp, blurred) < THRESHOLD - 0.01


def test_ringing_around_a_lone_word_on_a_page_is_noticed():
    sharp = page(lines=1, size=(2048, 1024))
    muddy = opened(saved(sharp, "JPEG", quality=60))
    assert similarity(sharp, muddy) < THRESHOLD


def test_a_change_of_the_alpha_channel_alone_is_noticed():
    image, other = photo().convert("RGBA"), photo().convert("RGBA")
    other.putalpha(200)
    assert similarity(image, other) < 0.9


def test_colour_below_transparent_pixels_is_not_looked_at():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert similarity(image, Image.new("RGBA", (32, 32))) == 1


def test_a_small_shift_of_a_plain_area_is_not_exaggerated():
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    assert similarity(image, Image.new("RGB", (64, 64), (1, 1, 1))) > 0.99


# --- what is refused ---------------------------------------------------------


def huge_png():
    return saved(Image.new("1", (12_000, 12_000)), "PNG")


def test_a_huge_image_is_refused_before_it_is_decoded():
    source = huge_png()
    tracemalloc.start()
    reason = refusal(source, most_pixels=143_999_999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "12000x12000" in reason
    assert peak < 10_000_000


def test_a_huge_image_within_the_limit_is_read():
    picture = shimmercat._read_picture(huge_png(), "image/png", 144_000_000)
    assert picture.frames[0].size == (12_000, 12_000)


def test_pixels_of_all_frames_count():
    source = animation(20)
    assert "times 20" in refusal(source, "image/gif", 24 * 16 * 20 - 1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.9])
def test_a_truncated_file_is_refused(form, part):
    source = saved(photo(), form)
    refusal(source[:int(len(source) * part)], FORMATS[form])


@pytest.mark.parametrize("source", [
    b"", b"GIF89a", b"\xff\xd8\xff", b"<svg/>", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("kind", FORMATS.values())
def test_what_is_no_image_is_refused(source, kind):
    assert "cannot be read" in refusal(source, kind)


def test_a_file_of_another_format_than_its_name_says_is_refused():
    assert refusal(saved(photo(), "PNG"), "image/jpeg") == (
        "is PNG, not image/jpeg")


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "AVIF"])
def test_other_formats_are_not_even_tried(form):
    assert "cannot be read" in refusal(saved(photo(), form), "image/png")


def test_kinds_without_a_row_are_refused():
    assert "image/tiff" in refusal(saved(photo(), "TIFF"), "image/tiff")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_refused_or_made_into_true_forms(seed):
    random = np.random.default_rng(seed)
    form = list(FORMATS)[seed % 4]
    source = bytearray(saved(photo((24, 20)), form))
    for at in random.integers(0, len(source), 3):
        source[at] = random.integers(256)
    try:
        forms(bytes(source), FORMATS[form])
    except PictureRefused as error:
        assert str(error)


def test_an_animated_png_is_refused():
    assert "animated" in refusal(animation(3, form="PNG"))


@pytest.mark.parametrize("mode", ["I;16", "RGB"])
def test_16_bits_per_channel_are_refused(mode):
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    source = saved(Image.fromarray(deep), "PNG")
    if mode == "RGB":
        source = deep_rgb_png(deep)
    assert "16 bits" in refusal(source)


def deep_rgb_png(deep):
    import struct
    import zlib

    def chunk(name, body):
        return (struct.pack(">I", len(body)) + name + body
                + struct.pack(">I", zlib.crc32(name + body)))
    rows = np.repeat(deep[..., None], 3, 2).astype(">u2")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))


def test_cmyk_without_a_sign_of_adobe_is_refused():
    source = saved(photo().convert("CMYK"), "JPEG")
    at = source.index(b"\xff\xee")
    length = int.from_bytes(source[at + 2:at + 4])
    assert "Adobe" in refusal(
        source[:at] + source[at + 2 + length:], "image/jpeg")


def several(kind=0x010001, mode="RGB", **options):
    """A JPEG of a camera, with a second picture of a kind behind it."""
    source = bytearray(saved(
        photo().convert(mode), "MPO", save_all=True,
        append_images=[noise(photo(), 90)], **{"quality": 97} | options))
    index = source.index(b"MPF\0")
    entry = source.rindex(b"\0\0\x03\0", index, index + 120) + 16
    source[entry:entry + 4] = kind.to_bytes(4, "little")
    assert opened(bytes(source)).format == "MPO"
    return bytes(source)


@pytest.mark.parametrize("kind", [0, 0x010001, 0x010002])
def test_of_a_photograph_with_previews_the_first_picture_is_kept(kind):
    source = several(kind, exif=turned(6), icc_profile=SRGB)
    found = forms(source, "image/jpeg")
    assert list(found) == ["jpeg", "webp", "avif"]
    for form in found.values():
        shown = ImageOps.exif_transpose(opened(form.body)).convert("RGB")
        assert similarity(ImageOps.exif_transpose(
            opened(source)).convert("RGB"), shown) >= THRESHOLD
        assert opened(form.body).info["icc_profile"] == SRGB
        assert getattr(opened(form.body), "n_frames", 1) == 1


def test_a_photograph_with_previews_is_at_least_repacked():
    source = several(mode="L", quality=30)
    found = forms(source, "image/jpeg", threshold=0.997)
    assert found["jpeg"].reason.startswith("repacked")


@pytest.mark.parametrize("kind, word", [
    (0x020001, "Panorama"), (0x020002, "Disparity"),
    (0x020003, "Multi-Angle"), (0x040000, "Unknown")])
def test_a_file_of_pictures_that_belong_together_is_refused(kind, word):
    reason = refusal(several(kind), "image/jpeg")
    assert "further picture" in reason and word in reason


@pytest.mark.parametrize("sign", [
    b'<x hdrgm:Version="1.0"/>', b"urn:iso:std:iso:ts:21496:-1\0",
    b"http://ns.apple.com/HDRGainMap/1.0/",
    b"urn:com:apple:photo:2020:aux:hdrgainmap"])
@pytest.mark.parametrize("make", [several, lambda: saved(photo(), "JPEG")],
                         ids=["behind", "inside"])
def test_a_gain_map_is_not_lost(make, sign):
    source = make()
    at = source.rindex(b"\xff\xd8\xff") + 2
    segment = b"\xff\xe1" + (len(sign) + 2).to_bytes(2) + sign
    assert "gain map" in refusal(
        source[:at] + segment + source[at:], "image/jpeg")


def test_an_orientation_that_viewers_disagree_on_is_refused():
    source = saved(photo(), "PNG", exif=turned(6))
    assert "orientation" in refusal(source)


# --- forms -------------------------------------------------------------------


def check(source, kind, found, threshold=THRESHOLD):
    """What holds for every body that is offered."""
    original = opened(source)
    for form in found.values():
        if form.body is None:
            continue
        image = opened(form.body)
        assert len(form.body) < len(source)
        assert image.format.lower() == form.form
        assert image.size == original.size
        assert getattr(image, "n_frames", 1) == getattr(
            original, "n_frames", 1)
        assert image.info.get("icc_profile") == original.info.get(
            "icc_profile")
        mode = "RGBA" if original.has_transparency_data else "RGB"
        if original.mode == "CMYK":
            mode = "CMYK"
        assert similarity(original.convert(mode),
                          image.convert(mode)) >= threshold - 1e-3


def test_a_photograph_becomes_much_smaller():
    source = (PHOTOS / "small" / "petals.jpg").read_bytes()
    found = forms(source, "image/jpeg")
    assert list(found) == ["jpeg", "webp", "avif"]
    check(source, "image/jpeg", found)
    assert min(len(form.body) for form in found.values()
               if form.body) < 0.55 * len(source)


def test_a_jpeg_comes_out_progressive():
    body = forms(saved(photo(), "JPEG", quality=95), "image/jpeg")["jpeg"].body
    assert opened(body).info["progressive"]


def test_an_incompressible_jpeg_is_at_least_repacked():
    source = saved(photo().convert("L"), "JPEG", quality=30)
    found = forms(source, "image/jpeg", threshold=0.997)
    assert found["jpeg"].reason.startswith("repacked")
    assert len(found["jpeg"].body) < len(source)


def test_forms_are_named_with_their_quality_and_similarity():
    found = forms(saved(photo(), "JPEG", quality=95), "image/jpeg")
    assert "quality" in found["avif"].reason
    assert "similarity 0.99" in found["avif"].reason


def test_a_higher_threshold_does_not_make_smaller_files():
    source = saved(photo((120, 90), "drop"), "JPEG", quality=97)
    sizes = {name: [] for name in ("jpeg", "webp", "avif")}
    for threshold in (0.95, 0.97, 0.98, 0.985, 0.99):
        for form in forms(source, "image/jpeg", threshold).values():
            sizes[form.form].append(len(form.body or source))
    assert all(each == sorted(each) for each in sizes.values())


def icon(size=48):
    """A disc cut out of a photograph."""
    image = photo((size, size)).copy()
    image.putalpha(Image.radial_gradient("L").resize((size, size)).point(
        lambda level: 255 * (level < 120)))
    return image


KINDS = {
    "photograph": lambda: saved(photo((160, 120), "drop"), "JPEG", quality=92),
    "page of text": lambda: saved(page(10, (240, 160)), "PNG"),
    "icon": lambda: saved(icon(), "PNG")}


@pytest.mark.parametrize("what", KINDS)
def test_a_lower_threshold_takes_away_more_and_never_more_than_it_says(what):
    source, best = KINDS[what](), []
    kind = "image/jpeg" if what == "photograph" else "image/png"
    for threshold in (0.98, 0.99, 0.995):
        found = forms(source, kind, threshold)
        check(source, kind, found, threshold)
        best.append(min(len(form.body) for form in found.values()
                        if form.body))
    assert best == sorted(best)
    assert best[1] < 0.6 * len(source)


def test_the_same_source_gives_the_same_bytes():
    source = saved(photo(), "PNG")
    assert forms(source) == made(
        source, "image/png", THRESHOLD, 50_000_000, 0)


def test_what_is_not_smaller_is_not_offered():
    source = forms(saved(page(8, (80, 60)), "PNG"))["png"].body
    form = forms(source)["png"]
    assert form == Form(
        "png", None, f"not smaller: {len(source)} of {len(source)} bytes")


def test_an_unreachable_threshold_leaves_what_has_no_loss():
    found = forms(saved(photo(), "PNG", compress_level=1), threshold=1)
    assert found["png"].body
    assert found["webp"].reason == "lossless, similarity 1.0000"
    assert found["avif"].body is None
    assert "similarity of 1" in found["avif"].reason


def test_a_one_pixel_gif_is_worked_on():
    source = saved(Image.new("P", (1, 1)), "GIF")
    found = forms(source, "image/gif")
    assert list(found) == ["png", "webp", "avif"]
    check(source, "image/gif", found)


PNG_MODES = {
    "1": lambda: page(8, (80, 60)).convert("1"),
    "L": lambda: photo().convert("L"),
    "LA": lambda: half_clear().convert("LA"),
    "P": lambda: photo().quantize(64),
    "P with one clear colour": lambda: with_info(
        page(8, (80, 60)).quantize(16), transparency=0),
    "P with alphas": lambda: half_clear().quantize(
        64, Image.Quantize.FASTOCTREE),
    "L with one clear grey": lambda: with_info(
        photo().convert("L"), transparency=7),
    "RGB with one clear colour": lambda: with_info(
        page(8, (80, 60)), transparency=(0, 0, 0)),
    "RGB of greys": lambda: photo().convert("L").convert("RGB"),
    "RGBA, opaque": lambda: photo().convert("RGBA"),
    "RGBA": lambda: half_clear(),
}


def half_clear():
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def with_info(image, **info):
    image.info |= info
    return image


@pytest.mark.parametrize("mode", PNG_MODES)
def test_a_png_of_any_mode_keeps_its_pixels(mode):
    source = saved(PNG_MODES[mode](), "PNG", compress_level=0)
    found = forms(source)
    check(source, "image/png", {
        name: form for name, form in found.items()
        if "opaque" not in mode})
    assert (opened(found["png"].body).convert("RGBA").tobytes()
            == opened(source).convert("RGBA").tobytes())
    assert found["webp"].body and found["avif"].body


@pytest.mark.parametrize("colours, bits", [(2, 1), (4, 2), (13, 4), (99, 8)])
def test_few_colours_are_stored_in_few_bits(colours, bits):
    rows = np.random.default_rng(3).integers(0, colours, (64, 64))
    palette = np.random.default_rng(4).integers(0, 256, (colours, 3))
    source = saved(Image.fromarray(palette[rows].astype(np.uint8)), "PNG")
    body = forms(source)["png"].body
    assert (body[24], body[25]) == (bits, 3)


def test_a_colour_image_of_greys_is_stored_as_grey():
    found = forms(saved(PNG_MODES["RGB of greys"](), "PNG"))
    assert opened(found["png"].body).mode in ("L", "P")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_shown_the_same_way(orientation):
    image = photo((112, 64)).convert("RGB")
    source = saved(image, "JPEG", quality=100, exif=turned(orientation))
    expected = ImageOps.exif_transpose(opened(source))
    found = forms(source, "image/jpeg")
    for form in found.values():
        shown = ImageOps.exif_transpose(opened(form.body)).convert("RGB")
        assert shown.size == expected.size
        assert similarity(expected, shown) >= THRESHOLD
        if form.form != "jpeg":
            assert opened(form.body).getexif().get(0x112, 1) == 1


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    exif[0x010F] = "Camera"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)
    return exif.tobytes()


def test_an_orientation_in_xmp_is_none_for_browsers():
    source = saved(photo(), "JPEG", quality=97, xmp=(
        b'<x xmlns:tiff="t"><tiff:Orientation>6</tiff:Orientation></x>'))
    for form in forms(source, "image/jpeg").values():
        assert opened(form.body).size == (80, 60)


@pytest.mark.parametrize("threshold", [0.99, 0.998])
def test_where_and_with_what_it_was_taken_is_dropped(threshold):
    source = saved(photo(), "JPEG", quality=85, exif=turned(6),
                   comment=b"SECRET", xmp=b"<x>SECRET</x>")
    assert b"SECRET" in source and b"Camera" in source
    for form in forms(source, "image/jpeg", threshold).values():
        body = form.body or b""
        assert b"SECRET" not in body and b"Camera" not in body
        exif = opened(body).getexif() if body else {}
        assert not set(exif) - {0x112}


def test_text_chunks_of_a_png_are_dropped():
    from PIL import PngImagePlugin
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Author", "SECRET")
    for form in forms(saved(photo(), "PNG", pnginfo=notes)).values():
        assert b"SECRET" not in (form.body or b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_colour_profile_is_kept(form):
    options = {"lossless": True, "method": 0, "quality": 0} if (
        form == "WEBP") else {"quality": 97}
    source = saved(photo(), form, icc_profile=SRGB, **options)
    found = forms(source, FORMATS[form])
    bodies = [each.body for each in found.values() if each.body]
    assert len(bodies) >= 2
    assert all(opened(body).info["icc_profile"] == SRGB for body in bodies)


def test_a_profile_for_greys_goes_only_where_greys_are():
    grey = photo().convert("L")
    found = forms(saved(grey, "PNG", icc_profile=GREYS, compress_level=1))
    assert opened(found["png"].body).mode == "L"
    assert opened(found["png"].body).info["icc_profile"] == GREYS
    assert "profile" in found["webp"].reason
    assert found["avif"].body is None


def test_a_profile_for_colours_keeps_a_png_of_greys_in_colour():
    image = photo().convert("L").convert("RGB")
    found = forms(saved(image, "PNG", icc_profile=SRGB, compress_level=1))
    assert opened(found["png"].body).mode in ("RGB", "P")


def test_a_cmyk_photograph_becomes_a_smaller_cmyk_photograph():
    image = photo((200, 150)).convert("CMYK")
    source = saved(image, "JPEG", quality=97, icc_profile=INKS)
    found = forms(source, "image/jpeg")
    check(source, "image/jpeg", found)
    made = opened(found["jpeg"].body)
    assert (made.mode, made.info["icc_profile"]) == ("CMYK", INKS)
    assert "CMYK" in found["webp"].reason and "CMYK" in found["avif"].reason


def test_a_grey_photograph_stays_grey():
    source = saved(photo().convert("L"), "JPEG", quality=97)
    found = forms(source, "image/jpeg")
    check(source, "image/jpeg", found)
    assert opened(found["jpeg"].body).mode == "L"
    assert found["webp"].body and found["avif"].body


def test_an_unusual_gamma_is_refused():
    source = saved(photo(), "PNG")
    import struct
    import zlib
    chunk = b"gAMA" + struct.pack(">I", 100_000)
    source = (source[:33] + struct.pack(">I", 4) + chunk
              + struct.pack(">I", zlib.crc32(chunk)) + source[33:])
    assert "gamma" in refusal(source)


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_is_encoded_again_when_that_makes_it_smaller(lossless):
    source = saved(photo(), "WEBP", lossless=lossless, method=0,
                   quality=0 if lossless else 100)
    found = forms(source, "image/webp")
    assert list(found) == ["webp", "avif"]
    check(source, "image/webp", found)
    assert found["avif"].body and found["webp"].body


# --- animations --------------------------------------------------------------


def shown(body):
    image, times = opened(body), []
    for n in range(image.n_frames):
        image.seek(n)
        image.load()
        times.append(image.info["duration"])
    return times, image.info.get("loop")


def test_an_animation_of_many_frames_keeps_them_all():
    # More than are looked at while a quality is searched.
    source = animation(60, duration=[20 + n % 3 * 10 for n in range(60)],
                       loop=0)
    found = forms(source, "image/gif")
    assert list(found) == ["png", "webp", "avif"]
    assert found["png"].body is None and "animation" in found["png"].reason
    for name in ("webp", "avif"):
        times, _ = shown(found[name].body)
        assert times == shown(source)[0]
    assert shown(found["webp"].body)[1] == 0


@pytest.mark.parametrize("loop, plays", [(None, 1), (0, 0), (3, 4)])
def test_an_animation_is_played_as_often_as_before(loop, plays):
    options = {} if loop is None else {"loop": loop}
    found = forms(animation(8, (48, 48), duration=50, **options),
                  "image/gif")
    assert shown(found["webp"].body)[1] == plays
    assert (found["avif"].body is None) == (plays > 0)


def test_a_hasty_animation_is_as_slow_as_browsers_make_it():
    found = forms(animation(8, (48, 48), duration=10, loop=0), "image/gif")
    assert set(shown(found["webp"].body)[0]) == {100}


def test_an_animated_webp_keeps_frames_times_and_plays():
    source = animation(12, (64, 64), form="WEBP", lossless=True, duration=40,
                       loop=2)
    found = forms(source, "image/webp")
    assert shown(found["webp"].body) == ([40] * 12, 2)
    assert len(found["webp"].body) < len(source)


def test_an_animation_with_clear_pixels_keeps_them():
    frames = []
    for n in range(8):
        frame = Image.new("RGBA", (48, 48))
        ImageDraw.Draw(frame).ellipse((n, n, n + 32, n + 32), (200, n, 0))
        frames.append(frame)
    source = saved(frames[0], "GIF", save_all=True, loop=0, duration=60,
                   append_images=frames[1:], disposal=2)
    found = forms(source, "image/gif")
    made = opened(found["webp"].body)
    made.seek(7)
    assert made.convert("RGBA").getpixel((0, 0))[3] == 0


def test_an_animation_is_not_scaled():
    found = forms(animation(5, loop=0), "image/gif", width=10)
    assert {form.body for form in found.values()} == {None}
    assert "not scaled" in found["webp"].reason


# --- widths ------------------------------------------------------------------


@pytest.mark.parametrize("form, own", [
    ("JPEG", "jpeg"), ("PNG", "png"), ("GIF", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("width", [1, 60, 79])
def test_the_own_format_is_always_there_at_a_smaller_width(form, own, width):
    found = forms(saved(photo(), form), FORMATS[form], width=width)
    height = max(1, round(60 * width / 80))
    assert list(found)[0] == own
    assert opened(found[own].body).size == (width, height)
    for each in found.values():
        if each.body and each.form != own:
            assert opened(each.body).size == (width, height)
            assert len(each.body) < len(found[own].body)


@pytest.mark.parametrize("threshold", [0.99, 1])
def test_a_width_is_to_be_had_at_any_threshold(threshold):
    found = forms(saved(photo(), "JPEG"), "image/jpeg", threshold, width=49)
    assert opened(found["jpeg"].body).width == 49


@pytest.mark.parametrize("width", [80, 5000])
def test_nothing_is_scaled_up(width):
    source = saved(photo(), "JPEG", quality=97)
    found = forms(source, "image/jpeg", width=width)
    assert {form.body for form in found.values()} == {None}
    assert {form.reason for form in found.values()} == {"it is 80 pixels wide"}


def test_the_width_is_that_of_the_turned_photograph():
    source = saved(photo((112, 64)), "JPEG", quality=97, exif=turned(6))
    found = forms(source, "image/jpeg", width=32)
    image = opened(found["jpeg"].body)
    assert (image.size, image.getexif().get(0x112, 1)) == ((32, 56), 1)


def test_a_scaled_palette_has_smooth_edges():
    sharp = Image.new("P", (64, 64), 1)
    sharp.putpalette([0, 0, 0, 255, 255, 255])
    ImageDraw.Draw(sharp).line((0, 0, 63, 40), 0, 3)
    body = forms(saved(sharp, "PNG"), width=20)["png"].body
    assert len(opened(body).convert("L").getcolors()) > 4


# --- anything ----------------------------------------------------------------


@st.composite
def small_images(draw):
    mode = draw(st.sampled_from(
        ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]))
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    coarse = random.integers(0, 256, (*(1 + n // draw(
        st.sampled_from([1, 5, 50])) for n in size[::-1]), 4))
    image = Image.fromarray(coarse.astype(np.uint8), "RGBA").resize(
        size, draw(st.sampled_from([0, 1])))
    kinds = {"CMYK": ["JPEG"], "L": ["JPEG", "PNG", "WEBP", "GIF"],
             "RGB": ["JPEG", "PNG", "WEBP", "GIF"], "P": ["PNG", "GIF"],
             "RGBA": ["PNG", "WEBP", "GIF"]}.get(mode, ["PNG"])
    form = draw(st.sampled_from(kinds))
    image = image.convert("RGB").convert(mode) if mode == "CMYK" else (
        image.convert(mode))
    return form, saved(image, form)


@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(small_images(), st.sampled_from([0.9, 0.99, 1.0]))
def test_any_small_image_keeps_its_size_and_becomes_smaller(made, threshold):
    form, source = made
    found = forms(source, FORMATS[form], threshold)
    check(source, FORMATS[form], found, threshold)
