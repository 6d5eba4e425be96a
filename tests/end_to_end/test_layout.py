"""Tests mirror the package, and modules of 0.1.0 that its documentation named are importable for one version."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from fresh_process import an_old_name, seen

import sae_nfm
from sae_nfm._old_names import MOVED

TESTS, PACKAGE = Path(__file__).parents[1], Path(sae_nfm.__file__).parent
OF_NO_PACKAGE = {"support", "saelens", "end_to_end", "browser", "golden"}
DOCUMENTED = dict(
    line.partition(": ")[::2] for line in (TESTS / "support" / "documented_names_0_1_0.txt").read_text().splitlines()
)
"""Modules and their names in README, docs and tutorials of 0.1.0."""


def test_every_folder_of_tests_names_a_package():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - OF_NO_PACKAGE <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize("old", DOCUMENTED)
def test_documented_names_of_0_1_0(old, recwarn):
    sys.modules.pop(f"sae_nfm.{old}" if old in MOVED else "", None)
    module = import_module(f"sae_nfm.{old}")
    missing = [name for name in DOCUMENTED[old].split() if not hasattr(module, name)]
    assert missing == []
    warned = [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert len(warned) == (old in MOVED)
    assert all(f"is sae_nfm.{MOVED[old].split()[0]} now" in text for text in warned)


def test_the_warning_is_the_user_s_line(once):
    told = "sae_nfm.baselines is sae_nfm.comparison.arms now; the old name goes with 0.3"
    assert seen(once, an_old_name) == [["user.py", 2, told]]
