"""Next-token cross-entropy that never holds all logits.

At a vocabulary of 50,000 the logits of one block take more memory than the model; so the head runs over chunks of
rows, and the gradient of each chunk is made while its logits are at hand. Exact: the same sums in another order.
Models whose head is more than one matrix (a bias, a soft cap) take the plain way through their own forward.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

# Logits put in place of the head's own when it is probed: a soft cap of 30 bends these, but not a fresh model's.
_PROBE_LOGIT = 1000.0
CHUNK_ROWS = 256  # 256 rows x 50,000 float32 logits are 51 MB, and fit a last-level cache at 4,000


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        # Custom functions are left alone by autocast: its type is taken for the matrix products here.
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        head = weight.to(low)
        grad_hidden = torch.empty_like(hidden)  # (N, D)
        grad_weight = torch.zeros_like(weight)  # (V, D)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = hidden[start : start + CHUNK_ROWS].to(low)  # (n, D)
            target = targets[start : start + CHUNK_ROWS]  # (n,)
            logits = (rows @ head.T).float()  # (n, V)
            log_z = torch.logsumexp(logits, dim=1)  # (n,)
            total += (log_z - logits.gather(1, target[:, None])[:, 0]).sum()
            probabilities = logits.sub_(log_z[:, None]).exp_()
            probabilities[torch.arange(len(target), device=target.device), target] -= 1.0
            slope = probabilities.to(low)
            if low == weight.dtype == hidden.dtype:
                torch.mm(slope, head, out=grad_hidden[start : start + CHUNK_ROWS])
                grad_weight.addmm_(slope.T, rows)
            else:
                grad_hidden[start : start + CHUNK_ROWS] = slope @ head
                grad_weight += slope.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, in nats.

    Args:
        hidden: Last hidden states, shape (N, D).
        weight: Head, shape (V, D).
        targets: Token ids, int64, shape (N,).

    Returns:
        Scalar float32; divide by N for the mean. Gradients of first order only.
    """
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, weight, targets))  # type: ignore[no-untyped-call]


class CausalLoss:
    """Loss and log-probabilities of a Hugging Face causal language model, by the leanest way that is exact for it.

    Args:
        model: Any AutoModelForCausalLM. Whether its head is one plain matrix is found by looking at what goes into
            the head and what becomes of its output on one short input, not by a list of known models.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.plain_head = self._head_is_one_matrix()

    def sum_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of cross-entropies in nats; `inputs` and `targets` are int64 of shape (B, T)."""
        if self.plain_head:
            hidden = self._hidden(inputs)
            return linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), self._weight(), targets.reshape(-1))
        logits = self._model(input_ids=inputs, use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")

    @torch.no_grad()
    def log_probs(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Float32 log-probability in nats of each target, at most 0; shapes (B, T) in and out."""
        hidden = self._hidden(inputs) if self.plain_head else None
        logits = None if self.plain_head else self._model(input_ids=inputs, use_cache=False).logits
        rows = (logits if hidden is None else hidden).reshape(inputs.numel(), -1)  # type: ignore[union-attr]
        flat = targets.reshape(-1)
        out = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
        for start in range(0, len(flat), CHUNK_ROWS):
            piece = rows[start : start + CHUNK_ROWS]
            chunk = (piece @ self._weight().T if self.plain_head else piece).float()
            target = flat[start : start + CHUNK_ROWS]
            out[start : start + CHUNK_ROWS] = chunk.gather(1, target[:, None])[:, 0] - torch.logsumexp(chunk, dim=1)
        # A backend's logsumexp may round to below its largest term; ensembles refuse what is above 0. NaN stays NaN.
        return out.clamp_(max=0.0).reshape(targets.shape)

    def _hidden(self, inputs: Tensor) -> Tensor:
        # base_model is the whole decoder without its head, in every transformers causal model.
        return cast(Tensor, self._model.base_model(input_ids=inputs, use_cache=False).last_hidden_state)

    def _weight(self) -> Tensor:
        return cast(Tensor, self._model.get_output_embeddings().weight)

    @torch.no_grad()
    def _head_is_one_matrix(self) -> bool:
        head = self._model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None or self._model.base_model is self._model:
            return False
        training = self._model.training
        self._model.eval()
        probe = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ramp = torch.linspace(-_PROBE_LOGIT, _PROBE_LOGIT, output.numel(), device=output.device)
            seen.append((inputs[0], output, ramp.reshape(output.shape).to(output.dtype)))
            return seen[-1][-1]

        handle = head.register_forward_hook(replace)
        try:
            logits = self._model(input_ids=probe, use_cache=False).logits
        finally:
            handle.remove()
        hidden = self._hidden(probe)
        self._model.train(training)
        if len(seen) != 1 or seen[0][0].shape != hidden.shape:
            return False
        before, output, ramp = seen[0]
        return (
            torch.allclose(before, hidden, rtol=1e-3, atol=1e-5)
            and torch.allclose(output, hidden @ self._weight().T, rtol=1e-3, atol=1e-5)
            and torch.equal(logits, ramp)
        )
