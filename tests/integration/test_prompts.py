"""Evaluation of a run whose documents have prompts: only what comes after them counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import settings

from cbtm import stages
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.merge.validation_set import selection_documents
from cbtm.run import Run
from cbtm.run_config import parse_config


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two experts, with every second validation document cut into src and tgt."""
    root = tmp_path_factory.mktemp("instructions")
    shutil.copytree(corpus, root / "corpus")
    path = root / "corpus/valid/small/00000/text.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    lines: list[dict[str, Any]] = [
        {"src": text[:50], "tgt": text[50:]} if number % 2 else {"text": text} for number, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = settings(str(root / "corpus"), str(root / "out"), None)
    values["train"] |= {"dense": False, "random_clusters": False, "steps": 5}
    made = Run(parse_config(json.dumps(values)))
    stages.plan(made)
    for task in stages.tasks(made):
        task.run()
    return made


def test_figures_are_those_of_the_tokens_and_bytes_after_the_prompts(run):
    tokenizer = TextTokenizer.load(Path(run.uri("tokenizer")))
    documents = {document.sp_id: document for document in run.documents("validation")}
    assert sum(document.prompt > 0 for document in documents.values()) == 20
    order = [
        json.loads(line)["sp_id"]
        for path in sorted(Path(run.uri("tokens/held-out/valid/small")).glob("*.documents.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert order == list(documents)
    scores = np.load(run.uri("scores/seed/log_probs.npy")).astype(np.float64)
    offsets = np.load(run.uri("scores/seed/offsets.npy"))
    total = tokens = prompts = n_bytes = 0
    for place in np.flatnonzero(~selection_documents(40)):
        document = documents[order[place]]
        starts = tokenizer.encode_with_starts(document.text)[1][1:]
        own = scores[offsets[place] : offsets[place + 1]]
        assert len(own) == len(starts)
        # A token is given where the one after it begins within the prompt or at its end.
        given = int(np.sum(np.append(starts[1:], len(document.text)) <= document.prompt))
        total -= own[given:].sum()
        tokens += len(own) - given
        prompts += given
        n_bytes += len(document.text[document.prompt :].encode())
    result = run.result()
    assert (result["n_tokens"], result["n_prompt_tokens"], result["n_bytes"]) == (tokens, prompts, n_bytes)
    assert prompts > 0
    assert result["seed"]["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-6)
    assert result["seed"]["bits_per_byte"] == pytest.approx(total / np.log(2) / n_bytes, rel=1e-6)
    assert sum(row["n_tokens"] for row in result["by_domain"]) == tokens


def test_report_says_that_prompts_do_not_count(run):
    page = Path(run.uri("report.html")).read_text()
    assert f"the {run.result()['n_prompt_tokens']:,} tokens of the prompts are given and do not count" in page
