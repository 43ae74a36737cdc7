"""README.rst says what the program says of itself.

Run as a program, this module writes README.rst's tables of options anew.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

TOP = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(TOP))
README = TOP / "README.rst"
TABLES = {"flags": ("flag", "internet flag"), "tweaks": ("tweak",)}
MEANING_WIDTH = 48


def shimmercat():
    """Return the module, imported late for the sake of `sys.path`."""
    import shimmercat as module
    return module


def options_table(places):
    """Return the table of the options of some places."""
    rows = [option_cells(option) for option in shimmercat().OPTIONS
            if option.where in places]
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    rule = "  ".join("=" * width for width in (*widths, MEANING_WIDTH))
    lines = [rule]
    for name, default, meaning in rows:
        first, *more = textwrap.wrap(meaning, MEANING_WIDTH)
        head = f"{name:{widths[0]}}  {default:{widths[1]}}"
        lines.append(f"{head}  {first}")
        lines += [" " * len(head) + "  " + line for line in more]
    return "\n".join([*lines, rule])


def option_cells(option):
    """Return name, default and meaning of an option, as in the table."""
    name = f"``{option.name}``"
    if option.where != "tweak":
        name = f"``--{option.name}``"
    if option.name == "redirect":
        name = f"``-t``, {name}"
    default = "\\-"
    if option.default not in (None, False):
        default = f"``{option.shown(option.default)}``"
    meaning = option.text[0].upper() + option.text[1:].rstrip(".") + "."
    if option.where == "internet flag":
        meaning = f"(internet) {meaning}"
    return name, default, meaning.replace("\\", "\\\\")


def with_tables(text):
    """Return the page with its tables of options as they should be."""
    for mark, places in TABLES.items():
        text = re.sub(
            rf"(?s)(\n\.\. {mark}\n\n).*?(\n*\.\. end\n)",
            lambda found, places=places:
                f"{found[1]}{options_table(places)}\n\n.. end\n", text)
    return text


def test_the_tables_of_options_follow_the_program():
    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `python tests/test_readme.py`"


def test_all_exit_statuses_are_explained():
    source = (TOP / "shimmercat.py").read_text(encoding="utf-8")
    used = set(re.findall(r"exit_code = (\d+)", source))
    table = README.read_text(encoding="utf-8").partition("Exit statuses:")[2]
    assert used <= set(re.findall(r"(?m)^(\d+) ", table))


def test_message_codes_on_the_page_are_declared():
    text = README.read_text(encoding="utf-8")
    named = set(map(int, re.findall(r"\b[0-6]0\d{3}\b", text)))
    assert not named - set(shimmercat().MESSAGES) - {10000, 20000}


def test_the_two_commands_are_there():
    text = README.read_text(encoding="utf-8")
    assert ("\n    pip install . && python shimmercat.py internet"
            " --working-dir conf/demo\n") in text
    assert "\n    pip install '.[test]' && pytest tests\n" in text


def test_the_flags_on_the_page_exist():
    text = README.read_text(encoding="utf-8")
    known = {f"--{option.name}" for option in shimmercat().OPTIONS}
    for command in re.findall(r"(?m)python shimmercat\.py .*$", text):
        words = shlex.split(command.strip("`.,"))
        flags = {word for word in words if word.startswith("--")}
        assert flags <= known, command


def test_the_demo_site_of_the_first_command_is_configured_rightly():
    done = subprocess.run(
        [sys.executable, TOP / "shimmercat.py", "check", "--working-dir",
         TOP / "conf" / "demo"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    devlove = TOP / "conf" / "demo" / "devlove.yaml"
    assert len(devlove.read_text().splitlines()) <= 10


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")),
                      encoding="utf-8")
