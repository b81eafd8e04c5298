"""A checkpoint with its experts relabelled by a permutation: a copy in which router rows and experts have their new places.

Bytes of experts that are tensors of their own stay where they are and get another name; rows of routers, of correction
biases and of stacked expert tensors are copied in the new order. No tensor is held in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.export.permutation import Permutation, broken_group, broken_text, read_permutation
from planc.export.safetensors_file import BITS, Shard, Tensor, copy_spans, damaged, header_bytes, read_header
from planc.files import staging_in, sweep
from planc.spec.text import decode, parse_json, read_bytes

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_MOST_BYTES = 256_000_000
_LAYER_KEYS = ("num_hidden_layers", "num_layers")
_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_LAYER = re.compile(r"((?:.*\.)?)layers\.(0|[1-9]\d{0,5})\.(.+)")
_EXPERT = re.compile(r"((?:.*?\.)?)experts\.(?:(0|[1-9]\d{0,5})\.)?(.+)")
_ROUTER = re.compile(r"(?:gate|router)\..+|(?:.+\.)?(?:e_score_correction_bias|expert_bias)")
_OUTSIDE = re.compile(r"(^|\.)(router|e_score_correction_bias|expert_bias)(\.|$)")
_SHARED = re.compile(r"shared_(?:expert|mlp)")  # used by every token, whatever the number of its experts
_DRAFT = "mtp"  #: in the names of draft models that count their layers from 0 again
_OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
_NOT_OF_IT = "export the plan of this very model, or name the checkpoint that the plan is of"

Names = dict[str, str]  #: tensor -> its new name, of those that get one
Rows = dict[str, tuple[int, ...]]  #: tensor -> old row of every new one, of those that have a row an expert


def apply_permutation(
    permutation: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Path], list[str]]:
    """Write the ``checkpoint`` (a folder of safetensors files, with or without an index) relabelled by the file ``permutation``
    into the new ``folder``. Returns the files written, and names of files left out because they hold weights in other formats.

    ``progress`` is told (files done, of how many). Raises PlancError: PLN504 for a checkpoint of another model, PLN505 for a
    damaged file, PLN506 where the disk is too small, PLN507 for a permutation of other experts, PLN017 where ``folder``
    cannot be written, PLN001 to PLN009 for files that cannot be read. ``folder`` is whole or is not there.
    """
    asked, source, target = read_permutation(permutation), Path(checkpoint), Path(folder)
    try:
        shards, index = _shards(source)
        _check_config(source, asked)
        names, rows = _changes(source, {n: tensor for shard in shards for n, tensor in shard.tensors.items()}, asked)
        others, left_out = _others(source, {shard.path.name for shard in shards})
    except OSError as error:
        message = f"cannot read {error.filename or source}: {error.strerror or error}"
        raise PlancError(
            [Diagnostic("PLN001", message, hint="--checkpoint names a folder of safetensors files")]
        ) from None
    parts = [(shard, *_relabelled(shard, names, rows)) for shard in shards]
    text = b""
    if index is not None:
        index["weight_map"] = {names.get(name, name): file for name, file in index["weight_map"].items()}
        text = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    size = sum((source / name).stat().st_size for name in others) + len(text)
    size += sum(len(header) + sum(length for _, length in spans) for _, header, spans in parts)
    count = len(parts) + len(others)
    with _whole(target, size) as staging:
        for done, (shard, header, spans) in enumerate(parts, 1):
            with (staging / shard.path.name).open("wb") as handle:
                handle.write(header)
                copy_spans(shard, handle, spans)
            if progress:
                progress(done, count)
        for done, name in enumerate(others, len(parts) + 1):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
            if progress:
                progress(done, count)
        if text:
            (staging / INDEX).write_bytes(text)
    written = [shard.path.name for shard in shards] + ([INDEX] if text else []) + others
    return [target / name for name in written], left_out


def _shards(folder: Path) -> tuple[list[Shard], dict[str, Any] | None]:
    """Headers of the checkpoint's files, and its index where it has one."""
    index = folder / INDEX
    if not index.is_file():
        shards = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
        names = [name for shard in shards for name in shard.tensors]
        if not shards:
            raise _other(folder, "there are no safetensors files in it", "name the folder that has them")
        if len(names) > len(set(names)):
            message = f"several files without a {INDEX} have tensors of the same name"
            raise _other(folder, message, "leave the files of one checkpoint in the folder")
        return shards, None
    record = parse_json(decode(read_bytes(index, _MOST_BYTES), str(index)), str(index))
    files = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not files or not all(_is_name(file) for file in files.values()):
        raise damaged(index, "its weight_map is not a mapping of tensors to files of this folder")
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise _other(folder, f"{file}, which {INDEX} names, is missing", "download the file")
    shards = [read_header(folder / file) for file in sorted(set(files.values()))]
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                message = f"`{name[:100]}` is in {found[name]} and in {shard.path.name}"
                raise _other(folder, message, "download the checkpoint again")
            found[name] = shard.path.name
    for name in [*files, *found]:
        if files.get(name) != found.get(name):
            where = f"in {files.get(name, 'no file')} and is in {found.get(name, 'none')}"
            raise _other(folder, f"`{name[:100]}` should be, by {INDEX}, {where}", "download the checkpoint again")
    return shards, record


