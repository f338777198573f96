import io

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusekrona.training import (
    DatasetError,
    ImagePlan,
    TrainingConfigError,
    load_dataset,
    load_folder,
    prepare_images,
)
from diffusekrona.training.data import nearest

PROMPT = "a sks toy"
PLAN = ImagePlan(32)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def solid(size, colour=RED, mode="RGB"):
    return Image.new(mode, size, colour)


def prepare(image, resolution=32, **plan):
    return prepare_images([image], PROMPT, ImagePlan(resolution, **plan))[0]


def test_images_come_in_the_order_of_their_names_and_other_files_are_ignored(tmp_path):
    for name, colour in (("b.PNG", BLUE), ("a.jpeg", RED), ("c.webp", WHITE)):
        solid((32, 32), colour).save(tmp_path / name, quality=100)
    (tmp_path / "._a.jpg").write_bytes(b"a resource fork")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "more").mkdir()
    solid((32, 32)).save(tmp_path / "more" / "d.png")

    images = load_folder(tmp_path, PROMPT, PLAN)

    found = [np.array(image.image)[16, 16] for image in images]
    assert len(found) == 3
    for pixel, colour in zip(found, (RED, BLUE, WHITE), strict=True):
        assert np.abs(pixel.astype(int) - colour).max() < 10


def test_a_text_file_overrides_the_prompt_of_its_image_only(tmp_path):
    solid((32, 32)).save(tmp_path / "a.png")
    solid((32, 32)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("\ufeff  a sks toy\n on sand \n", encoding="utf-8")
    assert [image.prompt for image in load_folder(tmp_path, PROMPT, PLAN)] == [PROMPT, "a sks toy on sand"]


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
    pixels = np.array(load_folder(tmp_path, PROMPT, ImagePlan(40))[0].image)
    assert tuple(pixels[5, 20]) == RED
    assert tuple(pixels[35, 20]) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(mode):
    image = Image.new(mode, (32, 32))
    assert tuple(np.array(prepare(image).image)[16, 16]) == WHITE


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    solid((32, 32), 0, "P").save(tmp_path / "a.png", transparency=0)
    assert tuple(np.array(load_folder(tmp_path, PROMPT, PLAN)[0].image)[16, 16]) == WHITE


def test_half_transparent_pixels_are_mixed_with_white():
    pixel = np.array(prepare(Image.new("RGBA", (8, 8), (0, 0, 0, 128))).image)[4, 4]
    assert np.abs(pixel.astype(int) - 127).max() <= 1


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 128 * 256, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.array(load_folder(tmp_path, PROMPT, PLAN)[0].image)[16, 16].tolist() == [128] * 3


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
        load_folder("toys", PROMPT, PLAN)
    assert str(tmp_path / "toys") in str(error.value)


def test_a_folder_without_images_says_what_it_needs(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "more").mkdir()
    solid((8, 8)).save(tmp_path / "more" / "b.png")
    with pytest.raises(DatasetError, match=r"such as name\.png or name\.jpg; its subfolders more/ are not looked into"):
        load_folder(tmp_path, PROMPT, PLAN)


@pytest.mark.parametrize("kept", [0, 10, 60, 120])
def test_a_damaged_image_is_named(tmp_path, kept):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:kept])
    with pytest.raises(DatasetError, match=r"b\.png cannot be read"):
        load_folder(tmp_path, PROMPT, PLAN)


