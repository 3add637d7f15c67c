"""Train a text-to-image GenTron: deepspeed train/t2i.py [--config FILE]"""

from gentron_train.process import run
from gentron_train.trainer import train

if __name__ == "__main__":
    run(lambda: train("t2i", __doc__))
