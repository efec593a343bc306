"""Write what the records show into their READMEs, and into the project's.

    python records/generate.py

A record is a folder `<date>_<idea>/` with `runs/*/` in it: run folders as `saltflat train`, `evaluate` and `landscape`
write them, without the weights. Between the marks

    <!-- generated: FOLDER -->   ...   <!-- end -->

in a record's README stands what this script wrote; the project's README has a shorter form. A test fails when that is
not what the script would write now.
"""

import re
from pathlib import Path

from saltflat.lab.report.markdown import brief, figures, summary

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The files that hold generated blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "records").glob("*/README.md"))]


def generated(page: Path) -> str:
    """The page's text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        record = ROOT / "records" / match[2]
        made = summary(runs_of(record)) if page.parent == record else brief(runs_of(record), f"records/{match[2]}")
        return f"{match[1]}\n{made}\n\n{match[3]}"

    return BLOCK.sub(block, page.read_text())


def runs_of(record: Path) -> list[Path]:
    """The run folders of a record."""
    return sorted((record / "runs").iterdir())


if __name__ == "__main__":
    for page in pages():
        page.write_text(generated(page))
        if page.parent != ROOT:
            for name, svg in figures(runs_of(page.parent)).items():
                (page.parent / f"{name}.svg").write_text(svg)
