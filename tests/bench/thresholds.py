"""What `image-similarity` costs and saves: sizes of the best forms.

    python tests/bench/thresholds.py [--cache DIR]

Photographs are those of the demo site, screenshots and icons are from the
Debian package gimp-help-en, which is downloaded into the cache folder and
unpacked there.  Each picture is made into all its forms at each threshold;
shown is the smallest, in percent of its source.
"""

import argparse
import sys
from pathlib import Path

from compare import table
from representations import DEMO, unpacked

TOP = Path(__file__).parent.parent.parent
HELP = Path("usr/share/gimp/2.0/help/en/images")
THRESHOLDS = (0.98, 0.99, 0.995)
#: {what is shown: its file}, below the demo site or GIMP's manual
PHOTOGRAPHS = {
    f"photograph, {name}": Path(f"photos/{name}.jpg")
    for name in ("drop", "dune", "petals", "ladybird")}
GRAPHICS = {
    "screenshot with text, 752x635": HELP / "dialogs/"
    "keyboard-shortcuts-dialog.png",
    "screenshot with text, 775x761": HELP / "filters/render/spyrogimp.png",
    "icon, 64x64": HELP / "toolbox/warp-icon.png",
    "icon, 48x48": HELP / "note.png",
    "icon, 22x22": HELP / "toolbox/stock-tool-cage-22.png"}
MOST_PIXELS = 50_000_000


def best(picture_forms, source, kind, threshold):
    """Return the length of the smallest form, or of the source."""
    return min([len(source)] + [
        len(made.body) for made in picture_forms(
            source, kind, threshold, MOST_PIXELS) if made.body])


def row(picture_forms, name, path):
    """Return one row of the table: sizes in percent of the source."""
    source = path.read_bytes()
    kind = {".jpg": "image/jpeg", ".png": "image/png"}[path.suffix]
    shares = [100 * best(picture_forms, source, kind, each) / len(source)
              for each in THRESHOLDS]
    return [name, f"{len(source):,}", *(f"{share:.0f}" for share in shares)]


def main(words):
    """Print the table."""
    sys.path.insert(0, str(TOP))
    from shimmercat import picture_forms
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, help="folder of downloaded packages; default: "
        "%(default)s", default=Path("~/.cache/shimmercat-bench").expanduser())
    options = parser.parse_args(words)
    manual, version = unpacked("gimp-help-en", options.cache.absolute())
    places = {name: DEMO / "www" / path for name, path in PHOTOGRAPHS.items()}
    places |= {name: manual / path for name, path in GRAPHICS.items()}
    print(f"gimp-help-en {version}; sizes in percent of the source.")
    print(table(["Best form at a similarity of", "bytes",
                 *map(str, THRESHOLDS)],
                [row(picture_forms, name, path)
                 for name, path in places.items()]))


if __name__ == "__main__":
    main(sys.argv[1:])
