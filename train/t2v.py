"""Train a text-to-video GenTron from a text-to-image pipeline: deepspeed train/t2v.py"""

from pathlib import Path

import torch

from gentron_fast.model import GenTron
from gentron_train.engine import (
    Settings,
    Trainer,
    check_run_folder,
    load_text_encoder,
    parse_settings,
    prepare_data,
    run,
    start_distributed,
)


def main() -> None:
    defaults = Settings(run=Path("runs/t2v"), init=Path("runs/t2i/pipeline"), steps=2800, batch=16)
    settings = parse_settings(defaults, __doc__)
    check_run_folder(settings)
    device = start_distributed()
    transformer = GenTron.from_pretrained(settings.init / "transformer", torch.float32)
    stream = prepare_data(settings, ("images", "clips"), device)
    torch.manual_seed(settings.seed)
    if not transformer.config.temporal:  # else --init names a T2V pipeline, to go on from
        transformer = GenTron.from_t2i(transformer)
    text_encoder = load_text_encoder(settings)
    Trainer(settings, transformer, text_encoder, stream, device, train_text=False).train()


if __name__ == "__main__":
    run(main)
