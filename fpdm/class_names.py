"""Classes by number and by name, as a call of the diffusers pipeline takes them."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fpdm.config import DenoiserConfig

SHOWN = 12  # names in an error


class ClassNames:
    """by_number: names of classes, several of one class separated by commas; numbers: of every single name."""

    def __init__(self, network: DenoiserConfig, id2label: Mapping[int | str, str]) -> None:
        """Raises ValueError for a number that the network has not."""
        self._network = network
        self.by_number = {int(number): name for number, name in id2label.items()}
        for number in self.by_number:
            self._checked(number, "id2label")
        self._numbers: dict[str, list[int]] = {}
        for number, names in self.by_number.items():
            for name in names.split(","):
                self._numbers.setdefault(name.strip(), []).append(number)
        self.numbers = {name: numbers[0] for name, numbers in sorted(self._numbers.items())}

    def number(self, name: str) -> int:
        """Raises ValueError for a name of no class, or of several."""
        numbers = self._numbers.get(name.strip(), [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise ValueError(f"class_labels: {name!r} names the classes {', '.join(map(str, numbers))}; give a number")
        listed = ", ".join(list(self.numbers)[:SHOWN]) + (
            ", ... (pipeline.labels)" if len(self.numbers) > SHOWN else ""
        )
        known = f"there are {listed}" if listed else "no class has a name here; give numbers"
        raise ValueError(f"class_labels: no class is named {name[:100]!r}; {known}")

    def tensor(self, labels: int | str | Sequence[int | str] | Tensor) -> Tensor:
        """(B,) numbers, or (B, condition_dim) vectors as they are.

        Raises ValueError for none, and for what is no class, such as num_classes, which is the null label.
        """
        if self._network.condition_dim is not None:
            return self._vectors(labels)
        values: Any = labels.tolist() if hasattr(labels, "tolist") else labels
        listed = [values] if isinstance(values, str | Integral) else list(values)
        if not listed:
            raise ValueError("class_labels: none; give one per image")
        return torch.tensor([self.number(one) if isinstance(one, str) else self._checked(one) for one in listed])

    def _vectors(self, labels: Any) -> Tensor:
        width = self._network.condition_dim
        if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.shape[1] != width or not len(labels):
            raise ValueError(f"class_labels: this network takes vectors; give a tensor (B, {width})")
        return labels

    def _checked(self, number: Any, name: str = "class_labels") -> int:
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ValueError(f"{name}: {str(number)[:100]!r} is neither a number nor a name of a class")
        if not 0 <= int(number) < self._network.num_classes:
            null = ", which is the null label" if number == self._network.num_classes else ""
            raise ValueError(f"{name}: {number}{null}; the classes are 0..{self._network.num_classes - 1}")
        return int(number)
