"""B-X3. Two generalised inverses of the Fisher matrix, one start, two ends: against
section 3 and the conclusions of Bernacchia, Lengyel and Hennequin (2018).

Two scalar layers, inputs and outputs of variance 1, the target w* = -1, the start
(w1, w2) = (1, 1/2). With J = (w2, w1), W = w2 w1 and R = w* - W the Fisher matrix is
J'J, and a natural gradient is any d with J'J d = J'R. Two of them are (10),
d = (R/(2 w2), R/(2 w1)), and that of Moore and Penrose, d = J'R / JJ'. This file shows,
in fractions alone (identities between rational functions of low degree, compared on a
grid without zeros):

1. both solve J'J d = J'R, and both move W by R: at a point they agree;
2. (10) keeps w1/w2, so that both weights are zero when W is: its flow ends there, at
   exp(-t) = 2/3, with the loss 1/2;
3. Moore-Penrose keeps w1^2 - w2^2 = 3/4, so that JJ' = w1^2 + w2^2 is never below 3/4:
   its velocity is defined all the way, W = -1 + (3/2) exp(-t) for ever, and at
   exp(-t) = 1/2 its loss is 9/32. The dynamics of the loss are not identical.

    python past_the_origin.py

It needs Python alone, and takes no time."""

from fractions import Fraction
from itertools import product

TARGET = Fraction(-1)
START = Fraction(1), Fraction(1, 2)
GRID = [Fraction(v) for v in (-4, -3, -2, -1, 1, 2, 3, 4)]


def ten(w1, w2):
    R = TARGET - w1 * w2
    return R / (2 * w2), R / (2 * w1)


def least_norm(w1, w2):
    R = TARGET - w1 * w2
    return w2 * R / (w1**2 + w2**2), w1 * R / (w1**2 + w2**2)


def is_natural(rule, w1, w2):
    """Whether J'J d = J'R."""
    J, R = (w2, w1), TARGET - w1 * w2
    moved = sum(j * d for j, d in zip(J, rule(w1, w2)))
    return all(j * moved == j * R for j in J)


def keeps(rule, invariant):
    """Whether a rule keeps the ratio of the weights, or the difference of squares."""
    for w1, w2 in product(GRID, GRID):
        d1, d2 = rule(w1, w2)
        change = {"ratio": d1 * w2 - w1 * d2, "balance": 2 * (w1 * d1 - w2 * d2)}
        if change[invariant]:
            return False
    return True


def loss(e):
    """R^2/2 on W = -1 + (3/2) e, e = exp(-t)."""
    W = START[0] * START[1]
    return ((W - TARGET) * e) ** 2 / 2


def certify(first=ten, second=least_norm):
    """All three steps; returns both losses at exp(-t) = 1/2."""
    for rule, point in product((first, second), product(GRID, GRID)):
        assert is_natural(rule, *point), f"{rule.__name__} is no natural gradient"
    assert keeps(first, "ratio") and all(START), "the first rule leaves its ray"
    assert keeps(second, "balance"), "the second rule leaves its hyperbola"
    balance = START[0] ** 2 - START[1] ** 2
    # w1^2 + w2^2 >= |w1^2 - w2^2|
    assert abs(balance) > 0, "the hyperbola passes through the origin"
    end, later = Fraction(2, 3), Fraction(1, 2)
    assert loss(end) == TARGET**2 / 2 and later < end
    assert loss(later) < loss(end)
    return loss(end), loss(later)


if __name__ == "__main__":
    stuck, passed = certify()
    print(
        "B-X3: at exp(-t) = 1/2 the flow (10) has ended with the loss"
        f" {stuck},\nand Moore-Penrose, from the same start, has {passed}."
    )
