"""Releases behind SAELens's doors: what is loaded is what was released, to the bit, or an error says which file is not."""

import hashlib
import json
import re
import sys
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from builders import inference_sae, random_activations, training_config
from fresh_process import as_the_note_says, directory_of_releases, seen
from huggingface_hub import constants
from sae_lens import SAE, TopKSAEConfig
from sae_lens.loading import pretrained_saes_directory
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from train_sae import SAES_DIR, package

from sae_nfm import JointNFMSAE, demo
from sae_nfm.data.datasets import held_out_tokens
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.hub.release import (
    PACKAGED,
    FolderSource,
    HubSource,
    PackageSource,
    Release,
    ReleasedSAE,
    read_releases,
    register_packaged_releases,
    register_release,
    register_releases,
    release_entry,
    write_releases,
)

DEMO, ID = "sae-nfm-demo", "blocks.2.hook_resid_post"
FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")


def directory() -> dict[str, PretrainedSAELookup]:
    return pretrained_saes_directory.get_pretrained_saes_directory()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of one saved joint_nfm SAE, `tmp_path/saes/mine`."""
    folder = tmp_path / "saes" / "mine"
    inference_sae(training_config("joint_nfm")).save_model(folder)
    save_file({"sparsity": torch.linspace(-6, 0, 32)}, folder / "sparsity.safetensors")
    return folder


@pytest.fixture
def registered(saved, request) -> str:
    """The release of that folder, under the test's own name."""
    entry = release_entry(saved, sae_id="mine", variance_explained=0.75, neuronpedia="tiny/0-mine")
    register_release(
        request.node.name, model="tiny", source=FolderSource(folder=saved.parent), saes=[entry], replace=True
    )
    return request.node.name


def same_tensors(sae: SAE, folder: Path) -> bool:
    weights = load_file(folder / "sae_weights.safetensors")
    return weights.keys() == sae.state_dict().keys() and all(
        torch.equal(weights[name].float(), tensor) for name, tensor in sae.state_dict().items()
    )


def test_packaged_release_through_every_door_without_a_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = SAES_DIR / ID
    sae, config, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(DEMO, ID)
    for loaded in (sae, SAE.from_pretrained(DEMO, ID, force_download=True), JointNFMSAE.from_pretrained(DEMO, ID)):
        assert type(loaded) is JointNFMSAE
        assert same_tensors(loaded, folder)
    assert torch.equal(sparsity, load_file(folder / "sparsity.safetensors")["sparsity"])
    on_disk = json.loads((folder / "cfg.json").read_text())
    for read in (config, load_sae_config_from_huggingface(DEMO, ID)):
        assert on_disk.items() <= read.items()
    assert SAE.from_pretrained(DEMO, ID, dtype="float64").W_dec.dtype == torch.float64
    assert same_tensors(SAE.load_from_disk(folder), folder)


def test_packaged_release_says_what_it_is():
    lookup = directory()[DEMO]
    assert (lookup.model, lookup.saes_map, lookup.neuronpedia_id) == (DEMO, {ID: ID}, {ID: None})
    sae = SAE.from_pretrained(DEMO, ID)
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size) == (DEMO, ID, 256)
    assert metadata.prepend_bos
    assert metadata.exclude_special_tokens
    assert lookup.expected_l0[ID] == pytest.approx(sae.cfg.k, abs=0.5)  # TopK: k, but for pre-activations below 0


def test_packaged_sae_explains_what_its_release_says():
    model = demo.load_model()
    tokens = held_out_tokens(model, demo.load_tokens("validation"), 256, 2_048)
    fidelity = evaluate(model, tokens, [Arm(name="sae", sae=SAE.from_pretrained(DEMO, ID).eval())])["sae"]
    # 8 of 400 rows: the FVU of single rows varies by about a tenth of its size
    assert 1 - fidelity.fvu == pytest.approx(directory()[DEMO].expected_var_explained[ID], abs=0.02)


def test_packaged_files_are_small_and_name_no_folders():
    files = [path for path in SAES_DIR.rglob("*") if path.is_file()]
    assert {path.name for path in (SAES_DIR / ID).iterdir()} == {*FILES, "runner_cfg.json"}
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for path in [PACKAGED, *(path for path in files if path.suffix in (".json", ".md"))]:
        assert not re.search(r"(?<![\w:/.])[/~]\w+/|\w:\\|/home/|/tmp/", path.read_text()), path


