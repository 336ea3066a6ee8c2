"""Weights in 8 and 4 bits.

    scheme (bits, group)  ->  recipe (layer -> scheme)  ->  apply (network -> quantised network)  ->  store (folder)

`linear`, `embedding` and `bitsandbytes` are the layers themselves. `scheme` and `recipe` import no torch.
"""
