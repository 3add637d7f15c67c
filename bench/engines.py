"""Engines of others that run a whole model on the CPU: OpenVINO, and zentorch, AMD's for torch."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

import torch
from contest import OPENVINO, Contender, absent
from torch import Tensor, nn


def engine(name: str, make: Callable[[], tuple[Callable, str]]) -> Contender:
    """The contender that `make` builds: a function of one input set, and what is to be told of it.

    Absent where the engine cannot be imported (its package is not installed, or a library of its
    own does not open), or takes no such model, with the reason.
    """
    package = name.lower()
    try:
        import_module(package)
    except ModuleNotFoundError as failure:
        reason = f"{failure.name} is not installed"
        return absent(name, reason if failure.name == package else f"{package}: {reason}")
    except (ImportError, OSError) as failure:
        return absent(name, f"{package} does not load: {_first_line(failure)}")
    try:
        run, note = make()
    except Exception as failure:
        return absent(name, f"{type(failure).__name__}: {_first_line(failure)}"[:160])
    return Contender(name, run, f"{note}, version {version(package)}", own_threads=name == OPENVINO)


def openvino_forward(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Callable[..., Tensor], int]:
    """What OpenVINO makes of an fp32 module that takes these tensors and returns one: a function of
    such tensors, whose result the next call overwrites, and the threads that it takes.

    dtype: in which it computes, with the weights rounded to it, fp32 or bf16; both by its hint for
    latency, on as many threads as torch.
    """
    import openvino
    from openvino import properties

    hints = properties.hint
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs))
    kind = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[dtype]
    options = {
        hints.performance_mode: hints.PerformanceMode.LATENCY,
        hints.inference_precision: kind,
        properties.inference_num_threads: torch.get_num_threads(),
    }
    compiled = openvino.compile_model(openvino.convert_model(exported), "CPU", options)
    taken = compiled.get_property(hints.inference_precision)
    if taken != kind:
        raise RuntimeError(f"this processor computes in {taken}, not in {kind}")
    request = compiled.create_infer_request()

    def run(*tensors: Tensor) -> Tensor:
        arrays = {place: t.contiguous().numpy() for place, t in enumerate(tensors)}
        outputs = request.infer(arrays, share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return run, compiled.get_property(properties.inference_num_threads)


def _first_line(failure: BaseException) -> str:
    return next(iter(str(failure).strip().splitlines()), "")
