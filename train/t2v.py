"""Train a text-to-video GenTron from a text-to-image pipeline: deepspeed train/t2v.py"""

from gentron_train.engine import run, train

if __name__ == "__main__":
    run(lambda: train("t2v", __doc__))
