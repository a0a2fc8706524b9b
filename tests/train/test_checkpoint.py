import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cbtm import storage
from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import ManifestError
from cbtm.train.checkpoint import Checkpoints, TrainState
from cbtm.train.config import OptimizationConfig
from cbtm.train.trainer import _optimizer

CONFIG = OptimizationConfig(steps=9, sequences_per_step=2, learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(random_state=0, n_layers=1):
    config = ScratchModelConfig(hidden_size=16, n_layers=n_layers, n_heads=2, random_state=random_state)
    model = create_model(config, vocab_size=300, separator_id=0, context_length=8)
    return model, _optimizer(model, CONFIG)


def step(model, optimizer, seed):
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(seed))
    torch.autograd.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    optimizer.zero_grad()


def stepped(n, **settings):
    model, optimizer = fresh(**settings)
    for number in range(n):
        step(model, optimizer, number)
    return model, optimizer


def below(folder, *, key="key", keep=1):
    return Checkpoints(str(folder / "checkpoints"), key=key, scratch=folder / "scratch", keep=keep)


def saved(folder, *steps, key="key", keep=9):
    """Checkpoints of the same run after several steps each; returns the folder of each."""
    for number in steps:
        below(folder, key=key, keep=keep).save(TrainState(number, []), *stepped(number))
    return {number: folder / f"checkpoints/step-{number:08d}" for number in steps}


def restored_step(folder, **settings):
    state = below(folder, **settings).restore(*fresh(random_state=1))
    return None if state is None else state.step


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_everything_that_the_next_step_depends_on_comes_back_to_the_bit(tmp_path):
    model, optimizer = stepped(3)
    state = TrainState(3, [{"step": 2.0, "train/loss": 0.1 + 0.2}], [1 / 3])
    torch.manual_seed(5)
    below(tmp_path).save(state, model, optimizer)
    expected = torch.rand(4)
    step(model, optimizer, seed=3)

    again, its_optimizer = fresh(random_state=1)
    torch.manual_seed(6)
    assert below(tmp_path).restore(again, its_optimizer) == state
    assert torch.equal(torch.rand(4), expected)
    step(again, its_optimizer, seed=3)
    assert_equal(weights(again), weights(model))
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert_equal(optimizer.state[first], its_optimizer.state[second])


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model, optimizer = stepped(2)
    below(tmp_path).save(TrainState(2, []), model, optimizer)
    names = load_file(tmp_path / "checkpoints/step-00000002/model.safetensors").keys()
    assert len({"lm_head.weight", "model.decoder.embed_tokens.weight"} & names) == 1

    again, its_optimizer = fresh(random_state=1)
    below(tmp_path).restore(again, its_optimizer)
    head, embeddings = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert head is embeddings
    assert torch.equal(head, model.get_output_embeddings().weight)


def test_nothing_is_pickled(tmp_path):
    saved(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "checkpoints/step-00000001").iterdir())
    assert names == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_there_is_nothing_to_restore_at_first(tmp_path):
    model, optimizer = fresh()
    before = weights(model)
    assert below(tmp_path).restore(model, optimizer) is None
    assert_equal(weights(model), before)
    assert not optimizer.state


def test_newest_checkpoint_is_restored(tmp_path):
    saved(tmp_path, 2, 10, 9)  # as numbers, not as text
    assert restored_step(tmp_path) == 9  # 10 went when 9 was saved: whoever saves 9 did not come from 10
    saved(tmp_path, 10)
    assert restored_step(tmp_path) == 10


def test_only_as_many_as_asked_for_stay(tmp_path):
    for keep in (1, 2):
        folder = tmp_path / str(keep)
        saved(folder, 1, 2, 3, 4, keep=keep)
        assert len(list((folder / "checkpoints").iterdir())) == keep
        assert restored_step(folder) == 4


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage):
    folders = saved(tmp_path, 1, 2)
    path = folders[2] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        if name == "manifest.json":
            path.write_bytes(b"{}")
    assert restored_step(tmp_path) == 1


