#!/usr/bin/env bash
# From nothing to a pretrained, evaluated network: makes the environment, cuts labelled squares from
# the free photographs in scikit-image's wheel, pretrains a ResNet-18 on them at 32 px through the
# same path as a big run, and says what to type next. Needs no GPU.
#
#   launch/quickstart.sh [--fresh] [flags of byol_fast.pretrain]
#
# Run again, it resumes an interrupted run and only reports a finished one; --fresh starts over.
# The environment: see launch/_env.sh (PYTHON=… names another interpreter or environment).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
called_from=$PWD
cd "$ROOT"

out=runs/quickstart
data=runs/data/photographs
fresh=no
train=yes
flags=()
while (($#)); do
    case $1 in
    -h | --help)
        sed -n '2,/^set -euo/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --fresh) fresh=yes ;;
    --out)
        out=${2:?--out needs a folder}
        shift
        ;;
    --out=*) out=${1#--out=} ;;
    --dry-run | --print-config)
        train=no
        flags+=("$1")
        ;;
    *) flags+=("$1") ;;
    esac
    shift
done

[[ $called_from == "$PWD" || $out == /* || $out == runs/quickstart ]] || out=$called_from/$out

prepare_environment quickstart 6

say "data"
"$PY" -m byol_fast.quickstart "$data"

pretrain=("$PY" -m byol_fast.pretrain --recipe quickstart --data "$data/train"
    --monitor.eval-data "$data/test" --out "$out" "${flags[@]+"${flags[@]}"}")
[[ $train == yes ]] || exec "${pretrain[@]}"

finished() { grep -q '"state": "done"' "$out/status.json" 2>/dev/null; }

if [[ $fresh == yes && -e $out ]]; then
    # only a folder that a run made is deleted
    [[ -f $out/status.json ]] ||
        die "$out is not a run folder, so --fresh leaves it alone: name another with --out"
    say "deleting $out (--fresh)"
    rm -rf "$out"
elif finished; then
    say "$out holds a finished run (--fresh starts over)"
elif [[ -d $out/checkpoints ]]; then
    say "resuming $out (--fresh starts over)"
fi

say "pretraining into $out"
status=0
"${pretrain[@]}" || status=$?
if ((status == 75)) || { ((status == 0)) && ! finished; }; then
    say "stopped before the end, with a checkpoint: the same command goes on from there"
    exit "$status"
fi
((status == 0)) || exit "$status"

"$PY" -m byol_fast.quickstart --summary "$out"
