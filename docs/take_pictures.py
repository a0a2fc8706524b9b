"""Take the pictures of MLflow's pages that the documentation shows.

cbtm ui run.yaml                            # prints the address of the comparison
python docs/take_pictures.py ADDRESS        # writes docs/images/comparison.png and docs/images/top_k.png

Needs Debian's chromium and chromium-driver.
"""

import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    """Open a browser and take the pictures of the run whose comparison is at the address given."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=1500,1000", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            take(browser, sys.argv[1])
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
