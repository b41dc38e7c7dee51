"""What `synchromesh plan` says to paste is what was planned: parsed as its programs parse it, and run on ranks."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.distributed.run import get_args_parser

from synchromesh import cli
from synchromesh.commands.paste import Asked, to_paste, torchrun
from synchromesh.commands.train import read_request
from synchromesh.planning.arrangement import Arrangement
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import plan_model
from synchromesh.planning.remedies import with_remedies
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.programs import run_job
from synchromesh.types import Plan, Workload


def planned(capsys: pytest.CaptureFixture[str], *given: str) -> dict:
    assert cli.main(["plan", *given, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    "given", [["--world", "8"], ["--world", "16"], ["--world", "16", "--experts", "64", "--k", "2"]]
)
def test_the_command_of_a_recipe_trains_what_was_planned(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *given, "--batch", "32")
    launcher, _, program = found["command"].partition(" -- ")
    started = get_args_parser().parse_args([*shlex.split(launcher)[1:], "script"])
    assert int(started.nnodes.split(":")[-1]) * int(started.nproc_per_node) == found["world"]
    module, command, *rest = shlex.split(program)
    assert (module, command) == ("synchromesh.cli", "train")
    config = read_request(rest, CATALOG).settings
    assert config.batch_size == 32 * found["world"]
    plans = {json.dumps(layer["plan"]) for layer in found["layers"]}
    if len(plans) == 1:
        assert config.parallelism.plan() == Plan.from_json(plans.pop())
    else:
        assert config.parallelism.plan() is None
        assert config.parallelism.adaptive
        assert config.parallelism.cluster == "a100_hdr"
    if "--experts" in given:
        assert (config.model.experts.num_experts, config.model.experts.k) == (64, 2)


def test_the_options_of_every_plan_are_read_back_as_the_plan() -> None:
    """A recipe's plans of any kind, also those that this model on this cluster does not get."""
    kind = LayerKind("stage", 1, 196, Workload(0, 1, 64, 256, 8, torch.float16, True))
    model = ModelShape("swinv2_moe_b", "image", (kind,), 0.0, 0.0, 0.0, (1.0, 1.0), "none")
    base = plan_model(model, load_profile("a100_hdr"), Ranks(8, 4), batch=4, training=True)
    for plan in (Plan(), Plan(8), Plan(2, near=False, chunks=4), Plan(2, two_level=True), Plan(4, regather=True)):
        one = dataclasses.replace(base, layers=(dataclasses.replace(base.layers[0], plan=plan),))
        command = to_paste(one, Asked("swinv2_moe_b", "a100_hdr"))
        assert command is not None
        config = read_request(shlex.split(command.partition(" train ")[2]), CATALOG).settings
        assert config.parallelism.plan() == plan


SHOWS = """
    from synchromesh import MoE
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    print(layer.strategy.grid.size, layer.strategy.plan)
"""
STEP = """
    y = run(torch.randn(16, 32, device=device, requires_grad=True))
    y.sum().backward()
"""
STEP_OF_A_MODEL = """
    tokens = torch.arange(16, device=device)[None]
    run(input_ids=tokens, labels=tokens).loss.backward()
"""


def run_script(text: str, folder: Path, ranks: int) -> list[str]:
    script = folder / "planned.py"
    script.write_text(text)
    done = run_job(ranks, script, cwd=folder)
    assert all(one.returncode == 0 for one in done), done[0].stderr
    return [one.stdout.strip().splitlines()[-1] for one in done]


def test_the_script_of_a_layer_runs_by_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ["--layer", "16", "32", "64", "4", "2", "--gated", "--capacity", "1.5"]
    found = planned(capsys, *layer, "--world", "2", "--cluster", "cpu_gloo", "--dtype", "float32")
    said = run_script(found["command"] + "\n" + SHOWS + STEP, tmp_path, 2)
    plan = Plan.from_json(json.dumps(found["layers"][0]["plan"]))
    assert said == [f"2 {plan}"] * 2


def test_the_script_of_a_hugging_face_model_runs_in_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6 experts on 4 ranks: two grids of two, side by side."""
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--length", "16", "--batch", "1", "--dtype", "float32"]
    found = planned(capsys, *given, "--cluster", "cpu_gloo", "--world", "4")
    assert found["copies"] >= 2
    said = run_script(found["command"] + "\n" + SHOWS + STEP_OF_A_MODEL, tmp_path, 4)
    plan = Plan.from_json(json.dumps(found["layers"][0]["plan"]))
    assert said == [f"{found['grid']} {plan}"] * 4


def test_where_nothing_fits_the_command_is_of_what_would_and_stages_have_none() -> None:
    kind = LayerKind("experts", 8, 2048, Workload(0, 2, 1024, 4096, 8, torch.bfloat16, True, matrices=3))
    model = ModelShape("model", "sequence", (kind,), 1e12, 4e8, 2e8, (0.5, 0.4), "assumed", 8, 8 * 2048 * 1024.0)
    profile = dataclasses.replace(load_profile("a100_hdr"), memory_bytes=9e9)
    found = plan_model(model, profile, Ranks(4, 4), batch=8, training=True)
    found = with_remedies(found, model, profile, training=True)
    first = next(one for one in found.would_fit if one.refused is None)
    command = to_paste(found, Asked(Path("model"), "a100_hdr"))
    assert command is not None
    assert ("gradient_checkpointing_enable" in command) == first.arrangement.recomputed
    assert ("FullySharded" in command) == first.arrangement.sharded
    assert (f"{first.arrangement.accumulate} parts" in command) == (first.arrangement.accumulate > 1)
    staged = plan_model(model, profile, Ranks(4, 4), batch=8, training=True, arrangement=Arrangement(stages=2))
    assert to_paste(staged, Asked(Path("model"), "a100_hdr")) is None


def test_several_nodes_meet_at_the_first() -> None:
    assert torchrun(Ranks(16, 8)) == (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400"
    )
