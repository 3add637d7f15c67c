"""Train a GenTron that takes guidance as an input, in one branch, from a pipeline that needs three:
deepspeed train/distill.py --teacher FOLDER"""

from gentron_train.entry import start

if __name__ == "__main__":
    start("distill", __doc__)
