import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.data.augment import Augment
from synchromesh.errors import InputError, StoppedError
from synchromesh.models.mixtures import LinearGate
from synchromesh.models.twin import gate_names
from synchromesh.moe.capacity import Dropless
from synchromesh.parallel.comm.grid import Grid
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.average import Average, Averaging, Gates
from synchromesh.training.config import Parallelism, TrainConfig
from synchromesh.training.evaluate import EvalOptions, evaluate
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Event, Job
from synchromesh.training.loop import fit
from synchromesh.training.run_folder import build_model, identity, load_trained
from synchromesh.training.task import Splits

MakeJob = Callable[..., Job]
Weights = dict[str, Tensor]


def kept(model: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(one: Weights, two: Weights) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def averaged(config: TrainConfig, **how: Any) -> TrainConfig:
    return dataclasses.replace(config, ema=Averaging(0.7, **how))


@pytest.mark.parametrize("gates", list(Gates))
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_that_of_its_definition_and_gates_follow_their_rule(
    tiny: TrainConfig, gates: Gates, warmup: bool
) -> None:
    model = build_model(tiny.task, tiny.model, {"classes": list("abcdefgh")})
    model.get_parameter("head.bias").requires_grad_(False)
    average, wanted = Average(model, Averaging(0.7, warmup=warmup, gates=gates)), kept(model)
    for step in range(4):
        decay = min(0.7, (1 + step) / (10 + step)) if warmup else 0.7
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter)
            follows = gates is Gates.AVERAGED or ".router." not in name
            wanted[name] = decay * wanted[name] + (1 - decay) * parameter.detach() if follows else parameter.detach()
        model.get_buffer("backbone.stages.1.blocks.1.ffn.router.balance.steps").add_(3)
        average.update(step)
    trained = kept(model)
    with average.in_place():
        found = kept(model)
    assert not different(kept(model), trained)
    assert found["backbone.stages.1.blocks.1.ffn.router.balance.steps"].tolist() == [12] * 4  # as balanced, a buffer
    for name, _ in model.named_parameters():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_all_gates_are_known(tiny: TrainConfig) -> None:
    model = build_model(tiny.task, tiny.model, {"classes": list("abcdefgh")})
    named = {name for name, _ in model.named_parameters()}
    assert gate_names(model) == {name for name in named if ".router." in name} != set()
    (layer,) = {name.partition(".router.")[0] for name in gate_names(model)}
    assert {f"{layer}.{name}" for name in gate_names(model.get_submodule(layer))} == gate_names(model)


def test_no_average_changes_nothing(tiny: TrainConfig, make_job: MakeJob) -> None:
    plain = fit(make_job(tiny, "plain"))
    other = make_job(averaged(tiny), "averaged")
    fit(other)
    assert not plain.average.values
    model = make_job(tiny, "plain").model
    load = load_trained(other.folder, CATALOG, student=True).model
    trained = load_trained(other.folder.parent / "plain", CATALOG).model
    assert not different(kept(load), kept(trained))
    assert different(kept(load), kept(model))


def test_a_run_scores_keeps_and_predicts_with_the_average(tiny: TrainConfig, make_job: MakeJob) -> None:
    job = make_job(averaged(tiny), "run")
    outcome = fit(job)
    trained = kept(job.model)
    found, student = load_trained(job.folder, CATALOG), load_trained(job.folder, CATALOG, student=True)
    assert not different(kept(student.model), trained)
    with outcome.average.in_place():
        assert not different(kept(found.model), kept(job.model))
    options = EvalOptions(tiny.loading, tiny.eval_batch_size, tiny.precision)
    again = evaluate(found.task, found.facts, found.model, job.splits.test, options)
    assert again.scores == outcome.evaluation.scores
    of_student = evaluate(found.task, found.facts, student.model, job.splits.test, options)
    assert of_student.scores != outcome.evaluation.scores


@pytest.mark.parametrize("crash_at", [4, 6])
def test_a_run_cut_off_goes_on_with_its_average_bit_for_bit(
    tiny: TrainConfig, make_job: MakeJob, crash_at: int
) -> None:
    config = dataclasses.replace(averaged(tiny), keep=dataclasses.replace(tiny.keep, checkpoint_steps=3))
    whole = fit(make_job(config, "whole"))
    with pytest.raises(RuntimeError, match="crashed"):
        fit(make_job(config, "cut", crash_at=crash_at))
    again = fit(make_job(config, "cut"))
    assert not different(whole.average.values, again.average.values)
    assert again.evaluation.scores == whole.evaluation.scores


