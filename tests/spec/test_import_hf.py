"""`import_config`: published sizes come out, nothing is guessed, and every fault of a config is reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from planc.diagnostics import Diagnostic, PlancError
from planc.spec.hf import ARCHITECTURES, MODEL_TYPES, import_config, to_yaml
from planc.spec.load import load_model
from planc.spec.model import Model, gate_parameters, parameter_counts
from planc.spec.text import parse_yaml

CONFIGS = Path(__file__).parent / "hf_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def config_of(name: str) -> dict[str, Any]:
    """The JSON of one of our configs."""
    value: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return value


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[Diagnostic]]]:
    """Import a shipped config with keys changed; None removes one."""

    def run(name: str, **changes: Any) -> tuple[dict[str, Any], list[Diagnostic]]:
        config = {k: v for k, v in (config_of(name) | changes).items() if k not in changes or v is not None}
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(config, indent=1))
        return import_config(path)

    return run


def model_of(name: str) -> Model:
    """The model that the config imports to."""
    return Model.model_validate(import_config(CONFIGS / f"{name}.json")[0])


# --- published totals --------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A stated pair of counts, in units of 1e9, with the relative tolerance that its rounding and rules justify."""

    total: float
    active: float
    source: str
    total_within: float = 0.005
    active_within: float = 0.02
    adjust: Callable[[Model], tuple[float, float]] = lambda model: (0, 0)
    why: str = ""


def without_embedding(model: Model) -> tuple[float, float]:
    """Added to (total, active) where the embedding table is not counted as active."""
    return 0, -parameter_counts(model)["embedding"]


def glm_rule(model: Model) -> tuple[float, float]:
    """GLM-4.5's stated rule: without embedding and head, with one MTP layer (an MoE layer and a 2h × h projection)."""
    counts = parameter_counts(model)
    assert model.moe is not None
    layer = counts["attention"] / model.layers + counts["shared_experts"] / 89 + gate_parameters(model)
    layer += 2 * model.hidden**2
    expert = counts["experts"] / 89 / model.moe.experts
    outside = counts["embedding"] + counts["head"]
    return layer + model.moe.experts * expert - outside, layer + model.moe.top_k * expert - outside


def one_more_moe_layer(model: Model) -> tuple[float, float]:
    """As many MoE layers as layers: what 1.04 T is consistent with; the released config has one dense layer."""
    assert model.moe is not None
    counts, n = parameter_counts(model), len(model.moe_layer_ids)
    return (counts["experts"] + counts["shared_experts"]) / n - counts["dense_mlp"], 0


PUBLISHED = {
    "deepseek-v3": Published(671, 37, "arXiv 2412.19437, abstract"),
    "deepseek-v2": Published(236, 21, "arXiv 2405.04434, abstract"),
    "mixtral-8x7b": Published(46.7, 12.9, "mistral.ai announcement of Mixtral 8x7B"),
    "qwen2-57b-a14b": Published(57.4, 14, "arXiv 2407.10671 and the model card of Qwen2-57B-A14B"),
    "qwen3-235b-a22b": Published(235, 22, "arXiv 2505.09388, abstract"),
    "gpt-oss-120b": Published(
        *(116.83, 5.13, "arXiv 2508.10925, table 1"),
        total_within=0.0005,
        active_within=0.001,
        adjust=without_embedding,
        why="the model card counts the head as active and the embedding not",
    ),
    "kimi-k2": Published(
        *(1040, 32, "arXiv 2507.20534, abstract; arXiv 2508.06471, table 1, has 1,043 B"),
        active_within=0.03,
        adjust=one_more_moe_layer,
        why="the released config sums to 1.026 T; 32 is coarse: 32.9 with the embedding table, 31.7 without",
    ),
    "glm-4.5": Published(
        *(355, 32, "arXiv 2508.06471, table 1"),
        total_within=0.002,
        adjust=glm_rule,
        why="the report counts the MTP layer, and neither embedding nor head",
    ),
    "olmoe-1b-7b": Published(6.9, 1.3, "arXiv 2409.02060, table 1"),
    "llama-4-maverick": Published(400, 17, "Llama 4 model card", why="the text model; the vision tower is left out"),
    "llama-3.1-8b": Published(8.03, 8.03, "safetensors count on the model's page", 0.0005, 0.0005),
}


def test_every_config_has_a_published_count() -> None:
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    stated, model = PUBLISHED[name], model_of(name)
    counts = parameter_counts(model)
    total_more, active_more = stated.adjust(model)
    assert (counts["total"] + total_more) / 1e9 == pytest.approx(stated.total, rel=stated.total_within)
    assert (counts["active"] + active_more) / 1e9 == pytest.approx(stated.active, rel=stated.active_within)


