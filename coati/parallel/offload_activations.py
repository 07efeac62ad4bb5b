"""``--offload_activations``: the inputs of checkpointed layers wait for the backward pass in host
memory."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from coati.utils.logging import get_logger

logger = get_logger(__name__)

LEAST = 2**16  # bytes: moving less takes longer than it saves


class HostCopies:
    """Copies of tensors in pinned host memory, made on a stream of their own, so that the forward
    pass does not wait for them. ``everywhere``: tensors that are in host memory already are copied
    as well, for tests. ``moved``: how many there were."""

    def __init__(self, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self.moved = 0
        self._stream: Any = None

    def pack(self, tensor: Tensor) -> Any:
        """What stands for ``tensor`` until :meth:`unpack`."""
        self.moved += 1
        if tensor.device.type != "cuda":
            return tensor.device, torch.empty_like(tensor).copy_(tensor), None
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            # Its memory is not given to another tensor before the copy is done.
            tensor.record_stream(self._stream)
            done = self._stream.record_event()
        return tensor.device, host, done

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, on its device, to the bit."""
        device, host, done = packed
        if done is not None:
            torch.cuda.current_stream(device).wait_event(done)
        return host.to(device, non_blocking=True)

    def holds(self, tensor: Any) -> bool:
        """Whether ``tensor``, an argument of a layer, is moved: a hidden state, and no mask that
        all layers share."""
        return (
            isinstance(tensor, Tensor)
            and tensor.requires_grad
            and tensor.nbytes >= LEAST
            and (self.everywhere or tensor.device.type == "cuda")
        )


def install(model: nn.Module, copies: HostCopies | None = None) -> HostCopies:
    """Let the layers of ``model``, whose gradient checkpointing is on, keep their inputs as
    ``copies``. If a forward pass in training moves none, that is logged."""
    copies = copies or HostCopies()
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            module._gradient_checkpointing_func = _with_copies(function, copies)

    def said(module: nn.Module, args: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        handle.remove()
        if not copies.moved:
            logger.warning(
                "--offload_activations moved nothing: the layers of this model, as the plugin runs "
                f"them, keep inputs of less than {LEAST // 2**10} KiB or compute them again in "
                "their own way"
            )

    handle = model.register_forward_hook(said)
    return copies


def _with_copies(function: Callable[..., Any], copies: HostCopies) -> Callable[..., Any]:
    """``function`` of checkpointing, whose tensor arguments are saved as ``copies``; what the layer
    itself saves is not, for checkpointing drops it."""

    @wraps(function)
    def checkpointed(layer: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        kept = {arg.data_ptr() for arg in args if copies.holds(arg)}

        def pack(tensor: Tensor) -> Any:
            return copies.pack(tensor) if tensor.data_ptr() in kept else tensor

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else copies.unpack(packed)

        with saved_tensors_hooks(pack, unpack):
            return function(layer, *args, **keywords)

    return checkpointed
