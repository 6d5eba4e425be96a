"""Hook points of what an MLP reads and writes, on every kind of model; what takes the MLP's place."""

import pytest
import torch
from builders import CONTEXT, D_MODEL, rows_of_tokens, tiny_model
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
from tiny_models import write_checkpoint
from torch import nn

from sae_nfm import demo
from sae_nfm.architectures import JointNFMSkipTranscoder, JointNFMTranscoder
from sae_nfm.architectures.transcoder_config import JointNFMSkipTranscoderConfig, JointNFMTranscoderConfig
from sae_nfm.attribution.direct_logits import Target
from sae_nfm.attribution.pair_effects import attribute_token, run_prompt
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.interventions import Splice, control_arms
from sae_nfm.interventions.equal_norm_controls import fit_activations
from sae_nfm.models import load_model, mlp_sites

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
KINDS = {"HookedTransformer": WRITTEN, "TransformerBridge": "blocks.1.mlp.hook_out"}
FAMILIES = ("gpt2", "neox", "llama", "gemma", "gemma2")
"""LayerNorm, LayerNorm with the MLP beside attention, RMSNorm and a gated MLP, weights of 1 + w, a second norm behind the MLP."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("models"), {}

    def model(family: str, kind: str):
        if (family, kind) not in found:
            folder = root / f"llama-7b-{family}"
            folder = folder if folder.is_dir() else write_checkpoint(folder, family)
            found[family, kind] = load_model(folder, model_class_name=kind).requires_grad_(False)
        return found[family, kind]

    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_makes_what_it_writes_of_what_it_reads(models, family, kind):
    """On other tokens than are probed; a HookedTransformer of Gemma 2 has no hook point in front of the second norm."""
    model = models(family, kind)
    if (family, kind) == ("gemma2", "HookedTransformer"):
        with pytest.raises(ValueError, match=r"second normalisation.*TransformerBridge"):
            mlp_sites(model, READ)
        return
    read, written = mlp_sites(model, READ)
    assert (read.hook_name, written.hook_name, read.d_in) == (READ, KINDS[kind], D_MODEL)
    tokens = rows_of_tokens()
    _, cache = model.run_with_cache(tokens, names_filter=[read.hook_name, written.hook_name])
    # Hugging Face's own module where there is one, which has no hooks of ours
    mlp = model.blocks[1].mlp
    own = getattr(mlp, "original_component", mlp)
    torch.testing.assert_close(own(cache[read.hook_name]), cache[written.hook_name], rtol=1e-4, atol=1e-5)


def test_the_embedded_model_s_layers():
    model = demo.load_model()
    for layer in range(model.cfg.n_layers):
        read, written = mlp_sites(model, f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        assert (read.d_in, written.d_in) == (256, 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "right"),
    [
        (("blocks.1.ln2.hook_normalized",), READ),
        (("blocks.1.hook_resid_mid",), READ),
        ((READ, "blocks.1.hook_resid_post"), None),
        ((READ, "blocks.0.hook_mlp_out"), None),
        (("blocks.0.mlp.hook_in", WRITTEN), None),
        (("unembed.hook_in",), "blocks.2.mlp.hook_in"),
    ],
)
def test_other_hook_points_are_refused_with_those_that_are_right(models, kind, given, right):
    """In front of the norm's weight, of the norm, behind the residual sum, of another block, of no block."""
    with pytest.raises(ValueError, match="hook_name") as error:
        mlp_sites(models("llama", kind), *given)
    block = given[0].split(".")[1] if right is None else None
    wanted = right or KINDS[kind].replace("1", block, 1)
    assert f"{wanted}" in str(error.value)
    assert given[-1] in str(error.value)


def test_a_norm_whose_weight_is_folded_reads_before_or_behind_it(models):
    """LayerNorm folded into the MLP: what is normalised is what the MLP reads, by either name."""
    model = tiny_model()
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    assert model.cfg.normalization_type == "LNPre"
    assert mlp_sites(model, "blocks.1.ln2.hook_normalized")[1].hook_name == WRITTEN


def relu_model():
    """A transformer whose MLP a TopK transcoder of as many features is."""
    model = tiny_model()
    for block in model.blocks:
        block.mlp.act_fn = nn.functional.relu
    return model.requires_grad_(False)


@torch.no_grad()
def exact(model, mlp, skip: bool) -> SAE:
    """The MLP of block 1. With the skip, W_out ReLU(z) = W_out z + W_out ReLU(-z): without it, the output is another one."""
    settings = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 2 * D_MODEL, "k": 2 * D_MODEL, "head": "none"}
    settings |= {"use_linear_path": False, "rescale_acts_by_decoder_norm": False}
    metadata = SAEMetadata(hook_name=READ, hook_name_out=WRITTEN, model_name="tiny", context_size=CONTEXT)
    cls, cfg = (
        (JointNFMSkipTranscoder, JointNFMSkipTranscoderConfig)
        if skip
        else (JointNFMTranscoder, JointNFMTranscoderConfig)
    )
    sae, sign = cls(cfg(**settings, metadata=metadata)).requires_grad_(False), -1 if skip else 1
    sae.W_enc.copy_(sign * mlp.W_in)
    sae.b_enc.copy_(sign * mlp.b_in)
    sae.W_dec.copy_(mlp.W_out)
    sae.b_dec.copy_(mlp.b_out)
    if skip:
        sae.W_skip.copy_((mlp.W_in @ mlp.W_out).T)
        sae.b_dec.add_(mlp.b_in @ mlp.W_out)
    return sae


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_that_is_the_mlp_changes_nothing(skip):
    """By our splice and SAELens's; with what it does ablated, what goes on is what is left."""
    model = relu_model()
    torch.nn.init.normal_(model.blocks[1].mlp.b_in)
    sae, tokens = exact(model, model.blocks[1].mlp, skip), rows_of_tokens()
    clean = model(tokens)
    torch.testing.assert_close(model.run_with_saes(tokens, saes=[sae]), clean)
    found = evaluate(model, tokens, [Arm(name="mlp", sae=sae)], show_progress=False)["mlp"]
    assert found.kl_nats == pytest.approx(0, abs=1e-6)
    assert found.fvu == pytest.approx(0, abs=1e-9)
    if skip:
        off = evaluate(model, tokens, [Arm(name="mlp", sae=sae, off=("hook_skip",))], show_progress=False)["mlp"]
        assert off.fvu > 0.1
    sae.W_dec.mul_(1.5)  # so it is the transcoder that was in place
    assert (model.run_with_saes(tokens, saes=[sae]) - clean).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens), clean)


