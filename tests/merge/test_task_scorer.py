import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch

from cbtm.errors import ConfigError, DataError, ManifestError
from cbtm.merge.scorer import ScoreConfig
from cbtm.merge.task_prompts import SeedPrompts, TaskPrompts
from cbtm.merge.task_scorer import read_scores, score_tasks

VOCAB = 60
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
DROPOUT_FREE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 8}
ARCHITECTURES = {
    "OPT": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
    "Llama": LLAMA,
    "GPT2": {**GPT, **DROPOUT_FREE},
    "GPTNeo": {**NEO, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    "Mistral": {**LLAMA, "sliding_window": 8},
    "Gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 8},  # no plain head
    "GPTJ": {**GPT, **DROPOUT_FREE, "rotary_dim": 4},  # a bias on the head
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},  # positions by ALiBi
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # recurrent: no keys and values
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name="OPT", **changes):
    """A tiny model with random weights, as large as trained ones, so that the shots matter."""
    import transformers

    settings = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, pad_token_id=None, **{**ARCHITECTURES[name], **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def opt():
    return build()


def prompts(answers=((5,), (6, 7), (6, 8, 9), (6, 8)), *, shots=2, lengths=(3, 7, 5, 4, 9, 3), n_prefix=20, name="toy"):
    """Random prompts of two seeds; with the longest answer at most n_prefix + 12 tokens."""
    rng = np.random.default_rng(3)
    draw = lambda length: rng.integers(10, VOCAB, size=length)  # noqa: E731
    seeds = tuple(
        SeedPrompts(
            seed=seed,
            prefix=np.concatenate([[0], draw(n_prefix - seed)]),
            suffixes=tuple(draw(length) for length in lengths),
            prefix_text="",
            suffix_texts=("",) * len(lengths),
        )
        for seed in (1, 2)
    )
    return TaskPrompts(
        name=name,
        shots=shots,
        labels=tuple(str(number) for number in range(len(answers))),
        answers=tuple(np.array(answer) for answer in answers),
        gold=np.zeros(len(lengths), dtype=np.int64),
        seeds=seeds,
        neutral=np.array([0, 11, 12]),
        cut=0,
    )


def score(folder, model, *tasks, prefix=None, context_length=64, progress=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    facts = score_tasks(
        model,
        tasks,
        config=ScoreConfig(**config),
        context_length=context_length,
        facts={"member": "dense"},
        folder=folder,
        prefix_token=prefix,
        progress=progress,
    )
    return [read_scores(folder, task) for task in tasks], facts


def naive(model, context, answers, front=()):
    """Log-probability of all answers' tokens, each from one forward pass over the whole prompt."""
    found = []
    for answer in answers:
        row = torch.tensor([*front, *context.tolist(), *answer.tolist()])[None]
        with torch.no_grad():
            logits = model(input_ids=row[:, :-1].to(model.device), use_cache=False).logits.cpu()
        log_probs = logits.log_softmax(dim=-1)[0]
        found += log_probs[torch.arange(-len(answer), 0), row[0, -len(answer) :]].tolist()
    return np.array(found)


def assert_naive(model, task, scores, front=()):
    for one, rows in zip(task.seeds, scores.log_probs, strict=True):
        for suffix, row in zip(one.suffixes, rows, strict=True):
            expected = naive(model, np.concatenate([one.prefix, suffix]), task.answers, front)
            np.testing.assert_allclose(row, expected, atol=1e-4)
    np.testing.assert_allclose(scores.neutral, naive(model, task.neutral, task.answers, front), atol=1e-4)


# --- against whole prompts ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_whole_prompts(tmp_path, name, caplog):
    model, task = build(name), prompts()
    with caplog.at_level(logging.WARNING, logger="cbtm"):
        (scores,), facts = score(tmp_path, model, task)
    assert scores.log_probs.dtype == np.float32
    assert scores.log_probs.shape == (2, 6, 1 + 2 + 3 + 2)
    assert_naive(model, task, scores)
    # The shots must matter, or a cache that is ignored would not show.
    without = naive(model, task.seeds[0].suffixes[0], task.answers)
    assert np.abs(without - scores.log_probs[0, 0]).max() > 0.01
    recurrent = name == "Mamba"
    assert facts["cached"] == {"toy": not recurrent}
    assert ("every prompt is read whole" in caplog.text) == recurrent


def test_a_cluster_token_stands_in_front_of_shots_and_of_the_neutral_prompt(tmp_path, opt):
    task = prompts()
    (scores,), _ = score(tmp_path, opt, task, prefix=59)
    assert_naive(opt, task, scores, front=[59])
    (without,), _ = score(tmp_path / "without", opt, task)
    assert np.abs(scores.neutral - without.neutral).max() > 0.1


def test_batch_size_does_not_matter(tmp_path, opt):
    task = prompts()
    (one,), facts = score(tmp_path / "a", opt, task, max_batch_tokens=8192)
    for number, size in enumerate((1, 60, 100, 150)):
        (other,), its_facts = score(tmp_path / f"b{number}", opt, task, max_batch_tokens=size)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        np.testing.assert_allclose(one.neutral, other.neutral, atol=1e-5)
        assert its_facts["forward_passes"] > facts["forward_passes"]


def test_answers_of_one_token_have_the_scores_they_have_beside_longer_ones(tmp_path, opt):
    # Three labels of one token: one row for an example. With a fourth of three tokens there is a row of two more.
    (short,), _ = score(tmp_path / "a", opt, prompts(((5,), (6,), (7,))))
    (long,), _ = score(tmp_path / "b", opt, prompts(((5,), (6,), (7,), (8, 9, 5))))
    np.testing.assert_allclose(short.log_probs, long.log_probs[..., :3], atol=1e-5)
    np.testing.assert_allclose(short.neutral, long.neutral[:3], atol=1e-5)
    for column, answer in enumerate(((5,), (6,), (7,))):  # each label with a row to itself
        (alone,), _ = score(tmp_path / f"c{column}", opt, prompts((answer,)))
        np.testing.assert_allclose(short.log_probs[..., column], alone.log_probs[..., 0], atol=1e-5)


def test_without_shots_there_is_no_cache(tmp_path, opt):
    task = prompts(shots=0, n_prefix=2)
    (scores,), facts = score(tmp_path, opt, task)
    assert facts["cached"] == {"toy": False}
    assert_naive(opt, task, scores)


def test_several_tasks_are_kept_apart(tmp_path, opt):
    tasks = [prompts(name="one"), prompts(((5,), (6,)), name="two", lengths=(4, 4, 4, 4))]
    both, facts = score(tmp_path / "both", opt, *tasks)
    assert facts["tasks"] == {task.name: task.digest for task in tasks}
    for number, task in enumerate(tasks):
        (alone,), _ = score(tmp_path / task.name, opt, task)
        np.testing.assert_array_equal(both[number].log_probs, alone.log_probs)


# --- a cache that does not hold ---


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_cache_that_is_ignored_is_found_and_not_used(tmp_path, caplog, scale):
    model, task = build(), prompts()
    with torch.no_grad():  # scale: also where the shots change the answers by less than a thousandth of a nat
        model.get_output_embeddings().weight.mul_(scale)
    expected, _ = score(tmp_path / "a", model, task)
    model.model.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "past_key_values": None}), with_kwargs=True
    )
    with caplog.at_level(logging.WARNING, logger="cbtm"):
        found, facts = score(tmp_path / "b", model, task)
    assert facts["cached"] == {"toy": False}
    assert "OPTForCausalLM answers otherwise through its cache, by" in caplog.text
    np.testing.assert_allclose(found[0].log_probs, expected[0].log_probs, atol=1e-5)


