import re
import threading

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from cbtm.branch.cluster_tokens import extend_vocabulary
from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError, DataError
from cbtm.merge.ensembles import clustering
from cbtm.merge.generation import MixtureForCausalLM
from cbtm.merge.mixture_cache import MixtureCache
from cbtm.merge.router import PrefixRouter

WORDS = [
    *("abc", "def", "ghi", "jkl", "mno", "pqr", "stu", "vwx", "kalt", "warm", "nord", "süd"),
    *("naïve", "café", "größe", "東京", "😀😀", "ΟΔΟΣ"),
]
POSITIONS, EXPERTS = 64, 3
TEMPERATURE = 1.0


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tokenizer(size):
    rng = np.random.default_rng(0)
    return TextTokenizer.train([" ".join(rng.permutation(WORDS)) for _ in range(40)], size)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(330)


def make_experts(folder, tokenizer, architecture, n=EXPERTS):
    shape = {"hidden_size": 16, "n_layers": 2, "n_heads": 2}
    if architecture == "llama":
        (folder / "llama.json").write_text(
            '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, '
            f'"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": {POSITIONS}}}'
        )
        shape = {"config": str(folder / "llama.json")}
    experts = []
    for seed in range(n):
        config = ScratchModelConfig(**shape, random_state=seed)
        model = create_model(
            config, vocab_size=tokenizer.vocab_size, separator_id=tokenizer.separator_id, context_length=POSITIONS
        )
        with torch.no_grad():  # weights as large as trained ones, so that experts differ and the context matters
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
        experts.append(model)
    return experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer):
    return {kind: make_experts(tmp_path_factory.mktemp(kind), tokenizer, kind) for kind in ("opt", "llama")}


@pytest.fixture(scope="module")
def routing():
    """Vocabulary, with beginnings of words, their vectors, some of which count for much, and centres."""
    rng = np.random.default_rng(3)
    known = sorted({word.lower()[:end] for word in WORDS for end in range(2, len(word) + 1)})
    vectors = (rng.normal(size=(len(known), 2)) * np.exp(rng.normal(size=(len(known), 1)))).astype(np.float32)
    angles = np.arange(EXPERTS) * 2 * np.pi / EXPERTS + 0.1
    return (
        {word: row for row, word in enumerate(known)},
        vectors,
        np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[0.9], [1], [1.1]],
    )


@pytest.fixture(scope="module")
def mixture_of(experts, tokenizer, routing):
    def make(architecture="opt", **settings):
        router = PrefixRouter(*routing)
        return MixtureForCausalLM(
            experts[architecture], router, tokenizer, **{"temperature": TEMPERATURE, "top_k": 2} | settings
        )

    return make


def word_tokens_alone(tokenizer):
    """Setting that leaves all tokens but bytes, so that random models write words."""
    return {"suppress_tokens": list(range(257)), "no_repeat_ngram_size": 1}


def text_of(tokenizer, tokens):
    """Text of tokens, without separators and without a character that is not complete."""
    spelled = tokenizer._tokenizer.decode([token for token in tokens if token != tokenizer.separator_id])
    return spelled.rstrip("\ufffd")


def weights_of(text, routing, top_k, temperature=TEMPERATURE):
    """exp(-distance^2 / T) of a text that is vectorised anew."""
    vocabulary, vectors, centers = routing
    rows = [vocabulary[word] for word in re.findall(r"\w\w+", text.lower()) if word in vocabulary]
    embedding = vectors[rows].astype(np.float64).sum(axis=0)
    embedding /= np.linalg.norm(embedding) or 1
    squared = ((embedding - centers) ** 2).sum(axis=1)
    weights = np.exp(-squared / temperature)
    weights[np.argsort(squared)[top_k:]] = 0
    return weights / weights.sum()


@torch.no_grad()
def brute_force(experts, tokenizer, routing, tokens, *, n_prompt, top_k, refresh, prefix_tokens=None):
    """Weights (m, k) and log-probabilities (m, V) of the m tokens behind the prompt: no cache, no stream."""
    probs = []
    for number, expert in enumerate(experts):
        prefix = [] if prefix_tokens is None else [prefix_tokens[number]]
        logits = expert(input_ids=torch.tensor([[*prefix, *tokens]]), use_cache=False).logits[0, len(prefix) :]
        probs.append(logits.double().softmax(dim=-1)[:, : tokenizer.vocab_size].numpy())
    weights, mixed = [], []
    for place in range(n_prompt, len(tokens)):
        step = len(tokens) if refresh == "once" else refresh
        context = n_prompt + (place - n_prompt) // step * step
        weights.append(weights_of(text_of(tokenizer, tokens[:context]), routing, top_k))
        mixed.append(sum(weight * p[place - 1] for weight, p in zip(weights[-1], probs, strict=True)))
    with np.errstate(divide="ignore"):
        return np.array(weights), np.log(mixed)


