"""Asks a server until its own stdin ends: `polite_client.py PORT PID`.

All requests go over one connection of HTTP/2.  For each line that it reads it
prints one: a JSON list of how many seconds each answer since the line before
took.  What the server's process PID and this one were ready to run in them
and did not get a processor for is taken off: that is what else the machine
does.
"""

import json
import pathlib
import select
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import harness
from h2_client import H2Client

PAUSE_SECONDS = 0.005


class Place:
    """A server as far as a client needs it."""

    connect = harness.Server.connect

    def __init__(self, port):
        self.port = port


def delay(*processes):
    """Return the seconds that processes have waited for a processor."""
    return sum(int(pathlib.Path(f"/proc/{pid}/schedstat").read_text()
                   .split()[1]) for pid in processes) / 1e9


def ask(client, pid):
    """Ask for the page; return the seconds that it took."""
    begin = time.monotonic() - delay(pid, "self")
    stream = client.get("/")
    client.finish()
    seconds = time.monotonic() - delay(pid, "self") - begin
    if client.heads[stream][":status"] != "200":
        raise ValueError(f"{client.heads[stream]}")
    return seconds


def main(port, pid):
    """Ask the server at a port, whose process is known by `pid`."""
    with H2Client(Place(int(port))) as client:
        ask(client, pid)
        seconds = []
        while True:
            if select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
                if not sys.stdin.readline():
                    return
                print(json.dumps(seconds), flush=True)
                seconds = []
            seconds.append(ask(client, pid))


if __name__ == "__main__":
    main(*sys.argv[1:])
