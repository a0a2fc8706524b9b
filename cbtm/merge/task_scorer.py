"""The scorer of few-shot tasks: the log-probability of every token of every answer behind every prompt, in one pass.

The shots of a seed are read once, and what the model keeps of them (its key-value cache) serves all test examples; so a
prompt costs its own example and not all the shots. Rows are padded behind, where a causal model does not look. Whether
a model gives through its cache what it gives without is tried on two rows of each task, not looked up in a list; one
that does not, such as a recurrent one, reads every prompt whole, and the log says so.

Answers share what they can: the first token of every answer is read off one row of probabilities, and only the tokens
before an answer's last are fed, so that labels of one token each cost one row for an example, not one for each label.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError, ManifestError
from cbtm.merge.scorer import ScoreConfig
from cbtm.merge.task_prompts import SeedPrompts, TaskPrompts, Tokens

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

ANSWERS_FILE = "tasks.json"
# Nats by which an answer may differ through the cache: two orders of float32 sums are about 1e-5 apart.
_TOLERANCE = 1e-3
_IGNORED = 0.05  # and over the nats by which the shots change it at all


@dataclass(frozen=True)
class TaskScores:
    """Natural log-probabilities of a task's answers under one model.

    Attributes:
        log_probs: Of every token of every label's answer, one label after the other (`TaskPrompts.answer_offsets`),
            float32 of shape (n_seeds, n_examples, n_answer_tokens).
        neutral: The same behind the neutral prompt, shape (n_answer_tokens,).
    """

    log_probs: NDArray[np.float32]
    neutral: NDArray[np.float32]


def score_tasks(
    model: "nn.Module",
    prompts: Sequence[TaskPrompts],
    *,
    config: ScoreConfig,
    context_length: int,
    facts: Mapping[str, Any],
    folder: Path,
    prefix_token: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score all answers of all tasks; write <task>.npy and <task>.neutral.npy for each, and tasks.json.

    Args:
        model: A Hugging Face causal language model.
        prompts: The tasks.
        config: Settings: `threads`, and `max_batch_tokens`, which counts a cached prefix for each row that follows it.
        context_length: Most tokens that are fed to the model at once.
        facts: What the scores belong to, written to tasks.json.
        folder: Output folder.
        prefix_token: Token in front of every prompt, where the model was trained with one.
        progress: Called with prompts scored so far and in all.

    Returns:
        `facts` with the digest of each task's prompts, `forward_passes`, `tokens_fed` (padding included), and `cached`:
        for each task, whether shots were read once.

    Raises:
        ConfigError: If a prompt is longer than the context.
        DataError: If the model gives NaN.
    """
    import torch

    from cbtm.train.ranks import choose_device

    for task in prompts:
        if task.longest + (prefix_token is not None) > context_length:
            raise ConfigError(
                f"task {task.name}: a prompt with its answer has {task.longest} tokens"
                f"{'' if prefix_token is None else ', the cluster token not counted'}, more than "
                f"context_length={context_length}; build the prompts with a smaller max_tokens"
            )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    answerer = _Answerer(model.to(choose_device("auto")).eval(), config.max_batch_tokens, prefix_token)
    total = sum(len(one.suffixes) for task in prompts for one in task.seeds)
    done, cached = 0, {}
    for task in prompts:
        rows = _Rows.of(task.answers)
        neutral = SeedPrompts(0, task.neutral[:1], (task.neutral[1:],), "", ("",))
        alone = answerer.score(neutral, rows, through_cache=False)[0]
        # Without shots there is nothing to keep.
        cached[task.name] = task.shots > 0 and answerer.cache_works(task.seeds[0], rows)
        log_probs = np.empty((len(task.seeds), len(task.gold), rows.n_tokens), dtype=np.float32)
        for number, one in enumerate(task.seeds):
            log_probs[number] = answerer.score(one, rows, through_cache=cached[task.name])
            done += len(one.suffixes)
            if progress is not None:
                progress(done, total)
        _write(folder, task.name, TaskScores(log_probs, alone))
    result = {
        **facts,
        "tasks": {task.name: task.digest for task in prompts},
        "forward_passes": answerer.forward_passes,
        "tokens_fed": answerer.tokens_fed,
        "cached": cached,
    }
    (folder / ANSWERS_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def read_scores(folder: Path, task: TaskPrompts) -> TaskScores:
    """Read the scores of a task that `score_tasks` wrote.

    Raises:
        ManifestError: If there are none, or they are of other prompts.
    """
    try:
        known = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))["tasks"]
        scores = TaskScores(np.load(_path(folder, task.name)), np.load(_path(folder, f"{task.name}.neutral")))
    except (OSError, ValueError, KeyError) as error:
        raise ManifestError(f"{folder} holds no scores of task {task.name}: {error}; score the tasks again") from error
    n_tokens = int(task.answer_offsets[-1])
    expected = (len(task.seeds), len(task.gold), n_tokens)
    if known.get(task.name) != task.digest or scores.log_probs.shape != expected or scores.neutral.shape != (n_tokens,):
        raise ManifestError(
            f"the scores of task {task.name} in {folder} are of other prompts than those made now: the task, the "
            "tokenizer or the context length changed; score the tasks again"
        )
    return scores