def generate(mixture, prompt, n_new, **settings):
    """Tokens of the prompt and the new ones, mixture's log-probabilities of each step (n_new, V), and the cache."""
    inputs = mixture.encode(prompt)
    out = mixture.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=n_new,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False} | settings,
    )
    return out.sequences[0].tolist(), torch.cat(out.logits).numpy(), out.past_key_values


def feeds(experts, calls):
    """Hooks that note how many tokens each forward pass of each expert takes."""

    def hook(number):
        return lambda module, args, kwargs: calls[number].append(kwargs["input_ids"].shape[1])

    return [expert.register_forward_pre_hook(hook(n), with_kwargs=True) for n, expert in enumerate(experts)]


@pytest.mark.parametrize("refresh", [1, 4, "once"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_greedy_generation_is_that_of_the_brute_force_mixture(
    architecture, top_k, refresh, mixture_of, experts, tokenizer, routing
):
    mixture = mixture_of(architecture, top_k=top_k, refresh=refresh)
    settings = word_tokens_alone(tokenizer)
    tokens, got, _ = generate(mixture, "abc größe", 24, **settings)
    n_prompt = len(tokens) - 24
    weights, expected = brute_force(
        experts[architecture], tokenizer, routing, tokens, n_prompt=n_prompt, top_k=top_k, refresh=refresh
    )
    assert (np.count_nonzero(weights, axis=1) == top_k).all()
    assert (len(set(weights.argmax(axis=1))) > 1) == (refresh != "once")  # the route changes on the way
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for place, log_probs in enumerate(expected, n_prompt):
        left_out = [*settings["suppress_tokens"], *tokens[:place]]
        log_probs[left_out] = -np.inf
        assert log_probs.argmax() == tokens[place]


def test_every_position_of_a_text_is_the_mixture_that_the_evaluation_measures(mixture_of, experts, tokenizer, routing):
    text = "naïve größe 東京 kalt, ΟΔΟΣ abc 😀😀 stu é日 nord"
    tokens, starts = tokenizer.encode_with_starts(text)
    assert len(set(starts[1:])) < len(starts) - 1  # some tokens are pieces of one character
    inputs = torch.from_numpy(tokens)[None]
    # refresh is for what is generated.
    mixture = mixture_of(top_k=2, refresh=4)
    logits = mixture(inputs).logits[0, :-1]
    assert logits.dtype == torch.float32
    assert logits.shape == (len(tokens) - 1, tokenizer.vocab_size)
    with torch.no_grad():
        scores = torch.stack([expert(inputs).logits[0, :-1].log_softmax(-1) for expert in experts["opt"]])
    places = torch.arange(len(tokens) - 1)
    expected = clustering(
        scores[:, places, inputs[0, 1:]].numpy(),
        PrefixRouter(*routing).distances(text, starts[1:]),
        temperature=TEMPERATURE,
        top_k=2,
    )
    np.testing.assert_allclose(logits[places, inputs[0, 1:]].numpy(), expected, atol=1e-4)
    last = mixture(inputs, logits_to_keep=3).logits[0, :-1]
    torch.testing.assert_close(last, logits[-2:], atol=1e-5, rtol=0)


def test_a_batch_is_each_of_its_prompts_alone(mixture_of, tokenizer):
    mixture = mixture_of(top_k=1)
    prompts = ["abc größe stu kalt warm", "東京"]
    settings = {"max_new_tokens": 20, "do_sample": False, **word_tokens_alone(tokenizer)}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    batch = mixture.encode_batch(prompts)
    assert batch["attention_mask"].sum(dim=1).tolist() == [mixture.encode(prompt).shape[1] for prompt in prompts]
    together = mixture.generate(**batch, **settings)
    # The processors see padding as tokens: separators, which no_repeat_ngram_size forbids in either case.
    for number, prompt in enumerate(prompts):
        alone = mixture.generate(mixture.encode(prompt), **settings)
        assert torch.equal(together.sequences[number, -20:], alone.sequences[0, -20:])
        assert torch.equal(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0])


def test_padding_has_logits_of_zero_and_changes_no_other(mixture_of):
    mixture = mixture_of()
    batch = mixture.encode_batch(["abc größe stu", "def"])
    logits = mixture(**batch).logits
    n_padding = int((batch["attention_mask"][1] == 0).sum())
    assert n_padding > 0
    assert not logits[1, :n_padding].any()
    assert torch.equal(logits[1, n_padding:], mixture(mixture.encode("def")).logits[0])


def test_two_generations_at_once_do_not_disturb_each_other(mixture_of, tokenizer):
    mixture = mixture_of(top_k=1)
    prompts = ["abc größe", "東京 nord"]
    settings = word_tokens_alone(tokenizer)
    alone = [generate(mixture, prompt, 20, **settings)[0] for prompt in prompts]
    found = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: generate(mixture, prompt, 20, **settings)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt][0] for prompt in prompts] == alone


