"""Checkpoints written tensor by tensor as the released training script writes them, from a model of plain torch."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from synchromesh import Dropless, Grid, Sharded, routing_options
from synchromesh.compat.swin import load_swin, read_classes, read_swin, save_swin
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import CosineGate, ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SWIN_MOE, SWIN_V2, SwinV2Config
from synchromesh.models.swin_v2_moe import swin_v2_moe
from synchromesh.parallel.parallelize import distribute
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

State = dict[str, Tensor]
CONFIG = SwinV2Config(
    image_size=32, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path=0.0, style=SWIN_MOE
)
EXPERTS = ExpertsConfig(num_experts=4, k=2, blocks=((), (0, 1)), dropout=0.0)
LAYERS = [f"layers.1.blocks.{block}.mlp._moe_layer." for block in (0, 1)]
PRIVATE = ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias")
CLASSES = 5


class CfgNode(dict):
    """Stands for the configuration that training files hold."""


def released_state(*, experts: int = 4, cosine: bool = False, output_bias: bool = False) -> State:
    """Random tensors under the released names, experts whole; the output bias of experts is always there."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,)}
    shapes |= {"layers.0.downsample.reduction.weight": (16, 32), "head.weight": (CLASSES, 16), "head.bias": (CLASSES,)}
    norms = {"patch_embed.norm": 8, "layers.0.downsample.norm": 32, "norm": 16}
    for stage, width, heads in ((0, 8, 2), (1, 16, 4)):
        for block in (0, 1):
            at = f"layers.{stage}.blocks.{block}."
            norms |= {f"{at}norm1": width, f"{at}norm2": width}
            shapes |= {f"{at}attn.qkv.weight": (3 * width, width), f"{at}attn.qkv.bias": (3 * width,)}
            shapes |= {f"{at}attn.proj.weight": (width, width), f"{at}attn.proj.bias": (width,)}
            shapes |= {f"{at}attn.cpb_mlp.0.weight": (512, 2), f"{at}attn.cpb_mlp.0.bias": (512,)}
            shapes |= {f"{at}attn.cpb_mlp.2.weight": (heads, 512)}
            if stage == 0:
                shapes |= {f"{at}mlp.fc1.weight": (32, 8), f"{at}mlp.fc1.bias": (32,), f"{at}mlp.fc2.weight": (8, 32)}
                shapes |= {f"{at}mlp.fc2.bias": (8,)} if output_bias else {}
    for layer in LAYERS:
        shapes |= {f"{layer}experts.batched_{name}": (experts, 64, 16) for name in ("fc1_w", "fc2_w")}
        shapes |= {f"{layer}experts.batched_fc1_bias": (experts, 64), f"{layer}experts.batched_fc2_bias": (experts, 16)}
        if cosine:
            shapes |= {
                f"{layer}gates.0.cosine_projector.weight": (6, 16),
                f"{layer}gates.0.cosine_projector.bias": (6,),
            }
            shapes |= {f"{layer}gates.0.sim_matrix": (6, experts), f"{layer}gates.0.temperature": (1,)}
        else:
            shapes |= {f"{layer}gates.0.wg.weight": (experts, 16)}
    shapes |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
    state = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    if not output_bias:
        state |= {name: torch.zeros_like(t) for name, t in state.items() if name.endswith("batched_fc2_bias")}
    return state


