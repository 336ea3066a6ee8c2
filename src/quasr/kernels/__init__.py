"""The operations of the fast decoder: plain torch as the specification, Triton on a GPU, one table that chooses."""
