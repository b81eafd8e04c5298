"""A local Hugging Face `config.json` to a planc model tree, and that tree to a model file.

Nothing is guessed. A value is read, or it is the default that the architecture's config class in `transformers`
documents (then a note says so), or it is a fault that names the Hugging Face key and the planc key to set.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.hf_architectures import ARCHITECTURES, MODEL_TYPES, Tree
from planc.spec.hf_config import ConfigReader, parse_config, shown
from planc.spec.model import Model, parameter_counts
from planc.spec.text import decode, read_bytes, scalar
from planc.units import format_count


def import_config(path: str | os.PathLike[str]) -> tuple[Tree, list[Diagnostic]]:
    """Read a `config.json`: a tree for the `Model` schema, and notes on defaults used and parts left out.

    Raises PlancError with every fault: PLN001-PLN005 and PLN009 for an unreadable file, PLN019 for an unknown
    architecture, PLN020 for a field that is absent, of the wrong type, or out of range.
    """
    file = os.fspath(path)
    text = decode(read_bytes(path), file)
    reader = ConfigReader(file, text, parse_config(text, file))
    name = _architecture(reader)
    if reader.faults:
        raise PlancError(reader.faults)
    if name not in ARCHITECTURES:
        raise PlancError([_unknown(reader, name)])
    reader.owner = re.sub(r"For(CausalLM|ConditionalGeneration)$", "Config", name)
    tree = {"name": _model_name(path, reader.config), "source": _source(file, name)} | ARCHITECTURES[name](reader)
    reader.faults.extend(() if reader.faults else _schema_faults(reader, tree))
    if reader.faults:
        raise PlancError(reader.faults)
    return tree, sorted(reader.notes, key=Diagnostic.sort_key)


def _architecture(reader: ConfigReader) -> str:
    """The first known name in ``architectures``, else the first name there, else the one of ``model_type``."""
    names = reader.config.get("architectures")
    kind = reader.config.get("model_type")
    if names is None and isinstance(kind, str):
        name = MODEL_TYPES.get(kind, kind)
        reader.note(f"`architectures` is not in the config: taken from `model_type` {shown(kind)}", "", "model_type")
        return name
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        message = f"`architectures` is {shown(names)}, not a list of names"
        if names is None:
            message = "neither `architectures` nor `model_type` is in the config, so its fields cannot be understood"
        reader.fault(message, "name", "architectures")
        return ""
    return next((n for n in names if n in ARCHITECTURES), str(names[0]))


def _model_name(path: str | os.PathLike[str], config: dict[str, Any]) -> str:
    """`_name_or_path` of the config, else the file's name, else (for a `config.json`) its folder's name."""
    stem = Path(path).stem if Path(path).stem != "config" else Path(path).resolve().parent.name
    stated = config.get("_name_or_path")
    name = stated.rstrip("/").rpartition("/")[2] if isinstance(stated, str) else ""
    for candidate in (name, stem):
        cleaned = re.sub(r"[^A-Za-z0-9._+ -]", "-", candidate).strip(" -.")[:100].strip()
        if cleaned:
            return cleaned
    return "imported"


def _source(file: str, architecture: str) -> str:
    printable = "".join(c if c.isprintable() and c not in '"\\' else "?" for c in file)
    return f"imported from {printable[-300:]} ({architecture[:80]})"


def _schema_faults(reader: ConfigReader, tree: Tree) -> list[Diagnostic]:
    """What the schema still refuses, as PLN020 (the tree is ours, so the field's place in the config is unknown)."""
    try:
        Model.model_validate(tree)
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=False, include_input=False)
        paths = [(".".join(map(str, row["loc"])), row["msg"]) for row in rows]
        return [Diagnostic("PLN020", f"`{path}`: {msg}", path, Span(reader.file, 1, 1)) for path, msg in paths]
    return []


#: planc key -> names that configs commonly give it; what an unknown architecture is searched for
_GENERIC: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "attention.heads": ("num_attention_heads", "n_head"),
    "attention.kv_heads": ("num_key_value_heads",),
    "attention.head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "dense_mlp.intermediate": ("intermediate_size", "n_inner"),
    "moe.experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "moe.top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"),
    "moe.intermediate": ("moe_intermediate_size", "expert_intermediate_size"),
}


def _unknown(reader: ConfigReader, name: str) -> Diagnostic:
    """PLN019, with what could be read all the same and what must be set by hand."""
    inner = reader.config.get("text_config")
    config = inner if isinstance(inner, dict) else reader.config
    found, absent = [], []
    for path, keys in _GENERIC.items():
        key = next((k for k in keys if type(config.get(k)) is int), None)
        if key is None:
            absent.append(path)
        else:
            found.append(f"`{path}` = {shown(config[key])} from `{key}`")
    related = tuple(f"could be read: {line}" for line in found) + tuple(f"not found: `{path}`" for path in absent)
    hint = "write a model file by hand with these keys" + (f", above all {', '.join(absent)}" if absent else "")
    message = f"the architecture `{name[:80]}` is not one that import-hf knows: {', '.join(ARCHITECTURES)}"
    return Diagnostic("PLN019", message, "", reader.span("architectures"), hint, related)


# --- writing -----------------------------------------------------------------------------------------------------

_COMMENTS = {
    "attention": "every layer's attention",
    "dense_mlp": "the MLP of dense layers: gate, up and down matrices",
    "moe": "the MLP of MoE layers: routed experts, gate, shared experts",
    "first_k_dense": "layers below this one are dense",
    "moe_stride": "layer i is MoE when i + 1 is a multiple of this",
    "moe_layers": "these layers are MoE, the others dense",
    "vocab": "rows of the embedding and of the output head",
    "tied_embeddings": "the output head shares the embedding's weights",
    "norm": "RMSNorm weights are counted",
    "dtypes": "element types; a key left out has its default (`planc schema spec`)",
}


def to_yaml(tree: Tree) -> str:
    """The tree of `import_config` as a commented model file: the same text for the same tree.

    ``tree`` must satisfy the `Model` schema; pydantic.ValidationError otherwise.
    """
    counts = parameter_counts(Model.model_validate(tree))
    total, active = format_count(counts["total"]), format_count(counts["active"])
    lines = [f"# {total} parameters, {active} of them active for a token (embedding and head counted in both)"]
    for key, value in tree.items():
        if key in _COMMENTS:
            lines.append(f"# {_COMMENTS[key]}")
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {k}: {_scalar(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A YAML 1.2 scalar: text is quoted unless it could be nothing else."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/ ()+-]*", value) and value == value.strip()
        return value if plain and scalar(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
