"""The tasks: their texts, their splits, real GLUE files, and what is said about files that are wrong."""

import logging
import math
import os
from pathlib import Path

import datasets
import pytest

from mpoe.training.metrics import METRICS
from mpoe.training.tasks import TASKS, get_task, load_task

GLUE = Path(os.environ.get("MPOE_GLUE_DIR", "data/glue"))
SPLITS = ("train", "validation", "test", "dev")

HEADERS = {
    "cola": None,
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "stsb": ["index", "genre", "filename", "sentence1", "sentence2", "score"],
    "mnli": ["index", "sentence1", "sentence2", "label1", "gold_label"],
    "qnli": ["index", "question", "sentence", "label"],
    "rte": ["index", "sentence1", "sentence2", "label"],
    "wnli": ["index", "sentence1", "sentence2", "label"],
    "sentiment": ["sentence", "label"],
} | {
    name: [*task.columns, "label"] for name, task in TASKS.items()
    if not task.file_columns and task.hub and task.hub != "nyu-mll/glue"
}  # fmt: skip
# A line of each task as GLUE's files have it, and what becomes of it.
EXAMPLES = {
    "cola": (["gj04", "0", "*", 'They "drank the pub.'], 'cola sentence: They "drank the pub.', "0"),
    "sst2": (["a charming journey . ", "1"], "sst2 sentence: a charming journey .", "1"),
    "mrpc": (["1", "7", "8", 'He said " no', "No ."], 'mrpc sentence1: He said " no sentence2: No .', "1"),
    "qqp": (["1", "2", "3", "Why?", "", "0"], "qqp question1: Why? question2: ", "0"),
    "stsb": (["0", "m", "f", "A {man}.", "A dog.", "3.750"], "stsb sentence1: A {man}. sentence2: A dog.", "3.8"),
    "mnli": (["0", "It rains.", "It is dry.", "x", "contradiction"],
             "mnli premise: It rains. hypothesis: It is dry.", "2"),
    "qnli": (["0", "Who?", "Me.", "not_entailment"], "qnli question: Who? sentence: Me.", "1"),
    "rte": (["0", "A.", "B.", "entailment"], "rte sentence1: A. sentence2: B.", "0"),
    "wnli": (["0", "A.", "B.", "1"], "wnli sentence1: A. sentence2: B.", "1"),
    "sentiment": (["Fine.", "1"], "sentiment sentence: Fine.", "positive"),
    "imdb": (["Fine.", "1"], "imdb Fine.", "1"),
    "yelp_polarity": (["Awful.", "0"], "yelp_polarity sentence: Awful.", "0"),
    "trec": (["Who?", "5"], "trec sentence: Who?", "5"),
    "paws": (["A.", "B.", "1"], "paws sentence1: A. sentence2: B.", "1"),
    "sick": (["A.", "B.", "2"], "sick premise: A. hypothesis: B.", "2"),
    "scitail": (["A.", "B.", "1"], "scitail sentence1: A. sentence2: B.", "1"),
    "snli": (["A.", "B.", "2"], "snli premise: A. hypothesis: B.", "2"),
    "boolq": (["is it", "It is.", "1"], "boolq question: is it passage: It is.", "1"),
    "cb": (["A.", "B.", "2"], "cb premise: A. hypothesis: B.", "2"),
    "superglue-rte": (["A.", "B.", "1"], "superglue-rte premise: A. hypothesis: B.", "1"),
    "commonsense_qa": (["Where?", "a", "b", "c", "d", "e", "4"],
                       "commonsense_qa question: Where? A: a B: b C: c D: d E: e", "4"),
    "social_i_qa": (["Why?", "He ran.", "x", "y", "z", "2"],
                    "social_i_qa question: Why? context: He ran. answerA: x answerB: y answerC: z", "2"),
    "cosmos_qa": (["Why?", "He ran.", "w", "x", "y", "z", "3"],
                  "cosmos_qa question: Why? context: He ran. answer0: w answer1: x answer2: y answer3: z", "3"),
    "winogrande": (["_ ran.", "He", "She", "2"], "winogrande sentence: _ ran. option1: He option2: She", "2"),
    "hellaswag": (["He", "a", "b", "c", "d", "3"],
                  "hellaswag ctx: He ending0: a ending1: b ending2: c ending3: d", "3"),
    "wmt16-en-ro": (["Hi {x}.", " Salut."], "Translate English to Romanian Hi {x}.", "Salut."),
    "wmt16-ro-en": (["Salut.", "Hi."], "Translate Romanian to English Salut.", "Hi."),
    "wmt16-en-cs": (["Hi.", "Ahoj."], "Translate English to Czech Hi.", "Ahoj."),
    "wmt16-en-fi": (["Hi.", "Hei."], "Translate English to Finnish Hi.", "Hei."),
    "wmt14-hi-en": (["Hi.", "नमस्ते।"], "Translate English to Hindi Hi.", "नमस्ते।"),
    "iwslt2017-en-nl": (["Hi.", "Hoi."], "Translate English to Dutch Hi.", "Hoi."),
    "iwslt2017-ro-nl": (["Salut.", "Hoi."], "Translate Romanian to Dutch Salut.", "Hoi."),
}  # fmt: skip

