"""Which benchmarks `make bench` runs, with which settings, and what each is to show.

No benchmark by itself. Sizes are chosen so that all of them take well under half an hour on two quiet cores; the
deadlines are wider, and what is left of the half hour bounds them too. Larger settings are those that the scripts have
by default, or are named in docs/benchmarks.md beside what they gave.
"""

from dataclasses import dataclass
from pathlib import Path

BUDGET_S = 30 * 60.0
CORPUS_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Entry:
    """One run of one script.

    Attributes:
        name: What the table and `--only` call it.
        script: File in benchmarks/.
        claim: What it is to show, in words.
        said_in: Pages that say so, below the project.
        arguments: Those of the quick setting; `{corpus}` is the root of the text.
        deadline_s: Wall time after which it is stopped; about twice what it takes on a quiet machine.
        packages: Without these it cannot run at all.
        peers: Packages it is compared with, by their names in the index; one that is missing is one row less.
        environment: Variables without which there is nothing to measure.
        as_printed: It writes no rows; the page shows the tables that it prints.
    """

    name: str
    script: str
    claim: str
    said_in: tuple[str, ...]
    arguments: tuple[str, ...]
    deadline_s: float
    packages: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    as_printed: bool = False


@dataclass(frozen=True)
class Text:
    """Corpus that the benchmarks read.

    Attributes:
        root: Its root, laid out as the pipeline reads it; labels lie below `labels`, where it has some.
        prose: Labels that are prose, and code, for the router.
    """

    root: Path
    prose: str = "aws_documentation"
    code: str = "python_source"

    def arguments(self, entry: Entry) -> list[str]:
        """Those of the entry, of this text; labels are left out where there are none."""
        words = {"{corpus}": str(self.root), "{labels}": str(self.root / "labels")}
        words |= {"{prose}": self.prose, "{code}": self.code}
        given = [words.get(argument, argument) for argument in entry.arguments]
        if not (self.root / "labels").is_dir():
            for option in ("--labels", "--prose", "--code"):
                if option in given:
                    del given[given.index(option) : given.index(option) + 2]
        return given


_TEXT = ("--corpus", "{corpus}")
_LABELLED = (*_TEXT, "--labels", "{labels}")
_BENCHMARKS, _DESIGN, _README = "docs/benchmarks.md", "docs/design.md", "README.md"
_SCALING = "docs/scaling.md"