def test_where_all_are_torn_training_starts_afresh(tmp_path):
    (folder,) = saved(tmp_path, 1).values()
    (folder / "model.safetensors").write_bytes(b"")
    model, optimizer = fresh()
    before = weights(model)
    assert below(tmp_path).restore(model, optimizer) is None
    assert_equal(weights(model), before)
    assert not optimizer.state


def test_torn_checkpoints_do_not_count_among_those_that_stay(tmp_path):
    folders = saved(tmp_path, 1, 2, 3)
    (folders[3] / "manifest.json").unlink()
    saved(tmp_path, 4, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_checkpoints_of_another_run_are_not_used(tmp_path):
    saved(tmp_path, 3, key="other")
    assert restored_step(tmp_path) is None
    assert restored_step(tmp_path, key="other") == 3


def test_later_checkpoints_of_another_run_do_not_push_out_this_ones(tmp_path):
    # A run was stopped at step 8 and its learning rate changed: the new run's step 2 is worth more than that 8.
    saved(tmp_path, 8, key="before")
    saved(tmp_path, 2, key="after", keep=1)
    assert restored_step(tmp_path, key="after") == 2
    assert not (tmp_path / "checkpoints/step-00000008").exists()


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    # Same size, other bytes: only fetching shows it, so it looks whole to whoever counts.
    folders = saved(tmp_path, 4, 8)
    (folders[8] / "state.json").write_bytes((folders[8] / "state.json").read_bytes()[::-1])
    assert restored_step(tmp_path) == 4
    saved(tmp_path, 5, keep=1)
    assert restored_step(tmp_path) == 5


@pytest.mark.parametrize(
    ("layers", "now", "message"), [(1, 2, "16 of its tensors are missing and 0"), (2, 1, "0 .* 16")]
)
def test_checkpoint_of_another_model_is_an_error_and_not_half_loaded(tmp_path, layers, now, message):
    # A layer of OPT has 16 tensors: 4 projections, 2 feed-forward, 2 norms, a weight and a bias each.
    below(tmp_path).save(TrainState(1, []), *stepped(1, n_layers=layers))
    model, optimizer = fresh(random_state=1, n_layers=now)
    before = weights(model)
    with pytest.raises(ManifestError, match=f"is of another model: {message}.* such as model.decoder.layers.1"):
        below(tmp_path).restore(model, optimizer)
    assert_equal(weights(model), before)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    (folder,) = saved(tmp_path, 2).values()
    first = (folder / "manifest.json").read_bytes()
    below(tmp_path).save(TrainState(2, [{"step": 1.0}]), *stepped(2))
    assert (folder / "manifest.json").read_bytes() != first
    assert json.loads((folder / "state.json").read_text())["curve"] == [{"step": 1.0}]
    assert restored_step(tmp_path) == 2


def test_a_folder_moved_elsewhere_still_restores(tmp_path):
    saved(tmp_path / "here", 2)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert restored_step(tmp_path / "there") == 2


def test_clear_removes_all(tmp_path):
    saved(tmp_path, 1, 2)
    below(tmp_path).clear()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert restored_step(tmp_path) is None


def test_checkpoints_in_a_bucket_come_back_and_go(bucket, tmp_path):
    checkpoints = Checkpoints(f"{bucket}/run/checkpoints", key="key", scratch=tmp_path)
    for number in (1, 2):
        model, optimizer = stepped(number)
        checkpoints.save(TrainState(number, []), model, optimizer)
    again, its_optimizer = fresh(random_state=1)
    assert checkpoints.restore(again, its_optimizer) == TrainState(2, [])
    assert_equal(weights(again), weights(model))
    assert {file.path.split("/")[1] for file in storage.list_files(f"{bucket}/run")} == {"step-00000002"}
    checkpoints.clear()
    assert storage.list_files(bucket) == []
    assert list(tmp_path.iterdir()) == []  # nothing is left on this machine
