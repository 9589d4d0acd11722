"""One statement of what is needed: pyproject.toml says it, the lock and environment.yml
must agree.
"""

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if "==" in line
)
LOCKED = {
    re.sub(r"[-_.]+", "-", name).lower(): version for name, version in LOCK.items()
}
REQUIRED = [
    *PROJECT["dependencies"],
    *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
]
REQUIRED.remove("ngdcore[notebooks]")  # how one extra holds another


@pytest.mark.parametrize("text", REQUIRED)
def test_lock_is_within_the_ranges(text):
    needed = Requirement(text)
    assert needed.specifier.contains(LOCKED[needed.name.lower()])


def test_lock_names_no_build_of_torch():
    assert "+" not in LOCKED["torch"]


def test_environment_yml_states_nothing_twice():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = {re.split(r"[=<> ]", name)[0] for name in conda}
    assert names == {"python", "pip", "pytorch-cpu"}
    python = next(d for d in conda if d.startswith("python=")).split("=")[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    (line,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_makefile_and_readme_agree_on_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme and "make test" in readme


def test_the_address_stands_in_one_place():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"][
        "url"
    ].removeprefix("https://")
    found = subprocess.run(
        ["git", "grep", "-lF", address, "--", ":!*.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["_config.yml"]
