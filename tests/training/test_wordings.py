import torch

from diffusekrona.training import TrainingConfig
from diffusekrona.training.wordings import ORDERS, all_wordings, drawn_wording, wordings

CAPTION = "sks toy, sand, sun, sea, sky"


def drawn(config, count=2000):
    generator = torch.Generator().manual_seed(0)
    return [drawn_wording(CAPTION, config, generator) for _ in range(count)]


def test_without_a_wish_a_caption_stays_and_nothing_random_is_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert drawn_wording(CAPTION, TrainingConfig(), generator) == CAPTION
    assert torch.equal(generator.get_state(), before)
    assert all_wordings([CAPTION, CAPTION], TrainingConfig()) == [CAPTION]


def test_tags_change_their_order_but_for_the_first_ones():
    for kept in (0, 1, 2):
        found = wordings(CAPTION, TrainingConfig(shuffle_tags=True, keep_tags=kept))
        assert found[0] == CAPTION
        assert 5 < len(found) <= ORDERS if kept < 2 else len(found) == 6
        for text in found:
            tags = text.split(", ")
            assert tags[:kept] == CAPTION.split(", ")[:kept]
            assert sorted(tags) == sorted(CAPTION.split(", "))


def test_all_that_is_drawn_was_encoded_and_all_that_was_encoded_is_drawn():
    config = TrainingConfig(shuffle_tags=True, caption_dropout=0.1)
    assert set(drawn(config)) == set(all_wordings([CAPTION], config))


def test_captions_are_dropped_as_often_as_was_asked_for():
    share = drawn(TrainingConfig(caption_dropout=0.2)).count("") / 2000
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 2000) ** 0.5
    assert "" not in drawn(TrainingConfig(shuffle_tags=True))
