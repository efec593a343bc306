"""The page about the command line: what `--help` says, command by command.

Where no terminal reads along, tyro rules a line below the title of each group of options. An option stands two spaces
in, its help two spaces or a line after it, and further in, wherever it is wrapped.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from docs.api import prose
from saltflat.lab.cli import parsed
from saltflat.lab.recipes import RECIPES

WIDTH = "120"  # on a wider one, tyro sets groups in columns
GROUP = re.compile(r"^ (?P<title>\w[\w ]*)\n -+\n(?P<inside>(?:  .*\n)*)", re.MULTILINE)
OPENING = """# The command line

What `saltflat COMMAND --help` says, command by command. A command looks at its input before it writes or computes
anything: what cannot be used is one line on stderr that names the field, the value and what is allowed.

| exit code | meaning |
| ---: | --- |
| 0 | done |
| 1 | something failed while working: a disk, a loss that is no number |
| 2 | bad input; nothing was touched |
| 75 | told to stop by a signal, and ready to go on |
| 130 | interrupted |
"""


@dataclass(frozen=True)
class Option:
    """`--name METAVAR`, or what a positional argument is called, and its help text."""

    name: str
    text: str


def commands() -> list[str]:
    """`recipes`, `study gap`, ... in the order that `--help` has them."""
    inner = [f"study {name}" for name in choices("study")]
    return [name for name in choices() if name != "study"] + inner


def choices(*words: str) -> list[str]:
    """The names of subcommands, as usage has them."""
    usage = help_of(*words).split("\n\n")[0]
    return re.findall(r"[\w-]+", usage[usage.rindex("{") :])


def help_of(*words: str) -> str:
    """What `saltflat WORDS --help` prints."""
    columns, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parsed([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def options(shown: str) -> Iterator[Option]:
    """What stands in the groups of a help text, subcommands and `--help` itself aside.

    >>> list(options("usage\\n\\n options\\n ----\\n  --a INT  so.\\n  --b {x,y}\\n           or.\\n"))
    [Option(name='--a INT', text='so.'), Option(name='--b {x,y}', text='or.')]
    """
    found: list[Option] = []
    for group in GROUP.finditer(shown):
        for line in group["inside"].splitlines() if group["title"] != "subcommands" else ():
            if line.startswith("   "):
                last = found.pop()
                found.append(Option(last.name, f"{last.text} {line.strip()}".strip()))
            else:
                name, *text = re.split(r"  +", line.strip(), maxsplit=1)
                found.append(Option(name, "".join(text)))
    yield from (option for option in found if option.name != "-h, --help")


def page() -> str:
    """All commands, with their options."""
    pieces = [OPENING]
    for name in commands():
        pieces += [f"## saltflat {name}", *_of(name)]
    return "\n\n".join(piece.strip() for piece in pieces if piece) + "\n"


def _of(name: str) -> Iterator[str]:
    if name == "train":
        yield from _train()
        return
    shown = help_of(*name.split())
    yield _description(shown)
    yield table(options(shown))


def _train() -> Iterator[str]:
    shown, resumed = help_of("train"), help_of("train", "--resume", "RUN")
    yield _description(shown)
    yield table(options(shown))
    yield (
        f"RECIPE is one of {len(RECIPES)} names: [recipes](recipes.md). Every field of a recipe can be overridden, as "
        "`--attack.eps 0.1`, before or after the other options: [settings](settings.md)."
    )
    yield "`saltflat train --resume RUN`: " + _description(resumed)
    yield table(options(resumed))


def _description(shown: str) -> str:
    """What stands between usage and the first box."""
    words = GROUP.split(shown.partition("\n\n")[2], maxsplit=1)[0]
    return "\n\n".join(prose(" ".join(paragraph.split())) for paragraph in words.strip().split("\n\n"))


def table(found: Iterable[Option]) -> str:
    """Name, default and meaning of options; empty if there are none."""
    rows = [_row(option) for option in found]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]) if rows else ""


def _row(option: Option) -> str:
    text, usual = option.text, ""
    if found := re.search(r" ?\((?:(required)|default: ?(.*))\)$", text):
        text = text[: found.start()]
        usual = found[1] or ("" if found[2] in ("", "None", "''") else f"`{found[2]}`")
    name = option.name.replace("{None}|", "").replace("{None,", "{")
    return f"| {cell(f'`{name}`')} | {cell(usual)} | {cell(prose(text))} |"


def cell(words: str) -> str:
    """What may stand in a cell of a table."""
    return words.replace("|", "\\|")
