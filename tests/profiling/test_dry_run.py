"""`sae-nfm dry-run`: the paper's figures come out, costs are those of real steps, and what does not fit is refused."""

import functools
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from builders import random_activations
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.mixing_buffer import mixing_buffer
from tiny_models import new_model, write_checkpoint

from sae_nfm import JointNFMTrainingSAEConfig
from sae_nfm.architectures.joint_training import JointNFMTrainingSAE
from sae_nfm.cli.train import parse
from sae_nfm.models.load import find_site, load_model
from sae_nfm.profiling import arms
from sae_nfm.profiling.arms import Sizes, joint_config, peak_of_steps
from sae_nfm.profiling.requirements import (
    CONFIGS,
    Experiment,
    LiveBytes,
    activation_buffer,
    dry_run,
    load_experiment,
    model_forward,
    sae_step,
    shape_of_model,
)
from sae_nfm.profiling.requirements import _kernel as chosen_kernel
from sae_nfm.profiling.requirements import _sparse_step as sparse_step
from sae_nfm.profiling.results import Device, DryRun
from sae_nfm_cli import main

LOADERS = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "model.layers.0",
}
DEVICE = Device(name="a card", memory_gib=1, flop_per_second=1e12, bytes_per_second=1e10)


RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"


@functools.cache
def packaged(name: str) -> DryRun:
    """The dry run of an experiment that comes with the package."""
    return dry_run(load_experiment(name))


@pytest.fixture
def paper():
    return packaged("paper")


@pytest.fixture(scope="module")
def plain():
    return dry_run(tiny())


@pytest.fixture
def little_to_rate(monkeypatch):
    """The machine's rates by a small product and a small copy."""
    monkeypatch.setitem(arms.RATE_SIZE, "cpu", 64)
    monkeypatch.setattr(arms, "COPIED_BYTES", 2**16)


def tiny(**flags) -> Experiment:
    """A run on the tiny Llama of `tiny_models`, by its config alone."""
    train = {
        "architecture": "joint_nfm",
        "model_name": "tiny-llama",
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.0",
        "model_from_pretrained_kwargs": {"dtype": "float16"},
        "context_size": 16,
        "d_sae": 64,
        "k": 4,
        "nfm_dim": 8,
        "training_tokens": 6400,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 8,
        "store_batch_size_prompts": 2,
        "normalize_activations": "none",
    }
    shape = new_model("llama").config.to_dict()
    return Experiment(name="tiny", train=train | flags, model=shape, device=DEVICE)


def runner(sae, **settings) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(sae=sae, logger=LoggingConfig(log_to_wandb=False), **settings)


def test_the_papers_parameters(paper):
    matrices, V, mlp = 50_000 * 3200, 50_000 * 300, 300 * 300 + 300 + 300 * 3200 + 3200
    assert mlp == 1_053_500  # "MLP 1.05M"
    assert paper.parameters == 3 * matrices + V + mlp + 50_000 + 2 * 3200 == 496_109_900
    assert paper.topk_parameters == 2 * matrices + 50_000 + 3200
    assert f"{paper.more_than_topk:.0%}" == "55%"
    assert f"{matrices / paper.parameters:.1%}, {V / paper.parameters:.0%}" == "32.3%, 3%"
    assert paper.shapes["W_enc"] == (3200, 50_000)
    assert paper.shapes["W_lin"] == (50_000, 3200)
    assert sum(math.prod(shape) for shape in paper.shapes.values()) == paper.parameters


def test_the_papers_model_and_cost(paper):
    assert paper.hook_name == "blocks.15.hook_out"
    linear = 26 * (4 * 3200**2 + 3 * 3200 * 8640 + 2 * 3200) + 2 * 32_000 * 3200 + 3200
    assert paper.model_parameters == linear + 32_000  # the bridge has a bias of zeros for the logits
    block = 2 * (4 * 3200**2 + 3 * 3200 * 8640) + 4 * 128 * 3200  # attention to all 128 positions
    assert paper.model_flops_per_token == 16 * block
    assert paper.kernel == "dense"  # on CUDA, by the estimate in `dispatch.choose`
    gib = {row.name: row.gib for row in paper.memory}
    assert gib["SAE weights"] == gib["gradients"] == gib["Adam's moments"] / 2 == 4 * 496_109_900 / 2**30
    assert gib["model weights"] == pytest.approx(2 * paper.model_parameters / 2**30, rel=1e-3)  # and small buffers
    assert paper.needed_gib < 24  # as on the paper's RTX 3090
    assert paper.steps == 78_125