def _is_name(file: Any) -> bool:
    return (
        isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors") and len(file.encode()) < 256
    )


def _check_config(folder: Path, asked: Permutation) -> None:
    """What the model's configuration says of its experts: groups of the gate, and names of single ones."""
    for path in sorted(folder.glob("*.json")):
        if path.name != CONFIG and "quant" not in path.name:
            continue
        text = decode(read_bytes(path, _MOST_BYTES), str(path))
        single = re.search(r"experts\.\d+", text)
        if single:
            message = f"{path.name} names single experts (`{single[0]}`), which would be others"
            raise _other(folder, message, "name layers or kinds of tensors there, not experts")
        if path.name == CONFIG:
            record = parse_json(text, str(path))
            inner = (record.get("text_config") or record.get("llm_config")) if isinstance(record, dict) else None
            for part in (record, inner):
                if isinstance(part, dict):
                    _check_counts(path, part, asked)
                    _check_groups(path, part.get("n_group"), part.get("topk_group"), asked)


def _check_counts(path: Path, part: dict[str, Any], asked: Permutation) -> None:
    for keys, wanted, what in ((_LAYER_KEYS, asked.layers, "layers"), (_EXPERT_KEYS, asked.experts, "experts")):
        said = next((part[key] for key in keys if type(part.get(key)) is int), wanted)
        if said != wanted:
            raise _not_these(path, f"{path.name} has {said} {what}, and the permutation is for {wanted}")


def _check_groups(path: Path, groups: Any, chosen: Any, asked: Permutation) -> None:
    if type(groups) is not int or type(chosen) is not int or not 1 <= chosen < groups:
        return
    if asked.experts % groups:
        raise _not_these(path, f"{path.name} has {groups} groups, and the permutation is of {asked.experts} experts")
    for layer, old in asked.old.items():
        broken = broken_group(old, groups)
        if broken is not None:
            raise _not_these(path, f"layer {layer}: {broken_text(broken, groups)}")


def _changes(folder: Path, tensors: dict[str, Tensor], asked: Permutation) -> tuple[Names, Rows]:
    """New names, and new rows."""
    members: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    with_experts: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        match = _LAYER.fullmatch(name)
        if match:
            prefix, layer, rest = match[1], int(match[2]), match[3]
            members[prefix, layer].append((rest, name))
            if _EXPERT.fullmatch(rest) and _DRAFT not in prefix:
                with_experts[prefix].add(layer)
    whole = [prefix for prefix, layers in with_experts.items() if layers >= asked.old.keys()]
    if len(whole) == 1 and len(with_experts) > 1:
        other = min(with_experts.keys() - set(whole))
        raise _other(folder, f"`{other}layers` has experts too, and they may be the same ones", _NOT_OF_IT)
    if len(whole) != 1:
        most = max(with_experts.values(), key=len, default=set())
        lacking = min(asked.old.keys() - most, default=None)
        message = f"layer {lacking} has no experts" if not whole else f"several models: {', '.join(sorted(whole))}"
        raise _other(folder, message, _NOT_OF_IT)
    [prefix] = whole
    unknown = {layer for layer in with_experts[prefix] - asked.old.keys() if layer < asked.layers}
    if unknown:
        raise _other(folder, f"layer {min(unknown)} has experts, and the permutation says nothing of it", _NOT_OF_IT)
    names: Names = {}
    rows: Rows = {}
    for layer in asked.old:
        for name, new in _layer_changes(folder, asked, layer, members[prefix, layer], tensors):
            if isinstance(new, str):
                names[name] = f"{prefix}layers.{layer}.{new}"
            else:
                rows[name] = new
    return names, rows


