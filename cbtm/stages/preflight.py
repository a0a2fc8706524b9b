"""Plan of a run: everything that can go wrong cheaply goes wrong here, before the expensive work."""

import tempfile
from pathlib import Path

from cbtm import storage
from cbtm.branch.seed import check_scratch, check_vocabulary, model_files
from cbtm.branch.source import fetch_files, list_names
from cbtm.branch.tokenizer import TextTokenizer, fetch_tokenizer
from cbtm.cluster.backends import check_backend
from cbtm.cluster.clusterer import read_settings
from cbtm.cluster.devices import find_device
from cbtm.cluster.labels import label_files
from cbtm.errors import ConfigError
from cbtm.merge.tasks import read_task
from cbtm.plan import Plan
from cbtm.run import Run
from cbtm.run_config import CONFIG_FILE
from cbtm.stages.extension import check_extension
from cbtm.stages.tracked import open_parent


def plan(run: Run) -> Plan:
    """Check the inputs, list the corpus, write plan.json, and open the run in the tracker.

    Raises:
        ConfigError: If seed model and tokenizer are not there or do not belong together, a given clusterer has
            another number of clusters, what k-means shall run on is not there, or a few-shot task has no files.
        DataError: If a split is empty, a corpus file has no labels or assignments where they are given, or a line of a
            few-shot task is no example.
        ManifestError: If a given clusterer is none, or the run that is extended has not finished.
        StorageError: If the root cannot be written, or the corpus cannot be read.
    """
    if run.base is not None:
        check_extension(run, run.base)
    storage.check_writable(run.config.root)
    made = run.make_plan()
    _check_shared(run)
    storage.write_bytes(run.uri(CONFIG_FILE), run.config.model_dump_json(indent=1).encode())
    if run.base is None:
        run.pin_sources()
        _check_seed(run)
    _check_cluster(run)
    for task in run.config.tasks:
        read_task(task)
    open_parent(run)
    return made


def _check_shared(run: Run) -> None:
    if run.shared is not None and run.plan_made.digest("validation") != run.shared.plan_made.digest("validation"):
        raise ConfigError(
            f"shared={run.config.shared} was planned when the validation split had other text; run it again first"
        )


def _check_cluster(run: Run) -> None:
    config = run.config.cluster
    if config.path is not None:
        n_clusters = read_settings(config.path)["n_clusters"]
        if n_clusters != config.n_clusters:
            raise ConfigError(
                f"cluster.n_clusters={config.n_clusters}, but the clusterer at {config.path} has {n_clusters}"
            )
    paths = run.paths("train")
    if (fixed := run.fixed_assignments) is not None:
        fixed.digest(paths)  # every corpus file has its assignments
    if config.labels is not None:
        for _ in label_files(config.labels, paths):
            pass
    check_backend(config.backend)
    find_device(config.device)


def _check_seed(run: Run) -> None:
    config, seed = run.config, run.config.seed_model
    if seed.scratch is not None:
        check_scratch(seed.scratch, config.train.context_length)
    given = config.tokenizer.path or seed.path
    if given is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer: TextTokenizer = fetch_tokenizer(run.given(given), Path(scratch, "tokenizer"))
        if seed.path is None:
            return
        source, folder = run.given(seed.path), Path(scratch, "model")
        names = model_files(list_names(source), source)
        fetch_files(source, folder, [name for name in names if name.endswith("config.json")])
        check_vocabulary(folder, tokenizer, config.train.context_length)
