import math
from itertools import product

import numpy as np
import pytest

from cbtm.errors import ConfigError, DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.task_evaluator import TaskMembers, evaluate_task
from cbtm.merge.task_prompts import SeedPrompts, TaskPrompts
from cbtm.merge.task_scorer import TaskScores

ONE = {"temperatures": (0.5,), "distance_powers": (2,), "bootstrap_resamples": 200}
EVEN = np.log([0.5, 0.5])


def task(gold, *, n_seeds=1, answers=((1,), (2,))):
    none = np.zeros(0, dtype=np.int64)
    seeds = tuple(
        SeedPrompts(seed, none, (none,) * len(gold), "", ("",) * len(gold)) for seed in range(10, 10 + n_seeds)
    )
    return TaskPrompts(
        name="toy",
        shots=4,
        labels=tuple("abcdef"[: len(answers)]),
        answers=tuple(np.array(answer) for answer in answers),
        gold=np.array(gold),
        seeds=seeds,
        neutral=np.array([0, 1]),
        cut=3,
    )


def scores(rows, neutral=EVEN):
    """Scores of one seed from the probabilities of the answers' tokens, one row for each example."""
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array(rows))
    if log_probs.ndim == 2:
        log_probs = log_probs[np.newaxis]
    return TaskScores(log_probs.astype(np.float32), np.asarray(neutral, dtype=np.float32))


def random_scores(rng, made, n_tokens):
    shape = (len(made.seeds), len(made.gold), n_tokens)
    return TaskScores(
        -rng.exponential(2, size=shape).astype(np.float32), -rng.exponential(2, size=n_tokens).astype(np.float32)
    )


def rows_of(result, model, scoring="plain", **same):
    found = [row for row in result["rows"] if row["model"] == model and row["scoring"] == scoring]
    return [row for row in found if all(row[name] == value for name, value in same.items())]


def one_row(result, model, scoring="plain", **same):
    (row,) = rows_of(result, model, scoring, **same)
    return row


def near(task, n_experts, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 1.5, size=(len(task.seeds) * len(task.gold), n_experts)).astype(np.float32)


# --- models alone ---


def test_accuracy_by_hand():
    made = task([0, 0, 0, 1, 1, 1, 1, 0])
    model = scores([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9], [0.2, 0.3], [0.4, 0.5], [0.1, 0.2]])
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    # Reported are examples 1, 3, 5 and 7: right, wrong, right, wrong.
    row = one_row(result, "seed")
    assert (row["accuracy"], row["by_seed"]) == (0.5, [0.5])
    assert row["interval"] == [0.0, 1.0]  # the 5th of 200 resamples from either end; all four alike has p = 1/16
    facts = {name: result[name] for name in ("name", "shots", "seeds", "n_examples", "labels", "chance", "cut")}
    assert facts == {
        "name": "toy", "shots": 4, "seeds": [10], "n_examples": 4, "labels": ["a", "b"], "chance": 0.5, "cut": 3,
    }  # fmt: skip


def test_chance_is_the_share_of_the_most_frequent_label_of_what_is_reported():
    made = task([0, 1, 0, 1, 0, 1, 0, 0])  # reported: 1, 1, 1, 0
    model = scores([[0.9, 0.1]] * 8)  # favours the first label
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    assert result["chance"] == 0.75
    assert one_row(result, "seed")["accuracy"] == 0.25


def test_pmi_takes_the_label_that_gains_most():
    # Plain: always the first. Over what they have without a text (0.8, 0.1): 0.75 against 4, and 1.1 against 1.
    made = task([1, 1, 0, 0])
    model = scores([[0.6, 0.4]] * 2 + [[0.88, 0.1]] * 2, neutral=np.log([0.8, 0.1]))
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    assert one_row(result, "seed", "plain")["accuracy"] == 0.5
    assert one_row(result, "seed", "pmi")["accuracy"] == 1.0


def test_tokens_of_an_answer_multiply():
    # b has two tokens: 0.9 * 0.5 = 0.45 against 0.5, and 0.9 * 0.6 = 0.54 against it.
    made = task([0, 0, 1, 1], answers=((1,), (2, 3)))
    rows = [[0.5, 0.9, 0.5]] * 2 + [[0.5, 0.9, 0.6]] * 2
    model = scores(rows, neutral=np.log([0.5, 0.5, 0.5]))
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    assert one_row(result, "seed")["accuracy"] == 1.0