def _layer_changes(
    folder: Path, asked: Permutation, layer: int, members: list[tuple[str, str]], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, str | tuple[int, ...]]]:
    """(tensor, its new name in the layer or the old row of every new one) of a layer; ``members``: (name in the layer, name)."""
    experts, old = asked.experts, asked.old[layer]
    blocks = {match[1] for rest, _ in members if (match := _EXPERT.fullmatch(rest))}
    if len(blocks) > 1:
        raise _other(folder, f"layer {layer} has experts in {', '.join(sorted(blocks))}", _NOT_OF_IT)
    [block] = blocks
    numbered: dict[str, dict[int, str]] = defaultdict(dict)
    routed = stacked = False
    for rest, name in members:
        tensor, match = tensors[name], _EXPERT.fullmatch(rest)
        local = rest.removeprefix(block)
        if match and match[2]:
            numbered[match[3]][int(match[2])] = name
        elif match or (rest.startswith(block) and _ROUTER.fullmatch(local)):
            if math.prod(tensor.shape) == 1 < experts:
                continue  # of all experts
            _check_rows(folder, name, tensor, experts, router=not match)
            routed, stacked = routed or (not match and local.endswith("weight")), stacked or match is not None
            yield name, old
        elif not rest.startswith(block) and _OUTSIDE.search(rest):
            message = f"`{name[:100]}` may be of the router, and lies outside `{block}`"
            raise _other(folder, message, "this kind of checkpoint cannot be relabelled")
        elif (
            rest.startswith(block)
            and not _SHARED.match(local)
            and (experts in tensor.shape or tensor.dtype in ("I32", "I64"))
        ):
            message = f"`{name[:100]}` may be of the experts, and planc does not know what it is"
            raise _other(folder, message, "this kind of checkpoint cannot be relabelled")
    if not routed:
        raise _other(folder, f"layer {layer} has experts and no router", _NOT_OF_IT)
    if not stacked and not numbered:
        raise _other(folder, f"layer {layer} has no experts", _NOT_OF_IT)
    for part, by_number in numbered.items():
        if max(by_number) >= experts:
            raise _not_these(folder, f"layer {layer} has an expert {max(by_number)}, the permutation {experts} experts")
        missing = min(set(range(experts)) - by_number.keys(), default=None)
        if missing is not None:
            raise _other(
                folder, f"layer {layer}: expert {missing} has no `{part[:60]}`", "download the checkpoint again"
            )
        if len({tensors[name].shape for name in by_number.values()}) > 1:
            raise _other(folder, f"layer {layer}: `{part[:60]}` of experts have different shapes", _NOT_OF_IT)
        for new, number in enumerate(old):
            yield by_number[number], f"{block}experts.{new}.{part}"


def _check_rows(folder: Path, name: str, tensor: Tensor, experts: int, *, router: bool) -> None:
    """Whether a tensor has a row for each expert, in whole bytes; dimensions of 1 may be before it."""
    rows = next((size for size in tensor.shape if size != 1), 1)
    if rows != experts and router and name.endswith(".weight"):
        raise _not_these(folder, f"`{name[:100]}` has {rows} rows, and the permutation is of {experts} experts")
    if rows != experts or math.prod(tensor.shape) // max(rows, 1) * BITS[tensor.dtype] % 8:
        message = (
            f"`{name[:100]}` is {tensor.dtype} {list(tensor.shape)}, which is not a row for each of {experts} experts"
        )
        raise _other(folder, message, _NOT_OF_IT)


