"""The page: one offline HTML file whose every number and word is a function of the records that runs left.

It has no address outside itself, and names out of records are escaped. All that is on it can be read without a script:
one script reads values out of figures and moves among numbers, another draws surfaces where there are any, and the
page's policy knows both by their hashes. Nothing here imports torch.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from saltflat.lab.config import BadInput
from saltflat.lab.record import replacing
from saltflat.lab.report.attacks import attacks_plate
from saltflat.lab.report.differences import difference_tables
from saltflat.lab.report.drawing import VARIABLES
from saltflat.lab.report.examples import galleries
from saltflat.lab.report.flatness import flatness_table
from saltflat.lab.report.lines import line_plates
from saltflat.lab.report.notation import counted
from saltflat.lab.report.notes import notes
from saltflat.lab.report.planes import plane_plates
from saltflat.lab.report.plates import curves_plate
from saltflat.lab.report.runs import Run, read_run
from saltflat.lab.report.settings import configuration, environments
from saltflat.lab.report.spectra import spectrum_plates
from saltflat.lab.report.statistics import Group, grouped, runs_of
from saltflat.lab.report.tables import accuracy_table, cost_table, outcome_table, seeds_table
from saltflat.lab.report.terms import claimed, shown
from saltflat.lab.report.trained import trained_table
from saltflat.lab.report.words import headline

TEMPLATES = Path(__file__).parent
SCRIPT = TEMPLATES / "surface.js"
READER = TEMPLATES / "reader.js"


def write_report(runs: Sequence[Path], path: Path, *, title: str | None = None) -> None:
    """Write one HTML file about these run folders, whole or not at all; a folder given twice counts once."""
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in runs))
    if not folders:
        raise BadInput("a report needs at least one run")
    page = render([read_run(folder) for folder in folders], title=title)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a name read from JSON may hold half a surrogate pair


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """The page as text: equal records give an equal page."""
    groups = grouped(runs)
    planes = plane_plates(groups)
    scripts = [Markup(path.read_text(encoding="utf-8")) for path in (READER, *([SCRIPT] if planes else []))]
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=title or _default_title(groups),
            extent=f"{counted(len(groups), 'recipe')}, {counted(len(runs_of(groups)), 'run')}",
            folders=[run.folder.name for run in runs_of(groups)],
            headline=headline(groups),
            claimed=claimed,
            shown=shown,
            trained=trained_table(groups),
            tables=[table for table in (accuracy_table(groups), outcome_table(groups)) if table.bodies],
            attacks=attacks_plate(groups),
            seeds=seeds_table(groups),
            differences=difference_tables(groups),
            curves=curves_plate(groups),
            landscapes=line_plates(groups),
            planes=planes,
            scripts=scripts,
            policy=_policy(scripts),
            flatness=flatness_table(groups),
            spectra=spectrum_plates(groups),
            galleries=galleries(groups),
            cost=cost_table(groups),
            configuration=configuration(groups),
            environments=environments(groups),
            notes=notes(groups, len(runs)),
            variables=VARIABLES,
        )
    )


def templates(*more: Path) -> jinja2.Environment:
    """The report's templates and those of other folders; what they show is escaped, and cannot turn the writing."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*more, TEMPLATES]),
        autoescape=True,
        finalize=_straight,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


# Signs that are not seen, and set what stands around them from right to left: a name could show another's number.
TURNING = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def _straight(shown: object) -> object:
    return shown.translate(TURNING) if isinstance(shown, str) else shown


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: nothing but its own styles and pictures and, by their hashes, its own scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


def _default_title(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    return f"{names[1]} against {names[0]}" if len(names) == 2 else ", ".join(names)