def test_importing_reads_nothing_and_early_importers_see_the_release(once):
    assert seen(once, as_the_note_says)["releases read by then"] == 0
    found = seen(once, directory_of_releases)
    assert found["loadable"] == [ID]
    for releases in (found["early"], found["late"]):
        assert releases.count(DEMO) == 1
        assert "gpt2-small-res-jb" in releases


def test_registering_twice_is_harmless(registered, saved):
    register_packaged_releases()
    register_packaged_releases()
    lookup = directory()[registered]
    assert directory()[registered] is lookup  # what is entered stays as it is, whatever its owner changes in it
    entry = release_entry(saved, sae_id="mine", variance_explained=0.75, neuronpedia="tiny/0-mine")
    register_release(registered, model="tiny", source=FolderSource(folder=saved.parent), saes=[entry])
    assert directory()[registered] == lookup
    assert list(directory()).count(DEMO) == 1


def test_folder_release_loads_to_the_bit(registered, saved):
    sae, config, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(registered, "mine")
    assert same_tensors(sae, saved)
    assert torch.equal(sae(random_activations()), SAE.load_from_disk(saved)(random_activations()))
    assert torch.equal(sparsity, torch.linspace(-6, 0, 32))
    assert sae.cfg.metadata.neuronpedia_id == "tiny/0-mine"  # SAELens itself drops it for configs of its present format
    assert config["metadata"]["neuronpedia_id"] == "tiny/0-mine"
    assert directory()[registered].expected_var_explained == {"mine": 0.75}


def test_other_architectures_can_be_released(tmp_path):
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.0.hook_resid_post")
    sae = SAE.from_dict(TopKSAEConfig(d_in=16, d_sae=32, k=4, metadata=metadata).to_dict())
    torch.nn.init.ones_(sae.W_enc)
    sae.save_model(tmp_path / "topk")
    entry = release_entry(tmp_path / "topk")
    assert entry.id == "blocks.0.hook_resid_post"
    register_release("a-topk-release", model="tiny", source=FolderSource(folder=tmp_path), saes=[entry])
    loaded, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("a-topk-release", entry.id)
    assert same_tensors(loaded, tmp_path / "topk")
    assert sparsity is None  # it has none


@pytest.mark.parametrize("name", FILES)
def test_altered_file_is_named_with_both_digests(registered, saved, name):
    path = saved / name
    released = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-2] + b" " + path.read_bytes()[-1:])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    told = (
        name,
        "'mine'",
        f"'{registered}'",
        str(saved.parent),
        found,
        released,
        "force_download=True",
        "release_entry",
    )
    with pytest.raises(ValueError, match=".*".join(map(re.escape, told))):
        SAE.from_pretrained(registered, "mine")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(registered, saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(saved / name))):
        SAE.from_pretrained(registered, "mine")


def test_release_loads_strictly(registered, saved):
    """Also where the digests are right: they say what was released, not that it is sound."""
    path = saved / "cfg.json"
    sound = json.loads(path.read_text())
    for config, message in (
        (sound | {"nfm_topk": 3}, r"unknown.*'nfm_topk'.*\bjoint_nfm\b"),
        ({key: value for key, value in sound.items() if key != "square_scale"}, "lacks.*'square_scale'"),
        (sound | {"use_square_path": False}, r"'U'.*unknown"),
    ):
        path.write_text(json.dumps(config))
        digests = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in FILES}
        entry = ReleasedSAE(id="mine", path="mine", sha256=digests)
        source = FolderSource(folder=saved.parent)
        register_release(registered, model="tiny", source=source, saes=[entry], replace=True)
        with pytest.raises(ValueError, match=message):
            SAE.from_pretrained(registered, "mine")


def test_relative_folder_outlasts_a_change_of_the_working_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = release_entry("saes/mine")
    register_release("a-relative-release", model="tiny", source=FolderSource(folder="saes"), saes=[entry])
    monkeypatch.chdir("/")
    assert same_tensors(SAE.from_pretrained("a-relative-release", entry.id), saved)


