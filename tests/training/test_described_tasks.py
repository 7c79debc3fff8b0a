"""Tasks that a YAML file describes: their files in every format, rows of the hub, and what is said of wrong ones."""

import csv
import json

import datasets
import pytest
import yaml

from mpoe.training.tasks import get_task, load_task

SPLITS = ("train", "validation", "test", "dev")
TICKETS = """
name: support-tickets
template: "ticket: {subject} body: {body}"
labels: [billing, technical, other]
label: category
metrics: [accuracy]
train: tickets/train.csv
dev: tickets/dev.csv
"""
COLUMNS = ["id", "subject", "body", "category"]
ROWS = [
    {"id": "1", "subject": 'Bill, of "May"', "body": "Too\nhigh.", "category": "billing"},
    {"id": "2", "subject": "It {crashes}", "body": "", "category": "technical"},
    {"id": "3", "subject": " Hello ", "body": "Bye\u2028now", "category": "other"},
]


def describe(folder, text=TICKETS, **changes):
    """Write a task's YAML file; a change to None takes the key out."""
    values = {key: value for key, value in (yaml.safe_load(text) | changes).items() if value is not None}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_rows(path, rows=ROWS, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        elif path.suffix == ".tsv":
            file.writelines("\t".join(line) + "\n" for line in [columns, *(list(row.values()) for row in rows)])
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_tickets(folder, suffix=".csv", train=20, dev=5):
    for name, count in (("train", train), ("dev", dev)):
        rows = [{"id": i, "subject": f"{name} {i}", "body": "b", "category": "other"} for i in range(count)]
        write_rows(folder / "tickets" / f"{name}{suffix}", [{k: str(v) for k, v in row.items()} for row in rows])


def load(path, data_dir=None, seed=0):
    return load_task(get_task(str(path)), data_dir and str(data_dir), seed)


def expect_error(message, path, data_dir=None):
    with pytest.raises(ValueError, match=message) as caught:
        load(path, data_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_of_every_format_become_source_and_target(suffix, tmp_path):
    rows = ROWS if suffix != ".tsv" else [ROWS[0] | {"body": "Too high."}, *ROWS[1:]]
    write_rows(tmp_path / f"train{suffix}", rows)
    write_rows(tmp_path / f"dev{suffix}", rows)
    data = load(describe(tmp_path, train=f"train{suffix}", dev=f"dev{suffix}"))
    assert data.dev["source"][:] == [
        f'ticket: Bill, of "May" body: {rows[0]["body"]}',
        "ticket: It {crashes} body: ",
        "ticket: Hello body: Bye\u2028now",
    ]
    assert data.dev["target"][:] == ["billing", "technical", "other"]


def test_the_task_is_as_described(tmp_path):
    task = get_task(str(describe(tmp_path)))
    assert (task.name, task.metrics, task.columns) == ("support-tickets", ("accuracy",), ("subject", "body"))
    assert [task.parse(text) for text in ("billing", " other\n", "Other", "0", "")] == [0, 2, -1, -1, -1]
    (tmp_path / "task.yaml").rename(tmp_path / "task.YML")
    assert get_task(str(tmp_path / "task.YML")).labels == ("billing", "technical", "other")


def test_with_a_development_file_it_is_the_test_set(tmp_path):
    write_tickets(tmp_path, train=57, dev=5)
    data = load(describe(tmp_path))
    assert [len(getattr(data, split)) for split in SPLITS] == [52, 5, 5, 5]
    assert not data.dev_is_split
    assert all("dev" in source for source in data.test["source"])


@pytest.mark.parametrize(("rows", "drawn"), [(3, 1), (19, 1), (57, 5), (100, 10)])
def test_without_a_development_file_tenths_are_drawn(rows, drawn, tmp_path):
    write_tickets(tmp_path, train=rows)
    path = describe(tmp_path, dev=None)
    data, again, other = (load(path, seed=seed) for seed in (1, 1, 2))
    assert [len(rows) for rows in (data.train, data.validation, data.test)] == [rows - 2 * drawn, drawn, drawn]
    assert data.dev is None
    assert not data.dev_is_split
    assert len({*data.train["source"], *data.validation["source"], *data.test["source"]}) == rows
    assert data.train["source"][:] == again.train["source"][:]
    assert data.test["source"][:] == again.test["source"][:]
    assert rows == 3 or data.test["source"][:] != other.test["source"][:]


def test_too_few_rows_to_draw_from(tmp_path):
    write_tickets(tmp_path, train=2)
    expect_error(
        "support-tickets must have 3 training rows or more, to split them; got 2", describe(tmp_path, dev=None)
    )


def test_free_text_and_scores(tmp_path):
    rows = [{"id": "1", "subject": "a", "body": "b", "category": " eins zwei "}] * 4
    write_rows(tmp_path / "tickets/train.csv", rows)
    path = describe(tmp_path, labels=None, metrics=["bleu"], dev=None)
    assert (get_task(str(path)).kind, load(path).train["target"][:]) == ("text", ["eins zwei"] * 2)
    write_rows(tmp_path / "tickets/train.csv", [row | {"category": "3.75"} for row in rows])
    path = describe(tmp_path, labels=None, kind="score", metrics=["spearman", "pearson"], dev=None)
    assert load(path).train["target"][:] == ["3.8"] * 2
    write_rows(tmp_path / "tickets/train.csv", [row | {"category": "6"} for row in rows])
    expect_error(r"train.csv:2: the score must be a number from 0 to 5; got '6'", path)


def test_json_labels_may_be_numbers_and_deep_inside(tmp_path):
    rows = [{"subject": "a", "body": "b", "answer": {"stars": [i]}} for i in (1, 2, 1, 2)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "dev.jsonl", rows)
    changes = {"train": "train.jsonl", "dev": "dev.jsonl", "label": "answer.stars.0", "labels": ["1", "2"]}
    assert load(describe(tmp_path, **changes)).dev["target"][:] == ["1", "2", "1", "2"]


def test_files_beside_the_description_go_before_those_of_the_data_dir(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_tickets(there, train=10, dev=5)
    path = describe(here)
    assert len(load(path, there).test) == 5
    write_tickets(here, train=10, dev=3)
    assert len(load(path, there).test) == 3
    (here / "tickets/dev.csv").unlink()
    assert len(load(path, there).test) == 5
    (there / "tickets/dev.csv").unlink()
    expect_error(
        r"needs the file tickets/dev.csv, but .*here/tickets/dev.csv and no .*there/tickets/dev.csv. Corr", path, there
    )
    expect_error(r"no .*here/tickets/dev.csv\. Correct .*task.yaml or name the folder with --data_dir", path)
    expect_error(r"data_dir must be a folder; .*nowhere is none", path, tmp_path / "nowhere")


def serve_hub(monkeypatch, rows, label=None):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, *split))
        part = datasets.Dataset.from_list(rows)
        return [part if label is None else part.cast_column(*label)] * len(split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


HUB = {"train": None, "dev": None, "hub": "me/tickets"}


def test_rows_of_the_hub(tmp_path, monkeypatch):
    asked = serve_hub(monkeypatch, ROWS)
    data = load(describe(tmp_path, **HUB))
    assert [len(rows) for rows in (data.train, data.validation, data.test)] == [1, 1, 1]
    data = load(describe(tmp_path, **HUB | {"config": "small", "dev": "held_out"}))
    assert data.test["target"][:] == ["billing", "technical", "other"]
    assert asked == [("me/tickets", None, "train"), ("me/tickets", "small", "train", "held_out")]


def test_label_indices_of_the_hub_stand_for_its_names(tmp_path, monkeypatch):
    # Index 1 is the name "2": the names count, not the digits.
    feature = datasets.ClassLabel(names=["1", "2", "3"])
    serve_hub(monkeypatch, [row | {"category": i} for i, row in enumerate(ROWS)], ("category", feature))
    path = describe(tmp_path, **HUB | {"dev": "test", "labels": ["3", "1", "2"]})
    assert load(path).test["target"][:] == ["1", "2", "3"]
    expect_error("row 2 of train: .* one of 1, 2; got '3'", describe(tmp_path, **HUB | {"labels": ["1", "2"]}))


def test_a_description_of_a_hub_dataset_without_the_hub(tmp_path):  # tests are offline
    path = describe(tmp_path, **HUB)
    expect_error(r"dataset me/tickets could not be loaded from the hub: .*Correct hub, config and dev in .*task", path)
    expect_error(r"reads me/tickets from the hub, as .*task.yaml says; drop --data_dir", path, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values that describe a task; got NoneType"),
        ("- name\n", "must hold keys and values .*; got list"),
        ("name: [\n", "must be a readable YAML file that describes a task: while parsing"),
        ("name: \x00\n", "must be a readable YAML file that describes a task: unacceptable"),
        ("labels: 2020-13-45\n", "must be a readable YAML file"),
    ],
)
def test_an_unreadable_description(text, message, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    expect_error(f"task.yaml {message}", path)


def test_a_missing_description(tmp_path):
    expect_error(
        "nowhere.yml must be a readable YAML file that describes a task: No such file", tmp_path / "nowhere.yml"
    )
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    expect_error("latin.yaml must be a readable YAML file that describes a task: 'utf-8'", tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "keys must be among name, template, .*; got colour"),
        ({"name": None}, "name must be given; got .*metrics"),
        ({"template": None}, "template must be given"),
        ({"metrics": None}, "metrics must be given"),
        ({"name": 7}, "name must be text; got 7"),
        ({"name": "a b"}, r"name must be of letters, digits and _.- only; got 'a b'"),
        ({"train": ["a.csv"]}, r"train must be text; got \['a.csv'\]"),
        ({"label": ""}, "label must be text; got ''"),
        ({"template": "a {subject"}, "template must have balanced braces; got 'a {subject'"),
        ({"template": "a subject}"}, "template must have balanced braces"),
        ({"template": "a {subject[0}"}, "template must have balanced braces"),
        ({"template": "a subject"}, "template must have a column's name in braces"),
        ({"template": "{subject.y.__class__}"}, "template must have nothing but columns' names in braces; got"),
        ({"template": "{subject[0]}"}, "template must have nothing but columns' names"),
        ({"template": "{subject!r}"}, "template must have nothing but columns' names"),
        ({"template": "{subject:>9}"}, "template must have nothing but columns' names"),
        ({"template": "{subject:{body}}"}, "template must have nothing but columns' names"),
        ({"template": "{}"}, "template must have nothing but columns' names"),
        ({"template": "{subject} {category}"}, "template must not show the answer; got {category}"),
        ({"template": "{subject} {label}"}, "template must not show the answer; got {label}"),
        ({"labels": "billing"}, "labels must be a list of 2 or more different texts; got 'billing'"),
        ({"labels": ["billing"]}, "labels must be a list of 2 or more different texts"),
        ({"labels": []}, "labels must be a list of 2 or more different texts"),
        ({"labels": [True, False]}, r"labels must be a list .*; got \[True, False\]. .* yes, no, .* quotation marks"),
        ({"labels": ["a", "a "]}, "labels must be a list of 2 or more different texts"),
        ({"labels": ["a", " "]}, "labels must be a list of 2 or more different texts"),
        ({"metrics": "accuracy"}, "metrics must be a list of 1 or more different texts; got 'accuracy'"),
        ({"metrics": []}, "metrics must be a list of 1 or more"),
        ({"metrics": ["rouge"]}, "metrics of 3 classes must be among accuracy, matthews; got rouge"),
        ({"metrics": ["accuracy", "f1"]}, "metrics of 3 classes must be among accuracy, matthews; got f1"),
        ({"labels": None}, "metrics of answers of kind text must be among bleu; got accuracy"),
        ({"labels": None, "kind": "score"}, "metrics of answers of kind score must be among pearson, spearman; got"),
        ({"labels": None, "kind": "classes"}, "kind must be text or score without labels; got 'classes'"),
        ({"kind": "score"}, "kind must be classes with labels; got 'score'"),
        ({"train": None}, "must give either train, a file, or hub, a dataset; got neither"),
        ({"hub": "me/tickets"}, "must give either train, a file, or hub, a dataset; got both"),
        ({"config": "small"}, "config must come with hub; got 'small' without it"),
        ({"train": "train.txt"}, r"train must be a file in .csv, .tsv, .jsonl; got 'train.txt'"),
        ({"dev": "dev"}, r"dev must be a file in .csv, .tsv, .jsonl; got 'dev'"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_named_with_the_key(changes, message, tmp_path):
    expect_error(f"task.yaml: {message}", describe(tmp_path, **changes))


def test_braces_of_the_text_and_any_column_name(tmp_path):
    path = describe(tmp_path, template="{{x}} {0} {subject line}{0}")
    assert get_task(str(path)).columns == ("0", "subject line")
    assert get_task(str(path)).source({"0": "{0}", "subject line": "s"}) == "{x} {0} s{0}"


HEAD, GOOD = "id,subject,body,category\n", "1,a,b,other\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.csv", "", "a.csv must have rows; it has none"),
        ("a.csv", HEAD + "\n", "a.csv must have rows; it has none"),
        ("a.csv", "id,subject,category\n" + GOOD, "a.csv:1: the header must have body; got id, subject, category"),
        ("a.csv", '"subject\nline",body\na,b\n', "a.csv:1: the header must have subject, category; got subject line"),
        ("a.csv", f"{HEAD}{GOOD}\n{GOOD}", r"csv:3: a line must have 4 comma-separated columns; got 0\."),
        ("a.csv", f'{HEAD}1,a,"b\nc",other\n1,a,b\n{GOOD}1\n', r"csv:4: .*; got 3 \(so also lines 6\)"),
        ("a.csv", f'{HEAD}1,a,"b\nc",other\n{GOOD}1,"a"b,c,other\n', "csv:5: the row must be comma-separated values"),
        ("a.csv", f'{HEAD}1,a,"b,other\n', "csv:2: the row must be comma-separated values; unexpected end"),
        ("a.csv", f"{HEAD}{GOOD}1,a,b,Other\n", "csv:3: the label must be one of billing, .*; got 'Other'"),
        ("a.tsv", "subject\tbody\tcategory\na\tb\tother\na\tb\n", "tsv:3: a line must have 3 tab-separated columns"),
        ("a.jsonl", "\n", "a.jsonl must have rows; it has none"),
        ("a.jsonl", '{"subject": "a", "body": "b", "category": "other"}\n{"a"\n', "jsonl:2: .* a JSON object; Expect"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: the line must be a JSON object; got list"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: the line must be a JSON object; it is nested too deeply"),
        ("a.jsonl", '{"subject": "\\ud800", "body": "b", "category": "other"}\n', "jsonl:1: .* surrogate pair"),
        ("a.csv", f"{HEAD}{GOOD}1,a,b,{'x' * 9000}\n", "csv:3: the label must be one of billing, .*; got .{,300}$"),
        ("a.jsonl", f'{{"{"x" * 9000}": 1}}\n', "jsonl:1: the row must have .*; got x{100}[.]+ Correct the row"),
        ("a.jsonl", '{"subject": "a", "body": "b"}\n', "jsonl:1: the row must have category; got subject, body"),
        ("a.jsonl", '{"subject": 3, "body": "b", "category": "other"}\n', "jsonl:1: column subject must be text.* 3"),
        ("a.jsonl", '{"subject": "a", "body": "b", "category": null}\n', "jsonl:1: the label must be .*; got 'None'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_line(file, text, message, tmp_path):
    write_tickets(tmp_path)
    (tmp_path / "tickets" / file).write_text(text)
    expect_error(message, describe(tmp_path, train=f"tickets/{file}"))


def test_a_file_in_another_encoding_is_refused(tmp_path):
    write_tickets(tmp_path)
    (tmp_path / "tickets/dev.csv").write_bytes("id,subject,body,category\n1,café,b,other\n".encode("latin-1"))
    expect_error("dev.csv must be UTF-8 text; byte 30 is not", describe(tmp_path))
