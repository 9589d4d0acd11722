"""Z-X13. Theorem 7 of Zhang, Martens and Grosse (2019) needs as many rows as columns.

For rows of which any d or fewer are linearly independent it promises an invertible A
such that Z'Z = (n/d) I for the normalised rows Z of XA. Squares of norms are fractions
where X and A are, and so is Z'Z = sum of (A'x)(A'x)'/|A'x|^2. This file shows, in
fractions alone, for n rows (1, t, t^2, ...) in d columns and maps A of many kinds:

1. for n < d the hypothesis is true, and det Z'Z = 0, while det (n/d) I is not: a sum of
   n matrices of rank 1 has rank n at most, whatever A;
2. |(d/n) Z'Z - I|^2 is never below d (d/n - 1), and the unit rows attain that;
3. for n = d there is such an A: the inverse of X.

    python forster_few_rows.py

It needs Python alone, and takes a second."""

from fractions import Fraction
from itertools import combinations


def determinant(rows):
    """By elimination, exactly."""
    rows, value = [list(map(Fraction, row)) for row in rows], Fraction(1)
    for i in range(len(rows)):
        pivot = next((j for j in range(i, len(rows)) if rows[j][i]), None)
        if pivot is None:
            return Fraction(0)
        if pivot != i:
            rows[i], rows[pivot], value = rows[pivot], rows[i], -value
        value *= rows[i][i]
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
    return value


def inverse(rows):
    """By Cramer's rule."""
    d, whole = len(rows), determinant(rows)

    def cofactor(i, j):
        minor = [r[:j] + r[j + 1 :] for k, r in enumerate(rows) if k != i]
        return (-1) ** (i + j) * determinant(minor)

    return [[cofactor(j, i) / whole for j in range(d)] for i in range(d)]


def times(rows, A):
    """The product of two matrices, as lists of rows."""
    return [
        [sum(x * a for x, a in zip(r, c, strict=True)) for c in zip(*A)] for r in rows
    ]


def moments(rows, A):
    """Z'Z for the normalised rows of XA."""
    mapped = times(rows, A)
    weights = [Fraction(1) / sum(v * v for v in row) for row in mapped]
    d = len(A)
    return [
        [sum(w * r[i] * r[j] for w, r in zip(weights, mapped)) for j in range(d)]
        for i in range(d)
    ]


def general(n, d):
    """Rows (1, t, ..., t^(d-1)), t = 1 to n."""
    return [[Fraction(t**k) for k in range(d)] for t in range(1, n + 1)]


def independent(rows, d):
    """Whether any d or fewer rows are: it is enough to look at the largest subsets."""
    size = min(len(rows), d)
    gram = lambda some: times(some, list(zip(*some)))  # noqa: E731
    return all(determinant(gram(some)) for some in combinations(rows, size))


def maps(d):
    """Invertible matrices of several kinds."""
    one = [[Fraction(i == j) for j in range(d)] for i in range(d)]
    upper = [[Fraction(i <= j) for j in range(d)] for i in range(d)]
    hilbert = [[Fraction(1, i + j + 1) for j in range(d)] for i in range(d)]
    return [one, upper, hilbert, general(d, d)]


def error_square(moment, n):
    """|(d/n) Z'Z - I|^2 in the Frobenius norm."""
    d = len(moment)
    return sum(
        (Fraction(d, n) * moment[i][j] - (i == j)) ** 2
        for i in range(d)
        for j in range(d)
    )


def certify(missing=1, largest=5):
    """All three steps; missing: how many rows fewer than columns there are at least.
    Raises AssertionError where one fails.
    """
    for d in range(2, largest + 1):
        for n in range(1, d - missing + 1):
            rows, least = general(n, d), d * (Fraction(d, n) - 1)
            assert independent(rows, d), "the hypothesis is not true"
            for A in maps(d):
                assert determinant(A), "the map is not invertible"
                moment = moments(rows, A)
                assert determinant(moment) == 0 != Fraction(n, d) ** d
                assert error_square(moment, n) >= least > 0
            unit = maps(d)[0][:n]
            assert error_square(moments(unit, maps(d)[0]), n) == least
        square = general(d, d)
        assert error_square(moments(square, inverse(square)), d) == 0


if __name__ == "__main__":
    certify()
    print(
        "Z-X13: with fewer rows than columns the hypothesis of Theorem 7 is true, its"
        "\nconclusion is not; with as many, the inverse of X is such a map."
    )
