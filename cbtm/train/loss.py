"""Next-token cross-entropy that never holds all logits (`cbtm.train.head`), of any Hugging Face causal model.

Models whose head is more than one matrix (a bias, a soft cap) take the plain way through their own forward.

Rows without a target to learn (prompts, padding) add nothing; where the caller says how many there are, they do not
go through the head at all. Documents that share a block are kept apart by a mask of the whole attention, which most
models of transformers take as it is; those that do not are found by trying.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cbtm.errors import ConfigError
from cbtm.train.data import IGNORED
from cbtm.train.head import compute_dtype, linear_cross_entropy, log_probs_at

logger = logging.getLogger(__name__)

# Logits put in place of the head's own when it is probed: a soft cap of 30 bends these, but not a fresh model's.
_PROBE_LOGIT = 1000.0
# Most of what one document's outputs may change by another's beside it, over the change without any mask. Rounding
# is 1e-6 of it in float32; a recurrent layer, which no mask reaches, is about 1.
_LEAK = 0.05


class CausalLoss:
    """Loss and log-probabilities of a Hugging Face causal language model, by the leanest way that is exact for it.

    Args:
        model: Any AutoModelForCausalLM. Whether its head is one plain matrix is found by looking at what goes into
            the head and what becomes of its output on one short input, not by a list of known models.
        fused: Compile the loss's own part, which takes a minute at the first step; for training on a GPU.
    """

    def __init__(self, model: nn.Module, *, fused: bool = False) -> None:
        self._model: Any = model
        self._fused = fused
        self.plain_head = self._head_is_one_matrix()
        self._mixes: str | None = None  # why documents of one block are not kept apart; "" where they are

    def sum_loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        n_targets: int | None = None,
    ) -> Tensor:
        """Sum of cross-entropies in nats over the targets that are not `IGNORED`.

        Args:
            inputs: Token ids, int64, shape (B, T).
            targets: Token ids or `IGNORED`, int64, shape (B, T).
            positions: Position of each token, int64, shape (B, T); None counts from 0 in each block.
            segments: Attention stays inside equal numbers, int64, shape (B, T); None keeps to causal attention.
            n_targets: How many targets are learned, where the caller knows (`Batch.n_targets` does): rows that are
                not learned are left out before the head, and the device is not waited for to count them. A number
                that is too small leaves learned ones out, the last first. None looks at each row.

        Returns:
            Scalar float32, 0 with a gradient of zeros where nothing is learned.

        Raises:
            ConfigError: If there are segments and the model cannot keep documents apart.
        """
        states = self._states(inputs, positions, segments)
        rows, flat, _ = _select(states, targets, n_targets)
        if self.plain_head:
            return linear_cross_entropy(
                rows, self._weight(), flat, all_learned=n_targets is not None, fused=self._fused
            )
        return nn.functional.cross_entropy(rows.float(), flat, reduction="sum", ignore_index=IGNORED)

    @torch.no_grad()
    def log_probs(
        self,
        inputs: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        n_targets: int | None = None,
    ) -> Tensor:
        """Float32 log-probability in nats of each target, at most 0, and 0 where it is `IGNORED`.

        Arguments as for `sum_loss`. Under autocast the logits are computed in its type, as they are in training.

        Returns:
            Shape (B, T).

        Raises:
            ConfigError: If there are segments and the model cannot keep documents apart.
        """
        states = self._states(inputs, positions, segments)
        rows, flat, learned = _select(states, targets, n_targets)
        ignored = flat == IGNORED
        flat = flat.masked_fill(ignored, 0)
        head = self._weight().to(compute_dtype(self._weight())) if self.plain_head else None
        out = log_probs_at(rows, head, flat)
        # A backend may round to above 0, which ensembles refuse. NaN stays NaN.
        out.clamp_(max=0.0).masked_fill_(ignored, 0.0)
        if learned is not None:
            out = out.new_zeros(targets.numel()).index_copy_(0, learned, out)
        return out.reshape(targets.shape)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode: nothing is dropped out."""
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)

    def keeps_documents_apart(self) -> bool:
        """Whether documents that share a block get the outputs that each gets alone, given positions and segments.

        Found once, by one short input. Call it before the model is wrapped or compiled; otherwise the first loss with
        segments does.
        """
        if self._mixes is None:
            self._mixes = self._mixing()
        return self._mixes == ""

    def _states(self, inputs: Tensor, positions: Tensor | None, segments: Tensor | None) -> Tensor:
        """What the targets are predicted from: last hidden states, or logits where the head is no plain matrix."""
        if segments is not None:
            self.check_apart(inputs.shape[1])
        return self._forward(inputs, positions, segments)

    def _forward(self, inputs: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"input_ids": inputs, "use_cache": False}
        if positions is not None:
            given["position_ids"] = positions
        if segments is not None:
            given["attention_mask"] = _block_diagonal(segments, compute_dtype(next(self._model.parameters())))
        if self.plain_head:
            # base_model is the whole decoder without its head, in every transformers causal model.
            return cast(Tensor, self._model.base_model(**given).last_hidden_state)
        return cast(Tensor, self._model(**given).logits)

    def check_apart(self, length: int) -> None:
        """Refuse a model that cannot keep documents apart in blocks of `length` tokens.

        Raises:
            ConfigError: Saying why.
        """
        settings: Any = getattr(self._model, "config", None)
        name = type(self._model).__name__
        text: Any = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
        for window in ("sliding_window", "attention_chunk_size"):
            # A mask that is given replaces the one with the window, and the probe is too short to show it.
            size = getattr(text, window, None)
            if isinstance(size, int) and size < length:
                raise ConfigError(
                    f"{name} with {window}={size} cannot keep documents apart in blocks of {length} tokens; use "
                    f"packing=documents or context_length={size}"
                )
        if not self.keeps_documents_apart():
            raise ConfigError(
                f"{name} does not keep the documents of a block apart ({self._mixes}); use packing=documents"
            )

    @torch.no_grad()
    def _mixing(self) -> str:
        """Why two documents in one block are not what they are alone, or nothing."""
        weight = next(self._model.parameters())
        lengths = [3, 4]  # fewer than any model has positions
        tokens = torch.arange(1, 1 + sum(lengths), device=weight.device)[None] % self._n_embeddings()  # (1, T)
        positions = torch.cat([torch.arange(n, device=weight.device) for n in lengths])[None]
        segments = torch.cat([torch.full((n,), i, device=weight.device) for i, n in enumerate(lengths)])[None]
        with self.evaluating(), torch.autocast(weight.device.type, enabled=False):
            alone = torch.cat([self._forward(part) for part in torch.split(tokens, lengths, dim=1)], dim=1).float()
            mixed = self._forward(tokens).float()
            try:
                packed = self._forward(tokens, positions, segments).float()
            except Exception as error:  # the model's own code, which may fail in any way on a mask it does not expect
                logger.info("%s takes no mask of the whole attention", type(self._model).__name__, exc_info=True)
                return f"it takes no mask of the whole attention: {type(error).__name__}: {error}"
        leak, without = (packed - alone).abs().max().item(), (mixed - alone).abs().max().item()
        # The second term is rounding, of which there is some where a model looks at nothing but the token itself.
        if leak <= _LEAK * without + 1e-5 * alone.abs().max().item():
            return ""
        return f"its outputs change by {leak:.2g} with a mask of the whole attention, and by {without:.2g} without"

    def _n_embeddings(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def _weight(self) -> Tensor:
        return cast(Tensor, self._model.get_output_embeddings().weight)

    @torch.no_grad()
    def _head_is_one_matrix(self) -> bool:
        head = self._model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None or self._model.base_model is self._model:
            return False
        probe = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ramp = torch.linspace(-_PROBE_LOGIT, _PROBE_LOGIT, output.numel(), device=output.device)
            seen.append((inputs[0], output, ramp.reshape(output.shape).to(output.dtype)))
            return seen[-1][-1]

        handle = head.register_forward_hook(replace)
        with self.evaluating():
            try:
                logits = self._model(input_ids=probe, use_cache=False).logits
            finally:
                handle.remove()
            hidden = self._model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        if len(seen) != 1 or seen[0][0].shape != hidden.shape:
            return False
        before, output, ramp = seen[0]
        return (
            torch.allclose(before, hidden, rtol=1e-3, atol=1e-5)
            and torch.allclose(output, hidden @ self._weight().T, rtol=1e-3, atol=1e-5)
            and torch.equal(logits, ramp)
        )


def _select(states: Tensor, targets: Tensor, n_targets: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of the states, shape (N, D), their targets, shape (N,), and their numbers, where not all are taken.

    Where the number of learned targets is given, it is those rows, in order, found without waiting for the device.
    """
    rows, flat = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    if n_targets is None or n_targets == len(flat):
        return rows, flat, None
    learned = torch.argsort((flat == IGNORED).to(torch.uint8), stable=True)[:n_targets]
    return rows.index_select(0, learned), flat.index_select(0, learned), learned


def _block_diagonal(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask of shape (B, 1, T, T): 0 where a token may look, -inf elsewhere.

    Added to the scores, which every attention of transformers does with a mask of four axes; a boolean one is taken
    by some and added by others.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = (segments[:, :, None] == segments[:, None, :]) & causal  # (B, T, T)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, -torch.inf)[:, None]
