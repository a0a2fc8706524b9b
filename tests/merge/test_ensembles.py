import math
import re
import tracemalloc

import numpy as np
import pytest

from cbtm.errors import ConfigError, DataError
from cbtm.merge import ensembles
from cbtm.merge.ensembles import (
    bits_per_byte,
    bootstrap_interval,
    clustering,
    experts_used,
    mix,
    paired_bootstrap_interval,
    perplexity,
    routing_entropy,
    single,
    uniform,
)
from cbtm.merge.router import routing_weights


def random_scores(n_experts=4, n_tokens=50, seed=0):
    rng = np.random.default_rng(seed)
    return -rng.exponential(3, size=(n_experts, n_tokens)).astype(np.float32)


def random_distances(n_tokens=50, n_experts=4, seed=1):
    return np.random.default_rng(seed).uniform(0.5, 1.4, size=(n_tokens, n_experts)).astype(np.float32)


def test_mixture_of_two_experts_by_hand():
    # .25 * .5 + .75 * .1 = .2
    mixed = mix(np.log(np.array([[0.5], [0.1]])), np.array([[0.25, 0.75]]))
    assert mixed.dtype == np.float64
    np.testing.assert_allclose(mixed, [math.log(0.2)], rtol=1e-14)


def test_mixture_is_the_weighted_sum_of_probabilities():
    scores, weights = random_scores(), routing_weights(random_distances(), temperature=0.1)
    direct = np.log((weights.T * np.exp(scores.astype(np.float64))).sum(axis=0))
    np.testing.assert_allclose(mix(scores, weights), direct, rtol=1e-12)


def test_one_expert_ensemble_has_that_experts_perplexity():
    scores = random_scores(n_experts=1)
    alone = perplexity(single(scores, 0))
    assert perplexity(mix(scores, np.ones((50, 1)))) == alone
    assert perplexity(uniform(scores)) == alone
    assert perplexity(clustering(scores, random_distances(n_experts=1), temperature=0.1)) == alone


def test_an_expert_of_weight_0_takes_no_part():
    scores = random_scores(n_experts=2)
    scores[1] = -np.inf
    weights = np.tile([1.0, 0.0], (50, 1))
    np.testing.assert_array_equal(mix(scores, weights), single(scores, 0))


def test_top_k_of_one_is_the_nearest_expert():
    scores, distances = random_scores(), random_distances()
    nearest = scores[distances.argmin(axis=1), np.arange(50)].astype(np.float64)
    np.testing.assert_array_equal(clustering(scores, distances, temperature=0.1, top_k=1), nearest)


def test_top_k_equal_to_k_is_the_dense_ensemble():
    scores, distances = random_scores(), random_distances()
    np.testing.assert_array_equal(
        clustering(scores, distances, temperature=0.1, top_k=4), clustering(scores, distances, temperature=0.1)
    )


def test_clustering_is_mix_with_routing_weights():
    scores, distances = random_scores(), random_distances()
    for power, top_k in [(2, None), (4, 2)]:
        weights = routing_weights(distances, temperature=0.1, distance_power=power, top_k=top_k)
        mixed = clustering(scores, distances, temperature=0.1, distance_power=power, top_k=top_k)
        np.testing.assert_array_equal(mixed, mix(scores, weights))


def test_uniform_is_the_mean_of_probabilities():
    # (.5 + .1) / 2 = .3
    np.testing.assert_allclose(uniform(np.log([[0.5], [0.1]])), [math.log(0.3)])


def test_uniform_of_identical_experts_is_that_expert():
    scores = np.tile(random_scores(n_experts=1), (7, 1))
    np.testing.assert_allclose(uniform(scores), single(scores, 0), rtol=1e-13)


