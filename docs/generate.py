"""Write the reference, docs/reference/, from what stands in the code.

    python -m docs.generate

A page for each room of the package out of its docstrings and signatures, which are parsed and not imported; a page of
the command line out of what `--help` says; one of settings and one of recipes out of the configs; and an index. A test
fails when the pages are not what this script would write now.
"""

import importlib.metadata
from pathlib import Path

import griffe

from docs import api, command_line, settings

FOLDER = Path(__file__).parent / "reference"

# From what imports nothing to what imports it all, as in ARCHITECTURE.md.
CORE = ["random", "balls", "objectives", "schedules", "inputs", "weights", "averaging", "step"]
ROOMS = [
    *("random", "balls", "objectives", "schedules", "models", "lean", "data", "inputs", "parallel"),
    *("weights", "averaging", "step", "neighbours", "evaluation", "landscape", "train", "integrations", "lab"),
]

MARK = (
    "<!-- Made by `python -m docs.generate`. -->\n<!-- fmt: off -->\n\n"  # the signatures are as they are in the source
)
BY_TYRO = f"<!-- As tyro {importlib.metadata.version('tyro')} words its help. -->\n"
OPENING = """# Reference

Made of the docstrings and signatures in the source by `python -m docs.generate`; a test fails when a page is not what
that would write now. The letters are explained in [theory](../theory.md), how the rooms hang together in
[ARCHITECTURE.md](../../ARCHITECTURE.md). Of the lab, the files behind commands, reports and studies are left out: what
they do is what the command line does.

- [The command line](command-line.md): every command, with its options
- [Settings](settings.md): every field of a training's config, with unit, default and allowed values
- [Recipes](recipes.md): named configs"""


def pages() -> dict[str, str]:
    """{file name: text} of every page."""
    root = api.package()
    found = {f"{name}.md": api.room(root[name], root) for name in ROOMS}
    found["command-line.md"] = command_line.page()
    found["settings.md"] = settings.fields_page(root)
    found["recipes.md"] = settings.recipes_page()
    found["index.md"] = index(root)
    return {name: (BY_TYRO if name == "command-line.md" else "") + MARK + text for name, text in found.items()}


def index(root: griffe.Module) -> str:
    """The rooms, what each is about, and where every public name is."""
    rooms = [f"| [saltflat.{name}]({name}.md) | {_about(root[name])} |" for name in ROOMS]
    offered = [root[name].final_target for name in sorted(api.exported(root))]
    names = [f"| [{of.name}]({of.path.split('.')[1]}.md#{api.anchor(of.name)}) | {_about(of)} |" for of in offered]
    pieces = [OPENING, "## Rooms", _table("room", rooms), "## Names of the package", _table("name", names)]
    return "\n\n".join(pieces) + "\n"


def _about(of: griffe.Object) -> str:
    return command_line.cell(api.summary(of))


def _table(first: str, rows: list[str]) -> str:
    return "\n".join([f"| {first} | what it is |", "| --- | --- |", *rows])


def main() -> None:
    """Write all pages, and remove those that this made for rooms that are gone."""
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted and MARK in path.read_text(encoding="utf-8"):
            path.unlink()
    print(f"{len(wanted)} pages in {FOLDER}")


if __name__ == "__main__":
    main()
