import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from cbtm.branch.tokenizer import SEPARATOR, TextTokenizer, TokenizerConfig, build_tokenizer, fetch_tokenizer
from cbtm.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat", "the dog ate the cat", "naïve café, déjà vu", "東京 is Tokyo, 🎉!"] * 5
AWKWARD = [
    "",
    " ",
    "\n\n\t",
    "a",
    "naïve café",
    "東京都",
    "🎉🎉 party 👩‍👩‍👧",
    "e\u0301",
    "\x00\x7f",
    SEPARATOR,
    f"a{SEPARATOR}b",
]

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]


@pytest.fixture(scope="module")
def trained():
    return TextTokenizer.train(TEXTS, 320)


def decoded(folder, ids):
    """Text that other software reads out of our folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def byte_characters():
    """GPT-2's stand-ins for `BYTES`: printable bytes are themselves, the others follow from 256 on."""
    return [chr(byte) for byte in PRINTABLE] + [chr(256 + number) for number in range(256 - len(PRINTABLE))]


def small_gpt2(folder, merges=(("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"))):
    """vocab.json and merges.txt in GPT-2's form: 256 bytes, one entry for each merge, the separator last."""
    entries = [*byte_characters(), *("".join(pair) for pair in merges), SEPARATOR]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return folder


def word_level(folder, *, settings=None, special=(), **changes):
    """A folder with a tokenizer.json of a few whole words."""
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    for name, values in changes.items():
        getattr(tokenizer, name)(**values)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_same_texts_give_the_same_tokenizer(tmp_path):
    for name in ("a", "b"):
        TextTokenizer.train(iter(TEXTS), 320).save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_training_does_not_depend_on_the_process_or_its_threads(tmp_path, trained):
    trained.save(tmp_path / "here")
    code = (
        "import json, sys; from pathlib import Path; from cbtm.branch.tokenizer import TextTokenizer\n"
        "TextTokenizer.train(json.loads(sys.argv[1]), 320).save(Path(sys.argv[2]))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    arguments = [sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, env=environment)
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_trained_vocabulary_is_the_separator_the_256_bytes_and_the_merges():
    # 1 + 256 = 257. "aa" has one pair to merge, and "abcdefgh" seven, one after the other.
    for text, n_merges in (("aa", 1), ("abcdefgh", 7)):
        tokenizer = TextTokenizer.train([text], 300)
        assert tokenizer.vocab_size == 257 + n_merges
        assert tokenizer.separator_id == 0
        assert len(tokenizer.encode_batch([text])[0]) == 2  # the separator, and the text whole
    assert TextTokenizer.train(TEXTS, 300).vocab_size == 300


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_the_text_back(trained, tmp_path, text):
    trained.save(tmp_path)
    (tokens,) = trained.encode_batch([text])
    assert decoded(tmp_path, tokens) == SEPARATOR + text


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_one_text_and_a_batch_are_cut_alike(trained, texts):
    batch = trained.encode_batch(texts)
    for text, tokens in zip(texts, batch, strict=True):
        again, starts = trained.encode_with_starts(text)
        assert tokens.dtype == again.dtype == starts.dtype == np.int64
        assert tokens[0] == trained.separator_id
        np.testing.assert_array_equal(again, tokens)
        assert starts.shape == tokens.shape
        assert starts[0] == 0
        assert (np.diff(starts) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_a_token_starts_behind_the_whole_characters_of_the_tokens_before_it(trained, tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    trained.save(folder)
    opened = Tokenizer.from_file(str(folder / "tokenizer.json"))
    byte_of = dict(zip(byte_characters(), BYTES, strict=True))
    tokens, starts = trained.encode_with_starts(text)
    before = b""
    for token, start in zip(tokens[1:].tolist(), starts[1:].tolist(), strict=True):
        assert start == len(before.decode("utf-8", errors="ignore"))  # leaves out a character that is cut
        before += bytes(byte_of[character] for character in opened.id_to_token(token))
    assert before == text.encode()


def test_starts_are_counted_in_characters_by_hand():
    # No merges: one token a byte. é is 2 bytes, 東 is 3, 🎉 is 4, and every byte starts at its character.
    tokenizer = TextTokenizer.train(["x"], 300)
    tokens, starts = tokenizer.encode_with_starts("é東 🎉x")
    assert len(tokens) == 1 + 2 + 3 + 1 + 4 + 1
    assert starts.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def test_text_that_spells_the_separator_is_no_separator(trained):
    # The separator stands for the end of a document; a text about tokenizers must not fall apart into two.
    (tokens,) = trained.encode_batch([f"one{SEPARATOR}two"])
    assert tokens[0] == trained.separator_id
    assert trained.separator_id not in tokens[1:]


def test_saved_folder_opens_to_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path)
    opened = TextTokenizer.load(tmp_path)
    assert (opened.separator, opened.separator_id, opened.vocab_size) == (SEPARATOR, 0, trained.vocab_size)
    for first, second in zip(trained.encode_batch(AWKWARD), opened.encode_batch(AWKWARD), strict=True):
        np.testing.assert_array_equal(first, second)


def test_saved_folder_opens_in_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened.bos_token == opened.eos_token == SEPARATOR
    text = "the naïve cat 東京"
    assert opened.encode(text, add_special_tokens=False) == trained.encode_batch([text])[0][1:].tolist()
    assert opened.decode(opened.encode(text)) == text


def test_gpt2_vocabulary_and_merges_make_gpt2s_tokens(tmp_path):
    # "hello" merges he, ll, hell, hello (ids 256 … 259); " world" keeps only Ġw (260) whole.
    tokenizer = TextTokenizer.load(small_gpt2(tmp_path / "gpt2"))
    letter = {character: number for number, character in enumerate(byte_characters())}
    assert tokenizer.separator_id == 261
    assert tokenizer.vocab_size == 262
    tokens, starts = tokenizer.encode_with_starts("hello world")
    assert tokens.tolist() == [261, 259, 260, *(letter[character] for character in "orld")]
    assert starts.tolist() == [0, 0, 5, 7, 8, 9, 10]


def test_gpt2_folder_of_the_environment_gives_published_ids(tmp_path):
    # The real files are half a megabyte and not part of this repository; the small ones hold the same two facts.
    given = os.environ.get("CBTM_TEST_GPT2")
    if given:
        tokenizer, expected = TextTokenizer.load(Path(given)), [50256, 15496, 995]
    else:
        merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("Ġ", "w"), ("o", "r"), ("l", "d")]
        merges += [("Ġw", "or"), ("Ġwor", "ld")]
        tokenizer, expected = TextTokenizer.load(small_gpt2(tmp_path, merges)), [265, 259, 264]
    assert tokenizer.encode_batch(["Hello world"])[0].tolist() == expected


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither tokenizer\.json nor vocab\.json with merges\.txt"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match="save_pretrained first"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_damaged_files_are_named_by_their_folder(tmp_path, name):
    small_gpt2(tmp_path)
    (tmp_path / name).write_text("no tokenizer")
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be read as a tokenizer"):
        TextTokenizer.load(tmp_path)


def test_damaged_settings_are_refused(tmp_path):
    word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not JSON"):
        TextTokenizer.load(tmp_path)


def test_tokenizer_without_bos_and_eos_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names neither a BOS nor an EOS token; add bos_token"):
        TextTokenizer.load(word_level(tmp_path, settings={"bos_token": None}))


def test_bos_that_is_no_token_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no token '<bos>', which its configuration names"):
        TextTokenizer.load(word_level(tmp_path, settings={"bos_token": "<bos>"}))


@pytest.mark.parametrize(
    ("values", "separator_id"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 1),
        ({"bos_token": {"content": "<s>", "lstrip": False}}, 1),
        ({"bos_token": None, "eos_token": "</s>"}, 2),
    ],
)
def test_separator_is_bos_or_else_eos(tmp_path, values, separator_id):
    tokenizer = TextTokenizer.load(word_level(tmp_path, settings=values, special=("<s>", "</s>")))
    assert tokenizer.separator_id == separator_id
    assert tokenizer.encode_batch(["one two"])[0].tolist() == [separator_id, 3, 4]


