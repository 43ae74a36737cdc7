"""The rules that keep shimmercat.py readable as one file."""

import ast
import collections
import dis
import functools
import io
import itertools
import math
import re
import statistics
import tokenize
from pathlib import Path

FILE = Path(__file__).parent.parent / "shimmercat.py"
RULE = "# " + "-" * 75
#: a room that outgrew its budget has more parts, `b`, `c` and so on
TITLE = re.compile(r"# (\d+)([b-f]?)\. ([A-Z][A-Za-z ]*): (.+)")
MAPPED = re.compile(
    r" {3,5}(\d+)([b-f]?)  ([A-Z][A-Za-z]*(?: [a-z]+)*)  +(.+)")

ROOMS = 20
ROOM_LINES = 450
#: the ceiling of the whole; what serving can do without goes elsewhere
FILE_LINES = 16_000
WIDTH = 79

#: the functions that catch everything, because nothing above them would
#: report it; a handler that ends in a bare `raise` is not meant
MAY_CATCH_ALL = frozenset((
    "Conversation._exchange",  # top of an exchange's greenlet
    "Conversation._pass_on",  # the same greenlet, once it has an answer
    "Connection._guard",  # top of a call by the event loop
    "live_apart",  # top of a forked child
    "Arbiter._take_turn",  # arbiter loop
    "Artisan._work",  # one job of the artisan
))

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
           tokenize.DEDENT, tokenize.ENDMARKER)


class Room:
    """One banner and the lines that it opens."""

    def __init__(self, lines, start):
        number, self.half, self.name, self.sentence = TITLE.fullmatch(
            lines[start + 1]).groups()
        self.number = int(number)
        #: number of the banner's first line, counted from one
        self.first = start + 1
        closing = lines.index(RULE, start + 1)
        text = " ".join(line.strip("# ") for line in lines[start:closing])
        self.offers = re.findall(
            r"\w+", text.partition("Offers ")[2].partition("Uses ")[0])
        self.uses = re.findall(
            r"(\d+) ([A-Z][A-Za-z]*(?: [a-z]+)*)", text.partition("Uses ")[2])


@functools.cache
def lines():
    """All lines of the file, without their ends."""
    return FILE.read_text(encoding="utf-8").splitlines()


@functools.cache
def tree():
    """The file's syntax tree."""
    return ast.parse("\n".join(lines()))


@functools.cache
def rooms():
    """All rooms, in the file's order."""
    return [Room(lines(), n) for n, line in enumerate(lines()[:-1])
            if line == RULE and TITLE.fullmatch(lines()[n + 1])]


def room_at(line):
    """Number of the room that holds a line."""
    return max((r.number for r in rooms() if r.first <= line), default=0)


@functools.cache
def tokens():
    """All tokens of the file."""
    text = "\n".join(lines()) + "\n"
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


@functools.cache
def comment_lines():
    """Numbers of the lines that hold a comment."""
    return {t.start[0] for t in tokens() if t.type == tokenize.COMMENT}


@functools.cache
def code_lines():
    """Numbers of the lines that hold more than comments and docstrings."""
    code = set()
    for token in tokens():
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree()):
        documented = isinstance(node, (*DEFINITIONS, ast.Module))
        if documented and ast.get_docstring(node) is not None:
            string = node.body[0]
            code -= set(range(string.lineno, string.end_lineno + 1))
    return code


def definitions(node=None, path=""):
    """Yield (dotted name, node) for all classes and functions; the dot after
    a function is doubled, as in `Class.method..inner`."""
    for child in ast.iter_child_nodes(tree() if node is None else node):
        if not isinstance(child, DEFINITIONS):
            yield from definitions(child, path)
            continue
        name = path + child.name
        yield name, child
        dots = ".." if isinstance(child, FUNCTIONS) else "."
        yield from definitions(child, name + dots)


def instructions(code):
    """Yield all instructions of a code object and of those inside it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from instructions(constant)


@functools.cache
def compiled():
    """The file's code object; nothing of it runs."""
    return compile("\n".join(lines()), str(FILE), "exec")


@functools.cache
def bindings():
    """{name: room} of everything that the module binds."""
    bound = {}
    for step in dis.get_instructions(compiled()):
        if step.opname == "STORE_NAME":
            bound.setdefault(step.argval, room_at(step.positions.lineno))
    return bound


def uses():
    """Yield (line, name, room of the name) where a name is looked up."""
    for step in instructions(compiled()):
        looked_up = "GLOBAL" in step.opname or step.opname == "LOAD_NAME"
        if looked_up and step.argval in bindings():
            yield step.positions.lineno, step.argval, bindings()[step.argval]


