"""The parts of the small model that ships, untrained: its autoencoder and its text encoders."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from gentron_fast.text import MAX_TOKENS, WHOLE_WORDS, TextEncoder
from gentron_fast.vae import VideoVAE

# Channels per level, full resolution first. Nearly all the time goes to the full-resolution level,
# nearly all the parameters to the last two.
VAE_CHANNELS = (16, 32, 64, 64)
TEXT_WIDTH = 128
WORD_END = "</w>"


def small_vae(channels: tuple[int, ...] = VAE_CHANNELS) -> VideoVAE:
    """The small AutoencoderKL, freshly initialised: factor 8, 4 latent channels.

    Its scaling factor is 1 until training measures the latents and sets it with
    `vae.autoencoder.register_to_config(scaling_factor=...)`.
    """
    levels = len(channels)
    autoencoder = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
    )
    return VideoVAE(autoencoder)


def small_text_encoder(words: list[str]) -> TextEncoder:
    """A small CLIP that knows `words` as one token each, and a small T5 on bytes; 1 M parameters.

    Both are freshly initialised from torch's global generator, and both encode any text.
    """
    tokenizer = word_tokenizer(words)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS["clip"],
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's own 0.02 is drowned by what the first layer adds, and all words would start out alike.
    nn.init.normal_(clip.embeddings.token_embedding.weight, std=0.2)
    nn.init.normal_(clip.embeddings.position_embedding.weight, std=0.1)
    byte_tokenizer = ByT5Tokenizer(extra_ids=0)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(byte_tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=192,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    return TextEncoder(clip=(clip, tokenizer), t5=(t5, byte_tokenizer))


def word_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIPTokenizer in which every given word is one token and all other text falls to pieces
    of words, down to single bytes. The order of the words does not matter."""
    words = sorted({word.lower() for word in words})
    for word in words:
        if not (word.isascii() and word.isalpha()):
            raise ValueError(f"{word!r} is no single word of letters a-z")
    merges = byte_pair_merges(words)
    characters = sorted(ByteLevel.alphabet())
    tokens = [
        *characters,
        *(character + WORD_END for character in characters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS["clip"],
        **{WHOLE_WORDS: True},
    )


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, after which each word is one token: the most frequent pair of
    neighbours is merged until no word has two parts (Sennrich et al. 2016)."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        split = [_merge(parts, best) for parts in split]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