@torch.no_grad()
def random_transcoder(skip: bool, seed: int = 0, **overrides) -> SAE:
    settings = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 32, "k": 6, "nfm_dim": 8} | overrides
    metadata = SAEMetadata(hook_name=READ, hook_name_out=WRITTEN, model_name="tiny", context_size=CONTEXT)
    cls, cfg = (
        (JointNFMSkipTranscoder, JointNFMSkipTranscoderConfig)
        if skip
        else (JointNFMTranscoder, JointNFMTranscoderConfig)
    )
    sae, generator = cls(cfg(**settings, metadata=metadata)), torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_both_splices_agree(models, kind, skip):
    """With a slow oracle: the MLP's output replaced by hand. Special tokens keep what the MLP wrote."""
    model, sae, tokens = models("llama", kind), random_transcoder(skip), rows_of_tokens()
    clean = model(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=[READ, KINDS[kind]])
    x, y = cache[READ], cache[KINDS[kind]]
    made = sae(x)
    if skip:
        torch.testing.assert_close(made, sae.decode_paths(sae.encode(x)).total() + x @ sae.W_skip.T)
    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(KINDS[kind], lambda value, hook: made)])
    assert (by_hand - clean).abs().max() > 0.01
    with Splice(sae=sae, special_tokens="changed").on(model) as trace:
        torch.testing.assert_close(model(tokens), by_hand)
        torch.testing.assert_close(trace.x, y)
        torch.testing.assert_close(trace.x_hat, made)
    torch.testing.assert_close(model.run_with_saes(tokens, saes=[sae]), by_hand)
    torch.testing.assert_close(
        model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean, rtol=1e-4, atol=1e-5
    )
    with Splice(sae=sae, use_error_term=True).on(model):
        torch.testing.assert_close(model(tokens), clean, rtol=1e-4, atol=1e-5)
    special = tokens == 0
    kept = torch.where(special[..., None], y, made)
    with Splice(sae=sae).on(model) as trace:
        logits = model(tokens)
        torch.testing.assert_close(trace.x_hat, kept)
    torch.testing.assert_close(
        logits, model.run_with_hooks(tokens, fwd_hooks=[(KINDS[kind], lambda value, hook: kept)])
    )
    assert torch.equal(model(tokens), clean)
    assert sae.cfg.metadata.hook_name_out == WRITTEN  # as before, under whatever name the model has it


def test_what_cannot_be_spliced_says_why(models):
    model, sae, tokens = models("llama", "HookedTransformer"), random_transcoder(True), rows_of_tokens()
    proxy = models("llama", "AutoModelForCausalLM")
    with pytest.raises(ValueError, match="HookedTransformer or a TransformerBridge"), Splice(sae=sae).on(proxy):
        pass
    with (
        model.hooks(fwd_hooks=[(READ, lambda value, hook: value)]),
        pytest.raises(ValueError, match=rf"{READ}'.*reset_hooks"),
        Splice(sae=sae).on(model),
    ):
        pass
    theirs = SkipTranscoder(SkipTranscoderConfig(d_in=D_MODEL, d_sae=8, d_out=D_MODEL, apply_b_dec_to_input=False))
    theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out = READ, WRITTEN
    with pytest.raises(ValueError, match=r"W_skip.*'skip_transcoder'.*joint_nfm_skip"), Splice(sae=theirs).on(model):
        pass
    activations = fit_activations(model, tokens, WRITTEN)
    with pytest.raises(ValueError, match=r"transcoder.*evaluate"):
        control_arms(Splice(sae=sae), activations)
    with pytest.raises(ValueError, match="AutoModelForCausalLM lacks"):
        mlp_sites(proxy, "model.layers.1.mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_an_mlp_are_attributed_exactly(models, kind):
    """What a pair writes is what goes when it is taken out with the gates held; its direct path begins at the MLP's output."""
    model, sae = models("llama", kind), random_transcoder(True)
    tokens = rows_of_tokens()[0]
    run = run_prompt(model, sae, tokens)
    target = Target.logit(5, run.logits.shape[-1], "a logit")
    found = attribute_token(model, sae, run, 6, target, top=4)
    assert found.sum_error < 1e-4
    assert len(found.pairs) == 4
    for pair in found.pairs:
        assert pair.prediction_error < 1e-3  # float32
        assert pair.written.norm > 0
        assert pair.written.direct is not None
        assert abs(pair.frozen - pair.written.gradient) < 0.1 * abs(pair.frozen) + 1e-3
