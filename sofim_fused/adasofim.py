"""A class with the arguments of AdamW, for SOFIM with a diagonal that adapts."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sofim_fused import checks
from sofim_fused.optimizer import SOFIM

_BETAS = (0.9, 0.99)  # compared by identity: whether the user has passed others


class AdaSOFIM(SOFIM):
    r"""SOFIM with a diagonal that adapts to the gradients, and with the arguments of ``torch.optim.AdamW``.

    .. math::
       \begin{array}{ll}
            m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t                                & \text{first moment}  \\
            v_t = (\beta_1 m_t + (1 - \beta_1)\, g_t) / (1 - \beta_1^{t+1})            & \text{look-ahead}    \\
            D_t = \mathrm{diag}(s_t)      & s_t^2 \text{: a running mean of } g^2 \text{ over rows and columns}  \\
            w_t = (1 - \eta\lambda)\, w_{t-1} - \eta\, D_t^{-1} v_t
       \end{array}

    It is :class:`SOFIM` with other defaults: ``diagonal="factored"``, ``numerator="nesterov"``, ``rho=None``. A step
    has the size of one of AdamW's, so AdamW's learning rates are a start. The state is one moment per parameter, and
    two numbers per row and column of a matrix where AdamW has one per element. ``docs/adaptive.md`` has the formulas,
    and when to take which diagonal.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups, as for :class:`SOFIM`. A
            group may spell ``momentum`` and ``beta2`` as ``betas``.
        lr: η, the learning rate: a float or a one-element tensor. The default is four times AdamW's.
        betas: (β₁, β₂), the decays of the first moment and of the means of g²: ``momentum`` and ``beta2``. In groups,
            and in state dicts, they have these two names, as in all of SOFIM.
        eps: added to the root of the means of g², at least 1e-18 and less than 1e18.
        weight_decay: λ ≥ 0, decoupled: a step multiplies w by 1 - ηλ. The default is that of AdamW and not SOFIM's 0,
            so that a program in which only the class is replaced keeps its regularization.
        momentum: β₁, instead of ``betas``.
        beta2: β₂, instead of ``betas``.
        diagonal: as for :class:`SOFIM`, but not ``"identity"``.
        numerator: as for :class:`SOFIM`.
        rho: as for :class:`SOFIM`; ``None``: without the term of rank one.
        options: the other arguments of :class:`SOFIM`.

    Raises:
        TypeError, ValueError, RuntimeError: as for :class:`SOFIM`.

    Example:
        >>> optimizer = AdaSOFIM(model.parameters(), lr=4e-3)  # was AdamW(model.parameters(), lr=1e-3)

    State dicts are those of :class:`SOFIM`: each class loads the other's, and then does what its groups say.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = 4e-3,
        betas: tuple[float, float] = _BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        momentum: float | None = None,
        beta2: float | None = None,
        diagonal: Literal["tensor", "row", "factored", "element"] = "factored",
        numerator: Literal["moment", "gradient", "nesterov"] = "nesterov",
        rho: float | Tensor | None = None,
        **options: Any,
    ) -> None:
        if betas is not _BETAS and not (momentum is None and beta2 is None):
            raise TypeError(
                "betas is given beside momentum or beta2, which are its two numbers: pass one of these ways"
            )
        first, second = checks.betas("", betas)
        checks.adapts(diagonal)
        super().__init__(
            params,
            lr=lr,
            momentum=first if momentum is None else momentum,
            rho=rho,
            diagonal=diagonal,
            beta2=second if beta2 is None else beta2,
            eps=eps,
            numerator=numerator,
            weight_decay=weight_decay,
            **options,
        )

    @classmethod
    def from_sgd(cls, optimizer: Any, **options: Any) -> NoReturn:
        """Always an error: SGD has no means of g² to continue with.

        Raises:
            TypeError: it says what to do instead.
        """
        raise TypeError(
            "AdaSOFIM.from_sgd() is impossible: SGD has no running means of g², and with its moments but without them "
            "the first steps would be ten times too long: make a new AdaSOFIM(model.parameters()), or continue with "
            "SOFIM.from_sgd(), whose diagonal does not adapt"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`SOFIM.add_param_group`. It may have ``betas``, as AdamW's groups do.

        Raises:
            TypeError, ValueError: the group, a value in it or one of its parameters is refused.
            RuntimeError: the requested backend cannot run on a parameter's device.
        """
        if isinstance(param_group, dict) and "betas" in param_group:
            param_group = _without_betas(param_group, f"parameter group {len(self.param_groups)}: ")
        super().add_param_group(param_group)


def _without_betas(group: dict[str, Any], where: str) -> dict[str, Any]:
    """A group with ``momentum`` and ``beta2`` in place of ``betas``."""
    if "momentum" in group or "beta2" in group:
        raise TypeError(
            f"{where}betas is given beside momentum or beta2, which are its two numbers: pass one of these ways"
        )
    if group.get("amsgrad"):
        raise ValueError(
            f"{where}amsgrad={group['amsgrad']!r}: the largest means of g² so far are not kept: leave it out"
        )
    momentum, beta2 = checks.betas(where, group["betas"])
    return {
        **{name: value for name, value in group.items() if name not in ("betas", "amsgrad")},
        "momentum": momentum,
        "beta2": beta2,
    }
