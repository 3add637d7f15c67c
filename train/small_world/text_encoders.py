"""Train the small model's text encoders, before it, as if pretrained.

    python -m gentron_train.small_world.text_encoders

A caption's encoder learns to tell what the caption says of its scene: the shape, colour, size and
fill of each object, motion, relation and background, "not said" among the answers. Captions are
made as they are needed; held-out combinations are not among them.
"""

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from gentron_fast.commandline import refuse, run
from gentron_fast.config import ENCODERS
from gentron_fast.files import check_output_folder, whole_folder
from gentron_fast.model import EncodedText, TextCondition
from gentron_fast.text import TextEncoder
from gentron_fast.threads import settle_threads
from gentron_train.data.options import check_positive
from gentron_train.small_world.architecture import TEXT_WIDTH, small_text_encoder
from gentron_train.small_world.autoencoder import (
    STATE_NAME,
    add_training_options,
    is_finished,
    learning_rate,
    load_state,
    open_beside,
    prepare_output,
    remove_state,
    save_state,
)
from gentron_train.small_world.renderer import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    MOTIONS,
    PHRASES,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    caption,
    sample_scene,
    vocabulary,
)

# Shapes: B captions, L tokens, D width, K facts.
NAME = "gentron_train.small_world.text_encoders"
_OBJECT = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS, "size": RADII}
# The answers to each fact, after "not said".
FACTS = {
    **{f"first {name}": tuple(words) for name, words in _OBJECT.items()},
    **{f"second {name}": tuple(words) for name, words in _OBJECT.items()},
    "motion": MOTIONS,
    "relation": tuple(RELATIONS),
    "background": tuple(BACKGROUNDS),
}
SORTED_TOGETHER = 8  # batches, so that captions of one batch are of much the same length


@dataclass(frozen=True)
class TextTraining:
    """What one run of the text encoders' training depends on."""

    steps: int = 2000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    seed: int = 0
    save_every: int = 500


class FactReader(nn.Module):
    """One encoder's text → answers to every fact: from its tokens, and from its pooled vector."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(FACTS), width) * width**-0.5)
        answers = max(map(len, FACTS.values())) + 1
        self.weight = nn.Parameter(torch.randn(len(FACTS), width, answers) * width**-0.5)
        self.pooled = nn.Linear(width, len(FACTS) * answers)
        real = torch.tensor([len(words) + 1 for words in FACTS.values()])
        self.register_buffer("surplus", torch.arange(answers) >= real[:, None], persistent=False)

    def forward(self, text: EncodedText) -> Tensor:
        """→ (2, B, K, answers), by tokens and by the pooled vector; -inf where a fact has fewer."""
        scores = text.tokens @ self.queries.T  # (B, L, K)
        weights = scores.masked_fill(~text.mask[..., None], -math.inf).softmax(1)
        by_tokens = torch.einsum("blk,bld,kda->bka", weights, text.tokens, self.weight)
        by_pooled = self.pooled(text.pooled).view_as(by_tokens)
        return torch.stack([by_tokens, by_pooled]).masked_fill(self.surplus, -math.inf)


class Lesson(nn.Module):
    """The encoders and a reader of each: what is trained."""

    def __init__(self, text_encoder: TextEncoder):
        super().__init__()
        self.text_encoder = text_encoder
        self.readers = nn.ModuleDict({name: FactReader(TEXT_WIDTH) for name in ("clip", "t5")})

    def forward(self, captions: list[str]) -> Tensor:
        """→ (encoders, 2, B, K, answers)."""
        text: TextCondition = self.text_encoder(self.text_encoder.tokenize(captions))
        return torch.stack([read(getattr(text, name)) for name, read in self.readers.items()])


def facts_said(scene: Scene, text: str) -> list[int]:
    """What a caption says of its scene: for each fact the answer's number, 0 for not said."""
    said = {}
    for place, thing in zip(("first", "second"), scene.objects, strict=False):
        noun = f"{thing.colour} {thing.shape}"  # two objects differ in colour
        match = re.search(rf"a (?:({thing.size}) )?(?:({thing.fill}) )?{noun}", text)
        said |= {f"{place} shape": thing.shape, f"{place} colour": thing.colour}
        said |= {f"{place} size": match[1], f"{place} fill": match[2]}
    if any(phrase in text for phrase in PHRASES[scene.motion]):
        said["motion"] = scene.motion
    said["relation"] = scene.relation
    if f"{scene.background} background" in text:
        said["background"] = scene.background
    pairs = ((words, said.get(name)) for name, words in FACTS.items())
    return [0 if word is None else words.index(word) + 1 for words, word in pairs]


