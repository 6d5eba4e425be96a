"""What training SAEs with added paths share: dropout, the metrics of each path, histograms."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from sae_nfm.architectures.nfm_paths import NFMPaths, Paths

_Host = TrainingSAE[Any] if TYPE_CHECKING else object


class TrainedPaths(NFMPaths, _Host):
    """In steps that SAELens logs, `TrainStepOutput.metrics` has each path's error, magnitude and share (see `metrics`),
    computed only when read. Dropout acts within a training step alone.
    """

    keep_paths = False
    """Whether `metrics` has them also in steps that SAELens does not log."""
    _in_training_step = False
    _step_paths: Paths | None = None

    @contextmanager
    def _training_step(self) -> Generator[None]:
        """Within it dropout acts, and the paths of the last `decode_paths` are kept."""
        self._in_training_step = True
        try:
            yield
        finally:
            self._in_training_step = False

    def _taken_paths(self) -> Paths:
        """What the paths wrote in this step; they are not kept beyond it."""
        assert self._step_paths is not None
        paths, self._step_paths = self._step_paths, None
        return paths

    @override
    def _dropout(self, pooled: Tensor) -> Tensor:
        return F.dropout(pooled, self.cfg.nfm_dropout, training=self._in_training_step)

    @override
    def decode_paths(self, feature_acts: Tensor) -> Paths:
        paths = super().decode_paths(feature_acts)
        if self._in_training_step:
            self._step_paths = paths
        return paths

    def _shows_paths(self, step_input: TrainStepInput) -> bool:
        return self.keep_paths or step_input.is_logging_step

    def _add_metrics(self, output: TrainStepOutput, step_input: TrainStepInput, paths: Paths) -> None:
        scale, shown = self._token_scale(step_input.sae_in), self._shows_paths(step_input)
        detached = {name: path.detach() for name, path in paths.present().items()} if shown else {}
        output.metrics.update(path_metrics(step_input.sae_in, output.sae_out.detach(), detached, scale))

    def _token_scale(self, sae_in: Tensor) -> Tensor | float:  # noqa: ARG002
        """Length in the input's space of a unit vector in the space of the paths, [*batch, 1] where it varies by token."""
        return 1.0

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Row norms of W_dec, as every SAE of SAELens logs them, and of the NFM's weights that read features: [d_sae] each."""
        rows = {name: getattr(self, name) for name in ("W_lin", "V", "U") if hasattr(self, name)}
        norms = {f"weights/{name}_norms": weight.float().norm(dim=1).cpu().numpy() for name, weight in rows.items()}
        return super().log_histograms() | norms


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