ENTRIES = (
    Entry(
        "assignment",
        "assignment.py",
        "One balanced assignment step is exact, and takes less time and memory than min-cost flow.",
        (_BENCHMARKS, _DESIGN, _README),
        (*_TEXT, "--sizes", "2000x8,50000x8,50000x128", "--repeats", "3", "--limit", "60"),
        200,
        peers=("ortools", "k-means-constrained", "scipy"),
    ),
    Entry(
        "kmeans",
        "kmeans.py",
        "Balanced k-means is exactly balanced, and takes less time than k-means-constrained at the same inertia.",
        (_BENCHMARKS, _README),
        # balanced-kmeans takes only a number of documents that is a multiple of k.
        (*_LABELLED, "--documents", "16000", "--repeats", "2", "--limit", "60"),
        240,
        peers=("k-means-constrained", "balanced-kmeans", "scikit-learn"),
    ),
    Entry(
        "batches",
        "batches.py",
        "k-means over batches that are read in turn holds one of them, and loses little.",
        ("docs/usage.md", _DESIGN),
        ("--points", "60000", "--repeats", "2"),
        120,
    ),
    Entry(
        "embedder",
        "embedder.py",
        "Fitting words and projection takes less time and memory than scikit-learn, and keeps as much energy.",
        (_BENCHMARKS, _DESIGN),
        (*_LABELLED, "--repeats", "3"),
        120,
        peers=("scikit-learn",),
    ),
    Entry(
        "assigner",
        "assigner.py",
        "Documents are assigned faster than scikit-learn does it, to the same clusters.",
        (_BENCHMARKS,),
        (*_TEXT, "--fit-documents", "8000", "--repeats", "3"),
        150,
        peers=("scikit-learn", "tokenizers", "pyarrow"),
    ),
    Entry(
        "assigner-memory",
        "assigner.py",
        "The memory of an assigner depends on neither the size of a shard nor the number of shards.",
        (_BENCHMARKS, _DESIGN),
        ("--memory", *_TEXT, "--fit-documents", "8000"),
        90,
    ),
    Entry(
        "router",
        "router.py",
        "Every prefix of a document is routed in one pass, to the distances that vectorising each prefix gives.",
        (_BENCHMARKS, _DESIGN),
        (*_LABELLED, "--prose", "{prose}", "--code", "{code}", "--lengths", "256,2048", "--repeats", "3"),
        90,
        peers=("scikit-learn",),
    ),
    Entry(
        "packing",
        "packing.py",
        "Packing whole documents leaves about a thousandth of the blocks as padding, and takes part of a second.",
        ("docs/decisions/0018-documents-are-packed-once.md",),
        ("--repeats", "3"),
        120,
    ),
    Entry(
        "training",
        "training.py",
        "The training loop takes the same steps as transformers' Trainer, in less memory.",
        (_BENCHMARKS,),
        ("--repeats", "3", "--steps", "10", "--limit", "60"),
        300,
        packages=("torch", "transformers", "accelerate"),
        peers=("transformers", "accelerate"),
    ),
    Entry(
        "training-overheads",
        "training.py",
        "Checkpoints, tracking and waiting for data take a small part of a training.",
        (_BENCHMARKS,),
        (
            "--overheads",
            *_TEXT,
            "--documents",
            "4000",
            "--vocabularies",
            "8192",
            "--sequences",
            "1",
            "--steps",
            "200",
            "--repeats",
            "1",
        ),
        240,
        packages=("torch", "transformers", "mlflow"),
    ),
    Entry(
        "scorer",
        "scorer.py",
        "Scoring takes less time and memory than a loop over all logits; the nearest experts take less than all.",
        (_BENCHMARKS, _README),
        # As many documents as the largest batch of the loops.
        ("--documents", "32", "--routed-documents", "4", "--repeats", "2", "--limit", "60"),
        300,
        packages=("torch", "transformers"),
        peers=("transformers",),
    ),
    Entry(
        "evaluator",
        "evaluator.py",
        "All settings of an ensemble are evaluated in one pass over scores, for which each expert reads the text once.",
        (_BENCHMARKS, _DESIGN, _README),
        ("--tokens", "200000", "--experts", "128", "--repeats", "2"),
        200,
        packages=("torch", "transformers"),
        peers=("torch",),
    ),
    Entry(
        "generation",
        "generation.py",
        "A mixture that runs the nearest experts alone writes faster than one that runs all, with equal probabilities.",
        (_BENCHMARKS, "docs/decisions/0022-a-cache-for-each-expert-that-catches-up.md"),
        (*_TEXT, "--prompt", "64", "--new", "32", "--written", "2", "--vocabulary", "4096", "--repeats", "2"),
        240,
        packages=("torch", "transformers"),
        peers=("transformers",),
    ),
    Entry(
        "storage",
        "storage.py",
        "Files go to and from an object store at least as fast as with the aws command and with boto3's defaults.",
        (_BENCHMARKS,),
        ("--bucket", "bench", "--workloads", "4x64000000,500x100000", "--repeats", "2", "--limit", "60"),
        240,
        packages=("boto3",),
        peers=("boto3", "awscli"),
        environment=("AWS_ENDPOINT_URL",),
        as_printed=True,
    ),
    Entry(
        "simulation",
        "simulation.py",
        "A task of a run of 10,000 shards and 128 clusters asks the store for little more than its own inputs.",
        (_SCALING,),
        ("--groups", "16", "--latency", "0"),
        200,
        as_printed=True,
    ),
    Entry(
        "scaling",
        "scaling.py",
        "Stages grow at most in proportion to the documents; training and scoring of a model depend on nothing else.",
        (_SCALING,),
        (*_TEXT, "--documents", "1000,4000", "--clusters", "2,8", "--at-documents", "1000"),
        200,
        packages=("torch", "tokenizers"),
        as_printed=True,
    ),
    Entry(
        "scaling-model",
        "scaling_model.py",
        "What the measured rates come to for C4 and 128 experts.",
        (_SCALING,),
        (),
        30,
        as_printed=True,
    ),
)
