#!/usr/bin/env bash
# Turn text into a dataset, on the CPUs of one node:
#
#   sbatch slurm/prepare.sh corpus=wikitext103
#   sbatch --cpus-per-task=64 slurm/prepare.sh corpus=text 'corpus.path=texts/*.zst' tokenizer=sentencepiece data.dir=data/mine
#
# Change the #SBATCH lines, and Python as in slurm/train.sh. Where compute nodes have no network, run txl_dist.prepare
# of a published corpus on a login node, or give corpus.path.

#SBATCH --job-name=txl_dist-prepare
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

[[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python
read -ra python <<< "${TXL_DIST_PYTHON:-$python}"
"${python[@]}" -m txl_dist.prepare workers="$SLURM_CPUS_PER_TASK" "$@"