def test_counts_that_are_known_to_the_last_parameter() -> None:
    """Sums of tensor sizes in the published checkpoints."""
    assert parameter_counts(model_of("mixtral-8x7b"))["total"] == 46_702_792_704
    assert parameter_counts(model_of("llama-3.1-8b"))["total"] == 8_030_261_248


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_is_what_its_config_imports_to(name: str) -> None:
    shipped, imported = load_model(name), model_of(name)
    assert parameter_counts(shipped) == parameter_counts(imported)
    assert shipped.model_copy(update={"source": ""}) == imported.model_copy(update={"source": ""})


def test_every_architecture_is_tested_and_has_a_model_type() -> None:
    assert {config_of(name)["architectures"][0] for name in NAMES} == set(ARCHITECTURES)
    assert set(MODEL_TYPES.values()) == set(ARCHITECTURES)
    for name in NAMES:
        assert MODEL_TYPES[config_of(name)["model_type"]] == config_of(name)["architectures"][0]


# --- what is read ------------------------------------------------------------------------------------------------


def test_layers_of_each_kind() -> None:
    assert model_of("deepseek-v3").moe_layer_ids == tuple(range(3, 61))
    assert model_of("llama-4-maverick").moe_layer_ids == tuple(range(1, 48, 2))
    assert model_of("mixtral-8x7b").dense_layer_ids == ()
    assert model_of("llama-3.1-8b").moe_layer_ids == ()


@pytest.mark.parametrize(
    ("name", "changes", "moe_layers"),
    [
        ("deepseek-v3", {"moe_layer_freq": 2}, [i for i in range(3, 61) if i % 2 == 0]),
        ("qwen3-235b-a22b", {"decoder_sparse_step": 2, "intermediate_size": 12288}, list(range(1, 94, 2))),
        ("qwen3-235b-a22b", {"mlp_only_layers": [0, 5], "intermediate_size": 12288}, [1, 2, 3, 4, *range(6, 94)]),
        ("glm-4.5", {"first_k_dense_replace": 0}, list(range(92))),
    ],
)
def test_moe_layers_by_rule(read: Any, name: str, changes: dict[str, Any], moe_layers: list[int]) -> None:
    assert list(Model.model_validate(read(name, **changes)[0]).moe_layer_ids) == moe_layers


def test_listed_moe_layers_of_llama_4(read: Any) -> None:
    text = config_of("llama-4-maverick")["text_config"] | {"moe_layers": [3, 4, 9]}
    assert read("llama-4-maverick", text_config=text)[0]["moe_layers"] == "3-4,9"


def test_biases_norms_and_gates() -> None:
    gpt, glm, qwen2 = model_of("gpt-oss-120b"), model_of("glm-4.5"), model_of("qwen2-57b-a14b")
    assert gpt.attention.bias and gpt.attention.out_bias and gpt.moe and gpt.moe.gate_bias and gpt.moe.expert_bias
    assert glm.attention.bias and not glm.attention.out_bias and glm.attention.qk_norm and glm.moe
    assert glm.moe.gate == "sigmoid" and glm.moe.gate_bias
    assert qwen2.attention.bias and not qwen2.attention.out_bias
    assert qwen2.moe and qwen2.moe.shared_gate and qwen2.moe.shared_width == 20480
    v3 = model_of("deepseek-v3").moe
    assert v3 and (v3.groups, v3.top_groups, v3.gate, v3.gate_bias) == (8, 4, "sigmoid", True)


def test_head_dim_given_and_derived(read: Any) -> None:
    assert model_of("qwen3-235b-a22b").attention.head_dim == 128  # hidden / heads would be 64
    assert model_of("llama-3.1-8b").attention.head_dim == 128
    assert read("llama-3.1-8b", head_dim=64)[0]["attention"]["head_dim"] == 64


def test_a_null_query_rank_projects_directly(tmp_path: Path) -> None:
    path = tmp_path / "lite.json"
    path.write_text(json.dumps(config_of("deepseek-v2") | {"q_lora_rank": None}))
    assert "q_lora_rank" not in import_config(path)[0]["attention"]


