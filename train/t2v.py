"""Train a text-to-video GenTron from a text-to-image pipeline: deepspeed train/t2v.py"""

from gentron_train.entry import start

if __name__ == "__main__":
    start("t2v", __doc__)
