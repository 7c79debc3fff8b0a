import pytest

from mpoe.files import brief, fits, load_json, load_yaml, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "half of a surrogate pair"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_what_is_no_json_is_a_value_error(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_json(text)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"a.json must be the JSON file that mpoe wrote.*{message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing"),
        ("- " * 3000, "nested too deeply"),
        ("!!int ''", "not what its tag"),
        ("!!bool maybe", "not what its tag"),
        ("!!timestamp x", "not what its tag"),
        ('"\\uD800"', "half of a surrogate pair"),
    ],
)
def test_what_is_no_yaml_is_a_value_error_of_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value)


def test_characters_beyond_16_bits_may_be_escaped():
    assert load_json('"\\ud83d\\ude00"') == load_yaml('"\\U0001F600"') == "\N{GRINNING FACE}"


def test_a_value_that_is_shown_stays_short():
    bomb = load_yaml("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c, *c, *c]\n")
    assert len(brief(bomb)) < 3000
    assert len(brief("x" * 10_000)) < 300
    assert brief(["good", 1]) == "['good', 1]"


def test_types_of_json_values():
    assert fits({"a": [1, 2.5]}, dict[str, list[float]])
    assert fits(None, int | None)
    assert not fits(True, int)
    assert not fits(1.5, int)
    assert not fits({"a": "b"}, dict[str, float])
    assert not fits([1], dict[str, float])
