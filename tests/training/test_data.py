import numpy as np
import pytest
from PIL import Image

from diffusekrona.training import DatasetError, load_folder, prepare_images

PROMPT = "a sks toy"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def solid(size, colour=RED, mode="RGB"):
    return Image.new(mode, size, colour)


def prepare(image, resolution=32):
    return prepare_images([image], PROMPT, resolution)[0]


def test_images_come_in_the_order_of_their_names_and_other_files_are_ignored(tmp_path):
    for name, colour in (("b.PNG", BLUE), ("a.jpeg", RED), ("c.webp", WHITE)):
        solid((32, 32), colour).save(tmp_path / name, quality=100)
    (tmp_path / "._a.jpg").write_bytes(b"a resource fork")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "more").mkdir()
    solid((32, 32)).save(tmp_path / "more" / "d.png")

    images = load_folder(tmp_path, PROMPT, 32)

    found = [np.array(image.image)[16, 16] for image in images]
    assert len(found) == 3
    for pixel, colour in zip(found, (RED, BLUE, WHITE), strict=True):
        assert np.abs(pixel.astype(int) - colour).max() < 10


def test_a_text_file_overrides_the_prompt_of_its_image_only(tmp_path):
    solid((32, 32)).save(tmp_path / "a.png")
    solid((32, 32)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("\ufeff  a sks toy\n on sand \n", encoding="utf-8")
    assert [image.prompt for image in load_folder(tmp_path, PROMPT, 32)] == [PROMPT, "a sks toy on sand"]


def test_the_middle_square_is_kept_and_the_shape_of_things_with_it():
    image = solid((96, 32), BLUE)
    image.paste(RED, (32, 0, 64, 32))
    prepared = prepare(image, 16)
    assert prepared.image.size == (16, 16)
    assert prepared.image.mode == "RGB"
    assert np.array(prepared.image).reshape(-1, 3).std(axis=0).max() < 60
    assert tuple(np.array(prepared.image)[8, 8]) == RED


def test_sizes_are_those_sdxl_conditions_on():
    wide, tall = prepare(solid((96, 32)), 16), prepare(solid((32, 64)), 16)
    assert (wide.original_size, wide.crop_top_left) == ((32, 96), (0, 16))
    assert (tall.original_size, tall.crop_top_left) == ((64, 32), (8, 0))


def test_a_small_image_is_enlarged():
    assert prepare(solid((5, 7)), 32).image.size == (32, 32)


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    image = solid((40, 40), BLUE)
    image.paste(RED, (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90° clockwise to view.
    image.save(tmp_path / "a.png", exif=exif)
    pixels = np.array(load_folder(tmp_path, PROMPT, 40)[0].image)
    assert tuple(pixels[5, 20]) == RED
    assert tuple(pixels[35, 20]) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode)
    assert tuple(np.array(prepare(image).image)[16, 16]) == WHITE


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    solid((32, 32), 0, "P").save(tmp_path / "a.png", transparency=0)
    assert tuple(np.array(load_folder(tmp_path, PROMPT, 32)[0].image)[16, 16]) == WHITE


def test_half_transparent_pixels_are_mixed_with_white():
    pixel = np.array(prepare(Image.new("RGBA", (8, 8), (0, 0, 0, 128))).image)[4, 4]
    assert np.abs(pixel.astype(int) - 127).max() <= 1


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 128 * 256, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.array(load_folder(tmp_path, PROMPT, 32)[0].image)[16, 16].tolist() == [128] * 3


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes_become_rgb(mode):
    assert prepare(Image.new(mode, (32, 32))).image.mode == "RGB"


def test_the_callers_image_is_not_changed():
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    prepare(image)
    assert (image.mode, image.size) == ("RGBA", (40, 20))


def test_a_missing_folder_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="There is no image folder toys") as error:
        load_folder("toys", PROMPT, 32)
    assert str(tmp_path / "toys") in str(error.value)


def test_a_folder_without_images_says_what_it_needs(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"at least one \.png, \.jpg, \.jpeg, \.webp"):
        load_folder(tmp_path, PROMPT, 32)


@pytest.mark.parametrize("kept", [0, 10, 60, 120])
def test_a_damaged_image_is_named(tmp_path, kept):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:kept])
    with pytest.raises(DatasetError, match=r"b\.png cannot be read"):
        load_folder(tmp_path, PROMPT, 32)


@pytest.mark.parametrize(("text", "said"), [(b" \n", "is empty"), (b"\xff\xfe\xfa", "is not UTF-8")])
def test_a_useless_caption_is_named(tmp_path, text, said):
    solid((32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(DatasetError, match=rf"a\.txt {said}"):
        load_folder(tmp_path, PROMPT, 32)


def test_a_blank_prompt_is_refused():
    with pytest.raises(DatasetError, match="The prompt is empty"):
        prepare_images([solid((8, 8))], "  ", 32)


def test_prompts_may_be_one_for_each_image():
    images = prepare_images([solid((8, 8))] * 2, ["a sks toy", "a sks toy on sand"], 32)
    assert [image.prompt for image in images] == ["a sks toy", "a sks toy on sand"]


def test_a_wrong_number_of_prompts_is_refused():
    with pytest.raises(DatasetError, match="2 images but 3 prompts"):
        prepare_images([solid((8, 8))] * 2, ["a", "b", "c"], 32)


def test_no_images_at_all_are_refused():
    with pytest.raises(DatasetError, match="no images"):
        prepare_images([], PROMPT, 32)
