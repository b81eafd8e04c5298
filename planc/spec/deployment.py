"""What is asked of the plan: workload, target, parallelism, expert rule, placement policy, claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, WithJsonSchema
from pydantic_core import PydanticCustomError

from planc.diagnostics import Diagnostic, Span
from planc.spec.cluster import Cluster
from planc.spec.fields import Degree, Name, PositiveSeconds, Seconds, Strict
from planc.spec.model import Model


class Workload(Strict):
    """The step that is planned. ``batch`` is the sequences in flight over the whole deployment; a decode step
    computes one token of each, a prefill step ``prefill_chunk`` prompt tokens per TP group (0: one whole prompt).
    The KV cache holds ``isl + osl`` tokens of every sequence."""

    phase: Literal["decode", "prefill"] = Field(
        default="decode", description="decode: one token of every sequence a step; prefill: prompt tokens"
    )
    batch: Annotated[int, Field(ge=1, le=10**8)] = Field(description="sequences in flight over the whole deployment")
    isl: Annotated[int, Field(ge=1, le=10**8)] = Field(description="input length in tokens")
    osl: Annotated[int, Field(ge=0, le=10**8)] = Field(default=0, description="output length in tokens")
    prefill_chunk: Annotated[int, Field(ge=0, le=10**8)] = Field(
        default=0, description="prefill: prompt tokens per TP group and step; 0: one whole prompt"
    )
    micro_batches: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="parts of a step that can overlap")

    @property
    def context(self) -> int:
        """Tokens of KV cache that every sequence may need."""
        return self.isl + self.osl


class Target(Strict):
    """What the deployment should reach."""

    tps: Annotated[float, Field(gt=0, le=1e12)] | None = None
    tpot: PositiveSeconds | None = None
    ttft: PositiveSeconds | None = None


def _read_stages(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and value and all(type(v) is int and v >= 1 for v in value):
        return tuple(value)
    raise PydanticCustomError("wrong_type", "expected the layers of each stage, such as `[31, 30]`")


Stages = Annotated[
    tuple[int, ...], BeforeValidator(_read_stages), WithJsonSchema({"type": "array", "items": {"type": "integer"}})
]


def _read_degree(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 10**6):
        return value
    if type(value) is int:
        raise PydanticCustomError("range", "{value} must be between 1 and 1,000,000", {"value": str(value)[:40]})
    raise PydanticCustomError("wrong_type", "expected a whole number or `auto`")


DegreeOrAuto = Annotated[
    int | Literal["auto"],
    BeforeValidator(_read_degree),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]


class ParallelismSpec(Strict):
    """Degrees, or ``auto``. ``expert_tp`` shards one expert over ranks of an NVLink domain."""

    dp: DegreeOrAuto = Field(default="auto", description="model replicas")
    pp: DegreeOrAuto = Field(default="auto", description="pipeline stages of a replica")
    ep: DegreeOrAuto = Field(default="auto", description="GPUs that hold the experts of one stage")
    tp: DegreeOrAuto = Field(default="auto", description="GPUs that share attention and dense layers")
    expert_tp: DegreeOrAuto = Field(default="auto", description="GPUs that share one expert")
    stages: Stages | None = Field(default=None, description="layers of each pipeline stage; default: balanced by cost")
    gating: Literal["leader", "sharded"] = Field(
        default="sharded", description="leader: the first rank of a TP group gates; sharded: each gates its tokens"
    )
    tp_comm: Literal["all_reduce", "reduce_scatter"] = Field(
        default="all_reduce", description="how attention's partial sums are reduced before an MoE block"
    )


class ExpertRule(Strict):
    """At most ``slots_per_gpu`` experts per GPU, of any one layer (``scope: layer``) or in all (``model``)."""

    scope: Literal["layer", "model"] = Field(default="layer", description="experts counted: of one layer, or of all")
    slots_per_gpu: Annotated[int, Field(ge=1, le=65536)] = Field(default=1, description="most experts per GPU")
    on_overflow: Literal["rounds", "error"] = Field(
        default="rounds", description="more experts than slots: run them in turns, or refuse the plan"
    )
    spares: Literal["auto", "idle", "replicate"] = Field(
        default="auto", description="spare slots: empty, or further copies; auto: copies where traffic is known"
    )


def _read_rule(value: object) -> object:
    if isinstance(value, str) and value != "none":
        raise PydanticCustomError(
            "choice", "`{value}` is not an expert rule: give a mapping or `none`", {"value": value[:40]}
        )
    return value


RuleOrNone = Annotated[ExpertRule | Literal["none"], BeforeValidator(_read_rule)]


class PlacementSpec(Strict):
    """How experts are assigned to ranks. ``policy``: a key of `planc.placement.POLICIES`, or `topology`, which plans for
    known traffic and the links it takes, or `given`, which takes an expert map from a file; `auto` is `given` where the spec
    names a map, else `topology` where it gives traffic, else `linear`."""

    policy: Name = Field(default="auto", description="auto, linear, round_robin, topology or given")
    objective: Literal["link", "balance"] = Field(
        default="link", description="topology: what comes first, the busiest link or the fullest GPU"
    )
    transfer: Literal["dedup", "direct"] = Field(
        default="dedup", description="topology: dispatch sends one copy per node (dedup) or per expert (direct)"
    )
    seed: Annotated[int, Field(ge=0, le=2**31)] = Field(default=0, description="topology: seed of the search")
    current: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="topology: file of the expert map that runs now; fewest bytes are moved from it"
    )
    map: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="given: file of an expert map, as an engine or a balancer writes it"
    )


class TrafficSpec(Strict):
    """Where tokens go: a recorded file, or a generator. Generated: ``popularity`` of experts (`zipf`: rank^-exponent;
    `lognormal`: exp(exponent · normal); `power_law`: Pareto draws of index exponent), and ``topics`` groups of tokens that
    prefer the same experts, with ``strength`` in logits. Group limits are those of the model's gate."""

    file: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="recorded: npz, npy, json or jsonl with token choices or expert loads"
    )
    popularity: Literal["uniform", "zipf", "lognormal", "power_law"] = "uniform"
    exponent: Annotated[float, Field(ge=0, le=10)] = Field(default=1.0, description="how skewed the popularity is")
    topics: Annotated[int, Field(ge=0, le=4096)] = Field(default=0, description="0: experts are chosen independently")
    strength: Annotated[float, Field(ge=0, le=20)] = Field(default=2.0, description="pull of a topic on its experts")
    tokens: Annotated[int, Field(ge=2, le=1_000_000)] = Field(default=4096, description="tokens to generate")
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0


