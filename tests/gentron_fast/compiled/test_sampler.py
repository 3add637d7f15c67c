"""A compiled sampler in a process: callbacks, and loading one again."""

import re
import threading
from pathlib import Path

import pytest
from compiled_files import PROMPT

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
