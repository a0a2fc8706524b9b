import hashlib
import io
import itertools
import json
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
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm import storage
from cbtm.branch.seed import ScratchModelConfig, create_model, load_model, save_model
from cbtm.errors import Interrupted, StorageError
from cbtm.merge.score_blocks import Block, Fed, ScoreBlocks, block_bounds, score_blocks
from cbtm.merge.scorer import ScoreConfig, score_documents

BLOCK = Block(3, 5, np.array([-1.5, np.nan, -np.inf], dtype=np.float32), Fed(2, 7))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def find(blocks, number=1, first=3, end=5, size=3):
    return blocks.load(number, first=first, end=end, size=size)


def assert_same(one, other):
    assert (one.first, one.end, one.fed) == (other.first, other.end, other.fed)
    assert one.log_probs.dtype == np.float32
    np.testing.assert_array_equal(one.log_probs, other.log_probs)


# --- blocks in storage ---


def test_a_block_comes_back_as_it_was(root):
    blocks = ScoreBlocks(root, key="k")
    assert find(blocks) is None
    blocks.save(1, BLOCK)
    assert_same(find(ScoreBlocks(root, key="k")), BLOCK)
    assert find(blocks, number=0) is None
    other = Block(3, 5, np.zeros(3, dtype=np.float32), Fed(1, 1))
    blocks.save(1, other)
    assert_same(find(blocks), other)


def test_a_block_of_other_scores_is_passed_over(root):
    blocks = ScoreBlocks(root, key="k")
    blocks.save(1, BLOCK)
    assert find(ScoreBlocks(root, key="l")) is None
    # Another block_tokens: other documents.
    assert find(blocks, first=2) is None
    assert find(blocks, end=6) is None
    assert find(blocks, size=4) is None
    assert find(blocks) is not None


def test_clearing_removes_all_blocks_whatever_their_key(root):
    blocks = ScoreBlocks(root, key="k")
    blocks.clear()  # there is nothing yet
    blocks.save(0, BLOCK)
    ScoreBlocks(root, key="l").save(1, BLOCK)
    blocks.clear()
    assert storage.list_files(root) == []
    assert find(blocks) is None
    if not storage.is_s3(root):
        assert not Path(root).exists()


@pytest.mark.parametrize("kind", ["cut", "flipped", "no JSON", "a list", "empty"])
def test_damaged_bytes_are_passed_over(tmp_path, kind):
    blocks = ScoreBlocks(str(tmp_path), key="k")
    blocks.save(1, BLOCK)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    damaged = {
        "cut": data[:-1],
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "no JSON": b"\x93NUMPY\n" + data,
        "a list": b"[]\n" + data.partition(b"\n")[2],
        "empty": b"",
    }[kind]
    path.write_bytes(damaged)
    assert find(blocks) is None


def test_nothing_is_unpickled(tmp_path, caplog):
    blocks = ScoreBlocks(str(tmp_path), key="k")
    blocks.save(1, Block(3, 5, np.zeros(3, dtype=np.float32), Fed()))
    (path,) = tmp_path.iterdir()
    file = io.BytesIO()
    np.save(file, np.array([{}, {}, {}], dtype=object))
    facts = json.loads(path.read_bytes().partition(b"\n")[0])
    facts["sha256"] = hashlib.sha256(file.getvalue()).hexdigest()
    path.write_bytes(json.dumps(facts).encode() + b"\n" + file.getvalue())
    assert find(blocks) is None
    assert "passed over: Object arrays cannot be loaded" in caplog.text


# --- the cut into blocks ---


def test_bounds_by_hand():
    # Scores begin at 0, 4, 9, 9, 10, 31: blocks 0, 0, 0, 0, 1 and 3 of ten tokens.
    assert block_bounds(np.array([0, 4, 9, 9, 10, 31, 35]), 10) == [(0, 4), (4, 5), (5, 6)]
    assert block_bounds(np.array([0, 4]), 10) == [(0, 1)]
    assert block_bounds(np.array([0, 0, 0]), 1) == [(0, 2)]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40), block_tokens=st.integers(1, 50))
