"""What the pages in docs/ say can be done is done here, links lead somewhere, and tables are about what there is."""

import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from family import COSTS, MEMBERS, sgd, taking
from networks import batch, convolutional
from PIL import Image

from saltflat import PGD, Linf
from saltflat.data import folder as image_folder
from saltflat.data import image_arrays
from saltflat.evaluation import checks
from saltflat.lab.cli import main, parsed
from saltflat.lab.measures import MEASURES
from saltflat.lab.recipes import RECIPES, adversary
from saltflat.lab.study import gap, listing

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Not the reference, which is made of docstrings, whose examples are doctests; its links are looked at, below.
PAGES = {
    str(path.relative_to(DOCS)): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if not path.is_relative_to(DOCS / "reference")
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [block for found, block in FENCED.findall(PAGES[page]) if found == language]


def command_of(line: str) -> str | None:
    """What of a line is for `saltflat`, be it started by itself or by torchrun, python or a script of Slurm's."""
    found = re.match(r"(?:torchrun .*-m )?(saltflat .*)", line.partition(" #")[0].rstrip(" &'"))
    return found and found[1]


def commands_of(block: str) -> list[str]:
    """One a line, or on several that end in a backslash."""
    lines = block.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := command_of(line.strip()))]


COMMANDS = [
    (page, command)
    for page in PAGES
    for language in ("sh", "bash")
    for block in blocks(page, language)
    for command in commands_of(block)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_commands_can_be_parsed(page, command):
    assert callable(parsed(shlex.split(command)[1:]))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_scripts_are_whole(page):
    for block in blocks(page, "bash"):
        assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""


def test_the_python_blocks_of_the_family_run_one_after_the_other():
    names: dict[str, object] = {}
    for block in blocks("family.md", "python"):
        exec(block, names)
    assert len(blocks("family.md", "python")) == 3


def test_the_python_block_on_performance_runs():
    (block,) = blocks("performance.md", "python")
    exec(block, {})


# --- pages that are played: their Python, and their commands, in order, in a folder of their own ---

PLAYED = ["tutorial.md", *(page for page in PAGES if page.startswith("how-to/"))]
ELSEWHERE = {  # pages whose Python another file runs, or a test above
    "family.md": "test_docs.py",
    "performance.md": "test_docs.py",
    "cluster.md": "test_executors.py",
    "loops.md": "test_loops.py",
    "large-data.md": "test_stored.py",
    "theory.md": "test_theory.py",
}
# What a page names and no test has: archives, folders of a reader's, checkpoints and grids of hours. These are parsed.
NOT_HERE = re.compile(r"cifar10|photographs|from-the-hub|models\.yaml|--preset \w+$|runs/at-awp-seed0")


MOST = {"--examples": 32, "--points": 3, "--draws": 2, "--climbs": 2, "--optimizer.epochs": 2}


def hurried(words: list[str]) -> list[str]:
    """The same command on fewer images, over fewer epochs: that it goes through is what is asked here."""
    if words[1] == "train" and not {"--optimizer.epochs", "--resume"}.intersection(words):
        words = [*words, "--optimizer.epochs", "2"]
    caps = [math.inf, *(MOST.get(word, math.inf) for word in words)]
    return [str(min(int(word), cap)) if word.isdecimal() else word for word, cap in zip(words, caps, strict=False)]


def play(page: str, folder: Path, commands: bool) -> int:
    """Run a page in a folder, which is the current one; how many commands were run. A block that begins with a file's
    name is that file, too.
    """
    names: dict[str, object] = {"__name__": "page"}
    run = 0
    for language, block in FENCED.findall(PAGES[page]):
        if language == "python":
            if named := re.match(r"# (\w+\.py)\n", block):
                (folder / named[1]).write_text(block)
            exec(compile(block, page, "exec"), names)
        if language == "sh" and commands:
            for command in commands_of(block):
                if page == "tutorial.md" or not NOT_HERE.search(command):
                    main(hurried(shlex.split(command))[1:])
                    run += 1
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page is played, as its reader does: the current folder, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_page_with_python_is_run():
    with_python = {page for page in PAGES if blocks(page, "python")}
    assert with_python - set(PLAYED) == set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        assert page in (Path(__file__).parent / test).read_text()


@pytest.mark.parametrize("page", [page for page in PLAYED if page != "tutorial.md" and blocks(page, "python")])
def test_the_python_blocks_of_how_to_pages_run(page, folder):
    play(page, folder, commands=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PLAYED)
def test_pages_can_be_followed_from_top_to_bottom(page, folder):
    assert play(page, folder, commands=True) > 0


def test_the_tutorial_sets_up_as_the_readme_does():
    (line,) = re.findall(r"^python3 -m venv .*$", PAGES["tutorial.md"], re.MULTILINE)
    assert line in (ROOT / "README.md").read_text()


def test_parts_of_the_report_are_called_as_the_tutorial_calls_them():
    template = (ROOT / "src/saltflat/lab/report/page.html.j2").read_text()
    parts = re.findall(r"\*\*([A-Z][^*]+)\*\*", PAGES["tutorial.md"])
    assert parts
    assert not [part for part in parts if part not in template]


def test_refusals_are_as_quoted(folder):
    grey, classes = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    whole = {"x_train": grey, "y_train": classes, "x_test": grey, "y_test": classes}
    np.savez("floats.npz", **whole | {"x_train": grey / 255})
    np.savez("soft.npz", **whole | {"y_train": np.eye(2)[classes]})
    for file, size in (("train/a/0.png", (8, 8)), ("train/a/1.png", (9, 8)), ("test/a/0.png", (8, 8))):
        (folder / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(folder / "images" / file)
    said = []
    for read in (lambda: image_arrays("floats.npz"), lambda: image_arrays("soft.npz"), lambda: image_folder("images")):
        with pytest.raises(ValueError) as refusal:
            read()
        said.append(str(refusal.value))
    quoted = re.findall(r"^- `([^`…]+)`", PAGES["how-to/own-data.md"].partition("## When it refuses")[2], re.MULTILINE)
    assert len(quoted) == 3
    assert all(words in line for words, line in zip(quoted, said, strict=True))


def test_the_listing_of_checkpoints_can_be_read(tmp_path):
    (block,) = blocks("how-to/study.md", "yaml")
    (tmp_path / "models.yaml").write_text(block)
    tasks = listing.read(tmp_path / "models.yaml", gap.SMALL, tmp_path, "cpu")
    assert len(tasks) == block.count("- name:") > 0


def first_column(page: str, head: str) -> list[str]:
    """The code in the first cells of the table that begins with this cell."""
    (rows,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|.*\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    return [code for row in rows.splitlines() for code in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_all_cautions_are_explained():
    raised = [name for name, of in vars(checks).items() if "Raised if: " in str(getattr(of, "__doc__", ""))]
    assert sorted(first_column("how-to/evaluate-a-checkpoint.md", "caution")) == sorted(raised)


def test_all_measures_are_explained():
    assert sorted(first_column("how-to/landscape.md", "`--measures`")) == sorted(MEASURES)


# --- links ---


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


LINKED = {
    path: without_code(path.read_text())
    for places in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md", "records/*/README.md")
    for path in sorted(ROOT.glob(places))
}


def targets(text: str) -> list[str]:
    """Of links and pictures, written in place or under a label."""
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What headings are called in links: as on GitHub, a number behind those that occurred before."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in targets(LINKED[page]):
        if not re.match(r"\w+:", target):
            place, _, anchor = target.partition("#")
            file = page.parent / place if place else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_labels_of_links_are_defined(page):
    labels = set(re.findall(r"^\[([^]]+)\]: ", LINKED[page], re.MULTILINE))
    assert set(re.findall(r"\]\[([^]]+)\]", LINKED[page])) <= labels


def test_the_map_has_every_page():
    shown = {target.partition("#")[0] for target in targets(PAGES["index.md"])}
    assert set(PAGES) - {"index.md"} <= shown
    assert "reference/index.md" in shown


def test_pages_that_the_source_names_exist():
    for folder in ("src", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for named in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text()):
                assert (ROOT / named).is_file(), f"{path.relative_to(ROOT)}: {named}"


# --- tables ---

NAMED = set(
    re.findall(
        r"`((?:cifar100?-|svhn-)?(?:(?:at|trades|mart|alp|rst|free|generated|speedrun)[a-z-]*|fast-[a-z-]+))`",
        "".join(PAGES.values()),
    )
)


def test_recipes_that_are_named_exist():
    assert NAMED
    assert not {name for name in NAMED if name not in RECIPES}


@pytest.mark.parametrize("name", [name for name, config in RECIPES.items() if config.data.name == "digits"])
def test_every_method_stands_in_the_family(name):
    assert name in NAMED or name.removesuffix("-awp") in NAMED


def amortised_cost():
    """Counted here, since it is a step of AWP's, and no member of its own."""
    model, (x, y), found = convolutional().train(), batch(), Counter()
    model[3].register_forward_hook(lambda *_: found.update(["forwards"]))
    model[3].weight.register_hook(lambda _: found.update(["gradients"]))
    attack = PGD(Linf(8 / 255), 2 / 255, 10)
    taking("awp", model, sgd(model), {}, attack=attack, amortised=True)(x, y)
    return found["forwards"], found["gradients"]


def test_the_costs_are_those_that_were_counted():
    rows = re.findall(r"^\| ([\w -]+?)(?:, K2 = 10)? \| (\d+) \| (\d+) \|", PAGES["family.md"], re.MULTILINE)
    counted = {adversary(MEMBERS[member].awp)[0]: COSTS[member] for member in MEMBERS if not member.startswith("free")}
    assert {name: (int(forwards), int(gradients)) for name, forwards, gradients in rows} == {
        "none": COSTS["at"],
        "amortised AWP": amortised_cost(),
        **counted,
    }
