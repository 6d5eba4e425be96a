"""From training to intervention on every family of models, at every usual kind of hook point, through every loader."""

import itertools

import pytest
import torch
from builders import covering_pairs, inference_sae, runner_config, token_dataset, training_config
from sae_lens import SAE, ActivationsStore, SAETrainingRunner
from sae_lens.util import temporary_seed
from tiny_models import FAMILIES, HF_BLOCK, write_checkpoints

from sae_nfm.evaluation.fidelity import Arm, evaluate, spliced
from sae_nfm.loading.saelens import quiet_saelens
from sae_nfm.models.load import find_site, load_model, resolve_hook_name

HOOKS = ("hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
LOADERS = ("HookedTransformer", "TransformerBridge")
for_families = pytest.mark.parametrize("family", FAMILIES)
every_pair = pytest.mark.parametrize(
    ("family", "hook", "loader"), covering_pairs(family=FAMILIES, hook=HOOKS, loader=LOADERS)
)
for_loaders = pytest.mark.parametrize("loader", LOADERS)
ROUNDING = {"atol": 2e-5, "rtol": 0}  # float32 through two blocks, logits and activations of size 1 to 5
SAME_FIGURES = {"rel": 1e-5, "abs": 2e-6}  # the same sums in another order; measured: 5e-7 relative, 1e-6 nats


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def models(checkpoints):
    return {(family, loader): load(checkpoints, family, loader) for family in FAMILIES for loader in LOADERS}


def load(checkpoints, family, loader):
    return load_model(checkpoints[family], model_class_name=loader)


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(token_dataset(8)["tokens"])


def train(model, hook_name, folder):
    """Three steps through SAELens's runner; the SAE as loaded from the folder it was saved to."""
    site = find_site(model, hook_name)
    shape = {"d_in": site.d_in, "reshape_activations": site.reshape_activations}
    run = runner_config(training_config("joint_nfm", site.hook_name, **shape), folder, steps=3)
    with torch.enable_grad(), temporary_seed(0), quiet_saelens():
        SAETrainingRunner(run, override_model=model, override_dataset=token_dataset(64)).run()
    return SAE.load_from_disk(folder)


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """SAEs by family, loader and hook point, each trained when first asked for."""
    saes = {}

    def get(family, loader, hook):
        if (family, loader, hook) not in saes:
            folder = tmp_path_factory.mktemp("sae")
            saes[family, loader, hook] = train(models[family, loader], f"blocks.0.{hook}", folder)
        return saes[family, loader, hook]

    return get


def point(model, sae, name):
    return f"{resolve_hook_name(model, sae.cfg.metadata.hook_name)}.{name}"


@torch.no_grad()
@every_pair
def test_train_save_load_splice(family, hook, loader, models, trained, tokens):
    model, sae = models[family, loader], trained(family, loader, hook)
    assert sae.cfg.metadata.hook_name == find_site(model, f"blocks.0.{hook}").hook_name
    clean, clean_cache = model.run_with_cache(tokens)
    x = clean_cache[sae.cfg.metadata.hook_name]
    pushed = model.run_with_hooks(tokens, fwd_hooks=[(sae.cfg.metadata.hook_name, add_ramp)])
    name = {at: point(model, sae, at) for at in ("hook_sae_output", "hook_nfm_interaction")}
    with model.saes([sae], use_error_term=True):
        torch.testing.assert_close(model(tokens), clean, **ROUNDING)
        push = model.run_with_hooks(tokens, fwd_hooks=[(name["hook_nfm_interaction"], add_ramp)])
    with model.saes([sae], use_error_term=False):
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(cache[name["hook_sae_output"]].flatten(2), sae(flat_for(sae, x)).flatten(2), **ROUNDING)
    assert (logits - clean).abs().max() > 0.05
    assert (push - clean).abs().max() > 0.05
    # Under the error term, an intervention on the interaction path is one on the model: the same, without an SAE.
    torch.testing.assert_close(push, pushed, **ROUNDING)
    torch.testing.assert_close(model(tokens), clean, **ROUNDING)  # all of it is gone


def add_ramp(value, hook):
    """Something that layer norm does not take away again."""
    shape = value.shape[2:]
    return value + torch.linspace(0, 1, shape.numel()).reshape(shape)


def flat_for(sae, x):
    """Activations [row, pos, ...] as the SAE takes them by itself: an SAE for a bridge does not flatten heads."""
    return x if sae.cfg.reshape_activations == "hook_z" else x.flatten(2)


@every_pair
def test_both_models_give_the_same_figures(family, hook, loader, models, trained, tokens):
    """The SAE's metadata has one kind of name, the models know one kind each."""
    sae = trained(family, loader, hook)
    given = sae.cfg.to_dict()
    arms = [Arm(name="whole", sae=sae), Arm(name="part", sae=sae, off=("hook_nfm_interaction", "hook_nfm_linear"))]
    hooked, bridge = (evaluate(models[family, other], tokens, arms, show_progress=False) for other in LOADERS)
    for arm in ("whole", "part"):
        assert vars(hooked[arm]) == pytest.approx(vars(bridge[arm]), **SAME_FIGURES)
    assert hooked["whole"].kl_nats != pytest.approx(hooked["part"].kl_nats, rel=1e-3)
    assert hooked["whole"].kl_nats > 0.01
    assert sae.cfg.to_dict() == given


@torch.no_grad()
@pytest.mark.parametrize(("family", "hook"), zip(FAMILIES, (*HOOKS, HOOKS[0]), strict=True))
def test_both_loaders_train_the_same_sae(family, hook, trained):
    hooked, bridge = (trained(family, loader, hook).state_dict() for loader in LOADERS)
    for name, tensor in hooked.items():
        torch.testing.assert_close(
            tensor, bridge[name], atol=1e-4, rtol=0
        )  # Adam's first steps turn rounding into 1e-6


@for_families
def test_hugging_face_names_from_training_to_figures(family, checkpoints, models, trained, tokens, tmp_path):
    proxy = load(checkpoints, family, "AutoModelForCausalLM")
    sae = train(proxy, HF_BLOCK[family], tmp_path)
    assert sae.cfg.metadata.hook_name == HF_BLOCK[family]
    found = evaluate(proxy, tokens, [Arm(name="sae", sae=sae)], batch_rows=3, show_progress=False)["sae"]
    same = trained(family, "HookedTransformer", "hook_resid_post")
    torch.testing.assert_close(sae.W_dec, same.W_dec, atol=1e-4, rtol=0)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    expected = evaluate(models[family, "HookedTransformer"], tokens, [Arm(name="sae", sae=sae)], show_progress=False)[
        "sae"
    ]
    assert vars(found) == pytest.approx(vars(expected), **SAME_FIGURES)


@for_loaders
def test_activations_store_from_a_loaded_sae(loader, models, trained, tokens):
    model, sae = models["gemma2", loader], trained("gemma2", loader, "attn.hook_z")
    store = ActivationsStore.from_sae(model, sae, token_dataset(8), train_batch_size_tokens=32, total_tokens=8)
    found = store.get_activations(store.get_batch_tokens(8))
    _, cache = model.run_with_cache(tokens)
    expected = cache[sae.cfg.metadata.hook_name].flatten(2).detach()
    assert found.shape == (8, 16, sae.cfg.d_in)
    torch.testing.assert_close(found, expected, **ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize(  # any two of family, loader and generating; all three: the first test has families and loaders
    ("family", "loader"), [*zip(FAMILIES, itertools.cycle(LOADERS), strict=False), ("gpt2", "TransformerBridge")]
)
def test_generate_with_a_spliced_sae(family, loader, models, tokens):
    model, sae = models[family, loader], inference_sae(training_config("joint_nfm"))
    prompt, n_new = tokens[:1, :5], 5

    def greedy(model):
        grown = prompt
        for _ in range(n_new):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], dim=1)
        return grown.tolist()

    def generated(use_past_kv_cache):
        options = {"max_new_tokens": n_new, "do_sample": False, "stop_at_eos": False, "verbose": False}
        return model.generate(prompt, use_past_kv_cache=use_past_kv_cache, **options).tolist()

    clean = greedy(model)
    assert generated(True) == clean
    with model.saes([sae], use_error_term=True):
        assert generated(True) == clean
    for attached in (model.saes([sae], use_error_term=False), spliced(model, Arm(name="sae", sae=sae))):
        with attached:
            by_hand = greedy(model)
            assert generated(True) == generated(False) == by_hand
        assert by_hand != clean
