"""What training keeps in memory, counted without a run, by tensors that have shapes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from common.recipe import Recipe, Train, denoiser_config, with_world_size
from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoiser, count_parameters
from pipeline.training.deepspeed_config import zero_stage
from pipeline.training.identity import precision
from preprocess.encoding.encoder import PRECISIONS


@dataclass(frozen=True)
class Activations:
    """What the backward pass needs of the forward one, of a batch in one type of numbers."""

    config: DenoiserConfig
    batch: int
    grad_iterations: int
    recomputed: bool  # by activation checkpointing, which keeps the inputs of blocks and iterations, and one in full
    intermediate: bool = False  # an earlier iterate is read out too
    with_growth: bool = False  # the fixed point's growth is measured too
    dtype: torch.dtype = torch.bfloat16
    fused_attention: bool = True  # keeps none of its scores

    @property
    def bytes(self) -> int:
        return self._saved() + (self._one_block() if self.recomputed else 0)

    def _one_block(self) -> int:
        """What one block of DiT saves, or one iteration of FPDM."""
        once = replace(self, grad_iterations=1, recomputed=False, intermediate=False, with_growth=False)
        if self.config.kind == "dit":
            two, one = (replace(once, config=replace(self.config, depth=depth)) for depth in (2, 1))
        else:
            two, one = replace(once, grad_iterations=2), once
        return two._saved() - one._saved()

    def _saved(self) -> int:
        """Bytes that a forward pass saves, each storage once, without the parameters."""
        shape = (self.batch, self.config.in_channels, self.config.input_size, self.config.input_size)
        saved: dict[int, torch.UntypedStorage] = {}
        with self._without_numbers():
            model, latents = Denoiser(self.config), torch.empty(shape)
            zero = torch.zeros(self.batch, dtype=torch.long)
            own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    saved[storage._cdata] = storage
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor):
                model(
                    latents,
                    zero,
                    zero,
                    iterations=(0, self.grad_iterations),
                    activation_checkpointing=self.recomputed,
                    intermediate=int(self.intermediate),
                    with_growth=self.with_growth,
                )
            return sum(storage.nbytes() for storage in saved.values())

    @contextmanager
    def _without_numbers(self) -> Iterator[None]:
        """Tensors in it have shapes alone, in this type. On the meta device attention keeps its scores."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            if self.fused_attention:
                with FakeTensorMode(), torch.device("cpu"):
                    yield
            else:
                with torch.device("meta"):
                    yield
        finally:
            torch.set_default_dtype(before)


def on_a_gpu(recipe: Recipe, ranks: int) -> float:
    """Bytes of one rank's training on a GPU: parameters and all that belongs to them, and the most activations.

    Not counted: the CUDA context, the allocator's fragments, and DeepSpeed's buffers.
    """
    train, config = with_world_size(recipe, ranks).train, denoiser_config(recipe)
    kind = precision(train, on_gpu=True)
    assert train.micro_batch_size is not None
    activations = Activations(
        config,
        train.micro_batch_size,
        train.max_grad_iterations,
        train.activation_checkpointing,
        intermediate=train.intermediate_loss > 0,
        with_growth=train.contraction > 0,
        dtype=PRECISIONS[kind],
    )
    return count_parameters(config) * bytes_a_parameter(train, ranks) + activations.bytes


def bytes_a_parameter(train: Train, ranks: int) -> float:
    """On one rank's GPU: weights and gradients in the training's precision, and in fp32 the weights, Adam's moments and
    averages, which ZeRO divides among the ranks; from stage 2 gradients too, at stage 3 all.
    """
    stage, kind = zero_stage(train, ranks, on_gpu=True), precision(train, on_gpu=True)
    number = PRECISIONS[kind].itemsize
    alone = stage == 0 and kind == "fp32"  # the weights are the fp32 ones themselves
    fp32 = 0 if train.optimizer.offload else 4 * (not alone) + 8 + 4 * len(train.ema.names)
    return (
        number / (ranks if stage == 3 else 1)
        + number / (ranks if stage >= 2 else 1)
        + fp32 / (ranks if stage >= 1 else 1)
    )
