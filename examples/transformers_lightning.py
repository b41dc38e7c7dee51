"""Fine-tune a transformers MoE model with Lightning's Trainer; its experts run on this library's kernels.

python examples/transformers_lightning.py
python examples/transformers_lightning.py 2
"""

import sys

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import OlmoeConfig, OlmoeForCausalLM

from synchromesh.compat.huggingface import register

SMALL = OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
)  # fmt: skip


class FineTuning(lightning.LightningModule):
    """Next-token loss of a causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = OlmoeForCausalLM(SMALL)
        self.model.set_experts_implementation("synchromesh")

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        if index % 5 == 0 and self.global_rank == 0:
            print(f"step {index:2d}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(ranks: int) -> None:
    register()
    lightning.seed_everything(0, verbose=False)
    tokens = (torch.arange(16) + torch.arange(512)[:, None] * 7) % 64
    trainer = lightning.Trainer(
        accelerator="auto", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(FineTuning(), DataLoader(tokens, batch_size=16, shuffle=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
