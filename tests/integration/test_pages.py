"""What people see, looked at in a browser: the report, and MLflow's pages of a run as `cbtm ui` opens them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, text_of, wait_for_text
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from servers import free_ports, status
from small import settings, write_config

from cbtm import stages
from cbtm.merge.figures import show_perplexity
from cbtm.run import Run
from cbtm.run_config import load_config

pytestmark = pytest.mark.slow  # the run takes 20 s, MLflow's server 10 to 25 s to start

PERPLEXITY = "eval/perplexity"
BY_TOP_K = "eval/top_k/perplexity"


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run that is done."""
    folder = tmp_path_factory.mktemp("looked-at")
    values = settings(str(corpus), str(folder / "run"), f"sqlite:///{folder}/mlflow.db")
    path = write_config(folder / "run.yaml", values)
    run = Run(load_config(path))
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()
    return path


@pytest.fixture(scope="module")
def result(config: Path) -> dict[str, Any]:
    """Content of result.json."""
    content: dict[str, Any] = json.loads((config.parent / "run/result.json").read_text())
    return content


@pytest.fixture(scope="module")
def address(config: Path) -> Iterator[str]:
    """Address of the comparison, as `cbtm ui` prints it; its server runs meanwhile."""
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "from cbtm.cli import main; main()", "ui", str(config), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    log = config.parent / "ui.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"comparison: (http://127\.0\.0\.1:\d+/#/compare-runs\S+)", line.strip())
        assert found is not None, line + log.read_text()
        health = f"http://127.0.0.1:{port}/health"
        _until(lambda: status(health) == 200, log)
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)
    _until(lambda: status(health) is None, log)  # the server ends with the command, and frees the port


def _until(condition: Callable[[], bool], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One for all pages; so wide that the columns of all runs are in sight."""
    with chromium(tmp_path_factory.mktemp("profile"), width=4000, height=1400) as opened:
        yield opened


def models(result: dict[str, Any]) -> dict[str, float]:
    """Name of the run in MLflow and perplexity of each model and ensemble that both pages show."""
    chosen = {row["top_k"]: row for row in result["ensemble"] if row["selected"] and row["ensemble"] == "clustering"}
    return {
        "small/seed": result["seed"]["perplexity"],
        "small/dense": result["dense"]["perplexity"],
        "small/evaluation-random": result["random"]["perplexity"],
        "small/ensemble": chosen[2]["perplexity"],
        "small/ensemble-top-1": chosen[1]["perplexity"],
    }


# --- the report ---


def test_the_report_shows_the_figures_of_the_result_and_loads_nothing(browser, config, result):
    browser.get((config.parent / "run/report.html").as_uri())
    shown = text_of(browser)
    assert len({show_perplexity(value) for value in models(result).values()}) > 1  # or the next lines prove little
    for name, value in zip(
        ("seed model", "dense model", "random clusters", "ensemble, all 2 experts", "ensemble, top-1"),
        models(result).values(),
        strict=True,
    ):
        assert re.search(rf"^{re.escape(name)} {re.escape(show_perplexity(value))} ", shown, re.MULTILINE), name
    assert browser.find_elements(By.TAG_NAME, "svg")
    assert browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)") == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    # Nothing is cut off at the side of a window of this width.
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


# --- MLflow ---

# The table renders only the cells in sight: scroll through it, and read each cell by its place.
_READ_CELLS = """
const read = [];
for (const grid of arguments)
  read.push([...grid.firstElementChild.children].map(cell => [
    parseInt(cell.style.top), parseInt(cell.style.left), cell.innerText.trim(), (cell.querySelector('a') || {}).href]));
return read;
"""


@dataclass
class Row:
    """A metric in the comparison: where its name links to, and its value in each run, by the place of the column."""

    link: str = ""
    values: dict[int, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        return [text for _, text in sorted(self.values.items())]


def metric_table(browser: Chrome) -> dict[str, Row]:
    """The table of metrics of the comparison, by metric."""

    def two_grids(_: Chrome) -> Any:
        found = browser.find_elements(By.CSS_SELECTOR, "div[role=grid]")
        return found if len(found) == 2 else None

    grids = WebDriverWait(browser, 60).until(two_grids)
    names: dict[int, str] = {}
    rows: dict[int, Row] = {}
    for place in range(0, browser.execute_script("return arguments[0].scrollHeight", grids[1]), 200):
        browser.execute_script("arguments[0].scrollTop = arguments[1]", grids[1], place)
        time.sleep(0.1)  # until it has rendered
        keys, values = browser.execute_script(_READ_CELLS, *grids)
        for top, _, text, link in keys:
            names[top], rows.setdefault(top, Row()).link = text, link
        for top, left, text, _ in values:
            rows.setdefault(top, Row()).values[left] = text
    return {names[top]: row for top, row in rows.items()}


def test_the_comparison_shows_the_figures_of_the_result(browser, address, result):
    browser.get(address)
    shown = wait_for_text(browser, "Run details", "small/dense", PERPLEXITY)
    names = re.findall(r"^small/\S+$", shown, re.MULTILINE)
    assert set(models(result)) <= set(names)
    assert f"Comparing {len(names)} Runs from 1 Experiment" in shown
    row = dict(zip(names, metric_table(browser)[PERPLEXITY].cells, strict=True))
    for name, value in models(result).items():
        assert float(row[name]) == float(f"{value:.4g}"), name  # it shows four digits


def test_the_chart_of_top_k_has_top_k_as_its_steps(browser, address, result):
    """The page that the name of the metric in the comparison links to."""
    browser.get(address)
    wait_for_text(browser, "Run details", PERPLEXITY)
    browser.get(metric_table(browser)[BY_TOP_K].link)
    shown = wait_for_text(browser, "Completed Runs", "Max", "(step=2)")
    ensemble = models(result)
    by_step = {1: ensemble["small/ensemble-top-1"], 2: ensemble["small/ensemble"]}
    (figures,) = re.findall(rf"^{BY_TOP_K} .*step=.*$", shown, re.MULTILINE)
    points = {int(step): float(value) for value, step in re.findall(r"(\S+) \(step=(\d+)\)", figures)}
    assert points == pytest.approx(by_step)
    assert browser.execute_script("return document.querySelector('.xtitle').textContent") == "Step"
    ticks = browser.execute_script("return [...document.querySelectorAll('.xtick text')].map(one => one.textContent)")
    assert {"1", "2"} <= set(ticks)
