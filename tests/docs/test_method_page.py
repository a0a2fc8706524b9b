"""docs/method.md: every formula names a function that is there, and says what that function computes."""

import importlib
import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shell_blocks import fenced

from cbtm.cluster.assignment import balanced_assignment
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import nearest_centers
from cbtm.merge.average import average_models
from cbtm.merge.ensembles import mix, posterior, product_of_experts
from cbtm.merge.intervals import Resamples
from cbtm.merge.measures import bits_per_byte, perplexity
from cbtm.merge.router import PrefixRouter, routing_weights
from cbtm.train.config import TrainConfig

FORMULAS = {
    content.partition("\n")[0]: content.partition("\n")[2].strip().splitlines()
    for _, language, content in fenced("docs/method.md")
    if language == "text"
}
RNG = random.Random(0)


def tfidf(lines: list[str], _: Path) -> None:
    assert lines == [
        "idf(w)  = ln((1 + n) / (1 + df(w))) + 1",
        "e(text) = normalise( sum over the words w of text, with repetition, of idf(w) · v(w) )",
    ]
    texts = ["red apple apple 12 4th", "red lorry", "green apple tree", "green lorry green"]
    embedder = TfidfSvdEmbedder(n_components=3, svd_iterations=20).fit(texts)
    words = {text: [word for word in text.split() if not word[0].isdigit()] for text in texts}  # numbers are none
    assert sorted(embedder.vocabulary_) == sorted({word for found in words.values() for word in found})
    for word, column in embedder.vocabulary_.items():
        df = sum(word in found for found in words.values())
        assert embedder.idf_[column] == pytest.approx(math.log((1 + 4) / (1 + df)) + 1)
    for text, vector in zip(texts, embedder.transform(texts), strict=True):
        total = [0.0] * 3
        for word in words[text]:
            column = embedder.vocabulary_[word]
            for d in range(3):
                total[d] += float(embedder.idf_[column]) * float(embedder.components_[d, column])
        length = math.sqrt(sum(value * value for value in total))
        assert vector.tolist() == pytest.approx([value / length for value in total], abs=1e-5)


def balanced(lines: list[str], _: Path) -> None:
    assert "floor(n/k) or ceil(n/k) points" in lines[0]
    points, centers = np.array([[RNG.random(), RNG.random()] for _ in range(7)]), np.array([[0, 0], [1, 0], [0.4, 1]])
    cost = np.array([[sum((p - c) ** 2) for c in centers] for p in points])
    sizes = [size for size in product((2, 3), repeat=3) if sum(size) == 7]
    labels = [[c for c, count in enumerate(size) for _ in range(count)] for size in sizes]
    least = min(sum(cost[i, c] for i, c in enumerate(order)) for one in labels for order in permutations(one))
    found = balanced_assignment(cost).labels
    assert sum(cost[i, c] for i, c in enumerate(found)) == pytest.approx(least)
    assert sorted(Counter(found.tolist()).values()) == [2, 2, 3]


def nearest(lines: list[str], _: Path) -> None:
    assert lines == ["cluster of a document x = argmin_c |e(x) − centre c|², the lower c of equal ones"]
    points, centers = np.float32([[0, 0], [2, 0], [1, 0]]), np.float32([[0, 0], [2, 0], [2, 0]])
    assert nearest_centers(points, centers).tolist() == [0, 1, 0]


def equal_tokens(lines: list[str], _: Path) -> None:
    assert lines[:3] == [
        "sequences of an expert in a step  = B / k",
        "tokens of the dense model         = steps · B · L",
        "tokens of the k experts           = k · steps · (B / k) · L",
    ]
    config = TrainConfig(steps=400, sequences_per_step=32, context_length=256, warmup_steps=20)
    assert config.share(8) == 4
    assert config.total_tokens == 400 * 32 * 256 == 8 * 400 * 4 * 256


