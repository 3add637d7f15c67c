"""Pictures while a model trains: what is told where there is none."""

from types import SimpleNamespace

import torch

from gentron_train import trainer as trainer_module
from gentron_train.trainer import Trainer


def test_latents_that_are_not_finite_are_told_and_make_no_picture(world, monkeypatch, capsys):
    kept = []
    trainer = SimpleNamespace(
        settings=SimpleNamespace(vae=world / "vae"),
        loader=SimpleNamespace(sizes=(4, 1, 8, 8)),
        text_encoder=object(),
        frozen_text=None,
        device=torch.device("cpu"),
        engine=None,
        state=SimpleNamespace(step=3),
        log=SimpleNamespace(main=True, picture=lambda *args: kept.append(args)),
        saver=SimpleNamespace(checkpoints=SimpleNamespace(barrier=lambda: None)),
    )
    monkeypatch.setattr(trainer_module, "say", print)
    latents = torch.zeros(1, 4, 1, 8, 8)
    monkeypatch.setattr(trainer_module.SamplePictures, "latents", lambda *_: latents)
    Trainer.sample(trainer)
    ((step, name, picture),) = kept
    assert (step, name, picture.shape[-1]) == (3, "samples", 3) and capsys.readouterr().out == ""
    latents[..., 0] = torch.nan
    Trainer.sample(trainer)
    told = capsys.readouterr().out
    assert told.startswith("step 3: no sample picture: the latents are not finite")
    assert told.count("\n") == len(kept) == 1
