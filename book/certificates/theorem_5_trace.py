"""Z-X5. Theorem 5 of Zhang, Martens and Grosse (2019) asks for more than there is.

The limiting Gram matrix G has the entries h(t) = t/4 + t arcsin(t)/(2 pi), t = x.x', so
that for inputs of norm 1 its diagonal is h(1) = 1/4 + (pi/2)/(2 pi). The least
eigenvalue of a symmetric matrix is at most e'Ge for each unit vector e, hence at most
each diagonal entry, and at most their mean, trace/n. The theorem promises n^beta/2 with
probability at least 1 - n exp(-n^beta/4), for beta in (0, 1/2). This file shows, in
whole numbers and fractions alone:

1. h(1) = 1/2, hence the least eigenvalue is at most 1/2, for every data set;
2. n^(p/q)/2 > 1/2, that is n^p > 1, for every n >= 2 (p/q: any positive fraction);
3. the stated probability is positive for some beta < 1/2 if and only if n >= 681 (it
   grows with beta, so that the limit beta = 1/2 decides): from there on the theorem
   says something, and it is false.

    python theorem_5_trace.py

It needs Python alone, and takes a second."""

from fractions import Fraction
from math import isqrt

FIRST = 681  # the least n for which the stated probability can be positive
SAMPLES = range(2, 2000)
POWERS = [(1, 100), (1, 4), (49, 100)]  # beta as p/q


def diagonal(linear=Fraction(1, 4), divisor=2):
    """h(1): arcsin(1) is half of pi, and pi cancels against that of 1/(2 pi)."""
    arcsin_over_pi = Fraction(1, 2)
    return linear + arcsin_over_pi / divisor


def promised_more(n, p, q, bound):
    """Whether n^(p/q)/2 > bound, by powers of whole numbers and fractions."""
    return n**p > (2 * bound) ** q


def exp_bounds(x):
    """(lower, upper) bounds of exp(x) for a positive fraction x, from its series."""
    term = total = Fraction(1)
    k = 0
    while term > Fraction(1, 10**20) or k < 2 * x:
        k += 1
        term = term * x / k
        total += term
    # Each further term is less than half of the one before.
    return total, total + term


def root_bounds(n, digits=8):
    """(lower, upper) bounds of the square root of n, to that many digits."""
    low = isqrt(n * 10 ** (2 * digits))
    return Fraction(low, 10**digits), Fraction(low + 1, 10**digits)


def says_something(n):
    """Whether n exp(-sqrt(n)/4) < 1; an error if the digits do not decide."""
    low, high = root_bounds(n)
    if exp_bounds(low / 4)[0] > n:
        return True
    if exp_bounds(high / 4)[1] <= n:
        return False
    raise ArithmeticError(f"more digits are needed at n = {n}")


def certify(bound, first=FIRST):
    """All three steps; raises AssertionError where one fails."""
    assert bound == Fraction(1, 2), f"the diagonal is {bound}"
    for p, q in POWERS:
        assert all(promised_more(n, p, q, bound) for n in SAMPLES), f"beta = {p}/{q}"
    assert not any(says_something(n) for n in range(2, first)), "it speaks before"
    # log(n) - sqrt(n)/4 has the derivative 1/n - 1/(8 sqrt(n)), which is negative once
    # sqrt(n) > 8. So what holds at `first` holds for all that follow.
    assert first > 64 and says_something(first), "it is silent there"


if __name__ == "__main__":
    certify(diagonal())
    print(
        "Z-X5: the least eigenvalue is at most 1/2 for unit inputs, and n^beta/2 is"
        f" more for every n >= 2;\nfrom n = {FIRST} on the stated probability is"
        " positive for some beta < 1/2, and the theorem false."
    )
