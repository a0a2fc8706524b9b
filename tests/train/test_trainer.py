import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tiny_training import go_on, make_job, start_ranks, train_here, wait_for, wait_until_held, write_run

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import ConfigError, DataError, Interrupted, ManifestError, StorageError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.data import IGNORED, BlockOrder
from cbtm.train.loss import CausalLoss
from cbtm.train.ranks import Ranks
from cbtm.train.schedule import learning_rate
from cbtm.train.trainer import DivergedError, train
from cbtm.train.validation import Validation

# Points at 5, 10 and 12, checkpoints at 4 and 8: a stop falls between points, between checkpoints, and on each.
STEPS = 12
BASE = {
    "steps": STEPS,
    "sequences_per_step": 4,
    "context_length": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "checkpoint_every": 4,
    "log_every": 5,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(dropout=0.0):
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2, dropout=dropout)
    return create_model(config, vocab_size=300, separator_id=0, context_length=8)


def documents(folder, *, seed=0, prompt=0):
    """20 documents of 11 random tokens, which begin with a prompt of so many."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with TokenShardWriter(folder, "text", vocab_size=300) as writer:
        for number in range(20):
            writer.add(DocumentRecord(str(number), 1), rng.integers(300, size=11), prompt)
    return TokenDocuments([(folder, "text")])


def validation_of(folder):
    """Other documents than those of the training, every second one of its own cluster."""
    found = documents(folder, seed=1)
    return Validation(found, np.arange(20) % 2, cluster=1, context_length=8, max_blocks=100)


def order_of(folder, config, prompt=0):
    return BlockOrder(
        documents(folder, prompt=prompt), context_length=8, seed=config.random_state, packing=config.packing
    )


def run(folder, *, dropout=0.0, prompt=0, progress=None, report=lambda metrics, step: None, model=None, **changes):
    """Train a tiny model below `folder`; returns it and the result."""
    config = OptimizationConfig(**(BASE | changes))
    model = model or tiny(dropout)
    result = train(
        model,
        order_of(folder / "tokens", config, prompt),
        config,
        sequences_per_step=config.sequences_per_step,
        checkpoints=Checkpoints(str(folder / "checkpoints"), key="key", scratch=folder / "scratch"),
        report=report,
        progress=progress,
        validation=validation_of(folder / "validation") if config.validate_every else None,
    )
    return model, result


def without_machine(curve):
    """A curve without what depends on the machine and its load."""
    machine = {"train/tokens_per_second", "train/data_wait", "train/memory_gb"}
    return [{name: value for name, value in point.items() if name not in machine} for point in curve]


def assert_same_run(one, other):
    """Same curve to the last digit, same weights to the last bit."""
    (model, result), (other_model, other_result) = one, other
    assert without_machine(result.curve) == without_machine(other_result.curve)
    assert result.validation == other_result.validation
    assert result.steps == other_result.steps
    weights, other_weights = model.state_dict(), other_model.state_dict()
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nothing stops, with and without dropout."""
    return {dropout: run(tmp_path_factory.mktemp("whole"), dropout=dropout) for dropout in (0.0, 0.2)}


class PowerCut(Exception):
    pass


def at_step(step, action):
    def progress(done, loss):
        if done == step:
            action()

    return progress


def in_step(step, model, action):
    """The model, which does something in the forward pass of one step."""
    passes = []

    def hook(module, inputs):
        passes.extend([None] * module.training)  # that of the loss, which looks at the model first, is none
        if len(passes) == step and module.training:
            action()

    model.model.decoder.register_forward_pre_hook(hook)
    return model


def cut():
    raise PowerCut


# --- going on after a stop ---


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 8, 11, 12])
def test_run_that_crashed_goes_on_as_if_it_had_not(tmp_path, uninterrupted, step, dropout):
    with pytest.raises(PowerCut):
        run(tmp_path, dropout=dropout, progress=at_step(step, cut))
    torch.manual_seed(step)  # another process has another generator
    seen = []
    resumed = run(tmp_path, dropout=dropout, progress=lambda done, loss: seen.append(done))
    # Progress is called before a checkpoint is due, so a crash at step 4 goes back to 0, one at 5 to 4.
    assert seen[0] == (step - 1) // 4 * 4 + 1
    assert_same_run(resumed, uninterrupted[dropout])


