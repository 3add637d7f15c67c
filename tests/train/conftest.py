"""What the training tests share: a small world on disk, and ranks without the launcher."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import free_port

from gentron_train.small_world.architecture import small_text_encoder, small_vae
from gentron_train.small_world.renderer import vocabulary, write_shards
from gentron_train.small_world.text_encoders import write


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a few shards (data), an untrained autoencoder (vae) and untrained text encoders
    (text)."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "data", images=12, clips=6, shard_size=6, processes=1, progress=False)
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    write(small_text_encoder(vocabulary()), folder / "text")
    return folder


class Ranks:
    """Ranks of a training run as forks of this process: the launcher's, without its ten seconds."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, count: int, function: Callable, *args) -> list[int]:
        """Process ids of forks that call function(*args) in the launcher's environment."""
        port, pids = str(free_port()), []
        for rank in map(str, range(count)):
            if pid := os.fork():
                pids.append(pid)
                continue
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
            status = 1
            try:
                function(*args)
                status = 0
            except SystemExit as leaving:
                status = leaving.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        return pids

    @staticmethod
    def wait(pids: list[int], seconds: float = 600) -> list[int]:
        """Their exit statuses; below 0: the signal that ended them, SIGKILL when time is up."""
        statuses, deadline = {}, time.monotonic() + seconds
        while len(statuses) < len(pids):
            for pid in [pid for pid in pids if pid not in statuses]:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return [statuses[pid] for pid in pids]

    def call(self, count: int, function: Callable, *args) -> list:
        """What function(*args) returns on every rank, by way of files."""

        def keep() -> None:
            torch.save(function(*args), self.folder / f"result{os.environ['RANK']}.pt")

        statuses = self.wait(self.start(count, keep))
        assert statuses == [0] * count, statuses
        return [torch.load(self.folder / f"result{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Ranks:
    torch.set_num_threads(1)  # a pool of threads in the parent would hang its forks
    return Ranks(tmp_path_factory.mktemp("ranks"))