def routing(lines: list[str], _: Path) -> None:
    assert lines == ["w_c(t) = exp(−d_c(x_t)^power / T) / sum over the kept experts j of exp(−d_j(x_t)^power / T)"]
    distances = [0.9, 0.5, 1.1]
    for power, temperature, kept in ((2, 0.1, [0, 1, 2]), (4, 0.3, [0, 1, 2]), (2, 0.1, [0, 1])):
        parts = [math.exp(-(distances[c] ** power) / temperature) if c in kept else 0.0 for c in range(3)]
        expected = [part / sum(parts) for part in parts]
        found = routing_weights(np.array([distances]), temperature=temperature, distance_power=power, top_k=len(kept))
        assert found[0].tolist() == pytest.approx(expected)


def incremental(lines: list[str], _: Path) -> None:
    assert lines == ["e(first i words) = s_i / |s_i|,   s_i = s_(i−1) + idf(word i) · v(word i),   s_0 = 0"]
    vectors, center = {"north": [1.0, 0.0], "east": [0.0, 2.0]}, [0.6, 0.8]
    router = PrefixRouter({"north": 0, "east": 1}, np.float32([[1, 0], [0, 2]]), np.array([center]))
    text, s = "north east north", [0.0, 0.0]
    for i, end in enumerate((5, 10, 16)):
        s = [a + b for a, b in zip(s, vectors[text.split()[i]], strict=True)]
        unit = [value / math.hypot(*s) for value in s]
        assert router.distances(text, np.array([end]))[0, 0] == pytest.approx(math.dist(unit, center), abs=1e-6)


def mixture(lines: list[str], _: Path) -> None:
    assert lines == ["log p(t) = log sum_c exp( log w_c(t) + log p_c(t) )"]
    p, w = [[0.5, 0.1], [0.2, 0.4]], [[0.25, 0.75], [0.9, 0.1]]  # expert by token; token by expert
    expected = [sum(w[t][c] * p[c][t] for c in range(2)) for t in range(2)]
    assert np.exp(mix(np.log(p), np.array(w))).tolist() == pytest.approx(expected)


def product_weights(lines: list[str], _: Path) -> None:
    assert lines[0].startswith("w_c(t) = clustering weight of c at t · p_c(t − 1) / sum_j")
    p, d, temperature = [[0.5, 0.1, 0.3], [0.2, 0.4, 0.6]], [[0.2, 0.4], [0.3, 0.1], [0.5, 0.9]], 0.2
    expected = [(p[0][0] + p[1][0]) / 2]  # uniform at the first token
    for t in (1, 2):
        parts = [math.exp(-(d[t][c] ** 2) / temperature) * p[c][t - 1] for c in range(2)]
        expected.append(sum(part * p[c][t] for c, part in enumerate(parts)) / sum(parts))
    found = product_of_experts(np.log(p), np.array(d), np.array([0, 3]), temperature=temperature)
    assert np.exp(found).tolist() == pytest.approx(expected)


def posterior_weights(lines: list[str], _: Path) -> None:
    assert lines == ["w_c(t) = prior_c · p_c(0) · … · p_c(t − 1) / sum_j prior_j · p_j(0) · … · p_j(t − 1)"]
    p = [[0.5, 0.1, 0.3], [0.2, 0.4, 0.6]]
    expected = []
    for t in range(3):
        parts = [0.5 * math.prod(p[c][:t]) for c in range(2)]
        expected.append(sum(part * p[c][t] for c, part in enumerate(parts)) / sum(parts))
    assert np.exp(posterior(np.log(p), np.array([0, 3]))).tolist() == pytest.approx(expected)


def perplexities(lines: list[str], _: Path) -> None:
    assert lines == ["nats       = −(sum over the tokens t of log p(t)) / n_tokens", "perplexity = exp(nats)"]
    # 1/2 · 1/8 · 1/2 = 1/32 is (1/perplexity)^3.
    assert perplexity(np.log([0.5, 0.125, 0.5])) == pytest.approx(32 ** (1 / 3))


def bytes_(lines: list[str], _: Path) -> None:
    assert lines == [
        "bits_per_byte = −(sum over the tokens t of log p(t)) / (ln 2 · UTF-8 bytes that these tokens spell)"
    ]
    assert bits_per_byte(np.log([0.5, 0.125, 0.5]), len("é!é".encode())) == pytest.approx((1 + 3 + 1) / 5)


