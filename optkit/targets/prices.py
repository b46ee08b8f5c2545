"""What an hour of a target costs to rent, in US dollars: on demand, one card, as price lists said on the day that is named.

Prices of the same card differ several times between who rents it; ``optkit plan --price`` and ``--prices`` put others in their place.
"""

from __future__ import annotations

from typing import NamedTuple


class Price(NamedTuple):
    """Dollars an hour, and where that is from."""

    dollars: float
    source: str


_LAMBDA = "lambda.ai/instances, 2026-09-20"
_RUNPOD = "runpod.io/pricing, 2026-10-07"
_OPENRELAY = "openrelay.inc/gpu-pricing-calculator, 2026-09-20"

PRICES = {
    "a10": Price(1.29, _LAMBDA),
    "a100": Price(2.79, f"{_LAMBDA}, one of eight"),
    "h100": Price(4.29, _LAMBDA),
    "h200": Price(4.59, _RUNPOD),
    "b200": Price(6.99, _LAMBDA),
    "rtx3090": Price(0.18, _OPENRELAY),
    "rtx4090": Price(0.29, _OPENRELAY),
}
