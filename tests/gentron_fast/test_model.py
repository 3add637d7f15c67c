"""GenTron: counted parameters, names, equations, masks, T2I → T2V, motion-free identity, files."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file

from gentron_fast import PRESETS, EncodedText, GenTron, GenTronConfig, TextCondition
from gentron_fast.layers import patch_positions, sincos

BLOCK_KEYS = [
    f"{name}.{kind}"
    for name in (
        "adaln",
        "self_attention.qkv",
        "self_attention.out",
        "cross_attention.q",
        "cross_attention.kv",
        "cross_attention.out",
        "temporal_attention.qkv",
        "temporal_attention.out",
        "mlp.fc1",
        "mlp.fc2",
    )
    for kind in ("weight", "bias")
]
OUTER_KEYS = [
    f"{name}.{kind}"
    for name in (
        "patch_embed",
        "time_embed.mlp.0",
        "time_embed.mlp.2",
        "pooled_embed.clip.0",
        "pooled_embed.clip.2",
        "pooled_embed.t5.0",
        "pooled_embed.t5.2",
        "final.adaln",
        "final.linear",
    )
    for kind in ("weight", "bias")
]
OPTIONS = {
    "no cross norm": {"cross_norm": False},
    "caption projection": {"caption_projection": True},
    "one encoder": {"encoders": ("t5",)},
    "no pooled text": {"pooled_text": False},
    "final table": {"final_table": True},
    "cos first": {"timestep_cos_first": True},
    "base size": {"position_base_size": 16, "position_interpolation": 2.0},
    "size embedding": {"size_embedding": True},
    "learned range": {"learned_range": True},
    "heads": {"heads": 2},
    "adaLN-zero": {"cross_attention": False},
}


def inputs(config, frames=4, batch=2, height=8, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shape = batch, config.in_channels, frames, height, width
    latents = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.tensor([20, 700, 999][:batch])


@pytest.mark.parametrize(
    "name,millions",
    [("XL/2", 928.0), ("G/2", 3082.4), ("XL/2-CLIP-adaLN-zero", 675.1)],
)
def test_parameters_as_counted(name, millions):
    with torch.device("meta"):
        model = GenTron(PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_presets():
    names = ["XL/2-CLIP-adaLN-zero", "XL/2-CLIP", "XL/2-T5", "XL/2", "G/2", "small"]
    assert list(PRESETS) == names + [f"{name}-T2V" for name in names]
    assert [PRESETS["XL/2"].block_encoder(i) for i in range(3)] == ["clip", "t5", "clip"]
    assert PRESETS["XL/2-CLIP-adaLN-zero"].block_encoder(0) is None


def test_state_dict_keys_are_frozen(tiny_config):
    expected = set(OUTER_KEYS) | {f"blocks.{i}.{key}" for i in range(2) for key in BLOCK_KEYS}
    assert set(GenTron(tiny_config).state_dict()) == expected
    pixart = replace(
        tiny_config, final_table=True, caption_projection=True, size_embedding=True,
        pooled_text=False, encoders=("t5",), temporal=False,
    )  # fmt: skip
    keys = set(GenTron(pixart).state_dict())
    assert {"final.table", "caption_projection.t5.0.weight", "size_embed.side.mlp.0.weight"} < keys
    assert {"size_embed.aspect.mlp.2.bias"} < keys
    assert not any("pooled" in key or "temporal" in key or "clip" in key for key in keys)


def attention_by_hand(q, k, v):
    """(L, H, Dh), (S, H, Dh): the softmax written out."""
    scores = torch.einsum("lhd,shd->hls", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hls,shd->lhd", scores.softmax(-1), v).flatten(1)


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def model_by_hand(model, latents, timestep, text, motion_free):
    """The equations of the paper for one sample (C, T, H, W), token by token and frame by frame."""
    w, config, p = model.state_dict(), model.config, model.config.patch_size

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x):
        return rearrange(x, "l (n h d) -> n l h d", h=config.heads, d=config.head_size)

    frames = [rearrange(f, "c (h p) (w q) -> (h w) (c p q)", p=p, q=p) for f in latents.unbind(1)]
    positions = patch_positions(latents.shape[2] // p, latents.shape[3] // p, config, "cpu")
    x = [linear(w, "patch_embed", frame) + positions for frame in frames]
    time = linear(w, "time_embed.mlp.0", sincos(timestep[None], 256).double())
    c = linear(w, "time_embed.mlp.2", F.silu(time))
    for name in config.encoders:
        pooled = linear(w, f"pooled_embed.{name}.0", getattr(text, name).pooled)
        c = c + linear(w, f"pooled_embed.{name}.2", F.silu(pooled))
    for i, block in enumerate(f"blocks.{i}" for i in range(config.depth)):
        rows = linear(w, f"{block}.adaln", F.silu(c)).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows
        for f in range(len(x)):
            h = norm(x[f]) * (1 + scale_a) + shift_a
            qkv = heads(linear(w, f"{block}.self_attention.qkv", h))
            x[f] = x[f] + gate_a * linear(w, f"{block}.self_attention.out", attention_by_hand(*qkv))
            tokens = getattr(text, config.encoders[i % 2]).tokens[0]
            (q,) = heads(linear(w, f"{block}.cross_attention.q", norm(x[f])))
            k, v = heads(linear(w, f"{block}.cross_attention.kv", tokens))
            out = attention_by_hand(q, k, v)
            x[f] = x[f] + linear(w, f"{block}.cross_attention.out", out)
        steps = sincos(torch.arange(len(x)), config.width).double()
        qkv = torch.stack(
            [
                heads(linear(w, f"{block}.temporal_attention.qkv", norm(x[f]) + steps[f]))
                for f in range(len(x))
            ],
            dim=1,
        )  # (3, T, N, H, Dh)
        mixed = [
            qkv[2, :, n].flatten(1) if motion_free else attention_by_hand(*qkv[:, :, n])
            for n in range(qkv.shape[2])
        ]
        mixed = linear(w, f"{block}.temporal_attention.out", torch.stack(mixed, dim=1))
        for f in range(len(x)):
            x[f] = x[f] + mixed[f]
            h = linear(w, f"{block}.mlp.fc1", norm(x[f]) * (1 + scale_m) + shift_m)
            out = linear(w, f"{block}.mlp.fc2", F.gelu(h, approximate="tanh"))
            x[f] = x[f] + gate_m * out
    shift, scale = linear(w, "final.adaln", F.silu(c)).chunk(2, dim=-1)
    out = [linear(w, "final.linear", norm(frame) * (1 + scale) + shift) for frame in x]
    side = latents.shape[2] // p
    return rearrange(torch.stack(out), "t (h w) (p q c) -> c t (h p) (w q)", h=side, p=p, q=p)


def test_forward_equals_the_equations(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config)
    latents, timestep = inputs(tiny_config, frames=3, height=4, width=8)
    motion_free = torch.tensor([False, True])
    out = model(latents, timestep, text, motion_free)
    for i in range(2):
        sample = text.select(slice(i, i + 1))
        by_hand = model_by_hand(model, latents[i], timestep[i], sample, bool(motion_free[i]))
        # sin-cos tables are fp32 in both; everything else is fp64.
        torch.testing.assert_close(out[i], by_hand, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_output_and_trains(option, tiny_config, make_model, make_text):
    config = replace(tiny_config, **OPTIONS[option])
    model, text = make_model(config), make_text(config)
    latents, timestep = inputs(config, frames=2, height=4, width=12)
    out = model(latents, timestep, text)
    assert out.shape == (2, config.out_channels, 2, 4, 12)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    default = replace(config, **{key: getattr(tiny_config, key) for key in OPTIONS[option]})
    shared = make_model(default)
    fitting = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key in shared.state_dict() and shared.state_dict()[key].shape == tensor.shape
    }
    shared.load_state_dict(fitting, strict=False)
    other = shared(latents, timestep, make_text(default))
    assert other.shape != out.shape or (other - out).abs().max() > 1e-4


def test_sinusoids_and_positions_have_the_values_of_their_sources(tiny_config):
    steps = torch.tensor([0.0, 3.0, 999.0])
    angles = steps[:, None] * 10000 ** (-torch.arange(128) / 128)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(sincos(steps, 256), table, rtol=1e-4, atol=1e-4)
    halves = sincos(steps, 256, cos_first=True).chunk(2, dim=1)
    assert torch.equal(torch.cat(halves[::-1], dim=1), sincos(steps, 256))

    plain = patch_positions(16, 16, tiny_config, "cpu")
    based = replace(tiny_config, position_base_size=16)
    assert torch.equal(patch_positions(16, 16, based, "cpu"), plain)
    wide = patch_positions(8, 32, based, "cpu").unflatten(0, (8, 32))
    assert torch.equal(wide[4, 10], plain.unflatten(0, (16, 16))[8, 5])
    stretched = patch_positions(16, 16, replace(based, position_interpolation=2.0), "cpu")
    assert torch.equal(stretched.unflatten(0, (16, 16))[4, 6], plain.unflatten(0, (16, 16))[2, 3])
    # The first half of the channels is the column, the second the row.
    column, row = plain.unflatten(0, (16, 16))[2, 3].chunk(2)
    assert torch.equal(column, sincos(torch.tensor(3), 24))
    assert torch.equal(row, sincos(torch.tensor(2), 24))


def test_condition_of_size_and_final_table(tiny_config, make_model, make_text):
    config = replace(tiny_config, size_embedding=True, final_table=True, pooled_text=False)
    model, text = make_model(config), make_text(config)
    timestep = inputs(config)[1]
    size = torch.tensor([[256.0, 512.0], [100.0, 50.0]])
    c, time = model.condition(timestep, text, size)
    sides = [model.size_embed.side(size[:, i]) for i in range(2)]
    aspect = model.size_embed.aspect(torch.tensor([0.5, 2.0]))
    expected = model.time_embed(timestep) + torch.cat([*sides, aspect], dim=1)
    torch.testing.assert_close(c, expected)
    torch.testing.assert_close(
        model.final.modulation(c, time), model.final.table + expected[:, None]
    )


def test_size_embedding_reads_the_given_size(tiny_config, make_model, make_text):
    config = replace(tiny_config, size_embedding=True)
    model, text = make_model(config), make_text(config)
    latents, timestep = inputs(config, height=4, width=8)
    implied = model(latents, timestep, text)
    stated = model(latents, timestep, text, size=torch.tensor([[32, 64]] * 2))
    other = model(latents, timestep, text, size=torch.tensor([[512, 512]] * 2))
    assert torch.equal(implied, stated) and not torch.allclose(implied, other)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 6, 10), (5, 4, 6), (32, 2, 4)], ids=str)
def test_resolutions_and_frame_counts(shape, tiny_config, make_model, make_text):
    frames, height, width = shape
    model = make_model(tiny_config)
    latents, timestep = inputs(tiny_config, frames, 1, height, width)
    out = model(latents, timestep, make_text(tiny_config, batch=1))
    assert out.shape == latents.shape and out.isfinite().all()


def test_padding_never_changes_the_output(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config, clip=3, t5=4)
    latents, timestep = inputs(tiny_config)
    padded = TextCondition(text.clip.pad(11), text.t5.pad(20))
    padded.clip.tokens[:, 3:] = 1e3  # whatever lies under the mask
    padded.t5.tokens[:, 4:] = -1e3
    torch.testing.assert_close(
        model(latents, timestep, text), model(latents, timestep, padded), rtol=1e-12, atol=1e-12
    )


def test_t2v_starts_as_t2i_on_every_frame(tiny_config, make_model, make_text):
    t2i = make_model(replace(tiny_config, temporal=False), torch.float32)
    text = make_text(tiny_config, dtype=torch.float32)
    latents, timestep = inputs(tiny_config, frames=5, dtype=torch.float32)
    t2v = GenTron.from_t2i(t2i)
    assert t2v.config == tiny_config
    reference = t2i(latents, timestep, text)
    for motion_free in (None, True, torch.tensor([True, False])):
        assert torch.equal(t2v(latents, timestep, text, motion_free), reference)
    for frame in range(5):
        image = t2i(latents[:, :, frame : frame + 1], timestep, text)
        torch.testing.assert_close(reference[:, :, frame : frame + 1], image)
    with pytest.raises(ValueError, match="already has temporal layers"):
        GenTron.from_t2i(t2v)


def test_identity_mask_is_single_frame_attention(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config)
    latents, timestep = inputs(tiny_config)
    changed = latents.clone()
    changed[:, :, 2] += 1
    for motion_free in (True, torch.tensor([True, True])):
        before = model(latents, timestep, text, motion_free)
        after = model(changed, timestep, text, motion_free)
        others = [0, 1, 3]
        torch.testing.assert_close(before[:, :, others], after[:, :, others], rtol=0, atol=1e-13)
        assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-3
    moving = (model(latents, timestep, text) - model(changed, timestep, text)).abs()
    assert (moving.amax((0, 1, 3, 4)) > 1e-6).all()
    mixed = model(latents, timestep, text, torch.tensor([True, False]))
    torch.testing.assert_close(mixed[0], model(latents, timestep, text, True)[0])
    torch.testing.assert_close(mixed[1], model(latents, timestep, text, False)[1])


def test_one_frame_needs_neither_q_nor_k(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config)
    latents, timestep = inputs(tiny_config, frames=1)
    model(latents, timestep, text).square().sum().backward()
    for block in model.blocks:
        gradient = block.temporal_attention.qkv.weight.grad.unflatten(0, (3, -1))
        assert not gradient[:2].any() and gradient[2].any()


def test_checkpointing_changes_no_gradient(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config)
    latents, timestep = inputs(tiny_config)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(latents, timestep, text, torch.tensor([True, False])).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_compiles_as_one_graph(tiny_config, make_model, make_text):
    model = make_model(tiny_config, torch.float32)
    text = make_text(tiny_config, dtype=torch.float32)
    latents, timestep = inputs(tiny_config, frames=2, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        motion_free = torch.tensor([True, False])
        out = compiled(latents, timestep, text, motion_free)
        torch.testing.assert_close(out, model(latents, timestep, text, motion_free))


def test_a_prompt_may_stand_for_several_latents(tiny_config, make_model, make_text):
    model, text = make_model(tiny_config), make_text(tiny_config, batch=2)
    latents, timestep = torch.randn(6, 4, 2, 8, 8).double(), torch.arange(6) * 100
    torch.testing.assert_close(
        model(latents, timestep, text), model(latents, timestep, text.repeat(3))
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": (2, 3, 4, 8, 8)}, r"latents must be \(B, 4, T, H, W\), got \(2, 3, 4, 8, 8\)"),
        ({"latents": (2, 4, 4, 7, 8)}, "7×8 does not divide by the patch size 2"),
        ({"latents": (2, 4, 33, 8, 8)}, "frames must be 1 … 32, got 33"),
        ({"timestep": (3,)}, r"timestep must be \(2,\), got \(3,\)"),
        ({"batch": 3}, "3 prompts for 2 latents"),
        ({"encoders": ("clip",)}, "reads t5 text"),
        ({"motion_free": (3,)}, r"motion_free must be \(2,\), got \(3,\)"),
    ],
)
def test_wrong_input_is_named(change, message, tiny_config, make_model, make_text):
    config = replace(tiny_config, encoders=change.get("encoders", tiny_config.encoders))
    text = make_text(config, batch=change.get("batch", 2))
    with pytest.raises(ValueError, match=message):
        make_model(tiny_config)(
            torch.zeros(change.get("latents", (2, 4, 4, 8, 8)), dtype=torch.float64),
            torch.zeros(change.get("timestep", (2,))),
            text,
            torch.zeros(change.get("motion_free", (2,)), dtype=torch.bool),
        )


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"width": 50}, "width 50 is not divisible by 4 heads"),
        ({"encoders": ("bert",)}, "encoders must be some of"),
        ({"encoders": ()}, "needs at least one text encoder"),
    ],
)
def test_wrong_configuration_is_named(fields, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        replace(tiny_config, **fields)


def test_unknown_configuration_field_is_named(tiny_config):
    values = tiny_config.to_dict() | {"depht": 3}
    with pytest.raises(ValueError, match=r"unknown configuration fields \['depht'\]"):
        GenTronConfig.from_dict(values)


def test_save_and_load(tiny_config, make_model, make_text, tmp_path):
    model = make_model(tiny_config, torch.float32)
    model.save_pretrained(tmp_path / "a")
    loaded = GenTron.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 2  # nothing half-written stays
    latents, timestep = inputs(tiny_config, dtype=torch.float32)
    text = make_text(tiny_config, dtype=torch.float32)
    assert torch.equal(loaded(latents, timestep, text), model(latents, timestep, text))
    half = GenTron.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.bfloat16}


def test_sharded_weights_load(tiny_config, make_model, tmp_path):
    model = make_model(tiny_config, torch.float32)
    model.save_pretrained(tmp_path)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, weight_map = load_file(whole), {}
    whole.unlink()
    for part in range(2):
        name = f"diffusion_pytorch_model-{part + 1:05d}-of-00002.safetensors"
        shard = dict(sorted(tensors.items())[part::2])
        save_file(shard, tmp_path / name)
        weight_map |= dict.fromkeys(shard, name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = GenTron.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_damaged_checkpoints_are_named(tiny_config, make_model, tmp_path):
    make_model(tiny_config, torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)

    save_file({k: v for k, v in tensors.items() if k != "patch_embed.bias"}, path)
    with pytest.raises(ValueError, match=r"missing \['patch_embed.bias'\]"):
        GenTron.from_pretrained(tmp_path)
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"surplus \['extra'\]"):
        GenTron.from_pretrained(tmp_path)
    save_file(tensors | {"patch_embed.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"patch_embed.bias .* shape \(7,\), wanted \(48,\)"):
        GenTron.from_pretrained(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        GenTron.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        GenTron.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        GenTron.from_pretrained(tmp_path)


def test_a_text_without_a_mask_is_real_everywhere():
    short, long = (EncodedText(torch.ones(1, length, 4), None) for length in (2, 3))
    assert short.trim() is short
    joined = TextCondition.cat([TextCondition(t5=short), TextCondition(t5=long)]).t5
    assert joined.mask.tolist() == [[True, True, False], [True, True, True]]
    assert joined.tokens.shape == (2, 3, 4) and joined.tokens[0, 2].eq(0).all()


def test_a_split_text_is_joined_again_without_padding():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    tokens = torch.randn(2, 3, 4).masked_fill(~mask[..., None], 0)
    text = TextCondition(clip=EncodedText(tokens, mask, torch.randn(2, 4)))
    ones = text.split()
    assert [one.clip.tokens.shape for one in ones] == [(1, 1, 4), (1, 2, 4)]
    assert all(one.t5 is None for one in ones)
    joined = TextCondition.cat(ones).clip
    for ours, theirs in zip(joined, text.clip.trim(), strict=True):
        assert torch.equal(ours, theirs)
