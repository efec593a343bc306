"""Student's t: how far the mean of a few numbers may lie from the truth.

    P(|T| <= t) = sin θ (1 + 1/2 cos² θ + (1·3)/(2·4) cos⁴ θ + ... to cos^(ν-2) θ)                          ν even
    P(|T| <= t) = 2/π (θ + sin θ (cos θ + 2/3 cos³ θ + (2·4)/(3·5) cos⁵ θ + ... to cos^(ν-2) θ))            ν odd

with θ = arctan(t / √ν), for ν degrees of freedom. Source: Abramowitz and Stegun, Handbook of Mathematical Functions,
26.7.3 and 26.7.4.
"""

import math

MOST = 1000  # degrees of freedom; beyond, t differs from the normal law's by less than 0.2 %


def inside(theta: float, freedom: int) -> float:
    """P(|T| <= √ν tan θ).

    >>> round(inside(math.atan(12.7062), 1), 6), round(inside(math.atan(4.30265 / math.sqrt(2)), 2), 6)
    (0.95, 0.95)
    """
    odd = freedom % 2
    cosine = math.cos(theta)
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def two_sided(freedom: int, share: float = 0.95) -> float:
    """The t with P(|T| <= t) = share.

    Raises ValueError for less than one degree of freedom.

    >>> [round(two_sided(freedom), 3) for freedom in (1, 2, 4, 30)]
    [12.706, 4.303, 2.776, 2.042]
    """
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    freedom = min(freedom, MOST)
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if inside(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
