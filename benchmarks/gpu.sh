#!/usr/bin/env bash
# Everything a GPU can tell in under nine minutes: benchmarks/gpu.sh OUT
#
# Needs PyTorch, torchvision, Triton, numpy and pytest, and no network. What else is installed is
# used (simplejpeg, DALI, FFCV, lightly, byol-pytorch, apex), what is not is named and left out. Each
# part writes its JSON and its output into OUT, the long ones as they go; a part that fails or runs
# out of time does not stop the others. Exit status 1 if a part failed. PYTHON=… names the
# interpreter, DATA=… a folder of images, BUDGET=… the seconds for everything; with DRY=1 the
# commands are printed, not run.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -uo pipefail
if (($# != 1)) || [[ $1 == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1" || exit 2
unset CDPATH # with it `cd` prints where it went
OUT=$(cd "$1" && pwd) || exit 2
PY=${PYTHON:-python}
# The parts run in the checkout; relative paths were meant from where this was called.
[[ $PY != */* || $PY == /* ]] || PY=$PWD/$PY
[[ -z ${DATA:-} || $DATA == /* ]] || DATA=$PWD/$DATA
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
BUDGET=${BUDGET:-530}
data=()
[[ -n ${DATA:-} ]] && data=(--data "$DATA")
failed=()

part() { # $1: name, $2: most seconds, then the command
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) started=$SECONDS status
    shift 2
    if [[ -n ${DRY:-} ]]; then
        echo "$name: $*"
        return
    fi
    if ((left < 15)); then
        echo "$name: left out, the time is over"
        failed+=("$name")
        return
    fi
    ((limit < left)) || limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    ((status == 124 || status == 137)) && echo "$name: ended after its $limit s"
    echo "$name: exit $status after $((SECONDS - started)) s"
    tail -n 24 "$OUT/$name.log" | sed 's/^/    /'
    ((status == 0)) || failed+=("$name")
}

has() { "$PY" -c "import $1" 2>/dev/null; }

if [[ -z ${DRY:-} ]]; then
    if ! "$PY" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
        echo "torch sees no GPU here"
        exit 1
    fi
    for package in torchvision triton simplejpeg nvidia.dali ffcv lightly byol_pytorch amp_C; do
        has "$package" || echo "$package is not installed: what needs it is left out"
    done
fi
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)

# What is worth most comes first: the last parts are what a slow machine has no time for.
part step-256 150 "$PY" benchmarks/fps.py --mode step optim linear-eval --batch-size 256 \
    --project 8 --nodes 4 --json "$OUT/step-256.json" --chart "$OUT/step-256.svg"
part tests 100 "$PY" -m pytest -v -rs -m gpu -p benchmarks.leave_out \
    --continue-on-collection-errors --junitxml="$OUT/tests.xml" \
    "${tests[@]}"
part peers 130 "$PY" benchmarks/peers.py --seconds 120 --json "$OUT/peers.json"
part step-64 90 "$PY" benchmarks/fps.py --mode step --batch-size 64 --engine graph \
    --json "$OUT/step-64.json"
part augment 30 "$PY" benchmarks/augment.py --json "$OUT/augment.json"
part ablation 90 "$PY" benchmarks/ablation.py --json "$OUT/ablation.json"
if [[ -n ${DRY:-} ]] || has simplejpeg; then
    part e2e 60 "$PY" benchmarks/fps.py --mode e2e "${data[@]}" --json "$OUT/e2e.json"
    part loader 70 "$PY" benchmarks/loader.py --device cuda --threads "$(nproc)" --batch-size 256 \
        --images 1024 --seconds 20 --only "torch views" "dali views" solo-learn "lightly" \
        "${data[@]}" --json "$OUT/loader.json" --chart "$OUT/loader.svg"
fi
part step-512 80 "$PY" benchmarks/fps.py --mode step --batch-size 512 --json "$OUT/step-512.json"

if ((${#failed[@]})); then
    echo "failed or left out: ${failed[*]}"
    exit 1
fi
