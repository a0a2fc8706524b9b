import math
import re
import tracemalloc

import numpy as np
import pytest

from cbtm.errors import ConfigError, DataError
from cbtm.merge import intervals
from cbtm.merge.intervals import Resamples, bootstrap_interval, paired_bootstrap_interval


def documents(n_settings=3, n_documents=25, seed=5):
    """Sums of negative log-probabilities (settings, documents), and tokens (documents,)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 50, size=n_documents)
    return tokens * rng.uniform(1, 3, size=(n_settings, n_documents)), tokens


def written_out(nll, tokens, *, random_state, n_resamples, level):
    """Interval of one perplexity, a resample at a time with the same draws."""
    rng = np.random.default_rng(random_state)
    rates = []
    for _ in range(n_resamples):
        drawn = rng.integers(len(tokens), size=len(tokens)).tolist()
        rates.append(sum(nll[d] for d in drawn) / sum(int(tokens[d]) for d in drawn))
    rates.sort()
    tail = math.floor((1 - level) / 2 * (n_resamples - 1))
    return math.exp(rates[tail]), math.exp(rates[-1 - tail])


@pytest.mark.parametrize("level", [0.95, 0.8, 0.01])
@pytest.mark.parametrize("n_documents", [2, 25])
def test_intervals_are_those_of_a_plain_loop(level, n_documents):
    nll, tokens = documents(n_documents=n_documents)
    resamples = Resamples(tokens, random_state=3, n_resamples=101, level=level)
    expected = [written_out(row, tokens, random_state=3, n_resamples=101, level=level) for row in nll]
    np.testing.assert_allclose(resamples.intervals(nll), expected, rtol=1e-12)
    differences = [written_out(row - nll[0], tokens, random_state=3, n_resamples=101, level=level) for row in nll]
    np.testing.assert_allclose(resamples.ratio_intervals(nll, nll[0]), differences, rtol=1e-12)


def test_chunks_do_not_change_the_draws(monkeypatch):
    nll, tokens = documents()
    whole = Resamples(tokens, random_state=3).intervals(nll)
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 7 * 25)  # 7 resamples at once; 1000 = 142 * 7 + 6
    np.testing.assert_allclose(Resamples(tokens, random_state=3).intervals(nll), whole, rtol=1e-14)


def test_all_settings_are_measured_on_the_same_draws():
    nll, tokens = documents()
    resamples = Resamples(tokens, random_state=3)
    together = resamples.intervals(nll)
    for row, ends in zip(nll, together, strict=True):
        np.testing.assert_allclose(resamples.intervals(row[np.newaxis])[0], ends, rtol=1e-14)
    np.testing.assert_array_equal(resamples.intervals(nll), together)  # and again


def test_the_ratio_of_identical_arms_is_exactly_1():
    nll, tokens = documents()
    np.testing.assert_array_equal(Resamples(tokens, random_state=0).ratio_intervals(nll[:1], nll[0]), [[1, 1]])


def test_impossible_documents_make_only_the_resamples_that_drew_them_infinite():
    nll, tokens = documents(n_documents=6)
    nll[1, 2] = np.inf
    resamples = Resamples(tokens, random_state=3, n_resamples=101, level=0.9)
    found = resamples.intervals(nll)
    expected = [written_out(row, tokens, random_state=3, n_resamples=101, level=0.9) for row in nll]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # (5/6)^6 = 33 % of the resamples leave document 2 out
    assert np.isfinite(found[1, 0])
    assert np.isinf(found).tolist() == [[False, False], [False, True], [False, False]]
    ratios = resamples.ratio_intervals(nll, nll[0])
    assert np.isinf(ratios).tolist() == [[False, False], [False, True], [False, False]]
    np.testing.assert_array_equal(ratios[0], [1, 1])


def test_an_impossible_document_of_the_base_makes_ratios_0():
    nll, tokens = documents(n_documents=6)
    base = nll[0].copy()
    base[2] = np.inf
    found = Resamples(tokens, random_state=3, n_resamples=101, level=0.9).ratio_intervals(nll, base)
    np.testing.assert_array_equal(found[:, 0], 0)
    assert (found[:, 1] > 0).all()


def test_perplexities_beyond_float64_are_infinite():
    found = Resamples(np.array([1, 1]), random_state=0).intervals(np.array([[1e4, 1e4]]))
    np.testing.assert_array_equal(found, [[np.inf, np.inf]])


def test_no_settings_have_no_intervals():
    assert Resamples(np.array([1, 1]), random_state=0).intervals(np.empty((0, 2))).shape == (0, 2)


def test_memory_is_that_of_a_chunk():
    nll, tokens = documents(n_settings=4, n_documents=20_000)  # 1000 x 20000 counts would be 160 MB
    tracemalloc.start()
    Resamples(tokens, random_state=0, n_resamples=1000).intervals(nll)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 8 * intervals._CHUNK_ELEMENTS


def test_arrays_that_do_not_fit_are_refused():
    nll, tokens = documents()
    resamples = Resamples(tokens, random_state=0)
    with pytest.raises(DataError, match=re.escape("nll of shape (3, 24), document_tokens of shape (25,)")):
        resamples.intervals(nll[:, :24])
    with pytest.raises(DataError, match=re.escape("nll of shape (25,)")):
        resamples.intervals(nll[0])
    with pytest.raises(DataError, match=re.escape("base of shape (1, 24)")):
        resamples.ratio_intervals(nll, nll[0, :24])
    with pytest.raises(DataError, match=re.escape("base is -1.0 for document 4")):
        resamples.ratio_intervals(nll, np.where(np.arange(25) == 4, -1, nll[0]))
    with pytest.raises(DataError, match=re.escape("document_tokens of shape (1, 25)")):
        Resamples(tokens[np.newaxis], random_state=0)


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
        ([1.0, 2.0], [1], "1 documents; an interval over documents takes at least 2"),
        ([1.0, 2.0, 3.0], [1, 1], "nll of shape (1, 3), document_tokens of shape (2,)"),
        ([1.0, -2.0], [1, 1], "nll is -2.0 for document 1"),
        ([np.nan, 2.0], [1, 1], "nll is nan for document 0"),
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
