"""What was measured, and the tables of it."""

import collections
import statistics
import typing

#: a server that used less of its core than this was waiting for its load
FULLY_BUSY = 0.9
MARKS_EXPLAINED = (
    "> at least, < at most, ~ not comparable: "
    "the load was the limit, not the server.")
NOTHING = "\\-"
#: what the rows that stand together have in common, in the tables' order
GROUPS = ("requests per second", "processor time per request", "latency",
          "a large file", "TLS handshakes", "memory", "two workers")


class Row(typing.NamedTuple):
    """One line of the tables."""

    #: one of `GROUPS`
    group: str
    name: str
    unit: str = ""
    digits: int = 0
    more_is_better: bool = True
    #: whether it says something beside that of another server
    is_compared: bool = True

    @property
    def label(self):
        """Name and unit."""
        return ", ".join(filter(None, (self.name, self.unit)))


class Figures:
    """All values, by row and server; what is asked for is their median."""

    def __init__(self):
        self._values = collections.defaultdict(
            lambda: collections.defaultdict(list))
        self._busy = collections.defaultdict(list)
        #: a sentence for each figure that one round could not get
        self.missing = []

    def add(self, row, server, value, busy=None):
        """Keep a value of one round; `busy` is the part of its core that
        the server used, where that may limit the value."""
        self._values[row][server].append(value)
        if busy is not None:
            self._busy[row, server].append(busy)

    def rows(self):
        """Return the rows with values, by groups, in the order of their
        first."""
        return sorted(self._values, key=lambda row: GROUPS.index(row.group))

    def median(self, row, server):
        """Return the median of the rounds, or None."""
        values = self._values[row].get(server)
        return statistics.median(values) if values else None

    def is_bound(self, row, server):
        """Whether the load, not the server, set the value: the server can
        do more than that."""
        busy = self._busy.get((row, server))
        return bool(busy) and statistics.median(busy) < FULLY_BUSY

    def times_as_good(self, row, ours, theirs):
        """Return how many times one server is as good as another, or None
        either has no value or that would say nothing."""
        pair = self.median(row, ours), self.median(row, theirs)
        if not all(pair) or not row.is_compared:
            return None
        return pair[0] / pair[1] if row.more_is_better else pair[1] / pair[0]

    def ratio_mark(self, row, ours, theirs):
        """Return what is known of a ratio whose parts may be bound."""
        return {(False, False): "", (True, False): ">", (False, True): "<",
                (True, True): "~"}[
                    self.is_bound(row, ours), self.is_bound(row, theirs)]

    def values_table(self, servers):
        """Return the table of all medians."""
        return table(["median of the rounds", *servers], [
            [row.label, *(self._cell(row, server) for server in servers)]
            for row in self.rows()])

    def _cell(self, row, server):
        value = self.median(row, server)
        if value is None:
            return NOTHING
        sign = ">" if self.is_bound(row, server) else ""
        return f"{sign}{value:,.{row.digits}f}"

    def ratios_table(self, ours, servers):
        """Return the table of how one server stands to the others."""
        return table([f"{ours}, times as good as", *servers], [
            [row.name, *(self._ratio_cell(row, ours, server)
                         for server in servers)]
            for row in self.rows() if row.is_compared])

    def _ratio_cell(self, row, ours, theirs):
        ratio = self.times_as_good(row, ours, theirs)
        if ratio is None:
            return NOTHING
        return f"{self.ratio_mark(row, ours, theirs)}{ratio:.2f}"


def table(head, rows):
    """Return a simple table of reStructuredText."""
    rows = [head, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    texts = ["  ".join(
        cell.ljust(width) if n == 0 else cell.rjust(width)
        for n, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip() for row in rows]
    return "\n".join([rule, texts[0], rule, *texts[1:], rule, ""])
