"""The rank of a process from its launcher's variables, and the errors for variables that make no sense."""

import pytest

from txl_dist.distributed.launcher import SRUN, TORCHRUN, RankInfo, first_host, launcher_env, patience
from txl_dist.errors import UserError

TORCHRUN_2 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
# As Slurm 22.05 sets them in a batch script, and in addition in a task of a step.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}
STEP = BATCH | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[003-004,9],login"}
STEP |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


@pytest.fixture
def rank_info(monkeypatch):
    """Return the RankInfo of a process in which these variables are set."""
    for name in (*TORCHRUN, *SRUN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def rank_info(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launcher_env()

    return rank_info


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, RankInfo()),
        (BATCH, RankInfo()),
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, RankInfo()),
        (TORCHRUN_2, RankInfo(1, 2, 0, "head", 29500)),
        (STEP | TORCHRUN_2, RankInfo(1, 2, 0, "head", 29500)),  # torchrun, started by srun
        (STEP, RankInfo(5, 8, 1, "gpu003", 15000 + 101 * 7 + 1, by_srun=True)),
        (STEP | {"MASTER_ADDR": "ib0", "MASTER_PORT": "5"}, RankInfo(5, 8, 1, "ib0", 5, by_srun=True)),
    ],
)
def test_launchers_are_understood(rank_info, variables, expected):
    assert rank_info(variables) == expected


@pytest.mark.parametrize(
    "variables, problems",
    [
        ({"RANK": "0"}, ["WORLD_SIZE and LOCAL_RANK: not set, but RANK=0; start with torchrun"]),
        ({"WORLD_SIZE": "1"}, ["RANK and LOCAL_RANK: not set, but WORLD_SIZE=1"]),
        (TORCHRUN_2 | {"RANK": "2"}, ["RANK=2: must be less than WORLD_SIZE=2"]),
        (TORCHRUN_2 | {"RANK": "-1"}, ["RANK=-1: must be a whole number"]),
        (TORCHRUN_2 | {"RANK": "one", "WORLD_SIZE": ""}, ["RANK=one: must", "WORLD_SIZE=: must"]),
        (TORCHRUN_2 | {"MASTER_ADDR": ""}, ["MASTER_ADDR: not set, but the processes must find each other"]),
        (TORCHRUN_2 | {"MASTER_PORT": "http"}, ["MASTER_PORT=http: must be the number of a port"]),
        (STEP | {"SLURM_PROCID": "8"}, ["SLURM_PROCID=8: must be less than SLURM_STEP_NUM_TASKS=8"]),
        (
            STEP | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_ID": "x"},
            ["SLURM_STEP_NODELIST: not set", "SLURM_JOB_ID=x: must"],
        ),
    ],
)
def test_variables_that_make_no_sense_are_named(rank_info, variables, problems):
    with pytest.raises(UserError) as error:
        rank_info(variables)
    lines = str(error.value).splitlines()
    assert len(lines) == len(problems) and all(map(str.startswith, lines, problems))


@pytest.mark.parametrize("given", ["abc", "", "0", "-1", "nan", "inf", "1e10"])
def test_patience_is_a_number_of_seconds(monkeypatch, given):
    assert patience() == 600
    monkeypatch.setenv("TXL_DIST_PATIENCE", given)
    with pytest.raises(UserError, match=f"TXL_DIST_PATIENCE={given}: must be a number of seconds"):
        patience()


@pytest.mark.parametrize(
    "nodelist, host",
    [("n1", "n1"), ("n[1-4]", "n1"), ("a,b", "a"), ("rack[2,5]-n[07-09].site,x", "rack2-n07.site")],
)
def test_the_first_host_of_a_list(nodelist, host):
    assert first_host(nodelist) == host
