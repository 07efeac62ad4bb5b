"""ColossalAI's CPU Adam kernel in torch: the same call, no compiler."""

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class TorchCpuAdam:
    """What ``CPUAdam`` and ``HybridAdam`` call for every parameter, in place of the compiled
    ``cpu_adam`` module.

    Source of the call: ColossalAI, extensions/csrc/kernel/x86/cpu_adam.cpp,
    ``Adam_Optimizer::step``.
    """

    def __init__(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        adamw_mode: bool,
    ):
        self.adamw_mode = adamw_mode

    @torch.no_grad()
    def step(
        self,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        bias_correction,
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        div_scale=-1,
    ) -> None:
        """Update ``param``, ``exp_avg`` and ``exp_avg_sq`` (any shape, all alike) in place.

        ``step`` counts from 1. The gradient is divided by ``div_scale`` where that is positive; it
        may have a lower precision than the rest and is left as it is.
        """
        grad = grad.to(param.dtype)
        if div_scale > 0:
            grad = grad / div_scale
        if not bias_correction:
            self._uncorrected(lr, beta1, beta2, eps, weight_decay, param, grad, exp_avg, exp_avg_sq)
            return
        # torch counts the step inside; float32 as its own optimizers keep it.
        steps = [torch.tensor(float(step - 1))]
        (adamw if self.adamw_mode else adam)(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
        )

    def _uncorrected(
        self, lr, beta1, beta2, eps, weight_decay, param, grad, exp_avg, exp_avg_sq
    ) -> None:
        if self.adamw_mode:
            param.mul_(1 - lr * weight_decay)
        else:
            grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-lr)
