"""Chance, all of it from the seed: one stream for each matter, so that no part disturbs another's draws."""

from __future__ import annotations

import hashlib
import math
import random


def stream(seed: int, *matter: object) -> random.Random:
    """The same stream for the same words, on every machine."""
    return random.Random("/".join(str(word) for word in (seed, *matter)))


def seeded_bytes(length: int, seed: int, *matter: object) -> bytes:
    """Bytes for keys and nonces; secret from nobody, which is right for a simulator alone."""
    words = "/".join(str(word) for word in (seed, *matter)).encode()
    return hashlib.shake_256(b"pos-gateway simulator\0" + words).digest(length)


def poisson(chance: random.Random, mean: float) -> int:
    """How many of what happens `mean` times on average (mean below some tens)."""
    count, product, floor = 0, chance.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= chance.random()
    return count


def around_one(chance: random.Random, sigma: float) -> float:
    """Lognormal with mean 1."""
    return chance.lognormvariate(-sigma * sigma / 2, sigma)
