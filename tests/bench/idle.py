"""Opens idle HTTP/2 connections: `idle.py PORT COUNT CA_FILE`.

Each connection makes its TLS handshake, asks for one small asset, reads it,
and then does nothing.  The TLS state on this side is dropped, the TCP
connection stays: ten thousand cost this process next to nothing.  Prints
`open COUNT` when all are there, and ends when its stdin does; with an error
if the server has closed any meanwhile.
"""

import resource
import select
import socket
import ssl
import struct
import sys

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = struct.pack(">HBBBL", 0, 0, 4, 0, 0)
SETTINGS_ACK = struct.pack(">HBBBL", 0, 0, 4, 1, 0)
DATA, HEADERS, ENDED = 0, 1, 1
TIMEOUT_SECONDS = 20


def request(port):
    """Return the bytes that a connection sends first."""
    block = hpack.Encoder().encode([
        (":method", "GET"), (":scheme", "https"), (":path", "/1k.js"),
        (":authority", f"localhost:{port}"), ("user-agent", "idle")])
    # END_STREAM and END_HEADERS, stream 1.
    head = struct.pack(">HBBBL", 0, len(block), HEADERS, 5, 1)
    return PREFACE + SETTINGS + head + block


def read_answer(stream):
    """Read frames until stream 1 has ended."""
    while True:
        head = stream.read(9)
        if len(head) < 9:
            raise ConnectionError("closed by the server")
        high, low, kind, flags, number = struct.unpack(">HBBBL", head)
        stream.read(high << 8 | low)
        if number == 1 and kind in (DATA, HEADERS) and flags & ENDED:
            return


def open_one(address, context, opening):
    """Return the descriptor of one connection that has had its answer."""
    raw = socket.create_connection(address, timeout=TIMEOUT_SECONDS)
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        wrapped.sendall(opening)
        with wrapped.makefile("rb") as stream:
            read_answer(stream)
        wrapped.sendall(SETTINGS_ACK)
        # Detached, the connection outlives the TLS object without a
        # close_notify.
        return wrapped.detach()


def main(port, count, ca_file):
    """Open `count` connections and hold them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["h2"])
    opening = request(port)
    held = [open_one(("127.0.0.1", port), context, opening)
            for _ in range(count)]
    print("open", len(held), flush=True)
    sys.stdin.read()
    watched = select.poll()
    for descriptor in held:
        watched.register(descriptor, select.POLLRDHUP)
    if closed := len(watched.poll(0)):
        sys.exit(f"{closed} of {count} were closed by the server")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
