"""Memory of the tensors made in a block of code, on any device including `meta`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts the bytes of tensors made inside the block, from creation to release.

    Tensors made before the block are not counted; those of a backward pass inside it are.

    Attributes:
        bytes: alive now.
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storage of its results."""
        made = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name.endswith("_"):
            return made
        for tensor in tree_leaves(made):
            plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            if plain and not is_traceable_wrapper_subclass(tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
