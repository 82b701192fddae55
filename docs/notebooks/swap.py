# %% [markdown]
# # Swap attention in an existing model
#
# A causal model of transformers, made with dense attention, goes on with the paper's patterns: the weights stay.

# %%
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dalle_kernels import Causal, TokenLayout
from dalle_kernels.integrations.transformers import register, register_patterns

layout = TokenLayout(text_length=64, grid=(16, 16))
torch.manual_seed(0)
sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": layout.length, "vocab_size": 512}
config = GPT2Config(**sizes, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
model = GPT2LMHeadModel(config).eval()
tokens = torch.randint(512, (2, layout.length))

# %% [markdown]
# First the pattern that hides nothing: the model must say what it said before.

# %%
register_patterns("all_before", Causal(layout))
with torch.no_grad():
    before = model(tokens).logits
    model.set_attn_implementation("all_before")
    print(f"largest difference of logits {(model(tokens).logits - before).abs().max():.0e}")

# %% [markdown]
# Now the paper's schedule, which is another model: rows, columns, and a convolution at the end. It trains and draws as
# before.

# %%
register(layout)
model.set_attn_implementation("dalle")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: {loss.item():.3f}")

# %%
drawn = model.generate(tokens[:, :64], max_new_tokens=16, do_sample=True, pad_token_id=0)
print(drawn.shape)
