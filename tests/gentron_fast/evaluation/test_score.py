import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gentron_fast.evaluate import main
from gentron_fast.evaluation.layout import Entry, list_entries
from gentron_fast.evaluation.results import Column, check_entries, score_column
from gentron_fast.evaluation.scorers import (
    DECODER_START,
    NO,
    QUESTION_START,
    YES,
    BlipVqa,
    ClipSimilarity,
    Detector,
    Grammar,
    Spatial,
    plain_question,
)


class Lightness:
    """A scorer without a network: the mean of the pixels; counts what it was asked."""

    name, is_official = "lightness", True

    def __init__(self, key="1"):
        self.key, self.seen = key, []

    def __call__(self, media, prompts):
        self.seen += prompts
        return [frames.mean() / 255 for frames in media]


def paint(path, value, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def run(tmp_path):
    """A run of two prompts with two images each."""
    for number, prompt in enumerate(["a cat near a dog", "a red cup"] * 2):
        paint(tmp_path / f"run/color/samples/{prompt}_{number:06d}.png", 51 * number)
    return tmp_path / "run"


def score(run, scorer, **options):
    entries = list_entries(run, "color", {})
    return score_column(run / "color", Column("color", {"annotation": scorer}), entries, **options)


def test_scores_are_the_official_file_in_the_order_of_numbers(run):
    assert score(run, Lightness()).mean == pytest.approx(0.3)
    answers = json.loads((run / "color/annotation/vqa_result.json").read_text())
    assert [answer["question_id"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["answer"] for answer in answers] == pytest.approx([0, 0.2, 0.4, 0.6])


def test_scoring_goes_on_image_by_image(run):
    class Killed(Lightness):
        def __call__(self, media, prompts):
            if self.seen:
                raise KeyboardInterrupt
            return super().__call__(media, prompts)

    with pytest.raises(KeyboardInterrupt):
        score(run, Killed(), batch=3)
    journal = next(run.glob("color/annotation/scores-*.jsonl"))
    journal.write_text(journal.read_text() + '{"of": ["torn')
    scorer = Lightness()
    assert score(run, scorer).mean == pytest.approx(0.3)
    assert scorer.seen == ["a red cup"]  # the fourth alone
    paint(run / "color/samples/a cat near a dog_000000.png", 255, size=(17, 16))
    again, other = Lightness(), Lightness("2")
    with pytest.warns(UserWarning, match="several sizes: 3 of 16 x 16, 1 of 16 x 17"):
        assert score(run, again).mean == pytest.approx(0.55)
    assert len(again.seen) == 1  # what changed since
    with pytest.warns(UserWarning):
        score(run, other)
    assert len(other.seen) == 4  # another scorer's scores are its own


def test_official_scores_made_over_ours_stay(run):
    score(run, Lightness())
    path = run / "color/annotation/vqa_result.json"
    path.write_text('[{"question_id": 0, "answer": 0.5}]')
    with pytest.warns(UserWarning, match="was made elsewhere and stays as it is"):
        score(run, Lightness())
    assert path.read_text() == '[{"question_id": 0, "answer": 0.5}]'


def test_images_whose_pixels_the_rules_do_not_count_are_told(run):
    class Counting(Lightness):
        side_of_rules = 512

    with pytest.warns(UserWarning, match="of 16 x 16, where the rules count 512 x 512 pixels"):
        assert len(score(run, Counting()).scores) == 4


def test_an_unreadable_image_is_told_and_left_out(run):
    (run / "color/samples/a red cup_000003.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"color: 1 unreadable, left out: a red cup_000003.png"):
        result = score(run, Lightness())
    assert result.mean == pytest.approx(0.2) and list(result.scores) == [0, 1, 2]


def test_a_result_made_elsewhere_is_not_overwritten(run):
    path = run / "color/annotation/vqa_result.json"
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.warns(UserWarning, match="was made elsewhere"):
        score(run, Lightness())
    assert path.read_text() == "[]"


TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TINY_VISION = TINY_TEXT | {"image_size": 32, "patch_size": 16}
WORDS = ["a", "cat", "dog", "red", "cup", "near", "the"]


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    """A random BLIP for questions with a tokenizer whose special words have their places."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    folder = tmp_path_factory.mktemp("blip")
    words = [f"[unused{i}]" for i in range(QUESTION_START + 1)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[YES], words[NO], words[2000 : 2000 + len(WORDS)] = "yes", "no", WORDS
    words[1029] = "?"
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    text = TINY_TEXT | {"vocab_size": QUESTION_START + 1, "encoder_hidden_size": 16}
    text |= {"bos_token_id": DECODER_START, "sep_token_id": 102, "initializer_range": 1.0}
    config = BlipConfig(text_config=text, vision_config=TINY_VISION, projection_dim=16)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP with the tokenizer of the small world."""
    from transformers import CLIPConfig, CLIPModel

    from gentron_train.small_world.architecture import small_text_encoder

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = small_text_encoder(WORDS).tokenizers["clip"]
    tokenizer.save_pretrained(folder)
    text = TINY_TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=TINY_VISION, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A random detector of closed labels."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    vision = TINY_VISION | {"image_size": [32, 32], "num_detection_tokens": 5}
    labels = {0: "cat", 1: "dog", 2: "cup"}
    YolosForObjectDetection(YolosConfig(**vision, id2label=labels)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    YolosImageProcessor(size=size, do_pad=False).save_pretrained(folder)
    return folder


class Words:
    """A grammar by hand."""

    KINDS = dict.fromkeys(("cat", "dog", "cup"), "NOUN") | {"red": "ADJ"}

    def chunks(self, prompt):
        return [chunk.strip() for chunk in prompt.split("near")]

    def tokens(self, prompt):
        return [(word, self.KINDS.get(word, "X")) for word in prompt.split()]


@pytest.fixture
def media():
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (3, 1, 40, 48, 3), np.uint8))


def test_blip_answers_as_its_decoder_begins(blip_folder, media):
    scorer = BlipVqa(blip_folder, "cpu", Words(), batch=2)
    prompts = ["a cat near a dog", "a red cup", "the dog near a cat"]
    scores = scorer(media, prompts)
    assert not scorer.is_official and "32 px" in scorer.name
    # The definition: one question at a time, nothing padded, by the network's own forward.
    for frames, prompt, score in zip(media, prompts, scores, strict=True):
        product = np.float32(1)
        for chunk in Words().chunks(prompt):
            words = scorer.tokenizer(f"{chunk}?", return_tensors="pt").input_ids
            words[0, 0] = QUESTION_START
            picture = Image.fromarray(frames[0]).resize((32, 32), Image.Resampling.BICUBIC)
            mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
            deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
            pixels = (torch.from_numpy(np.array(picture)) / 255 - mean) / deviation
            with torch.no_grad():
                start = torch.tensor([[DECODER_START]])
                seen = scorer.model.vision_model(pixels.permute(2, 0, 1)[None])[0]
                read = scorer.model.text_encoder(words, encoder_hidden_states=seen)[0]
                logits = scorer.model.text_decoder(start, encoder_hidden_states=read).logits[0, 0]
            yes, no = logits.double().softmax(-1)[[YES, NO]].tolist()
            product *= np.float32(round(yes / (yes + no), 4))
        assert score == pytest.approx(float(product), abs=1.5e-4)
    assert len(set(scores)) == 3 and all(0 < score < 1 for score in scores)


def test_questions_are_read_as_the_official_code_reads_them():
    assert plain_question('The "Red" (big) cup: 1.5?') == "the red big cup 15?"


def test_clip_is_the_cosine(clip_folder, media):
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    scorer = ClipSimilarity(clip_folder, "cpu")
    prompts = ["a red cup", "a cat near a dog", "the dog"]
    scores = scorer(media, prompts)
    for frames, prompt, score in zip(media, prompts, scores, strict=True):
        words = scorer.tokenizer([prompt], return_tensors="pt")
        pixels = images(Image.fromarray(frames[0]), return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = scorer.model(words.input_ids, pixels, words.attention_mask).logits_per_image
        cosine = float(logits / scorer.model.logit_scale.exp().detach())
        assert score == pytest.approx(cosine, abs=1e-5)
    complex_scorer = scorer.with_grammar(Words())
    assert complex_scorer(media[:1], ["a red cup"]) == pytest.approx(scorer(media[:1], ["a cup"]))
    assert complex_scorer.key != scorer.key


def test_a_detector_of_closed_labels(detector_folder, media):
    detector = Detector(detector_folder, "cpu", 0.1)
    pictures = [Image.fromarray(frames[0]) for frames in media]
    found = detector(pictures, [("cat", "dog")] * 3)
    assert all(found) and not detector.is_zero_shot and "YolosForObjectDetection" in detector.name
    for detections in found:
        assert {detection.label for detection in detections} <= {"cat", "dog", "cup"}
        confidences = [detection.confidence for detection in detections]
        assert confidences == sorted(confidences, reverse=True) and min(confidences) > 0.1
    scores = Spatial(detector, Words())(media, ["a cat near a dog", "red", "a cup near a cat"])
    assert scores[1] == 0 and all(0 <= score <= 1 for score in scores)


def test_a_zero_shot_detector(clip_folder, media, tmp_path):
    from transformers import (
        CLIPTokenizer,
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessor,
        OwlViTProcessor,
    )

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text = TINY_TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = OwlViTConfig(text_config=text, vision_config=TINY_VISION, projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 16
    images = OwlViTImageProcessor(size={"height": 32, "width": 32})
    OwlViTProcessor(images, tokenizer).save_pretrained(tmp_path)
    detector = Detector(tmp_path, "cpu", 0.0)
    pictures = [Image.fromarray(frames[0]) for frames in media]
    found = detector(pictures, [("cat", "dog"), ("cup", "cup"), ("dog near dog", "cat")])
    assert detector.is_zero_shot
    labels = [{d.label for d in own} for own in found]
    assert labels == [{"cat", "dog"}, {"cup"}, {"dog near dog", "cat"}]


def test_a_detector_that_answers_in_words(media, tmp_path):
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    words = [f"[unused{i}]" for i in range(1013)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[200:203], words[1012] = ["cat", "dog", "cup"], "."
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    size = {"shortest_edge": 64, "longest_edge": 64}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer).save_pretrained(
        tmp_path
    )
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=2,
        image_size=32,
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 16}.items()
    }
    config = GroundingDinoConfig(
        text_config=TINY_TEXT | {"model_type": "bert", "vocab_size": len(words)},
        backbone_config=backbone,
        d_model=32,
        num_queries=5,
        disable_custom_kernels=True,
        **sizes,
    )
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    detector = Detector(tmp_path, "cpu", 0.0)
    pictures = [Image.fromarray(frames[0]) for frames in media[:2]]
    found = detector(pictures, [("cat", "dog"), ("cup", "cup")])
    assert detector.is_zero_shot and [len(own) for own in found] == [5, 5]
    assert not any("dog" in detection.label for detection in found[1])


def test_the_grammar_of_the_english_model():
    pytest.importorskip("spacy")
    grammar = Grammar()
    assert grammar.chunks("a green bench and a blue bowl") == ["a green bench", "a blue bowl"]
    nouns = [text for text, kind in grammar.tokens("a girl on the top of a frog") if kind == "NOUN"]
    assert nouns == ["girl", "top", "frog"]


@pytest.fixture
def evaluate(capsys):
    def call(*arguments):
        code = main(["score", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def whole_run(tmp_path):
    """A run of three categories, one prompt and two images each, that was not made here."""
    generator = np.random.default_rng(0)
    prompts = {
        "color": "a red cup",
        "spatial": "a cat near a dog",
        "complex": "The cat is near a dog",
    }
    (tmp_path / "prompts").mkdir()
    for category, prompt in prompts.items():
        (tmp_path / f"prompts/{category}_val.txt").write_text(f"{prompt}.\n")
        for number in range(2):
            path = tmp_path / f"run/{category}/samples/{prompt}_{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    for kind in ("spatial", "action"):
        text = prompts["complex"] if kind == "spatial" else "Another."
        (tmp_path / f"prompts/complex_val_{kind}.txt").write_text(text)
    return tmp_path / "run"


def test_score_with_networks(evaluate, whole_run, blip_folder, clip_folder, detector_folder):
    pytest.importorskip("spacy")
    folders = ["--blip", blip_folder, "--clip", clip_folder, "--detector", detector_folder]
    folders += ["--compbench", whole_run.parent / "prompts", "--device", "cpu"]
    code, out, err = evaluate(whole_run, *folders, "--threshold", 0.1, "--title", "ours")
    assert code == 0, err
    assert "| GenTron G/2, CLIP-L and T5-XXL | 76.74 | 57.00 |" in out
    assert "| **ours** | – | – | – | – | – | – |" in out  # no scorer is the official one
    assert "| spatial | " in out and "YolosForObjectDetection" in out
    assert out == (whole_run / "table.md").read_text()
    read = {
        place: [a["answer"] for a in json.loads((whole_run / "complex" / place).read_text())]
        for place in (
            "annotation_blip/vqa_result.json",
            "labels/annotation_obj_detection_2d/vqa_result.json",
            "annotation_3_in_1/vqa_result.json",
        )
    }
    blip, spatial, combined = read.values()
    assert combined == pytest.approx([(a + b) / 2 for a, b in zip(blip, spatial, strict=True)])
    scores = json.loads((whole_run / "scores.json").read_text())
    assert scores["complex"]["mean"] == pytest.approx(np.mean(combined), abs=1e-12)
    assert "1 prompts have another number of images than 10" in err


def test_a_scorer_that_is_missing_is_told_and_the_rest_goes_on(evaluate, whole_run, blip_folder):
    pytest.importorskip("spacy")
    code, out, err = evaluate(whole_run, "--blip", blip_folder, "--device", "cpu")
    assert code == 0 and "- color: 2 images, BLIP-VQA" in out
    assert "spatial is not scored: no --detector" in err
    assert "complex is not scored: no --clip and --detector" in err


def write_official(folder, category, place, answers):
    path = folder / category / place / "vqa_result.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps([{"question_id": i, "answer": answer} for i, answer in enumerate(answers)])
    )


@pytest.mark.parametrize(
    "answers",
    ['[{"question_id": 1, "answer": 0.5}]', '[{"question_id": Infinity, "answer": 1}]', "[" * 9999],
    ids=["numbered from 1", "no number", "nested"],
)
def test_official_scores_of_another_form_are_one_line(evaluate, whole_run, tmp_path, answers):
    write_official(official := tmp_path / "official", "color", "annotation_blip", [])
    (official / "color/annotation_blip/vqa_result.json").write_text(answers)
    *_, err = evaluate(whole_run, "--from-official", official)
    assert "annotation_blip/vqa_result.json" in err and "Traceback" not in err


def test_official_scores_stand_in_the_official_columns(evaluate, whole_run, tmp_path):
    official = tmp_path / "official"
    write_official(official, "color", "annotation_blip", ["0.5000", "0.2500"])
    write_official(official, "spatial", "labels/annotation_obj_detection_2d", [0.9])
    write_official(official, "non_spatial", "annotation_clip", [0.3, 0.32])
    parts = {"annotation_blip": 0.5, "annotation_clip": 0.3, "annotation_obj_detection_2d": 0.7}
    for place, answer in parts.items():
        write_official(official, "complex", place, [answer, answer])
    prompts = ["--compbench", tmp_path / "prompts"]
    (whole_run / "manifest.json").write_text('{"count": 2}')  # whatever else it lacks
    code, out, err = evaluate(whole_run, "--from-official", official, *prompts)
    assert code == 0, err
    assert "| **run** | 37.50 | – | – | – | 31.00 | 60.00 |" in out
    assert "spatial/labels/annotation_obj_detection_2d has 1 scores, the run 2 images" in err
    # What was combined here is not the official code's.
    shutil.copytree(whole_run / "complex/annotation_3_in_1", official / "complex/annotation_3_in_1")
    _, _, err = evaluate(whole_run, "--from-official", official)
    assert "annotation_3_in_1/vqa_result.json is not the official code's" in err


def test_without_grammar_what_needs_none_is_scored(evaluate, whole_run, clip_folder, monkeypatch):
    def absent():
        raise ValueError("no grammar here")

    monkeypatch.setattr("gentron_fast.evaluation.scorers.Grammar", absent)
    samples = whole_run / "non_spatial/samples"
    samples.mkdir(parents=True)
    shutil.copy(next(whole_run.glob("color/samples/*")), samples / "a red cup_000000.png")
    folders = ["--clip", clip_folder, "--blip", clip_folder, "--device", "cpu"]
    code, out, err = evaluate(whole_run, *folders)
    assert code == 0 and "- non-spatial: 1 images, CLIP" in out
    assert "no grammar here" in err and "color is not scored: no English grammar" in err


@pytest.mark.parametrize(
    "manifest",
    [{"renamed": {"x": 1}}, {"prompts": {"color": "text"}}, {"count": 0}, {"kinds": []}],
    ids=str,
)
def test_a_damaged_manifest_is_one_line(evaluate, whole_run, manifest):
    (whole_run / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = evaluate(whole_run)
    assert code == 2 and err.count("\n") == 1 and f"{next(iter(manifest))} of " in err


def test_prompts_that_lack_images_are_told():
    entries = [Entry(Path(f"{i}.png"), prompt, i) for i, prompt in enumerate("aabbbx")]
    with pytest.warns(UserWarning) as told:
        check_entries("color", entries, ["a.", "b", "c"], 2)
    assert [str(warning.message) for warning in told] == [
        "color: 1 of 3 prompts have no image: 'c'",
        "color: 1 prompts of images are none of the benchmark's: 'x'",
        "color: 1 prompts have another number of images than 2: 'b'",
    ]


def test_official_scores_beside_our_own(evaluate, whole_run, clip_folder, blip_folder):
    pytest.importorskip("spacy")
    write_official(whole_run, "spatial", "labels/annotation_obj_detection_2d", [0.9, 0.7])
    write_official(whole_run, "complex", "labels/annotation_obj_detection_2d", [0.9, 0.7])
    arguments = ["--from-official", whole_run, "--blip", blip_folder, "--clip", clip_folder]
    arguments += ["--compbench", whole_run.parent / "prompts", "--device", "cpu"]
    for _ in range(2):
        code, out, err = evaluate(whole_run, *arguments)
        assert code == 0 and "| **run** | – | – | – | 80.00 | – | – |" in out
        assert "left out" not in err and "made elsewhere" not in err, err
        assert "- complex: 2 images, the official code, BLIP-VQA" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no run folder nowhere"),
        (["."], "holds no color/samples"),
        ([".", "--threshold", "2"], "--threshold is 2, wanted 0 to 1"),
        ([".", "--from-official", "."], "has no color/annotation_blip/vqa_result.json"),
    ],
    ids=["no folder", "no images", "threshold", "no official scores"],
)
def test_refused_in_one_line(evaluate, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = evaluate(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


def test_a_folder_that_holds_no_scorer_leaves_the_others(
    evaluate, whole_run, clip_folder, tmp_path
):
    pytest.importorskip("spacy")
    samples = whole_run / "non_spatial/samples"
    samples.mkdir(parents=True)
    shutil.copy(next(whole_run.glob("color/samples/*")), samples / "a red cup_000000.png")
    folders = ["--blip", tmp_path, "--clip", clip_folder, "--device", "cpu"]
    code, out, err = evaluate(whole_run, *folders)
    assert code == 0 and "- non-spatial: 1 images, CLIP" in out and "Traceback" not in err
    assert "--blip: cannot load BlipForQuestionAnswering" in err
    assert "color is not scored: no --blip" in err


def test_a_folder_that_holds_no_scorer_is_one_line(evaluate, whole_run, tmp_path):
    pytest.importorskip("spacy")
    code, _, err = evaluate(whole_run, "--blip", tmp_path, "--device", "cpu")
    assert code == 2 and "cannot load BlipForQuestionAnswering" in err.splitlines()[-1]
