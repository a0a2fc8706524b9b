import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cbtm import manifest, storage
from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import ManifestError, StorageError
from cbtm.train.checkpoint import Checkpoints, TrainState, checkpoint_shapes, fetch_checkpoint
from cbtm.train.config import OptimizationConfig
from cbtm.train.ranks import Ranks
from cbtm.train.sharding import WholeModel, shard

CONFIG = OptimizationConfig(steps=9, sequences_per_step=2, learning_rate=1e-2, weight_decay=0.1)
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(random_state=0, n_layers=1) -> WholeModel:
    config = ScratchModelConfig(hidden_size=16, n_layers=n_layers, n_heads=2, random_state=random_state)
    model = create_model(config, vocab_size=300, separator_id=0, context_length=8)
    return shard(model, CONFIG, Ranks(0, 1, torch.device("cpu")))


def step(training, seed):
    tokens = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(seed))
    torch.autograd.backward(training.module(tokens[:, :-1], tokens[:, 1:], n_targets=16))
    training.optimizer.step()
    training.optimizer.zero_grad()


def stepped(n, **settings):
    training = fresh(**settings)
    for number in range(n):
        step(training, number)
    return training


def below(folder, *, key="key", keep=1, describe=None):
    return Checkpoints(str(folder / "checkpoints"), key=key, scratch=folder / "scratch", keep=keep, describe=describe)


def save(checkpoints, state, training):
    """Save, and wait until it is published."""
    with checkpoints:
        checkpoints.save(replace(state, optimizer_steps=training.optimizer_steps), training.tensors())
        assert checkpoints.settle() is None


def restore(checkpoints, training):
    tensors = training.tensors()
    state = checkpoints.restore(tensors)
    if state is not None:
        training.adopt(tensors, state.optimizer_steps)
    return state


def saved(folder, *steps, key="key", keep=9):
    """Checkpoints of the same run after several steps each; returns the folder of each."""
    for number in steps:
        save(below(folder, key=key, keep=keep), TrainState(number, []), stepped(number))
    return {number: folder / f"checkpoints/step-{number:08d}" for number in steps}


def restored_step(folder, **settings):
    state = restore(below(folder, **settings), fresh(random_state=1))
    return None if state is None else state.step


def everything(training):
    """Weights and moments."""
    return {name: tensor.clone() for name, tensor in training.tensors().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stored_names(folder):
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_everything_that_the_next_step_depends_on_comes_back_to_the_bit(tmp_path):
    training = stepped(3)
    state = TrainState(
        step=3,
        curve=[{"step": 2.0, "train/loss": 0.1 + 0.2}],
        losses=[1 / 3],
        tokens=96,
        seconds=1.5,
        optimizer_steps=3,
        loss_scale={"value": 64.0, "clean_steps": 2.0},
        best={"loss": 2 / 3, "step": 2.0, "validations_since": 1},
    )
    save(below(tmp_path), state, training)
    again = fresh(random_state=1)
    assert restore(below(tmp_path), again) == state
    assert again.optimizer_steps == 3
    assert_equal(everything(again), everything(training))
    for each in (training, again):
        step(each, seed=3)
    assert_equal(everything(again), everything(training))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    training = stepped(2)
    save(below(tmp_path), TrainState(2, []), training)
    names = stored_names(tmp_path / "checkpoints/step-00000002")
    assert "model/model.decoder.embed_tokens.weight" in names
    assert not [name for name in names if "lm_head" in name]
    again = fresh(random_state=1)
    restore(below(tmp_path), again)
    model = again.module.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, training.module.model.lm_head.weight)


def test_nothing_is_pickled(tmp_path):
    saved(tmp_path, 1)
    folder = tmp_path / "checkpoints/step-00000001"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", SHARD, "state.json"]
    # Each tensor whole and in float32, so that other software can read it.
    shapes = checkpoint_shapes(folder)
    assert shapes["exp_avg/model.decoder.layers.0.fc1.weight"] == (64, 16)
    assert stored_names(folder) == set(shapes)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_there_is_nothing_to_restore_at_first(tmp_path):
    training = fresh()
    before = everything(training)
    assert restore(below(tmp_path), training) is None
    assert_equal(everything(training), before)
    assert training.optimizer_steps == 0


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


@pytest.mark.parametrize("name", ["manifest.json", SHARD, "state.json"])
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
    (folder / SHARD).write_bytes(b"")
    training = fresh()
    before = everything(training)
    assert restore(below(tmp_path), training) is None
    assert_equal(everything(training), before)


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
    ("layers", "now", "message"), [(1, 2, "48 of its tensors are missing, 0 are unknown"), (2, 1, "0 .* missing, 48 ")]
)
def test_checkpoint_of_another_model_is_an_error_and_not_half_loaded(tmp_path, layers, now, message):
    # A layer of OPT has 16 tensors (4 projections, 2 feed-forward, 2 norms, a weight and a bias each), with moments 48.
    save(below(tmp_path), TrainState(1, []), stepped(1, n_layers=layers))
    training = fresh(random_state=1, n_layers=now)
    before = everything(training)
    with pytest.raises(ManifestError, match=f"is of another model: {message}.* such as exp_avg/model.decoder.layers.1"):
        restore(below(tmp_path), training)
    assert_equal(everything(training), before)


