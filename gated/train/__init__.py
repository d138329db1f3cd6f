"""One optimizer step: the losses, the gradients, the optimizer and its guard."""
