"""Fast PyTorch operations for DALL-E-style models."""
