"""The arms that `sae-nfm speed` compares, timed in turn, and the peak memory of their steps.

For memory each arm steps in a process of its own, `python -m sae_nfm.profiling.arms JSON`, which answers with JSON.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    SAETrainer,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.util import temporary_seed
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_nfm.architectures import (
    JointNFMTrainingSAE,
    JointNFMTrainingSAEConfig,
    Kernel,
    SequentialNFMTrainingSAE,
    StagedTopKTrainingSAE,
    StagedTopKTrainingSAEConfig,
)
from sae_nfm.kernels import dispatch, reference, without_triton
from sae_nfm.models import synchronize
from sae_nfm.profiling.results import TOPK, Rates
from sae_nfm.training import fuse

TOPK_FUSED = "topk fused Adam"
JOINT_AUTO, JOINT_TORCH, PUBLISHED = "joint_nfm auto", "joint_nfm no Triton", "joint_nfm published"
STAGED, STAGED_4, STAGED_POOL = "staged_topk", "staged_topk in 4 stages", "staged_topk in 4 stages, candidates"
STAGED_K = "staged_topk in k stages"
JOINT_4, JOINT_POOL = "joint_nfm in 4 stages", "joint_nfm in 4 stages, candidates"
PURSUIT = "matching_pursuit"
STAGES, CANDIDATES, REFINEMENTS = 4, 4, 5
"""Of the arms in 4 stages: candidates for each active feature where not all features are, and refinements at inference."""
N_BATCHES = 4
"""Different batches that the steps go round."""
PUBLISHED_TENSORS = 4
"""Tensors [batch, d_sae, nfm_dim] that the published formulation holds at its peak, in the backward pass."""
RATE_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed; on a GPU it has to outlast its launch."""
COPIED_BYTES = 2**27
"""Size of the tensor whose copy is timed; larger than caches."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a training step works on."""

    d_in: int = 512
    """Width of the activations."""
    d_sae: int = 8192
    """Features."""
    k: int = 32
    """Active features a token (on average for batchtopk)."""
    nfm_dim: int = 64
    """Interaction dimensions of joint_nfm."""
    nfm_top_k: int | None = None
    """How many of the active features the linear and the interaction path read; all unless given."""
    batch: int = 2048
    """Tokens in a step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of parameters and activations."""
    autocast: bool = False
    """Whether steps run under SAELens's bfloat16 autocast."""
    device: str = "cpu"
    """Where."""
    seed: int = 0
    """Seed of activations and initial weights."""


Case = tuple[str, Sizes]
Job = tuple[list[float], Callable[[], Any]]
"""What is timed, and the list its seconds go to."""


@dataclass(kw_only=True)
class Timings:
    """Seconds of each round of one case, or why there are none."""

    step: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    reason: str | None = None


class PublishedNFMTrainingSAE(JointNFMTrainingSAE):
    """joint_nfm with the pooling as published: the embeddings f_i v_i of every feature as one tensor [batch, d_sae, nfm_dim].

    The same function as the dense form, which gets by without that tensor. Source: arXiv 2507.00269.
    """

    @override
    def _pool(self, read: reference.Acts) -> Tensor:
        dense = dispatch.to_dense(read, self.cfg.d_sae) if isinstance(read, reference.SparseActs) else read
        embedded = dense[:, :, None] * self.V
        pooled = 0.5 * (embedded.sum(dim=1).square() - embedded.square().sum(dim=1))
        return self._dropout(self.hook_nfm_pooled(pooled.to(self.V.dtype)))


def _topk(sizes: Sizes, **options: Any) -> TopKTrainingSAE:
    return TopKTrainingSAE(TopKTrainingSAEConfig(**_shape(sizes), k=sizes.k, **options))


def _joint(kernel: Kernel, sae_class: type[JointNFMTrainingSAE] = JointNFMTrainingSAE) -> Callable[[Sizes], Any]:
    return lambda sizes: sae_class(joint_config(sizes, kernel))


def joint_config(sizes: Sizes, kernel: Kernel = "auto") -> JointNFMTrainingSAEConfig:
    """joint_nfm of these sizes; its own checks refuse sizes that do not fit together, with a ValueError."""
    return JointNFMTrainingSAEConfig(
        **_shape(sizes), k=sizes.k, nfm_dim=sizes.nfm_dim, nfm_top_k=sizes.nfm_top_k, kernel=kernel
    )


def _stages(sizes: Sizes, *, candidates: bool = False, stages: int = STAGES) -> dict[str, Any]:
    return {
        "selection_stages": min(stages, sizes.k),
        "selection_candidates": min(CANDIDATES * sizes.k, sizes.d_sae) if candidates else None,
        "inference_refinement_steps": REFINEMENTS,
    }


def _staged(sizes: Sizes, **options: Any) -> TrainingSAE[Any]:
    return StagedTopKTrainingSAE(StagedTopKTrainingSAEConfig(**_shape(sizes), k=sizes.k, **options))


def _joint_staged(sizes: Sizes, *, candidates: bool) -> TrainingSAE[Any]:
    return JointNFMTrainingSAE(replace(joint_config(sizes), **_stages(sizes, candidates=candidates)))


def _pursuit(sizes: Sizes) -> MatchingPursuitTrainingSAE:
    options: dict[str, Any] = {"decoder_init_norm": 1.0, "max_iterations": sizes.k, "residual_threshold": 0.0}
    return MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(**_shape(sizes), **options))


def _sequential(sizes: Sizes) -> SequentialNFMTrainingSAE:
    """The same NFM on a TopK SAE that stays as it is."""
    base = TopKSAE(TopKSAEConfig(**_shape(sizes), k=sizes.k))
    return SequentialNFMTrainingSAE.wrap(base, nfm_dim=sizes.nfm_dim, nfm_top_k=sizes.nfm_top_k)


ARMS: dict[str, Callable[[Sizes], TrainingSAE[Any]]] = {
    "joint_nfm dense": _joint("dense"),
    "joint_nfm sparse": _joint("sparse"),
    JOINT_AUTO: _joint("auto"),
    JOINT_TORCH: _joint("auto"),
    PUBLISHED: _joint("dense", PublishedNFMTrainingSAE),
    "sequential_nfm": _sequential,
    TOPK: _topk,
    TOPK_FUSED: _topk,
    # SAELens's COO activations have no backward pass through the decoder norms
    "topk COO": partial(_topk, use_sparse_activations=True, rescale_acts_by_decoder_norm=False),
    STAGED: _staged,
    STAGED_4: lambda sizes: _staged(sizes, **_stages(sizes)),
    STAGED_POOL: lambda sizes: _staged(sizes, **_stages(sizes, candidates=True)),
    STAGED_K: lambda sizes: _staged(sizes, **_stages(sizes, stages=sizes.k)),
    JOINT_4: partial(_joint_staged, candidates=False),
    JOINT_POOL: partial(_joint_staged, candidates=True),
    PURSUIT: _pursuit,
    "batchtopk": lambda sizes: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**_shape(sizes), k=float(sizes.k))),
}
"""The training SAE of each arm."""
ON_REQUEST = (PURSUIT, STAGED_K)
"""Left out unless they are asked for: all features are ranked k times a step."""
JOINT_ARMS = ("joint_nfm dense", "joint_nfm sparse", JOINT_AUTO, JOINT_TORCH, PUBLISHED)
"""Forms of joint_nfm, which the lower bound of a step is for."""
INFERENCE_ARMS = (
    *("joint_nfm dense", JOINT_AUTO, TOPK),
    *(STAGED, STAGED_4, STAGED_POOL, STAGED_K, JOINT_4, JOINT_POOL, PURSUIT),
)
"""Arms that differ in inference."""


def activations(sizes: Sizes) -> list[Tensor]:
    """Batches [batch, d_in] that look like a residual stream: a mean, directions of falling strength, a little noise.

    Scaled to mean norm sqrt(d_in), as SAELens's "expected_average_only_in" would.
    """
    generator = torch.Generator().manual_seed(sizes.seed)
    rank = max(1, sizes.d_in // 2)
    strengths = torch.arange(1, rank + 1).pow(-0.5)
    directions = torch.randn(rank, sizes.d_in, generator=generator)
    mean = 0.5 * torch.randn(sizes.d_in, generator=generator)
    found: list[Tensor] = []
    for _ in range(N_BATCHES):
        low_rank = (strengths * torch.randn(sizes.batch, rank, generator=generator)) @ directions
        x = mean + low_rank + 0.1 * torch.randn(sizes.batch, sizes.d_in, generator=generator)
        x *= sizes.d_in**0.5 / x.norm(dim=-1).mean()
        found.append(x.to(sizes.device, getattr(torch, sizes.dtype)))
    return found


class Stepper:
    """An arm in training: each call is one step of SAELens's trainer, from forward to optimizer."""

    def __init__(self, arm: str, sizes: Sizes, batches: list[Tensor]) -> None:
        with temporary_seed(sizes.seed):
            sae = ARMS[arm](sizes)
        settings: Any = {"device": sizes.device, "autocast": sizes.autocast, "lr": 1e-4, "lr_end": 1e-4}
        settings |= {"total_training_samples": 10**6 * sizes.batch, "train_batch_size_samples": sizes.batch}
        config = SAETrainerConfig(**settings)
        self.batches = batches
        self.kernels = without_triton if arm == JOINT_TORCH else nullcontext
        self.trainer = SAETrainer(config, sae, iter(()))
        if arm == TOPK_FUSED:
            fuse(self.trainer.optimizer)

    def __call__(self) -> None:
        """Make one step."""
        with self.kernels():
            self.trainer.step(self.batches[self.trainer.n_training_steps % len(self.batches)])
        self.trainer.n_training_steps += 1


def reason_against(arm: str, sizes: Sizes, limit_gib: float) -> str | None:
    """Why an arm is not tried: memory that only the published formulation needs, or kernels that only a GPU has."""
    if arm == JOINT_TORCH and torch.device(sizes.device).type != "cuda":
        return f"there are no Triton kernels on {sizes.device}: the same as {JOINT_AUTO}"
    if arm != PUBLISHED:
        return None
    itemsize = getattr(torch, sizes.dtype).itemsize
    needed = PUBLISHED_TENSORS * sizes.batch * sizes.d_sae * sizes.nfm_dim * itemsize / 2**30
    return f"does not fit: {needed:,.1f} GiB" if needed > limit_gib else None


def time_cases(
    cases: Sequence[Case], sizes: Sizes, *, repeats: int, warm_up: int, limit_gib: float, with_inference: bool
) -> tuple[dict[Case, Timings], Rates]:
    """All cases in turn, round after round; what fails is left out of the rounds that follow, and says why.

    Args:
        cases: arms and sizes; they share activations.
        sizes: of the activations, with their type and device.
        repeats: rounds that count, after those of `warm_up`.
        limit_gib: memory that the published formulation may take.
    """
    timings = {case: Timings(reason=reason_against(*case, limit_gib)) for case in cases}
    batches, rated = activations(sizes), _rate_jobs(sizes)
    jobs: dict[Case, list[Job]] = {}
    with tqdm(total=(warm_up + repeats) * len(cases), desc="Timing", unit="step", leave=False) as bar:
        for number in range(warm_up + repeats):
            for case, found in timings.items():
                bar.update()
                if found.reason is not None:
                    continue
                try:
                    if case not in jobs:
                        jobs[case] = _jobs(case, found, batches, with_inference=with_inference)
                    _run(jobs[case], sizes.device, keep=number >= warm_up)
                except RuntimeError as error:
                    found.reason = one_line(error)
                    jobs.pop(case, None)
            _run(rated, sizes.device, keep=True)
    product, copy = (min(seconds) for seconds, _ in rated)
    return timings, Rates(
        flop_per_second=2 * _rate_size(sizes) ** 3 / product, bytes_per_second=2 * COPIED_BYTES / copy
    )


def _run(jobs: list[Job], device: str, *, keep: bool) -> None:
    for kept, job in jobs:
        synchronize(device)
        begin = time.perf_counter()
        job()
        synchronize(device)
        if keep:
            kept.append(time.perf_counter() - begin)


def _jobs(case: Case, found: Timings, batches: list[Tensor], *, with_inference: bool) -> list[Job]:
    arm, sizes = case
    stepper = Stepper(arm, sizes, batches)
    jobs: list[Job] = [(found.step, stepper)]
    if with_inference and arm in INFERENCE_ARMS:
        training = stepper.trainer.sae
        sae = SAE.from_dict(training.cfg.get_inference_sae_cfg_dict())
        sae.load_state_dict(training.state_dict())
        jobs.append((found.inference, partial(_splice, sae.eval(), batches[0], sizes)))
    return jobs


@torch.no_grad()
def _splice(sae: SAE[Any], batch: Tensor, sizes: Sizes) -> Tensor:
    with torch.autocast(torch.device(sizes.device).type, dtype=torch.bfloat16, enabled=sizes.autocast):
        return sae(batch)


def _rate_size(sizes: Sizes) -> int:
    return RATE_SIZE.get(torch.device(sizes.device).type, RATE_SIZE["cpu"])


def _rate_jobs(sizes: Sizes) -> list[Job]:
    """A matrix product, in the type that products have, and a copy."""
    dtype = torch.bfloat16 if sizes.autocast else getattr(torch, sizes.dtype)
    size = _rate_size(sizes)
    matrix = torch.ones(size, size, dtype=dtype, device=sizes.device)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=sizes.device)
    product, target = torch.empty_like(matrix), torch.empty_like(source)
    return [([], partial(torch.mm, matrix, matrix, out=product)), ([], partial(target.copy_, source))]


def _shape(sizes: Sizes) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in ("d_in", "d_sae", "dtype", "device")}


def one_line(error: RuntimeError) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()


PEAK_STEPS = 5
"""Steps after which the peak of memory is read."""


def measure_peaks(cases: Sequence[Case], timings: dict[Case, Timings]) -> dict[Case, int]:
    """Peak memory of every case that could be timed."""
    torch.cuda.empty_cache()  # what this process keeps for reuse, its workers may need
    found: dict[Case, int] = {}
    possible = [case for case in cases if timings[case].reason is None]
    for case in tqdm(possible, desc="Peak memory", unit="process", leave=False):
        try:
            found[case] = peak_of_steps(*case, n_steps=PEAK_STEPS, threads=torch.get_num_threads())
        except RuntimeError as error:
            timings[case].reason = f"no peak memory: {one_line(error)}"
    return found


def peak_of_steps(arm: str, sizes: Sizes, *, n_steps: int, threads: int) -> int:
    """Bytes that a fresh process's memory rises by for training steps: gradients, optimizer state, all that lives meanwhile.

    CPU: peak resident size, less that of the process before its first step. CUDA: the same of allocated device memory. When the
    process fails, a RuntimeError has its last words.
    """
    own = {field.name: getattr(sizes, field.name) for field in fields(Sizes)}
    task = json.dumps({"arm": arm, "n_steps": n_steps, "threads": threads, "sizes": own})
    command = [sys.executable, "-m", "sae_nfm.profiling.arms", task]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        said = process.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended by signal {-process.returncode}, perhaps out of memory")
    answer = json.loads(process.stdout.splitlines()[-1])
    return answer["peak_bytes"] - answer["peak_bytes_before"]


def _peak_bytes(device: str) -> int:
    """The most memory so far. Not ru_maxrss where Linux tells: that counts the parent's memory before exec, too."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _work(task: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(task["threads"])
    sizes = Sizes(**task["sizes"])
    step = Stepper(task["arm"], sizes, activations(sizes))
    if torch.device(sizes.device).type == "cuda":  # what making the SAE took is over; a process's peak size stays
        torch.cuda.reset_peak_memory_stats(sizes.device)
    before = _peak_bytes(sizes.device)
    for _ in range(task["n_steps"]):
        step()
    synchronize(sizes.device)
    return {"peak_bytes": _peak_bytes(sizes.device), "peak_bytes_before": before}


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
