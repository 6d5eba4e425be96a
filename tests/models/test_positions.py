"""Where tokens stand that interventions act on: on caches, run after run, in padded rows, without token ids."""

import copy
import gc

import pytest
import torch
from builders import D_MODEL, HOOK, inference_sae, rows_of_tokens, tiny_model, training_config
from sae_lens import SAE
from tiny_models import write_checkpoint
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformers import DynamicCache

from sae_nfm.architectures import attach_secondary
from sae_nfm.interventions import Edit, PairEdit, SecondarySplice, Splice, Substitution
from sae_nfm.interventions.edits import editing
from sae_nfm.interventions.steering import steering
from sae_nfm.models import counted_tokens, load_model, real_tokens, run_rows, tokens_read

PLACES = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "transformer.h.0",
}
FEATURES = "hook_sae_acts_post"
ROUNDING = {"atol": 3e-5, "rtol": 0}  # float32 through two blocks, logits of size 1 to 5
for_kinds = pytest.mark.parametrize("kind", PLACES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("positions") / "gpt2", "gpt2")
    return {kind: load_model(folder, model_class_name=kind).requires_grad_(False) for kind in PLACES}


@pytest.fixture(scope="module")
def saes():
    return {kind: inference_sae(training_config("joint_nfm", at)).requires_grad_(False) for kind, at in PLACES.items()}


@pytest.fixture
def tokens():
    """Two rows of 8 without special tokens but one."""
    rows = rows_of_tokens()[2:3, :8]
    rows = torch.cat([rows, rows.roll(3, 1)])
    rows[1, 4] = 0
    return rows


def clamp(where, index=(1, 2)):
    return Edit(at=FEATURES, index=index, mode="clamp", value=6.0, where=where)


def small_sae():
    """A TopK SAE that reads the hidden code."""
    cfg = {"architecture": "topk", "d_in": 8, "d_sae": 12, "k": 3, "rescale_acts_by_decoder_norm": False}
    sae = SAE.from_dict(cfg | {"metadata": {}}).requires_grad_(False)
    for number, parameter in enumerate(sae.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return sae


class Cached:
    """A model that is given its tokens in pieces, on a cache of keys and values."""

    def __init__(self, model, kind, rows):
        self.model, self.kind = model, kind
        self.cache = DynamicCache()
        if kind == "HookedTransformer":
            self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", rows)

    def __call__(self, tokens, mask=None):
        if self.kind == "HookedTransformer":
            mask = torch.ones_like(tokens) if mask is None else mask
            return self.model(tokens, past_kv_cache=self.cache, attention_mask=mask)
        given = {"past_key_values": self.cache, "use_cache": True}
        if mask is not None:
            given |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, -tokens.shape[1] :]}
        if self.kind == "TransformerBridge":
            return self.model(tokens, **given)
        return self.model.model(tokens, **given).logits


def arms(sae):
    """Interventions of every kind, at the first token, in the middle and late."""
    yield Splice(sae=sae)
    for where in ((0,), (2, 6), (7,)):
        yield Splice(sae=sae, edits=[clamp(where), PairEdit(pair=(1, 2), where=where, mode="scale", value=-2.0)])
    yield SecondarySplice(sae=sae, secondary=small_sae(), edits=[clamp((3, 7))])
    yield steering(str(sae.cfg.metadata.hook_name), torch.ones(D_MODEL), 2.0)


