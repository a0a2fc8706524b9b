"""Next-token cross-entropy that never holds all logits.

At a vocabulary of 50,000 the logits of one block take more memory than the model; so the head runs over chunks of
rows, and the gradient of each chunk is made while its logits are at hand. Exact: the same sums in another order. Scores
look at each logit once, so there the head runs over tiles that stay in a core's cache.
Models whose head is more than one matrix (a bias, a soft cap) take the plain way through their own forward.

Rows without a target to learn (prompts, padding) add nothing; where the caller says how many there are, they do not
go through the head at all. Documents that share a block are kept apart by a mask of the whole attention, which most
models of transformers take as it is; those that do not are found by trying.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from cbtm.errors import ConfigError
from cbtm.train.data import IGNORED

logger = logging.getLogger(__name__)

# Logits put in place of the head's own when it is probed: a soft cap of 30 bends these, but not a fresh model's.
_PROBE_LOGIT = 1000.0
# Most of what one document's outputs may change by another's beside it, over the change without any mask. Rounding
# is 1e-6 of it in float32; a recurrent layer, which no mask reaches, is about 1.
_LEAK = 0.05
GPU_CHUNK_ROWS = 2048
CHUNK_ROWS = 256  # 256 rows x 50,000 float32 logits are 51 MB, and fit a last-level cache at 4,000
# Side of a tile of logits, 4 MiB: the quickest of 256 to 1024 rows by 512 to 4096 columns, within 5 %.
CPU_TILE = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, all_learned: bool, fused: bool) -> Tensor:
        # Custom functions are left alone by autocast: its type is taken for the matrix products here.
        low = _compute_dtype(weight)
        head = weight.to(low)
        ignored = None if all_learned else targets == IGNORED  # (N,)
        learned = None if ignored is None else (~ignored).float()[:, None]  # (N, 1)
        targets = targets if ignored is None else targets.masked_fill(ignored, 0)
        n_rows, size = hidden.shape[0], _chunk_rows(hidden.device)
        # One chunk's logits, written over and over: a new tensor of this size is new pages for each chunk.
        shape = (min(size, n_rows), weight.shape[0])
        buffer = None if fused else hidden.new_empty(shape, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)  # (N, D)
        # In float32 whatever the weight's type: many chunks are added up.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)  # (V, D)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, n_rows, size):
            chunk = slice(start, start + size)
            rows, target = hidden[chunk].to(low), targets[chunk, None]  # (n, D), (n, 1)
            if buffer is None:
                losses, slope = _compiled_losses()(rows @ head.T, target)
            else:
                logits = buffer[: len(rows)]  # (n, V)
                if low == torch.float32:
                    torch.mm(rows, head.T, out=logits)
                else:
                    logits.copy_(rows @ head.T)
                losses, slope = _losses(logits, target)
            if learned is not None:
                losses, rows = losses * learned[chunk], rows * learned[chunk].to(low)
            total += losses.sum()
            if low == weight.dtype == hidden.dtype == torch.float32:
                torch.mm(slope, head, out=grad_hidden[chunk])
                torch.addmm(grad_weight, slope.T, rows, beta=float(start > 0), out=grad_weight)
            else:
                lowered = slope.to(low)
                grad_hidden[chunk] = lowered @ head
                grad_weight += lowered.T @ rows
            if learned is not None:
                grad_hidden[chunk] *= learned[chunk].to(grad_hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a loss is differentiated once.
        return grad_hidden.mul_(grads[0]), grad_weight.mul_(grads[0]), None, None, None


def _losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in nats, float32 (n, 1), and its slope by the logits, (n, V), in their place.

    Args:
        logits: Float32, shape (n, V); overwritten.
        target: Token ids, int64, shape (n, 1).
    """
    at_target = logits.gather(1, target)  # (n, 1)
    top, place = logits.max(dim=1, keepdim=True)
    slope = torch.softmax(logits, dim=1, out=logits)
    # The largest probability is 1 over the sum of exp(logit - top), and never so small that it vanishes.
    losses = top - slope.gather(1, place).log() - at_target
    slope.scatter_add_(1, target, torch.full_like(top, -1.0))
    return losses, slope


