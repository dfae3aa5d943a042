#!/usr/bin/env bash
# Everything a GPU can tell in half an hour: benchmarks/gpu.sh OUT [PART…]
#
# Needs PyTorch, torchvision, Triton, numpy and pytest, and no network. What else is installed is
# used (simplejpeg, DALI, FFCV, lightly, byol-pytorch, apex), what is not is named and left out. The
# first part fills the compiler's cache for all that follow, which keep its batch of 256; rows are
# written as they come. Each part writes its JSON and its output into OUT, and a line into
# OUT/parts.jsonl; one that fails or runs out of time does not stop the others. Exit status 1 if a
# part failed. PYTHON=… names the interpreter, DATA=… a folder of images, BUDGET=… the seconds for
# everything; with DRY=1 the commands are printed, not run. docs/gpu_first_contact.md is the plan.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -uo pipefail
if (($# == 0)) || [[ $1 == -* ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1" || exit 2
unset CDPATH # with it `cd` prints where it went
OUT=$(cd "$1" && pwd) || exit 2
shift
wanted=("$@")
PY=${PYTHON:-python3}
# The parts run in the checkout; relative paths were meant from where this was called.
[[ $PY != */* || $PY == /* ]] || PY=$PWD/$PY
[[ -z ${DATA:-} || $DATA == /* ]] || DATA=$PWD/$DATA
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
BUDGET=${BUDGET:-1700}
export TORCHINDUCTOR_FX_GRAPH_CACHE=1 TORCHINDUCTOR_AUTOGRAD_CACHE=1
known=(warm step-256 tests kernels graph-256 peers grouped step-64 augment ablation e2e loader)
for name in ${wanted[@]+"${wanted[@]}"}; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        echo "there is no part $name; there are: ${known[*]}" >&2
        exit 2
    fi
done
failed=()

note() { # $1: name, $2: outcome, $3: seconds
    echo "$1: $2"
    printf '{"part": "%s", "outcome": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$OUT/parts.jsonl"
}

chosen() { ((${#wanted[@]} == 0)) || [[ " ${wanted[*]} " == *" $1 "* ]]; }

part() { # $1: name, $2: most seconds, then the command
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) started=$SECONDS status outcome
    shift 2
    chosen "$name" || return 0
    if [[ -n ${DRY:-} ]]; then
        echo "$name: $*"
        return
    fi
    if ((left < 15)); then
        note "$name" "left out, the time is over" 0
        failed+=("$name")
        return
    fi
    ((limit < left)) || limit=$left
    timeout --kill-after=15 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    outcome="exit $status"
    ((status == 124 || status == 137)) && outcome="ended after its $limit s"
    note "$name" "$outcome" $((SECONDS - started))
    tail -n 24 "$OUT/$name.log" | sed 's/^/    /'
    ((status == 0)) || failed+=("$name")
}

leave_out() { # $1: name, $2: why
    chosen "$1" && note "$1" "left out, $2" 0
    return 0
}

missing=
if [[ -z ${DRY:-} ]]; then
    # Found, not imported: some take seconds.
    missing=$("$PY" - <<'PYTHON'
import importlib.util
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
names = "torchvision triton numpy pytest simplejpeg nvidia.dali ffcv lightly byol_pytorch amp_C"
for name in names.split():
    try:
        found = importlib.util.find_spec(name)
    except ImportError:  # of the package around it
        found = None
    if found is None:
        print(name)
PYTHON
    ) || exit 1
    for package in $missing; do
        echo "$package is not installed: what needs it is left out"
    done
fi
has() { [[ " ${missing//$'\n'/ } " != *" $1 "* ]]; }
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
data=()
if [[ -n ${DATA:-} ]]; then
    data=(--data "$DATA")
elif ! has simplejpeg; then
    data=(--data synthetic:4096)
fi

# What is worth most comes first: the last parts are what a slow machine has no time for.
fps=("$PY" benchmarks/fps.py)
part warm 400 "${fps[@]}" --mode step --batch-size 256 --steps 10 --json "$OUT/warm.json"
part step-256 200 "${fps[@]}" --mode step optim linear-eval --batch-size 256 \
    --project 8 --nodes 4 --json "$OUT/step-256.json" --chart "$OUT/step-256.svg"
if has pytest; then
    part tests 300 "$PY" -m pytest -v -rs -m gpu -p benchmarks.leave_out \
        --continue-on-collection-errors --junitxml="$OUT/tests.xml" \
        "${tests[@]}"
else
    leave_out tests "pytest is not installed"
fi
part kernels 150 "$PY" benchmarks/kernels.py --batch-size 256 --json "$OUT/kernels.json"
part graph-256 150 "${fps[@]}" --mode step --batch-size 256 --engine graph \
    --json "$OUT/graph-256.json"
part peers 300 "$PY" benchmarks/peers.py --batch-size 256 --seconds 240 --json "$OUT/peers.json"
part grouped 300 "${fps[@]}" --mode step --batch-size 256 --grouped 8 --json "$OUT/grouped.json"
part step-64 300 "${fps[@]}" --mode step --batch-size 64 --engine graph --json "$OUT/step-64.json"
part augment 60 "$PY" benchmarks/augment.py --batch-size 256 --json "$OUT/augment.json"
part ablation 300 "$PY" benchmarks/ablation.py --batch-size 256 --json "$OUT/ablation.json"
part e2e 150 "${fps[@]}" --mode e2e --batch-size 256 ${data[@]+"${data[@]}"} --json "$OUT/e2e.json"
if has simplejpeg; then
    [[ ${data[*]-} != *synthetic* ]] || data=()
    part loader 120 "$PY" benchmarks/loader.py --device cuda --threads "$(nproc)" \
        --batch-size 256 --images 1024 --seconds 40 \
        --only "torch views" "dali views" solo-learn "lightly" \
        ${data[@]+"${data[@]}"} --json "$OUT/loader.json" --chart "$OUT/loader.svg"
else
    leave_out loader "simplejpeg is not installed"
fi

if ((${#failed[@]})); then
    echo "failed or left out: ${failed[*]}"
    exit 1
fi