def test_blocks_hold_every_document_once_and_about_so_many_tokens(lengths, block_tokens):
    offsets = np.cumsum([0, *lengths])
    bounds = block_bounds(offsets, block_tokens)
    assert [document for first, end in bounds for document in range(first, end)] == list(range(len(lengths)))
    for first, end in bounds:
        # All but the last document end within the block's tokens.
        assert first < end
        assert offsets[end - 1] - offsets[first] < block_tokens


# --- going on ---

LENGTHS = (40, 9, 17, 5, 2, 33, 12, 1, 16, 25, 17, 3, 28, 9)
SETTINGS = {"block_tokens": 40, "max_batch_tokens": 32, "stride": 7, "threads": 1}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder of a tiny OPT, and of rows with the marks of those of their tokens that are needed."""
    folder = tmp_path_factory.mktemp("job")
    shape = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
    save_model(create_model(shape, vocab_size=300, separator_id=0, context_length=16), folder / "model")
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        np.save(folder / f"row-{number:02d}.npy", rng.integers(1, 300, size=length))
        np.save(folder / f"marks-{number:02d}.npy", rng.random(length - 1) < 0.5)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


def run(job, out, blocks=None, progress=None, model=None, **changes):
    """Score the rows of a job; returns the facts, and the files that are written."""
    out.mkdir(parents=True)
    facts = score_documents(
        model or load_model(job / "model"),
        [np.load(path) for path in sorted(job.glob("row-*.npy"))],
        ScoreConfig(**(SETTINGS | changes)),
        context_length=16,
        facts={"member": "dense"},
        folder=out,
        prefix_token=299,
        needed=[np.load(path) for path in sorted(job.glob("marks-*.npy"))],
        blocks=blocks,
        progress=progress,
    )
    return facts, {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    """Facts and files of a scoring that nothing stopped, and its progress."""
    seen = []
    facts, files = run(
        job, tmp_path_factory.mktemp("whole") / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert facts["forward_passes"] == len(seen) > 8
    assert 0 < facts["tokens_scored"] < facts["tokens"]
    return facts, files, seen


def ends_at(call, number):
    """A progress that sends a signal to this process at its n-th call."""
    calls = itertools.count(1)

    def progress(done, total):
        if next(calls) == call:
            os.kill(os.getpid(), number)

    return progress


def test_saved_blocks_change_no_bit(job, uninterrupted, tmp_path):
    blocks = ScoreBlocks(str(tmp_path / "blocks"), key="k")
    assert run(job, tmp_path / "out", blocks) == uninterrupted[:2]
    n_blocks = len(list((tmp_path / "blocks").iterdir()))
    assert n_blocks == 5
    # All are there now: nothing is scored again, and the facts are still of all of it.
    model, seen = load_model(job / "model"), []
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    assert run(job, tmp_path / "again", blocks, model=model) == uninterrupted[:2]
    assert len(seen) == 2  # how CausalLoss finds out about the head


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_behind_any_pass_it_goes_on_to_the_same_bits(job, uninterrupted, tmp_path, number):
    facts, files, seen = uninterrupted
    handler = signal.getsignal(number)
    for call in range(1, len(seen) + 1, 1 if number == signal.SIGTERM else 4):
        folder = tmp_path / str(call)
        blocks = ScoreBlocks(str(folder / "blocks"), key="k")
        with pytest.raises(Interrupted) as stopped:
            run(job, folder / "stopped", blocks, ends_at(call, number))
        n_saved = len(list((folder / "blocks").glob("*")))
        done, total = seen[call - 1]
        assert str(stopped.value) == (
            f"stopped after {done} of {total} tokens; {n_saved} of 5 blocks are saved at {blocks.uri}"
        )
        assert n_saved == 5 or call < len(seen)
        assert list((folder / "stopped").iterdir()) == []
        resumed = []
        assert run(job, folder / "out", blocks, lambda done, total, to=resumed: to.append(done)) == (facts, files)
        assert len(resumed) <= len(seen) - call + n_saved + 4  # at most the passes of one block are taken again
        assert resumed[-1] == total
    assert signal.getsignal(number) is handler


def test_stopped_without_blocks_it_says_so(job, tmp_path):
    with pytest.raises(Interrupted, match=r"^stopped after [0-9]+ of [0-9]+ tokens; none is saved$"):
        run(job, tmp_path / "out", None, ends_at(2, signal.SIGTERM))


def test_blocks_of_another_size_are_not_mixed(job, uninterrupted, tmp_path):
    blocks = ScoreBlocks(str(tmp_path / "blocks"), key="k")
    with pytest.raises(Interrupted):
        run(job, tmp_path / "stopped", blocks, ends_at(6, signal.SIGTERM), block_tokens=25)
    assert (tmp_path / "blocks/block-000000").exists()
    assert run(job, tmp_path / "out", blocks) == uninterrupted[:2]


SCORER = """
import itertools, json, os, sys
from pathlib import Path

