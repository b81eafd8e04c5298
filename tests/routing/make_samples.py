"""Writes the files in specs/traffic again: ``python tests/routing/make_samples.py``. The README there says what they
are; a test checks that the files are what this script makes."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from planc.routing import Skew, TokenTraffic, generate_tokens

FOLDER = Path(__file__).parents[2] / "specs" / "traffic"
FIRST_MOE_LAYER, LAYERS, EXPERTS = 3, 61, 64  # of moe-61l
_MOE_61L = {"layers": LAYERS - FIRST_MOE_LAYER, "experts": EXPERTS, "top_k": 2, "sources": 8}


def topk() -> dict[str, np.ndarray]:
    """A token trace of moe-61l, in the smallest dtype that holds the ids."""
    tokens = generate_tokens(**_MOE_61L, tokens=1024, skew=Skew("zipf", 0.6, topics=8), seed=1)
    return {"topk_ids": tokens.topk.astype(np.uint8), "source_rank": tokens.source.astype(np.uint8)}


def topk_lines() -> TokenTraffic:
    """A token trace of moe-4l."""
    return generate_tokens(
        tokens=64, layers=4, experts=16, top_k=2, sources=8, skew=Skew("lognormal", 0.5, topics=4), seed=2
    )


def logical_count() -> dict[str, np.ndarray]:
    """Six steps of moe-61l with a row for each of its 61 layers; those of dense layers are zero."""
    count = np.zeros((6, LAYERS, EXPERTS), dtype=np.uint16)
    for step in range(len(count)):
        tokens = generate_tokens(**_MOE_61L, tokens=512, skew=Skew("zipf", 0.6), seed=3, sample=step)
        count[step, FIRST_MOE_LAYER:] = tokens.loads()
    return {"logical_count": count}


def eplb_weight() -> np.ndarray:
    """Loads of moe-61l's MoE layers, int64 [58, 64]."""
    return generate_tokens(**_MOE_61L, tokens=4096, skew=Skew("power_law", 1.5), seed=4).loads()


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """What numpy.savez_compressed writes, without the time of day."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def files() -> dict[str, bytes]:
    """The files' bytes by name."""
    lines = topk_lines()
    rows = [
        json.dumps({"topk_ids": ids, "source_rank": source}) + "\n"
        for ids, source in zip(lines.topk.tolist(), lines.source.tolist(), strict=True)
    ]
    weight = ",\n  ".join(json.dumps(row) for row in eplb_weight().tolist())
    return {
        "sample-topk.npz": npz(topk()),
        "sample-topk.jsonl": "".join(rows).encode(),
        "sample-logical-count.npz": npz(logical_count()),
        "sample-eplb-weight.json": f'{{"weight": [\n  {weight}\n]}}\n'.encode(),
    }


if __name__ == "__main__":
    for name, data in files().items():
        (FOLDER / name).write_bytes(data)
