"""NemotronH checkpoints: config.json beside safetensors, whole or in shards with an index.

Names on disk are `backbone.…` and `lm_head.weight`; transformers 5 writes `model.…`; old files have `embedding` for
`embeddings`. All headers are compared with the model before any tensor is read; then one shard is open at a time.
"""

import json
import re
import warnings
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from tigon.models.config import HybridConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def _own_name(name: str) -> str:
    """A stored tensor's name in this model."""
    name = re.sub(r"^model\.", "backbone.", name)
    return re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", name)


def _shards(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        names = json.loads((path / INDEX).read_text())["weight_map"].values()
        files = [path / name for name in sorted(set(names))]
    else:
        files = [path / SINGLE]
    absent = [str(f) for f in files if not f.is_file()]
    if absent:
        raise FileNotFoundError(f"from_pretrained: no such file: {', '.join(absent)}")
    return files


def _compare(model: nn.Module, shards: list[Path], tied: bool) -> dict[str, str]:
    """Stored name -> own name of every tensor to read, or one error that names all that is wrong."""
    from safetensors import safe_open

    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found, unknown, misshapen, skipped = {}, [], [], []
    for shard in shards:
        with safe_open(shard, "pt") as f:
            for stored in f.keys():  # noqa: SIM118 (not a dict)
                own, shape = _own_name(stored), tuple(f.get_slice(stored).get_shape())
                if own not in expected:
                    (skipped if stored.startswith("mtp.") else unknown).append(stored)
                elif shape != expected[own]:
                    misshapen.append(f"{stored} has shape {shape}, expected {expected[own]}")
                else:
                    found[stored] = own
    missing = sorted(
        set(expected) - set(map(_own_name, [*found, *(m.split()[0] for m in misshapen)]))
    )
    if tied:
        missing = [name for name in missing if name != "lm_head.weight"]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("unknown", unknown), ("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"from_pretrained: {shards[0].parent}: {'; '.join(problems)}")
    if skipped:
        warnings.warn(
            f"from_pretrained: {len(skipped)} tensors of the multi-token prediction head (mtp.*) are not loaded",
            stacklevel=4,
        )
    return found


def load(
    cls,
    path: str | PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
):
    """A `cls` (HybridLM) with the checkpoint's weights.

    Args:
        path: the folder. device: where the weights go. dtype: to convert to; None keeps each tensor's own.

    Raises:
        FileNotFoundError: config.json or a shard, by name.
        ValueError: unknown, missing and misshapen tensors, all named; an option that the model does not have.
    """
    from safetensors import safe_open

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"from_pretrained: no such file: {path / 'config.json'}")
    config = HybridConfig.from_dict(json.loads((path / "config.json").read_text()))
    model = cls(config, device="meta")
    shards = _shards(path)
    names = _compare(model, shards, config.tie_word_embeddings)
    device = torch.device("cpu" if device is None else device)
    for shard in shards:
        with safe_open(shard, "pt", device=str(device)) as f:
            for stored in f.keys():  # noqa: SIM118
                if stored in names:
                    _put(model, names[stored], f.get_tensor(stored).to(dtype))
    if config.tie_word_embeddings:
        _check_tied(model)
        model.tie_weights()
    return model


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a meta parameter, keeping its marks (`_no_weight_decay`)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
    parameter.__dict__.update(getattr(module, leaf).__dict__)
    setattr(module, leaf, parameter)


def _check_tied(model: nn.Module) -> None:
    head, table = model.lm_head.weight, model.backbone.embeddings.weight
    if head is not table and not head.is_meta and not torch.equal(head, table):
        raise ValueError(
            "from_pretrained: tie_word_embeddings is true, but lm_head.weight and embeddings.weight differ"
        )


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", size.strip().upper())
    if not match:
        raise ValueError(f"max_shard_size: {size!r} is neither a number of bytes nor like '5GB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def _group(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut before a group would pass the limit."""
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def save(model: nn.Module, path: str | PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Write config.json and safetensors under the on-disk names; one shard's tensors are on the CPU at a time.

    max_shard_size: bytes, or "5GB", "500MB", "1GiB". A tied lm_head is written too: not every reader ties.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    groups = _group(
        {k: t.numel() * t.element_size() for k, t in tensors.items()}, _bytes(max_shard_size)
    )
    for old in [path / INDEX, *path.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)
    weight_map = {}
    for i, names in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        shard = {name: tensors[name].detach().cpu().contiguous().clone() for name in names}
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = model.config.to_dict() | {"dtype": dtype, "torch_dtype": dtype}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
