"""What the files for orchestrators share: names, what stands for an image or model not given, and machines that are alike.

Schedulers choose the machines, so a plan's nodes have to be of one kind, and its replicas of one shape.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace

from planc.diagnostics import Diagnostic
from planc.export import sglang, vllm
from planc.export.nodes import fitting, instances, of_amd
from planc.export.target import Job, refusal
from planc.verify import VerifiedPlan

IMAGE, MODEL = "${IMAGE}", "${MODEL}"  #: in the form that `envsubst` fills in; Kubernetes starts no such image
MAP_FOLDER = "/etc/planc/map"  #: where containers see the expert map
MOST_BYTES = (1 << 20) - (1 << 12)  #: of an expert map in a ConfigMap, which holds 1 MiB in all
_MOST_NAME = 24  #: pods of a multi-node Dynamo service are named after three objects, of 45 characters in all


def label(name: str) -> str:
    """A name as a DNS label (RFC 1035, which is RFC 1123 with a letter first) of at most 24 characters. Where that loses
    something it ends with a checksum, so that different names stay different."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"plan-{plain}"
    if plain == name and len(plain) <= _MOST_NAME:
        return plain
    checksum = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: _MOST_NAME - 7].rstrip('-')}-{checksum}"


def machine_faults(plan: VerifiedPlan, title: str) -> Iterator[Diagnostic]:
    """Why the machines of a plan for which `node_faults` finds nothing are not alike."""
    par, cluster = plan.parallelism, plan.spec.cluster
    used = cluster.group_of_rank[: par.world_size].tolist()
    kinds = dict.fromkeys(cluster.groups[group].gpu.name for group in sorted(set(used)))
    shapes = dict.fromkeys((len(one.nodes), one.gpus) for one in instances(plan))
    if len(kinds) > 1:
        message = f"ranks are on {' and '.join(kinds)}, and a scheduler that sees nodes alike may give them any"
        change = "give the cluster one group of nodes, or export sglang and start it node by node"
        yield refusal(title, message, change, "cluster.groups")
    elif len(shapes) > 1:
        (nodes, gpus), (others, other_gpus) = list(shapes)[:2]
        message = f"a replica is on {nodes} nodes with {gpus} GPUs each, and another on {others} with {other_gpus}"
        yield refusal(title, message, fitting(plan), "parallelism")


def machine_notes(plan: VerifiedPlan) -> Iterator[str]:
    """What of a plan's machines no scheduler is told."""
    if any((group.nvlink_domain or 0) > group.gpus_per_node for group in plan.spec.cluster.groups):
        yield "NVLink domains have several nodes: schedule an instance's nodes together, by the labels that your nodes have"


def placeholder_notes(image: str, model: str) -> Iterator[str]:
    """What is missing, where ``image`` or ``model`` is a placeholder."""
    missing = [value for value in (image, model) if value in (IMAGE, MODEL)]
    if missing:
        options = " and ".join("--image" if value == IMAGE else "--model" for value in missing)
        yield f"{' and '.join(missing)} must be filled in, by {options} or by envsubst: as it is, nothing starts"


def shape(plan: VerifiedPlan) -> dict[str, object]:
    """What every template is given: names, the instances as ``replicas`` of ``nodes`` with ``gpus`` each, and Kubernetes' name
    of these."""
    found = instances(plan)
    return {
        "name": plan.spec.name,
        "label": label(plan.spec.name),
        "replicas": len(found),
        "nodes": len(found[0].nodes),
        "gpus": found[0].gpus,
        "resource": "amd.com/gpu" if of_amd(plan) else "nvidia.com/gpu",
    }


def sglang_faults(job: Job, title: str) -> Iterator[Diagnostic]:
    """Why SGLang, or a scheduler of its nodes, cannot be told a plan."""
    faults = [replace(fault, message=f"{title} with {fault.message}") for fault in sglang.faults(job)]
    yield from faults or machine_faults(job.plan, title)


def sglang_options(plan: VerifiedPlan) -> list[tuple[str, str]]:
    """(flag, value) as `sglang.arguments`, with the map where containers see it."""
    return [(flag, f"{MAP_FOLDER}/{value}" if value == sglang.MAP else value) for flag, value in sglang.arguments(plan)]


def sglang_pods(job: Job) -> tuple[dict[str, object], list[str], list[tuple[str, bytes]]]:
    """SGLang in pods: the values of a template, the notes, and the map as a file where no ConfigMap can hold it."""
    plan = job.plan
    experts = sglang.expert_map(plan)
    fits = len(experts) <= MOST_BYTES
    image, model = job.image or IMAGE, job.model or MODEL
    notes = [*sglang.notes(job), *machine_notes(plan), *placeholder_notes(image, model)]
    if not fits:
        notes.append(
            f"{sglang.MAP} is too large for a ConfigMap: copy it into the volume claim {label(plan.spec.name)}-map"
        )
    values = shape(plan) | {
        "notes": notes,
        "image": image,
        "model": model,
        "options": sglang_options(plan),
        "variables": sglang.variables(plan),
        "map_name": sglang.MAP,
        "map_folder": MAP_FOLDER,
        "map": experts.decode() if fits else "",
    }
    return values, notes, [] if fits else [(sglang.MAP, experts)]


def verbatim(word: str) -> str:
    """A word for `command`, `args` or `env` of a container, where `$(NAME)` would be a variable and `$$` one `$`."""
    return word if word in (IMAGE, MODEL) else word.replace("$", "$$")


def vllm_job(job: Job) -> Job:
    """The same with options of vLLM's own target: a placement that is not vLLM's is a checkpoint relabelled for it."""
    return replace(job, options={"vllm.map": "permutation"})


def vllm_faults(job: Job, title: str) -> Iterator[Diagnostic]:
    """Why vLLM, or a scheduler of its nodes, cannot be told a plan. Changes that are options of vLLM's own target are none
    here."""
    faults = [
        replace(fault, message=f"{title} with {fault.message}", hint=fault.hint.partition(", or export with ")[0])
        for fault in vllm.faults(vllm_job(job))
    ]
    yield from faults or machine_faults(job.plan, title)
