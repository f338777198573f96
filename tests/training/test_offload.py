"""Frozen blocks that wait in memory or in files while a denoiser is trained."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from diffusekrona.bases.loading import load_base
from diffusekrona.training import TrainingConfigError, offload
from diffusekrona.training.families import family_of
from diffusekrona.training.offload import blocks_of, offloaded
from tests.pipelines import FAMILIES, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import QUICK, adapted, copies, same, train, weights

WAYS = pytest.mark.parametrize("how", ["blocks", "all"])
BASES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_sd3_pipeline])
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is of a file, and drops it")


@pytest.fixture
def copying(monkeypatch):
    """As for a device that is not the CPU."""

    def with_copies(*arguments):
        return offloaded(*arguments, copies=True)

    monkeypatch.setattr(offload, "offloaded", with_copies)


def ended(build, **values):
    pipe, factors = adapted(build, text_encoders=values.get("train_text_encoder", False))
    before = copies(weights(pipe))
    losses = train(pipe, factors, QUICK.replace(**values)).losses
    now = weights(pipe)
    assert all(torch.equal(before[name], now[name]) for name in before if "krona_" not in name)
    return losses, copies(factors)


@BASES
@WAYS
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"train_text_encoder": True, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "checkpointed", "bf16", "text"],
)
def test_losses_and_factors_are_those_without_offloading_bit_for_bit(build, how, values):
    plain, other = ended(build, **values), ended(build, offload=how, **values)
    assert plain[0] == other[0]
    assert same(plain[1], other[1])


@BASES
@WAYS
@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_of_blocks_give_the_same_too(build, how, checkpointing):
    plain = ended(build, gradient_checkpointing=checkpointing)
    other = ended(build, offload=how, gradient_checkpointing=checkpointing)
    assert plain[0] == other[0]
    assert same(plain[1], other[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_all_blocks_two_at_most_are_there_at_a_time(checkpointing, monkeypatch):
    pipe, factors = adapted(tiny_sd3_pipeline)
    alive, most = [], []
    enter = offload._Stage.enter

    def watched(stage, number):
        enter(stage, number)
        alive.extend((number, weakref.ref(weight.data.untyped_storage())) for weight in stage._blocks[number][:1])
        gc.collect()
        most.append(len({one for one, storage in alive if storage() is not None}))

    monkeypatch.setattr(offload._Stage, "enter", watched)
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    with offloaded(pipe.transformer, factors.values(), torch.device("cpu"), "blocks", copies=True):
        inputs = {
            "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 128),
            "pooled_projections": torch.randn(1, 128), "timestep": torch.tensor([3.0]),
        }  # fmt: skip
        pipe.transformer.train()(**inputs).sample.square().mean().backward()
    assert len(most) > 2 * len(blocks_of(pipe.transformer)) - 2
    assert max(most) <= 2


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_hold_most_of_a_denoiser_and_none_twice(name):
    denoiser = family_of(FAMILIES[name].build()).denoiser
    blocks = blocks_of(denoiser)
    found = [weight for block in blocks for weight in block.parameters()]
    assert len(found) == len(set(found))
    assert len(blocks) >= 1
    assert sum(w.numel() for w in found) > 0.3 * sum(w.numel() for w in denoiser.parameters())


@WAYS
def test_after_an_error_weights_are_as_before(how):
    pipe, factors = adapted()
    before = copies(weights(pipe))

    def stop(done):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(pipe, factors, QUICK.replace(offload=how), stop)
    now = weights(pipe)
    assert all(torch.equal(before[name], now[name]) for name in before if "krona_" not in name)
    assert not any(part._forward_pre_hooks for part in pipe.unet.modules())


@linux
def test_weights_are_used_from_the_bases_own_file_unless_they_were_written_over(tmp_path, monkeypatch):
    tiny_sd3_pipeline().save_pretrained(tmp_path)
    pipe = load_base(tmp_path)
    written = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    with torch.no_grad():
        written += 1
    expected, saved = copies(weights(pipe)), []
    monkeypatch.setattr(offload, "save_file", lambda t, path: saved.extend(t) or save_file(t, path))
    save_file = __import__("safetensors.torch", fromlist=["save_file"]).save_file
    with offloaded(pipe.transformer, [], torch.device("cpu"), "all"):
        pass
    assert len(saved) == 1
    assert same(weights(pipe), expected)


@WAYS
def test_quantized_and_offloaded_weights_are_refused(how):
    layer = nn.Linear(4, 4, device="meta")
    model = nn.Module()
    model.blocks = nn.ModuleList([layer])
    with (
        pytest.raises(TrainingConfigError, match=r"weight blocks\.0\.weight, which is offloaded already"),
        offloaded(model, [], torch.device("cpu"), how),
    ):
        pass


PROGRAM = """
import sys, threading, time
from pathlib import Path
import torch
from diffusekrona.training.offload import offloaded
from diffusers import SD3Transformer2DModel
from diffusekrona import KronAConfig, inject_krona

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

folder, how = sys.argv[1:]
warm = SD3Transformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                             caption_projection_dim=16, pooled_projection_dim=16, sample_size=8)
def inputs(width, dtype):
    return {"hidden_states": torch.randn(1, 16, 8, 8, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 5, width, dtype=dtype),
            "pooled_projections": torch.randn(1, width, dtype=dtype), "timestep": torch.tensor([3.0], dtype=dtype)}
krona = inject_krona(warm, KronAConfig(a1=2, a2=2))
warm(**inputs(16, torch.float32)).sample.square().mean().backward()
before, most, done = resident(), [0], []
def watch():
    while not done:
        most[0] = max(most[0], resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
model = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
krona = inject_krona(model, KronAConfig(a1=4, a2=64))
model.train().enable_gradient_checkpointing()
def step():
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs(model.config.joint_attention_dim, torch.bfloat16)).sample.float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in list(krona.parameters())[:2])
if how == "none":
    step()
else:
    with offloaded(model, list(krona.parameters()), torch.device("cpu"), how):
        step()
done.append(1)
print(sum(p.nbytes for p in model.parameters()) >> 20, (most[0] - before) >> 20)
"""


@linux
@pytest.mark.slow
def test_a_step_takes_the_memory_of_a_block_and_not_of_all(tmp_path):
    from diffusers import SD3Transformer2DModel

    heads, layers = 16, 12
    width = 64 * heads
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=layers, attention_head_dim=64, num_attention_heads=heads, joint_attention_dim=width,
            caption_projection_dim=width, pooled_projection_dim=width, sample_size=8,
        ).to(torch.bfloat16)  # fmt: skip
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, std=0.02)
    model.save_pretrained(tmp_path)
    del model
    found = {}
    for how in ("none", "all"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, found[how] = map(int, done.stdout.split()[-2:])
    print(size, found)
    assert size > 350
    assert found["none"] > size
    assert found["all"] < 200