def draw(count: int, *key: int) -> tuple[list[str], Tensor]:
    """`count` captions, three of four naming their motion, and their facts (count, K) int64."""
    rng = np.random.default_rng(key)
    captions, facts = [], []
    for _ in range(count):
        scene = sample_scene(rng)
        captions.append(caption(scene, rng, motion=bool(rng.random() < 0.75)))
        facts.append(facts_said(scene, captions[-1]))
    return captions, torch.tensor(facts)


def lesson_loss(answers: Tensor, facts: Tensor) -> Tensor:
    """Mean cross-entropy of answers (encoders, 2, B, K, answers) and facts (B, K)."""
    wanted = facts.expand(answers.shape[:-1]).flatten()
    return F.cross_entropy(answers.flatten(0, -2).float(), wanted)


@torch.no_grad()
def accuracy(lesson: Lesson, captions: list[str], facts: Tensor) -> dict[str, dict[str, float]]:
    """Share of captions of which a fact is told rightly, by each encoder's tokens and pooled."""
    right = (lesson(captions).argmax(-1) == facts).float().mean(2)
    return {
        f"{name} {part}": dict(zip(FACTS, shares, strict=True))
        for name, parts in zip(lesson.readers, right.tolist(), strict=True)
        for part, shares in zip(("tokens", "pooled"), parts, strict=True)
    }


def batches(training: TextTraining, first: int):
    """Captions and facts of every step from `first` on; a batch's captions are alike in length."""
    group, size = SORTED_TOGETHER, training.batch
    for number in range(first // group, -(-training.steps // group)):
        captions, facts = draw(group * size, training.seed, 3, number)
        order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
        shuffled = np.random.default_rng((training.seed, 4, number)).permutation(group)
        for step, part in enumerate(shuffled, number * group):
            rows = order[part * size : (part + 1) * size]
            if first <= step < training.steps:
                yield [captions[row] for row in rows], facts[rows]


def train(out: Path, training: TextTraining, device: str, resume: bool) -> dict:
    """Train, and write OUT/clip and OUT/t5, each a model with its tokenizer; the accuracy on
    captions that were not trained on.

    ValueError before any work where OUT, or what stands beside it, is not of such a training, or
    another process trains it.
    """
    check_output_folder(out, ENCODERS)
    torch.manual_seed(training.seed)
    lesson = Lesson(small_text_encoder(vocabulary())).to(device).train()
    optimizer = torch.optim.AdamW(lesson.parameters(), lr=training.lr, weight_decay=0.0)
    folder, log = open_beside(out)
    first = load_state(folder / STATE_NAME, lesson, optimizer) if resume else 0
    start = time.monotonic()
    with (
        tqdm(total=training.steps, initial=first, desc="text", mininterval=5) as bar,
        open(log, "a" if first else "w") as lines,
    ):
        for step, (captions, facts) in enumerate(batches(training, first), first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                answers = lesson(captions)
            loss = lesson_loss(answers, facts.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lesson.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if (step + 1) % 20 == 0:
                bar.set_postfix(loss=round(loss.item(), 4))
                seconds = round(time.monotonic() - start, 1)
                values = {"step": step + 1, "seconds": seconds, "loss": round(loss.item(), 5)}
                lines.write(json.dumps(values) + "\n")
                lines.flush()
            if (step + 1) % training.save_every == 0:
                save_state(folder / STATE_NAME, lesson, optimizer, step + 1)
    captions, facts = draw(512, training.seed, 5)
    shares = accuracy(lesson.eval(), captions, facts.to(device))
    write(lesson.text_encoder.cpu(), out)
    remove_state(folder)
    return shares


def write(text_encoder: TextEncoder, out: Path) -> None:
    """OUT/clip and OUT/t5, each a model with its tokenizer, as --clip and --t5 take them."""
    with whole_folder(out, ENCODERS) as partial:
        for name, model in text_encoder.encoders.items():
            model.save_pretrained(partial / name)
            text_encoder.save_tokenizer(name, partial / name)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: command(argv), argv, "stopped; go on with --resume")


def command(argv: list[str]) -> None:
    """Train as a command line says."""
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.splitlines()[0])
    parser.error = refuse
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    add_training_options(parser, TextTraining)
    args = parser.parse_args(argv)
    check_positive(args, "lr")
    prepare_output(args.out, ENCODERS)
    if args.resume and is_finished(args.out):
        print(f"text encoders in {args.out}, finished before")
        return
    training = TextTraining(args.steps, args.batch, args.lr, seed=args.seed)
    settle_threads()
    accuracies = train(args.out, training, args.device, args.resume)
    for name, shares in accuracies.items():
        print(f"{name:12}", *(f"{fact} {100 * share:.0f}" for fact, share in shares.items()))
    print(f"text encoders in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
