"""Pages about a room of the package, read from its source by griffe: nothing is imported, torch least of all.

A name is public if it is defined in a file and does not begin with an underscore. Its entry has the line that imports
it, its signature and its docstring, whose indented formulas, arguments and examples become Markdown.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import griffe

SOURCE = Path(__file__).parent.parent / "src"
LISTS = re.compile(r"(Args|Attributes):$")
LEADS = re.compile(r"(Args|Returns|Raises|Yields|Shapes|Memory|Costs?|Sources?|Deviation|Raised if|Explanation): ")
ENTRY = re.compile(r"([*\w, ]+): (.*)")
MARKS = ("contextmanager", "classmethod", "staticmethod")  # decorators that change how a function is called
Shown = griffe.Function | griffe.Class | griffe.Attribute
WIDE = 100  # characters of a signature on one line


def package() -> griffe.Module:
    """The whole package, parsed."""
    found = griffe.load("saltflat", search_paths=[SOURCE], allow_inspection=False)
    assert isinstance(found, griffe.Module)
    return found


def room(module: griffe.Module, root: griffe.Module) -> str:
    """The page of a room: a file, or a folder of files."""
    lines = [f"# {module.path}", linked(module), text(module)]
    files = files_of(module)
    if path_of(module).name == "__init__.py":
        lines.append("\n".join(f"- [{of.path}](#{anchor(of.path)}): {summary(of)}" for of in files))
        for of in files:
            lines += [f"## {of.path}", linked(of), text(of), *entries(of, root, "###")]
    else:
        lines += entries(module, root, "##")
    return "\n\n".join(line for line in lines if line) + "\n"


def files_of(module: griffe.Module) -> list[griffe.Module]:
    """The files of a room that hold names: itself, or those in its folder, by name."""
    inside = [of for of in module.modules.values() if not of.is_alias and path_of(of).name != "__init__.py"]
    own = [module] if public(module) else []
    return own + sorted((of for of in inside if public(of)), key=lambda of: of.path)


def public(of: griffe.Module | griffe.Class) -> list[Shown]:
    """Functions and classes that are defined here and have no underscore, in the order of the source; of a class, its
    methods and properties, and what it does when called."""
    named = {name: member for name, member in of.members.items() if isinstance(member, Shown)}
    called = {"__call__"} if "__call__" in named and named["__call__"].has_docstring else set()
    return [
        member
        for name, member in named.items()
        if (not name.startswith("_") or name in called)
        and (not isinstance(member, griffe.Attribute) or "property" in member.labels)
    ]


def types(module: griffe.Module) -> list[griffe.Attribute]:
    """The names that a file gives to types, which signatures speak of: `Weights = Mapping[str, Tensor]`."""
    given = [of for of in module.members.values() if isinstance(of, griffe.Attribute) and of.source]
    return [of for of in given if re.match(r"[A-Z]\w*[a-z]\w* = (?!TypeVar|ParamSpec)", of.source)]


def path_of(module: griffe.Module) -> Path:
    """Its file; of a room that is a folder, the `__init__.py` in there."""
    assert isinstance(module.filepath, Path)
    return module.filepath


def entries(module: griffe.Module, root: griffe.Module, level: str) -> Iterator[str]:
    """What stands in a file, in the order of the source."""
    if named := types(module):
        yield fenced("python", [of.source for of in named])
    for member in public(module):
        yield f"{level} {member.name}"
        home = importable(member, root)
        yield f"```python\nfrom {home} import {member.name}\n\n{signature(member)}\n```"
        yield text(member)
        if isinstance(member, griffe.Class):
            yield from methods(member, f"{level}#")


def methods(of: griffe.Class, level: str) -> Iterator[str]:
    """What a class does: first what says no more than its signature, then the rest, one by one."""
    found = public(of)
    if plain := [method for method in found if not method.has_docstring]:
        yield fenced("python", [signature(method) for method in plain])
    for method in found:
        if method.has_docstring:
            yield f"{level} {of.name}.{method.name}"
            yield f"```python\n{signature(method)}\n```"
            yield text(method)


def importable(member: griffe.Object, root: griffe.Module) -> str:
    """The shortest module that a name is offered by: the package, its room, or its file."""
    parts = member.path.split(".")[:-1]
    for n in range(1, len(parts)):
        offered = root if n == 1 else root[".".join(parts[1:n])]
        if member.name in (exported(offered) or []):
            return ".".join(parts[:n])
    return ".".join(parts)


def exported(module: griffe.Module) -> list[str]:
    """What a module says it offers; the package looks its names up late, and spells them out for type checkers."""
    if module.path == "saltflat":
        aliases = [member for member in module.members.values() if isinstance(member, griffe.Alias)]
        return [of.name for of in aliases if of.target_path.startswith("saltflat.")]
    return [str(name) for name in module.exports or []]


def signature(of: Shown) -> str:
    """As the source has it: on one line, or with a line for every parameter."""
    if isinstance(of, griffe.Attribute):
        return f"{of.name}: {of.annotation}"
    given = [of for of in of.parameters if of.name not in ("self", "cls") and not of.name.startswith("_")]
    words = list(_words(given))
    above = "".join(f"@{mark.value}\n" for mark in of.decorators if str(mark.value) in MARKS)
    end = f" -> {of.returns}" if isinstance(of, griffe.Function) and of.returns else ""
    bases = f"({', '.join(map(str, of.bases))})" if isinstance(of, griffe.Class) and of.bases else ""
    if isinstance(of, griffe.Class) and not given:
        return f"class {of.name}{bases}"
    line = f"{of.name}({', '.join(words)}){end}"
    if len(line) <= WIDE:
        return above + line
    return f"{above}{of.name}(\n" + "".join(f"    {word},\n" for word in words) + f"){end}"


def _words(parameters: list[griffe.Parameter]) -> Iterator[str]:
    stars: dict[object, str] = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    starred = False
    for of in parameters:
        if of.kind is griffe.ParameterKind.keyword_only and not starred:
            yield "*"
        starred = starred or of.kind in (griffe.ParameterKind.var_positional, griffe.ParameterKind.keyword_only)
        kind = f": {of.annotation}" if of.annotation is not None else ""
        value = str(of.default).replace("'", '"')
        usual = "" if of.default is None or of.kind in stars else f" = {value}" if kind else f"={value}"
        yield f"{stars.get(of.kind, '')}{of.name}{kind}{usual}"


def linked(module: griffe.Module) -> str:
    """Where the source is, seen from docs/reference/."""
    path = path_of(module).relative_to(SOURCE.parent).as_posix()
    return f"[{path}](../../{path})"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def summary(of: griffe.Object) -> str:
    """The first sentence of a docstring, on one line."""
    words = " ".join((of.docstring.value if of.docstring else "").split("\n\n")[0].split())
    return prose(re.split(r"(?<!et al)\. |:$", words)[0].rstrip("."))


def text(of: griffe.Object) -> str:
    """The docstring as Markdown; empty where there is none."""
    return "\n\n".join(blocks(of.docstring.value.splitlines())) if of.docstring else ""


def blocks(lines: list[str]) -> Iterator[str]:
    """Paragraphs, formulas, lists of arguments and examples of a docstring, in its order.

    >>> list(blocks(["A sum.", "", "    a + b", "", "Args:", "    a: a number,", "        or not.", "", ">>> 1", "1"]))
    ['A sum.', '```text\\na + b\\n```', '- **a**: a number, or not.', '```pycon\\n>>> 1\\n1\\n```']
    """
    left = list(lines)
    while left:
        if not left[0].strip():
            left.pop(0)
        elif LISTS.match(left[0]):
            left.pop(0)
            yield listed(_taken(left, lambda line: bool(line.strip())))
        elif left[0].startswith(">>>"):
            yield fenced("pycon", _taken(left, lambda line: bool(line.strip())))
        elif left[0].startswith("    "):
            inside = _taken(left, lambda line: not line.strip() or line.startswith("    "))
            yield fenced("text", [line[4:] for line in inside])
        else:
            words = " ".join(line.strip() for line in _taken(left, _of_paragraph))
            yield LEADS.sub(r"**\1**: ", prose(words), count=1) if LEADS.match(words) else prose(words)


def _of_paragraph(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("    ", ">>>")) and not (LISTS.match(line) or LEADS.match(line))


def _taken(lines: list[str], fits: Callable[[str], bool]) -> list[str]:
    """The first lines that fit, taken off; at least one."""
    taken = [lines.pop(0)]
    while lines and fits(lines[0]):
        taken.append(lines.pop(0))
    return taken


def fenced(language: str, lines: list[str]) -> str:
    """A block of code, without blank lines at its end."""
    while lines and not lines[-1].strip():
        lines.pop()
    return f"```{language}\n" + "\n".join(lines) + "\n```"


def listed(lines: list[str]) -> str:
    """`name: what it is`, each with the lines that go on, as a list."""
    least = min(len(line) - len(line.lstrip()) for line in lines)
    items: list[str] = []
    for line in lines:
        entry = ENTRY.match(line[least:])
        if entry and not line[least:].startswith(" "):
            items.append(f"- **{entry[1]}**: {prose(entry[2])}")
        else:
            items[-1] += f" {prose(line.strip())}"
    return "\n".join(items)


def prose(words: str) -> str:
    """Signs that Markdown would take for its own, outside of backticks, escaped.

    >>> prose("‖w‖_2 of <b> and `a_b * c`, w_l")
    '‖w‖\\\\_2 of \\\\<b> and `a_b * c`, w_l'
    """
    pieces = re.split(r"(`[^`]*`)", words)
    return "".join(piece if piece.startswith("`") else _escaped(piece) for piece in pieces)


def _escaped(words: str) -> str:
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)
    return re.sub(r"<(?=[A-Za-z/!])|(?<! )\*|\*(?! )", lambda sign: f"\\{sign[0]}", words)
