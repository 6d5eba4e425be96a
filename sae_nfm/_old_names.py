"""Modules of 0.1.0 that its documentation named, importable under their old names until 0.3, with a warning."""

import sys
import warnings
from functools import reduce
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from typing_extensions import override

MOVED: dict[str, str] = {
    "adapter": "convert.adapter",
    "attribute": "attribution.run attribution.results",
    "baselines": "comparison.arms",
    "behaviour": "evaluation.fidelity",
    "benchmark": "comparison.run",
    "claims": "comparison.results",
    "compare": "comparison.run",
    "compare_config": "comparison.config",
    "compare_results": "comparison.results",
    "config": "architectures.joint_config",
    "controls": "interventions.equal_norm_controls",
    "corpus_attribution": "attribution.run attribution.results",
    "dictionary_learning_checkpoint": "convert.dictionary_learning",
    "direct_path": "attribution.direct_logits",
    "distributions": "stats.distributions",
    "documents": "data.documents",
    "dry_run": "profiling.requirements",
    "dry_run_result": "profiling.results",
    "editing": "interventions.edits",
    "edits": "interventions.edits",
    "error_ratios": "evaluation.error_controls",
    "experiment": "profiling.requirements profiling.results",
    "explore": "explorer.run",
    "explorer_data": "explorer.results",
    "explorer_file": "explorer.results",
    "explorer_parts": "explorer.assemble",
    "factorial": "experiments.factorial.run",
    "factorial_result": "experiments.factorial.results",
    "figure_rows": "analysis.sae_report analysis.results",
    "functional": "analysis.path_contributions",
    "gauge": "analysis.gauge architectures.nfm_config",
    "gauge_report": "analysis.sae_report",
    "heads": "kernels.heads",
    "hooks": "interventions.intervene",
    "interaction": "kernels.reference",
    "interaction_graph": "attribution.graph attribution.results",
    "learning_dynamics": "experiments.dynamics.run",
    "learning_dynamics_result": "experiments.dynamics.results",
    "linear_part": "analysis.linear_component",
    "matched_training": "training.multi_arm",
    "neuronpedia": "explorer.neuronpedia",
    "nfm_fields": "architectures.nfm_config",
    "norms": "analysis.weight_norms",
    "pair_batches": "attribution.pair_table",
    "pair_corpus": "attribution.pair_table attribution.results",
    "pair_effects": "attribution.pair_effects",
    "pair_weights": "attribution.pair_table attribution.results",
    "pairing": "stats.estimates",
    "paths": "architectures.nfm_paths",
    "pretrained": "hub.release",
    "prompt_attribution": "attribution.pair_effects attribution.results",
    "release": "hub.release",
    "report.theme": "report.plots",
    "reproduce": "experiments.reproduce.run",
    "reproduced_result": "experiments.reproduce.results",
    "resampling": "stats.estimates",
    "results": "comparison.results",
    "resume": "training.resume",
    "sae": "architectures.joint_sae",
    "sae_by_name": "loading.saelens",
    "saebench": "evaluation.saebench",
    "saebench_config": "evaluation.saebench",
    "secondary": "architectures.secondary interventions.intervene",
    "secondary_command": "experiments.secondary.run",
    "secondary_figures": "experiments.secondary.measure",
    "secondary_result": "experiments.secondary.results",
    "secondary_training": "experiments.secondary.training",
    "sequential": "architectures.sequential_sae",
    "sequential_config": "architectures.sequential_config",
    "sequential_training": "architectures.sequential_training",
    "sources": "data.datasets",
    "sparsify_checkpoint": "convert.sparsify",
    "speed": "profiling.run",
    "speed_result": "profiling.results",
    "splicing": "models.splicing",
    "statistics": "stats.estimates",
    "steering": "interventions.steering",
    "steering_result": "interventions.results",
    "stimuli": "experiments.factorial.stimuli",
    "token_reads": "attribution.pairs",
    "token_rows": "evaluation.token_table",
    "training_sae": "architectures.joint_training",
    "verdicts": "stats.seed_document_test",
    "warm_start": "convert.warm_start",
}
"""The old module, and the new one with others that took some of its names; their package is looked in last."""
RENAMED = {
    "BenchmarkConfig": "DemoConfig",
    "BenchmarkResult": "CompareResult",
    "Comparison": "Change",
    "Row": "CompareRow",
    "run_benchmark": "compare_once",
    "read": "Explorer.load",
    "write": "Explorer.save",
}
"""Names in these modules that have changed."""


class _Attribute(ModuleType):
    """The old module, called as the function that has its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("sae_nfm.attribution").attribution_table(*args, **kwargs)


class OldNames(MetaPathFinder, Loader):
    """Finds what no other finder does."""

    @override
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.removeprefix("sae_nfm.") in MOVED else None

    @override
    def exec_module(self, module: ModuleType) -> None:
        new, *others = (f"sae_nfm.{name}" for name in MOVED[module.__name__.removeprefix("sae_nfm.")].split())
        warnings.warn(f"{module.__name__} is {new} now; the old name goes with 0.3", FutureWarning, stacklevel=2)
        places = [import_module(name) for name in (new, *others, new.rpartition(".")[0])]

        def found(name: str) -> Any:
            first, *rest = RENAMED.get(name, name).split(".")
            for place in places:
                if not first.startswith("__") and hasattr(place, first):
                    return reduce(getattr, rest, getattr(place, first))
            raise AttributeError(f"{new} has no {name!r}, nor has its package")

        module.__dict__["__getattr__"] = found
        if module.__name__ == "sae_nfm.attribute":  # it is a function now, which the old module would hide
            module.__class__ = _Attribute


def answer_to_old_names() -> None:
    """Install the finder, once."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != OldNames.__name__]
    sys.meta_path.append(OldNames())