def test_run_that_crashed_over_and_over_goes_on_as_if_it_had_not(tmp_path, uninterrupted):
    for step in (3, 6, 7, 10, 12):
        with pytest.raises(PowerCut):
            run(tmp_path, dropout=0.2, progress=at_step(step, cut))
    assert_same_run(run(tmp_path, dropout=0.2), uninterrupted[0.2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 7, 8, 12])
def test_signal_saves_the_step_and_the_same_run_goes_on(tmp_path, uninterrupted, step, number):
    before = signal.getsignal(number)
    model = in_step(step, tiny(0.2), lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 12; the checkpoint is at {tmp_path}/checkpoints"):
        run(tmp_path, model=model)
    assert signal.getsignal(number) == before
    seen = []
    resumed = run(tmp_path, dropout=0.2, progress=lambda done, loss: seen.append(done))
    assert seen == list(range(step + 1, 13))
    assert_same_run(resumed, uninterrupted[0.2])


def test_signal_between_two_steps_is_answered_at_the_end_of_the_next(tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped at step 7 of 12"):
        run(tmp_path / "between", progress=at_step(6, stop))
    # After the last one there is nothing left to stop.
    _, result = run(tmp_path / "end", progress=at_step(12, stop))
    assert result.steps == 12


@pytest.mark.parametrize(
    ("number", "exit_code", "first"),
    [
        (signal.SIGTERM, 75, 9),  # it comes behind step 7 and is answered behind step 8
        (signal.SIGKILL, -9, 5),  # back to the checkpoint of step 4
    ],
)
def test_process_that_is_ended_goes_on_in_another_as_if_it_had_not(tmp_path, number, exit_code, first):
    source = write_run(tmp_path / "source")
    settings = {"steps": 12, "dropout": 0.2}
    whole = train_here(make_job(source, tmp_path / "whole", **settings))
    job = make_job(source, tmp_path / "ended", **settings)
    processes = start_ranks(job, 1, hold_at=7)
    wait_until_held(job, processes)
    os.kill(processes[0].pid, number)
    go_on(job)
    assert wait_for(processes) == [exit_code]
    assert not list(job.output.glob("*.safetensors"))
    (job.output / "losses.jsonl").unlink()
    resumed = train_here(job)
    assert resumed.losses == {step: whole.losses[step] for step in range(first, 13)}
    assert without_machine(resumed.curve) == without_machine(whole.curve)
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in resumed.weights.items())


def test_run_whose_newest_checkpoint_is_torn_starts_afresh(tmp_path, uninterrupted):
    with pytest.raises(PowerCut):
        run(tmp_path, progress=at_step(7, cut))
    (tmp_path / "checkpoints/step-00000004/manifest.json").unlink()
    seen = []
    resumed = run(tmp_path, progress=lambda done, loss: seen.append(done))
    assert seen[0] == 1
    assert_same_run(resumed, uninterrupted[0.0])


def test_resumed_run_reports_the_points_of_the_one_before_again(tmp_path):
    reported = []
    with pytest.raises(PowerCut):
        run(tmp_path, progress=at_step(11, cut), report=lambda metrics, step: reported.append((step, dict(metrics))))
    assert [step for step, _ in reported] == [5, 10]
    again = []
    _, result = run(tmp_path, report=lambda metrics, step: again.append((step, dict(metrics))))
    # The checkpoint of step 8 knows the point of step 5; that of step 10 is made anew.
    assert [step for step, _ in again] == [5, 10, 12]
    assert again[0] == reported[0]
    assert [{"step": float(step), **metrics} for step, metrics in again] == result.curve


def test_training_works_outside_of_the_main_thread(tmp_path, uninterrupted):
    # Signal handlers cannot be set there; kfp's local runner and notebooks do this.
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same_run(results[0], uninterrupted[0.0])


# --- what a step does ---


def reference_losses(tmp_path, **changes):
    """The same training by PyTorch's own AdamW, transformers' own logits and one loop."""
    config = OptimizationConfig(**(BASE | changes))
    model = tiny().train()
    order = order_of(tmp_path / "tokens", config)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_epsilon, foreach=False)
    losses, norms = [], []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps, final_ratio=0.0
            )
        batch = order.batch(4 * step, 4)
        logits = model(input_ids=torch.from_numpy(batch.inputs)).logits
        targets = torch.from_numpy(batch.targets)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 300), targets.reshape(-1), ignore_index=IGNORED)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path):
    # An epsilon of the gradient's size: without it Adam would hide a gradient of the wrong length or unclipped.
    changes = {"adam_epsilon": 0.05, "gradient_clip_norm": 0.5, "learning_rate": 0.1}
    losses = []
    model, result = run(tmp_path, progress=lambda step, loss: losses.append(loss), **changes)
    plain, expected, norms = reference_losses(tmp_path, **changes)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert min(norms) > 0.5  # every step was clipped
    assert [point["train/gradient_norm"] for point in result.curve] == pytest.approx(
        [norms[4], norms[9], norms[11]], rel=1e-4
    )
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_time_of_an_interrupted_run_counts(tmp_path):
    def wait() -> None:
        time.sleep(0.2)

    with pytest.raises(PowerCut):
        run(tmp_path, progress=lambda step, loss: (at_step(3, wait)(step, loss), at_step(6, cut)(step, loss)))
    # The checkpoint of step 4 holds the time up to it.
    assert run(tmp_path)[1].seconds > 0.2


