"""The job of `sae-nfm speed`: what a training step of joint_nfm costs, beside SAELens's TopK and beside what it must cost.

All arms (`arms.ARMS`) make their steps in turn, round after round, so that a change in the machine's speed meets all of
them; each time is the median over rounds. A step is SAELens's `SAETrainer.step`: forward, backward, clipping, Adam, statistics.
"""

import platform
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles

import torch

from sae_nfm.architectures import parameter_count
from sae_nfm.common import check_choice, check_numbers, check_positive, check_writable, provenance
from sae_nfm.models import check_device
from sae_nfm.profiling.arms import (
    ARMS,
    JOINT_ARMS,
    JOINT_AUTO,
    JOINT_TORCH,
    ON_REQUEST,
    Case,
    Sizes,
    Timings,
    joint_config,
    measure_peaks,
    time_cases,
)
from sae_nfm.profiling.results import TOPK, Rates, Scan, SpeedResult, SpeedRow

SCANNED = (JOINT_AUTO, TOPK)


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(Sizes):
    """What is timed, how often, and where to write it."""

    arms: tuple[str, ...] = ()
    """Which arms; unless given all that the device has but matching_pursuit, in a scan "joint_nfm auto" and "topk"."""
    repeats: int = 7
    """Rounds that count."""
    warm_up: int = 2
    """Rounds before these."""
    threads: int | None = None
    """CPU threads; as torch has them unless given."""
    memory: bool = True
    """Whether to measure peak memory, each arm in a process of its own."""
    memory_limit_gib: float = 8.0
    """GiB that the published formulation may take; above that it is not tried."""
    scan: Scan | None = None
    """How the steps grow with this size, d_sae or nfm_dim, doubled from its value up to scan_to."""
    scan_to: int | None = None
    """Last size of the scan; 8 times the first unless given."""
    save: str | None = None
    """JSON file for every number, with configuration and versions."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        check_positive(self, "batch", "repeats", "warm_up", "threads")
        check_numbers(self)
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("scan", self.scan, ("d_sae", "nfm_dim", None))
        if self.scan_to is not None and self.scan is None:
            raise ValueError(f"scan_to is {self.scan_to} without a scan; give --scan d_sae or --scan nfm_dim too")
        if self.scan is not None and self.scan_to is not None and self.scan_to < 2 * getattr(self, self.scan):
            raise ValueError(
                f"scan_to is {self.scan_to}, less than twice the {self.scan} = {getattr(self, self.scan)} the scan begins "
                "with; raise it"
            )
        joint_config(self)


def measure_speed(config: SpeedConfig) -> SpeedResult:
    """Time the arms, or scan one size; writes `config.save` where that is given."""
    check_device(config.device)
    check_writable(config.save)
    left_out = (*ON_REQUEST, *(() if torch.device(config.device).type == "cuda" else (JOINT_TORCH,)))
    possible = tuple(arm for arm in ARMS if arm not in left_out)
    arms = config.arms or (SCANNED if config.scan else possible)
    with _threads(config.threads):
        cases = [(arm, sizes) for sizes in scan_sizes(config) for arm in arms]
        timings, rates = time_cases(
            cases,
            config,
            repeats=config.repeats,
            warm_up=config.warm_up,
            limit_gib=config.memory_limit_gib,
            with_inference=config.scan is None,
        )
        peaks = measure_peaks(cases, timings) if config.memory else {}
        rows = tuple(_row(case, timings, peaks, rates) for case in cases)
        cuda = torch.device(config.device).type == "cuda"
        origin = provenance(
            asdict(config) | {"arms": list(config.arms)},
            device=torch.cuda.get_device_name(config.device) if cuda else f"{platform.machine()} {config.device}",
            threads=torch.get_num_threads(),
            torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        )
        result = SpeedResult(rows=rows, rates=rates, provenance=origin)
    if config.save is not None:
        result.save(config.save)
    return result


def scan_sizes(config: SpeedConfig) -> list[Sizes]:
    """The sizes that are measured: one, or with a scan each doubling up to its end."""
    if config.scan is None:
        return [config]
    first = getattr(config, config.scan)
    last = 8 * first if config.scan_to is None else config.scan_to
    values = [first * 2**power for power in range((last // first).bit_length())]
    return [replace(config, **{config.scan: value}, scan=None, scan_to=None) for value in values]


def floor_seconds(sizes: Sizes, rates: Rates) -> float:
    """What a training step of joint_nfm takes at least, if products and memory run at the rates measured.

        2 batch d_in d_sae / flops + bytes / copied + the least of either form for every other product

    The first product is the encoder's, all features having to be ranked. With P parameters, numbers of the parameters' type,
    the bytes are those of

        P weights read, P gradients written                                                         2 P
        Adam: weight, gradient and two moments read, weight and moments written                     7 P

    Every other product reads q active features of each token, for w columns: `2 batch d_sae w / flops` as a matrix product, or
    `batch q w` numbers in gathered rows. With n = nfm_top_k these are

        W_dec + W_lin in the output, again for the gradient of activations, and of the output's and
            the input's gradient for those of W_dec and W_enc                                       q = k, w = 4 d_in
        the same three of V                                                                         q = n, w = 3 nfm_dim
        the three of W_lin apart, where it reads fewer features (n < k)                             q = n, w = 3 d_in

    Rows that the last cache holds come faster than a large copy, so that small dictionaries could be below this floor.
    """
    cfg = joint_config(sizes)
    n = cfg.k if cfg.nfm_top_k is None else cfg.nfm_top_k
    itemsize = getattr(torch, sizes.dtype).itemsize
    multiplied = 2 * sizes.batch * sizes.d_sae / rates.flop_per_second
    gathered = sizes.batch * itemsize / rates.bytes_per_second
    products = [(cfg.k, 4 * cfg.d_in), (n, 3 * cfg.nfm_dim), (n, 3 * cfg.d_in if n < cfg.k else 0)]
    least = sum(columns * min(multiplied, gathered * n_read) for n_read, columns in products)
    moved = 9 * parameter_count(cfg) * itemsize / rates.bytes_per_second
    return cfg.d_in * multiplied + moved + least


def _row(case: Case, timings: dict[Case, Timings], peaks: dict[Case, int], rates: Rates) -> SpeedRow:
    (arm, sizes), topk = case, timings.get((TOPK, case[1]), Timings())
    step, inference = _median(timings[case].step), _median(timings[case].inference)
    floor = floor_seconds(sizes, rates) if arm in JOINT_ARMS else None
    same_arm = [other for other in timings if other[0] == arm]
    seconds = timings[case].step
    quartiles = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else None
    smaller = [_median(timings[other].step) for other in same_arm[: same_arm.index(case)]]
    return SpeedRow(
        arm=arm,
        d_sae=sizes.d_sae,
        nfm_dim=sizes.nfm_dim,
        step_seconds=step,
        step_quartiles=(quartiles[0], quartiles[-1]) if quartiles else None,
        step_over_topk=_ratio(step, _median(topk.step)),
        floor_seconds=floor,
        step_over_floor=_ratio(step, floor),
        peak_bytes=peaks.get(case),
        peak_over_topk=_ratio(peaks.get(case), peaks.get((TOPK, sizes))),
        inference_seconds=inference,
        inference_over_topk=_ratio(inference, _median(topk.inference)),
        step_over_previous=_ratio(step, smaller[-1]) if smaller else None,
        step_over_first=_ratio(step, smaller[0]) if smaller else None,
        reason=timings[case].reason,
    )


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


@contextmanager
def _threads(wanted: int | None) -> Generator[None]:
    had = torch.get_num_threads()
    torch.set_num_threads(wanted or had)
    try:
        yield
    finally:
        torch.set_num_threads(had)
