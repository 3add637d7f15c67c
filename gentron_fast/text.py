"""The text encoders: CLIP and T5 by transformers, padding masked for both."""
# Shapes: B prompts, L tokens (the longest prompt of the batch), W width of the encoder.

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gentron_fast.config import GenTronConfig
from gentron_fast.files import read_json
from gentron_fast.model import CONFIG_NAME, EncodedText, TextCondition
from gentron_fast.parts import check_parameters, read_part_config, told_as
from gentron_fast.schema import (
    FLAG,
    MOST_LAYERS,
    MOST_TOKENS,
    MOST_WIDTH,
    OBJECT,
    TEXT,
    check,
    optional,
    real,
    whole,
)
from gentron_fast.transfer import on_device
from gentron_fast.weights import variant

MAX_TOKENS = {"clip": 77, "t5": 256}  # CLIP's positions; of T5 where its tokenizer says nothing
MOST_UNKNOWN = 100  # words are told of: a server is asked for others all the time
UNSAID = 10**9  # transformers' model_max_length of a tokenizer that says nothing is beyond
# Where a pipeline folder keeps each encoder and its tokenizer.
SUBFOLDERS = {"clip": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")}
MODEL_CLASSES = {"clip": "CLIPTextModel", "t5": "T5EncoderModel"}
TOKENIZER_CONFIG = "tokenizer_config.json"
# Fields of ours there: prompts are lower-cased and stripped; each word that the model was trained
# with is one token, so that any other is known to be new to it.
LOWER_AND_STRIP = "lower_and_strip"
WHOLE_WORDS = "whole_words"
Tokens = dict[str, tuple[Tensor, Tensor]]
WEIGHTS_STEM = "model"
_LAYERS, _WIDTH = whole(1, MOST_LAYERS), whole(1, MOST_WIDTH)
ENCODER_SCHEMA = dict.fromkeys(("num_hidden_layers", "num_layers"), _LAYERS)
ENCODER_SCHEMA |= dict.fromkeys(("num_attention_heads", "num_heads", "d_kv"), _WIDTH)
ENCODER_SCHEMA |= dict.fromkeys(("hidden_size", "d_model", "projection_dim"), _WIDTH)
ENCODER_SCHEMA |= dict.fromkeys(("intermediate_size", "d_ff"), whole(1, 16 * MOST_WIDTH))
ENCODER_SCHEMA |= dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), real(0, 1))
ENCODER_SCHEMA |= dict.fromkeys(("hidden_act", "feed_forward_proj"), TEXT)
ENCODER_SCHEMA |= {
    "vocab_size": whole(1, MOST_TOKENS),
    "max_position_embeddings": whole(2, MOST_TOKENS),
    "relative_attention_num_buckets": whole(4, MOST_TOKENS),
    "relative_attention_max_distance": whole(4, MOST_TOKENS),
    "text_config": OBJECT,  # of a whole CLIP
}
TOKENIZER_SCHEMA = {
    "model_max_length": optional(real(2, 1e32)),
    "extra_ids": whole(0, 10_000),
    LOWER_AND_STRIP: FLAG,
    WHOLE_WORDS: FLAG,
}


