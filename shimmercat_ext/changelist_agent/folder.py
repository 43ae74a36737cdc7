"""The files of a folder as they are."""

import collections
import hashlib
import os
import stat
import time
import typing

from shimmercat import CHANGELIST_FOLDER, MIB, SURE_SECONDS, file_identity

#: links to folders that a path may lead through: more would only be loops
_MOST_LINKS = 2
#: a larger file counts as changed when its identity does
_LARGEST_READ = 64 * MIB


class Folder:
    """A folder whose files are served; paths are octets below it.

    What shimmercat never asks for is not there: dot-files and the changelist.
    """

    def __init__(self, root: str):
        self.root = os.fsencode(root)
        #: {path: links that lead to it}, those that files() came across
        self._links = collections.defaultdict(set)

    def place(self) -> tuple | None:
        """What differs when another folder has the name; None without one."""
        try:
            return file_identity(os.stat(self.root))[:2]
        except OSError:
            return None

    def below(self, path: str) -> bytes | None:
        """The path of an absolute one; None for what is never served."""
        path = os.path.relpath(os.fsencode(path), self.root)
        return b"" if path == b"." else path if _is_served(path) else None

    def names(self, path: bytes) -> list[bytes]:
        """A path, and what it is called through links."""
        parts = path.split(b"/")
        return [path, *(
            b"/".join((link, *parts[count:]))
            for count in range(1, len(parts) + 1)
            for link in self._links.get(b"/".join(parts[:count]), ()))]

    def files(self, path: bytes) -> typing.Iterator[tuple[bytes, str]]:
        """(path, identity) of a file, or of all files below a folder.

        In order of paths; nothing when there is nothing.
        """
        if not path:
            self._links.clear()
        parts = path.split(b"/")
        return self._files(path, sum(
            os.path.islink(self._full(b"/".join(parts[:count])))
            for count in range(1, len(parts))))

    def digest(self, path: bytes) -> tuple[str, str] | None:
        """(identity, hash) of a file; None when it cannot be read.

        The identity is empty while it does not vouch for the octets: a file
        may change twice within a tick of its clock.
        """
        try:
            fd = os.open(self._full(path),
                         os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as stream:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    return None
                identity = _identity_text(status)
                is_young = time.time() - status.st_ctime < SURE_SECONDS
                if status.st_size > _LARGEST_READ:
                    return "" if is_young else identity, identity
                content = hashlib.file_digest(stream, "sha256").hexdigest()
                return "" if is_young else identity, content
        except OSError:
            return None

    def _full(self, path):
        return self.root + b"/" + path

    def _files(self, path, links):
        """The files below; `links` are on the way there."""
        full = self._full(path)
        try:
            status = os.stat(full)
            names = os.listdir(full) if stat.S_ISDIR(status.st_mode) else ()
        except OSError:
            # It is gone, or not ours to read: nothing is served from it.
            return
        if path and os.path.islink(full):
            real = os.path.relpath(os.path.realpath(full),
                                   os.path.realpath(self.root))
            self._links[real].add(path)
            links += 1
        if stat.S_ISREG(status.st_mode):
            yield path, _identity_text(status)
        elif links <= _MOST_LINKS:
            # As the paths below a folder are ordered, so is the folder.
            for name in sorted(names, key=lambda name: name + b"/" * (
                    os.path.isdir(full + b"/" + name))):
                below = path + b"/" + name if path else name
                if _is_served(below):
                    yield from self._files(below, links)


def _is_served(path):
    """Whether a path below the root is one that shimmercat can ask for."""
    first, *rest = path.split(b"/")
    names = rest if first == b".well-known" else (first, *rest)
    return first != CHANGELIST_FOLDER.encode() and not any(
        name.startswith(b".") for name in names)


def _identity_text(status):
    return " ".join(map(str, file_identity(status)))
