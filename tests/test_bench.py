"""What the benchmark reads in h2load's output, and what it makes of it."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"

#: of h2load 1.52.0, without its lines of progress
OUTPUT = """\
starting benchmark...
TLS Protocol: TLSv1.3
Cipher: TLS_AES_128_GCM_SHA256
Application protocol: h2
Main benchmark duration is over for thread #0. Stopping all clients.

finished in 1.51s, 72922.00 req/s, 73.30MB/s
requests: 72922 total, 72922 started, 72922 done, 72922 succeeded, 0 failed, \
0 errored, 0 timeout
status codes: 72922 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 73.30MB (76860556) total, 1.24MB (1301920) headers (space savings \
93.42%), 105.66MB (110796800) data
                     min         max         mean         sd        +/- sd
time for request:      255us     42.31ms     11.72ms      7.37ms    70.87%
req/s           :    2060.54     2378.62     2258.10       72.23    81.25%
"""


@pytest.fixture
def module(monkeypatch):
    """A function that imports a module of the benchmark, for one test."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = [path.stem for path in BENCH.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_rate_and_octets_are_those_of_the_main_phase(module):
    rate, octets = module("h2load").parse(OUTPUT, 2)
    assert (rate, octets) == (72922, 38430278)


def test_a_large_file_that_did_not_end_has_octets(module):
    text = OUTPUT.replace("72922.00 req/s", "0.00 req/s").replace(
        "72922 done, 72922 succeeded", "0 done, 0 succeeded").replace(
        "72922 2xx", "1 2xx")
    assert module("h2load").parse(text, 1) == (0, 76860556)


@pytest.mark.parametrize("sound, broken", [
    ("72922 succeeded", "72921 succeeded"),
    ("0 failed", "1 failed"),
    ("0 errored", "1 errored"),
    ("0 timeout", "1 timeout"),
    ("0 3xx", "1 3xx"),
    ("0 4xx", "72922 4xx"),
    ("0 5xx", "1 5xx"),
    ("TLSv1.3", "TLSv1.2"),
    ("(76860556) total", "(0) total"),
    ("status codes:", "statuses:"),
    ("72922.00 req/s, ", ""),
    (" total, 1.24MB", ""),
    (OUTPUT, ""),
])
def test_no_figure_is_made_of_a_load_that_failed(module, sound, broken):
    assert sound in OUTPUT
    h2load = module("h2load")
    with pytest.raises(h2load.NoFigure):
        h2load.parse(OUTPUT.replace(sound, broken), 1)


def test_percentiles_are_of_the_requests_of_the_main_phase(module):
    h2load = module("h2load")
    lines = [f"1795772373660911\t200\t{n}\n" for n in range(1000, 0, -1)]
    lines.append("1795772373660911\t0\t999999\n")
    load = h2load.Load(1, 1, 1, h2load.parse_times(lines))
    assert load.milliseconds(50) == 0.5
    assert load.milliseconds(99) == 0.99


@pytest.mark.parametrize("lines", [
    [], ["1795772373660911\t404\t12\n"], ["1795772373660911\t-1\t12\n"]])
def test_a_log_without_answers_has_no_percentiles(module, lines):
    h2load = module("h2load")
    with pytest.raises(h2load.NoFigure):
        h2load.parse_times(lines)


def test_a_ratio_is_above_one_where_shimmercat_is_better(module):
    figures = module("figures")
    found = figures.Figures()
    rate = figures.Row("requests per second", "rate")
    cost = figures.Row("processor time per request", "CPU", "µs", 1, False)
    for value in 30, 20, 10:
        found.add(rate, "shimmercat", value, 0.99)
        found.add(rate, "nginx", 10, 0.5)
        found.add(cost, "shimmercat", 10)
        found.add(cost, "nginx", 25)
    assert found.times_as_good(rate, "shimmercat", "nginx") == 2
    assert found.times_as_good(cost, "shimmercat", "nginx") == 2.5
    # nginx could have done more: the ratio is at most that.
    assert found.ratio_mark(rate, "shimmercat", "nginx") == "<"
    assert found.ratio_mark(cost, "shimmercat", "nginx") == ""
