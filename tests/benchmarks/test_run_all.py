"""`make bench`: what it runs, what it keeps, what it says of scripts that fail, and the page that it writes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import registry
import results_page
import run_all
from registry import Entry, Text

PROJECT = Path(__file__).resolve().parents[2]
BENCHMARKS = PROJECT / "benchmarks"

# As `records.Records` writes it, but without the seconds that importing it takes.
WRITES_A_ROW = """
import json, sys
rows = [{"case": "one case", "contender": "cbtm", "unit": "s", "median": 1.0, "ratio": 1.0}]
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"rows": rows, "goals": []}, file)
with open(sys.argv[1], "a") as calls:
    calls.write("called\\n")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A project whose benchmarks are files of the test."""
    folder = tmp_path / "project" / "benchmarks"
    folder.mkdir(parents=True)
    (folder.parent / "cbtm").mkdir()
    monkeypatch.setattr(run_all, "PROJECT", folder.parent)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "corpus" / "train" / "00000").mkdir(parents=True)
    (tmp_path / "corpus" / "train" / "00000" / "a.jsonl").write_text('{"text": "one"}\n')
    return Text(tmp_path / "corpus")


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


def entry(name, *arguments, **more):
    return Entry(name, f"{name}.py", "It works.", (), arguments, **({"deadline_s": 60.0} | more))


def run(entries, text, kept, **more):
    return run_all.run_all(entries, text, kept, **({"until": time.monotonic() + 100, "fresh": False} | more))


# --- the registry ---


def test_every_script_has_an_entry_and_every_entry_its_script():
    scripts = {
        file.name
        for file in BENCHMARKS.glob("*.py")
        if "__main__" in file.read_text(encoding="utf-8") and file.name != "run_all.py"
    }
    assert {one.script for one in registry.ENTRIES} == scripts


def test_entries_have_names_of_their_own_and_pages_that_are_there():
    names = [one.name for one in registry.ENTRIES]
    assert sorted(set(names)) == sorted(names)
    missing = [page for one in registry.ENTRIES for page in one.said_in if not (PROJECT / page).is_file()]
    assert missing == []


@pytest.mark.parametrize("one", registry.ENTRIES, ids=lambda one: one.name)
def test_arguments_of_an_entry_are_options_of_its_script(one):
    # Read from the source: --help of all of them would import torch ten times.
    source = (BENCHMARKS / one.script).read_text(encoding="utf-8") + (BENCHMARKS / "corpora.py").read_text("utf-8")
    options = {argument for argument in one.arguments if argument.startswith("--")}
    assert {option for option in options if f'"{option}"' not in source} == set()


def test_labels_and_what_needs_them_are_left_out_where_a_corpus_has_none(text):
    one = entry("script", "--corpus", "{corpus}", "--labels", "{labels}", "--prose", "{prose}", "--repeats", "1")
    root = str(text.root)
    assert text.arguments(one) == ["--corpus", root, "--repeats", "1"]
    (text.root / "labels").mkdir()
    assert text.arguments(one) == [
        *("--corpus", root, "--labels", f"{root}/labels", "--prose", "aws_documentation", "--repeats", "1")
    ]


# --- running ---


def test_a_run_that_was_interrupted_goes_on_with_what_is_missing(scripts, text, kept, tmp_path):
    for name in ("first", "second"):
        (scripts / f"{name}.py").write_text(WRITES_A_ROW)
    calls = {name: tmp_path / f"{name}.calls" for name in ("first", "second")}
    entries = [entry(name, str(calls[name])) for name in calls]
    run(entries[:1], text, kept)
    outcomes = run(entries, text, kept)
    assert [one["status"] for one in outcomes] == ["done", "done"]
    assert [file.read_text() for file in calls.values()] == ["called\n", "called\n"]
    run(entries, text, kept, fresh=True)
    assert [file.read_text() for file in calls.values()] == ["called\n" * 2] * 2


def test_other_code_other_text_and_other_arguments_are_run_again(scripts, text, kept, tmp_path):
    calls = tmp_path / "calls"
    (scripts / "first.py").write_text(WRITES_A_ROW)
    run([entry("first", str(calls))], text, kept)
    (scripts / "first.py").write_text(WRITES_A_ROW + "# changed\n")
    run([entry("first", str(calls))], text, kept)
    assert calls.read_text() == "called\n" * 2
    (text.root / "train" / "00000" / "b.jsonl").write_text('{"text": "two"}\n')
    run([entry("first", str(calls))], text, kept)
    assert calls.read_text() == "called\n" * 3
    run([entry("first", str(calls), "--repeats", "1")], text, kept)
    assert calls.read_text() == "called\n" * 4


def test_a_script_that_fails_hides_no_other_and_is_tried_again(scripts, text, kept, tmp_path):
    (scripts / "broken.py").write_text("raise SystemExit('there is no GPU')")
    (scripts / "sound.py").write_text(WRITES_A_ROW)
    entries = [entry("broken"), entry("sound", str(tmp_path / "calls"))]
    broken, sound = run(entries, text, kept)
    assert (broken["status"], broken["reason"]) == ("failed", "exit code 1: there is no GPU")
    assert sound["status"] == "done"
    (scripts / "broken.py").write_text(WRITES_A_ROW)
    assert run([entry("broken", str(tmp_path / "more"))], text, kept)[0]["status"] == "done"


def test_a_script_is_stopped_at_its_deadline_with_its_children_and_keeps_what_it_found(scripts, text, kept, tmp_path):
    waits = "import subprocess, time\nchild = subprocess.Popen(['sleep', '100'])\n"
    tells = f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\ntime.sleep(100)\n"
    (scripts / "late.py").write_text(WRITES_A_ROW + waits + tells)
    late = run([entry("late", str(tmp_path / "calls"), deadline_s=3.0)], text, kept)[0]
    assert (late["status"], late["reason"]) == ("failed", "stopped at its deadline of 3 s")
    assert [row["contender"] for row in late["rows"]] == ["cbtm"]
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_nothing_begins_behind_the_half_hour(scripts, text, kept):
    (scripts / "first.py").write_text("raise AssertionError")
    outcome = run([entry("first")], text, kept, until=time.monotonic() - 1)[0]
    assert (outcome["status"], outcome["reason"]) == ("failed", "the 30 minutes were over; the same command goes on")


def test_what_a_benchmark_needs_is_said_in_place_of_running_it(scripts, text, kept, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    outcomes = run(
        [
            entry("store", environment=("AWS_ENDPOINT_URL",)),
            entry("peerless", packages=("no_such_package",), peers=("no-such-package",)),
        ],
        text,
        kept,
    )
    assert [one["status"] for one in outcomes] == ["skipped", "skipped"]
    assert outcomes[0]["reason"] == "needs AWS_ENDPOINT_URL in the environment"
    assert outcomes[1]["reason"] == f"needs no_such_package: {run_all.INSTALL}"
    assert outcomes[1]["missing"] == ["no-such-package"]


def test_a_real_benchmark_runs_through_the_runner(kept):
    made = kept / "corpus"
    words = ["alpha beta gamma", "delta epsilon zeta", "eta theta iota", "kappa lambda mu"]
    (made / "train" / "00000").mkdir(parents=True)
    lines = [json.dumps({"text": f"{words[n % 4]} {words[n % 3]} common{n % 7}"}) for n in range(120)]
    (made / "train" / "00000" / "a.jsonl").write_text("\n".join(lines) + "\n")
    sizes = ("--sizes", "40x4", "--repeats", "1")
    one = Entry("assignment", "assignment.py", "Exact.", (), ("--corpus", "{corpus}", *sizes), deadline_s=200)
    outcome = run([one], Text(made), kept)[0]
    assert outcome["status"] == "done", outcome
    ours = outcome["rows"][0]
    assert (ours["case"], ours["contender"], ours["ratio"], ours["unit"]) == ("40 x 4", "cbtm", 1.0, "s")
    assert {row["contender"] for row in outcome["rows"]} >= {"OR-tools flow", "scipy linear_sum_assignment"}
    assert outcome["command"] == "python benchmarks/assignment.py --corpus corpus --sizes 40x4 --repeats 1"


def test_names_that_are_not_known_end_with_those_that_are():
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), "--only", "kmeans,speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("--only speed: known are assignment, kmeans, ")


# --- the page ---


def hand_made():
    rows = [
        {"case": "50 x 8", "contender": "cbtm", "unit": "s", "median": 0.0312, "low": 0.03, "high": 0.04, "repeats": 3,
         "peak_mb": 4.8, "is_ours": True, "note": "exact", "ratio": 1.0},
        {"case": "50 x 8", "contender": "flow", "unit": "s", "median": 0.197, "low": 0.197, "high": 0.197,
         "repeats": 1, "peak_mb": None, "is_ours": False, "note": "", "ratio": 6.314},
        {"case": "90 x 8", "contender": "flow", "unit": "s", "median": None, "low": None, "high": None,
         "repeats": 0, "peak_mb": None, "is_ours": False, "note": "failed: a | b", "ratio": None},
    ]  # fmt: skip
    common = {"commit": "abc", "load": 0.25, "missing": [], "seconds": 90.0, "claim": "It is exact."}
    return {
        "date": "2026-11-26 12:00 UTC",
        "text": "Text: sample",
        "machine": {"processor": "A CPU", "cores": 2, "memory_gb": 24.6, "system": "Linux x86_64", "python": "3.11.7"},
        "versions": {"scipy": "1.17.1", "ortools": "9.15"},
        "entries": [
            common | {"name": "assignment", "command": "python a.py", "status": "done", "rows": rows,
                      "goals": [{"goal": "twice", "met": True, "found": "6.3x"},
                                {"goal": "ten times", "met": False, "found": ""}]},
            common | {"name": "storage", "command": "python s.py", "status": "skipped", "seconds": 0.0,
                      "reason": "needs AWS_ENDPOINT_URL in the environment"},
            common | {"name": "late", "command": "python l.py", "status": "failed", "missing": ["peer"],
                      "reason": "stopped at its deadline of 6 s"},
        ],
    }  # fmt: skip


EXPECTED = """\
2026-11-26 12:00 UTC, commit abc: A CPU, 2 cores, 25 GB, Linux x86_64, Python 3.11.7. Load when a benchmark began: \
0.2 at most. All took 3 minutes. Text: sample.