def test_the_paper_file_is_the_preset(paper):
    preset = runner(
        JointNFMTrainingSAEConfig.paper(3200),
        model_name="openlm-research/open_llama_3b",
        model_class_name="TransformerBridge",
        model_from_pretrained_kwargs={"dtype": "float16"},
        hook_name="blocks.15.hook_out",
        dataset_path="wikitext-103-train.parquet",
        context_size=128,
        exclude_special_tokens=True,
        training_tokens=5_000_000,
        train_batch_size_tokens=64,
        n_batches_in_buffer=78,
        store_batch_size_prompts=16,
        lr=1e-4,
        lr_decay_steps=62_500,
        device="cuda",
        checkpoint_path=None,
        output_path="runs/paper",
    )
    experiment = load_experiment("paper")
    assert asdict(experiment.arguments().cfg) == asdict(preset)
    typed = shlex.split(paper.command)
    assert typed[:2] == ["sae-nfm", "train"]
    assert asdict(parse(typed[2:]).cfg) == asdict(preset)


def test_the_table_has_every_figure(paper):
    words = paper.words()
    for text in ("496,109,900 parameters, +55.0%", "W_lin    50,000 x 3,200", "of 24", "78,125 steps", "as given"):
        assert text in words
    for row in paper.memory:
        assert f"{row.name} " in words
        assert f"{row.gib:.2f}" in words


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:500]
        b = a + 1
        assert (live.now, live.peak) == (8000, 8000)  # a view is no new storage
        del b
        c = torch.zeros(100, dtype=torch.float16)
        assert (live.now, live.peak) == (4200, 8000)
        del a
        assert live.now == 4200
        del view
        assert live.now == c.numel() * 2


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_recipes_are_what_the_experiments_say(name):
    """Parameters and memory in docs/recipes.md are those of `sae-nfm dry-run NAME`, and the run fits its device."""
    found = packaged(name)
    rows = [row.strip("| ").split(" | ") for row in RECIPES.read_text().splitlines() if f"| `{name}`" in row]
    (_, d_in, hook_name, d_sae, *_), (_, parameters, more, _, gib, hours, _) = rows
    assert (d_in, d_sae) == tuple(f"{size:,}" for size in found.shapes["W_enc"])
    assert hook_name == found.hook_name
    assert parameters == f"{found.parameters / 1e6:.1f}M"
    assert more == f"{found.more_than_topk:.0%}".replace("%", " %")
    assert gib == f"{found.needed_gib:.1f}"
    assert hours == f"{found.model_seconds / 3600:.2f} + {found.sae_seconds / 3600:.2f}"


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("topk", {}), ("batchtopk", {}), ("joint_nfm", {}),
                                  ("joint_nfm", {"encoder": "batchtopk"}), ("joint_nfm", {"encoder": "jumprelu", "k": None}),
                                  ("staged_topk", {"selection_stages": 4, "kernel": "dense"}),
                                  ("joint_nfm", {"selection_stages": 2, "refinement_steps": 2})]
)  # fmt: skip
def test_a_simulated_step_is_a_real_one(architecture, encoder):
    config_class = get_sae_training_class(architecture)[1]
    paths = {"nfm_dim": 8, "nfm_top_k": 3, "kernel": "dense"} if architecture == "joint_nfm" else {}
    config = config_class(**{"d_in": 64, "d_sae": 512, "k": 8} | paths | encoder)
    cfg = runner(config, train_batch_size_tokens=128)
    with torch.random.fork_rng(), LiveBytes() as live:
        sae = get_sae_training_class(architecture)[0](replace(config))
        settings = SAETrainerConfig(
            total_training_samples=256, train_batch_size_samples=128, lr=1e-3, lr_end=1e-3, device="cpu"
        )
        trainer = SAETrainer(settings, sae, iter(()))
        for _ in range(2):
            trainer.step(random_activations(128, 64))
    # fake tensors make some operations of others; the real one also has a mask of dead features
    assert sae_step(cfg, config).peak_bytes == pytest.approx(live.peak, rel=0.05)


