"""The page of predictions is what the kernels compile to."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("predictions.py")
PAGE = Path(__file__).parents[2] / "docs/predictions.md"


def test_the_page_is_what_the_kernels_compile_to():
    triton = pytest.importorskip("triton")
    if f"## Triton {triton.__version__}\n" not in PAGE.read_text():
        pytest.skip("the page was written by other Tritons")
    command = [sys.executable, COMMAND, "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, "make predictions\n" + result.stdout + result.stderr


def test_the_page_tells_of_every_aim_and_of_loads_before_stores():
    text = PAGE.read_text()
    tritons = re.findall(r"^## Triton (.*)", text, re.MULTILINE)
    assert len(tritons) == 2 and tritons[-1] == "3.6.0"
    predicted = text[: text.index("## Measured on")]
    rows = [line.split(" | ") for line in predicted.splitlines() if line.startswith("| ")]
    aims = [row for row in rows if row[-1].rstrip(" |").endswith(("✓", "✗"))]
    assert len(aims) == 2 * 18 and not [row for row in aims if "✗" in row[-1]]
    chain = [row for row in rows if row[0] == "| residual, LayerNorm, modulation: forward"]
    # 256 columns a load: of x, y and gate before anything waits for one of them.
    assert [int(row[3]) for row in chain] == 2 * [3 * -(-1152 // 256), 3 * -(-1664 // 256)]


def test_loads_behind_one_another_are_predicted_to_take_longer(monkeypatch):
    """The same instructions in another order: what is in flight is in the prediction."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    import predictions

    loads = [f"/*0000*/ LDG.E.128.CONSTANT R{8 + 8 * i}, [R2.64] ;" for i in range(4)]
    uses = [f"/*0000*/ STS.128 [R3], R{8 + 8 * i} ;" for i in range(4)]
    together = [*loads, *uses]
    apart = [line for pair in zip(loads, uses, strict=True) for line in pair]
    shares = []
    for lines, trips in ((together, 1), (apart, 4)):
        found = predictions.INSTRUCTION.findall("\n".join(lines))
        code = [(int(address, 16), name, operands) for address, name, operands in found]
        waits = predictions._waits(code, None)
        assert waits == pytest.approx(trips * predictions.MEMORY, rel=0.02)
        counts = Counter(name for _, name, _ in code)
        read = predictions.Code(168, 0, 4, counts, Counter(), 4, waits)
        kernel = predictions.Kernel("", (), 100_000, 100_000 * 128 * 64 * 1.0)
        shares.append(predictions.predict(kernel, read))
    assert shares[1] < 0.7 * shares[0]