PAIR, NLI = {"sentence1": "A.", "sentence2": "B."}, {"premise": "A.", "hypothesis": "B."}
# Dataset, configuration and development split of each task on the hub, and the row of EXAMPLES in the columns there.
HUB_ROWS = {
    "cola": ("nyu-mll/glue", "cola", "validation", {"sentence": 'They "drank the pub.', "label": 0}),
    "sst2": ("nyu-mll/glue", "sst2", "validation", {"sentence": "a charming journey . ", "label": 1}),
    "mrpc": ("nyu-mll/glue", "mrpc", "validation", {"sentence1": 'He said " no', "sentence2": "No .", "label": 1}),
    "qqp": ("nyu-mll/glue", "qqp", "validation", {"question1": "Why?", "question2": "", "label": 0}),
    "stsb": ("nyu-mll/glue", "stsb", "validation", {"sentence1": "A {man}.", "sentence2": "A dog.", "label": 3.75}),
    "mnli": ("nyu-mll/glue", "mnli", "validation_matched",
             {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2}),
    "qnli": ("nyu-mll/glue", "qnli", "validation", {"question": "Who?", "sentence": "Me.", "label": 1}),
    "rte": ("nyu-mll/glue", "rte", "validation", PAIR | {"label": 0}),
    "wnli": ("nyu-mll/glue", "wnli", "validation", PAIR | {"label": 1}),
    "imdb": ("stanfordnlp/imdb", None, "test", {"text": "Fine.", "label": 1}),
    "yelp_polarity": ("fancyzhx/yelp_polarity", None, "test", {"text": "Awful.", "label": 0}),
    "trec": ("CogComp/trec", None, "test", {"text": "Who?", "coarse_label": 5, "fine_label": 49}),
    "paws": ("google-research-datasets/paws", "labeled_final", "test", PAIR | {"id": 7, "label": 1}),
    "sick": ("RobZamp/sick", None, "test", {"sentence_A": "A.", "sentence_B": "B.", "label": 2, "entailment_AB": "x"}),
    "scitail": ("allenai/scitail", "snli_format", "test", PAIR | {"gold_label": "neutral", "sentence1_parse": "x"}),
    "snli": ("stanfordnlp/snli", None, "test", NLI | {"label": 2}),
    "boolq": ("aps/super_glue", "boolq", "validation", {"question": "is it", "passage": "It is.", "label": 1}),
    "cb": ("aps/super_glue", "cb", "validation", NLI | {"label": 2}),
    "superglue-rte": ("aps/super_glue", "rte", "validation", NLI | {"label": 1}),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation",
                       {"question": "Where?", "answerKey": "E",
                        "choices": {"label": list("ABCDE"), "text": list("abcde")}}),
    "social_i_qa": ("allenai/social_i_qa", None, "validation",
                    {"context": "He ran.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z",
                     "label": "3\n"}),
    "cosmos_qa": ("allenai/cosmos_qa", None, "validation",
                  {"context": "He ran.", "question": "Why?", "answer0": "w", "answer1": "x", "answer2": "y",
                   "answer3": "z", "label": 3}),
    "winogrande": ("allenai/winogrande", "winogrande_l", "validation",
                   {"sentence": "_ ran.", "option1": "He", "option2": "She", "answer": "2"}),
    "hellaswag": ("Rowan/hellaswag", None, "validation",
                  {"ctx": "He", "ctx_a": "x", "endings": list("abcd"), "label": "3"}),
    "wmt16-en-ro": ("wmt/wmt16", "ro-en", "test", {"translation": {"en": "Hi {x}.", "ro": "Salut."}}),
    "wmt16-ro-en": ("wmt/wmt16", "ro-en", "test", {"translation": {"en": "Hi.", "ro": "Salut."}}),
    "wmt16-en-cs": ("wmt/wmt16", "cs-en", "test", {"translation": {"cs": "Ahoj.", "en": "Hi."}}),
    "wmt16-en-fi": ("wmt/wmt16", "fi-en", "test", {"translation": {"en": "Hi.", "fi": "Hei."}}),
    "wmt14-hi-en": ("wmt/wmt14", "hi-en", "test", {"translation": {"en": "Hi.", "hi": "नमस्ते।"}}),
    "iwslt2017-en-nl": ("IWSLT/iwslt2017", "iwslt2017-en-nl", "test", {"translation": {"en": "Hi.", "nl": "Hoi."}}),
    "iwslt2017-ro-nl": ("IWSLT/iwslt2017", "iwslt2017-ro-nl", "test", {"translation": {"ro": "Salut.", "nl": "Hoi."}}),
}  # fmt: skip