class Execution(Strict):
    """How an engine runs the step: what prices and schedule assume beside the graph."""

    all_to_all: Literal["auto", "low_latency", "normal"] = Field(
        default="auto",
        description="low_latency: a copy of a token per expert; normal: one per node; auto: by phase, decode low_latency",
    )
    compute_streams: Annotated[int, Field(ge=1, le=8)] = Field(default=1, description="kernels at a time on a GPU")
    communication_streams: Annotated[int, Field(ge=1, le=8)] = Field(
        default=1, description="transfers at a time on a GPU"
    )
    expert_chunks: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="experts start when 1/n of their tokens have come, and read their weights n times"
    )
    tokens_per_step: Annotated[float, Field(ge=1, le=64)] = Field(
        default=1.0,
        description="tokens that a decode step yields a sequence, with speculative tokens that are accepted",
    )
    step_overhead: Seconds = Field(default=0.0, description="time of the engine between two steps")
    serving: Literal["apart", "together"] = Field(
        default="apart", description="together: the GPUs that decode also prefill, in turns"
    )


class Claim(Strict):
    """A figure somebody stated about this deployment: data to check, never a number to reproduce."""

    name: Name
    source: Annotated[str, Field(max_length=500)] = ""
    tps: Annotated[float, Field(gt=0, le=1e12)] | None = None
    tpot: PositiveSeconds | None = None
    gpus: Degree | None = None
    latency_split: dict[Name, Annotated[float, Field(ge=0, le=1)]] | None = None


class Spec(Strict):
    """A whole deployment spec, includes and presets resolved.

    `span` gives the place of a dotted key in the file it came from, and `sources` the stated source of a value;
    both are empty for a spec made in code.
    """

    name: Name
    description: Annotated[str, Field(max_length=2000)] = ""
    model: Model
    cluster: Cluster
    workload: Workload
    target: Target = Target()
    parallelism: ParallelismSpec = ParallelismSpec()
    expert_rule: RuleOrNone = ExpertRule()
    execution: Execution = Execution()
    placement: PlacementSpec = PlacementSpec()
    traffic: TrafficSpec | None = None
    scenarios: Annotated[dict[Name, TrafficSpec], Field(max_length=16, default_factory=dict)]
    claims: Annotated[tuple[Claim, ...], Field(max_length=64, strict=False)] = ()

    _places: dict[str, Span] = PrivateAttr(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _folder: Path = PrivateAttr(default=Path("."))

    @property
    def folder(self) -> Path:
        """Where the files that the spec names are: the folder of the spec's own file."""
        return self._folder

    @property
    def replicates(self) -> bool:
        """Whether spare slots hold further copies."""
        rule = self.expert_rule
        if not isinstance(rule, ExpertRule):
            return False
        known = self.traffic is not None or self.policy == "given"
        return rule.spares == "replicate" or (rule.spares == "auto" and known)

    @property
    def policy(self) -> str:
        """The placement policy, `auto` resolved."""
        if self.placement.policy != "auto":
            return self.placement.policy
        return "given" if self.placement.map else "linear" if self.traffic is None else "topology"

    @property
    def sources(self) -> dict[str, str]:
        """Dotted key -> the source stated for its value."""
        return self._sources

    def span(self, dotted: str) -> Span | None:
        """Place of the key's value, else of its nearest parent that has one."""
        while dotted and dotted not in self._places:
            dotted = dotted.rpartition(".")[0]
        return self._places.get(dotted)

    def fault(self, code: str, message: str, path: str, hint: str = "", related: tuple[str, ...] = ()) -> Diagnostic:
        """An error at the place of ``path``."""
        return Diagnostic(code, message, path, self.span(path), hint, related)
