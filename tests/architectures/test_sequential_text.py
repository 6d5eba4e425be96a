"""An NFM on SAEs that were trained on real text: by SAELens's runner, saved, loaded, spliced.

Three kinds of SAE by default; every kind, for longer and loaded by a new process, as a slow test. `test_sequential` has every
kind with random weights, `test_saelens_doors` a new process.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.util import temporary_seed
from safetensors.torch import save_file

from sae_nfm import demo
from sae_nfm.architectures.sequential_config import SequentialNFMTrainingSAEConfig
from sae_nfm.loading.strict import sha256_of
from sae_nfm.models.splicing import splice
from sae_nfm.training.recorder import record_training
from sae_nfm.training.results import read_training_record

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus-train.parquet"
HOOK = "blocks.2.hook_resid_post"
D_SAE = 256
SETTINGS = {
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "jumprelu": {"l0_coefficient": 0.5},
    "batchtopk": {"k": 8, "topk_threshold_lr": 0.1},
    "matryoshka_batchtopk": {"k": 8, "topk_threshold_lr": 0.1, "matryoshka_widths": [64, D_SAE]},
    "matching_pursuit": {"max_iterations": 8, "decoder_init_norm": 1.0},
}
FEW = ("standard", "batchtopk", "matching_pursuit")
"""One that keeps its kind when saved, one that becomes a jumprelu, one that takes inputs as they are."""
SCRIPT = """
import json, sys
import sae_nfm
from sae_lens import SAE
from safetensors.torch import load_file

x, figures = load_file(f"{sys.argv[1]}/x.safetensors")["x"], {}
for name in sys.argv[2:]:
    sae = SAE.load_from_disk(f"{sys.argv[1]}/nfm/{name}")
    figures[name] = [sae.cfg.architecture(), sae.encode(x).sum().item(), sae(x).sum().item()]
print(json.dumps(figures))
"""


def trained(saes, folder, dataset, model, steps, batch):
    """SAELens's runner on all of them at once; returns the record."""
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=HOOK,
        context_size=64,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        store_batch_size_prompts=16,
        n_batches_in_buffer=16,
        n_batches_for_norm_estimate=8,
        exclude_special_tokens=True,
        lr=3e-3,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
    )
    with temporary_seed(0):
        runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
        with record_training(runner, folder / "training.jsonl", every=1):
            runner.run()
    return read_training_record(folder / "training.jsonl")


def run(folder, kinds, steps, batch):
    """SAEs of these kinds, and an NFM on each."""
    if not CORPUS.is_file():
        pytest.skip("the corpus of real text is not beside this checkout")
    model = demo.load_model()
    texts = Dataset.from_parquet(str(CORPUS)).select(range(600)).select_columns("text")
    bases = {}
    for name in kinds:
        scaled = "none" if name == "matching_pursuit" else "expected_average_only_in"
        config = get_sae_training_class(name)[1]
        bases[name] = config(d_in=256, d_sae=D_SAE, normalize_activations=scaled, **SETTINGS[name])
    trained(bases, folder / "bases", texts, model, steps, batch)
    before = {name: sha256_of(SAE.load_from_disk(folder / "bases" / name).state_dict()) for name in kinds}
    configs = {name: SequentialNFMTrainingSAEConfig(base=str(folder / "bases" / name), nfm_dim=32) for name in kinds}
    lines = trained(copy.deepcopy(configs), folder / "nfm", texts, model, steps, batch)
    tokens = model.to_tokens(texts[7]["text"])[:, :32]
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return SimpleNamespace(
        folder=folder, before=before, steps=steps, lines=lines, tokens=tokens, model=model, x=cache[HOOK]
    )


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run(tmp_path_factory.mktemp("few"), FEW, steps=60, batch=128)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return run(tmp_path_factory.mktemp("every"), SETTINGS, steps=200, batch=256)


@pytest.fixture(scope="module")
def elsewhere(every_kind):
    """What a new process makes of the SAEs."""
    save_file({"x": every_kind.x.contiguous()}, every_kind.folder / "x.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(every_kind.folder), *SETTINGS]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(made, architecture):
    """It learns, its base has the bits that it had, and both are what was saved."""
    lines = [line for line in made.lines if line["sae"] == architecture]
    losses = [line["losses/mse_loss"] for line in lines]
    added = [line["metrics/fvu_all"] - line["metrics/fvu_direct"] for line in lines]
    assert len(losses) == made.steps
    assert sum(losses[-20:]) / 20 < sum(losses[:5]) / 5
    assert 0 < added[0] < 0.05  # the small initial weights are noise on top of the base
    assert sum(added[-20:]) / 20 < added[0] - 0.01  # on the same tokens, that noise and perhaps more is gone

    base = SAE.load_from_disk(made.folder / "bases" / architecture)
    loaded = SAE.load_from_disk(made.folder / "nfm" / architecture)
    assert loaded.cfg.architecture() == "sequential_nfm"
    assert loaded.cfg.metadata.hook_name == HOOK
    assert sha256_of(loaded.base.state_dict()) == made.before[architecture]
    assert torch.equal(loaded.encode(made.x), base.encode(made.x))
    with torch.no_grad(), splice(made.model, loaded):
        spliced = made.model(made.tokens)
    assert (spliced - made.model(made.tokens)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", FEW)
def test_an_nfm_on_an_sae_of_real_text(architecture, few):
    check(few, architecture)


@pytest.mark.slow  # a minute of training
@pytest.mark.parametrize("architecture", SETTINGS)
def test_an_nfm_on_every_kind_of_sae(architecture, every_kind, elsewhere):
    check(every_kind, architecture)
    sae = SAE.load_from_disk(every_kind.folder / "nfm" / architecture)
    name, acts, out = elsewhere[architecture]
    assert name == "sequential_nfm"
    # another process, perhaps other threads
    assert acts == pytest.approx(sae.encode(every_kind.x).sum().item(), rel=1e-4)
    assert out == pytest.approx(sae(every_kind.x).sum().item(), rel=1e-3, abs=0.1)
