#!/usr/bin/env bash
# Lint, types and tests in their own environment, in six minutes on two cores; --all takes the slow
# tests too, in fifteen (CONTRIBUTING.md names them). Other arguments go to pytest:
#
#   launch/test.sh
#   launch/test.sh --all
#   launch/test.sh -k plan
#
# The environment: see launch/_env.sh (PYTHON=… names another interpreter or environment). DALI is
# installed on x86-64 Linux; FFCV where its system libraries are present or may be installed. A test
# that cannot run here is skipped by name with its reason, and the last line counts the skipped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

chosen=(-m "not slow") # an -m among the arguments comes later and wins
words=()
for word in "$@"; do
    if [[ $word == --all ]]; then chosen=(); else words+=("$word"); fi
done
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

scratch=$(mktemp -d)
names=() pids=() failed=()
cleanup() {
    ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT

beside() { # $1: name, then the command: runs while the tests do, and is shown after them
    names+=("$1")
    "${@:2}" >"$scratch/$1" 2>&1 &
    pids+=($!)
}

beside lint "$PY" -m ruff check .
beside format "$PY" -m ruff format --check .
beside types "$PY" -m mypy
beside vulnerabilities "$PY" launch/audit.py # skipped by name where it cannot look

say tests
# Two workers of one thread each take half the time of one that has both cores. Each begins with half
# of the files and takes over from the other when it is done.
workers=$(nproc)
((workers <= 4)) || workers=4
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=$scratch/results.xml
"$PY" -m pytest -q -ra --no-fold-skipped -n "$workers" --dist worksteal \
    --junitxml="$results" ${chosen[@]+"${chosen[@]}"} ${words[@]+"${words[@]}"} || failed+=(tests)

for i in "${!names[@]}"; do
    wait "${pids[i]}" || failed+=("${names[i]}")
    say "${names[i]}"
    cat "$scratch/${names[i]}"
done
pids=()

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
