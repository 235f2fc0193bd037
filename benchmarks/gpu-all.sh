#!/usr/bin/env bash
# Measure everything on one GPU, in steps of at most eight minutes each; without an argument all four, one after the
# other. Each row is a process of its own, so that one that fails stops no other, and the first step has what matters
# most. Results are in gpu.json and profile-*, in $OUT or the working directory.
#     [PYTHON=python] benchmarks/gpu-all.sh [STEP ...]
set -uo pipefail
cd "$(dirname "$0")/.."
# One process needs no network.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
models=(wt103_large wt103_base_nvidia enwik8_large)

row() {
  local left=$((began + 480 - SECONDS))
  ((left > 0)) && timeout "$left" "${PYTHON:-python}" benchmarks/gpu.py "$@" || echo "failed: $*" >&2
}

[ $# -gt 0 ] || set -- 1 2 3 4
for step; do
  began=$SECONDS
  case $step in
    1)
      row kernels triton
      for name in "${models[@]}"; do row training "$name" triton; done
      for lanes in 1 32; do row inference "$lanes"; done
      row profile wt103_large triton
      ;;
    2)
      for name in "${models[@]}"; do row turns "$name" compile; done
      row profile wt103_base_nvidia triton
      row profile enwik8_large triton
      ;;
    3)
      for switch in softmax relu checks; do row turns wt103_large "$switch"; done
      for lanes in 1 32; do row generation "$lanes"; done
      ;;
    4)
      for backend in sdpa reference; do
        row kernels "$backend"
        for name in "${models[@]}"; do row training "$name" "$backend"; done # enwik8_large, reference: 74 of 80 GB
      done
      ;;
  esac
done
