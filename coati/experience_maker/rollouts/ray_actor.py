"""What runs in a Ray actor that samples: the library's own sampler, told with each call which
weights it needs and where they are, so that an actor which was started anew answers as the one
before it. Imports nothing heavy: Ray starts it in environments of its own."""

import platform
import socket
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

Array = Any  # numpy.ndarray
Arrays = dict[str, tuple[str, Array]]  # name -> dtype of torch, and the bytes as numbers of NumPy


class RolloutActor:
    """``place``: directory or hub name of the model that is trained; ``settings``: ``dtype`` (of
    :data:`~coati.models.loading.DTYPES`), ``trust_remote_code``, ``max_length``, ``device`` and
    ``threads``."""

    def __init__(self, place: str, settings: Mapping[str, Any]) -> None:
        self.place = place
        self.settings = settings
        self._sampler: Any = None

    def describe(self) -> dict[str, Any]:
        """What the run compares before it publishes."""
        from coati.utils.environment import code_version

        return {
            **self._loaded().describe_model(),
            "coati": code_version(),
            "Python": platform.python_version(),
            "ray": version("ray"),
            "host": socket.gethostname(),
        }

    def take(self, name: str, weights: Sequence[Any]) -> str:
        """Load the weights called ``name``, unless they are; ``weights``: their one reference."""
        sampler = self._loaded()
        if sampler.loaded != name:
            import ray

            sampler.load(name, tensors_of(ray.get(weights[0])))
        return sampler.loaded

    def complete(
        self, name: str, weights: Sequence[Any], body: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The choices of
        :meth:`~coati.experience_maker.rollouts.own_sampler.OwnSampler.complete`, by the weights
        called ``name``."""
        self.take(name, weights)
        return self._loaded().complete(body)

    def _loaded(self) -> Any:
        if self._sampler is None:
            import torch

            from coati.experience_maker.rollouts.own_sampler import OwnSampler
            from coati.models.loading import find_model, load_causal_lm

            settings = self.settings
            torch.set_num_threads(settings["threads"])
            model = load_causal_lm(
                find_model(self.place, "actor"),
                dtype=settings["dtype"],
                trust_remote_code=settings["trust_remote_code"],
            )
            self._sampler = OwnSampler(model.to(settings["device"]), settings["max_length"])
        return self._sampler


def arrays_of(tensors: Mapping[str, Any]) -> Arrays:
    """``tensors`` on the CPU as plain NumPy, which needs no torch of the same release to be read;
    of types that NumPy has not, the bytes."""
    import torch

    known = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        kind = str(plain.dtype).removeprefix("torch.")
        found[name] = (kind, plain.view(known.get(plain.dtype, plain.dtype)).numpy())
    return found


def tensors_of(arrays: Arrays) -> dict[str, Any]:
    """What :func:`arrays_of` was given. The memory is shared and must not be written to."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return {
            name: torch.from_numpy(array).view(getattr(torch, kind))
            for name, (kind, array) in arrays.items()
        }
