"""The command line: every stage by itself, the whole run, and corpora to run it on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbtm import __version__, storage
from cbtm.cli_cluster import cluster_app
from cbtm.cli_compare import compare_app
from cbtm.cli_corpus import corpus_app, say
from cbtm.cli_extend import extend_app
from cbtm.errors import CbtmError, ConfigError
from cbtm.process import log_to_stderr, s3_patience

if TYPE_CHECKING:
    from cbtm.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
tracking_app = typer.Typer(no_args_is_help=True, help="The journal behind the tracking server.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(tracking_app, name="tracking")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated.")
]


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

    found = demo_corpus(corpus, root.parent / "corpora", progress=say)
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

    candidates = suggest_k(load_config(config, override), _numbers(k, "--k"), repeats=repeats)
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
    """Train the seed model, experts and baselines; with --member average-… make an average of the experts."""
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
    member: Annotated[list[str] | None, typer.Option(help="Member to score; default all that are trained.")] = None,
) -> None:
    """Score every validation token, and the answers of the few-shot tasks, under each model."""
    from cbtm import stages
    from cbtm.train.member import Member

    asked = [Member.parse(name) for name in member or []]
    this = _planned_run(config, override)
    for each in asked or [Member("seed"), *this.config.members]:
        stages.score(this, each)


@app.command()
def average(config: ConfigArgument, override: SetOption = None) -> None:
    """Average the experts' parameters into one model, in every way that is configured, and score it."""
    from cbtm import stages

    this = _planned_run(config, override)
    if not this.config.averages:
        raise ConfigError("average.averages is empty; name some of uniform, weighted and greedy")
    stages.average(this)


@app.command()
def evaluate(config: ConfigArgument, override: SetOption = None) -> None:
    """Compare every ensemble; write result.json, settings.csv and report.html."""
    from cbtm import stages
    from cbtm.merge.report import format_table, headline_rows

    this = _planned_run(config, override)
    stages.evaluate(this)
    typer.echo(format_table(headline_rows(this.result())))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; may be empty.")],
    root: Annotated[str, typer.Option(help="Folder or s3:// prefix of a run whose experts are trained.")] = "runs/demo",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; default the most probable ones.")] = False,
    sampling_temperature: Annotated[float, typer.Option(help="With --sample: of the mixture's probabilities.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample: from the most probable tokens that reach this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample: of the draws.")] = 0,
    top_k: Annotated[int | None, typer.Option(help="Experts that run at a token; default all.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the routing; default what the run's evaluation chose, or 0.1.")
    ] = None,
    distance_power: Annotated[float | None, typer.Option(help="Of the routing; default likewise, or 2.")] = None,
    refresh: Annotated[str, typer.Option(help="Tokens between two estimates of the weights, or once.")] = "1",
    experts: Annotated[str | None, typer.Option(help="Clusters whose experts are mixed, as 0,2; default all.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which expert carried which token.")] = False,
) -> None:
    """Continue a text with the experts of a run, mixed at every token."""
    import tempfile

    from cbtm.merge.explain import format_explanation
    from cbtm.merge.text_generation import generate_text
    from cbtm.run import Run
    from cbtm.run_config import recorded_config
    from cbtm.stages.generate import domain_terms, open_mixture

    this = Run(recorded_config(root))
    with tempfile.TemporaryDirectory(prefix="cbtm-generate-") as scratch:
        mixture = open_mixture(
            this,
            Path(scratch),
            top_k=top_k,
            temperature=temperature,
            distance_power=distance_power,
            refresh=_refresh(refresh),
            experts=None if experts is None else _numbers(experts, "--experts"),
        )
        made = generate_text(
            mixture,
            prompt,
            max_new_tokens=max_new_tokens,
            sample=sample,
            sampling_temperature=sampling_temperature,
            top_p=top_p,
            random_state=seed,
            on_text=None if explain else lambda text: typer.echo(text, nl=False),
        )
        if not explain:
            typer.echo()
        else:
            explained = mixture.explain(made.prompt_tokens, made.tokens)
            terms = domain_terms(this, Path(scratch))
            typer.echo(format_explanation(explained, colour=sys.stdout.isatty(), top_terms=terms))


@app.command(name="config")
def show_config(config: ConfigArgument, override: SetOption = None) -> None:
    """Print the checked configuration with every default."""
    import yaml

    from cbtm.run_config import load_config

    typer.echo(yaml.safe_dump(load_config(config, override).model_dump(mode="json"), sort_keys=False))


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


app.registered_commands += extend_app.registered_commands
app.registered_commands += compare_app.registered_commands
app.registered_commands += cluster_app.registered_commands  # after those of one machine


def _refresh(text: str) -> int | Literal["once"]:
    if text == "once":
        return "once"
    if not text.isdecimal():
        raise ConfigError(f"--refresh {text} is neither a number of tokens nor once")
    return int(text)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text} is no list of numbers; write it as 2,4,8") from None


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
