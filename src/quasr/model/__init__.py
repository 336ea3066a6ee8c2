"""The whole network in plain PyTorch; `config` alone imports no torch."""
