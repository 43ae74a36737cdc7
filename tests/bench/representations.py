"""Bytes that a browser gets: originals, nginx and shimmercat, by type.

    python tests/bench/representations.py [--sets demo,help] [--cache DIR]

Each file of a set is asked for once, over HTTP/2, with the fields that
Chromium sends for its type; counted are the bytes of bodies as sent.
shimmercat runs in internet mode after `shimmercat.py warm`.  nginx has
`gzip_comp_level 6` and `brotli_static`, with a .br file of `brotli -q 11`
beside each text that it makes smaller.  Every body is decoded: a text has to
be its source, an image has to have as many pixels and frames as its source.

Debian packages are downloaded into the cache folder and unpacked there;
nothing is installed.
"""

import argparse
import collections
import dataclasses
import datetime
import gzip
import io
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import brotli
import httpx
import zstandard
from compare import Bench, free_port, note
from figures import table
from PIL import Image, ImageOps
from servers import Nginx, Shimmercat, first_line

HERE = Path(__file__).parent
DEMO = HERE.parent.parent / "conf" / "demo"
IMAGES = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
PAGES = ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,"
         "image/webp,image/apng,*/*;q=0.8")
CODINGS = "gzip, deflate, br, zstd"
#: {suffix: (name in the tables, Accept)}
KINDS = {
    ".jpg": ("JPEG", IMAGES), ".png": ("PNG", IMAGES),
    ".svg": ("SVG", IMAGES), ".html": ("HTML", PAGES),
    ".css": ("CSS", "text/css,*/*;q=0.1"), ".js": ("JavaScript", "*/*"),
    ".txt": ("text", "*/*"), ".woff2": ("font", "*/*")}
PICTURES = ("JPEG", "PNG")
TEXTS = ("HTML", "CSS", "JavaScript", "SVG", "text")
#: how many of each suffix are taken from a package, spread evenly
PICKS = {".jpg": 45, ".png": 40, ".html": 8, ".css": 3, ".svg": 2}
MOST_PIXELS = 4_000_000
#: photographs are to be smaller than their originals by so much
PHOTOGRAPHS_PERCENT = 45
REQUEST_SECONDS = 30


@dataclasses.dataclass
class Collection:
    """One set of files: where it comes from, and what each was sent as."""

    title: str
    source: Path
    paths: list[Path]  #: relative to the source
    originals: dict = dataclasses.field(default_factory=dict)
    coded: dict = dataclasses.field(default_factory=dict)
    sent: dict = dataclasses.field(default_factory=dict)
    forms: collections.Counter = dataclasses.field(
        default_factory=collections.Counter)
    warm_seconds: float = 0

    def copy(self, folder):
        """Copy the files, and remember how long they are."""
        for path in self.paths:
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / path, place)
            self.originals[path] = place.stat().st_size

    def of(self, *names):
        """Return the paths of some types."""
        return [path for path in self.paths if kind_of(path) in names]


class WarmShimmercat(Shimmercat):
    """Starts after a warm-up, and takes the time of that."""

    seconds = 0

    def prepare(self):
        """Make the smaller forms of all files."""
        super().prepare()
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, self.program(), "warm",
             "--working-dir", self.folder],
            capture_output=True, text=True, cwd=self.folder, check=False,
            env=os.environ | {"HOME": str(self.folder)})
        if done.returncode:
            raise RuntimeError(f"warm ended with {done.returncode}:\n"
                               + done.stderr)
        self.seconds = time.monotonic() - begin
        note(done.stdout)


class CodingNginx(Nginx):
    """nginx that sends coded texts; needs .br files and their module."""

    def __init__(self, bench, port, module):
        """`module` is the file of ngx_http_brotli_static_module."""
        super().__init__(bench, port)
        self.module = module

    def prepare(self):
        """Write nginx.conf over a copy of the files with .br among them."""
        www = self.folder / "www"
        shutil.copytree(self.bench.www, www)
        for path in www.rglob("*"):
            if path.is_file() and kind_of(path) in TEXTS:
                write_brotli(path)
        (self.folder / "nginx.conf").write_text(f"""
load_module {self.module};
daemon off;
user root;
worker_processes 1;
pid {self.folder}/pid;
error_log {self.folder}/error.log;
events {{ worker_connections 100; }}
http {{
    include /etc/nginx/mime.types;
    access_log {self.log};
    gzip on;
    gzip_comp_level 6;
    gzip_min_length 256;
    gzip_types text/plain text/css application/javascript image/svg+xml;
    brotli_static on;
    server {{
        listen 127.0.0.1:{self.port} ssl http2;
        ssl_certificate {self.bench.certificate};
        ssl_certificate_key {self.bench.key};
        root {www};
    }}
}}
""")


def write_brotli(path):
    """Write a .br file if it is smaller; return the smaller size."""
    coded = path.with_name(path.name + ".br")
    subprocess.run(["brotli", "-q", "11", "-o", coded, path], check=True)
    size = coded.stat().st_size
    if size >= path.stat().st_size:
        coded.unlink()
    return min(size, path.stat().st_size)


