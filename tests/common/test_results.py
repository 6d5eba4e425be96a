"""Saved results: their kind, what is refused, and that reading them takes neither torch nor SAELens."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from builders import edited

import sae_nfm
from sae_nfm.common.results import SavedResult, as_result, kind_by_keys, with_kind, without_kind

PACKAGE = Path(sae_nfm.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Lengths(SavedResult):
    kind: ClassVar[str] = "lengths/2"

    rows: tuple[float, ...]
    unit: str | None = None


LENGTHS = Lengths(rows=(0.1 + 0.2, 3.0))


def saved(folder: Path, **changes: object) -> Path:
    path = folder / "results.json"
    LENGTHS.save(path)
    edited(path, json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_the_kind_comes_first_and_the_numbers_come_back(tmp_path):
    path = saved(tmp_path)
    assert path.read_text().startswith('{"kind": "lengths/2"')
    assert Lengths.load(path) == LENGTHS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lengths/1"}, "'lengths/1', expected 'lengths/2'"),
        ({"kind": "demo/2"}, "'demo/2'"),
        ({"rows": "three"}, "rows"),
        ({"length": 1}, "'length'"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, changes, message):
    path = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"{path}.*`sae-nfm lengths`.*{message}"):
        Lengths.load(path)


def test_content_that_is_no_object_is_refused(tmp_path):
    for text, message in (("[1]", "list"), ("{", "results")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Lengths.load(tmp_path / "results.json")


def test_files_of_0_1_0_are_known_by_their_keys():
    assert as_result(Lengths, {"rows": [1]}) == Lengths(rows=(1.0,))
    assert kind_by_keys({"rows": [1]}, [Lengths]) == kind_by_keys({"rows": [1], "unit": "m"}, [Lengths]) == "lengths/2"
    assert [kind_by_keys(other, [Lengths]) for other in ({}, {"rows": "three"}, {"rows": [], "more": 1})] == [None] * 3


def test_other_forms_say_their_kind_too():
    assert list(with_kind("sweep/1", {"rows": []})) == ["kind", "rows"]
    assert without_kind("sweep/1", with_kind("sweep/1", {"rows": []})) == without_kind("sweep/1", {"rows": []})
    with pytest.raises(ValueError, match=r"'sweep/2'.*'sweep/1'"):
        without_kind("sweep/1", with_kind("sweep/2", {}))


def test_results_are_read_without_torch_or_saelens():
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(PACKAGE.rglob("results.py"))
    ]
    assert len(names) > 9
    code = f"""
import sys, types
from importlib import import_module
package = types.ModuleType("sae_nfm")  # without its __init__, which registers the architectures
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["sae_nfm"] = package
for name in {[*names, "sae_nfm.report.page", "sae_nfm.report.command", "sae_nfm.report.chapters"]}:
    import_module(name)
    heavy = {{"torch", "sae_lens", "transformer_lens"}} & set(sys.modules)
    assert not heavy, (name, heavy)
sys.modules["sae_nfm.report.chapters"].chapters()
heavy = {{"torch", "sae_lens", "transformer_lens"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
