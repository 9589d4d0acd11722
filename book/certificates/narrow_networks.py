"""B-X1. With pseudo-inverses, (10) of Bernacchia, Lengyel and Hennequin (2018) is no
natural gradient in narrow networks.

Take whitened coordinates: both covariances are the identity and the loss is |R|^2/2,
R = W* - W. The map moves by the sum of B_i dW_i A_i =: J dW. An update is a natural
gradient, by whichever generalised inverse of the Fisher matrix J'J, exactly if it
solves J'J dW = J'R, that is, if every B_i' (R - J dW) A_i' is zero. On networks with
weights that are whole numbers this file shows, in fractions alone:

1. (10) with Moore-Penrose inverses moves the map by S R / L, and S has the eigenvalues
   k of the count of layers, in the multiplicities that the widths give: S - k has the
   rank that belongs to them. With narrow layers it has several positive ones, and
   J'(R - S R / L) is not zero for some R; with wide ones it is zero for every R;
2. the step of two layers, with the projectors on the columns of B_1 and the rows of
   A_L, solves the equation for every R, in all of the networks;
3. with the projectors on the columns and rows of W itself in their place it does not,
   where a network only contracts or only expands.

    python narrow_networks.py

It needs Python alone, and takes a few seconds."""

from fractions import Fraction
from functools import reduce
from itertools import product

NARROW = [(4, 3, 2), (2, 3, 4), (3, 2, 1), (3, 1, 3), (3, 2, 1, 2)]
WIDE = [(2, 2, 2), (2, 3, 1), (1, 2, 2)]


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


def mul(*factors):
    return reduce(
        lambda a, b: [
            [sum((x * y for x, y in zip(row, col)), Fraction(0)) for col in zip(*b)]
            for row in a
        ],
        factors,
    )


def turn(a):
    return [list(row) for row in zip(*a)]


def lin(a, b, times):
    """a + times b."""
    return [[x + times * y for x, y in zip(p, q)] for p, q in zip(a, b)]


def reduced(a):
    """Reduced row echelon form, and its pivots."""
    a, pivots = [row[:] for row in a], []
    for column in range(len(a[0])):
        row = len(pivots)
        found = next((i for i in range(row, len(a)) if a[i][column]), None)
        if found is None:
            continue
        a[row], a[found] = a[found], a[row]
        a[row] = [x / a[row][column] for x in a[row]]
        for i in range(len(a)):
            if i != row and a[i][column]:
                a[i] = [x - a[i][column] * y for x, y in zip(a[i], a[row])]
        pivots.append(column)
    return a, pivots


def inverse(a):
    n = len(a)
    both, pivots = reduced([row + unit for row, unit in zip(a, eye(n))])
    assert pivots == list(range(n)), "singular"
    return [row[n:] for row in both]


def pinv(a):
    """Moore-Penrose, by a = C F with columns C of a and F of full row rank."""
    rows, pivots = reduced(a)
    F = rows[: len(pivots)]
    C = [[row[p] for p in pivots] for row in a]
    left = mul(inverse(mul(turn(C), C)), turn(C))
    return mul(turn(F), inverse(mul(F, turn(F))), left)


def before_and_after(layers):
    """A_i = W_{i-1} ... W_1 and B_i = W_L ... W_{i+1} for all layers."""
    A, B = [eye(len(layers[0][0]))], [eye(len(layers[-1]))]
    for layer in layers[:-1]:
        A.append(mul(layer, A[-1]))
    for layer in layers[:0:-1]:
        B.insert(0, mul(B[0], layer))
    return A, B


def ten(A, B, layers, R):
    """(10), whitened, with Moore-Penrose inverses."""
    L = len(layers)
    steps = [mul(pinv(b), R, pinv(a)) for a, b in zip(A, B)]
    return [[[x / L for x in row] for row in step] for step in steps]


def two_layers(A, B, layers, R, of_the_map=False):
    """The repaired step: only the first and the last layer move."""
    first, last = pinv(B[0]), pinv(A[-1])
    W, half = mul(layers[-1], A[-1]), Fraction(-1, 2)
    P_a, P_b = mul(B[0], first), mul(last, A[-1])
    if of_the_map:
        P_a, P_b = mul(W, pinv(W)), mul(pinv(W), W)
    still = [[[Fraction(0)] * len(w[0]) for _ in w] for w in layers[1:-1]]
    return [
        mul(first, lin(R, mul(R, P_b), half)),
        *still,
        mul(lin(R, mul(P_a, R), half), last),
    ]


def moved(A, B, steps):
    """J dW, the sum of B_i dW_i A_i."""
    parts = [mul(b, step, a) for a, b, step in zip(A, B, steps)]
    return reduce(lambda p, q: lin(p, q, 1), parts)


def units(rows, columns):
    """The unit matrices of a shape."""
    for i, j in product(range(rows), range(columns)):
        yield [
            [Fraction((i, j) == (p, q)) for q in range(columns)] for p in range(rows)
        ]


def is_natural(widths, update):
    """Whether J'(R - J dW) = 0 for every R (for every unit matrix: it is linear)."""
    layers = weights(widths)
    A, B = before_and_after(layers)
    for R in units(widths[-1], widths[0]):
        rest = lin(R, moved(A, B, update(A, B, layers, R)), -1)
        gradients = [mul(turn(b), rest, turn(a)) for a, b in zip(A, B)]
        if any(x for g in gradients for row in g for x in row):
            return False
    return True


def counted(widths):
    """How many layers move each direction, by the widths alone: {k: multiplicity}."""
    L, found = len(widths) - 1, {}
    for q, p in product(range(widths[-1]), range(widths[0])):
        k = sum(q < min(widths[i:]) and p < min(widths[:i]) for i in range(1, L + 1))
        found[k] = found.get(k, 0) + 1
    return found


def multiplicity(widths, k):
    """The dimension of the kernel of S - k, for S R = L J (10)."""
    layers = weights(widths)
    A, B = before_and_after(layers)
    matrix = []
    for R in units(widths[-1], widths[0]):
        move = moved(A, B, ten(A, B, layers, R))
        rest = lin([[len(layers) * x for x in row] for row in move], R, -k)
        matrix.append([x for row in rest for x in row])
    return len(matrix) - len(reduced(matrix)[1])


def certify(count=counted, repair=two_layers, narrow=NARROW, wide=WIDE):
    """All three steps; raises AssertionError where one fails."""
    for widths in narrow + wide:
        for k, times in count(widths).items():
            assert multiplicity(widths, k) == times, f"{widths}: {k} of S"
        assert is_natural(widths, repair), f"{widths}: the repair fails"
    for widths in wide:
        assert is_natural(widths, ten), f"{widths}: (10) fails in a wide network"
    for widths in narrow:
        assert len(set(count(widths)) - {0}) > 1, f"{widths}: one rate only"
        assert not is_natural(widths, ten), f"{widths}: (10) is a natural gradient"
    for widths in [(4, 3, 2), (2, 3, 4)]:
        of_the_map = is_natural(widths, lambda *a: two_layers(*a, of_the_map=True))
        assert not of_the_map, f"{widths}: the projectors of W do"


if __name__ == "__main__":
    certify()
    names = ", ".join("-".join(map(str, widths)) for widths in NARROW)
    print(
        f"B-X1: in {names},\n(10) with pseudo-inverses has the rates k/L of the count"
        " of layers and solves the\nequation of a natural gradient for no generalised"
        " inverse; the step of two layers does."
    )
