"""Train a text-to-video GenTron from a text-to-image pipeline: deepspeed train/t2v.py"""

from gentron_train.process import run
from gentron_train.trainer import train

if __name__ == "__main__":
    run(lambda: train("t2v", __doc__))
