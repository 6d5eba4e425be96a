"""Push and pull through the real hub client, against a hub on a loopback socket: what arrives is what was sent, or an error."""

import ast
import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from builders import inference_sae, random_activations, training_config
from fresh_process import seen, through_the_hub
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from invented_comparison import compared_once
from sae_lens import SAE, TopKSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from sae_nfm import JointNFMSAE
from sae_nfm.common import FileError, seal
from sae_nfm.common.manifest import ManifestConfig, accept
from sae_nfm.hub import release as releases
from sae_nfm.hub.push_pull import PullConfig, PushConfig, Pushed, pull, push
from sae_nfm.hub.release import HubSource, register_release, register_releases, sha256

REPO, ID = "user/saes", "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def releases_end_with_their_test():
    """A release registered under a repository's name would stand before the repository of a later test."""
    before, directory = dict(releases._releases), get_pretrained_saes_directory()
    names = set(directory)
    yield
    releases._releases.clear()
    releases._releases.update(before)
    for name in set(directory) - names:
        del directory[name]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client in this process talks to, with an empty cache and a token."""
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # the client reads HF_ENDPOINT once, when imported
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet has servers of its own
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield server
    close_session()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved joint_nfm SAE with its runner_cfg.json."""
    inference_sae(training_config("joint_nfm")).save_model(tmp_path / "saved")
    (tmp_path / "saved" / "runner_cfg.json").write_text(json.dumps({"training_tokens": 12_345, "lr": 0.002}))
    return tmp_path / "saved"


@pytest.fixture
def demo_output(tmp_path) -> Path:
    """What `sae-nfm demo` leaves: two SAEs, their table, the report."""
    folder = tmp_path / "run"
    inference_sae(training_config("joint_nfm")).save_model(folder / "saes" / "joint")
    metadata = SAEMetadata(model_name="tiny", hook_name=ID)
    topk = SAE.from_dict(TopKSAEConfig(d_in=16, d_sae=32, k=4, metadata=metadata).to_dict())
    topk.save_model(folder / "saes" / "topk")
    (folder / "saes" / "runner_cfg.json").write_text("{}")
    compared_once().save(folder / "results.json")
    (folder / "report.html").write_text("<p>report</p>")
    return folder


def same_weights(sae: SAE, folder: Path) -> bool:
    weights = load_file(folder / "sae_weights.safetensors")
    return weights.keys() == sae.state_dict().keys() and all(
        torch.equal(weights[k], v) for k, v in sae.state_dict().items()
    )


def test_what_is_pushed_loads_from_the_hub_bit_by_bit(hub, saved):
    pushed = push(PushConfig(source=saved, repo_id=REPO))
    assert set(hub.repositories[REPO].commits[hub.repositories[REPO].head]) == {
        f"{ID}/cfg.json", f"{ID}/sae_weights.safetensors", f"{ID}/runner_cfg.json", "README.md", "pretrained.yaml",
    }  # fmt: skip
    assert len(hub.repositories[REPO].commits) == 2  # the empty one and one of ours
    for door in (SAE, JointNFMSAE):
        sae = door.from_pretrained(REPO, ID)
        assert type(sae) is JointNFMSAE
        assert same_weights(sae, saved)
    assert f'SAE.from_pretrained("{REPO}", "{ID}")' in pushed.words()


