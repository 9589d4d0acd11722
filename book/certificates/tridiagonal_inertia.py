"""K-X1. The tri-diagonal Sigma of Karakida and Osawa (2020), Lemma 4.3, is indefinite.

T_L has ones on its diagonal and beside it. The lemma calls it positive definite for
L = 3s and L = 3s+1. This file computes its inertia exactly, for every L up to 40, in
two ways that share nothing but the matrix:

1. Sturm: the leading minors obey d_k = d_{k-1} - d_{k-2}, whole numbers of period six,
   1, 1, 0, -1, -1, 0. For a tri-diagonal matrix without zeros beside the diagonal, the
   number of negative eigenvalues is that of the sign changes in d_0, ..., d_L, zeros
   passed over;
2. LDL': symmetric elimination in fractions, with a block of two where a pivot is zero.
   By Sylvester's law it has the inertia of T_L.

Both give floor(L/3) negative eigenvalues, and one zero eigenvalue for L = 3s+2; and a
vector on which the form is negative is shown for every L >= 3: (1, -2, 1, 0, ..., 0)
gives 1 + 4 + 1 - 4 - 4 = -2.

    python tridiagonal_inertia.py

It needs Python alone, and takes a few seconds."""

from fractions import Fraction

DEPTHS = range(1, 41)


def tridiagonal(L, beside=1):
    """T_L, as lists of fractions."""
    entry = {0: Fraction(1), 1: Fraction(beside)}
    return [[entry.get(abs(i - k), Fraction(0)) for k in range(L)] for i in range(L)]


def minors(matrix):
    """The leading principal minors of a tri-diagonal matrix, that of size 0 first."""
    d = [Fraction(1), matrix[0][0]]
    for k in range(1, len(matrix)):
        beside = matrix[k][k - 1] * matrix[k - 1][k]
        d.append(matrix[k][k] * d[-1] - beside * d[-2])
    return d


def sturm(matrix):
    """(negative, zero) eigenvalues from the leading minors. A zero eigenvalue of such a
    matrix is simple.
    """
    d = minors(matrix)
    signs = [1 if x > 0 else -1 for x in d if x != 0]
    changes = sum(a != b for a, b in zip(signs, signs[1:]))
    return changes, int(d[-1] == 0)


def inertia(matrix):
    """(negative, zero) eigenvalues by symmetric elimination, pivots of size one and, at
    a zero of the diagonal, two.
    """
    a = [row[:] for row in matrix]
    negative = 0
    while a:
        n = len(a)
        k = next((i for i in range(n) if a[i][i] != 0), None)
        if k is not None:
            negative += a[k][k] < 0
            a = eliminated(a, [k])
            continue
        pair = next(((i, j) for i in range(n) for j in range(i) if a[i][j] != 0), None)
        if pair is None:
            return negative, n  # nothing but zeros is left
        negative += 1  # a block (0 b; b 0) has one eigenvalue of each sign
        a = eliminated(a, list(pair))
    return negative, 0


def eliminated(a, chosen):
    """The Schur complement of the chosen one or two rows and columns."""
    rest = [i for i in range(len(a)) if i not in chosen]
    if len(chosen) == 1:
        (k,) = chosen
        inverse = [[1 / a[k][k]]]
    else:
        i, j = chosen
        inverse = [[Fraction(0), 1 / a[i][j]], [1 / a[i][j], Fraction(0)]]

    def taken(p, q):
        return sum(
            a[p][chosen[u]] * inverse[u][v] * a[chosen[v]][q]
            for u in range(len(chosen))
            for v in range(len(chosen))
        )

    return [[a[p][q] - taken(p, q) for q in rest] for p in rest]


def form(matrix, vector):
    """vector' matrix vector."""
    n = len(vector)
    return sum(vector[i] * matrix[i][k] * vector[k] for i in range(n) for k in range(n))


def certify(matrices):
    """Both ways, for {L: T_L}; raises AssertionError where something fails."""
    for L, matrix in matrices.items():
        expected = (L // 3, int(L % 3 == 2))
        assert sturm(matrix) == expected, f"Sturm, L = {L}: {sturm(matrix)}"
        assert inertia(matrix) == expected, f"LDL', L = {L}: {inertia(matrix)}"
        if L >= 3:
            assert form(matrix, [1, -2, 1] + [0] * (L - 3)) == -2, f"form, L = {L}"


if __name__ == "__main__":
    certify({L: tridiagonal(L) for L in DEPTHS})
    print(
        "K-X1: T_L has floor(L/3) negative eigenvalues for L = 1 to"
        f" {max(DEPTHS)}; positive definite for L = 1 only (L = 2 is singular)."
    )
