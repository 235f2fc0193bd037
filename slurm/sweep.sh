#!/usr/bin/env bash
# Train several runs, each as slurm/train.sh does. A file holds the overrides, one line per run. Bash can write it for a
# grid, here the 16 runs of conf/experiment/ablation.yaml, of which 4 run at a time:
#
#   printf '%s\n' model.attention={relative,shaw,absolute,al_rfou}' 'model.mem_len={32,0}' 'train.loss={full,second_half} > grid
#   sbatch --array=1-16%4 slurm/sweep.sh grid +experiment=ablation
#
# Each run needs a run.dir of its own: in its line or, as in the ablation's config, composed of the other keys.
# Change the #SBATCH lines, and Python as in slurm/train.sh.

#SBATCH --job-name=txl_dist-sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

set -euo pipefail

# A job array, not Hydra's --multirun: each run has its own processes, is requeued alone, and cannot disturb another.
read -ra overrides <<< "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
exec bash slurm/train.sh "${@:2}" "${overrides[@]}"
