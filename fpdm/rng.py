"""Random numbers without state: every value is a function of (seed, stream, index).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
torch's 64-bit integers, so every device draws the same integers. The key is (seed, crc32 of the stream's name), the
counter is (index, block): what index i draws depends neither on its batch nor on what was drawn before.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PERMUTE_ROUNDS = 8
_CHUNK = 1 << 20  # blocks drawn at a time: bounds the 64-bit temporaries

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int | Tensor]) -> Words:
    """Encrypt 128-bit counters: four int64 tensors, each holding unsigned 32-bit words, to four such tensors.

    key: two such words; the second may be a tensor, which broadcasts to the counter's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # The products wrap modulo 2**64, which leaves their 64 bits right; the mask undoes the shift's sign extension.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, stream: str | Tensor, index: Tensor, blocks: Tensor) -> Words:
    """Words of the given blocks of every index: index (B,), blocks (N,) -> four (B, N).

    stream: a name for all, or each index's own `_crcs` (B,).
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed: {seed} is outside 0..2**32-1; choose one inside")
    index = index.to(torch.int64)[:, None].expand(-1, len(blocks))
    blocks = blocks.expand_as(index)
    key = zlib.crc32(stream.encode()) if isinstance(stream, str) else stream[:, None]
    return philox((index & _MASK, (index >> 32) & _MASK, blocks & _MASK, blocks >> 32), (seed, key))


def _crcs(stream: str | Sequence[str], index: Tensor) -> Tensor:
    """(B,) for index (B,), of one name or of B."""
    if isinstance(stream, str):
        return torch.full_like(index, zlib.crc32(stream.encode()))
    return torch.tensor([zlib.crc32(name.encode()) for name in stream], dtype=torch.int64, device=index.device)


def uniform(seed: int, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24.

    Args:
        seed: 0..2**32-1.
        stream: name of the use; streams are independent.
        index: (B,) integers, for example sample numbers.
        shape: shape of what each index draws.

    Returns:
        (B, *shape) float32 on the index's device.

    Raises:
        ValueError: for a seed out of range.
    """
    return _draw(_to_uniform, seed, stream, index, shape)


def normal(seed: int, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers (B, *shape) by the Box-Muller transform; arguments and errors as `uniform`.

    Evaluated in float64 and rounded to float32: the last-bit differences between vectorised and scalar logarithms and
    cosines vanish in the rounding, so an index draws the same bits in whatever batch.
    """
    return _draw(_to_normal, seed, stream, index, shape)


def _draw(convert: Callable[[Words], Tensor], seed: int, stream: str, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    values = math.prod(shape)
    blocks = torch.arange(-(-values // 4), device=index.device)
    rows = max(1, _CHUNK // max(1, len(blocks)))
    parts = [convert(_words(seed, stream, part, blocks)) for part in index.split(rows)]
    return torch.cat(parts)[:, :values].reshape(len(index), *shape)


def _to_uniform(words: Words) -> Tensor:
    """Four (B, N) words to (B, 4N) float32."""
    return ((torch.stack(words, dim=-1) >> 8).float() * 2.0**-24).flatten(1)


def _to_normal(words: Words) -> Tensor:
    """Four (B, N) words to (B, 4N) float32."""
    pairs = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        radius = ((first + 1).double() * 2.0**-32).log_().mul_(-2).sqrt_()  # first + 1: the logarithm needs (0, 1]
        angle = second.double() * (2 * math.pi * 2.0**-32)
        pairs += [(radius * angle.cos()).float(), (radius * angle.sin()).float()]
    return torch.stack(pairs, dim=-1).flatten(1)


def integers(seed: int, stream: str, index: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high), (B,) int64; the bias is below high / 2**63. Errors as `uniform`, or high < 1."""
    if high < 1:
        raise ValueError(f"high: {high} leaves nothing to draw; it must be at least 1")
    words = _words(seed, stream, index, torch.zeros(1, dtype=torch.int64, device=index.device))
    return (((words[0] << 31) | (words[1] >> 1)) % high)[:, 0]


def permute(seed: int, stream: str | Sequence[str], position: Tensor, size: int) -> Tensor:
    """Where each position goes in a pseudo-random permutation of range(size), without ever holding the permutation.

    A Feistel network over pairs (left, right) of range(a) x range(b), with a * b barely above size, and cycle walking:
    what lands outside is sent through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        seed, stream: as in `uniform`; or B names of streams, a permutation each.
        position: (B,) integers in [0, size).
        size: number of elements, at least 1.

    Returns:
        (B,) int64 in [0, size); a bijection of range(size) for each stream.

    Raises:
        ValueError: for a seed or position out of range, or size < 1.
    """
    if size < 1:
        raise ValueError(f"size: {size} has no permutation; it must be at least 1")
    position = position.to(torch.int64)
    if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < size:
        raise ValueError(f"position: {int(position.min())}..{int(position.max())} is outside 0..{size - 1}")
    width = math.isqrt(size - 1) + 1
    crcs = _crcs(stream, position)
    result = _feistel(seed, crcs, position, -(-size // width), width)
    while (outside := result >= size).any():
        result[outside] = _feistel(seed, crcs[outside], result[outside], -(-size // width), width)
    return result


def _feistel(seed: int, stream: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    left, right = value // width, value % width
    for number in range(_PERMUTE_ROUNDS):
        block = torch.tensor([number], device=value.device)
        if number % 2:
            right = (right + _words(seed, stream, left, block)[0][:, 0]) % width
        else:
            left = (left + _words(seed, stream, right, block)[0][:, 0]) % height
    return left * width + right