def intervals(lines: list[str], _: Path) -> None:
    assert lines[0] == "perplexity of a resample = exp( sum over the drawn i of s_i / sum over the drawn i of n_i )"
    assert lines[2].startswith("interval                 = from the floor(0.025 · (R − 1))-th of them in ascending")
    n, s, dense, resamples = [3, 5, 2], [6.0, 9.0, 7.0], [5.0, 9.5, 8.0], 200
    rng = np.random.default_rng(4)
    drawn = rng.integers(3, size=(resamples, 3)).tolist()
    values = sorted(math.exp(sum(s[i] for i in one) / sum(n[i] for i in one)) for one in drawn)
    ratios = sorted(math.exp(sum(s[i] - dense[i] for i in one) / sum(n[i] for i in one)) for one in drawn)
    tail = math.floor(0.025 * (resamples - 1))
    found = Resamples(np.array(n), random_state=4, n_resamples=resamples)
    ends = found.intervals(np.array([s]))[0].tolist()
    assert ends == pytest.approx([values[tail], values[-1 - tail]])
    ends = found.ratio_intervals(np.array([s]), np.array(dense))[0].tolist()
    assert ends == pytest.approx([ratios[tail], ratios[-1 - tail]])


def averages(lines: list[str], folder: Path) -> None:
    assert lines == ["theta = sum_c a_c · theta_c / sum_c a_c"]
    for name, value in (("one", [1.0, 2.0]), ("two", [5.0, 0.0]), ("mean", None)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        if value:
            save_file({"theta": np.float32(value)}, folder / name / "model.safetensors", metadata={"format": "pt"})
    average_models([folder / "one", folder / "two"], [1.0, 3.0], folder / "mean")
    assert load_file(folder / "mean/model.safetensors")["theta"].tolist() == [(1 + 15) / 4, 2 / 4]


EVALUATED: dict[str, Callable[[list[str], Path], None]] = {
    "cbtm.cluster.embedder.TfidfSvdEmbedder": tfidf,
    "cbtm.cluster.assignment.balanced_assignment": balanced,
    "cbtm.cluster.kmeans.nearest_centers": nearest,
    "cbtm.train.config.TrainConfig.share": equal_tokens,
    "cbtm.merge.router.routing_weights": routing,
    "cbtm.merge.router.PrefixRouter": incremental,
    "cbtm.merge.ensembles.mix": mixture,
    "cbtm.merge.ensembles.product_of_experts": product_weights,
    "cbtm.merge.ensembles.posterior": posterior_weights,
    "cbtm.merge.measures.perplexity": perplexities,
    "cbtm.merge.measures.bits_per_byte": bytes_,
    "cbtm.merge.intervals.Resamples": intervals,
    "cbtm.merge.average.average_models": averages,
}
ELSEWHERE = {
    "cbtm.merge.scorer.score_documents": "tests/merge/test_scorer.py",
    "cbtm.merge.evaluator.evaluate": "tests/merge/test_evaluator.py",
    "cbtm.merge.task_evaluator.evaluate_task": "tests/merge/test_task_evaluator.py",
}
"""Formulas that need models or a whole evaluation; these tests compute them by other means."""


def resolved(name: str) -> Any:
    """The object that a dotted name stands for."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("function", FORMULAS)
def test_every_formula_names_a_function_that_is_there(function):
    assert callable(resolved(function))


def test_every_formula_is_evaluated_here_or_elsewhere():
    assert set(FORMULAS) == EVALUATED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("function", EVALUATED)
def test_the_formula_as_written_is_what_the_function_computes(function, tmp_path):
    EVALUATED[function](FORMULAS[function], tmp_path)


def test_names_in_the_prose_are_there():
    from re import findall

    text = Path(__file__).parents[2].joinpath("docs/method.md").read_text(encoding="utf-8")
    for name in sorted(set(findall(r"`(cbtm(?:\.\w+)+)`", text))):
        resolved(name)