def test_points_are_means_over_the_steps_since_the_last_one(tmp_path):
    losses = []
    _, result = run(tmp_path, progress=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 13))
    values = [loss for _, loss in losses]
    curve = result.curve
    assert [point["step"] for point in curve] == [5, 10, 12]
    means = [sum(values[:5]) / 5, sum(values[5:10]) / 5, sum(values[10:]) / 2]
    assert [point["train/loss"] for point in curve] == means
    # Warm-up 2, peak 0.01 at step 2, 0 at step 11: step 4 is 0.01 * (1 - 2/9), step 9 is 0.01 * (1 - 7/9).
    assert [point["train/learning_rate"] for point in curve] == pytest.approx([0.07 / 9, 0.02 / 9, 0.0], abs=1e-12)
    assert [point["train/tokens"] for point in curve] == [5 * 32, 10 * 32, 12 * 32]  # 4 sequences of 8 tokens
    assert all(point["train/tokens_per_second"] > 0 for point in curve)
    assert result.tokens == 12 * 32
    # 220 tokens give 219 // 8 = 27 blocks; 48 are seen.
    assert result.epochs == pytest.approx(48 / 27)


@pytest.mark.parametrize(
    ("packing", "prompt"), [("continuous", 0), ("continuous", 7), ("documents", 7), ("separate", 0)]
)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7])
def test_accumulated_step_is_the_step_of_the_whole_batch(tmp_path, micro_batch_size, packing, prompt):
    # An epsilon of 1 makes Adam's first step proportional to the gradient; 3 leaves a micro-batch of 1 over. Parts
    # with other numbers of learned tokens weigh by them.
    changes = {"steps": 2, "warmup_steps": 0, "adam_epsilon": 1.0, "learning_rate": 1.0, "gradient_clip_norm": 100.0}
    changes |= {"packing": packing, "prompt": prompt}
    whole, expected = run(tmp_path / "whole", **changes)
    model, result = run(tmp_path / "parts", micro_batch_size=micro_batch_size, **changes)
    assert result.tokens == expected.tokens
    assert result.curve[0]["train/loss"] == pytest.approx(expected.curve[0]["train/loss"], rel=1e-6)
    start = tiny()
    moved = max(
        (one - other).abs().max().item() for one, other in zip(whole.parameters(), start.parameters(), strict=True)
    )
    assert moved > 1e-2
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_follows_the_losses_of_float32(tmp_path, uninterrupted, precision):
    model, result = run(tmp_path, precision=precision)
    losses = [point["train/loss"] for point in result.curve]
    expected = [point["train/loss"] for point in uninterrupted[0.0][1].curve]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_goes_on_as_if_it_had_not_crashed(tmp_path, precision):
    whole = run(tmp_path / "whole", precision=precision, dropout=0.2)
    with pytest.raises(PowerCut):
        run(tmp_path / "cut", precision=precision, dropout=0.2, progress=at_step(6, cut))
    assert_same_run(run(tmp_path / "cut", precision=precision, dropout=0.2), whole)


