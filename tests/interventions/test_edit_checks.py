"""Edits that are refused, with what the message says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import inference_sae, random_sae, training_config
from sae_lens import SAE

from sae_nfm.attribution import TokenPairs
from sae_nfm.interventions import SecondarySplice, Substitution
from sae_nfm.interventions.edits import Edit, PairEdit, ReadEdit, TokensInTurn, hook_functions
from sae_nfm.interventions.intervene import Splice
from sae_nfm.kernels import SparseActs
from sae_nfm.models.splicing import Attached

FEATURES = "hook_sae_acts_post"
PAIR = PairEdit(pair=(1, 2), mode="scale", value=-1.0)
READ = ReadEdit(path="linear", index=(1,), mode="add", value=2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(at=FEATURES, mode="set", value=1.0), "mode .*'clamp', 'scale', 'add'.*'set'"),
        (lambda: Edit(at=FEATURES, mode="add", value=float("nan")), "value is nan"),
        (lambda: Edit(at=FEATURES, mode="add", value=torch.zeros(2, 3)), r"value is .*\(2, 3\)"),
        (lambda: Edit(at=FEATURES, index=(3, 3), mode="add", value=1.0), r"index is \(3, 3\)"),
        (lambda: Edit(at=FEATURES, index=(3, 4), mode="add", value=torch.ones(3)), r"value has 3\b.*index has 2\b"),
        (lambda: Edit(at=FEATURES, mode="add", value=1.0, where=()), r"where is \(\)"),
        (
            lambda: Edit(at=FEATURES, mode="add", value=1.0, where=torch.ones(3)),
            r"where is .*\(3,\).*torch\.float32.*\bbool\b.*\[rows, pos\]",
        ),
        (lambda: PairEdit(pair=(3, 4), mode="add", value=torch.ones(2)), r"value is .*\(2,\).*\bpair\b"),
        (
            lambda: ReadEdit(path="cubic", mode="add", value=1.0),
            "path .*'direct', 'linear', 'square', 'interaction'.*'cubic'",
        ),
    ],
)
def test_edits_that_no_sae_could_take(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def check(edit, **overrides):
    return lambda: Splice(sae=inference_sae(training_config("joint_nfm", **overrides)), edits=[edit])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (check(Edit(at="hook_nfm_cubic", mode="add", value=1.0)), r"\bhook_nfm_cubic\b.*\bhook_sae_input\b"),
        (check(READ, use_linear_path=False), r"\bhook_nfm_linear\b.*\buse_linear_path\b"),
        (check(PAIR, head="none"), r"\bhook_nfm_pooled\b.*\bhead 'none'"),
        (check(PAIR, head="mlp"), r"\bhead is 'mlp'.*'fm'"),
        (check(PairEdit(pair=(3, 3), mode="add", value=1.0)), r"pair is \(3, 3\).*'fm'.*two different"),
        (
            check(PairEdit(pair=(1, 32), mode="add", value=1.0)),
            r"\bindex has entry 32\b.*\bhook_sae_acts_post has 32\b",
        ),
        (
            check(Edit(at="hook_nfm_pooled", index=(8,), mode="add", value=1.0)),
            r"\bindex has entry 8\b.*\bhook_nfm_pooled has 8\b",
        ),
        (
            check(Edit(at="hook_nfm_linear", mode="add", value=torch.ones(3))),
            r"\bvalue has 3\b.*\bhook_nfm_linear has 16\b",
        ),
    ],
)
def test_edits_that_this_sae_cannot_take(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_sae_in_training_that_reads_in_units_of_its_own():
    sae = random_sae(training_config("sequential_nfm"))
    for edit in (PAIR, READ):
        with pytest.raises(ValueError, match=r"\bnfm_scale\b.*\bsave_inference"):
            edit.check(sae)
    ReadEdit(path="direct", mode="add", value=1.0).check(sae)


def test_a_plain_sae_has_a_direct_path_only():
    sae = SAE.from_dict({"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2, "metadata": {}})
    ReadEdit(path="direct", mode="add", value=1.0).check(sae)
    for edit in (PAIR, READ):
        with pytest.raises(ValueError, match=r"'topk'.*\bdirect path\b.*\bjoint_nfm\b"):
            edit.check(sae)
    with pytest.raises(ValueError, match=r"\bhook_nfm_linear\b.*\bhook_sae_input\b"):
        Edit(at="hook_nfm_linear", mode="add", value=1.0).check(sae)


def test_decode_by_itself_has_no_features_to_read():
    sae = inference_sae(training_config("joint_nfm"))
    direct = ReadEdit(path="direct", index=(1,), mode="add", value=2.0)
    message = rf"'{re.escape(direct.identity)}'.*\bencode\b"
    functions = hook_functions(sae, [direct], TokensInTurn())
    with Attached(owner=sae, prefix="").hooks(functions), pytest.raises(ValueError, match=message):
        sae.decode(torch.zeros(1, 2, 32))
    with Attached(owner=sae, prefix="").hooks(hook_functions(sae, [READ], TokensInTurn())):
        sae.decode(torch.zeros(1, 2, 32))  # the other paths' reading is part of decode


def test_one_entry_and_short_reprs():
    """One number is as good as a tuple of it, in every kind of sequence; what holds tensors is printed in a line."""
    given = {"at": "hook_sae_acts_post", "mode": "add", "value": 1.0}
    for several in (3, [3], range(3, 4), np.int64(3), np.array([3]), torch.tensor([3]), torch.tensor(3)):
        edit = Edit(**given, index=several, where=several)
        assert (edit.index, edit.where) == ((3,), (3,))
        assert edit.identity == Edit(**given, index=(3,), where=(3,)).identity
    for wrong in ("3", 1.5, [1.5], True, (), [[1]]):
        with pytest.raises(ValueError, match=r"\bindex is\b.*\bgive different entries\b"):
            Edit(**given, index=wrong)
        with pytest.raises(ValueError, match=r"\bwhere is\b.*\bgive positions\b"):
            Edit(**given, where=wrong)
    pairs = TokenPairs.of(SparseActs(torch.arange(4).expand(3, 4), torch.ones(3, 4)))
    assert repr(pairs) == "TokenPairs(first=int64[3, 6], second=int64[3, 6], product=float32[3, 6])"
    edit = replace(READ, value=torch.ones(1), where=torch.ones(2, 90, dtype=torch.bool))
    assert repr(edit).startswith("ReadEdit(mode='add', value=float32[1], where=bool[2, 90]")
    for entry in (Splice, Edit, PairEdit, ReadEdit, Substitution, SecondarySplice):
        assert "(" in entry.__doc__.partition("\n\n")[2]  # an example, not the fields' types alone
