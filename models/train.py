"""Train a small network on Fashion-MNIST and export it: `python -m octavo.models.train resnet OUT`.

Needs the extra `torch` and Debian's dataset-fashion-mnist; takes minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch.nn import functional

from octavo.models import fashion, networks
from octavo.models.export import to_onnx

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 128
PEAK_RATE = {"vit": 1.5e-3}
DEFAULT_PEAK_RATE = 3e-3


def fit(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, peak_rate: float) -> None:
    """Train in place: AdamW, one-cycle rate, mirrored images, smoothed labels.

    `images` is float32 `[n, 1, 28, 28]`, `labels` int64 `[n]`.
    """
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), peak_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, steps, pct_start=0.15)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            batch = images[chosen]
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            loss = functional.cross_entropy(network(batch), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label."""
    network.eval()
    predicted = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return (predicted == labels).float().mean().item()


def main(kind: str, out: Path, epochs: int = 4, seed: int = 0) -> None:
    """Train KIND (lstm, mobile, resnet, vit) and write it to OUT.

    BatchNormalization is kept in the file. The result depends on the processor's arithmetic.
    """
    torch.manual_seed(seed)
    network = networks.build(kind)
    images, labels = (torch.from_numpy(part("train")) for part in (fashion.images, fashion.labels))
    fit(network, images, labels, epochs, PEAK_RATE.get(kind, DEFAULT_PEAK_RATE))
    images, labels = (torch.from_numpy(part("t10k")) for part in (fashion.images, fashion.labels))
    typer.echo(f"{kind}: accuracy {accuracy(network, images, labels):.4f} on {len(images)} images")
    to_onnx(network, {"input": images[:2]}, "logits", out, keep_norms=True)


if __name__ == "__main__":
    typer.run(main)
