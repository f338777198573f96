import base64
import io
import math
import re

import numpy as np
import yaml
from PIL import Image

from diffusekrona.training.reports import loss_curve, model_card, run_page

FACTS = {"steps": "4 on 3 images", "final <loss>": "0.1"}


def pictures_in(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(content)))
        for content in re.findall(r"src='data:image/png;base64,([^']+)'", page)
    ]


def test_the_page_has_settings_loss_pictures_and_the_command_and_needs_no_other_file(tmp_path):
    Image.new("RGB", (7, 5), "red").save(tmp_path / "sheet.png")
    settings = {"instance_prompt": "a <sks> & toy", "learning_rate": 1e-4}
    page = run_page("a <sks> toy", "train --config 'a & b'", FACTS, settings, [0.5, 0.2], tmp_path / "sheet.png")
    curve, sheet = pictures_in(page)
    assert (curve.size, sheet.size) == ((880, 352), (7, 5))
    assert "<h1>a &lt;sks&gt; toy</h1>" in page
    assert "<title>a &lt;sks&gt; toy</title>" in page
    assert "<pre>train --config &#x27;a &amp; b&#x27;</pre>" in page
    assert "<td>instance_prompt</td><td>a &lt;sks&gt; &amp; toy</td>" in page
    assert "<td>learning_rate</td><td>0.0001</td>" in page
    assert "<td>final &lt;loss&gt;</td><td>0.1</td>" in page
    assert page.index("the loss over the steps") < page.index("<h2>Validation</h2>") < page.index("<h2>Settings</h2>")
    assert "<meta charset='utf-8'>" in page
    assert "<sks>" not in page
    assert not re.search(r"(src|href)='(?!data:)", page)


def test_without_validation_there_is_no_empty_heading(tmp_path):
    page = run_page("toy", "train", FACTS, {}, [0.5], tmp_path / "sheet.png")
    assert "<h2>Validation</h2>" not in page
    assert len(pictures_in(page)) == 1


def lines_of(losses, window, monkeypatch):
    """(steps, values, label) of each line that is plotted."""
    drawn = []
    monkeypatch.setattr(
        "diffusekrona.training.reports.figure_png",
        lambda figure: drawn.extend((*line.get_data(), line.get_label()) for line in figure.axes[0].lines) or b"",
    )
    loss_curve(losses, **({} if window is None else {"window": window}))
    return drawn


def test_the_curve_shows_each_step_and_the_mean_of_those_before_without_skipped_ones(monkeypatch):
    losses = [4.0, 2.0, math.nan, 3.0, 1.0]
    each, mean = lines_of(losses, 2, monkeypatch)
    np.testing.assert_array_equal(each[0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(each[1], losses)
    np.testing.assert_array_equal(mean[0], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(mean[1], [4, 3, 2, 3, 2])
    assert (each[2], mean[2]) == ("each step", "mean of 2 steps")


def test_the_mean_is_by_default_that_of_50_steps(monkeypatch):
    _, mean = lines_of([1.0] * 5 + [0.0] * 54, 50, monkeypatch)
    _, by_default = lines_of([1.0] * 5 + [0.0] * 54, None, monkeypatch)
    np.testing.assert_array_equal(by_default[1], mean[1])
    assert by_default[1][53:].tolist() == [0.02, *[0.0] * 5]
    assert by_default[2] == "mean of 50 steps"


def test_the_curve_says_what_its_axes_are(monkeypatch):
    named = []
    monkeypatch.setattr(
        "diffusekrona.training.reports.figure_png",
        lambda figure: named.extend((figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())) or b"",
    )
    loss_curve([0.5])
    assert named == ["step", "loss"]


def test_skipped_steps_alone_have_no_mean(monkeypatch):
    (_, _), mean = [line[1:] for line in lines_of([math.nan], 50, monkeypatch)]
    assert math.isnan(mean[0][0])


def test_a_model_card_has_a_header_that_the_hub_reads_whatever_the_prompt():
    prompt = 'a "sks" toy: c:\\toys'
    names = ["toy.safetensors", "b"]
    card = model_card("owner/base", "me/toy", prompt, "StableDiffusion3Pipeline", {"steps": "4"}, names)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "owner/base",
        "library_name": "diffusers",
        "instance_prompt": prompt,
        "pipeline_tag": "text-to-image",
        "tags": ["diffusekrona", "kronecker-adapter", "dreambooth"],
    }
    assert f"# {prompt}\n" in text
    assert "| steps | 4 |" in text
    assert "Files: `toy.safetensors`, `b`." in text
    code = text.split("```python\n")[1].split("```")[0]
    assert code.splitlines() == [
        "import torch",
        "from diffusers import StableDiffusion3Pipeline",
        "from diffusekrona import load_krona, merge_krona",
        "",
        "pipe = StableDiffusion3Pipeline.from_pretrained('owner/base', dtype=torch.float32)  # torch.bfloat16 on a GPU",
        "load_krona(pipe, 'me/toy')",
        "merge_krona(pipe)  # free from here on",
        f"image = pipe({prompt!r}).images[0]",
    ]
    assert f"for `owner/base`, trained with diffusekrona. Write **{prompt}** in a prompt" in text
