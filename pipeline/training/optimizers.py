"""The optimizers of `train.optimizer.name`: what each is built of.

What one keeps for each parameter is also in zero.py (MOMENTS, start_moments), over ranks, and in checkpoint_form.py.
"""

import torch

from common.recipe import Train
from fpdm.denoiser import Denoiser
from pipeline.training.identity import precision
from pipeline.training.muon import MuonAdamW


def build_optimizer(train: Train, model: Denoiser) -> torch.optim.Optimizer:
    # The rate of every step is set before it. Until then it is 0: in bf16 at stage 0 DeepSpeed makes the optimizer's
    # state by a step, which would decay the weights.
    settings, rate = train.optimizer, 0.0
    betas, decay = settings.betas, settings.weight_decay
    if settings.name == "adamw":
        # On a CPU torch's default is a loop over the parameters, which takes two and a half times as long. On a GPU it
        # is one call for all already, and the fused update wants its count of steps there too.
        fused = None if torch.cuda.is_available() else True
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=fused)
    assert settings.name == "muon"
    dtype = torch.float32 if precision(train) == "fp32" else torch.bfloat16
    return MuonAdamW(model, lr=rate, betas=betas, weight_decay=decay, dtype=dtype)
