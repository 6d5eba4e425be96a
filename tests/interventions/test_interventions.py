"""Every kind of intervention on every kind of model: what it does, where it does nothing, and that it is gone afterwards."""

import pytest
import torch
from builders import CONTEXT, D_MODEL, covering_pairs, inference_sae, rows_of_tokens, training_config
from sae_lens.saes.sae import SAEMetadata
from tiny_models import write_checkpoint

from sae_nfm.evaluation.fidelity import outcomes
from sae_nfm.interventions.intervene import Splice, Substitution, counted_tokens, path_means, splice
from sae_nfm.models.load import load_model

# One place under the names of each kind of model; the second is in the next block.
PLACES = {
    "HookedTransformer": ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    "TransformerBridge": ("blocks.0.hook_out", "blocks.1.hook_out"),
    "AutoModelForCausalLM": ("transformer.h.0", "transformer.h.1"),
}
ROUNDING = {"atol": 2e-5, "rtol": 0}  # float32 through two blocks, logits and activations of size 1 to 5
for_kinds = pytest.mark.parametrize("kind", PLACES)
PATHS = ("hook_nfm_linear", "hook_nfm_interaction")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("interventions") / "gpt2", "gpt2")
    return {kind: load_model(folder, model_class_name=kind).requires_grad_(False) for kind in PLACES}


@pytest.fixture(scope="module")
def tokens():
    return rows_of_tokens()


def sae_at(place, seed=0):
    return inference_sae(training_config("joint_nfm", place), seed).requires_grad_(False)


def activations(model, place, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=[place])
    return cache[place]


def logits_with(model, place, tokens, changed):
    """The logits when `changed` stands at a hook point: by TransformerLens's own hooks."""
    return model.run_with_hooks(tokens, fwd_hooks=[(place, lambda value, hook: changed)])


def push(x, context):
    return x + torch.linspace(0, 1, x.shape[-1])


@for_kinds
@pytest.mark.parametrize("special_tokens", ["kept", "changed"])
def test_substitution(models, tokens, kind, special_tokens):
    model, place = models[kind], PLACES[kind][0]
    clean, x = model(tokens), activations(model, place, tokens)
    changed = x + torch.linspace(0, 1, D_MODEL)
    if special_tokens == "kept":
        changed[tokens == 0] = x[tokens == 0]
    pushed = Substitution(at=place, function=push, description="push", special_tokens=special_tokens)
    with pushed.on(model) as trace:
        found = model(tokens)
    torch.testing.assert_close(trace.x, x)
    torch.testing.assert_close(trace.x_hat, changed)
    torch.testing.assert_close(found, logits_with(model, place, tokens, changed), **ROUNDING)
    assert (found - clean).abs().max() > 0.05
    assert torch.equal(model(tokens), clean)


@for_kinds
def test_a_substitution_knows_which_tokens_count(models, tokens, kind):
    model, seen = models[kind], []

    def look(x, context):
        seen.append((x.shape, context))
        return x

    generator = torch.Generator()
    with Substitution(at=PLACES[kind][0], function=look, description="look").on(model, generator):
        found = model(tokens)
    ((shape, context),) = seen
    assert shape == (3, CONTEXT, D_MODEL)
    assert context.generator is generator
    expected = tokens != 0
    expected[:, 0] = False
    assert torch.equal(context.counted, expected)
    assert torch.equal(context.counted, counted_tokens(model, tokens))
    assert torch.equal(found, model(tokens))  # nothing was changed: the same bits


@for_kinds
def test_identity_has_kl_zero_exactly(models, tokens, kind):
    nothing = Substitution(at=PLACES[kind][0], function=lambda x, context: x.clone(), description="nothing")
    ((_, found),) = outcomes(models[kind], tokens, {"nothing": nothing})
    assert found.kl_nats.tolist() == [0.0] * int(counted_tokens(models[kind], tokens).sum())
    assert not found.ce_delta_nats[found.has_next].any()
    assert not found.columns()["error_energy"].any()


