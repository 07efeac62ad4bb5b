"""Fixed and adaptive coefficients of the KL penalty."""


class KLController:
    """The coefficient of the KL penalty: fixed, or adapted to keep the KL near a target (arXiv
    1909.08593, section 2.2).

    Args:
        kl_coef: the initial coefficient.
        target: the KL per response (summed over its actions) to aim for; None: a fixed coefficient.
        horizon: responses after which a KL of 1.2 x target or more has raised the coefficient by a
            factor of about 1.2.

    Raises:
        ValueError: for a negative coefficient, and for a target with a coefficient, target or
            horizon that is not positive.
    """

    def __init__(self, kl_coef: float, target: float | None = None, horizon: int = 10000) -> None:
        if kl_coef < 0:
            raise ValueError(f"kl_coef must be 0 or more, not {kl_coef}")
        if target is not None and (target <= 0 or horizon <= 0 or kl_coef == 0):
            raise ValueError(
                f"with a KL target, kl_target ({target}), kl_horizon ({horizon}) and kl_coef "
                f"({kl_coef}) must be above 0: the coefficient is adapted by multiplication"
            )
        self.kl_coef = float(kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) x responses / horizon. ``kl``: the mean over
        the ``responses`` of all ranks.

        Raises:
            ValueError: for a KL that is not finite, and for a horizon so short that one collect
                phase could make the coefficient 0.
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
        """Restore what :meth:`state_dict` gave; a fixed coefficient stays this run's."""
        if self.target is not None:
            self.kl_coef = float(state["kl_coef"])
