"""B-X7. The Fisher matrix of a deep linear network is not positive definite, against
the text after (5) of Bernacchia, Lengyel and Hennequin (2018).

The Fisher matrix is F = J'CJ, with J the derivative of the map W = W_L ... W_1 in the
weights and C positive definite. So v'Fv = 0 exactly if J v = 0, and F is positive
definite exactly if J has full column rank. On networks with weights that are whole
numbers this file shows, in fractions alone:

1. a vector v other than zero with J v = 0 and so v'Fv = 0, for every network of two
   layers or more: v has W_1 in the first layer and -W_2 in the second;
2. the rank of J is r (n_0 + n_L - r), r the least of the widths: the number of
   parameters is larger.

    python flat_directions.py

It needs Python alone, and takes a second."""

from fractions import Fraction
from itertools import product

NETWORKS = [(1, 1, 1), (2, 2, 2), (3, 2, 3), (2, 4, 2), (3, 1, 2), (3, 4, 2, 3, 4)]


def weights(widths):
    """Whole numbers from -9 to 9 without a pattern, from a congruential generator."""
    state, layers = 7, []
    for rows, columns in zip(widths[1:], widths):
        layer = []
        for _ in range(rows):
            layer.append([])
            for _ in range(columns):
                state = (1103515245 * state + 12345) % 2**31
                layer[-1].append(Fraction(state // 2**16 % 19 - 9))
        layers.append(layer)
    return layers


def eye(n):
    return [[Fraction(i == j) for j in range(n)] for i in range(n)]


def mul(a, b):
    return [
        [sum((x * y for x, y in zip(row, col)), Fraction(0)) for col in zip(*b)]
        for row in a
    ]


def jacobian(layers):
    """Columns d vec(W) / d W_i[p, q], layer by layer: the product of column p of what
    follows and row q of what comes before.
    """
    columns = []
    for i in range(len(layers)):
        before, after = eye(len(layers[0][0])), eye(len(layers[-1]))
        for layer in layers[:i]:
            before = mul(layer, before)
        for layer in layers[:i:-1]:
            after = mul(after, layer)
        shape = range(len(layers[i])), range(len(layers[i][0]))
        for p, q in product(*shape):
            columns.append([row[p] * x for row in after for x in before[q]])
    return columns


def rank(rows):
    rows, found = [row[:] for row in rows], 0
    for column in range(len(rows[0])):
        at = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if at is None:
            continue
        rows[found], rows[at] = rows[at], rows[found]
        for i in range(found + 1, len(rows)):
            times = rows[i][column] / rows[found][column]
            rows[i] = [x - times * y for x, y in zip(rows[i], rows[found])]
        found += 1
    return found


def flat(layers):
    """The direction in which one layer grows as the next one shrinks."""
    signs = [1, -1] + [0] * (len(layers) - 2)
    return [s * x for s, layer in zip(signs, layers) for row in layer for x in row]


def dimension(widths):
    r = min(widths)
    return r * (widths[0] + widths[-1] - r)


def certify(networks=NETWORKS, direction=flat, count=dimension):
    """Both steps; raises AssertionError where one fails."""
    for widths in networks:
        layers = weights(widths)
        J, v = jacobian(layers), direction(layers)
        assert any(v), f"{widths}: the direction is zero"
        moved = [
            sum(x * column[k] for x, column in zip(v, J)) for k in range(len(J[0]))
        ]
        assert not any(moved), f"{widths}: the map moves"
        assert rank(J) == count(widths), f"{widths}: another rank"
        assert len(J) > rank(J), f"{widths}: no flat direction"


if __name__ == "__main__":
    certify()
    print(
        f"B-X7: v'Fv = 0 for a v other than zero, in {len(NETWORKS)} networks; the rank"
        " of F is r (n_0 + n_L - r)."
    )