@pytest.mark.parametrize(
    ("kind", "by", "special_tokens"),
    covering_pairs(kind=PLACES, by=("nothing", "zero", "mean"), special_tokens=("kept", "changed")),
)
def test_splice_with_paths_ablated(models, tokens, kind, by, special_tokens):
    model, place = models[kind], PLACES[kind][0]
    sae, x = sae_at(place), activations(models[kind], place, tokens)
    means = path_means(model, sae, tokens, PATHS, batch_rows=2)
    ablated = {"nothing": {}, "zero": dict.fromkeys(PATHS), "mean": means}[by]
    paths = sae.decode_paths(sae.encode(x))
    written = {"nothing": paths.linear + paths.interaction, "zero": 0.0, "mean": sum(means.values())}[by]
    expected = paths.direct + paths.square + written
    if special_tokens == "kept":
        expected = torch.where((tokens == 0)[..., None], x, expected)
    arm = Splice(sae=sae, ablated=ablated, special_tokens=special_tokens)
    with arm.on(model) as trace:
        found = model(tokens)
    torch.testing.assert_close(trace.x, x, **ROUNDING)
    torch.testing.assert_close(trace.x_hat, expected, **ROUNDING)
    torch.testing.assert_close(found, logits_with(model, place, tokens, expected), **ROUNDING)
    reconstructed = arm.reconstruct(x)
    if special_tokens == "kept":
        reconstructed = torch.where((tokens == 0)[..., None], x, reconstructed)
    torch.testing.assert_close(reconstructed, expected, **ROUNDING)
    assert not any(point.fwd_hooks for point in sae.hook_dict.values())


@for_kinds
def test_path_means_are_over_counted_tokens(models, tokens, kind):
    model, place = models[kind], PLACES[kind][0]
    sae = sae_at(place)
    paths = sae.decode_paths(sae.encode(activations(model, place, tokens)[counted_tokens(model, tokens)]))
    found = path_means(model, sae, tokens, PATHS, batch_rows=2)
    torch.testing.assert_close(found["hook_nfm_linear"], paths.linear.mean(0), **ROUNDING)
    torch.testing.assert_close(found["hook_nfm_interaction"], paths.interaction.mean(0), **ROUNDING)
    with pytest.raises(ValueError, match=r"\baverage\b.*\b4 tokens\b"):
        path_means(model, sae, torch.zeros(2, 2, dtype=torch.long), PATHS)


@pytest.mark.parametrize(
    ("kind", "place"), [("HookedTransformer", "blocks.0.attn.hook_z"), ("TransformerBridge", "blocks.0.attn.o.hook_in")]
)
def test_heads_are_flattened(models, tokens, kind, place):
    model = models[kind]
    cfg = training_config("joint_nfm", place, reshape_activations="hook_z" if place.endswith("_z") else "none")
    arm = Splice(sae=inference_sae(cfg).requires_grad_(False))
    with arm.on(model) as spliced:
        found = model(tokens)
    same = Substitution(at=place, function=lambda x, context: arm.reconstruct(x), description="the same")
    with same.on(model) as substituted:
        torch.testing.assert_close(model(tokens), found, **ROUNDING)
    for trace in (spliced, substituted):
        assert trace.x.shape == trace.x_hat.shape == (3, CONTEXT, D_MODEL)
    torch.testing.assert_close(substituted.x_hat, spliced.x_hat, **ROUNDING)
    assert arm.sae.hook_z_reshaping_mode == place.endswith("_z")


