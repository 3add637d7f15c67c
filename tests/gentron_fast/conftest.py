"""The compiled sampler that the tests share: the model that ships, exported once."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
from compiled_files import RUNTIME, STEPS
from torch._inductor import config as inductor_config

from gentron_fast.compiled import CompiledSampler

if "GENTRON_RUNTIME" in os.environ:
    name = "gentron_fast._runtime"
    spec = importlib.util.spec_from_file_location(name, RUNTIME / "_runtime.so")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """GENTRON_PACKAGE is one that was exported before, with the same options."""
    if made := os.environ.get("GENTRON_PACKAGE"):
        return Path(made)
    from gentron_fast import export  # needs tqdm, which a machine lent for its GPU may lack

    path = tmp_path_factory.mktemp("export") / "clip.gentron"
    arguments = ["--out", str(path), "--whole", "--steps", str(STEPS), "--batch", "3"]
    # The code around the kernels unoptimised: half of the compiler's time.
    with inductor_config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        assert export.main(arguments) == 0
    return path


@pytest.fixture(scope="session")
def sampler(package):
    start = time.perf_counter()
    sampler = CompiledSampler.load(package)
    assert time.perf_counter() - start <= 10.0
    return sampler


@pytest.fixture(scope="session")
def pipeline():
    from gentron_fast import GenTronPipeline

    return GenTronPipeline.from_pretrained()