def test_tensor_of_another_shape_is_named(tmp_path):
    save(below(tmp_path), TrainState(1, []), stepped(1))
    tensors = fresh().tensors()
    tensors["model/model.decoder.layers.0.fc1.bias"] = torch.zeros(63)
    with pytest.raises(
        ManifestError, match=r"1 have another shape, such as model/model\.decoder\.layers\.0\.fc1\.bias"
    ):
        below(tmp_path).restore(tensors)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    (folder,) = saved(tmp_path, 2).values()
    first = (folder / "manifest.json").read_bytes()
    save(below(tmp_path), TrainState(2, [{"step": 1.0}]), stepped(2))
    assert (folder / "manifest.json").read_bytes() != first
    assert json.loads((folder / "state.json").read_text())["curve"] == [{"step": 1.0}]
    assert restored_step(tmp_path) == 2


def test_files_that_a_killed_try_with_more_ranks_left_are_no_part_of_the_checkpoint(tmp_path):
    # It was killed while it published step 2: its shards are there, of other weights, and no manifest.
    torn = tmp_path / "checkpoints/step-00000002"
    save(below(tmp_path / "other"), TrainState(2, []), stepped(2, random_state=7))
    torn.mkdir(parents=True)
    shutil.copy(tmp_path / "other/checkpoints/step-00000002" / SHARD, torn / SHARD.replace("-00001-", "-00002-", 1))
    training = stepped(2)
    save(below(tmp_path), TrainState(2, []), training)
    assert sorted(path.name for path in torn.iterdir()) == ["manifest.json", SHARD, "state.json"]
    again = fresh(random_state=1)
    assert restore(below(tmp_path), again) == TrainState(2, [], optimizer_steps=2)
    assert_equal(everything(again), everything(training))


def test_a_folder_moved_elsewhere_still_restores(tmp_path):
    saved(tmp_path / "here", 2)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert restored_step(tmp_path / "there") == 2


def test_clear_removes_all_with_the_best(tmp_path):
    saved(tmp_path, 1, 2)
    save(below(tmp_path).best, TrainState(1, []), stepped(1))
    assert (tmp_path / "checkpoints/best/step-00000001/manifest.json").is_file()
    below(tmp_path).clear()
    assert not (tmp_path / "checkpoints").exists()
    assert restored_step(tmp_path) is None
    below(tmp_path).clear()  # there may be nothing, as after a seed that was taken over


def test_best_checkpoint_is_none_of_the_newest(tmp_path):
    saved(tmp_path, 4)
    checkpoints = below(tmp_path)
    with checkpoints:
        checkpoints.best.save(TrainState(8, []), stepped(1).tensors())
        assert checkpoints.best.settle() is None
    assert restored_step(tmp_path) == 4
    assert below(tmp_path).best.steps() == [8]
    assert below(tmp_path).steps() == [4]


def test_what_a_killed_process_left_on_this_machine_goes_with_the_next(tmp_path):
    (tmp_path / "scratch/saving-00000007-1").mkdir(parents=True)
    (tmp_path / "scratch/saving-00000007-1" / SHARD).write_bytes(bytes(1000))
    saved(tmp_path, 2)
    assert restored_step(tmp_path) == 2
    assert list((tmp_path / "scratch").iterdir()) == []


def test_checkpoints_in_a_bucket_come_back_and_go(bucket, tmp_path):
    checkpoints = Checkpoints(f"{bucket}/run/checkpoints", key="key", scratch=tmp_path)
    with checkpoints:
        for number in (1, 2):
            training = stepped(number)
            checkpoints.save(TrainState(number, [], optimizer_steps=number), training.tensors())
            checkpoints.best.save(TrainState(number, []), training.tensors())
            assert checkpoints.settle() is checkpoints.best.settle() is None
    again = fresh(random_state=1)
    assert restore(checkpoints, again) == TrainState(2, [], optimizer_steps=2)
    assert_equal(everything(again), everything(training))
    found = {file.path.rpartition("/")[0] for file in storage.list_files(f"{bucket}/run/checkpoints")}
    assert found == {"step-00000002", "best/step-00000002"}
    checkpoints.clear()
    assert storage.list_files(bucket) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # nothing is left on this machine


