import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tyro

from synchromesh.kernels.product_costs import cpu_model
from synchromesh.testing.programs import run_program
from synchromesh.training.codec import differences, encode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_benchmark_of_transformers_experts_runs(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "huggingface.py", "--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 8  # step and decode, two dtypes, two routings
    assert all(set(r["seconds"]) == {"eager", "batched_mm", "grouped_mm", "synchromesh"} for r in records)


def test_the_tables_of_the_docs_are_those_that_the_results_make():
    done = run_program(BENCHMARKS / "tables.py")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 160
    docs = [(BENCHMARKS.parent / "docs" / f"{page}.md").read_text() for page in ("benchmarks", "models")]
    assert [row for row in rows if not any(row in page.splitlines() for page in docs)] == []


def test_the_benchmark_of_a_cascades_memory_runs_and_fits_its_formula(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "cascade_memory.py", "--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    kept = sum(record["formula"].values()) - record["formula"]["weights"] - record["formula"]["working"]
    assert record["measured"]["forward"] > 0.8 * kept
    assert 0.7 < record["peak_over_formula"] < 1.4  # a small model: code pages and buffers of threads show


def test_the_benchmark_of_backbones_runs_and_makes_its_tables(tmp_path):
    out = tmp_path / "figures.jsonl"
    script = BENCHMARKS / "backbones.py"
    done = run_program(script, "speed", "--quick", "--batch", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["backbone"] for r in records] == ["SwinV2-T", "ViT-S/16", "FocalNet-T", "PVT-Tiny", "PVTv2-B1"]
    assert all(r[f"{whose}_trained"] > 0 for r in records for whose in ("ours", "theirs", "limit"))
    learnt = ["--tasks", "textures", "--backbones", "SpectrumNet", "--seeds", "1", "--epochs", "1"]
    done = run_program(script, "learn", *learnt, "--out", out)
    assert done.returncode == 0, done.stderr
    dense, experts = [json.loads(line) for line in out.read_text().splitlines()][5:]
    assert (dense["kind"], experts["kind"]) == ("dense", "experts")
    assert dense["multiply_adds"] == experts["multiply_adds"]
    assert dense["parameters"] < experts["parameters"]
    said = run_program(script, "table", "--file", out).stdout
    assert (
        f"| SpectrumNet | {dense['multiply_adds'] / 1e6:.2f} | {dense['score']:.3f} | {experts['score']:.3f} |" in said
    )


def test_the_benchmark_of_heads_runs(tmp_path):
    out = tmp_path / "figures.jsonl"
    heads = ["RTDetrV2", "MaskFormer", "UperNet", "CascadeMaskRCNN", "DepthFPN"]
    done = run_program(BENCHMARKS / "heads.py", "--quick", "--heads", *heads, "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["head"], r["pass"]) for r in records] == [(head, kind) for head in heads for kind in ("train", "infer")]
    assert all(set(r["seconds"]) == {"theirs", "ours"} and len(r["load"]) == 3 for r in records)
    wrong = run_program(BENCHMARKS / "heads.py", "--heads", "Yolo", "--out", out)
    assert wrong.returncode == 1
    assert "got the heads ['Yolo'], wanted some of Detr, " in wrong.stderr


@pytest.mark.parametrize("backend", ["", pytest.param("eager", marks=pytest.mark.exhaustive)])
def test_the_benchmark_of_swin_compares_before_it_times_and_keeps_lines_of_compiled_models_apart(backend, tmp_path):
    out = tmp_path / "figures.jsonl"
    here = f"{cpu_model()}, {os.cpu_count()} cores"
    old = {"model": "smallest", "dtype": "float32", "pass": "train", "batch": 16, "threads": 1}
    out.write_text("".join(json.dumps({**old, "machine": machine}) + "\n" for machine in (here, "another")))
    done = run_program(BENCHMARKS / "swin.py", "--tiny", "--threads", 1, "--compile", backend, "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    made = [record for record in records if "seconds" in record]
    # The other machine's line is another figure, and so is one without a backend.
    assert len(records) - len(made) == (2 if backend else 1)
    passes = [(dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("train", "infer")]
    assert [(r["dtype"], r["pass"]) for r in made] == passes
    assert all(set(r["seconds"]) == {"theirs", "dense", "experts", "matmuls"} for r in made)
    assert all(r["compiled"] == backend for r in made)


def test_the_table_of_matches_runs_and_knows_an_untrained_model(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "matching.py", "--tiny", "--seeds", 0, "--models", "cotap", "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["pair"] == "motorcycle"
    assert 0.4 < record["by_raw_pixels"] < 0.7  # both pictures are of one scene in one light
    assert 0.02 < record["by_chance"] < 0.08 < record["untrained"] != record["found_again"]


def test_pretexts_are_compared_with_scratch_and_what_is_there_is_not_done_again(tmp_path):
    out, tasks = tmp_path / "figures.jsonl", ("classify", "detect")
    command = [BENCHMARKS / "transfer.py", "--tiny", "--seeds", 0, "--models", "moe", "--tasks", *tasks, "--arms"]
    command += ["scratch", "cotap", "mixed_ae", "--pictures", "digits", "--out", out, "--work", tmp_path / "work"]
    done = run_program(*command)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = [(record["task"], record["arm"]) for record in records]
    digits, scenes = [("classify", arm) for arm in ("scratch", "cotap", "mixed_ae")], ["scratch", "cotap"]
    assert names == [*digits, *(("detect", arm) for arm in scenes)]  # MixedAE wants a ViT, and has no heads for scenes
    assert all(0 <= record["score"] <= 1 for record in records)
    assert all(("pretext_seconds" in record) == (not record["arm"].startswith("scratch")) for record in records)
    assert not list((tmp_path / "work" / "pretexts").glob("*"))
    again = run_program(*command)
    assert "minus scratch" in again.stdout
    assert len(out.read_text().splitlines()) == len(records)


def test_loads_of_hidden_and_visible_tokens_are_watched_while_experts_learn(tmp_path):
    out, picture = tmp_path / "figures.jsonl", tmp_path / "gaps.svg"
    size = ("--tiny", "--seeds", 0, "--where", "early")
    done = run_program(BENCHMARKS / "masked_routing.py", *size, "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    models = [("early", 0), ("early", 4)]
    assert [(one["where"], one["places"]) for one in records if one["step"] == 0] == models
    assert [sorted(one["layers"]) for one in records if one.get("last")][:1] == [
        ["stage 1, block 1", "stage 1, block 2"]
    ]
    for layer in (layer for one in records for layer in one["layers"].values()):
        assert layer["gap"] == pytest.approx(
            sum(abs(a - b) for a, b in zip(layer["hidden"], layer["visible"], strict=True)) / 2, abs=1e-4
        )
    assert [one["step"] for one in records] == [0, 1] * len(models)
    first = [one["layers"] for one in records if one["step"] == 0]
    assert first[0] == first[1]  # a code of places is zero before it learns
    drawn = ElementTree.parse(picture).getroot()
    assert drawn.tag.endswith("svg")
    assert len(drawn.findall("{*}svg")) == len(models)
    again = run_program(BENCHMARKS / "masked_routing.py", *size, "--out", out, "--picture", picture)
    assert len(out.read_text().splitlines()) == len(records), again.stderr


def test_the_benchmark_of_pretraining_compares_losses_before_it_times_steps(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "pretraining.py", "--tiny", "--sizes", "tiny", "--batch", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(record["seconds"]) == {"ours", "theirs", "mixture"}
    assert "Warning" not in done.stderr


def test_the_experiment_with_frozen_experts_runs(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(
        BENCHMARKS / "frozen_moe.py", "--tiny", "--seeds=1", "--pre-epochs=1", "--fine-epochs=1", "--out", out
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["row"] for record in records] == ["MoE, frozen", "MoE, tuned", "dense"]
    assert records[0]["parameters"] == records[1]["parameters"] > records[2]["parameters"]
    assert "MoE, frozen" in done.stdout


def loaded(name, monkeypatch):
    """Return a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    monkeypatch.syspath_prepend(BENCHMARKS)  # what benchmarks share lies beside them
    spec.loader.exec_module(module)
    return module


def test_the_demo_of_8_bit_products_is_the_recipe_with_such_experts_under_a_name_of_its_own(monkeypatch):
    demo = loaded("demo", monkeypatch)
    args = tyro.cli(demo.Args, args=["--products", "float8", "--tile", "64"])
    config, plain = demo.alone("moe", 0, args), demo.alone("moe", 0, demo.Args())
    differ = differences(encode(plain), encode(config))
    assert differ == [
        "model.experts.router.tile: 0 -> 64",
        "model.experts.products: None -> {'kind': 'Float8Products'}",
    ]
    assert demo.name_of("moe", args) == "moe, tile 64, float8"
    assert demo.name_of("moe", demo.Args()) == "moe"
    assert demo.name_of("dense", args) == "dense"


FILE = '''"""Accuracy of labels."""

import os  # a comment


class TopLabels:
    """Detection."""

    def accuracy_of(self, x):
        """Classification."""
        # argmax

        def inner():
            return "the detector"

        return x
'''


def test_functions_comments_and_names_of_tasks_are_counted_as_the_page_says(monkeypatch):
    house = loaded("house", monkeypatch)
    assert sorted(house.functions(FILE)) == [("accuracy_of", 9, 8), ("inner", 13, 2)]
    assert house.comments(FILE) == 2
    assert house.task_words(FILE) == ["accuracy", "detector", "labels"]
    assert house.task_words(FILE, house.CHARTS[0]) == ["accuracy", "detector"]
    assert house.task_words("x = table.enlabelled + CrossEntropyLoss") == ["cross entropy"]


def test_the_counts_of_this_tree_hold_what_a_reader_would_open_and_no_task_outside_its_home():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "house.py", BENCHMARKS.parent, "--names", "now", "--json"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tree"] == "now"
    assert found["modules_that_name_a_task"] == {}
    whole, parts = found["config_files_as_a_whole"], found["config_files"]
    assert whole["commands/train.py"] == "run(request: Request)"
    assert whole["training/loop.py"] == "fit(job: Job)"
    assert parts["tasks/classification.py"].endswith("(self: Classification)")
    assert set(whole) < set(parts) <= set(found["files_that_run_before_the_loop"])
    sharded, adaptive = found["forward_files_sharded"], found["forward_files_adaptive"]
    assert {"moe/layer.py", "moe/routing.py", "parallel/sharded.py", "parallel/comm/all_to_all.py"} <= set(sharded)
    assert {"planning/tuner.py", "moe/layer.py"} <= set(adaptive)
    assert not {name for name in sharded if name.startswith(("training/", "commands/"))}
    assert not {name for name in sharded if name.startswith("planning/tuner")}


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "house.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{tmp_path / 'synchromesh'} holds no Python files" in done.stderr


def test_the_benchmark_of_a_large_coco_json_reads_back_what_it_generates(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "coco_json.py", "--annotations", "300", "--pictures", "40", "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (record["annotations"], record["pictures"], record["faults"]) == (300, 40, {})
    assert record["seconds"] > 0
    assert record["peak_mib"] > 0


FAKE_OPS = """
import torch
from synchromesh.models.boxes import nms
from synchromesh.models.heads.cascade import roi_align as own


def roi_align(x, rows, side, *, spatial_scale, sampling_ratio, aligned):
    assert aligned
    boxes, image = rows[:, 1:], rows[:, 0].long()
    return own.roi_align(x, boxes, image, stride=round(1 / spatial_scale), side=side, samples=sampling_ratio)


def batched_nms(boxes, scores, groups, overlap):
    return nms(boxes, scores, groups, most=overlap + {off})
"""


def run_beside(tmp_path, off):
    """Run the benchmark with a torchvision that is none."""
    package = tmp_path / "torchvision"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("from torchvision import ops\n__version__ = '0'\n")
    (package / "ops.py").write_text(FAKE_OPS.format(off=off))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import roi_nms; roi_nms.main()"
    return run_program("-c", code, "--tiny", "--out", tmp_path / "figures.jsonl", cwd=tmp_path)


def test_the_benchmark_of_roi_align_and_nms_runs_and_prints_no_time_where_results_differ(tmp_path):
    done = run_beside(tmp_path, 0.0)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [(one["operator"], one["pass"]) for one in records] == [
        ("RoIAlign", "forward"),
        ("RoIAlign", "forward and backward"),
        ("NMS", "forward"),
    ]
    assert all(set(one["seconds"]) == {"theirs", "ours"} and one["apart"] == 0 for one in records)
    done = run_beside(tmp_path, -0.65)
    assert done.returncode == 1
    assert "results differ" in done.stderr
    assert len((tmp_path / "figures.jsonl").read_text().splitlines()) == len(records) + 2


def test_the_benchmark_of_roi_align_and_nms_says_that_torchvision_is_missing():
    done = run_program(BENCHMARKS / "roi_nms.py", "--tiny")
    assert done.returncode == 1
    assert "torchvision cannot be imported" in done.stderr


def test_the_benchmark_of_loading_runs_and_all_contestants_give_the_same_images(tmp_path):
    for package in ("datasets", "webdataset"):
        pytest.importorskip(package)
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "loading.py", "--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"files", "parquet", "tar", "datasets + PIL", "webdataset"} <= record["per_core"].keys()
    assert len(record["load"]) == 3


def test_the_benchmark_of_a_long_list_reads_it_all_in_bounded_memory(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "index_file.py", "--lines", 3000, "--classes", 7, "--out", out)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (record["learnt"] + record["scored"], record["lines"]) == (3000, 3000)
    assert record["peak_mib"] < 100


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("emoe", 5),
        ("simmim", 6),
        ("experts", 4),
        ("products", 10),
        pytest.param("sparse", 6, marks=pytest.mark.exhaustive),
        pytest.param("upcycle", 4, marks=pytest.mark.exhaustive),
        pytest.param("bytes", 5, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_the_demonstrations_of_adapted_models_run(what, rows, tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "adapt.py", what, "--tiny", "--seeds=1", "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == rows
    assert {(record["what"], record["seed"]) for record in records} == {(what, 0)}


def test_an_arm_alone_gives_the_numbers_that_it_gives_among_others_and_a_wrong_one_is_named(tmp_path):
    found = []
    for number, arms in enumerate((["dense", "4 experts, 75 % zeros, k = 4"], ["4 experts, 75 % zeros, k = 4"])):
        out = tmp_path / f"{number}.jsonl"
        done = run_program(BENCHMARKS / "adapt.py", "experts", "--tiny", "--seeds=1", "--out", out, "--arms", *arms)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    dense, last = found[0]
    assert dense["numbers"] == dense["products"] == last["numbers"] == last["products"]
    assert [last[name] for name in ("seen", "unseen")] == [found[1][0][name] for name in ("seen", "unseen")]
    wrong = run_program(BENCHMARKS / "adapt.py", "experts", "--tiny", "--seeds=1", "--out", out, "--arms", "sparse")
    assert "experts has no arm sparse: wanted some of ['dense', '4 experts" in wrong.stderr


def test_the_gluon_contestants_have_a_reference_and_say_where_they_cannot_run(monkeypatch):
    done = run_program(BENCHMARKS / "gpu_gluon.py")
    assert (done.returncode, done.stdout) == (
        0,
        "The Gluon kernels are for sm_90 and sm_100: nothing to run here.\n",
    ), done.stderr
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_gluon = loaded("gpu_gluon", monkeypatch)
    found = list(gpu_gluon.contestants("cpu", gpu_gluon.TINY))
    assert len(found) == 2 * len(gpu_gluon.TINY)
    wanted = found[0].reference()
    assert {"output", "gradient of x", "gradient of weights", "gradient of up", "gradient of gate"} <= set(wanted)
    assert all(str(result.dtype) == "torch.float64" and result.isfinite().all() for result in wanted.values())


def test_the_benchmark_of_several_tasks_scores_each_way_against_models_of_one_task(tmp_path):
    out = tmp_path / "figures.jsonl"
    sizes = ("--steps=1", "--pretrain=1", "--batch=2", "--test=2", "--arms", "heads only", "MTLoRA")
    done = run_program(BENCHMARKS / "multi_task.py", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["arm"].partition(":")[0] for record in records] == [*["alone"] * 4, "heads only", "MTLoRA"]
    heads, mtlora = records[4:]
    assert (heads["of_backbone"], mtlora["of_backbone"] > 0) == (0, True)
    alone = [next(iter(record["scores"].values())) for record in records[:4]]
    changes = [(a - b) / b for a, b in zip(mtlora["scores"].values(), alone, strict=True)]
    assert mtlora["change"] == pytest.approx((sum(changes[:3]) - changes[3]) / 4)


def test_the_linear_probe_runs_on_a_run_and_on_random_weights(tmp_path):
    run = tmp_path / "run"
    tiny = ["--model.width=8", "--model.depth=2", "--model.num-heads=2", "--model.patch-size=16", "--patch=16"]
    tiny += ["--model.experts.blocks.0", "1", "--decoder.width=8", "--decoder.depth=1", "--decoder.num-heads=2"]
    tiny += ["--data.train=4", "--data.test=2", "--batch-size=4", "--epochs=1", "--twin=none", "--nproc=1"]
    trained = run_program("-m", "synchromesh", "train", "mixed_ae_demo", *tiny, f"--run={run}")
    assert trained.returncode == 0, trained.stderr
    done = run_program(BENCHMARKS / "probe.py", run, "--seeds", "1", "--of-each", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [str(run), f"{run}, random weights"]
    shares = [float(line.rpartition(": ")[2].split()[0]) for line in lines]
    assert all(0.1 < share < 0.9 for share in shares)
    assert shares[0] != shares[1]
