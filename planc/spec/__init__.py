"""What is asked: reading, validating and cross-checking specs."""

from planc.spec.check import check_spec
from planc.spec.cluster import LINK_CLASSES, Cluster
from planc.spec.deployment import ExpertRule, Spec
from planc.spec.load import (
    load_cluster,
    load_gpu,
    load_model,
    load_spec,
    load_target,
    parse_spec,
    preset_names,
    shipped_folder,
)
from planc.spec.model import Model, parameter_counts

__all__ = [
    "LINK_CLASSES",
    "Cluster",
    "ExpertRule",
    "Model",
    "Spec",
    "check_spec",
    "load_cluster",
    "load_gpu",
    "load_model",
    "load_spec",
    "load_target",
    "parameter_counts",
    "parse_spec",
    "preset_names",
    "shipped_folder",
]