def test_what_is_pulled_loads_from_disk_bit_by_bit(hub, saved, tmp_path):
    push(PushConfig(source=saved, repo_id=REPO, sae_id="mine", license="mit"))
    pulled = pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))
    files = {str(path.relative_to(pulled.folder)) for path in pulled.folder.rglob("*") if path.is_file()}
    names = ("cfg.json", "sae_weights.safetensors", "runner_cfg.json")
    assert files == {
        "README.md",
        "pretrained.yaml",
        "digests.json",
        "mine/digests.json",
        *(f"mine/{name}" for name in names),
    }
    assert all((pulled.folder / "mine" / name).read_bytes() == (saved / name).read_bytes() for name in names)
    sae = SAE.load_from_disk(pulled.folder / "mine")
    assert same_weights(sae, saved)
    x = random_activations()
    assert torch.equal(sae(x), SAE.load_from_disk(saved)(x))
    assert f'SAE.load_from_disk("{tmp_path / "pulled" / "mine"}")' in pulled.words()
    assert "\nlicense: mit\n" in (pulled.folder / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_demo_output_goes_with_its_table_and_report(hub, demo_output, tmp_path):
    push(PushConfig(source=demo_output, repo_id=REPO))
    folder = pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled")).folder
    assert {path.name for path in folder.iterdir()} == {
        "joint", "topk", "README.md", "pretrained.yaml", "results.json", "report.html", "digests.json",
    }  # fmt: skip
    assert (folder / "report.html").read_text() == "<p>report</p>"
    listed = yaml.safe_load((folder / "pretrained.yaml").read_text())[REPO]["saes"]
    assert [(sae["id"], sae["variance_explained"]) for sae in listed] == [
        ("joint", pytest.approx(0.9)),
        ("topk", pytest.approx(0.92)),
    ]  # 1 - FVU
    card = (folder / "README.md").read_text()
    assert "| joint: direct only | 150 | 32.0 | 0.4000 |" in card
    assert "against topk (1.50 x its parameters): FVU +25.0%, KL -20.0% (mixed)" in card
    assert SAE.load_from_disk(folder / "topk").cfg.architecture() == "topk"
    only = pull(PullConfig(repo_id=REPO, output=tmp_path / "only", saes=("topk",))).folder
    assert not (only / "joint").exists()
    assert (only / "topk" / "cfg.json").is_file()


def test_files_of_two_runs_are_not_published_together(hub, demo_output):
    """As where one SAE is another's: told apart by the digests of the run, and by the weights that its results name."""
    other = inference_sae(training_config("joint_nfm"), seed=5)
    seal(demo_output / "saes" / "joint")
    seal(demo_output)
    other.save_model(demo_output / "saes" / "joint")  # whole in itself
    with pytest.raises(ValueError, match=r"does not belong together: saes/joint: it is not the one that the run wrote"):
        push(PushConfig(source=demo_output, repo_id=REPO))
    weights = {
        f"saes/{name}": sha256(demo_output / "saes" / name / "sae_weights.safetensors") for name in ("joint", "topk")
    }
    result = compared_once()
    replace(result, provenance=result.provenance | {"saes": weights | {"saes/joint": "0"}}).save(
        demo_output / "results.json"
    )
    accept(ManifestConfig(path=str(demo_output)))
    with pytest.raises(ValueError, match=r"results\.json is not of the SAE in saes/joint"):
        push(PushConfig(source=demo_output, repo_id=REPO))
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]
    replace(result, provenance=result.provenance | {"saes": weights}).save(demo_output / "results.json")
    push(PushConfig(source=demo_output, repo_id=REPO))


def test_a_second_push_keeps_what_is_there(hub, demo_output, saved):
    push(PushConfig(source=demo_output, repo_id=REPO, saes=("joint",)))
    push(PushConfig(source=saved, repo_id=REPO, sae_id="another"))
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    assert [sae["id"] for sae in yaml.safe_load(files["pretrained.yaml"])[REPO]["saes"]] == ["another", "joint"]
    card = files["README.md"].decode()
    assert "| `another` |" in card
    assert "| `joint` |" in card
    assert "| joint: direct only | 150 |" in card  # the earlier table


def test_nothing_is_overwritten_unasked(hub, saved):
    config = PushConfig(source=saved, repo_id=REPO)
    push(config)
    with pytest.raises(ValueError, match=rf"'{REPO}'.*{re.escape(ID)}/cfg\.json.*\boverwrite\b"):
        push(config)
    inference_sae(training_config("joint_nfm"), seed=5).save_model(saved)
    push(replace(config, overwrite=True))
    assert same_weights(SAE.from_pretrained(REPO, ID), saved)


def test_a_push_beside_another_one_is_refused(hub, saved):
    """Else the list of SAEs would be written without those of the other push."""
    push(PushConfig(source=saved, repo_id=REPO))
    hub.meanwhile = {"their-sae/cfg.json": b"{}"}
    with pytest.raises(ValueError, match=r"\b412\b.*somebody else"):
        push(PushConfig(source=saved, repo_id=REPO, sae_id="mine"))
    assert not [path for path in hub.repositories[REPO].commits[hub.repositories[REPO].head] if path.startswith("mine")]