def test_unknown_names_are_answered_by_saelens(registered):
    with pytest.raises(ValueError, match=rf"^ID other not found in release {registered}. Valid IDs are \['mine'\]\.$"):
        SAE.from_pretrained(registered, "other")
    with pytest.raises(ValueError, match=r"^Release sae-nfm-dmo not found in pretrained SAEs directory"):
        SAE.from_pretrained("sae-nfm-dmo", ID)


def test_names_that_are_taken(registered, saved, monkeypatch):
    entry, source = release_entry(saved), FolderSource(folder=saved.parent)
    with pytest.raises(ValueError, match=r"'gpt2-small-res-jb'.*SAELens"):
        register_release("gpt2-small-res-jb", model="tiny", source=source, saes=[entry])
    for name in (registered, DEMO):
        with pytest.raises(ValueError, match=rf"'{re.escape(name)}'.*\balready\b"):
            register_release(name, model="tiny", source=source, saes=[entry])
    theirs = PretrainedSAELookup(DEMO, "them/saes", "gpt2", None, {}, {}, {}, {}, {}, None)
    monkeypatch.setitem(directory(), DEMO, theirs)
    with pytest.raises(ValueError, match=r"'sae-nfm-demo'.*SAELens.*'them/saes'"):
        SAE.from_pretrained(DEMO, ID)


def test_entry_has_the_digests_of_the_files(saved):
    entry = release_entry(saved)
    assert (entry.id, entry.path) == ("blocks.0.hook_resid_post", "mine")
    assert release_entry(saved, path="a/b").path == "a/b"
    assert dict(entry.sha256) == {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in FILES}
    (saved / "sae_weights.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.*damaged"):
        release_entry(saved)
    with pytest.raises(FileNotFoundError, match=re.escape(str(saved / "none"))):
        release_entry(saved / "none")


def test_entries_that_cannot_be_verified_are_refused(saved):
    entry = release_entry(saved)
    digests = dict(entry.sha256)
    for wrong in ({}, {"cfg.json": digests["cfg.json"]}, digests | {"trainer_state.pt": "0"}):
        with pytest.raises(ValueError, match=r"\bsha256\b.*'cfg\.json', 'sae_weights\.safetensors'"):
            ReleasedSAE(id="mine", path="mine", sha256=wrong)
    for path in ("../mine", "/mine", "a/../../b", "", "a\\b"):
        with pytest.raises(ValueError, match=rf"\bpath\b.*{re.escape(repr(path))}"):
            ReleasedSAE(id="mine", path=path, sha256=digests)
    twins = (entry, ReleasedSAE(id="other", path=entry.path, sha256=digests))
    with pytest.raises(ValueError, match=r"'twins'.*\bpath\b.*\bmine\b"):
        Release(name="twins", model="tiny", source=FolderSource(folder=saved), saes=twins)


def test_yaml_round_trip(saved, tmp_path):
    entry = release_entry(saved, neuronpedia="tiny/0")
    releases = (
        Release(name="hub", model="tiny", source=HubSource(repo_id="user/saes", revision="v1"), saes=(entry,)),
        Release(name="disk", model="tiny", source=FolderSource(folder=tmp_path / "saes"), saes=(entry,)),
        Release(
            name="wheel", model="tiny", source=PackageSource(package="sae_nfm", folder="demo/data/sae"), saes=(entry,)
        ),
    )
    path = write_releases(releases, tmp_path / "releases.yaml")
    assert read_releases(path) == releases
    content = yaml.safe_load(path.read_text())
    content["disk"]["folder"] = "saes"  # relative to the file
    content["disk"]["saes"][0]["path"] = "mine"
    path.write_text(yaml.safe_dump({"a-release-from-yaml": content["disk"]}))
    register_releases(path)
    assert same_tensors(SAE.from_pretrained("a-release-from-yaml", entry.id), saved)


