"""The reference is what the source says now, holds every public name, and says of each what has to be said."""

import ast
import doctest
import re
from pathlib import Path
from textwrap import dedent

import pytest

import saltflat
from docs import api, command_line, generate, settings
from saltflat.lab.commands.frame import app, study_app
from saltflat.lab.recipes import RECIPES

PACKAGE = api.package()
FOLDER = generate.FOLDER
NEW = generate.pages()


def test_the_pages_are_what_would_be_written_now():
    stale = [name for name, text in NEW.items() if not (FOLDER / name).is_file() or not is_fresh(name, text)]
    gone = [path.name for path in FOLDER.iterdir() if path.name not in NEW]
    assert not stale + gone, "run `python -m docs.generate`"


def is_fresh(name: str, text: str) -> bool:
    """Where another tyro is installed than the page was made with, wording is its own: names and defaults count."""
    there = (FOLDER / name).read_text()
    if there.startswith("<!-- As tyro") and there.partition("\n")[0] != text.partition("\n")[0]:
        return re.findall(r"^##.*|^\| `.*?` \| .*? \|", there, re.M) == re.findall(
            r"^##.*|^\| `.*?` \| .*? \|", text, re.M
        )
    return there == text


def test_another_tyro_s_wording_is_fresh_and_another_option_is_not():
    name = "command-line.md"
    head, _, rest = NEW[name].partition("\n")
    assert is_fresh(name, NEW[name])
    assert not is_fresh(name, f"{head}\n{rest.replace('run folders', 'folders of runs')}")
    assert is_fresh(name, f"<!-- As tyro 99 words its help. -->\n{rest.replace('run folders', 'folders of runs')}")
    assert not is_fresh(name, f"<!-- As tyro 99 words its help. -->\n{rest.replace('--suite', '--sweet')}")


def test_pages_that_are_stale_are_written_anew_and_those_of_no_room_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "FOLDER", tmp_path / "reference")
    monkeypatch.setattr(generate, "pages", lambda: NEW)
    generate.main()
    (generate.FOLDER / "balls.md").write_text("something else")
    (generate.FOLDER / "gone.md").write_text(f"{generate.MARK}of a room that is gone")
    (generate.FOLDER / "notes.md").write_text("by hand")
    generate.main()
    assert {path.name: path.read_text() for path in generate.FOLDER.iterdir()} == NEW | {"notes.md": "by hand"}


def headings(page: str) -> set[str]:
    return set(re.findall(r"^#+ (.+)$", NEW[page], re.MULTILINE))


def of_core():
    """Every public name of the core's files: functions, classes, and what classes do."""
    for name in generate.CORE:
        for member in api.public(PACKAGE[name]):
            yield member
            if member.is_class:
                yield from api.public(member)


CORE = {member.path.removeprefix("saltflat."): member for member in of_core()}


