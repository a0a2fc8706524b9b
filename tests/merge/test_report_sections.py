"""The whole page of a result with every section, of infinite perplexities, and of a subset of experts on purpose."""

from xml.etree import ElementTree

import pytest
from hand_made_result import HOSTILE, Page, leave_out, make_full_result, make_infinite, svgs

from cbtm.merge.report import render_report

HEADINGS = ("Every kind of ensemble", "Label by label", "Routing over a document", "Few-shot tasks")


@pytest.fixture(scope="module")
def full_page() -> str:
    return render_report(make_full_result(), {})


def test_each_section_appears_with_its_data_and_not_without(full_page: str):
    new = Page(full_page).text
    assert [heading in new for heading in HEADINGS] == [True] * 4
    # Bars, top-k, temperature, domains, experts by domain, a task, the map and the sizes; no curves.
    assert len(svgs(full_page)) == 8
    result = {
        **make_full_result(),
        "averages": [],
        **dict.fromkeys(("by_label", "routing", "tasks", "domain_by_expert")),
    }
    result["ensemble"] = [row for row in result["ensemble"] if row["ensemble"] == "clustering"]
    del result["scoring"], result["routing_settings"]
    page = render_report(result, {})
    assert [heading in Page(page).text for heading in HEADINGS] == [False] * 4
    assert "Scoring" not in Page(page).text
    assert len(svgs(page)) == 6


def test_full_page_is_well_formed_and_fetches_and_runs_nothing(full_page: str):
    parsed = Page(full_page)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "https://" not in full_page
    assert "<image" not in full_page  # the policy of the page refuses data: as well
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value for name, value in parsed.attributes if name == "aria-labelledby"]
    assert set(named) <= set(ids)
    for svg in svgs(full_page):
        assert len(ElementTree.fromstring(svg).get("aria-label", "")) > 20


def test_full_page_holds_the_numbers_of_the_result(full_page: str):
    text = Page(full_page).words
    for fact in (
        "greedy soup of experts 0, 1 49.0 48.0–50.0",
        "posterior, all 4 38.0 37.2–38.8 −24.0 % −25.0 to −23.0 % 4.0 3.60 0.75 0",  # 38/50 = 0.76, 0.9 FLOPs an expert
        "oracle 37.0 36.3–37.7 −26.0 %",
        "−20.0 % * −36.0 to −4.0 %",  # cluster 0: 40/50 = 0.80, with 0.64 to 0.96
        "−14.0 % −30.0 to +2.0 %",  # cluster 3: 43/50 = 0.86, with 0.70 to 1.02
        "code 7 700 61.0 50.0 48.0–52.0 56.0 33.0 31.0–35.0 −34.0 % * −44.0 to −24.0 %",
        "law 7 700 61.0 50.0 48.0–52.0 56.0 48.5 46.5–50.5 −3.0 % −13.0 to +7.0 %",
        "In 4 of 4 domains that have an expert of their own, it is the best of all experts.",
        "Scoring 6 models took 6 passes over the validation tokens",
        "dense model 62.0 % 59.0–65.0 % 60.0–64.0 % 66.0 %",
    ):
        assert fact in text, fact
    assert "None" not in text


def test_bars_of_averages_have_their_place_and_colour(full_page: str):
    bars = svgs(full_page)[0]
    text = "".join(ElementTree.fromstring(bars).itertext())
    assert (
        text.index("ensemble, top-1") < text.index("uniform average of parameters") < text.index("best single expert")
    )
    assert bars.count("#56b4e9") == 3


def test_infinite_perplexities_are_shown_and_counted_and_crash_nothing():
    result = make_full_result()
    make_infinite(result["ensemble"][0], 12)
    make_infinite(result["random"], 2)
    make_infinite(result["averages"][0], 3)
    for row in result["ensemble"]:
        if row["ensemble"] in ("uniform", "bayes"):
            make_infinite(row, 7)
    result["by_domain"][1] |= {"ensemble": None, "dense_ratio": None, "interval": [40.0, None]}
    result["domain_by_expert"]["perplexity"][2][0] = None
    page = render_report(result, {})
    text = Page(page).words
    for fact in (
        "ensemble, all 4 experts ∞ 12 impossible – ∞ +∞ %",
        "without routing: ∞.",
        "bayes, all 4 ∞ +∞ % 4.0 3.60 0.75 7",
        "As many experts trained on random clusters reach ∞.",
        "models and settings here have such tokens",
    ):
        assert fact in text, fact
    assert "None" not in text
    assert "∞ (3 impossible)" in "".join(ElementTree.fromstring(svgs(page)[0]).itertext())


def test_page_of_a_result_where_everything_is_infinite_renders():
    result = make_full_result()
    for summary in (*result["ensemble"], *result["averages"], result["seed"], result["dense"], result["random"]):
        make_infinite(summary, 1)
    for row in result["by_domain"]:
        row |= dict.fromkeys(
            ("seed", "dense", "random", "ensemble", "own_expert", "dense_ratio", "dense_ratio_interval")
        )
    result["domain_by_expert"]["perplexity"] = [[None] * 4 for _ in range(4)]
    result["best_single_expert"] = None
    page = render_report(result, {})
    assert "gives 1 of 100,000 tokens no probability" in page
    assert len(svgs(page)) == 4  # bars, a task, the map of domains and their sizes


def test_a_subset_on_purpose_is_said_on_the_page():
    result = leave_out(make_full_result(), (1, 3))
    text = Page(render_report(result, {})).words
    assert "The trained experts of clusters 1, 3 are left out on purpose." in text
    assert "The 4 experts trained on random clusters reach 55.0" in text
    assert "with all experts" in text
    assert "ensemble, all 2 experts" in text


def test_full_page_of_128_domains_is_readable_and_of_bounded_size():
    page = render_report(make_full_result(128), {})
    assert Page(page).open == []
    assert len(page) < 2_000_000
    texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in svgs(page)]
    assert "domains, ranked by change" in texts[3]
    assert "expert of cluster" in texts[4]


def test_hostile_text_in_labels_tasks_and_routed_documents_stays_text():
    result = make_full_result()
    result["by_label"][0]["label"] = HOSTILE
    result["tasks"][0] |= {"name": HOSTILE, "labels": [HOSTILE, "'\"&amp;"]}
    result["tasks"][0]["rows"][0]["model"] = HOSTILE
    result["routing"][0] |= {"sp_id": HOSTILE, "pieces": [[HOSTILE + "\x00\ud800\u202e", 0, 0.5]]}
    result["domains"][0]["top_terms"] = [HOSTILE, '"><script>', "\u202eevil"]
    page = render_report(result, {})
    page.encode("utf-8")
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert HOSTILE in parsed.text
    assert "\u202e" not in page
    for svg in svgs(page):
        ElementTree.fromstring(svg)
