"""Tests on a GPU that is not there (tests/shared/pretended_gpu).

A process that sees it must see it from its start, so that each file has a test that runs the
others in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest
import torch

SHARED = Path(pretended_gpu.__file__).parents[1]


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    starts = [item for item in here if "run_pretended" in item.fixturenames]
    out = starts if pretended_gpu.is_pretended() else [i for i in here if i not in starts]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def run_pretended(tmp_path):
    """(file) → its tests pass in a process that sees the GPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which need not be pretended")

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pretended_gpu", "-q", "-x", "-p", "no:cacheprovider"]
        folders = [str(SHARED), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        result = subprocess.run([*command, file], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    return run