def test_a_readme_of_somebody_else_is_not_overwritten_unasked(hub, saved):
    push(PushConfig(source=saved, repo_id=REPO))
    hub.repositories[REPO].commits[hub.repositories[REPO].head] = {"README.md": b"theirs"}
    with pytest.raises(ValueError, match=rf"'{REPO}'.*README\.md"):
        push(PushConfig(source=saved, repo_id=REPO))


def test_altered_file_is_refused_by_its_sha256(hub, saved, tmp_path):
    push(PushConfig(source=saved, repo_id=REPO))
    path = f"{ID}/sae_weights.safetensors"
    original = (saved / "sae_weights.safetensors").read_bytes()
    hub.altered[path] = original[:-1] + bytes([original[-1] ^ 1])  # one bit of one weight: it loads, and is another SAE
    sent, arrived = (hashlib.sha256(content).hexdigest() for content in (original, hub.altered[path]))
    with pytest.raises(ValueError, match=rf"{re.escape(path)}.*'{REPO}'.*{arrived}.*{sent}"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))
    assert not (tmp_path / "pulled").exists()

    hub.altered.clear()
    with pytest.raises(ValueError, match=arrived):  # the cache has the damaged file
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))
    pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled", force_download=True))


def test_registered_hub_release_is_verified(hub, saved, tmp_path):
    repo = "user/registered"  # from here on a release of this process
    push(PushConfig(source=saved, repo_id=repo))
    listed = pull(PullConfig(repo_id=repo, output=tmp_path / "pulled")).folder / "pretrained.yaml"
    (release,) = register_releases(listed, replace=True)
    assert (release.name, release.source) == (repo, HubSource(repo_id=repo))
    assert same_weights(SAE.from_pretrained(repo, ID), saved)

    inference_sae(training_config("joint_nfm"), seed=5).save_model(saved)
    push(PushConfig(source=saved, repo_id=repo, overwrite=True))  # main moves on: no longer what was registered
    with pytest.raises(ValueError, match=rf"'{repo}'.*\bsha256\b"):
        SAE.from_pretrained(repo, ID)
    before = HubSource(repo_id=repo, revision=list(hub.repositories[repo].commits)[1])
    register_release(repo, model="tiny", source=before, saes=release.saes, replace=True)
    assert not same_weights(SAE.from_pretrained(repo, ID), saved)  # the one before

    requests = len(hub.requests)
    SAE.from_pretrained(repo, ID)
    assert not [line for line in hub.requests[requests:] if line.startswith("GET")]  # a commit in the cache
    SAE.from_pretrained(repo, ID, force_download=True)
    assert f"GET /{repo}/resolve/{before.revision}/{ID}/sae_weights.safetensors" in hub.requests[requests:]


def test_truncated_file_from_a_plain_repository_is_refused(hub, saved):
    push(PushConfig(source=saved, repo_id=REPO))
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    files[f"{ID}/sae_weights.safetensors"] = files[f"{ID}/sae_weights.safetensors"][:-7]
    with pytest.raises(ValueError, match=rf"'{ID}'.*'{REPO}'.*damaged.*force_download=True"):
        SAE.from_pretrained(REPO, ID)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("square_scale", None, r"cfg\.json.*'user/saes'.*lacks.*'square_scale'"),
        ("nfm_topk", 3, "unknown.*'nfm_topk'"),
    ],
)
def test_config_of_a_plain_repository_is_read_strictly(hub, saved, key, value, message):
    push(PushConfig(source=saved, repo_id=REPO))
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    config = json.loads(files[f"{ID}/cfg.json"]) | {key: value}
    if value is None:
        del config[key]
    files[f"{ID}/cfg.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(REPO, ID)


def test_damaged_upload_is_noticed(hub, saved):
    hub.garbled.add(f"{ID}/sae_weights.safetensors")
    with pytest.raises(ValueError, match=rf"\bstored\b.*{re.escape(ID)}/sae_weights\.safetensors"):
        push(PushConfig(source=saved, repo_id=REPO))
    hub.garbled = {"README.md"}
    with pytest.raises(ValueError, match=r"\bstored\b.*\bREADME\.md\b"):
        push(PushConfig(source=saved, repo_id=REPO, overwrite=True))


def test_pushing_without_a_login_or_rights(hub, saved, monkeypatch):
    with pytest.raises(ValueError, match=rf"pushing.*'somebody-else/saes'.*{hub.url}.*\b403\b"):
        push(PushConfig(source=saved, repo_id="somebody-else/saes"))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(ValueError, match=rf"pushing.*'user/saes'.*{hub.url}.*\b401\b.*`hf auth login`"):
        push(PushConfig(source=saved, repo_id=REPO))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"nobody is logged in.*`hf auth login`"):
        push(PushConfig(source=saved, repo_id=REPO))
    assert hub.repositories == {}


