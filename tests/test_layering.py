"""Who imports whom, downward only, and what imports with the core packages only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gentron_kernels": "kernels", "gentron_fast": "gentron_fast", "gentron_train": "train"}
OURS_ALLOWED = {
    "kernels": {"gentron_kernels"},
    "gentron_fast": {"gentron_kernels", "gentron_fast"},
    "train": {"gentron_kernels", "gentron_fast", "gentron_train"},
}
ONLY_IN = {
    "diffusers": {
        "gentron_fast/vae.py",
        "gentron_fast/pipeline.py",
        "gentron_fast/convert/pipelines.py",
        "train/small_world/architecture.py",
    },
    "transformers": {
        "gentron_fast/text.py",
        "gentron_fast/evaluation/scorers.py",
        "train/small_world/architecture.py",
    },
    "spacy": {"gentron_fast/evaluation/scorers.py"},
    "fastapi": {"gentron_fast/serving/app.py"},
    "uvicorn": {"gentron_fast/serving/server.py"},
    "prometheus_client": {"gentron_fast/serving/metrics.py"},
    "deepspeed": {"train/assembly.py", "train/ema.py", "train/process.py", "train/sharding.py"},
    "webdataset": {"train/data/shards.py", "train/small_world/autoencoder.py"},
    "ray": {"gentron_fast/on_ray.py", "gentron_fast/serving/replicas.py"},
    "av": {"gentron_fast/media.py", "train/data/decode.py", "train/small_world/renderer.py"},
}
# The room of evaluation serves commands alone: nothing that samples or trains needs it.
EVALUATION = "gentron_fast/evaluation"
MAY_EVALUATE = {"gentron_fast/evaluate.py", "gentron_fast/study.py", "train/shapes_table.py"}
CORE_MODULES = [
    "gentron_fast",
    "gentron_fast.config",
    "gentron_fast.model",
    "gentron_fast.diffusion",
    "gentron_fast.solvers",
    "gentron_fast.guidance",
    "gentron_kernels.attention",
    "gentron_kernels.guided_step",
    "gentron_kernels.launch",
    "gentron_kernels.layernorm_modulate",
    "gentron_kernels.temporal_attention",
]
OPTIONAL = ["transformers", "diffusers", "deepspeed", "webdataset", "av", "PIL", "triton", "tqdm"]


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", OURS_ALLOWED)
def test_imports_go_downward(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        assert not names & (set(FOLDERS) - OURS_ALLOWED[folder]), path
        assert "kernels" not in names and "train" not in names, path
        for library, allowed in ONLY_IN.items():
            where = path.relative_to(ROOT).as_posix()
            assert library not in names or where in allowed, f"{where} imports {library}"


def test_evaluation_is_imported_by_commands_alone():
    for path in sorted(path for folder in OURS_ALLOWED for path in (ROOT / folder).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        }
        if any(f"{name}.".startswith("gentron_fast.evaluation.") for name in names):
            assert where in MAY_EVALUATE or where.startswith(EVALUATION), where


@pytest.mark.parametrize("folder", ["kernels", "train"])
def test_folders_that_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_core_imports_with_torch_einops_and_safetensors_alone():
    code = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[*OPTIONAL, "ray"]!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
for name in {CORE_MODULES!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
