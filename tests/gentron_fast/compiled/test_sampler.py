"""A compiled sampler in a process: callbacks, and loading one again."""

import re
import threading
from pathlib import Path

import pytest
from compiled_files import PROMPT, STEPS, run_program, write_changed

from gentron_fast.compiled import CompiledSampler


def test_a_callback_may_not_call_its_own_sampler(package, sampler):
    refusals = []

    def on_step(_):
        with pytest.raises(
            ValueError, match="callback of a compiled sampler cannot call that"
        ) as e:
            sampler(PROMPT)
        refusals.append(e.value)

    thread = threading.Thread(target=sampler, args=([PROMPT],), kwargs={"on_step": on_step})
    thread.daemon = True  # it would never end
    thread.start()
    thread.join(120)
    assert not thread.is_alive() and len(refusals) == 20


def test_a_callback_may_wait_for_another_thread(sampler):
    frames = []

    def on_step(step):
        if step == 0:
            other = threading.Thread(target=lambda: frames.append(sampler(PROMPT, seed=3).frames))
            other.daemon = True
            other.start()
            other.join(60)
            assert not other.is_alive()

    assert (sampler(PROMPT, seed=3, on_step=on_step).frames == frames[0]).all()


def test_a_file_that_is_loaded_again_maps_no_more_libraries(package, sampler):
    def mapped():
        return set(re.findall(r"\S+\.wrapper\.so", Path("/proc/self/maps").read_text()))

    before = mapped()
    again = CompiledSampler.load(package)
    assert len(before) >= 16 and mapped() == before
    assert (again(PROMPT, seed=3).frames == sampler(PROMPT, seed=3).frames).all()


@pytest.mark.parametrize(
    "weight, words",
    [
        (
            "text_encoder.encoders.t5.encoder.final_layer_norm.weight",
            "the tokens of the t5 encoder",
        ),
        ("blocks.1.adaln.bias", f"the latents of step 1 of {STEPS}"),
        ("vae.autoencoder.decoder.conv_in.bias", "the pixels of the VAE"),
        ("vae.autoencoder.decoder.conv_out.bias", "the pixels of the VAE"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error_with_their_part(package, tmp_path, weight, words):
    value = float("inf" if "conv_out" in weight else "nan")  # infinity would be white
    path = write_changed(tmp_path / "bad.gentron", package, weight, lambda t: t.fill_(value))
    if weight.startswith("vae."):
        with pytest.raises(ValueError, match=f"^{words} are not finite: the weights are damaged"):
            CompiledSampler.load(path)(PROMPT)
        return
    out = tmp_path / "out.npy"
    done = run_program(path, "--tokens", "clip=1", "t5=1", "--out", out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and not out.exists()
    assert f"error: {words} are not finite: the weights are damaged" in done.stderr
