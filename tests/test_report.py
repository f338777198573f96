"""krona_report against the tensors themselves: counts, ranks, costs, and the printed table."""

import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from torch import nn

from diffusekrona import KronAConfig, KronALayer, KronAReport, inject_krona, krona_report
from diffusekrona.errors import AdapterNameError, KronAError
from diffusekrona.kron.costs import frozen_step, krona_step, lokr_step, lora_step, merging_pays
from diffusekrona.report import LORA_RANK
from diffusekrona.tuner.injected import krona_layers

CONFIG = KronAConfig(a1=4, a2=2, factor_pattern={"to_k": (2, 8)}, init_b="normal")


class Attention(nn.Module):
    """Four projections of three sizes, and a layer that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 24, bias=False)
        self.to_k = nn.Linear(32, 24)
        self.to_v = nn.Linear(16, 24)
        self.to_out = nn.ModuleList([nn.Linear(24, 8)])
        self.other = nn.Linear(8, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(config: KronAConfig = CONFIG, name: str = "default", device: str = "cpu") -> nn.Module:
    model = Attention().to(device)
    inject_krona(model, config, adapter_name=name)
    return model


def by_name(report: KronAReport) -> dict:
    return {layer.name: layer for layer in report.layers}


def dense_rank(layer: KronALayer) -> int:
    A, B = (factors["default"].detach().double() for factors in (layer.krona_A, layer.krona_B))
    return int(torch.linalg.matrix_rank(torch.kron(A, B)))


def test_totals_are_the_sums_over_layers_and_the_elements_of_the_tensors():
    bare = sum(p.numel() for p in Attention().parameters())
    model = attention()
    report = krona_report(model)
    assert report.adapter_name == "default"
    assert report.parameters == sum(layer.parameters for layer in report.layers)
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.lora_parameters == sum(layer.lora_parameters for layer in report.layers)
    assert report.base_parameters == bare
    assert report.share == pytest.approx(report.parameters / bare)


def test_lora_parameters_are_those_that_pefts_lora_trains_in_the_same_layers():
    config = LoraConfig(r=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    lora = inject_adapter_in_model(config, Attention())
    assert krona_report(attention()).lora_parameters == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_each_layer_is_there_once_with_its_name_shapes_parameters_and_cost():
    model = attention()
    layers, report = krona_layers(model), by_name(krona_report(model))
    assert report.keys() == layers.keys() == {"to_q", "to_k", "to_v", "to_out.0"}
    for name, layer in layers.items():
        A, B = layer.krona_A["default"], layer.krona_B["default"]
        found = report[name]
        assert found.shapes == (*A.shape, *B.shape)
        assert found.parameters == A.numel() + B.numel()
        d, h = layer.out_features, layer.in_features
        assert found.step_costs(50) == {
            "frozen": frozen_step(d, h, 50),
            "KronA": krona_step(found.shapes, 50, merged=merging_pays(found.shapes, 50)),
            "LoRA r=4": lora_step(d, h, 4, 50),
            "LoKr factor 8": lokr_step(d, h, None, 8, 50),
        }


def test_a_layer_counts_as_many_terms_as_it_has():
    model = attention(KronAConfig(a1=4, a2=2, num_terms=2, terms_pattern={"to_k": 3, "to_v": 1}, init_b="normal"))
    report = krona_report(model)
    assert {name: layer.update.num_terms for name, layer in by_name(report).items()} == {
        "to_q": 2,
        "to_k": 3,
        "to_v": 1,
        "to_out.0": 2,
    }
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert by_name(report)["to_k"].parameters == 3 * (4 * 2 + 6 * 16)
    for name, layer in krona_layers(model).items():
        assert by_name(report)[name].rank == int(torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-5))


def test_predicted_steps_are_the_times_of_all_layers_over_the_frozen_ones():
    report = krona_report(attention())
    costs = [layer.step_costs(77) for layer in report.layers]
    floor = sum(cost["frozen"].time(12) for cost in costs)
    expected = {name: sum(cost[name].time(12) for cost in costs) / floor for name in costs[0] if name != "frozen"}
    assert report.predicted_steps(77, balance=12) == pytest.approx(expected)
    assert expected["KronA"] > 1


def test_the_table_gives_the_predicted_step_of_each_kind_of_layer_and_of_all():
    report = krona_report(attention())
    table = report.table()
    steps = list(table.columns[-1].cells)
    kinds = {layer.shapes: layer for layer in report.layers}
    alone = [KronAReport("", [kinds[shapes]], 1).predicted_steps()["KronA"] for shapes in sorted(kinds)]
    assert steps == [f"{step:.2f}" for step in alone]
    together = report.predicted_steps()
    assert table.columns[-1].footer == f"{together['KronA']:.2f}"
    assert f"LoRA r=4: {together['LoRA r=4']:.2f}" in str(report)


def test_rank_is_that_of_the_dense_update_and_generic_factors_reach_the_highest():
    model = attention()
    for name, layer in by_name(krona_report(model)).items():
        assert layer.rank == dense_rank(krona_layers(model)[name])
        assert layer.rank == layer.highest_rank > 0


def test_a_fresh_adapter_has_rank_zero_and_a_rank_it_can_reach():
    for layer in krona_report(attention(KronAConfig(a1=4, a2=2))).layers:
        assert layer.rank == 0
        assert layer.highest_rank > 0


def test_factors_of_lower_rank_are_seen():
    model = attention()
    layers = krona_layers(model)
    with torch.no_grad():
        layers["to_q"].krona_A["default"][:, 1] = layers["to_q"].krona_A["default"][:, 0] * 2
        layers["to_v"].krona_B["default"][1:] = layers["to_v"].krona_B["default"][:1]
        layers["to_k"].krona_A["default"].zero_()
    report = by_name(krona_report(model))
    for name, layer in layers.items():
        assert report[name].rank == dense_rank(layer)
    assert 0 < report["to_q"].rank < report["to_q"].highest_rank
    assert 0 < report["to_v"].rank < report["to_v"].highest_rank
    assert report["to_k"].rank == 0
    assert report["to_out.0"].rank == report["to_out.0"].highest_rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rank_is_found_whatever_the_factors_dtype(dtype):
    model = attention().to(dtype)
    for layer in krona_report(model).layers:
        assert layer.rank == layer.highest_rank


def test_on_the_meta_device_there_are_counts_and_no_rank():
    report, real = krona_report(attention(device="meta")), krona_report(attention())
    assert {layer.rank for layer in report.layers} == {None}
    assert report.parameters == real.parameters
    assert report.base_parameters == real.base_parameters
    assert [layer.highest_rank for layer in report.layers] == [layer.highest_rank for layer in real.layers]
    assert f"{report.parameters:,}" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_have_no_rank_and_do_not_stop_the_report(value):
    model = attention()
    with torch.no_grad():
        krona_layers(model)["to_q"].krona_A["default"][0, 0] = value
    report = by_name(krona_report(model))
    assert report["to_q"].rank is None
    assert report["to_k"].rank is not None


def test_an_adapter_of_another_method_beside_it_is_no_part_of_the_base():
    alone = krona_report(attention()).base_parameters
    model = attention()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["other"]), model, adapter_name="lora")
    assert krona_report(model).base_parameters == alone


def test_modules_trained_in_full_count_once_as_base():
    alone = krona_report(attention()).base_parameters
    config = KronAConfig(a1=4, a2=2, factor_pattern={"to_k": (2, 8)}, modules_to_save=["other"])
    assert krona_report(attention(config)).base_parameters == alone


def test_each_of_several_adapters_has_its_own_report():
    model = attention(name="first")
    inject_krona(model, KronAConfig(a1=2, a2=2, target_modules=["to_q"]), adapter_name="second")
    assert len(krona_report(model, "first").layers) == 4
    second = krona_report(model, "second")
    assert [layer.name for layer in second.layers] == ["to_q"]
    assert second.layers[0].shapes == (2, 2, 12, 8)
    assert second.base_parameters == krona_report(model, "first").base_parameters
    with pytest.raises(AdapterNameError, match="first, second"):
        krona_report(model)
    with pytest.raises(AdapterNameError, match="'third'"):
        krona_report(model, "third")


def test_without_an_adapter_the_error_says_how_to_get_one():
    with pytest.raises(AdapterNameError, match="inject_krona or load_krona"):
        krona_report(Attention())
    with pytest.raises(KronAError, match="Expected a torch module or a Diffusers pipeline"):
        krona_report("unet")


def test_layers_of_a_pipeline_carry_their_components_name_and_only_adapted_components_count_as_base():
    unet, encoder = Attention(), Attention()
    pipe = SimpleNamespace(components={"unet": unet, "text_encoder": encoder, "vae": nn.Linear(100, 100)})
    inject_krona(unet, CONFIG)
    report = krona_report(pipe)
    assert all(layer.name.startswith("unet.") for layer in report.layers)
    assert report.base_parameters == sum(p.numel() for p in Attention().parameters())
    inject_krona(encoder, CONFIG)
    both = krona_report(pipe)
    assert both.base_parameters == 2 * report.base_parameters
    assert both.parameters == 2 * report.parameters
    assert {layer.name.split(".")[0] for layer in both.layers} == {"unet", "text_encoder"}


def rows_of(text: str) -> list[list[str]]:
    """The table's rows, header first and totals last: what stands apart by at least two spaces."""
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]
    return [cells for cells in lines if len(cells) > 1]


