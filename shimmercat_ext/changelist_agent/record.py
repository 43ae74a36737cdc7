"""What was in the folder, and the changelist that tells it to others."""

import contextlib
import os
import sqlite3
import time
import typing
from pathlib import Path

from shimmercat import (
    CHANGELIST_FOLDER,
    SLOT_SECONDS,
    Change,
    ShimmerCatError,
    slot_path,
)

_PAGE_ROWS = 1000
_SCHEMA = """
pragma locking_mode = exclusive;
pragma journal_mode = wal;
create table if not exists files (
    path blob primary key, identity text not null, content text not null
) without rowid;
"""


class CannotRecord(ShimmerCatError):
    """The database or the changelist cannot be written."""

    exit_code = 73


class Known(typing.NamedTuple):
    """A file as it was when the changelist last told of it."""

    path: bytes
    #: empty when it does not tell whether the file is still the same
    identity: str
    content: str  #: a hash


class Database:
    """The last known state of all files; survives the process."""

    def __init__(self, path: Path):
        """Opens or makes it; a damaged one is made anew, empty.

        Raises CannotRecord, also when another agent uses it.
        """
        self._path = path
        with _or_cannot(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._rows = self._opened()
            if self._rows is None:
                for suffix in ("", "-wal"):
                    Path(f"{path}{suffix}").unlink(missing_ok=True)
                self._rows = self._opened()

    def _opened(self):
        """A connection that keeps others out; None when it is damaged."""
        rows = sqlite3.connect(self._path, timeout=0)
        try:
            rows.executescript(_SCHEMA)
            # The first writing takes the lock, which is then kept.
            with rows:
                rows.execute("delete from files where path = x''")
            check = rows.execute("pragma quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            return None
        return rows if check == ("ok",) else None

    def below(self, path: bytes) -> typing.Iterator[Known]:
        """A file, or all files below a folder, in order of paths.

        What has been given may be saved anew meanwhile.
        """
        # "0" is the octet after the slash.
        yield from self._between(path, path + b"\0")
        yield from self._between(path and path + b"/",
                                 path + b"0" if path else b"\xff" * 4096)

    def _between(self, low, high):
        """The files of a half-open interval, read a page at a time."""
        page = [low]
        while page:
            page = self._rows.execute(
                "select * from files where path >= ? and path < ?"
                " order by path limit ?", (low, high, _PAGE_ROWS)).fetchall()
            for row in page:
                yield Known(*row)
                low = row[0] + b"\0"

    def save(self, states: dict[bytes, Known | None]) -> None:
        """Takes over what is known of paths, None of one where nothing is.

        Raises CannotRecord.
        """
        if not states:
            return
        with _or_cannot(self._path), self._rows:
            self._rows.executemany("delete from files where path = ?",
                                   [(path,) for path in states])
            self._rows.executemany("insert into files values (?, ?, ?)",
                                   filter(None, states.values()))

    def close(self) -> None:
        """Lets another agent have it."""
        self._rows.close()


class Changelist:
    """The changelist below the root of the files."""

    def __init__(self, root: str):
        self._root = Path(root)

    def append(self, changes: list[tuple[str, bytes]]) -> None:
        """Adds (event, path) pairs, as of this moment, and has them on disk.

        Raises CannotRecord.
        """
        if not changes:
            return
        now = int(time.time())
        path = self._root / slot_path(now)
        text = b"".join(Change(now, event, os.fsdecode(name)).line()
                        for event, name in changes)
        with _or_cannot(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
                    # A writer was killed in the midst of a line.
                    text = b"\n" + text
                while text:
                    text = text[stream.write(text):]
                os.fsync(stream.fileno())

    def prune(self, seconds: float) -> None:
        """Removes the files of slots that ended more than `seconds` ago."""
        oldest = time.time() - seconds
        for path in (self._root / CHANGELIST_FOLDER).glob("*/*/*/*"):
            slot = _slot_of(path.relative_to(self._root))
            if slot is not None and slot + SLOT_SECONDS < oldest:
                # A folder stays while it has others; the next time will do.
                with contextlib.suppress(OSError):
                    path.unlink()
                    for parent in path.parents[:3]:
                        parent.rmdir()


@contextlib.contextmanager
def _or_cannot(path):
    """Translates trouble into CannotRecord."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise CannotRecord(f"{path}: {error}") from error


def _slot_of(path):
    """First moment of the slot that a path is the file of, or None."""
    with contextlib.suppress(ValueError):
        # Somebody else's file.
        slot = int("".join(path.parts[1:]) + "00", 16)
        return slot if slot_path(slot) == str(path) else None
    return None
