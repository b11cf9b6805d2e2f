"""Models written by hand, of which no configuration says what they take: for tests of towers and scopes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and an MLP, each with its norm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def blocks(width: int, number: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block(width) for _ in range(number))


class Encoder(nn.Module):
    """Blocks after a stem that makes ``width`` features of something."""

    def __init__(self, stem: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.norm = stem, blocks(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Patches(nn.Module):
    """Patches of a picture, through a convolution."""

    def __init__(self, width: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class FlatPatches(nn.Module):
    """Patches of a picture that are cut beforehand, (batch, patches, 48), through a linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_size = 4
        self.proj = nn.Linear(3 * self.patch_size**2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Frames(nn.Module):
    """Spectrogram frames, (batch, 80, time), through two convolutions that halve their number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(nn.functional.gelu(self.conv1(x))).transpose(1, 2)


class Decoder(nn.Module):
    """A language model that takes further features before its tokens."""

    def __init__(self, width: int = 64, tokens: int = 99) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(tokens, width), blocks(width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        x = self.embed(x) if before is None else torch.cat([before, self.embed(x)], 1)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


class Composite(nn.Module):
    """A tower, a projection and a language model; nothing says which is which."""

    def __init__(self, tower: nn.Module, width: int = 32, text: int = 64) -> None:
        super().__init__()
        self.a = tower
        self.b = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))
        self.c = Decoder(text)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(x, self.b(self.a(y)))


class Flat(nn.Module):
    """The same without a module around each part."""

    def __init__(self, width: int = 32, text: int = 64) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 4, 4), blocks(width)
        self.c = nn.Linear(width, text)
        self.d, self.e = nn.Embedding(99, text), blocks(text)
        self.f, self.g = nn.LayerNorm(text), nn.Linear(text, 99, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.a(y).flatten(2).transpose(1, 2)
        for block in self.b:
            y = block(y)
        x = torch.cat([self.c(y), self.d(x)], 1)
        for block in self.e:
            x = block(x)
        return self.g(self.f(x))


def rename(model: nn.Module, **names: str) -> nn.Module:
    """Give children of the model other names, in place; its forward no longer works."""
    children = {names.get(name, name): child for name, child in model.named_children()}
    model._modules.clear()
    model._modules.update(children)
    return model
