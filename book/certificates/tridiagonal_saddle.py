"""K-X4. The tri-diagonal end point of Karakida and Osawa (2020), 4.4, is no minimum.

The paper calls the end point of each approximation a minimum-norm solution for its own
distance, theta' G theta, the limit of ridge regression with that penalty. Here G is
block tri-diagonal, G = (1/N) S' (T x I) S with S = blockdiag(J_1, ..., J_L), and the
Jacobians J_l (2 x 3, of full row rank) have small whole numbers for entries. In
fractions, for L = 3 to 7:

1. the end point d_l = s_l/alpha J_l' (J_l J_l')^-1 r, with T s = 1 and alpha = 1's = 1
   or more, fits the data (J d = r), and G d is a multiple of J' r: it is what the paper
   says it is, a stationary point;
2. v_l = w_l J_l' (J_l J_l')^-1 r with w = (1, -2, 1, 0, ..., 0) leaves the outputs
   alone (J v = 0), and v' G v = -2 |r|^2/N < 0;
3. so d + c v fits the data for every c and is shorter the larger c is; the ridge
   objective falls below every bound, whatever the ridge;
4. with the identity or all ones in the place of T the same v gives 6 |r|^2/N and 0: the
   block-diagonal and the exact end points are minima, as printed.

    python tridiagonal_saddle.py

It needs Python alone, and takes a second."""

from fractions import Fraction

N = 2
RESIDUAL = [Fraction(3), Fraction(-2)]
DEPTHS = range(3, 8)


def jacobians(L):
    """L matrices, 2 x 3, of full row rank."""
    return [[[1, l, 2], [l + 1, -1, 1]] for l in range(L)]


def coupled(L, reach=1):
    """Ones where two layers are at most `reach` apart."""
    return [[Fraction(abs(i - k) <= reach) for k in range(L)] for i in range(L)]


def shares(L):
    """Zeros and ones, or halves in pairs, with T s = 1."""
    if L % 3 == 2:
        half = Fraction(1, 2)
        return [half if l % 3 < 2 else Fraction(0) for l in range(L)]
    return [Fraction(l % 3 == (L % 3 == 0)) for l in range(L)]


def product(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector)) for row in matrix]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def pulled(J, r):
    """J' (J J')^-1 r."""
    a, b, d = dot(J[0], J[0]), dot(J[0], J[1]), dot(J[1], J[1])
    det = Fraction(a * d - b * b)
    x, y = (d * r[0] - b * r[1]) / det, (a * r[1] - b * r[0]) / det
    return [x * p + y * q for p, q in zip(*J)]


def change(Js, weights, r):
    """Layer l moves the outputs by weights[l] r."""
    return [[w * p for p in pulled(J, r)] for J, w in zip(Js, weights)]


def outputs(Js, d):
    """J d, and each layer's part of it."""
    parts = [product(J, part) for J, part in zip(Js, d)]
    return [sum(column) for column in zip(*parts)], parts


def metric(Js, sigma, d):
    """G d = (1/N) S' (sigma x I) S d, layer by layer."""
    _, parts = outputs(Js, d)
    result = []
    for J, row in zip(Js, sigma):
        mixed = [sum(s * p[n] for s, p in zip(row, parts)) for n in range(N)]
        result.append([dot(column, mixed) / N for column in zip(*J)])
    return result


def form(Js, sigma, d):
    """d' G d."""
    return sum(dot(a, b) for a, b in zip(d, metric(Js, sigma, d)))


def certify(L, sigma, w=(1, -2, 1)):
    """All four steps at one depth; raises AssertionError where one fails."""
    Js, r = jacobians(L), RESIDUAL
    square = dot(r, r)
    s = shares(L)
    assert product(sigma, s) == [1] * L, "the shares do not solve T s = 1"
    alpha = sum(s)
    assert alpha >= 1
    end = change(Js, [x / alpha for x in s], r)
    assert outputs(Js, end)[0] == r, "the end point does not fit"
    pulled_back = [[dot(c, r) / (alpha * N) for c in zip(*J)] for J in Js]
    assert metric(Js, sigma, end) == pulled_back, "it is not stationary"
    w = [Fraction(x) for x in w] + [Fraction(0)] * (L - 3)
    v = change(Js, w, r)
    assert outputs(Js, v)[0] == [0] * N, "v moves the outputs"
    assert form(Js, sigma, v) == -2 * square / N, "the form on v"
    last = form(Js, sigma, end)
    for c in (1, 2, 10, 1000):
        moved = [[a + c * b for a, b in zip(*both)] for both in zip(end, v)]
        assert outputs(Js, moved)[0] == r
        now = form(Js, sigma, moved)
        assert now == square / (alpha * N) - 2 * c * c * square / N < last
        last = now
    assert form(Js, coupled(L, 0), v) == 6 * square / N
    assert form(Js, coupled(L, L), v) == 0


if __name__ == "__main__":
    for depth in DEPTHS:
        certify(depth, coupled(depth))
    print(
        "K-X4: the tri-diagonal end point is stationary, and along solutions its own"
        f" form falls without bound; L = {min(DEPTHS)} to {max(DEPTHS)}."
    )
