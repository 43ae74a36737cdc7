"""A server that is not ours: it takes file descriptor 3, and drains.

Knows nothing of who started it.  Answers each request, `/slow` after a while,
with its process id; ends with status 3 at once where a file `broken` lies.
"""

import http.server
import os
import signal
import socket
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the process id, and closes."""

    def do_GET(self):
        """Answer a GET."""
        if self.path == "/slow":
            time.sleep(0.1)
        body = b"%d" % os.getpid()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Be silent."""


class Fd3Server(http.server.ThreadingHTTPServer):
    """Serves a socket that others listen at, too."""

    daemon_threads = False
    timeout = 0.02

    def __init__(self):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.server_close()
        self.socket = socket.socket(fileno=3)
        # Somebody else may have accepted what woke us.
        self.socket.setblocking(False)
        self.is_told = False

    def finish(self, number, _):
        """Say which signal came; accept no more, answer what was accepted.

        No thread is begun here: one may just be begun by who was interrupted.
        """
        print("told", signal.Signals(number).name, flush=True)
        self.is_told = True


def main():
    """Serve until a signal comes, and then until all is answered."""
    if os.path.exists("broken"):
        print("broken", file=sys.stderr)
        sys.exit(3)
    server = Fd3Server()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT,
                   signal.SIGQUIT):
        signal.signal(number, server.finish)
    print("EINHORN_FDS", os.environ.get("EINHORN_FDS"), flush=True)
    print("open", sorted(os.listdir("/proc/self/fd")), flush=True)
    print("user", os.getuid(), os.getgid(), os.getgroups(), flush=True)
    print("ready", flush=True)
    while not server.is_told:
        server.handle_request()
    server.server_close()


if __name__ == "__main__":
    main()
