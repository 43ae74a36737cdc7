"""The engine in C: HTTP/2 by nghttp2, where setup.py could build it."""

import pkgutil

# A checkout takes the engine that pip has built and installed, unless it was
# built in place.
__path__ = pkgutil.extend_path(__path__, __name__)

from .engine import ABI, bind

__all__ = ["ABI", "bind"]
