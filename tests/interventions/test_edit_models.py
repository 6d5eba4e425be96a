"""Edits of an SAE at work in a language model of every kind: their effect, nesting, `generate`, and nothing left behind."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from builders import D_MODEL, inference_sae, rows_of_tokens, training_config
from sae_lens import SAE
from tiny_models import write_checkpoint

from sae_nfm.architectures.secondary import attach_secondary
from sae_nfm.interventions.edits import READS, Edit, PairEdit, ReadEdit, editing
from sae_nfm.interventions.intervene import SecondarySplice, Splice
from sae_nfm.models.load import load_model
from sae_nfm.models.splicing import keeping

PLACES = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "transformer.h.0",
}
ATTACHING = ("HookedTransformer", "TransformerBridge")
FEATURES = "hook_sae_acts_post"
ROUNDING = {"atol": 2e-5, "rtol": 0}  # float32 through two blocks, logits and activations of size 1 to 5
for_kinds = pytest.mark.parametrize("kind", PLACES)
CLAMP = Edit(at=FEATURES, index=(1, 2), mode="clamp", value=3.0)
ADD = Edit(at="hook_nfm_hidden_pre", mode="add", value=1.0)
PAIR = PairEdit(pair=(1, 2), mode="scale", value=-1.0)
READ = ReadEdit(path="linear", index=(1,), mode="add", value=2.0)
ALL = (CLAMP, ADD, PAIR, READ)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("edits") / "gpt2", "gpt2")
    return {kind: load_model(folder, model_class_name=kind).requires_grad_(False) for kind in PLACES}


@pytest.fixture(scope="module")
def tokens():
    return rows_of_tokens()


def sae_at(kind, seed=0, **overrides):
    return inference_sae(training_config("joint_nfm", PLACES[kind], **overrides), seed).requires_grad_(False)


def small_sae(seed=3):
    """A TopK SAE that reads the hidden code."""
    cfg = {"architecture": "topk", "d_in": 8, "d_sae": 12, "k": 3, "rescale_acts_by_decoder_norm": False}
    sae = SAE.from_dict(cfg | {"metadata": {}}).requires_grad_(False)
    for number, parameter in enumerate(sae.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number)))
    return sae


def is_clean(model, sae):
    points = [*model.hook_dict.values(), *sae.hook_dict.values()]
    return (
        not any(point.fwd_hooks or point._forward_hooks for point in points) and READS not in sae.hook_sae_acts_post.ctx
    )


@contextmanager
def at_work(model, sae, edits):
    """Edits inside an SAE that another context has put there."""
    with Splice(sae=sae).on(model), editing(model, sae, edits):
        yield


@for_kinds
def test_edits_have_the_effect_of_the_sae_by_itself(models, tokens, kind):
    """On every kind of model: the model goes on with what the edited SAE makes of the activations; special tokens are kept."""
    model, sae, at = models[kind], sae_at(kind), PLACES[kind]
    clean, cache = model.run_with_cache(tokens)
    x, special = cache[at], (tokens == 0)[..., None]
    pair = PairEdit(pair=(1, 2), mode="clamp", value=5.0)
    for edits in ((CLAMP,), (ADD,), (pair,), (READ,), ALL):
        arm = Splice(sae=sae, edits=edits)
        with arm.on(model) as trace:
            found = model(tokens)
        expected = torch.where(special, x, arm.reconstruct(x))
        torch.testing.assert_close(trace.x_hat, expected, **ROUNDING)
        logits = model.run_with_hooks(tokens, fwd_hooks=[(at, lambda value, hook, changed=expected: changed)])
        torch.testing.assert_close(found, logits, **ROUNDING)
        with Splice(sae=sae).on(model):
            plain = model(tokens)
        assert (found - plain).abs().max() > 0.01
    assert torch.equal(trace.acts[tokens == 0], sae.encode(x)[tokens == 0])  # edits leave special tokens out
    assert (trace.acts[tokens != 0][:, [1, 2]] == 3).all()
    assert torch.equal(model(tokens), clean)
    assert is_clean(model, sae)


@for_kinds
def test_an_edit_of_the_output_leaves_special_tokens_out(models, tokens, kind):
    model, sae = models[kind], sae_at(kind)
    for special_tokens, changed in (("kept", tokens != 0), ("changed", torch.ones_like(tokens, dtype=torch.bool))):
        with Splice(sae=sae, special_tokens=special_tokens).on(model) as plain:
            model(tokens)
        add = Edit(at="hook_sae_output", mode="add", value=1.0)
        with Splice(sae=sae, special_tokens=special_tokens, edits=[add]).on(model) as trace:
            model(tokens)
        torch.testing.assert_close(trace.x_hat, plain.x_hat + changed[..., None])
    with Splice(sae=sae, edits=[Edit(at="hook_sae_input", mode="scale", value=0.0)]).on(model) as trace:
        model(tokens)
    assert torch.equal(trace.x, plain.x)  # what the model computed, not what the SAE was given


@for_kinds
def test_contexts_nest(models, tokens, kind):
    """Edits of the inner context act after those of the outer one; a pair of the outer one reads what the inner one left."""
    model, sae = models[kind], sae_at(kind)
    with Splice(sae=sae, edits=[PAIR, CLAMP, READ]).on(model):
        together = model(tokens)
    with Splice(sae=sae, edits=[PAIR]).on(model):
        outer = model(tokens)
        with editing(model, sae, [CLAMP]):
            with editing(model, sae, [READ]):
                assert torch.equal(model(tokens), together)
            with pytest.raises(RuntimeError, match="stop"), editing(model, sae, [ADD]):
                raise RuntimeError("stop")
        assert torch.equal(model(tokens), outer)
    double, add = Edit(at=FEATURES, mode="scale", value=2.0), Edit(at=FEATURES, mode="add", value=1.0)
    with Splice(sae=sae).on(model), editing(model, sae, [double]), editing(model, sae, [add]):
        found = model(tokens)
    both = Splice(sae=sae, edits=[double, add])
    with both.on(model):
        assert torch.equal(model(tokens), found)
    assert is_clean(model, sae)


@pytest.mark.parametrize("use_error_term", [True, False])
@pytest.mark.parametrize("kind", ATTACHING)
def test_an_sae_that_the_user_attached(models, tokens, kind, use_error_term):
    """SAELens's error term comes from a clean pass without hooks: it cancels no edit. Then the edit's change is all there is."""
    model, sae, at = models[kind], sae_at(kind), PLACES[kind]
    clean, cache = model.run_with_cache(tokens)
    x = cache[at]
    change = Splice(sae=sae, edits=ALL).reconstruct(x) - Splice(sae=sae).reconstruct(x)
    start = x if use_error_term else Splice(sae=sae).reconstruct(x)
    expected = start + change * (tokens != 0)[..., None]
    logits = model.run_with_hooks(tokens, fwd_hooks=[(at, lambda value, hook: expected)])
    model.add_sae(sae, use_error_term=use_error_term)
    try:
        plain = model(tokens)
        with editing(model, sae, ALL):
            found = model(tokens)
        assert torch.equal(model(tokens), plain)
        with editing(model, sae, ALL, special_tokens="changed"):
            everywhere = model(tokens)
    finally:
        model.reset_saes()
        model.hook_dict[at].name = at  # a bridge leaves a hook point of another name, whose hooks would not be found
    torch.testing.assert_close(found, logits, **ROUNDING)
    if use_error_term:
        torch.testing.assert_close(plain, clean, **ROUNDING)
    assert (found - plain).abs().max() > 0.05
    assert (everywhere - found)[:2].abs().max() > 0.05
    assert not (everywhere - found)[2].any()  # a row without special tokens
    assert torch.equal(model(tokens), clean)


@for_kinds
@pytest.mark.parametrize("where", [None, (-1, 2, 7), (-2,), "mask"])
def test_generating_is_running_again_and_again(models, tokens, kind, where):
    """Greedy generation under edits, with and without a cache, against full runs of the sequence so far.

    Outside `generate` every run is a prompt of its own: there the edited positions are counted from the beginning.
    """
    model, sae, prompt, n = models[kind], sae_at(kind), tokens[2:, :5], 4
    absolute = {None: None, (-1, 2, 7): (4, 2, 7), (-2,): (3,), "mask": (1, 3, 4)}[where]
    if where == "mask":
        where = torch.tensor([[False, True, False, True, True]])
    strong = {"where": where, "mode": "clamp", "value": 6.0}
    edits = [Edit(at=FEATURES, index=(1, 2), **strong), PairEdit(pair=(1, 2), where=where, mode="scale", value=-2.0)]
    if kind == "AutoModelForCausalLM":
        inner = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        generate = {
            cache: lambda c=cache: model.model.generate(prompt, use_cache=c, **inner) for cache in (True, False)
        }
    else:
        inner = {"max_new_tokens": n, "do_sample": False, "stop_at_eos": False, "verbose": False}
        generate = {c: lambda c=c: model.generate(prompt, use_past_kv_cache=c, **inner) for c in (True, False)}
    plain = generate[True]().tolist()
    sequence, steps = prompt, []
    with Splice(sae=sae, edits=[replace(edit, where=absolute) for edit in edits]).on(model) as trace:
        for _ in range(n):
            logits = model(sequence)[:, -1]
            logits[:, 0] = -torch.inf if kind == "AutoModelForCausalLM" else logits[:, 0]  # min_new_tokens forbids EOS
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
            steps.append((trace.acts[0, :, 1] == 6).tolist())
    for make in generate.values():
        with Splice(sae=sae, edits=edits).on(model):
            found = make()
        assert found.tolist() == sequence.tolist()
    edited = [position for position, hit in enumerate(steps[-1]) if hit]
    known = {None: list(range(8)), (-1, 2, 7): [2, 4, 7], (-2,): [3]}
    assert edited == (known[where] if where is None or isinstance(where, tuple) else [1, 3, 4])
    assert where is not None or found.tolist() != plain
    assert is_clean(model, sae)


@for_kinds
def test_nothing_is_left_after_an_error(models, tokens, kind):
    model, sae = models[kind], sae_at(kind)
    clean = model(tokens)

    def fail(value, hook):
        raise RuntimeError("stop")

    unfit = Edit(
        at=FEATURES, mode="add", value=1.0, where=torch.ones(9, 9, dtype=torch.bool)
    )  # fails while the model runs
    for edits in (ALL, [unfit]):
        for context in (
            lambda edits=edits: Splice(sae=sae, edits=edits).on(model),
            lambda edits=edits: at_work(model, sae, edits),
        ):
            with pytest.raises((RuntimeError, ValueError), match=r"stop|where is a mask"), context():
                model(tokens)
                raise RuntimeError("stop")
            assert torch.equal(model(tokens), clean)
            assert is_clean(model, sae)
    with (
        pytest.raises(RuntimeError, match="stop"),
        Splice(sae=sae, edits=ALL).on(model),
        sae.hooks(fwd_hooks=[("hook_nfm_pooled", fail)]),
    ):
        model(tokens)
    assert torch.equal(model(tokens), clean)
    assert is_clean(model, sae)
    run = model.model.generate if kind == "AutoModelForCausalLM" else model.generate
    late = Edit(at=FEATURES, mode="add", value=1.0, where=(-99,))
    with pytest.raises(ValueError, match=r"\bwhere\b.*-99\b"), Splice(sae=sae, edits=[*ALL, late]).on(model):
        run(tokens[:1], max_new_tokens=2)
    assert torch.equal(model(tokens), clean)
    assert is_clean(model, sae)


@for_kinds
def test_secondary_features(models, tokens, kind):
    """A feature of a secondary SAE clamped: what its decoder row does through the ReLU."""
    model, sae, small = models[kind], sae_at(kind), small_sae()
    edit = Edit(at="hook_secondary_acts_post", index=(4,), mode="clamp", value=2.0)
    arm = Splice(sae=sae, edits=[edit])
    with pytest.raises(ValueError, match="no secondary SAE"), arm.on(model):
        pass
    plain, identities = Splice(sae=sae), [arm.identity]
    for error_term in (False, True):
        with attach_secondary(sae, small, error_term=error_term):
            with arm.on(model) as trace:
                model(tokens)
            x, hidden = trace.x, {}
            with sae.hooks(fwd_hooks=[("hook_nfm_hidden_pre", keeping(hidden, "h"))]):
                before = plain.reconstruct(x)
            h = hidden["h"]
            new = (acts := small.encode(h)).clone()
            new[..., 4] = 2.0
            error = h - small.decode(acts) if error_term else 0
            change = ((small.decode(new) + error).relu() - (small.decode(acts) + error).relu()) @ sae.W_2
            expected = torch.where((tokens == 0)[..., None], x, before + change)
            torch.testing.assert_close(trace.x_hat, expected, **ROUNDING)
            assert change.abs().max() > 0.05
            identities.append(arm.identity)
        with SecondarySplice(sae=sae, secondary=small, error_term=error_term, edits=[edit]).on(model) as by_arm:
            model(tokens)
        assert torch.equal(by_arm.x_hat, trace.x_hat)
    with attach_secondary(sae, small_sae(seed=4)):
        identities.append(arm.identity)
        beyond = Edit(at="hook_secondary_acts_post", index=(12,), mode="clamp", value=2.0)
        with pytest.raises(ValueError, match=r"\bindex has entry 12\b.*\bhook_secondary_acts_post has 12\b"):
            beyond.check(sae)
        error = Edit(at="hook_secondary_error", mode="clamp", value=2.0)
        with pytest.raises(ValueError, match=r"\bhook_secondary_error\b.*\bwithout\b"):
            error.check(sae)
    assert len(set(identities)) == 4
    assert Splice(sae=sae, edits=[edit]).identity == identities[0]


def test_identity_of_an_arm(models):
    sae = sae_at("HookedTransformer")
    arms = [Splice(sae=sae), Splice(sae=sae, edits=[CLAMP]), Splice(sae=sae, edits=[CLAMP, READ])]
    arms += [Splice(sae=sae, edits=[READ, CLAMP]), Splice(sae=sae, edits=[PAIR])]
    assert len({arm.identity for arm in arms}) == len(arms)
    assert arms[1].identity == Splice(sae=sae_at("HookedTransformer"), edits=(CLAMP,)).identity
    assert arms[0].identity.endswith("special tokens kept")  # as before there were edits


def test_an_sae_that_is_not_at_work(models, tokens):
    kind = "AutoModelForCausalLM"
    model, sae = models[kind], sae_at(kind)
    message = r"'transformer\.h\.0'.*\bhooks\.Splice\b"
    with pytest.raises(ValueError, match=message), editing(model, sae, [CLAMP]):
        pass
    with pytest.raises(ValueError, match=message), Splice(sae=sae_at(kind, 1)).on(model), editing(model, sae, [CLAMP]):
        pass
    message = r"\(1, 3, 32\).*\(3, 16\)"
    with Splice(sae=sae, edits=[CLAMP]).on(model):
        model(tokens)
        with pytest.raises(ValueError, match=message):
            sae(torch.zeros(1, 3, D_MODEL))
    with pytest.raises(ValueError, match=r"\bwhere\b.*-17\b.*\b16\b.*-16\b"):
        Splice(sae=sae, edits=[Edit(at=FEATURES, mode="add", value=1.0, where=(-17,))]).reconstruct(
            torch.zeros(1, 16, 16)
        )