@pytest.mark.parametrize(("text", "said"), [(b" \n", "is empty"), (b"\xff\xfe\xfa", "is not UTF-8")])
def test_a_useless_caption_is_named(tmp_path, text, said):
    solid((32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(DatasetError, match=rf"a\.txt {said}"):
        load_folder(tmp_path, PROMPT, PLAN)


def test_a_blank_prompt_is_refused():
    with pytest.raises(DatasetError, match="The prompt is empty"):
        prepare_images([solid((8, 8))], "  ", PLAN)


def test_prompts_may_be_one_for_each_image():
    images = prepare_images([solid((8, 8))] * 2, ["a sks toy", "a sks toy on sand"], PLAN)
    assert [image.prompt for image in images] == ["a sks toy", "a sks toy on sand"]


def test_a_wrong_number_of_prompts_is_refused():
    with pytest.raises(DatasetError, match="2 images but 3 prompts"):
        prepare_images([solid((8, 8))] * 2, ["a", "b", "c"], PLAN)


def test_no_images_at_all_are_refused():
    with pytest.raises(DatasetError, match="no images"):
        prepare_images([], PROMPT, PLAN)


# Plans


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resolution", 0),
        ("resolution", "512"),
        ("repeats", 0),
        ("multiple", 0),
        ("center_crop", "no"),
        ("aspect_ratio_buckets", 1),
        ("on_bad_image", "ignore"),
    ],
)
def test_an_impossible_plan_is_refused_by_name(field, value):
    with pytest.raises(TrainingConfigError, match=rf"^{field} must be .*{value!r}"):
        ImagePlan(**{"resolution": 32, field: value})


def places(size):
    """A picture whose red and green say where in it a pixel is."""
    width, height = size
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 0], array[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(array)


@given(st.tuples(st.integers(32, 200), st.integers(32, 200)), st.booleans())
def test_the_part_that_is_cut_is_where_the_numbers_say(size, center):
    """The shorter side is as long as the result, so that nothing is resized and pixels can be read as places."""
    short = min(size)
    found = prepare_images([places(size)], PROMPT, ImagePlan(short, center_crop=center))[0]
    left, top, _ = np.array(found.image)[0, 0]
    assert found.crop_top_left == pytest.approx((top, left), abs=1)
    assert found.image.size == (short, short)
    if center:
        assert found.crop_top_left == pytest.approx(((size[1] - short) / 2, (size[0] - short) / 2), abs=1)


def test_each_repeat_is_cut_elsewhere_and_again_in_the_same_places():
    def crops(seed):
        plan = ImagePlan(40, center_crop=False, repeats=4, seed=seed)
        found = prepare_images([places((200, 40)), places((40, 200))], PROMPT, plan)
        assert [image.source for image in found] == ["image 1"] * 4 + ["image 2"] * 4
        return [image.crop_top_left for image in found]

    assert len(set(crops(0))) == 8
    assert crops(0) == crops(0)
    assert crops(0) != crops(1)


def test_random_parts_are_from_all_over_the_image():
    plan = ImagePlan(20, center_crop=False, repeats=300)
    lefts = [image.crop_top_left[1] for image in prepare_images([places((120, 20))], PROMPT, plan)]
    assert min(lefts) < 10
    assert max(lefts) > 90
    assert abs(np.mean(lefts) - 50) < 10


def test_repeats_of_the_middle_are_all_the_same():
    found = prepare_images([places((60, 40))], PROMPT, ImagePlan(32, repeats=3))
    assert len(found) == 3
    assert len({image.image.tobytes() for image in found}) == 1


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_with_buckets_each_image_is_of_the_size_nearest_to_its_own_shape(size):
    plan = ImagePlan(64, aspect_ratio_buckets=True, multiple=8)
    found = prepare_images([Image.new("RGB", size)], PROMPT, plan)[0]
    assert found.image.size in plan.sizes_at(64)
    assert found.image.size == nearest(size, plan.sizes_at(64))
    assert found.sizes == (*size[::-1], *found.crop_top_left, *found.image.size[::-1])


# Images of all kinds


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (1, 3000)])
@pytest.mark.parametrize("buckets", [False, True])
def test_tiny_and_very_narrow_images_are_no_trouble(size, buckets):
    found = prepare(solid(size, BLUE), aspect_ratio_buckets=buckets)
    assert found.image.size in ImagePlan(32, aspect_ratio_buckets=buckets).sizes_at(32)
    assert np.array(found.image).reshape(-1, 3).tolist() == [list(BLUE)] * (found.image.width * found.image.height)