def _largest_difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(np.subtract(one, other, out=np.zeros_like(one), where=one != other)).max())


def _write(folder: Path, name: str, scores: TaskScores) -> None:
    for values in (scores.log_probs, scores.neutral):
        if np.isnan(values).any():
            raise DataError(
                f"task {name}: {int(np.isnan(values).sum())} of {values.size} scores are NaN: the model's weights are "
                "broken"
            )
    np.save(_path(folder, name), scores.log_probs)
    np.save(_path(folder, f"{name}.neutral"), scores.neutral)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


@dataclass(frozen=True)
class _Rows:
    """Which rows an example needs behind it so that every answer token can be read.

    Attributes:
        continuations: Tokens fed after the example in each row.
        reads: For each row, (depth, target, column): the token `target`, which is number `column` of all answers'
            tokens, is predicted `depth` tokens after the last of the example; ascending by depth.
        n_tokens: Tokens of all answers.
    """

    continuations: list[Tokens]
    reads: list[list[tuple[int, int, int]]]
    n_tokens: int

    @classmethod
    def of(cls, answers: Sequence[Tokens]) -> "_Rows":
        """The fewest rows: an answer is read along another if all but its last token begin that one's row."""
        continuations: list[Tokens] = []
        for answer in sorted(answers, key=len, reverse=True):
            if not any(np.array_equal(row[: len(answer) - 1], answer[:-1]) for row in continuations):
                continuations.append(answer[:-1])
        reads: list[list[tuple[int, int, int]]] = [[] for _ in continuations]
        column = 0
        for answer in answers:
            place = next(
                i for i, row in enumerate(continuations) if np.array_equal(row[: len(answer) - 1], answer[:-1])
            )
            for depth, target in enumerate(answer.tolist()):
                reads[place].append((depth, target, column))
                column += 1
        return cls(continuations, [sorted(row) for row in reads], column)


@dataclass(frozen=True)
class _Unit:
    """One row to feed behind a prefix: an example with one of the continuations."""

    example: int
    row: int
    length: int