def test_flops_of_a_dense_step_by_hand():
    d, S, m, batch = 8, 32, 4, 16
    config = JointNFMTrainingSAEConfig.paper(d, d_sae=S, k=6, nfm_top_k=3, nfm_dim=m)
    cost = sae_step(runner(config, train_batch_size_tokens=batch), config)
    encoder, decoder = 3 * 2 * d * S, 3 * 2 * d * S  # output, gradients of both factors; gathers are no products
    assert cost.flops_per_token == encoder + decoder + 3 * 2 * (m * m + m * d)
    assert cost.resident_bytes >= 3 * 4 * sum(
        parameter.numel() for parameter in JointNFMTrainingSAE(config).parameters()
    )


def test_adam_on_cuda_takes_one_more_number_a_parameter():
    config = TopKTrainingSAEConfig(d_in=256, d_sae=2048, k=4)
    parameters = 2 * 256 * 2048 + 2048 + 256
    peaks = [
        sae_step(runner(config, train_batch_size_tokens=4, device=device), config).peak_bytes
        for device in ("cuda", "cpu")
    ]
    assert peaks[0] == pytest.approx(4 * 5 * parameters, rel=0.02)  # weights, gradients, moments; buffers are small


def test_the_buffer_is_the_real_one():
    cfg = runner(
        TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4),
        context_size=17,
        seqpos_slice=(1, None),
        n_batches_in_buffer=16,
        train_batch_size_tokens=64,
        store_batch_size_prompts=2,
    )
    live, loaded = LiveBytes(), 0

    def batches():
        nonlocal loaded
        while True:
            loaded += 1
            yield torch.zeros(2 * 16, 32)

    with torch.random.fork_rng(), live:
        served = mixing_buffer(256, 64, batches(), 0.5)
        while loaded < 40:
            next(served)
    cost = activation_buffer(cfg, 32)
    assert cost.peak_bytes == live.peak
    assert 256 * 32 * 4 <= cost.resident_bytes < cost.peak_bytes


@pytest.mark.parametrize("model_class_name", LOADERS)
def test_a_models_shape_is_what_its_loader_gives(model_class_name, tmp_path):
    folder = write_checkpoint(tmp_path / "llama", "llama")
    loaded = load_model(folder, model_class_name=model_class_name)
    shape = shape_of_model(new_model("llama").config, model_class_name, torch.float32)
    sizes = [{name: p.shape for name, p in model.named_parameters()} for model in (loaded, shape)]
    assert sizes[0] == sizes[1]
    hook_name = LOADERS[model_class_name]
    assert find_site(shape, hook_name) == find_site(loaded, hook_name)
    assert {p.device.type for p in shape.parameters()} == {"meta"}


@pytest.mark.parametrize("model_class_name", LOADERS)
def test_model_forward_by_hand(model_class_name):
    model = shape_of_model(new_model("llama").config, model_class_name, torch.float16)
    cfg = runner(
        TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4),
        hook_name=LOADERS[model_class_name],
        context_size=10,
        store_batch_size_prompts=3,
    )
    cost = model_forward(model, cfg)
    attention = 16 * 24 + 2 * 16 * 12 + 24 * 16  # two heads of 12, one of keys and values
    block = 2 * (attention + 3 * 16 * 24) + 4 * 10 * 24
    assert cost.flops_per_token == block  # every loader stops after the first of two blocks
    assert cost.resident_bytes >= 2 * sum(p.numel() for p in model.parameters())
    assert cost.peak_bytes >= 3 * 10 * 16 * 2


def test_times_by_hand():
    found = dry_run(tiny(d_sae=512))
    assert found.steps == 100
    assert found.model_seconds == pytest.approx(6400 * found.model_flops_per_token / 1e12)
    traffic = 9 * 4 * found.parameters / 1e10
    assert found.sae_seconds == pytest.approx(100 * (64 * found.sae_flops_per_token / 1e12 + traffic))
    normalised = dry_run(
        tiny(d_sae=512, normalize_activations="expected_average_only_in", n_batches_for_norm_estimate=10)
    )
    assert normalised.model_seconds == pytest.approx(found.model_seconds * 1.1)  # 640 tokens more