def test_equal_labels_go_to_the_first():
    made = task([0, 0, 1, 0])
    model = scores([[0.5, 0.5]] * 4)
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    for scoring in ("plain", "pmi"):
        assert one_row(result, "seed", scoring)["accuracy"] == 1.0


def test_impossible_answers_are_never_taken_before_possible_ones():
    made = task([1, 1, 1, 1])
    # Impossible with and without text would be -inf - -inf; impossible only without is an infinite gain.
    for neutral in (0.0, 0.5):
        with np.errstate(divide="ignore"):
            model = scores([[0.0, 0.2]] * 4, neutral=np.log([neutral, 0.9]))
        result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
        assert one_row(result, "seed", "plain")["accuracy"] == 1.0
        assert one_row(result, "seed", "pmi")["accuracy"] == 1.0


def test_seeds_are_averaged_and_examples_resampled_with_all_of_theirs():
    made = task([0] * 8, n_seeds=2)
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    # Every example is right under one seed and wrong under the other: no resample can differ.
    model = scores([[right, wrong] * 4, [wrong, right] * 4])
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
    row = one_row(result, "seed")
    assert row["by_seed"] == [0.0, 1.0]  # reported are the odd ones
    assert (row["accuracy"], row["interval"]) == (0.5, [0.5, 0.5])


def test_random_experts_are_the_mean_of_their_probabilities():
    made = task([0] * 4)
    # The first by the mean, 0.91 against 0.90; the mean of the logarithms takes the second, 0.009 against 0.08.
    one, other = scores([[0.9, 0.1]] * 4), scores([[0.01, 0.8]] * 4)
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(one, [one], random=[one, other]), near(made, 1))
    assert one_row(result, "random")["accuracy"] == 1.0


def test_models_that_are_there_have_a_row_for_each_scoring():
    made = task([0, 1, 0, 1])
    model = scores([[0.9, 0.1]] * 4)
    members = TaskMembers(model, [model], dense=model, random=[model], averages={"uniform": model, "greedy": model})
    result = evaluate_task(EvaluateConfig(**ONE), made, members, near(made, 1))
    alone = [row for row in result["rows"] if row["model"] != "ensemble"]
    names = ("seed", "dense", "random", "average-uniform", "average-greedy")
    assert [(row["model"], row["scoring"]) for row in alone] == list(product(names, ("plain", "pmi")))
    for row in alone:
        assert row["selected"]
        assert [row[name] for name in ("ensemble", "top_k", "temperature", "distance_power")] == [None] * 4


# --- ensembles ---


def brute_force(made, experts, weights):
    """Accuracy on the reported half by loops over probabilities; weights (n_prompts, k)."""
    n_examples = len(made.gold)
    starts = made.answer_offsets
    right = {"plain": [], "pmi": []}
    for seed, example in product(range(len(made.seeds)), range(1, n_examples, 2)):
        weight = weights[seed * n_examples + example]
        plain, pmi = [], []
        for label in range(len(made.labels)):
            behind = neutral = 1.0
            for token in range(starts[label], starts[label + 1]):
                behind *= sum(
                    w * math.exp(one.log_probs[seed, example, token]) for w, one in zip(weight, experts, strict=True)
                )
                neutral *= sum(w * math.exp(one.neutral[token]) for w, one in zip(weight, experts, strict=True))
            plain.append(behind)
            pmi.append(behind / neutral)
        right["plain"].append(plain.index(max(plain)) == made.gold[example])
        right["pmi"].append(pmi.index(max(pmi)) == made.gold[example])
    return {scoring: sum(values) / len(values) for scoring, values in right.items()}


def weights_by_hand(distances, temperature, power, top_k):
    found = []
    for row in distances.astype(np.float64):
        kept = sorted(range(len(row)), key=lambda place: (row[place], place))[:top_k]
        raw = [math.exp(-(row[c] ** power) / temperature) if c in kept else 0.0 for c in range(len(row))]
        found.append([one / sum(raw) for one in raw])
    return found


