"""Our experiments for PEFT's image benchmark, and their way through a checkout of our own making."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoKrConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusekrona import KronAConfig
from diffusekrona.bases.architectures import build
from diffusekrona.errors import KronAError
from research.peft_image_gen import checkout, counting, dry_run, needs, runs, tiny_base
from research.peft_image_gen.__main__ import PEERS, app
from research.peft_image_gen.checkout import BASE, EXPERIMENTS, OURS, Benchmark, find_benchmark, put_experiments
from research.peft_image_gen.reloaded import reloaded
from tests.pipelines import tiny_klein_pipeline

LOKR, BALANCED, LARGE = (
    f"flux2-klein-{name}-lr1e-3" for name in ("lokr-factors", "balanced", "8x64")
)  # fmt: skip
TARGETS = {
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "linear_in", "linear_out",
}  # fmt: skip
"""What the benchmark's LoRA and LoKr adapt."""

# What is counted


def test_parameters_are_counted_on_kleins_layers_and_agree_with_the_benchmarks_rows_for_the_peers():
    counts = counting.count_all()
    assert {one.name: (one.parameters, one.ranks) for one in counts} == {
        LOKR: (783_360, (1536, 3072)),
        BALANCED: (890_880, (256, 768)),
        LARGE: (5_754_880, (384, 1152)),
        "lora/flux2-klein-default": (38_338_560, None),  # these two are what the benchmark's results say
        "lokr/flux2-klein-lr1e-3": (783_360, None),
    }
    steps = {one.name: one.step for one in counts}
    assert 1 < steps[BALANCED] < steps[LARGE] < steps["lora/flux2-klein-default"] < steps[LOKR]
    assert steps["lokr/flux2-klein-lr1e-3"] > 2.5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_adapts_the_layers_that_lora_and_lokr_adapt(name):
    assert counting.read_config(name).target_modules == TARGETS
    report = counting.report_of(name)
    assert len(report.layers) == 80
    assert report.base_parameters == 3_875_544_576  # of the benchmark's full fine-tune


def test_the_factors_of_lokr_are_peft_lokrs():
    with torch.device("meta"):
        lokr = get_peft_model(build("flux2-klein-4b"), LoKrConfig(r=32, target_modules=sorted(TARGETS)))
    theirs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in lokr.named_parameters():
        if parameter.requires_grad:
            layer, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            theirs.setdefault(layer, {})[factor] = tuple(parameter.shape)
    names = {"A": "lokr_w1", "B": "lokr_w2", "B1": "lokr_w2_a", "B2": "lokr_w2_b"}
    ours = {
        layer.name.removeprefix("base_model.model."): {
            names[factor]: tuple(shape) for factor, shape in layer.update.tensors.items()
        }
        for layer in counting.report_of(LOKR).layers
    }
    assert ours == theirs


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_training_differs_from_the_benchmarks_defaults_in_the_learning_rate_only(name):
    assert checkout.read_json(OURS / name / "training_params.json") == {
        "optimizer_kwargs": {"lr": 1e-3, "weight_decay": 1e-4}
    }
    assert {path.name for path in (OURS / name).iterdir()} == {"adapter_config.json", "training_params.json"}


# The checkout

SCRIPT = """
import json, os, pathlib, sys
print("training", *sys.argv[1:])
print("a warning", file=sys.stderr)
told = json.loads(os.environ["TOLD"])[pathlib.Path(sys.argv[-1]).name]
if told["folder"]:
    path = pathlib.Path(told["folder"], "--".join(pathlib.Path(sys.argv[-1]).parts[1:]) + told["end"] + ".json")
    path.write_text(json.dumps(told["result"]))
sys.exit(told["code"])
"""
STARTER = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"


def result_of(name: str, status: str = "success", error: str = "", size: int = 3_200_000) -> dict[str, Any]:
    scores = [{"step": 750, "test dino_similarity": 0.7, "drift": 0.25, "train loss": 0.73}]
    training = {"status": status, "file_size": size, "num_trainable_params": 783_360, "train_time": 760.4}
    return {
        "run_info": {"experiment_name": name, "error_msg": error},
        "train_info": {**training, "accelerator_memory_max": 10_700_000_000, "metrics": scores},
        "meta_info": {"system_info": {"accelerator": "some GPU"}},
    }