def test_sampling_acts_on_the_mixture_and_repeats_with_its_seed(mixture_of, experts, tokenizer, routing):
    mixture = mixture_of()
    inputs = mixture.encode("abc")

    def draw(seed):
        torch.manual_seed(seed)
        return mixture.generate(
            inputs,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            max_new_tokens=20,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
        )

    first, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    tokens, n_prompt = first.sequences[0].tolist(), inputs.shape[1]
    _, expected = brute_force(experts["opt"], tokenizer, routing, tokens, n_prompt=n_prompt, top_k=2, refresh=1)
    np.testing.assert_allclose(torch.cat(first.logits).numpy(), expected, atol=1e-4)
    for scores, log_probs, token in zip(first.scores, expected, tokens[n_prompt:], strict=True):
        tempered = np.exp(log_probs / 0.7) / np.exp(log_probs / 0.7).sum()
        order = np.argsort(-tempered)
        kept = order[: np.searchsorted(np.cumsum(tempered[order]), 0.9) + 1]  # the fewest that reach 0.9
        assert set(np.flatnonzero(np.isfinite(scores[0].numpy()))) == set(kept)
        assert token in kept


def test_the_separator_that_a_text_begins_with_is_no_padding(mixture_of):
    mixture = mixture_of()
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = mixture.encode("abc")
    expected = mixture.generate(inputs, attention_mask=torch.ones_like(inputs), eos_token_id=None, **settings)
    # Without an end of text, transformers itself would take its padding token out of the prompt.
    found = mixture.generate(inputs, eos_token_id=None, **settings)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


# --- what runs ---


def test_an_expert_that_was_left_out_catches_up_in_one_pass(mixture_of, experts, tokenizer):
    calls = [[] for _ in range(EXPERTS)]
    handles = feeds(experts["opt"], calls)
    try:
        tokens, _, cache = generate(mixture_of(top_k=1), "abc größe", 24, **word_tokens_alone(tokenizer))
    finally:
        for handle in handles:
            handle.remove()
    n_read = len(tokens) - 1  # the last one is not fed
    assert [sum(lengths) for lengths in calls] == cache.tokens_fed[0]
    assert max(cache.tokens_fed[0]) == n_read
    # One expert a step: 24 passes in all, and more tokens than passes where one was behind.
    assert sum(map(len, calls)) == 24
    assert any(length > 1 for lengths in calls for length in lengths[1:])


def test_experts_that_are_never_near_never_run(experts, tokenizer):
    # Without a known word each context is at the origin, and the second centre is the nearest to that.
    router = PrefixRouter({}, np.zeros((0, 2), dtype=np.float32), np.array([[3.0, 0], [1, 0], [2, 0]]))
    mixture = MixtureForCausalLM(experts["opt"], router, tokenizer, top_k=1)
    tokens, _, cache = generate(mixture, "abc", 20, eos_token_id=None)
    assert cache.tokens_fed == [[0, len(tokens) - 1, 0]]  # a third of 3 x tokens


def test_an_expert_of_no_weight_at_the_end_of_a_text_is_not_fed_to_its_end(mixture_of, experts, tokenizer, routing):
    text = "abc größe nord kalt 東京 stu"
    tokens, starts = tokenizer.encode_with_starts(text)
    nearest = PrefixRouter(*routing).distances(text, np.append(starts[1:], len(text))).argmin(axis=1)
    calls = [[] for _ in range(EXPERTS)]
    handles = feeds(experts["opt"], calls)
    try:
        mixture_of(top_k=1)(torch.from_numpy(tokens)[None])
    finally:
        for handle in handles:
            handle.remove()
    last = [np.flatnonzero(nearest == expert) for expert in range(EXPERTS)]
    assert calls == [[places[-1] + 1] if len(places) else [] for places in last]
    assert len(set(nearest)) > 1