def test_printing_gives_one_row_for_each_kind_of_layer_and_the_totals():
    report = krona_report(attention())
    text = str(report)
    header, *kinds, totals = rows_of(text)
    assert header[:5] == ["layers", "d × h", "A", "B", "parameters"]
    assert sorted(row[0] for row in kinds) == ["1", "1", "2"]
    pair = next(row for row in kinds if row[0] == "2")
    assert pair[1:4] == ["24 × 16", "4 × 2", "6 × 8"]
    assert sum(int(row[4].replace(",", "")) for row in kinds) == report.parameters
    assert totals[0] == "4"
    assert totals[1:3] == [f"{report.parameters:,}", f"{report.lora_parameters:,}"]
    assert f"{report.share:.3%} of the base's {report.base_parameters:,}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_kind_with_several_ranks_shows_the_lowest_and_the_highest():
    model = attention()
    with torch.no_grad():
        krona_layers(model)["to_q"].krona_B["default"].zero_()
    _, *kinds, _ = rows_of(str(krona_report(model)))
    pair = next(row for row in kinds if row[0] == "2")
    assert pair[6] == "0–12 / 12"


def test_the_table_of_every_layer_names_each_of_them():
    report = krona_report(attention())
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table(every_layer=True))
    _, *layers, totals = rows_of(capture.get())
    assert [row[0] for row in layers] == [layer.name for layer in report.layers]
    assert totals[0] == str(len(report.layers))


@pytest.mark.parametrize("name", ["[v] dog", "[/v]", "[bold]dog[/bold]"])
def test_brackets_in_an_adapters_name_are_printed_as_they_are(name):
    assert repr(name) in str(krona_report(attention(name=name)))


def test_rich_prints_the_same_table():
    report = krona_report(attention())
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    assert capture.get().rstrip() == str(report)
