"""The page of the study: one offline HTML file, with a row per model as CSV and the findings as JSON beside it.

Every number and every word is a function of the table. The page holds no script and no address outside itself; names
out of the table are escaped. Nothing here imports torch.
"""

import json
from pathlib import Path

from saltflat.lab.record import replacing
from saltflat.lab.report.drawing import VARIABLES
from saltflat.lab.report.notation import counted
from saltflat.lab.report.page import templates
from saltflat.lab.study import findings as analysis
from saltflat.lab.study.findings import LEAST, Findings
from saltflat.lab.study.plates import confounder_plate, forest_plate, scatter_plate
from saltflat.lab.study.table import Table
from saltflat.lab.study.tables import as_csv, association_table, axes_table, measure_table, models_table
from saltflat.lab.study.words import headline, left_out

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write(table: Table, folder: Path, *, resamples: int = 2000, permutations: int = 2000, seed: int = 0) -> Findings:
    """Write gap.html, gap.csv and findings.json into a folder, each whole or not at all; returns what was found."""
    found = analysis.findings(table, resamples=resamples, permutations=permutations, seed=seed)
    record = json.dumps(analysis.as_record(found), indent=1) + "\n"
    for name, text in (("findings.json", record), ("gap.csv", as_csv(table)), ("gap.html", render(table, found))):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))  # a name read from JSON may hold half a pair
    return found


def render(table: Table, found: Findings) -> str:
    """The page as text: an equal table and equal findings give an equal page."""
    return (
        templates(TEMPLATE.parent)
        .get_template(TEMPLATE.name)
        .render(  # the style is the report's
            title=table.title,
            extent=f"{counted(len(found.measures), 'measure')} of {counted(len(table.models), 'model')}",
            headline=headline(found),
            forest=forest_plate(found) if found.runs >= LEAST else None,
            scatters=scatter_plate(table, found),
            confounder=confounder_plate(table, found),
            associations=association_table(found),
            axes=axes_table(found),
            measures=measure_table(found),
            models=models_table(table),
            settings=table.settings,
            left_out=left_out(table, found),
            found=found,
            variables=VARIABLES,
        )
    )
