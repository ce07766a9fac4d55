"""NemotronH checkpoints: config.json beside safetensors, whole or in shards with an index.

Names on disk are `backbone.…` and `lm_head.weight`; transformers 5 writes `model.…`; old files have `embedding` for
`embeddings`. Experts are single tensors on disk, and read from stacks too (tigon.models.expert_tensors). All headers
are compared with the model before any tensor is read; then one shard is open at a time.
Quantized checkpoints: tigon.integrations.modelopt.
"""

import json
import re
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from tigon.integrations.modelopt import (
    Expected,
    Layout,
    format_of,
    same_shape,
    warn_of,
    write_config,
)
from tigon.integrations.modelopt import layout as layout_of
from tigon.models.config import HybridConfig
from tigon.models.expert_tensors import Stacks, split

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def own_name(name: str) -> str:
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


def _stored_drafter(path: Path) -> bool:
    """Whether the files hold a block of multi-token prediction."""
    from safetensors import safe_open

    if (path / INDEX).is_file():
        names = json.loads((path / INDEX).read_text())["weight_map"]
    else:
        with safe_open(_shards(path)[0], "pt") as f:
            names = f.keys()
    return any(name.startswith("mtp.") for name in names)


def _drafter_as_stored(config: HybridConfig, path: Path, mtp: bool | None) -> HybridConfig:
    """The config, without a prediction block that is not asked for or whose tensors are not there."""
    if mtp is False or (not config.mtp_pattern and mtp is None):
        return config.replace(mtp_pattern="")
    if config.mtp_pattern and _stored_drafter(path):
        return config
    lack = "has no mtp.* tensors" if config.mtp_pattern else "has num_nextn_predict_layers=0"
    if mtp:
        raise ValueError(f"from_pretrained: {path} {lack}, but mtp=True asks for them")
    warnings.warn(
        f"from_pretrained: {path} {lack}, though config.json names them; transformers "
        "leaves them out when it saves. The model is loaded without multi-token prediction",
        stacklevel=4,
    )
    return config.replace(mtp_pattern="")


