import errno

import pytest

from mpoe.files import brief, fits, load_json, load_yaml, new_folder, read_json


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


def test_a_new_folder_appears_when_all_of_it_is_there(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [file.name for file in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "a"
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "b").write_text("b")
    assert (tmp_path / "empty" / "b").read_text() == "b"


def write_and_break_off(path, error):
    with new_folder(path) as folder:
        (folder / "a").write_text("a")
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_a_folder_that_breaks_off_is_deleted(tmp_path, error):
    with pytest.raises(type(error)):
        write_and_break_off(tmp_path / "out", error)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="out must have room"):
        write_and_break_off(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    assert not any(tmp_path.iterdir())


def test_a_new_folder_takes_no_place_of_something_else(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="must be new or an empty folder"), new_folder(path):
            pass
    with pytest.raises(ValueError, match="file is none"), new_folder(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "x"
