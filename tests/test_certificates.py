"""Each certificate runs alone, in exact arithmetic, and fails where it should."""

import ast
import importlib.util
import subprocess
import sys
from fractions import Fraction

import pytest
from conftest import ROOT

from ngdcore.ledger import is_finding, registry

FOLDER = ROOT / "book" / "certificates"
FILES = sorted(FOLDER.glob("*.py"))
ALLOWED = {"fractions", "math", "itertools", "functools", "sympy", "flint"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_runs_alone(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_imports_nothing_of_ours_and_uses_no_floats(path):
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
    assert names <= ALLOWED


def test_findings_and_files_name_each_other():
    named = {c["certificate"]: c for c in registry().values() if is_finding(c)}
    named.pop(None, None)
    assert set(named) == {path.name for path in FILES}
    for name, claim in named.items():
        assert claim["sure"] == "certified"
        assert (FOLDER / name).read_text().startswith(f'"""{claim["id"]}. ')


def test_an_error_gone_over_has_a_proof_or_a_certificate():
    errors = [c for c in registry().values() if c.get("nature") == "error"]
    assert not [c["id"] for c in errors if c["sure"] == "measured"]
    assert not [c["id"] for c in errors if c["rejudged"] and not c["certificate"]]


@pytest.mark.parametrize(
    ("bound", "first"),
    [(Fraction(3, 4), 681), (Fraction(1, 2), 680), (Fraction(1, 2), 682)],
)
def test_the_trace_certificate_can_fail(bound, first):
    with pytest.raises(AssertionError):
        load("theorem_5_trace").certify(bound, first)


def test_the_diagonal_is_that_of_the_kernel():
    trace = load("theorem_5_trace")
    assert trace.diagonal() == Fraction(1, 2)
    assert trace.diagonal(divisor=1) != Fraction(1, 2)


def test_the_forster_certificate_can_fail():
    with pytest.raises(AssertionError):
        load("forster_few_rows").certify(missing=0, largest=3)


def test_the_minimiser_certificate_can_fail():
    with pytest.raises(AssertionError):
        load("theorem_2_minimiser").certify(shift=Fraction(0))


@pytest.mark.parametrize("beside", [Fraction(1, 2), Fraction(2)])
def test_the_inertia_certificate_can_fail(beside):
    inertia = load("tridiagonal_inertia")
    broken = {L: inertia.tridiagonal(L, beside) for L in range(1, 9)}
    with pytest.raises(AssertionError):
        inertia.certify(broken)


@pytest.mark.parametrize(("middle", "negative"), [(3, 0), (-3, 6), (1, 2)])
def test_both_ways_count_signs(middle, negative):
    inertia = load("tridiagonal_inertia")
    matrix = inertia.tridiagonal(6)
    for k in range(6):
        matrix[k][k] = Fraction(middle)
    assert inertia.sturm(matrix) == inertia.inertia(matrix) == (negative, 0)


def test_the_narrow_certificate_can_fail():
    narrow = load("narrow_networks")

    def off(widths):
        return {k + (k == 1): times for k, times in narrow.counted(widths).items()}

    def of_the_map(*a):
        return narrow.two_layers(*a, of_the_map=True)

    wide = [*narrow.WIDE, (3, 2, 3)]
    for change in ({"count": off}, {"repair": of_the_map}, {"wide": wide}):
        with pytest.raises(AssertionError):
            narrow.certify(**change)


def test_the_certificate_of_the_origin_can_fail():
    origin = load("into_the_origin")
    same_side, third = (Fraction(-1), Fraction(1, 2)), Fraction(1, 3)

    def unlike(w1, w2):
        return tuple(
            (-1 - w1 * w2) / w * share for w, share in ((w2, third), (w1, 1 - third))
        )

    for change in ({"start": same_side}, {"target": Fraction(1)}, {"rule": unlike}):
        with pytest.raises(AssertionError):
            origin.certify(**change)


def test_the_certificate_past_the_origin_can_fail():
    past = load("past_the_origin")

    def gradient(w1, w2):
        return (w2 * (-1 - w1 * w2), w1 * (-1 - w1 * w2))

    for rules in ((past.ten, past.ten), (past.ten, gradient)):
        with pytest.raises(AssertionError):
            past.certify(*rules)


def test_the_flat_certificate_can_fail():
    flat = load("flat_directions")

    def both_grow(layers):
        return [abs(x) for x in flat.flat(layers)]

    def too_many(widths):
        return widths[0] * widths[-1]

    for change in (
        {"direction": both_grow},
        {"count": too_many},
        {"networks": [(2, 2)]},
    ):
        with pytest.raises((AssertionError, IndexError)):
            flat.certify(**change)


@pytest.mark.parametrize(("reach", "w"), [(0, (1, -2, 1)), (1, (1, -1, 0))])
def test_the_saddle_certificate_can_fail(reach, w):
    saddle = load("tridiagonal_saddle")
    with pytest.raises(AssertionError):
        saddle.certify(3, saddle.coupled(3, reach), w)


def test_on_other_metrics_the_same_direction_is_no_descent():
    saddle = load("tridiagonal_saddle")
    Js, v = saddle.jacobians(3), [Fraction(1), Fraction(-2), Fraction(1)]
    moved = saddle.change(Js, v, saddle.RESIDUAL)
    signs = [saddle.form(Js, saddle.coupled(3, reach), moved) for reach in (0, 1, 2)]
    assert signs[0] > 0 > signs[1] and signs[2] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"start": Fraction(1, 10**3)},
        {"reach": Fraction(1, 100), "start": Fraction(1, 10**6)},
        {"shared": Fraction(0), "own": Fraction(1)},
        {"shared": Fraction(1, 4)},
    ],
)
def test_the_small_start_certificate_can_fail(change):
    with pytest.raises(AssertionError):
        load("lemma_10_small_start").certify(**change)
