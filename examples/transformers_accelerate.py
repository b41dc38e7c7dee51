"""Fine-tune a transformers MoE model under accelerate, with its experts spread over the ranks.

python examples/transformers_accelerate.py
torchrun --nproc-per-node 2 examples/transformers_accelerate.py
"""

import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from synchromesh import Grid, clip_grad_norm
from synchromesh.compat.huggingface import full_state_dict, parallelize_experts

SMALL = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip

accelerator = Accelerator(cpu=not torch.cuda.is_available())
grid = Grid.from_group(dist.group.WORLD) if dist.is_initialized() else Grid(None)
torch.manual_seed(0)  # all ranks begin with the same weights
model = Qwen3MoeForCausalLM(SMALL)
parallelize_experts(model, grid)  # before the optimizer; each layer finds its best plan itself
print(f"rank {grid.rank} holds {sum(p.numel() for p in model.parameters()):,} parameters")

tokens = (torch.arange(16) + torch.arange(512)[:, None] * 7) % 64
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
run, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tokens, batch_size=16, shuffle=True))
for step, batch in enumerate(loader):
    loss = run(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    clip_grad_norm(model, grid, 1.0)  # not accelerate's: one norm over all ranks, each expert counted once
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(f"step {step:2d} on {grid.size} ranks  loss {loss.item():.3f}")

whole = full_state_dict(model, grid)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, state_dict=whole, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        again = AutoModelForCausalLM.from_pretrained(folder)
        print(f"saved and loaded {sum(p.numel() for p in again.parameters()):,} parameters")
accelerator.end_training()
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
