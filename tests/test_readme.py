"""What the README says can be done is done here."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from records.generate import figures, generated, made_anew, pages
from saltflat.lab.cli import parsed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run_one_after_the_other():
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert len(blocks("python")) == 3


COMMANDS = [
    re.sub(r"^torchrun .*?-m saltflat ", "saltflat ", line.partition("#")[0].strip())
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith(("saltflat ", "torchrun "))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_can_be_parsed(command):
    assert callable(parsed(shlex.split(command)[1:]))


def test_there_are_commands():
    assert len(COMMANDS) >= 7


def test_make_runs_the_plain_lines():
    makefile = (ROOT / "Makefile").read_text()
    pin = re.search(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)[1]
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    for line in lines:
        create, install, run = line.split(" && ")
        assert create.replace("python3", "$(PYTHON)") in makefile
        assert install.replace(".venv/bin", "$(BIN)").replace(pin, "$(TORCH)") in makefile
        assert run.replace(".venv/bin", "$(BIN)") in makefile
    for target in re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere():
    for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_blocks_are_fresh(page):
    assert generated(page) == page.read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / picture).is_file(), picture


@pytest.mark.parametrize("record", [page.parent for page in pages() if page.parent.parent.name == "records"], ids=str)
def test_figures_are_fresh(record):
    """In all that they say: ticks, labels, and the numbers in their descriptions; lines follow matplotlib's version."""
    made = figures(record)
    assert {path.stem for path in record.glob("*.svg")} == set(made)
    for name, svg in made.items():
        assert said(record.joinpath(f"{name}.svg").read_text()) == said(svg), name


def said(svg: str) -> list[str]:
    return re.findall(r'aria-label="([^"]*)"|<text[^>]*>([^<]*)</text>', svg)


def test_a_block_that_is_stale_is_noticed():
    stale = README.replace("±", "+")
    assert made_anew(stale, ROOT) == README != stale


def test_every_extra_is_named():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    said = README.partition("Into an environment that you have")[2].partition("Then [the tutorial]")[0]
    asked = re.search(r"pip install -e \"\.\[([\w,]+)\]\"", said)[1].split(",")
    assert {*asked, *re.findall(r"`(\w+)`", said)} == set(extras)
