"""The tests on other interpreters and other versions: `pip install nox`, then `nox`, or one session by its name.

nox -s oldest -- tests/training       the oldest versions of pyproject.toml's ranges
nox -s tests-3.13                      the pinned versions on another Python, where that is installed
nox -s oldest_torch                    the oldest torch, which brings CUDA's libraries (gigabytes)
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def _install_and_test(session: nox.Session, *requirements: str) -> None:
    session.install(*requirements, "-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The versions of constraints.txt; on other Pythons than 3.11 torch may come from PyPI, with CUDA's libraries."""
    _install_and_test(session, "-c", "constraints.txt")


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest of everything but torch."""
    _install_and_test(session, "-c", "constraints-oldest.txt")


@nox.session(python="3.13")
def oldest_torch(session: nox.Session) -> None:
    """The oldest torch with the newest of everything else."""
    _install_and_test(session, "torch==2.11.0")


@nox.session
def newest(session: nox.Session) -> None:
    """Whatever PyPI has today, but for torch, whose newest files bring CUDA's libraries."""
    _install_and_test(session, "torch==2.13.0")
