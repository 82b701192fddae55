# %% [markdown]
# # Train a dVAE on 100 pictures
#
# One hundred small drawings, a discrete VAE of the reference model, and a few hundred steps on one core.

# %%
import math

import torch
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.evaluate import psnr
from matplotlib import pyplot


def drawing(number: int, side: int = 16) -> torch.Tensor:
    """A disc of one colour on a gradient of two others: [3, side, side] in 0..1."""
    chance = torch.Generator().manual_seed(number)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    (x, y), radius = torch.randint(4, side - 4, (2,), generator=chance), 2 + 3 * torch.rand((), generator=chance)
    first, second, disc = torch.rand(3, 3, 1, 1, generator=chance)
    ground = first + (second - first) * (row / side)
    return torch.where((row - y) ** 2 + (column - x) ** 2 < radius**2, disc, ground)


pictures = torch.stack([drawing(number) for number in range(100)])

# %%
torch.manual_seed(0)
model = DiscreteVAE(DVAEConfig(resolution=16, width=16, groups=3, blocks=1, vocab=256, code_width=32, least_log_b=-2.0))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
steps, losses = 200, []
for step in range(steps):
    batch = pictures[torch.randint(100, (16,))]
    temperature = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
    output = model(batch, temperature, seed=step)
    loss = output.nll + 0.1 * output.kl
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"{len(model.encode(pictures).unique())} of 256 codes in use")

# %%
figure, axis = pyplot.subplots(figsize=(6, 2.5), layout="constrained")
axis.plot(losses)
axis.set(xlabel="step", ylabel="nats a pixel and channel")
pyplot.show()

# %% [markdown]
# Above eight of the pictures, below what 4 x 4 tokens keep of each.

# %%
kept = model.decode(model.encode(pictures))
print(f"{psnr(pictures, kept):.1f} dB")
both = torch.cat([torch.cat(list(row), 2) for row in (pictures[:8], kept[:8])], 1)
pyplot.figure(figsize=(8, 2), layout="constrained")
pyplot.imshow(both.permute(1, 2, 0))
pyplot.axis("off")
pyplot.show()
