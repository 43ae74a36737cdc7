"""What shimmercat.py can do without: companions and the native engine."""

import pkgutil

# What pip has installed is found from a checkout as well.
__path__ = pkgutil.extend_path(__path__, __name__)