def test_what_the_hub_does_not_have(hub, saved, tmp_path):
    push(PushConfig(source=saved, repo_id=REPO))
    with pytest.raises(FileNotFoundError, match=r"pretrained\.yaml.*'user/none'.*\brepository\b.*private"):
        pull(PullConfig(repo_id="user/none", output=tmp_path / "pulled"))
    with pytest.raises(FileNotFoundError, match=r"\brevision\b.*'v9'"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled", revision="v9"))
    with pytest.raises(ValueError, match=rf"'{REPO}'.*\blayer 9\b.*{re.escape(ID)}"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled", saes=("layer 9",)))
    (release,) = register_releases(
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled")).folder / "pretrained.yaml"
    )
    with pytest.raises(ValueError, match=rf"layer 9 .*{release.name}.*\['{ID}'\]"):
        SAE.from_pretrained(release.name, "layer 9")  # SAELens's own words
    with pytest.raises(ValueError, match=r"pulled'.*exists"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))


def test_hub_that_cannot_be_reached(hub, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again five times, with pauses
    push(PushConfig(source=saved, repo_id=REPO))
    first = pull(PullConfig(repo_id=REPO, output=tmp_path / "first"))
    register_release("cached-hub-release", model="tiny", source=HubSource(repo_id=REPO), saes=first.release.saes)
    hub.stop()
    unreachable = rf"{hub.url}.*\bcache\b.*HF_HUB_OFFLINE"
    assert same_weights(SAE.from_pretrained("cached-hub-release", ID), saved)  # from the cache
    pull(PullConfig(repo_id=REPO, output=tmp_path / "second"))
    with pytest.raises(FileNotFoundError, match=unreachable):
        SAE.from_pretrained("cached-hub-release", ID, force_download=True)
    with pytest.raises(FileNotFoundError, match=unreachable):
        pull(PullConfig(repo_id="user/never-fetched", output=tmp_path / "third"))
    with pytest.raises(FileNotFoundError, match=rf"pushing.*'{REPO}'.*{hub.url}.*HF_HUB_OFFLINE"):
        push(PushConfig(source=saved, repo_id=REPO))
    assert not (tmp_path / "third").exists()


def test_a_release_may_not_write_outside_its_folder(hub, saved, tmp_path):
    push(PushConfig(source=saved, repo_id=REPO))
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    files["pretrained.yaml"] = files["pretrained.yaml"].replace(f"path: {ID}".encode(), b"path: ../elsewhere")
    with pytest.raises(ValueError, match=r"\bpath\b.*'\.\./elsewhere'"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))


def altered_release(hub, saved, old: bytes, new: bytes) -> None:
    """A repository whose list of SAEs somebody has edited."""
    push(PushConfig(source=saved, repo_id=REPO))
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    assert old in files["pretrained.yaml"]
    files["pretrained.yaml"] = files["pretrained.yaml"].replace(old, new)


@pytest.mark.parametrize(
    "path",
    ["/etc", "a/../../b", "..", ".", "a\\\\..\\\\b", "C:/x", '"a\\nb"', '"a\\e[2Jb"', '"a\\u202Eb"', "[a]", "1", "''"],
)
def test_paths_that_no_release_has(hub, saved, tmp_path, path):
    altered_release(hub, saved, f"path: {ID}".encode(), f"path: {path}".encode())
    with pytest.raises(ValueError, match=r"pretrained\.yaml.*\bpath\b.*; ") as caught:
        pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))
    assert str(caught.value).isprintable()
    assert not list(tmp_path.glob("*pulled*"))


