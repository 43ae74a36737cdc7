"""A headless Chromium, driven by the DevTools protocol over a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal

from harness import eventually

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
    "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--window-size=1280,900",
    # Whatever else it thinks of: no name but ours leads anywhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    "--remote-debugging-pipe")
#: descriptors that --remote-debugging-pipe means
_COMMANDS, _EVENTS = 3, 4


class Browser:
    """A new Chromium with one empty tab, as a context manager."""

    def __init__(self, folder, *flags):
        self._folder = folder
        self._command = [
            CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder}/profile",
            "about:blank"]
        self._buffer = b""
        self._number = 0
        self._tab = {}
        self._loader = None
        #: what the tab has told so far: pairs of method and parameters
        self.events = []

    def __enter__(self):
        self._start()
        try:
            self._attach()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *failure):
        self._end()

    def _start(self):
        theirs_in, self._commands = _high_pipe()
        self._events, theirs_out = _high_pipe()
        with open(self._folder / "chromium.txt", "wb") as said:
            self.pid = os.posix_spawn(
                CHROMIUM, self._command,
                {**os.environ, "HOME": str(self._folder)},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs_in, _COMMANDS),
                              (os.POSIX_SPAWN_DUP2, theirs_out, _EVENTS),
                              (os.POSIX_SPAWN_DUP2, said.fileno(), 1),
                              (os.POSIX_SPAWN_DUP2, said.fileno(), 2)],
                setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)

    def _attach(self):
        """Speak to its only tab from here on."""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(one for one in targets if one["type"] == "page")
        attached = self.call("Target.attachToTarget", flatten=True,
                             targetId=page["targetId"])
        self._tab = {"sessionId": attached["sessionId"]}
        for domain in ("Network", "Page", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _end(self):
        """End it: without its pipe it goes by itself."""
        os.close(self._commands)
        os.close(self._events)
        try:
            eventually(self._has_gone)
        except AssertionError:
            os.killpg(self.pid, signal.SIGKILL)
            eventually(self._has_gone)
            raise
        finally:
            # Helpers of its own that are slower than it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _has_gone(self):
        return os.waitpid(self.pid, os.WNOHANG) != (0, 0)

    def call(self, method, **parameters):
        """Have the tab do something; return the result."""
        self._number += 1
        command = {"id": self._number, "method": method,
                   "params": parameters, **self._tab}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._hear(30)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _hear(self, seconds):
        """Return the next message; an event is kept too."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._events], [], [], seconds)
            assert ready, (f"silent for {seconds} s; unfinished:"
                           f" {[*map(self.requests().get, self.unfinished())]}"
                           f"; {self.complaints()}")
            data = os.read(self._events, 1 << 20)
            assert data, (self._folder / "chromium.txt").read_text()
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def told(self, *methods):
        """Return the parameters of all events of some kinds."""
        return [parameters for method, parameters in self.events
                if method in methods]

    def wait_until(self, predicate):
        """Hear what the tab tells until something is true."""
        while not predicate():
            self._hear(20)

    def run(self, script):
        """Return the value of an expression, awaited, in the page."""
        done = self.call("Runtime.evaluate", expression=script,
                         awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def visit(self, url):
        """Load a page with all its pictures, also those further down."""
        self.events.clear()
        begun = self.call("Page.navigate", url=url)
        assert "errorText" not in begun, begun
        self._loader = begun["loaderId"]
        self.wait_until(lambda: any(
            (one["loaderId"], one["name"]) == (self._loader, "load")
            for one in self.told("Page.lifecycleEvent")))
        self.run("""(async () => {
            for (const image of document.images) {
                if (!image.getAttribute("src")) continue;
                image.loading = "eager";
                if (!image.complete) await image.decode();
            }
            await document.fonts.ready;
        })()""")
        self.wait_until(lambda: not self.unfinished())

    def requests(self):
        """Return {id: URL} of what the page asked of servers.

        An icon of the page before may come now, and its end is never told.
        """
        return {one["requestId"]: one["request"]["url"]
                for one in self.told("Network.requestWillBeSent")
                if one["loaderId"] == self._loader
                and not one["request"]["url"].startswith("data:")}

    def unfinished(self):
        """Return the ids of requests without an end."""
        ended = {one["requestId"] for one in self.told(
            "Network.loadingFinished", "Network.loadingFailed")}
        return self.requests().keys() - ended

    def complaints(self):
        """Return what a developer would see in red on the console."""
        logged = [one["entry"] for one in self.told("Log.entryAdded")]
        called = self.told("Runtime.consoleAPICalled")
        return [one for one in logged if one["level"] == "error"] + [
            one for one in called if one["type"] in ("error", "assert")
        ] + self.told("Runtime.exceptionThrown", "Network.loadingFailed")

    def screenshot(self):
        """Return a picture of what the tab shows, as PNG."""
        picture = self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(picture["data"])


def _high_pipe():
    """Return a pipe whose numbers are not those it shall be given."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved
