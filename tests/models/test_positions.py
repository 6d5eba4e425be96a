"""Where tokens stand that interventions act on: on caches, run after run, in padded rows, without token ids."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from builders import D_MODEL, HOOK, inference_sae, rows_of_tokens, tiny_model, training_config
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from tiny_models import new_tokenizer, write_checkpoint
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache

from sae_nfm.analysis import read_activations
from sae_nfm.data import held_out_rows
from sae_nfm.evaluation.fidelity import Arm, evaluate, outcomes
from sae_nfm.experiments.factorial.measure import tokenized
from sae_nfm.experiments.factorial.stimuli import Cell, Factor, StimulusSet
from sae_nfm.explorer.activations import firings_of
from sae_nfm.interventions import Edit, PairEdit, SecondarySplice, Splice, path_means
from sae_nfm.interventions.edits import editing
from sae_nfm.interventions.steering import steering
from sae_nfm.models import (
    counted_tokens,
    load_model,
    loader_kwargs,
    masked_padding,
    model_of,
    real_tokens,
    run_rows,
    tokens_read,
)

PLACES = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "transformer.h.0",
}
FEATURES = "hook_sae_acts_post"
ROUNDING = {"atol": 3e-5, "rtol": 0}  # float32 through two blocks, logits of size 1 to 5
for_kinds = pytest.mark.parametrize("kind", PLACES)
for_two = pytest.mark.parametrize(
    "kind", [kind if kind != "TransformerBridge" else pytest.param(kind, marks=pytest.mark.slow) for kind in PLACES]
)
"""A bridge reads its tokens as the third kind does: in the slow suite."""


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
    for where in ((0, 6),):
        yield Splice(sae=sae, edits=[clamp(where), PairEdit(pair=(1, 2), where=where, mode="scale", value=-2.0)])
    yield SecondarySplice(sae=sae, secondary=small_sae(), edits=[clamp((3, 7))])
    yield steering(str(sae.cfg.metadata.hook_name), torch.ones(D_MODEL), 2.0)


@torch.no_grad()
@for_two
def test_pieces_on_a_cache_are_one_run(models, saes, tokens, kind):
    model, sae = models[kind], saes[kind]
    for arm in arms(sae):
        with arm.on(model):
            whole = model(tokens)
            for pieces in ((1,) * 8, (5, 3)):
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
@for_two
@pytest.mark.parametrize("where", [pytest.param((0, 8), marks=pytest.mark.slow), (-2, 7)])
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
    if where == (-2, 7):  # a prompt of one token after another
        with Splice(sae=sae, edits=[clamp((-1,))]).on(model):
            one = [within(prompt[:, :1], **greedy).tolist() for _ in range(2)]
            longer = within(sequence[:, :6], **greedy).tolist()
            assert one[0] == one[1]
            assert longer == within(sequence[:, :6], **greedy).tolist()


@pytest.fixture
def padded():
    """Rows of 8, 5, 6 and 3 tokens without BOS, padded at the left with the id that is BOS, EOS and padding; and alone."""
    rows = rows_of_tokens()[2]
    alone = [rows[:8], rows[3:8], rows[8:14], rows[11:14]]
    return alone, torch.stack([torch.cat([torch.zeros(8 - len(row), dtype=torch.long), row]) for row in alone])


def counted_rows(alone):
    return [row[None] for row in alone]


@torch.no_grad()
@for_two
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(models, saes, padded, kind, side):
    """Logits, edits and what is counted: inferred from the ids, and by an attention mask."""
    model, sae, (alone, rows) = models[kind], saes[kind], padded
    if side == "right":
        rows = torch.stack([row.roll(len(one)) for row, one in zip(rows, alone, strict=True)])
    real = real_tokens(model, rows)
    assert real.sum(1).tolist() == [8, 5, 6, 3]
    assert torch.equal(real, rows != 0)
    assert torch.equal(counted_tokens(model, rows).sum(1), real.sum(1) - 1)
    for where in ((0, 4), (-1, 1), None):
        arm = Splice(sae=sae, edits=[clamp(where)])
        with arm.on(model) as trace:
            found = run_rows(model, rows)
            x_hat = trace.x_hat
            for n, row in enumerate(alone):
                expected = model(row[None])[0]
                torch.testing.assert_close(found[n][real[n]], expected, **ROUNDING)
                torch.testing.assert_close(x_hat[n][real[n]], trace.x_hat[0], **ROUNDING)
    mask = torch.ones_like(rows)  # padding that are real tokens, by what the mask says
    with Splice(sae=sae, edits=[clamp((1,))]).on(model) as trace:
        run_rows(model, rows, real_tokens(model, rows, mask))
    assert torch.equal((trace.acts[..., 1] == 6).any(0).nonzero()[:, 0], torch.tensor([1]))


@torch.no_grad()
@for_two
def test_padded_rows_are_measured_as_rows_alone(models, saes, padded, kind):
    model, sae, (alone, rows) = models[kind], saes[kind], padded
    arms = [Arm(name="sae", sae=sae), Arm(name="part", sae=sae, off=("hook_nfm_linear",))]
    found = evaluate(model, rows, arms, show_progress=False, batch_rows=3)
    by_mask = evaluate(model, rows, arms, show_progress=False, attention_mask=rows != 0)
    own = {arm.name: [] for arm in arms}
    for row in alone:
        for name, outcome in outcomes(model, row[None], {arm.name: arm.intervention for arm in arms}):
            own[name].append(outcome)
    for name, several in own.items():
        kl = torch.cat([one.kl_nats for one in several])
        ce = torch.cat([one.ce_nats[one.has_next] for one in several])
        for fidelity in (found[name], by_mask[name]):
            assert fidelity.tokens == len(kl) == 18
            assert fidelity.kl_nats == pytest.approx(kl.mean().item(), rel=1e-4)
            assert fidelity.ce_nats == pytest.approx(ce.mean().item(), rel=1e-4)
    mean = path_means(model, sae, rows, ["hook_nfm_linear"], batch_rows=2)["hook_nfm_linear"]
    read, _ = read_activations(model, sae, rows, batch_rows=3)
    each = torch.cat([read_activations(model, sae, row[None])[0] for row in alone])
    torch.testing.assert_close(read, each, **ROUNDING)
    firings = firings_of(model, sae, rows, show_progress=False)
    assert firings.counted.sum() == 18
    assert mean.shape == (D_MODEL,)


@torch.no_grad()
@for_two
def test_generating_from_padded_rows(models, saes, padded, kind):
    """Left-padded prompts in a batch, with their attention mask, are continued as each alone."""
    model, sae, (alone, rows) = models[kind], saes[kind], padded
    mask, n = (rows != 0).long(), 3
    for where in ((-1, 1, 6),):
        with Splice(sae=sae, edits=[clamp(where)]).on(model):
            if kind == "HookedTransformer":  # its generate takes no mask
                run = Cached(model, kind, 4)
                logits, step = [run(rows, mask)[:, -1]], rows
                for _ in range(n):
                    step = logits[-1].argmax(-1, keepdim=True)
                    logits.append(run(step)[:, -1])
                found = torch.stack(logits[:-1], 1).argmax(-1)
            else:
                inner = model.model if kind == "AutoModelForCausalLM" else model.original_model
                greedy = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
                found = inner.generate(rows, attention_mask=mask, **greedy)[:, -n:]
        for row, one in zip(alone, found, strict=True):
            absolute = where if where is None else tuple(p + len(row) if p < 0 else p for p in where)
            sequence = row[None]
            with Splice(sae=sae, edits=[clamp(absolute)]).on(model):
                for _ in range(n):
                    last = model(sequence)[:, -1]
                    last[:, 0] = last[:, 0] if kind == "HookedTransformer" else -torch.inf
                    sequence = torch.cat([sequence, last.argmax(-1, keepdim=True)], 1)
            assert sequence[0, -n:].tolist() == one.tolist()


def test_which_tokens_are_padding():
    model = tiny_model()

    def real(*rows, **kwargs):
        return real_tokens(model, torch.tensor(rows), **kwargs).long().tolist()

    assert real([0, 1, 2, 0], [1, 2, 0, 3]) == [[1] * 4] * 2  # BOS, separators: one id, and none twice at an end
    assert real([0, 0, 0, 1], [0, 1, 2, 3]) == [[0, 0, 1, 1], [1] * 4]  # padding before BOS
    assert real([0, 0, 0, 1], [4, 1, 2, 3], [0, 1, 2, 3]) == [[0, 0, 0, 1], [1] * 4, [0, 1, 1, 1]]  # no BOS
    assert real([1, 2, 0, 0], [1, 2, 3, 0], [1, 0, 0, 3]) == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert real([0, 1, 2], attention_mask=torch.tensor([[0, 1, 1]])) == [[0, 1, 1]]
    model.tokenizer.pad_token = "t9"
    assert real([9, 0, 1, 2], [0, 1, 2, 9], [0, 1, 9, 2]) == [[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    with pytest.raises(ValueError, match=r"padding between tokens"):
        real([1, 2, 3], attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        real([1, 2, 3], attention_mask=torch.tensor([[1, 0]]))


@torch.no_grad()
@for_kinds
@pytest.mark.parametrize("edit", [pytest.param(clamp((1,)), marks=pytest.mark.slow), None])
def test_what_was_put_in_place_and_is_gone(models, saes, tokens, kind, edit):
    """A reset inside of a splice is an error at the next run, and nothing is left behind; hooks beside it are none."""
    model, sae, at = models[kind], saes[kind], PLACES[kind]
    clean, edits = model(tokens), [] if edit is None else [edit]
    resets = [lambda: model.reset_hooks(), lambda: model.reset_hooks(including_permanent=True)]
    if kind == "TransformerBridge":  # whose own reset_hooks fails where an SAE is attached
        resets = [lambda: [point.remove_hooks() for point in model.hook_dict.values() if isinstance(point, HookPoint)]]
    if kind != "AutoModelForCausalLM":
        resets += [model.reset_saes, lambda: model.add_sae(copy.deepcopy(sae))]
    for reset in resets:
        for special_tokens in ("kept", "changed"):
            with Splice(sae=sae, edits=edits, special_tokens=special_tokens).on(model):
                spliced = model(tokens)
                with model.hooks(fwd_hooks=[(at.replace(".0", ".1"), lambda value, hook: None)]):
                    assert torch.equal(model(tokens), spliced)
                model.run_with_hooks(tokens, fwd_hooks=[(at.replace(".0", ".1"), lambda value, hook: None)])
                model.run_with_cache(tokens)
                assert torch.equal(model(tokens), spliced)
                reset()
                for _ in range(2):
                    with pytest.raises(ValueError, match=rf"{at}.*taken out|taken out.*reset_hooks"):
                        model(tokens)
            if kind != "AutoModelForCausalLM":
                model.reset_saes()
                model.hook_dict[at].name = at
            assert torch.equal(model(tokens), clean)
            assert not any(point.fwd_hooks for point in (*model.hook_dict.values(), *sae.hook_dict.values()))
    with steering(at, torch.ones(D_MODEL), 1.0).on(model):
        model.reset_hooks()
        with pytest.raises(ValueError, match="taken out"):
            model(tokens)
    assert torch.equal(model(tokens), clean)


def test_hooks_that_a_splice_would_silence(models, saes, tokens):
    model, sae = models["HookedTransformer"], saes["HookedTransformer"]
    with (
        model.hooks(fwd_hooks=[(HOOK, lambda value, hook: 0 * value)]),
        pytest.raises(ValueError, match=r"hook functions at 'blocks\.0\.hook_resid_post'"),
        Splice(sae=sae).on(model),
    ):
        pass


@torch.no_grad()
@for_kinds
def test_a_model_that_is_given_activations(models, saes, tokens, kind):
    """Where no ids are needed it works; where special tokens are to be kept it is a sentence."""
    model, sae, needed = models[kind], saes[kind], "no token ids.*special_tokens='changed'"
    arms = [Splice(sae=sae, special_tokens=how, edits=[clamp((1, -1))]) for how in ("changed", "kept")]
    steered = steering(PLACES[kind], torch.ones(D_MODEL), 1.0)
    arms += [replace(steered, special_tokens="changed"), steered]
    if kind == "HookedTransformer":
        resid = model(tokens, stop_at_layer=0)
        runs = [lambda at=at, resid=resid: model(resid, start_at_layer=at) for at in (0, -2)]
    else:
        embeds = (model.model if kind == "AutoModelForCausalLM" else model.original_model).get_input_embeddings()(
            tokens
        )
        inner = model.model if kind == "AutoModelForCausalLM" else model
        runs = [lambda: inner(inputs_embeds=embeds).logits] if inner is not model else [lambda: model(embeds)]
    for run in runs:
        for changed, kept in (arms[:2], arms[2:]):
            with changed.on(model):
                torch.testing.assert_close(run(), model(tokens), **ROUNDING)
            with kept.on(model), pytest.raises(ValueError, match=needed):
                run()
    if kind == "HookedTransformer":
        for arm in arms:
            with arm.on(model):
                found = model(resid, start_at_layer=0, tokens=tokens)
                torch.testing.assert_close(found, model(tokens), **ROUNDING)
                model(tokens, stop_at_layer=1)
                with pytest.raises(ValueError, match="start_at_layer needs the residual stream"):
                    model(tokens, start_at_layer=1)
        text = ["t3 t4 t5", "t7"]
        for padding_side in ("left", "right"):
            ids = model.to_tokens(text, padding_side=padding_side)
            mask = real_tokens(model, ids)
            assert mask.sum(1).tolist() == [4, 2]
            for arm in arms:
                with arm.on(model):
                    whole = model(text, padding_side=padding_side)
                    torch.testing.assert_close(whole[mask], run_rows(model, ids)[mask], **ROUNDING)
                    torch.testing.assert_close(model("t7")[0], whole[1][mask[1]], **ROUNDING)
        with Splice(sae=sae, edits=[clamp((1,))]).on(model) as trace:
            model("t3 t4 t5", prepend_bos=False)
        assert (trace.acts[0, :, 1] == 6).nonzero().tolist() == [[1]]


def test_a_copy_made_within_a_splice_and_nothing_left(models, saes, tokens):
    """No method stays patched, a copy of the model runs by itself, and what was read is let go."""
    model, sae = models["HookedTransformer"], saes["HookedTransformer"]
    with Splice(sae=sae).on(model):
        copied = copy.deepcopy(model)
    copied.reset_saes()
    assert torch.equal(copied(tokens), model(tokens))
    for one in models.values():
        assert not {"forward", "generate", "generate_stream", "hf_generate"} & set(vars(one))
    gc.collect()
    with tokens_read(model) as read:
        assert read.users == 1
        assert not read.guards


@pytest.mark.parametrize("kind", PLACES)
def test_a_tokenizer_without_bos(tmp_path, kind):
    """TransformerLens makes up a BOS that the model does not have; text goes in without, and prompts too."""
    folder = write_checkpoint(tmp_path / "gpt2", "gpt2", tokenizer=False)
    tokenizer = new_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = load_model(folder, model_class_name=kind)
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (None, None)
    rows = held_out_rows(model, Dataset.from_dict({"text": ["t1 t2 t3 t4 t5 t6", "t7 t8 t9 t1 t2"]}), 5, 10)
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]]
    assert run_rows(model, rows.tokens).isfinite().all()
    cells = [Cell(levels=("a", "b"), words=(f"t{n}",), sentences=("t1 t2", f"t{n} t{n}")) for n in range(10, 14)]
    factors = tuple(Factor(name=name, levels=("a", "b")) for name in ("first", "second"))
    changed = StimulusSet(name="invented", factors=factors, cells=tuple(cells))
    assert tokenized(model, changed).prompts[0] == (1, 2)


def test_the_model_is_loaded_as_the_metadata_say(tmp_path):
    """Class, data type and revision; of another folder all but what chooses among models of one name."""
    folder = write_checkpoint(tmp_path / "gpt2", "gpt2")
    sae = inference_sae(training_config("joint_nfm", PLACES["TransformerBridge"]))
    given = {"dtype": "bfloat16", "revision": "main", "fold_ln": True}
    sae.cfg.metadata.model_name, sae.cfg.metadata.model_class_name = str(folder), "TransformerBridge"
    sae.cfg.metadata.model_from_pretrained_kwargs = {"dtype": "bfloat16"}
    model, _ = model_of(sae, "cpu")
    assert isinstance(model, SAETransformerBridge)
    assert next(model.parameters()).dtype == torch.bfloat16
    other, _ = model_of(sae, "cpu", model_class_name="HookedTransformer")
    assert isinstance(other, HookedSAETransformer)
    assert other.cfg.dtype == torch.bfloat16
    sae.cfg.metadata.model_from_pretrained_kwargs = given
    assert loader_kwargs(sae.cfg.metadata, str(folder)) == given
    assert loader_kwargs(sae.cfg.metadata, "elsewhere") == {"dtype": "bfloat16", "fold_ln": True}
    assert loader_kwargs(sae.cfg.metadata, str(folder), "HookedTransformer") == {"dtype": "bfloat16"}


@torch.no_grad()
@for_kinds
def test_padding_is_masked_for_saelens(models, saes, padded, kind):
    """What SAELens's evaluation gives to a model without a mask, and an error term, which leaves the model as it is."""
    model, (alone, rows) = models[kind], padded
    with masked_padding(model):
        found = model(rows)
        for n, row in enumerate(alone):
            torch.testing.assert_close(found[n, -len(row) :], model(row[None])[0], **ROUNDING)
    assert not torch.equal(model(rows)[1], found[1])
    with Splice(sae=saes[kind], use_error_term=True).on(model) as trace:
        model(alone[0][None])
        torch.testing.assert_close(trace.x_hat, trace.x, **ROUNDING)
