#!/usr/bin/env bash
# Evaluate runs, on one GPU:
#
#   sbatch slurm/evaluate.sh run=runs/wt103_large split=test
#   sbatch slurm/evaluate.sh 'run=runs/ablation/*' split=valid format=json
#
# Change the #SBATCH lines, and Python as in slurm/train.sh.

#SBATCH --job-name=txl_dist-evaluate
#SBATCH --gpus=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

[[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python
read -ra python <<< "${TXL_DIST_PYTHON:-$python}"
"${python[@]}" -m txl_dist.evaluate "$@"
