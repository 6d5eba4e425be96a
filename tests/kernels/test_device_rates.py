"""Which form a product has by the rates of its device, and how these are measured."""

import pytest
import torch

from sae_nfm.kernels import device_rates, dispatch
from sae_nfm.kernels.device_rates import CPU


def test_the_choice_follows_the_rates():
    flops, gathered = CPU
    crossing = round(1_000_000 * gathered / (2 * flops))
    assert dispatch.choose(1_000_000, crossing - 1, "cpu") == "sparse"
    assert dispatch.choose(1_000_000, crossing + 1, "cpu") == "dense"


@pytest.mark.parametrize(
    ("d_sae", "k", "device", "dtype", "expected"),
    [
        (8192, 32, "cpu", torch.float32, "sparse"),
        (50_000, 1024, "cpu", torch.float32, "sparse"),
        (50_000, 25_000, "cpu", torch.float32, "dense"),
        (50_000, 32, "mps", torch.float32, "dense"),
        # a GPU by its data sheet, as none is there
        (24_576, 32, "cuda", torch.float32, "sparse"),
        (50_000, 32, "cuda", torch.bfloat16, "sparse"),
        (50_000, 1024, "cuda", torch.bfloat16, "dense"),
        (50_000, 512, "cuda", torch.float32, "sparse"),
    ],
)
def test_the_choice_at_known_sizes(monkeypatch, d_sae, k, device, dtype, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose(d_sae, k, device, dtype) == expected


def test_rates_are_work_over_time(monkeypatch):
    """1 s for the product 2 * 8 * 4 * 16 FLOP, 2 s for 8 tokens' 3 rows of 4 float32."""
    for name, size in {"TOKENS": 8, "ACTIVE": 3, "FEATURES": 16, "WIDTH": 4}.items():
        monkeypatch.setattr(device_rates, name, size)
    seconds = iter([1.0, 2.0])

    def timed(work, device):
        work()
        return next(seconds)

    monkeypatch.setattr(device_rates, "_seconds", timed)
    before = torch.get_rng_state()
    assert device_rates.measure_rates(torch.device("cpu"), torch.bfloat16) == (1024, 192)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_of_float32_are_measured_in_float32_under_autocast(monkeypatch):
    for name, size in {"TOKENS": 8, "ACTIVE": 3, "FEATURES": 16, "WIDTH": 4}.items():
        monkeypatch.setattr(device_rates, name, size)
    made = []

    def timed(work, device):
        made.append(work().dtype)
        return 1.0

    monkeypatch.setattr(device_rates, "_seconds", timed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        device_rates.measure_rates(torch.device("cpu"), torch.float32)
    assert made == [torch.float32, torch.float32]


def test_the_median_time_leaves_the_first_call_out(monkeypatch):
    monkeypatch.setattr(device_rates, "LAUNCHES", 1)
    ticks = iter([0.0, 100.0, *(value for second in (1.0, 5.0, 3.0, 2.0, 4.0) for value in (0.0, second))])
    monkeypatch.setattr(device_rates.time, "perf_counter", lambda: next(ticks))
    assert device_rates._seconds(lambda: torch.zeros(()), torch.device("cpu")) == 3.0
