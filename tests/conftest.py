"""What every test runs under: offline, seeded, and with the shape annotations of `mpoe.mpo` and `mpoe.nn` checked."""

import atexit
import os
import random
import sys
import tempfile
import zlib

# Libraries read these when they are imported, so they come before every import that could bring one in.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# `datasets` keeps mapped tables on disk by the code's fingerprint; a run must not find those of another run.
_datasets_cache = tempfile.TemporaryDirectory(prefix="mpoe-tests-")
atexit.register(_datasets_cache.cleanup)
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name
# One thread: most tests multiply small matrices, where more threads only wait for each other on a busy machine, and
# sums come out the same whatever the number of cores. Subprocesses inherit it; `OMP_NUM_THREADS=8 make test` overrides.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# The hook instruments a module while it is imported: too late for one that is there already.
_early = sorted(name for name in sys.modules if name == "mpoe" or name.startswith("mpoe."))
if _early:
    raise RuntimeError(f"mpoe must not be imported before tests/conftest.py; sys.modules holds {_early}")
install_import_hook(["mpoe.mpo", "mpoe.nn"], "beartype.beartype")

import hypothesis
import numpy as np
import pytest
import torch

from tiny import tiny_t5, tiny_tokenizer, write_cola, write_sentiment

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class _TorchRandom:
    """torch's default generator with the interface of `random.Random`, for Hypothesis."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Hypothesis resets what it knows before each example; without torch's generator a failing example would not replay.
_torch_random = _TorchRandom()  # Hypothesis holds a weak reference only
hypothesis.register_random(_torch_random)
# No deadline: tests have no clocks. Derandomised: a red run on one machine is red on the next.
hypothesis.settings.register_profile("mpoe", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mpoe")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed every global generator from the test's id.

    The id makes a test's draws its own: the same alone, in any order and in the whole suite, different between the
    cases of a parametrised test, and unlike those of code under test that seeds itself with 0.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with a model and data, and the working directory of a test."""
    monkeypatch.chdir(tmp_path)
    tiny_t5().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_cola(write_sentiment(tmp_path / "data"))
    return tmp_path
