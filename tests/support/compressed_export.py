"""Runs by itself, in a process of its own: compressed-tensors packs the linear layers of a small NemotronH.

    python compressed_export.py PEERS OUT        PEERS: the folder where compressed-tensors is installed

Writes OUT/<case>/checkpoint (config.json, model.safetensors) and OUT/<case>/truth.safetensors: `weight.<layer>`, what
the package's own decompressor makes of the packed tensors. Exit code 3 and one line if it cannot be imported.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")
SKIPPED = ["lm_head", r"re:.*\.mixer\.o_proj"]


def main(peers, out):
    from modelopt_export import nemotron

    sys.path.append(peers)
    try:
        from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    except ImportError as error:
        print(error)
        return 3
    numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    weights = QuantizationArgs(**numbers, scale_dtype=torch.float8_e4m3fn)
    inputs = QuantizationArgs(**numbers, dynamic="local", scale_dtype=torch.float8_e4m3fn)
    for name in ("w4a16", "w4a4"):
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=weights,
            input_activations=inputs if name == "w4a4" else None,
        )
        model, tensors, truth = nemotron(), {}, {}
        state = {k.replace("model.", "backbone."): v for k, v in model.state_dict().items()}
        for key, value in state.items():
            layer, _, part = key.rpartition(".")
            if part != "weight" or not layer.endswith(
                ("in_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj")
            ):
                tensors[key] = value
                continue
            scale_2 = generate_gparam(value.min(), value.max())
            blocks = value.unflatten(-1, (-1, 16))
            scale, _ = calculate_qparams(
                blocks.amin(-1), blocks.amax(-1), weights, global_scale=scale_2
            )
            given = {"weight": value, "weight_scale": scale, "weight_global_scale": scale_2}
            if name == "w4a4":
                given["input_global_scale"] = torch.tensor([2688 / 3.0])
            packed = NVFP4PackedCompressor.compress(given, scheme)
            tensors |= {f"{layer}.{part}": t.contiguous() for part, t in packed.items()}
            unpacked = NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
            truth[f"weight.{layer}"] = unpacked.float().contiguous()
        folder = out / name / "checkpoint"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        save_file(truth, out / name / "truth.safetensors")
        group = json.loads(scheme.model_dump_json()) | {"format": "nvfp4-pack-quantized"}
        settings = json.loads(model.config.to_json_string(use_diff=False))
        settings["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": SKIPPED,
        }
        (folder / "config.json").write_text(json.dumps(settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
