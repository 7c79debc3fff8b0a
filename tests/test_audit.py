"""scripts/audit.py beside a pip-audit that answers as the real one does, or does not answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"
CLEAN = {"name": "rich", "version": "1.0", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (1.0)"}
VULNERABLE = {"name": "onnx", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": []}]}


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """Runs the script; `code` is what pip-audit does."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(code, *flags):
        (tmp_path / "pip_audit.py").write_text(code)
        return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)

    return run


def answer(*dependencies, status=0):
    return f"print({json.dumps(json.dumps({'dependencies': dependencies, 'fixes': []}))}); raise SystemExit({status})"


def test_no_known_vulnerability(audit):
    done = audit(answer(CLEAN, CLEAN))
    assert (done.returncode, done.stdout) == (0, "audit: 2 pinned versions, 0 with known vulnerabilities\n")


def test_a_vulnerability_fails_and_is_named(audit):
    done = audit(answer(CLEAN, VULNERABLE, SKIPPED, status=1))
    assert done.returncode == 1
    assert "onnx 1.0: PYSEC-1, mended in 1.1" in done.stderr
    assert "without an answer for torch" in done.stdout


def test_an_index_that_knows_nothing_is_not_taken_for_a_clean_answer(audit):
    done = audit(answer(SKIPPED))
    assert done.returncode == 0
    assert "SKIPPED, nothing was audited: the index" in done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "raise ConnectionError('Failed to resolve pypi.org')",
        'raise SystemExit("ERROR:pip_audit._cli:Could not connect to PyPI\'s vulnerability feed")',
    ],
)
def test_without_a_network_it_says_so_and_passes(audit, code):
    done = audit(code)
    assert done.returncode == 0
    assert "SKIPPED, nothing was audited" in done.stdout


def test_it_does_not_hang(audit):
    done = audit("import time; time.sleep(600)", "--timeout", "0.5")
    assert done.returncode == 0
    assert "SKIPPED, nothing was audited: no answer within 0.5 s" in done.stdout


@pytest.mark.parametrize("code", ["raise SystemExit('invalid requirement')", "print('[]')"])
def test_another_failure_fails(audit, code):
    assert audit(code).returncode == 1