def test_rates_that_are_not_given_are_measured(plain, little_to_rate):
    unknown = replace(tiny(), device=Device(name="this one", memory_gib=1, bytes_per_second=5.0))
    found = dry_run(unknown)
    assert found.rates_measured
    assert found.device.flop_per_second > 0
    assert found.device.bytes_per_second == 5.0
    assert "measured here" in found.words()
    assert dry_run(tiny(), measure_rates=True).device.bytes_per_second != DEVICE.bytes_per_second
    assert not plain.rates_measured


def test_what_lies_on_other_devices_is_not_counted():
    one = dry_run(tiny(device="cuda"))
    split = dry_run(tiny(device="cuda", llm_device="cuda:1", act_store_device="cpu"))
    on = {row.name: row.device for row in split.memory}
    assert (on["SAE weights"], on["model weights"], on["activation buffer"]) == ("cuda", "cuda:1", "cpu")
    gib = {row.name: row.gib for row in one.memory}
    names = ("SAE weights", "Adam's moments", "gradients", "step's activations and temporaries")
    assert split.needed_gib == pytest.approx(sum(gib[name] for name in names))
    assert one.needed_gib > split.needed_gib


@pytest.mark.parametrize(
    "settings",
    [{}, {"d_sae": 2048}, {"d_sae": 2048, "k": 1500}, {"kernel": "sparse"}, {"d_sae": 2048, "encoder": "batchtopk"}],
)
def test_the_kernel_is_the_one_the_sae_chooses(settings):
    config = JointNFMTrainingSAEConfig(**{"d_in": 8, "d_sae": 64, "k": 4, "nfm_dim": 8} | settings)
    expected = "sparse" if JointNFMTrainingSAE(config).works_sparsely() else "dense"
    assert chosen_kernel(runner(config, device="cpu")) == expected


def test_a_sparse_step_takes_less_than_a_dense_one():
    sizes = {"d_sae": 4096, "train_batch_size_tokens": 2048, "training_tokens": 8192, "n_batches_in_buffer": 256}
    sparse, dense = (dry_run(tiny(kernel=kernel, **sizes)) for kernel in ("auto", "dense"))
    assert (sparse.kernel, dense.kernel) == ("sparse", "dense")
    assert sparse.sae_flops_per_token < dense.sae_flops_per_token
    assert sparse.needed_gib < dense.needed_gib


@pytest.mark.parametrize(
    ("stages", "candidates", "batch"), [(1, None, 128), (4, None, 128), (4, 64, 128), (4, None, 1600), (16, None, 1600)]
)
@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk"])
def test_memory_of_a_sparse_step_in_stages(architecture, stages, candidates, batch):
    sae_class, config_class = get_sae_training_class(architecture)
    settings = {"d_in": 64, "d_sae": 2048, "k": 16, "selection_stages": stages, "selection_candidates": candidates}
    config = config_class(**settings)
    with torch.random.fork_rng(), LiveBytes() as live:
        options = {"total_training_samples": 2 * batch, "train_batch_size_samples": batch, "lr": 1e-3, "lr_end": 1e-3}
        trainer = SAETrainer(SAETrainerConfig(**options, device="cpu"), sae_class(replace(config)), iter(()))
        for _ in range(2):
            trainer.step(random_activations(batch, 64))
    cfg = runner(config, train_batch_size_tokens=batch, device="cpu")
    assert chosen_kernel(cfg) == "sparse"
    estimate = sparse_step(cfg).peak_bytes
    assert 0.95 * live.peak <= estimate <= 1.3 * live.peak  # an upper bound but for small things


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_memory_is_that_of_a_process(kernel):
    sizes = Sizes(d_in=512, d_sae=32_768, k=64, nfm_dim=64, batch=256)
    flags = {"d_sae": sizes.d_sae, "k": sizes.k, "nfm_dim": sizes.nfm_dim, "kernel": kernel}
    experiment = tiny(**flags, train_batch_size_tokens=256, n_batches_in_buffer=32, decoder_init_norm=0.1)
    shape = new_model("llama").config.to_dict() | {"hidden_size": sizes.d_in}
    found = dry_run(replace(experiment, model=shape, device=replace(DEVICE, memory_gib=8)))
    assert found.parameters == sum(p.numel() for p in JointNFMTrainingSAE(joint_config(sizes)).parameters())
    names = ("Adam's moments", "gradients", "step's activations and temporaries")
    estimate = sum(row.gib for row in found.memory if row.name in names) * 2**30
    measured = peak_of_steps(f"joint_nfm {kernel}", sizes, n_steps=3, threads=1)
    # measured: 1 % more and 7 % less than a process's memory rose by, which also has what libraries and the allocator keep
    assert estimate == pytest.approx(measured, rel=0.2)


