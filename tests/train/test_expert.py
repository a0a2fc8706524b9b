"""One member of a run: what a job leaves in its folder."""

import json

import numpy as np
import pytest
import torch
from tiny_training import CONTEXT, SETTINGS, make_job, train_here, write_run

from cbtm.branch.cluster_tokens import extend_vocabulary
from cbtm.branch.seed import load_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ManifestError
from cbtm.train.cost import flops_per_token
from cbtm.train.data import IGNORED, BlockOrder
from cbtm.train.expert import train_expert
from cbtm.train.job import TrainJob


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("llama"), "llama")


def order_of(job, prefix=None):
    config = job.config
    return BlockOrder(
        job.documents(),
        context_length=CONTEXT,
        seed=config.random_state,
        packing=config.packing,
        prefix_token=prefix,
    )


def test_member_is_a_model_folder_with_its_facts_and_curve(source, tmp_path):
    job = make_job(source, tmp_path, price_per_hour=2.0, validate_every=None)
    trained = train_here(job)
    order = order_of(job)
    learned = sum(order.batch(4 * step, 4).n_targets for step in range(8))
    cost = trained.facts.pop("cost")
    assert trained.facts == {
        "format": 1,
        "member": "cluster-00001",
        "kind": "expert",
        "cluster": 1,
        "clusterer_digest": "c",
        "tokenizer_digest": "t",
        "seed_digest": "s",
        "documents": 60,
        "corpus_tokens": order.documents.n_tokens,
        "tokens_seen": learned,
        "epochs": round(32 / order.n_blocks, 4),
        "steps": 8,
        "sequences_per_step": 4,
        "final_loss": trained.curve[-1]["train/loss"],
    }
    # All 8 steps of 4 sequences of 8 tokens were computed, whatever was padding.
    assert cost["tokens"] == 256 > learned
    assert cost["flops"] == 256 * flops_per_token(load_model(source / "start"), CONTEXT)
    assert cost["price"] == pytest.approx(2.0 * cost["seconds"] / 3600, abs=1e-6)
    assert [point["step"] for point in trained.curve] == [3, 6, 8]
    assert {path.name for path in job.output.iterdir()} == {
        *(path.name for path in (source / "start").iterdir()),
        *("expert.json", "training.jsonl", "tokenizer.json", "tokenizer_config.json", "losses.jsonl"),
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (job.output / name).read_bytes() == (source / "tokenizer" / name).read_bytes()
    opened = load_model(job.output).state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in trained.weights.items())
    start = load_model(source / "start").state_dict()
    assert not torch.equal(opened["lm_head.weight"], start["lm_head.weight"])


def test_facts_are_returned_and_the_curve_is_reported(source, tmp_path):
    job, reported = make_job(source, tmp_path), []
    facts = train_expert(job, report=lambda metrics, step: reported.append((step, dict(metrics))))
    assert json.loads((job.output / "expert.json").read_text()) == facts
    curve = [json.loads(line) for line in (job.output / "training.jsonl").read_text().splitlines()]
    merged = {}
    for step, metrics in reported:
        merged.setdefault(step, {"step": float(step)}).update(metrics)
    assert list(merged.values()) == curve


@pytest.mark.parametrize("member", ["dense", "cluster-00001"])
def test_last_validation_stands_among_the_facts(source, tmp_path, member):
    trained = train_here(make_job(source, tmp_path, member=member))
    found = trained.facts["validation"]
    assert found == {name: trained.curve[-1][name] for name in ("validation/own_loss", "validation/all_loss")}
    # The dense model's own domain is all.
    assert (found["validation/own_loss"] == found["validation/all_loss"]) == (member == "dense")


def test_validation_looks_only_at_the_documents_that_it_may(source, tmp_path):
    # By hand: of 60 documents the first 30 may be used, of which each third is of cluster 1.
    job = make_job(source, tmp_path, validation_sequences=1000)
    trained = train_here(job)
    model, nats = load_model(job.output), {"own": [], "all": []}
    for number, row in enumerate(list(job.documents().documents())[:30]):
        for begin in range(0, len(row) - 1, CONTEXT):
            tokens = torch.from_numpy(row[begin : begin + CONTEXT + 1])
            with torch.no_grad():
                log_probs = model(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(dim=-1)
            values = (-log_probs[torch.arange(len(tokens) - 1), tokens[1:]]).tolist()
            nats["all"] += values
            nats["own"] += values if number % 3 == 1 else []
    assert trained.facts["validation"] == pytest.approx(
        {f"validation/{name}_loss": float(np.mean(values)) for name, values in nats.items()}, rel=1e-5
    )


def test_dropout_of_the_job_takes_the_place_of_the_start_models(source, tmp_path):
    runs = {rate: train_here(make_job(source, tmp_path / str(rate), dropout=rate)) for rate in (None, 0.0, 0.3)}
    assert runs[None].losses == runs[0.0].losses != runs[0.3].losses
    settings = {rate: json.loads((one.folder / "config.json").read_text()) for rate, one in runs.items()}
    assert {rate: one["dropout"] for rate, one in settings.items()} == {None: 0.0, 0.0: 0.0, 0.3: 0.3}


@pytest.mark.parametrize(("kept", "left"), [(1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_as_many_checkpoints_stay_as_were_asked_for(source, tmp_path, kept, left):
    train_here(make_job(source, tmp_path, checkpoint_every=2, checkpoints_kept=kept))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in left]


def test_job_that_is_run_again_goes_on_from_its_last_checkpoint_to_the_same_folder(source, tmp_path):
    job = make_job(source, tmp_path, checkpoint_every=3)
    first = train_here(job)
    (job.output / "losses.jsonl").unlink()
    again = train_here(job)
    assert again.losses == {step: first.losses[step] for step in (7, 8)}
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in first.weights.items())
    assert again.facts["tokens_seen"] == first.facts["tokens_seen"]


def test_checkpoint_says_what_it_is_of(source, tmp_path):
    job = make_job(source, tmp_path)
    train_here(job)
    folder = tmp_path / "checkpoints/step-00000004"
    assert json.loads((folder / "expert.json").read_text()) == {
        "format": 1,
        "member": "cluster-00001",
        "kind": "expert",
        "cluster": 1,
        "clusterer_digest": "c",
        "tokenizer_digest": "t",
        "seed_digest": "s",
    }
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "start/config.json").read_text())
    assert TextTokenizer.load(folder).vocab_size == TextTokenizer.load(source / "tokenizer").vocab_size


