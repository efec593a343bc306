"""Write what the records show into their READMEs, and into the project's.

    python records/generate.py

A record is a folder `<date>_<idea>/` with `runs/*/` in it: run folders as `saltflat train` and `saltflat evaluate`
write them, without the weights. Between the marks

    <!-- generated: FOLDER -->   ...   <!-- end -->

in any of the READMEs stands what this script wrote; a test fails when that is not what it would write now.
"""

import re
from pathlib import Path

from saltflat.lab.report.markdown import summary

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The files that hold generated blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "records").glob("*/README.md"))]


def generated(text: str) -> str:
    """The text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        runs = sorted((ROOT / "records" / match[2] / "runs").iterdir())
        return f"{match[1]}\n{summary(runs)}\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(generated(page.read_text()))
