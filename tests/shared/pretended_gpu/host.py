"""What the host does for the device: it sends tensors, and waits for results."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pretended_gpu.device import on_wait

ROOT = Path(__file__).parents[3]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("kernels", "gentron_fast", "train"))
READ_BY_HOST = {  # their result, or its shape, is a number that the host must know
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
INDEXED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Event(NamedTuple):
    """Something that crosses between the host and the device.

    kind: "wait", "pageable copy" or "pinned copy" (to the device, the second beside what the host
    does next), or "copy to the host"; operator: its name; function and place: who asked for it, a
    function of this project and file:line.
    """

    kind: str
    operator: str
    function: str
    place: str


class Host(TorchDispatchMode):
    """While it is entered, tensors on "cuda" are fake and those of the CPU real; `events` notes
    what crosses between them, in order."""

    def __init__(self):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.events: list[Event] = []

    def __enter__(self):
        on_wait.append(self._waited)
        return super().__enter__()

    def __exit__(self, *exception):
        on_wait.remove(self._waited)
        return super().__exit__(*exception)

    def _waited(self, name: str) -> None:
        self._note("wait", name)

    def _note(self, kind: str, operator: str) -> None:
        self.events.append(Event(kind, operator, *_caller()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not on_device and not any(_is_cuda(leaf) for leaf in leaves):
            return function(*args, **kwargs)
        name = function.name()
        is_read = name in READ_BY_HOST or (name in INDEXED and _has_mask(args[1]))
        if is_read and args[0].device.type == "cuda":
            self._note("wait", name)
        if name == "aten::_local_scalar_dense":  # some number, so that the caller goes on
            return torch.ones((), dtype=args[0].dtype).item()
        self._note_copies(name, args, kwargs)
        args, kwargs = tree_map(self._faked, (args, kwargs))
        with self.fakes:
            return function(*args, **kwargs)

    def _note_copies(self, name: str, args: tuple, kwargs: dict) -> None:
        if name == "aten::_to_copy":
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            beside = kwargs.get("non_blocking", False)
        elif name == "aten::copy_":
            source, target, beside = args[1], args[0].device, bool(args[2:] and args[2])
        else:
            return
        if source.device.type == target.type:
            return
        if target.type == "cuda":
            from_pinned = beside and source.is_pinned()
            self._note("pinned copy" if from_pinned else "pageable copy", name)
        else:
            self._note("copy to the host", name)

    def _faked(self, leaf):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.fakes.from_tensor(leaf)
        return leaf


def _is_cuda(leaf) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _has_mask(indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _caller() -> tuple[str, str]:
    """The innermost function of this project that is no helper of transfers, and its place."""
    frame = sys._getframe()
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if file.startswith(OURS) and not (file.endswith("/transfer.py") or "<" in name):
            return name, f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "", ""