def test_every_room_has_a_page():
    rooms = {path.stem for path in Path(saltflat.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert rooms - {"py"} == set(generate.ROOMS)  # py.typed
    assert set(generate.CORE) < set(generate.ROOMS)


def test_every_public_name_is_in_the_reference():
    for name, home in saltflat._HOME.items():
        assert name in headings(f"{home}.md")
        assert f"]({home}.md#{api.anchor(name)})" in NEW["index.md"]
    for name, member in CORE.items():
        *_, of, last = name.split(".")
        page = f"{name.split('.')[0]}.md"
        if member.has_docstring:
            assert (f"{of}.{last}" if member.parent.is_class else last) in headings(page)
        else:
            assert api.signature(member) in NEW[page]


def test_imports_that_pages_show_are_those_that_work():
    shown = re.findall(r"^from (saltflat\S*) import (\w+)$", "".join(NEW[f"{name}.md"] for name in generate.CORE), re.M)
    assert len(shown) > 40
    for module, name in shown:
        namespace: dict[str, object] = {}
        exec(f"from {module} import {name}", namespace)
        assert name in namespace


def said(member) -> str:
    """What is read of a name: its own docstring, its class's and its file's."""
    around = [member, member.parent, member.module] if member.parent.is_class else [member, member.module]
    return "\n".join(of.docstring.value for of in around if of.docstring)


def raised(member) -> set[str]:
    """The errors that stand in its body."""
    tree = ast.parse(dedent(member.source))
    errors = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {error.func.id for error in errors if isinstance(error, ast.Call) and isinstance(error.func, ast.Name)}


UNITS = re.compile(r"unit|nats|relative|progress|per cent|\[0, 1\]|share|pixel|decay")


def missing(member) -> list[str]:
    """What a docstring of the core owes its reader, and does not say."""
    if not member.docstring:
        return [] if member.parent.is_class and member.parent.docstring else ["a docstring"]
    words, found = said(member), []
    parameters = [of for of in getattr(member, "parameters", ()) if of.name != "self" and not of.name.startswith("_")]
    found += [of.name for of in parameters if not re.search(rf"\b{of.name}\b", words)]
    found += [error for error in sorted(raised(member)) if error not in words]
    kinds = [str(of.annotation) for of in parameters] + [str(getattr(member, "returns", ""))]
    if any(re.search(r"\bTensor\b", kind) for kind in kinds) and not re.search(r"\((N|n|P|C|L|1)\b|\{name", words):
        found.append("shapes")
    if any(re.match(r"float\b", kind) for kind in kinds[:-1]) and not UNITS.search(words):
        found.append("a unit")
    if member.name in saltflat.__all__ and ">>>" not in member.docstring.value:
        found.append("an example")
    return found


def test_docstrings_of_the_core_say_what_is_asked():
    owed = {name: missing(member) for name, member in CORE.items()}
    assert not {name: words for name, words in owed.items() if words}


def test_every_function_and_class_has_a_docstring():
    files = [file for name in generate.ROOMS for file in api.files_of(PACKAGE[name])]
    bare = {member.path for file in files for member in api.public(file) if not member.has_docstring}
    assert not {name for name in bare if not name.startswith("saltflat.lab.config.")}  # whose fields have a text each


def test_files_of_the_core_say_where_it_comes_from():
    assert not [name for name in generate.CORE if not re.search(r"arXiv|Sources?:", PACKAGE[name].docstring.value)]


@pytest.mark.parametrize("module", [api, command_line, settings])
def test_examples_in_what_makes_the_pages_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 == found.failed


def test_every_command_has_its_options_on_the_page():
    assert set(command_line.commands()) == {
        *app._subcommands,
        *(f"study {name}" for name in study_app._subcommands),
    } - {"study"}
    for name in command_line.commands():
        assert f"saltflat {name}" in headings("command-line.md")
        page = NEW["command-line.md"].split(f"## saltflat {name}\n")[1].split("\n## ")[0]
        options = re.findall(r"^  +(--[a-z][\w-]*)", command_line.help_of(*name.split()), re.MULTILINE)
        assert options or name == "recipes"
        assert [of for of in options if of != "--help" and of not in page] == []


def test_every_field_of_a_recipe_is_among_the_settings():
    options = [of.name for of in command_line.options(command_line.help_of("train", "at"))]
    fields = {re.match(r"--([\w.-]+)", name)[1].replace("-", "_") for name in options} - {"out", "go_on"}
    assert fields == set(re.findall(r"^\| `([\w.]+)` \|", NEW["settings.md"], re.MULTILINE))


def test_settings_say_what_they_mean():
    rows = re.findall(r"^\| `[\w.]+` \| .* \|$", NEW["settings.md"], re.MULTILINE)
    assert [row for row in rows if re.search(r"\|  \|$", row)] == []


def test_every_recipe_has_a_row():
    assert set(re.findall(r"^\| `([\w-]+)` \|", NEW["recipes.md"], re.MULTILINE)) == set(RECIPES)


def test_code_ends_where_it_should():
    assert not [name for name, text in NEW.items() if len(re.findall(r"^```", text, re.MULTILINE)) % 2]