def test_the_colours_of_print_become_those_of_screens(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    pixel = np.array(load_folder(tmp_path, PROMPT, PLAN)[0].image)[16, 16].astype(int)
    assert np.abs(pixel - np.array(Image.new("CMYK", (1, 1), (0, 255, 255, 0)).convert("RGB"))[0, 0]).max() < 10
    assert pixel[0] > 150 > 100 > pixel[1]


@pytest.mark.parametrize("value", [0, 1, 255, 256, 40000, 65535])
def test_sixteen_bits_become_their_upper_eight(tmp_path, value):
    Image.fromarray(np.full((32, 32), value, dtype=np.uint16)).save(tmp_path / "a.tif")
    assert np.array(load_folder(tmp_path, PROMPT, PLAN)[0].image)[16, 16].tolist() == [value >> 8] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_way_to_hold_a_camera_is_turned_upright_and_its_size_with_it(tmp_path, orientation):
    """Made by undoing what a viewer has to do, step by step, as the standard has it."""
    upright = places((60, 40))
    undo = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"],
        5: ["TRANSPOSE"], 6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }  # fmt: skip
    held = upright
    for step in undo[orientation]:
        held = held.transpose(Image.Transpose[step])
    exif = Image.Exif()
    exif[0x0112] = orientation
    held.save(tmp_path / "a.png", exif=exif)
    found = load_folder(tmp_path, PROMPT, ImagePlan(40))[0]
    assert found.original_size == (40, 60)
    assert np.array_equal(np.array(found.image), np.array(upright)[:, 10:50])


# Bad images


@pytest.fixture
def one_bad(tmp_path):
    for name in ("a", "c"):
        solid((32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    return tmp_path


def test_a_bad_image_stops_or_is_left_out_with_a_warning(one_bad, caplog):
    with pytest.raises(DatasetError, match=r"b\.jpg cannot be read"):
        load_folder(one_bad, PROMPT, PLAN)
    found = load_folder(one_bad, PROMPT, ImagePlan(32, on_bad_image="skip"))
    assert [image.source.rpartition("/")[2] for image in found] == ["a.png", "c.png"]
    (record,) = caplog.records
    assert "b.jpg cannot be read" in record.getMessage()
    assert record.getMessage().endswith("It is left out.")


def test_what_is_wrong_with_a_caption_is_not_skipped(one_bad):
    (one_bad / "c.txt").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"c\.txt is empty"):
        load_folder(one_bad, PROMPT, ImagePlan(32, on_bad_image="skip"))


def test_if_all_images_are_bad_there_is_nothing_to_train_on(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="None of the 2 images can be used"):
        load_folder(tmp_path, PROMPT, ImagePlan(32, on_bad_image="skip"))


def test_an_image_in_memory_that_turns_out_to_be_damaged_is_one_too(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-500])
    images = [solid((32, 32)), Image.open(tmp_path / "a.png")]
    with pytest.raises(DatasetError, match="image 2 cannot be read"):
        prepare_images(images, PROMPT, PLAN)
    found = prepare_images([images[0], Image.open(tmp_path / "a.png")], PROMPT, ImagePlan(32, on_bad_image="skip"))
    assert len(found) == 1


