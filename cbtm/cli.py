"""The command line: every stage by itself, the whole run, and corpora to run it on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbtm import __version__, storage
from cbtm.errors import CbtmError, ConfigError
from cbtm.process import log_to_stderr, s3_patience

if TYPE_CHECKING:
    from cbtm.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
corpus_app = typer.Typer(no_args_is_help=True, help="Text to run on: a sample, your own, or a public one.")
tracking_app = typer.Typer(no_args_is_help=True, help="The journal behind the tracking server.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(tracking_app, name="tracking")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated.")
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Write anew where another corpus lies.")]


def main() -> None:
    """Run the command line; an error that the user can mend is one line and an exit code."""
    log_to_stderr()
    try:
        app()
    except CbtmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Cluster-Branch-Train-Merge: one expert language model for each domain of a corpus."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(config: ConfigArgument, override: SetOption = None) -> None:
    """Run the whole compiled pipeline on this machine; go on where an earlier run stopped."""
    from cbtm import local
    from cbtm.merge.report import format_table, headline_rows
    from cbtm.run import REPORT_FILE, Run
    from cbtm.run_config import load_config

    this = Run(load_config(config, override))
    local.run_pipeline(this)
    typer.echo(format_table(headline_rows(this.result())))
    typer.echo(f"report: {this.uri(REPORT_FILE)}")


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="Folder that receives the run.")] = Path("runs/demo"),
    corpus: Annotated[Path | None, typer.Option(help="Folder of own text; default a sample of real text.")] = None,
    override: SetOption = None,
) -> None:
    """Run everything on real text on this machine: domains, seed model, experts, baselines, report."""
    from cbtm import local
    from cbtm.corpora.folder import demo_corpus
    from cbtm.merge.report import format_table, headline_rows
    from cbtm.run import REPORT_FILE, Run
    from cbtm.run_config import demo_config

    found = demo_corpus(corpus, root.parent / "corpora", progress=_say)
    this = Run(demo_config(str(root), str(found.root), found.train_split, found.validation_split, override or []))
    local.run_pipeline(this)
    typer.echo(format_table(headline_rows(this.result())))
    typer.echo(f"report: {this.uri(REPORT_FILE)}")


@app.command()
def ui(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the run; default the demo.")
    ] = None,
    override: SetOption = None,
    root: Annotated[Path, typer.Option(help="Folder of the demo run.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="Port of the server.")] = 5000,
) -> None:
    """Serve the tracking database and open the comparison of a run's models."""
    from cbtm.run import Run
    from cbtm.run_config import load_config, recorded_config
    from cbtm.tracking.ui import serve

    this = Run(load_config(config, override) if config else recorded_config(str(root)))
    serve(this.config.tracking, this.key, port=port, say=typer.echo)


@app.command()
def plan(config: ConfigArgument, override: SetOption = None) -> None:
    """Check the configuration and its inputs, and list the shard groups."""
    from cbtm import stages

    this = _run(config, override)
    for group in stages.plan(this).groups:
        typer.echo(f"{group.name} files={len(group.files)} bytes={sum(file.size for file in group.files)}")


@app.command()
def tokenizer(config: ConfigArgument, override: SetOption = None) -> None:
    """Take over or train the tokenizer."""
    from cbtm import stages

    this = _run(config, override)
    stages.plan(this)
    stages.tokenizer(this)


@app.command()
def cluster(config: ConfigArgument, override: SetOption = None) -> None:
    """Find the domains of the corpus."""
    from cbtm import stages

    this = _run(config, override)
    stages.plan(this)
    if this.config.cluster.needs_tokens:
        stages.tokenizer(this)
    stages.cluster(this)


