#!/usr/bin/env bash
# Train, or resume, a run, with one process per GPU:
#
#   sbatch slurm/train.sh +experiment=wt103_large
#   sbatch --nodes=4 --gpus-per-node=4 --time=12:00:00 slurm/train.sh +experiment=wt103_large run.dir=/scratch/me/large
#   sbatch --gpus-per-node=0 --nodes=2 --ntasks-per-node=4 slurm/train.sh +experiment=quickstart      # on CPUs
#
# Submit from the repository. Change the #SBATCH lines below, or give the same options on sbatch's command line, which
# take precedence. Python is .venv/bin/python where that exists, else the `python` of the shell that submits: activate a
# conda environment or load modules there; sbatch passes them on. Or give the full command, as for a container:
#
#   TXL_DIST_PYTHON="apptainer exec --nv image.sif python" sbatch slurm/train.sh +experiment=wt103_large
#
# A job that is preempted, or gets SIGUSR1 before its time is over, saves, exits with code 75 and is requeued; it
# resumes where it stopped, bitwise identical, and appends to the same log.

#SBATCH --job-name=txl_dist
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

[[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python
read -ra python <<< "${TXL_DIST_PYTHON:-$python}"
tasks=${SLURM_GPUS_ON_NODE:-0}
if ((tasks == 0)); then
  tasks=${SLURM_NTASKS_PER_NODE:-1}
  unset SLURM_CPUS_PER_GPU  # srun refuses it where there are no GPUs
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}}"

# The signals that stop the tasks may reach this shell, too, which still has to requeue the job.
trap : TERM USR1 USR2

# Signals are blocked from the first moment, for Python and for the runtime of a container around it.
code=0
srun --ntasks-per-node="$tasks" --kill-on-bad-exit=1 env --block-signal=TERM,USR1,USR2 \
  "${python[@]}" -m txl_dist.train "$@" || code=$?

# A job that Slurm itself has requeued, or a user has cancelled, is no longer running.
if [[ $code == 75 && $(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