def test_damaged_checkpoint_in_a_bucket_leaves_no_file_among_those_of_the_one_before(bucket, tmp_path):
    # Both are fetched into one folder. The newer one has a file more, of a larger model, and shows its damage last.
    checkpoints = Checkpoints(f"{bucket}/checkpoints", key="key", scratch=tmp_path, keep=9)
    expected = stepped(1)
    save(checkpoints, TrainState(1, []), expected)
    work = tmp_path / "newer"
    save(below(tmp_path / "other"), TrainState(2, []), stepped(2, n_layers=2))
    shutil.copytree(tmp_path / "other/checkpoints/step-00000002", work)
    (work / "manifest.json").unlink()
    (work / SHARD).rename(work / SHARD.replace("-00001-", "-00002-", 1))
    manifest.publish(manifest.StageSpec("checkpoint", f"{bucket}/checkpoints/step-00000002", "key"), work, {})
    state = f"{bucket}/checkpoints/step-00000002/state.json"
    storage.write_bytes(state, storage.read_bytes(state)[::-1])
    again = fresh(random_state=3)
    assert restore(Checkpoints(f"{bucket}/checkpoints", key="key", scratch=tmp_path / "here"), again).step == 1
    assert_equal(everything(again), everything(expected))


# --- what is no checkpoint ---


@pytest.mark.parametrize("name", ["optimizer.pt", "__0_0.distcp", ".metadata", "model.safetensors.bin"])
def test_file_that_could_be_a_pickle_is_never_read(tmp_path, caplog, name):
    folders = saved(tmp_path, 1)
    work = tmp_path / "with-a-pickle"
    shutil.copytree(folders[1], work)
    (work / "manifest.json").unlink()
    (work / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    root = str(tmp_path / "checkpoints/step-00000002")
    made = manifest.publish(manifest.StageSpec("checkpoint", root, "key"), work, {"step": 2})
    said = f"{root} holds {name}; a checkpoint is safetensors and JSON, and nothing else is read"
    with pytest.raises(ManifestError) as refused:
        fetch_checkpoint(root, made, tmp_path / "fetched")
    assert str(refused.value).startswith(said)
    assert restored_step(tmp_path) == 1
    assert f"checkpoint={root} passed over: {said}" in caplog.text


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FULL = r"no space left on the disk that holds {}/saving-00000002-1 for a checkpoint; free some .* from its last checkp"


def test_disk_too_small_for_the_tensors_is_an_error_with_the_remedy(tmp_path, small_disk):
    # 3 x 4 bytes for each of 300 * 16 embeddings alone are 57,600 of its 65,536.
    saved(tmp_path, 1)
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), key="key", scratch=small_disk / "scratch")
    with checkpoints, pytest.raises(StorageError, match=FULL.format(small_disk / "scratch")):
        checkpoints.save(TrainState(2, []), stepped(2).tensors())
    # The next process finds the last whole one, and room again.
    again = Checkpoints(str(tmp_path / "checkpoints"), key="key", scratch=small_disk / "scratch")
    assert restore(again, fresh(random_state=1)).step == 1
    assert list((small_disk / "scratch").iterdir()) == []


def test_disk_that_is_full_beside_the_tensors_is_an_error_with_the_remedy(tmp_path):
    def describe(folder):
        (folder / "config.json").symlink_to("/dev/full")
        (folder / "config.json").write_text("{}")

    saved(tmp_path, 1)
    checkpoints = below(tmp_path, describe=describe)
    with checkpoints, pytest.raises(StorageError, match=FULL.format(tmp_path / "scratch")):
        checkpoints.save(TrainState(2, []), stepped(2).tensors())
    assert restored_step(tmp_path) == 1


def test_other_failure_of_writing_is_no_full_disk(tmp_path):
    def describe(folder):
        (folder / "nowhere/config.json").write_text("{}")

    with below(tmp_path, describe=describe) as checkpoints, pytest.raises(FileNotFoundError):
        checkpoints.save(TrainState(2, []), stepped(2).tensors())


# --- publishing beside the training ---


def test_saving_does_not_wait_for_publishing_and_settling_does(tmp_path):
    # Whoever publishes reads all files first; a pipe gives nothing until its other end is closed.
    ends = []

    def describe(folder):
        os.mkfifo(folder / "slow.json")
        ends.append((folder / "slow.json", os.open(folder / "slow.json", os.O_RDWR)))

    def release():
        (tmp_path / "plain").touch()
        (tmp_path / "plain").replace(ends[0][0])
        os.close(ends[0][1])

    training = stepped(2)
    expected = everything(training)
    with below(tmp_path, describe=describe) as checkpoints:
        checkpoints.save(TrainState(2, []), training.tensors())
        step(training, seed=2)  # what is published is of when it was saved
        assert checkpoints.steps() == []
        threading.Timer(0.2, release).start()
        assert checkpoints.settle() is None
        assert checkpoints.steps() == [2]
    again = fresh(random_state=1)
    assert restore(below(tmp_path), again).step == 2
    assert_equal(everything(again), expected)


def test_settling_says_why_the_newest_could_not_be_published(tmp_path):
    (tmp_path / "checkpoints").write_text("no folder can be made here")
    with below(tmp_path) as checkpoints:
        checkpoints.save(TrainState(2, []), stepped(2).tensors())
        assert "Not a directory" in checkpoints.settle()
