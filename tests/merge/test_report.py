"""The report page, its verdict and its terminal table, on results written by hand."""

import copy
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hand_made_result import (
    HOSTILE,
    Page,
    make_curves,
    make_result,
    make_subset,
    svgs,
)

from cbtm.errors import ConfigError, DataError
from cbtm.merge.figures import format_change, format_perplexity, plain_text, smooth_curve
from cbtm.merge.report import headline_rows, render_report, verdict


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(make_result(), make_curves())


def test_result_of_another_format_is_refused():
    with pytest.raises(DataError, match="format 2, this cbtm reads 1"):
        render_report({**make_result(), "format": 2}, {})


def test_page_of_a_subset_says_so_and_speaks_of_the_true_clusters():
    page = render_report(make_subset(), {"dense": [], "cluster-00001": [], "cluster-00003": []})
    text = Page(page).text.replace("\u00a0", " ")
    for fact in (
        "Only 2 of 4 experts were trained (clusters 1, 3), so the comparison with the dense model, which was trained "
        "on all clusters, is not at equal tokens.",
        "Cluster-Branch-Train-Merge with 2 experts",
        "The dense model trains on 1,638,400 tokens; 2 experts train, together, on 819,200, each with 1/4 of the",
        "2 of 4",
        "All experts with equal weights, without routing: 70.0.",
    ):
        assert fact in text, fact
    assert "same number of tokens" not in text
    assert "None" not in text
    # All four domains have a card; those of clusters 1 and 3 have an expert, whose perplexities are 200 and 201.
    assert [text.count(f"Cluster {cluster}\n") for cluster in range(4)] == [1, 1, 1, 1]
    assert text.count("expert alone") == 2 + 1  # and the sentence that explains it
    cards = text.split("Cluster 1\n")[1].split("Cluster 2\n")
    assert "200.0" in cards[0]
    assert "201.0" in cards[1].split("Cluster 3\n")[1]
    levels = ["".join(ElementTree.fromstring(svg).itertext()) for svg in svgs(page)]
    assert "2 (all)" in levels[1]


def test_page_of_a_subset_without_a_dense_model_compares_with_nothing():
    subset = make_subset((2,))
    result = {**subset, "dense": None, "tokens_seen": {**subset["tokens_seen"], "dense": None}}
    for row in result["ensemble"]:
        row["dense_ratio"] = row["dense_ratio_interval"] = None
    for row in result["by_domain"]:
        row["dense"] = None
    text = Page(render_report(result, {})).text
    assert "Only 1 of 4 experts was trained (cluster 2)." in text
    assert "one expert trains on 409,600 of 1,638,400 tokens, with 1/4 of the batch." in text


def test_many_clusters_of_a_subset_are_not_all_named():
    result = {**make_result(64), "n_clusters": 128}
    assert "(clusters 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)" in Page(render_report(result, {})).text


def test_page_says_that_prompts_do_not_count():
    claim = "Every token of every document is scored"
    plain = Page(render_report({**make_result(), "n_prompt_tokens": 0}, {})).text
    assert claim in plain
    text = Page(render_report({**make_result(), "n_prompt_tokens": 1234}, {})).text
    assert claim not in text
    assert "the 1,234 tokens of the prompts are given and do not count." in text


def test_experts_with_different_numbers_of_steps_are_not_said_to_have_the_same():
    result = make_result()
    assert "in the same number of steps" in Page(render_report(result, {})).text
    result["experts"][2]["steps"] = 200
    text = Page(render_report(result, {})).text
    assert "in the same number of steps" not in text
    assert "the 4 experts share them, each with 1/4 of the batch" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345, "12.35"), (46.75, "46.8"), (999.94, "999.9"), (12345.6, "12,346"), (None, "–"), (math.inf, "inf")],
)
def test_perplexity_keeps_the_digits_that_matter(value: float | None, text: str):
    assert format_perplexity(value) == text


def test_change_is_signed_and_rounds_to_no_negative_zero():
    assert [format_change(x) for x in (0.813, 1.2, 0.9999, None)] == [
        "−18.7\u00a0%",
        "+20.0\u00a0%",
        "±0.0\u00a0%",
        "–",
    ]


