"""Run every code block of README.md and docs/ that is not marked as one that cannot be run here: `make docs-test`.

Each page has a folder of its own, with tiny models and data under the names that it uses, and its blocks run there in
their order. What is checked is that they end well, not what they print. Some minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console

from documented import PAGES, ROOT, Block, blocks, prepare, write_files

# `mpoe`, of the Python that runs this; a fine-tuning run ends after some steps, whatever a page or its config says.
LIMITS = "--max_steps 4 --save_steps 2 --eval_steps 2 --warmup_steps 1 --logging_steps 2 --use_cpu"
MPOE = f"""#!/bin/sh
limits=
[ "$1" = finetune ] && limits="{LIMITS}"
exec "{sys.executable}" -m mpoe_command "$@" $limits
"""
TIMEOUT = 400  # seconds, of a block


def main() -> int:
    """Run them, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="README.md, docs/quickstart.md, ...; all if none is named")
    parser.add_argument("--keep", metavar="FOLDER", help="new folder for what the blocks write")
    args = parser.parse_args()
    named = [(ROOT / page).resolve() for page in args.pages] or list(PAGES)
    if unknown := [str(page) for page in named if page not in PAGES]:
        parser.error(f"pages must be README.md or in docs/; got {', '.join(unknown)}")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    failed = ran = left_out = 0
    with tempfile.TemporaryDirectory() as scratch:
        ground = Path(scratch, "ground")
        ground.mkdir()
        prepare(ground)
        environment = _environment(Path(scratch, "bin"))
        for page in named:
            folder = Path(args.keep or scratch) / f"of-{page.stem}"
            shutil.copytree(ground, folder, symlinks=True)
            write_files(page, folder)
            for block in blocks(page):
                if block.language not in ("sh", "python"):
                    continue
                if block.not_run is not None:
                    console.print(f"{block.name:<34} not run: {block.not_run}")
                    left_out += 1
                    continue
                started = time.perf_counter()
                error = _run(block, folder, environment)
                console.print(f"{block.name:<34} {'FAILED' if error else 'ok'}, {time.perf_counter() - started:.0f} s")
                ran += 1
                if error:
                    failed += 1
                    console.print("\n".join(f"    {line}" for line in error.splitlines()[-30:]))
    console.print(f"{ran} blocks ran, {failed} of them failed; {left_out} are not run here")
    return failed


def _environment(binaries: Path) -> dict[str, str]:
    """The process's own, with this Python's programs and no network."""
    binaries.mkdir()
    (binaries / "mpoe").write_text(MPOE)
    (binaries / "mpoe").chmod(0o755)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    source = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # an index that refuses at once: what a page downloads is in the cache
    offline = {"HF_HUB_OFFLINE": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "MPOE_CACHE": "cache"}
    return {**os.environ, **offline, "PATH": path, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1"}


def _run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """What a block wrote if it failed, else nothing."""
    if block.language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", f"{block.first}\n{block.code}"]
    else:  # with what the page's earlier blocks have defined
        earlier = folder / "earlier.py"
        code = "\n".join([earlier.read_text() if earlier.exists() else "", block.first, block.code])
        earlier.write_text(code)
        command = [sys.executable, "-W", "ignore", "earlier.py"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, text=True, timeout=TIMEOUT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done in {TIMEOUT} s"
    return f"{done.stdout}\nstatus {done.returncode}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