def test_without_a_common_prompt_each_image_needs_its_own(tmp_path):
    solid((32, 32)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png has no prompt: .*a\.txt"):
        load_folder(tmp_path, None, PLAN)
    (tmp_path / "a.txt").write_text("a sks cup")
    assert load_folder(tmp_path, None, PLAN)[0].prompt == "a sks cup"


# Datasets on disk


@pytest.fixture
def dataset(tmp_path):
    """Writes a dataset of these columns to disk, images as they would be encoded."""
    datasets = pytest.importorskip("datasets")

    def write(split=None, **columns):
        rows = datasets.Dataset.from_dict(columns)
        for name, values in columns.items():
            if not isinstance(values[0], str):
                rows = rows.cast_column(name, datasets.Image())
        folder = tmp_path / "dataset"
        (datasets.DatasetDict({split: rows}) if split else rows).save_to_disk(str(folder))
        return folder

    return write


def encoded(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


ROWS = [encoded(solid((40, 30), RED)), encoded(solid((30, 40), BLUE))]


@pytest.mark.parametrize("split", [None, "train"])
def test_a_dataset_is_as_good_as_its_images_and_captions(dataset, split):
    found = load_dataset(dataset(split, image=ROWS, text=["a red toy", " a blue toy "]), None, PLAN)
    assert [image.prompt for image in found] == ["a red toy", "a blue toy"]
    assert [tuple(np.array(image.image)[16, 16]) for image in found] == [RED, BLUE]
    assert [image.original_size for image in found] == [(30, 40), (40, 30)]
    assert found[1].source.endswith("dataset, row 1")


def test_columns_can_have_other_names_and_one_prompt_can_replace_the_captions(dataset):
    folder = dataset(picture=ROWS, said=["a red toy", "a blue toy"])
    assert load_dataset(folder, None, PLAN, "picture", "said")[0].prompt == "a red toy"
    assert [image.prompt for image in load_dataset(folder, PROMPT, PLAN, "picture")] == [PROMPT] * 2


def test_a_dataset_that_lacks_something_is_refused_by_name(dataset, tmp_path):
    folder = dataset(image=ROWS)
    with pytest.raises(DatasetError, match=r"no column 'text'; there are: image\."):
        load_dataset(folder, None, PLAN)
    with pytest.raises(DatasetError, match="no column 'picture'"):
        load_dataset(folder, PROMPT, PLAN, "picture")
    with pytest.raises(DatasetError, match="is no dataset that save_to_disk wrote"):
        load_dataset(tmp_path / "nowhere", PROMPT, PLAN)


def test_a_dataset_without_a_training_split_says_which_there_are(dataset):
    with pytest.raises(DatasetError, match=r"no split 'train'; give the folder of one of its splits: test\."):
        load_dataset(dataset("test", image=ROWS), PROMPT, PLAN)


def test_a_bad_row_stops_or_is_left_out(dataset):
    folder = dataset(image=[ROWS[0], {"bytes": b"no image", "path": None}], text=["a", "b"])
    with pytest.raises(DatasetError, match="row 1 cannot be read"):
        load_dataset(folder, None, PLAN)
    assert len(load_dataset(folder, None, ImagePlan(32, on_bad_image="skip"))) == 1


def test_a_column_of_something_else_holds_no_images(dataset):
    with pytest.raises(DatasetError, match="column 'text' holds no image"):
        load_dataset(dataset(image=ROWS, text=["a", "b"]), PROMPT, PLAN, "text")


def test_a_row_without_a_caption_is_named(dataset):
    with pytest.raises(DatasetError, match="row 1 has no prompt in column 'text'"):
        load_dataset(dataset(image=ROWS, text=["a", None]), None, PLAN)


# What a folder holds


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_every_format_that_pillow_reads_is_taken(tmp_path, caplog):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for name in ("a.png", "b.webp", "c.gif", "d.avif", "f.bmp", "g.tga", "h.tiff", "i.jp2", "j.ppm"):
        picture.save(tmp_path / name)
    picture.save(tmp_path / "e.JFIF", format="JPEG")
    Image.new("RGB", (32, 32), RED).save(tmp_path / "k.gif", save_all=True, append_images=[solid((32, 32), BLUE)])
    pillow_heif.register_heif_opener()
    picture.save(tmp_path / "l.HEIC", format="HEIF")
    found = load_folder(tmp_path, PROMPT, PLAN)
    assert len(found) == 12
    assert not warned(caplog)
    first_frame = next(image for image in found if image.source.endswith("k.gif"))
    assert np.abs(np.array(first_frame.image)[16, 16].astype(int) - RED).max() < 10


def test_what_is_in_a_folder_and_not_used_is_named(tmp_path, caplog):
    solid((32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("a sks toy")
    (tmp_path / "b.txt").write_text("of no image")
    (tmp_path / "film.mp4").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "more").mkdir()
    solid((32, 32)).save(tmp_path / "more" / "c.png")
    assert len(load_folder(tmp_path, PROMPT, PLAN)) == 1
    (told,) = warned(caplog)
    assert "1 images are used; passed over: b.txt (a caption without an image), film.mp4 (no image)" in told
    assert "more/ (a subfolder" in told
    assert "a.caption" not in told
    assert "DS_Store" not in told


def test_kohyas_subfolders_say_how_often_and_what(tmp_path):
    for name, count in (("3_sks toy", 2), ("1_a toy", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            solid((32, 32)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "3_sks toy" / "1.txt").write_text("sks toy on sand")
    solid((32, 32)).save(tmp_path / "cover.png")
    prompts = [image.prompt for image in load_folder(tmp_path / "3_sks toy", "x", PLAN)]
    assert prompts == ["x", "sks toy on sand"]
    (tmp_path / "cover.png").unlink()
    found = [image.prompt for image in load_folder(tmp_path, None, PLAN)]
    assert found == ["a toy", *["sks toy"] * 3, *["sks toy on sand"] * 3]
    given = [image.prompt for image in load_folder(tmp_path, PROMPT, PLAN)]
    assert given == [PROMPT, *[PROMPT] * 3, *["sks toy on sand"] * 3]


@pytest.mark.parametrize(("choice", "left"), [("upscale", 2), ("skip", 1)])
def test_images_below_the_resolution_are_named(tmp_path, caplog, choice, left):
    solid((31, 64)).save(tmp_path / "a.png")
    solid((32, 64)).save(tmp_path / "b.png")
    assert len(load_folder(tmp_path, PROMPT, ImagePlan(32, on_small=choice))) == left
    (told,) = warned(caplog)
    assert "a.png (31 x 64)" in told
    assert "b.png" not in told
    with pytest.raises(DatasetError, match=r"a\.png \(31 x 64\).*set on_small to upscale or skip"):
        load_folder(tmp_path, PROMPT, ImagePlan(32, on_small="stop"))


def test_each_image_comes_in_every_resolution():
    found = prepare_images([solid((64, 64)), solid((48, 64))], PROMPT, ImagePlan(32, extra_resolutions=[48, 16]))
    assert [image.image.size for image in found] == [(32, 32), (48, 48), (16, 16)] * 2
    with pytest.raises(TrainingConfigError, match="extra_resolutions 20 is not divisible by 8"):
        ImagePlan(32, extra_resolutions=[20])


# Masks


def test_a_mask_is_cut_like_its_image_wherever_it_comes_from(tmp_path):
    """The left half counts: by a file beside the image, and by what is not transparent."""
    half = Image.new("L", (64, 32))
    half.paste(255, (0, 0, 32, 32))
    solid((64, 32)).save(tmp_path / "a.png")
    half.save(tmp_path / "a-masklabel.png")
    solid((64, 32)).save(tmp_path / "b.png")
    half.save(tmp_path / "b.mask.png")
    opaque = solid((64, 32), mode="RGBA")
    opaque.putalpha(half)
    opaque.save(tmp_path / "c.png")
    solid((64, 32)).save(tmp_path / "d.png")
    *found, whole = load_folder(tmp_path, PROMPT, ImagePlan(32, masked_loss=True))
    assert len(found) == 3
    for image in found:
        mask = np.array(image.mask)
        assert mask.shape == (32, 32)
        assert (mask[:, :16] == 255).all()
        assert (mask[:, 16:] == 0).all()
    assert whole.mask is None
    assert [image.mask for image in load_folder(tmp_path, PROMPT, PLAN)] == [None] * 4


def test_masks_that_cannot_be_used_are_refused(tmp_path):
    solid((32, 32)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="masked_loss is on, but no image has a mask"):
        load_folder(tmp_path, PROMPT, ImagePlan(32, masked_loss=True))
    Image.new("L", (16, 16)).save(tmp_path / "a.mask.png")
    with pytest.raises(DatasetError, match=r"mask of .*a\.png is 16 x 16"):
        load_folder(tmp_path, PROMPT, ImagePlan(32, masked_loss=True))
