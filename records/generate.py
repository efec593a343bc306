"""Write what the records show into their READMEs, and into the project's.

    python -m records.generate

A record is a folder `<date>_<idea>/` with `runs/*/` in it: run folders as `saltflat train`, `evaluate` and `landscape`
write them, without the weights; or it holds what the scripts in `benchmarks/` wrote. Between the marks

    <!-- generated: FOLDER -->   ...   <!-- end -->

in a record's README stands what this script wrote; the project's README has a shorter form. A test fails when that is
not what the script would write now.
"""

import re
from pathlib import Path

from benchmarks.tables import compared
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
        made = _shown(record, page.parent == record)
        return f"{match[1]}\n{made}\n\n{match[3]}"

    return BLOCK.sub(block, page.read_text())


def _shown(record: Path, whole: bool) -> str:
    if not (record / "runs").is_dir():
        return compared(record)
    return summary(runs_of(record)) if whole else brief(runs_of(record), f"records/{record.name}")


def runs_of(record: Path) -> list[Path]:
    """The run folders of a record."""
    return sorted((record / "runs").iterdir())


if __name__ == "__main__":
    for page in pages():
        page.write_text(generated(page))
        if (page.parent / "runs").is_dir():
            for name, svg in figures(runs_of(page.parent)).items():
                (page.parent / f"{name}.svg").write_text(svg)
