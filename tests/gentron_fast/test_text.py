import io
import json
import shutil
import warnings

import pytest
import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from gentron_fast.text import MAX_TOKENS, WHOLE_WORDS, TextEncoder
from gentron_train.small_world.architecture import ByT5Tokenizer, word_tokenizer

PROMPTS = ["", "a red circle", "a circle left of a red square, moving left"]
FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def make_clip():
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["a", "red", "circle", "square", "left", "of", "moving"])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval(), tokenizer


def t5_config(tokenizer):
    return T5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3
    )


def make_t5():
    torch.manual_seed(1)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    return T5EncoderModel(t5_config(tokenizer)).eval(), tokenizer


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(clip=make_clip(), t5=make_t5())


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    encoder.save_pretrained(folder)
    return folder


def load(folder, **options):
    clip, clip_tokenizer, t5, t5_tokenizer = (folder / part for part in FOLDERS)
    return TextEncoder.from_pretrained((clip, clip_tokenizer), (t5, t5_tokenizer), **options)


def test_tokens_masks_and_the_null_text(encoder):
    tokens = encoder.tokenize(PROMPTS)
    ids, mask = tokens["clip"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [2, 5, 12]
    assert ids.shape == mask.shape == (3, 12)
    tokenizer = encoder.tokenizers["clip"]
    assert ids[0, :2].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    ids, mask = tokens["t5"]
    assert mask.sum(1).tolist() == [len(prompt) + 1 for prompt in PROMPTS]
    assert ids[0, 0] == encoder.tokenizers["t5"].eos_token_id


def test_values_against_transformers(encoder):
    condition = encoder.encode(PROMPTS)
    for name, encoded in zip(("clip", "t5"), condition, strict=True):
        inputs = encoder.tokenizers[name](PROMPTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = encoder.encoders[name](**inputs)
        mask = inputs["attention_mask"].bool()
        assert torch.equal(encoded.mask, mask)
        torch.testing.assert_close(encoded.tokens[mask], output.last_hidden_state[mask])
        assert not encoded.tokens[~mask].any()
        assert not encoded.tokens.requires_grad
        for row in range(len(PROMPTS)):
            real = output.last_hidden_state[row][mask[row]]
            pooled = real[-1] if name == "clip" else real.mean(0)
            torch.testing.assert_close(encoded.pooled[row], pooled)


def test_padding_never_changes_the_output(encoder):
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for alone, batch in zip(encoder.encode([prompt]), together, strict=True):
            length = alone.tokens.shape[1]
            assert batch.mask[row].sum() == length
            torch.testing.assert_close(batch.tokens[row, :length], alone.tokens[0])
            torch.testing.assert_close(batch.pooled[row], alone.pooled[0])


def test_long_prompts_are_cut_with_one_warning(encoder):
    encoder = TextEncoder(clip=make_clip(), t5=make_t5())
    with pytest.warns(UserWarning, match="cut to") as caught:
        tokens = encoder.tokenize(["a red circle " * 40, "a"])
    assert sorted(str(warning.message).split(";")[0] for warning in caught) == [
        "a prompt of 122 clip tokens was cut to 77",
        "a prompt of 521 t5 tokens was cut to 256",
    ]
    remarks = [str(warning.message).split(";")[0] for warning in caught]
    assert encoder.remarks("a red circle " * 40) == remarks and encoder.remarks("a") == []
    for name, limit in MAX_TOKENS.items():
        ids, mask = tokens[name]
        expected = encoder.tokenizers[name](
            "a red circle " * 40, truncation=True, max_length=limit
        )["input_ids"]
        assert ids[0].tolist() == expected
        assert mask[0].all()
        assert ids.shape == (2, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a red circle " * 40])


def test_unknown_words_are_told_up_to_a_limit(encoder, monkeypatch):
    monkeypatch.setitem(encoder.tokenizers["clip"].init_kwargs, WHOLE_WORDS, True)
    monkeypatch.setattr(encoder, "_warned_of", set())
    monkeypatch.setattr("gentron_fast.text.MOST_UNKNOWN", 3)
    with pytest.warns(UserWarning, match="never seen: qzx, qzy$"):
        encoder.tokenize(["qzx qzy"])
    with pytest.warns(UserWarning, match="never seen: zxq; later ones are not told"):
        encoder.tokenize(["qzx zxq zyq"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize(["xqz"])
    assert len(encoder._warned_of) == 3


def test_a_prompt_that_spells_the_end_token_ends_there(encoder):
    spelled = encoder.encode(["a red<|endoftext|> circle"]).clip
    plain = encoder.encode(["a red"]).clip
    torch.testing.assert_close(spelled, plain)


def test_one_encoder_alone(encoder):
    alone = TextEncoder(t5=make_t5())
    condition = alone.encode(PROMPTS)
    assert condition.clip is None
    torch.testing.assert_close(condition.t5, encoder.encode(PROMPTS).t5)
    with pytest.raises(ValueError, match="a CLIP model, a T5 model, or both"):
        TextEncoder()


def test_forward_is_differentiable(encoder):
    condition = encoder(encoder.tokenize(PROMPTS))
    sum((text.tokens.square().sum() + text.pooled.sum()) for text in condition).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        parameter.grad = None


def test_release_frees_the_weights_and_encode_says_so():
    encoder = TextEncoder(t5=make_t5())
    assert encoder.encode(["a"]).t5.tokens.shape == (1, 2, 24)
    encoder.release()
    assert not list(encoder.parameters())
    with pytest.raises(RuntimeError, match="text encoders were released"):
        encoder.encode(["a"])
    with pytest.raises(RuntimeError, match="text encoders were released"):
        encoder.save_pretrained("anywhere")


def test_no_prompts_are_refused(encoder):
    with pytest.raises(ValueError, match="no prompts"):
        encoder.encode([])


def test_a_tokenizer_larger_than_its_model_is_refused():
    with pytest.raises(ValueError, match="the t5 tokenizer knows 384 tokens, its model 259"):
        TextEncoder(t5=(make_t5()[0], ByT5Tokenizer()))


def test_saved_loaded_and_saved_again_gives_the_same_bytes(encoder, saved, tmp_path):
    loaded = load(saved)
    for ours, theirs in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not loaded.training
    # Options of a call stay in the tokenizer; they must not reach the file.
    loaded.tokenizers["clip"](PROMPTS, truncation=True, max_length=5, padding="max_length")
    loaded.save_pretrained(tmp_path)
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    again = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == again
    assert {path.parts[0] for path in files} == set(FOLDERS)
    for path in files:
        assert (saved / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_dtype(saved):
    condition = load(saved, dtype=torch.bfloat16).encode(["a red circle"])
    assert {part.dtype for text in condition for part in text} == {torch.bfloat16, torch.bool}


def test_sharded_t5_with_its_decoder_and_a_sentence_piece_vocabulary(tmp_path):
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁red", -3.0)]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    whole = T5ForConditionalGeneration(t5_config(tokenizer)).eval()
    whole.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    encoder = TextEncoder.from_pretrained(t5=(tmp_path / "model", tmp_path / "tokenizer"))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), T5Tokenizer)
    condition = encoder.encode(["a red", ""])
    assert condition.t5.mask.tolist() == [[True, True, True], [True, False, False]]
    with torch.no_grad():
        expected = whole.get_encoder()(torch.tensor([[3, 4, 1]])).last_hidden_state
    torch.testing.assert_close(condition.t5.tokens[:1], expected)


def test_a_sentencepiece_model_alone(tmp_path):
    """As T5 is published: spiece.model without tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS[1:] * 5), model_writer=model, vocab_size=25,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 9, "lower_and_strip": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = TextEncoder.tokenizers_alone({"t5": tmp_path})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    with pytest.warns(UserWarning, match="was cut to 9"):
        ids, mask = encoder.tokenize([" A red", PROMPTS[2], "left  of é", ""])["t5"]
    wanted = [[*processor.encode(text), 1] for text in ("a red", PROMPTS[2], "left  of é", "")]
    wanted[1] = [*wanted[1][:8], 1]
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == wanted


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_tells_how_prompts_are_read(folder, encoder, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    path = tmp_path / "a" / folder / "tokenizer_config.json"
    fields = {"model_max_length": 5, "lower_and_strip": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = load(tmp_path / "b")
    loaded.save_pretrained(tmp_path / "c")
    for file in (tmp_path / "b" / folder).iterdir():
        assert file.read_bytes() == (tmp_path / "c" / folder / file.name).read_bytes()

    name = "clip" if folder == "tokenizer" else "t5"
    alone = TextEncoder.tokenizers_alone({name: tmp_path / "c" / folder})
    for read in (loaded, alone):
        assert read.tokenize([" A "])[name][0].equal(encoder.tokenize(["a"])[name][0])
        with pytest.warns(UserWarning, match=f"{name} tokens was cut to 5"):
            ids = read.tokenize(["A Red circle left"])[name][0]
        whole = encoder.tokenize(["a red circle left"])[name][0]
        assert ids.tolist() == [[*whole[0, :4].tolist(), encoder.tokenizers[name].eos_token_id]]


def test_a_t5_tokenizer_says_how_long_prompts_are(saved, tmp_path):
    """As PixArt-Σ's 300, where 256 is taken for a tokenizer that says nothing."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 300}))
    encoder = load(tmp_path)
    assert (encoder.max_tokens("clip"), encoder.max_tokens("t5")) == (77, 300)
    with pytest.warns(UserWarning, match="of 401 t5 tokens was cut to 300"):
        tokens = TextEncoder(t5=(encoder.encoders["t5"], encoder.tokenizers["t5"])).encode(
            ["a" * 400]
        )
    assert tokens.t5.tokens.shape[1] == 300
    assert load(saved).max_tokens("t5") == 256


def test_clip_tokenizer_from_vocabulary_and_merges(encoder, saved, tmp_path):
    description = json.loads((saved / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(description["vocab"]))
    merges = [" ".join(pair) for pair in description["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    loaded = TextEncoder.from_pretrained(clip=(saved / "text_encoder", tmp_path))
    for ours, theirs in zip(
        loaded.tokenize(PROMPTS)["clip"], encoder.tokenize(PROMPTS)["clip"], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_wrong_folders_give_one_clear_error(saved, tmp_path):
    clip, tokenizer = saved / "text_encoder", saved / "tokenizer"
    with pytest.raises(FileNotFoundError, match=r"no clip text encoder at .*nothing: .* no such"):
        TextEncoder.from_pretrained(clip=(tmp_path / "nothing", tokenizer))
    with pytest.raises(FileNotFoundError, match=r"no clip tokenizer at .*nothing: .* no such"):
        TextEncoder.from_pretrained(clip=(clip, str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match=r"no clip text encoder at .* files are missing"):
        TextEncoder.from_pretrained(clip=(tmp_path, tokenizer))
    with pytest.raises(FileNotFoundError, match=r"no clip tokenizer at .* vocab\.json"):
        TextEncoder.from_pretrained(clip=(clip, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no t5 tokenizer at .* spiece\.model"):
        TextEncoder.from_pretrained(t5=(saved / "text_encoder_2", tmp_path))
    with pytest.raises(ValueError, match=r"text_encoder_2 is no clip text encoder: .* parameters"):
        TextEncoder.from_pretrained(clip=(saved / "text_encoder_2", tokenizer))


def test_a_name_that_is_not_on_the_hub_gives_one_clear_error(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no t5 text encoder at no/such: neither a folder"):
        TextEncoder.from_pretrained(t5=("no/such", saved / "tokenizer_2"))
    with pytest.raises(FileNotFoundError, match="no t5 tokenizer at no/such: "):
        TextEncoder.from_pretrained(t5=(saved / "text_encoder_2", "no/such"))


def test_weights_that_do_not_fit_give_one_clear_error(saved, tmp_path):
    folder = shutil.copytree(saved / "text_encoder_2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    with pytest.raises(ValueError, match=r"is no t5 text encoder: \d+ tensors .* another shape"):
        TextEncoder.from_pretrained(t5=(folder, saved / "tokenizer_2"))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"weights at .* are damaged"):
        TextEncoder.from_pretrained(t5=(folder, saved / "tokenizer_2"))