def test_float16_leaves_steps_out_until_the_loss_scale_fits(tmp_path, caplog):
    # 2^40 times any gradient of this model overflows float16: every step halves the scale, and nothing is learned.
    start = {name: tensor.clone() for name, tensor in tiny().state_dict().items()}
    model, _ = run(tmp_path / "high", precision="float16", loss_scale=2.0**40)
    assert "step=11 left out: its gradient overflows at a loss scale of 5.36871e+08" in caplog.text  # 2^40 / 2^11
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name])
    # From 2^20 it comes down to where it fits, and learns from there.
    learned, _ = run(tmp_path / "low", precision="float16", loss_scale=2.0**20)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in learned.state_dict().items())


def test_float16_stops_where_no_scale_helps(tmp_path):
    model = tiny()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"gradient norm is (inf|nan) at step"):
        run(tmp_path, model=model, precision="float16", loss_scale=2.0**-14)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_loss(tmp_path, uninterrupted, dropout):
    assert_same_run(run(tmp_path, dropout=dropout, activation_checkpointing=True), uninterrupted[dropout])


def test_activation_checkpointing_of_a_model_without_it_is_refused(tmp_path):
    model = tiny()
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ConfigError, match="activation_checkpointing is not supported by OPTForCausalLM"):
            run(tmp_path, model=model, activation_checkpointing=True)
    finally:
        type(model).supports_gradient_checkpointing = True


def test_compilation_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile=true needs a compiler, and no-such-compiler is not on the PATH"):
        run(tmp_path, compile=True)


