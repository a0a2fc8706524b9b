"""A model out of a checkpoint: the one that a training of so many steps would have left."""

import json
import shutil

import pytest
import torch
from tiny_training import CONTEXT, make_job, train_here, train_on_ranks, write_run
from typer.testing import CliRunner

from cbtm import cli, manifest
from cbtm.branch.seed import load_model
from cbtm.errors import ConfigError, ManifestError
from cbtm.train.consolidate import consolidate

# A learning rate that knows nothing of the last step: a training of 4 steps is the first half of one of 8.
CONSTANT = {"final_learning_rate_ratio": 1.0, "warmup_steps": 0, "validate_every": None, "cluster_tokens": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the checkpoints of steps 2, 4 and 6 by number of ranks, and the models of trainings of 4 steps."""
    root = tmp_path_factory.mktemp("trained")
    source = write_run(root / "source")
    found = {}
    for n in (1, 2):
        settings = CONSTANT | ({"devices": 2, "sharding": "fsdp2"} if n == 2 else {})
        start = train_here if n == 1 else (lambda job: train_on_ranks(job, 2))
        whole = start(make_job(source, root / f"whole-{n}", checkpoint_every=2, checkpoints_kept=9, **settings))
        half = start(make_job(source, root / f"half-{n}", steps=4, checkpoint_every=9, **settings))
        found[n] = whole.folder.with_name("checkpoints"), half
    return found


@pytest.fixture
def checkpoints(trained, tmp_path):
    """A copy of those of one rank, to be damaged."""
    return shutil.copytree(trained[1][0], tmp_path / "checkpoints")


def tear(checkpoint):
    (checkpoint / "manifest.json").unlink()


def logits(folder):
    with torch.no_grad():
        return load_model(folder).eval()(torch.arange(3 * CONTEXT).reshape(3, CONTEXT)).logits


@pytest.mark.parametrize("n", [1, 2])
def test_model_is_that_of_a_training_that_ended_there(trained, tmp_path, n):
    checkpoints, half = trained[n]
    facts = consolidate(str(checkpoints / "step-00000004"), tmp_path / "model")
    assert torch.equal(logits(tmp_path / "model"), logits(half.folder))
    names = {path.name for path in half.folder.iterdir()} - {"losses.jsonl", "training.jsonl"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text()) == json.loads((half.folder / name).read_text())
    assert json.loads((tmp_path / "model/expert.json").read_text()) == facts
    assert facts == {
        **{name: half.facts[name] for name in ("format", "member", "kind", "cluster")},
        **{f"{name}_digest": half.facts[f"{name}_digest"] for name in ("clusterer", "tokenizer", "seed")},
        "steps": 4,
        "tokens_seen": half.facts["tokens_seen"],
        "checkpoint": str(checkpoints / "step-00000004"),
    }


def test_checkpoints_of_one_rank_and_of_two_are_of_one_model(trained, tmp_path):
    for n in (1, 2):
        consolidate(str(trained[n][0]), tmp_path / str(n))
    torch.testing.assert_close(logits(tmp_path / "1"), logits(tmp_path / "2"), rtol=1e-4, atol=1e-5)


def test_newest_complete_one_is_taken(checkpoints, tmp_path):
    assert consolidate(str(checkpoints), tmp_path / "newest")["steps"] == 6
    tear(checkpoints / "step-00000006")
    assert consolidate(str(checkpoints), tmp_path / "before")["steps"] == 4


def test_best_one_is_had_by_its_own_folder(checkpoints, tmp_path):
    (checkpoints / "best").mkdir()
    shutil.move(checkpoints / "step-00000002", checkpoints / "best/step-00000002")
    assert consolidate(str(checkpoints), tmp_path / "newest")["steps"] == 6
    assert consolidate(str(checkpoints / "best"), tmp_path / "best")["steps"] == 2


def test_checkpoint_in_a_bucket(trained, bucket, tmp_path):
    work = shutil.copytree(trained[2][0] / "step-00000004", tmp_path / "work")
    tear(work)
    manifest.publish(manifest.StageSpec("checkpoint", f"{bucket}/ck/step-00000004", "key"), work, {})
    facts = consolidate(f"{bucket}/ck", tmp_path / "model")
    assert facts["checkpoint"] == f"{bucket}/ck/step-00000004"
    assert torch.equal(logits(tmp_path / "model"), logits(trained[2][1].folder))


def test_folder_that_holds_something_is_refused_and_left_alone(trained, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path}/model is not an empty folder"):
        consolidate(str(trained[1][0]), tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_empty_folder_is_taken(trained, tmp_path):
    (tmp_path / "model").mkdir()
    assert consolidate(str(trained[1][0]), tmp_path / "model")["steps"] == 6


def test_where_no_checkpoint_is_whole_there_is_no_model(checkpoints, tmp_path):
    for folder in checkpoints.iterdir():
        tear(folder)
    for uri in (checkpoints, checkpoints / "step-00000004", tmp_path / "nowhere"):
        with pytest.raises(ManifestError, match=f"{uri} holds no complete checkpoint; expected .*checkpoints/<member>"):
            consolidate(str(uri), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pickle_is_refused(checkpoints, tmp_path):
    folder = checkpoints / "step-00000006"
    tear(folder)
    (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    work = shutil.move(folder, tmp_path / "work")
    manifest.publish(manifest.StageSpec("checkpoint", str(folder), "key"), work, {})
    with pytest.raises(
        ManifestError,
        match=f"{folder} holds optimizer.pt; a checkpoint is safetensors and JSON, and nothing else is read, because a "
        "pickle could run code",
    ):
        consolidate(str(checkpoints), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_checkpoint_that_was_changed_is_refused(checkpoints, tmp_path):
    path = next((checkpoints / "step-00000006").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ManifestError, match=f"step-00000006: {path.name} was changed or cut short"):
        consolidate(str(checkpoints), tmp_path / "model")


def test_command_line(trained, tmp_path):
    result = CliRunner().invoke(cli.app, ["consolidate", str(trained[2][0]), str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    said = f"{tmp_path}/model member=cluster-00001 steps=6 from {trained[2][0]}/step-00000006\n"
    assert result.stdout == said
    assert load_model(tmp_path / "model").config.vocab_size == logits(trained[2][1].folder).shape[-1]
