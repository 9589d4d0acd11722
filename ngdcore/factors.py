r"""Factors and Gram matrices of finite networks: everything a natural gradient needs,
without a Jacobian.

From a network's signals, inputs :math:`H_l` (N x M_in) and output-gradients :math:`D_l`
(NC x M_out, sample-major) of each trained layer, come the *factors*
:math:`A_l = H_l H_l^\top` and :math:`B_l = D_l D_l^\top`; the layer's Gram matrix is
:math:`K_l = (A_l \otimes 1_C 1_C^\top) \circ B_l`, and
:math:`J J^\top = K = \sum_l K_l`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .room import check_room
from .signals import Signals

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["Factors", "empirical", "operator"]

REMEDY = (
    "use fewer samples, float32, blocks() or operator() in its place, or"
    " fisher.MatrixFree(stored=False) to solve with it"
)
RUN = 16  # samples that some_rows takes from one place
TILE = 256  # rows of NC a tile: small enough for the cache, large enough for GEMM

Write = Callable[[slice, slice, list[Tensor]], None]


class Factors(ABC):
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
    scalar : Factors or None
        Where every matrix is one of a single output times :math:`I_C`, as for
        infinitely wide networks with C > 1, the factors of that output: solve with
        them, and expand the result.
    """

    signals: Signals | None = None
    scalar: "Factors | None" = None

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
        self._train = train  # None where square: no reference to itself

    @property
    def train(self) -> "Factors":
        return self if self._train is None else self._train

    @property
    def nbytes(self) -> int:
        """Bytes that the Gram matrix takes, or would.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=2).nbytes
        72
        """
        size = torch.empty(0, dtype=self.dtype).element_size()
        return size * self.rows * self.c * self.columns * self.c

    def gram(self) -> Float[Tensor, "RC NC"]:
        r"""The Gram matrix :math:`K = J J^\top = \sum_l K_l` (no 1/N), shape (rows C,
        columns C).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net = ngd.models.MLP([3, 4, 2], seed=0)
        >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
        >>> ngd.kernels.empirical(sig).gram().shape
        torch.Size([6, 6])
        """
        return self._assemble(self._gram_tile)[0]

    def layer(self, l: int) -> Float[Tensor, "RC NC"]:
        r"""The Gram matrix of trained layer ``l`` alone, :math:`K_l = (A_l \otimes
        11^\top) \circ B_l`; l from 0. For several layers, see `layers`.
        """
        return self.layers([l])[0]

    def layers(self, only: Sequence[int] | None = None) -> list[Tensor]:
        r"""The Gram matrices :math:`K_l` of all trained layers, or of ``only`` these,
        in one sweep: about the time of one Gram.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=5)
        >>> torch.allclose(sum(fac.layers()), fac.gram())
        True
        """
        chosen = self._chosen(only)
        return self._assemble(
            lambda r, s, out: self._layer_tiles(r, s, chosen, out), len(chosen)
        )

    def sides(self) -> tuple[list[Tensor], list[Tensor]]:
        r"""The factors :math:`A_l` and :math:`B_l` of all trained layers, in one
        sweep."""
        every = range(self.depth)
        return self._all_A(every), self._all_B(every)

    def A(self, l: int) -> Float[Tensor, "R N"]:
        r"""The forward factor :math:`A_l = H_l H_l^\top`, shape (rows, columns)."""
        return self._all_A(self._chosen([l]))[0]

    def B(self, l: int) -> Float[Tensor, "RC NC"]:
        r"""The backward factor :math:`B_l = D_l D_l^\top`, (rows C, columns C)."""
        return self._all_B(self._chosen([l]))[0]

    def nngp(self) -> Float[Tensor, "R N"]:
        r"""The covariance :math:`\Sigma_L` of an infinitely wide network's outputs at
        the start, the same for each output: its Gaussian process (NNGP), (rows,
        columns).

        Raises
        ------
        TypeError
            For a finite network, whose outputs are what they are.

        Notes
        -----
        Lee et al. (2018). It is the last layer's factor ``A(-1)``.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> K = ngd.kernels.analytic(torch.eye(2, dtype=torch.float64), 2).nngp()
        >>> K.shape, round(float(K[0, 0]), 9)
        (torch.Size([2, 2]), 1.0)
        """
        if self.signals is not None:
            raise TypeError(
                "nngp() is of the ensemble of infinitely wide networks: call it on"
                " kernels.analytic(x, depth, ...), not on empirical factors"
            )
        return self.A(-1)

    def variance(self) -> Float[Tensor, " R"]:
        """The variance of an infinitely wide network's outputs at the rows, at the
        start: for square factors the diagonal of `nngp`."""
        raise TypeError("variance() is of infinitely wide networks, as nngp() is")

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " NC"]:
        """The Gram matrix's diagonal, without the Gram; square factors only.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(2, dtype=torch.float64), depth=2)
        >>> torch.allclose(fac.diagonal(), fac.gram().diagonal()), round(fac.trace(), 9)
        (True, 4.0)
        """

    def trace(self) -> float:
        """The Gram matrix's trace, without the Gram; square factors only."""
        return float(self.diagonal().sum())

    def blocks(
        self, rows: int = 1024, upper: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """The Gram matrix, at most ``rows`` samples at a time.

        Parameters
        ----------
        rows : int
            Samples a block.
        upper : bool
            Of square factors only what lies on and right of the block's diagonal: half
            of the work. The block is then ``K[part, part.start:]``.

        Yields
        ------
        slice, Tensor
            The rows of the Gram, and ``K[part]``, (rows C, columns C).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac, K = ngd.kernels.analytic(ngd.data.gaussian(5, 3), depth=3), {}
        >>> for part, block in fac.blocks(rows=3):
        ...     K[part.start, part.stop] = block.shape
        >>> K
        {(0, 3): torch.Size([3, 5]), (3, 5): torch.Size([2, 5])}
        """
        if not isinstance(rows, Integral) or rows < 1:
            raise ValueError(f"rows={rows} must be a whole number of 1 or more")
        if upper:
            self._must_be_square("blocks(upper=True)")
        for start in range(0, self.rows, int(rows)):
            part = slice(start, min(start + int(rows), self.rows))
            columns = slice(start if upper else 0, self.columns)
            block = self._assemble(self._gram_tile, rows=part, columns=columns)[0]
            yield _span(part, self.c), block

    def some_rows(self, count: int) -> tuple[Float[Tensor, "r NC"], Tensor]:
        """About ``count`` rows of the square Gram, of samples in runs of 16 spread
        evenly over the data; and their numbers (r,).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(ngd.data.gaussian(100, 5), depth=2)
        >>> rows, which = fac.some_rows(32)
        >>> rows.shape, torch.allclose(rows, fac.gram()[which])
        (torch.Size([32, 100]), True)
        """
        self._must_be_square("some_rows()")
        runs = -(-min(count // self.c, self.rows) // RUN)
        parts = [
            slice(i * self.rows // runs, min(i * self.rows // runs + RUN, self.rows))
            for i in range(runs)
        ]
        made = [self._assemble(self._gram_tile, rows=part)[0] for part in parts]
        every = torch.arange(self.rows * self.c, device=self.device)
        which = [every[_span(part, self.c)] for part in parts]
        return torch.cat([every.new_empty(0, len(every)).to(self.dtype), *made]), (
            torch.cat([every[:0], *which])
        )

    def narrow_gram(self, dtype: torch.dtype) -> Float[Tensor, "NC NC"]:
        """The square Gram matrix in another dtype, each entry computed in this one and
        rounded once; no more than a block of rows is held in this dtype.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(ngd.data.gaussian(20, 5), depth=2)
        >>> torch.equal(fac.narrow_gram(torch.float32), fac.gram().float())
        True
        """
        n = self.rows * self.c
        size = n**2 * torch.empty(0, dtype=dtype).element_size()
        check_room(f"the Gram matrix in {dtype}", size, self.device, REMEDY)
        out = torch.empty(n, n, dtype=dtype, device=self.device)
        for part, block in self.blocks(upper=True):
            out[part, part.start :] = block
            out[part.start :, part] = block.T
        return out

    @abstractmethod
    def cross(self, x: "Tensor | Signals") -> "Factors":
        """Factors with rows at other inputs ``x`` (or their signals) and columns at
        these.

        Raises
        ------
        ValueError
            For signals of another network, or stale ones.
        """

    @abstractmethod
    def _gram_tile(self, rows: slice, columns: slice, out: list[Tensor]) -> None:
        """Write K of these samples to out[0], a view (n, C, m, C) of the Gram."""

    @abstractmethod
    def _layer_tiles(self, rows, columns, layers, out: list[Tensor]) -> None:
        """Write K_l of these samples to out, a view (n, C, m, C) for each of layers."""

    @abstractmethod
    def _all_A(self, layers: Sequence[int]) -> list[Tensor]:
        """A_l of these layers, (rows, columns) each."""

    @abstractmethod
    def _all_B(self, layers: Sequence[int]) -> list[Tensor]:
        """B_l of these layers, (rows C, columns C) each."""

    def _times(self, V: Tensor, transposed: bool = False) -> Tensor:
        """K V, or K^T V, for V of as many rows as K has columns (or rows), by
        blocks."""
        if not transposed:
            return torch.cat([block @ V for _, block in self.blocks()])
        return sum(block.T @ V[part] for part, block in self.blocks())

    def _chosen(self, layers: Sequence[int] | None) -> list[int]:
        """These layers (all for None), checked and counted from 0."""
        for l in layers or []:
            if not isinstance(l, Integral) or not -self.depth <= l < self.depth:
                raise ValueError(
                    f"layer {l} does not exist; these factors have {self.depth} trained"
                    " layers, counted from 0"
                )
        every = range(self.depth) if layers is None else layers
        return [l % self.depth for l in every]

    def _must_be_square(self, what: str) -> None:
        """Raise, for `what`, where rows are other samples than columns."""
        if self.train is not self:
            raise ValueError(
                f"{what} needs square factors (training rows); these have other rows"
                " than columns"
            )

    def _assemble(
        self,
        write: Write,
        count: int = 1,
        c: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> list[Tensor]:
        """``count`` matrices of c outputs a sample, filled tile by tile by `write`; all
        of them, or a rectangle of samples."""
        mirror, c = self.train is self and rows is None, c or self.c
        rows = rows or slice(0, self.rows)
        columns = columns or slice(0, self.columns)
        n, m, step = _length(rows), _length(columns), max(1, TILE // self.c)
        like = dict(dtype=self.dtype, device=self.device)
        size = count * n * c * m * c * torch.empty(0, **like).element_size()
        check_room("what was asked of the factors", size, self.device, REMEDY)
        made = [torch.empty(n * c, m * c, **like) for _ in range(count)]
        grids = [out.view(n, c, m, c) for out in made]
        for i in range(0, n, step):
            for j in range(i if mirror else 0, m, step):
                r, s = slice(i, min(i + step, n)), slice(j, min(j + step, m))
                places = [grid[r, :, s, :] for grid in grids]
                write(_shift(r, rows.start), _shift(s, columns.start), places)
                if mirror:
                    for out in made:
                        _mirror(out, _span(r, c), _span(s, c))
        return made


def _mirror(out: Tensor, r: slice, s: slice) -> None:
    """Exactly symmetric: what lies below the diagonal is a copy."""
    tile = out[r, s]
    if r == s:
        tile.copy_(tile.triu() + tile.triu(1).T)
    else:
        out[s, r] = tile.T


def _span(samples: slice, c: int) -> slice:
    """The rows of NC that belong to these samples."""
    return slice(samples.start * c, samples.stop * c)


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _length(part: slice) -> int:
    return part.stop - part.start


class _Empirical(Factors):
    """Factors of a finite network, from its signals."""

    def __init__(
        self, sig: Signals, columns: Signals | None = None, train: Factors | None = None
    ):
        super().__init__(
            sig.n, (columns or sig).n, sig.c, len(sig.H), sig.outputs, train
        )
        self.signals, self._columns = sig, columns or sig

    def __repr__(self) -> str:
        size = f"{self.rows} x {self.columns} samples, C={self.c}"
        return f"<empirical factors: {size}, {self.depth} layers, {self.dtype}>"

    def cross(self, x):
        sig = x if isinstance(x, Signals) else self.signals.at(x)
        self.signals.matches(sig)
        return _Empirical(sig, self.signals, self)

    def diagonal(self):
        self._must_be_square("diagonal()")
        total, sig = 0.0, self.signals
        for H, D in zip(sig.H, sig.D):
            size = D.square().sum(1).view(self.rows, self.c)
            total = total + size * H.square().sum(1, keepdim=True)
        return total.flatten()

    def _gram_tile(self, rows, columns, out):
        """K, (n, C, m, C): the product of the sides of every layer."""
        (K,) = out
        K.zero_()
        for l in range(self.depth):
            A, B = self._tile_A(l, rows, columns), self._tile_B(l, rows, columns)
            K.addcmul_(B, A[:, None, :, None])

    def _layer_tiles(self, rows, columns, layers, out):
        for l, K in zip(layers, out):
            A, B = self._tile_A(l, rows, columns), self._tile_B(l, rows, columns)
            torch.mul(B, A[:, None, :, None], out=K)

    def _all_A(self, layers):
        """A_l, (rows, columns) each: one product, D is not asked for."""

        def write(r, s, out):
            for l, place in zip(layers, out):
                place[:, 0, :, 0] = self._tile_A(l, r, s)

        return self._assemble(write, len(layers), c=1)

    def _all_B(self, layers):
        """B_l, (rows C, columns C) each."""

        def write(r, s, out):
            for l, place in zip(layers, out):
                place.copy_(self._tile_B(l, r, s))

        return self._assemble(write, len(layers))

    def _tile_A(self, l, rows, columns):
        """H H^T of these samples, (n, m)."""
        return self.signals.H[l][rows] @ self._columns.H[l][columns].T

    def _tile_B(self, l, rows, columns):
        """D D^T of these samples, (n, C, m, C)."""
        left, right = self.signals.D[l], self._columns.D[l]
        B = left[_span(rows, self.c)] @ right[_span(columns, self.c)].T
        return B.view(_length(rows), self.c, _length(columns), self.c)

    def _times(self, V, transposed=False):
        """K V by pull and push, a column at a time."""
        rows, columns = self.signals, self._columns
        to, fro = (columns, rows) if transposed else (rows, columns)
        done = [to.jvp(fro.vjp(v)).flatten() for v in V.T]
        return torch.stack(done, 1)


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
    >>> net = ngd.models.TwoLayerReLU(3, 8, seed=0)
    >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
    >>> ngd.kernels.empirical(sig).gram().diagonal().min() > 0
    tensor(True)
    """
    if not isinstance(sig, Signals):
        raise TypeError(
            f"sig must come from ngdcore.signals(net, x), not {type(sig).__name__}"
        )
    return _Empirical(sig)


def operator(kernel: "Factors | Signals") -> "LinearOperator":
    r"""The Gram matrix as a `scipy.sparse.linalg.LinearOperator`, never formed: for
    ``eigsh``, ``minres``, ``svds`` and whatever else asks for products only.

    A finite network's product is :math:`v \mapsto J'(J^\top v)`, one pull and one push;
    an infinite one's goes through `Factors.blocks`. Vectors are NumPy arrays.

    Parameters
    ----------
    kernel : Factors or Signals
        Square, or ``fac.cross(x)``.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> from scipy.sparse.linalg import eigsh
    >>> fac = ngd.kernels.analytic(torch.eye(4, dtype=torch.float64), depth=2)
    >>> top = eigsh(ngd.kernels.operator(fac), k=1)[0][0]
    >>> bool(abs(top - torch.linalg.eigvalsh(fac.gram())[-1]) < 1e-9)
    True
    """
    from scipy.sparse.linalg import LinearOperator

    factors = empirical(kernel) if isinstance(kernel, Signals) else kernel
    if not isinstance(factors, Factors):
        raise TypeError(
            f"kernel must be factors or signals, not {type(kernel).__name__}"
        )

    def product(transposed):
        def apply(V):
            columns = torch.as_tensor(V, dtype=factors.dtype, device=factors.device)
            done = factors._times(columns.reshape(len(V), -1), transposed)
            return done.cpu().numpy().reshape(-1, *V.shape[1:])

        return apply

    dtype = torch.empty(0, dtype=factors.dtype).numpy().dtype
    forward, back = product(False), product(True)
    shape = (factors.rows * factors.c, factors.columns * factors.c)
    return LinearOperator(shape, forward, back, forward, dtype, back)


def culprits(factors: Factors) -> str:
    """Duplicate, antipodal or zero inputs, if there are any: the usual reason of a
    singular Gram.
    """
    if factors.train is not factors:
        return ""
    A = factors.A(0)
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
                f"{len(pairs)} pair(s) of {kind} inputs, the first in rows"
                f" {pairs[0].tolist()}"
            )
    zeros = (A.diagonal() == 0).nonzero()
    if len(zeros):
        found.append(
            f"{len(zeros)} input(s) of zeros, the first in row {int(zeros[0])}"
        )
    return "; there are " + " and ".join(found) if found else ""
