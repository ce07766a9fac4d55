"""tigon check-checkpoint: headers that lie, files that are none, indices that do not fit; nothing raises."""

import json
import struct

import pytest
import torch
from checkpoints import UP, edit_json, edit_tensors, errors, poison, quantized

safetensors_torch = pytest.importorskip("safetensors.torch")


def raw_header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(change):
    """The header with one entry changed."""

    def edit(header):
        change(header[f"{UP}.weight"])
        return header

    return edit


def overlap(header):
    a, b = (header[f"{UP}.{part}"]["data_offsets"] for part in ("weight", "weight_scale"))
    size = b[1] - b[0]
    header[f"{UP}.weight_scale"]["data_offsets"] = [a[0] + 8, a[0] + 8 + size]
    return header


HEADERS = {  # change of the header -> words of the fault
    "beyond the end": (
        entry(lambda e: e.update(data_offsets=[10**12, 10**12 + 3072])),
        "ends at byte",
    ),
    "backwards": (entry(lambda e: e.update(data_offsets=[3072, 0])), "after its end"),
    "negative": (entry(lambda e: e.update(data_offsets=[-3072, 0])), "are not two positions"),
    "true is no number": (entry(lambda e: e.update(shape=[True, 3072])), "is not a list of sizes"),
    "negative size": (entry(lambda e: e.update(shape=[-1, 3072])), "is not a list of sizes"),
    "fraction": (entry(lambda e: e.update(shape=[96.0, 32])), "is not a list of sizes"),
    "huge product": (entry(lambda e: e.update(shape=[2**40, 2**40])), "data_offsets hold 3072"),
    "too few bytes": (entry(lambda e: e.update(shape=[96, 33])), "needs 3168 bytes"),
    "dtype": (entry(lambda e: e.update(dtype="F7")), "dtype 'F7' is not known"),
    "dtype of a list": (entry(lambda e: e.update(dtype=[])), "dtype [] is not known"),
    "wider dtype": (entry(lambda e: e.update(dtype="F32")), "needs 12288 bytes"),
    "no shape": (entry(lambda e: e.pop("shape")), "lacks dtype, shape or data_offsets"),
    "three offsets": (entry(lambda e: e.update(data_offsets=[0, 1, 2])), "are not two positions"),
    "overlap": (overlap, "overlaps"),
    "entry of a list": (lambda h: h | {f"{UP}.weight": []}, "lacks dtype"),
    "metadata": (lambda h: h | {"__metadata__": {"a": 1}}, "object of texts"),
    "a list": (lambda h: [], "not a JSON object"),
    "not JSON": (lambda h: b"{", "header is not JSON"),
    "not text": (lambda h: b"\xff\xfe{}", "header is not JSON"),
    "deep": (lambda h: b"[" * 200_000, "header is not JSON"),
    "twice": (
        lambda h: (
            json.dumps(h)[:-1] + f', "{UP}.weight": {json.dumps(h[f"{UP}.weight"])}}}'
        ).encode(),
        "named twice",
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_the_file_cannot_hold_is_reported(fault, folder, check):
    change, words = HEADERS[fault]
    path = folder / "model.safetensors"
    header, data = raw_header(path)
    write_raw(path, change(header), data)
    code, findings = check(folder, "--values", "all")
    assert code == 2
    found = [f for f in errors(findings) if words in f["fault"]]
    assert found, findings
    assert found[0]["file"] == "model.safetensors"


def test_whatever_bytes_of_a_header_change_it_is_read_or_reported_as_safetensors_does(
    folder, check
):
    """Where safetensors refuses the file an error is reported; nothing raises."""
    import random

    from safetensors import SafetensorError, safe_open

    draw = random.Random(5)
    path = folder / "model.safetensors"
    original = path.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    refused = 0
    for _ in range(150):
        data = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            at = draw.choice([draw.randrange(8), 8 + draw.randrange(length)])
            data[at] = draw.choice([draw.randrange(256), *b'0123456789-,:"[]{}eE'])
        path.write_bytes(data)
        code, findings = check(folder, "--values", "none")
        try:
            with safe_open(path, "pt") as f:
                list(f.keys())
        except (SafetensorError, OverflowError):
            refused += 1
            assert code == 2 and any(f["file"] == path.name for f in errors(findings))
    assert refused > 50


def test_names_in_a_header_cannot_steer_the_terminal(folder, tigon_command):
    header, data = raw_header(folder / "model.safetensors")
    header["\x1b[2J\ud800"] = header.pop(f"{UP}.weight")
    write_raw(folder / "model.safetensors", header, data)
    code, out = tigon_command("check-checkpoint", str(folder))
    assert code == 2 and "\\x1b[2J\\ud800" in out and "\x1b" not in out


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": -3},
        {"hidden_size": "wide"},
        {"n_groups": 0},
        {"hybrid_override_pattern": "X"},
        {"hybrid_override_pattern": "E", "n_routed_experts": 10**12},
        {"time_step_limit": 3},
    ],
)
def test_sizes_that_make_no_model_leave_the_rest_checked(sizes, folder, check):
    edit_json(folder, "config.json", lambda v: v.update(sizes))
    edit_tensors(folder, poison(f"{UP}.weight_scale", 0x7F))
    code, findings = check(folder)
    assert code == 2 and any("shapes are not checked" in f["fault"] for f in findings)
    assert [f["tensor"] for f in errors(findings)] == [f"{UP}.weight_scale"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not even"),
        (b"\x05\0\0", "not even"),
        (struct.pack("<Q", 2**63) + b"{}", "header of"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"{}" + b"\0" * 5, "belong to none"),
    ],
)
def test_a_file_that_is_no_safetensors_is_reported(content, words, folder, check):
    (folder / "model.safetensors").write_bytes(content)
    code, findings = check(folder)
    assert code == 2 and any(words in f["fault"] for f in findings), findings