@for_kinds
def test_gone_after_an_error(models, tokens, kind):
    model, place = models[kind], PLACES[kind][0]
    clean = model(tokens)

    def fail(x, context):
        raise RuntimeError("stop")

    arms = [
        Splice(sae=sae_at(place), ablated={"hook_nfm_linear": None}),
        Splice(sae=sae_at(place), ablated={"hook_nfm_linear": torch.zeros(3)}),  # fails while the model runs
        Substitution(at=place, function=push, description="push"),
        Substitution(at=place, function=fail, description="fail"),
    ]
    for arm in arms:
        with pytest.raises((RuntimeError, ValueError), match=r"stop|has 3 entries"), arm.on(model):
            assert not torch.equal(model(tokens), clean)
            raise RuntimeError("stop")
        assert torch.equal(model(tokens), clean)
        with arm.on(model):  # nothing is left that would be in the way
            pass
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@for_kinds
@pytest.mark.parametrize("inner", ["splice", "substitution"])
@pytest.mark.parametrize("outer", ["splice", "substitution"])
def test_nested_at_two_hook_points(models, tokens, kind, outer, inner):
    """In the order of the model, whichever is entered first."""
    model, (early, late) = models[kind], PLACES[kind]

    def arm(which, place):
        if which == "splice":
            return Splice(sae=sae_at(place, seed=len(place)))
        return Substitution(at=place, function=push, description="push")

    first, second = arm(outer, early), arm(inner, late)
    with first.on(model):
        logits, x = model(tokens), activations(model, late, tokens) if outer == "substitution" else None
    with first.on(model) as one, second.on(model) as two:
        both = model(tokens)
    if x is not None:
        torch.testing.assert_close(two.x, x, **ROUNDING)
    torch.testing.assert_close(both, logits_with(model, late, tokens, two.x_hat), **ROUNDING)
    with second.on(model), first.on(model) as again:
        torch.testing.assert_close(model(tokens), both, **ROUNDING)
    torch.testing.assert_close(again.x_hat, one.x_hat, **ROUNDING)
    assert (both - logits).abs().max() > 0.05
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@for_kinds
def test_refused_at_a_hook_point_that_is_taken(models, tokens, kind):
    model, place = models[kind], PLACES[kind][0]
    clean = model(tokens)
    arms = [Splice(sae=sae_at(place)), Substitution(at=place, function=push, description="push")]
    for outer in arms:
        for inner in arms:
            with outer.on(model) as trace:
                before = model(tokens)
                with (
                    pytest.raises(ValueError, match=f"'{place}' already"),
                    inner.on(model),
                ):
                    pass
                assert torch.equal(model(tokens), before)
                assert trace.x_hat is not None
    with pytest.raises(ValueError, match="already"), splice(model, sae_at(place)), splice(model, sae_at(place, 1)):
        pass
    assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_tokens_are_told_apart_while_generating(models, tokens, kind):
    """With a cache of keys and values the model sees one token at a time; special tokens are still known."""
    model, place = models[kind], PLACES[kind][0]
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    arm = Substitution(at=place, function=lambda x, context: -2 * x * context.counted[..., None], description="turn")
    with arm.on(model):
        with_cache = model.generate(tokens[1:2], use_past_kv_cache=True, **options)
        without = model.generate(tokens[1:2], use_past_kv_cache=False, **options)
    assert with_cache.tolist() == without.tolist()
    assert with_cache.tolist() != model.generate(tokens[1:2], **options).tolist()


def test_identity_tells_arms_apart(models):
    place = PLACES["HookedTransformer"][0]
    sae, other = sae_at(place), sae_at(place, seed=1)
    mean = torch.ones(D_MODEL)
    wider = sae_at(place)
    wider.cfg.square_scale = 3.0
    arms = [
        Splice(sae=sae),
        Splice(sae=other),
        Splice(sae=wider),
        Splice(sae=sae_at(PLACES["HookedTransformer"][1])),
        Splice(sae=sae, special_tokens="changed"),
        Splice(sae=sae, ablated={"hook_nfm_linear": None}),
        Splice(sae=sae, ablated={"hook_nfm_linear": mean}),
        Splice(sae=sae, ablated={"hook_nfm_linear": 2 * mean}),
        Splice(sae=sae, ablated={"hook_nfm_interaction": mean}),
        Substitution(at=place, function=push, description="push"),
        Substitution(at=place, function=push, description="pull"),
        Substitution(at=place, function=push, description="push", special_tokens="changed"),
    ]
    assert len({arm.identity for arm in arms}) == len(arms)
    assert Splice(sae=sae_at(place)).identity == arms[0].identity


def test_errors_say_what_is_wrong(models, tokens):
    model, place = models["HookedTransformer"], PLACES["HookedTransformer"][0]
    sae = sae_at(place)
    with pytest.raises(ValueError, match=r"\bhook_nfm_cubic\b.*\bhook_sae_input\b"):
        Splice(sae=sae, ablated={"hook_nfm_cubic": None})
    with pytest.raises(ValueError, match=r"\bhook_nfm_linear has shape \(2, 16\)"):
        Splice(sae=sae, ablated={"hook_nfm_linear": torch.zeros(2, 16)})
    short = Splice(sae=sae, ablated={"hook_nfm_linear": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"\bhook_nfm_linear has 3\b.*\b16\b"):
        short.reconstruct(torch.zeros(1, 1, 16))
    far = Substitution(at="blocks.9.hook_out", function=push, description="push")
    with pytest.raises(ValueError, match=r"'blocks\.9\.hook_out'"), far.on(model):
        pass
    halved = Substitution(at=place, function=lambda x, context: x[..., :8], description="half")
    with pytest.raises(ValueError, match=r"'half'.*\(3, 16, 8\).*\(3, 16, 16\)"), halved.on(model):
        model(tokens)
    nowhere = sae_at(place)
    nowhere.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match=r"\bno hook_name\b"), Splice(sae=nowhere).on(model):
        pass
    between = sae_at(place)
    between.cfg.metadata = SAEMetadata(hook_name=place, hook_name_out="blocks.0.hook_mlp_out")
    with pytest.raises(ValueError, match=r"'blocks\.0\.hook_resid_post'.*'blocks\.0\.hook_mlp_out'"):
        Splice(sae=between)