@app.command(name="suggest-k")
def suggest_k(
    config: ConfigArgument,
    override: SetOption = None,
    k: Annotated[str, typer.Option(help="Numbers of clusters to try.")] = "2,4,8,16,32",
    repeats: Annotated[int, typer.Option(help="Fits of each, on other samples.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
) -> None:
    """Fit several numbers of clusters; show inertia, balance and stability side by side."""
    import json

    from cbtm.cluster.selection import candidates_json, format_candidates, suggest
    from cbtm.run_config import load_config
    from cbtm.stages.explore import suggest_k

    candidates = suggest_k(load_config(config, override), _numbers(k), repeats=repeats)
    suggested = suggest(candidates)
    typer.echo(format_candidates(candidates, suggested))
    if output is not None:
        storage.write_bytes(str(output), json.dumps(candidates_json(candidates, suggested), indent=1).encode())


@app.command()
def drift(
    clusterer: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the clusterer.")],
    corpus: Annotated[str, typer.Argument(help="Root of the corpus with the new documents.")],
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    output: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
) -> None:
    """Say how far new documents lie from the domains, compared with the documents of the fit."""
    import json
    import tempfile

    from cbtm.cluster.drift import format_drift
    from cbtm.stages.explore import drift

    with tempfile.TemporaryDirectory() as scratch:
        report = drift(clusterer, corpus, split, Path(scratch))
    typer.echo(format_drift(report))
    if output is not None:
        storage.write_bytes(str(output), json.dumps(report.to_json(), indent=1).encode())


@app.command(name="import-clusterer")
def import_clusterer(
    tfidf: Annotated[Path, typer.Argument(help="tfidf.pkl of the reference code.")],
    kmeans: Annotated[Path, typer.Argument(help="kmeans.pkl of the reference code.")],
    folder: Annotated[Path, typer.Argument(help="Clusterer folder to write; for cluster.path.")],
) -> None:
    """Turn a published clusterer into JSON and safetensors; nothing in its pickles is ever run."""
    from cbtm.cluster.published import import_clusterer

    facts = import_clusterer(tfidf, kmeans, folder)
    typer.echo(f"{folder} clusters={facts['n_clusters']} dimensions={facts['n_components']} words={facts['words']}")


@app.command(name="import-metaseq")
def import_metaseq(
    source: Annotated[Path, typer.Argument(help="A consolidated .pt file, or a folder of shards.")],
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder to write; for seed_model.path.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer to put beside the weights.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the checkpoint does not say.")] = None,
) -> None:
    """Turn a metaseq OPT checkpoint, whole or in shards, into a Hugging Face folder."""
    from cbtm.branch.metaseq import import_metaseq

    facts = import_metaseq(source, folder, tokenizer=tokenizer, heads=heads)
    typer.echo(f"{folder} size={facts['size']} parameters={facts['n_parameters']} dtype={facts['dtype']}")


@app.command()
def assign(
    config: ConfigArgument,
    override: SetOption = None,
    group: Annotated[list[str] | None, typer.Option(help="Shard group, as cbtm plan lists them; default all.")] = None,
) -> None:
    """Assign documents to clusters and tokenise them."""
    from cbtm import stages

    this = _planned_run(config, override)
    for name in group or [planned.name for planned in this.plan_made.groups]:
        stages.assign(this, name)


@app.command()
def train(
    config: ConfigArgument,
    override: SetOption = None,
    member: Annotated[
        list[str] | None,
        typer.Option(help="seed, dense, cluster-00000 … or random-00000 …; default all of them."),
    ] = None,
) -> None:
    """Train the seed model, experts and baselines."""
    from cbtm import stages
    from cbtm.train.member import Member

    asked = [Member.parse(name) for name in member or []]
    this = _planned_run(config, override)
    for each in asked or [Member("seed"), *this.config.members]:
        stages.train(this, each)


@app.command()
def consolidate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or the folder of a training's; local or s3://.")],
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
) -> None:
    """Make a model of a checkpoint, from whatever number of devices has written it."""
    from cbtm.train.consolidate import consolidate

    facts = consolidate(checkpoint, folder)
    typer.echo(f"{folder} member={facts['member']} steps={facts['steps']} from {facts['checkpoint']}")


@app.command()
def score(
    config: ConfigArgument,
    override: SetOption = None,
    member: Annotated[list[str] | None, typer.Option(help="Member to score; default all of them.")] = None,
) -> None:
    """Score every validation token under each model."""
    from cbtm import stages
    from cbtm.train.member import Member

    asked = [Member.parse(name) for name in member or []]
    this = _planned_run(config, override)
    for each in asked or [Member("seed"), *this.config.members]:
        stages.score(this, each)


@app.command()
def evaluate(config: ConfigArgument, override: SetOption = None) -> None:
    """Compare every ensemble; write result.json and report.html."""
    from cbtm import stages
    from cbtm.merge.report import format_table, headline_rows

    this = _planned_run(config, override)
    stages.evaluate(this)
    typer.echo(format_table(headline_rows(this.result())))


@app.command(name="config")
def show_config(config: ConfigArgument, override: SetOption = None) -> None:
    """Print the checked configuration with every default."""
    import yaml

    from cbtm.run_config import load_config

    typer.echo(yaml.safe_dump(load_config(config, override).model_dump(mode="json"), sort_keys=False))


@corpus_app.command("sample")
def corpus_sample(
    root: Annotated[Path, typer.Argument(help="Folder to write.")], replace: ReplaceOption = False
) -> None:
    """Gather real text of several kinds from the installed packages, without any download."""
    from cbtm.corpora.sample import gather_sample

    summary = gather_sample(root, replace=replace, progress=_say)
    typer.echo(f"{summary.root} train={summary.n_train} valid={summary.n_valid} bytes={summary.n_bytes}")


@corpus_app.command("import")
def corpus_import(
    source: Annotated[Path, typer.Argument(help="Folder of text files, or of JSON lines.")],
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
    replace: ReplaceOption = False,
) -> None:
    """Turn a folder of text into a corpus with a held-out validation split."""
    from cbtm.corpora.folder import import_folder

    summary = import_folder(source, root, replace=replace, progress=_say)
    typer.echo(f"{summary.root} train={summary.n_train} valid={summary.n_valid} bytes={summary.n_bytes}")


@corpus_app.command("download")
def corpus_download(
    name: Annotated[str, typer.Argument(help="c4-example: the public C4 sample of the reference code.")],
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_url: Annotated[str | None, typer.Option(help="Mirror to download from.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the archive must have.")] = None,
) -> None:
    """Download a public corpus; an interrupted download goes on where it stopped."""
    from cbtm.corpora.download import BASE_URL, download_c4_example

    if name != "c4-example":
        raise ConfigError(f"unknown corpus {name!r}; known is c4-example")
    made = download_c4_example(root, base_url=base_url or BASE_URL, expected_sha256=sha256, progress=_say)
    typer.echo(f"{made.root} sha256={made.sha256} bytes={made.n_bytes} validation_split={made.validation_split}")


@tracking_app.command("replay")
def tracking_replay(config: ConfigArgument, override: SetOption = None) -> None:
    """Send what an outage of the tracking server kept back."""
    from cbtm.stages.tracked import replay_all

    this = _run(config, override)
    report = replay_all(this)
    typer.echo(f"journals={report.journals} sent={report.records_sent} left={report.records_left}")
    for problem in report.problems:
        typer.echo(problem, err=True)
    raise typer.Exit(0 if report.records_left == 0 else 1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--k {text} is no list of numbers; write it as 2,4,8") from None


def _planned_run(config: Path, override: list[str] | None) -> "Run":
    """A run whose plan can be read; from then on a store that is away is waited for, as in a pod."""
    this = _run(config, override)
    _ = this.plan_made
    storage.be_patient(s3_patience())
    return this


def _run(config: Path, override: list[str] | None) -> "Run":
    from cbtm.run import Run
    from cbtm.run_config import load_config

    return Run(load_config(config, override))


def _say(message: str) -> None:
    if sys.stderr.isatty():
        typer.echo(message, err=True)
