"""docs/differences.md: every deviation that the source admits stands there, and what it says restores theirs exists."""

import re
from pathlib import Path

import pytest

import saltflat
from saltflat.lab.recipes import RECIPES

SOURCE = Path(saltflat.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "differences.md").read_text()
DEVIATING = {
    str(path.relative_to(SOURCE)): path.read_text().count("Deviation:")
    for path in sorted(SOURCE.rglob("*.py"))
    if "Deviation:" in path.read_text()
}
COMMIT = r"https://github\.com/[\w-]+/[\w-]+/(?:blob|tree)/[0-9a-f]{40}(?:/|$)"


def rows(file: str) -> int:
    """How many differences the table has for a file: its own row, and those below that name none."""
    found = re.search(rf"^\| `{re.escape(file)}` \|.*\n((?:\| \| .*\n)*)", PAGE, re.MULTILINE)
    return 0 if found is None else 1 + found[1].count("\n")


def test_there_are_deviations():
    assert len(DEVIATING) > 10


@pytest.mark.parametrize("file", DEVIATING)
def test_every_deviation_in_the_source_stands_on_the_page(file):
    assert rows(file) >= min(DEVIATING[file], 1)
    assert rows(file) + 1 >= DEVIATING[file]  # two of one kind may share a row


@pytest.mark.parametrize("file", re.findall(r"^\| `([\w/]+\.py)` \|", PAGE, re.MULTILINE))
def test_no_file_is_listed_that_deviates_no_more(file):
    assert file in DEVIATING


def test_references_are_defined_and_lead_to_a_commit():
    links = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", PAGE, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", PAGE)) == set(links)
    assert [url for url in links.values() if not re.match(COMMIT, url)] == []


def test_lines_that_are_named_lie_in_what_is_linked():
    links = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", PAGE, re.MULTILINE))
    named = re.findall(r"\[(\d+)(?:–(\d+))?\]\[([\w-]+)\]", PAGE)
    assert len(named) > 40
    for first, last, link in named:
        low, high = re.search(r"#L(\d+)(?:-L(\d+))?$", links[link]).groups()
        assert int(low) <= int(first) <= int(last or first) <= int(high or low), (first, link)


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`(\w+\.\w+) (\w+)`", PAGE))), ids=" ".join)
def test_settings_that_restore_theirs_are_those_of_official_recipes(setting):
    (section, field), value = setting[0].split("."), setting[1]
    official = [getattr(recipe, section) for name, recipe in RECIPES.items() if name.endswith("-official")]
    assert value in {str(getattr(of, field)).removesuffix(".0") for of in official}


@pytest.mark.parametrize(
    "field", sorted(set(re.findall(r"`((?:awp|attack|optimizer|compute|data)\.(?!py`)\w+)`", PAGE)))
)
def test_settings_that_are_named_exist(field):
    section, name = field.split(".")
    assert hasattr(getattr(RECIPES["at"], section), name)


def test_numbers_of_records_are_theirs():
    records = Path(__file__).parent.parent / "records"
    agree = re.findall(
        r"\| (\d+\.\d+)\s?% \|$", (records / "2026-11-25_autoattack-compared/README.md").read_text(), re.M
    )
    assert (min(map(float, agree)), max(map(float, agree))) == (99.8, 100.0)
    assert "99.8 to 100 % of its verdicts" in PAGE
    speed = (records / "2026-11-26_speed" / "README.md").read_text()
    ratios = re.findall(r"^\| AT-AWP fp32 (?:eval|train) \| [^|]* \| (\d\.\d\d) ", speed, re.M)
    assert {f"{float(ratio):.1f}" for ratio in ratios} == {"1.7", "1.8"}
    assert "takes 1.7 to 1.8 times as long" in PAGE