@torch.no_grad()
@for_kinds
def test_pieces_on_a_cache_are_one_run(models, saes, tokens, kind):
    model, sae = models[kind], saes[kind]
    for arm in arms(sae):
        with arm.on(model):
            whole = model(tokens)
            for pieces in ((8,), (1,) * 8, (5, 3), (1, 2, 5)):
                run = Cached(model, kind, 2)
                found = torch.cat([run(piece) for piece in tokens.split(pieces, 1)], 1)
                torch.testing.assert_close(found, whole, **ROUNDING)
    edit = clamp((6,))
    with Splice(sae=sae).on(model):
        plain = Cached(model, kind, 2)
        plain(tokens[:, :5])
    with Splice(sae=sae, edits=[edit]).on(model):  # on a cache that was begun before
        whole = model(tokens)
        torch.testing.assert_close(plain(tokens[:, 5:]), whole[:, 5:], **ROUNDING)
        one, other = Cached(model, kind, 2), Cached(model, kind, 2)  # two sequences in turns
        one(tokens[:, :4]), other(tokens[:, :6])
        torch.testing.assert_close(one(tokens[:, 4:]), whole[:, 4:], **ROUNDING)
        torch.testing.assert_close(other(tokens[:, 6:]), whole[:, 6:], **ROUNDING)
    model.add_sae(sae) if kind == "HookedTransformer" else None  # SAELens's own way
    if kind == "HookedTransformer":
        with editing(model, sae, [edit]):
            whole, run = model(tokens), Cached(model, kind, 2)
            found = torch.cat([run(piece) for piece in tokens.split((5, 3), 1)], 1)
        model.reset_saes()
        torch.testing.assert_close(found, whole, **ROUNDING)


@torch.no_grad()
@for_kinds
def test_the_same_input_gives_the_same_logits(models, saes, tokens, kind):
    """A run without a cache begins anew, whatever ran before: a token again, a row that has grown by one."""
    model, sae = models[kind], saes[kind]
    for where in ((0,), (-1,), (1,)):
        with Splice(sae=sae, edits=[clamp(where)]).on(model):
            alone = {n: model(tokens[:, :n]) for n in (5, 1, 6)}
            for n in (1, 1, 5, 6, 1, 2, 1):
                found = model(tokens[:, :n])
                if n in alone:
                    assert torch.equal(found, alone[n])


@torch.no_grad()
@for_kinds
@pytest.mark.parametrize("where", [(0,), (-1, 7), (-2,), (8,)])
def test_generate(models, saes, tokens, kind, where):
    """With and without a cache, bound before or within, one after another, by prompt lookup, in steps."""
    model, sae, prompt, n = models[kind], saes[kind], tokens[:1, :5], 5
    absolute = tuple(place + 5 if place < 0 else place for place in where)
    greedy = {"max_new_tokens": n, "do_sample": False}
    hf = kind == "AutoModelForCausalLM"
    bound = model.model.generate if hf else model.generate
    greedy |= {"min_new_tokens": n} if hf else {"stop_at_eos": False, "verbose": False}
    cached = "use_cache" if hf else "use_past_kv_cache"
    sequence = prompt
    with Splice(sae=sae, edits=[clamp(absolute)]).on(model):
        for _ in range(n):
            logits = model(sequence)[:, -1]
            logits[:, 0] = -torch.inf if hf else logits[:, 0]  # min_new_tokens forbids EOS
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    with Splice(sae=sae, edits=[clamp(where)]).on(model):
        within = model.model.generate if hf else model.generate
        for generate in (within, bound, within):
            for use_cache in (True, False):
                assert generate(prompt, **greedy, **{cached: use_cache}).tolist() == sequence.tolist()
        if hf:
            looked_up = within(prompt, **greedy, prompt_lookup_num_tokens=3)
            assert looked_up.tolist() == sequence.tolist()
            embeds = model.model.get_input_embeddings()(prompt)
            with pytest.raises(ValueError, match="no token ids"):
                within(inputs_embeds=embeds, **greedy)
        elif kind == "HookedTransformer":
            stream = model.generate_stream(prompt, **greedy)
            assert list(stream)[-1].shape[1] <= n + 5
    if where == (-2,):  # a prompt of one token after another
        with Splice(sae=sae, edits=[clamp((-1,))]).on(model):
            one = [within(prompt[:, :1], **greedy).tolist() for _ in range(2)]
            longer = within(sequence[:, :6], **greedy).tolist()
            assert one[0] == one[1]
            assert longer == within(sequence[:, :6], **greedy).tolist()
