"""What the rows of the live view are sorted by."""

from __future__ import annotations

from enum import Enum


class Order(str, Enum):
    """What the busiest, slowest or worst is looked for by: it comes first."""

    SPEED = "speed"
    RATE = "rate"
    LATENCY = "latency"
    FAILED = "failed"
    PEER = "peer"  #: clusters and peers by their ids, smallest first

    def next(self) -> Order:
        orders = list(Order)
        return orders[(orders.index(self) + 1) % len(orders)]
