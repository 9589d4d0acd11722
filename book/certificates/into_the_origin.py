"""B-X2. The flow (10) of Bernacchia, Lengyel and Hennequin (2018) can end in finite
time, with a loss that is left, though it did not start at a saddle.

Two scalar layers, inputs and outputs of variance 1, the target w* = -1. With the map
W = w2 w1 and R = w* - W, (10) reads dw1/dt = R/(2 w2), dw2/dt = R/(2 w1). The start is
(w1, w2) = (1, 1/2). This file shows, in fractions alone:

1. the start is no critical point: the gradients of R^2/2 there are not zero;
2. along the flow dW/dt = R and w1/w2 stays what it is. (Both are identities between
   rational functions; numerator and denominator have degrees below 6 in each weight,
   and they are compared on a grid of 8 x 8 points without zeros.)
3. so W = -1 + (3/2) e, where e = exp(-t) falls from 1 to 0: there is one moment, at
   e = 2/3, where W = 0. With w1/w2 kept, both weights are zero there: the origin,
   where (10) has no value and every gradient vanishes. R^2/2 = 1/2 is left, and the
   theorem's prediction (3e/2)^2/2 goes on to zero.

    python into_the_origin.py

It needs Python alone, and takes no time."""

from fractions import Fraction
from itertools import product

TARGET = Fraction(-1)
START = Fraction(1), Fraction(1, 2)
GRID = [Fraction(v) for v in (-4, -3, -2, -1, 1, 2, 3, 4)]


def ten(w1, w2, target=TARGET):
    """(10): the error through the inverse of what follows and what comes before."""
    R = target - w1 * w2
    return R / (2 * w2), R / (2 * w1)


def gradients(w1, w2, target=TARGET):
    R = target - w1 * w2
    return -w2 * R, -w1 * R


def speeds(rule, w1, w2):
    """d/dt of the map, and w2^2 times that of the ratio w1/w2."""
    d1, d2 = rule(w1, w2)
    return w2 * d1 + w1 * d2, d1 * w2 - w1 * d2


def certify(start=START, target=TARGET, rule=ten):
    """All three steps; returns exp(-t) at the end and the loss that is left."""
    assert any(gradients(*start, target)), "the start is a critical point"
    for w1, w2 in product(GRID, GRID):
        of_map, of_ratio = speeds(rule, w1, w2)
        assert of_map == target - w1 * w2, "the map does not head for its target"
        assert of_ratio == 0, "the ratio of the weights changes"
    W = start[0] * start[1]
    e = -target / (W - target)
    assert 0 < e < 1, "the segment from the start to the target does not meet zero"
    assert target + (W - target) * e == 0
    # w1 = ratio w2 and w1 w2 = 0 with a ratio that is neither zero nor infinite.
    assert start[0] != 0 and start[1] != 0
    assert gradients(Fraction(0), Fraction(0), target) == (0, 0)
    left = target**2 / 2
    assert left > 0
    return e, left


if __name__ == "__main__":
    e, left = certify()
    print(
        f"B-X2: from (1, 1/2), no critical point, (10) reaches the origin at exp(-t) ="
        f" {e},\nin finite time, and the excess loss {left} is left."
    )