def test_every_setting_is_the_brute_force_mixture():
    rng = np.random.default_rng(1)
    made = task(rng.integers(3, size=40).tolist(), n_seeds=3, answers=((1,), (2, 3), (4, 5, 6)))
    experts = [random_scores(rng, made, 6) for _ in range(3)]
    prior = np.array([0.5, 0.3, 0.2])
    distances = near(made, 3)
    config = EvaluateConfig(temperatures=(0.1, 1.0), distance_powers=(2, 4), bootstrap_resamples=100)
    result = evaluate_task(config, made, TaskMembers(experts[0], experts), distances, prior=prior)
    every = rows_of(result, "ensemble", "plain") + rows_of(result, "ensemble", "pmi")
    assert len(every) == 2 * (2 * 2 * 2 + 1 + 1)  # top-k 3 and 1, two exponents, two temperatures; uniform; prior
    for row in every:
        if row["ensemble"] == "clustering":
            weights = weights_by_hand(distances, row["temperature"], row["distance_power"], row["top_k"])
        else:
            weights = [[1 / 3] * 3 if row["ensemble"] == "uniform" else prior] * len(distances)
        assert row["accuracy"] == pytest.approx(brute_force(made, experts, weights)[row["scoring"]], abs=1e-12)
        assert row["accuracy"] == pytest.approx(np.mean(row["by_seed"]))
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert len({row["accuracy"] for row in every}) > 4


def test_many_prompts_are_mixed_in_blocks_that_do_not_show(monkeypatch):
    rng = np.random.default_rng(4)
    made = task(rng.integers(2, size=30).tolist(), n_seeds=2, answers=((1, 2), (3,)))
    experts = [random_scores(rng, made, 3) for _ in range(2)]
    arguments = (EvaluateConfig(**ONE), made, TaskMembers(experts[0], experts), near(made, 2))
    whole = evaluate_task(*arguments)
    monkeypatch.setattr("cbtm.merge.log_space._BLOCK_ELEMENTS", 40)  # 6 of 60 prompts at a time
    assert evaluate_task(*arguments) == whole


def test_an_ensemble_of_one_expert_is_that_expert():
    rng = np.random.default_rng(2)
    made = task(rng.integers(2, size=20).tolist(), n_seeds=2)
    expert = random_scores(rng, made, 2)
    result = evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(expert, [expert]), near(made, 1))
    for scoring, kind in product(("plain", "pmi"), ("clustering", "uniform")):
        row = one_row(result, "ensemble", scoring, ensemble=kind)
        alone = one_row(result, "seed", scoring)
        assert [row[name] for name in ("accuracy", "by_seed", "interval")] == [
            alone[name] for name in ("accuracy", "by_seed", "interval")
        ]


def test_the_expert_that_a_prompt_is_near_to_answers_it():
    made = task([0, 0, 1, 1] * 2)
    knows_first, knows_last = scores([[0.9, 0.1]] * 8), scores([[0.1, 0.9]] * 8)
    distances = np.array([[0.1, 1.0], [0.1, 1.0], [1.0, 0.1], [1.0, 0.1]] * 2, dtype=np.float32)
    members = TaskMembers(knows_first, [knows_first, knows_last])
    result = evaluate_task(EvaluateConfig(**ONE), made, members, distances)
    for top_k in (1, 2):
        assert one_row(result, "ensemble", ensemble="clustering", top_k=top_k)["accuracy"] == 1.0
    assert one_row(result, "seed")["accuracy"] == 0.5
    wrong = evaluate_task(EvaluateConfig(**ONE), made, members, distances[:, ::-1])
    assert one_row(wrong, "ensemble", ensemble="clustering", top_k=1)["accuracy"] == 0.0


def test_settings_are_chosen_on_the_examples_that_are_not_reported():
    # The first expert, the nearest, is right on the choosing half alone, the others on the reported half alone.
    made = task([0] * 8)
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    first, other = scores([right, wrong] * 4), scores([wrong, right] * 4)
    distances = np.tile(np.array([[0.1, 0.5, 0.6]], dtype=np.float32), (8, 1))
    config = EvaluateConfig(temperatures=(100.0, 0.01), distance_powers=(2,), bootstrap_resamples=100)
    result = evaluate_task(config, made, TaskMembers(first, [first, other, other]), distances)
    kept = {row["temperature"]: row for row in rows_of(result, "ensemble", ensemble="clustering", top_k=3)}
    # At 0.01 the first answers; at 100 the mean of all three, two of whom are the others.
    assert (kept[0.01]["accuracy"], kept[100.0]["accuracy"]) == (0.0, 1.0)
    assert (kept[0.01]["selected"], kept[100.0]["selected"]) == (True, False)


