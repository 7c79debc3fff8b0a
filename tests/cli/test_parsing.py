"""What a command line gives, whatever its defaults are."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from mpoe.cli.parsing import parse, without_defaults


@dataclass
class Arguments:
    name: str = field(metadata={"help": "A name."})
    count: int = field(default=8, metadata={"help": "A count."})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Sizes."})
    rate: float | None = field(default=None, metadata={"help": "A rate."})
    fast: bool = field(default=True, metadata={"help": "Whether."})
    slow: bool = field(default=False, metadata={"help": "Whether."})
    kind: Literal["flat", "deep"] = field(default="flat", metadata={"help": "A kind."})


def read(*argv):
    (arguments,), given = parse("mpoe test", "A test.", (Arguments,), ["--name", "n", *argv])
    assert given.pop("name") == "n"
    assert all(getattr(arguments, name) == value for name, value in given.items())
    return arguments, given


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {}),
        (["--count", "8"], {"count": 8}),
        (["--count=9"], {"count": 9}),
        (["--sizes", "1", "2"], {"sizes": [1, 2]}),
        (["--rate", "1e-4"], {"rate": 1e-4}),
        (["--fast"], {"fast": True}),
        (["--no_fast", "--slow"], {"fast": False, "slow": True}),
        (["--slow", "False"], {"slow": False}),
    ],
)
def test_flags_that_say_the_default_are_given_too(argv, given):
    assert read(*argv) == (Arguments("n", **given), given)
    assert read(*argv)[1].keys() == given.keys()


def test_so_are_a_config_files_keys(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"name": "n", "count": 8, "rate": None, "slow": True, "sizes": 3}))
    (arguments,), given = parse("mpoe test", "A test.", (Arguments,), [str(path), "--slow", "False", "--fast"])
    assert given == {"name": "n", "count": 8, "rate": None, "slow": False, "sizes": [3], "fast": True}
    assert arguments == Arguments(**given)
    assert without_defaults((Arguments,), given) == {"name": "n", "sizes": [3]}


def test_help_keeps_the_defaults(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--count N A count. (default: 8)" in printed
    assert "--fast [true|false] Whether. --no_fast is false. (default: True)" in printed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "count must be what --count takes; got 1.5"),
        ({"count": True}, "count must be what --count takes; got True"),
        ({"slow": 3}, "slow must be what --slow takes; got 3"),
        ({"sizes": [1, "x"]}, r"sizes must be what --sizes takes; got \[1, 'x'\]"),
        ({"rate": {"a": 1}}, "rate must be what --rate takes"),
        ({"kind": "round"}, "kind must be what --kind takes; got 'round'"),
        ({"nothing": 1}, r"unknown config key 'nothing'"),
    ],
)
def test_a_config_files_values_are_read_as_flags_are(values, message, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"name": "n", **values}))
    with pytest.raises(ValueError, match=f"run.json: {message}"):
        parse("mpoe test", "A test.", (Arguments,), [str(path)])


def test_a_null_leaves_a_flag_out_that_cannot_be_none(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: 5\ncount: null\nkind: null\n")
    (arguments,), given = parse("mpoe test", "A test.", (Arguments,), [str(path)])
    assert arguments == Arguments("5")
    assert given == {"name": "5"}
    path.write_text("name: null\n")
    with pytest.raises(ValueError, match="required: --name"):
        parse("mpoe test", "A test.", (Arguments,), [str(path)])
