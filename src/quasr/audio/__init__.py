"""From bytes to mel frames, in numpy: decode, chunk, mel. Import the submodule that is needed."""
