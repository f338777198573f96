"""Configs that say given things of given layers. What words mean there is tested in `test_presets.py`."""

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusekrona import KronAConfig
from diffusekrona.tuner.targets import common_and_pattern, layer_factors, target_layers, target_only

names = st.lists(st.sampled_from(["a", "b", "ab", "0"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.sampled_from([(1, 2), (2, 1), (4, 4)]), min_size=1, max_size=30))
def test_patterns_give_each_layer_its_factors_also_where_a_name_ends_as_another(shapes):
    (a1, a2), pattern = common_and_pattern(shapes)
    config = KronAConfig(a1=a1, a2=a2, factor_pattern=pattern)
    assert {name: layer_factors(config, name) for name in shapes} == shapes


def test_layers_that_share_a_value_share_a_pattern():
    shapes = {f"block.{number}.to_q": (2, 2) if number % 3 else (4, 4) for number in range(600)}
    common, pattern = common_and_pattern(shapes)
    assert common == (2, 2)
    assert len(pattern) == 1


class Tree(nn.Module):
    """A module at each of these dotted names and at all that lead to them."""

    def __init__(self, paths):
        super().__init__()
        for path in paths:
            parent = self
            for part in path.split("."):
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)


@given(st.sets(names, min_size=1, max_size=20), st.data())
def test_a_config_can_target_any_set_of_layers_and_no_other(paths, data):
    model = Tree(paths)
    chosen = data.draw(st.sets(st.sampled_from(sorted(name for name, _ in model.named_modules() if name)), min_size=1))
    config = KronAConfig()
    target_only(config, model, chosen)
    assert set(target_layers(model, config)) == chosen
