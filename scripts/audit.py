"""Ask PyPI's advisory service about the pinned versions, with pip-audit: `make check` runs it.

Exit status 1 if a pinned version has a known vulnerability. Where the service cannot be reached, or does not know the
versions (a mirror may not), it says so and fails nobody: a check must pass on a machine without a network.
"""

import argparse
import json
import subprocess  # nosec B404  # for pip-audit alone, see below
import sys

TIMEOUT = 90  # seconds for all of it; pip-audit itself gives up on a request after REQUEST_TIMEOUT
REQUEST_TIMEOUT = 10
# What pip-audit and the libraries under it raise when there is no network, a mirror, or a service that is down.
NETWORK = ("ConnectionError", "Could not connect", "Timeout", "ServiceError", "ProxyError", "SSLError", "HTTPError")


def main() -> int:
    """Run it, and say in a few lines what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirements", nargs="?", default="constraints.txt", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for all of it (default: %(default)s)")
    args = parser.parse_args()
    words = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    words += ["--timeout", str(REQUEST_TIMEOUT), "--requirement", args.requirements]
    try:
        # our own interpreter with the words above
        done = subprocess.run(  # nosec B603
            [sys.executable, "-m", "pip_audit", *words], capture_output=True, text=True, timeout=args.timeout
        )
    except subprocess.TimeoutExpired:
        return _skipped(f"no answer within {args.timeout:g} s")
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(word in done.stderr for word in NETWORK):
            return _skipped(done.stderr.strip().splitlines()[-1])
        print(f"audit: pip-audit failed:\n{done.stderr}", file=sys.stderr)
        return 1
    return _report(found)


def _report(found: list[dict]) -> int:
    vulnerable = [entry for entry in found if entry.get("vulns")]
    for entry in vulnerable:
        for advisory in entry["vulns"]:
            fixes = ", ".join(advisory.get("fix_versions") or ()) or "no version yet"
            print(f"audit: {entry['name']} {entry['version']}: {advisory['id']}, mended in {fixes}", file=sys.stderr)
    unknown = [entry["name"] for entry in found if "skip_reason" in entry]
    known = len(found) - len(unknown)
    if not known:
        return _skipped("the index that answers for PyPI here has no advisories for the pinned versions")
    if unknown:
        print(f"audit: without an answer for {', '.join(unknown)}")
    print(f"audit: {known} pinned versions, {len(vulnerable)} with known vulnerabilities")
    return 1 if vulnerable else 0


def _skipped(reason: str) -> int:
    print(f"audit: SKIPPED, nothing was audited: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
