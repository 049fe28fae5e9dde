"""Linear mode connectivity: the loss along a straight line between two adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unmerge.adapter import Factors
from unmerge.errors import ConfigError, IncompatibleAdaptersError, NonFiniteError
from unmerge.kernels.lowrank import concatenate

__all__ = ["Interpolation", "ModeConnectivity", "interpolate", "mode_connectivity"]

Interpolation = Literal["multiplied", "direct"]


@dataclass(frozen=True, slots=True)
class ModeConnectivity:
    """The loss along the line between two adapters.

    Attributes:
        interpolation: What was interpolated: the deltas ("multiplied") or the factors ("direct").
        alphas: Positions on the line, from 0 (start) to 1 (end).
        losses: Loss at each of them.
    """

    interpolation: Interpolation
    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def chord(self) -> tuple[float, ...]:
        """The ends' losses, interpolated: `(1 − α) L(start) + α L(end)` per position."""
        first, last = self.losses[0], self.losses[-1]
        return tuple((1 - alpha) * first + alpha * last for alpha in self.alphas)

    @property
    def excess(self) -> tuple[float, ...]:
        """Loss less the interpolated ends' losses per position; 0 at the ends."""
        inner = [loss - line for loss, line in zip(self.losses, self.chord, strict=True)]
        return (0.0, *inner[1:-1], 0.0)

    @property
    def barrier(self) -> float:
        """Largest excess over the positions (equation 1); not negative, as it is 0 at the ends."""
        return max(self.excess)

    @property
    def barrier_at(self) -> float:
        """The position of the barrier; 0 where there is none."""
        return self.alphas[self.excess.index(self.barrier)]

    @property
    def connected(self) -> bool:
        """Whether the loss lies nowhere above the line between the ends' losses.

        The paper's criterion, to the last digit; for a noisy loss compare `barrier` with the noise.
        """
        return self.barrier == 0

    def to_data(self) -> dict[str, Any]:
        """Return the curve as plain JSON-compatible data."""
        return {
            "interpolation": self.interpolation,
            "alphas": list(self.alphas),
            "losses": list(self.losses),
            "chord": list(self.chord),
            "barrier": self.barrier,
            "barrier_at": self.barrier_at,
            "connected": self.connected,
        }


def interpolate(
    start: Mapping[str, Factors],
    end: Mapping[str, Factors],
    alpha: float,
    *,
    interpolation: Interpolation = "multiplied",
) -> dict[str, Factors]:
    """Return the adapter at position `alpha` between two adapters, as factors per module.

    Args:
        start: Factors by module path, as in `Adapter.modules`; given back as they are at 0.
        end: Likewise, at 1. A module that only one of them has counts as zero in the other.
        alpha: Any number; 0 is start, 1 is end.
        interpolation: "multiplied" interpolates the deltas, `(1 − α) Δ_1 + α Δ_2`, of rank
            r_1 + r_2 and exactly; "direct" interpolates the factors, each with the root of its
            scaling (and A with its sign): `((1 − α) B_1 + α B_2)((1 − α) A_1 + α A_2)`.

    Returns:
        Float64 factors of scaling 1, by module path, sorted; the originals at 0 and 1.

    Raises:
        ConfigError: `alpha` is not finite, or `interpolation` is unknown.
        IncompatibleAdaptersError: A module's shapes differ, or with "direct" its ranks.
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha is {alpha}, expected a finite number")
    if interpolation not in ("multiplied", "direct"):
        raise ConfigError(f'interpolation is "{interpolation}", expected "multiplied" or "direct"')
    if alpha in (0, 1):
        return dict(sorted((end if alpha else start).items()))
    between: dict[str, Factors] = {}
    for path in sorted({*start, *end}):
        first = start[path] if path in start else _zero_like(end[path])
        last = end[path] if path in end else _zero_like(start[path])
        if (first.d_out, first.d_in) != (last.d_out, last.d_in):
            raise IncompatibleAdaptersError(
                f"{path}: the shapes are ({first.d_out}, {first.d_in}) and ({last.d_out}, "
                f"{last.d_in}), expected equal ones; check that both used the same base model"
            )
        if interpolation == "multiplied":
            A, B = concatenate([first, last], [1 - alpha, alpha])
        else:
            A, B = _direct(path, first, last, alpha)
        between[path] = Factors(A=A, B=B, scaling=1.0)
    return between


def mode_connectivity(
    loss: Callable[[Mapping[str, Factors]], float],
    start: Mapping[str, Factors],
    end: Mapping[str, Factors],
    steps: int = 11,
    *,
    interpolation: Interpolation = "multiplied",
) -> ModeConnectivity:
    """Evaluate the loss along the line between two adapters.

    Args:
        loss: Returns the loss of an adapter, given as factors by module path. It is called
            `steps` times, in order; the paper takes the mean cross entropy on both test sets.
        start: Factors by module path, as in `Adapter.modules`.
        end: Likewise.
        steps: Number of evenly spaced positions, both ends among them; 11 as in the paper.
        interpolation: See `interpolate`. The paper compares both.

    Raises:
        ConfigError: `steps` is below 3, or `interpolation` is unknown.
        IncompatibleAdaptersError: As `interpolate`.
        NonFiniteError: A loss is NaN or infinite; names the position.

    Source: "LoRA Merging with SVD", section 3.1, equation 1, and Figure 1; Frankle et al., "Linear
        Mode Connectivity and the Lottery Ticket Hypothesis" (2020). Equation 1 writes α for the
        first adapter's part, here it is the second's; the supremum is taken over the positions.
    """
    if steps < 3:
        raise ConfigError(f"steps is {steps}, expected at least 3: both ends and a point between")
    alphas = tuple(step / (steps - 1) for step in range(steps))
    losses = []
    for alpha in alphas:
        value = float(loss(interpolate(start, end, alpha, interpolation=interpolation)))
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss at alpha = {alpha:g} is {value}, expected a number")
        losses.append(value)
    return ModeConnectivity(interpolation=interpolation, alphas=alphas, losses=tuple(losses))


def _zero_like(factors: Factors) -> Factors:
    return Factors(torch.zeros_like(factors.A), torch.zeros_like(factors.B), scaling=1.0)


def _direct(
    path: str, first: Factors, last: Factors, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if first.rank != last.rank:
        raise IncompatibleAdaptersError(
            f"{path}: the ranks are {first.rank} and {last.rank}; factors can only be interpolated "
            'where they are equal: use interpolation="multiplied"'
        )
    A = torch.zeros_like(first.A, dtype=torch.float64)
    B = torch.zeros_like(first.B, dtype=torch.float64)
    for factors, part in ((first, 1 - alpha), (last, alpha)):
        root = math.sqrt(abs(factors.scaling))
        A += part * math.copysign(root, factors.scaling) * factors.A.to(torch.float64)
        B += part * root * factors.B.to(torch.float64)
    return A, B
