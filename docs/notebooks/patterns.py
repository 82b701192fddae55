# %% [markdown]
# # Draw patterns
#
# A pattern is cheap and holds no matrix: it can be asked what it shows before anything is computed.

# %%
from pathlib import Path

from IPython.display import Image

from dalle_kernels import Column, Convolution, Neighborhood, Row, TokenLayout

layout = TokenLayout(text_length=16, grid=(12, 12))
print(Row(layout).show())

# %% [markdown]
# Any two of one length compose. Here each cell sees its column and the cells around it:

# %%
pattern = Column(layout) | Convolution(layout, kernel_size=3, boundary="clamp")
print(pattern.show())

# %% [markdown]
# `plot` draws the mask, the tiles that kernels walk, and one query's keys.

# %%
Image(pattern.plot(Path("pattern.png")).read_bytes())

# %% [markdown]
# A neighbourhood of a larger grid shows what an order of tokens is for: in raster order, a query's keys lie in as many
# tiles as the window has rows; walked in blocks, in few.

# %%
Image(Neighborhood((48, 48), window=9).plot(Path("neighborhood.png")).read_bytes())
