"""The page of predictions is what the kernels compile to."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("predictions.py")
PAGE = Path(__file__).parents[2] / "docs/predictions.md"


def test_the_page_is_what_the_kernels_compile_to():
    triton = pytest.importorskip("triton")
    if f"(Triton {triton.__version__}," not in PAGE.read_text():
        pytest.skip("the page was written by another Triton")
    command = [sys.executable, COMMAND, "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, "make predictions\n" + result.stdout + result.stderr


def test_the_page_tells_of_every_aim_and_of_loads_before_stores():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    aims = [row for row in rows if row[-1].rstrip(" |").endswith(("✓", "✗"))]
    assert len(aims) == 18 and not [row for row in aims if "✗" in row[-1]]
    chain = [row for row in rows if row[0] == "| residual, LayerNorm, modulation: forward"]
    # 256 columns a load: of x, y and gate before anything waits for one of them.
    assert [int(row[3]) for row in chain] == [3 * -(-1152 // 256), 3 * -(-1664 // 256)]
