"""Expert maps in SGLang's form: out and back, and every way in which a file is not one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planc.diagnostics import PlancError
from planc.placement.expert_map import map_json, read_map


def tables(layers: int = 2, holders: int = 4, slots: int = 2, experts: int = 6) -> np.ndarray:
    random = np.random.default_rng(0)
    rows = [random.permutation(np.arange(holders * slots) % experts) for _ in range(layers)]
    return np.array(rows, dtype=np.int32).reshape(layers, holders, slots)


def read(path: Path, **changes: object) -> np.ndarray:
    asked = {"experts": 6, "holders": 4, "moe_layers": (1, 3), "layers": 4} | changes
    return read_map(path, **asked)


def test_out_and_back(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(map_json(tables()))
    assert np.array_equal(read(file), tables())
    assert list(json.loads(file.read_text())) == ["physical_to_logical_map"]


def test_every_hidden_layer_has_a_row(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(map_json(tables(), moe_layers=(1, 3), layers=4))
    rows = json.loads(file.read_text())["physical_to_logical_map"]
    assert len(rows) == 4 and rows[0] == rows[2] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert np.array_equal(read(file), tables())


def test_a_bare_list_and_empty_slots(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    with_empty = tables(experts=5)
    with_empty[0, 0, 0] = -1
    with_empty[0, 1:] = np.array([[0, 1], [2, 3], [4, 0]])
    file.write_text(json.dumps([row.reshape(-1).tolist() for row in with_empty]))
    assert np.array_equal(read(file, experts=5), with_empty)


GOOD = [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
FAULTS = {
    "not JSON": ("nothing", "PLN004"),
    "another key": ('{"map": []}', "PLN024"),
    "no rows": ('{"physical_to_logical_map": []}', "PLN024"),
    "words": ('{"physical_to_logical_map": [["a"]]}', "PLN024"),
    "fractions": ('{"physical_to_logical_map": [[0.5]]}', "PLN024"),
    "yes and no": ('{"physical_to_logical_map": [[true]]}', "PLN024"),
    "huge ids": ('{"physical_to_logical_map": [[99999999999999999999]]}', "PLN024"),
    "ragged": (json.dumps([GOOD[0], GOOD[0][:-1]]), "PLN024"),
    "too few layers": (json.dumps(GOOD[:1]), "PLN025"),
    "too many layers": (json.dumps(GOOD * 3), "PLN025"),
    "slots that do not divide": (json.dumps([[*GOOD[0], 1]] * 2), "PLN025"),
    "an id beyond the experts": (json.dumps([[6, *GOOD[0][1:]], GOOD[1]]), "PLN025"),
    "an id below -1": (json.dumps([[-2, *GOOD[0][1:]], GOOD[1]]), "PLN025"),
    "an expert that is nowhere": (json.dumps([[0, 1, 2, 3, 4, 4, 0, 1], GOOD[1]]), "PLN025"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_map_or_another_s(tmp_path: Path, name: str) -> None:
    text, code = FAULTS[name]
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(PlancError) as error:
        read(file)
    assert {d.code for d in error.value.diagnostics} == {code}
    assert all(d.span and d.span.file == str(file) for d in error.value.diagnostics)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlancError, match="PLN001"):
        read(tmp_path / "gone.json")
