"""What a benchmark found, for programs: rows and goals, written as JSON beside the tables that people read.

No benchmark by itself. Every script takes `--json FILE` and writes there what `run_all.py` gathers. A row is one
contender at one case, such as "50,000 x 8"; all rows of one case have one unit. The ratio of a row is taken here and
nowhere else, so that it means the same in every table: how many times as good our own row of that case is.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corpora import Measurement, goal

LESS_IS_BETTER = {"s", "ms", "MB", "requests", "µs/token"}
MORE_IS_BETTER = {"tokens/s", "MB/s", "positions/s", "documents/s"}


@dataclass(frozen=True)
class Row:
    """One contender at one case.

    Attributes:
        case: What is done, with its size.
        contender: Who does it.
        unit: Of the numbers; one of `LESS_IS_BETTER` and `MORE_IS_BETTER`.
        median: Of the repeats; None where it failed.
        low: The lowest.
        high: The highest.
        repeats: Measurements behind the median.
        peak_mb: Memory above what was there before the work, unless the script's page says otherwise; None unknown.
        is_ours: What the ratios of this case are taken against.
        note: What else is to be known: a quality, or why it failed.
    """

    case: str
    contender: str
    unit: str
    median: float | None
    low: float | None = None
    high: float | None = None
    repeats: int = 0
    peak_mb: float | None = None
    is_ours: bool = False
    note: str = ""


class Records:
    """Rows and goals of one run of a script, in the order in which they were found.

    The file is written anew at each of them, so that a script that is stopped has said what it knew; None writes none.
    """

    def __init__(self, file: Path | None) -> None:
        self.rows: list[Row] = []
        self.goals: list[dict[str, Any]] = []
        self._file = file

    def add(
        self,
        case: str,
        contender: str,
        unit: str,
        values: Sequence[float],
        *,
        peak_bytes: float | None = None,
        is_ours: bool = False,
        note: str = "",
    ) -> None:
        """A contender's numbers; without any it failed, and `note` says why."""
        if unit not in LESS_IS_BETTER | MORE_IS_BETTER:
            raise ValueError(
                f"unit={unit!r}: nobody says whether more of it is better; name it in benchmarks/records.py"
            )
        numbers = (statistics.median(values), min(values), max(values)) if values else (None, None, None)
        peak = None if peak_bytes is None else peak_bytes / 1e6
        self.rows.append(Row(case, contender, unit, *numbers, len(values), peak, is_ours, note))
        self._write()

    def measured(
        self,
        case: str,
        contender: str,
        runs: Sequence[Measurement],
        *,
        unit: str = "s",
        value: Callable[[Measurement], float] = lambda run: run.seconds,
        peak: Callable[[Measurement], float] = lambda run: run.peak_bytes,
        is_ours: bool = False,
        note: str = "",
    ) -> None:
        """The same of measurements in processes of their own, of which the last may have failed."""
        if runs[-1].error:
            self.add(case, contender, unit, [], is_ours=is_ours, note=f"failed: {runs[-1].error}")
            return
        values, peaks = [value(run) for run in runs], [peak(run) for run in runs]
        self.add(case, contender, unit, values, peak_bytes=statistics.median(peaks), is_ours=is_ours, note=note)

    def goal(self, text: str, is_met: bool, found: str = "") -> None:
        """Print whether a goal is met, and keep it."""
        goal(text, is_met, found)
        self.goals.append({"goal": text, "met": bool(is_met), "found": found})
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            rows = [asdict(row) | {"ratio": ratio_of(row, self.rows)} for row in self.rows]
            self._file.write_text(json.dumps({"rows": rows, "goals": self.goals}, indent=1) + "\n", encoding="utf-8")


def ratio_of(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as good as `row` our own of the same case and unit is; None where either is missing."""
    own = next((one for one in rows if one.is_ours and (one.case, one.unit) == (row.case, row.unit)), None)
    if own is None or not own.median or not row.median:
        return None
    return row.median / own.median if row.unit in LESS_IS_BETTER else own.median / row.median


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of every script whose value `Records` takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and goals there, for run_all.py")
