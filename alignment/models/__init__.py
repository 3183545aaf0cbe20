"""Models: loading, the packed forward pass, and what makes a module trainable on one or many workers."""