def function_lengths():
    """Yield (code lines, place) of every function."""
    for name, node in definitions():
        if isinstance(node, FUNCTIONS):
            span = set(range(node.lineno, node.end_lineno + 1))
            yield len(span & code_lines()), f"line {node.lineno}: {name}"


def handlers():
    """Yield (node, function's dotted name, what is caught) of handlers,
    `contextlib.suppress` among them."""
    inside = {}
    for name, node in definitions():
        inside.update(dict.fromkeys(map(id, ast.walk(node)), name))
    for node in ast.walk(tree()):
        place = inside.get(id(node), "")
        if isinstance(node, ast.ExceptHandler):
            yield node, place, ast.unparse(node.type) if node.type else ""
        elif isinstance(node, ast.With):
            for item in node.items:
                called = ast.unparse(item.context_expr)
                if called.startswith("contextlib.suppress("):
                    yield node, place, called


def message_table():
    """Return the dictionary that MESSAGES is bound to."""
    return next(node.value for node in tree().body
                if isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "MESSAGES")


def calls_of_say():
    """Yield the calls of `say` that have arguments."""
    for node in ast.walk(tree()):
        if (isinstance(node, ast.Call) and node.args
                and ast.unparse(node.func).split(".")[-1] == "say"):
            yield node


def message_codes():
    """Return (declared, said, mentioned) message codes with their lines."""
    table = message_table()
    declared = {key.value: key.lineno for key in table.keys}
    said = {}
    for node in calls_of_say():
        said.update(integers(node.args[0]))
    for node in ast.walk(tree()):
        if isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target.endswith("message_code"):
                said.update(integers(node.value))
    rows = set(map(id, ast.walk(table)))
    mentioned = set(said) | {
        value for node in ast.walk(tree()) if id(node) not in rows
        for value in integers(node) if value >= 10_000}
    return declared, said, mentioned


def integers(node):
    """{integer: line} of an expression, conditional ones among them."""
    if isinstance(node, ast.IfExp):
        return integers(node.body) | integers(node.orelse)
    is_integer = isinstance(node, ast.Constant) and type(node.value) is int
    return {node.value: node.lineno} if is_integer else {}


def test_the_twenty_rooms_are_there_and_in_order():
    assert [room.number for room in rooms() if not room.half] == list(
        range(ROOMS))
    for first, second in itertools.pairwise(rooms()):
        assert second.number == first.number + (not second.half)


def test_the_map_says_what_the_banners_say():
    map_ = [MAPPED.fullmatch(line) for line in
            tree().body[0].value.value.splitlines()]
    assert [(int(m[1]), *m.groups()[1:]) for m in map_ if m] == [
        (room.number, room.half, room.name, room.sentence)
        for room in rooms()]


def test_a_room_uses_names_of_lower_numbered_rooms_only():
    assert not [
        f"line {line}: room {room_at(line)} uses {name} of room {room}"
        for line, name, room in uses() if room > room_at(line)]


def test_a_banner_names_every_room_that_its_room_uses():
    names = {room.number: room.name for room in rooms() if not room.half}
    listed = collections.defaultdict(lambda: {0})
    for room in rooms():
        listed[room.number] |= {room.number, *(int(n) for n, _ in room.uses)}
    assert not [f"room {room.number} calls room {n} {name}" for room in rooms()
                for n, name in room.uses if names.get(int(n)) != name]
    assert not [
        f"line {line}: {name} is from room {room}, which the banner of "
        f"room {room_at(line)} does not list"
        for line, name, room in uses() if room not in listed[room_at(line)]]


def test_a_banner_offers_exactly_the_public_names_of_its_room():
    for number in range(1, ROOMS):
        public = {name for name, home in bindings().items()
                  if home == number and not name.startswith("_")}
        offers = [name for room in rooms() if room.number == number
                  for name in room.offers]
        assert public == set(offers), f"room {number}"


def test_private_names_stay_in_their_room():
    assert not [
        f"line {line}: {name} is private to room {room}"
        for line, name, room in uses()
        if name.startswith("_") and room and room != room_at(line)]


def test_all_lists_what_the_banners_offer():
    exported = next(ast.literal_eval(node.value) for node in tree().body
                    if isinstance(node, ast.Assign)
                    and ast.unparse(node.targets[0]) == "__all__")
    assert exported == [
        name for room in rooms()[1:] for name in room.offers]