def test_an_id_is_a_string_in_the_code_that_is_printed(hub, saved, tmp_path, capsys):
    altered_release(hub, saved, f"id: {ID}".encode(), b"""id: 'x"); import os; os.system("rm'""")
    pulled = pull(PullConfig(repo_id=REPO, output=tmp_path / 'a"b'))
    call = ast.parse(pulled.words().splitlines()[-1].strip()).body[0].value
    assert (call.func.attr, call.args[0].value) == ("load_from_disk", f'{tmp_path}/a"b/{ID}')
    names = replace(pulled.release, source=HubSource(repo_id=REPO))
    call = ast.parse(Pushed(url="", release=names).words().splitlines()[-1].strip()).body[0].value
    assert [one.value for one in call.args] == [REPO, 'x"); import os; os.system("rm']


def test_a_pull_removes_nothing_and_follows_no_link(hub, saved, tmp_path):
    push(PushConfig(source=saved, repo_id=REPO))
    mine = tmp_path / "pulled.partial"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    pull(PullConfig(repo_id=REPO, output=tmp_path / "pulled"))
    mine = tmp_path / "pulled.1.partial"  # out of the way
    assert (mine / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"link'.*exists"):
        pull(PullConfig(repo_id=REPO, output=tmp_path / "link"))
    with pytest.raises(FileError, match=r"mine\.txt/x' cannot be written: not a directory"):
        pull(PullConfig(repo_id=REPO, output=mine / "mine.txt" / "x"))
    assert (tmp_path / "pulled").stat().st_mode & 0o777 == mine.stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["sparsity.safetensors", "runner_cfg.json", "cfg.json", "sae_weights.safetensors"])
def test_a_damaged_or_linked_file_is_not_published(hub, saved, tmp_path, name):
    save_file({"sparsity": torch.zeros(32)}, saved / "sparsity.safetensors")
    path, elsewhere = saved / name, tmp_path / "elsewhere" / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(saved))):
            push(PushConfig(source=saved, repo_id=REPO))
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(whole)
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=rf"{name}' is a link to '{re.escape(str(elsewhere))}'.*nothing was published"):
        push(PushConfig(source=saved, repo_id=REPO))
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


def test_sparsity_of_another_sae_is_not_published(hub, saved):
    for wrong in (torch.zeros(31), torch.full((32,), torch.nan)):
        save_file({"sparsity": wrong}, saved / "sparsity.safetensors")
        with pytest.raises(ValueError, match=r"sparsity\.safetensors' is damaged \(.*(32,|NaN)"):
            push(PushConfig(source=saved, repo_id=REPO))


def test_what_is_not_finished_is_not_published(hub, demo_output, tmp_path):
    (demo_output / "saes" / "joint").rename(demo_output / "saes" / "joint.partial")
    with pytest.raises(ValueError, match=r"no SAE joint\.partial; it has topk$"):
        push(PushConfig(source=demo_output, repo_id=REPO, saes=("joint.partial",)))
    demo_output.rename(tmp_path / "x.partial")
    with pytest.raises(ValueError, match=r"x\.partial' is unfinished"):
        push(PushConfig(source=tmp_path / "x.partial", repo_id=REPO))
    (tmp_path / "x.partial").rename(demo_output)
    (demo_output / "report.html").write_text("<!doctype html><html><body>")
    with pytest.raises(ValueError, match=r"report\.html' ends early"):
        push(PushConfig(source=demo_output, repo_id=REPO, saes=("topk",)))


def test_sources_that_are_nothing_to_push(hub, saved, demo_output, tmp_path):
    for arguments, message in (
        ({"source": tmp_path / "empty"}, r"empty'.*`sae-nfm demo`"),
        ({"source": demo_output, "saes": ("none",)}, r"\bnone\b.*\bjoint, topk\b"),
        ({"source": demo_output, "sae_id": "x"}, r"\bsae_id\b"),
        ({"source": saved, "saes": ("x",)}, r"\bx\b.*demo's"),
    ):
        with pytest.raises(ValueError, match=message):
            push(PushConfig(repo_id=REPO, **arguments))
    with pytest.raises(ValueError, match=r"\brepo_id\b.*'saes'"):
        PushConfig(source=saved, repo_id="saes")
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.*damaged"):
        push(PushConfig(source=saved, repo_id=REPO))
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


def test_fresh_process_configured_by_its_environment(once):
    """As a user has it: HF_ENDPOINT and HF_TOKEN; what SAELens's own uploader writes loads, too."""
    assert seen(once, through_the_hub) == {"pulled": True, "pushed": True, "SAELens's own uploader": True}