def test_plain_text_drops_what_breaks_or_reorders_a_line():
    assert plain_text("a\x00b\n\n c\u202ed \ud800e", 20) == "a b cd e"
    assert plain_text("abcdef", 4) == "abc…"
    assert plain_text("می\u200cخواهم", 20) == "می\u200cخواهم"  # the non-joiner is spelling, not formatting


def test_curve_is_averaged_in_bins_and_the_later_of_two_points_counts():
    points = [{"step": s, "train/loss": loss} for s, loss in ((1, 4.0), (2, 9.0), (2, 2.0), (3, 1.0), (4, math.nan))]
    # steps 1, 2, 3 with losses 4, 2, 1: the first bin has two, (1 + 2)/2 and (4 + 2)/2
    assert smooth_curve([*points, {"step": 5}], bins=2) == ([1.5, 3.0], [3.0, 1.0])
    assert smooth_curve([], bins=2) == ([], [])


def test_page_is_well_formed_and_says_the_verdict(page: str):
    parsed = Page(page)
    assert parsed.open == []
    text = parsed.text.replace("\u00a0", " ").replace("\u2060", "")
    assert verdict(make_result()) in text
    for fact in (
        "1,638,400",
        "250.0 M",
        "2 min 05 s",
        "normalised mutual information 0.93",
        "−20.0 %",
        "text of cluster 3",
        "edge of 3",
        "almost as near to 0 (term0, naïve, a_$x$)",
        "By documents the largest domain is 2.5 times the smallest (10 and 4).",
        "By tokens the largest domain is 3.0 times the smallest (3,000 and 1,000).",
        "which placed the centres, hold 250 to 251 each",
        "a distance is off by 21 % on average",
        "labels kind 3 100 %",
        "nearest domains 0 term0, 1 term1, 2 term2",  # naïve is in all of them and tells nothing apart
    ):
        assert fact in text, fact


def test_page_fetches_nothing_and_runs_nothing(page: str):
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(parsed.tags)
    references = [value for name, value in parsed.attributes if name in {"href", "src", "xlink:href", "srcset"}]
    assert references
    assert all(value.startswith("#") for value in references)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_each_figure_is_xml_with_a_label_and_ids_of_its_own(page: str):
    figures = svgs(page)
    assert len(figures) == 7
    ids: list[str] = []
    for svg in figures:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 20
        own = [element.get("id", "") for element in root.iter() if element.get("id")]
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used <= set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_figures_hold_the_numbers_of_the_result(page: str):
    texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in svgs(page)]
    texts, of_domains = texts[:4] + texts[6:], texts[4:6]
    assert "2: term2, naïve, a_$x$, <b>bold, e (10 documents, 1,000 tokens)" in of_domains[0]
    assert "share of the training split, %" in of_domains[1]
    assert "200.0 (bar cut)" in texts[0]  # 200 is more than 2.5 times the median of 60, 50, 55, 40, 41, 42, 200
    assert "4 (all)" in texts[1]
    assert "distance²" in texts[2]
    assert "term0, naïve, a_$x$ · 0" in texts[3]
    assert "experts (4)" in texts[4]


def test_hostile_text_stays_text():
    result = make_result()
    hostile = {"sp_id": HOSTILE, "text": HOSTILE + "\x00\ud800 " + "x" * 1000}
    result["domains"][0]["examples"] = [{**hostile, "distance": 0.1}]
    result["domains"][0]["borderline"] = [{**hostile, "margin": 0.1, "other": 0}]
    result["domains"][0]["labels"] = [{"label": HOSTILE, "share": 1.0}]
    result["domains"][0]["top_terms"] = [HOSTILE, '"><script>', "'&amp;", "\u202eevil"]
    result["run"]["name"] = HOSTILE + "\ud800"
    result["corpus"]["root"] = result["run"]["root"] = HOSTILE
    page = render_report(result, {})
    page.encode("utf-8")
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert HOSTILE in parsed.text
    assert "x" * 301 not in page
    for svg in svgs(page):
        ElementTree.fromstring(svg)


def test_terms_in_any_script_draw_without_a_warning(recwarn: pytest.WarningsRecorder):
    result = make_result()
    result["domains"][1]["top_terms"] = ["语言模型", "יער", "🙂"]
    assert "语言模型" in render_report(result, {})
    assert not recwarn.list