def write(path, lines, newline="\n", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(line) + newline for line in lines).encode(encoding))


def write_task(root, name, train=20, dev=7, **options):
    """Files of `train` and `dev` rows, each row with its number in the text."""
    task, line = TASKS[name], EXAMPLES[name][0]
    header = HEADERS[name] or task.file_header
    position = header.index(task.file_columns.get(task.columns[0], task.columns[0]))
    for file, count in (("train.tsv", train), (task.dev_file, dev)):
        rows = [[*line[:position], f"{file} {i}", *line[position + 1 :]] for i in range(count)]
        write(root / task.folder / file, ([HEADERS[name]] if HEADERS[name] else []) + rows, **options)


@pytest.mark.parametrize("name", TASKS)
def test_a_line_of_the_file_becomes_source_and_target(name, tmp_path):
    task, (line, source, target) = TASKS[name], EXAMPLES[name]
    for file in ("train.tsv", task.dev_file):
        write(tmp_path / task.folder / file, ([HEADERS[name]] if HEADERS[name] else []) + [line] * 2)
    data = load_task(task, str(tmp_path), seed=0)
    assert data.dev[1] == {"source": source, "target": target}
    assert data.train.column_names == ["source", "target"]


@pytest.mark.parametrize("name", TASKS)
def test_every_target_parses_to_its_class(name):
    task = TASKS[name]
    assert set(task.metrics) <= set(METRICS)
    assert bool(task.labels) == (task.kind == "classes")
    for index, text in enumerate(task.labels):
        assert task.target({"label": index}) == text
        assert task.parse(f" {text}\n") == index
    if task.labels:
        assert task.parse("maybe") == task.parse("") == task.parse("0 1") == -1


def test_scores_are_rounded_to_a_fifth_and_parse_within_the_scale():
    stsb = TASKS["stsb"]
    assert [stsb.target({"label": x}) for x in (0, 0.25, 3.75, 3.8, 4.917, 5.0)] == [
        "0.0",
        "0.2",
        "3.8",
        "3.8",
        "5.0",
        "5.0",
    ]
    assert [stsb.parse(text) for text in ("3.8", " 0 ", "5.0")] == [3.8, 0, 5]
    assert all(math.isnan(stsb.parse(text)) for text in ("5.2", "-0.2", "four", "", "nan", "inf", "1 2"))


@pytest.mark.parametrize("text", ["Salut.", "0", "", "a  b"])
def test_a_translation_parses_to_itself(text):
    task = TASKS["wmt16-en-ro"]
    assert task.parse(f" {text}\n") == task.target({"label": f"{text} "}) == text


