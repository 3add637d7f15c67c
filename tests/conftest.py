"""What several test files build on: tiny models with no zero weights, tiny pipeline folders, and
the figures of the tests marked `faults`."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gentron_fast import EncodedText, GenTron, GenTronConfig, TextCondition, cores

TINY = GenTronConfig(depth=2, width=48, heads=4, clip_width=128, t5_width=128, temporal=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def own_cores(tmp_path_factory, monkeypatch):
    """Tests take the cores in turn with nothing else of the machine, such as a training."""
    monkeypatch.setattr(cores, "CORES", tmp_path_factory.getbasetemp() / "cores")


@pytest.fixture(scope="session")
def tiny_config() -> GenTronConfig:
    return TINY


@pytest.fixture(scope="session")
def make_model():
    """(config, dtype=fp64) → a GenTron whose every weight is random: zero ones hide mistakes."""

    def make(config: GenTronConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GenTron:
        generator = torch.Generator().manual_seed(seed)
        model = GenTron(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
        return model

    return make


@pytest.fixture(scope="session")
def make_text():
    """(config, batch, clip length, t5 length) → random text without padding."""

    def make(config, batch=2, clip=5, t5=9, dtype=torch.float64, seed=1) -> TextCondition:
        generator = torch.Generator().manual_seed(seed)

        def encoded(length: int, width: int) -> EncodedText:
            tokens = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
            mask = torch.ones(batch, length, dtype=torch.bool)
            return EncodedText(tokens.to(dtype), mask, tokens.mean(1).to(dtype))

        lengths = {"clip": clip, "t5": t5}
        return TextCondition(
            **{name: encoded(lengths[name], config.text_width(name)) for name in config.encoders}
        )

    return make


def _save_pipeline(make_model, config: GenTronConfig, folder):
    from gentron_fast import GenTronPipeline
    from gentron_train.small_world.architecture import small_text_encoder, small_vae
    from gentron_train.small_world.renderer import vocabulary

    torch.manual_seed(0)
    parts = make_model(config, torch.float32), small_text_encoder(vocabulary()), small_vae()
    GenTronPipeline(*parts, default_frames=4, default_size=(64, 64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_folder(make_model, tmp_path_factory):
    """A saved text-to-video pipeline of random weights: two blocks, 64 × 64 pixels, 4 frames."""
    return _save_pipeline(make_model, TINY, tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="session")
def tiny_t2i_folder(make_model, tmp_path_factory):
    """The same for text to image."""
    return _save_pipeline(make_model, replace(TINY, temporal=False), tmp_path_factory.mktemp("t2i"))


OUTCOMES = ("ended well", "refused", "recovered", "lost")  # of a trial, refused: in one line


@pytest.fixture
def tally(request):
    """tally(outcome): count a trial of a test marked `faults` for the table of `make faults`."""
    counts = Counter()
    request.node.user_properties.append(("faults", counts))

    def count(outcome: str) -> None:
        assert outcome in OUTCOMES
        counts[outcome] += 1

    return count


def pytest_terminal_summary(terminalreporter):
    """The figures of `make faults`; a test that failed lost a trial."""
    rows: dict[str, Counter] = {}
    for result in ("passed", "failed"):
        for report in terminalreporter.getreports(result):
            for name, counts in report.user_properties:
                if name == "faults" and (report.when == "call" or result == "failed"):
                    file, _, test = report.location
                    names = Path(file).stem, test.partition("[")[0]
                    name = ": ".join(part.removeprefix("test_") for part in names)
                    row = rows.setdefault(name.replace("_", " "), Counter())
                    row.update(counts)
                    row["lost"] += result == "failed"
    if not rows:
        return
    width = max(map(len, rows)) + 2
    heads = ("trials", *OUTCOMES)
    terminalreporter.section("faults")
    terminalreporter.write_line(" " * width + "".join(f"{head:>12}" for head in heads))
    for name, row in rows.items():
        figures = (row.total(), *(row[outcome] for outcome in OUTCOMES))
        cells = "".join(f"{figure:12,d}" for figure in figures)
        terminalreporter.write_line(f"{name:{width}}{cells}")
