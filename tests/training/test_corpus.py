"""A text's tokens and words, whatever the pieces that it is read in."""

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mpoe.training import corpus as corpus_module
from mpoe.training.corpus import Corpus, Text, bos_of, tokenize_text
from mpoe.training.data_arguments import CorpusArguments

WIKITEXT = " \n = Robert <unk> = \n \n Robert is an actor . \n He had a role . \n \n"
PROSE = "First line.\n\n  Indented, twice.\nA third\u2028line\u00a0here\n\n\n\nThe end"


def gpt2_like(text, bos=False):
    """GPT-2's kind of tokenizer: bytes, cut at words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False),
    )
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


def as_text(text):
    return Text("a text", lambda: iter(text.splitlines(keepends=True) if "\u2028" not in text else lines_of(text)))


def lines_of(text):
    return [line + "\n" for line in text.split("\n")[:-1]] + [text.split("\n")[-1]]


@pytest.mark.parametrize("piece", [1, 10, 25, 10**6])
@pytest.mark.parametrize("text", [WIKITEXT * 5, PROSE])
def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch, text, piece):
    monkeypatch.setattr(corpus_module, "PIECE", piece)
    tokenizer = gpt2_like(text)
    found = tokenize_text(as_text(text), tokenizer, disable_tqdm=True)
    assert found.tokens.tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.decode(found.tokens) == text


def test_words_are_counted_as_wikitext_does():
    """What stands between white space, and an end of line for every line."""
    found = tokenize_text(as_text(WIKITEXT), gpt2_like(WIKITEXT), disable_tqdm=True)
    assert found.words == 4 + 5 + 5 + 6


def test_a_cut_text_has_the_words_of_that_part():
    text = WIKITEXT * 4
    tokenizer = gpt2_like(text)
    lines = lines_of(text)
    for most in (8, 30, 60, 10**6):
        found = tokenize_text(as_text(text), tokenizer, max_tokens=most, disable_tqdm=True)
        kept = tokenizer.decode(found.tokens)
        assert text.startswith(kept)
        assert kept.endswith("\n")
        assert found.words == sum(len(line.split()) + 1 for line in lines_of(kept)[:-1])
        assert len(found.tokens) <= most
        assert kept == text or len(tokenizer(kept + lines[kept.count("\n")])["input_ids"]) > most
    with pytest.raises(ValueError, match="max_eval_tokens must hold the first line of a text; got 2"):
        tokenize_text(as_text("one two three four\n"), tokenizer, max_tokens=2, disable_tqdm=True)


def test_a_tokenizer_that_begins_texts_is_known():
    assert bos_of(gpt2_like(PROSE)) is None, "GPT-2 has such a token and does not use it"
    assert bos_of(gpt2_like(PROSE, bos=True)) == 0
    assert tokenize_text(as_text(PROSE), gpt2_like(PROSE, bos=True), disable_tqdm=True).tokens[0] != 0


@pytest.mark.parametrize("name", ["valid.txt", "validation.txt", "dev.txt"])
def test_a_folders_files_and_those_that_are_named(tmp_path, name):
    for file in ("train.txt", name, "test.txt", "other.txt"):
        (tmp_path / file).write_text(f"this is {file}\n")
    corpus = Corpus.open(CorpusArguments(corpus=str(tmp_path), test_file=str(tmp_path / "other.txt")))
    assert corpus.name == tmp_path.name
    parts = [list(part.lines()) for part in (corpus.train, corpus.validation, corpus.test)]
    assert parts == [["this is train.txt\n"], [f"this is {name}\n"], ["this is other.txt\n"]]


def test_one_file_is_training_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i:02}\n" for i in range(40)))
    corpus = Corpus.open(CorpusArguments(corpus=str(path)))
    assert (corpus.name, corpus.validation, corpus.test) == ("book", None, None)
    first, last = corpus.train.split_end(0.05)
    assert list(last.lines()) == ["line 38\n", "line 39\n"]
    assert [*first.lines(), *last.lines()] == list(corpus.train.lines())
    path.write_text("one line")
    with pytest.raises(ValueError, match="must have lines, to give its last ones"):
        corpus.train.split_end(0.05)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = ["", " = Title = \n", "two\nlines"]
    parts = {"train": datasets.Dataset.from_dict({"text": rows, "page": rows})}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or parts)
    corpus = Corpus.open(CorpusArguments(corpus="some/corpus", corpus_config="small"))
    assert asked == [("some/corpus", "small")]
    assert list(corpus.train.lines()) == ["\n", " = Title = \n", "two\n", "lines\n"]
    assert corpus.test is None
    with pytest.raises(ValueError, match="text_column must be a column of train of some/corpus: text, page; got body"):
        Corpus.open(CorpusArguments(corpus="some/corpus", text_column="body"))
    parts.clear()
    with pytest.raises(ValueError, match="corpus must have a split of train, validation, test; some/corpus has"):
        Corpus.open(CorpusArguments(corpus="some/corpus"))


def test_what_is_not_there_is_said(tmp_path):
    for arguments, message in (
        ({"corpus": str(tmp_path)}, "must be a folder with train.txt, valid.txt or test.txt"),
        ({"corpus": str(tmp_path / "none.txt")}, "must be a text file, a folder or a dataset on the hub; there is no"),
        ({"train_file": str(tmp_path / "none.txt")}, "a text must be a file; there is no"),
        ({"corpus": "no/such-corpus"}, r"no/such-corpus could not be loaded from there: .* Correct --corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            Corpus.open(CorpusArguments(**arguments))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    text = Corpus.open(CorpusArguments(corpus=str(tmp_path / "latin.txt"))).train
    with pytest.raises(ValueError, match=r"latin.txt must be UTF-8 text"):
        list(text.lines())
