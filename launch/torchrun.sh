#!/usr/bin/env bash
# torchrun with this project's environment and the settings a restart needs. Flags go to pretrain:
#
#   launch/torchrun.sh --data /imagenet/train --epochs 300 --batch-size 4096
#
# One process per GPU of this machine (one without a GPU); NPROC=2 says otherwise. On several machines,
# run it on each with NNODES, NODE_RANK and MASTER_ADDR set (MASTER_PORT 29500). MAX_RESTARTS=3 lets
# torchrun start all ranks again, from the newest checkpoint, when one dies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]]; then
    python=python
elif [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
else
    python=python3
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}

# Without it a restarted rank may connect to addresses of the attempt before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if ((${NNODES:-1} > 1)); then
    meeting=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?set it to this machine\'s number, from 0}"
        --rdzv_backend=c10d --rdzv_id="${RUN_ID:-byol}"
        --rdzv_endpoint="${MASTER_ADDR:?set it to the first machine\'s address}:${MASTER_PORT:-29500}")
else
    meeting=(--standalone)
fi
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc_per_node="$nproc" \
    --max_restarts="${MAX_RESTARTS:-0}" -m byol_fast.pretrain "$@"
