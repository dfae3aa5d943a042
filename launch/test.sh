#!/usr/bin/env bash
# Lint, types and tests in their own environment. Arguments go to pytest (launch/test.sh -k plan).
#
# The environment: see launch/_env.sh (PYTHON=… names another interpreter or environment). DALI is
# installed on x86-64 Linux; FFCV where its system libraries are present or may be installed. A test
# that cannot run here is skipped by name with its reason, and the last line counts the skipped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

extras=dev,peers
[[ $(uname -sm) == "Linux x86_64" ]] && extras=dev,peers,dali
prepare_environment "$extras" 8

if [[ $PY == "$VENV"/* ]]; then
    PYTHON=$PY bash launch/install_ffcv.sh || say "FFCV is not installed: its tests are skipped"
else # an environment of yours gets nothing that was not asked for
    say "FFCV's tests run if it is there; launch/install_ffcv.sh installs it"
fi

# pytest writes its checkpoints there; on a full disk tests fail for no fault of theirs
room_for "the tests need" 3 "${TMPDIR:-/tmp}"

failed=()
check() { # $1: name, then the command
    local name=$1
    shift
    say "$name"
    "$@" || failed+=("$name")
}
results=$(mktemp)
trap 'rm -f "$results"' EXIT

check lint "$PY" -m ruff check .
check format "$PY" -m ruff format --check .
check types "$PY" -m mypy
check vulnerabilities "$PY" launch/audit.py # skipped by name where it cannot look
# Two workers of one thread each take half the time of one that has both cores; a file stays together.
workers=$(nproc)
((workers <= 4)) || workers=4
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check tests "$PY" -m pytest -q -ra --no-fold-skipped -n "$workers" --dist loadfile \
    --junitxml="$results" "$@"

if ((${#failed[@]})); then
    say "failed: ${failed[*]}"
else
    say "lint, format, types, vulnerabilities and tests passed"
fi
"$PY" - "$results" <<'PY'
import sys
from xml.etree import ElementTree

try:
    suites = list(ElementTree.parse(sys.argv[1]).iter("testsuite"))
except ElementTree.ParseError:
    sys.exit("error: pytest left no results")
total, skipped, failures, errors = (
    sum(int(suite.get(key, 0)) for suite in suites)
    for key in ("tests", "skipped", "failures", "errors")
)
bad = failures + errors
print(f"tests: {total - skipped - bad} passed, {bad} failed, {skipped} skipped")
PY
((${#failed[@]} == 0))