@pytest.mark.parametrize(
    ("changes", "dtypes"),
    [
        ({}, {"weights": "bf16"}),
        ({"torch_dtype": "float16"}, {"weights": "fp16", "kv_cache": "fp16", "activations": "fp16"}),
        ({"torch_dtype": None, "dtype": "bfloat16"}, {"weights": "bf16"}),
        ({"torch_dtype": "float32"}, {"weights": "bf16"}),
        ({"quantization_config": {"quant_method": "fp8"}}, {"weights": "fp8"}),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, {"weights": "fp8"}),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"weights": "bf16"}),
    ],
)
def test_dtypes(read: Any, changes: dict[str, Any], dtypes: dict[str, str]) -> None:
    assert read("mixtral-8x7b", **changes)[0]["dtypes"] == dtypes


def test_model_type_stands_in_for_architectures(read: Any) -> None:
    tree, notes = read("kimi-k2", architectures=None)
    assert tree["moe"]["experts"] == 384
    assert any("`model_type`" in n.message for n in notes)


def test_the_name_comes_from_the_config_the_file_or_the_folder(tmp_path: Path, read: Any) -> None:
    assert read("mixtral-8x7b", _name_or_path="mistralai/Mixtral-8x7B-v0.1")[0]["name"] == "Mixtral-8x7B-v0.1"
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / "mixtral-8x7b.json").read_text())
    assert import_config(folder / "config.json")[0]["name"] == "my model"
    assert read("mixtral-8x7b", _name_or_path="\"<'\\")[0]["name"] == "changed"


# --- notes: defaults, and parts left out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "default"),
    [
        ("qwen3-235b-a22b", "decoder_sparse_step", "1"),
        ("qwen3-235b-a22b", "mlp_only_layers", "[]"),
        ("deepseek-v3", "moe_layer_freq", "1"),
        ("deepseek-v3", "scoring_func", '"sigmoid"'),
        ("deepseek-v3", "topk_method", '"noaux_tc"'),
        ("deepseek-v3", "n_group", "8"),
        ("mixtral-8x7b", "tie_word_embeddings", "false"),
        ("gpt-oss-120b", "attention_bias", "true"),
        ("llama-3.1-8b", "attention_bias", "false"),
    ],
)
def test_a_documented_default_is_used_with_a_note(read: Any, name: str, key: str, default: str) -> None:
    tree, notes = read(name, **{key: None})
    assert tree | {"name": "", "source": ""} == import_config(CONFIGS / f"{name}.json")[0] | {"name": "", "source": ""}
    (note,) = [n for n in notes if f"`{key}` is not in the config" in n.message]
    assert note.severity == "note" and note.code == "PLN020" and f"default {default} is used" in note.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepseek-v3", "multi-token-prediction layers are left out"),
        ("deepseek-v3", "checkpoint is FP8"),
        ("gpt-oss-120b", '"mxfp4"`, which planc does not plan: planned as bf16'),
        ("gpt-oss-120b", "attention sinks"),
        ("gpt-oss-120b", "full attention, an upper bound"),
        ("llama-4-maverick", "vision tower is left out"),
        ("olmoe-1b-7b", "norms of q and k"),
    ],
)
def test_what_is_left_out_is_noted(name: str, text: str) -> None:
    notes = import_config(CONFIGS / f"{name}.json")[1]
    assert [n.severity for n in notes if text in n.message] == ["note"]


def test_nothing_is_noted_that_is_not_so() -> None:
    assert import_config(CONFIGS / "qwen3-235b-a22b.json")[1] == []


# --- faults ------------------------------------------------------------------------------------------------------

NEEDED = {
    "deepseek-v3": {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "vocab_size": "vocab",
        "num_attention_heads": "attention.heads",
        "kv_lora_rank": "attention.kv_lora_rank",
        "n_routed_experts": "moe.experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.intermediate",
        "intermediate_size": "dense_mlp.intermediate",
    },
    "mixtral-8x7b": {"num_local_experts": "moe.experts", "num_key_value_heads": "attention.kv_heads"},
    "gpt-oss-120b": {"head_dim": "attention.head_dim"},
    "qwen2-57b-a14b": {"shared_expert_intermediate_size": "moe.shared_intermediate"},
}


@pytest.mark.parametrize(("name", "key", "path"), [(n, k, p) for n, row in NEEDED.items() for k, p in row.items()])
def test_a_missing_field_names_both_keys(read: Any, name: str, key: str, path: str) -> None:
    with pytest.raises(PlancError) as caught:
        read(name, **{key: None})
    (fault,) = caught.value.diagnostics
    assert fault.code == "PLN020" and fault.severity == "error" and fault.path == path
    assert f"`{key}`" in fault.message and f"`{path}`" in fault.message


