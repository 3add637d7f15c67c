"""Results of runs that were never trained, whose means are known."""

import numpy as np

from gentron_train.findings import claims
from gentron_train.findings.scoring import SCHEMA, sampling

MADE_OF = {"shards": {"seed": 0}, "vae": "a", "text_encoder": "b", "text_encoder_2": "c"}
PROMPTS = 300  # of the table here
# The means of made-up results: what is not named is like the others.
MEANS = {
    ("clip", "alignment"): 0.8,
    ("adaln", "alignment"): 0.5,
    ("clip", "psnr"): 21.0,
    ("adaln", "psnr"): 24.0,
    ("larger", "loss"): 0.1,
    ("smaller", "loss"): 0.3,
    ("t2v-clips", "frame psnr"): 15.0,
}
USUAL = {"psnr": 22.0, "frame psnr": 22.0, "travel": 12.0, "loss": 0.2}


def made_up(table, seeds):
    """Results of every run, from the means above."""
    records = []
    for run, seed in [(run, seed) for seed in seeds for run in table.runs.values()]:
        rng = np.random.default_rng([seed, *run.name.encode()])

        def mean(measure, name=run.name):
            return MEANS.get((name, measure), USUAL.get(measure, 0.5))

        clips = ("motion", "frame alignment", "frame psnr", "place jitter", "size jitter")
        names = (*claims.MAIN, *claims.IMAGES, "frame broken", "colour jitter", "travel")
        names += clips if run.stage == "t2v" else ()
        for scale in table.scales(run):
            scores = {
                name: (mean(name) + 0.02 * rng.standard_normal(PROMPTS)).round(3).tolist()
                for name in names
            }
            scores["travel"] = [way - (scale or 0.0) for way in scores["travel"]]
            scores["relation"][0] = None
            records.append(
                {name: "cpu" for name, kind in SCHEMA.items() if kind is SCHEMA["run"]}
                | dict.fromkeys(("steps", "parameters", "flops"), 5)
                | {"run": run.name, "stage": run.stage, "seed": seed, "lambda_m": scale}
                | {"train_seconds": 600.0, "score_seconds": 60.0, "model": {}, "made_of": MADE_OF}
                | {"sampling": sampling(scale)}
                | {"loss": mean("loss") + 0.001 * seed, "curve": [[1, 2.0], [5, 1.0]]}
                | {"start": 0.0 if run.stage == "t2i" else None, "scores": scores}
                | {"settings": run.settings(table.config).on(1).to_dict() | {"seed": seed}}
            )
    return records