def test_a_stop_in_an_evaluation_saves_the_trained_weights_as_such(tiny: TrainConfig, make_job: MakeJob) -> None:
    config = dataclasses.replace(averaged(tiny), eval_batch_size=8)
    whole, job = make_job(config, "whole"), make_job(config, "cut")
    wanted = fit(whole)

    class Stops:
        def __len__(self) -> int:
            return len(job.splits.test)

        def read(self, index: int, draw: Any = None) -> Any:
            job.stop.signal = signal.SIGTERM
            return job.splits.test.read(index)

    with pytest.raises(StoppedError) as caught:
        fit(dataclasses.replace(job, splits=dataclasses.replace(job.splits, test=Stops())))
    assert caught.value.step == 6
    job = make_job(config, "cut")
    found = fit(job)
    assert not different(kept(job.model), kept(whole.model))
    assert not different(found.average.values, wanted.average.values)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_wanted(tiny: TrainConfig, make_job: MakeJob) -> None:
    fit(make_job(tiny, "run"))
    with pytest.raises(InputError, match=r"does not hold what this model needs: missing average/"):
        fit(make_job(averaged(tiny), "run"))


def plain(config: TrainConfig, parallelism: Parallelism) -> TrainConfig:
    """Nothing that ranks draw for themselves."""
    experts = dataclasses.replace(config.model.experts, router=LinearGate(noise=0.0), capacity=Dropless())
    return dataclasses.replace(
        averaged(config),
        bf16=False,
        task=dataclasses.replace(config.task, augment=Augment()),
        model=dataclasses.replace(config.model, drop_path=0.0, experts=experts),
        optim=dataclasses.replace(config.optim, eps=1e-3),
        parallelism=parallelism,
    )


def on_ranks(
    config: TrainConfig, splits: Splits, folder: Path, stop_at: int = -1
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train to the end, after a stop on the way where one is wanted; return scores, and this rank's averages."""
    grid, own = Grid.from_group(dist.group.WORLD), identity(config.task, config.model, splits.facts)

    def job(stop: StopWish) -> Job:
        with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
            model = build_model(config.task, config.model, splits.facts)

        def tell(event: Event) -> None:
            if event.step == stop_at:
                stop.signal = signal.SIGTERM

        return Job(config, model, splits, folder, own, stop, tell, grid)

    if stop_at >= 0:
        with pytest.raises(StoppedError):
            fit(job(StopWish()))
        stop_at = -1
    found = fit(job(StopWish()))
    return dict(found.evaluation.scores.numbers), {name: v.tolist() for name, v in found.average.values.items()}


@pytest.mark.parametrize("gather", [0, 2])
def test_two_ranks_have_the_average_of_one_process_under_any_plan_and_any_number_reads_it(
    tiny: TrainConfig, make_job: MakeJob, tmp_path: Path, gather: int
) -> None:
    config = plain(tiny, Parallelism(adaptive=False, gather=gather))
    alone = fit(make_job(config, "alone"))
    job = make_job(config, "ranks")
    found = run_ranks(on_ranks, 2, config, job.splits, job.folder)
    assert found[0][0] == found[1][0] == pytest.approx(dict(alone.evaluation.scores.numbers), rel=1e-4)
    one, two = (load_trained(tmp_path / name, CATALOG).model.state_dict() for name in ("alone", "ranks"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    trained = load_trained(tmp_path / "ranks", CATALOG, student=True).model.state_dict()
    assert "backbone.stages.1.blocks.1.ffn.experts.up" in different(two, trained)


def test_ranks_that_were_stopped_go_on_with_their_averages_bit_for_bit(tiny: TrainConfig, make_job: MakeJob) -> None:
    config = plain(tiny, Parallelism(adaptive=False, gather=2))
    whole, cut = (make_job(config, name) for name in ("whole", "cut"))
    wanted = run_ranks(on_ranks, 2, config, whole.splits, whole.folder)
    assert run_ranks(on_ranks, 2, config, cut.splits, cut.folder, 8) == wanted
    up = "backbone.stages.1.blocks.1.ffn.experts.up"
    assert wanted[0][1][up] != wanted[1][1][up]  # each rank has its own experts