def test_a_run_that_does_not_fit(plain):
    small = replace(tiny(), device=replace(DEVICE, memory_gib=1e-5))
    largest = max(plain.memory, key=lambda row: row.gib)
    figures = rf"{plain.needed_gib:.2f} GiB.*a card.*\b1e-05\b.*{largest.name} {largest.gib:.2f}"
    with pytest.raises(ValueError, match=rf"{figures}.*lower d_sae"):
        dry_run(small)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"d_in": 17}, r"\bd_in\b.*\b17\b.*'model\.layers\.0'.*\b16\b"),
        ({"hook_name": "model.layers.2"}, r"'model\.layers\.2'.*\bmodel\.layers\.1\b"),
        ({"context_size": 33}, r"\bcontext_size\b.*\b33\b.*\b32\b"),
        ({"nfm_top_k": 5}, r"\bnfm_top_k\b.*\bk\b.*\b4\b.*\b5\b"),
        ({"model_class_name": "HookedMamba"}, r"\bmodel_class_name\b.*'HookedMamba'.*\bHookedTransformer\b"),
    ],
)
def test_mistakes_in_a_run(flags, message):
    with pytest.raises(ValueError, match=message):
        dry_run(tiny(**flags))


def test_a_file_of_ones_own(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "llama", "llama")
    experiment = tiny(model_name=str(folder))
    content = {
        "train": experiment.train,
        "device": {"name": "mine", "memory_gib": 2.5, "flop_per_second": 1e9, "bytes_per_second": 1e9},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["dry-run", str(path)]) == 0  # the model's shape is read from its folder
    assert "needed at once on mine: 0.00 of 2.5" in capsys.readouterr().out
    assert main(["dry-run", str(path), "--memory-gib", "0.00001"]) == 2
    assert "mine has 1e-05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {}", r"lacks.*\bdevice\b.*\btrain, model, device\b"),
        ("{train: {}, device: {name: x, memory_gib: 1}, modell: {}}", r"unknown.*\bmodell\b.*\btrain, model, device\b"),
        (
            "{train: {}, device: {name: x, memory: 1}}",
            r"unknown.*\bdevice\.memory\b.*lacks.*\bdevice\.memory_gib\b.*\bdevice\.name\b",
        ),
        ("{train: [1], device: {name: x, memory_gib: 1}}", r"\btrain\b.*\bmodel\b.*`key: value`"),
        ("train: {", r"mine\.yaml.*YAML"),
    ],
)
def test_mistakes_in_a_file(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load_experiment(path)


def test_no_such_file_shape_or_number():
    with pytest.raises(FileNotFoundError, match=r"'papr'.*\bgemma-2-2b, gpt2, paper, pythia-1\.4b, pythia-410m\b"):
        load_experiment("papr")
    with pytest.raises(ValueError, match=r"'tiny-llama'.*`model:`.*\btiny\.yaml\b"):
        dry_run(replace(tiny(), model=None))
    # YAML reads 1e12 as text
    with pytest.raises(ValueError, match=r"\bflop_per_second\b.*'1e12'.*1\.5e\+12"):
        Device(name="x", memory_gib=1, flop_per_second="1e12")
    with pytest.raises(ValueError, match=r"\bmemory_gib\b.*\bNone\b"):
        Device(name="x", memory_gib=None)
