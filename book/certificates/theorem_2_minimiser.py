"""Z-X9. Theorem 2 of Zhang, Martens and Grosse (2019): the label is the minimum.

The proof needs that; the statement does not ask for it.

For a loss whose l(., y) is mu-strongly convex with an L-Lipschitz gradient it promises

    |u(k) - y|^2 <= (1 - 2 eta mu L/(mu + L))^k |u(0) - y|^2

under Conditions 1 and 3 and for small enough eta. Take l(u, y) = (u - y - s)^2/2, for
which mu = L = 1 and the printed factor is 1 - eta, and the model u = theta, whose
Jacobian is 1 and does not move, so that both conditions hold with every constant. Its
natural gradient step is theta <- theta - eta l'(u). This file shows, in fractions:

1. from u(0) = y + 2s the outputs are u(k) = y + s + s (1 - eta)^k;
2. |u(k) - y|^2 is more than the printed right-hand side for each k >= 1, however small
   the step: (1 + q)^2 > 4q for q = (1 - eta)^k, unless q = 1;
3. with the minimiser y + s in the place of y the statement holds, in each step.

    python theorem_2_minimiser.py

It needs Python alone, and takes a second."""

from fractions import Fraction

STEPS = [Fraction(1, 1000), Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)]


def run(shift, eta, steps, label=Fraction(1)):
    """Outputs of natural gradient descent from label + 2 shift (from label + 1 where
    the shift is zero).
    """
    outputs = [label + (2 * shift or 1)]
    for _ in range(steps):
        u = outputs[-1]
        outputs.append(u - eta * (u - label - shift))
    return outputs


def broken(outputs, centre, eta):
    """The steps at which the printed bound, around that centre, fails."""
    start = (outputs[0] - centre) ** 2
    return [
        k for k, u in enumerate(outputs) if (u - centre) ** 2 > (1 - eta) ** k * start
    ]


def certify(shift=Fraction(1, 3), steps=40, label=Fraction(1)):
    """All three steps; raises AssertionError where one fails."""
    for eta in STEPS:
        outputs = run(shift, eta, steps, label)
        closed = [label + shift * (1 + (1 - eta) ** k) for k in range(steps + 1)]
        assert outputs == closed, "not the closed form"
        assert broken(outputs, label, eta) == list(range(1, steps + 1))
        assert not broken(outputs, label + shift, eta)


if __name__ == "__main__":
    certify()
    print(
        "Z-X9: a quadratic loss that is least beside the label breaks Theorem 2's bound"
        " from the\nfirst step on, however small eta; around its minimiser the bound"
        " holds."
    )
