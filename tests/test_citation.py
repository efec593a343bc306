"""CITATION.cff has the keys of its schema, and says what pyproject.toml says; CONTRIBUTING.md names what there is."""

import re
import tomllib
from pathlib import Path

import pytest

import saltflat
from saltflat.lab.config import read_yaml

ROOT = Path(__file__).parent.parent
CITATION = read_yaml((ROOT / "CITATION.cff").read_text(), "CITATION.cff")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# Of the Citation File Format 1.2.0: https://github.com/citation-file-format/citation-file-format
REQUIRED = {"cff-version", "message", "title", "authors"}
KEYS = REQUIRED | {
    *("abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url"),
    *("preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url"),
    "version",
}
REFERENCE_REQUIRED = {"authors", "title", "type"}
REFERENCE_KEYS = REFERENCE_REQUIRED | {
    *("collection-title", "collection-type", "conference", "doi", "identifiers", "journal", "url", "year")
}
PERSON, ENTITY = {"family-names", "given-names", "orcid", "affiliation"}, {"name", "website", "email"}


def test_it_has_the_keys_of_the_schema():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert REQUIRED <= CITATION.keys() <= KEYS
    for reference in CITATION["references"]:
        assert REFERENCE_REQUIRED <= reference.keys() <= REFERENCE_KEYS
        assert isinstance(reference["year"], int)
        for identifier in reference["identifiers"]:
            assert {"type", "value"} <= identifier.keys() <= {"type", "value", "description"}
            assert identifier["type"] in ("doi", "url", "swh", "other")
    for person in [*CITATION["authors"], *(person for of in CITATION["references"] for person in of["authors"])]:
        assert person.keys() <= PERSON or person.keys() <= ENTITY


def test_it_says_what_the_project_says():
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text()
    version = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)[1]
    assert CITATION["version"] == version == saltflat.__version__
    assert CITATION["license"] == PROJECT["project"]["license"]
    assert CITATION["keywords"] == PROJECT["project"]["keywords"]
    assert CITATION["authors"] == PROJECT["project"]["authors"]


def test_the_paper_is_cited_by_its_arxiv_number():
    (paper,) = CITATION["references"]
    number = re.search(r"\d{4}\.\d{5}", paper["url"])[0]
    assert f"arXiv:{number}" in [identifier["value"] for identifier in paper["identifiers"]]
    assert f"arxiv.org/abs/{number}" in (ROOT / "docs" / "family.md").read_text()


@pytest.mark.parametrize("path", re.findall(r"`((?:src|tests|lab)/[\w/.]+|[\w]+\.py)`", CONTRIBUTING))
def test_files_that_contributors_are_sent_to_exist(path):
    places = [ROOT / path, *(ROOT / "src" / "saltflat").glob(path), *(ROOT / "src" / "saltflat").rglob(Path(path).name)]
    assert any(place.exists() for place in places)


def test_names_that_contributors_are_sent_to_exist():
    named = re.findall(r"`([A-Z_]{4,}|LeftAsFound|_check_together|losses)`", CONTRIBUTING)
    sources = "".join(path.read_text() for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py"))
    assert len(named) >= 7
    for name in named:
        assert re.search(rf"^(?:def |class )?{name}\b", sources, re.MULTILINE), name


def test_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", CONTRIBUTING, re.MULTILINE)
    assert len(targets) >= 5
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", CONTRIBUTING):
        assert (ROOT / link).exists(), link