class _Answerer:
    """A model that reads prompts, and the count of what it read."""

    def __init__(self, model: "nn.Module", max_batch_tokens: int, prefix_token: int | None) -> None:
        from cbtm.train.loss import CausalLoss

        self._model: Any = model
        self._plain_head = CausalLoss(model).plain_head
        self._device = next(model.parameters()).device
        self._max_batch_tokens = max_batch_tokens
        self._front = np.array([] if prefix_token is None else [prefix_token], dtype=np.int64)
        self.forward_passes = self.tokens_fed = 0

    def score(self, prompts: SeedPrompts, rows: _Rows, *, through_cache: bool) -> NDArray[np.float32]:
        """Log-probabilities of all answers' tokens, shape (n_examples, n_answer_tokens)."""
        prefix = np.concatenate([self._front, prompts.prefix])
        out = np.full((len(prompts.suffixes), rows.n_tokens), np.nan, dtype=np.float32)
        cache = self._read(prefix) if through_cache else None
        for batch in self._batches(prompts, rows, len(prefix)):
            self._score(out, batch, prompts, rows, prefix, cache)
        return out

    def cache_works(self, prompts: SeedPrompts, rows: _Rows) -> bool:
        """Try the shortest and the longest row of the first batch through the cache, whole, and without a prefix."""
        prefix = np.concatenate([self._front, prompts.prefix])
        batch = next(self._batches(prompts, rows, len(prefix)))
        whole, bare, behind = np.zeros((3, len(prompts.suffixes), rows.n_tokens), dtype=np.float32)
        probe = [batch[0], batch[-1]]
        self._score(whole, probe, prompts, rows, prefix, None)
        self._score(bare, probe, prompts, rows, prefix[:0], None)
        name = type(self._model).__name__
        try:
            self._score(behind, probe, prompts, rows, prefix, self._read(prefix))
        except Exception as error:  # the model's own code, which may fail in any way on a cache it does not have
            logger.warning(
                "%s takes no expanded cache (%s: %s): every prompt is read whole", name, type(error).__name__, error
            )
            return False
        off, without = _largest_difference(whole, behind), _largest_difference(whole, bare)
        rounding = 1e-5 * float(np.abs(whole[np.isfinite(whole)]).max(initial=0))
        # A cache that is not looked at is off by as much as no prefix at all, however little that is.
        if off <= _TOLERANCE and off <= _IGNORED * without + rounding:
            return True
        logger.warning("%s answers otherwise through its cache, by %.2g nats: every prompt is read whole", name, off)
        return False

    def _batches(self, prompts: SeedPrompts, rows: _Rows, n_prefix: int) -> Iterator[list[_Unit]]:
        """Rows of similar length together, in a fixed order."""
        units = [
            _Unit(example, row, len(suffix) + len(continuation))
            for example, suffix in enumerate(prompts.suffixes)
            for row, continuation in enumerate(rows.continuations)
        ]
        units.sort(key=lambda unit: (unit.length, unit.example, unit.row))
        batch: list[_Unit] = []
        for unit in units:
            # Each row holds a copy of the prefix, or reads it. Sorted: the newest row is the longest of its batch.
            if batch and (len(batch) + 1) * (n_prefix + unit.length) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch

    def _score(
        self,
        out: NDArray[np.float32],
        batch: list[_Unit],
        prompts: SeedPrompts,
        rows: _Rows,
        prefix: Tokens,
        cache: Any,
    ) -> None:
        """Score some rows into `out`; without a cache each begins with the prefix."""
        start = 0 if cache is not None else len(prefix)
        inputs = np.zeros((len(batch), start + max(unit.length for unit in batch)), dtype=np.int64)  # (B, T)
        inputs[:, :start] = prefix[:start]
        sites: list[tuple[int, int]] = []  # row and place of every state that something is read off
        reads: list[tuple[int, int, int, int]] = []  # site, token, example, column
        for number, unit in enumerate(batch):
            suffix = prompts.suffixes[unit.example]
            inputs[number, start : start + unit.length] = np.concatenate([suffix, rows.continuations[unit.row]])
            for depth, target, column in rows.reads[unit.row]:
                site = number, start + len(suffix) - 1 + depth
                if not sites or sites[-1] != site:
                    sites.append(site)
                reads.append((len(sites) - 1, target, unit.example, column))
        values = self._log_probs(self._states(inputs, cache), np.array(sites), np.array(reads)[:, :2])
        _, _, examples, columns = np.array(reads).T
        out[examples, columns] = values

    def _log_probs(
        self, states: "torch.Tensor", sites: NDArray[np.int64], reads: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Log-probability of each token read, shape (n_reads,); the head runs over the sites alone.

        Args:
            states: Last hidden states, or logits where the head is no plain matrix, shape (B, T, D).
            sites: Row and place of each site, shape (n_sites, 2).
            reads: Site, ascending, and token of each read, shape (n_reads, 2).
        """
        import torch

        from cbtm.train.head import CHUNK_ROWS

        with torch.no_grad():
            chosen = states[torch.from_numpy(sites[:, 0]), torch.from_numpy(sites[:, 1])]  # (n_sites, D)
            parts = []
            for begin in range(0, len(sites), CHUNK_ROWS):
                logits = chosen[begin : begin + CHUNK_ROWS]
                if self._plain_head:
                    logits = logits @ self._model.get_output_embeddings().weight.T
                logits = logits.float()  # (n, V)
                first, last = np.searchsorted(reads[:, 0], [begin, begin + CHUNK_ROWS])
                site, token = torch.from_numpy(reads[first:last].copy()).to(self._device).T
                parts.append(logits[site - begin, token] - logits.logsumexp(dim=1)[site - begin])
            # Rounding may lift a certain token above probability 1, which ensembles refuse.
            values: NDArray[np.float32] = torch.cat(parts).clamp_(max=0.0).cpu().numpy()
        return values

    def _states(self, inputs: NDArray[np.int64], cache: Any) -> "torch.Tensor":
        """Last hidden states, or logits where the head is no plain matrix, shape (B, T, D)."""
        given = {"use_cache": False}
        if cache is not None:
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(inputs))
            given = {"use_cache": True, "past_key_values": own}
        output = self._forward(inputs, **given)
        states: torch.Tensor = output.last_hidden_state if self._plain_head else output.logits
        return states

    def _read(self, prefix: Tokens) -> Any:
        """What the model keeps of a prefix."""
        return self._forward(prefix[np.newaxis], use_cache=True).past_key_values

    def _forward(self, inputs: NDArray[np.int64], **given: Any) -> Any:
        import torch

        self.forward_passes += 1
        self.tokens_fed += inputs.size
        # base_model is the whole decoder without its head, in every transformers causal model.
        model = self._model.base_model if self._plain_head else self._model
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(inputs).to(self._device), **given)
