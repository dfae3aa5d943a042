"""Known vulnerabilities in what requirements-hashed.lock pins, by pip-audit where it can run.

    python launch/audit.py [LOCK]        exit status 0: none known, or not looked; 1: there are some

Without pip-audit or without an answer from its service nothing was looked at, which is said and is
no failure: the checks must not depend on a network. A vulnerability that is known does fail them:
raise the pin, or enter its id below with the reason why it does not concern this project.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements-hashed.lock"
SECONDS = 180

ACCEPTED: dict[str, str] = {}  # id of a vulnerability -> why it does not concern this project


def verdict(report: dict, accepted: dict[str, str]) -> tuple[str, bool]:
    """What pip-audit's JSON says, in words, and whether it is a failure."""
    entries = report["dependencies"]
    skipped = [entry["name"] for entry in entries if "skip_reason" in entry]
    if len(skipped) == len(entries):
        return "skipped: the service knows none of the packages, so nothing was looked at", False
    found, waived = [], []
    for entry in entries:
        for hole in entry.get("vulns", []):
            ids = [hole["id"], *hole.get("aliases", [])]
            if any(name in accepted for name in ids):
                waived.append(hole["id"])
                continue
            fixed = " or ".join(hole.get("fix_versions", [])) or "no version yet"
            pinned = f"{entry['name']} {entry['version']}"
            found.append(f"  {pinned}: {', '.join(ids)}; fixed in {fixed}")
    looked = f"{len(entries) - len(skipped)} of {len(entries)} packages looked at"
    if waived:
        looked += f", {len(waived)} accepted by name"
    if found:
        mend = (
            "raise the pins (CONTRIBUTING.md), or accept an id with its reason in launch/audit.py"
        )
        return "\n".join([f"known vulnerabilities ({looked}):", *found, mend]), True
    return f"no known vulnerability ({looked})", False


def audit(lock: Path) -> tuple[str, bool]:
    """Runs pip-audit on a lock file; see `verdict`."""
    if find_spec("pip_audit") is None:
        return "skipped: pip-audit is not installed (pip install pip-audit)", False
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    command += ["--disable-pip", "--require-hashes", "-r", str(lock)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS
        )
        return verdict(json.loads(run.stdout), ACCEPTED)
    except subprocess.TimeoutExpired:
        return f"skipped: no answer in {SECONDS} s", False
    except (ValueError, KeyError):  # it prints JSON, or why it could not look
        lines = run.stderr.strip().splitlines() or ["pip-audit printed nothing"]
        return f"skipped: {lines[-1]}", False


if __name__ == "__main__":
    text, failed = audit(Path(sys.argv[1]) if len(sys.argv) > 1 else LOCK)
    print(text)
    sys.exit(failed)
