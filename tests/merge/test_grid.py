import itertools
import math
import re
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.errors import ConfigError, DataError
from cbtm.merge import ensembles, grid
from cbtm.merge.grid import Setting, mix_grid
from cbtm.merge.router import routing_weights

KINDS = ("clustering", "product_of_experts", "bayes", "posterior", "uniform", "prior", "oracle")


def all_settings(n_experts, temperatures=(0.05, 1.0), powers=(2, 4), top_ks=None):
    """Every kind with every top-k."""
    found = [Setting(kind, n_experts) for kind in ("uniform", "prior", "oracle")]
    for top_k in top_ks or range(1, n_experts + 1):
        found += [Setting(kind, top_k) for kind in ("bayes", "posterior")]
        found += [
            Setting(kind, top_k, temperature=temperature, distance_power=power)
            for kind in ("clustering", "product_of_experts")
            for temperature in temperatures
            for power in powers
        ]
    return found


def problem(lengths=(7, 1, 0, 42), n_experts=4, seed=0):
    """Scores (k, n), distances (n, k), offsets and a prior."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scores = -rng.exponential(3, size=(n_experts, offsets[-1])).astype(np.float32)
    distances = rng.uniform(0.5, 1.4, size=(offsets[-1], n_experts)).astype(np.float32)
    return scores, distances, offsets, rng.dirichlet(np.ones(n_experts))


def defined(setting, scores, distances, offsets, prior, counted=None):
    """Log-probability of each token, by the definitions."""
    routed = {"temperature": setting.temperature, "distance_power": setting.distance_power, "top_k": setting.top_k}
    match setting.ensemble:
        case "clustering":
            return ensembles.clustering(scores, distances, **routed)
        case "product_of_experts":
            return ensembles.product_of_experts(scores, distances, offsets, **routed)
        case "bayes":
            return ensembles.bayes(scores, offsets, prior=prior, top_k=setting.top_k)
        case "posterior":
            return ensembles.posterior(scores, offsets, prior=prior, top_k=setting.top_k)
        case "uniform":
            return ensembles.uniform(scores)
        case "prior":
            return ensembles.fixed_prior(scores, prior)
        case "oracle":
            return ensembles.oracle(scores, offsets, counted=counted)


def token_weights(setting, scores, distances, offsets, prior):
    """Weights of the experts at each token, written out token by token, shape (n, k)."""
    k = len(scores)
    scores = scores.astype(np.float64)
    rows = []
    with np.errstate(divide="ignore"):
        start = np.log(prior)
    for begin, end in itertools.pairwise(offsets.tolist()):
        for t in range(begin, end):
            if setting.ensemble == "uniform":
                logs = np.zeros(k)
            elif setting.ensemble == "prior" or (setting.ensemble in ("bayes", "posterior") and t == begin):
                logs = start
            elif setting.ensemble in ("bayes", "posterior"):
                read = scores[:, t - 1 : t] if setting.ensemble == "bayes" else scores[:, begin:t]
                logs = start + read.sum(axis=1)
                logs = start if np.isneginf(logs).all() else logs
            else:
                energy = distances[t].astype(np.float64) ** setting.distance_power
                logs = -(energy - energy.min()) / setting.temperature
                if setting.ensemble == "product_of_experts":
                    product = logs + scores[:, t - 1]
                    logs = logs if np.isneginf(product).all() else product
                    logs = np.zeros(k) if t == begin else logs
            kept = sorted(range(k), key=lambda j: (-logs[j], j))
            kept = kept if setting.ensemble in ("uniform", "prior") else kept[: setting.top_k]
            weights = np.zeros(k)
            weights[kept] = np.exp(logs[kept] - logs.max())
            rows.append(weights / weights.sum())
    return np.array(rows).reshape(-1, k)


def by_document(values, offsets):
    return [values[begin:end].sum() for begin, end in itertools.pairwise(offsets.tolist())]


def check_all(scores, distances, offsets, prior, counted, chosen, **options):
    """Every sum of every setting against the definitions."""
    found = mix_grid(list(scores), distances, offsets, chosen, prior=prior, counted=counted, **options)
    counts = np.ones(len(distances), bool) if counted is None else counted
    for setting, sums in zip(chosen, found, strict=True):
        logs = np.where(counts, defined(setting, scores, distances, offsets, prior, counted), 0)
        np.testing.assert_allclose(sums.nll, by_document(-logs, offsets), rtol=1e-10, atol=1e-12, err_msg=str(setting))
        np.testing.assert_array_equal(sums.impossible, by_document(np.isneginf(logs), offsets), err_msg=str(setting))
        check_weights(setting, sums, scores, distances, offsets, prior, counts)
        np.testing.assert_array_equal(
            sums.passes, written_passes(setting, distances, offsets, prior), err_msg=str(setting)
        )


def check_weights(setting, sums, scores, distances, offsets, prior, counts):
    if setting.ensemble == "oracle":
        used, entropy = counts.astype(float), np.zeros(len(counts))
    else:
        weights = token_weights(setting, scores, distances, offsets, prior) * counts[:, np.newaxis]
        used = np.count_nonzero(weights, axis=1)
        entropy = -np.sum(weights * np.log(weights, out=np.zeros_like(weights), where=weights > 0), axis=1)
    np.testing.assert_array_equal(sums.experts_used, by_document(used, offsets), err_msg=str(setting))
    np.testing.assert_allclose(sums.entropy, by_document(entropy, offsets), rtol=1e-9, atol=1e-12, err_msg=str(setting))


def written_passes(setting, distances, offsets, prior):
    """Token-passes, document by document and expert by expert."""
    n_experts, found = distances.shape[1], []
    for begin, end in itertools.pairwise(offsets.tolist()):
        readers = np.count_nonzero(prior) if setting.ensemble == "prior" else n_experts
        total = readers * (end - begin)
        if setting.ensemble == "clustering":
            nearest = [sorted(range(n_experts), key=lambda j: (row[j], j)) for row in distances[begin:end]]
            total = sum(
                max((t + 1 for t, order in enumerate(nearest) if expert in order[: setting.top_k]), default=0)
                for expert in range(n_experts)
            )
        found.append(total)
    return found


SCORES = st.one_of(st.sampled_from([0.0, -0.5, -0.5, -2.0, -1e4, -np.inf]), st.floats(-30, 0, width=32))
DISTANCES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]), st.floats(0, 1.5, width=32))


@st.composite
def problems(draw):
    """Few documents and experts, with ties, impossible tokens, prompts, and chunks that cut documents."""
    n_experts = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(sum))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    n = int(offsets[-1])

    def array(values, shape, dtype):
        return np.array(draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape))), dtype).reshape(
            shape
        )

    shares = array(st.integers(0, 3), (n_experts,), float)
    prior = shares / shares.sum() if shares.sum() else np.full(n_experts, 1 / n_experts)
    counted = draw(st.one_of(st.none(), st.just(array(st.booleans(), (n,), bool))))
    scores, distances = array(SCORES, (n_experts, n), np.float32), array(DISTANCES, (n, n_experts), np.float32)
    return scores, distances, offsets, prior, counted, draw(st.sampled_from([1, 7, 2**17]))


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_sum_of_every_setting_is_as_defined(drawn):
    *given_arrays, chunk = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_CHUNK_ELEMENTS", chunk)
        patch.setattr(grid, "_UNIT_ELEMENTS", 8)
        check_all(*given_arrays, all_settings(given_arrays[0].shape[0]))


@pytest.mark.parametrize("seed", range(3))
def test_128_experts_are_mixed_as_defined(seed):
    scores, distances, offsets, prior = problem(lengths=(30, 1, 60), n_experts=128, seed=seed)
    top_ks = [128, 64, 5, 1]
    chosen = all_settings(128, temperatures=(0.1,), powers=(2,), top_ks=top_ks)
    check_all(scores, distances, offsets, prior, np.arange(91) % 7 != 0, chosen)


def test_experts_that_are_far_apart_do_not_underflow():
    # Each has weight only where another is a million times likelier: p = exp(-1e4) beside exp(-1).
    scores, distances, offsets, prior = problem()
    scores[0] -= 1e4
    scores[1, ::2] = -np.inf
    check_all(scores, distances, offsets, prior, None, all_settings(4))
    one = [Setting("clustering", 4, temperature=1e-3, distance_power=2)]
    distances[:] = [0, 2, 2, 2]  # weights of exp(-4000), which routing_weights has as 0
    (sums,) = mix_grid(list(scores), distances, offsets, one)
    np.testing.assert_allclose(sums.nll, by_document(-scores[0].astype(np.float64), offsets))
    np.testing.assert_array_equal(sums.experts_used, np.diff(offsets))


def test_a_weight_that_underflows_takes_no_part_even_where_the_others_fail():
    scores, distances = np.array([[-np.inf], [-1.0]]), np.array([[0.0, 2.0]])
    assert routing_weights(distances, temperature=1e-3)[0].tolist() == [1, 0]
    for kind, nll in (("clustering", math.inf), ("posterior", 1 + math.log(2))):
        cool = {"temperature": 1e-3, "distance_power": 2} if kind == "clustering" else {}
        (sums,) = mix_grid(list(scores), distances, np.array([0, 1]), [Setting(kind, 2, **cool)])
        assert sums.nll.tolist() == [pytest.approx(nll)]
        assert sums.impossible.tolist() == [math.isinf(nll)]


def test_posterior_turns_to_a_far_second_where_the_first_fails():
    # As in the definition: -1 - log 2, then log(exp(-2000) * exp(-.5)), then the second alone
    scores = np.array([[-1.0, -np.inf, -1.0], [-2001.0, -0.5, -0.25]])
    (sums,) = mix_grid(list(scores), np.ones((3, 2)), np.array([0, 3]), [Setting("posterior", 2)])
    np.testing.assert_allclose(sums.nll, [1 + math.log(2) + 2000.5 + 0.25], rtol=1e-13)


def test_posterior_sums_to_the_bayesian_mixture_of_whole_documents():
    scores, distances, offsets, prior = problem(lengths=(300, 1, 40), n_experts=8)
    (sums,) = mix_grid(list(scores), distances, offsets, [Setting("posterior", 8)], prior=prior)
    for nll, begin, end in zip(sums.nll, offsets, offsets[1:], strict=False):
        joint = np.log(prior) + scores[:, begin:end].sum(axis=1, dtype=np.float64)
        assert nll == pytest.approx(-joint.max() - math.log(np.exp(joint - joint.max()).sum()), rel=1e-12)


def test_impossible_tokens_are_counted_and_make_their_document_infinite():
    scores, distances, offsets, prior = problem(lengths=(3, 3))
    scores[:, [0, 2]] = -np.inf
    for setting, sums in zip(
        all_settings(4), mix_grid(list(scores), distances, offsets, all_settings(4), prior=prior), strict=True
    ):
        assert sums.impossible.tolist() == [2, 0], setting
        assert np.isinf(sums.nll).tolist() == [True, False], setting


def test_permuting_the_experts_changes_nothing():
    scores, distances, offsets, prior = problem(n_experts=6)
    # At the first token all weights of these are equal, so which are kept depends on the order.
    chosen = [
        s
        for s in all_settings(6)
        if s.top_k == 6 or s.ensemble == "clustering" or (s.ensemble in ("bayes", "posterior"))
    ]
    order = np.random.default_rng(1).permutation(6)
    before = mix_grid(list(scores), distances, offsets, chosen, prior=prior)
    after = mix_grid(list(scores[order]), distances[:, order], offsets, chosen, prior=prior[order])
    for one, other in zip(before, after, strict=True):
        for values, others in zip(astuple(one), astuple(other), strict=True):
            np.testing.assert_allclose(values, others, rtol=1e-12)


def test_one_expert_is_that_expert():
    scores, distances, offsets, prior = problem(n_experts=1)
    alone = by_document(-scores[0].astype(np.float64), offsets)
    for sums in mix_grid(list(scores), distances, offsets, all_settings(1), prior=prior):
        np.testing.assert_allclose(sums.nll, alone, rtol=1e-14)
        np.testing.assert_array_equal(sums.experts_used, np.diff(offsets))
        np.testing.assert_array_equal(sums.entropy, 0)
        np.testing.assert_array_equal(sums.passes, np.diff(offsets))


def test_equal_experts_are_one_whatever_weighs_them():
    scores, distances, offsets, prior = problem()
    scores[:] = scores[0]
    for sums in mix_grid(list(scores), distances, offsets, all_settings(4), prior=prior):
        np.testing.assert_allclose(sums.nll, by_document(-scores[0].astype(np.float64), offsets), rtol=1e-13)


def test_certain_tokens_cost_nothing_however_they_are_mixed():
    _, distances, offsets, prior = problem(n_experts=3)
    for sums in mix_grid([np.zeros(50)] * 3, distances, offsets, all_settings(3), prior=prior):
        np.testing.assert_allclose(sums.nll, 0, atol=1e-13)
        assert (sums.nll >= 0).all()


def test_tiny_costs_keep_their_digits():
    # 1 - 1e-7 is the nearest that float32 probabilities come to 1; their logarithms say more.
    scores = np.full((2, 4), -1e-9, dtype=np.float32)
    (sums,) = mix_grid(list(scores), np.ones((4, 2)), np.array([0, 4]), [Setting("uniform", 2)])
    np.testing.assert_allclose(sums.nll, 4e-9, rtol=1e-6)


def test_results_do_not_depend_on_threads_or_on_the_kind_of_array(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_UNIT_ELEMENTS", 64)
    scores, distances, offsets, prior = problem(lengths=(5, 60, 0, 2, 9, 31, 1, 8))
    chosen, counted = all_settings(4), np.arange(116) % 3 > 0
    expected = mix_grid(list(scores), distances, offsets, chosen, prior=prior, counted=counted)
    for expert, row in enumerate(scores):
        np.save(tmp_path / f"{expert}.npy", row)
    np.save(tmp_path / "distances.npy", distances)
    stored = [np.load(tmp_path / f"{expert}.npy", mmap_mode="r") for expert in range(4)]
    near = np.load(tmp_path / "distances.npy", mmap_mode="r")
    for threads in (1, 2, 5):
        found = mix_grid(stored, near, offsets, chosen, prior=prior, counted=counted, threads=threads)
        for one, other in zip(expected, found, strict=True):
            for values, others in zip(astuple(one), astuple(other), strict=True):
                np.testing.assert_array_equal(values, others)


def test_settings_do_not_depend_on_their_company():
    scores, distances, offsets, prior = problem()
    chosen = [*all_settings(4), *all_settings(4)[5:9]]  # some twice
    together = mix_grid(list(scores), distances, offsets, chosen, prior=prior)
    for setting, sums in zip(chosen, together, strict=True):
        (alone,) = mix_grid(list(scores), distances, offsets, [setting], prior=prior)
        for values, others in zip(astuple(sums), astuple(alone), strict=True):
            np.testing.assert_allclose(values, others, rtol=1e-12, err_msg=str(setting))


def test_a_document_longer_than_a_chunk_is_as_any_other(monkeypatch):
    monkeypatch.setattr(grid, "_CHUNK_ELEMENTS", 12)  # 3 tokens of 4 experts
    scores, distances, offsets, prior = problem()
    check_all(scores, distances, offsets, prior, np.arange(50) % 5 > 1, all_settings(4))


def test_sparse_scores_do_where_no_setting_looks():
    scores, distances, offsets, _ = problem(n_experts=6)
    near = np.argsort(distances, axis=1, kind="stable")[:, :2]
    sparse = np.full_like(scores, np.nan)
    np.put_along_axis(sparse.T, near, np.take_along_axis(scores.T, near, axis=1), axis=1)
    counted = np.arange(50) % 5 > 0
    sparse[:, ~counted] = np.nan
    chosen = [Setting("clustering", k, temperature=0.1, distance_power=2) for k in (2, 1)]
    found = mix_grid(list(sparse), distances, offsets, chosen, counted=counted)
    for one, other in zip(found, mix_grid(list(scores), distances, offsets, chosen, counted=counted), strict=True):
        for values, others in zip(astuple(one), astuple(other), strict=True):
            np.testing.assert_array_equal(values, others)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e-3])
@pytest.mark.parametrize("setting", all_settings(4, (0.1,), (2,), [4]), ids=lambda setting: setting.ensemble)
def test_damage_that_a_setting_looks_at_is_refused_with_its_place(setting, wrong, monkeypatch):
    monkeypatch.setattr(grid, "_CHUNK_ELEMENTS", 12)
    scores, distances, offsets, prior = problem()
    scores[2, 33] = wrong
    message = f"log-probability {np.float64(np.float32(wrong))} at token 33 of expert 2 is not in [-inf, 0]"
    for counted in (None, np.arange(50) % 2 > 0):
        with pytest.raises(DataError, match=re.escape(message)):
            mix_grid(list(scores), distances, offsets, [setting], prior=prior, counted=counted, threads=2)


def test_missing_scores_of_an_expert_without_a_prior_do_no_harm():
    scores, distances, offsets, _ = problem()
    scores[3] = np.nan
    prior = np.array([0.5, 0.25, 0.25, 0.0])
    (sums,) = mix_grid(list(scores), distances, offsets, [Setting("prior", 4)], prior=prior)
    expected = ensembles.fixed_prior(scores[:3], prior[:3])
    np.testing.assert_allclose(sums.nll, by_document(-expected, offsets))
    np.testing.assert_array_equal(sums.passes, 3 * np.diff(offsets))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.5, 1e30])
def test_distances_that_are_none_are_refused(wrong):
    scores, distances, offsets, _ = problem()
    distances = distances.astype(np.float64)
    distances[7, 1] = wrong
    for kind in ("clustering", "product_of_experts"):
        chosen = [Setting(kind, 4, temperature=1, distance_power=20)]
        with pytest.raises(DataError, match="expected finite ones of at least 0, also raised to distance_power=20"):
            mix_grid(list(scores), distances, offsets, chosen)
    mix_grid(list(scores), distances, offsets, [Setting("bayes", 4)])  # which does not look at them


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("clustering", 5, temperature=1, distance_power=2), "top_k=5 of clustering is not in [1, 4]"),
        (Setting("bayes", 0), "top_k=0 of bayes is not in [1, 4]"),
        (Setting("clustering", 4, distance_power=2), "temperature=None of clustering is not a positive finite number"),
        (Setting("clustering", 4, temperature=0, distance_power=2), "temperature=0 of clustering"),
        (Setting("clustering", 4, temperature=-1, distance_power=2), "temperature=-1 of clustering"),
        (
            Setting("product_of_experts", 4, temperature=1, distance_power=math.inf),
            "distance_power=inf of product_of_experts",
        ),
        (
            Setting("posterior", 4, temperature=1),
            "temperature=1 is set for posterior, which does not look at distances",
        ),
        (Setting("prior", 4), "the prior ensemble takes its weights from prior, which is None"),
        (Setting("mean", 4), "ensemble='mean' is not one of clustering, product_of_experts, bayes"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    scores, distances, offsets, _ = problem()
    with pytest.raises(ConfigError, match=re.escape(message)):
        mix_grid(list(scores), distances, offsets, [setting])


def test_arrays_that_do_not_fit_are_refused():
    scores, distances, offsets, _ = problem()
    one = [Setting("uniform", 4)]
    with pytest.raises(DataError, match=re.escape("distances of shape (50, 3) for 4 experts")):
        mix_grid(list(scores), distances[:, :3], offsets, one)
    with pytest.raises(DataError, match=re.escape("scores of expert 1 of shape (49,); expected (50,)")):
        mix_grid([scores[0], scores[1, :49], scores[2], scores[3]], distances, offsets, one)
    with pytest.raises(DataError, match="offsets run from 0 to 50, there are 49 tokens"):
        mix_grid(list(scores[:, :49]), distances[:49], offsets, one)
    with pytest.raises(DataError, match=re.escape("counted has shape (49,)")):
        mix_grid(list(scores), distances, offsets, one, counted=np.ones(49, bool))
    with pytest.raises(DataError, match=re.escape("for 0 experts")):
        mix_grid([], distances[:, :0], offsets, one)
    with pytest.raises(DataError, match=re.escape("prior of shape (3,) for 4 experts")):
        mix_grid(list(scores), distances, offsets, [Setting("prior", 4)], prior=np.full(3, 1 / 3))
    with pytest.raises(ConfigError, match="threads=0 is below 1"):
        mix_grid(list(scores), distances, offsets, one, threads=0)


def test_no_settings_and_no_documents_are_no_work():
    scores, distances, offsets, _ = problem()
    assert mix_grid(list(scores), distances, offsets, []) == []
    (sums,) = mix_grid([np.empty(0)] * 2, np.empty((0, 2)), np.array([0]), [Setting("uniform", 2)])
    assert sums.nll.shape == sums.passes.shape == (0,)


def test_progress_counts_tokens_in_order(monkeypatch):
    monkeypatch.setattr(grid, "_UNIT_ELEMENTS", 32)  # 8 tokens of 4 experts
    scores, distances, offsets, _ = problem(lengths=(7, 1, 0, 42, 5))
    seen = []
    mix_grid(
        list(scores), distances, offsets, all_settings(4)[:1], threads=2, progress=lambda *so_far: seen.append(so_far)
    )
    assert seen == [(8, 55), (50, 55), (55, 55)]


def test_memory_does_not_grow_with_tokens_times_experts(tmp_path):
    n_experts, n_tokens = 128, 20_000  # 2.6 M scores: 20 MB as float64, in chunks of 1 MiB
    distances = np.memmap(tmp_path / "distances", np.float32, "w+", shape=(n_tokens, n_experts))
    distances[:] = np.linspace(0.5, 1.5, n_experts)
    row = np.memmap(tmp_path / "scores", np.float32, "w+", shape=(n_tokens,))
    row[:] = -1
    chosen = all_settings(n_experts, (0.1,), (2,), [128, 4])
    peaks = []
    for lengths in ([100] * 200, [n_tokens]):
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tracemalloc.start()
        found = mix_grid([row] * n_experts, distances, offsets, chosen, prior=np.full(n_experts, 1 / n_experts))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        for sums in found:
            np.testing.assert_allclose(sums.nll, lengths, rtol=1e-12)
    assert max(peaks) < 18 * 2**20