def test_blocks_do_not_change_the_result(monkeypatch):
    scores, distances = random_scores(), random_distances()
    whole = clustering(scores, distances, temperature=0.1, top_k=2)
    monkeypatch.setattr(ensembles, "_BLOCK_ELEMENTS", 12)  # 3 tokens of 4 experts; 50 = 16 * 3 + 2
    np.testing.assert_array_equal(clustering(scores, distances, temperature=0.1, top_k=2), whole)
    weights = routing_weights(distances, temperature=0.1, top_k=2)
    np.testing.assert_array_equal(mix(scores, weights), whole)
    assert experts_used(weights) == 2


def test_very_unlikely_tokens_do_not_underflow():
    # exp(-2000) is 0 in float64; log(.5 exp(-2000) + .5 exp(-2000 - log 3)) = -2000 + log(.5 + .5 / 3)
    mixed = mix(np.array([[-2000.0], [-2000.0 - math.log(3)]]), np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(mixed, [-2000 + math.log(2 / 3)], rtol=1e-15)


def test_a_token_impossible_for_one_expert_is_possible_for_the_mixture():
    # .75 * 0 + .25 * .4 = .1
    mixed = mix(np.array([[-np.inf], [math.log(0.4)]]), np.array([[0.75, 0.25]]))
    np.testing.assert_allclose(mixed, [math.log(0.1)])


def test_a_token_impossible_for_all_stays_impossible_and_the_perplexity_is_infinite():
    scores = np.array([[-1.0, -np.inf], [-1.0, -np.inf]], dtype=np.float32)
    for mixed in (uniform(scores), mix(scores, np.full((2, 2), 0.5)), single(scores, 0)):
        assert mixed[0] == pytest.approx(-1)
        assert mixed[1] == -np.inf
        assert perplexity(mixed) == math.inf
        assert bits_per_byte(mixed, 10) == math.inf


def test_certain_tokens_keep_probability_at_most_1():
    assert perplexity(mix(np.zeros((3, 1), dtype=np.float32), np.array([[0.1, 0.2, 0.7 + 1e-9]]))) == 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e-3])
def test_damaged_scores_are_refused_with_their_place(wrong):
    scores = random_scores(n_experts=2, n_tokens=5)
    scores[1, 3] = wrong
    message = re.escape(f"log-probability {np.float64(np.float32(wrong))} at token 3 of expert 1 is not in [-inf, 0]")
    with pytest.raises(DataError, match=message):
        uniform(scores)
    # An expert of weight 0 is no place to hide damage.
    with pytest.raises(DataError, match=message):
        mix(scores, np.tile([1.0, 0.0], (5, 1)))
    with pytest.raises(DataError, match="at token 3 is not in"):
        single(scores, 1)
    with pytest.raises(DataError, match="at token 3 is not in"):
        perplexity(scores[1])


def test_the_place_of_damage_counts_from_the_first_block(monkeypatch):
    monkeypatch.setattr(ensembles, "_BLOCK_ELEMENTS", 4)  # 2 tokens of 2 experts
    scores = random_scores(n_experts=2, n_tokens=7)
    scores[0, 5] = np.nan
    with pytest.raises(DataError, match="token 5 of expert 0"):
        uniform(scores)


@pytest.mark.parametrize("wrong", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], [0.0, 0.0]])
def test_weights_that_are_no_distribution_are_refused(wrong):
    weights = np.array([[0.5, 0.5], wrong])
    for use in (lambda: mix(random_scores(2, 2), weights), lambda: experts_used(weights)):
        with pytest.raises(DataError, match=r"weights of token 1 are .* must sum to 1 over the experts"):
            use()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"weights of shape \(3, 2\) do not fit log_probs of shape \(3, 2\)"):
        mix(random_scores(3, 2), np.full((3, 2), 0.5))
    with pytest.raises(DataError, match=r"distances of shape \(1, 4\) do not fit log_probs of shape \(4, 2\)"):
        clustering(random_scores(4, 2), random_distances(1, 4), temperature=1)
    with pytest.raises(DataError, match="expected \\(experts, tokens\\), at least one expert"):
        uniform(np.empty((0, 3)))
    with pytest.raises(ConfigError, match=re.escape("expert=4 is not in [0, 4)")):
        single(random_scores(), 4)
    with pytest.raises(ConfigError, match=re.escape("expert=-1 is not in [0, 4)")):
        single(random_scores(), -1)


