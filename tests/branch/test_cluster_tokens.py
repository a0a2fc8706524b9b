import json

import pytest
import torch

from cbtm.branch.cluster_tokens import add_cluster_tokens, cluster_token, extend_vocabulary
from cbtm.branch.seed import ScratchModelConfig, check_vocabulary, create_model, load_model, save_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError

TEXTS = ["the cat sat on the mat", "the dog ate the cat"] * 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer(tmp_path):
    trained = TextTokenizer.train(TEXTS, 300)
    trained.save(tmp_path / "tokenizer")
    return trained


def opt(n_rows=280):
    config = ScratchModelConfig(hidden_size=8, n_layers=1, n_heads=2)
    return create_model(config, vocab_size=n_rows, separator_id=0, context_length=8)


def of_file(folder, n_rows=280, **settings):
    path = folder / "shape.json"
    path.write_text(json.dumps({"max_position_embeddings": 8, "hidden_size": 8, "num_hidden_layers": 1, **settings}))
    return create_model(ScratchModelConfig(config=str(path)), vocab_size=n_rows, separator_id=0, context_length=8)


def llama(folder):
    return of_file(folder, model_type="llama", num_attention_heads=2, intermediate_size=16, tie_word_embeddings=False)


def rows(model):
    return model.get_input_embeddings().weight.detach()


def test_tokens_follow_the_tokenizers_last_id(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    first = add_cluster_tokens(tmp_path / "tokenizer", tmp_path / "grown", 3)
    assert first == tokenizer.vocab_size
    opened = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert [opened.convert_tokens_to_ids(f"<|cluster-{cluster}|>") for cluster in range(3)] == [
        first,
        first + 1,
        first + 2,
    ]
    assert opened.convert_ids_to_tokens(first + 2) == cluster_token(2)
    assert len(opened) == first + 3
    assert opened.decode([first, *opened("the cat")["input_ids"]], skip_special_tokens=True) == "the cat"
    opened.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").convert_tokens_to_ids(cluster_token(1)) == first + 1


def test_text_is_tokenised_as_before_though_it_spells_a_cluster_token(tokenizer, tmp_path):
    add_cluster_tokens(tmp_path / "tokenizer", tmp_path / "grown", 2)
    grown = TextTokenizer.load(tmp_path / "grown")
    assert (grown.vocab_size, grown.separator_id) == (tokenizer.vocab_size + 2, tokenizer.separator_id)
    for text in (*TEXTS, "a <|cluster-1|> b"):
        assert grown.encode_batch([text])[0].tolist() == tokenizer.encode_batch([text])[0].tolist()


def test_given_folder_stays_as_it_is(tokenizer, tmp_path):
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    add_cluster_tokens(tmp_path / "tokenizer", tmp_path / "grown", 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()} == before


def test_tokenizer_with_cluster_tokens_gets_no_second_ones(tokenizer, tmp_path):
    add_cluster_tokens(tmp_path / "tokenizer", tmp_path / "grown", 2)
    with pytest.raises(ConfigError, match=r"has a token <\|cluster-0\|> already; take one without cluster tokens"):
        add_cluster_tokens(tmp_path / "grown", tmp_path / "twice", 4)


def test_gap_between_the_ids_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "gap").mkdir()
    Tokenizer(models.WordLevel({"<s>": 0, "far": 9}, unk_token="<s>")).save(str(tmp_path / "gap/tokenizer.json"))
    (tmp_path / "gap/tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ConfigError, match="has 2 entries with ids up to 9: there are gaps, and cluster tokens cannot"):
        add_cluster_tokens(tmp_path / "gap", tmp_path / "grown", 2)


def test_rows_beyond_the_tokenizer_are_used_first():
    # 280 rows, 270 in use: 3 tokens take rows 270 to 272, and nothing grows.
    model, before = opt(), rows(opt())
    assert extend_vocabulary(model, 3, first_id=270) == 0
    assert model.config.vocab_size == 280
    mean = before[:270].double().mean(dim=0).float()
    assert torch.equal(rows(model)[270:273], mean.expand(3, 8))
    assert torch.equal(rows(model)[:270], before[:270])
    assert torch.equal(rows(model)[273:], before[273:])


def test_rows_are_added_for_what_is_left(tmp_path):
    # 280 rows, 275 in use: 8 tokens take rows 275 to 282, of which 280, 281 and 282 are new.
    model, before = opt(), rows(opt())
    assert extend_vocabulary(model, 8, first_id=275) == 3
    assert model.config.vocab_size == 283
    assert rows(model).shape == (283, 8)
    assert torch.equal(rows(model)[275:], before[:275].double().mean(dim=0).float().expand(8, 8))
    assert torch.equal(rows(model)[:275], before[:275])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # still tied
    assert model(torch.tensor([[282, 1]])).logits.shape == (1, 2, 283)
    save_model(model, tmp_path)
    assert torch.equal(rows(load_model(tmp_path)), rows(model))


def test_untied_head_grows_with_its_own_mean(tmp_path):
    model, head = llama(tmp_path), llama(tmp_path).get_output_embeddings().weight.detach()
    assert extend_vocabulary(model, 2, first_id=280) == 2
    grown = model.get_output_embeddings().weight.detach()
    assert torch.equal(grown[280:], head.double().mean(dim=0).float().expand(2, 8))
    assert not torch.equal(grown[280:], rows(model)[280:])
    assert torch.equal(grown[:280], head)


def test_bias_of_a_head_grows_too(tmp_path):
    model = of_file(tmp_path, model_type="gptj", n_embd=8, n_layer=1, n_head=2, rotary_dim=2, n_positions=8, n_inner=16)
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias.copy_(torch.arange(280.0))
    extend_vocabulary(model, 1, first_id=280)
    assert model.get_output_embeddings().bias[280].item() == 139.5  # mean of 0 … 279


def test_new_rows_draw_no_random_number():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = opt(), opt()
    extend_vocabulary(first, 4, first_id=280)
    torch.rand(3)
    extend_vocabulary(second, 4, first_id=280)
    assert torch.equal(rows(first), rows(second))
    torch.manual_seed(5)
    extend_vocabulary(opt(), 4, first_id=280)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_and_tokenizer_with_cluster_tokens_belong_together(tokenizer, tmp_path):
    model = opt(tokenizer.vocab_size)
    first = add_cluster_tokens(tmp_path / "tokenizer", tmp_path / "expert", 2)
    extend_vocabulary(model, 2, first_id=first)
    save_model(model, tmp_path / "expert")
    check_vocabulary(tmp_path / "expert", TextTokenizer.load(tmp_path / "expert"), 8)


def test_model_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="the tokenizer has 281 entries but the model's vocabulary is 280"):
        extend_vocabulary(opt(), 1, first_id=281)
