"""What a process takes from its launcher: its share of the work, and its GPU."""

import pytest
import torch

from gentron_fast.commandline import choose_device, rank_and_world, share

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1"}


@pytest.fixture
def launched(monkeypatch):
    """(**variables): the variables of a launcher, and no other ones."""

    def launch(**variables):
        for name in (*TORCHRUN, *SRUN, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_ranks_share_the_work(variables, launched, capsys):
    work, shares = list(range(8)), []
    for rank in range(3):
        launched(**{name: "3" if value == "3" else str(rank) for name, value in variables.items()})
        shares.append(share(work, "clips"))
        assert capsys.readouterr().out == f"rank {rank} of 3: {len(shares[-1])} of 8 clips\n"
    assert sorted(n for part in shares for n in part) == work and max(map(len, shares)) == 3


@pytest.mark.parametrize(
    "variables, wanted",
    [
        ({}, (0, 1)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),  # torchrun inside a step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script without srun
    ],
    ids=["alone", "torchrun in srun", "sbatch"],
)
def test_which_variables_count(variables, wanted, launched):
    launched(**variables)
    assert rank_and_world() == wanted


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' of WORLD_SIZE '2'"),
        ({"WORLD_SIZE": "2"}, "RANK is '' of WORLD_SIZE '2'"),
        ({"RANK": "1"}, "RANK is '1' of WORLD_SIZE ''"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"SLURM_PROCID": "-1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is '-1'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranks_that_do_not_fit(variables, words, launched):
    launched(**variables)
    with pytest.raises(ValueError, match=words):
        rank_and_world()


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched()
    assert choose_device(None) == torch.device("cuda")
    for variables in ({"LOCAL_RANK": "5"}, {"SLURM_LOCALID": "1"}):
        launched(**variables)
        assert choose_device(None) == torch.device("cuda", 1)
