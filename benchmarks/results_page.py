"""The page of results: what `run_all.py` gathered, as Markdown between two marks of docs/benchmarks.md.

No benchmark by itself.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

BEGIN, END = "<!-- results of make bench: begin -->", "<!-- results of make bench: end -->"
SKIPPED, FAILED, DONE = "skipped", "failed", "done"


def render(result: Mapping[str, Any]) -> str:
    """Markdown of a gathered result: machine, versions, then a section for each benchmark."""
    entries = result["entries"]
    loads = [entry["load"] for entry in entries if entry["status"] != SKIPPED]
    machine = result["machine"]
    commits = " and ".join(sorted({entry["commit"] for entry in entries}))
    minutes = sum(entry["seconds"] for entry in entries) / 60
    lines = [
        f"{result['date']}, commit {commits}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, {machine['system']}, Python {machine['python']}. Load when a benchmark began: "
        f"{max(loads, default=0.0):.1f} at most. All took {minutes:.0f} minutes. {result['text']}.",
        "",
        f"Packages: {', '.join(f'{name} {version}' for name, version in sorted(result['versions'].items()))}.",
    ]
    for entry in entries:
        lines += ["", f"### {entry['name']}", "", *_section(entry)]
    return "\n".join(lines) + "\n"


def with_results(page: str, result: Mapping[str, Any]) -> str:
    """The page with what stands between the marks replaced.

    Raises:
        ValueError: If the page has not one pair of marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN} and one line {END}; results go between them")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{render(result)}\n{END}{rest.partition(END)[2]}"


def _section(entry: Mapping[str, Any]) -> list[str]:
    if entry["status"] == SKIPPED:
        return [entry["claim"], "", f"Not run: {entry['reason']}."]
    lines = [entry["claim"], "", f"`{entry['command']}`, {entry['seconds']:.0f} s"]
    if entry["missing"]:
        lines[-1] += f"; not installed: {', '.join(entry['missing'])}"
    if entry["status"] == FAILED:
        lines += ["", f"**Failed**: {entry['reason']}."]
    if "printed" in entry:
        return [*lines, "", *entry["printed"]]
    if entry.get("rows"):
        lines += ["", *_table(entry["rows"])]
    if entry.get("goals"):
        lines += ["", *(_goal(goal) for goal in entry["goals"])]
    return lines


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| case | contender | median | range | ratio | peak MB | |", "|--|--|--|--|--|--|--|"]
    for case, of_case in groupby(rows, key=lambda row: row["case"]):
        for place, row in enumerate(of_case):
            cells = ["" if place else case, row["contender"], "–", "", "", "", row["note"]]
            if row["median"] is not None:
                cells[2] = f"{number(row['median'])} {row['unit']}"
                cells[3] = f"{number(row['low'])}–{number(row['high'])}" if row["repeats"] > 1 else "once"
                cells[4] = "" if row["ratio"] is None else f"{number(row['ratio'])}"
                cells[5] = "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return lines


def _goal(goal: Mapping[str, Any]) -> str:
    found = f" ({goal['found']})" * bool(goal["found"])
    return f"- {goal['goal']}: {'met' if goal['met'] else '**not met**'}{found}"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2
    while abs(value) * 10**digits < 100 and digits < 8:
        digits += 1
    return f"{value:.{digits if abs(value) < 10 else 1}f}"
