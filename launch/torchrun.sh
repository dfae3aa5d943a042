#!/usr/bin/env bash
# torchrun with this project's environment and the settings a restart needs. Flags go to pretrain:
#
#   launch/torchrun.sh --data /imagenet/train --epochs 300 --batch-size 4096
#
# One process per GPU of this machine (one without a GPU); NPROC=2 says otherwise. On several machines,
# run it on each with NNODES, NODE_RANK (from 0) and MASTER_ADDR, the first machine's address
# (MASTER_PORT: 29500). LOCAL_ADDR is this machine's own address, where the others cannot resolve its
# name. NNODES=2:4 runs on as many of four machines as there are, but not on fewer than two.
# MAX_RESTARTS=3 lets torchrun start all ranks again, from the newest checkpoint, when one dies.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -euo pipefail
unset CDPATH # with it `cd` prints where it went
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not a `cd`: --data, --out and PYTHON may be relative to where this is called.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]]; then
    python=python
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi

command -v "$python" >/dev/null || die "PYTHON=$python is not a command"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}

# torchrun takes SIGHUP for a request to stop, also where nohup has it ignored.
if [[ -n $(trap -p HUP) ]]; then
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGQUIT}
    export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE # torch without that flag
fi

# Without it a restarted rank may connect to addresses of the attempt before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ ${NNODES:-1} != 1 ]]; then
    [[ -n ${NODE_RANK:-} ]] || die "NNODES=$NNODES, so set NODE_RANK to this machine's number, from 0"
    [[ -n ${MASTER_ADDR:-} ]] || die "NNODES=$NNODES, so set MASTER_ADDR to the first machine's address"
    port=${MASTER_PORT:-29500}
    if [[ $NODE_RANK == 0 ]] && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        die "port $port of this machine is in use: set MASTER_PORT to another one, on every machine"
    fi
    # The first machine holds the meeting's store whatever name it was called by.
    meeting=(--nnodes="$NNODES" --rdzv_backend=c10d --rdzv_id="${RUN_ID:-byol}"
        --rdzv_endpoint="$MASTER_ADDR:$port"
        --rdzv_conf="is_host=$((NODE_RANK == 0))" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"})
else
    meeting=(--standalone)
fi
# torchrun's own; a rank that finds these of an enclosing job would believe them.
unset MASTER_ADDR MASTER_PORT NODE_RANK
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc_per_node="$nproc" \
    --max_restarts="${MAX_RESTARTS:-0}" -m byol_fast.pretrain "$@"