def test_settings_of_clustering_are_checked():
    with pytest.raises(ConfigError, match=re.escape("top_k=5 is not in [1, 4]")):
        clustering(random_scores(), random_distances(), temperature=1, top_k=5)


def test_perplexity_by_hand():
    # Probabilities 1/2 and 1/8: the geometric mean is 1/4
    assert perplexity(np.log([0.5, 0.125])) == pytest.approx(4)


def test_perplexity_of_a_uniform_vocabulary_is_its_size():
    assert perplexity(np.full(1000, -math.log(50272), dtype=np.float32)) == pytest.approx(50272, rel=1e-6)


def test_bits_per_byte_by_hand():
    # 1/2 and 1/8 take 1 + 3 bits, over 8 bytes
    assert bits_per_byte(np.log([0.5, 0.125]), 8) == pytest.approx(0.5)


def test_no_tokens_and_no_bytes_are_refused():
    with pytest.raises(DataError, match="at least one"):
        perplexity(np.array([]))
    with pytest.raises(DataError, match="n_bytes=0"):
        bits_per_byte(np.array([-1.0]), 0)


def test_interval_of_alike_documents_is_their_perplexity():
    # Every document has 10 tokens of probability 1/5, so each resample has perplexity 5
    low, high = bootstrap_interval(np.full(20, 10 * math.log(5)), np.full(20, 10), random_state=0)
    assert low == pytest.approx(5)
    assert high == pytest.approx(5)


def test_interval_of_two_documents_by_enumeration():
    # Resamples of {1/2, 1/8}: both first (p 1/4), both second (1/4), one each (1/2): perplexity 2, 8 or 4.
    nll, tokens = np.log([2.0, 8.0]), np.array([1, 1])
    wide = bootstrap_interval(nll, tokens, random_state=0, level=0.9)
    assert wide == (pytest.approx(2), pytest.approx(8))
    narrow = bootstrap_interval(nll, tokens, random_state=0, level=0.3)
    assert narrow == (pytest.approx(4), pytest.approx(4))


def test_documents_weigh_by_their_tokens():
    # 1 token of perplexity 16 and 3 of perplexity 1: exp(log(16) / 4) = 2, not the mean over documents
    nll, tokens = np.array([math.log(16), 0.0]), np.array([1, 3])
    assert bootstrap_interval(nll, tokens, random_state=0, level=0.01) == (pytest.approx(2), pytest.approx(2))


def test_interval_has_about_the_stated_coverage():
    # Document means ~ N(2, .5), one token each: the log-perplexity of the population is 2.
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        nll = np.abs(rng.normal(2, 0.5, size=60))
        low, high = bootstrap_interval(nll, np.ones(60, int), random_state=trial, n_resamples=200, level=0.9)
        covered += low <= math.exp(2) <= high
    assert 0.83 <= covered / 200 <= 0.96


def test_interval_is_fixed_by_its_seed():
    nll, tokens = np.random.default_rng(3).uniform(10, 90, size=30), np.full(30, 20)
    first = bootstrap_interval(nll, tokens, random_state=1)
    assert first == bootstrap_interval(nll, tokens, random_state=1)
    assert first != bootstrap_interval(nll, tokens, random_state=2)


def test_an_impossible_document_makes_the_upper_end_infinite():
    nll = np.concatenate([np.full(9, 1.0), [np.inf]])
    low, high = bootstrap_interval(nll, np.ones(10, int), random_state=0)
    # (9/10)^10 = 35 % of the resamples leave it out
    assert low == pytest.approx(math.e)
    assert high == math.inf


