"""A file imports only what stands above it; torch is asked for late; names stand where they are said to."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import saltflat

SOURCE = Path(saltflat.__file__).parent
ORDER = [
    "random", "balls", "objectives", "schedules", "models", "lean", "data", "inputs", "parallel",
    "weights", "averaging", "step",
    "neighbours", "evaluation", "landscape", "train", "integrations", "lab",
]  # fmt: skip
CORE = ["random", "balls", "objectives", "schedules", "inputs", "weights", "averaging", "step"]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or not path.name.startswith("__"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "saltflat"
            }
    return {name for name in found if name.split(".")[0] == "saltflat"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_what_stands_above_it(path):
    for name in imported(path):
        parts = name.split(".")
        if len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(room(path)), f"{path} imports {name}"


def test_no_cycle_among_the_files_of_a_room():
    edges = {
        path: {
            other
            for other in FILES
            for name in imported(path)
            if other != path and ".".join(("saltflat", *other.relative_to(SOURCE).with_suffix("").parts)) == name
        }
        for path in FILES
    }
    while edges:
        leaves = [path for path, others in edges.items() if not others & edges.keys()]
        assert leaves, f"a cycle among {sorted(str(path.relative_to(SOURCE)) for path in edges)}"
        for path in leaves:
            del edges[path]


def test_the_core_knows_nothing_of_configs_files_or_printing():
    for name in CORE:
        tree = ast.parse((SOURCE / f"{name}.py").read_text())
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"print", "open", "eval", "exec"}
        assert not {"pathlib", "yaml", "pydantic", "tyro", "rich"} & {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no docstring, comment or blank."""
    source = path.read_text()
    held = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, (node.body[0].lineno if hasattr(node, "body") else (node.end_lineno or 0) + 1))
    }
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = source.splitlines()
    return sum(1 for line in held - prose if lines[line - 1].strip() and not lines[line - 1].strip().startswith("#"))


def test_the_core_stays_small():
    assert sum(lines_of_code(SOURCE / f"{name}.py") for name in CORE) <= 800


def test_public_names_are_spelled_out_once_for_types_and_once_for_looking_up():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = {
        (alias.asname, node.module.removeprefix("saltflat."))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saltflat.")
        for alias in node.names
    }
    assert typed == {(name, home) for name, home in saltflat._HOME.items()}
    assert set(saltflat.__all__) <= set(dir(saltflat))
    for name in saltflat.__all__:
        assert getattr(saltflat, name).__module__ == f"saltflat.{saltflat._HOME[name]}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = saltflat.nothing


def test_importing_the_package_does_not_import_torch():
    script = "import sys, saltflat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
