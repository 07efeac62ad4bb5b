"""The coefficient of the KL penalty, carried from one collect phase to the next."""


class KLController:
    """The coefficient of the KL penalty: fixed, or drawn toward a target (arXiv 1909.08593,
    section 2.2).

    Args: kl_coef: where it starts. target: KL per response (summed over its actions) that is aimed
        at; None: the coefficient stays. horizon: after about this many responses a KL of 1.2 times
        the target or more has raised it by a factor of 1.2.

    Raises:
        ValueError: for a target, or a coefficient to start from, that leaves nothing to adapt.
    """

    def __init__(self, kl_coef: float, target: float | None = None, horizon: int = 10000) -> None:
        if kl_coef < 0:
            raise ValueError(f"kl_coef must be 0 or more, not {kl_coef}")
        if target is not None and (target <= 0 or horizon <= 0 or kl_coef == 0):
            raise ValueError(
                f"a KL target multiplies kl_coef toward it: kl_target ({target}), kl_horizon "
                f"({horizon}) and kl_coef ({kl_coef}) must be above 0"
            )
        self.kl_coef = float(kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """coef *= 1 + clip(kl / target - 1, +-.2) responses / horizon; ``kl``: the mean of all
        ranks' ``responses``.

        Raises ValueError where the coefficient would be broken for the rest of the run: a KL that
        is not finite, or so short a horizon that one phase could make it 0.
        """
        if self.target is None:
            return
        if not abs(kl) < float("inf"):
            raise ValueError(
                f"the KL of a collect phase is {kl}; the log-probs of policy or reference are not "
                "finite"
            )
        if 0.2 * responses >= self.horizon:
            raise ValueError(
                f"kl_horizon {self.horizon} is too short for {responses} responses in a collect "
                f"phase: one phase could make kl_coef 0; take {responses} or more"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        """As JSON keeps it exactly."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.kl_coef = float(state["kl_coef"])
