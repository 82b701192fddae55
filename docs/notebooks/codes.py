# %% [markdown]
# # A quantiser of 262,144 codes
#
# 2^18 codes, for 1,024 rows at a time. The table of every row against every code would be 1 GB, and as much again for
# its gradient; none of the three ways below makes it.

# %%
import resource

import torch

from dalle_kernels import binary_entropy, binary_quantize, code_statistics, vq_lookup

codes, width, rows = 2**18, 16, 1024
torch.manual_seed(0)
features = torch.randn(rows, width, requires_grad=True)
codebook = torch.randn(codes, width, requires_grad=True)
print(f"a table of {rows} x {codes} floats has {rows * codes * 4 / 2**30:.0f} GB")

# %% [markdown]
# **The nearest code**, with the straight-through gradient; the squared distance trains both sides.

# %%
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
latents, indices, distance = vq_lookup(features, codebook)
(latents.square().mean() + distance.mean()).backward()
print(f"{len(indices.unique())} codes chosen by {rows} rows")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(f"memory grew by {grown:.0f} MB, of which {2**18 * width * 4 / 2**20:.0f} are the codebook's gradient")

# %% [markdown]
# **An EMA codebook** needs how many rows chose each code, and their sums.

# %%
counts, sums = code_statistics(features.detach(), indices, codes)
print(int(counts.sum()), tuple(sums.shape))

# %% [markdown]
# **No codebook at all**: 18 signs are a number below 2^18. The entropies over all codes are exact.

# %%
bits = torch.randn(rows, 18, requires_grad=True)
latents, indices = binary_quantize(bits)
of_rows, of_mean, distribution = binary_entropy(bits)
(of_rows - of_mean).backward()
print(f"{distribution.numel():,} codes; rows have {of_rows:.2f} nats, their mean {of_mean:.2f} of {18 * 0.6931:.2f}")
