r"""Factors and Gram matrices of finite networks: everything a natural gradient needs,
without a Jacobian.

From a network's signals, inputs :math:`H_l` (N x M_in) and output-gradients :math:`D_l`
(NC x M_out, sample-major) of each trained layer, come the *factors*
:math:`A_l = H_l H_l^\top` and :math:`B_l = D_l D_l^\top`; the layer's Gram matrix is
:math:`K_l = (A_l \otimes 1_C 1_C^\top) \circ B_l`, and
:math:`J J^\top = K = \sum_l K_l`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .signals import Signals

__all__ = ["Factors", "empirical"]

TILE = 256  # rows of NC a tile: small enough for the cache, large enough for GEMM at full speed


class Factors:
    r"""The factors :math:`A_l, B_l` of every trained layer, tile by tile; made by
    `empirical` or `analytic`.

    Rows may be other inputs than columns (`cross`); then ``train`` holds the square
    factors of the columns. Nothing is stored beyond what the maker holds: Gram matrices
    are assembled in tiles on and above the diagonal, the Hadamard product fused into
    them, and mirrored.

    Attributes
    ----------
    rows, columns : int
        Numbers of samples.
    c : int
        Outputs C; Gram matrices are (rows C) x (columns C), sample-major.
    depth : int
        Trained layers.
    """

    signals: Signals | None = None

    def __init__(
        self,
        rows: int,
        columns: int,
        c: int,
        depth: int,
        like: Tensor,
        train: "Factors | None" = None,
    ):
        self.rows, self.columns, self.c, self.depth = rows, columns, c, depth
        self.dtype, self.device = like.dtype, like.device
        self._train = train  # None for square factors: a reference to itself would keep the network alive until a sweep

    @property
    def train(self) -> "Factors":
        return self if self._train is None else self._train

    def _tiles(
        self, rows: slice, columns: slice, layers: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def gram(self) -> Tensor:
        r"""The Gram matrix :math:`K = J J^\top = \sum_l K_l` (no 1/N), shape (rows C,
        columns C).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64))
        >>> ngd.kernels.empirical(sig).gram().shape
        torch.Size([6, 6])
        """
        return self._assemble(range(self.depth), lambda out, A, B: out.addcmul_(B, A))

    def layer(self, l: int) -> Tensor:
        r"""The Gram matrix of trained layer ``l`` alone, :math:`K_l = (A_l \otimes
        11^\top) \circ B_l`; l from 0.
        """
        return self._assemble(self._one(l), lambda out, A, B: out.addcmul_(B, A))

    def A(self, l: int) -> Tensor:
        r"""The forward factor :math:`A_l = H_l H_l^\top`, shape (rows, columns)."""
        return self._assemble(self._one(l), lambda out, A, B: out.copy_(A), c=1)

    def B(self, l: int) -> Tensor:
        r"""The backward factor :math:`B_l = D_l D_l^\top`, shape (rows C, columns C)."""
        return self._assemble(self._one(l), lambda out, A, B: out.copy_(B))

    def cross(self, x: "Tensor | Signals") -> "Factors":
        """Factors with rows at other inputs ``x`` (or their signals) and columns at
        these.
        """
        raise NotImplementedError

    def _one(self, l: int) -> range:
        if not -self.depth <= l < self.depth:
            raise ValueError(
                f"layer {l} does not exist; these factors have {self.depth} trained layers, counted from 0"
            )
        return range(l % self.depth, l % self.depth + 1)

    def _assemble(self, layers: range, write: Callable, c: int | None = None) -> Tensor:
        square, c, step = self.train is self, c or self.c, max(1, TILE // self.c)
        out = torch.zeros(
            self.rows * c, self.columns * c, dtype=self.dtype, device=self.device
        )
        grid = out.view(self.rows, c, self.columns, c)
        for i in range(0, self.rows, step):
            for j in range(i if square else 0, self.columns, step):
                r, s = (
                    slice(i, min(i + step, self.rows)),
                    slice(j, min(j + step, self.columns)),
                )
                for A, B in self._tiles(r, s, layers):
                    write(
                        grid[r, :, s, :],
                        A[:, None, :, None],
                        B.view(len(A), self.c, A.shape[1], self.c),
                    )
                if square:  # exactly symmetric: what lies below the diagonal is a copy
                    tile = out[_span(r, c), _span(s, c)]
                    if i == j:
                        tile.copy_(tile.triu() + tile.triu(1).T)
                    else:
                        out[_span(s, c), _span(r, c)] = tile.T
        return out


def _span(samples: slice, c: int) -> slice:
    """The rows of NC that belong to these samples."""
    return slice(samples.start * c, samples.stop * c)


class _Empirical(Factors):
    """Factors of a finite network, from its signals."""

    def __init__(
        self, sig: Signals, columns: Signals | None = None, train: Factors | None = None
    ):
        super().__init__(
            sig.n, (columns or sig).n, sig.c, len(sig.H), sig.outputs, train
        )
        self.signals, self._columns = sig, columns or sig
        self._space = torch.empty(
            2 * (max(TILE, sig.c)) ** 2, dtype=self.dtype, device=self.device
        )

    def _tiles(self, rows, columns, layers):
        n, m, c = rows.stop - rows.start, columns.stop - columns.start, self.c
        half = len(self._space) // 2
        A, B = (
            self._space[: n * m].view(n, m),
            self._space[half : half + n * m * c * c].view(n * c, m * c),
        )
        left, right = self.signals, self._columns
        for l in layers:
            torch.mm(left.H[l][rows], right.H[l][columns].T, out=A)
            torch.mm(left.D[l][_span(rows, c)], right.D[l][_span(columns, c)].T, out=B)
            yield A, B

    def cross(self, x):
        sig = x if isinstance(x, Signals) else self.signals.at(x)
        self.signals.matches(sig)
        return _Empirical(sig, self.signals, self)


def empirical(sig: Signals) -> Factors:
    r"""Factors of a finite network: :math:`A_l = H_l H_l^\top`,
    :math:`B_l = D_l D_l^\top` from its signals.

    Parameters
    ----------
    sig : Signals
        From `signals`.

    Returns
    -------
    Factors
        ``gram()`` equals the dense :math:`J J^\top` (no 1/N) to rounding.

    Raises
    ------
    TypeError
        If ``sig`` is not a `Signals`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.TwoLayerReLU(3, 8, seed=0), torch.eye(3, dtype=torch.float64))
    >>> ngd.kernels.empirical(sig).gram().diagonal().min() > 0
    tensor(True)
    """
    if not isinstance(sig, Signals):
        raise TypeError(
            f"sig must come from ngdcore.signals(net, x), not {type(sig).__name__}"
        )
    return _Empirical(sig)


def culprits(factors: Factors) -> str:
    """Duplicate or antipodal inputs, if there are any: the usual reason of a singular
    Gram.
    """
    if factors.train is not factors:
        return ""
    A = (
        factors.signals.H[0] @ factors.signals.H[0].T
        if factors.signals
        else factors.A(0)
    )  # tiles would sweep D
    scale = A.diagonal().clamp_min(torch.finfo(A.dtype).tiny).rsqrt()
    cosine = (A * scale[:, None] * scale).triu(1)
    found = []
    for kind, hit in (
        ("duplicate", cosine > 1 - 1e-6),
        ("antipodal", cosine < -1 + 1e-6),
    ):
        pairs = hit.nonzero()
        if len(pairs):
            found.append(
                f"{len(pairs)} pair(s) of {kind} inputs, the first in rows {pairs[0].tolist()}"
            )
    return "; there are " + " and ".join(found) if found else ""