def test_published_padding_and_truncation_are_switched_off(tmp_path):
    changes = {"enable_padding": {"length": 8}, "enable_truncation": {"max_length": 2}}
    word_level(tmp_path / "given", settings={"bos_token": "<s>"}, **changes)
    published = Tokenizer.from_file(str(tmp_path / "given/tokenizer.json"))
    assert len(published.encode("one two one").ids) == 8  # two tokens kept, six of padding
    tokenizer = TextTokenizer.load(tmp_path / "given")
    texts = ["one two one", "two"]
    assert [row.tolist() for row in tokenizer.encode_batch(texts)] == [[1, 3, 4, 3], [1, 4]]
    assert tokenizer.encode_with_starts("one two one")[0].tolist() == [1, 3, 4, 3]
    tokenizer.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    assert settings["padding"] is settings["truncation"] is None


def test_published_template_adds_no_second_separator(tmp_path):
    folder = word_level(tmp_path, settings={"bos_token": "<s>"}, special=("<s>",))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.encode("one").ids == [1, 3]
    assert TextTokenizer.load(folder).encode_batch(["one"])[0].tolist() == [1, 3]


def test_vocabulary_with_a_gap_counts_to_its_highest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "far": 9}, unk_token="<s>"))
    assert tokenizer.get_vocab_size() == 2
    assert TextTokenizer(tokenizer, "<s>").vocab_size == 10


def test_build_trains_on_the_texts_when_nothing_is_given(tmp_path):
    made = build_tokenizer(TokenizerConfig(vocab_size=300), None, iter(TEXTS), tmp_path / "made")
    assert TextTokenizer.load(tmp_path / "made").vocab_size == made.vocab_size == 300


def test_build_prefers_the_tokenizer_path_to_the_seed_models(tmp_path):
    word_level(tmp_path / "seed", settings={"bos_token": "<s>"})
    small_gpt2(tmp_path / "other")
    texts = iter(TEXTS)
    config = TokenizerConfig(path=str(tmp_path / "other"))
    assert build_tokenizer(config, str(tmp_path / "seed"), texts, tmp_path / "out/a").vocab_size == 262
    assert build_tokenizer(TokenizerConfig(), str(tmp_path / "seed"), texts, tmp_path / "out/b").vocab_size == 5
    assert next(texts) == TEXTS[0]  # a given tokenizer needs no text
    assert fetch_tokenizer(str(tmp_path / "seed"), tmp_path / "scratch").separator == "<s>"


def test_empty_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no document to train a tokenizer on; check corpus\.root"):
        build_tokenizer(TokenizerConfig(), None, iter([]), tmp_path)


def test_text_too_short_for_the_vocabulary_is_logged(tmp_path, caplog):
    build_tokenizer(TokenizerConfig(vocab_size=400), None, ["aa"], tmp_path)
    assert "vocab_size=400 but the text gives only 258" in caplog.text  # the separator, 256 bytes, and aa
