import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cbtm
from cbtm.branch.seed import ScratchModelConfig, create_model, load_model
from cbtm.errors import ConfigError, Interrupted
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.cost import flops_per_token
from cbtm.train.data import BlockOrder
from cbtm.train.expert import train_member
from cbtm.train.member import Member
from cbtm.train.schedule import learning_rate
from cbtm.train.trainer import DivergedError, train

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


def documents(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with TokenShardWriter(folder, "text", vocab_size=300) as writer:
        for number in range(20):
            writer.add(DocumentRecord(str(number), 1), rng.integers(300, size=11))
    return TokenDocuments([(folder, "text")])


def checkpoints_of(folder):
    return Checkpoints(str(folder / "checkpoints"), key="key", scratch=folder / "scratch")


def run(folder, *, dropout=0.0, progress=None, report=lambda metrics, step: None, model=None, **changes):
    """Train a tiny model below `folder`; returns it and the result."""
    config = OptimizationConfig(**(BASE | changes))
    model = model or tiny(dropout)
    order = BlockOrder(documents(folder / "tokens"), context_length=8, seed=config.random_state)
    result = train(
        model,
        order,
        config,
        sequences_per_step=config.sequences_per_step,
        checkpoints=checkpoints_of(folder),
        report=report,
        progress=progress,
    )
    return model, result


def without_speed(curve):
    return [{name: value for name, value in point.items() if name != "train/tokens_per_second"} for point in curve]


def assert_same_run(one, other):
    """Same curve to the last digit, same weights to the last bit."""
    (model, result), (other_model, other_result) = one, other
    assert without_speed(result.curve) == without_speed(other_result.curve)
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
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 12; the checkpoint is at {tmp_path}/checkpoints"):
        run(tmp_path, dropout=0.2, progress=at_step(step, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) == before
    seen = []
    resumed = run(tmp_path, dropout=0.2, progress=lambda done, loss: seen.append(done))
    assert seen == list(range(step + 1, 13))
    assert_same_run(resumed, uninterrupted[0.2])


def child_main(folder):
    """What the child process of the tests below runs: train, and wait at step 7 for a signal."""
    torch.set_num_threads(1)

    def wait():
        (folder / "at-step-7").touch()
        while not (folder / "go-on").exists():
            time.sleep(0.01)

    try:
        run(folder, dropout=0.2, progress=at_step(7, wait))
    except Interrupted as error:
        sys.exit(error.exit_code)


@pytest.fixture(scope="module", autouse=True)
def children(tmp_path_factory):
    """Two processes on their way to step 7, and their folders; started first, because they take seconds to import."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cbtm.__file__).parents[1])}
    folders = [tmp_path_factory.mktemp("child") for _ in range(2)]
    started = [
        (subprocess.Popen([sys.executable, __file__, str(folder)], env=environment), folder) for folder in folders
    ]
    yield started
    for process, _ in started:
        process.kill()
        process.wait()


def wait_for_step_7(process, folder):
    deadline = time.monotonic() + 120
    while not (folder / "at-step-7").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_ends_a_process_with_75_and_another_process_goes_on_as_if_nothing_had_been(children, uninterrupted):
    process, folder = children[0]
    wait_for_step_7(process, folder)
    process.send_signal(signal.SIGTERM)
    (folder / "go-on").touch()
    assert process.wait(timeout=60) == 75
    seen = []
    resumed = run(folder, dropout=0.2, progress=lambda done, loss: seen.append(done))
    assert seen[0] == 8
    assert_same_run(resumed, uninterrupted[0.2])


def test_process_that_is_killed_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(children, uninterrupted):
    process, folder = children[1]
    wait_for_step_7(process, folder)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    seen = []
    resumed = run(folder, dropout=0.2, progress=lambda done, loss: seen.append(done))
    assert seen[0] == 5
    assert_same_run(resumed, uninterrupted[0.2])


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
    order = BlockOrder(documents(tmp_path / "tokens"), context_length=8, seed=config.random_state)
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
        blocks = torch.from_numpy(order.batch(4 * step, 4))
        logits = model(input_ids=blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 300), blocks[:, 1:].reshape(-1))
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


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7])
def test_accumulated_step_is_the_step_of_the_whole_batch(tmp_path, micro_batch_size):
    # An epsilon of 1 makes Adam's first step proportional to the gradient; 3 leaves a micro-batch of 1 over.
    changes = {"steps": 2, "warmup_steps": 0, "adam_epsilon": 1.0, "learning_rate": 1.0, "gradient_clip_norm": 100.0}
    whole, expected = run(tmp_path / "whole", **changes)
    model, result = run(tmp_path / "parts", micro_batch_size=micro_batch_size, **changes)
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


def test_compiled_model_is_trained_and_saved_like_any(tmp_path, uninterrupted):
    # Without a compiler's minutes: the stance has the compiled call run the original code.
    with torch.compiler.set_stance("force_eager"):
        model, result = run(tmp_path, compile=True)
    assert model.base_model._compiled_call_impl is not None
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


# --- a member of a run ---


def test_member_is_written_as_a_model_folder_with_its_facts_and_curve(tmp_path):
    model = tiny()
    folder = tmp_path / "expert"
    folder.mkdir()
    facts = train_member(
        Member("expert", 3),
        model,
        documents(tmp_path / "tokens"),
        OptimizationConfig(**BASE),
        sequences_per_step=2,
        bindings={"clusterer_digest": "c", "tokenizer_digest": "t", "seed_digest": "s"},
        checkpoints=checkpoints_of(tmp_path),
        report=lambda metrics, step: None,
        progress=None,
        folder=folder,
    )
    curve = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    assert json.loads((folder / "expert.json").read_text()) == facts
    cost = facts.pop("cost")
    assert cost["flops"] == 12 * 2 * 8 * flops_per_token(model, 8)
    assert cost["seconds"] > 0
    assert facts == {
        "format": 1,
        "member": "cluster-00003",
        "kind": "expert",
        "cluster": 3,
        "clusterer_digest": "c",
        "tokenizer_digest": "t",
        "seed_digest": "s",
        "documents": 20,
        "corpus_tokens": 220,
        "tokens_seen": 12 * 2 * 8,
        "epochs": round(24 / 27, 4),  # 12 steps of 2 sequences, 27 blocks
        "steps": 12,
        "sequences_per_step": 2,
        "final_loss": curve[-1]["train/loss"],
    }
    opened = load_model(folder).state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in model.state_dict().items())


if __name__ == "__main__":
    child_main(Path(sys.argv[1]))
