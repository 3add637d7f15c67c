"""Train a text-to-image GenTron: deepspeed train/t2i.py [--config FILE]"""

from gentron_train.entry import start

if __name__ == "__main__":
    start("t2i", __doc__)
