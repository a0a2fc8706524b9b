import itertools
import math
import re
import tracemalloc

import numpy as np
import pytest

from cbtm.errors import ConfigError, DataError
from cbtm.merge import log_space
from cbtm.merge.ensembles import (
    bayes,
    bits_per_byte,
    clustering,
    experts_used,
    fixed_prior,
    mix,
    nats_per_token,
    oracle,
    perplexity,
    posterior,
    product_of_experts,
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
    monkeypatch.setattr(log_space, "_BLOCK_ELEMENTS", 12)  # 3 tokens of 4 experts; 50 = 16 * 3 + 2
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
    monkeypatch.setattr(log_space, "_BLOCK_ELEMENTS", 4)  # 2 tokens of 2 experts
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


OFFSETS = np.array([0, 7, 8, 8, 50])  # documents of 7, 1, 0 and 42 tokens


def written_out(log_probs, document_weights):
    """Mix with the weights that `document_weights(probabilities (k, n) of a document, its first token)` gives."""
    mixed = []
    for begin, end in itertools.pairwise(OFFSETS.tolist()):
        p = np.exp(log_probs[:, begin:end].astype(np.float64))
        for t, weights in enumerate(document_weights(p, begin)):
            mixed.append(math.log(sum(w / sum(weights) * p[j, t] for j, w in enumerate(weights))))
    return np.array(mixed)


def keep(weights, top_k):
    """The largest weights, ties to the lowest index; the others 0."""
    kept = sorted(range(len(weights)), key=lambda j: (-weights[j], j))[:top_k]
    return [w if j in kept else 0.0 for j, w in enumerate(weights)]


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("prior", [None, np.array([0.1, 0.2, 0.3, 0.4])])
def test_bayes_weighs_by_the_token_before(prior, top_k):
    scores, start = random_scores(), [0.25] * 4 if prior is None else prior.tolist()

    def weights(p, begin):
        for t in range(p.shape[1]):
            yield keep(start if t == 0 else [start[j] * p[j, t - 1] for j in range(4)], top_k or 4)

    mixed = bayes(scores, OFFSETS, prior=prior, top_k=top_k)
    assert mixed.dtype == np.float64
    np.testing.assert_allclose(mixed, written_out(scores, weights), rtol=1e-12)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("power", [2, 4])
def test_product_of_experts_weighs_clusters_by_the_token_before(power, top_k):
    scores, distances = random_scores(), random_distances()

    def weights(p, begin):
        for t in range(p.shape[1]):
            clusters = [math.exp(-(float(d) ** power) / 0.3) for d in distances[begin + t]]
            yield keep([1.0] * 4 if t == 0 else [clusters[j] * p[j, t - 1] for j in range(4)], top_k or 4)

    mixed = product_of_experts(scores, distances, OFFSETS, temperature=0.3, distance_power=power, top_k=top_k)
    np.testing.assert_allclose(mixed, written_out(scores, weights), rtol=1e-12)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_posterior_weighs_by_all_tokens_before(top_k):
    scores, prior = random_scores(), [0.4, 0.3, 0.2, 0.1]

    def weights(p, begin):
        for t in range(p.shape[1]):
            yield keep([prior[j] * math.prod(p[j, :t]) for j in range(4)], top_k or 4)

    mixed = posterior(scores, OFFSETS, prior=np.array(prior), top_k=top_k)
    np.testing.assert_allclose(mixed, written_out(scores, weights), rtol=1e-12)


def test_the_reference_bayes_by_hand():
    # Uniform at first: (.5 + .1) / 2 = .3. Then the weights are .5 : .1 = 5/6 : 1/6, so 5/6 * .2 + 1/6 * .8 = .3
    mixed = bayes(np.log([[0.5, 0.2], [0.1, 0.8]]), np.array([0, 2]))
    np.testing.assert_allclose(mixed, np.log([0.3, 0.3]), rtol=1e-14)


def test_posterior_is_the_bayesian_mixture_of_whole_documents():
    # The chain rule: sum_t log p(x_t | x_<t) = log sum_j prior_j prod_t p_j(x_t), also where no float64 can hold it
    for scale, prior in [(1, None), (1, [0.7, 0.1, 0.1, 0.1]), (300, [0.7, 0.1, 0.1, 0.1])]:
        scores = scale * random_scores()
        log_prior = np.log(np.full(4, 0.25) if prior is None else prior)
        mixed = posterior(scores, OFFSETS, prior=None if prior is None else np.array(prior))
        for begin, end in itertools.pairwise(OFFSETS.tolist()):
            joint = log_prior + scores[:, begin:end].sum(axis=1, dtype=np.float64)
            whole = joint.max() + math.log(np.exp(joint - joint.max()).sum())
            assert mixed[begin:end].sum() == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_posterior_turns_to_a_far_second_where_the_first_fails():
    # The first leads by 2000 nats, more than float64 weights can tell apart; then it finds a token impossible.
    scores = np.array([[-1.0, -np.inf, -1.0], [-2001.0, -0.5, -0.25]])
    mixed = posterior(scores, np.array([0, 3]))
    # -1 - log 2; then log(exp(-2000) * exp(-.5)); then the second alone
    np.testing.assert_allclose(mixed, [-1 - math.log(2), -2000.5, -0.25], rtol=1e-12)


def test_posterior_with_a_prior_of_one_expert_is_that_expert():
    scores = random_scores()
    for mixed in (
        posterior(scores, OFFSETS, prior=np.array([0.0, 0, 1, 0])),
        bayes(scores, OFFSETS, prior=np.array([0.0, 0, 1, 0])),
        fixed_prior(scores, np.array([0.0, 0, 1, 0])),
    ):
        np.testing.assert_array_equal(mixed, single(scores, 2))


@pytest.mark.parametrize("vocabulary", [3])
def test_mixtures_are_distributions_over_the_next_token(vocabulary):
    # Whatever the text before, the probabilities of all continuations by one token sum to 1.
    rng = np.random.default_rng(4)
    tables = rng.dirichlet(np.ones(vocabulary), size=(4, 5))  # (experts, tokens, vocabulary)
    text, offsets = rng.integers(vocabulary, size=5), np.array([0, 2, 5])
    distances = random_distances(n_tokens=5)
    totals = {}
    for position, token in itertools.product(range(5), range(vocabulary)):
        changed = text.copy()
        changed[position] = token
        scores = np.log(tables[:, np.arange(5), changed])
        routed = {"temperature": 0.2, "distance_power": 4}
        for name, mixed in {
            "clustering": clustering(scores, distances, top_k=2, **routed),
            "uniform": uniform(scores),
            "prior": fixed_prior(scores, np.array([0.1, 0.2, 0.3, 0.4])),
            "product": product_of_experts(scores, distances, offsets, top_k=3, **routed),
            "bayes": bayes(scores, offsets, top_k=2),
            "posterior": posterior(scores, offsets, prior=np.array([0.4, 0.3, 0.2, 0.1])),
        }.items():
            totals.setdefault((name, position), 0.0)
            totals[name, position] += math.exp(mixed[position])
    assert len(totals) == 6 * 5
    np.testing.assert_allclose(list(totals.values()), 1, rtol=1e-13)


def test_equal_experts_are_one_whatever_weighs_them():
    scores = np.tile(random_scores(n_experts=1), (3, 1))
    for mixed in (
        bayes(scores, OFFSETS, top_k=2),
        posterior(scores, OFFSETS),
        product_of_experts(scores, random_distances(n_experts=3), OFFSETS, temperature=0.1),
        fixed_prior(scores, np.array([0.2, 0.3, 0.5])),
        oracle(scores, OFFSETS),
    ):
        np.testing.assert_allclose(mixed, single(scores, 0), rtol=1e-13)


def test_ties_go_to_the_lowest_expert():
    # Both experts are as good on the first token, so the first is kept for the second.
    scores = np.log([[0.5, 0.1], [0.5, 0.9]])
    for mixed in (bayes(scores, np.array([0, 2]), top_k=1), posterior(scores, np.array([0, 2]), top_k=1)):
        np.testing.assert_allclose(mixed, np.log([0.5, 0.1]))
    mixed = product_of_experts(scores, np.ones((2, 2)), np.array([0, 2]), temperature=1, top_k=1)
    np.testing.assert_allclose(mixed, np.log([0.5, 0.1]))


def test_the_first_token_of_a_document_forgets_the_one_before():
    scores = np.log([[0.9, 0.5], [0.1, 0.25]])
    # Two documents: uniform again at the second token, (.5 + .25) / 2
    for mixed in (
        bayes(scores, np.array([0, 1, 2])),
        posterior(scores, np.array([0, 1, 2])),
        product_of_experts(scores, np.array([[0.0, 9.0], [0.0, 9.0]]), np.array([0, 1, 2]), temperature=1),
    ):
        np.testing.assert_allclose(mixed[1], math.log(0.375))


def test_after_a_token_impossible_for_all_the_prior_stands_in():
    scores = np.array([[-np.inf, math.log(0.5), math.log(0.4)], [-np.inf, math.log(0.1), math.log(0.8)]])
    offsets, prior = np.array([0, 3]), np.array([0.75, 0.25])
    # .75 * .5 + .25 * .1 = .4; then bayes weighs .375 : .025 = 15/16 : 1/16 and posterior has no more to go by
    np.testing.assert_allclose(bayes(scores, offsets, prior=prior), [-np.inf, math.log(0.4), math.log(0.425)])
    np.testing.assert_allclose(posterior(scores, offsets, prior=prior), [-np.inf, math.log(0.4), math.log(0.5)])
    # An expert without a prior cannot come in.
    one = posterior(np.array([[-np.inf, -1.0], [-1.0, -3.0]]), np.array([0, 2]), prior=np.array([1.0, 0.0]))
    np.testing.assert_array_equal(one, [-np.inf, -1.0])
    # For the product it is the clustering weights: exp(0) : exp(-log 3) = 3 : 1
    distances = np.array([[0.0, 5.0], [0.0, math.sqrt(math.log(3))], [0.0, 5.0]])
    mixed = product_of_experts(scores, distances, offsets, temperature=1)
    np.testing.assert_allclose(mixed[:2], [-np.inf, math.log(0.4)])


def test_oracle_is_the_best_expert_of_each_document():
    # Document 0: .5 * .5 = .25 against .9 * .1 = .09; document 1: .2 against .3
    scores = np.log([[0.5, 0.5, 0.2], [0.9, 0.1, 0.3]])
    np.testing.assert_array_equal(oracle(scores, np.array([0, 2, 2, 3])), [scores[0, 0], scores[0, 1], scores[1, 2]])
    # By the first token of document 0 alone, the second expert
    counted = np.array([True, False, True])
    np.testing.assert_array_equal(oracle(scores, np.array([0, 2, 3]), counted=counted), scores[1])


def test_oracle_takes_the_fewest_impossible_tokens_and_then_the_likeliest():
    inf = np.inf
    scores = np.array([[-1.0, -inf, -inf], [-9.0, -inf, -9.0], [-8.0, -inf, -9.0]])
    np.testing.assert_array_equal(oracle(scores, np.array([0, 3])), scores[2])


def test_oracle_bounds_every_choice_of_one_expert_per_document():
    scores = random_scores()
    best = oracle(scores, OFFSETS)
    for expert in range(4):
        for begin, end in itertools.pairwise(OFFSETS.tolist()):
            assert best[begin:end].sum() >= single(scores, expert)[begin:end].sum()


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "prior of shape (2,) for 4 experts"),
        ([0.5, 0.5, 0.5, 0.5], "prior is [0.5 0.5 0.5 0.5], with sum 2.0"),
        ([1.5, -0.5, 0, 0], "with sum 1.0; expected weights of at least 0 that sum to 1"),
        ([np.nan, 0.5, 0.5, 0], "with sum nan"),
    ],
)
def test_a_prior_that_is_no_distribution_is_refused(prior, message):
    for use in (
        lambda: fixed_prior(random_scores(), np.array(prior)),
        lambda: bayes(random_scores(), OFFSETS, prior=np.array(prior)),
        lambda: posterior(random_scores(), OFFSETS, prior=np.array(prior)),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            use()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (np.array([0, 49]), "offsets run from 0 to 49, there are 50 tokens"),
        (np.array([1, 50]), "offsets run from 1 to 50"),
        (np.array([0, 9, 8, 50]), "expected ascending numbers from 0 to the number of tokens"),
        (np.array([0.0, 50.0]), "dtype float64; expected integers"),
        (np.array([], dtype=np.int64), "offsets of shape (0,)"),
    ],
)
def test_offsets_that_do_not_cover_the_tokens_are_refused(offsets, message):
    for use in (
        lambda: bayes(random_scores(), offsets),
        lambda: posterior(random_scores(), offsets),
        lambda: oracle(random_scores(), offsets),
        lambda: product_of_experts(random_scores(), random_distances(), offsets, temperature=1),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            use()


def test_settings_of_all_routed_ensembles_are_checked():
    for top_k in (0, 5):
        for use in (
            lambda: bayes(random_scores(), OFFSETS, top_k=top_k),  # noqa: B023 - called at once
            lambda: posterior(random_scores(), OFFSETS, top_k=top_k),  # noqa: B023
            lambda: product_of_experts(random_scores(), random_distances(), OFFSETS, temperature=1, top_k=top_k),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=re.escape(f"top_k={top_k} is not in [1, 4]")):
                use()
    with pytest.raises(ConfigError, match=re.escape("temperature=0 is not a positive finite number")):
        product_of_experts(random_scores(), random_distances(), OFFSETS, temperature=0)
    with pytest.raises(DataError, match=r"distances of shape \(1, 4\) do not fit"):
        product_of_experts(random_scores(), random_distances(1), OFFSETS, temperature=1)


def test_nats_are_the_logarithm_of_the_perplexity():
    # (log 2 + log 8) / 2 = log 4
    assert nats_per_token(np.log([0.5, 0.125])) == pytest.approx(math.log(4))
    assert nats_per_token(np.array([-1.0, -np.inf])) == math.inf
    assert perplexity(np.array([-1e4])) == math.inf  # beyond float64


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