def test_same_data_gives_the_same_bytes_whatever_the_user_configured(page: str):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert render_report(copy.deepcopy(make_result()), make_curves()) == page
        assert dict(matplotlib.rcParams) == before


def test_cost_of_each_model_is_told_and_what_is_not_known_is_not():
    page = render_report(make_result(), make_curves())
    assert "2\u00a0h 02\u00a0min on NVIDIA H100, cpu (x86_64), at a price of 6.08; the 2 models one by one" in page
    # 2.5e18 FLOP are 2,500 PFLOP.
    assert "<td>2,500.000</td><td>34.5 %</td><td>6.08</td>" in page
    assert "<td>0.003</td><td>–</td><td>–</td>" in page


def test_arms_that_were_not_trained_leave_no_row_and_no_claim():
    result = {**make_result(), "dense": None, "random": None, "labels": None}
    for row in result["ensemble"]:
        row["dense_ratio"] = row["dense_ratio_interval"] = None
    for row in result["by_domain"]:
        row["dense"] = row["random"] = row["own_expert"] = None
    result["by_domain"][2] |= {"seed": None, "ensemble": None, "n_documents": 0, "n_tokens": 0}
    rows = headline_rows(result)
    assert [row.name for row in rows][:2] == ["seed model", "ensemble, all 4 experts"]
    assert all(row.change_to_dense is None for row in rows)
    page = render_report(result, {"cluster-00000": []})
    text = Page(page).text
    assert "None" not in text
    assert "Random clusters are the control" not in text
    assert "mutual information" not in text
    # Neither the gain by domain, which needs the dense model, nor training, of which nothing was logged.
    assert len(svgs(page)) == 5


def test_a_result_of_cbtm_0_1_0_renders_without_what_it_lacks():
    result = {**make_result(), "labels": None}
    del result["map"], result["balance"]
    old = {"cluster", "documents", "tokens", "share_documents", "share_tokens", "top_terms", "examples"}
    result["domains"] = [{key: domain[key] for key in old} for domain in result["domains"]]
    page = render_report(result, {})
    text = Page(page).text
    assert "typical document" in text
    for absent in ("borderline", "nearest domains", "By documents", "mutual information", "a distance is off"):
        assert absent not in text
    assert len(svgs(page)) == 5  # no map, no training


def test_an_empty_domain_is_said_and_drawn():
    result = make_result()
    result["domains"][1] |= {"documents": 0, "tokens": 0, "share_documents": 0.0, "share_tokens": 0.0}
    result["balance"]["documents"] = {"smallest": 0, "largest": 10, "ratio": None}
    assert "By documents the largest domain has 10 and the smallest none." in Page(render_report(result, {})).text


@pytest.mark.parametrize("n_clusters", [1, 128])
def test_one_and_many_clusters_render(n_clusters: int):
    page = render_report(make_result(n_clusters), make_curves(n_clusters, steps=2))
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.text.count(f"Cluster {n_clusters - 1}\n") == 1
    assert len(svgs(page)) == (5 if n_clusters == 1 else 7)  # one domain has no map and no sizes to compare
    if n_clusters == 1:
        assert "The one expert reaches perplexity 40.0" in parsed.text.replace("\u00a0", " ")
        assert "1 experts" not in parsed.text
    else:
        assert "The other 104 domains" in parsed.text  # 128 - 24


def test_an_unknown_member_of_curves_is_named():
    with pytest.raises(DataError, match="unknown member 'expert-3' in curves; expected seed, dense, cluster-00000"):
        render_report(make_result(), {"expert-3": []})


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'the report needs {package} .*pip install "cbtm\[report\]"'):
        render_report(make_result(), {})


def test_import_is_light_and_rendering_leaves_pyplot_alone():
    code = (
        "import sys, cbtm.merge.report as report, cbtm.merge.figures as figures\n"
        "assert not {'matplotlib', 'jinja2', 'torch', 'sklearn'} & set(sys.modules)\n"
        "figures.bar_chart([figures.Bar('a', 1.0, None, 'dense')], label='a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
