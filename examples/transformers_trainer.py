"""Fine-tune a transformers MoE model with its Trainer; its experts run on this library's kernels.

python examples/transformers_trainer.py
torchrun --nproc-per-node 2 examples/transformers_trainer.py
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from synchromesh.compat.huggingface import register

SMALL = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True,
)  # fmt: skip


class Counting(Dataset):
    """Sequences that count on from a random number."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index * 7) % 64
        return {"input_ids": tokens, "labels": tokens}


register()  # from here on "synchromesh" is an experts implementation
with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    MixtralForCausalLM(SMALL).save_pretrained(f"{folder}/pretrained")  # stands for a model from the hub
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/pretrained", experts_implementation="synchromesh")
    arguments = TrainingArguments(
        f"{folder}/run",
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting())
    trainer.train()
    if trainer.is_world_process_zero():
        print("loss", [round(float(log["loss"]), 3) for log in trainer.state.log_history if "loss" in log])
