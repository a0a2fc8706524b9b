"""The report page, its verdict and its terminal table, on results written by hand."""

import copy
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from cbtm.errors import ConfigError, DataError
from cbtm.merge.figures import format_change, format_perplexity, plain_text, smooth_curve
from cbtm.merge.report import HeadlineRow, format_table, headline_rows, render_report, verdict

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>"


def arm(perplexity: float) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity) / 4,  # four bytes a token
        "interval": [perplexity * 0.98, perplexity * 1.02],
    }


def ensemble_row(top_k: int, temperature: float, perplexity: float, *, selected: bool, dense: float) -> dict[str, Any]:
    ratio = perplexity / dense
    return {
        "ensemble": "clustering", "distance_power": 2.0, "temperature": temperature, "top_k": top_k,
        **arm(perplexity), "selected": selected, "selection_perplexity": perplexity + 1, "experts_used": float(top_k),
        "dense_ratio": ratio, "dense_ratio_interval": [ratio - 0.01, ratio + 0.01],
    }  # fmt: skip


def make_result(n_clusters: int = 4, dense: float = 50.0, best: float = 40.0) -> dict[str, Any]:
    """All experts reach `best`; each halving of top_k costs 1. The unselected temperature is better by 5."""
    rows, top_k, perplexity = [], n_clusters, best
    while top_k:
        rows.append(ensemble_row(top_k, 0.1, perplexity, selected=True, dense=dense))
        rows.append(ensemble_row(top_k, 1.0, perplexity - 5, selected=False, dense=dense))
        top_k, perplexity = top_k // 2, perplexity + 1
    uniform = {**rows[0], **arm(70.0), "ensemble": "uniform", "distance_power": None, "temperature": None}
    rows.append({**uniform, "top_k": n_clusters, "selected": False, "dense_ratio": 70.0 / dense})
    clusters = range(n_clusters)
    share = 1 / n_clusters
    return {
        "format": 1,
        "run": {
            "name": "by hand", "root": "runs/by-hand", "created": "2025-01-02T03:04:05+00:00",
            "cbtm_version": "0.1.0", "seconds": {"fit": 2.5, "train": 125.0},
            "cost": [
                {"member": "dense", "device": "NVIDIA H100", "seconds": 7300.0, "tokens_per_second": 45000.0,
                 "flops": 2.5e18, "utilisation": 0.345, "price": 6.08, "devices": 8, "tokens": 328_500_000},
                {"member": "cluster-00000", "device": "cpu (x86_64)", "seconds": 61.0, "tokens_per_second": 900.0,
                 "flops": 3e12, "utilisation": None, "price": None, "devices": 1, "tokens": 54_900},
            ],
        },
        "corpus": {
            "root": "corpora/c8", "train_split": "train", "validation_split": "valid", "train_documents": 1000,
            "train_tokens": 250_000_000, "validation_documents": 800, "validation_tokens": 200_000, "digest": "ab" * 32,
        },
        "n_clusters": n_clusters, "tokens_per_arm": 1_638_400, "steps": 400,
        "n_documents": 400, "n_tokens": 100_000, "n_bytes": 400_000,
        "selection": {"n_documents": 400, "n_tokens": 100_000},
        "seed": arm(60.0), "dense": arm(dense), "random": arm(55.0),
        "best_single_expert": {"cluster": 0, **arm(200.0)},
        "ensemble": rows,
        "experts": [
            {"cluster": c, "perplexity": 200.0 + c, "documents": 9, "tokens": 99, "top_terms": ["a"]} for c in clusters
        ],
        "domains": [
            {
                "cluster": c, "documents": 10, "tokens": 1000, "share_documents": share, "share_tokens": share,
                "top_terms": [f"term{c}", "naïve", "a_$x$", "<b>bold", *"efghij"],
                "fit_documents": 10, "nearest_documents": 10, "radius": 0.5,
                "position": [math.cos(c), math.sin(c)],
                "neighbours": [{"cluster": other, "distance": 0.5} for other in clusters if other != c][:3],
                "labels": [{"label": f"kind {c}", "share": 0.996}, {"label": "other", "share": 0.004}],
                "examples": [{"sp_id": f"train/a.jsonl|{c}", "text": f"text of cluster {c}", "distance": 0.1}],
                "borderline": [
                    {"sp_id": f"train/b.jsonl|{c}", "text": f"edge of {c}", "margin": 0.01, "other": 0}
                ] if c else [],
            }
            for c in clusters
        ],
        "by_domain": [
            {
                "cluster": c, "n_documents": 5, "n_tokens": 500, "seed": 60.0, "dense": dense, "random": 55.0,
                "ensemble": best + c, "own_expert": best + c + 1,
            }
            for c in clusters
        ],
        "map": {"method": "stress majorisation", "distance_error": 0.21},
        "balance": {
            "documents": {"smallest": 4, "largest": 10, "ratio": 2.5},
            "tokens": {"smallest": 1000, "largest": 3000, "ratio": 3.0},
            "fit": {"smallest": 250, "largest": 251, "ratio": 1.004},
        },
        "labels": {
            "n_labelled": 1000, "n_labels": 8, "nmi": 0.93, "purity": 0.97, "nearest": {"nmi": 0.91, "purity": 0.96},
        },
    }  # fmt: skip