def _relabelled(shard: Shard, names: Names, rows: Rows) -> tuple[bytes, list[tuple[int, int]]]:
    """A file's new header (empty where the old one stays), and the spans of the old file that follow it."""
    tensors = {names.get(name, name): tensor for name, tensor in shard.tensors.items()}
    header = b"" if list(tensors) == list(shard.tensors) else header_bytes(shard.metadata, tensors)
    spans: list[tuple[int, int]] = []
    for first, size in [(0, 0 if header else shard.data), *_data(shard, rows)]:
        if spans and sum(spans[-1]) == first:
            spans[-1] = (spans[-1][0], spans[-1][1] + size)
        elif size:
            spans.append((first, size))
    return header, spans


def _data(shard: Shard, rows: Rows) -> Iterator[tuple[int, int]]:
    for name, tensor in sorted(shard.tensors.items(), key=lambda item: item[1].start):
        first, size = shard.data + tensor.start, tensor.end - tensor.start
        if name in rows:
            step = size // len(rows[name])
            yield from ((first + row * step, step) for row in rows[name])
        else:
            yield first, size


def _others(folder: Path, shards: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files that are copied as they are, and those that are left out: weights in other formats, and hidden files."""
    copied: list[str] = []
    left_out: list[str] = []
    known = {*shards, INDEX}
    for where, folders, files in os.walk(folder, onerror=_raise):
        here = Path(where).relative_to(folder)
        skipped = [name for name in folders if name.startswith(".") or (Path(where) / name).is_symlink()]
        left_out += [f"{(here / name).as_posix()}/" for name in sorted(skipped)]
        folders[:] = sorted(set(folders) - set(skipped))
        for file in sorted(files):
            name = (here / file).as_posix()
            if name in known:
                continue
            odd = file.endswith(_OTHER_WEIGHTS) or file.startswith(".") or not (Path(where) / file).is_file()
            (left_out if odd else copied).append(name)
    return copied, left_out


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _whole(target: Path, size: int) -> Iterator[Path]:
    """A folder to write in, of ``size`` bytes, that becomes ``target`` at the end; whatever stops it before, nothing is left."""
    parent = target.absolute().parent
    try:
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            raise _not_new(target, "there already")
        if target.is_symlink() or os.path.ismount(target):
            raise _not_new(target, "a link" if target.is_symlink() else "where another disk is mounted")
        there = next(path for path in (parent, *parent.parents) if path.is_dir())
        sweep(there)
        free = shutil.disk_usage(there).free
        if size > free:
            raise _no_room(target, size, free)
        parent.mkdir(parents=True, exist_ok=True)
        with staging_in(parent) as staging:
            (staging / "new").mkdir()
            yield staging / "new"
            os.rename(staging / "new", target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(target, size, shutil.disk_usage(parent).free) from None
        hint = "choose another folder with -o"
        message = f"cannot write {target}: {error.strerror or error}" + (
            f" ({error.filename})" if error.filename else ""
        )
        raise PlancError([Diagnostic("PLN017", message, hint=hint)]) from None


def _not_new(target: Path, what: str) -> PlancError:
    hint = "choose another folder with -o; a relabelled checkpoint is a folder of its own"
    return PlancError([Diagnostic("PLN017", f"{target} is {what}", hint=hint)])


def _no_room(target: Path, size: int, free: int) -> PlancError:
    message = f"{target} needs {size / 1e9:.4g} GB, and {free / 1e9:.4g} GB are free there"
    return PlancError([Diagnostic("PLN506", message, hint="choose a larger disk with -o, or free some space")])


def _other(folder: Path, message: str, hint: str) -> PlancError:
    return PlancError([Diagnostic("PLN504", f"{folder}: {message}", span=Span(str(folder), 1, 1), hint=hint)])


def _not_these(path: Path, message: str) -> PlancError:
    hint = "use the permutation.json that `planc export` wrote for this model"
    return PlancError([Diagnostic("PLN507", message, span=Span(str(path), 1, 1), hint=hint)])
