"""Edits that are refused, with what the message says."""

import re

import pytest
import torch
from builders import inference_sae, random_sae, training_config
from sae_lens import SAE

from sae_nfm.edited_tokens import TokensInTurn
from sae_nfm.editing import hook_functions
from sae_nfm.edits import Edit, PairEdit, ReadEdit
from sae_nfm.hooks import Splice
from sae_nfm.splicing import Attached

FEATURES = "hook_sae_acts_post"
PAIR = PairEdit(pair=(1, 2), mode="scale", value=-1.0)
READ = ReadEdit(path="linear", index=(1,), mode="add", value=2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(at=FEATURES, mode="set", value=1.0), "mode is 'set'; give one of 'clamp', 'scale', 'add'"),
        (
            lambda: Edit(at=FEATURES, mode="add", value=float("nan")),
            "value is nan; give a finite number, or a vector of them",
        ),
        (
            lambda: Edit(at=FEATURES, mode="add", value=torch.zeros(2, 3)),
            "value is a tensor (2, 3) of torch.float32; give a finite number, or a vector of them",
        ),
        (
            lambda: Edit(at=FEATURES, index=(3, 3), mode="add", value=1.0),
            "index is (3, 3); give different entries, counted from 0, such as (3, 17), or None for all",
        ),
        (
            lambda: Edit(at=FEATURES, index=(3, 4), mode="add", value=torch.ones(3)),
            "value has 3 numbers, index has 2 entries; give one number for each",
        ),
        (
            lambda: Edit(at=FEATURES, mode="add", value=1.0, where=()),
            "where is (); give positions such as (3, -1), a mask [rows, pos], or None for all tokens",
        ),
        (
            lambda: Edit(at=FEATURES, mode="add", value=1.0, where=torch.ones(3)),
            "where is a tensor (3,) of torch.float32; give a mask of bool, [rows, pos], True where the edit is to act",
        ),
        (
            lambda: PairEdit(pair=(3, 3), mode="add", value=1.0),
            "pair is (3, 3); give two different features, such as (3, 17)",
        ),
        (
            lambda: PairEdit(pair=(3, 4), mode="add", value=torch.ones(2)),
            "value is a tensor (2,); give a number for a pair",
        ),
        (
            lambda: ReadEdit(path="cubic", mode="add", value=1.0),
            "path is 'cubic'; give one of 'direct', 'linear', 'square', 'interaction'",
        ),
    ],
)
def test_edits_that_no_sae_could_take(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def check(edit, **overrides):
    return lambda: Splice(sae=inference_sae(training_config("joint_nfm", **overrides)), edits=[edit])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            check(Edit(at="hook_nfm_cubic", mode="add", value=1.0)),
            "the SAE has no hook_nfm_cubic; it has hook_sae_input, ",
        ),
        (
            check(READ, use_linear_path=False),
            "nothing passes hook_nfm_linear: the SAE's linear path is switched off (use_linear_path)",
        ),
        (
            check(PAIR, head="none"),
            "nothing passes hook_nfm_pooled: the SAE's interaction path is switched off (head 'none')",
        ),
        (check(PAIR, head="mlp"), "the SAE's head is 'mlp', which pools features, not pairs; give head 'fm'"),
        (
            check(PairEdit(pair=(1, 32), mode="add", value=1.0)),
            "index has entry 32, and what passes hook_sae_acts_post has 32, counted from 0",
        ),
        (
            check(Edit(at="hook_nfm_pooled", index=(8,), mode="add", value=1.0)),
            "index has entry 8, and what passes hook_nfm_pooled has 8, counted from 0",
        ),
        (
            check(Edit(at="hook_nfm_linear", mode="add", value=torch.ones(3))),
            "value has 3 numbers, and what passes hook_nfm_linear has 16; give one number for each",
        ),
    ],
)
def test_edits_that_this_sae_cannot_take(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_an_sae_in_training_that_reads_in_units_of_its_own():
    sae = random_sae(training_config("sequential_nfm"))
    message = (
        r"^this SAE is in training and reads features in units of its own \(nfm_scale\); save it with save_inference"
    )
    for edit in (PAIR, READ):
        with pytest.raises(ValueError, match=message):
            edit.check(sae)
    ReadEdit(path="direct", mode="add", value=1.0).check(sae)


def test_a_plain_sae_has_a_direct_path_only():
    sae = SAE.from_dict({"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2, "metadata": {}})
    ReadEdit(path="direct", mode="add", value=1.0).check(sae)
    for edit in (PAIR, READ):
        with pytest.raises(
            ValueError, match=r"^an SAE of the architecture 'topk' has a direct path only; give a joint_nfm"
        ):
            edit.check(sae)
    with pytest.raises(ValueError, match=r"^the SAE has no hook_nfm_linear; it has hook_sae_input, "):
        Edit(at="hook_nfm_linear", mode="add", value=1.0).check(sae)


def test_decode_by_itself_has_no_features_to_read():
    sae = inference_sae(training_config("joint_nfm"))
    functions = hook_functions(sae, [READ], TokensInTurn())
    message = r"^'add 2.0 as read by the linear path, entries \[1\], all tokens' reads the features of the same pass; call encode"
    with Attached(owner=sae, prefix="").hooks(functions), pytest.raises(ValueError, match=message):
        sae.decode(torch.zeros(1, 2, 32))
