import pytest
import torch
from diffusers import AutoencoderKL

from gentron_fast.vae import VideoVAE, check_finite


def make_vae(**changes):
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "scaling_factor": 0.5,
    }
    return VideoVAE(AutoencoderKL(**{**config, **changes})).eval()


@pytest.mark.parametrize("levels", [3, 4])
def test_factor_scaling_and_channels_are_read_from_the_configuration(levels):
    vae = make_vae(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=6,
    )
    assert (vae.factor, vae.scaling_factor, vae.latent_channels) == (2 ** (levels - 1), 0.5, 6)
    size = 4 * vae.factor
    mean, std = vae.encode(torch.zeros(1, 3, 1, size, size))
    assert mean.shape == std.shape == (1, 6, 1, 4, 4)


@pytest.mark.parametrize("shift", [None, 0.25])
@torch.no_grad()
def test_encode_and_decode_against_diffusers_frame_by_frame(shift):
    vae = make_vae(shift_factor=shift)
    pixels = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    mean, std = vae.encode(pixels)
    decoded = vae.decode(mean)
    assert mean.shape == (2, 4, 3, 4, 6)
    assert decoded.shape == pixels.shape
    assert decoded.abs().max() <= 1
    for b in range(2):
        for t in range(3):
            posterior = vae.autoencoder.encode(pixels[b : b + 1, :, t]).latent_dist
            expected = (posterior.mean - (shift or 0)) * 0.5
            torch.testing.assert_close(mean[b : b + 1, :, t], expected)
            torch.testing.assert_close(std[b : b + 1, :, t], posterior.std * 0.5)
            frame = vae.autoencoder.decode(posterior.mean).sample.clamp(-1, 1)
            torch.testing.assert_close(decoded[b : b + 1, :, t], frame)


@pytest.mark.parametrize("slice_frames", [1, 3, 8, 100])
@torch.no_grad()
def test_slices_of_frames_give_the_same_result(slice_frames):
    vae = make_vae()
    latents = torch.randn(2, 4, 5, 4, 4)
    torch.testing.assert_close(
        vae.decode(latents, slice_frames=slice_frames), vae.decode(latents, slice_frames=10)
    )
    pixels = torch.rand(2, 3, 5, 16, 16)
    for part, whole in zip(vae.encode(pixels, slice_frames), vae.encode(pixels), strict=True):
        torch.testing.assert_close(part, whole)


@torch.no_grad()
def test_decode_runs_no_more_frames_at_once_than_asked(monkeypatch):
    vae = make_vae()
    sizes = []
    decode = vae.autoencoder.decode
    monkeypatch.setattr(vae.autoencoder, "decode", lambda z: sizes.append(len(z)) or decode(z))
    vae.decode(torch.randn(2, 4, 5, 4, 4), slice_frames=4)
    assert sizes == [4, 4, 2]


def test_gradients_reach_the_weights_and_the_overshoot():
    vae = make_vae()
    mean, std = vae.encode(torch.rand(1, 3, 1, 16, 16))
    with torch.no_grad():
        vae.autoencoder.decoder.conv_out.bias += 5
    decoded = vae.decode(mean + std * torch.randn_like(std), clamp=False)
    assert decoded.min() > 1
    decoded.square().mean().backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_check_size():
    vae = make_vae()
    vae.check_size(64, 8, patch=2)
    with pytest.raises(ValueError, match=r"size 100x66 .* multiples of 8 .* 96x64 or 104x72"):
        vae.check_size(100, 66, patch=2)
    with pytest.raises(ValueError, match=r"nearest: 8x64"):
        vae.check_size(0, 64, patch=2)
    with pytest.raises(ValueError, match=r"size 17x16 .* multiples of 4 "):
        vae.encode(torch.zeros(1, 3, 1, 17, 16))


def test_wrong_channels_and_slices_are_refused():
    vae = make_vae()
    with pytest.raises(ValueError, match="pixels have 1 channels, the VAE takes 3"):
        vae.encode(torch.zeros(1, 1, 1, 16, 16))
    with pytest.raises(ValueError, match="latents have 8 channels, the VAE takes 4"):
        vae.decode(torch.zeros(1, 8, 1, 4, 4))
    with pytest.raises(ValueError, match="slice_frames must be at least 1, not 0"):
        vae.decode(torch.zeros(1, 4, 1, 4, 4), slice_frames=0)


@torch.no_grad()
def test_saved_loaded_and_saved_again_gives_the_same_bytes(tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "a")
    loaded = VideoVAE.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()
    latents = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    half = VideoVAE.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert half.dtype == half.decode(latents).dtype == torch.bfloat16


def test_a_folder_without_an_autoencoder_gives_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*nothing"):
        VideoVAE.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        VideoVAE.from_pretrained(tmp_path)


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_fp16_stays_fp32(tmp_path):
    for upcast in (True, False):
        vae = make_vae(force_upcast=upcast)
        vae.autoencoder.decoder.conv_in.weight *= 3e5  # activations beyond 65504, as SDXL's
        vae.save_pretrained(tmp_path / str(upcast))
    latents = torch.randn(1, 4, 1, 8, 8)
    stays = VideoVAE.from_pretrained(tmp_path / "True", torch.float16)
    assert stays.dtype == torch.float32
    check_finite(stays.decode(latents), "the pixels are")
    assert stays.computed_in(torch.float16) == torch.float32
    assert stays.computed_in(torch.bfloat16) == torch.bfloat16
    halved = VideoVAE.from_pretrained(tmp_path / "False", torch.float16)
    assert halved.dtype == torch.float16
    with pytest.raises(ValueError, match="the pixels are not finite"):
        check_finite(halved.decode(latents), "the pixels are")
