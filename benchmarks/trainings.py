"""What `training.py` measures: one training as cbtm does it, and as transformers' Trainer does.

No benchmark by itself. A `Case` says what is trained; `ours` and `peer` prepare it and return the work, which builds
the model, trains, and tells of the steps behind the warm-up. The models and tokens that the cases need are made here.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.cost import flops_per_token, peak_flops
from cbtm.train.data import BlockOrder
from cbtm.train.meter import device_name
from cbtm.train.trainer import train

WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One training, the same for all contenders.

    Attributes:
        name: What the table calls it.
        shape: The model.
        vocabulary: Its tokens.
        context: Tokens of a sequence.
        sequences: Sequences of a step.
        micro: Sequences of one forward pass.
        steps: Steps that are timed; `WARM_UP` more are taken before.
        tokens: Folder of the token shard.
        precision: Type that is computed in.
        device: Where.
        compile: Use torch.compile.
        profile: File for a profile of the timed steps; None measures without.
    """

    name: str
    shape: ScratchModelConfig
    vocabulary: int
    context: int
    sequences: int
    micro: int
    steps: int
    tokens: Path
    precision: str = "float32"
    device: str = "cpu"
    compile: bool = False
    profile: Path | None = None

    @property
    def all_steps(self) -> int:
        return WARM_UP + self.steps

    def config(self, **changes: Any) -> OptimizationConfig:
        settings = {
            "steps": self.all_steps,
            "sequences_per_step": self.sequences,
            "context_length": self.context,
            "micro_batch_size": self.micro,
            "learning_rate": 3e-4,
            "final_learning_rate_ratio": 1.0,  # constant: the two differ in what they take for the last step
            "weight_decay": 0.1,
            "precision": self.precision,
            "compile": self.compile,
            "checkpoint_every": self.all_steps,
            "log_every": self.all_steps,
            "device": self.device,
        }
        return OptimizationConfig(**(settings | changes))

    def order(self) -> BlockOrder:
        return BlockOrder(TokenDocuments([(self.tokens, "text")]), context_length=self.context, seed=0)

    def model(self) -> Any:
        with torch.device(self.device):
            return create_model(self.shape, vocab_size=self.vocabulary, separator_id=0, context_length=self.context)


class Watch:
    """Time, losses and memory of the steps behind the warm-up."""

    def __init__(self, case: Case) -> None:
        self._case, self._marks = case, list[float]()
        self._profiler = None if case.profile is None else torch.profiler.profile()
        self._on_gpu = case.device == "cuda"
        self.losses: list[Any] = []
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def step(self, taken: int) -> None:
        """To be called behind each step, with the number of steps taken."""
        if taken == WARM_UP:
            if self._profiler is not None:
                self._profiler.start()
            self._mark()
        elif taken == self._case.all_steps:
            self._mark()
            if self._profiler is not None:
                self._profiler.stop()
                self._write_profile()

    def facts(self, model: Any) -> dict[str, Any]:
        case, (begin, end) = self._case, self._marks
        device = device_name(torch.device(case.device))
        return {
            "tokens_per_second": case.steps * case.sequences * case.context / (end - begin),
            "flops_per_token": flops_per_token(model, case.context),
            "peak_flops": peak_flops(device, case.precision),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if self._on_gpu else None,
            "losses": [float(loss) for loss in self.losses],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": model.config._attn_implementation,
            "device": device,
        }

    def _mark(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    def _write_profile(self) -> None:
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
        self._case.profile.write_text(f"{self._case.name}, {self._case.steps} steps\n{table}\n", encoding="utf-8")


def ours(case: Case) -> Callable[[], Any]:
    """cbtm's loop, with a real order of blocks and a place for checkpoints that it does not use."""
    rehearse(_train_ours, case)
    return partial(_train_ours, case)


def _train_ours(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        watch, model = Watch(case), case.model()

        def progress(step: int, loss: float) -> None:
            watch.losses.append(loss)
            watch.step(step)

        train(
            model,
            case.order(),
            case.config(),
            sequences_per_step=case.sequences,
            checkpoints=Checkpoints(folder, key="benchmark", scratch=Path(folder) / "scratch"),
            report=lambda metrics, step: None,
            progress=progress,
        )
        return watch.facts(model)


def peer(case: Case) -> Callable[[], Any]:
    """The Trainer, told not to do anything beside training, with its blocks in memory."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    rehearse(lambda tiny: _train_peer(tiny, _blocks(tiny)), case)
    return partial(_train_peer, case, _blocks(case))


def _blocks(case: Case) -> list[dict[str, Any]]:
    batch = case.order().batch(0, case.all_steps * case.sequences)
    pairs = zip(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), strict=True)
    # Targets are given shifted, which spares it a copy; each input has one, as in ours.
    return [{"input_ids": inputs, "labels": targets, "shift_labels": targets} for inputs, targets in pairs]


def _train_peer(case: Case, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    losses: list[Any] = []  # sums of the losses of micro-batches, over the targets of the whole step

    class InOrder(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(blocks)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.step(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        watch, model = Watch(case), case.model()
        model.config.use_cache = False
        arguments = TrainingArguments(output_dir=folder, **_arguments(case))
        trainer = InOrder(model, arguments, train_dataset=blocks, callbacks=[Steps()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    parts = case.sequences // case.micro
    watch.losses = [sum(losses[start : start + parts]) for start in range(0, len(losses), parts)]
    return watch.facts(model)


def rehearse(work: Callable[[Case], Any], case: Case) -> None:
    """Do the work with a model of a few weights, so that imports and first uses of libraries are not measured."""
    shape = ScratchModelConfig(hidden_size=8, n_layers=1, n_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_random_tokens(Path(folder), vocabulary=16, count=100)
        sizes = {"vocabulary": 16, "context": 8, "sequences": 1, "micro": 1, "steps": 1}
        work(replace(case, shape=shape, tokens=tokens, compile=False, profile=None, **sizes))


def _arguments(case: Case) -> dict[str, Any]:
    """The Trainer's settings: those of `Case.config`, and nothing that takes time beside training."""
    config = case.config()
    return {
        "max_steps": config.steps,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.sequences // case.micro,
        "optim": "adamw_torch_fused",
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_betas[0],
        "adam_beta2": config.adam_betas[1],
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.gradient_clip_norm,
        "bf16": case.precision == "bfloat16",
        "torch_compile": case.compile,
        "use_cpu": case.device == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": case.device == "cuda",
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def write_random_tokens(folder: Path, *, vocabulary: int, count: int) -> Path:
    """One shard of tokens that are all as likely; returns the folder."""
    tokens = np.random.default_rng(0).integers(vocabulary, size=count)
    with TokenShardWriter(folder, "text", vocab_size=vocabulary) as writer:
        writer.add(DocumentRecord("random", count), tokens)
    return folder


def write_text_tokens(folder: Path, texts: Callable[[], Iterator[str]], *, vocabulary: int) -> tuple[Path, str]:
    """One shard of texts in a BPE that is trained on them; returns the folder, and what is in it in words."""
    from cbtm.branch.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.train(texts(), vocabulary)
    remaining = texts()
    with TokenShardWriter(folder, "text", vocab_size=vocabulary) as writer:
        while some := list(islice(remaining, 1000)):
            for text, tokens in zip(some, tokenizer.encode_batch(some), strict=True):
                writer.add(DocumentRecord("text", len(text.encode())), tokens)
        counts = writer.counts
    return (
        folder,
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens of a BPE of {tokenizer.vocab_size:,}",
    )