BOMB = reduce(
    lambda inner, names: f"&{names[1]} [{inner}{f', *{names[0]}' * 8}]",
    pairwise("abcdefghi"),
    "&a [x, x, x, x, x, x, x, x, x]",
)
"""Aliases of aliases: written out, it has 9^9 words."""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("id: mine", f"id: {BOMB}", r"id of a release is a list"),
        ("id: mine", 'id: "a\\nb"', r"id of a release is 'a\\nb'"),
        ("model: tiny", 'model: "a\\x1b[2J"', r"model of a release is 'a\\x1b\[2J'"),
        ("model: tiny", f"model: {BOMB}", r"model of a release is a list"),
        ("mine-release:", '"a\\u202E":', r"release of a release is 'a\\u202e'"),
        ("l0: null", "l0: .nan", r"l0 nan"),
        ("l0: null", f"l0: {BOMB}", r"l0 a list"),
        ("cfg.json: ", "cfg.json: 0", r"64 hexadecimal digits"),
        ("cfg.json: ", f"cfg.json: {BOMB} #", r"64 hexadecimal digits"),
        ("package: sae_nfm\n  folder: demo", "repo_id: ../../x #", r"repo_id is '\.\./\.\./x'"),
        ("folder: demo", "folder: ../../..", r"path '\.\./\.\./\.\.'"),
    ],
)
def test_a_release_of_somebody_else_is_text_and_numbers(saved, tmp_path, old, new, told):
    entry = release_entry(saved, sae_id="mine")
    source = PackageSource(package="sae_nfm", folder="demo")
    path = write_releases(
        [Release(name="mine-release", model="tiny", source=source, saes=(entry,))], tmp_path / "releases.yaml"
    )
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"releases\.yaml' is not a list of releases \(.*{told}") as caught:
        read_releases(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_release_imports_nothing(saved, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    entry = release_entry(saved, sae_id="mine")
    for name in ("hostile", "sae_nfm.hostile", "this"):
        source = PackageSource(package=name, folder="saes")
        register_release("an-importing-release", model="tiny", source=source, saes=[entry], replace=True)
        with pytest.raises(ValueError, match=rf"'{name}'.*not imported.*`import {name}`"):
            SAE.from_pretrained("an-importing-release", "mine")
        assert name not in sys.modules


@pytest.mark.parametrize(
    "text",
    ["a: [", "just text", "r: {model: m, saes: []}", "r: {model: m, folder: f, saes: [{id: x}]}", "r: {folder: f, saes: []}",
     "r: {model: m, folder: f, sea: [], saes: []}"],
)  # fmt: skip
def test_yaml_that_is_no_release(tmp_path, text):
    (tmp_path / "releases.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)releases\.yaml.*list of releases"):
        read_releases(tmp_path / "releases.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_releases(tmp_path / "none.yaml")


def test_package_without_its_data(saved):
    source = PackageSource(package="sae_nfm", folder="no/such/folder")
    register_release("a-package-release", model="tiny", source=source, saes=[release_entry(saved, sae_id="mine")])
    with pytest.raises(FileNotFoundError, match=r"no/such/folder/mine/cfg\.json.*\binstall sae_nfm\b"):
        SAE.from_pretrained("a-package-release", "mine")


def test_packaging_rounds_and_leaves_folders_out(saved, tmp_path):
    run = tmp_path / "run"
    (run / "joint_nfm").mkdir(parents=True)
    for name in FILES:
        (run / "joint_nfm" / name).write_bytes((saved / name).read_bytes())
    (run / "runner_cfg.json").write_text(json.dumps({"lr": 0.5, "output_path": "/home/me/x", "checkpoint_path": "/y"}))
    package(run, tmp_path / "packaged")
    assert {path.name for path in (tmp_path / "packaged").iterdir()} == {*FILES, "runner_cfg.json"}
    runner = json.loads((tmp_path / "packaged" / "runner_cfg.json").read_text())
    assert runner == {"lr": 0.5, "output_path": None, "checkpoint_path": None}
    packaged, original = SAE.load_from_disk(tmp_path / "packaged"), SAE.load_from_disk(saved)
    assert packaged.W_enc.dtype == torch.float32
    assert all(torch.equal(packaged.state_dict()[k], v.half().float()) for k, v in original.state_dict().items())

    weights = load_file(saved / "sae_weights.safetensors")
    save_file(weights | {"b_lin": torch.full((16,), 1e5)}, run / "joint_nfm" / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="half precision"):
        package(run, tmp_path / "never")
    assert not (tmp_path / "never").exists()