def _compare(
    expected: dict[str, Expected],
    stacks: Stacks,
    shards: list[Path],
    rename: Callable[[str], str],
    layout: Layout,
    quiet: bool,
) -> tuple[dict[str, str], int]:
    """Stored name -> own name of every tensor to read, or one error that names all that is wrong.

    Also how many tensors are left out because the model has no place for them. quiet: not a word about a block of
    multi-token prediction that the model does not have.
    """
    from safetensors import safe_open

    drafter = any(name.startswith("mtp.") for name in expected)
    found, unknown, misshapen, skipped, mtp = {}, [], [], 0, 0
    for shard in shards:
        with safe_open(shard, "pt") as f:
            for stored in f.keys():  # noqa: SIM118 (not a dict)
                own, piece = layout.own_name(rename(stored)), f.get_slice(stored)
                if own in expected:
                    found[stored] = own
                    fault = _fault(expected[own], tuple(piece.get_shape()), piece.get_dtype())
                    misshapen += [f"{stored} has {fault}"] if fault else []
                elif own.startswith("mtp.") and not drafter:
                    mtp += 1
                elif layout.skips(own):
                    skipped += 1
                else:
                    unknown.append(stored)
    needed = {name for name, (_, _, optional) in expected.items() if not optional}
    got = set(found.values())
    missing = sorted((needed - got).union(stacks.missing(got)))
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("unknown", unknown), ("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"from_pretrained: {shards[0].parent}: {'; '.join(problems)}")
    if mtp and not quiet:
        warnings.warn(
            f"from_pretrained: {mtp} tensors of multi-token prediction (mtp.*) are not loaded: the model has none",
            stacklevel=5,
        )
    return found, skipped


def _fault(expected: Expected, shape: tuple[int, ...], dtype: str) -> str | None:
    """What about a stored tensor is not as expected; of a quantized layer's the dtype counts too."""
    if expected[1] is None:
        return None if shape == expected[0] else f"shape {shape}, expected {expected[0]}"
    if same_shape(shape, expected[0]) and dtype == expected[1]:
        return None
    return f"dtype {dtype} and shape {shape}, expected {expected[1]} and {expected[0]}"


def read_into(
    model: nn.Module,
    path: Path,
    layout: Layout,
    rename: Callable[[str], str],
    *,
    tied: bool = False,
    quiet: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Install the layout's frozen layers, compare all headers, then read one shard at a time.

    tied: whether lm_head.weight may be absent. quiet: no warning about mtp.* tensors that the model has no place for.
    dtype: of unquantized tensors; None keeps each tensor's own.
    """
    from safetensors import safe_open

    shards, stacks = _shards(path), Stacks(model)
    single = stacks.shapes()
    layout.install(model, dtype, {n.removesuffix(".weight"): shape for n, shape in single.items()})
    expected = layout.expected(model)
    for name in stacks.names:
        expected[name] = (*expected[name][:2], True)
    for name, shape in single.items():
        expected.setdefault(name, (shape, None, True))
    if tied:
        expected["lm_head.weight"] = (*expected["lm_head.weight"][:2], True)
    names, skipped = _compare(expected, stacks, shards, rename, layout, quiet)
    warn_of(layout, set(names.values()), skipped, path)
    device = torch.device("cpu" if device is None else device)
    buffers, plain = dict(model.named_buffers()), dtype or _plain_dtype(model)
    for shard in shards:
        with safe_open(shard, "pt", device=str(device)) as f:
            for stored in f.keys():  # noqa: SIM118
                if stored in names:
                    own = names[stored]
                    value = layout.convert(own, f.get_tensor(stored))
                    if own.rpartition(".")[0] in layout.decoded:
                        own, value = layout.decode(own, value, plain)
                    elif expected[own][1] is None and own not in buffers:
                        value = value.to(dtype)
                    if value is None:
                        continue
                    if own in stacks.pieces:
                        stacks.put(own, value)
                    else:
                        _put(model, own, value)
    return model


def load(
    cls,
    path: str | PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mtp: bool | None = None,
):
    """A `cls` (HybridLM) with the checkpoint's weights; layers that nvidia-modelopt or compressed-tensors quantized
    become frozen `FP8Linear` and `NVFP4Linear` (see `tigon.integrations.modelopt`).

    Args:
        path: the folder. device: where the weights go. dtype: to convert unquantized tensors to; None keeps each
            tensor's own. mtp: whether the block of multi-token prediction is read. None: if config.json names one and
            its tensors are there, else the model has none, with a warning where the two disagree. False: never.

    Raises:
        FileNotFoundError: config.json or a shard, by name.
        ValueError: unknown, missing and misshapen tensors, all named; an option that the model does not have, a
            quantization that is not supported; mtp=True without the tensors.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"from_pretrained: no such file: {path / 'config.json'}")
    settings = json.loads((path / "config.json").read_text())
    if mtp is False:
        settings["num_nextn_predict_layers"] = 0  # of any number of blocks
    config = _drafter_as_stored(HybridConfig.from_dict(settings), path, mtp)
    layout = layout_of(path, settings, own_name)
    model = cls(config, device="meta", dtype=dtype or _dtype(settings))
    tied = config.tie_word_embeddings
    if tied and layout.config.of("lm_head") is not None:
        raise ValueError(f"{path}: lm_head is quantized and cannot be tied to the embeddings")
    read_into(
        model, path, layout, own_name, tied=tied, quiet=mtp is False, device=device, dtype=dtype
    )
    if tied:
        _check_tied(model)
        model.tie_weights()
    return model


def _dtype(settings: dict) -> torch.dtype | None:
    """What config.json says that the weights are stored in."""
    name = settings.get("dtype") or settings.get("torch_dtype")
    return getattr(torch, name, None) if isinstance(name, str) else None


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer, keeping a parameter's marks (`_no_weight_decay`)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:  # a scale of one value; how many ones its shape had does not matter
        value = value.reshape(()) if value.numel() == 1 and "scale" in leaf else value
        half = value.dtype in (torch.bfloat16, torch.float16)  # a router's bias, which is fp32 here
        setattr(module, leaf, value.float() if half else value)
        return
    old = getattr(module, leaf)
    parameter = nn.Parameter(value.reshape(old.shape), requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
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


def _plain_dtype(model: nn.Module) -> torch.dtype:
    """Of the weights that are not codes or scales; lm_head's if it is plain."""
    quantized = {id(p) for m in model.modules() if format_of(m) for p in m.parameters()}
    named = model.named_parameters()
    plain = [p for n, p in named if id(p) not in quantized and not n.startswith("mtp.")]
    return plain[-1].dtype if plain else torch.float32


def save(model: nn.Module, path: str | PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Write config.json and safetensors under the on-disk names; one shard's tensors are on the CPU at a time. Frozen
    layers are written in nvidia-modelopt's layout, with hf_quant_config.json.

    max_shard_size: bytes, or "5GB", "500MB", "1GiB". A tied lm_head is written too: not every reader ties.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = split(model.state_dict())
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
    dtype = str(_plain_dtype(model)).removeprefix("torch.")
    config = model.config.to_dict() | {"dtype": dtype, "torch_dtype": dtype}
    config |= write_config(model, path)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
