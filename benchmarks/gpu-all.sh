#!/usr/bin/env bash
# Measure everything on one GPU, each row in a process of its own that is ended after eight minutes; a row that fails
# stops no other. Results are in gpu.json, in $OUT or the working directory.
#     benchmarks/gpu-all.sh [PYTHON]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
# One process needs no network.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}

row() {
  timeout 480 "$python" benchmarks/gpu.py "$@" || echo "failed: $*" >&2
}

for backend in triton sdpa reference; do row kernels "$backend"; done
for name in wt103_base_nvidia wt103_large enwik8_large; do
  row training "$name" triton
  row training "$name" triton compiled
done
for lanes in 1 32; do row inference "$lanes"; done
for name in wt103_base_nvidia wt103_large enwik8_large; do
  row training "$name" sdpa
  row training "$name" reference # enwik8_large needs 74 of 80 GB
done
