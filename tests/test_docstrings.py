"""Every public name says what it is, by an example that runs."""

import doctest
import importlib
import inspect

import pytest

NAMES = (
    "models",
    "data",
    "signals",
    "factors",
    "infinite",
    "fisher.base",
    "fisher.layerwise",
    "fisher.kfac",
    "fisher.unitwise",
    "fisher.deep_linear",
    "optim.natural_gradient",
    "optim.adaptive",
    "optim.losses",
    "optim.training",
    "dynamics",
    "plotting",
    "chapter",
    "ledger",
)
MODULES = {name: importlib.import_module(f"ngdcore.{name}") for name in NAMES}
# made by other names, not by hand
WITHOUT = {
    "DataError",
    "RankDeficient",
    "Info",
    "Step",
    "Settings",
    "DataSet",
    "Factors",
    "Fisher",
}


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    failed, tried = doctest.testmod(MODULES[name])
    assert tried and not failed


def test_every_public_name_has_an_example():
    public = {
        f"{module}.{name}": getattr(MODULES[module], name)
        for module in NAMES
        for name in MODULES[module].__all__
    }
    made = {
        k: v for k, v in public.items() if (inspect.isclass(v) or inspect.isfunction(v))
    }
    bare = [
        k
        for k, v in made.items()
        if ">>>" not in (inspect.getdoc(v) or "") and k.rsplit(".", 1)[1] not in WITHOUT
    ]
    assert not bare