def test_a_truncated_file_names_what_it_lost(folder, check):
    path = folder / "model.safetensors"
    header, _ = raw_header(path)
    last = max(
        (e["data_offsets"][1], name) for name, e in header.items() if name != "__metadata__"
    )[1]
    path.write_bytes(path.read_bytes()[:-1])
    code, findings = check(folder)
    assert code == 2 and last in [f["tensor"] for f in findings if "ends at byte" in f["fault"]]


@pytest.fixture
def sharded(tmp_path):
    quantized().save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


INDEX = "model.safetensors.index.json"
INDICES = {
    "shard that is not there": (
        lambda m: m.update({f"{UP}.weight": "model-9.safetensors"}),
        "which is not there",
    ),
    "tensor in another shard": (
        lambda m: m.update(
            {f"{UP}.weight": m["lm_head.weight"], "lm_head.weight": m[f"{UP}.weight"]}
        ),
        "the index has it in",
    ),
    "tensor that no shard has": (lambda m: m.update(ghost=m["lm_head.weight"]), "is not in model-"),
    "file outside": (
        lambda m: m.update({f"{UP}.weight": "../model.safetensors"}),
        "outside the folder",
    ),
    "absolute path": (lambda m: m.update({f"{UP}.weight": "/etc/passwd"}), "outside the folder"),
    "pickle": (lambda m: m.update({f"{UP}.weight": "model.bin"}), "never opened"),
    "number": (lambda m: m.update({f"{UP}.weight": 3}), "does not map"),
}


@pytest.mark.parametrize("fault", INDICES)
def test_an_index_that_does_not_fit_its_shards_is_reported(fault, sharded, check):
    change, words = INDICES[fault]
    assert check(sharded) == (0, [])
    edit_json(sharded, INDEX, lambda v: change(v["weight_map"]))
    code, findings = check(sharded)
    assert code == 2 and any(words in f["fault"] for f in errors(findings)), findings


def test_shards_beside_the_index_are_warned_of(sharded, check):
    extra = sharded / "extra.safetensors"
    safetensors_torch.save_file({"x": torch.ones(2)}, extra)
    code, findings = check(sharded)
    assert code == 0 and findings[0]["file"] == "extra.safetensors"


def test_only_pickled_weights_are_named_and_not_opened(folder, check):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    code, findings = check(folder)
    assert code == 2 and "never opened: pytorch_model.bin" in findings[0]["fault"]
