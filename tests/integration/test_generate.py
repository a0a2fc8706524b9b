"""Generation from a run's folder: the experts and the routing are those of the run, and so is what they write."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import settings
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cbtm import cli, stages
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.errors import CbtmError, ConfigError, ManifestError
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages.generate import open_mixture
from cbtm.train.member import Member

PROMPT = "def read(path):\n"


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    values: dict[str, Any] = settings(str(corpus), str(tmp_path_factory.mktemp("run") / "out"), None)
    run = Run(parse_config(json.dumps(values)))
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()
    return run


def generate(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["generate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def greedy(run: Run, scratch: Path, n_tokens: int) -> str:
    """The most probable continuation, each step by both experts' full logits and a prefix vectorised anew."""
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))
    clusterer = Clusterer.load(run.fetch(run.cluster_spec(), scratch))
    experts = [AutoModelForCausalLM.from_pretrained(run.member_root(member)) for member in run.experts]
    chosen = next(row for row in run.result()["ensemble"] if row["selected"] and row["top_k"] == 2)
    tokens, text = tokenizer.encode_with_starts(PROMPT)[0].tolist(), PROMPT
    for _ in range(n_tokens):
        vector = clusterer.embedder.transform([text])[0].astype(np.float64)
        energy = np.linalg.norm(vector - clusterer.centers, axis=1) ** chosen["distance_power"]
        weights = np.exp(-energy / chosen["temperature"])
        with torch.no_grad():
            probs = [model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1).numpy() for model in experts]
        tokens.append(int(np.argmax((weights / weights.sum()) @ np.stack(probs))))
        text = tokenizer._tokenizer.decode(tokens[1:])
    return text.removeprefix(PROMPT)


def test_the_command_writes_what_the_mixture_finds_most_probable(made, tmp_path):
    said = generate(PROMPT, "--root", made.config.root, "--max-new-tokens", "12")
    assert said == greedy(made, tmp_path, 12) + "\n"


def test_one_expert_alone_writes_what_transformers_generates_with_it(made, tmp_path):
    tokenizer = TextTokenizer.load(made.fetch(made.tokenizer_spec(), tmp_path))
    tokens = torch.from_numpy(tokenizer.encode_with_starts(PROMPT)[0])[None]
    model = AutoModelForCausalLM.from_pretrained(made.member_root(Member("expert", 1)))
    whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False)
    expected = tokenizer._tokenizer.decode(whole[0, tokens.shape[1] :].tolist())
    said = generate(PROMPT, "--root", made.config.root, "--max-new-tokens", "10", "--experts", "1")
    assert said.rstrip("\n") == expected.rstrip("\n")


def test_explanation_names_the_experts_with_the_terms_of_their_domains(made):
    said = generate(PROMPT, "--root", made.config.root, "--max-new-tokens", "8", "--explain")
    *text, first, second = said.splitlines()
    assert "".join(text).startswith("[")  # the expert that carried the first token, in brackets
    assert first.startswith("expert ")
    assert {line.split(" carried ")[0] for line in (first, second)} == {"expert 0", "expert 1"}
    terms = {row["cluster"]: row["top_terms"] for row in made.result()["experts"]}
    for line in (first, second):
        assert line.endswith(": " + ", ".join(terms[int(line.split()[1])]))


def test_same_seed_draws_the_same_text(made):
    drawn = [
        generate(PROMPT, "--root", made.config.root, "--max-new-tokens", "12", "--sample", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_routing_is_that_of_the_evaluation_or_the_usual_one(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made.config.root, root)
    run = Run(made.config.model_copy(update={"root": str(root)}))
    distances = np.array([[0.8, 1.0]])
    found = json.loads((root / "result.json").read_text())
    for row in found["ensemble"]:
        row["selected"] = (row["ensemble"], row["top_k"], row["temperature"]) == ("clustering", 2, 0.5)
        row["selected"] &= row["distance_power"] == 4
    (root / "result.json").write_text(json.dumps(found))
    energy = (0.8**4 - 1.0) / 0.5
    chosen = open_mixture(run, tmp_path / "a")._weigh(distances)
    np.testing.assert_allclose(chosen[0, 1], np.exp(energy) / (1 + np.exp(energy)), rtol=1e-12)
    given = open_mixture(run, tmp_path / "b", temperature=0.2, distance_power=2)._weigh(distances)
    energy = (0.8**2 - 1.0) / 0.2
    np.testing.assert_allclose(given[0, 1], np.exp(energy) / (1 + np.exp(energy)), rtol=1e-12)
    (root / "result.json").unlink()
    usual = open_mixture(run, tmp_path / "c")._weigh(distances)
    energy = (0.8**2 - 1.0) / 0.1
    np.testing.assert_allclose(usual[0, 1], np.exp(energy) / (1 + np.exp(energy)), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--experts", "0,7"], ConfigError, "cluster 7 has no expert; trained are 0, 1"),
        (["--experts", "zero"], ConfigError, "--experts zero is no list of numbers"),
        (["--temperature", "0"], ConfigError, "temperature=0.0 is not a positive finite number"),
        (["--top-k", "0"], ConfigError, "top_k=0 is not in"),
        (["--refresh", "never"], ConfigError, "--refresh never is neither a number of tokens nor once"),
        (["--max-new-tokens", "99"], ConfigError, "48 positions"),
    ],
)
def test_wrong_options_are_named(made, arguments, error, message):
    with pytest.raises(error, match=message):
        generate(PROMPT, "--root", made.config.root, *arguments)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CbtmError, match=r"config.json is not there"):
        generate(PROMPT, "--root", str(tmp_path))


def test_an_expert_of_another_clusterer_does_not_write(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made.config.root, root)
    run = Run(made.config.model_copy(update={"root": str(root)}))
    path = Path(run.member_root(Member("expert", 1)), "expert.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clusterer_digest": "0" * 64}))
    with pytest.raises(ManifestError, match="weights would go to the wrong experts"):
        open_mixture(run, tmp_path / "scratch")