def _fused_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `_losses`, in a form that compiles to one kernel, and with a slope in the type of the logits."""
    wide = logits.float()
    top = wide.amax(dim=1, keepdim=True)
    exponentials = (wide - top).exp()
    total = exponentials.sum(dim=1, keepdim=True)  # (n, 1)
    losses = top + total.log() - wide.gather(1, target)
    is_target = torch.arange(logits.shape[1], device=logits.device) == target  # (n, V)
    return losses, (exponentials / total - is_target.float()).to(logits.dtype)


@cache
def _compiled_losses() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_fused_losses`, compiled when it is first called."""
    compiled: Any = torch.compile(_fused_losses)
    return cast(Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], compiled)


def _chunk_rows(device: torch.device) -> int:
    """Rows whose logits are computed at a time.

    On a GPU more of them: each chunk is added into the head's gradient, (V, D), and below D rows that is more memory
    traffic than the logits themselves.
    """
    return CHUNK_ROWS if device.type == "cpu" else GPU_CHUNK_ROWS


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, all_learned: bool = False, fused: bool = False
) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, in nats.

    Args:
        hidden: Last hidden states, shape (N, D).
        weight: Head, shape (V, D).
        targets: Token ids, int64, shape (N,); rows whose target is `IGNORED` add nothing.
        all_learned: That no target is `IGNORED`, which need not be looked for then.
        fused: Compile what is between the two matrix products of a chunk into one kernel.

    Returns:
        Scalar float32; divide by N for the mean. Gradients of first order only.
    """
    loss = _LinearCrossEntropy.apply(hidden, weight, targets, all_learned, fused)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """Type of matrix products with that tensor: autocast's where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


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
        head = self._weight().to(_compute_dtype(self._weight())) if self.plain_head else None
        out = _log_probs_at(rows, head, flat)
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
            given["attention_mask"] = _block_diagonal(segments, _compute_dtype(next(self._model.parameters())))
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


def _log_probs_at(rows: Tensor, head: Tensor | None, targets: Tensor) -> Tensor:
    """Log-softmax of `rows @ head.T` at the targets, float32 (N,); of the rows themselves where there is no head.

    Args:
        rows: Shape (N, D), or logits (N, V).
        head: Shape (V, D).
        targets: Token ids, int64 (N,).
    """
    n_logits = rows.shape[1] if head is None else head.shape[0]
    n_rows, n_columns = _tile(rows.device, n_logits)
    # One tile of logits, written over and over: a new tensor of this size is new pages for each.
    buffer = rows.new_empty(min(n_rows, len(rows)) * min(n_columns, n_logits), dtype=torch.float32)
    out = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    for start in range(0, len(targets), n_rows):
        piece, wanted = rows[start : start + n_rows], targets[start : start + n_rows]  # (n, D), (n,)
        at_target, sums = torch.zeros_like(wanted, dtype=torch.float32), []
        for first in range(0, n_logits, n_columns):
            width = min(n_columns, n_logits - first)
            logits = buffer[: len(piece) * width].view(len(piece), width)
            if head is None:
                logits.copy_(piece[:, first : first + width])
            elif head.dtype == piece.dtype == torch.float32:
                torch.mm(piece, head[first : first + width].T, out=logits)
            else:
                logits.copy_(piece.to(head.dtype) @ head[first : first + width].T)
            place = wanted - first
            found = logits.gather(1, place.clamp(0, width - 1)[:, None])[:, 0]
            at_target = torch.where((place >= 0) & (place < width), found, at_target)
            # In place, where logsumexp writes all exponentials to new memory. A tile may be -inf throughout: padding.
            top = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            sums.append(logits.sub_(top).exp_().sum(dim=1).log_().add_(top[:, 0]))
        out[start : start + n_rows] = at_target - torch.logsumexp(torch.stack(sums), dim=0)
    return out


def _tile(device: torch.device, n_logits: int) -> tuple[int, int]:
    """Rows and columns of logits that are computed at a time where they are needed for a moment only.

    On a CPU they stay in a core's cache until they are summed; a GPU takes whole rows, with fewer launches.
    """
    return (CPU_TILE, CPU_TILE) if device.type == "cpu" else (GPU_CHUNK_ROWS, n_logits)


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
