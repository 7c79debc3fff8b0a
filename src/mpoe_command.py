"""What the command `mpoe` starts: `mpoe.cli.main`, with the package `mpoe` imported without torch.

`import mpoe` brings in torch and Transformers, which take seconds. `mpoe --help`, completion and `mpoe doctor` do
without; `mpoe/__init__.py` looks whether this module was there first.
"""

import sys


def main() -> int:
    """Run one command and return the exit status, as `mpoe.cli.main.main` does."""
    from mpoe.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.modules["mpoe_command"] = sys.modules["__main__"]  # its name, under `python -m mpoe_command` too
    sys.exit(main())
