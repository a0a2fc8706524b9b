"""Take the pictures that the documentation shows: of reports, and of MLflow's pages.

    cbtm ui run.yaml                            # prints the address of the comparison, and serves MLflow
    python docs/take_pictures.py --ui ADDRESS   # docs/images/comparison.png and top_k.png
    python docs/take_pictures.py --report runs/demo/report.html
    python docs/take_pictures.py --arms runs/compare/comparison.html --server http://127.0.0.1:5000

The last writes arms.png, and arms_mlflow.png of the newest comparison in that server. Needs Debian's chromium and
chromium-driver.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

IMAGES = Path(__file__).resolve().parent / "images"
TOP_K = "eval/top_k/perplexity"
ROW = 45  # pixels of a metric in the table


def wait_for(browser: Chrome, text: str) -> None:
    """Wait until the page shows `text`."""
    WebDriverWait(browser, 60).until(lambda _: text in browser.find_element(By.TAG_NAME, "body").text)


def close_assistant(browser: Chrome) -> None:
    """Close the panel that MLflow opens beside the page."""
    for button in browser.find_elements(By.CSS_SELECTOR, "button[aria-label=Close]"):
        button.click()


def collapse(browser: Chrome, *sections: str) -> None:
    """Close sections of the comparison."""
    for header in browser.find_elements(By.CSS_SELECTOR, ".du-bois-light-collapse-header"):
        if header.text.strip() in sections:
            header.click()


_LINKS = """
return Object.fromEntries([...document.querySelectorAll("a[title='Plot chart']")]
  .filter(link => parseInt(link.parentElement.style.top) == arguments[0])
  .map(link => [link.textContent, link.href]))
"""


def scroll_to(browser: Chrome, metric: str) -> str:
    """Scroll the table of metrics until `metric` is its first row; the address that its name links to."""
    names, values = browser.find_elements(By.CSS_SELECTOR, "div[role=grid]")
    for top in range(0, browser.execute_script("return arguments[0].scrollHeight", values), ROW):
        # Twice, for the names (of MLflow 3.17) follow the values one event late.
        for place in (top + 1, top):
            browser.execute_script("arguments[0].scrollTop = arguments[1]", values, place)
            time.sleep(0.1)
        links: dict[str, str] = browser.execute_script(_LINKS, top)
        if metric in links:
            apart = browser.execute_script("return arguments[0].scrollTop - arguments[1].scrollTop", names, values)
            assert abs(apart) <= 1, f"the names of the metrics are {apart} pixels beside their values"
            return links[metric]
    raise SystemExit(f"the comparison has no metric {metric}")


def take(browser: Chrome, address: str) -> None:
    """Open both pages and save what they show."""
    browser.get(address)
    wait_for(browser, "Run details")
    close_assistant(browser)
    collapse(browser, "Visualizations", "Parameters", "Artifacts", "Tags")
    chart = scroll_to(browser, TOP_K)
    scroll_to(browser, "eval/perplexity")
    browser.execute_script("arguments[0].scrollIntoView(false)", browser.find_element(By.CSS_SELECTOR, "h1, h2"))
    time.sleep(1)
    browser.save_screenshot(str(IMAGES / "comparison.png"))
    browser.set_window_size(1500, 800)
    browser.get(chart)
    wait_for(browser, "Completed Runs")
    wait_for(browser, "(step=")
    close_assistant(browser)
    time.sleep(1)
    browser.save_screenshot(str(IMAGES / "top_k.png"))


def take_page(browser: Chrome, file: Path, picture: str, height: int) -> None:
    """Save the top of a page of this machine, 1000 pixels wide."""
    size = {"width": 1000, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.resolve().as_uri())
    time.sleep(1)
    browser.save_screenshot(str(IMAGES / picture))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def lines_address(server: str) -> str:
    """Address of the chart of perplexity against k, of the newest comparison."""
    from mlflow import MlflowClient

    client = MlflowClient(server)
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, "metrics.`compare/perplexity` > 0", order_by=["start_time DESC"])
    lines = [run for run in runs if "/line-" in run.info.run_name][:3]
    if not lines:
        raise SystemExit(f"{server} has no comparison; run make compare, and serve its database")
    given = {
        "runs": [run.info.run_id for run in lines],
        "metric": "compare/perplexity",
        "experiments": [lines[0].info.experiment_id],
        "plot_metric_keys": ["compare/perplexity"],
    }
    query = "&".join(f"{name}={quote(json.dumps(value))}" for name, value in given.items())
    return f"{server}/#/metric?{query}&x_axis=step&show_point=true"


def take_lines(browser: Chrome, server: str) -> None:
    """Save MLflow's chart of the comparison's lines."""
    browser.set_window_size(1500, 800)
    browser.get(lines_address(server))
    wait_for(browser, "Completed Runs")
    wait_for(browser, "(step=")
    close_assistant(browser)
    time.sleep(2)
    browser.save_screenshot(str(IMAGES / "arms_mlflow.png"))


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ui", metavar="ADDRESS", help="what cbtm ui prints")
    parser.add_argument("--report", type=Path, metavar="FILE", help="report.html of the demo")
    parser.add_argument("--arms", type=Path, metavar="FILE", help="comparison.html of make compare")
    parser.add_argument("--server", metavar="ADDRESS", help="the MLflow server that has it")
    return parser.parse_args()


def main() -> None:
    """Open a browser and take the pictures that are asked for."""
    args = parse()
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        flags = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1500,1000")
        for flag in (*flags, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            if args.report is not None:
                take_page(browser, args.report, "report.png", 1385)
            if args.arms is not None:
                take_page(browser, args.arms, "arms.png", 740)
            if args.server is not None:
                take_lines(browser, args.server)
            if args.ui is not None:
                browser.set_window_size(1500, 1000)
                take(browser, args.ui)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
