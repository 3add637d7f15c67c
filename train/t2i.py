"""Train a text-to-image GenTron and its text encoders: deepspeed train/t2i.py"""

import torch

from gentron_fast.config import PRESETS
from gentron_fast.model import GenTron
from gentron_train.engine import (
    Settings,
    Trainer,
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
    device = start_distributed()
    stream = prepare_data(settings, ("images",), device)
    torch.manual_seed(settings.seed)
    if settings.init is not None:
        transformer = GenTron.from_pretrained(settings.init / "transformer", torch.float32)
    else:
        transformer = GenTron(PRESETS[settings.preset])
    pretrained = settings.clip is not None or settings.t5 is not None
    if pretrained or settings.init is not None:
        text_encoder = load_text_encoder(settings)
    elif settings.preset == "small":
        text_encoder = small_text_encoder(vocabulary())
    else:
        raise ValueError(f"--preset {settings.preset} needs its text encoders: --clip, --t5")
    Trainer(settings, transformer, text_encoder, stream, device, train_text=not pretrained).train()


if __name__ == "__main__":
    run(main)
