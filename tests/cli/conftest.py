import pytest

from tiny import tiny_t5, tiny_tokenizer, write_cola, write_sentiment


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with a model and data, and the working directory of a test."""
    monkeypatch.chdir(tmp_path)
    tiny_t5().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_cola(write_sentiment(tmp_path / "data"))
    return tmp_path
