"""Speed and memory: our precisions and other programs on the same clips and token counts, in one run."""
