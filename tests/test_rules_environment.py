"""BN9: what an import of batchnorm would find, and which kernels run; rules that need no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm
from batchnorm.doctor.measuring.installation import environment
from batchnorm.rules import RULES, Evidence
from batchnorm.rules.rule_evidence import Environment

PACKAGE = Path(batchnorm.__file__).parent
CODES = [code for code in RULES if code.startswith("BN9")]
SICK = {"BN901": (Environment(shadow="batchnorm.py"), "batchnorm.py exists"),
        "BN902": (Environment(kernels="reference"), "reference kernels")}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_a_sick_environment_is_named_and_a_healthy_one_is_not(code):
    sick, measured = SICK[code]
    (finding,) = RULES[code].findings(Evidence("net", {}, environment=sick))
    assert (finding.layer, finding.measured) == ("", measured)
    assert RULES[code].findings(Evidence("net", {}, environment=Environment())) == []


def _write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("file", "shadow"),
    [
        ("batchnorm.py", "batchnorm.py"),
        ("batchnorm/__init__.py", "batchnorm"),
        ("batchnorm/notes.txt", ""),  # Python takes a folder without __init__.py only if there is no package
        ("src/batchnorm.py", ""),
        ("batch_norm.py", ""),
    ],
)
def test_what_hides_the_package_in_the_current_folder_is_found(file, shadow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(PACKAGE.parent)])
    assert environment().shadow == ""
    _write(tmp_path / file)
    assert environment().shadow == shadow


def test_only_folders_that_python_searches_before_the_package_count(tmp_path, monkeypatch):
    _write(tmp_path / "lib" / "batchnorm.py")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "lib"), str(PACKAGE.parent)])
    assert environment().shadow == os.path.join("..", "lib", "batchnorm.py")  # noqa: PTH118
    monkeypatch.setattr(sys, "path", [str(PACKAGE.parent), str(tmp_path / "lib")])
    assert environment().shadow == ""


def test_the_package_s_own_folder_hides_nothing(monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    assert environment().shadow == ""


def test_a_file_that_is_found_really_hides_the_package(tmp_path):
    (tmp_path / "batchnorm.py").write_text("print('hidden')")
    (tmp_path / "train.py").write_text("import batchnorm")
    # -S: an editable install comes before any folder
    command, path = [sys.executable, "-S", tmp_path / "train.py"], {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    assert done.stdout == "hidden\n"


def test_the_reference_kernels_are_named_when_they_are_forced_or_alone(monkeypatch):
    monkeypatch.setenv("BATCHNORM_KERNELS", "reference")
    assert environment().kernels == "reference"
    monkeypatch.delenv("BATCHNORM_KERNELS")
    monkeypatch.setattr("batchnorm.doctor.measuring.installation.find_spec", lambda name: None)
    assert environment().kernels == "reference"
    monkeypatch.setattr("batchnorm.doctor.measuring.installation.find_spec", lambda name: object())
    assert environment().kernels == "native"


def test_rules_and_environment_need_neither_torch_nor_numpy():
    code = (
        "import batchnorm.rules, batchnorm.doctor.measuring.installation as e, sys\n"
        "e.environment(); print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
