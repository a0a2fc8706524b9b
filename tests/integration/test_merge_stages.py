"""Everything that a run makes of its experts: ensembles, averages, few-shot answers; against slow ways to the same."""

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import settings
from transformers import AutoModelForCausalLM

from cbtm import stages
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.corpus import Document
from cbtm.errors import ConfigError, ManifestError
from cbtm.merge.validation_set import selection_documents
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.train.member import Member

TASK = {"name": "kinds", "template": {"text": "Text: {text}", "question": "Kind:"}, "shots": 0, "seeds": [1]}


def run_all(values: dict[str, Any]) -> Run:
    run = Run(parse_config(json.dumps(values)))
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()
    return run


def write_task(folder: Path) -> Path:
    folder.mkdir()
    for name in ("train", "test"):
        lines = [
            {"text": f"def f{i}(x): return {i}" if i % 2 else f"the argument {i} is a name", "label": "ab"[i % 2]}
            for i in range(12)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def values(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("merge")
    base = settings(str(corpus), str(folder / "out"), None)
    return base | {
        "average": {"averages": ["uniform", "weighted", "greedy"]},
        "tasks": [TASK | {"path": str(write_task(folder / "kinds"))}],
    }


@pytest.fixture(scope="module")
def made(values: dict[str, Any]) -> Run:
    return run_all(values)


@pytest.fixture(scope="module")
def result(made: Run) -> dict[str, Any]:
    return made.result()


def digests(run: Run, *folders: str) -> dict[str, str]:
    root = Path(run.config.root)
    found = [path for folder in folders for path in sorted((root / folder).rglob("manifest.json"))]
    assert found
    return {str(path.relative_to(root)): path.read_text() for path in found}


def held_out_documents(run: Run, scratch: Path) -> tuple[list[Document], list[np.ndarray]]:
    """Documents in the order of the scores, and their tokens with the separator."""
    shards, _ = run.validation_documents(scratch)
    there = {document.sp_id: document for document in run.documents("validation")}
    return [there[record.sp_id] for record in shards.records()], list(shards.documents())


def prefix_distances(run: Run, scratch: Path, text: str, ends: list[int]) -> np.ndarray:
    """Distance of text[:end] to the centres, each prefix vectorised anew."""
    clusterer = Clusterer.load(run.fetch(run.cluster_spec(), scratch))
    vectors = clusterer.embedder.transform([text[:end] for end in ends]).astype(np.float64)  # (t, d)
    return np.linalg.norm(vectors[:, np.newaxis] - clusterer.centers[np.newaxis], axis=2)


def log_probs(folder: str, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each token after the first, from full logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


# --- averages ---


def test_uniform_average_is_the_mean_of_the_parameters_and_opens_with_transformers(made):
    models = [
        AutoModelForCausalLM.from_pretrained(made.member_root(member)).state_dict()
        for member in (*made.experts, Member("average", recipe="uniform"))
    ]
    for name, tensor in models[2].items():
        torch.testing.assert_close(tensor, ((models[0][name].double() + models[1][name].double()) / 2).float())


def test_averages_stand_in_the_result_with_what_they_are_made_of(made, result):
    rows = {row["name"]: row for row in result["averages"]}
    assert list(rows) == ["uniform", "weighted", "greedy"]
    assert rows["uniform"]["weights"] == [0.5, 0.5]
    assert rows["weighted"]["weights"] != [0.5, 0.5]
    assert sum(rows["weighted"]["weights"]) == pytest.approx(1)
    assert rows["greedy"]["experts"][0] in (0, 1)
    for name, row in rows.items():
        assert row["perplexity"] > 1
        facts = json.loads(Path(made.member_root(Member("average", recipe=name)), "expert.json").read_text())
        assert (facts["kind"], facts["weights"]) == ("average", row["weights"])


def test_weighted_average_takes_the_mean_routing_weights_of_the_documents_that_choose(made, result, tmp_path):
    tokenizer = TextTokenizer.load(made.fetch(made.tokenizer_spec(), tmp_path))
    documents, _ = held_out_documents(made, tmp_path)
    energies = []
    for document in itertools.compress(documents, selection_documents(len(documents))):
        starts = tokenizer.encode_with_starts(document.text)[1][1:].tolist()
        energies.append(prefix_distances(made, tmp_path, document.text, starts) ** 2)
    weights = np.exp(-np.concatenate(energies) / 0.1)  # the defaults: temperature 0.1, the paper's exponent
    weights /= weights.sum(axis=1, keepdims=True)
    found = next(row for row in result["averages"] if row["name"] == "weighted")["weights"]
    np.testing.assert_allclose(found, weights.mean(axis=0), atol=1e-5)


def test_greedy_soup_is_no_worse_than_its_best_expert_where_it_was_chosen(made):
    facts = json.loads(Path(made.member_root(Member("average", recipe="greedy")), "expert.json").read_text())
    losses = [one["negative_log_prob"] for one in facts["tried"] if one["kept"]]
    assert losses == sorted(losses, reverse=True)
    assert facts["tried"][0]["kept"]
    assert len(facts["tried"]) == 2


# --- ensembles ---


def test_scoring_is_one_pass_of_each_model_whatever_the_number_of_settings(made, result):
    assert result["scoring"]["models"] == 1 + 1 + 2 + 2 + 3  # seed, dense, experts, random, averages
    tokens = result["n_tokens"] + result["selection"]["n_tokens"]
    assert result["scoring"]["tokens_scored"] == 9 * tokens
    scores = digests(made, "scores")
    more = made.config.model_copy(
        update={"evaluate": made.config.evaluate.model_copy(update={"temperatures": (0.01, 0.1, 0.3, 1.0, 3.0)})}
    )
    again = Run(more)
    stages.evaluate(again)
    assert len(again.result()["ensemble"]) == 2 * (2 * 2 * 5) + 2 * 2 + 3
    assert again.result()["scoring"] == result["scoring"]
    assert digests(made, "scores") == scores
    stages.evaluate(made)


def test_nearest_expert_alone_is_scored_where_it_is_nearest_and_gives_the_same(made, result, values, tmp_path):
    sparse = run_all(
        values | {"root": str(tmp_path / "out"), "score": {"threads": 1, "top_k": 1}, "average": {}, "tasks": []}
    )
    found = sparse.result()
    rows = {(row["distance_power"], row["temperature"]): row for row in found["ensemble"]}
    assert {row["ensemble"] for row in found["ensemble"]} == {"clustering"}
    for row in result["ensemble"]:
        if row["ensemble"] == "clustering" and row["top_k"] == 1:
            same = rows[row["distance_power"], row["temperature"]]
            assert same["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert found["scoring"]["top_k"] == 1
    assert 0 < found["scoring"]["compute_share"] < 1
    assert found["scoring"]["tokens_scored"] < result["scoring"]["tokens_scored"]
    assert found["experts"][0]["perplexity"] is None  # no expert was scored on everything


def test_reference_preset_is_the_reference_arithmetic(values, tmp_path):
    # Contexts that every document fits, as those of the reference do.
    training = {"context_length": 1024, "steps": 4, "sequences_per_step": 2, "threads": 1, "learning_rate": 0.01}
    base = {key: value for key, value in values.items() if key not in ("average", "tasks")}
    run = run_all(
        base
        | {
            "root": str(tmp_path / "out"),
            "preset": "reference",
            "seed_model": values["seed_model"] | {"training": training},
            "train": training,
            "evaluate": {"bootstrap_resamples": 100, "ensembles": ["clustering"]},
        }
    )
    assert run.config.score.max_tokens == 2049
    row = next(row for row in run.result()["ensemble"] if row["top_k"] == 2)
    assert (row["temperature"], row["distance_power"]) == (0.1, 4)
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), tmp_path))
    documents, tokens = held_out_documents(run, tmp_path)
    total, count = 0.0, 0
    reported = ~selection_documents(len(documents))
    for document, whole in itertools.compress(zip(documents, tokens, strict=True), reported):
        ids = whole[1:]  # no separator
        starts = tokenizer.encode_with_starts(document.text)[1][1:]
        experts = np.stack([log_probs(made_root, ids) for made_root in map(run.member_root, run.experts)])  # (2, n)
        # Token i is predicted after tokens[:i]; the router sees one token less, and distances are squared twice.
        energy = prefix_distances(run, tmp_path, document.text, starts[: len(ids) - 1].tolist()) ** 4
        weights = np.exp(-energy / 0.1)
        weights /= weights.sum(axis=1, keepdims=True)
        total -= np.log((weights.T * np.exp(experts)).sum(axis=0)).sum()
        count += len(ids) - 1
    assert run.result()["n_tokens"] == count
    assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_preset_refuses_a_value_of_its_own_for_what_it_sets(values):
    with pytest.raises(ConfigError, match=r"preset=reference sets routing.lag=1, but the configuration says 0"):
        parse_config(json.dumps(values | {"preset": "reference", "routing": {"lag": 0}}))


def test_subset_of_the_experts_is_evaluated_without_training_and_shown_beside_all(made, result, values):
    scores = digests(made, "scores", "experts")
    run = Run(parse_config(json.dumps(values | {"evaluate": values["evaluate"] | {"experts": [1]}})))
    stages.evaluate(run)
    found = run.result()
    assert digests(made, "scores", "experts") == scores
    assert (found["experts_evaluated"], found["clusters_trained"]) == ([1], [0, 1])
    for domain, of_all in zip(found["by_domain"], result["by_domain"], strict=True):
        assert domain["ensemble"] == pytest.approx(result["domain_by_expert"]["perplexity"][domain["cluster"]][1])
        assert domain["ensemble_all"] == pytest.approx(of_all["ensemble"])
    report = Path(run.uri("report.html")).read_text()
    assert "The expert of cluster 0 was trained and is left out on purpose" in report
    assert "perplexity is" in report
    assert "with all trained experts: leaving out changes it by" in report
    stages.evaluate(made)


def test_known_domains_of_the_validation_documents_are_reported_by_label(made, values, tmp_path, corpus):
    labels = tmp_path / "labels"
    for path in corpus.rglob("*.jsonl"):
        name = path.relative_to(corpus)
        (labels / name).parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines()
        rows = [{"sp_id": f"{name}|{i}", "domain": "code" if i % 2 else "prose"} for i in range(len(lines))]
        (labels / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_all(values | {"cluster": values["cluster"] | {"labels": str(labels)}})
    rows = run.result()["by_label"]
    assert [row["label"] for row in rows] == ["code", "prose"]
    assert sum(row["n_documents"] for row in rows) == run.result()["n_documents"]
    assert all(row["ensemble"] > 1 and row["dense"] > 1 for row in rows)


def test_most_documents_are_as_many_as_were_asked_for(values, tmp_path):
    run = run_all(
        values
        | {"root": str(tmp_path / "out"), "score": {"threads": 1, "max_documents": 13}, "average": {}, "tasks": []}
    )
    found = run.result()
    assert found["n_documents"] + found["selection"]["n_documents"] == 13


def test_scores_of_another_tokenizer_are_refused(made, values, tmp_path):
    other = run_all(
        values | {"root": str(tmp_path / "out"), "tokenizer": {"vocab_size": 400}, "average": {}, "tasks": []}
    )
    for name in ("log_probs.npy", "offsets.npy", "scores.json", "manifest.json"):
        Path(other.uri("scores", "dense", name)).write_bytes(Path(made.uri("scores", "dense", name)).read_bytes())
    Path(other.uri("manifest.json")).unlink()
    with pytest.raises(ManifestError, match=r"belongs to another configuration or other inputs; run stage score again"):
        stages.evaluate(Run(other.config))


# --- few-shot tasks ---


def test_every_model_and_ensemble_answers_the_tasks(result):
    (task,) = result["tasks"]
    assert (task["name"], task["labels"], task["n_examples"]) == ("kinds", ["a", "b"], 6)
    models = {row["model"] for row in task["rows"]}
    averages = {f"average-{name}" for name in ("uniform", "weighted", "greedy")}
    assert models == {"seed", "dense", "random", "ensemble"} | averages
    assert {row["ensemble"] for row in task["rows"]} == {None, "clustering", "uniform", "prior"}
    assert {row["scoring"] for row in task["rows"]} == {"plain", "pmi"}


def test_accuracy_of_the_dense_model_is_that_of_its_full_logits(made, result, values, tmp_path):
    tokenizer = TextTokenizer.load(made.fetch(made.tokenizer_spec(), tmp_path))
    task = Path(values["tasks"][0]["path"])
    examples = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(examples))
    right = []
    for place in order[1::2]:  # the reported half
        prompt = f"Text: {examples[place]['text']}\nKind:"
        scores = []
        for label in "ab":
            known = tokenizer.encode_with_starts(prompt)[0]
            whole = np.concatenate([known, tokenizer.encode_with_starts(f" {label}")[0][1:]])
            scores.append(log_probs(made.member_root(Member("dense")), whole)[len(known) - 1 :].sum())
        right.append("ab"[int(np.argmax(scores))] == examples[place]["label"])
    row = next(row for row in result["tasks"][0]["rows"] if (row["model"], row["scoring"]) == ("dense", "plain"))
    assert row["accuracy"] == pytest.approx(np.mean(right))


def test_changed_task_is_answered_again_and_nothing_else_is_made(made, values, tmp_path):
    before = digests(made, "scores", "experts", "averages")
    other = write_task(tmp_path / "kinds")
    lines = (other / "test.jsonl").read_text().splitlines()
    (other / "test.jsonl").write_text("\n".join(lines[:8]) + "\n")
    run = run_all(values | {"tasks": [values["tasks"][0] | {"path": str(other)}]})
    assert run.result()["tasks"][0]["n_examples"] == 4
    assert digests(made, "scores", "experts", "averages") == before


def test_a_task_without_files_is_refused_before_any_work(values, tmp_path):
    broken = values | {"root": str(tmp_path / "new"), "tasks": [TASK | {"path": str(tmp_path / "nothing")}]}
    with pytest.raises(ConfigError, match=r"task kinds: .*train.jsonl is not there"):
        stages.plan(Run(parse_config(json.dumps(broken))))


# --- documents ---


def test_figures_of_the_result_are_those_of_its_documents(made, result):
    with open(made.uri("documents.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["sp_id"] for row in rows] == [document.sp_id for document in made.documents("validation")]
    reported = [row for row in rows if row["half"] == "reported"]
    tokens = sum(int(row["tokens"]) for row in reported)
    assert (len(reported), tokens) == (result["n_documents"], result["n_tokens"])
    assert sum(int(row["bytes"]) for row in reported) == result["n_bytes"]

    def perplexity(name: str) -> float:
        return math.exp(sum(float(row[name]) for row in reported) / tokens)

    for name in ("seed", "dense", "random"):
        assert perplexity(name) == pytest.approx(result[name]["perplexity"])
    for row in result["averages"]:
        assert perplexity(f"average-{row['name']}") == pytest.approx(row["perplexity"])
    chosen = [row for row in result["ensemble"] if row["selected"]]
    assert len(chosen) == sum("-top-" in name for name in rows[0])
    for row in chosen:
        assert perplexity(f"{row['ensemble']}-top-{row['top_k']}") == pytest.approx(row["perplexity"])
