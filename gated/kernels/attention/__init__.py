"""The attention contract and its backends: cuDNN, splash, blocks, the reference."""
