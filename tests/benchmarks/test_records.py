"""Rows of a benchmark: medians, ratios, and what is there after a script was stopped."""

import json

import pytest
from corpora import Measurement
from records import Records


def ratios(records):
    file = records._file
    return {row["contender"]: row["ratio"] for row in json.loads(file.read_text())["rows"]}


def test_a_ratio_above_one_says_that_ours_is_better_whatever_the_unit(tmp_path):
    seconds = Records(tmp_path / "seconds.json")
    seconds.add("case", "cbtm", "s", [2.0, 4.0, 3.0], is_ours=True)
    seconds.add("case", "peer", "s", [6.0])
    assert ratios(seconds) == {"cbtm": 1.0, "peer": 2.0}  # 6 s against a median of 3 s
    speeds = Records(tmp_path / "speeds.json")
    speeds.add("case", "peer", "tokens/s", [50.0])
    speeds.add("case", "cbtm", "tokens/s", [200.0], is_ours=True)
    assert ratios(speeds) == {"peer": 4.0, "cbtm": 1.0}  # found although ours comes behind


def test_there_is_no_ratio_across_cases_or_to_a_contender_that_failed(tmp_path):
    records = Records(tmp_path / "rows.json")
    records.add("small", "cbtm", "s", [1.0], is_ours=True)
    records.add("large", "peer", "s", [5.0])
    records.add("small", "broken", "s", [], note="failed: no memory")
    assert ratios(records) == {"cbtm": 1.0, "peer": None, "broken": None}


def test_a_row_has_the_median_and_the_range_of_its_measurements(tmp_path):
    records = Records(tmp_path / "rows.json")
    runs = [Measurement(seconds=s, peak_bytes=b) for s, b in ((4.0, 3e6), (1.0, 1e6), (2.0, 2e6))]
    records.measured("case", "cbtm", runs, is_ours=True)
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert (row["median"], row["low"], row["high"], row["peak_mb"], row["repeats"]) == (2.0, 1.0, 4.0, 2.0, 3)


def test_a_measurement_that_failed_is_a_row_that_says_why(tmp_path):
    records = Records(tmp_path / "rows.json")
    records.measured("case", "peer", [Measurement(seconds=1.0), Measurement(error="stopped after 60 s")])
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert (row["median"], row["note"]) == (None, "failed: stopped after 60 s")


def test_what_was_found_is_in_the_file_before_the_script_ends(tmp_path, capsys):
    records = Records(tmp_path / "rows.json")
    records.add("case", "cbtm", "s", [1.0])
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1
    records.goal("twice as fast", False, "1.9x")
    assert json.loads((tmp_path / "rows.json").read_text())["goals"] == [
        {"goal": "twice as fast", "met": False, "found": "1.9x"}
    ]
    assert capsys.readouterr().out == "goal twice as fast: not met (1.9x)\n"


def test_a_unit_must_say_whether_more_is_better():
    with pytest.raises(ValueError, match=r"unit='parsec': nobody says whether more of it is better"):
        Records(None).add("case", "cbtm", "parsec", [1.0])
