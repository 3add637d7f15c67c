"""train/t2i.py with checkpoints that take 40 seconds."""

import time

from gentron_train.checkpoint import Checkpoints
from gentron_train.process import run
from gentron_train.trainer import train

save = Checkpoints.save


def slow_save(self, *args):
    time.sleep(40)
    return save(self, *args)


if __name__ == "__main__":
    Checkpoints.save = slow_save
    run(lambda: train("t2i", __doc__))
