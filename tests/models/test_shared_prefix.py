"""Blocks before an intervention run once for all interventions: the bits of a run from the tokens, or that run itself."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from builders import D_MODEL, HOOK, inference_sae, rows_of_tokens, training_config
from sae_lens.evals import get_recons_loss
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from tiny_models import write_checkpoint
from transformer_lens.components import TransformerBlock

from sae_nfm.evaluation.fidelity import outcomes
from sae_nfm.evaluation.saelens_evals import _in_float32
from sae_nfm.experiments.factorial.measure import WordScorer
from sae_nfm.interventions import Edit, Splice, Substitution
from sae_nfm.models import SharedPrefix, load_model, real_tokens, run_rows

BLOCKS_BEFORE = {
    "blocks.1.hook_resid_post": 2,
    "blocks.0.hook_out": 1,
    "blocks.1.hook_resid_pre": 1,
    "blocks.1.hook_mlp_out": 1,
    "blocks.1.hook_attn_out": 1,
    "blocks.1.attn.hook_z": 1,
    "blocks.0.hook_resid_mid": 0,
    "hook_embed": 0,
}
KINDS = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "model.layers.0",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prefix")
    return {family: write_checkpoint(root / family, family) for family in ("gpt2", "llama", "gemma2")}


@pytest.fixture(scope="module")
def llama(folders):
    return load_model(folders["llama"]).requires_grad_(False)


@pytest.fixture
def runs(monkeypatch):
    """Blocks that computed something, in order."""
    found, forward = [], TransformerBlock.forward

    def counted(self, *args, **kwargs):
        found.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    return found


def add_one(x, context):
    return x + 1


def in_place(x, context):
    return x.mul_(2)


def moved(at, function=add_one, head=None):
    return Substitution(at=at, function=function, head=head, description=function.__name__)


def padded():
    """Four rows, those in the middle padded at the left, and their attention mask."""
    tokens = rows_of_tokens()[[0, 1, 2, 2]]
    tokens[1, :5] = tokens[2, :2] = 0
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :5] = mask[2, :2] = False
    return tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_bits_of_a_run_from_the_tokens(folders, runs, family, side):
    model, (tokens, mask) = load_model(folders[family]), padded()
    model.tokenizer.padding_side = side
    width = {"blocks.1.attn.hook_z": model.cfg.d_head * model.cfg.n_heads}
    arms = {at: moved(at) for at in BLOCKS_BEFORE} | {"one head": moved("blocks.1.attn.hook_z", head=1)}
    for at in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z"):
        sae = inference_sae(training_config("joint_nfm", at, d_in=width.get(at, D_MODEL)))
        arms |= {f"sae {at}": Splice(sae=sae, edits=[Edit(at="hook_sae_acts_post", index=1, mode="clamp", value=3.0)])}
        arms |= {f"no path {at}": Splice(sae=sae, ablated={"hook_nfm_linear": None}, special_tokens="changed")}
    real = real_tokens(model, tokens, mask)
    clean, expected = run_rows(model, tokens, real), {}
    for name, arm in arms.items():
        with arm.on(model) as trace:
            expected[name] = run_rows(model, tokens, real), trace.x, trace.x_hat
        assert not torch.equal(expected[name][0], clean), name
    prefix = SharedPrefix(model, [arm.hook_name for arm in arms.values()])
    with prefix.shared():
        assert torch.equal(run_rows(model, tokens, real), clean)
    for _ in range(2):
        for name, arm in arms.items():
            with arm.on(model) as trace, prefix.shared(arm.hook_name):
                runs.clear()
                logits = run_rows(model, tokens, real)
            assert len(runs) == 2 - BLOCKS_BEFORE[arm.hook_name], name
            for found, one in zip((logits, trace.x, trace.x_hat), expected[name], strict=True):
                assert torch.equal(found, one), name
    assert torch.equal(run_rows(model, tokens, real), clean)
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.blocks)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_are_those_of_each_arm_alone(folders, kind):
    """A function that writes into what it is given changes its own arm only."""
    model, (tokens, mask), at = load_model(folders["llama"], model_class_name=kind), padded(), KINDS[kind]
    arms = {"one": moved(at), "writes": moved(at, in_place), "two": moved(at, lambda x, context: x + 2)}
    together = dict(outcomes(model, tokens, arms, attention_mask=mask))
    for name, arm in arms.items():
        alone = dict(outcomes(model, tokens, {name: arm}, attention_mask=mask))[name]
        assert alone.kl_nats.min() > 0
        with arm.on(model):
            expected, prefix = run_rows(model, tokens, mask), SharedPrefix(model, [arm.hook_name])
            for _ in range(2):  # without a run before them
                with prefix.shared(arm.hook_name):
                    assert torch.equal(run_rows(model, tokens, mask), expected)
        for column, values in together[name].columns().items():
            torch.testing.assert_close(values, alone.columns()[column], rtol=0, atol=0, equal_nan=True)


def plus(value, hook):
    return value + 1


def hooked(at):
    return lambda model, stack: stack.enter_context(model.hooks(fwd_hooks=[(at, plus)]))


def attached(model, stack):
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK)
    sae = inference_sae(training_config("joint_nfm", HOOK, metadata=metadata))
    stack.enter_context(model.saes([sae]))


def patched(part):
    def change(model, stack):
        module = model.blocks[0] if part is None else getattr(model.blocks[0], part)
        forward = module.forward
        before = vars(module).get("forward")
        vars(module)["forward"] = lambda *args, **kwargs: forward(*args, **kwargs) + 1

        def back():
            vars(module).pop("forward")
            if before is not None:
                vars(module)["forward"] = before

        stack.callback(back)

    return change


def torch_hook(model, stack):
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, output: output + 1)
    stack.callback(handle.remove)


def weights(model, stack):
    weight = model.blocks[0].mlp.W_out
    stack.callback(weight.copy_, weight.clone())
    weight[:3] = 0


CHANGES = {
    "hook": hooked("blocks.0.hook_mlp_out"),
    "embedding": hooked("hook_embed"),
    "attention": hooked("blocks.1.attn.hook_pattern"),
    "SAE": attached,
    "block": patched(None),
    "attention module": patched("attn"),
    "torch": torch_hook,
    "weights": weights,
}


@torch.no_grad()
@pytest.mark.parametrize("when", ["in the first run", "in the second", "in both"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_before_counts(llama, change, when):
    tokens, arm = rows_of_tokens(), moved("blocks.1.hook_resid_post")
    with ExitStack() as stack, arm.on(llama):
        if when != "in the first run":
            CHANGES[change](llama, stack)
        expected = llama(tokens)
    prefix = SharedPrefix(llama, [arm.hook_name])
    with ExitStack() as stack:
        if when != "in the second":
            CHANGES[change](llama, stack)
        with prefix.shared():
            llama(tokens)
    with ExitStack() as stack, arm.on(llama):
        if when != "in the first run":
            CHANGES[change](llama, stack)
        with prefix.shared(arm.hook_name):
            assert torch.equal(llama(tokens), expected)
        assert torch.equal(llama(tokens), expected)


@torch.no_grad()
def test_another_run_is_another_run(llama, runs):
    """Other tokens, another mask, a cache of keys and values, and whoever reads activations before."""
    (tokens, mask), arm = padded(), moved("blocks.1.hook_resid_post")
    prefix = SharedPrefix(llama, [arm.hook_name])
    with prefix.shared():
        llama(tokens, attention_mask=mask)
    for given, other in (
        (tokens.roll(1, 0), mask),
        (tokens, mask.roll(1, 0)),
        (tokens, None),
        (tokens[:, :9], mask[:, :9]),
    ):
        kwargs = {} if other is None else {"attention_mask": other}
        with arm.on(llama):
            expected = llama(given, **kwargs)
            with prefix.shared(arm.hook_name):
                assert torch.equal(llama(given, **kwargs), expected)
    with arm.on(llama):
        expected, cache = llama.run_with_cache(tokens, attention_mask=mask)
        with prefix.shared(arm.hook_name):
            seen = []
            logits = llama.run_with_hooks(
                tokens,
                attention_mask=mask,
                fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: seen.append(value))],
            )
    assert torch.equal(logits, expected)
    assert torch.equal(seen[0], cache["blocks.0.hook_resid_pre"])


def test_gradients_reach_the_tokens(folders):
    """With gradients every run is its own: two backward passes, as without it."""
    model, tokens, arm = load_model(folders["llama"]), rows_of_tokens(), moved("blocks.1.hook_resid_post")
    prefix, found = SharedPrefix(model, [arm.hook_name]), []
    for shared in (False, True, True):
        with ExitStack() as stack, arm.on(model):
            stack.enter_context(prefix.shared(arm.hook_name)) if shared else None
            model.zero_grad()
            model(tokens).square().mean().backward()
        found.append(model.W_E.grad.clone())
    assert found[0].abs().sum() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_saelens_evaluation_and_word_scores(llama, runs):
    """Two batches of SAELens's three conditions; words scored under one intervention after another."""
    at = "blocks.1.hook_resid_post"
    sae, batches, scaler = inference_sae(training_config("joint_nfm", at)), padded()[0].split(2), ActivationScaler()
    expected = [get_recons_loss(sae, llama, scaler, tokens, True, True) for tokens in batches]
    runs.clear()
    with _in_float32(sae, llama):
        found = [get_recons_loss(sae, llama, scaler, tokens, True, True) for tokens in batches]
    assert len(runs) == 2 * len(llama.blocks)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    given: Any = {"prompts": [(0, 3, 4), (0, 5, 6), (0, 1, 2, 7)], "words": [(8,), (9, 10)]}
    scorer, arms = WordScorer(llama, **given), [moved(at), Splice(sae=sae), moved("blocks.1.hook_mlp_out")]
    for arm in (*arms, *arms):
        scored, alone = scorer.scores(arm), WordScorer(llama, **given).scores(arm)
        assert all((getattr(scored, name) == getattr(alone, name)).all() for name in ("log_prob", "prob", "logit"))
    runs.clear()
    scorer.scores(arms[0])
    assert not runs
