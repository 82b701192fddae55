"""Other projects' weights as safetensors."""
