"""Makes TLS handshakes: `handshakes.py PORT SECONDS full|resumed`.

Prints `begin`, and when the time is over the number of handshakes.  Each has
a TCP connection of its own, is TLS 1.3 with ALPN for HTTP/2, and counts once
the server's SETTINGS have come, so that it is over at both ends; nothing is
asked for.  A resumed one offers the ticket of one connection again; unless
the server takes it, the program fails.

The group of the key exchange is P-256, which all servers have (nghttpd has no
other; offered X25519 first, it would need one more turn).  Certificates are
not checked against anything: that would be work of the client only.
"""

import concurrent.futures
import socket
import ssl
import sys
import time

from idle import PREFACE, SETTINGS

THREADS = 8
TIMEOUT_SECONDS = 20


def client_context():
    """Return the settings of all connections."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_ecdh_curve("prime256v1")
    context.set_alpn_protocols(["h2"])
    return context


def shake(address, context, session=None):
    """Connect, and return the session that the server's ticket gives."""
    raw = socket.create_connection(address, TIMEOUT_SECONDS)
    # Else the preface waits until the server acknowledges Finished, 40 ms.
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    with context.wrap_socket(raw, server_hostname="localhost",
                             session=session) as wrapped:
        if wrapped.session_reused != (session is not None):
            raise ConnectionError("the server did not resume a session")
        wrapped.sendall(PREFACE + SETTINGS)
        if not wrapped.recv(16384):
            raise ConnectionError("closed by the server")
        return wrapped.session


def repeat(address, context, session, end):
    """Make handshakes until a time, and return their number."""
    count = 0
    while time.monotonic() < end:
        shake(address, context, session)
        count += 1
    return count


def main(port, seconds, kind):
    """Make handshakes on some threads and print their number."""
    address, context = ("127.0.0.1", port), client_context()
    ticket = shake(address, context)
    session = ticket if kind == "resumed" else None
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        print("begin", flush=True)
        end = time.monotonic() + seconds
        counts = [pool.submit(repeat, address, context, session, end)
                  for _ in range(THREADS)]
        print(sum(count.result() for count in counts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