# --- caches ---


def test_generation_goes_on_from_a_cache(mixture_of, tokenizer):
    mixture = mixture_of(top_k=1)
    settings = {"do_sample": False, "suppress_tokens": list(range(257)), "return_dict_in_generate": True}
    whole = mixture.generate(mixture.encode("abc"), max_new_tokens=20, **settings).sequences
    half = mixture.generate(mixture.encode("abc"), max_new_tokens=8, **settings)
    assert isinstance(half.past_key_values, MixtureCache)
    rest = mixture.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=12, **settings)
    assert torch.equal(rest.sequences, whole)


def test_what_follows_in_a_cache_is_a_prompt_with_weights_of_its_end(mixture_of, experts, tokenizer, routing):
    mixture = mixture_of(refresh="once")
    settings = {"do_sample": False, "suppress_tokens": list(range(257)), "return_dict_in_generate": True}
    first = mixture.generate(mixture.encode("abc"), max_new_tokens=4, **settings)
    more = mixture.encode(" 東京 nord kalt")[:, 1:]
    prompt = torch.cat([first.sequences, more], dim=1)
    second = mixture.generate(
        prompt, past_key_values=first.past_key_values, max_new_tokens=4, output_logits=True, **settings
    )
    tokens = second.sequences[0].tolist()
    _, expected = brute_force(
        experts["opt"], tokenizer, routing, tokens, n_prompt=prompt.shape[1], top_k=2, refresh="once"
    )
    np.testing.assert_allclose(torch.cat(second.logits).numpy(), expected, atol=1e-4)


def test_generation_without_a_cache_is_the_same(mixture_of, tokenizer):
    settings = word_tokens_alone(tokenizer)
    with_cache, expected, _ = generate(mixture_of(), "abc", 10, **settings)
    without, got, _ = generate(mixture_of(), "abc", 10, use_cache=False, **settings)
    assert without == with_cache
    np.testing.assert_allclose(got, expected, atol=1e-4)


# --- tokens of clusters ---