def test_all_faults_come_at_once_with_their_places(read: Any) -> None:
    with pytest.raises(PlancError) as caught:
        read("deepseek-v3", hidden_size="big", n_routed_experts=10**30, vocab_size=None, scoring_func="tanh")
    faults = {f.path: f for f in caught.value.diagnostics}
    assert set(faults) == {"hidden", "moe.experts", "vocab", "moe.gate"}
    assert {f.code for f in faults.values()} == {"PLN020"}
    span = faults["hidden"].span
    assert span is not None and (span.line, span.column, span.width) == (6, 2, len('"hidden_size"'))
    assert "more than 15 digits" in faults["moe.experts"].message


@pytest.mark.parametrize("value", [True, 1.5, -1, 0, 10**9, "7168", [7168], {}, float("nan"), float("inf")])
def test_a_size_is_a_sensible_whole_number(read: Any, value: object) -> None:
    with pytest.raises(PlancError) as caught:
        read("llama-3.1-8b", hidden_size=value)
    (fault,) = caught.value.diagnostics
    assert (fault.code, fault.path) == ("PLN020", "hidden") and "`hidden_size` is " in fault.message


def test_a_head_dim_that_cannot_be_derived_is_missing(read: Any) -> None:
    with pytest.raises(PlancError, match="`head_dim` is not in the config"):
        read("llama-3.1-8b", num_attention_heads=36)


@pytest.mark.parametrize(
    ("name", "changes", "path"),
    [
        ("mixtral-8x7b", {"tie_word_embeddings": "no"}, "tied_embeddings"),
        ("mixtral-8x7b", {"torch_dtype": 16}, "dtypes.weights"),
        ("mixtral-8x7b", {"quantization_config": "fp8"}, "dtypes.weights"),
        ("qwen3-235b-a22b", {"mlp_only_layers": [94]}, "moe_layers"),
        ("qwen3-235b-a22b", {"mlp_only_layers": "none"}, "moe_layers"),
        ("qwen3-235b-a22b", {"decoder_sparse_step": 95, "intermediate_size": 1}, "moe_layers"),
        ("llama-4-maverick", {"text_config": [1]}, "layers"),
        ("mixtral-8x7b", {"architectures": 7}, "name"),
        ("mixtral-8x7b", {"architectures": None, "model_type": None}, "name"),
    ],
)
def test_an_unusable_field_is_refused(read: Any, name: str, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(PlancError) as caught:
        read(name, **changes)
    (fault,) = caught.value.diagnostics
    assert (fault.code, fault.path) == ("PLN020", path)
    assert any(f"`{key}` " in fault.message for key in changes) or "no layer is an MoE layer" in fault.message


def test_an_unknown_architecture_says_what_could_be_read(read: Any) -> None:
    with pytest.raises(PlancError) as caught:
        read("mixtral-8x7b", architectures=["MixtralForCausalLM2"], num_local_experts=None)
    (fault,) = caught.value.diagnostics
    assert fault.code == "PLN019" and "DeepseekV3ForCausalLM" in fault.message
    assert "could be read: `layers` = `32` from `num_hidden_layers`" in fault.related
    assert "not found: `moe.experts`" in fault.related
    assert "moe.experts" in fault.hint and "did you mean" not in fault.hint


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b'{"a": 1,\n  b: 2}', "PLN004", 2),
        (b"[" * 100_000, "PLN009", 1),
        (b'{"a": ' + b"9" * 5000 + b"}", "PLN004", 1),
        (b'{"a": 1,\n "a": 2}', "PLN005", 2),
        (b"[1, 2]", "PLN020", 1),
        (b"", "PLN004", 1),
        (b"\xff{}", "PLN002", 1),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, data: bytes, code: str, line: int) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(PlancError) as caught:
        import_config(path)
    (fault,) = caught.value.diagnostics
    assert fault.code == code and fault.span is not None and fault.span.line == line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlancError, match="PLN001"):
        import_config(tmp_path / "absent.json")


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_model_file_says_what_the_tree_says(name: str) -> None:
    tree, _ = import_config(CONFIGS / f"{name}.json")
    text = to_yaml(tree)
    assert parse_yaml(text, "out.yaml").value == tree
    assert to_yaml(tree) == text and text.startswith("# ") and "\t" not in text


@pytest.mark.parametrize("word", ["1e9", "no", "true", "null", "0x10", "a: b", "# c", "- d", "{}", "ü", "a #b", "1.5"])
def test_any_name_survives_the_model_file(word: str) -> None:
    tree = import_config(CONFIGS / "llama-3.1-8b.json")[0] | {"name": word, "source": word}
    assert parse_yaml(to_yaml(tree), "out.yaml").value == tree


def test_a_tree_outside_the_schema_is_not_written() -> None:
    with pytest.raises(ValidationError):
        to_yaml({"name": "x"})
