"""What a run of any size needs: the formulas of docs/scaling.md, and the tables that they give.

Nothing is measured here. Rates come from measurements of this project or from what others published, and each says
which; all else follows by arithmetic. `python benchmarks/scaling_model.py` prints the tables of the page for C4 and 128
experts of 6.7 billion parameters.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "computed", "published", "assumed"]

TB, GB, MB = 1e12, 1e9, 1e6
_FILES_OF_A_SHARD = 3  # tokens, offsets, documents (cbtm.tokens)
_MODEL_FILES, _SCORE_FILES = 8, 3
_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Scale:
    """The size of a run.

    Attributes:
        documents: Documents of the training split.
        text_bytes: Bytes of their text.
        shards: Corpus files of the training split.
        groups: `assign.max_groups`.
        clusters: Clusters, and experts.
        parameters: Parameters of a model.
        vocabulary: Tokens of the vocabulary.
        training_tokens: Tokens that the experts see together, and the dense model.
        validation_tokens: Tokens that are scored.
        models: Models that are trained: experts, as many random-cluster experts, and the dense one.
    """

    documents: float = 365e6
    text_bytes: float = 1.4e12
    shards: int = 10_000
    groups: int = 256
    clusters: int = 128
    parameters: float = 6.7e9
    vocabulary: int = 50_272
    training_tokens: float = 168e9
    validation_tokens: float = 1e6
    with_baselines: bool = True

    @property
    def models(self) -> int:
        return 2 * self.clusters + 1 if self.with_baselines else self.clusters


@dataclass(frozen=True)
class Rates:
    """Rates that the arithmetic starts from; `RATES` says where each comes from.

    Attributes:
        bytes_per_token: Bytes of text for one token.
        fit_seconds: Processor seconds of words, projection and k-means for 100,000 documents and 128 clusters.
        assign_bytes_per_second: Text that one core assigns and tokenises in a second.
        read_bytes_per_second: Text that one core reads and parses in a second.
        route_tokens_per_second: Validation tokens whose distances one core finds in a second.
        mfu: Part of a GPU's peak that training reaches.
        peak_flops: Peak of a GPU.
        heads_of_a_manifest_per_second: Not used for cost, for time alone.
    """

    bytes_per_token: float
    fit_seconds: float
    assign_bytes_per_second: float
    read_bytes_per_second: float
    route_tokens_per_second: float
    mfu: float = 0.464
    peak_flops: float = 989e12


@dataclass(frozen=True)
class Line:
    """One line of a table: what, how much in which unit, and where the number comes from."""

    what: str
    value: float
    unit: str
    source: Source = "computed"


# --- storage ---


def token_bytes(scale: Scale, rates: Rates) -> float:
    """Bytes of one partition's token files: ids in the smallest type, and an offset and an identity a document."""
    width = 2 if scale.vocabulary <= 1 << 16 else 4
    identity = 60  # a line {"sp_id": "train/00000/text.jsonl.zst|123456", "bytes": 3836}
    return corpus_tokens(scale, rates) * width + scale.documents * (_INT64 + identity)


def corpus_tokens(scale: Scale, rates: Rates) -> float:
    """Tokens of the training split, with one separator a document."""
    return scale.text_bytes / rates.bytes_per_token + scale.documents


def checkpoint_bytes(scale: Scale) -> float:
    """Weights, and two moments of AdamW, in float32 each."""
    return 3 * _FLOAT32 * scale.parameters


def storage(scale: Scale, rates: Rates, *, checkpoints_kept: int = 2, experts_at_once: int = 128) -> list[Line]:
    """Bytes in the object store."""
    partitions = 2 if scale.with_baselines else 1
    models = scale.models + 1  # and the seed
    tokens = scale.validation_tokens
    return [
        Line("corpus, uncompressed", scale.text_bytes / TB, "TB", "assumed"),
        Line("assignment lines", scale.documents * 60 / GB, "GB"),
        Line(f"token shards, {partitions} partitions", partitions * token_bytes(scale, rates) / TB, "TB"),
        Line(f"{models} models, float32", models * _FLOAT32 * scale.parameters / TB, "TB"),
        Line("one checkpoint: weights and moments", checkpoint_bytes(scale) / GB, "GB"),
        Line(
            f"checkpoints of {experts_at_once} trainings at once, {checkpoints_kept} kept",
            experts_at_once * checkpoints_kept * checkpoint_bytes(scale) / TB,
            "TB",
        ),
        Line("scores, all models", models * tokens * _FLOAT32 / GB, "GB"),
        Line("distances, on the disk of a pod", tokens * scale.clusters * _FLOAT32 / GB, "GB"),
    ]


# --- requests ---


def group_files(scale: Scale) -> float:
    """Files that the assigner publishes for one group of the training split."""
    partitions = 2 if scale.with_baselines else 1
    return scale.shards / scale.groups + partitions * scale.clusters * _FILES_OF_A_SHARD


def objects(scale: Scale) -> float:
    """Objects of a finished run, besides the corpus."""
    assigned = scale.groups * (group_files(scale) + 1)
    return assigned + (scale.models + 1) * (_MODEL_FILES + _SCORE_FILES + 2)


