"""Z-X11. Lemma 10 of Zhang, Martens and Grosse (2019) needs its 1/nu.

For a two-layer ReLU network of width m whose weights start as N(0, nu^2) and whose
units move by at most A each and B all together, (69) bounds the Rademacher complexity
on n unit inputs by

    B/sqrt(2n) (1 + (2 log(2/delta)/m)^(1/4)) + 2 A^2 sqrt(m) + A sqrt(2 log(2/delta)),

with probability at least 1 - delta, whatever nu. This file shows, in whole numbers and
fractions alone, a case in which it fails with probability above 1/2:

1. n inputs x_i = 7/25 e_0 + 24/25 e_i, of norm 1; for each choice of signs a direction
   v in which the signed sum of the units' outputs is M_p for a unit weight, p of the
   signs being +1; the expectation of M_p over signs;
2. all units move by A along v (for the opposite signs, where the outer weight is -1),
   so that B = A sqrt(m). A ReLU is 1-Lipschitz, so the start costs at most its own
   size, whose mean over units and inputs is below 2 nu with probability above 1/2
   (Markov, E|g| < 1): complexity/(A sqrt(m)) >= E M_p/n - 2 nu/A;
3. that is more than (69)/(A sqrt(m)).

    python lemma_10_small_start.py

It needs Python alone, and takes a second."""

from fractions import Fraction
from math import comb, factorial, isqrt

SHARED, OWN = Fraction(7, 25), Fraction(24, 25)
INPUTS, WIDTH = 100, 10**6
REACH, START = Fraction(1, 10**3), Fraction(1, 10**7)  # A and nu; delta = 1/10


def root_below(x, digits=12):
    """A fraction of that many digits, at most the square root of x."""
    return Fraction(
        isqrt(x.numerator * 10 ** (2 * digits) // x.denominator), 10**digits
    )


def root_above(x, digits=12):
    """One that is more."""
    return root_below(x, digits) + Fraction(1, 10**digits)


def inputs_are_unit(shared, own):
    """Whether shared e_0 + own e_i has norm 1."""
    return shared**2 + own**2 == 1


def signed_sum(n, p, shared=SHARED, own=OWN):
    """A lower bound of M_p: sum of sign times ReLU output for v/|v|, where v has a in
    direction 0, b in the p positive ones and -c in the others.
    """
    c_over_a = shared / own
    a = shared * p / (1 + (n - p) * c_over_a**2)
    b, c = own, a * c_over_a
    outputs = [shared * a + own * b] * p + [shared * a - own * c] * (n - p)
    signs = [1] * p + [-1] * (n - p)
    value = sum(s * max(f, 0) for s, f in zip(signs, outputs))
    norm_square = a**2 + p * b**2 + (n - p) * c**2
    return root_below(value**2 / norm_square) if p else Fraction(0)


def complexity(n, nu_over_reach, shared=SHARED, own=OWN):
    """Lower bound of the complexity over A sqrt(m)."""
    mean = sum(comb(n, p) * signed_sum(n, p, shared, own) for p in range(n + 1))
    return mean / 2**n / n - 2 * nu_over_reach


def log_2_over_delta():
    """A bound of log 20: exp(3), by its series, is more."""
    assert sum(Fraction(3**k, factorial(k)) for k in range(30)) > 20
    return 3


def printed(n, m, reach, nu=1):
    """Upper bound of (69) over A sqrt(m), for delta = 1/10; with nu: of its form with
    the missing 1/nu.
    """
    log_over_m = root_above(Fraction(2 * log_2_over_delta(), m))
    first = root_above(Fraction(1, 2 * n)) * (1 + root_above(log_over_m))
    return first + 2 * reach / nu + log_over_m


def certify(shared=SHARED, own=OWN, reach=REACH, start=START):
    """All three steps; raises AssertionError where one fails."""
    assert inputs_are_unit(shared, own), "inputs of another norm"
    ours = complexity(INPUTS, start / reach, shared, own)
    theirs = printed(INPUTS, WIDTH, reach)
    assert ours > theirs, "the printed bound holds here"
    assert ours < printed(INPUTS, WIDTH, reach, start), "and with 1/nu it fails too"
    return ours, theirs


if __name__ == "__main__":
    ours, theirs = (Fraction(round(10**4 * f), 10**4) for f in certify())
    print(
        f"Z-X11: {INPUTS} inputs, width {WIDTH}, A = {REACH}, nu = {START}: complexity"
        f" over A sqrt(m) at\nleast {ours}, by (69) at most {theirs}; with 1/nu the"
        " bound holds."
    )