def test_compiled_model_is_trained_and_saved_like_any(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled here, and there may be no compiler
    # Without a compiler's minutes: the stance has the compiled call run the original code.
    with torch.compiler.set_stance("force_eager"):
        model, result = run(tmp_path, compile=True)
    # Each layer, and not what is around them: while that is compiled, transformers makes a mask for the attention.
    compiled = [name for name, part in model.named_modules() if part._compiled_call_impl is not None]
    assert compiled == [f"model.decoder.layers.{number}" for number in range(model.config.num_hidden_layers)]
    assert_same_run((model, result), uninterrupted[0.0])


def test_weights_decay_in_matrices_only(tmp_path):
    # Decoupled decay takes lr * decay * w off on top of Adam's step: 0.01 * 0.5 of the weight.
    changes = {"steps": 1, "warmup_steps": 0}
    start = dict(tiny().named_parameters())
    kept = dict(run(tmp_path / "kept", weight_decay=0.0, **changes)[0].named_parameters())
    decayed = dict(run(tmp_path / "decayed", weight_decay=0.5, **changes)[0].named_parameters())
    assert {parameter.ndim for parameter in start.values()} == {1, 2}
    for name, parameter in start.items():
        if parameter.ndim == 1:
            assert torch.equal(kept[name], decayed[name]), name
        else:
            torch.testing.assert_close(kept[name] - decayed[name], 0.005 * parameter, rtol=1e-3, atol=1e-7, msg=name)


def test_dropout_is_on_while_training(tmp_path, uninterrupted):
    assert uninterrupted[0.2][1].curve[0]["train/loss"] != uninterrupted[0.0][1].curve[0]["train/loss"]
    assert_same_run(run(tmp_path, dropout=0.2), uninterrupted[0.2])  # and seeded
    other = run(tmp_path / "other", dropout=0.2, random_state=5)
    assert other[1].curve[0]["train/loss"] != uninterrupted[0.2][1].curve[0]["train/loss"]


def test_text_that_repeats_is_learned(tmp_path):
    # 27 blocks of random tokens, seen 30 times: from ln 300 = 5.7 to well below.
    _, result = run(tmp_path, steps=200, warmup_steps=10, learning_rate=3e-2, checkpoint_every=1000, log_every=10)
    assert result.curve[0]["train/loss"] == pytest.approx(math.log(300), abs=0.3)
    assert result.curve[-1]["train/loss"] < 3


# --- divergence ---


def break_weights(model, value):
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(value)


def test_broken_weights_are_named_at_the_first_step(tmp_path):
    model = tiny()
    break_weights(model, torch.nan)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 0, blocks 0 to 3; lower learning_rate=0\.01"):
        run(tmp_path, model=model)


def test_divergence_names_its_step_and_the_last_checkpoint_stays(tmp_path, uninterrupted):
    model = tiny()
    with pytest.raises(DivergedError, match="the loss is nan at step 6, blocks 24 to 27"):
        run(tmp_path, model=model, progress=at_step(6, lambda: break_weights(model, torch.nan)))
    assert DivergedError.exit_code == 2
    seen = []
    resumed = run(tmp_path, progress=lambda done, loss: seen.append(done))
    assert seen[0] == 5
    assert_same_run(resumed, uninterrupted[0.0])


def test_infinite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    # The loss is a number still; one step more and every weight would be NaN, at the last step unseen.
    model = tiny()
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(DivergedError, match=r"the gradient norm is (nan|inf) at step 0, blocks 0 to 3"):
        run(tmp_path, model=model, steps=1, warmup_steps=0)
    start = tiny().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


# --- validation and patience ---


def validation_losses(curve):
    return {
        int(point["step"]): {name: value for name, value in point.items() if name.startswith("validation/")}
        for point in curve
        if "validation/own_loss" in point
    }


def test_validation_losses_stand_in_the_curve_at_their_steps_and_at_the_last(tmp_path):
    weights, reported = {}, []
    model = tiny(0.2)

    def keep(step, loss):
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def report(metrics, step):
        reported.extend((step, name) for name in metrics if name.startswith("validation/"))

    _, result = run(tmp_path, model=model, validate_every=5, log_every=4, progress=keep, report=report)
    found = validation_losses(result.curve)
    assert sorted(found) == [5, 10, 12]
    assert [point["step"] for point in result.curve] == [4, 5, 8, 10, 12]
    assert reported == [(step, f"validation/{name}_loss") for step in (5, 10, 12) for name in ("own", "all")]
    for step, losses in found.items():
        same = tiny()
        same.load_state_dict(weights[step])
        sums = validation_of(tmp_path / "again").measure(CausalLoss(same), "cpu", 100)
        expected = {f"validation/{name}_loss": nats / count for name, (nats, count) in sums.items()}
        assert losses == pytest.approx(expected, rel=1e-6)
        assert losses["validation/own_loss"] != losses["validation/all_loss"]
    assert result.validation == found[12]


def test_validation_changes_no_step(tmp_path, uninterrupted):
    losses = {}
    for validate_every in (None, 1):
        steps = losses[validate_every] = []
        run(
            tmp_path / str(validate_every),
            dropout=0.2,
            validate_every=validate_every,
            progress=lambda step, loss, steps=steps: steps.append(loss),
        )
    assert losses[None] == losses[1]


# Random text cannot be learned: what is learned of the training's makes other text's loss rise.
OVERFITTING = {
    "steps": 40,
    "learning_rate": 5e-3,
    "warmup_steps": 10,
    "validate_every": 3,
    "patience": 2,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A run whose patience ends, the weights after each of its steps, and what it left behind."""
    folder, weights, model = tmp_path_factory.mktemp("overfitted"), {}, tiny(0.2)

    def keep(step, loss):
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    return *run(folder, model=model, progress=keep, **OVERFITTING), weights


def test_training_ends_when_patience_does_with_the_weights_of_the_best_validation(overfitted):
    model, result, weights = overfitted
    found = validation_losses(result.curve)
    best = min(found, key=lambda step: found[step]["validation/own_loss"])
    assert 3 < best < 30  # a better one has taken the place of an earlier
    # Two validations behind the best one, at every third step.
    assert max(weights) == max(found) == result.curve[-1]["step"] == best + 6
    assert "train/loss" in result.curve[-1]
    assert result.steps == best
    assert result.validation == found[best]
    assert result.tokens == (best + 6) * 32  # what was paid for
    assert all(torch.equal(tensor, weights[best][name]) for name, tensor in result.weights.items())
    assert all(torch.equal(tensor, weights[best][name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(model.lm_head.weight, weights[best + 6]["lm_head.weight"])


@pytest.mark.parametrize("behind_best", [-1, 0, 1, 2, 3, 5, 6])
def test_run_that_crashed_near_the_best_validation_ends_as_if_it_had_not(tmp_path, overfitted, behind_best):
    model, result, _ = overfitted
    with pytest.raises(PowerCut):
        run(tmp_path, dropout=0.2, progress=at_step(result.steps + behind_best, cut), **OVERFITTING)
    seen = []
    resumed = run(tmp_path, dropout=0.2, progress=lambda step, loss: seen.append(step), **OVERFITTING)
    # Progress is called before a checkpoint is due, and there is one behind every second step.
    assert seen[0] == (result.steps + behind_best - 1) // 2 * 2 + 1
    assert_same_run(resumed, (model, result))


def test_run_that_is_stopped_at_its_last_validation_has_nothing_left_to_train(tmp_path, overfitted):
    model, result, weights = overfitted
    stopping = in_step(max(weights), tiny(0.2), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=f"stopped at step {max(weights)} of 40"):
        run(tmp_path, model=stopping, **OVERFITTING)
    resumed = run(tmp_path, dropout=0.2, progress=at_step(max(weights) + 1, cut), **OVERFITTING)
    assert_same_run(resumed, (model, result))


def test_best_model_that_is_lost_is_not_replaced_by_another(tmp_path, overfitted):
    best = overfitted[1].steps
    with pytest.raises(PowerCut):
        run(tmp_path, dropout=0.2, progress=at_step(best + 5, cut), **OVERFITTING)
    (tmp_path / f"checkpoints/best/step-{best:08d}/manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"checkpoints/best has lost the best model; remove .*/checkpoints$"):
        run(tmp_path, dropout=0.2, **OVERFITTING)


def test_checkpoint_is_not_published_before_the_best_one_that_it_speaks_of(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best").write_text("no folder can be made here")
    with pytest.raises(StorageError, match=r"the model of the best validation was not published: .*Not a directory"):
        run(tmp_path, dropout=0.2, **OVERFITTING)
    # Those of before the first validation at step 3 speak of none.
    assert [path.parent.name for path in tmp_path.glob("checkpoints/*/manifest.json")] == ["step-00000002"]


def test_validation_that_has_nothing_to_measure_is_an_error(tmp_path):
    config = OptimizationConfig(**BASE, validate_every=3)
    prompts = documents(tmp_path / "prompts", prompt=10)
    with pytest.raises(DataError, match="the validation documents are prompts alone; use others, or leave validate_"):
        train(
            tiny(),
            order_of(tmp_path / "tokens", config),
            config,
            sequences_per_step=4,
            checkpoints=Checkpoints(str(tmp_path / "checkpoints"), key="key", scratch=tmp_path / "scratch"),
            report=lambda metrics, step: None,
            validation=Validation(prompts, np.arange(20) % 2, cluster=1, context_length=8, max_blocks=100),
        )


def test_without_patience_all_steps_are_taken(tmp_path):
    _, result = run(tmp_path, **(OVERFITTING | {"patience": None, "steps": 24}))
    assert result.steps == 24
    found = validation_losses(result.curve)
    assert result.validation == found[24]
    assert found[24]["validation/own_loss"] > min(losses["validation/own_loss"] for losses in found.values())


# --- what the points tell ---


def test_points_tell_perplexity_memory_and_waiting(tmp_path):
    _, result = run(tmp_path)
    for point in result.curve:
        assert point["train/perplexity"] == pytest.approx(math.exp(point["train/loss"]))
        assert 0 <= point["train/data_wait"] < 1
        assert 0.05 < point["train/memory_gb"] < 100  # torch alone takes so much
        assert "train/utilisation" not in point  # a processor's peak is not known
    assert 0 <= result.waited["data"] < 1
    assert 0 < result.waited["checkpoints"] < 1


def test_tokens_are_those_that_are_learned(tmp_path):
    # Documents of 11 are pieces of 8 and 3, of which two share a block of 8: padding and prompts do not count.
    config = OptimizationConfig(**BASE, packing="documents")
    _, result = run(tmp_path, packing="documents", prompt=4)
    order = order_of(tmp_path / "again", config, prompt=4)
    learned = [order.batch(4 * step, 4).n_targets for step in range(12)]
    assert [point["train/tokens"] for point in result.curve] == [sum(learned[:5]), sum(learned[:10]), sum(learned)]
    assert result.tokens == sum(learned) < 12 * 32
    assert result.computed_tokens == 12 * 32


def test_loss_of_a_point_weighs_tokens_alike_within_a_step(tmp_path):
    # One step: the mean over its learned tokens, by transformers' own logits.
    config = OptimizationConfig(**(BASE | {"steps": 1, "warmup_steps": 0, "packing": "documents"}))
    batch = order_of(tmp_path / "again", config, prompt=4).batch(0, 4)
    logits = tiny()(input_ids=torch.from_numpy(batch.inputs)).logits
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 300), torch.from_numpy(batch.targets).reshape(-1), ignore_index=IGNORED
    )
    _, result = run(tmp_path, steps=1, warmup_steps=0, packing="documents", prompt=4, micro_batch_size=1)
    assert result.curve[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-6)


# --- publishing beside the training ---


def test_steps_do_not_wait_for_checkpoints_but_the_end_does(tmp_path):
    # Whoever publishes reads all files first. This one is a pipe, which gives nothing until its other end is closed;
    # then a plain file has taken its name.
    ends, steps = [], []

    def describe(folder):
        pipe = folder / "slow.json"
        os.mkfifo(pipe)
        ends.append((pipe, os.open(pipe, os.O_RDWR)))

    def release():
        while ends:
            pipe, end = ends.pop(0)
            (tmp_path / "plain").touch()
            (tmp_path / "plain").replace(pipe)
            os.close(end)

    def progress(step, loss):
        steps.append((step, sorted((tmp_path / "checkpoints").glob("*/manifest.json"))))
        if step == 12:
            threading.Timer(0.3, release).start()

    config = OptimizationConfig(**BASE)
    train(
        tiny(),
        order_of(tmp_path / "tokens", config),
        config,
        sequences_per_step=4,
        checkpoints=Checkpoints(
            str(tmp_path / "checkpoints"), key="key", scratch=tmp_path / "scratch", keep=9, describe=describe
        ),
        report=lambda metrics, step: None,
        progress=progress,
    )
    assert steps == [(step, []) for step in range(1, 13)]
    assert not ends
    published = sorted(path.parent.name for path in (tmp_path / "checkpoints").glob("*/manifest.json"))
    assert published == ["step-00000004", "step-00000008"]


# --- what cannot be shared ---


@pytest.mark.parametrize(
    ("n_ranks", "changes", "message"),
    [
        (3, {}, "4 sequences per step do not divide among 3 devices; use a multiple, or devices=1"),
        (6, {}, "4 sequences per step do not divide among 6 devices; use a multiple, or devices=2"),
        # 220 tokens give 219 // 8 = 27 blocks.
        (
            28,
            {"sequences_per_step": 28},
            "the text gives 27 blocks of context_length=8, fewer than devices=28; use devices=1, a shorter context",
        ),
    ],
)
def test_work_that_cannot_be_shared_is_refused(tmp_path, n_ranks, changes, message):
    config = OptimizationConfig(**(BASE | changes))
    with pytest.raises(ConfigError, match=message):
        train(
            tiny(),
            order_of(tmp_path / "tokens", config),
            config,
            sequences_per_step=config.sequences_per_step,
            checkpoints=Checkpoints(str(tmp_path / "checkpoints"), key="key", scratch=tmp_path / "scratch"),
            report=lambda metrics, step: None,
            ranks=Ranks(0, n_ranks, torch.device("cpu")),
        )