def descriptors_of_all_shards(scale: Scale) -> int:
    """File descriptors of a model that is trained on all clusters, if every token shard were mapped at once."""
    return 2 * scale.clusters * scale.groups


def requests(scale: Scale) -> list[Line]:
    """Requests to the object store; multipart uploads count as one."""
    expert = 4 + scale.groups * (1 + _FILES_OF_A_SHARD)  # plan and specs, manifests, token shards
    dense = 4 + scale.groups * (1 + scale.clusters * _FILES_OF_A_SHARD)
    experts = scale.models - (1 if scale.with_baselines else 0)
    gets = experts * expert + ((scale.models - experts) * dense)
    return [
        Line("objects of a finished run", objects(scale), ""),
        Line("put of the assign loop", scale.groups * (group_files(scale) + 1), ""),
        Line("get of an expert's training before its first step", expert, ""),
        Line("get of the dense model's", dense, ""),
        Line("get of all trainings", gets, ""),
        Line("head of an assign task that is run again", group_files(scale), ""),
    ]


# --- time ---


def training_flops(scale: Scale, layers: int = 32, width: int = 4096, context: int = 2048) -> float:
    """FLOPs of training one token, as cbtm.train.cost counts them; OPT-6.7B's shape."""
    return 6 * scale.parameters + 12.0 * layers * width * context


def gpu_hours(scale: Scale, rates: Rates) -> list[Line]:
    """Hours of one GPU."""
    per_second = rates.mfu * rates.peak_flops
    arms = 3 if scale.with_baselines else 1
    arm = scale.training_tokens * training_flops(scale) / per_second / 3600
    scoring = (scale.models + 1) * scale.validation_tokens * 2 * scale.parameters / per_second / 3600
    return [
        Line("tokens a second of one GPU", per_second / training_flops(scale), "1/s", "published"),
        Line("all experts", arm, "h"),
        Line("of it one expert", arm / scale.clusters, "h"),
        Line(f"{arms} arms (experts, random clusters, dense)", arms * arm, "h"),
        Line("scoring, all models", scoring, "h"),
    ]


def cpu_hours(scale: Scale, rates: Rates) -> list[Line]:
    """Hours of one core."""
    reading = scale.text_bytes / rates.read_bytes_per_second / 3600
    assign = scale.text_bytes / rates.assign_bytes_per_second / 3600
    return [
        Line("fit: words, projection, k-means of the sample", rates.fit_seconds / 3600, "h", "measured"),
        Line("fit: one pass over the corpus to draw the sample", reading, "h"),
        Line("assign, tokenising included", assign, "h"),
        Line("of it one group", assign / scale.groups, "h"),
        Line("route the validation text", scale.validation_tokens / rates.route_tokens_per_second / 3600, "h"),
    ]


def memory(scale: Scale) -> list[Line]:
    """Bytes of the largest processes."""
    return [
        Line("training: weights, gradients and moments, float32", 4 * _FLOAT32 * scale.parameters / GB, "GB"),
        Line("scoring: weights, float32", _FLOAT32 * scale.parameters / GB, "GB"),
        Line("fit: costs of a batch of 200,000 documents", 200_000 * scale.clusters * _FLOAT32 / GB, "GB"),
    ]


def kubeflow(scale: Scale, validation_groups: int = 8) -> list[Line]:
    """What Kubeflow carries."""
    groups = scale.groups + validation_groups
    members = scale.models
    tasks = 10 + groups + 2 * members
    return [
        Line("iterations of the assign loop", groups, ""),
        Line("iterations of the train loop", members, ""),
        Line("pods of tasks", tasks, ""),
        Line("pods of drivers", tasks + groups + members + 4, ""),
        Line("bytes of the list of groups", sum(len(f'"train-{0:05d}", ') for _ in range(groups)), "B"),
    ]


def table(title: str, lines: Sequence[Line]) -> str:
    """A Markdown table."""
    rows = [f"| {title} | | |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {one.what} | {shown(one.value)} {one.unit} | {one.source} |" for one in lines)])


def shown(value: float) -> str:
    """Three digits that count, and all of a larger whole number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=128)
    args = parser.parse_args()
    scale = Scale(groups=args.groups, clusters=args.clusters)
    for title, lines in (
        ("Storage", storage(scale, RATES)),
        ("Requests", requests(scale)),
        ("GPU", gpu_hours(scale, RATES)),
        ("CPU", cpu_hours(scale, RATES)),
        ("Memory", memory(scale)),
        ("Kubeflow", kubeflow(scale)),
    ):
        print(table(title, lines), end="\n\n")


# From docs/scaling.md's tables (measured) and the MFU that llm-foundry published for MPT 7B on eight H100, 46.4 %.
RATES = Rates(
    bytes_per_token=4.3,
    fit_seconds=60.0,
    assign_bytes_per_second=1e6,
    read_bytes_per_second=100e6,
    route_tokens_per_second=5e5,
)

if __name__ == "__main__":
    main()