def tell(monkeypatch, **of: Any) -> None:
    """What the script of the checkout does for each experiment, or for all."""
    every = {
        name: {"code": 0, "folder": "results", "end": "", "result": result_of(f"krona/{name}"), **of.get(name, {})}
        for name in EXPERIMENTS
    }
    monkeypatch.setenv("TOLD", json.dumps(every))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout, of the installed PEFT and a script that only tells what it is given."""
    root = tmp_path / "peft"
    folder = root / "method_comparison" / "image-gen"
    for name in ("experiments", *checkout.RESULTS):
        (folder / name).mkdir(parents=True)
    (root / "src").mkdir()
    (root / "src" / "peft").symlink_to(Path(peft.__file__).parent)
    (folder / "run.py").write_text(SCRIPT)
    (folder / "requirements.txt").write_text("torch>=2 # a comment\n\nnumpy\n")
    defaults = {"model_id": BASE, "dataset_id": "cats", "dino_model_id": "dino", "max_steps": 750}
    (folder / "default_training_params.json").write_text(json.dumps({**defaults, "optimizer_kwargs": {"lr": 1e-4}}))
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], cwd=root, check=True)
    return root


@pytest.fixture
def benchmark(root: Path) -> Benchmark:
    return find_benchmark(root)


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    """Starts the script without this library, which takes seconds to import."""
    path = tmp_path / "starter.py"
    path.write_text(STARTER)
    return path


def test_a_checkout_has_the_benchmark_its_peft_and_a_branch(root, benchmark):
    assert benchmark == Benchmark(root / "method_comparison" / "image-gen", root / "src", "main")
    put_experiments(benchmark, [LOKR])
    params = benchmark.params(f"krona/{LOKR}")
    assert (params["max_steps"], params["optimizer_kwargs"]["lr"]) == (750, 1e-3)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("src/peft", "not a checkout of PEFT's repository"),
        ("method_comparison", "has no method_comparison/image-gen"),
        ("method_comparison/image-gen/run.py", "not as it was .* has no run.py"),
        ("method_comparison/image-gen/cancelled_results", "not as it was .* has no cancelled_results"),
        (".git", "not the top of a git repository"),
    ],
)
def test_what_is_no_checkout_as_we_know_it_is_named(root, missing, said):
    (root / missing).rename(root.parent / "elsewhere")
    with pytest.raises(KronAError, match=said):
        find_benchmark(root)


def test_a_folder_within_another_repository_is_no_checkout(root):
    # git would give the other repository's branch, and the benchmark would write it into its results
    inner = root / "inner"
    (inner / "src").mkdir(parents=True)
    (inner / "src" / "peft").symlink_to(Path(peft.__file__).parent)
    (inner / "method_comparison").symlink_to(root / "method_comparison")
    with pytest.raises(KronAError, match="not the top of a git repository"):
        find_benchmark(inner)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_id": "FLUX.3"}, f"its base model is FLUX.3; our experiments are for the layers of {BASE}"),
        ({"optimizer_kwargs": None}, "default_training_params.json has no optimizer_kwargs"),
    ],
)
def test_defaults_that_our_experiments_do_not_fit_are_named(root, change, said):
    path = root / "method_comparison" / "image-gen" / "default_training_params.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(KronAError, match=said):
        find_benchmark(root)


def test_defaults_that_are_not_json_are_named(root):
    (root / "method_comparison" / "image-gen" / "default_training_params.json").write_text("{")
    with pytest.raises(KronAError, match=r"default_training_params\.json is not JSON"):
        find_benchmark(root)


# Copying


def test_experiments_are_copied_once(benchmark):
    copied = put_experiments(benchmark, [LOKR, LARGE])
    assert len(copied) == 4
    assert {path.parent.name for path in copied} == {LOKR, LARGE}
    for path in copied:
        assert path.parent.parent == benchmark.folder / "experiments" / "krona"
        assert path.read_bytes() == (OURS / path.parent.name / path.name).read_bytes()
    assert put_experiments(benchmark, [LOKR, LARGE]) == []


def test_a_file_that_differs_is_replaced_only_if_asked(benchmark):
    theirs = put_experiments(benchmark, [LARGE])[0]
    theirs.write_text("{}")
    with pytest.raises(KronAError, match=rf"{theirs.name} differ from ours\. Nothing was copied\."):
        put_experiments(benchmark, EXPERIMENTS)
    assert theirs.read_text() == "{}"
    assert not (benchmark.folder / "experiments" / "krona" / LOKR).exists()
    assert theirs in put_experiments(benchmark, EXPERIMENTS, overwrite=True)
    assert theirs.read_bytes() == (OURS / LARGE / theirs.name).read_bytes()


# What a run needs


def test_an_older_python_is_named():
    assert list(needs.python_problems((3, 12, 0))) == []
    assert list(needs.python_problems((3, 11, 7))) == ["It needs Python 3.12 or newer, and this is 3.11.7."]


def test_packages_that_are_missing_or_too_old_are_named(benchmark):
    assert list(needs.package_problems(benchmark)) == []
    (benchmark.folder / "requirements.txt").write_text("torch>=99\nno-such-package-of-anybody\n")
    old, missing = needs.package_problems(benchmark)
    assert f"torch>=99 is asked for, and {torch.__version__} is installed" in old
    assert "no-such-package-of-anybody is not installed" in missing


def test_models_and_pictures_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    asked = []

    def ask(name: str, kind: str) -> None:
        asked.append((name, kind))
        if name != "on/hub":
            raise ConnectionError("no network\nand more")

    monkeypatch.setattr(needs, "_cached", lambda: {("in/cache", "dataset")})
    params = [
        {"model_id": "on/hub", "dataset_id": "in/cache", "dino_model_id": str(tmp_path)},
        {"model_id": "in/cache", "dataset_id": "in/cache", "dino_model_id": "no/where"},
    ]
    assert list(needs.hub_problems(params, ask)) == [
        f"The model {name} is neither in the hub's cache nor to be had from the hub: no network"
        for name in ("in/cache", "no/where")  # cached as a dataset, wanted as a model
    ]
    assert asked == [("on/hub", "model"), ("in/cache", "model"), ("no/where", "model")]


def test_all_that_is_missing_is_told_at_once(benchmark, monkeypatch):
    monkeypatch.setattr(needs, "has_accelerator", lambda: False)
    monkeypatch.setattr(needs, "hub_problems", lambda params: ["no weights"])
    monkeypatch.setattr(needs, "python_problems", lambda: ["old Python"])
    with pytest.raises(KronAError, match=r"cannot run here\.\n- old Python\n- It needs a GPU[^\n]*\n- no weights$"):
        needs.check_needs(benchmark, [])
    monkeypatch.setattr(needs, "has_accelerator", lambda: True)
    with pytest.raises(KronAError, match=r"- old Python\n- no weights$"):
        needs.check_needs(benchmark, [])


# Running


def test_a_run_passes_on_output_and_exit_code_and_reads_what_was_written(benchmark, starter, monkeypatch, capfd):
    tell(monkeypatch)
    done = runs.run_experiment(benchmark, f"krona/{LOKR}", starter=starter)
    assert (done.code, done.problem, done.exit_code) == (0, None, 0)
    assert done.result is not None
    assert done.result.path == benchmark.folder / "results" / f"krona--{LOKR}.json"
    printed = capfd.readouterr()
    assert printed.out == f"training -v {Path('experiments', 'krona', LOKR)}\n"
    assert printed.err == "a warning\n"
    tell(monkeypatch, **{LOKR: {"code": 7}})
    assert runs.run_experiment(benchmark, f"krona/{LOKR}", starter=starter).exit_code == 7


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"folder": "", "code": 0}, "wrote nothing into results, temporary_results, cancelled_results"),
        ({"folder": "", "code": 3}, "ended with exit code 3"),
        ({"folder": "cancelled_results", "result": result_of("x", "canceled", "out of memory")}, "out of memory"),
        ({"result": result_of("x", size=runs.NOT_SAVED)}, "could not be saved"),
    ],
)
def test_a_run_that_did_not_finish_is_one_whatever_the_exit_code(benchmark, starter, monkeypatch, told, said):
    tell(monkeypatch, **{LOKR: told})
    done = runs.run_experiment(benchmark, f"krona/{LOKR}", starter=starter)
    assert said in (done.problem or "")
    assert done.exit_code == (told.get("code") or 1)


def test_results_of_earlier_runs_are_not_taken_for_this_ones(benchmark, starter, monkeypatch):
    old = benchmark.folder / "temporary_results" / f"krona--{LOKR}--2026-08-21.json"
    old.write_text(json.dumps(result_of("krona/old")))
    tell(monkeypatch, **{LOKR: {"folder": ""}})
    assert runs.run_experiment(benchmark, f"krona/{LOKR}", starter=starter).result is None
    tell(monkeypatch, **{LOKR: {"folder": "temporary_results", "end": "--2026-08-22"}})
    done = runs.run_experiment(benchmark, f"krona/{LOKR}", starter=starter)
    assert done.result is not None
    assert done.result.path.name == f"krona--{LOKR}--2026-08-22.json"


def test_a_result_of_another_form_is_named(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"run_info": {"experiment_name": "a"}}))
    with pytest.raises(KronAError, match=r"some\.json is no result of the benchmark as we know it"):
        runs.read_result(path)


@pytest.mark.slow
def test_the_checkouts_peft_knows_krona_in_a_run(benchmark):
    (benchmark.folder / "run.py").write_text(
        "import sys, peft\nprint(peft.__file__, type(peft.PeftConfig.from_pretrained(sys.argv[-1])).__name__)\n"
    )
    put_experiments(benchmark, [LOKR])
    log = benchmark.folder / "log.txt"
    with log.open("w") as output:
        done = runs.run_experiment(benchmark, f"krona/{LOKR}", output=output)
    assert log.read_text().splitlines()[-1] == f"{benchmark.source / 'peft' / '__init__.py'} KronAConfig"
    assert done.code == 0


# The command


@pytest.fixture
def ready(monkeypatch, starter):
    """A machine with all that a run needs."""
    monkeypatch.setattr(needs, "check_needs", lambda benchmark, params: None)
    monkeypatch.setattr(runs, "run_experiment", partial(runs.run_experiment, starter=starter))


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_run_copies_runs_all_and_shows_its_rows_beside_the_peers(root, benchmark, ready, monkeypatch):
    tell(monkeypatch)
    (benchmark.folder / "results" / "lora--flux2-klein-default.json").write_text(
        json.dumps(result_of("lora/flux2-klein-default"))
    )
    done = invoke("run", root)
    assert done.exit_code == 0
    for name in EXPERIMENTS:
        assert f"krona/{name}  " in done.stdout
        assert f"{name}: written to {benchmark.folder / 'results' / f'krona--{name}.json'}\n" in done.stdout
    assert "lora/flux2-klein-default" in done.stdout
    assert "lokr/" not in done.stdout  # which this checkout has no result of
    assert "783,360" in done.stdout
    assert "some GPU" in done.stdout


def test_run_goes_on_after_a_failure_and_ends_with_its_code(root, benchmark, ready, monkeypatch):
    first, second, third = EXPERIMENTS
    canceled = {"folder": "cancelled_results", "result": result_of("x", "canceled", "out of memory")}
    tell(monkeypatch, **{first: {"code": 5, "folder": ""}, second: canceled})
    done = invoke("run", root)
    assert done.exit_code == 5
    assert f"{first}: the benchmark's script ended with exit code 5" in done.stdout
    assert f"{second}: it is canceled: out of memory" in done.stdout
    assert f"{third}: written to" in done.stdout


def test_run_runs_only_what_is_asked(root, benchmark, ready, monkeypatch):
    tell(monkeypatch)
    assert invoke("run", root, "--run", LOKR).exit_code == 0
    assert [path.name for path in (benchmark.folder / "results").iterdir()] == [f"krona--{LOKR}.json"]
    unknown = invoke("run", root, "--run", "4x64")
    assert unknown.exit_code == 1
    assert f"There is no experiment 4x64; there are {', '.join(EXPERIMENTS)}." in unknown.stderr


def test_results_that_count_are_replaced_only_if_asked(root, benchmark, ready, monkeypatch):
    tell(monkeypatch)
    assert invoke("run", root, "--run", LOKR).exit_code == 0
    again = invoke("run", root, "--run", LOKR)
    assert again.exit_code == 1
    assert f"would replace {benchmark.folder / 'results' / f'krona--{LOKR}.json'}" in again.stderr
    assert invoke("run", root, "--run", LOKR, "--overwrite").exit_code == 0
    subprocess.run(["git", "checkout", "-q", "-b", "other"], cwd=root, check=True)  # whose results have a time
    assert invoke("run", root, "--run", LOKR).exit_code == 0


def test_nothing_is_copied_where_a_run_lacks_something(root, benchmark, monkeypatch):
    monkeypatch.setattr(needs, "has_accelerator", lambda: False)
    monkeypatch.setattr(needs, "hub_problems", lambda params: [])
    done = invoke("run", root)
    assert done.exit_code == 1
    assert "It needs a GPU" in done.stderr
    assert list((benchmark.folder / "experiments").iterdir()) == []


def test_copy_runs_nothing(root, benchmark):
    done = invoke("copy", root, "--run", LARGE)
    assert done.exit_code == 0
    folder = benchmark.folder / "experiments" / "krona" / LARGE
    assert done.stdout == f"copied {folder / 'adapter_config.json'}\ncopied {folder / 'training_params.json'}\n"
    assert list((benchmark.folder / "results").iterdir()) == []


# The dry run


@pytest.fixture
def dry(benchmark, tmp_path, starter, monkeypatch):
    """A dry run whose script saves a file, and whose base is not written; and what the loading of files tells."""
    for peer in PEERS:
        folder = benchmark.folder / "experiments" / peer
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (benchmark.folder / "run.py").write_text(
        "import os, pathlib, sys\n"
        "name = '--'.join(pathlib.Path(sys.argv[-1]).parts[1:])\n"
        "folder = pathlib.Path(os.environ['TMPDIR'], 'tmp')\n"
        "folder.mkdir()\n"
        "(folder / 'adapter_model.safetensors').write_bytes(b'')\n"
        f"pathlib.Path('results', name + '.json').write_text({json.dumps(json.dumps(result_of('x')))})\n"
    )
    told = {"saved": 26, "same": 26, "change": 0.1}

    def call(command: list[str], benchmark: Benchmark, output: Any = None) -> int:
        output.write("a line of a library\n" + json.dumps(told))
        return 0

    monkeypatch.setattr(dry_run, "check_programs", lambda benchmark: None)
    monkeypatch.setattr(dry_run, "write_all", lambda folder, steps: {"max_steps": steps, "model_id": "tiny"})
    monkeypatch.setattr(dry_run, "ON_CPU", starter)
    monkeypatch.setattr(dry_run, "call", call)
    return lambda: list(dry_run.dry_run(benchmark, tmp_path / "out", PEERS)), told


def test_a_dry_run_tries_ours_and_the_peers_and_leaves_the_checkout_alone(dry, benchmark, tmp_path):
    attempt, _ = dry
    before = {path: path.read_bytes() for path in benchmark.folder.rglob("*") if path.is_file()}
    found = attempt()
    assert [one.experiment for one in found] == [*(f"krona/{name}" for name in EXPERIMENTS), *PEERS]
    assert [one.problem for one in found] == [None] * 5
    assert {path: path.read_bytes() for path in benchmark.folder.rglob("*") if path.is_file()} == before
    experiments = tmp_path / "out" / "image-gen" / "experiments"
    ours = checkout.read_json(experiments / "krona" / LOKR / "training_params.json")
    assert ours == {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 1e-4}, "max_steps": 4, "model_id": "tiny"}
    config = experiments / "krona" / LOKR / "adapter_config.json"
    assert config.read_bytes() == (OURS / LOKR / "adapter_config.json").read_bytes()
    assert [*dry_run.table(found).columns[0].cells] == [one.experiment for one in found]


@pytest.mark.parametrize(
    ("loading", "said"),
    [({"same": 25}, "of 26 saved tensors only 25 load as they were"), ({"change": 0.0}, "changes nothing")],
)
def test_an_adapter_that_does_not_load_as_it_was_is_a_problem(dry, loading, said):
    attempt, told = dry
    told.update(loading)
    assert all(said in one.problem for one in attempt())


def test_an_adapter_that_was_not_saved_is_a_problem(dry, benchmark):
    attempt, _ = dry
    script = (benchmark.folder / "run.py").read_text()
    (benchmark.folder / "run.py").write_text(script.replace("adapter_model.safetensors", "other") + "print('end')\n")
    for one in attempt():
        assert "saved no adapter that can be loaded" in one.problem
        assert one.problem.endswith("end")


def test_a_peer_that_the_benchmark_has_no_more_is_named(dry, benchmark):
    attempt, _ = dry
    (benchmark.folder / "experiments" / PEERS[1]).rename(benchmark.folder / "experiments" / "lokr" / "new")
    with pytest.raises(KronAError, match=rf"no experiment {PEERS[1]} any more; it has lokr/new, {PEERS[0]}\."):
        attempt()


@pytest.mark.slow
def test_the_benchmark_takes_the_cpu_for_its_device_only_where_there_is_no_gpu(tmp_path):
    (tmp_path / "utils.py").write_text(
        "from peft.utils import infer_device\n"
        "device = infer_device()\n"
        "if device not in ['cuda', 'xpu']: raise RuntimeError('no GPU')\n"
    )
    (tmp_path / "run.py").write_text(
        "import sys, torch, utils\n"
        "from peft.utils import infer_device\n"
        "if utils.device == 'cpu':\n"
        "    torch.cpu.reset_peak_memory_stats(), torch.cpu.empty_cache(), torch.cpu.manual_seed_all(0)\n"
        "    assert torch.cpu.memory_allocated() == torch.cpu.memory_reserved() == 0\n"
        "    assert torch.cpu.max_memory_reserved() == 0\n"
        "    assert torch.cpu.get_device_name(0) == 'CPU (dry run)'\n"
        "print(utils.device, infer_device(), *sys.argv)\n"
    )
    (tmp_path / "both.py").write_text(
        "import runpy, sys, peft.utils\n"
        "for device in ('cuda', 'cpu'):\n"
        "    peft.utils.infer_device = lambda: device\n"
        "    sys.modules.pop('utils', None)\n"
        f"    sys.argv = [{str(dry_run.ON_CPU)!r}, 'run.py', '-v']\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "both.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["cuda cuda run.py -v", "cpu cpu run.py -v"]


def test_an_adapter_is_compared_with_what_it_loads_as(tmp_path):
    pipe = tiny_klein_pipeline()
    pipe.transformer.save_pretrained(tmp_path / "base" / "transformer")
    config = KronAConfig(a1=4, a2=4, target_modules=["to_q", "to_qkv_mlp_proj"], init_weights=False)
    get_peft_model(pipe.transformer, config).save_pretrained(tmp_path / "adapter")
    found = reloaded(tmp_path / "base", tmp_path / "adapter")
    assert (found["saved"], found["same"]) == (4, 4)
    assert found["change"] > 0
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * ("krona_B" not in name) for name, tensor in load_file(path).items()}
    save_file({**tensors, "elsewhere.krona_A.weight": torch.ones(4, 4)}, path)
    found = reloaded(tmp_path / "base", tmp_path / "adapter")
    assert (found["saved"], found["same"], found["change"]) == (5, 4, 0)


def test_the_tiny_encoder_and_pictures_are_such_as_the_benchmark_loads(tmp_path):
    from transformers import AutoModel

    tiny_base.write_encoder(tmp_path / "dino")
    assert type(AutoModel.from_pretrained(tmp_path / "dino")).__name__ == "Dinov2Model"
    assert (tmp_path / "dino" / "preprocessor_config.json").is_file()
    assert tiny_base.write_pictures(tmp_path / "pictures") == len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_a_dry_run_writes_into_a_new_folder_only(root, tmp_path):
    done = invoke("dry-run", root, "--output", tmp_path)
    assert done.exit_code == 1
    assert f"{tmp_path} exists" in done.stderr


def test_a_dry_run_with_a_problem_ends_with_1(root, tmp_path, monkeypatch):
    good = dry_run.Tried("krona/a", runs.Run(0, runs.Result(root, result_of("krona/a"))), root, {
        "saved": 2, "same": 2, "change": 0.5,
    })  # fmt: skip
    bad = replace(good, experiment="krona/b", loaded={"saved": 2, "same": 1, "change": 0.5})
    for found, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(dry_run, "dry_run", lambda *arguments, found=found: iter(found))
        done = invoke("dry-run", root)
        assert done.exit_code == code
        assert "krona/a: trained, saved and loaded" in done.stdout
        assert ("krona/b: of 2 saved tensors only 1 load as they were" in done.stdout) == bool(code)