def test_tokens_of_clusters_stand_in_front_and_are_never_generated(tmp_path, tokenizer, routing):
    size = tokenizer.vocab_size
    experts = make_experts(tmp_path, tokenizer, "opt")
    for expert in experts:
        extend_vocabulary(expert, EXPERTS, first_id=size)
        weight = expert.get_input_embeddings().weight
        with torch.no_grad():  # rows unlike the mean, and of tokens that are likely
            weight[size:] = 4 * weight[300 : 300 + EXPERTS]
    prefixes = [size + number for number in range(EXPERTS)]
    mixture = MixtureForCausalLM(
        experts, PrefixRouter(*routing), tokenizer, temperature=TEMPERATURE, top_k=2, prefix_tokens=prefixes
    )
    tokens, got, _ = generate(mixture, "abc größe", 20, eos_token_id=None)
    assert max(tokens) < size
    _, expected = brute_force(
        experts, tokenizer, routing, tokens, n_prompt=len(tokens) - 20, top_k=2, refresh=1, prefix_tokens=prefixes
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.exp(got).sum(axis=1).min() < 0.95  # the rest is what the experts give to tokens of clusters
    # The prefix takes one of the positions.
    with pytest.raises(
        ConfigError, match=f"{POSITIONS} tokens to read.* but the experts have {POSITIONS - 1} positions"
    ):
        mixture(torch.zeros((1, POSITIONS), dtype=torch.int64))


# --- the rest of generate ---


class Collected(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_streamers_and_stopping_criteria_work(mixture_of):
    mixture, streamer = mixture_of(), Collected()
    inputs = mixture.encode("abc")
    n_prompt = inputs.shape[1]
    out = mixture.generate(
        inputs,
        streamer=streamer,
        stopping_criteria=[StopAfter(n_prompt + 3)],
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert out.shape == (1, n_prompt + 3)
    assert streamer.values == [inputs.tolist(), *([token] for token in out[0, n_prompt:].tolist())]
    assert streamer.ended


def test_the_separator_ends_a_text(mixture_of, tokenizer):
    out = mixture_of().generate(max_new_tokens=9, do_sample=False, suppress_tokens=range(1, tokenizer.vocab_size))
    assert out.tolist() == [[tokenizer.separator_id] * 2]  # without a prompt it begins with the separator


def test_a_text_may_fill_all_positions_and_no_more(mixture_of):
    mixture = mixture_of()
    inputs = mixture.encode("abc")
    fitting = POSITIONS - inputs.shape[1] + 1  # the last token is not read
    settings = {"do_sample": False, "eos_token_id": None}
    assert mixture.generate(inputs, max_new_tokens=fitting, **settings).shape[1] == POSITIONS + 1
    calls = [[] for _ in range(EXPERTS)]
    handles = feeds(mixture.experts, calls)
    try:
        with pytest.raises(
            ConfigError, match=f"{POSITIONS + 1} tokens to read.*the experts have {POSITIONS} positions"
        ):
            mixture.generate(inputs, max_new_tokens=fitting + 1, **settings)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [[], [], []]  # before any work
    with pytest.raises(ConfigError, match="shorten the prompt"):
        mixture.generate(torch.ones((1, POSITIONS + 1), dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "by greedy search or by sampling, not by beam_search; leave out num_beams"),
        ({"num_beams": 2, "do_sample": True}, "not by beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "not by assisted_generation"),
        ({"cache_implementation": "static"}, "cache_implementation=static: each expert of a mixture has its own cache"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size=2: each expert"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache; pass a MixtureCache"),
        ({"use_cache": False}, "use_cache=False with refresh=4: only a cache knows where the prompt ends"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, mixture_of):
    mixture = mixture_of(refresh=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        mixture.generate(mixture.encode("abc def"), max_new_tokens=4, **settings)


def test_a_mixture_is_not_saved(mixture_of, tmp_path):
    with pytest.raises(ConfigError, match="a mixture is not saved; its experts and its router are in the run"):
        mixture_of().save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": 0}, "refresh=0 is neither a number of tokens, at least 1, nor 'once'"),
        ({"top_k": 4}, "top_k=4 is not in [1, 3]"),
        ({"temperature": 0}, "temperature=0 is not a positive finite number"),
        ({"distance_power": -1}, "distance_power=-1 is not"),
        ({"clusters": [1, 2]}, "2 clusters for 3 experts; give one for each"),
        ({"prefix_tokens": [1]}, "1 prefix_tokens for 3 experts"),
        ({"prefix_tokens": [5, 5, 5]}, "prefix token 5 of expert 0 is not in [330, 330), behind the tokenizer's own"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, mixture_of):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mixture_of(**settings)


def test_experts_that_do_not_fit_are_refused(experts, tokenizer, routing, tmp_path):
    router = PrefixRouter(*routing)
    with pytest.raises(ConfigError, match="no expert to mix"):
        MixtureForCausalLM([], router, tokenizer)
    with pytest.raises(ConfigError, match=r"2 experts but a router of 3 clusters; use PrefixRouter\.subset"):
        MixtureForCausalLM(experts["opt"][:2], router, tokenizer)
    larger = train_tokenizer(332)
    with pytest.raises(ConfigError, match="expert 0 has a vocabulary of 330, the tokenizer one of 332"):
        MixtureForCausalLM(experts["opt"], router, larger)


@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        ([[0, 330]], None, "token 330 is none of the tokenizer's 330; use `encode`"),
        ([[0, 5, 6]], [[1, 1, 0]], "attention_mask has a 0 behind a 1: pad prompts on their left"),
        ([[0, 5], [0, 0]], [[1, 1], [0, 0]], "sequence 1 has no token; begin with the separator"),
        ([[0, 5]], [[1]], "attention_mask of shape (1, 1) for input_ids of (1, 2)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(inputs, mask, message, mixture_of):
    with pytest.raises(DataError, match=re.escape(message)):
        mixture_of()(torch.tensor(inputs), attention_mask=None if mask is None else torch.tensor(mask))


def test_a_cache_of_another_batch_is_refused(mixture_of):
    mixture = mixture_of()
    cache = mixture(mixture.encode("abc")).past_key_values
    with pytest.raises(DataError, match="2 sequences with a cache of 1; use the same ones in order"):
        mixture(torch.tensor([[1], [2]]), past_key_values=cache)


def test_an_expert_that_gives_nan_is_named(tmp_path, tokenizer, routing):
    experts = make_experts(tmp_path, tokenizer, "opt")
    with torch.no_grad():
        experts[1].get_input_embeddings().weight.fill_(torch.nan)
    mixture = MixtureForCausalLM(experts, PrefixRouter(*routing), tokenizer, clusters=[4, 7, 9])
    with pytest.raises(DataError, match="the expert of cluster 7 gives NaN: its weights are broken"):
        mixture(mixture.encode("abc"))


# --- explanations ---


def test_explanations_are_bayes_rule_on_the_brute_force_mixture(mixture_of, experts, tokenizer, routing):
    clusters = [4, 7, 9]
    mixture = mixture_of(top_k=2, refresh=4, clusters=clusters)
    tokens, logits, _ = generate(mixture, "abc größe", 20, **word_tokens_alone(tokenizer))
    prompt, generated = tokens[:-20], tokens[-20:]
    explained = mixture.explain(prompt, generated)
    weights, expected = brute_force(
        experts["opt"], tokenizer, routing, tokens, n_prompt=len(prompt), top_k=2, refresh=4
    )
    with torch.no_grad():
        inputs = torch.tensor([tokens])
        own = np.stack([expert(inputs).logits[0].softmax(-1).numpy() for expert in experts["opt"]])  # (k, T, V)
    for place, (token, weight) in enumerate(zip(explained, weights, strict=True)):
        at, number = len(prompt) - 1 + place, generated[place]
        joint = weight * own[:, at, number]
        assert token.token == number
        assert token.log_prob == pytest.approx(expected[place, number], abs=1e-4)
        assert token.log_prob == pytest.approx(logits[place, number], abs=1e-4)
        ran = [cluster for cluster, value in zip(clusters, weight, strict=True) if value]
        assert list(token.weights) == list(token.responsibilities) == ran
        assert list(token.weights.values()) == pytest.approx(weight[weight > 0], abs=1e-6)
        assert list(token.responsibilities.values()) == pytest.approx(joint[weight > 0] / joint.sum(), abs=1e-4)
        assert token.cluster == clusters[joint.argmax()]
    spelled = "".join(token.text for token in explained)
    assert spelled.rstrip("\ufffd") == text_of(tokenizer, tokens).removeprefix("abc größe")


def test_explanations_of_nothing_and_of_no_prompt(mixture_of):
    assert mixture_of().explain([0], []) == []
    with pytest.raises(DataError, match="the prompt has no token"):
        mixture_of().explain([], [5])
    with pytest.raises(DataError, match="token 999 is none of the tokenizer's 330"):
        mixture_of().explain([0], [999])
    with pytest.raises(ConfigError, match=f"{POSITIONS + 1} tokens to read"):
        mixture_of().explain([0], [5] * (POSITIONS + 1))
    assert len(mixture_of().explain([0], [5] * POSITIONS)) == POSITIONS


def test_tokens_within_a_character_add_no_text_until_it_is_complete(mixture_of, tokenizer):
    # Three bytes of one character, which the tokenizer knows no longer token of.
    tokens = tokenizer.encode_batch(["日"])[0][1:].tolist()
    assert len(tokens) == 3
    explained = mixture_of().explain([tokenizer.separator_id], [*tokens, tokenizer.separator_id])
    assert [token.text for token in explained] == ["", "", "日", ""]


def test_routes_do_not_see_a_character_before_it_is_complete(experts, tokenizer):
    # "日日" is a word of the second cluster: with two bytes of the second character the context is still "日".
    vectors = np.array([[1.0, 0.0]], dtype=np.float32)
    router = PrefixRouter({"日日": 0}, vectors, np.array([[0.0, 0.1], [1.0, 0.0], [5.0, 5.0]]))
    mixture = MixtureForCausalLM(experts["opt"], router, tokenizer, top_k=1)
    tokens = tokenizer.encode_batch(["日日"])[0].tolist()
    assert len(tokens) == 7
    explained = mixture.explain(tokens[:1], [*tokens[1:], 5])
    assert [token.cluster for token in explained] == [0] * 6 + [1]


def test_experts_may_be_given_in_any_order_of_clusters(experts, tokenizer, routing):
    vocabulary, vectors, centers = routing
    order = [2, 0, 1]
    inputs = torch.from_numpy(tokenizer.encode_batch(["abc größe stu"])[0])[None]
    settings = {"temperature": TEMPERATURE, "top_k": 2}
    straight = MixtureForCausalLM(experts["opt"], PrefixRouter(vocabulary, vectors, centers), tokenizer, **settings)
    shuffled = MixtureForCausalLM(
        [experts["opt"][number] for number in order],
        PrefixRouter(vocabulary, vectors, centers[order]),
        tokenizer,
        clusters=order,
        **settings,
    )
    torch.testing.assert_close(shuffled(inputs).logits, straight(inputs).logits, atol=1e-5, rtol=0)
