"""Train a text-to-image GenTron and its text encoders: deepspeed train/t2i.py"""

import torch

from gentron_fast.config import PRESETS
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
from gentron_train.shapes import vocabulary
from gentron_train.small import small_text_encoder


def main() -> None:
    settings = parse_settings(Settings(draws=4), __doc__)
    check_run_folder(settings)
    pretrained = settings.clip is not None or settings.t5 is not None
    if settings.preset != "small" and not pretrained and settings.init is None:
        raise ValueError(f"--preset {settings.preset} needs its text encoders: --clip, --t5")
    device = start_distributed()
    torch.manual_seed(settings.seed)
    if settings.init is not None:
        transformer = GenTron.from_pretrained(settings.init / "transformer", torch.float32)
    else:
        transformer = GenTron(PRESETS[settings.preset])
    if pretrained or settings.init is not None:
        text_encoder = load_text_encoder(settings)
    else:
        text_encoder = small_text_encoder(vocabulary())
    stream = prepare_data(settings, ("images",), device)
    Trainer(settings, transformer, text_encoder, stream, device, train_text=not pretrained).train()


if __name__ == "__main__":
    run(main)