def make_subset(clusters: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
    """A run of four clusters of which only some got an expert, which saw its share of the tokens and no more."""
    result, few = make_result(4), make_result(len(clusters))
    kept = {key: few[key] for key in ("ensemble", "experts")}
    for row, cluster in zip(kept["experts"], clusters, strict=True):
        row |= {"cluster": cluster, "tokens_seen": 409_600, "steps": 400}
    for row in result["by_domain"]:
        if row["cluster"] not in clusters:
            row["own_expert"] = None
    seen = 409_600 * len(clusters)
    return {
        **result,
        **kept,
        "clusters_trained": list(clusters),
        "best_single_expert": {"cluster": clusters[-1], **arm(200.0)},
        "tokens_seen": {"dense": 1_638_400, "experts": seen, "random": seen},
    }


def make_curves(n_clusters: int = 4, steps: int = 12) -> dict[str, list[dict[str, float]]]:
    def curve(start: float) -> list[dict[str, float]]:
        return [
            {"step": s, "train/loss": start - 0.1 * s, "train/learning_rate": 1e-3, "train/tokens_per_second": 9600.0}
            for s in range(1, steps + 1)
        ]

    members = [f"{kind}-{c:05}" for kind in ("cluster", "random") for c in range(n_clusters)]
    return {"seed": curve(8.0), "dense": curve(4.0), **{member: curve(4.0) for member in members}}


class Page(HTMLParser):
    """What a browser would act on: the tags, their attributes, and the text between them."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(make_result(), make_curves())


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_headline_has_the_arms_in_order_with_their_change_to_dense():
    rows = headline_rows(make_result())
    assert [(row.name, row.perplexity) for row in rows] == [
        ("seed model", 60.0),
        ("dense model", 50.0),
        ("random clusters", 55.0),
        ("ensemble, all 4 experts", 40.0),
        ("ensemble, top-2", 41.0),
        ("ensemble, top-1", 42.0),
        ("best single expert, cluster 0", 200.0),
    ]
    # 60/50 - 1, the dense model itself, 55/50 - 1, 40/50 - 1, 41/50 - 1, 42/50 - 1, 200/50 - 1
    assert [row.change_to_dense for row in rows] == [
        None if x is None else pytest.approx(x) for x in (0.2, None, 0.1, -0.2, -0.18, -0.16, 3.0)
    ]
    assert rows[1].interval == (49.0, 51.0)


def test_a_better_row_that_was_not_selected_is_not_reported():
    # At T = 1 every top_k is 5 better on the reported half, but T = 0.1 was chosen on the other half.
    assert min(row.perplexity for row in headline_rows(make_result())) == 40.0


def test_two_selected_rows_of_one_top_k_are_refused():
    result = make_result()
    result["ensemble"][1]["selected"] = True
    with pytest.raises(DataError, match="two ensembles with top_k=4 are selected"):
        headline_rows(result)


def test_result_of_another_format_is_refused():
    with pytest.raises(DataError, match="format 2, this cbtm reads 1"):
        render_report({**make_result(), "format": 2}, {})


def test_verdict_of_a_win():
    # 40/50 = 0.80, interval of the ratio 0.79 to 0.81
    assert verdict(make_result(best=40.0)) == (
        "The ensemble of 4 experts reaches perplexity 40.0, 20.0 % below the dense model at equal training tokens "
        "(95 % interval 19.0–21.0 %)."
    )


def test_verdict_of_a_loss():
    # 55/50 = 1.10, interval of the ratio 1.09 to 1.11
    assert verdict(make_result(best=55.0)) == (
        "The ensemble of 4 experts reaches perplexity 55.0, 10.0 % above the dense model at equal training tokens "
        "(95 % interval 9.0–11.0 %): on this corpus the dense model is the better one."
    )


def test_verdict_is_undecided_when_the_interval_includes_0():
    # 49.75/50 = 0.995, interval of the ratio 0.985 to 1.005
    assert verdict(make_result(best=49.75)) == (
        "The ensemble of 4 experts (perplexity 49.8) and the dense model (50.0) cannot be told apart at equal training "
        "tokens: the difference of −0.5 % has a 95 % interval of −1.5 % to +0.5 %, which includes 0."
    )


def test_verdict_without_a_dense_model_claims_nothing():
    result = {**make_result(), "dense": None}
    assert verdict(result) == (
        "The ensemble of 4 experts reaches perplexity 40.0; "
        "no dense model was trained at equal tokens to compare it with."
    )


def test_verdict_without_interval_says_so_and_without_ensemble_too():
    result = make_result()
    result["ensemble"][0]["dense_ratio_interval"] = None
    assert verdict(result).endswith("at equal training tokens; no interval was computed.")
    assert verdict({**result, "ensemble": []}) == "No ensemble of the experts was evaluated."


def test_verdict_names_the_top_k_when_all_experts_were_not_evaluated():
    result = make_result()
    result["ensemble"] = [row for row in result["ensemble"] if row["top_k"] == 2]
    assert verdict(result).startswith("The top-2 ensemble of 4 experts reaches perplexity 41.0, 18.0 % below")


def test_verdict_on_a_subset_says_how_many_tokens_its_experts_saw():
    # 2 of 4 experts with 409,600 tokens each, the dense model with 1,638,400.
    assert verdict(make_subset()) == (
        "The ensemble of 2 experts reaches perplexity 40.0, 20.0 % below the dense model on 50 % of its training "
        "tokens (95 % interval 19.0–21.0 %)."
    )
    assert verdict(make_subset((2,))).startswith("The one expert reaches perplexity 40.0, 20.0 % below the dense model")
    whole = {**make_result(), "tokens_seen": {"dense": 1_638_400, "experts": 1_638_000, "random": None}}
    assert verdict(whole) == verdict(make_result())  # rounded steps


def test_headline_of_a_subset_counts_the_experts_that_there_are():
    names = [row.name for row in headline_rows(make_subset())]
    assert names[3:] == ["ensemble, all 2 experts", "ensemble, top-1", "best single expert, cluster 3"]


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


def test_table_aligns_and_is_ascii():
    rows = [
        HeadlineRow("dense model", 50.0, 1.411, (49.0, 51.0), None),
        HeadlineRow("ensemble, top-1", 1234.5, 2.5675, None, 23.69),
    ]
    assert format_table(rows).splitlines() == [
        "                 perplexity  bits/byte  95 % interval   vs dense",
        "dense model            50.0      1.411   49.0 to 51.0          -",
        "ensemble, top-1       1,234      2.567              -  +2369.0 %",
    ]
    assert format_table(headline_rows(make_result())).isascii()


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
