"""The shipped samples: made by the script beside this test, small, and read as what their README says they are."""

from __future__ import annotations

import io
import re

import make_samples
import numpy as np
import pytest

import planc
from planc.routing import Expected, load_traffic

FILES = make_samples.files()


def expected(name: str) -> Expected:
    """What the model of an example spec expects of its traffic."""
    model = planc.load_spec(name).model
    assert model.moe
    return Expected(model.layers, model.moe_layer_ids, model.moe.experts, model.moe.top_k, model.name)


@pytest.mark.parametrize("name", FILES)
def test_samples_are_what_the_script_makes(name: str) -> None:
    """Arrays are compared: another zlib packs them into other bytes."""
    shipped = (make_samples.FOLDER / name).read_bytes()
    if not name.endswith(".npz"):
        assert shipped == FILES[name]
        return
    with np.load(io.BytesIO(shipped)) as there, np.load(io.BytesIO(FILES[name])) as here:
        assert there.files == here.files
        for key in here.files:
            assert there[key].dtype == here[key].dtype
            assert np.array_equal(there[key], here[key])


def test_the_folder_has_nothing_else_and_is_small() -> None:
    files = {path.name: path for path in make_samples.FOLDER.iterdir()}
    assert files.keys() == {*FILES, "README.md"}
    assert sum(path.stat().st_size for path in files.values()) < 250_000


def test_the_readme_says_how_they_are_made() -> None:
    from planc.routing import Skew, generate_tokens

    text = (make_samples.FOLDER / "README.md").read_text(encoding="utf-8")
    calls = dict(re.findall(r"^\| `(sample-[\w.-]+)` \|.*\| `(generate_tokens\(.*?)`.* \|$", text, re.MULTILINE))
    assert calls.keys() == FILES.keys()
    names = {"generate_tokens": generate_tokens, "Skew": Skew, "step": 2}
    made = {name: eval(call, names) for name, call in calls.items()}
    assert np.array_equal(made["sample-topk.npz"].topk, make_samples.topk()["topk_ids"])
    assert np.array_equal(made["sample-topk.jsonl"].topk, make_samples.topk_lines().topk)
    assert np.array_equal(made["sample-logical-count.npz"], make_samples.logical_count()["logical_count"][2, 3:])
    assert np.array_equal(made["sample-eplb-weight.json"], make_samples.eplb_weight())


@pytest.mark.parametrize("name", [name for name in FILES if name != "sample-topk.jsonl"])
def test_samples_belong_to_the_reference_model(name: str) -> None:
    traffic = load_traffic(make_samples.FOLDER / name, expect=expected("moe-61l-ep64-dp2"))
    assert (traffic.layers, traffic.experts) == (58, 64)
    assert traffic.name == name
    choices = {"sample-topk.npz": 1024 * 58 * 2, "sample-logical-count.npz": 6 * 512 * 58 * 2}
    assert traffic.loads.sum() == choices.get(name, 4096 * 58 * 2)


def test_the_lines_belong_to_the_small_model() -> None:
    traffic = load_traffic(make_samples.FOLDER / "sample-topk.jsonl", expect=expected("moe-4l-64gpu"))
    made = make_samples.topk_lines()
    assert traffic.tokens is not None
    assert np.array_equal(traffic.tokens.topk, made.topk)
    assert np.array_equal(traffic.tokens.on_sources(8), made.source)