# --- what it costs ---


def test_tokens_fed_by_hand(tmp_path, opt):
    # One token each: a row is the example alone. Seed 1 has 1 + 19 tokens of prefix, seed 2 has 1 + 18.
    task = prompts(((5,), (6,)), lengths=(4, 4, 4, 4))
    _, facts = score(tmp_path, opt, task, max_batch_tokens=50)
    # Two rows of 20 + 4 or 19 + 4 a batch: two batches of 2 x 4 a seed, after its prefix.
    seeds = (20 + 2 * 8) + (19 + 2 * 8)
    # Neutral prompt: separator and two. Probe: two rows whole, without shots, and through the cache.
    neutral, probe = 3, 2 * (20 + 4) + 2 * 4 + (20 + 2 * 4)
    assert facts["tokens_fed"] == seeds + neutral + probe
    assert facts["forward_passes"] == 2 * (1 + 2) + 1 + 4


def test_labels_share_rows(tmp_path, opt):
    lengths = (4, 4, 4, 4)

    def fed(*answers):
        return score(tmp_path, opt, prompts(answers, lengths=lengths, n_prefix=4))[1]["tokens_fed"]

    one = fed((5,), (6,))
    assert fed((5,), (6,), (7,), (8,)) == one
    # (6, 7) needs 6 fed after the example; 5, 6 and (6, 8) are read off the same row, (9, 8) needs another.
    two = fed((6, 7))
    assert fed((5,), (6,), (6, 7), (6, 8)) == two > one
    assert fed((6, 7), (9, 8)) > two


def test_facts_are_returned_and_written(tmp_path, opt):
    seen = []
    _, facts = score(tmp_path, opt, prompts(), progress=lambda done, total: seen.append((done, total)))
    assert json.loads((tmp_path / "tasks.json").read_text()) == facts
    assert facts["member"] == "dense"
    assert seen == [(6, 12), (12, 12)]
    assert all(a <= b for a, b in pairwise(seen))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tasks.json", "toy.neutral.npy", "toy.npy"]


# --- errors ---


def test_prompts_longer_than_the_context_are_refused(tmp_path, opt):
    task = prompts()
    assert task.longest == 20 + 9 + 3
    score(tmp_path, opt, task, context_length=32)
    score(tmp_path, opt, task, context_length=33, prefix=59)
    with pytest.raises(ConfigError, match="task toy: a prompt with its answer has 32 tokens, more than context_len"):
        score(tmp_path, opt, task, context_length=31)
    with pytest.raises(ConfigError, match="has 32 tokens, the cluster token not counted, more than context_length=32"):
        score(tmp_path, opt, task, context_length=32, prefix=59)


def test_broken_weights_are_an_error_that_counts_the_scores(tmp_path):
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(DataError, match="task toy: 96 of 96 scores are NaN: the model's weights are broken"):
        score(tmp_path, model, prompts())
    assert not (tmp_path / "tasks.json").exists()


def test_scores_of_other_prompts_are_refused(tmp_path, opt):
    score(tmp_path, opt, prompts())
    with pytest.raises(ManifestError, match=r"the scores of task toy in .* are of other prompts than those made now"):
        read_scores(tmp_path, prompts(lengths=(3, 7, 5, 4, 9, 4)))
    with pytest.raises(ManifestError, match=r"holds no scores of task other: .*; score the tasks again"):
        read_scores(tmp_path, prompts(name="other"))