def test_pairing_cancels_what_is_hard_for_both():
    # a is 10 % below b on every document, whatever the document: the ratio is .9 in every resample
    tokens = np.array([10, 40, 5, 100])
    nll_b = tokens * np.array([2.0, 5.0, 1.0, 9.0])
    low, high = paired_bootstrap_interval(nll_b + tokens * math.log(0.9), nll_b, tokens, random_state=0)
    assert low == pytest.approx(0.9)
    assert high == pytest.approx(0.9)
    unpaired = bootstrap_interval(nll_b, tokens, random_state=0)
    assert unpaired[1] / unpaired[0] > 2


def test_swapping_the_sides_inverts_the_ratio():
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 50, size=25)
    nll_a, nll_b = tokens * rng.uniform(1, 3, size=25), tokens * rng.uniform(1, 3, size=25)
    low, high = paired_bootstrap_interval(nll_a, nll_b, tokens, random_state=0)
    swapped = paired_bootstrap_interval(nll_b, nll_a, tokens, random_state=0)
    assert swapped == (pytest.approx(1 / high), pytest.approx(1 / low))


def test_a_ratio_of_two_infinite_perplexities_is_refused():
    finite, infinite = np.ones(2), np.array([1.0, np.inf])
    with pytest.raises(DataError, match="the ratio of their perplexities is undefined"):
        paired_bootstrap_interval(infinite, infinite, np.ones(2, int), random_state=0)
    assert paired_bootstrap_interval(infinite, finite, np.ones(2, int), random_state=0)[1] == math.inf
    assert paired_bootstrap_interval(finite, infinite, np.ones(2, int), random_state=0)[0] == 0


@pytest.mark.parametrize(
    ("nll", "tokens", "message"),
    [
        ([1.0], [1], "1 documents; an interval over documents takes at least 2"),
        ([1.0, 2.0], [1], "document_nll of shape (2,), document_tokens of shape (1,)"),
        ([1.0, -2.0], [1, 1], "document_nll is -2.0 for document 1"),
        ([np.nan, 2.0], [1, 1], "document_nll is nan for document 0"),
        ([1.0, 2.0], [1, 0], "document 1 has 0 scored tokens"),
    ],
)
def test_documents_that_allow_no_interval_are_refused(nll, tokens, message):
    with pytest.raises(DataError, match=re.escape(message)):
        bootstrap_interval(np.array(nll), np.array(tokens), random_state=0)


def test_settings_of_the_interval_are_checked():
    with pytest.raises(ConfigError, match="level=95 is not between 0 and 1"):
        bootstrap_interval(np.ones(2), np.ones(2, int), random_state=0, level=95)
    with pytest.raises(ConfigError, match="n_resamples=0 is below 1"):
        bootstrap_interval(np.ones(2), np.ones(2, int), random_state=0, n_resamples=0)


def test_experts_used_counts_weights_above_0():
    # 1 and 3 experts
    assert experts_used(np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])) == 2


def test_routing_entropy_by_hand():
    # 0 for one expert, log 4 for four alike
    assert routing_entropy(np.array([[1.0, 0, 0, 0], [0.25] * 4])) == pytest.approx(math.log(4) / 2)


def test_statistics_over_no_tokens_are_refused():
    with pytest.raises(DataError, match="at least one of each"):
        experts_used(np.empty((0, 3)))


def test_memory_does_not_grow_with_tokens_times_experts(tmp_path):
    n_experts, n_tokens = 128, 50_000  # 6.4 M scores: 51 MB as float64, in blocks of 8 MiB
    scores = np.memmap(tmp_path / "scores", np.float32, "w+", shape=(n_experts, n_tokens))
    scores[:] = -1
    distances = np.memmap(tmp_path / "distances", np.float32, "w+", shape=(n_tokens, n_experts))
    distances[:] = 1
    tracemalloc.start()
    mixed = clustering(scores, distances, temperature=0.1, top_k=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(mixed, -1, rtol=1e-12)
    assert peak < 6 * 2**23 + mixed.nbytes