def test_headline_metrics():
    headline = {name: task.metrics[0] for name, task in TASKS.items()}
    translations = dict.fromkeys([name for name in TASKS if name.startswith(("wmt", "iwslt"))], "bleu")
    assert len(translations) == 7
    assert headline == dict.fromkeys(TASKS, "accuracy") | {"cola": "matthews", "stsb": "pearson"} | translations


def test_task_names_are_found_in_any_case():
    assert get_task("CoLA") is TASKS["cola"]
    with pytest.raises(
        ValueError, match=r"'imdb2' is not known: did you mean imdb\? It must be one of cola, .* or a .yaml"
    ):
        get_task("imdb2")


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "rte", "wnli"])
def test_small_task_halves_its_development_set(name, tmp_path):
    write_task(tmp_path, name, train=20, dev=7)
    data = load_task(TASKS[name], str(tmp_path), seed=1)
    assert [len(getattr(data, split)) for split in SPLITS] == [20, 3, 4, 7]
    assert data.dev_is_split
    assert sorted([*data.validation["source"], *data.test["source"]]) == sorted(data.dev["source"])


@pytest.mark.parametrize("name", ["sst2", "qqp", "mnli", "qnli", "sentiment"])
@pytest.mark.parametrize(("train", "validation"), [(5, 1), (57, 5), (11_000, 1000)])
def test_large_task_takes_validation_from_training(name, train, validation, tmp_path):
    write_task(tmp_path, name, train=train, dev=7)
    data = load_task(TASKS[name], str(tmp_path), seed=1)
    assert [len(getattr(data, split)) for split in SPLITS] == [train - validation, validation, 7, 7]
    assert not data.dev_is_split
    assert data.test["source"] == data.dev["source"]
    sources = [*data.train["source"], *data.validation["source"]]
    assert len(set(sources)) == train
    assert all("train.tsv" in source for source in sources)


@pytest.mark.parametrize(("name", "split"), [("cola", "test"), ("sst2", "train")])
def test_the_seed_makes_the_split(name, split, tmp_path):
    write_task(tmp_path, name, train=100, dev=20)
    first, again, other = (getattr(load_task(TASKS[name], str(tmp_path), seed), split)["source"] for seed in (3, 3, 4))
    assert list(first) == list(again) != list(other)


def test_the_task_folder_itself_may_be_given(tmp_path):
    write_task(tmp_path, "sst2")
    inside, outside = (load_task(TASKS["sst2"], str(p), seed=0) for p in (tmp_path / "SST-2", tmp_path))
    assert list(inside.train["source"]) == list(outside.train["source"])


def test_windows_files_and_odd_characters_are_read_whole(tmp_path):
    write_task(tmp_path, "mrpc", newline="\r\n", encoding="utf-8-sig")
    text = 'one\u2028two\x85three "quoted'
    write(tmp_path / "MRPC/dev.tsv", [HEADERS["mrpc"], ["0", "", "", text, "b"], ["1", "", "", "c", "d"]])
    data = load_task(TASKS["mrpc"], str(tmp_path), seed=0)
    assert len(data.train) == 20
    assert data.dev["source"][0] == f"mrpc sentence1: {text} sentence2: b"


def expect_error(message, name, data_dir):
    with pytest.raises(ValueError, match=message) as caught:
        load_task(TASKS[name], data_dir and str(data_dir), seed=0)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files(tmp_path):
    expect_error("data_dir must be a folder; .*nowhere is none", "cola", tmp_path / "nowhere")
    expect_error("must hold the folder CoLA .* holds nothing", "cola", tmp_path)
    write_task(tmp_path, "sst2")
    (tmp_path / "RTE").mkdir()
    expect_error("must hold the folder CoLA of task cola; .* holds RTE, SST-2", "cola", tmp_path)
    expect_error(r"task rte needs the file .*RTE/train.tsv, .*No such file", "rte", tmp_path)
    (tmp_path / "SST-2/dev.tsv").unlink()
    expect_error(r"task sst2 needs the file .*SST-2/dev.tsv", "sst2", tmp_path)


