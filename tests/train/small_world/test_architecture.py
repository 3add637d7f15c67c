import pytest
import torch

from gentron_fast.vae import VideoVAE
from gentron_train.small_world.architecture import (
    byte_pair_merges,
    small_text_encoder,
    small_vae,
    word_tokenizer,
)

WORDS = ["a", "red", "are", "circle", "circles", "moving", "spinning", "left", "of", "background"]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_small_vae():
    vae = small_vae()
    assert isinstance(vae, VideoVAE)
    assert (vae.factor, vae.latent_channels, vae.scaling_factor) == (8, 4, 1.0)
    assert parameters(vae) <= 1.2e6
    with torch.no_grad():
        mean, std = vae.encode(torch.zeros(1, 3, 2, 64, 64))
        assert mean.shape == std.shape == (1, 4, 2, 8, 8)
        assert vae.decode(mean).shape == (1, 3, 2, 64, 64)
    vae.autoencoder.register_to_config(scaling_factor=0.5)
    assert vae.scaling_factor == 0.5


def test_small_text_encoder():
    torch.manual_seed(0)
    encoder = small_text_encoder(WORDS).eval()
    assert parameters(encoder) <= 1.1e6
    condition = encoder.encode(["a red circle moving left", ""])
    for encoded in condition:
        assert encoded.tokens.shape[-1] == encoded.pooled.shape[-1] == 128
        assert encoded.tokens[encoded.mask].std() == pytest.approx(1, abs=0.1)
    assert condition.clip.mask.sum(1).tolist() == [7, 2]
    assert condition.t5.mask.sum(1).tolist() == [25, 1]
    # CLIP pools at the end token, wherever it stands.
    for row, last in enumerate([6, 1]):
        assert torch.equal(condition.clip.pooled[row], condition.clip.tokens[row, last])


def test_words_start_out_distinct():
    torch.manual_seed(0)
    encoder = small_text_encoder(WORDS).eval()
    for encoded in encoder.encode(["a red circle moving left"]):
        tokens = torch.nn.functional.normalize(encoded.tokens[0], dim=-1)
        similarity = tokens @ tokens.T
        count = len(tokens)
        assert (similarity.sum() - count) / (count * (count - 1)) < 0.7


def test_every_known_word_is_one_token():
    tokenizer = word_tokenizer(WORDS)
    for word in WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
        assert tokenizer.tokenize(word.upper()) == [f"{word}</w>"]
    assert tokenizer.eos_token_id == len(tokenizer) - 1 > 2  # 2 would pool at the largest id


@pytest.mark.parametrize("text", ["reds arc", "Zürich, 漢字 🙂 42!", "\x00 \x7f"])
def test_any_other_text_falls_to_pieces_without_loss(text):
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in ids  # the unknown token
    joined = tokenizer.decode(ids).replace(" ", "")
    assert joined == "".join(text.lower().split())


def test_word_order_and_repeats_do_not_matter():
    first = word_tokenizer(WORDS)
    second = word_tokenizer([*reversed(WORDS), "Red"])
    assert first.get_vocab() == second.get_vocab()
    text = "a red circle spinning bread"
    assert first(text)["input_ids"] == second(text)["input_ids"]


def test_byte_pair_merges():
    assert byte_pair_merges(["ab", "a"]) == [("a", "b</w>")]
    assert byte_pair_merges(["aaa", "baa"]) == [("a", "a</w>"), ("b", "aa</w>"), ("a", "aa</w>")]


@pytest.mark.parametrize("word", ["two words", "don't", "é", "42"])
def test_what_is_no_single_word_is_refused(word):
    with pytest.raises(ValueError, match="is no single word of letters"):
        word_tokenizer([word])