def released_logits(state: State, images: Tensor, *, window: int = 4, pretrained: int = 4) -> Tensor:
    """The released model in evaluation, every expert with room for all, pair by pair in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attend(x: Tensor, name: str, heads: int, side: int, shift: int) -> Tensor:
        place = torch.cartesian_prod(torch.arange(x.shape[1]), torch.arange(x.shape[2]))
        cell = (place + side - shift) // side if shift else place // side
        apart = (cell[:, None] != cell[None, :]).any(-1)
        offset = 8 * (place[:, None] - place[None, :]).double() / (pretrained - 1)
        spaced = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
        bias = linear(F.relu(linear(spaced, f"{name}.cpb_mlp.0")), f"{name}.cpb_mlp.2").permute(2, 0, 1)
        q, k, v = linear(x.flatten(1, 2), f"{name}.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        y = scores.masked_fill(apart, -math.inf).softmax(-1) @ v
        return linear(y.transpose(1, 2).reshape(x.shape), f"{name}.proj")

    def mixture(x: Tensor, name: str) -> Tensor:
        if f"{name}gates.0.sim_matrix" in state:
            gate = f"{name}gates.0."
            cosine = F.normalize(linear(x, f"{gate}cosine_projector"), dim=-1)
            logits = cosine @ F.normalize(state[f"{gate}sim_matrix"], dim=0)
            logits = logits * state[f"{gate}temperature"].clamp(max=math.log(100)).exp()
        else:
            logits = F.linear(x, state[f"{name}gates.0.wg.weight"])
        scores, chosen = logits.softmax(-1).topk(EXPERTS.k, dim=-1)
        up, up_bias, down, down_bias = (
            state[f"{name}experts.batched_{each}"] for each in ("fc1_w", "fc1_bias", "fc2_w", "fc2_bias")
        )
        hidden = F.gelu(torch.einsum("...d,efd->...ef", x, up) + up_bias)
        each = torch.einsum("...ef,efd->...ed", hidden, down) + down_bias
        picked = each.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (scores[..., None] * picked).sum(-2)

    x = F.conv2d(images.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    for stage, heads in ((0, 2), (1, 4)):
        side = min(window, x.shape[1])
        for block in (0, 1):
            name = f"layers.{stage}.blocks.{block}."
            shift = side // 2 if block and x.shape[1] > side else 0
            x = x + attend(norm(x, f"{name}norm1"), f"{name}attn", heads, side, shift)
            y = norm(x, f"{name}norm2")
            if f"{name}mlp.fc1.weight" in state:
                x = x + linear(F.gelu(linear(y, f"{name}mlp.fc1")), f"{name}mlp.fc2")
            else:
                x = x + mixture(y, f"{name}mlp._moe_layer.")
        if stage == 0:
            x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
            x = linear(norm(x, "layers.0.downsample.norm"), "layers.0.downsample.reduction")
    return linear(norm(x, "norm").mean((1, 2)), "head")


def of_rank(state: State, rank: int, world: int) -> State:
    """What a rank's model holds: whole experts, or one of the shards of one."""
    own = dict(state)
    for name, whole in state.items():
        if ".experts." not in name:
            continue
        if whole.shape[0] >= world:
            own[name] = whole.chunk(world)[rank].clone()
        else:
            shards = world // whole.shape[0]
            size = -(-whole.shape[1] // shards)  # the last part of a bias is padded
            padded = torch.cat(
                [whole, whole.new_zeros(len(whole), size * shards - whole.shape[1], *whole.shape[2:])], 1
            )
            first = rank % shards * size
            own[name] = padded[rank // shards][None, first : first + size].clone()
    return own


def write_as_released(
    folder: Path,
    state: State,
    world: int,
    *,
    everything: bool = False,
    old: bool = False,
    trained: tuple[str, ...] = PRIVATE,
) -> Path:
    """Write the files of all ranks; `trained` names the parameters that count as a rank's own."""
    path = folder / "ckpt_epoch_final.pth"
    for rank in range(world):
        own = of_rank(state, rank, world)
        for stage, side in ((0, 4), (1, 4)):
            for block in (0, 1):
                at = f"layers.{stage}.blocks.{block}."
                own[f"{at}attn.relative_coords_table"] = torch.randn(1, 2 * side - 1, 2 * side - 1, 2)
                own[f"{at}attn.relative_position_index"] = torch.zeros(side**2, side**2, dtype=torch.int64)
        own["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
        if old:
            own = {name: t[:, None] if t.dim() == 2 and name.endswith("_bias") else t for name, t in own.items()}
        else:
            own |= {
                f"{layer}_num_global_experts": torch.tensor(len(state[f"{LAYERS[0]}experts.batched_fc1_w"]))
                for layer in LAYERS
            }
        private = {name for name in own if name.endswith(trained) and ".experts." in name}
        if everything:
            config = CfgNode(MODEL=CfgNode(NAME="swin_moe"))
            torch.save({"model": own, "epoch": 3, "max_accuracy": 0.5, "config": config}, f"{path}.rank{rank}")
            continue
        torch.save({"model": {name: t for name, t in own.items() if name in private}}, f"{path}.rank{rank}")
        if rank == 0:
            torch.save({"model": {name: t for name, t in own.items() if name not in private}}, f"{path}.master")
    return path


def ours(**changes: object) -> Classifier:
    return swin_v2_moe(CONFIG, CLASSES, experts=dataclasses.replace(EXPERTS, **changes)).double().eval()


def check_logits(model: Classifier, state: State, **how: int) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with routing_options(model, capacity=Dropless()), torch.no_grad():
        got = model(images)
    wanted = released_logits(state, images, **how)
    assert (got - wanted).norm() < 2e-6 * wanted.norm()  # the gate computes in float32, the coordinates are kept in it


HOW = {"experts only": {}, "everything": {"everything": True}, "old Tutel": {"old": True}}


@pytest.mark.parametrize(("world", "how"), [(2, "experts only"), (8, "everything"), (8, "old Tutel")])
def test_files_give_the_released_logits(tmp_path, world, how):
    state = released_state()
    path = write_as_released(tmp_path, state, world, **HOW[how])
    model = ours()
    load_swin(model, path)
    check_logits(model, state)
    again = ours()
    again.load_state_dict(read_swin(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("how", HOW)
def test_files_of_any_number_of_ranks_hold_the_same(tmp_path, world, how):
    state = released_state()
    torch.save(state, tmp_path / "whole.pth")
    wanted = read_swin(tmp_path / "whole.pth")
    got = read_swin(write_as_released(tmp_path, state, world, **HOW[how]))
    assert set(got) == set(wanted) == set(ours().state_dict())
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_output_biases_and_cosine_routers_are_read(tmp_path):
    state = released_state(cosine=True, output_bias=True)
    path = write_as_released(tmp_path, state, 8, trained=(*PRIVATE, "batched_fc2_bias"))
    model = ours(router=CosineGate(dim=6), down_bias=True)
    load_swin(model, path)
    check_logits(model, state)


def test_a_shared_expert_of_odd_width_has_a_padded_bias(tmp_path):
    """16 numbers on 3 ranks are stored as 6 + 6 + 4, and two of padding."""
    state = {
        name: t
        for name, t in released_state(experts=1, output_bias=True).items()
        if "layers.1.blocks.1.mlp" not in name
    }
    state = {name: t[:, :63] if ".experts." in name and t.shape[1] == 64 else t for name, t in state.items()}
    path = tmp_path / "ckpt.pth"
    for rank in range(3):
        torch.save({"model": of_rank(state, rank, 3)}, f"{path}.rank{rank}")
    bias = state[f"{LAYERS[0]}experts.batched_fc2_bias"]
    assert torch.equal(read_swin(path)["backbone.stages.1.blocks.0.ffn.experts.down_bias"], bias)


def test_one_file_that_holds_everything_is_read_by_its_own_name(tmp_path):
    state = released_state()
    torch.save({"model": state}, tmp_path / "one.pth.global")
    torch.save(state, tmp_path / "gathered.pth")
    whole = read_swin(tmp_path / "one.pth")
    for path in (tmp_path / "one.pth.global", tmp_path / "gathered.pth"):
        for name, tensor in read_swin(path).items():
            assert torch.equal(tensor, whole[name])


def test_an_output_bias_that_the_model_lacks_must_be_zero(tmp_path):
    state = released_state(output_bias=True)
    path = write_as_released(tmp_path, state, 1)
    with pytest.raises(ValueError, match="has no"):
        load_swin(ours(), path)
    frozen = write_as_released(tmp_path, state, 2)  # the frozen bias of rank 0 alone is no bias of all experts
    with pytest.raises(ValueError, match=r"2 parts of .*down_bias on 2 ranks, wanted 4 of 4 experts"):
        read_swin(frozen)


def test_a_model_of_another_window_keeps_the_positions_of_pretraining(tmp_path):
    state = released_state()
    path = write_as_released(tmp_path, state, 2)
    wider = dataclasses.replace(CONFIG, window_size=8, pretrained_window_sizes=(4, 4))
    model = swin_v2_moe(wider, CLASSES, experts=EXPERTS).double().eval()
    load_swin(model, path)
    check_logits(model, state, window=8)


def test_a_head_for_other_classes_is_taken_by_index_or_starts_at_zero(tmp_path):
    state = released_state()
    path = write_as_released(tmp_path, state, 2)
    model = swin_v2_moe(CONFIG, 3, experts=EXPERTS)
    (tmp_path / "map.txt").write_text("4\n0\n2\n")
    load_swin(model, path, classes=read_classes(tmp_path / "map.txt"))
    assert torch.equal(model.head.weight, state["head.weight"][[4, 0, 2]])
    assert torch.equal(model.head.bias, state["head.bias"][[4, 0, 2]])
    with pytest.warns(UserWarning, match="a head of 5 classes, this model has 3: its head starts at zero"):
        load_swin(model, path)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    with pytest.raises(ValueError, match="got 3 classes, up to 9"):
        load_swin(model, path, classes=[4, 0, 9])
    (tmp_path / "map.txt").write_text("n01440764\n")
    with pytest.raises(ValueError, match="class number"):
        read_classes(tmp_path / "map.txt")


def without(end: str) -> Callable[[Path], None]:
    return lambda path: Path(f"{path}.{end}").unlink()


WRONG = {
    "a rank's file is missing": (without("rank1"), "rank1 is missing"),
    "the last rank's file is missing": (without("rank3"), "holds 3 parts of .* on 3 ranks, wanted 4 of 4 experts"),
    "the shared file is missing": (without("master"), "no router: wanted ckpt_epoch_final.pth.master"),
    "no state": (lambda path: torch.save([1], f"{path}.rank0"), "holds no state dict"),
    "no tensors": (lambda path: torch.save({"model": {"a": 1}}, f"{path}.rank0"), "rank0 .*got int for 'a', wanted"),
    "tables of the first Swin": (
        lambda path: torch.save(
            {"model": {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(49, 2)}}, f"{path}.master"
        ),
        "no tensor 'layers.0.blocks.0.attn.relative_position_bias_table': tables",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_refused_by_name_and_change_nothing(tmp_path, wrong):
    path = write_as_released(tmp_path, released_state(), 4)
    change, message = WRONG[wrong]
    change(path)
    model = ours()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_swin(model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_model_is_refused_by_the_names_that_differ(tmp_path):
    path = write_as_released(tmp_path, released_state(), 4)
    model = ours(num_experts=8)
    before = model.head.weight.clone()
    with pytest.raises(
        ValueError, match=r"does not fit the model: .*router.weight has shape \(4, 16\), wanted \(8, 16\)"
    ):
        load_swin(model, path)
    with pytest.raises(ValueError, match="is missing"):
        load_swin(ours(down_bias=True), path)
    assert torch.equal(model.head.weight, before)


def test_the_number_of_experts_must_agree(tmp_path):
    state = released_state()
    state[f"{LAYERS[0]}_num_global_experts"] = torch.tensor(8)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="has 8 experts, its router has 4"):
        read_swin(tmp_path / "file.pth")


FC1, ROUTER = f"{LAYERS[0]}experts.batched_fc1_w", f"{LAYERS[0]}gates.0."
DAMAGED = {
    "a matrix is missing": ({FC1: None}, r"experts\.up is missing, wanted \[experts, hidden, width\]"),
    "a matrix is flat": ({FC1: torch.ones(4)}, r"experts\.up is of shape \(4,\), wanted \[experts"),
    "a bias is flat": ({FC1.replace("_w", "_bias"): torch.ones(4)}, r"up_bias has parts of shapes \[\(4,\)\]"),
    "the router is flat": ({f"{ROUTER}wg.weight": torch.tensor(1.0)}, r"router of .* has shape \(\), wanted a row"),
    "directions": ({f"{ROUTER}wg.weight": None, f"{ROUTER}sim_matrix": torch.ones(1, 2, 3)}, r"has shape \(1, 2, 3\)"),
    "two temperatures": ({f"{ROUTER}temperature": torch.ones(2)}, "the model has no .*router.log_scale"),
    "a head without rows": ({"head.bias": torch.tensor(1.0)}, r"head\.bias has shape \(\), wanted \(5,\)"),
    "a number as a name": ({7: torch.ones(2)}, "has the key 7 in its state dict, wanted names"),
    "two counts": ({f"{LAYERS[0]}_num_global_experts": torch.ones(2)}, r"'layers.*shape \(2,\), wanted one whole"),
    "no count": ({f"{LAYERS[0]}_num_global_experts": torch.tensor(math.nan)}, "is no number of experts"),
    "a sparse tensor": ({"norm.bias": torch.eye(2).to_sparse()}, "got .*sparse.* for 'norm.bias', wanted a dense"),
    "complex numbers": ({"norm.bias": torch.ones(2) * 1j}, "complex.*(where the file is|where it is) trusted"),
}


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused_by_name(tmp_path, damaged, zipped):
    changes, message = DAMAGED[damaged]
    state = {name: value for name, value in (released_state() | changes).items() if value is not None}
    torch.save(state, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"(?i)file\.pth.*{message}"):
        load_swin(ours(), tmp_path / "file.pth")


def test_parts_of_ranks_must_make_whole_experts_of_one_shape(tmp_path):
    path = write_as_released(tmp_path, released_state(), 2)
    state = torch.load(f"{path}.rank1", weights_only=True)["model"]
    torch.save(state | {FC1: state[FC1][:, :3]}, f"{path}.rank1")
    with pytest.raises(ValueError, match=r"parts of shapes \[\(2, 3, 16\), \(2, 64, 16\)\], wanted 3 dims, equal"):
        read_swin(path)
    for rank in range(6):
        torch.save({name: tensor[:1] for name, tensor in state.items()}, f"{path}.rank{rank}")
    with pytest.raises(ValueError, match=r"holds 6 parts of .* on 6 ranks, wanted"):
        read_swin(path)


@pytest.mark.parametrize("world", [1, 2, 8, 16])
@pytest.mark.parametrize(("cosine", "everything"), [(False, False), (True, False), (False, True)])
def test_what_is_written_is_what_the_release_writes(tmp_path, world, cosine, everything):
    biased = cosine
    state = released_state(cosine=cosine, output_bias=biased)
    wanted_path = write_as_released(
        tmp_path, state, world, everything=everything, trained=(*PRIVATE, "fc2_bias") if biased else PRIVATE
    )
    model = ours(router=CosineGate(dim=6) if cosine else LinearGate(), down_bias=biased).float()
    load_swin(model, wanted_path)
    written = save_swin(model, tmp_path / "ours.pth", ranks=world, everything=everything)
    assert len(written) == world + (not everything)
    for file in written:
        got = torch.load(file, weights_only=True)["model"]
        wanted = torch.load(f"{wanted_path}{file.suffix}", weights_only=False)["model"]
        derived = ("relative_coords_table", "relative_position_index", "attn_mask")
        wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith(derived)}
        assert set(got) == set(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name


def test_dense_and_true_swin_v2_go_there_and_back(tmp_path):
    for number, style in enumerate((SWIN_MOE, SWIN_V2)):
        model = Classifier(dataclasses.replace(CONFIG, style=style).build(), CLASSES)
        (file,) = save_swin(model, tmp_path / f"{number}.pth")
        assert file.suffix == ".global"
        other = Classifier(dataclasses.replace(CONFIG, style=style).build(), CLASSES)
        load_swin(other, tmp_path / f"{number}.pth")
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def test_nothing_is_overwritten_and_what_cannot_be_cut_is_refused(tmp_path):
    model = ours()
    save_swin(model, tmp_path / "a.pth", ranks=2)
    with pytest.raises(ValueError, match="exists"):
        save_swin(model, tmp_path / "a.pth", ranks=2)
    with pytest.raises(ValueError, match="4 experts to write for 3 ranks"):
        save_swin(model, tmp_path / "b.pth", ranks=3)
    with pytest.raises(ValueError, match="hidden width 64 to cut into 128 parts"):
        save_swin(model, tmp_path / "b.pth", ranks=512)
    with pytest.raises(ValueError, match=r"ffn\.router sees the places of tokens, .* wanted places=0"):
        save_swin(ours(router=LinearGate(places=2)), tmp_path / "b.pth")
    assert [file.name for file in tmp_path.glob("b.pth*")] == []


def ranks_load_and_write(folder: Path) -> None:
    grid = Grid.from_group(dist.group.WORLD)
    model, whole = ours(num_experts=2).float(), ours(num_experts=2)
    distribute(model, grid, strategy=lambda: Sharded(grid))
    for each in (model, whole):
        load_swin(each, folder / "ckpt_epoch_final.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), routing_options(model, capacity=Dropless()), routing_options(whole, capacity=Dropless()):
        assert_close("logits", model(images), whole(images.double()).float())
    save_swin(model, folder / "again.pth")
    with pytest.raises(ValueError, match="spread over"):
        save_swin(model, folder / "other.pth", ranks=3)


def test_ranks_read_their_part_of_files_of_other_ranks_and_write_their_own(tmp_path):
    """Files of 8 ranks, 4 to an expert; read by 4 ranks, 2 to an expert."""
    path = write_as_released(tmp_path, released_state(experts=2), 8)
    run_ranks(ranks_load_and_write, 4, tmp_path)
    wanted = read_swin(path)
    for name, tensor in read_swin(tmp_path / "again.pth").items():
        assert torch.equal(tensor, wanted[name]), name
    assert len(list(tmp_path.glob("again*"))) == 4 + 1