class TextEncoder(nn.Module):
    """A CLIP text model, a T5 encoder, or both, each with its tokenizer.

    Every argument is a pair (model, tokenizer) of transformers or None. Modules are found in
    `.encoders` under "clip" and "t5", tokenizers in `.tokenizers`.
    """

    def __init__(self, clip: tuple | None = None, t5: tuple | None = None):
        super().__init__()
        given = {name: pair for name, pair in (("clip", clip), ("t5", t5)) if pair is not None}
        if not given:
            raise ValueError("a text encoder needs a CLIP model, a T5 model, or both")
        self.encoders = nn.ModuleDict({name: model for name, (model, _) in given.items()})
        self.tokenizers = {name: tokenizer for name, (_, tokenizer) in given.items()}
        self._warned_of: set[str] = set()
        for name, (model, tokenizer) in given.items():
            if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
                raise ValueError(f"the {name} tokenizer has no end-of-sequence or no padding token")
            rows = model.get_input_embeddings().num_embeddings
            if len(tokenizer) > rows:
                raise ValueError(
                    f"the {name} tokenizer knows {len(tokenizer)} tokens, its model {rows}"
                )

    @classmethod
    def from_pretrained(
        cls,
        clip: tuple[str | os.PathLike, str | os.PathLike] | None = None,
        t5: tuple[str | os.PathLike, str | os.PathLike] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """Load encoders, each from (model, tokenizer): local folders or names on the Hugging Face
        hub. Weights are safetensors, in one file or in shards.

        Raises FileNotFoundError for what cannot be found, ValueError for weights that do not fit.
        """
        sources = {"clip": clip, "t5": t5}
        pairs = {
            name: (_load_model(name, source[0], dtype), _load_tokenizer(name, source[1]))
            for name, source in sources.items()
            if source is not None
        }
        return cls(**pairs).eval()

    @classmethod
    def tokenizers_alone(cls, folders: dict[str, str | os.PathLike]) -> TextEncoder:
        """What tokenizes and cannot encode, of tokenizer folders by encoder."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.encoders, encoder._warned_of = nn.ModuleDict(), set()
        encoder.tokenizers = {name: _load_tokenizer(name, path) for name, path in folders.items()}
        return encoder

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write text_encoder/ and tokenizer/ for CLIP, text_encoder_2/ and tokenizer_2/ for T5.

        The same encoder gives the same bytes, whatever it was loaded from and used for.
        """
        self._require_weights()
        for name, model in self.encoders.items():
            model_folder, tokenizer_folder = (Path(folder) / part for part in SUBFOLDERS[name])
            model.save_pretrained(model_folder)
            self.save_tokenizer(name, tokenizer_folder)

    def save_tokenizer(self, name: str, folder: Path) -> None:
        """Write the tokenizer of "clip" or "t5"."""
        _save_tokenizer(self.tokenizers[name], folder)

    def width(self, name: str) -> int | None:
        """Width of the tokens of "clip" or "t5"; None without that encoder."""
        if name not in self.encoders:
            return None
        config = self.encoders[name].config
        return config.hidden_size if name == "clip" else config.d_model

    def check_widths(self, config: GenTronConfig) -> None:
        """ValueError where an encoder is not as wide as the text that a model takes."""
        for name in config.encoders:
            if (width := self.width(name)) != (wanted := config.text_width(name)):
                raise ValueError(
                    f"the {name} text encoder is {width} wide, the transformer takes {wanted}"
                )

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Token ids (B, L) and mask (B, L), True on real tokens, for each encoder.

        Padded to the longest prompt of the batch; prompts longer than `max_tokens` are cut, with a
        warning the first time. A tokenizer_config.json with lower_and_strip has prompts lower-cased
        and stripped first, one with whole_words warns of words that the model has never seen.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        return {name: self._tokenize_for(name, prompts) for name in self.tokenizers}

    def max_tokens(self, name: str) -> int:
        """Tokens to which prompts of "clip" or "t5" are cut: as many as the tokenizer's
        model_max_length says, of CLIP no more than 77 or its positions; 256 of a T5 without it."""
        said = self.tokenizers[name].model_max_length
        if name == "t5":
            return int(said) if said < UNSAID else MAX_TOKENS[name]
        models = [self.encoders[name]] if name in self.encoders else []
        positions = [model.config.max_position_embeddings for model in models]
        return int(min(MAX_TOKENS[name], said, *positions))

    def _tokenize_for(self, name: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
        # Cut and padded here: transformers would keep both as state that save_pretrained writes.
        tokenizer = self.tokenizers[name]
        limit, end = self.max_tokens(name), tokenizer.eos_token_id
        self._warn_of_words(_unknown_words(tokenizer, prompts))
        rows = self._whole_rows(name, prompts)
        for number, row in enumerate(rows):
            if len(row) > limit:
                self._warn_of_cut(name, len(row), limit)
                rows[number] = [*row[: limit - 1], end]
        longest = max(map(len, rows))
        padding = tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def _whole_rows(self, name: str, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, its end token the last, however many they are."""
        tokenizer, rows = self.tokenizers[name], []
        end = tokenizer.eos_token_id
        if tokenizer.init_kwargs.get(LOWER_AND_STRIP):
            prompts = [prompt.lower().strip() for prompt in prompts]
        with told_as(f"the {name} tokenizer cannot read the prompts"):
            all_ids = tokenizer(prompts, verbose=False)["input_ids"]
        for row in all_ids:
            if end not in row:
                raise ValueError(f"the {name} tokenizer puts no end token {end} behind a prompt")
            # CLIP pools at the first end token; a prompt that spells one ends there.
            rows.append(row[: row.index(end) + 1])
        return rows

    def remarks(self, prompt: str) -> list[str]:
        """What `tokenize` would warn of in this prompt, a line each, however often it has."""
        told = []
        for name, tokenizer in self.tokenizers.items():
            (row,), limit = self._whole_rows(name, [prompt]), self.max_tokens(name)
            if len(row) > limit:
                told.append(f"a prompt of {len(row)} {name} tokens was cut to {limit}")
            if unknown := _unknown_words(tokenizer, [prompt]):
                told.append(f"the model has never seen: {', '.join(unknown)}")
        return told

    def _warn_of_cut(self, name: str, length: int, limit: int) -> None:
        if name not in self._warned_of:
            self._warned_of.add(name)
            warnings.warn(
                f"a prompt of {length} {name} tokens was cut to {limit}; "
                "later ones are cut without a warning",
                stacklevel=2,
            )

    def _warn_of_words(self, unknown: list[str]) -> None:
        room = max(0, MOST_UNKNOWN - len(self._warned_of))
        new = [word for word in unknown if word not in self._warned_of][:room]
        self._warned_of.update(new)
        if new:
            end = "; later ones are not told" if len(new) == room else ""
            warnings.warn(f"the model has never seen: {', '.join(new)}{end}", stacklevel=2)

    def forward(self, tokens: Tokens) -> TextCondition:
        """Encode what `tokenize` returns; differentiable.

        Tokens and pooled text come in the encoder's dtype: CLIP's pooled text is the state at the
        end token, T5's the mean over real tokens. Tokens under padding are zero.
        """
        self._require_weights()
        return TextCondition(
            **{name: self._encode_with(name, *tokens[name]) for name in self.encoders}
        )

    def _encode_with(self, name: str, ids: Tensor, mask: Tensor) -> EncodedText:
        encoder = self.encoders[name]
        ids, mask = on_device(ids, encoder.device), on_device(mask, encoder.device)
        output = encoder(input_ids=ids, attention_mask=mask.long())
        tokens = output.last_hidden_state.masked_fill(~mask[..., None], 0)
        if name == "clip":
            return EncodedText(tokens, mask, output.pooler_output)
        return EncodedText(tokens, mask, tokens.sum(1) / mask.sum(1, keepdim=True))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextCondition:
        """Encode prompts for sampling, without gradients. The empty string is the null text: two
        CLIP tokens (begin, end) and one T5 token (end)."""
        self._require_weights()
        tokens = self.tokenize(prompts)
        for name, (ids, _) in tokens.items():
            rows = self.encoders[name].get_input_embeddings().num_embeddings
            if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
                raise ValueError(
                    f"the {name} tokenizer gives tokens {int(ids.min())} to {int(ids.max())}, "
                    f"its model knows {rows}"
                )
        with told_as("the text encoders cannot encode"):
            return self(tokens)

    def release(self) -> None:
        """Free the weights once everything is encoded (T5-XXL takes 9.5 GB in bf16)."""
        self.encoders.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require_weights(self) -> None:
        if not self.encoders:
            raise RuntimeError(
                "the text encoders were released; load them again to encode more prompts"
            )


def _unknown_words(tokenizer, prompts: list[str]) -> list[str]:
    """Words that a tokenizer of whole words takes apart; none of another one."""
    if not tokenizer.init_kwargs.get(WHOLE_WORDS):
        return []
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(prompts).lower()))
    return [word for word in words if len(tokenizer.tokenize(word)) > 1]


def _load_model(name: str, source: str | os.PathLike, dtype: torch.dtype) -> nn.Module:
    import transformers

    model_class = getattr(transformers, MODEL_CLASSES[name])
    what = f"{name} text encoder"

    def load(**options):
        if folder := Path(source) if Path(source).is_dir() else None:
            read_encoder_config(folder)
            config_class = model_class.config_class
            check_parameters(
                what,
                folder,
                WEIGHTS_STEM,
                lambda: model_class(config_class.from_pretrained(folder)),
            )
        with told_as(f"no {what} at {source}"):
            return model_class.from_pretrained(
                source,
                dtype=dtype,
                variant=folder and variant(folder, WEIGHTS_STEM),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
                **options,
            )

    model, report = _load(what, source, load)
    # transformers would go on with random values in place of what is missing.
    wrong = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong:
        raise ValueError(
            f"{source} is no {name} text encoder: {len(wrong)} tensors are missing or have another "
            f"shape, {min(wrong)} among them"
        )
    return model


def read_encoder_config(folder: Path) -> dict:
    """The config.json of a text encoder. FileNotFoundError or ValueError that names the file."""
    path = folder / CONFIG_NAME
    config = read_part_config(path, ENCODER_SCHEMA)
    check(config.get("text_config", {}), ENCODER_SCHEMA, str(path))
    return config


def read_tokenizer_config(folder: Path) -> dict:
    """The tokenizer_config.json of a tokenizer, {} where it has none; ValueError as above."""
    # transformers looks into both files for code to run.
    paths = [path for name in (CONFIG_NAME, TOKENIZER_CONFIG) if (path := folder / name).is_file()]
    configs = {path.name: read_part_config(path, TOKENIZER_SCHEMA) for path in paths}
    return configs.get(TOKENIZER_CONFIG, {})


def _load_tokenizer(name: str, source: str | os.PathLike):
    from transformers import AutoTokenizer, CLIPTokenizer

    tokenizer_class = CLIPTokenizer if name == "clip" else AutoTokenizer
    files = {
        "clip": "tokenizer.json, or vocab.json and merges.txt",
        "t5": "tokenizer.json or spiece.model",
    }
    what = f"{name} tokenizer"

    def load(**options):
        read_tokenizer_config(Path(source))
        with told_as(f"no {what} at {source}"):
            tokenizer = tokenizer_class.from_pretrained(source, trust_remote_code=False, **options)
            return tokenizer, len(tokenizer) <= len(tokenizer.all_special_ids)

    empty = Path(source).is_dir() and not any(Path(source).glob("*.*"))
    if not empty:
        tokenizer, empty = _load(what, source, load)
    if empty:
        raise FileNotFoundError(f"no {what} at {source}: it takes {files[name]}")
    return tokenizer


def _load(what: str, source: str | os.PathLike, load: Callable):
    local = Path(source).is_dir()
    # "name" and "owner/name" may be on the hub; anything else can only be a folder.
    if not local and (isinstance(source, os.PathLike) or len(Path(source).parts) > 2):
        raise FileNotFoundError(f"no {what} at {source}: there is no such folder")
    try:
        return load(local_files_only=local)
    except OSError as error:
        reason = "its files are missing" if local else "neither a folder nor found on the hub"
        raise FileNotFoundError(f"no {what} at {source}: {reason}") from error


def _save_tokenizer(tokenizer, folder: Path) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # calls leave their options behind, and tokenizer.json keeps them
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    write_tokenizer_config(path, read_json(path))


def write_tokenizer_config(path: Path, config: dict) -> None:
    """A tokenizer_config.json, without what a loaded tokenizer notes of how it was loaded."""
    noted = {"is_local", "local_files_only", "name_or_path"}
    if config.get("additional_special_tokens") is None:
        noted.add("additional_special_tokens")
    kept = {key: value for key, value in config.items() if key not in noted}
    path.write_text(
        json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
