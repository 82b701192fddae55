"""A small, readable DALL-E built from nothing but `dalle_kernels` and PyTorch.

To read it from picture to picture: `dvae` (pictures to tokens and back), `transformer` (captions and tokens as one
stream), `train` (both stages, on `loop`), `generate` (tokens drawn one after the other), `clip` (the judge of what was
drawn). Then the relatives: `pixels` (Sparse Transformers and Image GPT), `unclip` and `prior` (DALL-E 2), on
`train_family`.
"""
