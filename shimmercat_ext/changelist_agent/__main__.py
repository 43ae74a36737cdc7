"""The command `sc_changelist_agent DIR`; runs until it is told to end."""

import argparse
import contextlib
import heapq
import itertools
import logging
import operator
import os
import signal
import sys
import threading
import time
from pathlib import Path

try:
    from watchdog import events
    from watchdog.observers import Observer
except ImportError:
    sys.exit("the changelist agent needs: pip install"
             " 'shimmercat[changelist-agent]'")

from shimmercat import CHANGELIST_FOLDER

from .folder import Folder
from .record import CannotRecord, Changelist, Database, Known

LOG = logging.getLogger("sc_changelist_agent")

#: a file is looked at when it was left alone for so long, or is never left
_SETTLE_SECONDS, _RESTLESS_SECONDS, _TICK_SECONDS = 0.2, 2.0, 0.1
#: until a full disk is tried again
_AGAIN_SECONDS = 10.0
#: paths that wait to be looked at; with more, everything is
_MOST_UNSETTLED = 10_000
_BATCH = 1000
#: all but what reading causes
_EVENTS = [events.FileCreatedEvent, events.FileModifiedEvent,
           events.FileAttribEvent, events.FileDeletedEvent,
           events.FileMovedEvent, events.DirCreatedEvent,
           events.DirAttribEvent, events.DirDeletedEvent, events.DirMovedEvent]


class Unsettled(events.FileSystemEventHandler):
    """Paths that inotify pointed to and nobody has looked at since."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._lock = threading.Lock()
        #: {path: (first, last) time that it was pointed to}
        self._paths = {}

    def on_any_event(self, event: events.FileSystemEvent) -> None:
        """Notes the paths of an event; called by the observer's thread."""
        now = time.monotonic()
        for name in filter(None, (event.src_path, event.dest_path)):
            path = self._folder.below(name)
            if path is None:
                continue
            with self._lock:
                if len(self._paths) >= _MOST_UNSETTLED:
                    self._paths, path = {}, b""
                first, _ = self._paths.get(path, (now, now))
                self._paths[path] = first, now

    def take(self) -> list[bytes]:
        """All names of paths that have settled, none of them below another."""
        now = time.monotonic()
        with self._lock:
            settled = {
                path for path, (first, last) in self._paths.items()
                if now - last >= _SETTLE_SECONDS
                or now - first >= _RESTLESS_SECONDS}
            for path in settled:
                del self._paths[path]
        names = {name for path in settled
                 for name in self._folder.names(path)}
        return [name for name in names if names.isdisjoint(_parents(name))]


def _parents(path):
    while path:
        path = path.rpartition(b"/")[0]
        yield path


class Agent:
    """Keeps the changelist of a folder."""

    def __init__(self, root: str, database: Database):
        self._folder, self._changelist = Folder(root), Changelist(root)
        self._database, self.ended = database, threading.Event()

    def compare(self, paths: list[bytes]) -> int:
        """Tells of what has changed there and below; how much that was."""
        batch, count = [], 0
        for path, found, known in itertools.chain.from_iterable(
                _paired(self._folder.files(path), self._database.below(path))
                for path in paths):
            if self.ended.is_set():
                break
            if not (found and known and found == known.identity):
                state = self._folder.digest(path) if found else None
                batch.append((path, known, state and Known(path, *state)))
            if len(batch) >= _BATCH:
                count += self._tell(batch)
                batch = []
        return count + self._tell(batch)

    def run(self, refresh_seconds: float, keep_seconds: float) -> None:
        """Compares at once what inotify points to, everything at times."""
        unsettled = Unsettled(self._folder)
        place, due, watch = None, 0.0, None
        while not self.ended.wait(_TICK_SECONDS):
            if self._folder.place() != place or watch and not all(
                    thread.is_alive() for thread in watch.emitters):
                if watch:
                    watch.stop()
                place, due = self._folder.place(), 0.0
                watch = place and self._watch(unsettled)
            try:
                if place is None:
                    continue
                if time.monotonic() >= due:
                    due = time.monotonic() + refresh_seconds
                    LOG.info("compared: %d changes", self.compare([b""]))
                    self._changelist.prune(keep_seconds)
                self.compare(unsettled.take())
            except CannotRecord as error:
                LOG.error("%s; tried again", error)
                due = time.monotonic() + _AGAIN_SECONDS
        if watch:
            watch.stop()

    def _tell(self, batch):
        """Writes the changelist, then the database.

        Killed between the two, the agent tells of the same changes again.
        """
        changes = [(event, path) for path, known, state in batch
                   if (event := _event(known, state))]
        self._changelist.append(changes)
        self._database.save({path: state for path, _, state in batch})
        return len(changes)

    def _watch(self, unsettled):
        """An observer of the folder, or None where that is not to be had."""
        observer = Observer()
        try:
            observer.schedule(unsettled, os.fsdecode(self._folder.root),
                              recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as error:
            LOG.error("no inotify, changes are found late: %s (see"
                      " fs.inotify.max_user_watches)", error)
            return None
        return observer


def _paired(found, known):
    """(path, identity or None, Known or None) of two sorted streams."""
    first = operator.itemgetter(0)
    both = heapq.merge(((*row, None) for row in found),
                       ((row.path, None, row) for row in known), key=first)
    for path, rows in itertools.groupby(both, first):
        _, identities, knowns = zip(*rows, strict=True)
        yield path, next(filter(None, identities), None), next(
            filter(None, knowns), None)


def _event(known, state):
    if known is None or state is None:
        return "d" if known else "c" if state else None
    return None if known.content == state.content else "m"


def _arguments():
    parser = argparse.ArgumentParser(
        prog="sc_changelist_agent",
        description="Writes down which files below DIR change, in "
        f"DIR/{CHANGELIST_FOLDER}, for a shimmercat on another host.")
    parser.add_argument("dir", metavar="DIR", help="root of the files")
    for name, kind, default, text in (
            ("database", Path, None, "where the last state of the files is"
             " kept (DIR/.sc_changelist_agent/files.sqlite3)"),
            ("refresh-seconds", _positive, 300.0, "time between two"
             " comparisons of everything (300)"),
            ("keep-days", _positive, 7.0, "age of the oldest changes that are"
             " kept; more than tOld (7)")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser.parse_args()


def _positive(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}; expected a number above 0, below 1e9")


def main() -> int:
    """Runs the command; returns its exit status."""
    options = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    # Who serves the changelist is another user.
    os.umask(0o022)
    root = os.path.abspath(options.dir)
    if not os.path.isdir(root):
        LOG.error("%s: expected a folder", root)
        return os.EX_NOINPUT
    try:
        with contextlib.closing(Database(options.database or Path(
                root, ".sc_changelist_agent", "files.sqlite3"))) as database:
            agent = Agent(root, database)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: agent.ended.set())
            agent.run(options.refresh_seconds, options.keep_days * 86_400)
    except CannotRecord as error:
        LOG.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
