"""Numbers in sentences, each with the key of its definition, so that a page can say what it means."""

import re
from collections.abc import Mapping

from saltflat.lab.report.notation import UNBROKEN

SPREAD = rf"(?:{UNBROKEN}±{UNBROKEN}\d+(?:\.\d+)?)?"
NUMBER = re.compile(rf"[+−]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?{SPREAD}[ {UNBROKEN}](?P<unit>points|%)")

Parts = list[tuple[str, str]]  # text, and a key of the page's definitions or nothing


def claimed(sentence: str) -> Parts:
    """Of what is said of gaps and accuracies.

    >>> claimed("a gap of 2.50 points")
    [('a gap of ', ''), ('2.50 points', 'gap')]
    """
    return _parts(sentence, {"points": "gap", "%": "robust"})


def shown(sentence: str) -> Parts:
    """Of what is said of differences, and of what chance alone would do."""
    return _parts(sentence, {"points": "paired", "%": "chance"})


def _parts(sentence: str, keys: Mapping[str, str]) -> Parts:
    parts, end = [], 0
    for found in NUMBER.finditer(sentence):
        parts += [(sentence[end : found.start()], ""), (found[0], keys[found["unit"]])]
        end = found.end()
    return [part for part in (*parts, (sentence[end:], "")) if part[0]]
