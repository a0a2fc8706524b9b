import numpy as np
import pytest
import torch

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError
from cbtm.merge.generation import MixtureForCausalLM
from cbtm.merge.router import PrefixRouter
from cbtm.merge.text_generation import generate_text

POSITIONS = 48


@pytest.fixture(scope="module")
def mixture():
    tokenizer = TextTokenizer.train(["abc def größe 東京 " * 30], 290)
    experts = []
    for seed in range(2):
        config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2, random_state=seed)
        sizes = {"vocab_size": tokenizer.vocab_size, "separator_id": 0, "context_length": POSITIONS}
        experts.append(create_model(config, **sizes))
        with torch.no_grad():  # weights as large as trained ones
            experts[-1].get_input_embeddings().weight.mul_(20)
    vectors = np.array([[1.0, 0], [0, 1.0]], dtype=np.float32)
    return MixtureForCausalLM(experts, PrefixRouter({"abc": 0, "def": 1}, vectors, np.eye(2)), tokenizer)


def test_text_comes_in_pieces_of_whole_characters_and_is_that_of_the_tokens(mixture):
    pieces = []
    made = generate_text(mixture, "abc", max_new_tokens=30, sample=True, random_state=1, on_text=pieces.append)
    assert made.prompt_tokens == mixture.encode("abc")[0].tolist()
    assert "".join(pieces) == made.text
    assert "" not in pieces
    assert len(pieces) > 5
    assert not made.is_finished
    assert len(made.tokens) == 30
    read = mixture.text_stream()
    assert made.text == "".join(read(token) for token in [*made.prompt_tokens, *made.tokens]).removeprefix("abc")


def test_without_sampling_it_is_the_greedy_text(mixture):
    made = generate_text(mixture, "abc", max_new_tokens=8, sampling_temperature=0.5, top_p=0.5, random_state=7)
    expected = mixture.generate(mixture.encode("abc"), max_new_tokens=8, do_sample=False)[0].tolist()
    assert [*made.prompt_tokens, *made.tokens] == expected


def test_sampling_repeats_with_its_seed_and_leaves_the_generator_of_torch_alone(mixture):
    before = torch.get_rng_state()
    settings = {"max_new_tokens": 20, "sample": True}
    first, again, other = (generate_text(mixture, "", random_state=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first.tokens != other.tokens


def test_all_tokens_may_be_drawn_and_settings_narrow_that(mixture):
    # transformers draws from the 50 most probable ones unless told otherwise.
    draws = [generate_text(mixture, "", max_new_tokens=40, sample=True, random_state=seed) for seed in range(4)]
    ranks, probable = [], []
    for made in draws:
        sequence = torch.tensor([[*made.prompt_tokens, *made.tokens[:-1]]])
        log_probs = mixture(sequence).logits[0, -len(made.tokens) :]
        own = log_probs.gather(1, torch.tensor(made.tokens)[:, None])
        ranks.append((log_probs > own).sum(dim=1).max().item())
        probable.append(log_probs[0].argmax().item())
    assert max(ranks) >= 50
    cold = generate_text(mixture, "", max_new_tokens=5, sample=True, sampling_temperature=1e-3)
    narrow = generate_text(mixture, "", max_new_tokens=5, sample=True, top_p=1e-3)
    assert cold.tokens == narrow.tokens == generate_text(mixture, "", max_new_tokens=5).tokens


def test_the_separator_finishes_a_text_and_adds_nothing_to_it(mixture):
    mixture.generation_config.forced_eos_token_id = 0
    try:
        made = generate_text(mixture, "abc", max_new_tokens=4)
    finally:
        mixture.generation_config.forced_eos_token_id = None
    assert made.is_finished
    assert made.tokens[-1] == 0
    assert "endoftext" not in made.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 generates nothing; use at least 1"),
        ({"sampling_temperature": 0.0}, "sampling_temperature=0.0 is not a positive finite number"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
        ({"max_new_tokens": POSITIONS}, f"but the experts have {POSITIONS} positions for text"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, mixture):
    with pytest.raises(ConfigError, match=message):
        generate_text(mixture, "abc", **{"max_new_tokens": 4, "sample": True} | settings)
