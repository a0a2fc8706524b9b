"""Losses and log-probabilities of rows under a head that is one matrix, of which all logits never exist at once.

At a vocabulary of 50,000 the logits of one block take more memory than the model; so the head runs over chunks of
rows, and the gradient of each chunk is made while its logits are at hand. Exact: the same sums in another order. Scores
look at each logit once, so there the head runs over tiles that stay in a core's cache.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from cbtm.train.data import IGNORED

GPU_CHUNK_ROWS = 2048
CHUNK_ROWS = 256  # 256 rows x 50,000 float32 logits are 51 MB, and fit a last-level cache at 4,000
# Side of a tile of logits, 4 MiB: the quickest of 256 to 1024 rows by 512 to 4096 columns, within 5 %.
CPU_TILE = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, all_learned: bool, fused: bool) -> Tensor:
        # Custom functions are left alone by autocast: its type is taken for the matrix products here.
        low = compute_dtype(weight)
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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Type of matrix products with that tensor: autocast's where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def log_probs_at(rows: Tensor, head: Tensor | None, targets: Tensor) -> Tensor:
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
