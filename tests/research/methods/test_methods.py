"""What every method has to do, whatever it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.errors import AdapterFileError, KronAError
from research.methods import FullDreamBooth, KronA, LoRA, SVDiff
from research.methods.method import MethodError
from tests.pipelines import tiny_sd_pipeline
from tests.research.methods.cases import CASES, IN_SD, picture, shake, tensors, train
from tests.snapshots import assert_same, snapshot, unchanged


@CASES
def test_a_fresh_method_changes_nothing_and_comes_out_again(build, method):
    pipe = build()
    pipe.unet.conv_in.requires_grad_(False)  # must stay so
    drawn = picture(pipe)  # which sets attributes of its own
    before, expected = snapshot(pipe), method.count(pipe)
    parameters = method.prepare(pipe)
    assert np.array_equal(picture(pipe), drawn)
    assert sum(parameter.numel() for parameter in parameters.values()) == expected > 0
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    learning = {p for module in modules for p in module.parameters() if p.requires_grad}
    assert learning == set(parameters.values())
    assert {name.split(".")[0] for name in parameters} == set(method.chosen(pipe))
    shake(parameters)
    assert not np.array_equal(picture(pipe), drawn)
    method.remove(pipe)
    assert_same(before, snapshot(pipe))
    assert np.array_equal(picture(pipe), drawn)


@CASES
def test_training_saving_removing(build, method, tmp_path):
    pipe = build()
    base = picture(pipe)
    before = snapshot(pipe)
    parameters = method.prepare(pipe)
    start = tensors(pipe)
    train(pipe, method, parameters)
    trained = {id(parameter) for parameter in parameters.values()}
    live = {
        f"{part}.{name}".replace(".base_layer", ""): tensor
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    moved = {id(live[name]) for name, old in start.items() if not torch.equal(live[name], old)}
    assert moved <= trained
    assert len(moved) > len(trained) / 2
    assert all(any(id(parameters[name]) in moved for name in parameters if name.startswith(f"{part}."))
               for part in method.chosen(pipe))  # fmt: skip

    path, drawn = method.save(pipe, tmp_path), picture(pipe)
    assert not np.array_equal(drawn, base)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    saved = load_file(path)
    assert saved.keys() == parameters.keys()
    other = build()
    for name, parameter in method.prepare(other).items():
        parameter.data.copy_(saved[name])
    assert np.array_equal(picture(other), drawn)

    for one in (pipe, other):
        method.remove(one)
        assert np.array_equal(picture(one), base)
    assert_same(before, snapshot(pipe))


@IN_SD
def test_half_precision_base(method):
    pipe = tiny_sd_pipeline().to(torch.bfloat16)
    base = picture(pipe)
    before = snapshot(pipe)
    parameters = method.prepare(pipe)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    np.testing.assert_allclose(picture(pipe), base, atol=0.05)
    train(pipe, method, parameters)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert not np.array_equal(picture(pipe), base)
    method.remove(pipe)
    assert_same(before, snapshot(pipe))


def test_one_method_at_a_time(tmp_path):
    pipe = tiny_sd_pipeline()
    method = LoRA(2)
    for action in (lambda: method.save(pipe, tmp_path), lambda: method.remove(pipe), lambda: method.parameters(pipe)):
        with pytest.raises(MethodError, match=r"holds no method.*prepare"):
            action()
    method.prepare(pipe)
    with unchanged(pipe):
        for other in (method, LoRA(4), SVDiff(), FullDreamBooth(), KronA()):
            with pytest.raises(MethodError, match="One method at a time"):
                other.prepare(pipe)
        with pytest.raises(MethodError, match="LoRA-DreamBooth"):
            LoRA(4).remove(pipe)
    method.remove(pipe)
    inject_krona(pipe, KronAConfig())
    with unchanged(pipe), pytest.raises(MethodError, match="already holds an adapter"):
        method.prepare(pipe)


@IN_SD
def test_where_a_second_component_fails_the_first_is_as_before(method):
    pipe = tiny_sd_pipeline()
    real, seen = type(method)._install, []

    class Failing(type(method)):
        def _install(self, component):
            real(self, component)
            seen.append(component)
            if len(seen) == len(self.chosen(pipe)):
                raise RuntimeError("no more memory")

    with unchanged(pipe), pytest.raises(RuntimeError, match="no more memory"):
        Failing(**method.options()).prepare(pipe)
    assert len(seen) == len(method.chosen(pipe))


def test_factors_that_do_not_divide_leave_the_pipeline_alone():
    pipe = tiny_sd_pipeline()
    with unchanged(pipe), pytest.raises(KronAError, match="cannot take these factors"):
        KronA(3, 64, text_encoders=True).prepare(pipe)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    pipe = tiny_sd_pipeline()
    method = LoRA(2)
    with torch.no_grad():
        next(iter(method.prepare(pipe).values())).fill_(torch.inf)
    with pytest.raises(AdapterFileError, match="nothing was saved"):
        method.save(pipe, tmp_path)
    assert not any(tmp_path.iterdir())