SST2 = ["sentence", "label"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("sst2", [], r"train.tsv must have rows; it has none"),
        ("sst2", [SST2], r"train.tsv must have rows; it has none"),
        ("cola", [], r"train.tsv must have rows; it has none"),
        ("sst2", [["text", "label"], ["a", "1"]], r"train.tsv:1: the header must have sentence; got text, label"),
        ("mrpc", [["Quality", "sentence1"], ["1", "a"]], r"train.tsv:1: .* must have #1 String, #2 String; got"),
        ("sst2", [SST2, ["a", "1"], ["b"], ["c", "1"], ["d", "e", "0"]], r"v:3: .*2 ta.*; got 1 \(so also lines 5\)"),
        ("sst2", [SST2, ["a", "1"], [""], ["c", "1"]], r"tsv:3: a line must have 2 tab-separated columns; got 1\."),
        ("cola", [["x", "1", "", "a"], ["y", "1", "b"]], r"tsv:2: a line must have 4 tab-separated columns; got 3"),
        ("sst2", [SST2, ["a", "1"], ["b", "2"]], r"train.tsv:3: the label must be one of 0, 1; got '2'"),
        ("cola", [["source", "label", "star", "sentence"]], r"train.tsv:1: the label must be one of 0, 1; got 'label'"),
        ("qnli", [HEADERS["qnli"], ["0", "a", "b", "1"]], r"tsv:2: .*one of entailment, not_entailment; got '1'"),
        ("stsb", [HEADERS["stsb"], ["0", "", "", "a", "b", "x"]], r"tsv:2: the score must be .* 0 to 5; got 'x'"),
        ("stsb", [HEADERS["stsb"], ["0", "", "", "a", "b", "5.1"]], r"tsv:2: the score must be .* 0 to 5; got '5.1'"),
        ("sst2", [SST2, ["a", "1"]], r"sst2 must have 2 training rows or more.*; got 1"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_line(name, lines, message, tmp_path):
    write_task(tmp_path, name)
    write(tmp_path / TASKS[name].folder / "train.tsv", lines)
    expect_error(message, name, tmp_path)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    write_task(tmp_path, "sst2")
    write(tmp_path / "SST-2/train.tsv", [SST2, ["café", "1"]], encoding="latin-1")
    expect_error(r"train.tsv must be UTF-8 text; byte 18 is not", "sst2", tmp_path)


def test_one_row_cannot_be_halved(tmp_path):
    write_task(tmp_path, "rte", dev=1)
    expect_error("rte must have 2 development rows or more.*; got 1", "rte", tmp_path)


def test_without_the_hub_a_folder_is_asked_for():
    expect_error(
        r"nyu-mll/glue \(cola\) could not be loaded.*CoLA/train.tsv.*--data_dir", "cola", None
    )  # tests are offline
    expect_error("sentiment is not on the hub: .*sentiment/ with --data_dir", "sentiment", None)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub_is_script])
def test_a_dataset_that_is_a_script_is_said_to_be_one(name):
    hub = HUB_ROWS[name][0]
    expect_error(rf"{hub}.* could not .*a loading script there, which.*{name}/train.tsv.*--data_dir", name, None)


def serve_hub(monkeypatch, train, dev, features=None):
    """Have the hub answer with these rows; the list that is returned fills with what it is asked for."""
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, *split))
        parts = [datasets.Dataset.from_list(rows, features=features) for rows in (train, dev)]
        return parts[: len(split)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub])
def test_a_row_of_the_hub_becomes_source_and_target(name, monkeypatch):
    hub, config, dev_split, row = HUB_ROWS[name]
    asked = serve_hub(monkeypatch, [row] * 10, [row] * 4)
    data = load_task(TASKS[name], None, seed=0)
    assert asked == [(hub, config, "train", dev_split)]
    _, source, target = EXAMPLES[name]
    assert data.dev[2] == data.train[0] == {"source": source, "target": target}
    assert [len(getattr(data, split)) for split in SPLITS] == ([10, 2, 2, 4] if TASKS[name].is_small else [9, 1, 4, 4])


