"""A comparison as one HTML page that needs no other file: verdict, figure, tables."""

import html
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jobs.comparison.differences import (
    Comparison,
    difference_table,
    result_table,
    verdict_lines,
)
from jobs.comparison.figure import caption, svg
from jobs.comparison.seed_groups import SEED
from jobs.comparison.seed_spread import LEAST_SEEDS, LEVEL
from pipeline.storage import LocalStore

_NUMBER = re.compile(r"-|[-+]?[\d,.]+( \(.*\))?")
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.sub, figcaption, .notes { color: #555; font-size: .9rem; }
.verdict { border-left: 4px solid #0072B2; background: #f2f7fb; padding: .7rem 1rem;
  margin: 1rem 0; }
.careful { border-color: #E69F00; background: #fdf6e7; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; } thead th { border-bottom: 2px solid #999; }
.number { text-align: right; } code { font-size: .9em; }
@media print { body { margin: 0; max-width: none; } }
"""


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the page, whole or not at all."""
    LocalStore(path.absolute().parent).write(path.name, page(comparison).encode())


def page(comparison: Comparison) -> str:
    """The whole document."""
    names = " and ".join(group.name for group in comparison.groups)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = [
        f"<h1>Comparison of {html.escape(names)}</h1>",
        f'<p class="sub">{len(comparison.runs)} runs of {len(comparison.groups)} recipes,'
        f" {made}, tvq {version('tvq')}</p>",
    ]
    for line in verdict_lines(comparison):
        kind = "verdict careful" if line.startswith("careful:") else "verdict"
        parts.append(f'<p class="{kind}">{html.escape(line)}</p>')
    parts.append(
        f"<figure>{svg(comparison)}<figcaption>{html.escape(caption(comparison))}"
        "</figcaption></figure>"
    )
    if comparison.differences:
        parts += ["<h2>What differs in the recipes</h2>", _table(*difference_table(comparison))]
    parts += ["<h2>Results</h2>", _table(*result_table(comparison))]
    if comparison.has_seeds:
        parts.append('<p class="sub">Mean over the seeds (least to most).</p>')
    parts += ["<h2>Runs</h2>", _table(*_run_table(comparison)), "<h2>How it is told</h2>", _notes()]
    title = html.escape(f"{names} · tvq compare")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _run_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = []
    for group in comparison.groups:
        for index in sorted(group.members + group.repeats):
            one = comparison.runs[index]
            rows.append(
                [
                    one.name,
                    group.name,
                    one.parameters.get(SEED, "-"),
                    one.status,
                    f"{one.updates:,}",
                    f"{one.tokens:,}",
                    one.run_id,
                ]
            )
    return ["run", "recipe", "seed", "status", "updates", "tokens", "MLflow run"], rows


def _notes() -> str:
    return (
        '<p class="notes">Runs whose recipes differ in the seed alone are one recipe. Figures are'
        " compared after the last evaluation that all runs share. A difference exceeds the seed"
        " spread if the ranges of the seeds are apart and Welch's two-sided test (variances not"
        f" assumed equal, {LEAST_SEEDS} seeds or more of each recipe) has p under {LEVEL};"
        " with several recipes against the first, p is adjusted by Holm. The bands are ranges of"
        " the seeds that were run; they are not intervals of confidence. What a seed changes is"
        " initial parameters, order of the data and random draws, not the validation text.</p>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are set to the right."""
    right = [
        index > 0 and all(_NUMBER.fullmatch(row[index]) for row in rows)
        for index in range(len(columns))
    ]

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=number' * number}>{html.escape(cell)}</{tag}>"
            for cell, number in zip(cells, right, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return (
        f'<div class="scroll"><table><thead>{line(columns, "th")}</thead>'
        f"<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"
    )