def test_no_room_outgrows_its_budget():
    ends = [room.first for room in rooms()[1:]] + [len(lines()) + 1]
    starts = [1] + ends[:-1]
    assert not [
        f"room {room.number} {room.name} has {end - start} lines"
        for room, start, end in zip(rooms(), starts, ends, strict=True)
        if end - start > ROOM_LINES]
    assert len(lines()) <= FILE_LINES


def test_functions_are_short():
    lengths = sorted(function_lengths())
    counts = [count for count, _ in lengths]
    assert statistics.median(counts) <= 7
    assert counts[math.ceil(0.95 * len(counts)) - 1] <= 28, lengths[-30:]
    assert not [place for count, place in lengths if count > 50]


def is_promised(name):
    """Whether a method is one of a base class, or of a parser's protocol,
    where its contract stands."""
    kind, _, method = name.partition(".")
    return method.startswith("on_") or any(
        f"{base}.{method}" in documented() for base in bases().get(kind, ()))


@functools.cache
def bases():
    """{class: its base classes}."""
    return {name: [ast.unparse(base) for base in node.bases]
            for name, node in definitions() if isinstance(node, ast.ClassDef)}


@functools.cache
def documented():
    """Names of what has a docstring."""
    return {name for name, node in definitions()
            if ast.get_docstring(node) is not None}


def test_everything_public_has_a_docstring_that_opens_with_a_sentence():
    missing, odd = [], []
    for name, node in definitions():
        text = ast.get_docstring(node)
        setter = any(ast.unparse(d).endswith(".setter")
                     for d in node.decorator_list)
        private = ".." in name or "._" in f".{name}"
        if text is None and not setter and not is_promised(name) and (
                isinstance(node, ast.ClassDef) or not private):
            missing.append(f"line {node.lineno}: {name}")
        if text is not None and not text.split("\n")[0].endswith("."):
            odd.append(f"line {node.lineno}: {name}")
    assert not missing
    assert not odd, "first lines that do not end with a full stop"


def test_no_line_is_wider_than_79_characters():
    assert not [f"line {n}: {len(line)} characters"
                for n, line in enumerate(lines(), 1) if len(line) > WIDTH]


def test_imports_stand_in_room_0_alone():
    allowed = {"import shimmercat_ext.native", "from shimmercat_ext import "
               "native", "from shimmercat_ext.native import bind"}
    found = [(node, ast.unparse(node).split(" as ")[0])
             for node in ast.walk(tree())
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [
        f"line {node.lineno}: {text}" for node, text in found
        if room_at(node.lineno)
        and not (room_at(node.lineno) == 5 and text in allowed)]


def test_only_the_named_functions_catch_everything():
    broad = re.compile(r"\b(Base)?Exception\b|^$")
    found = {place: f"line {node.lineno}: {place} catches {caught or 'all'}"
             for node, place, caught in handlers() if broad.search(caught)
             and ast.unparse(node.body[-1]) != "raise"}
    assert not [found[place] for place in set(found) - MAY_CATCH_ALL]
    assert not MAY_CATCH_ALL - set(found), "named, but catch no such thing"


def test_no_handler_is_silent_without_its_reason_in_a_comment():
    silent = []
    for node, place, _ in handlers():
        last, first = node.end_lineno, node.lineno
        if isinstance(node, ast.With):
            first -= 1
        elif not all(isinstance(step, ast.Pass) for step in node.body):
            continue
        if not comment_lines() & set(range(first, last + 1)):
            silent.append(f"line {node.lineno}: {place}")
    assert not silent


def test_every_message_said_is_declared_and_every_declared_one_is_said():
    declared, said, mentioned = message_codes()
    assert list(declared) == sorted(declared)
    assert not {f"line {line}: {code:05}" for code, line in said.items()
                if code not in declared}
    assert not {f"line {line}: {code:05}" for code, line in declared.items()
                if code not in mentioned}


def test_every_message_gets_the_pieces_of_its_format():
    table = message_table()
    pieces = {key.value: ast.literal_eval(row.args[0]).count("{}")
              for key, row in zip(table.keys, table.values, strict=True)}
    wrong = []
    for node in calls_of_say():
        given = [not isinstance(word, ast.Starred) for word in node.args[1:]]
        for code, line in integers(node.args[0]).items():
            if all(given) and pieces.get(code) not in (None, len(given)):
                wrong.append(f"line {line}: {code:05} has {len(given)}"
                             f" pieces, its format {pieces[code]}")
    assert not wrong


def test_nothing_is_left_to_do():
    assert not [f"line {n}: {line.strip()}"
                for n, line in enumerate(lines(), 1)
                if re.search(r"\b(TODO|FIXME|XXX)\b", line)]
