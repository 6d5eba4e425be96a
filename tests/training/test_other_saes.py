"""`sae-nfm train` from or on other SAEs: a base, an adapter, a warm start, a primary."""

import json
import re
from pathlib import Path

import pytest
import torch
from builders import D_MODEL, D_SAE, HOOK, inference_sae, random_activations, saved_base, training_config
from sae_lens import SAE
from safetensors.torch import load_file
from small_training import SIZES

from sae_nfm.architectures.secondary import attach_secondary, primary_digest
from sae_nfm.training.results import read_training_record
from sae_nfm_cli import main

BASE = str(saved_base(d_in=D_MODEL, d_sae=D_SAE, k=4))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(shared, *more: str, architecture: str = "joint_nfm", where: tuple[str, ...] = ("--hook_name", HOOK)) -> int:
    at = SIZES.index("--d_sae")
    sizes = [*SIZES[:at], *SIZES[at + 2 :]]
    data = ["--model_name", str(shared / "model"), "--dataset_path", str(shared / "text.jsonl"), *where]
    return main(["train", "--architecture", architecture, *sizes, *data, "--output_path", "output", *more])


def test_a_base_gives_its_sizes_and_its_hook_point(shared):
    assert train(shared, "--base", BASE, architecture="sequential_nfm", where=()) == 0
    sae, base = SAE.load_from_disk("output"), SAE.load_from_disk(BASE)
    x = random_activations()
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.metadata.hook_name) == (D_MODEL, D_SAE, HOOK)
    assert torch.equal(sae.encode(x), base.encode(x))
    assert not torch.equal(sae(x), base(x))
    assert "`sequential_nfm`" in Path("output/README.md").read_text()


def test_an_adapter_has_the_nfm_alone(shared):
    assert train(shared, "--base", BASE, architecture="sequential_nfm") == 0
    whole, x = SAE.load_from_disk("output"), random_activations()
    assert train(shared, "--base", BASE, "--adapter", "true", architecture="sequential_nfm") == 0
    assert not [name for name in load_file("output/sae_weights.safetensors") if name.startswith("base.")]
    assert torch.equal(SAE.load_from_disk("output")(x), whole(x))


def test_a_warm_start_begins_as_the_sae(shared):
    assert train(shared, "--warm_start", BASE, "--lr", "1e-9", "--nfm_weight_init_std", "1e-6", where=()) == 0
    sae, base, x = SAE.load_from_disk("output"), SAE.load_from_disk(BASE), random_activations()
    assert (sae.cfg.architecture(), sae.cfg.d_sae, sae.cfg.k, sae.cfg.nfm_dim) == ("joint_nfm", D_SAE, 4, 64)
    torch.testing.assert_close(
        sae(x), base(x), atol=1e-3, rtol=1e-3
    )  # the learning rate and the NFM are tiny, not zero
    assert not torch.equal(sae(x), base(x))


def test_a_secondary_sae_is_trained_on_a_primary_and_knows_it(shared):
    primary = inference_sae(training_config("joint_nfm"))
    primary.save_model("primary")
    assert train(shared, "--primary", "primary", "-k", "3", "--d_sae", "24", architecture="topk", where=()) == 0
    sae = SAE.load_from_disk("output")
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (primary.cfg.nfm_dim, 24)
    assert sae.cfg.metadata.hook_name == f"{HOOK}.hook_nfm_hidden_pre"
    assert sae.cfg.metadata.primary_digest == primary_digest(primary)
    losses = [line["losses/mse_loss"] for line in read_training_record("output/training.jsonl")]
    assert losses[-1] < losses[0]
    with attach_secondary(primary, sae):
        pass
    at_linear = ("--hook_name", f"{HOOK}.hook_nfm_linear")
    assert train(shared, "--primary", "primary", "-k", "3", "--d_sae", "24", architecture="topk", where=at_linear) == 0
    assert SAE.load_from_disk("output").cfg.d_in == D_MODEL


@pytest.mark.parametrize(
    ("more", "architecture", "told"),
    [
        ((), "sequential_nfm", r"sequential_nfm\b.*--base\b"),
        (("--base", "nowhere"), "sequential_nfm", "'nowhere'.*folder"),
        (("--base", BASE, "--d_sae", "31"), "sequential_nfm", r"d_sae is 31\b.*\b32\b"),
        (("--warm_start", BASE), "topk", r"--warm_start\b.*\bjoint_nfm\b.*\btopk\b"),
        (("--warm_start", BASE, "--k", "5"), "joint_nfm", r"\bk is 5\b.*\b4\b"),
        (("--adapter", "true"), "joint_nfm", r"--adapter\b.*\bsequential_nfm\b.*--base\b.*\bjoint_nfm\b"),
        (("--primary", BASE), "topk", "'topk'.*interaction path"),
        (("--primary", BASE, "--warm_start", BASE), "joint_nfm", r"--warm_start and --primary\b"),
        (("--primary", "p", "--model_class_name", "TransformerBridge"), "topk", "--primary.*--model_class_name"),
        (("--primary", "elsewhere"), "topk", r"'blocks\.7\.hook_mlp_out'"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(more, architecture, told, shared, capsys):
    inference_sae(training_config("joint_nfm")).save_model("p")
    inference_sae(training_config("joint_nfm", hook_name="blocks.7.hook_mlp_out")).save_model("elsewhere")
    assert train(shared, *more, architecture=architecture) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not Path("output").exists()
    assert not Path("output.partial").exists()


def test_the_runner_config_names_the_base(shared):
    assert train(shared, "--base", BASE, architecture="sequential_nfm") == 0
    assert json.loads(Path("output/runner_cfg.json").read_text())["sae"]["base"] == BASE
