"""Write what the records show into their READMEs, and into the project's.

    python -m records.generate

A record is a folder `<date>_<idea>/` with `runs/*/` in it: run folders as `saltflat train`, `evaluate` and `landscape`
write them, without the weights; or the `table.json` of a `saltflat study gap`; or the `results/*.json` of a `saltflat
study claims`; or what the scripts in `benchmarks/` wrote. Between the marks

    <!-- generated: FOLDER -->   ...   <!-- end -->

in a record's README stands what this script wrote. The project's README has a shorter form, docs/evidence.md that or
the whole, and docs/scaling.md the same beside what `benchmarks/scaling_model.py` plans, in a block named `plan`. A test
fails when that is not what the script would write now.
"""

import json
import os
import re
from pathlib import Path

from benchmarks import official_logs, peer_tables, scaling_model, speedrun
from benchmarks.tables import compared, planned
from saltflat.lab.report import markdown
from saltflat.lab.study import claims_markdown
from saltflat.lab.study import markdown as study

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- generated: ", "<!-- end -->"
BLOCK = re.compile(rf"({BEGIN}(\S+) -->\n)(?:(?!{BEGIN}).)*?({END})", re.DOTALL)


def pages() -> list[Path]:
    """The files that hold generated blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "records").glob("*/README.md"))]


def generated(page: Path) -> str:
    """The page's text with every block made anew."""
    return made_anew(page.read_text(), page.parent)


def made_anew(text: str, at: Path) -> str:
    """The same, of the text of a page in the folder `at`."""

    def block(match: re.Match[str]) -> str:
        record = ROOT / "records" / match[2]
        made = _plan() if match[2] == "plan" else _shown(record, at)
        return f"{match[1]}\n{made}\n\n{match[3]}"

    if not len(BLOCK.findall(text)) == text.count(BEGIN) == text.count(END):
        raise ValueError(f"a page in {at}: expected an `{END}` after every `{BEGIN}FOLDER -->`, and no other")
    return BLOCK.sub(block, text)


def _shown(record: Path, at: Path) -> str:
    """In a page of the folder `at`: whole in the record's own, brief in others."""
    whole, pictures = at == record, Path(os.path.relpath(record, at)).as_posix()
    if (record / "runs").is_dir():
        return markdown.summary(runs_of(record)) if whole else markdown.brief(runs_of(record), pictures)
    if (record / "table.json").is_file():
        return study.summary(record) if whole else study.brief(record, pictures)
    if (record / "results").is_dir():
        at_length = at == ROOT / "docs"
        return (
            claims_markdown.summary(record, f"{pictures}/" if at_length else "")
            if whole or at_length
            else claims_markdown.brief(record, f"{pictures}/")
        )
    for folder, part in ((record, ""), (record.parent, record.name)):  # FOLDER/PART is a part of its tables
        if (folder / "peers.json").is_file():
            return peer_tables.markdown(folder / "peers.json", part, Path(os.path.relpath(ROOT, at)).as_posix())
    if (record / "logs.json").is_file():
        return official_logs.markdown(record / "logs.json")
    return "\n\n".join([compared(record), *(markdown_of(path) for path in sorted(record.glob("speedrun*.json")))])


def _plan() -> str:
    given = scaling_model.Assumed()
    return f"{planned(scaling_model.plan(given))}\n\nAssumed: {scaling_model.in_words(given)}."


def markdown_of(path: Path) -> str:
    """The table of a speed record."""
    return f"**The speed record's recipe on a CPU**\n\n{speedrun.markdown(json.loads(path.read_text()))}"


def figures(record: Path) -> dict[str, str]:
    """The SVG text of every figure that lies beside a record's README, by its name."""
    if (record / "runs").is_dir():
        return markdown.figures(runs_of(record))
    if (record / "results").is_dir():
        return claims_markdown.figures(record)
    return study.figures(record) if (record / "table.json").is_file() else {}


def runs_of(record: Path) -> list[Path]:
    """The run folders of a record: by recipe, the plain one before those that are named after it, then by seed."""
    return sorted((record / "runs").iterdir(), key=lambda run: run.name.rpartition("-"))


if __name__ == "__main__":
    for page in pages():
        page.write_text(generated(page))
        if page.parent.parent == ROOT / "records":
            for name, svg in figures(page.parent).items():
                (page.parent / f"{name}.svg").write_text(svg)
