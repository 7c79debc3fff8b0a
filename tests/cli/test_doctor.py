"""`mpoe doctor` where all is well, and on machines that have less than this one."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from packaging.requirements import Requirement

from mpoe.cli import checks, doctor
from mpoe.cli.main import main

PROBE = {
    "libraries": dict.fromkeys(("torch", "transformers", "datasets", "accelerate", "mpoe")),
    "machine": "x86_64", "threads": 64, "mkl": True, "cuda_build": None, "accelerator": None, "gpus": [],
    "triton": None, "gflops": {"float32": 100.0, "bfloat16": 400.0, "float16": 1.0},
}  # fmt: skip
GPU = {"name": "NVIDIA H100", "free": 70 * 2**30, "total": 80 * 2**30, "bf16": True}


@pytest.fixture
def found(monkeypatch):
    """Checks by name, with a probe that says what a test wants, and without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    def run(capsys, status=0, **changes):
        monkeypatch.setattr(doctor, "_probe", lambda timeout: ({**PROBE, **changes}, None))
        if status:
            with pytest.raises(SystemExit, match=str(status)):
                main(["doctor", "--json"])
        else:
            assert main(["doctor", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["usable"] == (status == 0)
        return {check["name"]: check for check in printed["checks"]}

    return run


@pytest.fixture(scope="module")
def probed():
    """What is true of this machine."""
    return doctor._probe(timeout=300)


def test_this_machine(probed, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_probe", lambda timeout: probed)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("Versions", "Devices", "Folders", "Network", "Optional packages", "mpoe can work here."):
        assert text in printed
    assert importlib.metadata.version("transformers") in printed
    assert "not asked, because HF_HUB_OFFLINE is set" in printed


def test_the_probe_measures_this_machine(probed):
    probe, failure = probed
    assert failure is None
    assert set(probe["libraries"].values()) == {None}
    assert probe["gflops"]["float32"] > 0
    assert probe["threads"] >= 1


def test_what_a_process_that_dies_or_hangs_says(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "raise SystemExit('libtorch.so: cannot open')")
    probe, failure = doctor._probe(timeout=60)
    assert probe == {}
    assert failure.verdict == "broken"
    assert "status 1 and said: libtorch.so: cannot open" in failure.found
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    assert "not done in 0.5 s" in doctor._probe(timeout=0.5)[1].found


def test_a_machine_with_gpus(found, capsys):
    by_name = found(capsys, gpus=[GPU, {**GPU, "bf16": False}], cuda_build="12.8", accelerator="cuda", threads=1)
    assert by_name["GPU 0"]["found"] == "NVIDIA H100, 70.0 of 80.0 GiB free, bf16"
    assert by_name["GPU 1"]["found"].endswith("no bf16 (use --fp16)")
    assert by_name["Triton"]["verdict"] == "ok"
    assert by_name["torch's threads"]["verdict"] == "ok"  # the CPU does not train
    assert "GPU" not in by_name


def test_what_would_be_slow(found, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(checks.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(checks, "memory", lambda: (8 * 2**30, 2**30, ""))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (40.0, 1.0, 1.0))
    by_name = found(capsys, threads=1, mkl=False)
    assert by_name["torch's threads"]["found"] == "1 (OMP_NUM_THREADS=1)"
    assert by_name["memory"]["found"] == "1.0 GiB free of 8.0 GiB"
    for name in ("torch's threads", "torch's MKL", "memory", "load", "GPU"):
        assert by_name[name]["verdict"] == "slow"
        assert by_name[name]["advice"]
    assert by_name["CPU, float16"]["verdict"] == "note"
    assert "--fp16" in by_name["CPU, float16"]["advice"]
    assert by_name["CPU, bfloat16"]["verdict"] == "ok"


def test_libraries_that_are_missing_old_or_broken(found, capsys, monkeypatch):
    wanted = ["torch>=2.11", "transformers>=99", "no-such-package>=1", "peft; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    by_name = found(capsys, status=1, libraries={**PROBE["libraries"], "torch": "OSError: libcudart.so.12"})
    assert by_name["no-such-package"]["found"] == "missing; mpoe needs >=1"
    assert by_name["no-such-package"]["advice"] == "pip install 'no-such-package>=1'"
    assert "import torch fails: OSError: libcudart.so.12" in by_name["torch"]["found"]
    assert by_name["torch"]["verdict"] == "broken"
    assert by_name["transformers"]["verdict"] == "note"
    assert "not within >=99" in by_name["transformers"]["found"]
    assert by_name["peft"]["about"] == "Optional packages"


def test_optional_packages(found, capsys, monkeypatch):
    there = checks._version
    monkeypatch.setattr(checks, "_version", lambda name: None if name == "gguf" else there(name))
    by_name = found(capsys)
    assert by_name["gguf"]["found"] == "not installed; for mpoe fetch smollm2"
    assert by_name["gguf"]["advice"] == "pip install gguf"
    assert importlib.metadata.version("peft") in by_name["peft"]["found"]


def test_folders(found, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MPOE_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30}))
    by_name = found(capsys)
    assert by_name["downloads"]["found"] == f"{tmp_path}/not/there/yet, 1.0 GiB free"
    assert "MPOE_CACHE names another folder" in by_name["downloads"]["advice"]
    assert not (tmp_path / "not").exists()


def test_a_network_that_does_not_answer_is_waited_for_some_seconds_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(checks, "NETWORK_SECONDS", 0.2)
    asked = []

    def never(package, timeout):
        asked.append(timeout)
        time.sleep(30)

    monkeypatch.setattr("mpoe.cli.assets.file_url", never)
    by_name = {check.name: check for check in checks.network()}
    assert "Connection refused" in by_name["hub"].found
    assert by_name["package index"].found == "no answer in 0 s"
    assert asked == [0.2]


def test_a_hub_that_answers(monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    by_name = {check.name: check for check in checks.network()}
    server.shutdown()
    server.server_close()
    assert by_name["hub"].found.endswith("answers")
    assert by_name["hub"].verdict == "ok"
    assert "must list vaderSentiment-0.5.zip" in by_name["package index"].found


def test_it_works_where_torch_does_not():
    """As with a torch that cannot be imported: the tables are there, and say so."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import mpoe_command\n"
        "from mpoe.cli import doctor\n"
        "doctor._PROBE = \"import sys; sys.modules['torch'] = None\\n\" + doctor._PROBE\n"
        "sys.argv[1:] = ['doctor']; sys.exit(mpoe_command.main())"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "import torch fails" in done.stdout
    assert "mpoe cannot work here; to be mended: accelerate, torch, import mpoe" in done.stdout


def test_wrong_flags(capsys):
    assert main(["doctor", "--timeout", "0"]) == 2
    assert "--timeout must be > 0 seconds; got 0.0" in capsys.readouterr().err


def test_the_declared_requirements_are_read():
    names = {Requirement(line).name for line in importlib.metadata.requires("mpoe") or ()}
    shown = {check.name for check in checks.versions({})}
    assert {"torch", "transformers"} <= shown <= names | {"Python", "mpoe"}
