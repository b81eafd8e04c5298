"""JSON Schemas of what people and programs write and read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from planc.report.search_file import SearchFile
from planc.spec import Cluster, Model, Spec
from planc.verify import PlanFile

_BASED: dict[str, Any] = {"type": "string", "description": "a preset, or a file relative to this one"}
_GROUP_KEYS = ("nodes", "gpus_per_node", "gpu", "nvlink_domain")


def json_schema(what: Literal["spec", "model", "cluster", "plan", "search"]) -> dict[str, Any]:
    """The schema of a spec, a model file, a cluster file (all as written, presets allowed), plan.json, or the result of a search."""
    models: dict[str, type[BaseModel]] = {"spec": Spec, "model": Model, "cluster": Cluster, "plan": PlanFile}
    models["search"] = SearchFile
    schema = TypeAdapter(models[what]).json_schema(by_alias=True)
    if what not in ("plan", "search"):
        _allow_presets(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"planc.{what}/1"} | schema


def _allow_presets(schema: dict[str, Any]) -> None:
    """A model, cluster or GPU may also be a name, or a mapping with `base` that overrides parts; a cluster of one node
    group may give the group's keys at its top; any value may be `{value, source}`."""
    definitions = schema.get("$defs", {})
    for name in ("Model", "Cluster", "Gpu"):
        part = schema if schema.get("title") == name else definitions.get(name)
        if part is None:
            continue
        part["properties"]["base"] = _BASED
        part["required"] = [key for key in part.get("required", []) if key == "base"]
        if name == "Cluster" and "NodeGroup" in definitions:
            group = definitions["NodeGroup"]["properties"]
            part["properties"] |= {key: group[key] for key in _GROUP_KEYS}
    for part in (schema, *definitions.values()):
        for key, value in part.get("properties", {}).items():
            if value.get("$ref", "").rpartition("/")[2] in ("Model", "Cluster", "Gpu"):
                part["properties"][key] = {"anyOf": [{"$ref": value["$ref"]}, _BASED]}
            elif (
                part.get("title") in ("Gpu", "Peak", "Link", "Nic", "Leaf", "Spine", "Cluster", "NodeGroup")
                and "$ref" not in value
            ):
                part["properties"][key] = {"anyOf": [value, _sourced(value)]}


def _sourced(value: dict[str, Any]) -> dict[str, Any]:
    inner = {k: v for k, v in value.items() if k not in ("default", "title", "description")}
    properties = {"value": inner, "source": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["value", "source"], "additionalProperties": False}
