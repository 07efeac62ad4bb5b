"""Mixed precision, clipping and the gradient norm for plugin ddp, where ColossalAI leaves them to
the caller."""

from functools import wraps

import torch
from colossalai.booster.mixed_precision import MixedPrecision
from colossalai.interface import OptimizerWrapper

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class AutocastPrecision(MixedPrecision):
    """fp32 weights; forward under autocast for bf16 and fp16; loss scaling for fp16; clipping for
    all three."""

    def __init__(self, precision: str, max_norm: float) -> None:
        super().__init__()
        self.precision = precision
        self.max_norm = max_norm

    def configure(self, model, optimizer=None, criterion=None):
        if self.precision in AUTOCAST:
            _run_under_autocast(model, AUTOCAST[self.precision])
        if optimizer is not None:
            optimizer = ClippingOptimizer(
                optimizer.optim, self.max_norm, scaled=self.precision == "fp16"
            )
        return model, optimizer, criterion


def _run_under_autocast(model, dtype: torch.dtype) -> None:
    # Not a wrapper module: the plugin's no_sync insists on finding its own class outermost.
    forward = model.forward
    device = next(model.parameters()).device.type

    @wraps(forward)
    def autocast_forward(*args, **kwargs):
        with torch.autocast(device, dtype=dtype):
            return forward(*args, **kwargs)

    model.forward = autocast_forward


class ClippingOptimizer(OptimizerWrapper):
    """Scales the loss (fp16), clips, steps, and knows the norm it clipped; a step that overflowed
    is skipped."""

    def __init__(self, optim, max_norm: float, scaled: bool) -> None:
        super().__init__(optim)
        self.max_norm = max_norm
        self._current_grad_norm: float | None = None
        device = optim.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(
            device, init_scale=2.0**16, growth_interval=1000, enabled=scaled
        )

    def backward(self, loss, inputs=None, retain_graph=False, **kwargs) -> None:
        self.scaler.scale(loss).backward(inputs=inputs, retain_graph=retain_graph, **kwargs)

    def step(self, *args, **kwargs) -> None:
        self.scaler.unscale_(self.optim)
        parameters = [p for group in self.optim.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._current_grad_norm = (
            None if self.scaler.is_enabled() and not torch.isfinite(norm) else float(norm)
        )
        self.scaler.step(self.optim, *args, **kwargs)
        self.scaler.update()

    def get_grad_norm(self, norm_type=2.0, **kwargs) -> float | None:
        return self._current_grad_norm
