"""Plan of a run: everything that can go wrong cheaply goes wrong here, before the expensive work."""

import tempfile
from pathlib import Path

from cbtm import storage
from cbtm.branch.seed import check_vocabulary, model_files
from cbtm.branch.tokenizer import TextTokenizer, fetch_tokenizer
from cbtm.plan import Plan
from cbtm.run import CONFIG_FILE, Run, RunConfig
from cbtm.stages.tracked import open_parent


def plan(run: Run) -> Plan:
    """Check the inputs, list the corpus, write plan.json, and open the run in the tracker.

    Raises:
        ConfigError: If seed model and tokenizer are not there or do not belong together.
        DataError: If a split is empty.
        StorageError: If the root cannot be written, or the corpus cannot be read.
    """
    storage.check_writable(run.config.root)
    made = run.make_plan()
    storage.write_bytes(run.uri(CONFIG_FILE), run.config.model_dump_json(indent=1).encode())
    _check_seed(run.config)
    open_parent(run)
    return made


def _check_seed(config: RunConfig) -> None:
    seed = config.seed_model
    given = config.tokenizer.path or seed.path
    if given is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer: TextTokenizer = fetch_tokenizer(given, Path(scratch, "tokenizer"))
        if seed.path is None:
            return
        names = model_files([file.path for file in storage.list_files(seed.path)])
        folder = storage.local_path(seed.path) if not storage.is_s3(seed.path) else Path(scratch, "model")
        if storage.is_s3(seed.path):
            storage.download(seed.path, folder, [name for name in names if name.endswith("config.json")])
        check_vocabulary(folder, tokenizer, config.train.context_length)
