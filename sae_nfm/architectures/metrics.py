"""What each path contributed to one training batch: error as paths are added, magnitude, share.

The values are callables: SAELens evaluates metrics when it logs, so steps that are not logged pay nothing.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Metric = Callable[[], Tensor]


def path_metrics(
    sae_in: Tensor, sae_out: Tensor, paths: Mapping[str, Tensor], token_scale: Tensor | float
) -> dict[str, Metric]:
    """Metrics of one batch, by name, each a callable that returns a 0-d tensor.

    - `fvu_all`, `fvu_direct`, `fvu_direct+linear`, ...: fraction of the batch's variance left unexplained by the direct
      path alone, by it and one further path, and by all.
    - `magnitude_<path>`: mean absolute value of what the path writes.
    - `share_<path>`: that magnitude over the sum of the integration paths' (the paper's "94 % linear, 6 % nonlinear").

    Args:
        sae_in: [batch, d_in].
        sae_out: [batch, d_in], the output of all paths.
        paths: name -> [batch, d_in], in the SAE's normalised space; the first is the direct path.
        token_scale: length in the input's space of a unit in the normalised space: [batch, 1], or one number for all.

    Source: arXiv 2507.00269, component analysis.
    """
    integration = [name for name in paths if name != "direct"]

    def fvu(kept: list[str]) -> Metric:
        left_out = [paths[name] for name in paths if name not in kept]

        def compute() -> Tensor:
            error = sae_in.float() - sae_out.float()
            for path in left_out:
                error = error + path.float() * token_scale
            return error.square().sum() / (sae_in.float() - sae_in.float().mean(0)).square().sum()

        return compute

    def magnitude(name: str) -> Metric:
        return lambda: (paths[name].float() * token_scale).abs().mean()

    def share(name: str) -> Metric:
        return lambda: magnitude(name)() / torch.stack([magnitude(other)() for other in integration]).sum()

    metrics = {"fvu_all": fvu(list(paths))}
    if integration:
        metrics["fvu_direct"] = fvu(["direct"])
    if len(integration) > 1:
        metrics |= {f"fvu_direct+{name}": fvu(["direct", name]) for name in integration}
    metrics |= {f"magnitude_{name}": magnitude(name) for name in paths}
    metrics |= {f"share_{name}": share(name) for name in integration}
    return metrics
