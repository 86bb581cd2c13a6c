"""GPUs by model, from their makers' data sheets; for plans, the log, and the report's receipt."""

from dataclasses import dataclass
from typing import Literal

Model = Literal["b200", "h200", "h100", "h100-nvl", "h100-pcie", "a100", "l40s", "v100"]


@dataclass(frozen=True)
class GPU:
    """TFLOP/s are of dense products; where a model comes with several memories, the largest."""

    name: str  # part of the name that torch gives
    tflops: float  # of matrix products in bf16, of V100 in fp16
    fp32_tflops: float  # without TF32
    memory_gb: float
    watts: float  # rated power


# A name that holds another one comes before it.
GPUS: dict[Model, GPU] = {
    "b200": GPU("B200", 2250, 75, 180, 1000),
    "h200": GPU("H200", 989, 67, 141, 700),
    "h100-nvl": GPU("H100 NVL", 835, 60, 94, 400),
    "h100-pcie": GPU("H100 PCIe", 756, 51, 80, 350),
    "h100": GPU("H100", 989, 67, 80, 700),
    "a100": GPU("A100", 312, 19.5, 80, 400),
    "l40s": GPU("L40S", 362, 91.6, 48, 350),
    "v100": GPU("V100", 125, 15.7, 32, 300),
}


def named(device: str | None) -> GPU | None:
    """The model of a device by torch's name of it, such as `NVIDIA H100 80GB HBM3`; None for others."""
    return next((gpu for gpu in GPUS.values() if gpu.name in (device or "")), None)