# --- cluster tokens ---


@pytest.mark.parametrize(("member", "kind"), [("cluster-00001", "expert"), ("random-00001", "random")])
def test_cluster_token_stands_in_front_of_each_block(untied, tmp_path, member, kind):
    job = make_job(untied, tmp_path, member=member, cluster_tokens=3, weight_decay=0.0)
    trained = train_here(job)
    assert (trained.facts["kind"], trained.facts["cluster_token"]) == (kind, "<|cluster-1|>")
    first = TextTokenizer.load(untied / "tokenizer").vocab_size
    start = load_model(untied / "start")
    extend_vocabulary(start, 3, first_id=first)
    batch = order_of(job, prefix=first + 1).batch(0, 4)
    assert (batch.inputs[:, 0] == first + 1).all()
    with torch.no_grad():
        logits = start(input_ids=torch.from_numpy(batch.inputs)).logits
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, first + 3), torch.from_numpy(batch.targets).reshape(-1), ignore_index=IGNORED
    )
    assert trained.losses[1] == pytest.approx(expected.item(), rel=1e-6)
    # Of the three new embeddings only that of the own cluster is ever fed.
    rows = trained.weights["model.embed_tokens.weight"][first:]
    before = start.get_input_embeddings().weight.detach()[first:]
    assert rows.shape == (3, 16)
    assert [torch.equal(row, old) for row, old in zip(rows, before, strict=True)] == [True, False, True]


def test_folder_with_cluster_tokens_is_opened_by_transformers(source, tmp_path):
    from transformers import AutoTokenizer

    job = make_job(source, tmp_path, cluster_tokens=3)
    trained = train_here(job)
    first = TextTokenizer.load(source / "tokenizer").vocab_size
    tokenizer = AutoTokenizer.from_pretrained(str(job.output), local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["<|cluster-0|>", "<|cluster-1|>", "<|cluster-2|>"]) == [
        first,
        first + 1,
        first + 2,
    ]
    model = load_model(job.output)
    assert model.config.vocab_size == first + 3
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in trained.weights
    # So does a checkpoint, which is of the grown model.
    settings = json.loads((tmp_path / "checkpoints/step-00000004/config.json").read_text())
    assert settings["vocab_size"] == first + 3
    assert TextTokenizer.load(tmp_path / "checkpoints/step-00000004").vocab_size == first + 3


def test_validation_has_the_cluster_token_in_front_too(source, tmp_path):
    job = make_job(source, tmp_path, cluster_tokens=3, validation_sequences=1000)
    trained = train_here(job)
    first, model, nats = TextTokenizer.load(source / "tokenizer").vocab_size, load_model(job.output), []
    for row in list(job.documents().documents())[:30]:
        for begin in range(0, len(row) - 1, CONTEXT - 1):
            tokens = torch.tensor([first + 1, *row[begin : begin + CONTEXT].tolist()])
            with torch.no_grad():
                log_probs = model(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(dim=-1)
            nats += (-log_probs[torch.arange(1, len(tokens) - 1), tokens[2:]]).tolist()
    assert trained.facts["validation"]["validation/all_loss"] == pytest.approx(float(np.mean(nats)), rel=1e-5)


@pytest.mark.parametrize("member", ["seed", "dense"])
def test_model_of_all_clusters_has_no_cluster_token(source, tmp_path, member):
    trained = train_here(make_job(source, tmp_path, member=member, cluster_tokens=3))
    plain = train_here(make_job(source, tmp_path / "plain", member=member))
    assert trained.losses == plain.losses
    assert "cluster_token" not in trained.facts
    assert load_model(trained.folder).config.vocab_size == TextTokenizer.load(source / "tokenizer").vocab_size


# --- jobs ---


def test_job_is_read_as_it_was_written(source, tmp_path):
    job = make_job(source, tmp_path, cluster_tokens=3, dropout=0.1)
    job.save(tmp_path / "job.json")
    assert TrainJob.load(tmp_path / "job.json") == job
    assert job.cluster == 1
    assert job.config.steps == SETTINGS["steps"]


@pytest.mark.parametrize("content", [None, "{", '{"member": "dense"}'])
def test_file_that_is_no_job_is_named(tmp_path, content):
    path = tmp_path / "job.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ManifestError, match=f"{path} is no training job: "):
        TrainJob.load(path)
