"""What is said about the package agrees with the package."""

import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import txl_dist

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pyproject():
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 reads no TOML")
    import tomllib

    return tomllib.loads((REPO / "pyproject.toml").read_text())


def test_the_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", txl_dist.__version__)
    assert OmegaConf.load(REPO / "CITATION.cff").version == txl_dist.__version__


def test_pyproject_takes_the_version_and_the_licence_from_here(pyproject):
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "txl_dist.__version__"}
    assert pyproject["project"]["license"] == OmegaConf.load(REPO / "CITATION.cff").license
    assert "Apache License" in (REPO / "LICENSE").read_text()


def test_an_installed_package_has_all_modules_and_its_types(pyproject):
    setuptools = pyproject["tool"]["setuptools"]
    folders = {path.parent.relative_to(REPO) for path in (REPO / "txl_dist").rglob("*.py")}
    assert {*setuptools["packages"]} == {".".join(folder.parts) for folder in folders} | {"txl_dist.conf"}
    assert all((REPO / "txl_dist" / name).is_file() for name in setuptools["package-data"]["txl_dist"])
    assert "py.typed" in setuptools["package-data"]["txl_dist"]


def test_only_models_and_conversion_name_an_architecture():
    files = [path.relative_to(REPO / "txl_dist") for path in (REPO / "txl_dist").rglob("*.py")]
    naming = [path for path in files if re.search("transformer_?xl", (REPO / "txl_dist" / path).read_text(), re.I)]
    elsewhere = [path for path in naming if path.parts[0] not in ("models", "conversion")]
    assert not elsewhere