Packages: ortools 9.15, scipy 1.17.1.

### assignment

It is exact.

`python a.py`, 90 s

| case | contender | median | range | ratio | peak MB | |
|--|--|--|--|--|--|--|
| 50 x 8 | cbtm | 0.0312 s | 0.0300–0.0400 | 1.00 | 5 | exact |
|  | flow | 0.197 s | once | 6.31 |  |  |
| 90 x 8 | flow | – |  |  |  | failed: a / b |

- twice: met (6.3x)
- ten times: **not met**

### storage

It is exact.

Not run: needs AWS_ENDPOINT_URL in the environment.

### late

It is exact.

`python l.py`, 90 s; not installed: peer

**Failed**: stopped at its deadline of 6 s.
"""


def test_a_result_becomes_the_page_that_was_written_by_hand():
    assert results_page.render(hand_made()) == EXPECTED


def test_results_go_between_the_marks_and_the_rest_of_the_page_stays():
    page = f"# Title\n\n{results_page.BEGIN}\n\nold\n\n{results_page.END}\n\nBehind.\n"
    once = results_page.with_results(page, hand_made())
    assert once.startswith(f"# Title\n\n{results_page.BEGIN}\n\n2026-11-26")
    assert once.endswith(f"{results_page.END}\n\nBehind.\n")
    assert "old" not in once
    assert results_page.with_results(once, hand_made()) == once
    with pytest.raises(ValueError, match="the page needs one line <!-- results of make bench: begin -->"):
        results_page.with_results("# Title\n", hand_made())


def test_the_page_shows_the_last_result():
    page = (PROJECT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    latest = BENCHMARKS / "results" / "latest.json"
    if latest.is_file():
        assert results_page.with_results(page, json.loads(latest.read_text(encoding="utf-8"))) == page
    else:
        between = page.partition(results_page.BEGIN)[2].partition(results_page.END)[0]
        assert between.strip() == "`make bench` has not been run to its end yet."


@pytest.mark.parametrize(("value", "shown"), [(0.000123456, "0.000123"), (0.5, "0.500"), (2.254, "2.25"),
                                              (24.36, "24.4"), (5123.4, "5,123"), (0, "0")])  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(value, shown):
    assert results_page.number(value) == shown
