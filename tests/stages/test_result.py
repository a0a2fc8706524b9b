"""What the last stage makes of domains, experts and documents, for result.json and for the tracker."""

import json

import pytest

from cbtm.corpus import Document
from cbtm.errors import ManifestError
from cbtm.stages.held_out import answer_bytes
from cbtm.stages.result import domain_entries, expert_entry, read_domains, tokens_seen
from cbtm.stages.result_tracking import cluster_figures, domain_table
from cbtm.tokens import DocumentRecord
from cbtm.train.member import Member


def described():
    def domain(cluster):
        return {
            "cluster": cluster, "fit_documents": 5, "nearest_documents": 4, "top_terms": ["a", "b"], "radius": 0.5,
            "position": [0.0, 0.0], "neighbours": [{"cluster": 1 - cluster, "distance": 1.0}],
            "labels": [{"label": "law", "share": 0.75}], "examples": [], "borderline": [],
        }  # fmt: skip

    even = {"smallest": 5, "largest": 5, "ratio": 1.0}
    return {"format": 2, "domains": [domain(0), domain(1)], "balance": {"fit": even, "nearest": even}}


COUNTS = [{"documents": 30, "tokens": 1000, "bytes": 1}, {"documents": 10, "tokens": 3000, "bytes": 1}]


def test_sizes_are_those_of_the_assignment():
    entries, balance = domain_entries(described(), COUNTS)
    assert [(one["documents"], one["tokens"], one["fit_documents"]) for one in entries] == [
        (30, 1000, 5),
        (10, 3000, 5),
    ]
    assert [(one["share_documents"], one["share_tokens"]) for one in entries] == [(0.75, 0.25), (0.25, 0.75)]
    assert balance == {
        "documents": {"smallest": 10, "largest": 30, "ratio": 3.0},
        "tokens": {"smallest": 1000, "largest": 3000, "ratio": 3.0},
        "fit": {"smallest": 5, "largest": 5, "ratio": 1.0},
    }


def test_table_of_domains_has_the_layout_of_mlflow_tables(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = domain_table(domain_entries(described(), COUNTS)[0])
    (tmp_path / "table.json").write_text(json.dumps(table), encoding="utf-8")
    read = pandas.read_json(tmp_path / "table.json", orient="split")  # as mlflow.load_table does
    assert read["tokens"].tolist() == [1000, 3000]
    assert read["top_terms"].tolist() == ["a, b", "a, b"]
    assert read["neighbours"].astype(str).tolist() == ["1", "0"]
    assert read["labels"].tolist() == ["law 0.75", "law 0.75"]


def test_entry_of_an_expert_has_the_facts_of_its_own_cluster():
    domain = domain_entries(described(), COUNTS)[0][1]
    facts = {"tokens_seen": 480, "steps": 5, "kind": "expert"}
    assert expert_entry({"cluster": 1, "perplexity": 9.5}, domain, facts) == {
        "cluster": 1, "perplexity": 9.5, "documents": 10, "tokens": 3000, "top_terms": ["a", "b"],
        "tokens_seen": 480, "steps": 5,
    }  # fmt: skip


def test_tokens_seen_are_summed_over_the_members_that_there_are():
    seen = {Member("expert", 1): 300, Member("expert", 3): 200, Member("dense"): 1000}
    facts = {member: {"tokens_seen": tokens} for member, tokens in seen.items()}
    assert tokens_seen(facts) == {"dense": 1000, "experts": 500, "random": None}


def test_bytes_are_those_after_the_prompt():
    # "né: " is five bytes of four characters; "où" is three bytes.
    text = "né: où"
    record = DocumentRecord("d|0", len(text.encode()))
    assert answer_bytes(Document("d|0", text), record) == 8
    assert answer_bytes(Document("d|0", text, prompt=4), record) == 3


def test_unknown_figures_are_left_out_of_the_tracker():
    sizes = {"documents": {"ratio": None}, "tokens": {"ratio": 2.0}}
    facts = {"explained_energy": 0.2, "inertia": 7.5}
    assert cluster_figures({"balance": sizes, "labels": None}, facts) == {
        "cluster/balance_tokens": 2.0,
        "cluster/explained_energy": 0.2,
        "cluster/inertia": 7.5,
    }
    with_labels = cluster_figures({"balance": sizes, "labels": {"nmi": 0.9, "purity": 0.8}}, facts)
    assert (with_labels["cluster/nmi"], with_labels["cluster/purity"]) == (0.9, 0.8)


@pytest.mark.parametrize(("content", "found"), [([], "1"), ({"format": 3}, "3"), ({}, "None")])
def test_a_description_of_another_version_is_refused(content, found, tmp_path):
    path = tmp_path / "domains.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=f"domains.json has format {found}, this cbtm reads 2; fit the clusterer"):
        read_domains(path)
    path.write_text(json.dumps(described()))
    assert read_domains(path) == described()