@pytest.mark.parametrize(
    ("name", "words"), [("scitail", ["entailment", "neutral"]), ("commonsense_qa", "ABCDE"), ("social_i_qa", "123")]
)
def test_label_words_of_the_hub_become_the_index(name, words, monkeypatch):
    *_, row = HUB_ROWS[name]
    column = TASKS[name].hub_columns.get("label", "label")
    serve_hub(monkeypatch, [row] * 10, [row | {column: word} for word in words])
    assert list(load_task(TASKS[name], None, seed=0).dev["target"]) == [str(i) for i in range(len(words))]


def test_rows_without_a_label_are_left_out_and_counted(monkeypatch, tmp_path, caplog):
    row = {"premise": "A.", "hypothesis": "B."}
    labels = [0, -1, 2, 1, -1, -1]
    serve_hub(monkeypatch, [row | {"label": label} for label in labels], [row | {"label": 1}] * 2)
    with caplog.at_level(logging.WARNING):
        data = load_task(TASKS["snli"], None, seed=0)
    assert sorted([*data.train["target"], *data.validation["target"]]) == ["0", "1", "2"]
    assert caplog.messages == ["task snli: 3 of 6 rows have no label and are left out"]
    write_task(tmp_path, "snli")
    write(tmp_path / "snli/dev.tsv", [HEADERS["snli"], ["A.", "B.", "-1"], ["A.", "B.", "0"]])
    assert list(load_task(TASKS["snli"], str(tmp_path), seed=0).test["target"]) == ["0"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cb", {"label": -1}, r"super_glue \(cb\), row 1 of validation: the label must be one of 0, 1, 2; got '-1'"),
        ("cb", {"premise": None}, r"super_glue \(cb\), row 1 of validation: column premise must be text; got None"),
        ("scitail", {"gold_label": "maybe"}, r"row 1 of test: the label must be one of entailment, neutral; got 'ma"),
        (
            "hellaswag",
            {"endings": ["a"]},
            r"hellaswag, row 1 of val.*: the row must have endings.1; got ctx, ctx_a, en",
        ),
        ("wmt16-en-ro", {"translation": {"en": "Hi.", "ro": None}}, r"row 1 of test: the label must be text; got None"),
        ("stsb", {"label": -1.0}, r"row 1 of validation: the score must be a number from 0 to 5; got '-1.0'"),
    ],
)
def test_a_bad_row_of_the_hub_is_named(name, change, message, monkeypatch):
    *_, row = HUB_ROWS[name]
    serve_hub(monkeypatch, [row] * 10, [row, row | change])
    expect_error(message, name, None)


def test_a_column_that_the_hub_lacks_is_named(monkeypatch):
    serve_hub(monkeypatch, [{"text": "a", "label": 1}] * 3, [{"text": "a", "label": 1}] * 3)
    expect_error(r"glue \(sst2\), row 0 of train: the row must have sentence; got text, label", "sst2", None)


def test_a_row_without_a_label_is_refused():
    with pytest.raises(ValueError, match=r"label of task cola must be in 0..1; got -1"):
        TASKS["cola"].target({"label": -1})


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "validation", "test", "dev"),
    [
        ("cola", 8551, 521, 522, 1043),
        ("sst2", 66349, 1000, 872, 872),
        ("mrpc", 3668, 204, 204, 408),
        ("stsb", 5749, 750, 750, 1500),
        ("qnli", None, None, 5463, 5463),
    ],
)
def test_real_glue_files_are_read_whole(name, train, validation, test, dev):
    if not (GLUE / TASKS[name].folder).is_dir():
        pytest.skip(f"no GLUE files of {name} in {GLUE}; MPOE_GLUE_DIR names another folder")
    data = load_task(TASKS[name], str(GLUE), seed=0)
    assert (len(data.test), len(data.dev)) == (test, dev)
    if train is not None:  # QNLI's training file may be a subset
        assert (len(data.train), len(data.validation)) == (train, validation)
    parsed = {TASKS[name].parse(target) for target in data.train["target"]}
    assert len(parsed) == (26 if name == "stsb" else 2)
    assert not parsed & {-1}