def kind_of(path):
    """Return the name of a file's type in the tables, or None."""
    return KINDS.get(path.suffix, (None,))[0]


def unpacked(package, cache):
    """Return the folder of a Debian package's files, and its version."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-qq", package],
                       cwd=cache, check=True)
    archive, = cache.glob(f"{package}_*.deb")
    if not (cache / package).exists():
        subprocess.run(["dpkg-deb", "-x", archive, cache / package],
                       check=True)
    return cache / package, first_line("dpkg-deb", "-f", archive, "Version")


def demo_set(_cache):
    """Return the demo site."""
    www = DEMO / "www"
    paths = sorted(path.relative_to(www) for path in www.rglob("*")
                   if path.is_file())
    return Collection("The demo site, conf/demo (its CREDITS name sources "
                      "and licences).", www, paths)


def help_set(cache):
    """Return files of the user manual of GIMP."""
    folder, version = unpacked("gimp-help-en", cache)
    paths = [path for suffix, count in PICKS.items() for path in spread(
        sorted(filter(is_modest, folder.rglob(f"*{suffix}"))), count)]
    return Collection(
        f"Debian package gimp-help-en {version} (GIMP's user manual; GNU "
        "Free Documentation License 1.2 or later, no invariant sections): "
        f"{len(paths)} of its files, evenly spread.", folder,
        sorted(path.relative_to(folder) for path in paths))


def is_modest(path):
    """Return whether a path is a file of no more than MOST_PIXELS."""
    if path.is_symlink() or kind_of(path) not in PICTURES:
        return path.is_file() and not path.is_symlink()
    with Image.open(path) as image:
        return image.width * image.height <= MOST_PIXELS


def spread(things, count):
    """Return `count` things at equal distances, or all."""
    step = max(1, len(things) / count)
    return [things[int(n * step)] for n in range(min(count, len(things)))]


#: {name: what makes the set}
SETS = {"demo": demo_set, "help": help_set}


def fetch_all(server, collection):
    """Ask for all files; keep the lengths and the forms of the answers."""
    sent, forms = {}, collections.Counter()
    context = ssl.create_default_context(cafile=server.bench.certificate)
    with httpx.Client(base_url=f"https://localhost:{server.port}",
                      http2=True, verify=context, trust_env=False,
                      timeout=REQUEST_SECONDS) as client:
        for path in collection.paths:
            answer, body = fetch(client, path)
            source = (server.bench.www / path).read_bytes()
            check(path, answer, body, source)
            sent[path] = len(body)
            if server.name == "shimmercat":
                forms[form_of(answer)] += 1
    collection.sent[server.name] = sent
    collection.forms += forms


def fetch(client, path):
    """Return an answer and its body as it was sent."""
    with client.stream("GET", "/" + urllib.parse.quote(str(path)), headers={
            "accept": KINDS[path.suffix][1],
            "accept-encoding": CODINGS}) as answer:
        body = b"".join(answer.iter_raw())
    if answer.status_code != 200 or answer.http_version != "HTTP/2":
        raise RuntimeError(f"{path}: {answer}, {answer.http_version}")
    return answer, body


def form_of(answer):
    """Return what a body is, in a word: a coding or a type."""
    kind = answer.headers["content-type"].partition(";")[0]
    coding = answer.headers.get("content-encoding")
    return coding or (kind if kind.startswith("image/") else "as it is")


def check(path, answer, body, source):
    """Raise unless a body says truly what it is and shows the source."""
    length = answer.headers.get("content-length", len(body))
    if int(length) != len(body):
        raise RuntimeError(f"{path}: {len(body)} bytes, not {length}")
    plain = decoded(body, answer.headers.get("content-encoding"))
    if kind_of(path) in PICTURES:
        if shape(plain) != shape(source):
            raise RuntimeError(f"{path}: {shape(plain)}, {shape(source)}")
    elif plain != source:
        raise RuntimeError(f"{path}: not the source")


def decoded(body, coding):
    """Return a body without its coding."""
    decoders = {
        None: bytes, "gzip": gzip.decompress, "br": brotli.decompress,
        "zstd": lambda body: zstandard.ZstdDecompressor().decompressobj(
            ).decompress(body)}
    return decoders[coding](body)


def shape(body):
    """Return width, height and number of frames as a viewer sees them."""
    with Image.open(io.BytesIO(body)) as image:
        frames = getattr(image, "n_frames", 1)
        upright = ImageOps.exif_transpose(image)
        upright.load()
        return *upright.size, frames


def measure(collection, module):
    """Have both servers send all files of a set."""
    with tempfile.TemporaryDirectory(prefix="shimmercat-bench.") as folder:
        bench = Bench(Path(folder), 0)
        # Its three scripts are there, too, and are not counted.
        bench.prepare()
        collection.copy(bench.www)
        with WarmShimmercat(bench, free_port()) as server:
            fetch_all(server, collection)
            collection.warm_seconds = server.seconds
        with CodingNginx(bench, free_port(), module) as server:
            fetch_all(server, collection)
            for path in collection.of(*TEXTS):
                place = server.folder / "www" / path
                coded = place.with_name(place.name + ".br")
                collection.coded[path] = (
                    coded if coded.exists() else place).stat().st_size


def saved(before, after):
    """Return by how many percent the second is less."""
    return 100 * (before - after) / max(1, before)


def sizes_table(collection):
    """Return the table of bytes by type."""
    head = ["Type", "files", "originals", "nginx", "shimmercat",
            "saved vs. originals", "saved vs. nginx"]
    names = dict.fromkeys(kind_of(path) for path in sorted(
        collection.paths, key=lambda path: list(KINDS).index(path.suffix)))
    rows = [size_row(name, collection, collection.of(name))
            for name in names]
    return table(head, [*rows, size_row("all", collection,
                                        collection.paths)])


def size_row(name, collection, paths):
    """Return one row of the table of bytes."""
    columns = (collection.originals, collection.sent["nginx"],
               collection.sent["shimmercat"])
    first, second, third = (sum(column[path] for path in paths)
                            for column in columns)
    return [name, str(len(paths)), f"{first:,}", f"{second:,}",
            f"{third:,}", f"{saved(first, third):.1f} %",
            f"{saved(second, third):.1f} %"]


def verdicts(collection):
    """Return lines that say whether what was wanted holds."""
    sent, originals = collection.sent["shimmercat"], collection.originals
    photographs = collection.of("JPEG")
    share = saved(sum(originals[path] for path in photographs),
                  sum(sent[path] for path in photographs))
    middle = statistics.median(saved(originals[path], sent[path])
                               for path in photographs)
    texts = collection.of(*TEXTS)
    ours = sum(sent[path] for path in texts)
    theirs = sum(collection.coded[path] for path in texts)
    larger = [path for path in texts if sent[path] > collection.coded[path]]
    return [
        f"* JPEG at least {PHOTOGRAPHS_PERCENT} % smaller than the "
        f"originals: {verdict(share >= PHOTOGRAPHS_PERCENT)} ({share:.1f} "
        f"%; median of the files {middle:.1f} %).",
        f"* Texts as small as ``brotli -q 11``: {verdict(ours <= theirs)} "
        f"({ours:,} of {theirs:,} bytes; {len(larger)} of {len(texts)} "
        "files are larger).",
        *(f"  {path}: {sent[path]:,} of {collection.coded[path]:,} bytes."
          for path in larger)]


def verdict(holds):
    """Return a word for a truth."""
    return "holds" if holds else "does NOT hold"


def report(collection):
    """Print what was found of a set."""
    forms = ", ".join(f"{count} {form}" for form, count
                      in collection.forms.most_common())
    print(collection.title, "\n")
    print(sizes_table(collection))
    print("\n".join(verdicts(collection)))
    print(f"* Sent by shimmercat: {forms}.")
    print(f"* Time of the warm-up: {collection.warm_seconds:.0f} s.\n",
          flush=True)


def machine(options):
    """Return a paragraph that says where and how it was measured."""
    return "\n".join([
        f"{datetime.date.today()}: {os.cpu_count()} cores, Linux "
        f"{platform.release()}.",
        f"shimmercat {Shimmercat.version()}, nginx {Nginx.version()}, "
        f"{first_line('brotli', '--version')}.",
        "Bytes of bodies as sent to a client of HTTP/2 with Chromium's "
        "Accept and Accept-Encoding.",
        "Every body was decoded: texts are their sources, images have their "
        "sources' width, height and frames.",
        "Command: ``python tests/bench/representations.py "
        f"{options.words}``.", ""])


def parse(words):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sets", default=",".join(SETS), help="default: %(default)s")
    add("--cache", type=Path, help="folder of downloaded packages; default: "
        "%(default)s", default=Path("~/.cache/shimmercat-bench").expanduser())
    options = parser.parse_args(words)
    options.words = " ".join(words)
    options.sets = options.sets.split(",")
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"unknown sets {unknown}, known are {[*SETS]}")
    for tool in ("apt-get", "dpkg-deb", "brotli", "taskset"):
        if not shutil.which(tool):
            parser.error(f"{tool} is not installed")
    if not Nginx.program():
        parser.error("nginx is not installed")
    return options


def main(words):
    """Measure the sets and print a table of each."""
    options = parse(words)
    cache = options.cache.absolute()
    folder, _ = unpacked("libnginx-mod-http-brotli-static", cache)
    module, = folder.rglob("ngx_http_brotli_static_module.so")
    print(machine(options))
    for name in options.sets:
        collection = SETS[name](cache)
        measure(collection, module)
        report(collection)


if __name__ == "__main__":
    main(sys.argv[1:])
