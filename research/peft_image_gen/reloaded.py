"""Load an adapter that the benchmark saved, and say what came of it: `python reloaded.py BASE CHECKPOINT`.

Prints one line of JSON: how many tensors the file has, how many of them the loaded model has with the same bits, and
the norm of what the adapter changes of the base's output, over the output's norm.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


def reloaded(base: Path, checkpoint: Path) -> dict[str, float]:
    """Compare a checkpoint with what it loads as, over the base in float32, where no rounding hides a small change."""
    transformer = Flux2Transformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32)
    inputs = _inputs(transformer.config)
    with torch.no_grad():
        plain = transformer(**inputs)[0]
        adapted = PeftModel.from_pretrained(transformer, str(checkpoint)).eval()
        changed = adapted(**inputs)[0]
    saved, loaded = load_file(checkpoint / "adapter_model.safetensors"), get_peft_model_state_dict(adapted)
    same = [name for name, tensor in saved.items() if name in loaded and torch.equal(tensor, loaded[name])]
    return {"saved": len(saved), "same": len(same), "change": ((changed - plain).norm() / plain.norm()).item()}


def _inputs(config: dict[str, int]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    pixels, text = torch.zeros(1, 16, 4, dtype=torch.int64), torch.zeros(1, 8, 4, dtype=torch.int64)
    pixels[..., 1], pixels[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
    text[..., 3] = torch.arange(8)
    return {
        "hidden_states": torch.randn(1, 16, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, config["joint_attention_dim"], generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": pixels,
        "txt_ids": text,
        "return_dict": False,
    }


if __name__ == "__main__":
    print(json.dumps(reloaded(Path(sys.argv[1]), Path(sys.argv[2]))))
