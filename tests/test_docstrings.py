"""Every public name says what it is, by an example that runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ngdcore

MODULES = {
    info.name.removeprefix("ngdcore."): importlib.import_module(info.name)
    for info in pkgutil.walk_packages(ngdcore.__path__, "ngdcore.")
}
# made by other names, not by hand
WITHOUT = {
    "DataError",
    "RankDeficient",
    "NotConverged",
    "Info",
    "Step",
    "Settings",
    "DataSet",
    "Factors",
    "Fisher",
    "Prediction",
}


def public(module):
    """Functions and classes that a module makes, and names as public."""
    return {
        name: made
        for name in getattr(module, "__all__", ())
        if (inspect.isclass(made := getattr(module, name)) or inspect.isfunction(made))
        and made.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, tried = doctest.testmod(MODULES[name])
    assert not failed and (tried or not public(MODULES[name]).keys() - WITHOUT)


def test_every_public_name_has_an_example():
    bare = [
        f"{room}.{name}"
        for room, module in MODULES.items()
        for name, made in public(module).items()
        if ">>>" not in (inspect.getdoc(made) or "") and name not in WITHOUT
    ]
    assert not bare


def test_rooms_say_what_is_public():
    facades = {"data", "fisher", "kernels"}
    assert facades <= MODULES.keys() and not any(map(public, map(MODULES.get, facades)))
    assert all(inspect.getdoc(module) for module in MODULES.values())
