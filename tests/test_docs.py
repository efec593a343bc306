"""What the pages in docs/ say can be done is done here, and their tables are about what there is."""

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from family import COSTS, MEMBERS, sgd, taking
from networks import batch, convolutional

from saltflat import PGD, Linf
from saltflat.lab.cli import parsed
from saltflat.lab.recipes import RECIPES, adversary

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def command_of(line: str) -> str | None:
    """What of a line is for `saltflat`, be it started by itself or by torchrun, python or a script of Slurm's."""
    found = re.match(r"(?:torchrun .*-m )?(saltflat .*)", line.partition(" #")[0].rstrip(" &'"))
    return found and found[1]


COMMANDS = [
    (page, command)
    for page in PAGES
    for language in ("sh", "bash")
    for block in blocks(page, language)
    for line in block.splitlines()
    if (command := command_of(line.strip()))
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
    assert len(blocks("family.md", "python")) == 2


def test_the_python_block_on_performance_runs():
    (block,) = blocks("performance.md", "python")
    exec(block, {})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (DOCS / target).exists(), target


def test_anchors_are_headings():
    pages = PAGES | {"../README.md": (DOCS.parent / "README.md").read_text()}
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", PAGES[page]):
            headings = re.findall(r"^#+ (.+)$", pages[target or page], re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, (page, anchor)


NAMED = set(
    re.findall(
        r"`((?:cifar100?-|svhn-)?(?:at|trades|mart|alp|rst|fast|free|generated|speedrun)[a-z-]*)`",
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