def test_one_setting_is_selected_for_each_kind_top_k_and_scoring():
    rng = np.random.default_rng(5)
    made = task(rng.integers(2, size=40).tolist())
    experts = [random_scores(rng, made, 2) for _ in range(4)]
    config = EvaluateConfig(bootstrap_resamples=100)
    result = evaluate_task(config, made, TaskMembers(experts[0], experts), near(made, 4), prior=np.full(4, 0.25))
    chosen = [
        (row["ensemble"], row["top_k"], row["scoring"])
        for row in result["rows"]
        if row["model"] == "ensemble" and row["selected"]
    ]
    kinds = [("clustering", 4), ("clustering", 2), ("clustering", 1), ("uniform", 4), ("prior", 4)]
    assert sorted(chosen) == sorted((*kind, scoring) for kind in kinds for scoring in ("plain", "pmi"))


def test_experts_of_some_clusters_are_mixed_by_the_distances_to_theirs():
    made = task([0] * 4)
    right, wrong = scores([[0.9, 0.1]] * 4), scores([[0.1, 0.9]] * 4)
    # Clusters 0, 2 and 3 have experts. Nearest is cluster 1, which has none, then 3.
    distances = np.tile(np.array([[0.9, 0.1, 0.8, 0.3]], dtype=np.float32), (4, 1))
    members = TaskMembers(wrong, [wrong, wrong, right], clusters=[0, 2, 3])
    result = evaluate_task(EvaluateConfig(**ONE), made, members, distances)
    assert one_row(result, "ensemble", ensemble="clustering", top_k=1)["accuracy"] == 1.0
    without = evaluate_task(EvaluateConfig(**ONE, experts=(0, 2)), made, members, distances)
    assert one_row(without, "ensemble", ensemble="clustering", top_k=1)["accuracy"] == 0.0
    with pytest.raises(ConfigError, match=r"evaluate.experts names cluster 1, which has no expert"):
        evaluate_task(EvaluateConfig(**ONE, experts=(0, 1)), made, members, distances)


def test_kinds_that_are_not_wanted_or_have_no_weights_are_left_out():
    made = task([0, 1] * 4)
    model = scores([[0.9, 0.1]] * 8)
    config = EvaluateConfig(**ONE, ensembles=("clustering", "bayes", "prior"))
    members = TaskMembers(model, [model, model])
    kinds = {row["ensemble"] for row in evaluate_task(config, made, members, near(made, 2))["rows"]}
    assert kinds == {None, "clustering"}
    prior = np.array([0.5, 0.5])
    kinds = {row["ensemble"] for row in evaluate_task(config, made, members, near(made, 2), prior=prior)["rows"]}
    assert kinds == {None, "clustering", "prior"}


def test_progress_counts_settings():
    made = task([0, 1] * 4)
    model = scores([[0.9, 0.1]] * 8)
    seen = []
    evaluate_task(
        EvaluateConfig(**ONE), made, TaskMembers(model, [model, model]), near(made, 2),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]  # top-k 2 and 1, uniform


# --- errors ---


def test_what_does_not_fit_is_refused():
    made = task([0, 1] * 4)
    model = scores([[0.9, 0.1]] * 8)
    config = EvaluateConfig(**ONE)
    with pytest.raises(DataError, match=r"task toy: distances of shape \(7, 1\) for 8 prompts"):
        evaluate_task(config, made, TaskMembers(model, [model]), near(made, 1)[:7])
    with pytest.raises(DataError, match=r"task toy: scores of 1 experts do not fit clusters \[0, 1\] of 2"):
        evaluate_task(config, made, TaskMembers(model, [model]), near(made, 2))
    short = scores([[0.9, 0.1]] * 7)
    for members in (TaskMembers(short, [model]), TaskMembers(model, [short]), TaskMembers(model, [model], dense=short)):
        with pytest.raises(DataError, match=r"task toy: scores of shapes \(1, 7, 2\) and \(2,\), expected \(1, 8, 2\)"):
            evaluate_task(config, made, members, near(made, 1))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.5])
def test_scores_that_are_no_log_probabilities_are_refused(wrong):
    made = task([0, 1] * 4)
    model = scores([[0.9, 0.1]] * 8)
    model.log_probs[0, 3, 1] = wrong
    with pytest.raises(DataError, match=r"log-probability .* is not in \[-inf, 0\]"):
        evaluate_task(EvaluateConfig(**ONE), made, TaskMembers(model, [model]), near(made, 1))