import numpy as np

from cbtm.branch.seed import load_model
from cbtm.merge.score_blocks import ScoreBlocks
from cbtm.merge.scorer import ScoreConfig, score_documents
from cbtm.process import stage_process

folder, out, blocks, halt_at, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
calls = itertools.count(1)


def progress(done, total):
    if next(calls) == halt_at:
        print(done, flush=True)
        os.kill(os.getpid(), number)


with stage_process():
    score_documents(
        load_model(folder / "model"),
        [np.load(path) for path in sorted(folder.glob("row-*.npy"))],
        ScoreConfig(**json.loads((folder / "settings.json").read_text())),
        context_length=16,
        facts={"member": "dense"},
        folder=out,
        prefix_token=299,
        needed=[np.load(path) for path in sorted(folder.glob("marks-*.npy"))],
        blocks=ScoreBlocks(blocks, key="k"),
        progress=progress,
    )
"""


def test_a_process_that_is_ended_leaves_blocks_to_go_on_from(job, uninterrupted, tmp_path):
    facts, files, seen = uninterrupted
    script = tmp_path / "scorer.py"
    script.write_text(SCORER)
    half = len(seen) // 2
    numbers = (signal.SIGTERM, signal.SIGKILL)
    processes = []
    for number in numbers:  # side by side: most of their time is imports
        (tmp_path / f"out-{number}").mkdir()
        arguments = [job, tmp_path / f"out-{number}", tmp_path / f"blocks-{number}", half, int(number)]
        command = [sys.executable, script, *map(str, arguments)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for number, process in zip(numbers, processes, strict=True):
        done, said = process.communicate(timeout=60)
        assert int(done) == seen[half - 1][0]
        assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), said
        assert list((tmp_path / f"out-{number}").iterdir()) == []
        saved = sorted(path.name for path in (tmp_path / f"blocks-{number}").iterdir())
        assert saved == [f"block-{place:06d}" for place in range(len(saved))]
        assert 0 < len(saved) < 5
        if number == signal.SIGTERM:
            assert f"{len(saved)} of 5 blocks are saved" in said
        model, fed = load_model(job / "model"), []
        model.get_input_embeddings().register_forward_hook(lambda _, given, out, to=fed: to.append(given[0].shape))
        blocks = ScoreBlocks(str(tmp_path / f"blocks-{number}"), key="k")
        assert run(job, tmp_path / f"again-{number}", blocks, model=model) == (facts, files)
        assert len(fed) - 2 < facts["forward_passes"]  # fewer than the facts count, which are of both processes


def test_a_request_to_stop_does_not_wait_for_a_store_that_is_away(s3_settings):
    s3_settings.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # which refuses
    storage.be_patient(60)
    blocks = ScoreBlocks("s3://bucket/blocks", key="k")

    def stops_at_once(first, end, stop, count):
        assert stop.is_set()

    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="0 of 1 blocks are saved"):
        score_blocks(stops_at_once, np.array([0, 5]), [(0, 1)], blocks, None)
    assert time.monotonic() - begin < 20
    timer.join()


def test_a_store_that_fails_is_an_error(job, tmp_path):
    with pytest.raises(StorageError, match="use a local path or s3://"):
        run(job, tmp_path / "a", ScoreBlocks("gs://bucket/blocks", key="k"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        run(job, tmp_path / "b", ScoreBlocks(str(tmp_path / "file/blocks"), key="k"))
