"""Token sampling by the CUDA kernel of csrc/sampling/sample.cu."""

from __future__ import annotations

import torch

from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.noise import packed
from dalle_kernels.sampling.contract import Inputs, Outputs


def refuse(call: Call) -> str | None:
    return cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16, torch.float32))


def forward(inputs: Inputs) -> Outputs:
    logits, unconditional, guidance_scale, temperature, top_k, top_p, seed, row_offset = inputs
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        key = packed(seed, row_offset, logits.device)
        cuda_library.operations().sample_tokens(
            logits, unconditional, guidance_scale, temperature, top_k, top_p, key, tokens
        )
    return Outputs(tokens)
